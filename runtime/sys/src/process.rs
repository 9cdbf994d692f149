//! Processes: clone, namespaces, pidfds, exec, wait.

use crate::{check, check_fd};
use std::ffi::{CStr, c_char};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
pub const CLONE_NEWTIME: i32 = 0x80;

/// The two sides of [`clone`].
pub enum Cloned {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// `clone3(2)` in the manner of fork: the child has a copy of the memory.
///
/// # Safety
/// The process has one thread. The child calls only what is safe after fork: no allocation is promised to the
/// reader, though a single-threaded process holds no lock that could be inherited.
pub unsafe fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: i32 = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        // With CLONE_PARENT the kernel takes the caller's own.
        exit_signal: if flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 },
        ..Default::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args has the layout and size given; no stack is set, so the child continues here on its own copy.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match check(ret)? {
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent {
            pid: pid as i32,
            // SAFETY: the kernel stored a new descriptor here.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// Runs `f` while a process lives in new namespaces, whose number it is given. That process does nothing.
pub fn in_new_namespaces<T>(flags: i32, f: impl FnOnce(i32) -> T) -> io::Result<T> {
    let (ours, theirs) = crate::socket::pair()?;
    // SAFETY: other threads may hold locks, and the child needs none of them: it closes, waits for the end of the
    // conversation and exits, by system calls alone.
    let cloned = unsafe { clone(flags as u64, None) };
    match cloned? {
        Cloned::Child => {
            drop(ours);
            let _ = set_parent_death_signal(libc::SIGKILL);
            let _ = crate::socket::recv(&theirs, &mut [0u8; 4]);
            exit_now(0)
        }
        Cloned::Parent { pid, .. } => {
            drop(theirs);
            let done = f(pid);
            drop(ours);
            wait_pid(pid).map(|_| done)
        }
    }
}

pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of a descriptor of another process, which one must be allowed to trace.
pub fn pidfd_getfd(pidfd: impl AsFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), fd, 0) })
}

pub fn pidfd_send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_fd().as_raw_fd(), signal, ptr::null::<u8>(), 0)
    })?;
    Ok(())
}

pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::kill(pid, signal) }))?;
    Ok(())
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// The shell's convention: 128 + signal.
    pub fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        }
    }
}

/// Waits for one child.
pub fn wait_pid(pid: i32) -> io::Result<Exit> {
    loop {
        if let Some((_, exit)) = wait(pid, 0)? {
            return Ok(exit);
        }
    }
}

/// `waitpid(2)`: `None` when `WNOHANG` found nothing. `ECHILD` is an error.
pub fn wait(pid: i32, flags: i32) -> io::Result<Option<(i32, Exit)>> {
    let mut status = 0;
    loop {
        // SAFETY: status is a valid place.
        let ret = unsafe { libc::waitpid(pid, &mut status, flags) };
        match check(i64::from(ret)) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(0) => return Ok(None),
            Ok(got) => {
                let exit = if libc::WIFSIGNALED(status) {
                    Exit::Signal(libc::WTERMSIG(status))
                } else {
                    Exit::Code(libc::WEXITSTATUS(status))
                };
                return Ok(Some((got as i32, exit)));
            }
        }
    }
}

pub fn setns(fd: impl AsFd, kind: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::setns(fd.as_fd().as_raw_fd(), kind) }))?;
    Ok(())
}

pub fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: plain number.
    check(i64::from(unsafe { libc::unshare(flags) }))?;
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec.
pub fn close_range_cloexec(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: plain numbers; no descriptor is closed.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Closes the descriptors from `first` to `last`, both included.
///
/// # Safety
/// Nobody in this process uses or closes any of them afterwards.
pub unsafe fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: plain numbers; the caller answers for the descriptors.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

pub fn setsid() -> io::Result<()> {
    // SAFETY: no arguments.
    check(i64::from(unsafe { libc::setsid() }))?;
    Ok(())
}

pub fn getpid() -> i32 {
    // SAFETY: cannot fail.
    unsafe { libc::getpid() }
}

/// Ends the process without running destructors or exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// `execve(2)`; returns only on failure. Both arrays end with a null pointer.
///
/// # Safety
/// Every pointer of `argv` and `envp` but the last is a NUL-terminated string.
pub unsafe fn execve(path: &CStr, argv: &[*const c_char], envp: &[*const c_char]) -> io::Error {
    if argv.last() != Some(&ptr::null()) || envp.last() != Some(&ptr::null()) {
        return io::Error::from_raw_os_error(libc::EINVAL);
    }
    // SAFETY: the arrays are null-terminated (checked) and hold C strings (promised by the caller).
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Executes the file that `fd` is, with the caller's arguments and environment.
///
/// # Safety
/// As [`execve`].
pub unsafe fn fexecve(fd: impl AsFd, argv: &[*const c_char], envp: *const *const c_char) -> io::Error {
    if argv.last() != Some(&ptr::null()) {
        return io::Error::from_raw_os_error(libc::EINVAL);
    }
    // SAFETY: argv is null-terminated (checked); envp is the process's own environment.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp,
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

fn prctl(option: i32, a: u64, b: u64, c: u64) -> io::Result<i32> {
    // SAFETY: the options used in this module take numbers or pointers that outlive the call.
    Ok(check(i64::from(unsafe { libc::prctl(option, a, b, c, 0u64) }))? as i32)
}

pub fn set_dumpable(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, u64::from(on), 0, 0)?;
    Ok(())
}

pub fn set_subreaper(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, u64::from(on), 0, 0)?;
    Ok(())
}

pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, signal as u64, 0, 0)?;
    Ok(())
}

