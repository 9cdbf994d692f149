//! What the table says.
//!
//! ```text
//! raw          prerouting -300   drop: loopback addresses from outside, pod addresses not from our bridge
//! prerouting   prerouting -100   to an address of this host: jump publish
//! output       output     -100   the same for connections of the host itself
//! publish                        host address . protocol . port -> pod; then protocol . port -> pod
//! postrouting  postrouting 100   masquerade: 127.0.0.1 -> pod, pod -> pod through a published port, pod -> world
//! ```
//!
//! There is no forward chain: an accept there would not outweigh a drop of another table, and our own drops come
//! before routing. `Net::forward_drops` finds the tables that would drop.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use crate::config::{NetConfig, digest, hex};
use crate::filter::model::{
    Chain, Compare, DataType, Expression, Header, Hook, Map, MetaKey, Register, Rule, Table,
};

pub(crate) const MAP_BY_ADDRESS: &str = "publish-by-address";
pub(crate) const MAP_ANY: &str = "publish-any";
const PUBLISH: &str = "publish";

const NFPROTO_IPV4: u8 = 2;
const IPV4_SOURCE_OFFSET: u32 = 12;
const IPV4_DESTINATION_OFFSET: u32 = 16;
const TRANSPORT_DESTINATION_PORT_OFFSET: u32 = 2;
const RTN_LOCAL: u32 = 2;
/// IPS_DST_NAT: the destination of this connection was rewritten.
const STATUS_DNAT: u32 = 1 << 5;
const IFNAMSIZ: usize = 16;

const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// Number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

impl std::str::FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(text: &str) -> Result<Protocol, UnknownProtocol> {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .find(|protocol| protocol.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| UnknownProtocol(text.to_owned()))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown protocol {0:?}: TCP, UDP or SCTP")]
pub struct UnknownProtocol(pub String);

/// One port of the host that leads to a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Publish {
    /// `None` (or 0.0.0.0): every address of the host.
    pub host_ip: Option<Ipv4Addr>,
    pub host_port: u16,
    pub ip: Ipv4Addr,
    pub container_port: u16,
    pub protocol: Protocol,
}

impl Publish {
    /// `None`: every address of the host.
    pub(crate) fn address(&self) -> Option<Ipv4Addr> {
        self.host_ip.filter(|ip| !ip.is_unspecified())
    }
}

/// The end of the key in both maps.
pub(crate) fn key_of_port(publish: &Publish) -> [u8; 8] {
    let [high, low] = publish.host_port.to_be_bytes();
    [publish.protocol.number(), 0, 0, 0, high, low, 0, 0]
}

/// The whole table. Where two entries claim one host port, the first one keeps it.
pub(crate) fn lower_table(config: &NetConfig, publish: &[Publish]) -> Table {
    let (mut by_address, mut any) = (BTreeMap::new(), BTreeMap::new());
    for entry in publish {
        let port = key_of_port(entry);
        let target = [&entry.ip.octets()[..], &padded(entry.container_port)].concat();
        match entry.address() {
            Some(ip) => by_address.entry([&ip.octets()[..], &port].concat()).or_insert(target),
            None => any.entry(port.to_vec()).or_insert(target),
        };
    }
    use DataType::{Address, Protocol, Service};
    let target = &[Address, Service];
    Table {
        name: config.table.clone(),
        maps: vec![
            Map {
                name: MAP_BY_ADDRESS,
                key: &[Address, Protocol, Service],
                data: target,
                elements: by_address.into_iter().collect(),
            },
            Map {
                name: MAP_ANY,
                key: &[Protocol, Service],
                data: target,
                elements: any.into_iter().collect(),
            },
        ],
        chains: chains(config),
    }
}

/// What the table carries as its comment: it names the owner to people and changes with every change of the table.
pub(crate) fn fingerprint(table: &Table) -> String {
    format!("managed by evenkeel, {}", hex(&digest(&["table", &table.to_string()])[..16]))
}

fn chains(config: &NetConfig) -> Vec<Chain> {
    let bridge = config.bridge.as_str();
    let to_publish = || {
        let mut rule = vec![Expression::DestinationKind];
        rule.extend([equal(RTN_LOCAL.to_ne_bytes()), Expression::Jump(PUBLISH)]);
        vec![Rule { comment: "", expressions: rule }]
    };
    let base = |name, kind, number, priority, rules| Chain {
        name,
        hook: Some(Hook { kind, number, priority }),
        rules,
    };
    vec![
        Chain { name: PUBLISH, hook: None, rules: publish_rules() },
        base("raw", "filter", PREROUTING, -300, raw_rules(config, bridge)),
        base("prerouting", "nat", PREROUTING, -100, to_publish()),
        base("output", "nat", OUTPUT, -100, to_publish()),
        base("postrouting", "nat", POSTROUTING, 100, postrouting_rules(config, bridge)),
    ]
}

