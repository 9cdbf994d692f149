//! nf_tables messages. Numbers are from linux/netfilter/nf_tables.h; all of them go big-endian.

use crate::filter::model::{Chain, Compare, DataType, Expression, Map, Rule, Table};
use keel_sys::netlink::wire::{Writer, flag};
use keel_sys::netlink::{Netlink, NetlinkError};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
pub(crate) const NFPROTO_UNSPEC: u8 = 0;
pub(crate) const NFPROTO_INET: u8 = 1;

pub(crate) const NEWTABLE: u16 = 0;
pub(crate) const DELTABLE: u16 = 2;
pub(crate) const NEWCHAIN: u16 = 3;
pub(crate) const NEWRULE: u16 = 6;
pub(crate) const NEWSET: u16 = 9;
pub(crate) const NEWSETELEM: u16 = 12;

/// A nested list is limited to 64 KiB by its 16-bit length; one element takes about 50 bytes.
const ELEMENTS_PER_MESSAGE: usize = 1000;

const NFT_SET_MAP: u32 = 8;
const NF_ACCEPT: u32 = 1;
const NF_DROP: u32 = 0;
const NFT_JUMP: u32 = (-3i32) as u32;
const NFT_NAT_DNAT: u32 = 1;
const NFPROTO_IPV4: u32 = 2;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_FLAG_DADDR: u32 = 2;
const CT_KEY_STATUS: u32 = 2;

pub(crate) const TABLE_FLAG_OWNER: u32 = 2;
pub(crate) const TABLE_FLAG_PERSIST: u32 = 4;

/// Types inside user data, by which `nft` finds what it shows.
pub(crate) const COMMENT: u8 = 0;
const KEY_BYTE_ORDER: u8 = 0;
const DATA_BYTE_ORDER: u8 = 1;
const BIG_ENDIAN: u32 = 2;

pub(crate) fn message_type(kind: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | kind
}

/// nfgenmsg.
pub(crate) fn family_header(w: &mut Writer, family: u8, resource: u16) {
    w.raw(&[family, 0]);
    w.raw(&resource.to_be_bytes());
}

/// A transaction: all of it happens, or nothing.
pub(crate) struct Batch<'s> {
    socket: &'s mut Netlink,
    writer: Writer,
    sent: Vec<(u32, String)>,
}

impl<'s> Batch<'s> {
    pub(crate) fn new(socket: &'s mut Netlink, doing: &str) -> Batch<'s> {
        let mut batch = Batch { socket, writer: Writer::default(), sent: Vec::new() };
        batch.delimiter(BATCH_BEGIN, doing);
        batch
    }

    pub(crate) fn delete_table(&mut self, name: &str) {
        self.message(DELTABLE, 0, format!("remove the packet-filter table {name}"), |w| w.string(1, name));
    }

    pub(crate) fn add_table(&mut self, table: &Table, flags: u32, comment: &str) {
        let name = table.name.as_str();
        self.message(NEWTABLE, flag::CREATE, format!("create the packet-filter table {name}"), |w| {
            w.string(1, name);
            w.be32(2, flags);
            w.attribute(6, &user_text(comment));
        });
        for map in &table.maps {
            self.add_map(name, map);
        }
        for chain in &table.chains {
            self.add_chain(name, chain);
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                self.add_rule(name, chain.name, rule);
            }
        }
    }

    /// Sends it. The last message before the end asks for an acknowledgement, which the kernel gives after
    /// the commit; errors come unasked.
    pub(crate) fn commit(mut self, doing: &str) -> Result<(), NetlinkError> {
        self.delimiter(BATCH_END, doing);
        let sent: Vec<(u32, &str)> =
            self.sent.iter().map(|(sequence, doing)| (*sequence, doing.as_str())).collect();
        self.socket.transact(&self.writer.into_bytes(), &sent)
    }

    fn delimiter(&mut self, kind: u16, doing: &str) {
        let sequence = self.socket.next_sequence();
        self.writer.message(kind, flag::REQUEST, sequence, |w| {
            family_header(w, NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES);
        });
        self.sent.push((sequence, doing.to_owned()));
    }

    fn message(&mut self, kind: u16, flags: u16, doing: String, body: impl FnOnce(&mut Writer)) {
        let sequence = self.socket.next_sequence();
        let flags = flags | flag::REQUEST | flag::ACK;
        self.writer.message(message_type(kind), flags, sequence, |w| {
            family_header(w, NFPROTO_INET, 0);
            body(w);
        });
        self.sent.push((sequence, doing));
    }

