//! The hold phase: output to the log and the clients, input from them, and the end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use keel_proto::Stream;
use keel_sys::epoll::{BATCH, ERR, Epoll, HUP, IN, OUT, Ready};
use keel_sys::monitor::{Status, pidfd_exit_status, reap, take_inherited};
use keel_sys::process::{
    block_signals, close_range_cloexec, kill, pidfd_open, pidfd_send_signal, read_signal, set_name,
    set_subreaper,
};
use keel_sys::{seqpacket, tty};

use super::cli::Options;
use super::clients::Clients;
use super::control::{Lines, Message};
use super::parent;
use super::setup::{self, Failure};
use crate::cgroup::Cgroup;
use crate::confine::{confine, filter};
use crate::error::{Context, Error};
use crate::helper::{CANNOT_EXECUTE, Helper, Program};
use crate::hold::exit_numbers;
use crate::journal::{Fields, Journal};
use crate::log::{Limits, Log};
use crate::notify;
use crate::process::leads_group;
use crate::pump::{Output, Pump, Read};
use crate::record::write_durably;

/// How long the buffers of a burst are kept.
const WARM: Duration = Duration::from_millis(200);
/// Between looks at a terminal that nobody has open, while its container runs.
const TERMINAL_AGAIN: Duration = Duration::from_millis(500);
/// Largest message of input.
const INPUT: usize = 32 << 10;
const SIGINT: i32 = 2;
const SIGQUIT: i32 = 3;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
/// The monitor is the last to go when memory is short. Not every host allows that.
const LAST_TO_GO: &str = "-1000";
/// The one task of a helper.
const EXIT_COMMAND: &str = "exit-command";
const EXIT_FILE: &str = "exit";
const OOM_FILE: &str = "oom";
/// The exit code of a container that was killed for its time being up, and what its caller is told.
const TIMED_OUT: i32 = -1;
const TIMED_OUT_MESSAGE: &str = "command timed out";

const SIGNALS: u64 = 0;
const CONTAINER: u64 = 1;
const LISTENER: u64 = 2;
const STDIN: u64 = 3;
const STDOUT: u64 = 4;
const STDERR: u64 = 5;
const CONTROL: u64 = 6;
const WINDOW: u64 = 7;
const NOTIFY: u64 = 8;
const CLIENTS: u64 = 16;

/// What set-up leaves open, and what it found out: the search would leave its memory behind.
#[derive(Default)]
pub(super) struct Handed {
    pub(super) pid: i32,
    /// Empty where the container has no cgroup of its own, or had ended before we looked.
    pub(super) cgroup: Cgroup,
    /// No descriptor is open above this.
    pub(super) highest: i32,
    pub(super) stdin: Option<OwnedFd>,
    /// A terminal's master, or the end of a pipe.
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) attach: Option<OwnedFd>,
    pub(super) control: Option<OwnedFd>,
    pub(super) window: Option<OwnedFd>,
    pub(super) notify: Option<OwnedFd>,
    pub(super) sync: Option<OwnedFd>,
}

impl Handed {
    fn slots(&mut self) -> [&mut Option<OwnedFd>; 8] {
        [
            &mut self.stdin,
            &mut self.stdout,
            &mut self.stderr,
            &mut self.attach,
            &mut self.control,
            &mut self.window,
            &mut self.notify,
            &mut self.sync,
        ]
    }

    /// As words: `pid,highest,fd,fd,..` with nothing in place of a descriptor that there is not, and the cgroup's
    /// directories.
    pub(super) fn encode(mut self) -> Result<[OsString; WORDS], Failure> {
        let mut numbers = vec![self.pid.to_string(), self.highest.to_string()];
        for slot in self.slots() {
            let number = slot.take().map(parent::leave_open).transpose()?;
            numbers.push(number.map(|n| n.to_string()).unwrap_or_default());
        }
        let path = |dir: Option<PathBuf>| dir.unwrap_or_default().into_os_string();
        Ok([numbers.join(",").into(), path(self.cgroup.unified), path(self.cgroup.memory)])
    }

