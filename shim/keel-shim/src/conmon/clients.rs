//! Clients of the attach socket. A message to a client is one byte for the stream and then output; what comes from one is
//! input as it is.
//!
//! A client that is slow slows the container down, as a reader of a pipe would: `podman run` prints through here, and
//! must print all of it. It never holds up the monitor itself, and for no longer than [`STUCK`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use keel_proto::Stream;
use keel_sys::epoll::{Epoll, IN, OUT};
use keel_sys::seqpacket;

/// Of output in one message: what readers have room for.
const LARGEST: usize = 8192;
/// More are refused.
const MAX_CLIENTS: usize = 32;
/// A client that takes nothing for so long is cut off, and the container goes on.
const STUCK: Duration = Duration::from_secs(300);
const STDOUT: u8 = 2;
const STDERR: u8 = 3;

pub(crate) struct Clients {
    slots: Vec<Option<Client>>,
    first_token: u64,
}

pub(crate) struct Client {
    socket: OwnedFd,
    /// Messages that it had no room for.
    queue: VecDeque<Vec<u8>>,
    /// When it last took something, while it is behind.
    stuck_since: Option<Instant>,
    /// It may still send input.
    feeds: bool,
}

impl Clients {
    /// Client `i` is known to epoll as `first_token + i`.
    pub(crate) fn new(first_token: u64) -> Clients {
        Clients { slots: Vec::new(), first_token }
    }

    pub(crate) fn accept(&mut self, listener: &OwnedFd, epoll: &Epoll) {
        while let Ok(socket) = seqpacket::accept(listener.as_fd()) {
            let slot = match self.slots.iter().position(Option::is_none) {
                Some(slot) => slot,
                None if self.slots.len() < MAX_CLIENTS => {
                    self.slots.push(None);
                    self.slots.len() - 1
                }
                None => continue,
            };
            if epoll.add(&socket, IN, self.first_token + slot as u64).is_ok() {
                let queue = VecDeque::new();
                self.slots[slot] = Some(Client { socket, queue, stuck_since: None, feeds: true });
            }
        }
    }

    pub(crate) fn index(&self, token: u64) -> Option<usize> {
        usize::try_from(token.checked_sub(self.first_token)?).ok()
    }

    pub(crate) fn fd(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.slots.get(index)?.as_ref().map(|client| client.socket.as_fd())
    }

    /// Closing takes it out of the epoll set.
    pub(crate) fn close(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = None;
        }
    }

    pub(crate) fn any(&self) -> bool {
        self.slots.iter().any(Option::is_some)
    }

    /// Somebody has to catch up before there may be more output.
    pub(crate) fn behind(&self) -> bool {
        self.slots.iter().flatten().any(|client| !client.queue.is_empty())
    }

    pub(crate) fn broadcast(&mut self, stream: Stream, bytes: &[u8]) {
        if !self.any() {
            return;
        }
        let tag = if stream == Stream::Stdout { STDOUT } else { STDERR };
        for part in bytes.chunks(LARGEST) {
            for slot in &mut self.slots {
                if slot.as_mut().is_some_and(|client| client.send(tag, part).is_err()) {
                    *slot = None;
                }
            }
        }
    }

    /// The socket has room again.
    pub(crate) fn writable(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index)
            && slot.as_mut().is_some_and(|client| client.flush().is_err())
        {
            *slot = None;
        }
    }

    /// It sends nothing more; it may still listen.
    pub(crate) fn fed(&mut self, index: usize) {
        if let Some(Some(client)) = self.slots.get_mut(index) {
            client.feeds = false;
        }
    }

    /// Listens to those who may speak and waits for those who are behind. With `choked` input nobody may speak.
    pub(crate) fn watch(&self, epoll: &Epoll, choked: bool) {
        for (slot, token) in self.slots.iter().zip(self.first_token..) {
            if let Some(client) = slot {
                let read = if client.feeds && !choked { IN } else { 0 };
                let write = if client.queue.is_empty() { 0 } else { OUT };
                let _ = epoll.modify(&client.socket, read | write, token);
            }
        }
    }

    /// When the next client is to be given up.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.slots.iter().flatten().filter_map(|client| Some(client.stuck_since? + STUCK)).min()
    }

    pub(crate) fn drop_stuck(&mut self, now: Instant) {
        for slot in &mut self.slots {
            if slot.as_ref().and_then(|c| c.stuck_since).is_some_and(|since| now >= since + STUCK) {
                *slot = None;
            }
        }
    }

    /// Those who have everything.
    pub(crate) fn close_idle(&mut self) {
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(|client| client.queue.is_empty()) {
                *slot = None;
            }
        }
    }
}

impl Client {
    fn send(&mut self, tag: u8, part: &[u8]) -> io::Result<()> {
        let sent = match self.queue.is_empty() {
            true => seqpacket::send(self.socket.as_fd(), &[tag], part),
            false => Err(io::ErrorKind::WouldBlock.into()),
        };
        match sent {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.stuck_since.get_or_insert_with(Instant::now);
                self.queue.push_back([&[tag], part].concat());
                Ok(())
            }
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(message) = self.queue.front() {
            match seqpacket::send(self.socket.as_fd(), message, b"") {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                other => other?,
            }
            self.queue.pop_front();
            self.stuck_since = Some(Instant::now());
        }
        self.queue = VecDeque::new();
        self.stuck_since = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_sys::file::set_nonblocking;

    #[test]
    fn a_client_that_takes_nothing_is_cut_off_after_its_time_and_no_sooner() {
        let client = || {
            let (socket, theirs) = seqpacket::pair().unwrap();
            set_nonblocking(&socket, true).unwrap();
            (Client { socket, queue: VecDeque::new(), stuck_since: None, feeds: true }, theirs)
        };
        let ((stuck, _unread), (other, reader)) = (client(), client());
        let mut clients = Clients { slots: vec![Some(stuck), Some(other)], first_token: 0 };
        while !clients.behind() {
            clients.broadcast(Stream::Stdout, &[b'x'; LARGEST]);
            let got = seqpacket::receive(reader.as_fd(), &mut [0; LARGEST + 1]).unwrap();
            assert_eq!(got.len, LARGEST + 1);
        }
        let due = clients.deadline().unwrap();
        clients.drop_stuck(due - Duration::from_millis(1));
        assert!(clients.behind());
        clients.drop_stuck(due);
        assert!(!clients.behind() && clients.slots[0].is_none() && clients.slots[1].is_some());
    }
}
