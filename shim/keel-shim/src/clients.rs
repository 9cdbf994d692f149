//! Connections to the control socket. None of them can make the container, or the others, wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use keel_proto::{Attach, ErrorCode, MAX_DATA, Reply, Stream};
use keel_sys::epoll::{Epoll, IN, OUT};
use keel_sys::process::geteuid;
use keel_sys::seqpacket;

/// More is refused: each costs a descriptor of a process that has few.
pub(crate) const MAX_CLIENTS: usize = 16;

#[derive(Default)]
pub(crate) struct Clients {
    slots: Vec<Option<Client>>,
    first_token: u64,
}

pub(crate) struct Client {
    socket: OwnedFd,
    attached: Option<Attach>,
    /// Wants the exit record.
    pub(crate) waiting: bool,
    /// Output that this attachment was too slow for, not yet told.
    missed: u64,
    /// Nothing is read from it for now.
    paused: bool,
    /// Somebody waits for room in its socket.
    choked: bool,
}

impl Client {
    fn new(socket: OwnedFd) -> Client {
        Client { socket, attached: None, waiting: false, missed: 0, paused: false, choked: false }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn send(&self, reply: &Reply<'_>) -> io::Result<()> {
        let message = reply.encode();
        seqpacket::send(self.fd(), message.head(), message.body)
    }

    pub(crate) fn attach(&mut self, what: Attach) {
        self.attached = Some(what);
    }

    pub(crate) fn has_stdin(&self) -> bool {
        self.attached.is_some_and(|a| a.stdin)
    }

    fn wants(&self, stream: Stream) -> bool {
        self.attached.is_some_and(|a| match stream {
            Stream::Stdout => a.stdout,
            Stream::Stderr => a.stderr,
        })
    }

    /// `Err`: the connection is of no more use.
    pub(crate) fn output(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(MAX_DATA) {
            if self.missed > 0 && !self.tell_gap()? {
                self.missed += part.len() as u64;
                continue;
            }
            match self.send(&Reply::Data { stream, bytes: part }) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.missed += part.len() as u64,
                other => other?,
            }
        }
        Ok(())
    }

    fn tell_gap(&mut self) -> io::Result<bool> {
        match self.send(&Reply::Gap { bytes: self.missed }) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            other => other?,
        }
        self.missed = 0;
        Ok(true)
    }

    fn interest(&self, stdin_blocked: bool) -> u32 {
        let read = if self.paused || stdin_blocked && self.has_stdin() { 0 } else { IN };
        let write = if self.missed > 0 || self.choked { OUT } else { 0 };
        read | write
    }
}

impl Clients {
    /// Client `i` is known to epoll as `first_token + i`.
    pub(crate) fn new(first_token: u64) -> Clients {
        Clients { slots: Vec::new(), first_token }
    }

    pub(crate) fn accept(&mut self, listener: &OwnedFd, epoll: &Epoll) {
        while let Ok(socket) = seqpacket::accept(listener.as_fd()) {
            let refuse = |code, message| {
                let client = Client::new(socket.try_clone()?);
                client.send(&Reply::Error { code, message })
            };
            let allowed = seqpacket::peer_uid(socket.as_fd()).is_ok_and(|uid| uid == 0 || uid == geteuid());
            if !allowed {
                let _ = refuse(ErrorCode::Failed, "only root may control this container");
                continue;
            }
            let Some(slot) = self.free_slot() else {
                let _ = refuse(ErrorCode::Busy, "too many connections");
                continue;
            };
            if epoll.add(&socket, IN, self.first_token + slot as u64).is_ok() {
                self.slots[slot] = Some(Client::new(socket));
            }
        }
    }

    fn free_slot(&mut self) -> Option<usize> {
        match self.slots.iter().position(Option::is_none) {
            None if self.slots.len() < MAX_CLIENTS => {
                self.slots.push(None);
                Some(self.slots.len() - 1)
            }
            found => found,
        }
    }

    pub(crate) fn index(&self, token: u64) -> Option<usize> {
        usize::try_from(token.checked_sub(self.first_token)?).ok()
    }

    pub(crate) fn get(&mut self, index: usize) -> Option<&mut Client> {
        self.slots.get_mut(index)?.as_mut()
    }

    /// Closing takes it out of the epoll set.
    pub(crate) fn close(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = None;
        }
    }

    pub(crate) fn attachments(&self) -> u16 {
        let attached = self.slots.iter().flatten().filter(|c| c.attached.is_some());
        u16::try_from(attached.count()).unwrap_or(u16::MAX)
    }

    pub(crate) fn broadcast(&mut self, stream: Stream, bytes: &[u8], epoll: &Epoll, stdin_blocked: bool) {
        let first = self.first_token;
        for (slot, i) in self.slots.iter_mut().zip(first..) {
            let Some(client) = slot.as_mut().filter(|c| c.wants(stream)) else { continue };
            let behind = client.missed > 0;
            let sent = client.output(stream, bytes);
            if sent.is_err() {
                *slot = None;
            } else if behind != (client.missed > 0) {
                let _ = epoll.modify(&client.socket, client.interest(stdin_blocked), i);
            }
        }
    }

    /// The socket has room again. `false`: close it.
    pub(crate) fn writable(&mut self, index: usize, epoll: &Epoll, stdin_blocked: bool) -> bool {
        let token = self.first_token + index as u64;
        let Some(client) = self.get(index) else { return true };
        if client.missed > 0 && client.tell_gap().is_err() {
            return false;
        }
        epoll.modify(&client.socket, client.interest(stdin_blocked), token).is_ok()
    }

    pub(crate) fn pause(&mut self, index: usize, paused: bool, epoll: &Epoll) {
        self.change(index, epoll, |client| client.paused = paused);
    }

    pub(crate) fn choke(&mut self, index: usize, choked: bool, epoll: &Epoll) {
        self.change(index, epoll, |client| client.choked = choked);
    }

    fn change(&mut self, index: usize, epoll: &Epoll, change: impl FnOnce(&mut Client)) {
        let token = self.first_token + index as u64;
        if let Some(client) = self.get(index) {
            change(client);
            let _ = epoll.modify(&client.socket, client.interest(false), token);
        }
    }

    /// Stops or resumes listening to those who feed the container's input.
    pub(crate) fn block_stdin(&mut self, blocked: bool, epoll: &Epoll) {
        let first = self.first_token;
        for (client, token) in self.slots.iter().zip(first..).filter_map(|(s, i)| Some((s.as_ref()?, i))) {
            if client.has_stdin() {
                let _ = epoll.modify(&client.socket, client.interest(blocked), token);
            }
        }
    }

    /// Everybody who attached or waits gets the record, and with it the end of the connection's use.
    pub(crate) fn tell_exit(&mut self, record: &str) {
        for client in self.slots.iter_mut().flatten() {
            if client.attached.is_some() && client.missed > 0 {
                let _ = client.tell_gap();
            }
            if client.waiting || client.attached.is_some() {
                let _ = client.send(&Reply::Exited { record });
            }
            client.waiting = false;
        }
    }
}
