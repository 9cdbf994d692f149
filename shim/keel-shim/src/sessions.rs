//! Commands run in the container for a client: own streams, own terminal, own exit status, same shim.
//!
//! ```text
//!  Exec ──> runtime exec --detach ──┬─ failed ──> Error to the client
//!                                   └─ done ────> Ok, then Data.. ──> process ends ──> rest of Data, Exited
//! ```
//! A client that goes away leaves its command running, and what it writes is thrown away. A client that does not read
//! stops its command, and nobody else's, at the pipe.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use keel_proto::{ErrorCode, Exec, ExitRecord, MAX_DATA, Reply, Stream};
use keel_sys::epoll::{Epoll, IN, OUT};
use keel_sys::file::{pipe, set_nonblocking};
use keel_sys::monitor::{Reaped, Status};
use keel_sys::process::{pidfd_open, pidfd_send_signal};
use keel_sys::{seqpacket, tty};

use crate::args::Options;
use crate::clients::Clients;
use crate::error::{Context, Error};
use crate::helper::{Helper, Task};
use crate::hold::{exit_numbers, now_ms};
use crate::runtime::{Runtime, read_pid};

/// Each takes up to four descriptors.
const MAX_SESSIONS: usize = 16;
/// Ends of unknown processes, kept while a command is being started: it may end before we know its number.
const MAX_EARLY: usize = 256;
/// Reads after the end, should somebody in the background write on without end.
const LAST_READS: u32 = 64;
/// Tokens of one session: stdout, stderr, stdin, console.
const TOKENS: u64 = 4;

pub(crate) struct Sessions {
    slots: Vec<Option<Session>>,
    first_token: u64,
    early: Vec<Reaped>,
    next_name: u32,
}

struct Session {
    name: String,
    tty: bool,
    size: tty::Size,
    client: Option<usize>,
    /// The runtime's `exec`, while it runs.
    starting: Option<i32>,
    pid: i32,
    pidfd: Option<OwnedFd>,
    started_at_ms: u64,
    /// Stdout and stderr; a terminal is the first.
    outputs: [Option<File>; 2],
    /// Output that the client had no room for.
    choked: Vec<u8>,
    choked_stream: Stream,
    stdin: Option<File>,
    /// Input that the command had no room for.
    unfed: Vec<u8>,
    stdin_ends: bool,
    /// It has ended, and when, in milliseconds of the epoch.
    over: Option<(Reaped, u64)>,
    console: Option<OwnedFd>,
    connection: Option<OwnedFd>,
}

impl Sessions {
    /// Session `i` is known to epoll by [`TOKENS`] tokens from `first_token + i * TOKENS` on.
    pub(crate) fn new(first_token: u64) -> Sessions {
        Sessions { slots: Vec::new(), first_token, early: Vec::new(), next_name: 0 }
    }

    pub(crate) fn any(&self) -> bool {
        self.slots.iter().any(Option::is_some)
    }

    pub(crate) fn owns(&self, token: u64) -> bool {
        token >= self.first_token
    }

    pub(crate) fn start(
        &mut self,
        options: &Options,
        helper: Option<&Helper>,
        epoll: &Epoll,
        client: usize,
        exec: Exec<'_>,
    ) -> Result<(), Error> {
        let helper = helper.ok_or_else(|| Error::new("the monitor has no helper"))?;
        let slot = match self.slots.iter().position(Option::is_none) {
            None if self.slots.len() < MAX_SESSIONS => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            Some(slot) => slot,
            None => return Err(Error::new("too many commands run in this container")),
        };
        let name = format!("exec-{}", self.next_name);
        self.next_name = self.next_name.wrapping_add(1);
        let token = self.first_token + slot as u64 * TOKENS;
        let session = Session::spawn(options, helper, epoll, token, name.clone(), client, exec);
        if session.is_err() {
            forget_files(&options.dir, &name);
        }
        self.slots[slot] = Some(session?);
        Ok(())
    }

    fn of_client(&mut self, client: usize) -> Option<(u64, &mut Session)> {
        let first = self.first_token;
        let mut slots = self.slots.iter_mut().enumerate();
        slots.find_map(|(i, slot)| {
            let session = slot.as_mut().filter(|s| s.client == Some(client))?;
            Some((first + i as u64 * TOKENS, session))
        })
    }

    pub(crate) fn has_client(&mut self, client: usize) -> bool {
        self.of_client(client).is_some()
    }

