//! The hold phase: waits for output, for clients and for the end. What an idle container costs is here.

mod end;
mod input;
mod output;
mod requests;
mod restart;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keel_proto::{Phase, Stream, file};
use keel_sys::epoll::{BATCH, ERR, Epoll, HUP, IN, Ready};
use keel_sys::monitor::{
    Reaped, Status, move_to_standard, pidfd_exit_status, reap, take_inherited, take_standard,
};
use keel_sys::process::{block_signals, pidfd_send_signal, read_signal, set_name};

use crate::args::{Inherited, Options};
use crate::clients::Clients;
use crate::confine::{confine, filter};
use crate::error::{Context, Error};
use crate::helper::{Helper, Task};
use crate::machine::{Effect, Event, step};
use crate::memory::Memory;
use crate::notify;
use crate::pump::{Output, Pump};
use crate::replay;
use crate::runtime::DELETE_TIMEOUT;
use crate::sessions::Sessions;
use crate::setup;

/// How long the buffers of a burst are kept. Giving pages back costs less than a millisecond.
const WARM: Duration = Duration::from_millis(200);
/// Output that comes later than this after the end is from somebody who is not the container.
const DRAIN: Duration = Duration::from_secs(2);
/// Between kills of a cgroup whose processes do not go, for instance because a disk does not answer.
const KILL_AGAIN: Duration = Duration::from_secs(1);
/// Between tries to write the exit record.
const WRITE_AGAIN: Duration = Duration::from_secs(1);
/// For the status of a container whose parent is somebody else, who has to reap it first.
const REAPED_BY_OTHERS: Duration = Duration::from_secs(10);
const SIGKILL: i32 = 9;
/// Almost the last that the kernel kills for want of memory: a container outlives its monitor, but unwatched.
const OOM_SCORE_ADJ: &str = "-999";
/// The helper's socket has the number of standard error, the epoll set that of standard output: of descriptors there are to be
/// few. What a library says there is no task, or refused.
const HELPER: i32 = 2;

const SIGNALS: u64 = 0;
const CONTAINER: u64 = 1;
const LISTENER: u64 = 2;
const STDIN: u64 = 3;
const STDOUT: u64 = 4;
const STDERR: u64 = 5;
const OWNER: u64 = 6;
const NOTIFY: u64 = 7;
const WRITER: u64 = 8;
const CLIENTS: u64 = 16;
const SESSIONS: u64 = 64;

pub(crate) fn run(inherited: &Inherited) -> Result<ExitCode, Error> {
    let mut hold = Hold::new(inherited)?;
    // Late, so that the two share most of their memory. Without a helper, what it does is refused; the rest works.
    let filter = filter();
    hold.helper = match inherited.helper {
        true => take_standard(HELPER).ok().map(Helper::inherited),
        false => start_helper(&hold.memory.options),
    };
    confine(&filter, OOM_SCORE_ADJ);
    drop(filter);
    hold.begin();
    while hold.phase != Phase::Gone {
        hold.turn()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn start_helper(options: &Options) -> Option<Helper> {
    let helper = Helper::start(|text, monitor| Task::lower(text, options, monitor)).ok()?;
    move_to_standard(helper.into_socket(), HELPER).ok().map(Helper::inherited)
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
    /// Nobody in the container has the terminal open.
    terminal_left: bool,
    pump: Pump,
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
    restart: restart::State,
    /// Takes the container's word that it is ready.
    notify: Option<UnixDatagram>,
    /// Held for the next run; `memory.held` says what they are.
    sockets: Vec<OwnedFd>,
    helper: Option<Helper>,
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
        let notify = take(inherited.notify)?;
        let sockets = inherited.sockets.iter().map(|fd| take_inherited(*fd)).collect::<Result<_, _>>();
        let sockets = sockets.doing("take inherited descriptor")?;
        let _ = set_name(c"keel-shim");
        let memory = Memory::load(&inherited.dir)?;
        let o = &memory.options;
        let mut pump = Pump::of(o, memory.lost)?;
        let within = match &o.log.file {
            Some(log) if memory.resumed => replay::within_lines(log, &mut pump.output),
            _ => [false; 2],
        };
        let output =
            |fd: Option<OwnedFd>, stream, in_line| fd.map(|fd| Output::new(fd.into(), stream, in_line));
        Ok(Hold {
            epoll: Epoll::on_standard_output().doing("create epoll")?,
            signals: block_signals().doing("block signals")?,
            pidfd,
            listener,
            stdin: stdin.map(|fd| Stdin { file: fd.into(), pending: Vec::new() }),
            outputs: [output(stdout, Stream::Stdout, within[0]), output(stderr, Stream::Stderr, within[1])],
            terminal_left: false,
            pump,
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
            restart: restart::State::default(),
            notify: notify.map(Into::into),
            sockets,
            helper: None,
            memory,
        })
    }

    fn begin(&mut self) {
        let mut watched = vec![(self.signals.as_fd(), IN, SIGNALS)];
        if let Some(listener) = &self.listener {
            watched.push((listener.as_fd(), IN, LISTENER));
        }
        if let Some(notify) = &self.notify {
            watched.push((notify.as_fd(), IN, NOTIFY));
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
        if got == 0 && self.pump.warm {
            self.pump.cool();
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
        let warm = self.pump.warm.then_some(WARM);
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
            OWNER => self.owner_gone(),
            NOTIFY => self.notified(),
            WRITER => self.writer_has_room(),
            STDIN => self.feed_stdin(),
            STDOUT => self.pump(0),
            STDERR => self.pump(1),
            token if self.sessions.owns(token) => {
                self.pump.warm = true;
                self.sessions.ready(token, &mut self.pump.input, &self.epoll, &mut self.clients);
            }
            token => {
                if let Some(index) = self.clients.index(token) {
                    self.client(index, ready.events);
                }
            }
        }
    }

    /// Has a program started that needs more rights than this phase has.
    fn start(&self, task: Task<'_>, streams: [Option<BorrowedFd<'_>>; 3]) -> Result<i32, Error> {
        let helper = self.helper.as_ref().ok_or_else(|| Error::new("the monitor has no helper"))?;
        helper.run(&task.encode(), streams)
    }

    fn notified(&mut self) {
        let Some(notify) = &self.notify else { return };
        self.pump.warm = true;
        if notify::forward(notify, self.memory.options.notify_to.as_ref()) {
            // Who waits for it looks again and again; without it the container is not ready, which is safe.
            let _ = std::fs::write(self.memory.options.dir.join(file::READY), "");
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
            Effect::LookWhoRestarts => self.look_who_restarts(),
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
            } else if self.restart.is_child(reaped.pid) {
                self.restart_answered();
            } else if !self.pump.reaped(&reaped) {
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
}
