//! A pod's network: namespaces, bridge, veth, addresses, and the packet filter, spoken to the kernel over netlink.
//!
//! Never starts a process (`ip`, `nft`), never touches a link or table that does not bear the instance's mark,
//! never decides what should run.
//!
//! Kernel: 5.2 for address translation in `inet` tables, 5.10 for the table's comment, 5.12 and 6.9 for owned tables, 6.9
//! for links that carry packets the moment `attach` returns without polling. Older ones lose only the last three.
//!
//! IPv4 only. A published port answers on every IPv4 address of the host and on 127.0.0.1, not on `[::1]`: the kernel
//! has no counterpart of `route_localnet` for IPv6.

mod address;
mod config;
mod filter;
mod link;
mod namespace;
mod net;
mod port;
mod resolver;
mod sysctl;

#[cfg(test)]
mod kernel_tests;

pub use address::{AssignError, NoFreeSubnet, assign, choose_subnet};
pub use config::{NetConfig, TableOwnership};
pub use filter::lower::{Protocol, Publish, UnknownProtocol};
pub use filter::observe::ForwardDrop;
pub use filter::watch::FilterWatch;
pub use keel_sys::netlink::NetlinkError;
pub use link::{POD_LINK, Traffic};
pub use namespace::{
    NamespaceError, NamespaceKind, create_namespaces, create_owned_namespaces, in_netns, observe_namespaces,
    pin_namespaces_of, remove_namespaces,
};
pub use net::{Attached, BridgeReport, Net, NetError, NetPortError, Observed, observe_used_subnets};
pub use port::{PortError, PortHolder, check_host_port};
pub use resolver::{
    Dns, HostsEntry, host_resolv_conf, render_host_network_resolv_conf, render_hosts, render_hosts_entries,
    render_resolv_conf,
};
pub use sysctl::SysctlError;