    /// A child of this process has ended, which may be one of ours.
    pub(crate) fn reaped(&mut self, reaped: Reaped, options: &Options, epoll: &Epoll, clients: &mut Clients) {
        let mut slots = self.slots.iter();
        let found = slots.position(|s| {
            s.as_ref()
                .is_some_and(|s| s.starting == Some(reaped.pid) || s.over.is_none() && s.pid == reaped.pid)
        });
        let Some(slot) = found else {
            if self.slots.iter().flatten().any(|s| s.starting.is_some()) && self.early.len() < MAX_EARLY {
                self.early.push(reaped);
            }
            return;
        };
        let token = self.first_token + slot as u64 * TOKENS;
        let Some(session) = &mut self.slots[slot] else { return };
        if session.starting != Some(reaped.pid) {
            return self.ended(slot, reaped, epoll, clients);
        }
        session.starting = None;
        match session.started(options, epoll, token, reaped) {
            Ok(()) => {
                session.say(clients, &Reply::Ok);
                let pid = session.pid;
                if let Some(early) = self.early.iter().find(|r| r.pid == pid).copied() {
                    self.ended(slot, early, epoll, clients);
                }
            }
            Err(e) => {
                session.say(clients, &Reply::Error { code: ErrorCode::Failed, message: &e.one_line() });
                self.slots[slot] = None;
            }
        }
        if !self.slots.iter().flatten().any(|s| s.starting.is_some()) {
            self.early = Vec::new();
        }
    }

    fn ended(&mut self, slot: usize, reaped: Reaped, epoll: &Epoll, clients: &mut Clients) {
        if let Some(session) = &mut self.slots[slot] {
            session.over = Some((reaped, now_ms().max(session.started_at_ms)));
        }
        self.finish(slot, epoll, clients);
    }

    /// Once the command has ended: the rest of its output, as fast as the client takes it, and then how it ended.
    fn finish(&mut self, slot: usize, epoll: &Epoll, clients: &mut Clients) {
        let Some(session) = &mut self.slots[slot] else { return };
        let Some((reaped, at_ms)) = session.over else { return };
        let mut buffer = vec![0; MAX_DATA];
        for index in 0..2 {
            for _ in 0..LAST_READS {
                if !session.choked.is_empty() {
                    return;
                }
                if !session.read(index, &mut buffer, epoll, clients) {
                    break;
                }
            }
        }
        if !session.choked.is_empty() {
            return;
        }
        let record = session.record(reaped, at_ms).to_json();
        if let Some(index) = session.client
            && let Some(client) = clients.get(index)
        {
            let full = client
                .send(&Reply::Exited { record: &record })
                .is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
            clients.choke(index, full, epoll);
            if full {
                return;
            }
            clients.pause(index, false, epoll);
        }
        self.slots[slot] = None;
    }

    pub(crate) fn ready(&mut self, token: u64, buffer: &mut [u8], epoll: &Epoll, clients: &mut Clients) {
        let offset = token - self.first_token;
        let Ok(slot) = usize::try_from(offset / TOKENS) else { return };
        let Some(Some(session)) = self.slots.get_mut(slot) else { return };
        match offset % TOKENS {
            index @ (0 | 1) => {
                session.read(index as usize, &mut buffer[..MAX_DATA], epoll, clients);
            }
            2 => session.feed(epoll, clients),
            _ => session.console(epoll, token),
        }
        self.finish(slot, epoll, clients);
    }

    /// The client's socket has room again.
    pub(crate) fn client_writable(&mut self, client: usize, epoll: &Epoll, clients: &mut Clients) {
        let Some((token, session)) = self.of_client(client) else { return };
        session.unchoke(token, epoll, clients);
        let slot = usize::try_from((token - self.first_token) / TOKENS).unwrap_or(0);
        self.finish(slot, epoll, clients);
    }

    pub(crate) fn client_left(&mut self, client: usize, epoll: &Epoll) {
        if let Some((token, session)) = self.of_client(client) {
            session.client = None;
            session.end_input(epoll);
            session.choked = Vec::new();
            session.watch_outputs(token, IN, epoll);
        }
    }

    pub(crate) fn stdin(&mut self, client: usize, bytes: &[u8], epoll: &Epoll, clients: &mut Clients) {
        if let Some((token, session)) = self.of_client(client) {
            session.take_input(bytes, token, epoll, clients);
        }
    }

    pub(crate) fn stdin_eof(&mut self, client: usize) {
        if let Some((_, session)) = self.of_client(client) {
            session.stdin_ends = true;
            if session.unfed.is_empty() && !session.tty {
                session.stdin = None;
            }
        }
    }

    pub(crate) fn resize(&mut self, client: usize, rows: u16, columns: u16) {
        if let Some((_, session)) = self.of_client(client) {
            session.size = tty::Size { rows, columns };
            session.apply_size();
        }
    }

    pub(crate) fn signal(&mut self, client: usize, signal: u8) {
        if let Some((_, session)) = self.of_client(client)
            && let Some(pidfd) = &session.pidfd
        {
            // It may have just ended.
            let _ = pidfd_send_signal(pidfd, i32::from(signal));
        }
    }
}

