//! What the kernel has in place of our table.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::TABLE_PREFIX;
use crate::filter::encode::{self, COMMENT, NFPROTO_INET, NFPROTO_UNSPEC};
use crate::filter::lower::{self, Publish};
use crate::filter::model::{Expression, Table};
use keel_sys::netlink::wire::{self, Writer};
use keel_sys::netlink::{Netlink, NetlinkError};

const GETTABLE: u16 = 1;
const GETCHAIN: u16 = 4;
const GETSETELEM: u16 = 13;
const GETGEN: u16 = 16;
const HOOK_FORWARD: u32 = 2;
const NF_DROP: u32 = 0;
/// nfgenmsg.
const HEADER: usize = 4;

/// Our table as found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FoundTable {
    /// The fingerprint that it was written with; empty where there is none.
    pub(crate) fingerprint: String,
    /// Rules and jumps per chain.
    pub(crate) chains: BTreeMap<String, u32>,
    pub(crate) elements: BTreeMap<String, Elements>,
}

impl FoundTable {
    /// False when somebody flushed chains, removed rules or changed the maps since we wrote it.
    pub(crate) fn matches(&self, table: &Table, fingerprint: &str) -> bool {
        let jumps = |name: &str| {
            let rules = table.chains.iter().flat_map(|chain| &chain.rules);
            let all = rules.flat_map(|rule| &rule.expressions);
            all.filter(|expression| matches!(expression, Expression::Jump(target) if *target == name)).count()
        };
        // A kernel before 5.10 keeps no comment; the contents have to do there.
        (self.fingerprint == fingerprint || self.fingerprint.is_empty())
            && table.chains.iter().all(|chain| {
                let expected = chain.rules.len() + jumps(chain.name);
                self.chains.get(chain.name).is_some_and(|found| *found as usize == expected)
            })
            && self.chains.len() == table.chains.len()
            && table.maps.iter().all(|map| {
                let wanted: BTreeMap<_, _> = map.elements.iter().cloned().collect();
                self.elements.get(map.name) == Some(&wanted)
            })
    }
}

/// Counts every change of any table; equal numbers mean that nothing changed.
pub(crate) fn generation(socket: &mut Netlink) -> Result<u32, NetlinkError> {
    let body = |w: &mut Writer| encode::family_header(w, NFPROTO_UNSPEC, 0);
    let found =
        socket.get("read the packet-filter generation", encode::message_type(GETGEN), body, |body| {
            wire::read_be32(wire::find(body.get(HEADER..)?, 1)?)
        })?;
    Ok(found.unwrap_or(0))
}

/// Fingerprint of the table; `None` when there is no such table.
pub(crate) fn find_table(socket: &mut Netlink, name: &str) -> Result<Option<String>, NetlinkError> {
    let body = |w: &mut Writer| {
        encode::family_header(w, NFPROTO_INET, 0);
        w.string(1, name);
    };
    let doing = format!("look up the packet-filter table {name}");
    socket.get(&doing, encode::message_type(GETTABLE), body, |body| {
        let list = body.get(HEADER..)?;
        Some(wire::find(list, 6).and_then(comment).unwrap_or_default())
    })
}

pub(crate) fn observe_table(socket: &mut Netlink, table: &Table) -> Result<Option<FoundTable>, NetlinkError> {
    let name = table.name.as_str();
    let Some(fingerprint) = find_table(socket, name)? else {
        return Ok(None);
    };
    let mut found = FoundTable { fingerprint, ..FoundTable::default() };
    found.chains = list_chains(socket, NFPROTO_INET)?
        .into_iter()
        .filter(|chain| chain.table == name)
        .map(|chain| (chain.name, chain.uses))
        .collect();
    for map in &table.maps {
        if let Some(elements) = list_elements(socket, name, map.name)? {
            found.elements.insert(map.name.to_owned(), elements);
        }
    }
    Ok(Some(found))
}

/// A chain of another program that drops forwarded packets by policy, such as `ip filter FORWARD` beside docker.
/// `Display` is `<family> <table> <chain>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardDrop(String);