    pub(super) fn decode([numbers, unified, memory]: &[OsString; WORDS]) -> Result<Handed, Error> {
        let wrong = || Error::new("not a call from set-up");
        let mut numbers = numbers.to_str().ok_or_else(wrong)?.split(',');
        let mut number = || numbers.next().and_then(|n| n.parse().ok()).ok_or_else(wrong);
        let (pid, highest) = (number()?, number()?);
        let path = |word: &OsString| Some(PathBuf::from(word)).filter(|path| !path.as_os_str().is_empty());
        let cgroup = Cgroup { unified: path(unified), memory: path(memory), ..Cgroup::default() };
        let mut handed = Handed { pid, highest, cgroup, ..Handed::default() };
        for (slot, number) in handed.slots().into_iter().zip(numbers) {
            if !number.is_empty() {
                let number = number.parse().map_err(|_| wrong())?;
                *slot = Some(take_inherited(number).doing("take a descriptor from set-up")?);
            }
        }
        Ok(handed)
    }
}

/// How many words [`Handed`] is.
pub(super) const WORDS: usize = 3;

pub(super) fn highest_descriptor() -> i32 {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max().unwrap_or(2)
}

pub(super) fn run(options: Options, handed: Handed) -> Result<ExitCode, Error> {
    let mut hold = Hold::new(options, handed)?;
    hold.confine();
    hold.begin();
    while !hold.is_over() {
        hold.turn()?;
    }
    // The container's code, so that a service manager sees it; a failing exit command's instead.
    let code = hold.exit_command_code.filter(|code| *code != 0).or(hold.code).unwrap_or(0);
    Ok(ExitCode::from(code as u8))
}

struct Hold {
    options: Options,
    epoll: Epoll,
    signals: OwnedFd,
    pid: i32,
    pidfd: Option<OwnedFd>,
    cgroup: Cgroup,
    stdin: Option<File>,
    /// Taken from a client and not yet by the container.
    unfed: Vec<u8>,
    /// The input ends when that is done.
    stdin_ends: bool,
    outputs: [Option<Output>; 2],
    pump: Pump,
    listener: Option<OwnedFd>,
    clients: Clients,
    /// Output waits for a client.
    held_back: bool,
    control: Option<Lines>,
    window: Option<Lines>,
    notify: Option<UnixDatagram>,
    sync: Option<OwnedFd>,
    /// Left open for us by the caller, to keep something busy as long as the container runs: published ports.
    foreign: Vec<OwnedFd>,
    /// When the container's time is up.
    timeout: Option<Instant>,
    timed_out: bool,
    /// When to look at a terminal again.
    terminal_again: Option<Instant>,
    /// Of the container, once it has ended.
    code: Option<i32>,
    /// When to run the exit command.
    exit_command_at: Option<Instant>,
    exit_command: Option<i32>,
    exit_command_code: Option<i32>,
    /// Starts the exit command; absent where there is none.
    helper: Option<Helper>,
}

