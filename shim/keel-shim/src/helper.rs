//! The part of the monitor that may start programs with the rights of whoever started it.
//!
//! The hold phase reads what a container writes and what clients say, and gives up what it does not need for that (see
//! `confine`). no_new_privs and a filter would be inherited by all that it starts, down to the commands that run in the
//! container, whose set-user-ID programs must work. So a second process, split off before, starts programs on its word: it
//! has all the rights, sees no output and no client, and knows a few tasks, whose programs and arguments it makes itself
//! from what set-up left. What it starts is a child of the monitor. There is no way without it: neither is ever given back,
//! a thread would share its memory with what it is to be safe from, and a process gets no parent but its maker or its maker's.
//!
//! ```text
//!  hold: no_new_privs, filter ── task, three streams ──> helper: asleep, shares its memory with hold, one descriptor
//!        reaps it            <────────── pid ──────────    └─ clone(CLONE_PARENT), execve
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, parent_id};
use std::process::Command;
use std::time::Duration;

use keel_sys::monitor::{null_stream, shed_memory, spawn_helper, spawn_sibling};
use keel_sys::process::{set_name, set_parent_death_signal};
use keel_sys::seqpacket;

use crate::args::Options;
use crate::error::{Context, Error};
use crate::runtime::Runtime;

const SIGKILL: i32 = 9;
const MAX_TASK: usize = 512;
/// The helper answers as soon as it has made a process.
const PATIENCE: Duration = Duration::from_secs(10);
/// As of a shell whose command cannot be executed.
pub(crate) const CANNOT_EXECUTE: i32 = 126;

/// What a task is lowered to.
pub(crate) struct Program {
    pub(crate) command: Command,
    /// A runtime that runs on beside whoever cleans up after the monitor would race with them.
    pub(crate) dies_with_monitor: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task<'a> {
    /// The runtime's `exec` with the files of this session.
    Exec { name: &'a str, console: Option<&'a str> },
    /// The runtime's `delete --force`.
    Delete,
    /// The command that restarts the container.
    Restart,
}

impl<'a> Task<'a> {
    pub(crate) fn encode(self) -> String {
        match self {
            Task::Exec { name, console } => format!("exec\n{name}\n{}", console.unwrap_or_default()),
            Task::Delete => "delete".to_owned(),
            Task::Restart => "restart".to_owned(),
        }
    }