fn publish_rules() -> Vec<Rule> {
    let transport = |to| Expression::Meta { key: MetaKey::Transport, to };
    let port = |to| Expression::Payload {
        header: Header::Transport,
        offset: TRANSPORT_DESTINATION_PORT_OFFSET,
        length: 2,
        to,
    };
    let redirect = [Expression::Redirect];
    let by_address = [
        address(IPV4_DESTINATION_OFFSET),
        transport(Register::Second),
        port(Register::Third),
        Expression::Map(MAP_BY_ADDRESS),
    ];
    let any = [transport(Register::First), port(Register::Second), Expression::Map(MAP_ANY)];
    vec![ipv4_rule("", &[&by_address, &redirect]), ipv4_rule("", &[&any, &redirect])]
}

/// Before connection tracking, so that replies to masqueraded connections (to an address of the host) are not
/// mistaken for access to pods.
fn raw_rules(config: &NetConfig, bridge: &str) -> Vec<Rule> {
    let drop = [Expression::Count, Expression::Drop];
    let not_from = |name| [interface(MetaKey::InputName), Expression::Compare(Compare::Unequal, link(name))];
    vec![
        // The redirect of 127.0.0.1:port would otherwise turn packets that the kernel drops as martian into
        // good ones, and `route_localnet` would let pods in.
        ipv4_rule(
            "loopback addresses from outside",
            &[&not_from("lo"), &to_loopback(IPV4_DESTINATION_OFFSET), &drop],
        ),
        ipv4_rule(
            "loopback addresses from outside",
            &[&not_from("lo"), &to_loopback(IPV4_SOURCE_OFFSET), &drop],
        ),
        ipv4_rule(
            "pods are reached through published ports only",
            &[&not_from(bridge), &within(config, IPV4_DESTINATION_OFFSET), &drop],
        ),
    ]
}

fn postrouting_rules(config: &NetConfig, bridge: &str) -> Vec<Rule> {
    let output = |how| [interface(MetaKey::OutputName), Expression::Compare(how, link(bridge))];
    let masquerade = [Expression::Masquerade];
    // The source names the sender here, not the input interface: that one is empty for bridged packets.
    let redirected = [
        Expression::ConnectionStatus,
        Expression::Mask(STATUS_DNAT.to_ne_bytes().to_vec()),
        Expression::Compare(Compare::Unequal, vec![0; 4]),
    ];
    vec![
        ipv4_rule(
            "this host through 127.0.0.1",
            &[&to_loopback(IPV4_SOURCE_OFFSET), &output(Compare::Equal), &masquerade],
        ),
        ipv4_rule(
            "pod to pod through a published port",
            &[&within(config, IPV4_SOURCE_OFFSET), &output(Compare::Equal), &redirected, &masquerade],
        ),
        ipv4_rule(
            "pod to the world",
            &[&within(config, IPV4_SOURCE_OFFSET), &output(Compare::Unequal), &masquerade],
        ),
    ]
}

fn ipv4_rule(comment: &'static str, parts: &[&[Expression]]) -> Rule {
    let family = [Expression::Meta { key: MetaKey::Family, to: Register::First }, equal([NFPROTO_IPV4])];
    Rule { comment, expressions: [&family[..], &parts.concat()].concat() }
}

fn interface(key: MetaKey) -> Expression {
    Expression::Meta { key, to: Register::First }
}

fn address(offset: u32) -> Expression {
    Expression::Payload { header: Header::Network, offset, length: 4, to: Register::First }
}

fn to_loopback(offset: u32) -> [Expression; 3] {
    [address(offset), Expression::Mask(vec![255, 0, 0, 0]), equal([127, 0, 0, 0])]
}

fn within(config: &NetConfig, offset: u32) -> [Expression; 3] {
    let mask = config.subnet.netmask().octets().to_vec();
    [address(offset), Expression::Mask(mask), equal(config.subnet.network().octets())]
}

fn equal(value: impl Into<Vec<u8>>) -> Expression {
    Expression::Compare(Compare::Equal, value.into())
}

/// An interface name as the kernel compares it: all 16 bytes.
fn link(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(host_ip: Option<[u8; 4]>, host_port: u16, pod: u8, protocol: Protocol) -> Publish {
        Publish {
            host_ip: host_ip.map(Ipv4Addr::from),
            host_port,
            ip: Ipv4Addr::new(10, 77, 0, pod),
            container_port: 80,
            protocol,
        }
    }

    fn lowered(publish: &[Publish]) -> Table {
        lower_table(&NetConfig::new("", "10.77.0.0/16".parse().unwrap()), publish)
    }

    #[test]
    fn the_first_claim_to_a_port_wins_and_addresses_have_a_map_of_their_own() {
        let text = lowered(&[
            entry(None, 8080, 5, Protocol::Tcp),
            entry(Some([0, 0, 0, 0]), 8080, 6, Protocol::Tcp),
            entry(None, 8080, 6, Protocol::Udp),
            entry(Some([127, 0, 0, 1]), 8080, 7, Protocol::Tcp),
        ])
        .to_string();
        let maps = text.split("chain publish").next().unwrap();
        assert_eq!(
            maps,
            "map publish-by-address\n  0x0100007f 0x00000006 0x0000901f : 0x07004d0a 0x00005000\n\
             map publish-any\n  0x00000006 0x0000901f : 0x05004d0a 0x00005000\n  \
             0x00000011 0x0000901f : 0x06004d0a 0x00005000\n"
        );
    }

    #[test]
    fn the_whole_table_as_text() {
        let expected = "\
map publish-by-address
map publish-any
chain publish
  #
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ payload load 4b @ network header + 16 => reg 1 ]
  [ meta load l4proto => reg 9 ]
  [ payload load 2b @ transport header + 2 => reg 10 ]
  [ lookup reg 1 set publish-by-address dreg 1 ]
  [ nat dnat ip addr_min reg 1 proto_min reg 9 ]
  #
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ meta load l4proto => reg 1 ]
  [ payload load 2b @ transport header + 2 => reg 9 ]
  [ lookup reg 1 set publish-any dreg 1 ]
  [ nat dnat ip addr_min reg 1 proto_min reg 9 ]