impl Hold {
    fn new(options: Options, handed: Handed) -> Result<Hold, Error> {
        // Every descriptor that came with us and is none of the handed ones.
        let foreign = (3..=handed.highest).filter_map(|number| take_inherited(number).ok()).collect();
        // All descriptors from here on are ours alone.
        let _ = close_range_cloexec(3);
        let _ = set_name(c"conmon");
        let drivers = options.drivers()?;
        let mut log = drivers.file.as_ref().map(|path| Log::open(path, false, limits(&options)));
        if let (Some(log), Ok(most @ 1..)) = (&mut log, u64::try_from(options.log_global_size_max)) {
            // What an earlier monitor wrote counts.
            let (_, size) = log.position();
            log.budget = most.saturating_sub(size);
        }
        let mut pump = Pump::new(log, None)?;
        if drivers.journal {
            pump.journal = Some(Box::new(Journal::new(&Fields {
                id: options.uuid().to_owned(),
                name: options.name.clone(),
                tag: options.log_tag.clone(),
                labels: options.log_labels.clone(),
                mark_partial: !options.no_partial,
            })));
        }
        let output = |fd: Option<OwnedFd>, stream| fd.map(|fd| Output::new(fd.into(), stream, false));
        let timeout = u64::try_from(options.timeout).ok().filter(|seconds| *seconds > 0);
        Ok(Hold {
            epoll: Epoll::on_standard_output().doing("create epoll")?,
            signals: block_signals().doing("block signals")?,
            pid: handed.pid,
            pidfd: pidfd_open(handed.pid).ok(),
            cgroup: handed.cgroup,
            stdin: handed.stdin.map(Into::into),
            unfed: Vec::new(),
            stdin_ends: false,
            outputs: [output(handed.stdout, Stream::Stdout), output(handed.stderr, Stream::Stderr)],
            pump,
            listener: handed.attach,
            clients: Clients::new(CLIENTS),
            held_back: false,
            control: handed.control.map(|fd| Lines::new(fd.into())),
            window: handed.window.map(|fd| Lines::new(fd.into())),
            notify: handed.notify.map(Into::into),
            // A container's caller has had its one answer.
            sync: handed.sync.filter(|_| options.exec),
            foreign,
            timeout: timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
            timed_out: false,
            terminal_again: None,
            code: None,
            exit_command_at: None,
            exit_command: None,
            exit_command_code: None,
            helper: None,
            options,
        })
    }

    /// Gives up what only the exit command needs: podman's unmounts, and takes networks down. Its own process is split off for
    /// it, late, so that the two share most of their memory. Without a helper there is no exit command, and what podman
    /// would do by it is worth more than confinement.
    fn confine(&mut self) {
        let filter = filter();
        if self.options.exit_command.is_some() {
            let options = &self.options;
            let lower = |task: &str, _| {
                (task == EXIT_COMMAND).then_some(())?;
                Some(Program { command: setup::exit_command(options)?, dies_with_monitor: false })
            };
            self.helper = Helper::start(lower).ok();
            if self.helper.is_none() {
                return;
            }
        }
        confine(&filter, LAST_TO_GO);
    }

    fn begin(&mut self) {
        let mut watched = vec![(self.signals.as_fd(), SIGNALS)];
        watched.extend(self.pidfd.as_ref().map(|fd| (fd.as_fd(), CONTAINER)));
        watched.extend(self.listener.as_ref().map(|fd| (fd.as_fd(), LISTENER)));
        watched.extend(self.control.as_ref().map(|lines| (lines.file.as_fd(), CONTROL)));
        watched.extend(self.window.as_ref().map(|lines| (lines.file.as_fd(), WINDOW)));
        watched.extend(self.notify.as_ref().map(|socket| (socket.as_fd(), NOTIFY)));
        for (fd, token) in watched {
            // Fails only for want of kernel memory; the rest still works.
            let _ = self.epoll.add(fd, IN, token);
        }
        self.watch_outputs();
        if self.pidfd.is_none() {
            self.container_ended(HUP);
        }
        // Children that ended before the signal was blocked.
        self.reap();
    }

    fn is_over(&self) -> bool {
        let command_done = self.exit_command_at.is_none() && self.exit_command.is_none();
        self.code.is_some() && command_done && !self.clients.any()
    }

    fn turn(&mut self) -> Result<(), Error> {
        let mut ready = [Ready::default(); BATCH];
        let got = self.epoll.wait(&mut ready, self.wait_for()).doing("wait for events")?;
        if got == 0 && self.pump.warm {
            self.pump.cool();
        }
        // New clients first: they came before the output that is ready with them.
        ready[..got].sort_unstable_by_key(|ready| ready.token);
        for ready in &ready[..got] {
            self.dispatch(*ready);
        }
        self.due();
        Ok(())
    }

    fn wait_for(&self) -> Option<Duration> {
        let due = [self.timeout, self.terminal_again, self.exit_command_at, self.clients.deadline()];
        let due = due.into_iter().flatten().min();
        let due = due.map(|at| at.saturating_duration_since(Instant::now()));
        let warm = self.pump.warm.then_some(WARM);
        [due, warm].into_iter().flatten().min()
    }