impl Session {
    fn spawn(
        options: &Options,
        helper: &Helper,
        epoll: &Epoll,
        token: u64,
        name: String,
        client: usize,
        exec: Exec<'_>,
    ) -> Result<Session, Error> {
        let dir = &options.dir;
        let process = file(dir, &name, "json");
        fs::write(&process, exec.process).at("write", &process)?;
        let mut session = Session {
            tty: exec.tty,
            size: tty::Size { rows: exec.rows, columns: exec.columns },
            client: Some(client),
            starting: None,
            pid: 0,
            pidfd: None,
            started_at_ms: 0,
            outputs: [None, None],
            choked: Vec::new(),
            choked_stream: Stream::Stdout,
            stdin: None,
            unfed: Vec::new(),
            stdin_ends: false,
            over: None,
            console: None,
            connection: None,
            name: name.clone(),
        };
        let mut console = None;
        let mut streams: [Option<OwnedFd>; 3] = [None, None, None];
        if exec.tty {
            let socket = format!("{}.sock", session.name);
            let listener = seqpacket::listen_stream(dir, &socket, 1).at("listen on", &dir.join(&socket))?;
            epoll.add(&listener, IN, token + 3).doing("watch the console socket")?;
            session.console = Some(listener);
            let opened = File::open(dir).at("open", dir)?;
            console = Some(format!("/proc/{}/fd/{}/{socket}", std::process::id(), opened.as_raw_fd()));
            // The runtime resolves the path while it runs, so the directory stays open with the session.
            session.connection = Some(opened.into());
        } else {
            let (out, their_out) = pipe().doing("create a pipe")?;
            let (err, their_err) = pipe().doing("create a pipe")?;
            streams = [None, Some(their_out), Some(their_err)];
            if exec.stdin {
                let (their_in, input) = pipe().doing("create a pipe")?;
                set_nonblocking(&input, true).doing("make a pipe non-blocking")?;
                streams[0] = Some(their_in);
                session.stdin = Some(input.into());
            }
            for (index, fd) in [out, err].into_iter().enumerate() {
                set_nonblocking(&fd, true).doing("make a pipe non-blocking")?;
                session.outputs[index] = Some(fd.into());
            }
        }
        let task = Task::Exec { name: &name, console: console.as_deref() };
        let streams = streams.each_ref().map(|stream| stream.as_ref().map(AsFd::as_fd));
        session.starting = Some(helper.run(&task.encode(), streams)?);
        Ok(session)
    }

    /// The runtime has done its part, well or not.
    fn started(
        &mut self,
        options: &Options,
        epoll: &Epoll,
        token: u64,
        runtime_end: Reaped,
    ) -> Result<(), Error> {
        let dir = &options.dir;
        // What the runtime sent before it ended may not have been looked at yet.
        for _ in 0..2 {
            self.console(epoll, token + 3);
        }
        self.console = None;
        self.connection = None;
        let ended = Status::decode(runtime_end.status);
        let pid = read_pid(&file(dir, &self.name, "pid"));
        let result = if ended == Some(Status::Exited(0)) {
            pid
        } else {
            let error = Error::new("the command could not be started");
            Err(Runtime::named(options, &self.name).explain(error, self.outputs[1].as_mut()))
        };
        forget_files(dir, &self.name);
        self.pid = result?;
        self.pidfd = pidfd_open(self.pid).ok();
        self.started_at_ms = now_ms();
        if self.tty && self.outputs[0].is_none() {
            return Err(Error::new("runtime sent no terminal"));
        }
        // Not before: the answer comes before the first output.
        self.watch_outputs(token, IN, epoll);
        Ok(())
    }

    /// `token` is the console's own.
    fn console(&mut self, epoll: &Epoll, token: u64) {
        let Some(listener) = &self.console else { return };
        if let Ok(connection) = seqpacket::accept(listener.as_fd()) {
            let _ = epoll.remove(listener);
            let _ = epoll.add(&connection, IN, token);
            self.connection = Some(connection);
        }
        let Some(connection) = &self.connection else { return };
        let mut text = [0; 512];
        let Ok(received) = seqpacket::receive(connection.as_fd(), &mut text) else { return };
        if let Some(master) = received.fds.into_iter().next()
            && set_nonblocking(&master, true).is_ok()
        {
            self.outputs[0] = Some(master.into());
            self.apply_size();
        }
        let _ = epoll.remove(connection);
    }

    fn apply_size(&self) {
        let sane = self.size.rows > 0 && self.size.columns > 0;
        if self.tty
            && sane
            && let Some(terminal) = &self.outputs[0]
        {
            let _ = tty::set_size(terminal, self.size);
        }
    }

