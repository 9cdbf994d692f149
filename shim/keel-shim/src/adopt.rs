//! Taking over a container whose shim was killed.

use std::fs::File;
use std::process::ExitCode;

use keel_proto::{ExitRecord, file};
use keel_sys::monitor::take_inherited;
use keel_sys::process::pidfd_open;
use keel_sys::seqpacket;

use crate::args::AdoptOptions;
use crate::error::{Context, Error};
use crate::log::cut_torn_record;
use crate::memory::Memory;
use crate::notify;
use crate::process::{Identity, replace};
use crate::progress;
use crate::rotation;
use crate::runtime::Runtime;
use crate::setup::{Access, BACKLOG, Descriptors, become_hold, detach, open, remove_files};
use crate::sockets;

pub(crate) fn run(options: &AdoptOptions) -> ExitCode {
    match adopt(options) {
        Ok(Adopted::Running(memory, fds)) => become_hold(&memory, &fds),
        Ok(Adopted::Recorded(memory)) => {
            println!("ok {}", memory.container.pid);
            ExitCode::SUCCESS
        }
        Err(e) => {
            println!("error {}", e.one_line());
            ExitCode::FAILURE
        }
    }
}

enum Adopted {
    /// Or ended, and not recorded yet: the hold phase finds out.
    Running(Box<Memory>, Descriptors),
    /// The old shim got as far as the record; what it did not do any more is done.
    Recorded(Box<Memory>),
}

fn adopt(options: &AdoptOptions) -> Result<Adopted, Error> {
    let dir = std::path::absolute(&options.dir).at("resolve", &options.dir)?;
    let take = |fd: Option<i32>| fd.map(take_inherited).transpose().doing("take inherited descriptor");
    let given_pidfd = take(options.pidfd)?;
    let terminal = take(options.terminal)?;
    detach()?;
    // Until this shim is known by its file: two at a time would both find the old one gone.
    let opened = File::open(&dir).at("open", &dir)?;
    opened.lock().at("lock", &dir)?;
    let mut memory = Memory::load(&dir)?;
    memory.options.dir.clone_from(&dir);
    if let Some(runtime) = &options.runtime {
        memory.options.runtime.clone_from(runtime);
    }
    if memory.started_at_ms == 0 {
        return Err(Error::new("the container was never started"));
    }
    let shim_file = dir.join(file::SHIM_PID);
    let old = std::fs::read_to_string(&shim_file).at("read", &shim_file)?;
    if let Some(old) = Identity::parse(&old).filter(|old| old.runs()) {
        return Err(Error::new(format!("shim {} still runs", old.pid)));
    }
    if is_recorded(&memory) {
        Runtime::new(&memory.options).delete_forced();
        remove_files(&memory.options);
        return Ok(Adopted::Recorded(Box::new(memory)));
    }
    // Opened first and checked afterwards: the number cannot have been given to somebody else in between.
    let pidfd = match given_pidfd {
        Some(pidfd) => Some(pidfd),
        None => pidfd_open(memory.container.pid).ok().filter(|_| memory.container.exists()),
    };
    let held = pidfd.as_ref().map(|pidfd| sockets::recover(pidfd, &memory.held)).unwrap_or_default();
    memory.held = held.names;
    memory.adopted = true;
    memory.resumed = true;
    replace(&shim_file, Identity::current()?.to_line().as_bytes())?;
    let listener =
        seqpacket::listen(&dir, file::CONTROL, BACKLOG).at("listen on", &dir.join(file::CONTROL))?;
    // The directory is what the container has, so a new socket in it is found.
    let notify = if memory.options.notify { notify::listen(&dir).ok().map(Into::into) } else { None };
    let sockets = held.fds;
    let fds = if memory.options.tty {
        Descriptors { pidfd, listener, stdin: None, stdout: terminal, stderr: None, notify, sockets }
    } else {
        let stdout = open(&dir, file::STDOUT, Access::Read)?;
        let stderr = open(&dir, file::STDERR, Access::Read)?;
        if let Some(log) = &memory.options.log.file {
            rotation::finish(log, memory.options.log.max_files);
            // What is in a raw log has left the FIFO, whole lines or not.
            if !memory.options.log.raw {
                cut_torn_record(log).at("repair", log)?;
                progress::resume(&dir, log, &stdout, &stderr)?;
            }
        }
        // Fails when nobody reads the input any more, because the container has ended.
        let stdin = if memory.options.stdin { open(&dir, file::STDIN, Access::Write).ok() } else { None };
        Descriptors {
            pidfd,
            listener,
            stdin: stdin.map(Into::into),
            stdout: Some(stdout.into()),
            stderr: Some(stderr.into()),
            notify,
            sockets,
        }
    };
    memory.save()?;
    Ok(Adopted::Running(Box::new(memory), fds))
}

/// A record of another process under the same name is an old one.
fn is_recorded(memory: &Memory) -> bool {
    let text = std::fs::read_to_string(&memory.options.exit_file).unwrap_or_default();
    ExitRecord::parse(&text).is_ok_and(|record| {
        record.id == memory.options.id && i32::try_from(record.pid) == Ok(memory.container.pid)
    })
}
