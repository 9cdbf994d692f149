//! The shim's program: a new one for each start, and one for each container whose shim was killed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use keel_manifest::model::RestartPolicy;
use keel_plan::ContainerId;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::HostConfig;
use crate::error::HostError;
use crate::kept::Kept;
use crate::observe::Orphan;
use crate::paths::Paths;
use crate::records::runtime_of;

/// A runtime that has not started a container by then will not.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Bytes of a shim's one-line answer that are read.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
/// Time between two tries to adopt a container.
const ADOPT_AGAIN: Duration = Duration::from_secs(10);
/// An adoption takes milliseconds; one that hangs must not hold up the others.
const ADOPT_WORKERS: usize = 4;

pub(crate) struct Shims {
    paths: Paths,
    config: HostConfig,
    pub(crate) kept: Kept,
    adoptions: Mutex<Adoptions>,
    /// An adoption has ended.
    ended: Condvar,
    hint: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct Adoptions {
    waiting: VecDeque<Orphan>,
    /// Waiting ones too.
    under_way: BTreeSet<ContainerId>,
    /// Could not be adopted, and when that was tried last: the host is read after every action.
    refused: BTreeMap<ContainerId, Instant>,
    workers: usize,
}

impl Shims {
    pub(crate) fn new(paths: Paths, config: HostConfig) -> Shims {
        let (adoptions, kept) = (Mutex::default(), Kept::default());
        Shims { paths, config, kept, adoptions, ended: Condvar::new(), hint: OnceLock::new() }
    }

    /// Called after each adoption, whatever came of it.
    pub(crate) fn on_change(&self, hint: Box<dyn Fn() + Send + Sync>) {
        let _ = self.hint.set(hint);
    }

    pub(crate) fn start(&self, id: &ContainerId, more: &[OsString]) -> Result<(), HostError> {
        self.run("run", id, &self.config.runtime, more, Vec::new())
    }

    /// What has a shim see to the next run when nobody else is there to do it.
    pub(crate) fn restarts(&self, id: &ContainerId, restart: RestartPolicy) -> Vec<OsString> {
        let policy = match restart {
            RestartPolicy::Always => "always",
            RestartPolicy::OnFailure => "on-failure",
            RestartPolicy::Never => return Vec::new(),
        };
        if self.config.restart_command.is_empty() {
            return Vec::new();
        }
        let mut words: Vec<OsString> =
            vec!["--restart".into(), policy.into(), "--restart-lock".into(), self.paths.lock().into()];
        let command = self.config.restart_command.iter().cloned().chain([id.0.clone().into()]);
        words.extend(command.flat_map(|word| ["--restart-command".into(), word]));
        words
    }

    /// Gives a container whose shim was killed a new one. One that is being adopted already is waited for.
    pub(crate) fn adopt(&self, orphan: &Orphan) -> Result<(), HostError> {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut adoptions = self.lock();
        if adoptions.under_way.contains(&orphan.id) {
            while adoptions.under_way.contains(&orphan.id) && Instant::now() < deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                (adoptions, _) =
                    self.ended.wait_timeout(adoptions, left).unwrap_or_else(PoisonError::into_inner);
            }
            return Ok(());
        }
        adoptions.under_way.insert(orphan.id.clone());
        drop(adoptions);
        self.finish_adoption(orphan)
    }

    /// On threads of its own: a hanging adoption must not hold up a look at the host.
    pub(crate) fn adopt_later(self: &Arc<Self>, orphans: &[Orphan]) {
        let mut adoptions = self.lock();
        adoptions
            .refused
            .retain(|id, at| at.elapsed() < ADOPT_AGAIN && orphans.iter().any(|orphan| orphan.id == *id));
        for orphan in orphans {
            if adoptions.refused.contains_key(&orphan.id) || !adoptions.under_way.insert(orphan.id.clone()) {
                continue;
            }
            tracing::warn!(container = %orphan.id, "its shim is gone; adopting it");
            adoptions.waiting.push_back(orphan.clone());
        }
        while adoptions.workers < ADOPT_WORKERS.min(adoptions.waiting.len()) {
            let shims = self.clone();
            let thread =
                std::thread::Builder::new().name("adopt".into()).spawn(move || shims.adopt_waiting());
            if let Err(error) = thread {
                tracing::warn!(%error, "start a thread for adoptions; the next look tries again");
                for orphan in std::mem::take(&mut adoptions.waiting) {
                    adoptions.under_way.remove(&orphan.id);
                }
                return;
            }
            adoptions.workers += 1;
        }
    }

    fn adopt_waiting(&self) {
        loop {
            let mut adoptions = self.lock();
            let Some(orphan) = adoptions.waiting.pop_front() else {
                adoptions.workers -= 1;
                return;
            };
            drop(adoptions);
            if let Err(error) = self.finish_adoption(&orphan) {
                tracing::warn!(container = %orphan.id, error = %error.chain(), "adoption failed");
            }
            if let Some(hint) = self.hint.get() {
                hint();
            }
        }
    }

    fn finish_adoption(&self, orphan: &Orphan) -> Result<(), HostError> {
        let done = runtime_of(&self.paths, &orphan.id, &self.config.runtime)
            .map_err(HostError::from)
            .and_then(|runtime| self.run("adopt", &orphan.id, &runtime, &[], self.kept.copies(&orphan.id)));
        let mut adoptions = self.lock();
        adoptions.under_way.remove(&orphan.id);
        if done.is_err() {
            adoptions.refused.insert(orphan.id.clone(), Instant::now());
        }
        self.ended.notify_all();
        done
    }

