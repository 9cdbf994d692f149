//! Notice of changes to the packet filter, whoever made them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use keel_sys::netlink::{NetlinkError, NetlinkProtocol, NetlinkSocket};

const NFNLGRP_NFTABLES: u32 = 7;
/// Notices are read only to be counted as one.
const BUFFER_BYTES: usize = 64 << 10;

/// Readable when any table of this network namespace has changed. A hint: ask `Net::in_sync` then.
#[derive(Debug)]
pub struct FilterWatch(NetlinkSocket);

impl FilterWatch {
    pub fn open() -> Result<FilterWatch, NetlinkError> {
        let failed = |error| NetlinkError::new("watch the packet filter", error);
        let socket = NetlinkSocket::open(NetlinkProtocol::Netfilter).map_err(failed)?;
        socket.subscribe(NFNLGRP_NFTABLES).map_err(failed)?;
        Ok(FilterWatch(socket))
    }

    /// Whether anything changed since the last call. Never waits. Lost notices count as a change.
    pub fn changed(&self) -> Result<bool, NetlinkError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut changed = false;
        loop {
            match self.0.receive(&mut buffer) {
                Ok(None) => return Ok(changed),
                Ok(Some(_)) => changed = true,
                Err(error) if is_loss(&error) => changed = true,
                Err(error) => return Err(NetlinkError::new("watch the packet filter", error)),
            }
        }
    }
}

/// The queue overflowed, or a notice was longer than the buffer.
fn is_loss(error: &io::Error) -> bool {
    use nix::errno::Errno;
    [Errno::ENOBUFS, Errno::EMSGSIZE].iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

impl AsFd for FilterWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