    fn due(&mut self) {
        let now = Instant::now();
        let past = |at: &mut Option<Instant>| at.take_if(|at| now >= *at).is_some();
        if past(&mut self.timeout) {
            self.timed_out = true;
            self.kill();
        }
        if past(&mut self.terminal_again) {
            self.watch_outputs();
        }
        if past(&mut self.exit_command_at) {
            self.run_exit_command();
        }
        self.clients.drop_stuck(now);
        self.settle();
    }

    fn dispatch(&mut self, ready: Ready) {
        match ready.token {
            SIGNALS => {
                if let Ok(signal @ (SIGTERM | SIGINT | SIGQUIT)) = read_signal(&self.signals) {
                    self.signal(signal);
                }
                self.reap();
            }
            CONTAINER => self.container_ended(ready.events),
            LISTENER => self.accept(),
            STDIN => self.feed(),
            STDOUT => self.output(0),
            STDERR => self.output(1),
            CONTROL => self.control(),
            WINDOW => self.window(),
            NOTIFY => {
                if let (Some(socket), Some(host)) = (&self.notify, &self.options.notify_socket) {
                    notify::forward(socket, Some(host));
                }
            }
            token => {
                if let Some(index) = self.clients.index(token) {
                    self.client(index, ready.events);
                }
            }
        }
    }

    fn accept(&mut self) {
        if let Some(listener) = &self.listener {
            self.clients.accept(listener, &self.epoll);
        }
    }