impl ForwardDrop {
    /// The commands with which an administrator lets the pods through.
    pub fn remedy(&self, bridge: &str) -> String {
        let chain = &self.0;
        format!(
            "nft insert rule {chain} iifname {bridge} accept; nft insert rule {chain} oifname {bridge} accept"
        )
    }
}

impl fmt::Display for ForwardDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) fn forward_drops(socket: &mut Netlink) -> Result<Vec<ForwardDrop>, NetlinkError> {
    let chains = list_chains(socket, NFPROTO_UNSPEC)?;
    let dropping = chains.into_iter().filter(|chain| chain.hook == Some(HOOK_FORWARD) && chain.drops);
    let name = |chain: FoundChain| format!("{} {} {}", family_name(chain.family), chain.table, chain.name);
    Ok(dropping.map(|chain| ForwardDrop(name(chain))).collect())
}

/// Name of the table of another instance that has the host port of `publish`.
pub(crate) fn find_published(
    socket: &mut Netlink,
    own: &str,
    publish: &Publish,
) -> Result<Option<String>, NetlinkError> {
    let body = |w: &mut Writer| encode::family_header(w, NFPROTO_INET, 0);
    let tables =
        socket.list("list the packet-filter tables", encode::message_type(GETTABLE), body, |body| {
            Some(wire::text(wire::find(body.get(HEADER..)?, 1)?))
        })?;
    let port = lower::key_of_port(publish);
    for table in tables.into_iter().filter(|table| table.starts_with(TABLE_PREFIX) && table != own) {
        for map in [lower::MAP_BY_ADDRESS, lower::MAP_ANY] {
            let elements = list_elements(socket, &table, map)?.unwrap_or_default();
            let clash = |key: &[u8]| match publish.address() {
                Some(ip) if key.len() > port.len() => key == [&ip.octets()[..], &port].concat(),
                _ => key.ends_with(&port),
            };
            if elements.keys().any(|key| clash(key)) {
                return Ok(Some(table));
            }
        }
    }
    Ok(None)
}

struct FoundChain {
    family: u8,
    table: String,
    name: String,
    hook: Option<u32>,
    drops: bool,
    uses: u32,
}

fn list_chains(socket: &mut Netlink, family: u8) -> Result<Vec<FoundChain>, NetlinkError> {
    let body = |w: &mut Writer| encode::family_header(w, family, 0);
    socket.list("list the packet-filter chains", encode::message_type(GETCHAIN), body, |body| {
        let list = body.get(HEADER..)?;
        let number = |list, kind| wire::find(list, kind).and_then(wire::read_be32);
        Some(FoundChain {
            family: *body.first()?,
            table: wire::text(wire::find(list, 1)?),
            name: wire::text(wire::find(list, 3)?),
            hook: wire::find(list, 4).and_then(|hook| number(hook, 1)),
            drops: number(list, 5) == Some(NF_DROP),
            uses: number(list, 6).unwrap_or(0),
        })
    })
}

/// Key to data, as in `Map::elements`.
pub(crate) type Elements = BTreeMap<Vec<u8>, Vec<u8>>;

fn list_elements(socket: &mut Netlink, table: &str, map: &str) -> Result<Option<Elements>, NetlinkError> {
    let body = |w: &mut Writer| {
        encode::family_header(w, NFPROTO_INET, 0);
        w.string(1, table);
        w.string(2, map);
    };
    let doing = format!("list the map {table}/{map}");
    let parts = socket.list(&doing, encode::message_type(GETSETELEM), body, |body| {
        let list = wire::find(body.get(HEADER..)?, 3)?;
        let value = |element, kind| Some(wire::find(wire::find(element, kind)?, 1)?.to_vec());
        let all =
            wire::attributes(list).filter_map(|(_, element)| Some((value(element, 1)?, value(element, 2)?)));
        Some(all.collect::<Vec<_>>())
    });
    match parts {
        Ok(parts) => Ok(Some(parts.into_iter().flatten().collect())),
        Err(error) if error.is(nix::errno::Errno::ENOENT as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The comment inside user data.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == COMMENT {
            return Some(wire::text(value));
        }
        data = &rest[value.len()..];
    }
    None
}

fn family_name(family: u8) -> &'static str {
    match family {
        1 => "inet",
        2 => "ip",
        10 => "ip6",
        7 => "bridge",
        _ => "other",
    }
}
