//! `linux.netDevices`: devices of the runtime's network namespace moved into the container's, with their permanent global
//! addresses, and set up there.

use crate::error::RuntimeError;
use crate::op::NsKind;
use keel_sys::netlink::wire::{self, Writer, flag};
use keel_sys::netlink::{Netlink, NetlinkError, NetlinkProtocol};
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

const ADDRESS: usize = 8;
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
    let mut outside = Netlink::open(NetlinkProtocol::Route)?;
    let own = file::openat(file::cwd(), c"/proc/self/ns/net", libc::O_RDONLY, 0)
        .map_err(sys("open the own network namespace"))?;
    // A netlink socket belongs for ever to the namespace that it was made in.
    process::setns(netns, NsKind::Net.flag()).map_err(sys("join the container's network namespace"))?;
    let inside = Netlink::open(NetlinkProtocol::Route);
    process::setns(&own, NsKind::Net.flag()).map_err(sys("return to the own network namespace"))?;
    let mut inside = inside?;
    for device in devices {
        move_one(device, netns, &mut outside, &mut inside)?;
    }
    Ok(())
}

fn move_one(
    device: &NetDevice,
    netns: &OwnedFd,
    outside: &mut Netlink,
    inside: &mut Netlink,
) -> Result<(), RuntimeError> {
    let NetDevice { host, name } = device;
    let index = index_of(outside, host)?;
    let doing = format!("read the addresses of {host}");
    let addresses = outside.list(
        &doing,
        libc::RTM_GETADDR,
        |w| w.raw(&[0; ADDRESS]),
        |body| kept_address(body, index),
    )?;
    let before = indexes(inside)?;
    outside.request(&format!("move {host} as {name}"), libc::RTM_NEWLINK, |w| {
        link(w, index, 0, 0);
        w.u32(IFLA_NET_NS_FD, netns.as_raw_fd() as u32);
        w.string(IFLA_IFNAME, name);
    })?;
    // Its number is another one when the container had a device of that number.
    let Some(&index) = indexes(inside)?.difference(&before).next() else {
        let source = io::ErrorKind::NotFound.into();
        return Err(NetlinkError::new(format!("find {name} after its move"), source).into());
    };
    for address in &addresses {
        let doing = format!("restore an address of {name}");
        let mut writer = Writer::default();
        let sequence = inside.next_sequence();
        let flags = flag::REQUEST | flag::ACK | flag::CREATE | flag::EXCL;
        writer.message(libc::RTM_NEWADDR, flags, sequence, |w| address.write(w, index));
        inside.transact(&writer.into_bytes(), &[(sequence, &doing)])?;
    }
    let up = libc::IFF_UP as u32;
    inside.request(&format!("bring up {name}"), libc::RTM_NEWLINK, |w| link(w, index, up, up))?;
    Ok(())
}

/// `struct ifinfomsg`.
fn link(w: &mut Writer, index: u32, flags: u32, change: u32) {
    w.raw(&[0; 4]);
    for field in [index, flags, change] {
        w.raw(&field.to_ne_bytes());
    }
}

fn index_in(body: &[u8]) -> Option<u32> {
    wire::read_u32(body, 4)
}

fn index_of(socket: &mut Netlink, name: &str) -> Result<u32, NetlinkError> {
    let doing = format!("find the device {name}");
    let request = |w: &mut Writer| {
        link(w, 0, 0, 0);
        w.string(IFLA_IFNAME, name);
    };
    let found = socket.get(&doing, libc::RTM_GETLINK, request, index_in)?;
    found.ok_or_else(|| NetlinkError::new(doing, io::Error::from_raw_os_error(libc::ENODEV)))
}

fn indexes(socket: &mut Netlink) -> Result<BTreeSet<u32>, NetlinkError> {
    let doing = "list the devices of the container";
    let all = socket.list(doing, libc::RTM_GETLINK, |w| link(w, 0, 0, 0), index_in)?;
    Ok(all.into_iter().collect())
}

/// What of an address goes with its device.
#[derive(Debug)]
struct Address {
    family: u8,
    prefix: u8,
    flags: u8,
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Address {
    /// `struct ifaddrmsg` (scope 0 is the universe) and its attributes.
    fn write(&self, w: &mut Writer, index: u32) {
        w.raw(&[self.family, self.prefix, self.flags, 0]);
        w.raw(&index.to_ne_bytes());
        for (kind, data) in &self.attributes {
            w.attribute(*kind, data);
        }
    }
}

/// An address of a listing, if it is on this device, permanent and global.
fn kept_address(body: &[u8], index: u32) -> Option<Address> {
    let &[family, prefix, flags, scope] = body.first_chunk()?;
    let list = body.get(ADDRESS..)?;
    let long_flags = wire::find(list, IFA_FLAGS).and_then(|value| wire::read_u32(value, 0));
    let permanent = long_flags.unwrap_or(flags.into()) & libc::IFA_F_PERMANENT != 0;
    let kept = permanent && index_in(body)? == index && scope == libc::RT_SCOPE_UNIVERSE;
    let attributes = wire::attributes(list)
        .filter(|(kind, _)| [IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST].contains(kind))
        .map(|(kind, data)| (kind, data.to_vec()))
        .collect();
    kept.then_some(Address { family, prefix, flags, attributes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(flags: u32, scope: u8, index: u32) -> Vec<u8> {
        let mut w = Writer::default();
        w.raw(&[2, 24, 0, scope]);
        w.raw(&index.to_ne_bytes());
        w.attribute(IFA_LOCAL, &[10, 0, 0, 1]);
        w.attribute(3, b"label\0");
        w.u32(IFA_FLAGS, flags);
        w.into_bytes()
    }

    #[test]
    fn permanent_global_addresses_of_the_device_are_kept() {
        let (permanent, universe) = (libc::IFA_F_PERMANENT, libc::RT_SCOPE_UNIVERSE);
        let kept = kept_address(&listed(permanent, universe, 7), 7).unwrap();
        assert_eq!((kept.family, kept.prefix), (2, 24));
        assert_eq!(kept.attributes, [(IFA_LOCAL, vec![10, 0, 0, 1])]);
        assert!(kept_address(&listed(0, universe, 7), 7).is_none(), "of a lease");
        assert!(kept_address(&listed(permanent, libc::RT_SCOPE_LINK, 7), 7).is_none(), "of the link");
        assert!(kept_address(&listed(permanent, universe, 8), 7).is_none(), "of another device");
        assert!(kept_address(&[2, 24], 7).is_none(), "cut off");
    }
}
