//! Who restarts the container when it has ended.
//!
//! Whoever holds the lock does: the daemon, or a command. The shim decides nothing that they decide; it is who stays
//! awake. It outlives its container, asleep, until it hears that its run has been followed by another, was removed, or
//! was the last (`Dismiss`). Should the holder of the lock die first, the shim runs the command that it was given, which
//! takes the lock, counts the end, looks at the back-off with the same code as the daemon, and starts the next run under
//! the next number, with its own log, exit record, writable layer, and shim. A daemon that comes later finds runs like
//! any others, and a deadline like any other.
//!
//! ```text
//!  lock held ──> sleep until its holder has ended ──┐
//!      ^                                            v
//!      └────────────── look <── wait, failure ── command ──> done: the shim goes
//! ```
//! Restarting in the shim itself, by the same bundle, was the other way: it would need the numbers, the mounts of a fresh
//! writable layer and the back-off here, a second time, in a program that is to be small.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use keel_proto::Phase;
use keel_sys::epoll::IN;
use keel_sys::file::{pipe, read, set_nonblocking};
use keel_sys::process::{kill, pidfd_open};

use crate::args::Restart;
use crate::error::Context;
use crate::helper::Task;
use crate::machine::Event;

use super::{Hold, OWNER, SIGKILL, exit_numbers};

/// Somebody who has just taken the lock has not written their number yet.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A start takes tens of milliseconds; on a loaded host, with hooks, minutes.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);
/// After a command that failed; doubling up to the longest back-off there is.
const FIRST_RETRY: Duration = Duration::from_secs(10);
const LAST_RETRY: Duration = Duration::from_secs(300);
/// After a stop that was asked for, say for a newer image, the next run comes soon and wants the sockets; if none does,
/// clients must not be left waiting in their queues.
const SUCCESSOR: Duration = Duration::from_secs(60);
/// Longer is no answer.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
const MAX_ANSWER: usize = 256;

#[derive(Default)]
pub(super) struct State {
    /// The end was asked for.
    pub(super) stopped: bool,
    /// Somebody else sees to what follows.
    dismissed: bool,
    /// The sockets were kept for as long as a successor may take.
    kept: bool,
    /// Holds the lock.
    owner: Option<OwnedFd>,
    command: Option<Child>,
    retry: Duration,
}

struct Child {
    pid: i32,
    answer: OwnedFd,
}

impl State {
    pub(super) fn is_child(&self, pid: i32) -> bool {
        self.command.as_ref().is_some_and(|child| child.pid == pid)
    }
}

enum Owner {
    Nobody,
    Process(OwnedFd),
    /// Somebody who cannot be awaited.
    Unclear,
    /// There is no such instance any more.
    Removed,
}

impl Hold {
    pub(super) fn look_who_restarts(&mut self) {
        if let Some(child) = &self.restart.command {
            // It had its time. Its end comes as that of any child.
            let _ = kill(child.pid, SIGKILL);
            return self.arm(LOOK_AGAIN);
        }
        if self.restart.stopped && !self.restart.dismissed && !self.restart.kept && !self.sockets.is_empty() {
            self.restart.kept = true;
            return self.arm(SUCCESSOR);
        }
        let lock = self.memory.options.restart_lock.as_deref().filter(|_| self.restart_wanted());
        match lock.map_or(Owner::Removed, owner_of) {
            Owner::Nobody => self.run_restart_command(),
            Owner::Unclear => self.arm(LOOK_AGAIN),
            Owner::Removed => self.event(Event::Released),
            Owner::Process(pidfd) => match self.epoll.add(&pidfd, IN, OWNER) {
                Ok(()) => self.restart.owner = Some(pidfd),
                Err(_) => self.arm(LOOK_AGAIN),
            },
        }
    }

    fn restart_wanted(&self) -> bool {
        let (code, _, _) = exit_numbers(self.ended.and_then(|ended| ended.status));
        let wanted = match self.memory.options.restart {
            Some(Restart::Always) => true,
            Some(Restart::OnFailure) => code != 0,
            None => false,
        };
        wanted && !self.restart.stopped && !self.restart.dismissed
    }

    pub(super) fn owner_gone(&mut self) {
        if let Some(owner) = self.restart.owner.take() {
            let _ = self.epoll.remove(&owner);
        }
        self.event(Event::OwnerGone);
    }

    pub(super) fn dismiss(&mut self) {
        self.restart.dismissed = true;
        // A command that runs is left to end by itself.
        if self.phase == Phase::Resting {
            self.event(Event::Released);
        }
    }

    fn run_restart_command(&mut self) {
        let started = pipe().doing("create a pipe").and_then(|(answer, theirs)| {
            let pid = self.start(Task::Restart, [None, Some(theirs.as_fd()), None])?;
            Ok(Child { pid, answer })
        });
        match started {
            Ok(child) => {
                self.restart.command = Some(child);
                self.arm(COMMAND_TIMEOUT);
            }
            Err(_) => self.retry_restart(),
        }
    }

    pub(super) fn restart_answered(&mut self) {
        let answer =
            self.restart.command.take().and_then(|child| read_answer(&child).ok()).unwrap_or_default();
        match answer.split_once(' ') {
            None if answer == "done" => self.event(Event::Released),
            Some(("wait", ms)) if ms.parse::<u64>().is_ok() => {
                self.restart.retry = Duration::ZERO;
                let wait = Duration::from_millis(ms.parse().unwrap_or(0));
                self.arm(wait.min(LONGEST_WAIT));
            }
            _ => self.retry_restart(),
        }
        self.pump.warm = true;
    }

    fn retry_restart(&mut self) {
        self.restart.retry = (self.restart.retry * 2).clamp(FIRST_RETRY, LAST_RETRY);
        self.arm(self.restart.retry);
    }
}

/// Its first line. What it started may hold the pipe open, and is not waited for.
fn read_answer(child: &Child) -> io::Result<String> {
    set_nonblocking(&child.answer, true)?;
    let mut answer = [0; MAX_ANSWER];
    let got = read(&child.answer, &mut answer)?;
    let text = String::from_utf8_lossy(&answer[..got]);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn owner_of(lock: &Path) -> Owner {
    let file = match File::open(lock) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Owner::Removed,
        Err(_) => return Owner::Unclear,
    };
    match file.try_lock() {
        // Given back at once: the command takes it.
        Ok(()) => return Owner::Nobody,
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(_)) => return Owner::Unclear,
    }
    let read = || fs::read_to_string(lock).ok()?.trim().parse::<i32>().ok();
    let Some(pid) = read() else { return Owner::Unclear };
    match pidfd_open(pid) {
        // Still the holder after the descriptor was opened, so it is that process.
        Ok(pidfd) if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && read() == Some(pid) => {
            Owner::Process(pidfd)
        }
        _ => Owner::Unclear,
    }
}
