//! An nf_tables table as data. `Display` prints what `nft --debug=netlink` prints, for golden tests.

use std::fmt;

/// Registers of four bytes; a value of up to 16 bytes starts at the first one.
/// The kernel's numbers (NFT_REG_1, NFT_REG32_01, NFT_REG32_02).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    First = 1,
    Second = 9,
    Third = 10,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetaKey {
    InputName = 6,
    OutputName = 7,
    Family = 15,
    Transport = 16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Header {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Equal = 0,
    Unequal = 1,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expression {
    Meta {
        key: MetaKey,
        to: Register,
    },
    /// Bytes of the packet.
    Payload {
        header: Header,
        offset: u32,
        length: u32,
        to: Register,
    },
    /// And with the mask, in the first register.
    Mask(Vec<u8>),
    /// The rule ends here unless the first register compares so.
    Compare(Compare, Vec<u8>),
    /// Kind of the destination address (local, unicast, ...), seen from this host.
    DestinationKind,
    ConnectionStatus,
    /// Value of the map under the key that starts in the first register; the rule ends without one.
    Map(&'static str),
    /// New destination: address from the first register, port from the second.
    Redirect,
    Masquerade,
    Count,
    Drop,
    Jump(&'static str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) comment: &'static str,
    pub(crate) expressions: Vec<Expression>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    pub(crate) kind: &'static str,
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: &'static str,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// Data types as nft numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataType {
    Address = 7,
    Protocol = 12,
    Service = 13,
}

/// Every field of key and data fills four bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Map {
    pub(crate) name: &'static str,
    pub(crate) key: &'static [DataType],
    pub(crate) data: &'static [DataType],
    pub(crate) elements: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) maps: Vec<Map>,
    pub(crate) chains: Vec<Chain>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for map in &self.maps {
            writeln!(f, "map {}", map.name)?;
            for (key, data) in &map.elements {
                writeln!(f, "  {} : {}", words(key), words(data))?;
            }
        }
        for chain in &self.chains {
            match &chain.hook {
                Some(hook) => writeln!(
                    f,
                    "chain {} type {} hook {} priority {}",
                    chain.name, hook.kind, hook.number, hook.priority
                )?,
                None => writeln!(f, "chain {}", chain.name)?,
            }
            for rule in &chain.rules {
                writeln!(f, "  # {}", rule.comment)?;
                rule.expressions.iter().try_for_each(|expression| writeln!(f, "  {expression}"))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expression::Meta { key, to } => {
                let key = match key {
                    MetaKey::InputName => "iifname",
                    MetaKey::OutputName => "oifname",
                    MetaKey::Family => "nfproto",
                    MetaKey::Transport => "l4proto",
                };
                write!(f, "[ meta load {key} => reg {} ]", *to as u32)
            }
            Expression::Payload { header, offset, length, to } => {
                let header = match header {
                    Header::Network => "network",
                    Header::Transport => "transport",
                };
                write!(f, "[ payload load {length}b @ {header} header + {offset} => reg {} ]", *to as u32)
            }
            Expression::Mask(mask) => {
                write!(f, "[ bitwise reg 1 = ( reg 1 & {} ) ^ {} ]", words(mask), words(&vec![0; mask.len()]))
            }
            Expression::Compare(how, value) => {
                let how = match how {
                    Compare::Equal => "eq",
                    Compare::Unequal => "neq",
                };
                write!(f, "[ cmp {how} reg 1 {} ]", words(value))
            }
            Expression::DestinationKind => f.write_str("[ fib daddr type => reg 1 ]"),
            Expression::ConnectionStatus => f.write_str("[ ct load status => reg 1 ]"),
            Expression::Map(name) => write!(f, "[ lookup reg 1 set {name} dreg 1 ]"),
            Expression::Redirect => f.write_str("[ nat dnat ip addr_min reg 1 proto_min reg 9 ]"),
            Expression::Masquerade => f.write_str("[ masq ]"),
            Expression::Count => f.write_str("[ counter ]"),
            Expression::Drop => f.write_str("[ immediate reg 0 drop ]"),
            Expression::Jump(chain) => write!(f, "[ immediate reg 0 jump -> {chain} ]"),
        }
    }
}

/// Words in the byte order of the host, short ones without leading zero bytes.
fn words(bytes: &[u8]) -> String {
    let word = |chunk: &[u8]| {
        let digits: String = chunk.iter().rev().map(|byte| format!("{byte:02x}")).collect();
        format!("0x{digits:0>8}")
    };
    bytes.chunks(4).map(word).collect::<Vec<_>>().join(" ")
}