pub fn set_no_new_privs() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0)?;
    Ok(())
}

pub fn set_name(name: &CStr) -> io::Result<()> {
    prctl(libc::PR_SET_NAME, name.as_ptr() as u64, 0, 0)?;
    Ok(())
}

pub fn sethostname(name: &[u8]) -> io::Result<()> {
    // SAFETY: the length is given.
    check(i64::from(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }))?;
    Ok(())
}

pub fn setdomainname(name: &[u8]) -> io::Result<()> {
    // SAFETY: the length is given.
    check(i64::from(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }))?;
    Ok(())
}

pub fn umask(mask: u32) -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::umask(mask) }
}

pub fn personality(persona: u64) -> io::Result<()> {
    // SAFETY: plain number.
    check(i64::from(unsafe { libc::personality(persona) }))?;
    Ok(())
}

/// `struct sched_attr` of `sched_setattr(2)`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

pub fn sched_setattr(attr: &SchedAttr) -> io::Result<()> {
    let mut attr = *attr;
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: attr has the layout and size given; 0 is this thread.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })?;
    Ok(())
}

/// `class` and `level` as in ioprio_set(2), for this process.
pub fn ioprio_set(class: u32, level: u32) -> io::Result<()> {
    // SAFETY: plain numbers; 1 is IOPRIO_WHO_PROCESS, 0 is this process.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, (class << 13) | level) })?;
    Ok(())
}

/// `set_mempolicy(2)`; `nodes` is a bit mask of NUMA nodes.
pub fn set_mempolicy(mode: u32, nodes: &[u64]) -> io::Result<()> {
    let (mask, bits) =
        if nodes.is_empty() { (ptr::null(), 0) } else { (nodes.as_ptr(), nodes.len() as u64 * 64 + 1) };
    // SAFETY: the mask's length in bits is given (the kernel takes one more than it reads).
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) })?;
    Ok(())
}

/// `sched_setaffinity(2)` for this thread; `mask` is a bit mask of CPUs.
pub fn set_affinity(mask: &[u64]) -> io::Result<()> {
    // SAFETY: the mask's length in bytes is given.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(mask), mask.as_ptr()) })?;
    Ok(())
}

/// Joins the session keyring of this name, or a new one, so that the caller's keys stay outside. Later processes of the
/// same user find it by its name.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    const KEYCTL_SETPERM: i32 = 5;
    // From include/linux/key.h: all for the possessor; view, read, search and link for the user.
    const PERMISSIONS: u32 = 0x3f1b_0000;
    // SAFETY: name is NUL-terminated.
    let ring = check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr(), 0, 0, 0)
    })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, ring, PERMISSIONS, 0, 0) })?;
    Ok(())
}

/// Default disposition for every signal, nothing blocked.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is a valid disposition; signals that cannot be changed answer EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: set is initialised by sigemptyset before its use.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), ptr::null_mut());
    }
}

/// Blocks every signal and returns a signalfd that delivers them.
pub fn block_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: set is initialised by sigfillset before its use.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), ptr::null_mut());
        check_fd(i64::from(libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC)))
    }
}

/// The next signal of a signalfd.
pub fn read_signal(fd: impl AsFd) -> io::Result<i32> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    loop {
        // SAFETY: info is as large as stated.
        let ret = unsafe {
            libc::read(fd.as_fd().as_raw_fd(), info.as_mut_ptr().cast(), size_of::<libc::signalfd_siginfo>())
        };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            // SAFETY: a successful read of a signalfd fills the record.
            Ok(_) => return Ok(unsafe { info.assume_init() }.ssi_signo as i32),
        }
    }
}

pub fn geteuid() -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::geteuid() }
}

pub fn getegid() -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::getegid() }
}

/// The `CLONE_NEW*` flag of the namespace that `fd` is; an error for any other file.
pub fn namespace_type(fd: impl AsFd) -> io::Result<i32> {
    const NS_GET_NSTYPE: u64 = 0xb703;
    // SAFETY: the request takes no argument.
    Ok(check(i64::from(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), NS_GET_NSTYPE as _) }))? as i32)
}

/// Ends the process on the signals that ask for it. The init of a pid namespace gets none that it has no handler for; an
/// exec takes the handlers away.
pub fn end_on_signals() {
    extern "C" fn end(signal: i32) {
        exit_now(128 + signal)
    }
    let handler = end as extern "C" fn(i32) as *const () as libc::sighandler_t;
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: the handler makes one system call that is safe in a signal handler, and does not return.
        unsafe { libc::signal(signal, handler) };
    }
}

/// Ignores a broken pipe, or gives it its default effect.
pub fn ignore_sigpipe(on: bool) {
    let disposition = if on { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: both are valid dispositions.
    unsafe { libc::signal(libc::SIGPIPE, disposition) };
}

/// A small program links this in place of `pthread_getattr_np`. The standard library asks that only where the main
/// thread's stack ends, and a static glibc brings stdio, `sscanf` and its number formats for the answer. Without one an
/// overflow still faults at the kernel's guard gap, only wordless.
#[unsafe(no_mangle)]
extern "C" fn keel_stack_unknown() -> i32 {
    libc::ENOSYS
}
