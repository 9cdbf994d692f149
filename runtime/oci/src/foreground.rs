//! A container in the foreground: signals are passed on, a terminal is relayed, the exit code is the program's.

use crate::activation::Notify;
use crate::error::{RuntimeError, sys_error};
use keel_sys::process::{self, Exit};
use keel_sys::{file, socket, tty};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Both ends of a console socket within this process: one for the child, one to receive the master on.
pub struct OwnConsole {
    ours: OwnedFd,
}

impl OwnConsole {
    pub fn new() -> Result<(OwnConsole, OwnedFd), RuntimeError> {
        let (ours, theirs) = socket::pair().map_err(sys_error("make a socket pair"))?;
        Ok((OwnConsole { ours }, theirs))
    }

    /// The master that the child has sent.
    pub fn receive(self) -> Result<OwnedFd, RuntimeError> {
        let (_, fd) =
            socket::recv_fd(&self.ours, &mut [0u8; 64]).map_err(sys_error("receive the terminal"))?;
        fd.ok_or_else(|| RuntimeError::Usage("the container sent no terminal".to_owned()))
    }
}

/// Signals are blocked from here on and come through the descriptor, so that none is lost before the child is there.
pub struct Signals(OwnedFd);

impl Signals {
    pub fn block() -> Result<Signals, RuntimeError> {
        process::block_signals().map(Signals).map_err(sys_error("make a signalfd"))
    }
}

/// Waits for the child, passing signals and notices of readiness on and relaying the terminal. The terminal's remaining output is read after
/// the exit.
pub fn wait(
    pid: i32,
    pidfd: &OwnedFd,
    signals: &Signals,
    master: Option<&OwnedFd>,
    notify: Option<&Notify>,
) -> Result<Exit, RuntimeError> {
    let stdin = standard(0);
    let saved = master.and_then(|_| tty::make_raw(stdin).ok());
    if saved.is_some() {
        // The container's terminal leaves the line ends to this one.
        let _ = tty::set_onlcr(stdin);
    }
    if let Some(master) = master {
        copy_size(master);
    }
    let result = pump(pid, pidfd, signals, master, notify, stdin);
    if let Some(saved) = saved {
        let _ = tty::restore(stdin, &saved);
    }
    result
}

fn standard(number: i32) -> BorrowedFd<'static> {
    file::standard(number)
}

fn copy_size(master: &OwnedFd) {
    if let Ok(size) = tty::size(standard(0)) {
        let _ = tty::set_size(master, size);
    }
}

fn pump(
    pid: i32,
    pidfd: &OwnedFd,
    signals: &Signals,
    master: Option<&OwnedFd>,
    notify: Option<&Notify>,
    stdin: BorrowedFd<'_>,
) -> Result<Exit, RuntimeError> {
    let mut input = master.is_some();
    let mut output = master.is_some();
    loop {
        let sources = [
            Some(pidfd.as_fd()),
            Some(signals.0.as_fd()),
            input.then_some(stdin),
            master.map(|m| m.as_fd()).filter(|_| output),
            notify.map(Notify::as_fd),
        ];
        let ready = file::poll_readable(&sources).map_err(sys_error("wait for the container"))?;
        if ready[1] {
            pass_on(pidfd, signals, master)?;
        }
        if let Some(notify) = notify.filter(|_| ready[4]) {
            notify.pass_on();
        }
        if let Some(master) = master {
            if ready[3] {
                output = copy(master.as_fd(), standard(1));
            }
            if ready[2] {
                input = copy(stdin, master.as_fd());
            }
        }
        if ready[0] && !(output && ready[3]) {
            return process::wait_pid(pid).map_err(sys_error("wait for the container"));
        }
    }
}

fn pass_on(pidfd: &OwnedFd, signals: &Signals, master: Option<&OwnedFd>) -> Result<(), RuntimeError> {
    let signal = process::read_signal(&signals.0).map_err(sys_error("read a signal"))?;
    match signal {
        libc::SIGCHLD | libc::SIGPIPE | libc::SIGURG => Ok(()),
        libc::SIGWINCH if master.is_some() => {
            if let Some(master) = master {
                copy_size(master);
            }
            Ok(())
        }
        signal => match process::pidfd_send_signal(pidfd, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other.map_err(sys_error("pass a signal on")),
        },
    }
}

/// One chunk; `false` when this direction is over.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut chunk = [0u8; 4096];
    // A master whose other side is closed answers EIO.
    let Ok(n) = file::read(from, &mut chunk) else { return false };
    n > 0 && write_all(to, &chunk[..n]).is_ok()
}

fn write_all(to: BorrowedFd<'_>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let n = file::write(to, data)?;
        data = &data[n..];
    }
    Ok(())
}
