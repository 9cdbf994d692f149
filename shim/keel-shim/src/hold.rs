//! The hold phase: waits for output, for clients and for the end. What an idle container costs is here.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keel_proto::{
    Attach, DecodeError, ErrorCode, Exec, ExitRecord, MAX_MESSAGE, Phase, Reply, Request, State, Stream,
};
use keel_sys::epoll::{BATCH, ERR, Epoll, HUP, IN, OUT, Ready};
use keel_sys::file::set_cloexec;
use keel_sys::monitor::{Buffer, Reaped, Status, pidfd_exit_status, reap, shed_memory, take_inherited};
use keel_sys::process::{block_signals, close_range_cloexec, pidfd_send_signal, read_signal, set_name};
use keel_sys::{seqpacket, tty};

use crate::args::Inherited;
use crate::clients::Clients;
use crate::cri::Formatter;
use crate::error::{Context, Error};
use crate::log::{Limits, Log, Lost};
use crate::machine::{Effect, Event, step};
use crate::memory::Memory;
use crate::progress::Progress;
use crate::record::write_durably;
use crate::replay;
use crate::runtime::{DELETE_TIMEOUT, Runtime};
use crate::sessions::Sessions;
use crate::setup;

/// As much as a pipe holds: one read empties it.
const INPUT: usize = 64 << 10;
/// Four times as much as is read: lines shorter than 13 bytes take more than one write.
const OUTPUT: usize = 256 << 10;
/// How long the buffers of a burst are kept. Giving pages back costs less than a millisecond.
const WARM: Duration = Duration::from_millis(200);
/// Output that comes later than this after the end is from somebody who is not the container.
const DRAIN: Duration = Duration::from_secs(2);
/// And no more than so much of it, should it come faster than it can be read.
const DRAIN_READS: u32 = 256;
/// Between kills of a cgroup whose processes do not go, for instance because a disk does not answer.
const KILL_AGAIN: Duration = Duration::from_secs(1);
/// Between tries to write the exit record.
const WRITE_AGAIN: Duration = Duration::from_secs(1);
/// For the status of a container whose parent is somebody else, who has to reap it first.
const REAPED_BY_OTHERS: Duration = Duration::from_secs(10);
const SIGKILL: i32 = 9;
/// Of a terminal, in rows or columns; programs allocate by it.
const LARGEST_WINDOW: u16 = 4096;

const SIGNALS: u64 = 0;
const CONTAINER: u64 = 1;
const LISTENER: u64 = 2;
const STDIN: u64 = 3;
const STDOUT: u64 = 4;
const STDERR: u64 = 5;
const CLIENTS: u64 = 16;
const SESSIONS: u64 = 64;

