//! Whether a port of the host is free to be published, and who has it otherwise.

use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use socket2::{Domain, Socket, Type};

use crate::filter::lower::Protocol;

/// TCP_LISTEN in the `st` column; for UDP 07 means bound and not connected.
const TCP_LISTENING: &str = "0A";
const UDP_UNCONNECTED: &str = "07";

/// A process of the host that has the port open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortHolder {
    pub pid: u32,
    pub command: String,
}

impl fmt::Display for PortHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error("host port {protocol} {port} is in use by {}", holder.as_ref().map_or("a socket that no visible process owns".to_owned(), ToString::to_string))]
    InUse { port: u16, protocol: Protocol, holder: Option<PortHolder> },
    #[error("host port {protocol} {port} is published by another evenkeel instance (table {table})")]
    Published { port: u16, protocol: Protocol, table: String },
    #[error("this host has no address {ip}")]
    NoSuchAddress { ip: Ipv4Addr },
    #[error("find out whether host port {protocol} {port} is free")]
    Unknown { port: u16, protocol: Protocol, source: io::Error },
}

/// Whether a socket of the host has the port: published, it would no longer be reached. Binds for an instant
/// and never listens, so no client is accepted by mistake. SCTP is taken as free.
pub fn check_host_port(host_ip: Option<Ipv4Addr>, port: u16, protocol: Protocol) -> Result<(), PortError> {
    let ip = host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let Err(source) = try_bind(ip, port, protocol) else {
        return Ok(());
    };
    Err(match source.kind() {
        io::ErrorKind::AddrInUse => {
            PortError::InUse { port, protocol, holder: find_holder(Path::new("/proc"), ip, port, protocol) }
        }
        io::ErrorKind::AddrNotAvailable => PortError::NoSuchAddress { ip },
        _ => PortError::Unknown { port, protocol, source },
    })
}

fn try_bind(ip: Ipv4Addr, port: u16, protocol: Protocol) -> io::Result<()> {
    let kind = match protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
        Protocol::Sctp => return Ok(()),
    };
    let socket = Socket::new(Domain::IPV4, kind, None)?;
    if protocol == Protocol::Tcp {
        // Connections that linger after their server is gone are no obstacle; a listener still is.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&SocketAddrV4::new(ip, port).into())
}

/// `thread-self` and not `self`: the answer is for the network namespace of this thread.
fn find_holder(proc: &Path, ip: Ipv4Addr, port: u16, protocol: Protocol) -> Option<PortHolder> {
    let (tables, state) = match protocol {
        Protocol::Tcp => (["tcp", "tcp6"], TCP_LISTENING),
        Protocol::Udp => (["udp", "udp6"], UDP_UNCONNECTED),
        Protocol::Sctp => return None,
    };
    tables.iter().find_map(|table| {
        let text = fs::read_to_string(proc.join("thread-self/net").join(table)).ok()?;
        parse_sockets(&text, ip, port, state).find_map(|inode| find_process(proc, inode))
    })
}

/// Inodes of the sockets that claim `ip:port`, from the text of `/proc/net/{tcp,udp}{,6}`.
fn parse_sockets<'a>(
    text: &'a str,
    ip: Ipv4Addr,
    port: u16,
    state: &'a str,
) -> impl Iterator<Item = u64> + 'a {
    text.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_whitespace();
        let (address, found_port) = fields.nth(1)?.split_once(':')?;
        let found_state = fields.nth(1)?;
        let inode = fields.nth(5)?.parse().ok()?;
        let claims =
            u16::from_str_radix(found_port, 16) == Ok(port) && found_state == state && covers(address, ip);
        claims.then_some(inode)
    })
}

/// The kernel prints the address as 32-bit words in the byte order of the host. In the IPv6 table, "any" covers
/// IPv4 too, and an IPv4 address stands in the last word.
fn covers(address: &str, ip: Ipv4Addr) -> bool {
    let Ok(found) = u32::from_str_radix(address.get(address.len().saturating_sub(8)..).unwrap_or(""), 16)
    else {
        return false;
    };
    let mapped = address.len() == 8 || address.get(16..24) == Some("FFFF0000");
    let any = address.bytes().all(|digit| digit == b'0') || (mapped && found == 0);
    any || (mapped && (ip.is_unspecified() || found == u32::from_ne_bytes(ip.octets())))
}

fn find_process(proc: &Path, inode: u64) -> Option<PortHolder> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir(proc).ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find_map(|pid| {
        let dir = proc.join(pid.to_string());
        // A process may end while we look.
        let mut descriptors = fs::read_dir(dir.join("fd")).ok()?.flatten();
        descriptors.find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()))?;
        let command = fs::read_to_string(dir.join("comm")).unwrap_or_default();
        Some(PortHolder { pid, command: command.trim_end().to_owned() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn a_held_port_is_refused_and_its_holder_named() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        let both = TcpListener::bind("[::]:0").unwrap();
        let own = std::process::id();
        for (ip, address, protocol) in [
            (None, tcp.local_addr().unwrap(), Protocol::Tcp),
            (Some(Ipv4Addr::LOCALHOST), tcp.local_addr().unwrap(), Protocol::Tcp),
            (Some(Ipv4Addr::LOCALHOST), udp.local_addr().unwrap(), Protocol::Udp),
            (None, both.local_addr().unwrap(), Protocol::Tcp),
        ] {
            let error = check_host_port(ip, address.port(), protocol).unwrap_err();
            assert!(
                matches!(&error, PortError::InUse { holder: Some(holder), .. } if holder.pid == own),
                "{error}"
            );
        }
        let port = tcp.local_addr().unwrap().port();
        check_host_port(Some(Ipv4Addr::LOCALHOST), port, Protocol::Sctp).unwrap();
        drop(tcp);
        check_host_port(Some(Ipv4Addr::LOCALHOST), port, Protocol::Tcp).unwrap();
        let error = check_host_port(Some(Ipv4Addr::new(192, 0, 2, 77)), port, Protocol::Tcp).unwrap_err();
        assert!(matches!(error, PortError::NoSuchAddress { .. }), "{error}");
    }

    #[test]
    fn socket_tables_are_read_by_state_address_and_port() {
        let table = "  sl  local_address rem_address st tx rx tr tm retrnsmt uid timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 111 1 0 100 0 0 10 0\n\
            1: 00000000:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 222 1 0 100 0 0 10 0\n\
            2: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000 0 0 333 1 0 100 0 0 10 0\n\
            3: 00000000000000000000000000000000:1F92 0:0 0A 0:0 00:0 0 0 0 444 1\n\
            4: 0000000000000000FFFF00000100007F:1F92 0:0 0A 0:0 00:0 0 0 0 555 1\n\
            5: B80D0120000000000000000001000000:1F92 0:0 0A 0:0 00:0 0 0 0 666 1\n\
            garbage\n";
        let found = |ip: [u8; 4], port| -> Vec<u64> {
            parse_sockets(table, Ipv4Addr::from(ip), port, TCP_LISTENING).collect()
        };
        assert_eq!(found([0, 0, 0, 0], 0x1f90), [111]);
        assert_eq!(found([127, 0, 0, 1], 0x1f90), [111]);
        assert_eq!(found([10, 0, 0, 1], 0x1f90), [0u64; 0]);
        assert_eq!(found([10, 0, 0, 1], 0x1f91), [222]);
        assert_eq!(found([127, 0, 0, 1], 0x1f92), [444, 555]);
    }
}
