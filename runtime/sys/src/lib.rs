//! Thin, safe wrappers over the Linux system calls that the other crates need.
//!
//! Never: policy, retries that hide errors, heap allocation on a path that runs between clone and exec
//! (everything here that takes `&CStr` and returns a number or an fd is usable there).

pub mod bpf;
pub mod cred;
pub mod epoll;
pub mod file;
pub mod heap;
pub mod memfd;
pub mod monitor;
pub mod mount;
pub mod netlink;
pub mod process;
pub mod scan;
pub mod sealed;
pub mod seccomp;
pub mod seqpacket;
pub mod socket;
pub mod tty;
mod walk;
pub mod writeback;
pub mod xattr;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The result of a system call that returns -1 and sets `errno`.
pub(crate) fn check(ret: i64) -> io::Result<i64> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// As [`check`], for calls that return a new file descriptor.
pub(crate) fn check_fd(ret: i64) -> io::Result<OwnedFd> {
    let fd = check(ret)?;
    // SAFETY: the kernel has just handed out this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `errno` of an error, 0 when it has none.
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// The name of a signal that ends a process by its own fault or that it was sent, in lower case as Go programs print it.
pub fn signal_text(signal: i32) -> &'static str {
    match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGILL => "illegal instruction",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGPIPE => "broken pipe",
        libc::SIGTERM => "terminated",
        libc::SIGXCPU => "cpu time limit exceeded",
        libc::SIGSYS => "bad system call",
        _ => "no common signal",
    }
}

/// The system's text for an error number, in lower case as Go programs print it: callers of OCI runtimes match
/// on "no such file or directory" and "permission denied".
pub fn errno_text(errno: i32) -> String {
    if errno == libc::ENOSYS {
        return "function not implemented: this needs Linux 5.12, and a sandbox that lets the call through"
            .into();
    }
    let text = io::Error::from_raw_os_error(errno).to_string();
    let text = match text.find(" (os error") {
        Some(end) => &text[..end],
        None => &text,
    };
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}
