//! A netlink socket that never blocks: the kernel answers route and netfilter requests inside `send`.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Room for the largest packet-filter transaction: about 36 bytes per published port, so some hundred
/// thousand ports. A transaction must go out in one datagram to be atomic.
const SEND_BUFFER_BYTES: libc::c_int = 8 << 20;

/// Room for the answers to one datagram (one acknowledgement each) and for bursts of change notices.
const RECEIVE_BUFFER_BYTES: libc::c_int = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetlinkProtocol {
    Route,
    Netfilter,
}

/// Belongs to the network namespace of the thread that opened it, for ever.
#[derive(Debug)]
pub struct NetlinkSocket(OwnedFd);

impl NetlinkSocket {
    pub fn open(protocol: NetlinkProtocol) -> io::Result<NetlinkSocket> {
        let number = match protocol {
            NetlinkProtocol::Route => libc::NETLINK_ROUTE,
            NetlinkProtocol::Netfilter => libc::NETLINK_NETFILTER,
        };
        // SAFETY: no pointers; the result is checked before use.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, number) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by the kernel and nothing else owns it.
        let socket = NetlinkSocket(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: sockaddr_nl is plain data; all zero is a valid value (port id chosen by the kernel).
        let mut address: libc::sockaddr_nl = unsafe { mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        // SAFETY: `address` outlives the call and the length is its own.
        let bound = unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                (&raw const address).cast(),
                mem::size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // Reasons in words (kernel 4.12+), and errors without an echo of the request. An older kernel answers
        // without them: still usable.
        let _ = socket.set(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1);
        let _ = socket.set(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1);
        // The forced form needs CAP_NET_ADMIN, which everything else here needs as well.
        let _ = socket.set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER_BYTES);
        let _ = socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES);
        Ok(socket)
    }

    /// Asks for the change notices of one multicast group (`RTNLGRP_*`, `NFNLGRP_*`).
    pub fn subscribe(&self, group: u32) -> io::Result<()> {
        self.set(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group as libc::c_int)
    }

    /// Sends one datagram of one or more messages. The answers are queued when this returns.
    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: pointer and length describe `datagram`, which outlives the call.
            let sent = unsafe { libc::send(self.0.as_raw_fd(), datagram.as_ptr().cast(), datagram.len(), 0) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Next queued datagram; `None` when there is none. Never waits.
    pub fn receive<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
        loop {
            // SAFETY: pointer and length describe `buffer`, exclusively borrowed for the call.
            let got = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT | libc::MSG_TRUNC,
                )
            };
            if let Ok(length) = usize::try_from(got) {
                return buffer
                    .get(..length)
                    .map(Some)
                    .ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(error),
            }
        }
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: `value` lives through the call and its size is passed with it.
        let done = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                mem::size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
