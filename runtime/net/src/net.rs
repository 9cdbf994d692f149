//! `Net`: everything that one instance does to the network of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::Ipv4Net;
use keel_sys::netlink::{Netlink, NetlinkError, NetlinkProtocol};
use nix::errno::Errno;

use crate::config::{NetConfig, TableOwnership};
use crate::filter::conntrack;
use crate::filter::encode::{Batch, TABLE_FLAG_OWNER, TABLE_FLAG_PERSIST};
use crate::filter::lower::{Protocol, Publish, fingerprint, lower_table};
use crate::filter::model::Table;
use crate::filter::observe::{self, Elements, ForwardDrop};
use crate::link::{self, Link, LinkOp, POD_LINK, Traffic};
use crate::namespace::in_netns;
use crate::port::{PortError, check_host_port};
use crate::sysctl::{self, SysctlError};

/// MTU where no default route tells one (Ethernet).
const FALLBACK_MTU: u32 = 1500;
/// Links on their way out. An offset keeps it apart for each instance.
const TRASH_GROUP_OFFSET: u32 = 0x0100_0000;
/// The table may come or go between looking and replacing, by an administrator's hand.
const REPLACE_TRIES: u32 = 3;

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("the link {name} exists and is not ours; remove it or choose another bridge name")]
    BridgeTaken { name: String },
    #[error("the bridge {name} does not exist")]
    NoBridge { name: String },
    #[error("open the network namespace {}", path.display())]
    Namespace { path: PathBuf, source: io::Error },
    #[error("work inside the network namespace {}", path.display())]
    Inside { path: PathBuf, source: io::Error },
    #[error("the link {link} has no peer {POD_LINK} in {}", path.display())]
    NoPeer { link: String, path: PathBuf },
    #[error("the packet-filter table {table} belongs to another running process")]
    TableOwned { table: String, source: NetlinkError },
}

#[derive(Debug, thiserror::Error)]
pub enum NetPortError {
    #[error(transparent)]
    Port(#[from] PortError),
    #[error(transparent)]
    Net(#[from] NetError),
}

/// What `ensure_bridge` had to change on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeReport {
    pub created: bool,
    /// A bridge that was removed and made again has another one; no link is attached to it then.
    pub index: u32,
    pub mtu: u32,
    /// IPv4 forwarding was off on this host and is on now.
    pub forwarding_enabled: bool,
}

/// A pod's link on the host's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub link: String,
    pub index: u32,
}

/// What is there of this instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Address and prefix length of the bridge; `None` when there is no bridge, it is not ours or has no address.
    pub bridge: Option<Ipv4Net>,
    /// Links by pod id; more than one while the kernel still removes a predecessor's.
    pub links: BTreeMap<String, Vec<String>>,
    /// The fingerprint that the table was written with; `None` when there is no table.
    pub table: Option<String>,
    /// Counts every change to any packet-filter table of the host.
    pub generation: u32,
}

/// Works in the network namespace of the thread that opened it, from whatever thread it is used.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    route: Mutex<Netlink>,
    filter: Mutex<Netlink>,
    verified: Mutex<Option<Verified>>,
    known: Mutex<Option<KnownLinks>>,
}

/// Names of links by pod id, read once: only this process makes more of them, and to list hundreds takes longer than to
/// create one. A name that is no longer there does no harm.
type KnownLinks = BTreeMap<String, BTreeSet<String>>;

/// A table that the kernel was found to hold, and when.
#[derive(Debug)]
struct Verified {
    generation: u32,
    table: Table,
}

/// The kernel spreads the elements of a large set anew in the background, and a dump meanwhile misses some or has them
/// twice: what does not match is looked at again before it is believed.
const LOOKS: usize = 3;

impl Net {
    pub fn open(config: NetConfig) -> Result<Net, NetError> {
        Ok(Net {
            config,
            route: Mutex::new(Netlink::open(NetlinkProtocol::Route)?),
            filter: Mutex::new(Netlink::open(NetlinkProtocol::Netfilter)?),
            verified: Mutex::new(None),
            known: Mutex::new(None),
        })
    }