    fn signal(&self, signal: i32) {
        if let Some(pidfd) = self.pidfd.as_ref().filter(|_| self.code.is_none()) {
            // It may have just ended.
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }

    /// With what a command has started, which no pid namespace takes along.
    fn kill(&self) {
        if self.options.exec && self.code.is_none() && leads_group(self.pid) {
            let _ = kill(-self.pid, SIGKILL);
        }
        self.signal(SIGKILL);
    }

    fn reap(&mut self) {
        while let Ok(Some(reaped)) = reap(-1) {
            if reaped.pid == self.pid && self.code.is_none() {
                self.ended(Status::decode(reaped.status));
            } else if Some(reaped.pid) == self.exit_command {
                self.exit_command = None;
                let code = exit_numbers(Status::decode(reaped.status)).0;
                if code == CANNOT_EXECUTE {
                    super::say(&self.options, &Error::new("the exit command cannot be executed"));
                }
                self.exit_command_code = Some(code);
            }
        }
    }

    /// Usually a child of ours; systemd may have made it somebody else's.
    fn container_ended(&mut self, events: u32) {
        self.reap();
        if self.code.is_some() {
            return;
        }
        let status = match self.pidfd.as_ref().map(|fd| pidfd_exit_status(fd.as_fd())) {
            Some(Ok(Some(status))) => Status::decode(status),
            Some(Ok(None)) if events & (HUP | ERR) == 0 => {
                // Its parent has still to reap it, which HUP will tell.
                if let Some(pidfd) = &self.pidfd {
                    let _ = self.epoll.modify(pidfd, 0, CONTAINER);
                }
                return;
            }
            _ => None,
        };
        self.ended(status);
    }

    fn ended(&mut self, status: Option<Status>) {
        let code = if self.timed_out { TIMED_OUT } else { exit_numbers(status).0 };
        self.code = Some(code);
        self.timeout = None;
        self.terminal_again = None;
        if let Some(pidfd) = self.pidfd.take() {
            let _ = self.epoll.remove(&pidfd);
        }
        self.accept();
        // What is written by now counts; somebody in the background may hold the streams for ever.
        for output in self.outputs.iter_mut().filter_map(Option::take) {
            let _ = self.epoll.remove(&output.file);
            self.pump.finish(output, |stream, bytes| self.clients.broadcast(stream, bytes));
        }
        self.stdin = None;
        if let Some(log) = self.pump.log.as_ref().filter(|_| !self.options.no_sync_log) {
            log.sync();
        }
        if self.cgroup.oom_killed() {
            self.tell_oom();
        }
        // Before anybody is told: the ports may be wanted at once.
        self.foreign.clear();
        self.clients.close_idle();
        self.listener = None;
        self.tell_end(code);
        let delay = u64::try_from(self.options.exit_delay).unwrap_or(0);
        if self.options.exit_command.is_some() {
            self.exit_command_at = Some(Instant::now() + Duration::from_secs(delay));
        }
    }

    fn tell_oom(&self) {
        let dirs = [self.options.persist_dir.clone(), self.options.bundle()];
        for dir in dirs.into_iter().flatten() {
            // Whoever asks finds no reason then, but still the exit code.
            let _ = File::create(dir.join(OOM_FILE));
        }
    }

    fn tell_end(&mut self, code: i32) {
        let o = &self.options;
        let persistent = o.persist_dir.as_ref().map(|dir| dir.join(EXIT_FILE));
        let shared = o.exit_dir.as_ref().map(|dir| dir.join(&o.cid));
        for file in [persistent, shared].into_iter().flatten() {
            if let Err(e) = write_durably(&file, code.to_string().as_bytes()) {
                super::say(o, &e);
            }
        }
        if let Some(sync) = self.sync.take().filter(|_| o.exec) {
            let message = self.timed_out.then_some(TIMED_OUT_MESSAGE);
            parent::tell(o, &sync, i64::from(code), message);
        }
        // Before the exit command, which may start the container anew.
        if let Some(bundle) = o.bundle() {
            let _ = fs::remove_file(bundle.join(setup::ATTACH));
        }
        if let Some(link) = setup::socket_link(o) {
            let _ = fs::remove_file(link);
        }
    }

    fn run_exit_command(&mut self) {
        // What it starts in the background is not ours to wait for.
        let _ = set_subreaper(false);
        let started = match &self.helper {
            Some(helper) => helper.run(EXIT_COMMAND, [None; 3]),
            None => setup::spawn_exit_command(&self.options),
        };
        match started {
            Ok(pid) => self.exit_command = Some(pid),
            Err(e) => {
                super::say(&self.options, &e);
                self.exit_command_code = Some(1);
            }
        }
    }

    fn output(&mut self, index: usize) {
        let Some(output) = &mut self.outputs[index] else { return };
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        match self.pump.read(output, true, |bytes| self.clients.broadcast(stream, bytes)) {
            Read::Some | Read::Nothing => {}
            Read::End if self.options.terminal && index == 0 => {
                // Nobody has it open now; the container may open it again.
                let _ = self.epoll.remove(&output.file);
                self.terminal_again = Some(Instant::now() + TERMINAL_AGAIN);
            }
            Read::End => {
                if let Some(output) = self.outputs[index].take() {
                    let _ = self.epoll.remove(&output.file);
                    self.pump.end(output);
                }
            }
        }
    }

    /// Fails for what is watched already.
    fn watch_outputs(&self) {
        for (output, token) in self.outputs.iter().zip([STDOUT, STDERR]) {
            if let Some(output) = output {
                let _ = self.epoll.add(&output.file, IN, token);
            }
        }
    }

    /// Output stops while a client is behind, and input while the container is.
    fn settle(&mut self) {
        let behind = self.clients.behind();
        if behind && !self.held_back {
            for output in self.outputs.iter().flatten() {
                let _ = self.epoll.remove(&output.file);
            }
        } else if !behind && self.held_back {
            self.watch_outputs();
        }
        self.held_back = behind;
        if self.code.is_some() {
            self.clients.close_idle();
        }
        self.clients.watch(&self.epoll, !self.unfed.is_empty());
    }

    /// Not inlined: its message buffer would become part of the frame that sleeps.
    #[inline(never)]
    fn client(&mut self, index: usize, events: u32) {
        if events & OUT != 0 {
            self.clients.writable(index);
        }
        if events & (IN | HUP | ERR) == 0 {
            return;
        }
        let gone = events & (HUP | ERR) != 0;
        let mut message = [0; INPUT];
        self.pump.warm = true;
        while let Some(fd) = self.clients.fd(index) {
            let got = match seqpacket::receive(fd, &mut message) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => 0,
                Ok(received) => received.len,
            };
            if got == 0 {
                self.clients.fed(index);
                self.end_input();
                break;
            }
            self.take_input(&message[..got]);
            // Of one that is gone everything is taken at once: it would wake us again and again.
            if !self.unfed.is_empty() && !gone {
                break;
            }
        }
        if gone {
            self.clients.close(index);
        }
    }

