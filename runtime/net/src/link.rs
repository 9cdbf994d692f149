//! Links, addresses and routes: what to do as data (`LinkOp`), its netlink encoding, and reading it back.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::errno::Errno;

use crate::config::{NetConfig, mac_of};
use keel_sys::netlink::wire::{self, Writer, flag};
use keel_sys::netlink::{Netlink, NetlinkError};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;

const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;

/// The operational state (RFC 2863) in which a link carries packets.
const IF_OPER_UP: u8 = 6;

/// The kernel starts a link that was just plugged in from a work queue, a second later at worst. A link
/// that takes longer is left to itself: it is no reason to fail a pod.
const START_LIMIT: Duration = Duration::from_millis(1500);
const START_POLL: Duration = Duration::from_millis(1);

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
const IFLA_GROUP: u16 = 27;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BRPORT_MODE: u16 = 4;
const VETH_INFO_PEER: u16 = 1;
/// Listings without counters: a quarter of the bytes.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const LOOPBACK_INDEX: u32 = 1;

/// Name of the interface inside a pod.
pub const POD_LINK: &str = "eth0";

/// One change to the links of one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkOp {
    AddBridge {
        name: String,
        mac: [u8; 6],
        mtu: u32,
        group: u32,
    },
    /// The peer is born inside the namespace behind `netns`, a descriptor of this process.
    AddVeth {
        name: String,
        bridge: u32,
        group: u32,
        mtu: u32,
        peer_mac: [u8; 6],
        netns: i32,
    },
    /// In the bridge, up, and labelled.
    SetPort {
        name: String,
        bridge: u32,
        alias: String,
    },
    /// A frame may leave by the port that it came in by: a pod that calls its own published port sends such.
    /// After `SetPort`: the kernel looks at the port's bridge before it reads the rest of a message.
    Hairpin {
        name: String,
    },
    Up {
        index: u32,
        name: String,
    },
    Down {
        name: String,
    },
    SetMtu {
        index: u32,
        name: String,
        mtu: u32,
    },
    AddAddress {
        index: u32,
        name: String,
        address: Ipv4Net,
    },
    RemoveAddress {
        index: u32,
        name: String,
        address: Ipv4Net,
    },
    DefaultRoute {
        index: u32,
        name: String,
        gateway: Ipv4Addr,
    },
    Remove {
        index: u32,
        name: String,
    },
    MoveToGroup {
        index: u32,
        name: String,
        group: u32,
    },
    RemoveGroup {
        group: u32,
    },
}

impl std::fmt::Display for LinkOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LinkOp::AddBridge { name, mtu, .. } => write!(f, "create the bridge {name} (mtu {mtu})"),
            LinkOp::AddVeth { name, mtu, .. } => write!(f, "create the link {name} to a pod (mtu {mtu})"),
            LinkOp::SetPort { name, alias, .. } => write!(f, "bring up the link {name} of {alias}"),
            LinkOp::Hairpin { name } => write!(f, "let {name} send frames back"),
            LinkOp::Up { name, .. } => write!(f, "bring up {name}"),
            LinkOp::Down { name } => write!(f, "take down {name}"),
            LinkOp::SetMtu { name, mtu, .. } => write!(f, "set the mtu of {name} to {mtu}"),
            LinkOp::AddAddress { name, address, .. } => write!(f, "add the address {address} to {name}"),
            LinkOp::RemoveAddress { name, address, .. } => {
                write!(f, "remove the address {address} from {name}")
            }
            LinkOp::DefaultRoute { name, gateway, .. } => {
                write!(f, "set the default route via {gateway} on {name}")
            }
            LinkOp::Remove { name, .. } => write!(f, "remove the link {name}"),
            LinkOp::MoveToGroup { name, .. } => write!(f, "mark the link {name} for removal"),
            LinkOp::RemoveGroup { group } => write!(f, "remove the links of group {group}"),
        }
    }
}

