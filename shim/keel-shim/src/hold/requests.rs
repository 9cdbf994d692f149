//! What clients ask.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use keel_proto::{Attach, DecodeError, ErrorCode, Exec, MAX_MESSAGE, Phase, Reply, Request, State};
use keel_sys::epoll::{ERR, HUP, IN, OUT};
use keel_sys::file::set_cloexec;
use keel_sys::process::close_range_cloexec;
use keel_sys::{seqpacket, tty};

use crate::args::Inherited;
use crate::error::{Context, Error};
use crate::helper::Helper;
use crate::machine::Event;
use crate::replay;
use crate::setup;

use super::Hold;

/// Of a terminal, in rows or columns; programs allocate by it.
const LARGEST_WINDOW: u16 = 4096;
/// A socket holds as much of earlier output, and what follows; its client may not read.
const MOST_REPLAY: usize = 128 << 10;

impl Hold {
    /// Not inlined: its message buffer would become part of the frame that sleeps.
    #[inline(never)]
    pub(super) fn client(&mut self, index: usize, events: u32) {
        if events & OUT != 0 && !self.clients.writable(index, &self.epoll) {
            return self.client_left(index);
        }
        if events & OUT != 0 {
            self.sessions.client_writable(index, &self.epoll, &mut self.clients);
        }
        if events & (IN | HUP | ERR) == 0 {
            return;
        }
        let mut message = [0; MAX_MESSAGE];
        let Some(client) = self.clients.get(index) else { return };
        let got = match seqpacket::receive(client.fd(), &mut message) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(e) if e.kind() == io::ErrorKind::InvalidData => MAX_MESSAGE + 1,
            Err(_) => 0,
            Ok(received) => received.len,
        };
        if got == 0 {
            return self.client_left(index);
        }
        let decoded = match message.get(..got) {
            Some(message) => Request::decode(message),
            None => Err(DecodeError::Long { len: got }),
        };
        match decoded {
            Ok(request) => self.request(index, request),
            Err(e) => {
                let code = match e {
                    DecodeError::Version(_) => ErrorCode::Version,
                    _ => ErrorCode::Malformed,
                };
                self.refuse(index, code, &e.to_string());
            }
        }
    }

    pub(super) fn client_left(&mut self, index: usize) {
        let fed = self.clients.get(index).is_some_and(|c| c.has_stdin());
        self.sessions.client_left(index, &self.epoll);
        self.clients.close(index);
        if fed {
            self.end_stdin();
        }
    }

    pub(super) fn request(&mut self, index: usize, request: Request<'_>) {
        // On a connection that runs a command, these are the command's, and not answered.
        if self.sessions.has_client(index) {
            match request {
                Request::Stdin(bytes) => {
                    return self.sessions.stdin(index, bytes, &self.epoll, &mut self.clients);
                }
                Request::StdinEof => return self.sessions.stdin_eof(index),
                Request::Resize { rows, columns } if is_sane(rows, columns) => {
                    return self.sessions.resize(index, rows, columns);
                }
                Request::Resize { .. } => return,
                Request::Signal { signal } => return self.sessions.signal(index, signal),
                _ => return self.refuse(index, ErrorCode::Unsupported, "this connection runs a command"),
            }
        }
        match request {
            Request::Exec(exec) => self.exec(index, exec),
            Request::State => self.answer(index, &Reply::State(self.state())),
            Request::Signal { signal } => {
                let sent = self.signal(signal);
                self.acknowledge(index, sent.doing("signal the container"));
            }
            Request::Stop { signal, grace_ms } => {
                self.stop_signal = signal;
                self.grace = Duration::from_millis(u64::from(grace_ms));
                self.restart.stopped = true;
                self.event(Event::Stop);
                self.answer(index, &Reply::Ok);
            }
            Request::Resize { rows, columns } => self.resize(index, rows, columns),
            Request::Attach(what) => self.attach(index, what),
            Request::Stdin(bytes) => self.take_stdin(index, bytes),
            Request::StdinEof => self.end_stdin(),
            Request::Reopen => {
                let done = self.pump.reopen();
                self.acknowledge(index, done);
            }
            Request::Wait => self.wait(index),
            Request::Spares => self.spares(index),
            Request::Upgrade => self.upgrade(index),
            Request::Sockets => self.tell_sockets(index),
            Request::Dismiss => {
                self.answer(index, &Reply::Ok);
                self.dismiss();
            }
        }
    }

    pub(super) fn state(&self) -> State {
        let lost = self.lost();
        State {
            phase: self.phase,
            tty: self.memory.options.tty,
            adopted: self.memory.adopted,
            pid: u32::try_from(self.memory.container.pid).unwrap_or(0),
            started_at_ms: self.memory.started_at_ms,
            log_lost_lines: lost.lines,
            log_lost_bytes: lost.bytes,
            attachments: self.clients.attachments(),
        }
    }

    pub(super) fn answer(&mut self, index: usize, reply: &Reply<'_>) {
        let failed = self.clients.get(index).is_some_and(|client| client.send(reply).is_err());
        if failed {
            // It does not read its answers.
            self.client_left(index);
        }
    }

    pub(super) fn refuse(&mut self, index: usize, code: ErrorCode, message: &str) {
        self.answer(index, &Reply::Error { code, message });
    }

    pub(super) fn acknowledge(&mut self, index: usize, done: Result<(), Error>) {
        match done {
            Ok(()) => self.answer(index, &Reply::Ok),
            Err(e) => self.refuse(index, ErrorCode::Failed, &e.one_line()),
        }
    }

    pub(super) fn resize(&mut self, index: usize, rows: u16, columns: u16) {
        let terminal = self.outputs[0].as_ref().filter(|_| self.memory.options.tty);
        let Some(terminal) = terminal else {
            return self.refuse(index, ErrorCode::Unsupported, "the container has no terminal");
        };
        if !is_sane(rows, columns) {
            return self.refuse(index, ErrorCode::Failed, "window size out of range");
        }
        let done = tty::set_size(&terminal.file, tty::Size { rows, columns });
        self.acknowledge(index, done.doing("resize the terminal"));
    }

    pub(super) fn attach(&mut self, index: usize, what: Attach) {
        if what.stdin && self.stdin.is_none() && !self.memory.options.tty {
            return self.refuse(index, ErrorCode::Unsupported, "the container has no input");
        }
        self.answer(index, &Reply::Ok);
        let Some(client) = self.clients.get(index) else { return };
        client.attach(what);
        if what.replay_kib > 0
            && let Some(log) = &self.memory.options.log.file
        {
            self.pump.warm = true;
            let raw = self.memory.options.log.raw;
            let most = (usize::from(what.replay_kib) << 10).min(MOST_REPLAY);
            let _ = replay::send(client, log, raw, what, most, &mut self.pump.input);
        }
        // Others may have input blocked; and not all of the replay may have fitted.
        let _ = self.clients.watch(index, &self.epoll);
        let Some(client) = self.clients.get(index) else { return };
        if let Some(record) = &self.record {
            let _ = client.send(&Reply::Exited { record });
        }
    }

    pub(super) fn exec(&mut self, index: usize, exec: Exec<'_>) {
        if self.phase > Phase::Stopping {
            return self.refuse(index, ErrorCode::Unsupported, "the container has ended");
        }
        if self.clients.get(index).is_some_and(|client| client.is_attached()) {
            return self.refuse(
                index,
                ErrorCode::Unsupported,
                "this connection is attached to the container",
            );
        }
        if exec.tty && exec.rows | exec.columns != 0 && !is_sane(exec.rows, exec.columns) {
            return self.refuse(index, ErrorCode::Failed, "window size out of range");
        }
        // Answered when the runtime has done it.
        if let Err(e) =
            self.sessions.start(&self.memory.options, self.helper.as_ref(), &self.epoll, index, exec)
        {
            self.refuse(index, ErrorCode::Failed, &e.one_line());
        }
    }

    pub(super) fn wait(&mut self, index: usize) {
        let Some(client) = self.clients.get(index) else { return };
        match &self.record {
            Some(record) => {
                let _ = client.send(&Reply::Exited { record });
            }
            None => client.waiting = true,
        }
    }

    pub(super) fn spares(&mut self, index: usize) {
        let output = |i: usize| self.outputs[i].as_ref().map(|o| o.file.as_fd());
        let terminal = self.memory.options.tty;
        let (stdout, master) = if terminal { (None, output(0)) } else { (output(0), None) };
        let stderr = output(1);
        let pidfd = self.pidfd.as_ref().map(AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = [pidfd, stdout, stderr, master].into_iter().flatten().collect();
        let reply = Reply::Spares {
            pidfd: pidfd.is_some(),
            stdout: stdout.is_some(),
            stderr: stderr.is_some(),
            terminal: master.is_some(),
        };
        let message = reply.encode();
        if let Some(client) = self.clients.get(index) {
            let _ = seqpacket::send_fds(client.fd(), message.head(), message.body, &fds);
        }
    }

    fn tell_sockets(&mut self, index: usize) {
        let names = self.memory.held.join("\n");
        let fds: Vec<BorrowedFd<'_>> = self.sockets.iter().map(AsFd::as_fd).collect();
        let message = Reply::Sockets { names: &names }.encode();
        if let Some(client) = self.clients.get(index) {
            let _ = seqpacket::send_fds(client.fd(), message.head(), message.body, &fds);
        }
    }

    /// Executes whatever program now has the name that this one was started by. Connections end; the container, its
    /// children and its streams do not notice.
    pub(super) fn upgrade(&mut self, index: usize) {
        let busy = self.phase != Phase::Running
            || self.sessions.any()
            || self.stdin.as_ref().is_some_and(|s| !s.pending.is_empty());
        if busy {
            return self.refuse(
                index,
                ErrorCode::Unsupported,
                "not while the container is being stopped or fed, or runs a command",
            );
        }
        // A writer of logs is another program's then.
        self.pump.settle();
        self.memory.lost = self.lost();
        self.memory.resumed = true;
        if let Err(e) = self.memory.save() {
            return self.acknowledge(index, Err(e));
        }
        self.answer(index, &Reply::Ok);
        let inherited = self.pass_on();
        let error = setup::execute_hold(&own_path(), &inherited);
        self.keep();
        self.acknowledge(index, Err(error).doing("execute the monitor's program"));
    }

    pub(super) fn pass_on(&self) -> Inherited {
        let pass = |fd: Option<BorrowedFd<'_>>| {
            let fd = fd?;
            set_cloexec(fd, false).ok()?;
            Some(fd.as_raw_fd())
        };
        let output = |i: usize| self.outputs[i].as_ref().map(|o| o.file.as_fd());
        Inherited {
            dir: self.memory.options.dir.clone(),
            pidfd: pass(self.pidfd.as_ref().map(AsFd::as_fd)),
            listener: pass(self.listener.as_ref().map(AsFd::as_fd)),
            stdin: pass(self.stdin.as_ref().map(|s| s.file.as_fd())),
            stdout: pass(output(0)),
            stderr: pass(output(1)),
            notify: pass(self.notify.as_ref().map(AsFd::as_fd)),
            helper: pass(self.helper.as_ref().map(Helper::socket)).is_some(),
            sockets: self.sockets.iter().filter_map(|fd| pass(Some(fd.as_fd()))).collect(),
        }
    }

    /// Undoes `pass_on`.
    pub(super) fn keep(&self) {
        let _ = close_range_cloexec(3);
        if let Some(helper) = &self.helper {
            let _ = set_cloexec(helper.socket(), true);
        }
    }
}

fn is_sane(rows: u16, columns: u16) -> bool {
    let sane = 1..=LARGEST_WINDOW;
    sane.contains(&rows) && sane.contains(&columns)
}

/// The path by which this program was started, for a newer one may have that name now.
fn own_path() -> PathBuf {
    let link = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let bytes = link.as_os_str().as_bytes();
    // What the kernel shows for a file that lost its name.
    OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes)).into()
}