    fn input(&self) -> Option<&File> {
        match self.options.terminal {
            true => self.outputs[0].as_ref().map(|output| &output.file),
            false => self.stdin.as_ref(),
        }
    }

    fn take_input(&mut self, bytes: &[u8]) {
        let Some(mut input) = self.input() else { return };
        let written = match self.unfed.is_empty() {
            true => written(input.write(bytes), bytes.len()),
            false => 0,
        };
        if written == bytes.len() {
            return;
        }
        if self.unfed.is_empty() {
            // A terminal is watched for output under its own token, which cannot be told apart; a copy can.
            let copy = if self.options.terminal { input.try_clone().ok() } else { None };
            let watched = copy.as_ref().or(self.stdin.as_ref());
            if watched.is_none_or(|file| self.epoll.add(file, OUT, STDIN).is_err()) {
                return;
            }
            if copy.is_some() {
                self.stdin = copy;
            }
        }
        self.unfed.extend_from_slice(&bytes[written..]);
    }

    /// The input has room.
    fn feed(&mut self) {
        let Some(mut input) = self.stdin.as_ref() else { return };
        let done = written(input.write(&self.unfed), self.unfed.len());
        self.unfed.drain(..done);
        if self.unfed.is_empty() {
            let _ = self.epoll.remove(input);
            self.unfed = Vec::new();
            if self.options.terminal || self.stdin_ends {
                self.stdin = None;
            }
        }
    }

    /// A client has no more input: neither has the container, unless it was to be left open.
    fn end_input(&mut self) {
        if self.options.stdin && !self.options.leave_stdin_open && !self.options.terminal {
            self.stdin_ends = true;
            if self.unfed.is_empty() {
                self.stdin = None;
            }
        }
    }

    fn control(&mut self) {
        let mut messages = Vec::new();
        if let Some(lines) = &mut self.control {
            lines.read(|line| messages.extend(Message::of_control(line)));
        }
        messages.into_iter().for_each(|message| self.obey(message));
    }

    fn window(&mut self) {
        let mut messages = Vec::new();
        if let Some(lines) = &mut self.window {
            lines.read(|line| messages.extend(Message::of_window(line)));
        }
        messages.into_iter().for_each(|message| self.obey(message));
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Resize { rows, columns } => {
                if let Some(terminal) = self.outputs[0].as_ref().filter(|_| self.options.terminal) {
                    let _ = tty::set_size(&terminal.file, tty::Size { rows, columns });
                }
            }
            Message::ReopenLogs => {
                if let Some(log) = &mut self.pump.log {
                    let done = if self.options.log_rotate { log.rotate_now() } else { log.reopen() };
                    if let Err(e) = done {
                        super::say(&self.options, &e);
                    }
                }
            }
        }
    }
}

/// What is no longer read is dropped, as a closed pipe would.
fn written(result: io::Result<usize>, all: usize) -> usize {
    match result {
        Ok(written) => written,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
        Err(_) => all,
    }
}

/// Without `--log-rotate` there is one file, which begins anew when it is full.
fn limits(options: &Options) -> Limits {
    let bytes = u64::try_from(options.log_size_max).ok().filter(|bytes| *bytes > 0);
    let backups = if options.log_rotate { u32::try_from(options.log_max_files).unwrap_or(0) } else { 0 };
    Limits { bytes: bytes.unwrap_or(u64::MAX), files: backups + 1, age: None, total: None, compress: false }
}