/// A link as the kernel lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) up: bool,
    /// Carries packets, on top of being set up.
    pub(crate) running: bool,
    pub(crate) mtu: u32,
    pub(crate) master: u32,
    pub(crate) group: u32,
    pub(crate) alias: String,
    pub(crate) kind: String,
}

/// Counters of a pod's network since it was attached, in and out as the pod sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub in_bytes: u64,
    pub in_packets: u64,
    pub in_errors: u64,
    pub in_dropped: u64,
    pub out_bytes: u64,
    pub out_packets: u64,
    pub out_errors: u64,
    pub out_dropped: u64,
}

/// What the bridge lacks: nothing at all when it is as it should be.
pub(crate) fn lower_bridge(
    config: &NetConfig,
    mtu: u32,
    found: Option<&Link>,
    addresses: &[Ipv4Net],
) -> Vec<LinkOp> {
    let name = &config.bridge;
    let Some(link) = found else {
        return vec![LinkOp::AddBridge {
            name: name.clone(),
            mac: mac_of(config.gateway()),
            mtu,
            group: config.group,
        }];
    };
    let (index, name) = (link.index, name.clone());
    let mut ops = Vec::new();
    if link.mtu != mtu {
        ops.push(LinkOp::SetMtu { index, name: name.clone(), mtu });
    }
    let wanted = address_in(config.gateway(), config.subnet);
    let stale = addresses.iter().filter(|address| **address != wanted);
    ops.extend(stale.map(|address| LinkOp::RemoveAddress { index, name: name.clone(), address: *address }));
    if !addresses.contains(&wanted) {
        ops.push(LinkOp::AddAddress { index, name: name.clone(), address: wanted });
    }
    if !link.up {
        ops.push(LinkOp::Up { index, name });
    }
    ops
}

/// The host's half of a pod's link.
pub(crate) fn lower_port(
    config: &NetConfig,
    link: &str,
    id: &str,
    bridge: u32,
    mtu: u32,
    ip: Ipv4Addr,
    netns: i32,
) -> [LinkOp; 3] {
    [
        LinkOp::AddVeth {
            name: link.to_owned(),
            bridge,
            group: config.group,
            mtu,
            peer_mac: mac_of(ip),
            netns,
        },
        LinkOp::SetPort { name: link.to_owned(), bridge, alias: id.to_owned() },
        LinkOp::Hairpin { name: link.to_owned() },
    ]
}

/// The pod's half, to be done inside its namespace.
pub(crate) fn lower_inside(
    config: &NetConfig,
    index: u32,
    ip: Ipv4Addr,
    addresses: &[Ipv4Net],
) -> Vec<LinkOp> {
    let name = || POD_LINK.to_owned();
    let wanted = address_in(ip, config.subnet);
    let stale = addresses.iter().filter(|address| **address != wanted);
    let mut ops: Vec<LinkOp> =
        stale.map(|address| LinkOp::RemoveAddress { index, name: name(), address: *address }).collect();
    ops.extend([
        LinkOp::Up { index: LOOPBACK_INDEX, name: "lo".to_owned() },
        LinkOp::AddAddress { index, name: name(), address: wanted },
        LinkOp::Up { index, name: name() },
        LinkOp::DefaultRoute { index, name: name(), gateway: config.gateway() },
    ]);
    ops
}

pub(crate) fn lower_loopback() -> LinkOp {
    LinkOp::Up { index: LOOPBACK_INDEX, name: "lo".to_owned() }
}

/// Does all of it in one exchange. What is already as wanted is no error.
pub(crate) fn apply_ops(socket: &mut Netlink, ops: &[LinkOp]) -> Result<(), NetlinkError> {
    let mut writer = Writer::default();
    let names: Vec<String> = ops.iter().map(ToString::to_string).collect();
    let mut sent = Vec::with_capacity(ops.len());
    for (op, doing) in ops.iter().zip(&names) {
        let sequence = socket.next_sequence();
        encode(op, sequence, &mut writer);
        sent.push((sequence, doing.as_str()));
    }
    if sent.is_empty() {
        return Ok(());
    }
    socket.transact(&writer.into_bytes(), &sent)
}

