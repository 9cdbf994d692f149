//! What this host is and allows, read once.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use crate::spec::{HostDevice, HostResources};

/// Directories of `/dev` that belong to the host's own session and never to a container.
const PRIVATE_DEVICES: &[&str] = &["pts", "shm", "mqueue", "hugepages", "fd"];

/// More open files than this is never a sensible default, whatever the host allows.
const MAX_NOFILE: u64 = 1 << 20;

#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) node_name: String,
    pub(crate) nofile: u64,
    memory_bytes: u64,
    cores: u64,
    pub(crate) capabilities: BTreeSet<String>,
}

impl Facts {
    pub(crate) fn read() -> Facts {
        let nofile = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(_, hard)| hard.min(MAX_NOFILE));
        Facts {
            node_name: node_name(),
            nofile,
            memory_bytes: memory_bytes().unwrap_or(1 << 30),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            capabilities: bounding_set(),
        }
    }

    /// The address is asked for each time: a host may get one long after the start.
    pub(crate) fn resources(&self) -> HostResources {
        HostResources { ip: host_ip(), cores: self.cores, memory_bytes: self.memory_bytes }
    }
}

/// The address that the host reaches others by: that of its default route. Nothing is sent for it, since connecting a
/// datagram socket only looks the route up. Without a route to anywhere it is the loopback.
fn host_ip() -> Ipv4Addr {
    /// TEST-NET-1 (RFC 5737): never a host, so only the default route can lead there.
    const NOWHERE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);
    let ask = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(NOWHERE)?;
        socket.local_addr()
    };
    match ask().map(|address: std::net::SocketAddr| address.ip()) {
        Ok(IpAddr::V4(ip)) if !ip.is_unspecified() => ip,
        _ => Ipv4Addr::LOCALHOST,
    }
}

pub(crate) fn node_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_string())
        .unwrap_or_else(|_| "localhost".to_string())
}

fn memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn bounding_set() -> BTreeSet<String> {
    let mask = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        .unwrap_or(u64::MAX);
    keel_manifest::CAPABILITIES
        .iter()
        .enumerate()
        .filter(|(bit, _)| mask & (1 << bit) != 0)
        .map(|(_, name)| format!("CAP_{name}"))
        .collect()
}

/// Device nodes below `/dev`, for privileged containers.
pub(crate) fn host_devices() -> Vec<HostDevice> {
    let mut found = Vec::new();
    collect_devices(Path::new("/dev"), &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect_devices(dir: &Path, found: &mut Vec<HostDevice>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let kind = meta.file_type();
        let name = entry.file_name();
        if kind.is_dir() {
            if !PRIVATE_DEVICES.iter().any(|private| name == *private) {
                collect_devices(&path, found);
            }
        } else if (kind.is_char_device() || kind.is_block_device()) && name != "console" && name != "ptmx" {
            let (major, minor) = (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
            if let Ok(path) = path.into_os_string().into_string() {
                found.push(HostDevice {
                    path,
                    kind: if kind.is_block_device() { 'b' } else { 'c' },
                    major: i64::try_from(major).unwrap_or(0),
                    minor: i64::try_from(minor).unwrap_or(0),
                    mode: meta.mode() & 0o777,
                });
            }
        }
    }
}
