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
    /// The container takes no input: nobody who has some is listened to.
    input_blocked: bool,
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

    pub(crate) fn is_attached(&self) -> bool {
        self.attached.is_some()
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

    /// What it does not take now is missed. That it has gone is told by its socket, as of any other client.
    pub(crate) fn output(&mut self, stream: Stream, bytes: &[u8]) {
        for part in bytes.chunks(MAX_DATA) {
            let behind = self.missed > 0 && !self.tell_gap().unwrap_or(false);
            if behind || self.send(&Reply::Data { stream, bytes: part }).is_err() {
                self.missed += part.len() as u64;
            }
        }
    }

    fn tell_gap(&mut self) -> io::Result<bool> {
        match self.send(&Reply::Gap { bytes: self.missed }) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            other => other?,
        }
        self.missed = 0;
        Ok(true)
    }

    fn interest(&self, input_blocked: bool) -> u32 {
        let read = if self.paused || input_blocked && self.has_stdin() { 0 } else { IN };
        let write = if self.missed > 0 || self.choked { OUT } else { 0 };
        read | write
    }
}

impl Clients {
    /// Client `i` is known to epoll as `first_token + i`.
    pub(crate) fn new(first_token: u64) -> Clients {
        Clients { slots: Vec::new(), first_token, input_blocked: false }
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

    pub(crate) fn broadcast(&mut self, stream: Stream, bytes: &[u8], epoll: &Epoll) {
        let (first, blocked) = (self.first_token, self.input_blocked);
        for (client, token) in self.slots.iter_mut().zip(first..).filter_map(|(s, i)| Some((s.as_mut()?, i)))
        {
            if client.wants(stream) {
                let behind = client.missed > 0;
                client.output(stream, bytes);
                if behind != (client.missed > 0) {
                    let _ = epoll.modify(&client.socket, client.interest(blocked), token);
                }
            }
        }
    }

    /// The socket has room again. `false`: close it.
    pub(crate) fn writable(&mut self, index: usize, epoll: &Epoll) -> bool {
        let Some(client) = self.get(index) else { return true };
        if client.missed > 0 && client.tell_gap().is_err() {
            return false;
        }
        self.watch(index, epoll).is_ok()
    }

    /// Waits for what is of interest from now on.
    pub(crate) fn watch(&mut self, index: usize, epoll: &Epoll) -> io::Result<()> {
        let (token, blocked) = (self.first_token + index as u64, self.input_blocked);
        let Some(client) = self.get(index) else { return Ok(()) };
        epoll.modify(&client.socket, client.interest(blocked), token)
    }

    pub(crate) fn pause(&mut self, index: usize, paused: bool, epoll: &Epoll) {
        self.change(index, epoll, |client| client.paused = paused);
    }

    pub(crate) fn choke(&mut self, index: usize, choked: bool, epoll: &Epoll) {
        self.change(index, epoll, |client| client.choked = choked);
    }

    fn change(&mut self, index: usize, epoll: &Epoll, change: impl FnOnce(&mut Client)) {
        if let Some(client) = self.get(index) {
            change(client);
            let _ = self.watch(index, epoll);
        }
    }

    /// Stops or resumes listening to those who feed the container's input.
    pub(crate) fn block_stdin(&mut self, blocked: bool, epoll: &Epoll) {
        self.input_blocked = blocked;
        for index in 0..self.slots.len() {
            let _ = self.watch(index, epoll);
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
