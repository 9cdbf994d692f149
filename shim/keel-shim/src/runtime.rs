//! Calling the OCI runtime: any program with runc's command line.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use keel_proto::json;
use keel_sys::epoll::{BATCH, Epoll, IN, Ready};
use keel_sys::monitor::die_with_parent;
use keel_sys::process::pidfd_open;

use crate::args::Options;
use crate::error::{Context, Error};

/// Creating a container takes tens of milliseconds; hooks, cold disks and a loaded host can make it minutes.
pub(crate) const CREATE_TIMEOUT: Duration = Duration::from_secs(240);
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const DELETE_TIMEOUT: Duration = Duration::from_secs(30);
/// Of a runtime's error text; the report is one line.
const MAX_MESSAGE: usize = 2000;

pub(crate) struct Runtime<'a> {
    options: &'a Options,
    /// Of the files for the runtime's messages.
    name: &'a str,
}

impl<'a> Runtime<'a> {
    pub(crate) fn new(options: &'a Options) -> Runtime<'a> {
        Runtime { options, name: "runtime" }
    }

    /// For one of several calls at a time.
    pub(crate) fn named(options: &'a Options, name: &'a str) -> Runtime<'a> {
        Runtime { options, name }
    }

    /// `RUNTIME --root R --log F --log-format json ARGS.. VERB`. The kernel kills it should the shim die: a half-made
    /// container is cleaned up by whoever finds it, a runtime that runs on beside that would race with it.
    pub(crate) fn command(&self, verb: &str) -> Command {
        let mut command = self.bare(verb);
        die_with_parent(&mut command);
        command
    }

    /// The same without the kill.
    pub(crate) fn bare(&self, verb: &str) -> Command {
        self.complete(Command::new(&self.options.runtime), verb)
    }

    /// The same, called by a process that is given words before it.
    pub(crate) fn command_through(&self, program: &str, words: &[OsString], verb: &str) -> Command {
        let mut command = Command::new(program);
        command.args(words).arg(&self.options.runtime);
        let mut command = self.complete(command, verb);
        die_with_parent(&mut command);
        command
    }