fn encode(op: &LinkOp, sequence: u32, writer: &mut Writer) {
    let asked = flag::REQUEST | flag::ACK;
    let create = asked | flag::CREATE | flag::EXCL;
    let replace = asked | flag::CREATE | flag::REPLACE;
    let mut message = |kind, flags, body: &dyn Fn(&mut Writer)| writer.message(kind, flags, sequence, body);
    match op {
        LinkOp::AddBridge { name, mac, mtu, group } => message(RTM_NEWLINK, create, &|w| {
            link_header(w, 0, 0, 0);
            w.string(IFLA_IFNAME, name);
            w.attribute(IFLA_ADDRESS, mac);
            w.u32(IFLA_MTU, *mtu);
            w.u32(IFLA_GROUP, *group);
            w.nest(IFLA_LINKINFO, |w| w.attribute(IFLA_INFO_KIND, b"bridge"));
        }),
        LinkOp::AddVeth { name, bridge, group, mtu, peer_mac, netns } => {
            message(RTM_NEWLINK, create, &|w| {
                link_header(w, 0, 0, 0);
                w.string(IFLA_IFNAME, name);
                w.u32(IFLA_MTU, *mtu);
                w.u32(IFLA_GROUP, *group);
                w.u32(IFLA_MASTER, *bridge);
                w.nest(IFLA_LINKINFO, |w| {
                    w.attribute(IFLA_INFO_KIND, b"veth");
                    w.nest(IFLA_INFO_DATA, |w| {
                        w.nest(VETH_INFO_PEER, |w| {
                            link_header(w, 0, 0, 0);
                            w.string(IFLA_IFNAME, POD_LINK);
                            w.attribute(IFLA_ADDRESS, peer_mac);
                            w.u32(IFLA_MTU, *mtu);
                            w.attribute(IFLA_NET_NS_FD, &netns.to_ne_bytes());
                        });
                    });
                });
            });
        }
        LinkOp::SetPort { name, bridge, alias } => message(RTM_NEWLINK, asked, &|w| {
            link_header(w, 0, IFF_UP, IFF_UP);
            w.string(IFLA_IFNAME, name);
            w.string(IFLA_IFALIAS, alias);
            w.u32(IFLA_MASTER, *bridge);
        }),
        LinkOp::Hairpin { name } => message(RTM_NEWLINK, asked, &|w| {
            link_header(w, 0, 0, 0);
            w.string(IFLA_IFNAME, name);
            w.nest(IFLA_LINKINFO, |w| {
                w.attribute(IFLA_INFO_SLAVE_KIND, b"bridge");
                w.nest(IFLA_INFO_SLAVE_DATA, |w| w.u8(IFLA_BRPORT_MODE, 1));
            });
        }),
        LinkOp::Up { index, .. } => message(RTM_NEWLINK, asked, &|w| link_header(w, *index, IFF_UP, IFF_UP)),
        LinkOp::Down { name } => message(RTM_NEWLINK, asked, &|w| {
            link_header(w, 0, 0, IFF_UP);
            w.string(IFLA_IFNAME, name);
        }),
        LinkOp::SetMtu { index, mtu, .. } => message(RTM_NEWLINK, asked, &|w| {
            link_header(w, *index, 0, 0);
            w.u32(IFLA_MTU, *mtu);
        }),
        LinkOp::AddAddress { index, address, .. } => {
            message(RTM_NEWADDR, replace, &|w| address_body(w, *index, *address));
        }
        LinkOp::RemoveAddress { index, address, .. } => {
            message(RTM_DELADDR, asked, &|w| address_body(w, *index, *address));
        }
        LinkOp::DefaultRoute { index, gateway, .. } => message(RTM_NEWROUTE, replace, &|w| {
            w.raw(&[AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST]);
            w.raw(&[0; 4]);
            w.attribute(RTA_GATEWAY, &gateway.octets());
            w.u32(RTA_OIF, *index);
        }),
        LinkOp::Remove { index, .. } => message(RTM_DELLINK, asked, &|w| link_header(w, *index, 0, 0)),
        LinkOp::MoveToGroup { index, group, .. } => message(RTM_NEWLINK, asked, &|w| {
            link_header(w, *index, 0, 0);
            w.u32(IFLA_GROUP, *group);
        }),
        LinkOp::RemoveGroup { group } => message(RTM_DELLINK, asked, &|w| {
            link_header(w, 0, 0, 0);
            w.u32(IFLA_GROUP, *group);
        }),
    }
}