    fn add_map(&mut self, table: &str, map: &Map) {
        let id = self.socket.next_sequence();
        self.message(NEWSET, flag::CREATE, format!("create the map {table}/{}", map.name), |w| {
            w.string(1, table);
            w.string(2, map.name);
            w.be32(3, NFT_SET_MAP);
            w.be32(4, concatenation(map.key));
            w.be32(5, field_bytes(map.key));
            w.be32(6, concatenation(map.data));
            w.be32(7, field_bytes(map.data));
            w.be32(10, id);
            let mut orders = user_data(KEY_BYTE_ORDER, &BIG_ENDIAN.to_ne_bytes());
            orders.extend(user_data(DATA_BYTE_ORDER, &BIG_ENDIAN.to_ne_bytes()));
            w.attribute(13, &orders);
        });
        for part in map.elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.message(NEWSETELEM, flag::CREATE, format!("fill the map {table}/{}", map.name), |w| {
                w.string(1, table);
                w.string(2, map.name);
                w.nest(3, |w| {
                    for (key, data) in part {
                        w.nest(1, |w| {
                            w.nest(1, |w| w.attribute(1, key));
                            w.nest(2, |w| w.attribute(1, data));
                        });
                    }
                });
            });
        }
    }

    fn add_chain(&mut self, table: &str, chain: &Chain) {
        self.message(NEWCHAIN, flag::CREATE, format!("create the chain {table}/{}", chain.name), |w| {
            w.string(1, table);
            w.string(3, chain.name);
            if let Some(hook) = &chain.hook {
                w.nest(4, |w| {
                    w.be32(1, hook.number);
                    w.be32(2, hook.priority.cast_unsigned());
                });
                w.be32(5, NF_ACCEPT);
                w.string(7, hook.kind);
            }
        });
    }

    fn add_rule(&mut self, table: &str, chain: &str, rule: &Rule) {
        let doing = format!("add a rule to {table}/{chain}");
        self.message(NEWRULE, flag::CREATE | flag::APPEND, doing, |w| {
            w.string(1, table);
            w.string(2, chain);
            w.nest(4, |w| rule.expressions.iter().for_each(|expression| encode(w, expression)));
            if !rule.comment.is_empty() {
                w.attribute(7, &user_text(rule.comment));
            }
        });
    }
}

fn encode(w: &mut Writer, expression: &Expression) {
    let mut named = |name: &str, body: &dyn Fn(&mut Writer)| {
        w.nest(1, |w| {
            w.string(1, name);
            w.nest(2, |w| body(w));
        });
    };
    match expression {
        Expression::Meta { key, to } => named("meta", &|w| {
            w.be32(1, *to as u32);
            w.be32(2, *key as u32);
        }),
        Expression::Payload { header, offset, length, to } => named("payload", &|w| {
            w.be32(1, *to as u32);
            w.be32(2, *header as u32);
            w.be32(3, *offset);
            w.be32(4, *length);
        }),
        Expression::Mask(mask) => named("bitwise", &|w| {
            w.be32(1, 1);
            w.be32(2, 1);
            w.be32(3, mask.len() as u32);
            w.nest(4, |w| w.attribute(1, mask));
            w.nest(5, |w| w.attribute(1, &vec![0; mask.len()]));
        }),
        Expression::Compare(how, value) => named("cmp", &|w| {
            w.be32(1, 1);
            w.be32(
                2,
                match how {
                    Compare::Equal => 0,
                    Compare::Unequal => 1,
                },
            );
            w.nest(3, |w| w.attribute(1, value));
        }),
        Expression::DestinationKind => named("fib", &|w| {
            w.be32(1, 1);
            w.be32(2, FIB_RESULT_ADDRTYPE);
            w.be32(3, FIB_FLAG_DADDR);
        }),
        Expression::ConnectionStatus => named("ct", &|w| {
            w.be32(1, 1);
            w.be32(2, CT_KEY_STATUS);
        }),
        Expression::Map(name) => named("lookup", &|w| {
            w.string(1, name);
            w.be32(2, 1);
            w.be32(3, 1);
        }),
        Expression::Redirect => named("nat", &|w| {
            w.be32(1, NFT_NAT_DNAT);
            w.be32(2, NFPROTO_IPV4);
            w.be32(3, 1);
            w.be32(5, 9);
        }),
        Expression::Masquerade => named("masq", &|_| {}),
        Expression::Count => named("counter", &|_| {}),
        Expression::Drop => named("immediate", &|w| verdict(w, NF_DROP, None)),
        Expression::Jump(chain) => named("immediate", &|w| verdict(w, NFT_JUMP, Some(chain))),
    }
}

fn verdict(w: &mut Writer, code: u32, chain: Option<&str>) {
    w.be32(1, 0);
    w.nest(2, |w| {
        w.nest(2, |w| {
            w.be32(1, code);
            if let Some(chain) = chain {
                w.string(2, chain);
            }
        });
    });
}

/// Six bits per type, the first one highest.
fn concatenation(types: &[DataType]) -> u32 {
    types.iter().fold(0, |all, kind| all << 6 | *kind as u32)
}

fn field_bytes(types: &[DataType]) -> u32 {
    types.len() as u32 * 4
}

fn user_text(text: &str) -> Vec<u8> {
    user_data(COMMENT, &[text.as_bytes(), &[0]].concat())
}

fn user_data(kind: u8, value: &[u8]) -> Vec<u8> {
    let length = u8::try_from(value.len()).expect("comments are short constants and hashes");
    [&[kind, length], value].concat()
}