    /// `parent`: the monitor, the only one whose descriptors a console may be reached by.
    fn decode(text: &'a str, parent: u32) -> Option<Task<'a>> {
        let mut lines = text.split('\n');
        let task = match lines.next()? {
            "delete" => Task::Delete,
            "restart" => Task::Restart,
            "exec" => {
                let name = lines.next()?;
                let number = name.strip_prefix("exec-").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
                let console = Some(lines.next()?).filter(|console| !console.is_empty());
                let within = |c: &str| c.starts_with(&format!("/proc/{parent}/fd/")) && !c.contains("..");
                let sound = number.is_some_and(|n| !n.is_empty()) && console.is_none_or(within);
                sound.then_some(Task::Exec { name, console })?
            }
            _ => return None,
        };
        lines.next().is_none().then_some(task)
    }

    fn command(self, options: &Options) -> Option<Command> {
        let runtime = Runtime::new(options);
        Some(match self {
            Task::Exec { name, console } => {
                let runtime = Runtime::named(options, name);
                let mut command = runtime.bare("exec");
                command.arg("--detach").arg("--process").arg(options.dir.join(format!("{name}.json")));
                command.arg("--pid-file").arg(options.dir.join(format!("{name}.pid")));
                if let Some(console) = console {
                    command.arg("--tty").arg("--console-socket").arg(console);
                }
                command.arg(&options.id);
                command
            }
            Task::Delete => {
                let mut command = runtime.bare("delete");
                command.arg("--force").arg(&options.id);
                command
            }
            Task::Restart => {
                let (program, arguments) = options.restart_command.split_first()?;
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
        })
    }

    /// What restarts a container is on its own.
    fn dies_with_monitor(self) -> bool {
        self != Task::Restart
    }

    /// In the new process: `text` is the monitor's word.
    pub(crate) fn lower(text: &str, options: &Options, monitor: u32) -> Option<Program> {
        let task = Task::decode(text, monitor)?;
        Some(Program { command: task.command(options)?, dies_with_monitor: task.dies_with_monitor() })
    }
}

/// The monitor's end.
pub(crate) struct Helper {
    socket: OwnedFd,
}

impl Helper {
    /// Before rights are given up. `lower` makes programs of the monitor's words.
    pub(crate) fn start(lower: impl Fn(&str, u32) -> Option<Program>) -> Result<Helper, Error> {
        let (socket, theirs) = seqpacket::pair().doing("create a pair of sockets")?;
        spawn_helper(theirs, |socket| serve(socket, &lower)).doing("split off the helper")?;
        seqpacket::set_receive_timeout(&socket, Some(PATIENCE)).doing("set up the helper's socket")?;
        Ok(Helper { socket })
    }

    /// Of a monitor that was another program before.
    pub(crate) fn inherited(socket: OwnedFd) -> Helper {
        Helper { socket }
    }

    pub(crate) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the child's number. A stream that is not given is `/dev/null`.
    pub(crate) fn run(&self, task: &str, streams: [Option<BorrowedFd<'_>>; 3]) -> Result<i32, Error> {
        let ask = || {
            let fds = streams.map(|stream| stream.unwrap_or(null_stream()));
            seqpacket::send_fds(self.socket(), task.as_bytes(), &[], &fds)?;
            let mut text = [0; ANSWER];
            let got = seqpacket::receive(self.socket(), &mut text)?;
            match decode_answer(&text[..got.len.min(ANSWER)]) {
                Some(pid @ 1..) => Ok(pid),
                Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                None => Err(io::ErrorKind::InvalidData.into()),
            }
        };
        ask().doing("have the helper start a program")
    }
}

/// A number and its complement: the socket is the helper's standard error too, and what a library may say there in its last
/// moment is not to be taken for the number of a process.
const ANSWER: usize = 8;

fn encode_answer(number: i32) -> [u8; ANSWER] {
    let both = u64::from(number.cast_unsigned()) | u64::from(!number.cast_unsigned()) << 32;
    both.to_le_bytes()
}

fn decode_answer(text: &[u8]) -> Option<i32> {
    let number = i32::from_le_bytes(text.first_chunk().copied()?);
    (text == encode_answer(number)).then_some(number)
}

fn serve(socket: BorrowedFd<'_>, lower: &impl Fn(&str, u32) -> Option<Program>) -> i32 {
    const INVALID: i32 = -22;
    let monitor = parent_id();
    let _ = set_name(c"keel-helper");
    if set_parent_death_signal(SIGKILL).is_err() {
        return 1;
    }
    loop {
        shed_memory();
        let mut text = [0; MAX_TASK];
        let (len, fds) = match seqpacket::receive(socket, &mut text) {
            Ok(received) if received.len > 0 => (received.len, received.fds),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            // The monitor has gone.
            _ => return 0,
        };
        let answer = match (std::str::from_utf8(&text[..len]), <[OwnedFd; 3]>::try_from(fds)) {
            (Ok(text), Ok(streams)) => spawn_sibling(|| execute(lower(text, monitor), streams, monitor))
                .unwrap_or_else(|e| e.raw_os_error().unwrap_or(-INVALID).saturating_neg()),
            _ => INVALID,
        };
        if seqpacket::send(socket, &encode_answer(answer), &[]).is_err() {
            return 0;
        }
    }
}

/// The new process. Returns only if it cannot become the program.
fn execute(program: Option<Program>, streams: [OwnedFd; 3], monitor: u32) -> i32 {
    let Some(Program { mut command, dies_with_monitor }) = program else { return CANNOT_EXECUTE };
    if dies_with_monitor && (set_parent_death_signal(SIGKILL).is_err() || parent_id() != monitor) {
        return CANNOT_EXECUTE;
    }
    let [stdin, stdout, stderr] = streams;
    let Ok(said) = stderr.try_clone() else { return CANNOT_EXECUTE };
    let error = command.stdin(stdin).stdout(stdout).stderr(stderr).exec();
    let text = format!("run {}: {error}\n", command.get_program().display());
    let _ = keel_sys::file::write(&said, text.as_bytes());
    CANNOT_EXECUTE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_answers_are_numbers_and_no_text_is() {
        for number in [1, 4_194_304, -22, i32::MAX] {
            assert_eq!(decode_answer(&encode_answer(number)), Some(number));
        }
        let main = i32::from_le_bytes(*b"main");
        for text in [&b""[..], b"main", b"panicked", &encode_answer(main)[..7], b"mainmain"] {
            assert_eq!(decode_answer(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_whole_tasks_within_the_monitors_own_files_are_understood() {
        let exec = |name, console| Task::Exec { name, console };
        for task in [
            exec("exec-0", None),
            exec("exec-17", Some("/proc/7/fd/9/exec-17.sock")),
            Task::Delete,
            Task::Restart,
        ] {
            assert_eq!(Task::decode(&task.encode(), 7), Some(task));
        }
        for bad in [
            "",
            "exec",
            "exec\nexec-1",
            "exec\nexec-\n",
            "exec\n../x\n",
            "exec\nexec-1/../x\n",
            "exec\nexec-1\n/etc/x",
            "exec\nexec-1\n/proc/8/fd/1/x",
            "exec\nexec-1\n/proc/7/fd/1/../../x",
            "delete\nall",
            "run",
        ] {
            assert_eq!(Task::decode(bad, 7), None, "{bad}");
        }
    }
}
