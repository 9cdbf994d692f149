//! What one instance owns on the host's network, all of it derived from its tag.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

/// Longest interface name, without the terminating zero (IFNAMSIZ - 1).
pub(crate) const LINK_NAME_BYTES: usize = 15;

/// Every instance's table begins so.
pub(crate) const TABLE_PREFIX: &str = "evenkeel";

/// Names, numbers and addresses of one instance. Two tags share none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    pub tag: String,
    pub subnet: Ipv4Net,
    pub bridge: String,
    pub table: String,
    pub veth_prefix: String,
    /// Link group of the bridge and of every veth: crash leftovers go in one request.
    pub group: u32,
    /// `None`: that of the device that the default route uses.
    pub mtu: Option<u32>,
    pub ownership: TableOwnership,
}

/// Who may change our packet-filter table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableOwnership {
    /// Anyone with the right to change packet filters. The table stays when this process ends.
    #[default]
    Shared,
    /// Only this process while it lives (kernel 5.12+): `nft flush ruleset` passes it by. With kernel 6.9+ the table
    /// stays when the process ends, and the next process takes it over; on an older kernel it would
    /// vanish with the process, so there the table is shared.
    Owned,
}

impl NetConfig {
    /// `tag` is empty for the default instance, else `-<hex digits>`.
    pub fn new(tag: &str, subnet: Ipv4Net) -> NetConfig {
        let bare = tag.trim_start_matches('-');
        NetConfig {
            tag: tag.to_owned(),
            subnet: subnet.trunc(),
            bridge: if bare.is_empty() { "ek0".to_owned() } else { format!("ek{bare}") },
            table: format!("{TABLE_PREFIX}{tag}"),
            veth_prefix: "ek".to_owned(),
            group: group_of(tag),
            mtu: None,
            ownership: TableOwnership::default(),
        }
    }

    /// First address of the subnet: the bridge, which is the pods' gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.network()).wrapping_add(1))
    }

    /// Name of the host's end of a pod's veth. The namespace's inode is part of it, so that a pod
    /// created anew never meets the link of its predecessor, which the kernel removes in its own time.
    pub fn veth_name(&self, id: &str, netns_inode: u64) -> String {
        let room = LINK_NAME_BYTES.saturating_sub(self.veth_prefix.len()).min(11);
        let hash = hex(&digest(&[&self.tag, id, &netns_inode.to_string()]));
        format!("{}{}", self.veth_prefix, &hash[..room])
    }
}

/// Same address, same MAC: a pod that comes back is reached at once, whatever neighbours remember.
/// 02 marks it as locally administered.
pub(crate) fn mac_of(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x02, 0x65, a, b, c, d]
}

pub(crate) fn digest(parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.finalize().into()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Never 0, which is the group of every link that nobody grouped; never negative in tools that print it signed.
fn group_of(tag: &str) -> u32 {
    let [a, b, c, ..] = digest(&["link group", tag]);
    u32::from_be_bytes([0x65, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(tag: &str) -> NetConfig {
        NetConfig::new(tag, "10.77.0.0/16".parse().unwrap())
    }

    #[test]
    fn tags_share_nothing() {
        let (a, b) = (config(""), config("-12ab9f"));
        assert_eq!((a.bridge.as_str(), a.table.as_str()), ("ek0", "evenkeel"));
        assert_eq!((b.bridge.as_str(), b.table.as_str()), ("ek12ab9f", "evenkeel-12ab9f"));
        assert_ne!(a.group, b.group);
        assert_ne!(a.veth_name("web", 1), b.veth_name("web", 1));
    }

    #[test]
    fn link_names_fit_and_change_with_the_namespace() {
        let c = config("");
        let name = c.veth_name(&"x".repeat(60), u64::MAX);
        assert!(name.len() <= LINK_NAME_BYTES && name.starts_with("ek"), "{name}");
        assert_ne!(c.veth_name("web", 1), c.veth_name("web", 2));
        assert_eq!(c.veth_name("web", 1), c.veth_name("web", 1));
        assert_eq!(c.gateway(), Ipv4Addr::new(10, 77, 0, 1));
    }
}