    pub fn config(&self) -> &NetConfig {
        &self.config
    }

    /// Bridge, its address, a table that guards it, and the host settings that publishing needs. Changes only what differs.
    /// Must run on a thread in the namespace that `open` ran in: settings are per namespace.
    pub fn ensure_bridge(&self) -> Result<BridgeReport, NetError> {
        let mut route = self.route();
        let name = self.config.bridge.as_str();
        let mtu = match self.config.mtu {
            Some(mtu) => mtu,
            None => link::observe_uplink_mtu(&mut route)?.unwrap_or(FALLBACK_MTU),
        };
        let mut found = self.own_bridge(&mut route)?;
        let created = found.is_none();
        if created {
            link::apply_ops(&mut route, &link::lower_bridge(&self.config, mtu, None, &[]))?;
            found = link::observe_link(&mut route, name)?;
        }
        let bridge = found.ok_or_else(|| NetError::NoBridge { name: name.to_owned() })?;
        // Only IPv4 is spoken on it: an address of the other kind would be a way into the host that
        // no rule of ours looks at. Before it is up, so that there never is one.
        sysctl::ensure(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        let addresses: Vec<Ipv4Net> = link::observe_addresses(&mut route)?
            .into_iter()
            .filter(|(index, _)| *index == bridge.index)
            .map(|(_, address)| address)
            .collect();
        link::apply_ops(&mut route, &link::lower_bridge(&self.config, mtu, Some(&bridge), &addresses))?;
        // A table without ports, where there is none: from the first packet on, pods reach the world, and what the
        // settings below would let in is dropped.
        let guarded = observe::find_table(&mut self.filter(), &self.config.table)?.is_some();
        if !guarded {
            self.apply(&[])?;
        }
        // Lets connections to 127.0.0.1 of the host leave for the bridge.
        sysctl::ensure(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
        let forwarding_enabled = sysctl::ensure("ipv4/ip_forward", "1")? == Some(true);
        Ok(BridgeReport { created, index: bridge.index, mtu, forwarding_enabled })
    }

    /// The index of the bridge; `None` when somebody has removed it.
    pub fn bridge_index(&self) -> Result<Option<u32>, NetError> {
        Ok(self.own_bridge(&mut self.route())?.map(|bridge| bridge.index))
    }

    /// Connects the namespace at `netns` to the bridge as `ip`. Done twice, or begun by a predecessor that died,
    /// the result is the same. Links that the pod `id` had in other namespaces are taken down first:
    /// they would answer for the same address.
    pub fn attach(&self, id: &str, netns: &Path, ip: Ipv4Addr) -> Result<Attached, NetError> {
        let unreadable = |source| NetError::Namespace { path: netns.to_owned(), source };
        let file = File::open(netns).map_err(unreadable)?;
        let name = self.config.veth_name(id, file.metadata().map_err(unreadable)?.ino());
        let index = self.attach_outside(id, &name, &file, ip)?;
        let inside = in_netns(netns, || attach_inside(&self.config, ip))
            .map_err(|source| NetError::Inside { path: netns.to_owned(), source })??;
        if !inside {
            return Err(NetError::NoPeer { link: name, path: netns.to_owned() });
        }
        let mut route = self.route();
        link::wait_until_running(&mut route, &name)?;
        link::wait_until_running(&mut route, &self.config.bridge)?;
        Ok(Attached { link: name, index })
    }

    fn attach_outside(&self, id: &str, name: &str, netns: &File, ip: Ipv4Addr) -> Result<u32, NetError> {
        let mut route = self.route();
        let missing = || NetError::NoBridge { name: self.config.bridge.clone() };
        let bridge = self.own_bridge(&mut route)?.ok_or_else(missing)?;
        for other in self.note_link(&mut route, id, name)? {
            match link::apply_ops(&mut route, &[LinkOp::Down { name: other }]) {
                Err(error) if !error.is(Errno::ENODEV as i32) => return Err(error.into()),
                _ => {}
            }
        }
        let [add, set, hairpin] =
            link::lower_port(&self.config, name, id, bridge.index, bridge.mtu, ip, netns.as_raw_fd());
        match link::apply_ops(&mut route, &[add]) {
            Err(error) if !error.is(Errno::EEXIST as i32) => return Err(error.into()),
            _ => {}
        }
        link::apply_ops(&mut route, &[set, hairpin])?;
        let link = link::observe_link(&mut route, name)?;
        Ok(link.map_or(0, |link| link.index))
    }

    /// Removes every link of the pod `id` now, in about 30 ms each. Only for a namespace that lives on: links go by
    /// themselves with their namespace, without anyone waiting. Answers how many there were.
    pub fn detach(&self, id: &str) -> Result<usize, NetError> {
        let mut route = self.route();
        let links = self.own_links(&mut route)?;
        let mut removed = 0;
        for link in links.iter().filter(|link| link.alias == id && link.name != self.config.bridge) {
            removed += usize::from(link::remove_link(&mut route, link)?);
        }
        Ok(removed)
    }

    /// Removes the links of pods that `live` does not name, all of them in one request. Links go with their
    /// namespace; this is for namespaces that a stray process keeps alive. Answers how many there were.
    pub fn sweep(&self, live: &BTreeSet<String>) -> Result<usize, NetError> {
        let mut route = self.route();
        let trash = self.config.group.wrapping_add(TRASH_GROUP_OFFSET);
        let mut moved = 0;
        for link in self.own_links(&mut route)? {
            if link.name == self.config.bridge || live.contains(&link.alias) {
                continue;
            }
            let mark = [LinkOp::MoveToGroup { index: link.index, name: link.name, group: trash }];
            match link::apply_ops(&mut route, &mark) {
                Ok(()) => moved += 1,
                Err(error) if error.is(Errno::ENODEV as i32) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Also what a sweep that died half-way has marked.
        link::remove_group(&mut route, trash)?;
        Ok(moved)
    }

    /// Replaces the whole table by what `publish` says, in one transaction. Where two entries claim one host port,
    /// the first one keeps it. UDP flows through ports that now lead elsewhere start anew.
    pub fn apply(&self, publish: &[Publish]) -> Result<(), NetError> {
        let table = lower_table(&self.config, publish);
        let comment = fingerprint(&table);
        let mut filter = self.filter();
        let before = observe::observe_table(&mut filter, &table)?;
        let mut exists = before.is_some();
        let mut tries = 0;
        loop {
            tries += 1;
            match replace(&mut filter, &table, &comment, exists, self.config.ownership) {
                Ok(()) => break,
                Err(error)
                    if tries < REPLACE_TRIES
                        && (error.is(Errno::ENOENT as i32) || error.is(Errno::EEXIST as i32)) =>
                {
                    exists = observe::find_table(&mut filter, &table.name)?.is_some();
                }
                Err(error) if error.is(Errno::EPERM as i32) && exists => {
                    return Err(NetError::TableOwned { table: table.name, source: error });
                }
                Err(error) => return Err(error.into()),
            }
        }
        let moved = moved_udp_ports(&before.unwrap_or_default().elements, &table);
        conntrack::forget_udp(&mut filter, &moved)?;
        Ok(())
    }

    /// Whether the host port of `publish` is free: no socket of the host and no other instance has it.
    /// Entries of this instance do not count.
    pub fn check_port(&self, publish: &Publish) -> Result<(), NetPortError> {
        check_host_port(publish.host_ip, publish.host_port, publish.protocol)?;
        let taken = observe::find_published(&mut self.filter(), &self.config.table, publish)
            .map_err(NetError::from)?;
        match taken {
            None => Ok(()),
            Some(table) => {
                let (port, protocol) = (publish.host_port, publish.protocol);
                Err(PortError::Published { port, protocol, table }.into())
            }
        }
    }

    /// Whether the table in the kernel is still the one that `apply(publish)` writes: a flush by another program, a
    /// removed rule or a changed entry is seen. While no table of the host changes, one question to the
    /// kernel is enough.
    pub fn in_sync(&self, publish: &[Publish]) -> Result<bool, NetError> {
        let table = lower_table(&self.config, publish);
        let mut filter = self.filter();
        // Asked first: a change during the look makes the next look a full one.
        let generation = observe::generation(&mut filter)?;
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.as_ref().is_some_and(|seen| seen.generation == generation && seen.table == table) {
            return Ok(true);
        }
        let mut matches = false;
        for _ in 0..LOOKS {
            let found = observe::observe_table(&mut filter, &table)?;
            matches = found.is_some_and(|found| found.matches(&table, &fingerprint(&table)));
            if matches {
                break;
            }
        }
        *verified = matches.then_some(Verified { generation, table });
        Ok(matches)
    }

    pub fn observe(&self) -> Result<Observed, NetError> {
        let mut seen = Observed::default();
        {
            let mut route = self.route();
            let links = self.own_links(&mut route)?;
            if let Some(bridge) = links.iter().find(|link| link.name == self.config.bridge) {
                let addresses = link::observe_addresses(&mut route)?;
                seen.bridge =
                    addresses.into_iter().find(|(index, _)| *index == bridge.index).map(|(_, net)| net);
            }
            for link in links.into_iter().filter(|link| !link.alias.is_empty()) {
                seen.links.entry(link.alias).or_default().push(link.name);
            }
        }
        let mut filter = self.filter();
        seen.table = observe::find_table(&mut filter, &self.config.table)?;
        seen.generation = observe::generation(&mut filter)?;
        Ok(seen)
    }

    /// Counters by pod id. A predecessor's link that is still being removed is left out.
    pub fn traffic(&self) -> Result<BTreeMap<String, Traffic>, NetError> {
        let links = link::observe_traffic(&mut self.route())?;
        let own = links
            .into_iter()
            .filter(|(link, _)| link.group == self.config.group && link.running && !link.alias.is_empty());
        Ok(own.map(|(link, traffic)| (link.alias, traffic)).collect())
    }

    /// Chains of other programs that drop forwarded packets by policy. Published ports (from outside) and the pods' way out
    /// do not work through them until an accept for the bridge is added there (`ForwardDrop::remedy`): a
    /// rule of ours cannot overrule another table's drop, and we do not write into foreign tables.
    /// Chains of the old iptables (`iptables-legacy`) are not seen.
    pub fn forward_drops(&self) -> Result<Vec<ForwardDrop>, NetError> {
        Ok(observe::forward_drops(&mut self.filter())?)
    }

    /// Removes the table, every link and the bridge of this instance; nothing else. Absence is fine.
    pub fn purge(&self) -> Result<(), NetError> {
        {
            let mut filter = self.filter();
            if observe::find_table(&mut filter, &self.config.table)?.is_some() {
                let doing = format!("remove the packet-filter table {}", self.config.table);
                let mut batch = Batch::new(&mut filter, &doing);
                batch.delete_table(&self.config.table);
                match batch.commit(&doing) {
                    Err(error) if !error.is(Errno::ENOENT as i32) => return Err(error.into()),
                    _ => {}
                }
            }
        }
        link::remove_group(&mut self.route(), self.config.group)?;
        Ok(())
    }

    fn own_bridge(&self, route: &mut Netlink) -> Result<Option<Link>, NetError> {
        let name = &self.config.bridge;
        match link::observe_link(route, name)? {
            Some(link) if link.kind != "bridge" || link.group != self.config.group => {
                Err(NetError::BridgeTaken { name: name.clone() })
            }
            found => Ok(found),
        }
    }

    fn own_links(&self, route: &mut Netlink) -> Result<Vec<Link>, NetError> {
        let mut links = link::observe_links(route)?;
        links.retain(|link| link.group == self.config.group);
        Ok(links)
    }

    /// Notes `name` as the link of the pod `id`; answers the other links that the pod may still have.
    fn note_link(&self, route: &mut Netlink, id: &str, name: &str) -> Result<BTreeSet<String>, NetError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut links = match known.take() {
            Some(links) => links,
            None => {
                let mut links = KnownLinks::new();
                for link in self.own_links(route)? {
                    links.entry(link.alias).or_default().insert(link.name);
                }
                links
            }
        };
        let mut others = links.insert(id.to_owned(), BTreeSet::from([name.to_owned()])).unwrap_or_default();
        others.remove(name);
        *known = Some(links);
        Ok(others)
    }

    fn route(&self) -> MutexGuard<'_, Netlink> {
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn filter(&self) -> MutexGuard<'_, Netlink> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// IPv4 networks that routes and addresses of this host cover, except through the link `except` (the own bridge).
/// Default routes cover everything and are left out.
pub fn observe_used_subnets(except: &str) -> Result<Vec<Ipv4Net>, NetError> {
    let mut route = Netlink::open(NetlinkProtocol::Route)?;
    let except = link::observe_link(&mut route, except)?.map(|link| link.index);
    let routes = link::observe_routes(&mut route)?;
    let routes =
        routes.into_iter().filter(|route| route.leaves()).map(|route| (route.link, route.destination));
    let mut used: Vec<Ipv4Net> = link::observe_addresses(&mut route)?
        .into_iter()
        .chain(routes)
        .filter(|(index, net)| Some(*index) != except && net.prefix_len() > 0)
        .map(|(_, net)| net.trunc())
        .collect();
    used.sort_unstable();
    used.dedup();
    Ok(used)
}

/// The pod's half; runs inside its namespace. False: the link has no end here.
fn attach_inside(config: &NetConfig, ip: Ipv4Addr) -> Result<bool, NetError> {
    let mut route = Netlink::open(NetlinkProtocol::Route)?;
    let Some(peer) = link::observe_link(&mut route, POD_LINK)? else {
        return Ok(false);
    };
    let addresses: Vec<Ipv4Net> = link::observe_addresses(&mut route)?
        .into_iter()
        .filter(|(index, _)| *index == peer.index)
        .map(|(_, address)| address)
        .collect();
    link::apply_ops(&mut route, &link::lower_inside(config, peer.index, ip, &addresses))?;
    link::wait_until_running(&mut route, POD_LINK)?;
    Ok(true)
}

fn replace(
    filter: &mut Netlink,
    table: &Table,
    comment: &str,
    exists: bool,
    ownership: TableOwnership,
) -> Result<(), NetlinkError> {
    let write = |filter: &mut Netlink, flags| {
        let doing = format!("replace the packet-filter table {}", table.name);
        let mut batch = Batch::new(filter, &doing);
        if exists {
            batch.delete_table(&table.name);
        }
        batch.add_table(table, flags, comment);
        batch.commit(&doing)
    };
    if ownership == TableOwnership::Owned {
        match write(filter, TABLE_FLAG_OWNER | TABLE_FLAG_PERSIST) {
            // An older kernel: a table that dies with us would be worse than one that others can change.
            Err(error) if error.is(Errno::EOPNOTSUPP as i32) || error.is(Errno::EINVAL as i32) => {}
            other => return other,
        }
    }
    write(filter, 0)
}

/// UDP host ports that `before` sent elsewhere than `after` does, or one of them nowhere.
fn moved_udp_ports(before: &BTreeMap<String, Elements>, after: &Table) -> BTreeSet<u16> {
    let udp = Protocol::Udp.number();
    let mut moved = BTreeSet::new();
    for map in &after.maps {
        let new: Elements = map.elements.iter().cloned().collect();
        let none = Elements::new();
        let old = before.get(map.name).unwrap_or(&none);
        for key in old.keys().chain(new.keys()) {
            // Every key ends with the protocol and the port, four bytes each.
            if let [.., protocol, _, _, _, high, low, _, _] = key[..]
                && protocol == udp
                && old.get(key) != new.get(key)
            {
                moved.insert(u16::from_be_bytes([high, low]));
            }
        }
    }
    moved
}
