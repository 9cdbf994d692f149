//! The parent's side of the clone: namespaces that must be joined before it, and the conversation until the child is
//! ready. Used for a container's first process and for those of `exec`.

use crate::child::{self, Fds, MESSAGE_BYTES, StateText, Word};
use crate::error::{RuntimeError, sys_error};
use crate::op::{NsKind, Op};
use keel_sys::{file, process, socket};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

pub(crate) struct Launch<'a> {
    pub(crate) ops: &'a [Op],
    pub(crate) fds: Fds,
    pub(crate) clone_flags: u64,
    /// Namespaces that take effect only for children: joined around the clone.
    pub(crate) parent_joins: Vec<(NsKind, OwnedFd)>,
    pub(crate) time_offsets: Option<String>,
    /// The cgroup v2 directory to be cloned into.
    pub(crate) cgroup: Option<OwnedFd>,
    pub(crate) state: StateText,
}

pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) sync: OwnedFd,
}

/// Clones the child, which begins with its operations at once.
#[expect(unsafe_code, reason = "clone")]
pub(crate) fn launch(mut launch: Launch<'_>) -> Result<Launched, RuntimeError> {
    let (ours, theirs) = socket::pair().map_err(sys_error("make a socket pair"))?;
    launch.fds.sync = Some(theirs);
    let texts = texts_after_ready(launch.ops);
    let back = enter(&launch)?;
    // SAFETY: the runtime has one thread, and the child runs `child::run`, which does not return.
    let cloned = unsafe { process::clone(launch.clone_flags, launch.cgroup.as_ref().map(|c| c.as_fd())) };
    if let Ok(process::Cloned::Child) = cloned {
        // Our end would keep the conversation open in the child.
        drop(ours);
        child::run(launch.ops, &texts, &launch.fds, &launch.state);
    }
    for (kind, fd) in back {
        process::setns(&fd, kind.flag()).map_err(sys_error("return to the own namespace"))?;
    }
    match cloned.map_err(sys_error("clone"))? {
        process::Cloned::Parent { pid, pidfd } => Ok(Launched { pid, pidfd, sync: ours }),
        process::Cloned::Child => process::exit_now(1),
    }
}

/// Joins the namespaces for children; the result is the way back.
fn enter(launch: &Launch<'_>) -> Result<Vec<(NsKind, OwnedFd)>, RuntimeError> {
    let mut back = Vec::new();
    let own = |kind: NsKind| {
        let path = if kind == NsKind::Pid { c"/proc/self/ns/pid" } else { c"/proc/self/ns/time" };
        file::openat(file::cwd(), path, libc::O_RDONLY, 0).map_err(sys_error("open the own namespace"))
    };
    for (kind, fd) in &launch.parent_joins {
        back.push((*kind, own(*kind)?));
        process::setns(fd, kind.flag()).map_err(|source| RuntimeError::Sys {
            what: if *kind == NsKind::Pid { "join the pid namespace" } else { "join the time namespace" },
            source,
        })?;
    }
    if let Some(offsets) = &launch.time_offsets {
        back.push((NsKind::Time, own(NsKind::Time)?));
        process::unshare(NsKind::Time.flag()).map_err(sys_error("make a time namespace"))?;
        if !offsets.is_empty() {
            fs::write("/proc/self/timens_offsets", offsets).map_err(sys_error("write the time offsets"))?;
        }
    }
    Ok(back)
}

/// For operations after the readiness: their failures are told to a `start` command that does not have the list.
fn texts_after_ready(ops: &[Op]) -> Vec<Vec<u8>> {
    let ready = ops.iter().position(|op| matches!(op, Op::Ready)).unwrap_or(ops.len());
    ops.iter()
        .enumerate()
        .map(|(i, op)| if i <= ready { Vec::new() } else { op.describe().into_bytes() })
        .collect()
}

/// One message of the child.
pub(crate) enum Heard {
    Word(Word),
    /// The socket was closed: by the exec or by the process's death.
    Closed,
}

pub(crate) fn hear(sync: &OwnedFd, ops: &[Op]) -> Result<Heard, RuntimeError> {
    let mut buffer = [0u8; MESSAGE_BYTES + 512];
    let n = match socket::recv(sync, &mut buffer) {
        Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => 0,
        other => other.map_err(sys_error("read from the container's process"))?,
    };
    if n == 0 {
        return Ok(Heard::Closed);
    }
    match child::decode(&buffer[..n]) {
        Some((Word::Failed, op, failure)) => {
            let text = ops.get(op as usize).map(|op| op.explain(failure));
            Err(RuntimeError::Child(text.unwrap_or_else(|| keel_sys::errno_text(failure.errno))))
        }
        Some((word, _, _)) => Ok(Heard::Word(word)),
        None => Err(RuntimeError::Child("unreadable message from the container's process".to_owned())),
    }
}

/// The answer of a child to a `start` command: `None` when the program runs.
pub(crate) fn hear_start(socket: &OwnedFd) -> Result<Option<String>, RuntimeError> {
    let mut buffer = [0u8; MESSAGE_BYTES + 512];
    // A reset instead of an end: the process never took the word, another `start` was first.
    let n = socket::recv(socket, &mut buffer).map_err(sys_error("read from the container's process"))?;
    let Some((Word::Failed, _, failure)) = child::decode(&buffer[..n]) else { return Ok(None) };
    let what = String::from_utf8_lossy(&buffer[MESSAGE_BYTES..n]).into_owned();
    Ok(Some(match failure.step {
        crate::op::Step::ExitCode => format!("{what}: exit status {}", failure.detail),
        crate::op::Step::Killed => format!("{what}: killed by signal {}", failure.detail),
        crate::op::Step::Timeout => format!("{what}: timed out"),
        crate::op::Step::NotFound => format!("{what}: executable file not found in $PATH"),
        _ => format!("{what}: {}", keel_sys::errno_text(failure.errno)),
    }))
}

pub(crate) fn answer(sync: &OwnedFd) -> Result<(), RuntimeError> {
    socket::send(sync, b"go").map_err(sys_error("answer the container's process"))
}

/// How a child that closed its socket ended; it is waited for.
pub(crate) fn obituary(pid: i32) -> String {
    match process::wait_pid(pid) {
        Ok(process::Exit::Code(code)) => format!("exit status {code}"),
        Ok(process::Exit::Signal(signal)) => format!("killed by signal {signal}"),
        Err(_) => "it is gone".to_owned(),
    }
}
