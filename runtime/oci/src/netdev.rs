//! `linux.netDevices`: devices of the runtime's network namespace moved into the container's, with their permanent global
//! addresses, and set up there.

use crate::error::{RuntimeError, io_error};
use crate::op::NsKind;
use keel_sys::netlink::{NetlinkProtocol, NetlinkSocket};
use keel_sys::{file, process};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A device by its name outside and inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    pub host: String,
    /// May end in `%d`: then the kernel chooses a number.
    pub name: String,
}

/// `IFNAMSIZ` without the terminating zero.
pub(crate) const NAME_BYTES: usize = 15;

/// Larger than any datagram of a dump (the kernel makes them of at most 32 KiB).
const BUFFER_BYTES: usize = 64 << 10;

const HEADER: usize = 16;
const LINK: usize = 16;
const ADDRESS: usize = 8;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE_EXCL: u16 = 0x600;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;

/// Moves all devices into the namespace that `netns` is.
pub(crate) fn move_all(devices: &[NetDevice], netns: &OwnedFd) -> Result<(), RuntimeError> {
    if devices.is_empty() {
        return Ok(());
    }
    let sys = |what: &'static str| move |source: io::Error| RuntimeError::Sys { what, source };
    let mut outside = Route::open().map_err(sys("open a netlink socket"))?;
    let own = file::openat(file::cwd(), c"/proc/self/ns/net", libc::O_RDONLY, 0)
        .map_err(sys("open the own network namespace"))?;
    // A netlink socket belongs for ever to the namespace that it was made in.
    process::setns(netns, NsKind::Net.flag()).map_err(sys("join the container's network namespace"))?;
    let inside = Route::open();
    process::setns(&own, NsKind::Net.flag()).map_err(sys("return to the own network namespace"))?;
    let mut inside = inside.map_err(sys("open a netlink socket"))?;
    for device in devices {
        move_one(device, netns, &mut outside, &mut inside)?;
    }
    Ok(())
}