fn link_header(w: &mut Writer, index: u32, flags: u32, change: u32) {
    w.raw(&[0; 4]);
    w.raw(&index.to_ne_bytes());
    w.raw(&flags.to_ne_bytes());
    w.raw(&change.to_ne_bytes());
}

fn address_body(w: &mut Writer, index: u32, address: Ipv4Net) {
    w.raw(&[AF_INET, address.prefix_len(), 0, 0]);
    w.raw(&index.to_ne_bytes());
    w.attribute(IFA_LOCAL, &address.addr().octets());
    w.attribute(IFA_ADDRESS, &address.addr().octets());
}

/// `ip` with the prefix length of `subnet`.
pub(crate) fn address_in(ip: Ipv4Addr, subnet: Ipv4Net) -> Ipv4Net {
    Ipv4Net::new(ip, subnet.prefix_len()).expect("the prefix length comes from a valid network")
}

pub(crate) fn observe_link(socket: &mut Netlink, name: &str) -> Result<Option<Link>, NetlinkError> {
    let body = |w: &mut Writer| {
        link_header(w, 0, 0, 0);
        w.string(IFLA_IFNAME, name);
        w.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    };
    socket.get(&format!("look up the link {name}"), RTM_GETLINK, body, parse_link)
}

pub(crate) fn observe_links(socket: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    let body = |w: &mut Writer| {
        link_header(w, 0, 0, 0);
        w.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    };
    socket.list("list the links", RTM_GETLINK, body, parse_link)
}

/// Links with their counters.
pub(crate) fn observe_traffic(socket: &mut Netlink) -> Result<Vec<(Link, Traffic)>, NetlinkError> {
    let body = |w: &mut Writer| link_header(w, 0, 0, 0);
    socket.list("list the links with their counters", RTM_GETLINK, body, |body| {
        let counters = wire::find(body.get(16..)?, IFLA_STATS64)?;
        // rtnl_link_stats64; what this end receives, the pod's end has sent.
        let [out_packets, in_packets, out_bytes, in_bytes, out_errors, in_errors, out_dropped, in_dropped] =
            std::array::from_fn(|n| wire::read_u64(counters, n * 8).unwrap_or(0));
        let traffic = Traffic {
            in_bytes,
            in_packets,
            in_errors,
            in_dropped,
            out_bytes,
            out_packets,
            out_errors,
            out_dropped,
        };
        Some((parse_link(body)?, traffic))
    })
}