chain raw type filter hook 0 priority -300
  # loopback addresses from outside
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ meta load iifname => reg 1 ]
  [ cmp neq reg 1 0x00006f6c 0x00000000 0x00000000 0x00000000 ]
  [ payload load 4b @ network header + 16 => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x000000ff ) ^ 0x00000000 ]
  [ cmp eq reg 1 0x0000007f ]
  [ counter ]
  [ immediate reg 0 drop ]
  # loopback addresses from outside
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ meta load iifname => reg 1 ]
  [ cmp neq reg 1 0x00006f6c 0x00000000 0x00000000 0x00000000 ]
  [ payload load 4b @ network header + 12 => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x000000ff ) ^ 0x00000000 ]
  [ cmp eq reg 1 0x0000007f ]
  [ counter ]
  [ immediate reg 0 drop ]
  # pods are reached through published ports only
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ meta load iifname => reg 1 ]
  [ cmp neq reg 1 0x00306b65 0x00000000 0x00000000 0x00000000 ]
  [ payload load 4b @ network header + 16 => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x0000ffff ) ^ 0x00000000 ]
  [ cmp eq reg 1 0x00004d0a ]
  [ counter ]
  [ immediate reg 0 drop ]
chain prerouting type nat hook 0 priority -100
  #
  [ fib daddr type => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ immediate reg 0 jump -> publish ]
chain output type nat hook 3 priority -100
  #
  [ fib daddr type => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ immediate reg 0 jump -> publish ]
chain postrouting type nat hook 4 priority 100
  # this host through 127.0.0.1
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ payload load 4b @ network header + 12 => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x000000ff ) ^ 0x00000000 ]
  [ cmp eq reg 1 0x0000007f ]
  [ meta load oifname => reg 1 ]
  [ cmp eq reg 1 0x00306b65 0x00000000 0x00000000 0x00000000 ]
  [ masq ]
  # pod to pod through a published port
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ payload load 4b @ network header + 12 => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x0000ffff ) ^ 0x00000000 ]
  [ cmp eq reg 1 0x00004d0a ]
  [ meta load oifname => reg 1 ]
  [ cmp eq reg 1 0x00306b65 0x00000000 0x00000000 0x00000000 ]
  [ ct load status => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x00000020 ) ^ 0x00000000 ]
  [ cmp neq reg 1 0x00000000 ]
  [ masq ]
  # pod to the world
  [ meta load nfproto => reg 1 ]
  [ cmp eq reg 1 0x00000002 ]
  [ payload load 4b @ network header + 12 => reg 1 ]
  [ bitwise reg 1 = ( reg 1 & 0x0000ffff ) ^ 0x00000000 ]
  [ cmp eq reg 1 0x00004d0a ]
  [ meta load oifname => reg 1 ]
  [ cmp neq reg 1 0x00306b65 0x00000000 0x00000000 0x00000000 ]
  [ masq ]
";
        let text: Vec<String> =
            lowered(&[]).to_string().lines().map(|line| line.trim_end().to_owned()).collect();
        assert_eq!(text.join("\n"), expected.trim_end());
    }

    #[test]
    fn the_fingerprint_follows_every_difference() {
        let one = fingerprint(&lowered(&[entry(None, 1, 2, Protocol::Tcp)]));
        assert_eq!(one, fingerprint(&lowered(&[entry(None, 1, 2, Protocol::Tcp)])));
        for other in [
            lowered(&[]),
            lowered(&[entry(None, 2, 2, Protocol::Tcp)]),
            lowered(&[entry(None, 1, 3, Protocol::Tcp)]),
            lowered(&[entry(None, 1, 2, Protocol::Udp)]),
            lower_table(
                &NetConfig::new("", "10.78.0.0/16".parse().unwrap()),
                &[entry(None, 1, 2, Protocol::Tcp)],
            ),
        ] {
            assert_ne!(one, fingerprint(&other));
        }
    }

    #[test]
    fn protocols_are_read_in_any_case() {
        assert_eq!("tcp".parse(), Ok(Protocol::Tcp));
        assert_eq!("SCTP".parse(), Ok(Protocol::Sctp));
        assert_eq!("icmp".parse::<Protocol>(), Err(UnknownProtocol("icmp".to_owned())));
    }
}