fn move_one(
    device: &NetDevice,
    netns: &OwnedFd,
    outside: &mut Route,
    inside: &mut Route,
) -> Result<(), RuntimeError> {
    let host = &device.host;
    let index = outside.index_of(host).map_err(io_error("linux.netDevices: find device", host))?;
    let addresses =
        outside.addresses(index).map_err(io_error("linux.netDevices: read the addresses of", host))?;
    let before =
        inside.indexes().map_err(io_error("linux.netDevices: list the devices of", "the container"))?;
    let mut attributes = Vec::new();
    attribute(&mut attributes, IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
    attribute(&mut attributes, IFLA_IFNAME, &with_zero(&device.name));
    outside
        .act(libc::RTM_NEWLINK, 0, &link(index, 0, 0), &attributes)
        .map_err(io_error("linux.netDevices: move device", format!("{host} as {}", device.name)))?;
    // Its number is another one when the container had a device of that number.
    let after =
        inside.indexes().map_err(io_error("linux.netDevices: list the devices of", "the container"))?;
    let index = after.difference(&before).next().copied().ok_or(io::ErrorKind::NotFound.into());
    let index = index.map_err(io_error("linux.netDevices: find the moved device", &device.name))?;
    for (header, attributes) in &addresses {
        let mut header = *header;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        inside
            .act(libc::RTM_NEWADDR, NLM_F_CREATE_EXCL, &header, attributes)
            .map_err(io_error("linux.netDevices: restore an address of", &device.name))?;
    }
    let up = libc::IFF_UP as u32;
    inside
        .act(libc::RTM_NEWLINK, 0, &link(index, up, up), &[])
        .map_err(io_error("linux.netDevices: set up", &device.name))
}

fn with_zero(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// `struct ifinfomsg`.
fn link(index: i32, flags: u32, change: u32) -> [u8; LINK] {
    let mut out = [0; LINK];
    out[4..8].copy_from_slice(&index.to_ne_bytes());
    out[8..12].copy_from_slice(&flags.to_ne_bytes());
    out[12..16].copy_from_slice(&change.to_ne_bytes());
    out
}

fn attribute(out: &mut Vec<u8>, kind: u16, data: &[u8]) {
    out.extend_from_slice(&((data.len() + 4) as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// Attributes by kind, until the first that does not fit.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let size = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let data = bytes.get(4..size)?;
        bytes = bytes.get(size.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, data))
    })
}

type Address = ([u8; ADDRESS], Vec<u8>);

/// An address of a dump as a request for the same one, if it is on this device, permanent and global.
fn kept_address(body: &[u8], index: i32) -> Option<Address> {
    let header: [u8; ADDRESS] = body.get(..ADDRESS)?.try_into().ok()?;
    let on = u32_at(body, 4)? as i32;
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let (mut flags, scope) = (u32::from(header[2]), header[3]);
    let mut out = Vec::new();
    for (kind, data) in attributes(body.get(ADDRESS..)?) {
        match kind {
            IFA_FLAGS => flags = u32_at(data, 0)?,
            IFA_ADDRESS | IFA_LOCAL | IFA_BROADCAST => attribute(&mut out, kind, data),
            _ => {}
        }
    }
    let kept = on == index && flags & libc::IFA_F_PERMANENT != 0 && scope == libc::RT_SCOPE_UNIVERSE;
    kept.then_some((header, out))
}

struct Route {
    socket: NetlinkSocket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Route {
    fn open() -> io::Result<Route> {
        let socket = NetlinkSocket::open(NetlinkProtocol::Route)?;
        Ok(Route { socket, sequence: 0, buffer: vec![0; BUFFER_BYTES] })
    }

    fn send(&mut self, kind: u16, flags: u16, header: &[u8], attributes: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let size = HEADER + header.len() + attributes.len();
        let mut message = Vec::with_capacity(size);
        message.extend_from_slice(&(size as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(header);
        message.extend_from_slice(attributes);
        self.socket.send(&message)
    }

    /// The messages that answer the last request, up to its end or its acknowledgement.
    fn answers(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            let Some(datagram) = self.socket.receive(&mut self.buffer)? else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            let mut rest = datagram;
            while let (Some(size), Some(kind), Some(sequence)) =
                (u32_at(rest, 0), u16_at(rest, 4), u32_at(rest, 8))
            {
                let Some(body) = rest.get(HEADER..size as usize) else { break };
                if sequence == self.sequence {
                    match i32::from(kind) {
                        libc::NLMSG_ERROR => {
                            return match u32_at(body, 0).unwrap_or(0) as i32 {
                                0 => Ok(()),
                                errno => Err(io::Error::from_raw_os_error(-errno)),
                            };
                        }
                        libc::NLMSG_DONE => return Ok(()),
                        _ => each(body),
                    }
                }
                rest = rest.get((size as usize).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    fn act(&mut self, kind: u16, flags: u16, header: &[u8], attributes: &[u8]) -> io::Result<()> {
        self.send(kind, flags | libc::NLM_F_ACK as u16, header, attributes)?;
        self.answers(|_| {})
    }

    fn index_of(&mut self, name: &str) -> io::Result<i32> {
        let mut attributes = Vec::new();
        attribute(&mut attributes, IFLA_IFNAME, &with_zero(name));
        self.send(libc::RTM_GETLINK, libc::NLM_F_ACK as u16, &link(0, 0, 0), &attributes)?;
        let mut found = None;
        self.answers(|body| found = u32_at(body, 4))?;
        found.map(|i| i as i32).ok_or(io::ErrorKind::NotFound.into())
    }

    fn indexes(&mut self) -> io::Result<BTreeSet<i32>> {
        self.send(libc::RTM_GETLINK, NLM_F_DUMP, &link(0, 0, 0), &[])?;
        let mut all = BTreeSet::new();
        self.answers(|body| all.extend(u32_at(body, 4).map(|i| i as i32)))?;
        Ok(all)
    }

    fn addresses(&mut self, index: i32) -> io::Result<Vec<Address>> {
        self.send(libc::RTM_GETADDR, NLM_F_DUMP, &[0; ADDRESS], &[])?;
        let mut all = Vec::new();
        self.answers(|body| all.extend(kept_address(body, index)))?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumped(flags: u32, scope: u8, index: i32) -> Vec<u8> {
        let mut body = vec![2, 24, 0, scope];
        body.extend_from_slice(&index.to_ne_bytes());
        attribute(&mut body, IFA_LOCAL, &[10, 0, 0, 1]);
        attribute(&mut body, 3, b"label\0");
        attribute(&mut body, IFA_FLAGS, &flags.to_ne_bytes());
        body
    }

    #[test]
    fn permanent_global_addresses_of_the_device_are_kept() {
        let (permanent, universe) = (libc::IFA_F_PERMANENT, libc::RT_SCOPE_UNIVERSE);
        let (header, rest) = kept_address(&dumped(permanent, universe, 7), 7).unwrap();
        assert_eq!(header[..2], [2, 24]);
        assert_eq!(attributes(&rest).collect::<Vec<_>>(), [(IFA_LOCAL, &[10, 0, 0, 1][..])]);
        assert!(kept_address(&dumped(0, universe, 7), 7).is_none(), "of a lease");
        assert!(kept_address(&dumped(permanent, libc::RT_SCOPE_LINK, 7), 7).is_none(), "of the link");
        assert!(kept_address(&dumped(permanent, universe, 8), 7).is_none(), "of another device");
        assert!(kept_address(&[2, 24], 7).is_none(), "cut off");
    }
}
