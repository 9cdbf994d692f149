//! Waiting for many descriptors.

use crate::monitor::move_to_standard;
use crate::{check, check_fd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

pub const IN: u32 = libc::EPOLLIN as u32;
pub const OUT: u32 = libc::EPOLLOUT as u32;
pub const HUP: u32 = libc::EPOLLHUP as u32;
pub const ERR: u32 = libc::EPOLLERR as u32;
/// Told when it happens, and not again as long as it lasts.
pub const EDGE: u32 = libc::EPOLLET as u32;

/// Events taken from the kernel at once; the rest comes with the next wait.
pub const BATCH: usize = 16;

/// A level-triggered set. A descriptor leaves it when its last copy is closed, or by [`Epoll::remove`].
pub struct Epoll(OwnedFd);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    pub token: u64,
    pub events: u32,
}

impl Epoll {
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: plain numbers.
        check_fd(i64::from(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })).map(Epoll)
    }

    /// Under the number of standard output, for a process that is to have few descriptors: what is written to a set is
    /// refused (`EINVAL`).
    pub fn on_standard_output() -> io::Result<Epoll> {
        move_to_standard(Epoll::new()?.0, libc::STDOUT_FILENO).map(Epoll)
    }

    pub fn add(&self, fd: impl AsFd, events: u32, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, events, token)
    }

    pub fn modify(&self, fd: impl AsFd, events: u32, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, events, token)
    }

    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, 0)
    }

    fn control(&self, operation: i32, fd: impl AsFd, events: u32, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: token };
        // SAFETY: the event is live for the call.
        check(i64::from(unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), operation, fd.as_fd().as_raw_fd(), &raw mut event)
        }))?;
        Ok(())
    }

    /// Waits until something is ready or the time is up (`None`: never); returns how many entries are filled. A signal
    /// counts as nothing ready. The wait is rounded up to whole milliseconds, so a deadline has passed afterwards.
    pub fn wait(&self, ready: &mut [Ready; BATCH], timeout: Option<Duration>) -> io::Result<usize> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let millis =
            timeout.map_or(-1, |t| i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX));
        // SAFETY: the array has BATCH entries.
        let got = unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), BATCH as i32, millis) };
        let got = match check(i64::from(got)) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other? as usize,
        };
        for (to, from) in ready.iter_mut().zip(&events[..got]) {
            *to = Ready { token: from.u64, events: from.events };
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_descriptors_are_told_by_token() {
        let (reader, writer) = crate::file::pipe().unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.add(&reader, IN, 7).unwrap();
        let mut ready = [Ready::default(); BATCH];
        assert_eq!(epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap(), 0);
        drop(writer);
        assert_eq!(epoll.wait(&mut ready, None).unwrap(), 1);
        assert_eq!(ready[0], Ready { token: 7, events: HUP });
        epoll.remove(&reader).unwrap();
        assert_eq!(epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap(), 0);
    }
}