    /// Whether it can still be found out how this run ended, which has no monitor and no process any more.
    pub(crate) fn can_recover(&self, id: &ContainerId) -> bool {
        self.kept.has(id) && !self.lock().refused.contains_key(id)
    }

    pub(crate) fn is_adopting(&self, id: &ContainerId) -> bool {
        self.lock().under_way.contains(id)
    }

    /// For a process that is about to end.
    pub(crate) fn settle(&self, timeout: Duration) {
        let adoptions = self.lock();
        let _ = self
            .ended
            .wait_timeout_while(adoptions, timeout, |adoptions| !adoptions.under_way.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
    }

    fn run(
        &self,
        verb: &str,
        id: &ContainerId,
        runtime: &Path,
        more: &[OsString],
        given: Vec<(&str, OwnedFd)>,
    ) -> Result<(), HostError> {
        let dir = self.paths.container(id);
        let mut command = Command::new(&self.config.shim);
        command.arg(verb).arg("--id").arg(&id.0).arg("--dir").arg(&dir).arg("--bundle").arg(&dir);
        command.arg("--runtime").arg(runtime);
        command.arg("--runtime-root").arg(self.paths.runtime_root());
        command.arg("--exit-file").arg(self.paths.exit_record(id));
        command.args(more);
        for (option, fd) in &given {
            command.arg(option).arg(fd.as_raw_fd().to_string());
        }
        if !given.is_empty() {
            keel_sys::monitor::give(&mut command, given.into_iter().map(|(_, fd)| fd).collect());
        }
        let failed = |message: String| HostError::Start { container: id.to_string(), message };
        let mut child = command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed(format!("run {}: {e}", self.config.shim.display())))?;
        let answer = read_answer(&mut child, START_TIMEOUT);
        let _ = child.wait();
        match answer.map_err(|e| failed(format!("shim: {e}")))? {
            line if line.starts_with("ok ") => Ok(()),
            line if line.is_empty() => Err(failed("the shim ended without an answer".into())),
            line => Err(failed(line.strip_prefix("error ").unwrap_or(&line).to_string())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Adoptions> {
        self.adoptions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One line from the shim, within a deadline: a hanging runtime must not hang the engine.
fn read_answer(child: &mut Child, timeout: Duration) -> io::Result<String> {
    let mut stdout = child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?;
    let deadline = Instant::now() + timeout;
    let mut answer = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || answer.len() as u64 > MAX_ANSWER_BYTES {
            child.kill()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {timeout:?}")));
        }
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, wait) {
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(e.into()),
            Ok(_) => {}
        }
        let mut chunk = [0; 4096];
        match stdout.read(&mut chunk)? {
            0 => break,
            n => answer.extend_from_slice(&chunk[..n]),
        }
        if answer.contains(&b'\n') {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_string())
}

/// Runs a program to its end with no environment and an empty input; kills it at the deadline. Its standard error is
/// kept, up to a bound.
pub(crate) fn run_to_end(
    program: &Path,
    arguments: impl FnOnce(&mut Command),
    timeout: Duration,
) -> io::Result<(std::process::ExitStatus, String)> {
    let mut command = Command::new(program);
    arguments(&mut command);
    let mut child =
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + timeout;
    let ended = await_end(&mut child, deadline);
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended
}

fn await_end(child: &mut Child, deadline: Instant) -> io::Result<(std::process::ExitStatus, String)> {
    let mut stderr = child.stderr.take().ok_or_else(|| io::Error::other("no pipe"))?;
    keel_sys::file::set_nonblocking(&stderr, true)?;
    let pidfd = keel_sys::process::pidfd_open(child.id().cast_signed())?;
    let mut text = Vec::new();
    let mut open = true;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end in time and was killed"));
        }
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds =
            [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(stderr.as_fd(), PollFlags::POLLIN)];
        let watched = if open { &mut fds[..] } else { &mut fds[..1] };
        match poll(watched, wait) {
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(e.into()),
            Ok(_) => {}
        }
        let is_over = fds[0].any().unwrap_or(false);
        // Drained to the end even when no more is kept: a full pipe would hold it up. What a process that outlives it
        // has to say is not waited for.
        let mut chunk = [0; 4096];
        while open {
            match stderr.read(&mut chunk) {
                Ok(0) => open = false,
                Ok(n) if text.len() as u64 <= MAX_ANSWER_BYTES => text.extend_from_slice(&chunk[..n]),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if is_over {
            return Ok((child.wait()?, String::from_utf8_lossy(&text).into_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_killed_and_one_that_talks_is_drained() {
        let shell = Path::new("/bin/sh");
        let before = Instant::now();
        let hangs = |c: &mut Command| {
            c.args(["-c", "exec /bin/sleep 1000"]);
        };
        let error = run_to_end(shell, hangs, Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(before.elapsed() < Duration::from_secs(30));
        let talks = "i=0; while [ $i -lt 20000 ]; do echo 123456789 >&2; i=$((i+1)); done; exit 3";
        let talk = |c: &mut Command| {
            c.args(["-c", talks]);
        };
        let (status, text) = run_to_end(shell, talk, Duration::from_secs(60)).unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(text.starts_with("123456789\n"));
        let env = |c: &mut Command| {
            c.args(["-c", "/usr/bin/env >&2"]);
        };
        let (_, text) = run_to_end(shell, env, Duration::from_secs(60)).unwrap();
        assert!(!text.contains("HOME="), "{text}");
    }
}