pub(crate) fn run(inherited: &Inherited) -> Result<ExitCode, Error> {
    let mut hold = Hold::new(inherited)?;
    hold.begin();
    while hold.phase != Phase::Gone {
        hold.turn()?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Code, signal and core dump as records have them.
pub(crate) fn exit_numbers(status: Option<Status>) -> (i32, i32, bool) {
    match status {
        Some(Status::Exited(code)) => (code, 0, false),
        Some(Status::Signaled { signal, core }) => (128 + signal, signal, core),
        None => (-1, 0, false),
    }
}

struct Hold {
    memory: Memory,
    epoll: Epoll,
    signals: OwnedFd,
    /// Absent when the container was gone before this shim came.
    pidfd: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    stdin: Option<Stdin>,
    outputs: [Option<Output>; 2],
    log: Option<Log>,
    /// Absent where nothing is to be kept safe: no log, or a terminal, which cannot be looked into.
    progress: Option<Progress>,
    input: Buffer,
    output: Buffer,
    /// The buffers have pages to give back.
    warm: bool,
    clients: Clients,
    sessions: Sessions,
    phase: Phase,
    deadline: Option<Instant>,
    /// The adopted container has ended and its parent has so long to reap it.
    reaper_due: Option<Instant>,
    stop_signal: u8,
    grace: Duration,
    ended: Option<Ended>,
    /// Set when it is on disk.
    record: Option<String>,
    /// Child that runs `delete`.
    deleting: Option<i32>,
}

struct Output {
    file: File,
    formatter: Formatter,
}

struct Stdin {
    file: File,
    /// Taken from a client and not yet by the container.
    pending: Vec<u8>,
}

/// How the container's first process ended.
#[derive(Clone, Copy)]
struct Ended {
    status: Option<Status>,
    usage: Reaped,
    at_ms: u64,
}

impl Hold {
    fn new(inherited: &Inherited) -> Result<Hold, Error> {
        let take = |fd: Option<i32>| fd.map(take_inherited).transpose().doing("take inherited descriptor");
        let pidfd = take(inherited.pidfd)?;
        let listener = take(inherited.listener)?;
        let stdin = take(inherited.stdin)?;
        let stdout = take(inherited.stdout)?;
        let stderr = take(inherited.stderr)?;
        let _ = set_name(c"keel-shim");
        let memory = Memory::load(&inherited.dir)?;
        let o = &memory.options;
        let log = o.log.as_ref().map(|path| Log::open(path, Limits::of(o), memory.lost));
        let progress = match log {
            Some(_) if !o.tty => Progress::open(&o.dir).ok(),
            _ => None,
        };
        let mut buffer = Buffer::new(OUTPUT).doing("map buffer")?;
        let within = match &o.log {
            Some(log) if memory.resumed => replay::within_lines(log, &mut buffer),
            _ => [false; 2],
        };
        buffer.discard();
        let output = |fd: Option<OwnedFd>, stream, in_line| {
            fd.map(|fd| Output { file: fd.into(), formatter: Formatter::new(stream, in_line) })
        };
        Ok(Hold {
            epoll: Epoll::new().doing("create epoll")?,
            signals: block_signals().doing("block signals")?,
            pidfd,
            listener,
            stdin: stdin.map(|fd| Stdin { file: fd.into(), pending: Vec::new() }),
            outputs: [output(stdout, Stream::Stdout, within[0]), output(stderr, Stream::Stderr, within[1])],
            log,
            progress,
            input: Buffer::new(INPUT).doing("map buffer")?,
            output: buffer,
            // Start-up counts as a burst.
            warm: true,
            clients: Clients::new(CLIENTS),
            sessions: Sessions::new(SESSIONS),
            phase: Phase::Running,
            deadline: None,
            reaper_due: None,
            stop_signal: 0,
            grace: Duration::ZERO,
            ended: None,
            record: None,
            deleting: None,
            memory,
        })
    }

    fn begin(&mut self) {
        let mut watched = vec![(self.signals.as_fd(), IN, SIGNALS)];
        if let Some(listener) = &self.listener {
            watched.push((listener.as_fd(), IN, LISTENER));
        }
        for (output, token) in self.outputs.iter().zip([STDOUT, STDERR]) {
            if let Some(output) = output {
                watched.push((output.file.as_fd(), IN, token));
            }
        }
        // A parent hears of the end by signal and wait; only who is not needs the pidfd for it.
        if let Some(pidfd) = self.pidfd.as_ref().filter(|_| self.memory.adopted) {
            watched.push((pidfd.as_fd(), IN, CONTAINER));
        }
        for (fd, events, token) in watched {
            // Fails only for want of kernel memory; the rest still works.
            let _ = self.epoll.add(fd, events, token);
        }
        if self.pidfd.is_none() {
            self.ended(None, Reaped::default());
        }
        // Children that ended before the signal was blocked.
        self.reap();
    }

    fn turn(&mut self) -> Result<(), Error> {
        let mut ready = [Ready::default(); BATCH];
        let got = self.epoll.wait(&mut ready, self.timeout()).doing("wait for events")?;
        if got == 0 && self.warm {
            self.input.discard();
            self.output.discard();
            shed_memory();
            self.warm = false;
        }
        for ready in &ready[..got] {
            self.dispatch(*ready);
        }
        let due = |deadline: Option<Instant>| deadline.is_some_and(|d| Instant::now() >= d);
        if due(self.deadline) {
            self.deadline = None;
            self.event(Event::Deadline);
        }
        if due(self.reaper_due) {
            self.container_ended_elsewhere(HUP);
        }
        Ok(())
    }

    /// `None` when nothing is due: an idle shim sleeps for ever.
    fn timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        let due = [self.deadline, self.reaper_due].into_iter().flatten().min();
        let due = due.map(|d| d.saturating_duration_since(now));
        let warm = self.warm.then_some(WARM);
        [due, warm].into_iter().flatten().min()
    }

    fn dispatch(&mut self, ready: Ready) {
        match ready.token {
            SIGNALS => {
                // Only the end of a child means anything here: a monitor ends when its container has.
                let _ = read_signal(&self.signals);
                self.reap();
            }
            CONTAINER => self.container_ended_elsewhere(ready.events),
            LISTENER => {
                if let Some(listener) = &self.listener {
                    self.clients.accept(listener, &self.epoll);
                }
            }
            STDIN => self.feed_stdin(),
            STDOUT => self.pump(0),
            STDERR => self.pump(1),
            token if self.sessions.owns(token) => {
                self.warm = true;
                self.sessions.ready(token, &mut self.input, &self.epoll, &mut self.clients);
            }
            token => {
                if let Some(index) = self.clients.index(token) {
                    self.client(index, ready.events);
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        let (phase, effects) = step(self.phase, event);
        self.phase = phase;
        for effect in effects {
            self.perform(*effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::SendStopSignal => {
                let _ = self.signal(self.stop_signal);
            }
            Effect::ArmGrace => {
                let due = Instant::now() + self.grace;
                self.deadline = Some(self.deadline.map_or(due, |old| old.min(due)));
            }
            Effect::KillCgroup => {
                if !self.memory.cgroup.kill() {
                    let _ = self.signal(SIGKILL as u8);
                }
            }
            Effect::ArmKillAgain => self.arm(KILL_AGAIN),
            Effect::ArmDrain => {
                self.arm(DRAIN);
                self.check_drained();
            }
            Effect::CloseStreams => self.close_streams(),
            Effect::WriteRecord => self.write_record(),
            Effect::ArmWriteAgain => self.arm(WRITE_AGAIN),
            Effect::TellClients => {
                let record = self.record.take().unwrap_or_default();
                self.clients.tell_exit(&record);
                self.record = Some(record);
            }
            Effect::StartDelete => self.start_delete(),
            Effect::ArmDelete => self.arm(DELETE_TIMEOUT),
            Effect::Disarm => self.deadline = None,
            Effect::Quit => setup::remove_files(&self.memory.options),
        }
    }

    fn arm(&mut self, delay: Duration) {
        self.deadline = Some(Instant::now() + delay);
    }

    fn signal(&self, signal: u8) -> io::Result<()> {
        match &self.pidfd {
            Some(pidfd) if self.ended.is_none() => pidfd_send_signal(pidfd, i32::from(signal)),
            _ => Err(io::Error::from_raw_os_error(3)),
        }
    }

    fn reap(&mut self) {
        while let Ok(Some(reaped)) = reap(-1) {
            if reaped.pid == self.memory.container.pid && !self.memory.adopted {
                self.ended(Status::decode(reaped.status), reaped);
            } else if Some(reaped.pid) == self.deleting {
                self.deleting = None;
                self.event(Event::Deleted);
            } else {
                self.sessions.reaped(reaped, &self.memory.options, &self.epoll, &mut self.clients);
            }
        }
    }

    fn ended(&mut self, status: Option<Status>, usage: Reaped) {
        if self.ended.is_none() {
            let at_ms = now_ms().max(self.memory.started_at_ms);
            self.ended = Some(Ended { status, usage, at_ms });
            self.event(Event::Exited);
        }
    }

    /// An adopted container has ended; its status is to be had from the pidfd once its parent has reaped it, which is
    /// what HUP tells.
    fn container_ended_elsewhere(&mut self, events: u32) {
        let Some(pidfd) = &self.pidfd else { return };
        let status = match pidfd_exit_status(pidfd.as_fd()) {
            Ok(Some(status)) => Status::decode(status),
            Ok(None) if events & (HUP | ERR) == 0 => {
                // Readable until then, it would wake us for nothing. The parent may be slow, or never reap.
                let _ = self.epoll.modify(pidfd, 0, CONTAINER);
                self.reaper_due = Some(Instant::now() + REAPED_BY_OTHERS);
                return;
            }
            _ => None,
        };
        let _ = self.epoll.remove(pidfd);
        self.reaper_due = None;
        self.ended(status, Reaped::default());
    }

    // Output.

    fn pump(&mut self, index: usize) {
        if matches!(self.read_once(index), Read::End) {
            self.close_output(index);
            self.check_drained();
        }
    }

    fn read_once(&mut self, index: usize) -> Read {
        let Some(output) = &mut self.outputs[index] else { return Read::Nothing };
        let got = match &self.progress {
            Some(progress) => progress.look(&output.file, &mut self.input),
            None => output.file.read(&mut self.input),
        };
        let bytes = match got {
            Ok(0) => return Read::End,
            Ok(got) => &self.input[..got],
            Err(e) => {
                return match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Read::Nothing,
                    // A terminal says EIO when its last user is gone.
                    _ => Read::End,
                };
            }
        };
        self.warm = true;
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        if let Some(log) = &mut self.log {
            if let Some(progress) = &self.progress {
                progress.begin(stream, log.position());
            }
            output.formatter.set_time(SystemTime::now());
            let mut rest = bytes;
            while !rest.is_empty() {
                let (taken, written) = output.formatter.format(rest, &mut self.output);
                log.append(&self.output[..written]);
                rest = &rest[taken..];
            }
        }
        if let Some(progress) = &self.progress {
            progress.take(&output.file, bytes.len());
        }
        let blocked = self.stdin.as_ref().is_some_and(|s| !s.pending.is_empty());
        self.clients.broadcast(stream, bytes, &self.epoll, blocked);
        Read::Some
    }

    fn close_output(&mut self, index: usize) {
        let Some(mut output) = self.outputs[index].take() else { return };
        let _ = self.epoll.remove(&output.file);
        if let Some(log) = &mut self.log {
            let mut closing = [0; 64];
            output.formatter.set_time(SystemTime::now());
            log.append(output.formatter.close(&mut closing));
        }
    }

    fn check_drained(&mut self) {
        if self.phase == Phase::Draining && self.outputs.iter().all(Option::is_none) {
            self.event(Event::Drained);
        }
    }

    fn close_streams(&mut self) {
        for index in 0..self.outputs.len() {
            for _ in 0..DRAIN_READS {
                if !matches!(self.read_once(index), Read::Some) {
                    break;
                }
            }
            self.close_output(index);
        }
        self.stdin = None;
        if let Some(log) = &self.log {
            log.sync();
        }
    }

    // The end.

    fn write_record(&mut self) {
        let record = self.make_record().to_json();
        let event = match write_durably(&self.memory.options.exit_file, record.as_bytes()) {
            Ok(()) => {
                self.record = Some(record);
                Event::Recorded
            }
            Err(_) => Event::RecordFailed,
        };
        self.event(event);
    }

    fn make_record(&self) -> ExitRecord {
        let ended = self.ended.unwrap_or(Ended { status: None, usage: Reaped::default(), at_ms: now_ms() });
        let (code, signal, core) = exit_numbers(ended.status);
        let lost = self.lost();
        ExitRecord {
            id: self.memory.options.id.clone(),
            pid: u32::try_from(self.memory.container.pid).unwrap_or(0),
            code,
            signal,
            core,
            oom: self.memory.cgroup.oom_killed(),
            lost: ended.status.is_none(),
            started_at_ms: self.memory.started_at_ms,
            finished_at_ms: ended.at_ms,
            user_us: ended.usage.user_us,
            system_us: ended.usage.system_us,
            max_rss_kb: ended.usage.max_rss_kb,
            log_lost_lines: lost.lines,
            log_lost_bytes: lost.bytes,
        }
    }

    fn lost(&self) -> Lost {
        self.log.as_ref().map_or(self.memory.lost, |log| log.lost)
    }

    fn start_delete(&mut self) {
        let runtime = Runtime::new(&self.memory.options);
        let mut command = runtime.command("delete");
        command.arg("--force").arg(&self.memory.options.id);
        match runtime.spawn("delete", &mut command) {
            Ok(child) => self.deleting = i32::try_from(child.id()).ok(),
            // Whoever reads the record cleans up in any case.
            Err(_) => self.event(Event::Deleted),
        }
    }

    // Clients.

    /// Not inlined: its message buffer would become part of the frame that sleeps.
    #[inline(never)]
    fn client(&mut self, index: usize, events: u32) {
        let blocked = self.stdin.as_ref().is_some_and(|s| !s.pending.is_empty());
        if events & OUT != 0 && !self.clients.writable(index, &self.epoll, blocked) {
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

    fn client_left(&mut self, index: usize) {
        let fed = self.clients.get(index).is_some_and(|c| c.has_stdin());
        self.sessions.client_left(index, &self.epoll);
        self.clients.close(index);
        if fed {
            self.end_stdin();
        }
    }

    fn request(&mut self, index: usize, request: Request<'_>) {
        // On a connection that runs a command, these are the command's, and not answered.
        if self.sessions.has_client(index) {
            match request {
                Request::Stdin(bytes) => {
                    return self.sessions.stdin(index, bytes, &self.epoll, &mut self.clients);
                }
                Request::StdinEof => return self.sessions.stdin_eof(index),
                Request::Resize { rows, columns } => return self.sessions.resize(index, rows, columns),
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
                self.event(Event::Stop);
                self.answer(index, &Reply::Ok);
            }
            Request::Resize { rows, columns } => self.resize(index, rows, columns),
            Request::Attach(what) => self.attach(index, what),
            Request::Stdin(bytes) => self.take_stdin(index, bytes),
            Request::StdinEof => self.end_stdin(),
            Request::Reopen => {
                let done = self.log.as_mut().map_or(Ok(()), Log::reopen);
                self.acknowledge(index, done);
            }
            Request::Wait => self.wait(index),
            Request::Spares => self.spares(index),
            Request::Upgrade => self.upgrade(index),
        }
    }

    fn state(&self) -> State {
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

    fn answer(&mut self, index: usize, reply: &Reply<'_>) {
        let failed = self.clients.get(index).is_some_and(|client| client.send(reply).is_err());
        if failed {
            // It does not read its answers.
            self.client_left(index);
        }
    }

    fn refuse(&mut self, index: usize, code: ErrorCode, message: &str) {
        self.answer(index, &Reply::Error { code, message });
    }

    fn acknowledge(&mut self, index: usize, done: Result<(), Error>) {
        match done {
            Ok(()) => self.answer(index, &Reply::Ok),
            Err(e) => self.refuse(index, ErrorCode::Failed, &e.one_line()),
        }
    }

    fn resize(&mut self, index: usize, rows: u16, columns: u16) {
        let terminal = self.outputs[0].as_ref().filter(|_| self.memory.options.tty);
        let Some(terminal) = terminal else {
            return self.refuse(index, ErrorCode::Unsupported, "the container has no terminal");
        };
        let sane = 1..=LARGEST_WINDOW;
        if !sane.contains(&rows) || !sane.contains(&columns) {
            return self.refuse(index, ErrorCode::Failed, "window size out of range");
        }
        let done = tty::set_size(&terminal.file, tty::Size { rows, columns });
        self.acknowledge(index, done.doing("resize the terminal"));
    }

    fn attach(&mut self, index: usize, what: Attach) {
        if what.stdin && self.stdin.is_none() && !self.memory.options.tty {
            return self.refuse(index, ErrorCode::Unsupported, "the container has no input");
        }
        self.answer(index, &Reply::Ok);
        let Some(client) = self.clients.get(index) else { return };
        client.attach(what);
        if what.replay_kib > 0
            && let Some(log) = &self.memory.options.log
        {
            self.warm = true;
            let _ = replay::send(client, log, what, &mut self.output, &mut self.input);
        }
        if let Some(record) = &self.record {
            let _ = client.send(&Reply::Exited { record });
        }
    }

    fn exec(&mut self, index: usize, exec: Exec<'_>) {
        if self.phase > Phase::Stopping {
            return self.refuse(index, ErrorCode::Unsupported, "the container has ended");
        }
        // Answered when the runtime has done it.
        if let Err(e) = self.sessions.start(&self.memory.options, &self.epoll, index, exec) {
            self.refuse(index, ErrorCode::Failed, &e.one_line());
        }
    }

    fn wait(&mut self, index: usize) {
        let Some(client) = self.clients.get(index) else { return };
        match &self.record {
            Some(record) => {
                let _ = client.send(&Reply::Exited { record });
            }
            None => client.waiting = true,
        }
    }

    fn spares(&mut self, index: usize) {
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

    /// Executes whatever program now has the name that this one was started by. Connections end; the container, its
    /// children and its streams do not notice.
    fn upgrade(&mut self, index: usize) {
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

    fn pass_on(&self) -> Inherited {
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
        }
    }

    /// Undoes `pass_on`.
    fn keep(&self) {
        let _ = close_range_cloexec(3);
    }

    // Input.

    fn take_stdin(&mut self, index: usize, bytes: &[u8]) {
        if !self.clients.get(index).is_some_and(|c| c.has_stdin()) {
            return self.refuse(index, ErrorCode::Unsupported, "not attached to the input");
        }
        let written = self.write_stdin(bytes);
        if written < bytes.len() {
            self.keep_stdin(&bytes[written..]);
        }
    }

    fn write_stdin(&mut self, bytes: &[u8]) -> usize {
        let mut file: &File = match (&self.stdin, &self.outputs[0]) {
            (Some(stdin), _) if stdin.pending.is_empty() => &stdin.file,
            (Some(_), _) => return 0,
            (None, Some(terminal)) if self.memory.options.tty => &terminal.file,
            _ => return bytes.len(),
        };
        match file.write(bytes) {
            Ok(written) => written,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            // Nobody reads any more: input for nobody is dropped as a closed pipe would.
            Err(_) => bytes.len(),
        }
    }

    /// Keeps what the container did not take, and listens to no more input until it has.
    fn keep_stdin(&mut self, rest: &[u8]) {
        if self.stdin.is_none()
            && let Some(terminal) = &self.outputs[0]
            && let Ok(file) = terminal.file.try_clone()
        {
            self.stdin = Some(Stdin { file, pending: Vec::new() });
        }
        let Some(stdin) = &mut self.stdin else { return };
        let first = stdin.pending.is_empty();
        stdin.pending.extend_from_slice(rest);
        if first && self.epoll.add(&stdin.file, OUT, STDIN).is_ok() {
            self.clients.block_stdin(true, &self.epoll);
        }
    }

    fn feed_stdin(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        match (&stdin.file).write(&stdin.pending) {
            Ok(written) => {
                stdin.pending.drain(..written);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => stdin.pending.clear(),
        }
        if stdin.pending.is_empty() {
            let _ = self.epoll.remove(&stdin.file);
            stdin.pending = Vec::new();
            if self.memory.options.tty {
                self.stdin = None;
            }
            self.clients.block_stdin(false, &self.epoll);
        }
    }

    /// The client that fed the input is done: with `--stdin-once` so is the container's input.
    fn end_stdin(&mut self) {
        if self.memory.options.stdin_once && !self.memory.options.tty {
            self.stdin = None;
        }
    }
}

/// The path by which this program was started, for a newer one may have that name now.
fn own_path() -> PathBuf {
    let link = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let bytes = link.as_os_str().as_bytes();
    // What the kernel shows for a file that lost its name.
    OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes)).into()
}

enum Read {
    Some,
    Nothing,
    End,
}