    fn complete(&self, mut command: Command, verb: &str) -> Command {
        if let Some(root) = &self.options.runtime_root {
            command.arg("--root").arg(root);
        }
        command.arg("--log").arg(self.log()).args(["--log-format", "json"]);
        command.args(&self.options.runtime_args).arg(verb);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    pub(crate) fn start(&self) -> Result<(), Error> {
        let mut command = self.command("start");
        command.arg(&self.options.id).stderr(self.error_output()?);
        let child = self.spawn("start", &mut command)?;
        let done = self.wait("start", child, Instant::now() + START_TIMEOUT, |_| Ok(()));
        done.map_err(|e| self.explain(e, None))
    }

    /// What this leaves behind is for the caller's caller; there is nobody here to tell.
    pub(crate) fn delete_forced(&self) {
        let mut command = self.command("delete");
        command.arg("--force").arg(&self.options.id);
        if let Ok(child) = self.spawn("delete", &mut command) {
            let _ = self.wait("delete", child, Instant::now() + DELETE_TIMEOUT, |_| Ok(()));
        }
        self.forget_output();
    }

    pub(crate) fn spawn(&self, verb: &str, command: &mut Command) -> Result<Child, Error> {
        command.spawn().doing(&format!("run {} {verb}", self.options.runtime.display()))
    }

    /// Waits for success. While it runs, `meanwhile` is called each time `also` has something to read.
    pub(crate) fn wait_also(
        &self,
        verb: &str,
        child: Child,
        deadline: Instant,
        also: Option<&OwnedFd>,
        meanwhile: impl FnMut(&Epoll) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match await_end(child, deadline, also, meanwhile)? {
            None => Err(Error::new(format!("runtime {verb} did not finish in time and was killed"))),
            Some(status) if !status.success() => {
                Err(Error::new(format!("runtime {verb} failed with {status}")))
            }
            Some(_) => Ok(()),
        }
    }

    fn wait(
        &self,
        verb: &str,
        child: Child,
        deadline: Instant,
        meanwhile: impl FnMut(&Epoll) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.wait_also(verb, child, deadline, None, meanwhile)
    }

    fn log(&self) -> PathBuf {
        self.options.dir.join(format!("{}.log", self.name))
    }

    fn stderr(&self) -> PathBuf {
        self.options.dir.join(format!("{}.err", self.name))
    }

    /// A file for what the runtime says where its stderr is not the container's.
    pub(crate) fn error_output(&self) -> Result<File, Error> {
        let path = self.stderr();
        File::create(&path).at("create", &path)
    }

    pub(crate) fn forget_output(&self) {
        let _ = fs::remove_file(self.log());
        let _ = fs::remove_file(self.stderr());
    }

    /// Adds the runtime's own words: from its log, else from its stderr.
    pub(crate) fn explain(&self, error: Error, container_stderr: Option<&mut File>) -> Error {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let said = logged_error(&log)
            .or_else(|| some_text(&fs::read_to_string(self.stderr()).unwrap_or_default()))
            .or_else(|| read_now(container_stderr?))
            .or_else(|| some_text(&log));
        match said {
            Some(said) => Error::new(format!("{error}: {said}")),
            None => error,
        }
    }
}

/// How a runtime's call ended; `None` if it had to be killed at the deadline.
pub(crate) fn await_end(
    mut child: Child,
    deadline: Instant,
    also: Option<&OwnedFd>,
    mut meanwhile: impl FnMut(&Epoll) -> Result<(), Error>,
) -> Result<Option<ExitStatus>, Error> {
    const CHILD: u64 = 0;
    const ALSO: u64 = 1;
    let pid = i32::try_from(child.id()).unwrap_or(0);
    let pidfd = pidfd_open(pid).doing("open pidfd of the runtime")?;
    let epoll = Epoll::new().doing("create epoll")?;
    epoll.add(&pidfd, IN, CHILD).doing("watch the runtime")?;
    if let Some(also) = also {
        epoll.add(also, IN, ALSO).doing("watch the console socket")?;
    }
    let mut ready = [Ready::default(); BATCH];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let got = epoll.wait(&mut ready, Some(left)).doing("wait for the runtime")?;
        if ready[..got].iter().any(|r| r.token != CHILD) {
            meanwhile(&epoll)?;
        }
        if ready[..got].iter().any(|r| r.token == CHILD) {
            return child.wait().map(Some).doing("wait for the runtime");
        }
        if got == 0 && Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Ok(None);
        }
    }
}

pub(crate) fn read_now(file: &mut File) -> Option<String> {
    let mut bytes = Vec::new();
    // A FIFO that somebody still holds ends with WouldBlock; what was read before that counts.
    let _ = file.take(MAX_MESSAGE as u64 * 4).read_to_end(&mut bytes);
    some_text(&String::from_utf8_lossy(&bytes))
}

fn some_text(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.chars().take(MAX_MESSAGE).collect())
}

/// The last error of a JSON log.
fn logged_error(log: &str) -> Option<String> {
    log.lines().rev().find_map(|line| {
        let mut message = None;
        let mut grave = false;
        json::members(line, |key, value| match (key, value) {
            ("level", json::Value::Text(level)) => grave = level == "error" || level == "fatal",
            ("msg", json::Value::Text(text)) => message = Some(text),
            _ => {}
        })?;
        message.filter(|_| grave).and_then(|m| some_text(&m))
    })
}

/// Reads the pid file that the runtime's `create` wrote.
pub(crate) fn read_pid(path: &Path) -> Result<i32, Error> {
    let text = fs::read_to_string(path).at("read", path)?;
    match text.trim().parse() {
        Ok(pid) if pid > 1 => Ok(pid),
        _ => Err(Error::new(format!("runtime wrote {text:?} as pid"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_json_log_is_told() {
        let log = "{\"level\":\"error\",\"msg\":\"first\"}\n{\"level\":\"error\",\"msg\":\"no \\\"x\\\"\\n\",\"time\":\"t\"}\n\
                   {\"level\":\"warning\",\"msg\":\"later\"}\nnot json\n";
        assert_eq!(logged_error(log), Some("no \"x\"".into()));
        assert_eq!(logged_error("plain text"), None);
    }
}