    fn record(&self, reaped: Reaped, at_ms: u64) -> ExitRecord {
        let (code, signal, core) = exit_numbers(Status::decode(reaped.status));
        ExitRecord {
            id: self.name.clone(),
            pid: u32::try_from(reaped.pid).unwrap_or(0),
            code,
            signal,
            core,
            started_at_ms: self.started_at_ms,
            finished_at_ms: at_ms,
            user_us: reaped.user_us,
            system_us: reaped.system_us,
            max_rss_kb: reaped.max_rss_kb,
            ..ExitRecord::default()
        }
    }

    fn say(&self, clients: &mut Clients, reply: &Reply<'_>) {
        if let Some(client) = self.client.and_then(|c| clients.get(c)) {
            // A full socket loses the last word; the client sees the connection end.
            let _ = client.send(reply);
        }
    }

    /// One piece of output to the client. `false`: nothing more to read now.
    fn read(&mut self, index: usize, buffer: &mut [u8], epoll: &Epoll, clients: &mut Clients) -> bool {
        let Some(output) = &mut self.outputs[index] else { return false };
        let got = match output.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) | Ok(0) => {
                let _ = epoll.remove(output);
                self.outputs[index] = None;
                return false;
            }
            Ok(got) => got,
        };
        let bytes = &buffer[..got];
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        let Some(client) = self.client else { return true };
        let sent = clients.get(client).map(|c| c.send(&Reply::Data { stream, bytes }));
        if let Some(Err(e)) = sent
            && e.kind() == io::ErrorKind::WouldBlock
        {
            self.choked = bytes.to_vec();
            self.choked_stream = stream;
            for output in self.outputs.iter().flatten() {
                let _ = epoll.remove(output);
            }
            clients.choke(client, true, epoll);
        }
        true
    }

    fn unchoke(&mut self, token: u64, epoll: &Epoll, clients: &mut Clients) {
        let Some(index) = self.client.filter(|_| !self.choked.is_empty()) else { return };
        let Some(client) = clients.get(index) else { return };
        let reply = Reply::Data { stream: self.choked_stream, bytes: &self.choked };
        if client.send(&reply).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
            return;
        }
        self.choked = Vec::new();
        clients.choke(index, false, epoll);
        self.watch_outputs(token, IN, epoll);
    }

    fn watch_outputs(&self, token: u64, events: u32, epoll: &Epoll) {
        for (output, token) in self.outputs.iter().zip(token..) {
            if let Some(output) = output {
                // Fails for one that is watched already.
                let _ = epoll.add(output, events, token);
            }
        }
    }

    fn input(&self) -> Option<&File> {
        if self.tty { self.outputs[0].as_ref() } else { self.stdin.as_ref() }
    }

    fn take_input(&mut self, bytes: &[u8], token: u64, epoll: &Epoll, clients: &mut Clients) {
        let Some(mut input) = self.input() else { return };
        if !self.unfed.is_empty() {
            // What a client that goes has left in its socket.
            return self.unfed.extend_from_slice(bytes);
        }
        let written = match input.write(bytes) {
            Ok(written) => written,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => bytes.len(),
        };
        if written == bytes.len() {
            return;
        }
        // A terminal is watched for output under its own token; a copy is watched for room.
        let watched = if self.tty { input.try_clone().ok() } else { None };
        if self.tty {
            self.stdin = watched;
        }
        self.unfed.extend_from_slice(&bytes[written..]);
        if let Some(input) = &self.stdin {
            let _ = epoll.add(input, OUT, token + 2);
        }
        if let Some(client) = self.client {
            clients.pause(client, true, epoll);
        }
    }

    fn end_input(&mut self, epoll: &Epoll) {
        self.unfed = Vec::new();
        if let Some(input) = self.stdin.take() {
            // A terminal's copy would stay in the set, and be ready for ever.
            let _ = epoll.remove(&input);
        }
    }

    /// The command's input has room.
    fn feed(&mut self, epoll: &Epoll, clients: &mut Clients) {
        let Some(mut input) = self.stdin.as_ref() else { return };
        match input.write(&self.unfed) {
            Ok(written) => {
                self.unfed.drain(..written);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => self.unfed.clear(),
        }
        if !self.unfed.is_empty() {
            return;
        }
        let _ = epoll.remove(input);
        if self.tty || self.stdin_ends {
            self.stdin = None;
        }
        if let Some(client) = self.client {
            clients.pause(client, false, epoll);
        }
    }
}

fn file(dir: &Path, name: &str, kind: &str) -> PathBuf {
    dir.join(format!("{name}.{kind}"))
}

fn forget_files(dir: &Path, name: &str) {
    for kind in ["json", "pid", "sock", "log", "err"] {
        let _ = fs::remove_file(file(dir, name, kind));
    }
}