/// (link, address with its prefix length) of every IPv4 address.
pub(crate) fn observe_addresses(socket: &mut Netlink) -> Result<Vec<(u32, Ipv4Net)>, NetlinkError> {
    let body = |w: &mut Writer| w.raw(&[AF_INET, 0, 0, 0, 0, 0, 0, 0]);
    socket.list("list the addresses", RTM_GETADDR, body, |body| {
        let list = body.get(8..)?;
        let address = wire::find(list, IFA_LOCAL).or_else(|| wire::find(list, IFA_ADDRESS))?;
        let address = Ipv4Net::new(read_ip(address)?, *body.get(1)?).ok()?;
        Some((wire::read_u32(body, 4)?, address))
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) destination: Ipv4Net,
    pub(crate) link: u32,
    pub(crate) metric: u32,
    local: bool,
}

impl Route {
    /// One that sends packets to other hosts, unlike the entries for the host's own addresses.
    pub(crate) fn leaves(&self) -> bool {
        !self.local
    }
}

pub(crate) fn observe_routes(socket: &mut Netlink) -> Result<Vec<Route>, NetlinkError> {
    let body = |w: &mut Writer| w.raw(&[AF_INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    socket.list("list the routes", RTM_GETROUTE, body, |body| {
        let list = body.get(12..)?;
        let destination = wire::find(list, RTA_DST).map_or(Some(Ipv4Addr::UNSPECIFIED), read_ip)?;
        let number = |kind| wire::find(list, kind).and_then(|value| wire::read_u32(value, 0)).unwrap_or(0);
        Some(Route {
            destination: Ipv4Net::new(destination, *body.get(1)?).ok()?,
            link: number(RTA_OIF),
            metric: number(RTA_PRIORITY),
            local: *body.get(7)? >= RTN_LOCAL,
        })
    })
}

/// MTU of the device that the default route uses; `None` on a host without one.
pub(crate) fn observe_uplink_mtu(socket: &mut Netlink) -> Result<Option<u32>, NetlinkError> {
    let routes = observe_routes(socket)?;
    let uplink = routes
        .iter()
        .filter(|route| route.leaves() && route.destination.prefix_len() == 0 && route.link != 0)
        .min_by_key(|route| route.metric);
    let Some(uplink) = uplink else {
        return Ok(None);
    };
    let body = |w: &mut Writer| {
        link_header(w, uplink.link, 0, 0);
        w.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    };
    let link = socket.get("look up the link of the default route", RTM_GETLINK, body, parse_link)?;
    Ok(link.map(|link| link.mtu))
}

/// Waits until a link carries packets. Without that, the first packet after an attach is lost now and then, and whoever
/// sent it waits a second before the next try. Since kernel 6.9 asking is enough: it makes the
/// kernel do its pending work on the link before it answers.
pub(crate) fn wait_until_running(socket: &mut Netlink, name: &str) -> Result<(), NetlinkError> {
    let deadline = Instant::now() + START_LIMIT;
    while observe_link(socket, name)?.is_some_and(|link| !link.running) && Instant::now() < deadline {
        thread::sleep(START_POLL);
    }
    Ok(())
}

/// Removes a link; one that is gone already is as good.
pub(crate) fn remove_link(socket: &mut Netlink, link: &Link) -> Result<bool, NetlinkError> {
    absent_is_fine(apply_ops(socket, &[LinkOp::Remove { index: link.index, name: link.name.clone() }]))
}

pub(crate) fn remove_group(socket: &mut Netlink, group: u32) -> Result<bool, NetlinkError> {
    absent_is_fine(apply_ops(socket, &[LinkOp::RemoveGroup { group }]))
}

fn absent_is_fine(result: Result<(), NetlinkError>) -> Result<bool, NetlinkError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is(Errno::ENODEV as i32) => Ok(false),
        Err(error) => Err(error),
    }
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let list = body.get(16..)?;
    let number = |kind| wire::find(list, kind).and_then(|value| wire::read_u32(value, 0)).unwrap_or(0);
    let string = |kind| wire::find(list, kind).map(wire::text).unwrap_or_default();
    let info = wire::find(list, IFLA_LINKINFO).unwrap_or(&[]);
    Some(Link {
        index: wire::read_u32(body, 4)?,
        name: string(IFLA_IFNAME),
        up: wire::read_u32(body, 8)? & IFF_UP != 0,
        running: matches!(wire::find(list, IFLA_OPERSTATE), Some([IF_OPER_UP])),
        mtu: number(IFLA_MTU),
        master: number(IFLA_MASTER),
        group: number(IFLA_GROUP),
        alias: string(IFLA_IFALIAS),
        kind: wire::find(info, IFLA_INFO_KIND).map(wire::text).unwrap_or_default(),
    })
}

fn read_ip(value: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(value.get(..4)?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NetConfig {
        NetConfig::new("", "10.77.0.0/16".parse().unwrap())
    }

    #[track_caller]
    fn check(ops: &[LinkOp], expected: &[&str]) {
        assert_eq!(ops.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_bridge_gets_what_it_lacks() {
        let good: Ipv4Net = "10.77.0.1/16".parse().unwrap();
        let stale: Ipv4Net = "10.1.0.1/24".parse().unwrap();
        let link = |up, mtu| Link { index: 7, up, mtu, ..Link::default() };
        check(&lower_bridge(&config(), 1400, None, &[]), &["create the bridge ek0 (mtu 1400)"]);
        check(
            &lower_bridge(&config(), 1400, Some(&link(false, 1500)), &[stale]),
            &[
                "set the mtu of ek0 to 1400",
                "remove the address 10.1.0.1/24 from ek0",
                "add the address 10.77.0.1/16 to ek0",
                "bring up ek0",
            ],
        );
        check(&lower_bridge(&config(), 1400, Some(&link(true, 1400)), &[good]), &[]);
    }

    #[test]
    fn a_pod_gets_its_address_alone() {
        let ip = Ipv4Addr::new(10, 77, 0, 9);
        let found = ["10.77.0.8/16".parse().unwrap(), "10.77.0.9/16".parse().unwrap()];
        check(
            &lower_inside(&config(), 2, ip, &found),
            &[
                "remove the address 10.77.0.8/16 from eth0",
                "bring up lo",
                "add the address 10.77.0.9/16 to eth0",
                "bring up eth0",
                "set the default route via 10.77.0.1 on eth0",
            ],
        );
        check(
            &lower_port(&config(), "ek1", "web", 7, 1500, ip, 3),
            &[
                "create the link ek1 to a pod (mtu 1500)",
                "bring up the link ek1 of web",
                "let ek1 send frames back",
            ],
        );
    }

    #[test]
    fn the_encoding_of_a_veth() {
        let [add, ..] = lower_port(&config(), "ekab", "web", 7, 1500, Ipv4Addr::new(10, 77, 0, 9), 3);
        let mut writer = Writer::default();
        encode(&add, 9, &mut writer);
        let bytes = writer.into_bytes();
        let message = wire::messages(&bytes).next().unwrap();
        assert_eq!((message.kind, message.flags, message.sequence), (RTM_NEWLINK, 0x605, 9));
        let list = &message.body[16..];
        assert_eq!(wire::find(list, IFLA_MASTER), Some(&7u32.to_ne_bytes()[..]));
        let data = wire::find(wire::find(list, IFLA_LINKINFO).unwrap(), IFLA_INFO_DATA).unwrap();
        let peer = &wire::find(data, VETH_INFO_PEER).unwrap()[16..];
        assert_eq!(wire::find(peer, IFLA_NET_NS_FD), Some(&3u32.to_ne_bytes()[..]));
        assert_eq!(wire::find(peer, IFLA_ADDRESS), Some(&[2, 0x65, 10, 77, 0, 9][..]));
        assert_eq!(wire::text(wire::find(peer, IFLA_IFNAME).unwrap()), "eth0");
    }

    #[test]
    fn whatever_arrives_is_parsed_without_panic() {
        // xorshift: the same bytes in every run.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..20_000 {
            let mut bytes = [0u8; 96];
            for byte in &mut bytes {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Mostly small numbers: lengths that fit lead deeper.
                *byte = if state & 3 == 0 { state as u8 } else { (state as u8) & 0x1f };
            }
            let _ = parse_link(&bytes);
            for message in wire::messages(&bytes) {
                let _ = wire::attributes(message.body).count();
            }
        }
    }
}
