//! Files, always relative to a directory descriptor.

use crate::{check, check_fd};
use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Magic links (`/proc/PID/fd/N`) are not followed.
pub const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
pub const RESOLVE_NO_XDEV: u64 = 0x01;
pub const RESOLVE_NO_SYMLINKS: u64 = 0x04;
/// An attempt to leave the directory fails.
pub const RESOLVE_BENEATH: u64 = 0x08;
/// The directory is `/` for the whole resolution.
pub const RESOLVE_IN_ROOT: u64 = 0x10;

pub const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
pub const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;
pub const PROC_SUPER_MAGIC: i64 = 0x9fa0;
pub const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;
pub const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// The working directory as a directory descriptor argument.
pub fn cwd() -> BorrowedFd<'static> {
    // SAFETY: AT_FDCWD is a special value that every *at call accepts; it is never closed.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}

#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// `openat2(2)`. `O_CLOEXEC` is always set. Where the kernel or a sandbox does not have the call, the path is walked part
/// by part with the same result.
pub fn openat2(dir: impl AsFd, path: &CStr, flags: i32, mode: u32, resolve: u64) -> io::Result<OwnedFd> {
    match openat2_call(&dir, path, flags, mode, resolve) {
        // A sandbox may say EPERM for a call that it does not know; if it was the kernel, the walk gets the same.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            crate::walk::open(dir.as_fd(), path, flags, mode, resolve)
        }
        other => other,
    }
}

fn openat2_call(dir: &impl AsFd, path: &CStr, flags: i32, mode: u32, resolve: u64) -> io::Result<OwnedFd> {
    let how = OpenHow { flags: (flags | libc::O_CLOEXEC) as u64, mode: u64::from(mode), resolve };
    // EAGAIN means that a rename raced with ".." inside the root; the kernel asks for another try.
    for _ in 0..128 {
        // SAFETY: path is NUL-terminated, how lives for the call and its size is given.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                dir.as_fd().as_raw_fd(),
                path.as_ptr(),
                &how as *const OpenHow,
                size_of::<OpenHow>(),
            )
        };
        match check_fd(ret) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => continue,
            other => return other,
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// `openat(2)`. `O_CLOEXEC` is always set.
pub fn openat(dir: impl AsFd, path: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: path is NUL-terminated.
    check_fd(i64::from(unsafe {
        libc::openat(dir.as_fd().as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC, mode)
    }))
}

pub fn mkdirat(dir: impl AsFd, path: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::mkdirat(dir.as_fd().as_raw_fd(), path.as_ptr(), mode) }))?;
    Ok(())
}

pub fn mknodat(dir: impl AsFd, path: &CStr, mode: u32, major: u32, minor: u32) -> io::Result<()> {
    let dev = libc::makedev(major, minor);
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::mknodat(dir.as_fd().as_raw_fd(), path.as_ptr(), mode, dev) }))?;
    Ok(())
}

pub fn symlinkat(target: &CStr, dir: impl AsFd, path: &CStr) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated.
    check(i64::from(unsafe { libc::symlinkat(target.as_ptr(), dir.as_fd().as_raw_fd(), path.as_ptr()) }))?;
    Ok(())
}

/// Reads a link into `buffer`; an empty path reads the link that `dir` itself is (`O_PATH|O_NOFOLLOW`).
pub fn readlinkat<'b>(dir: impl AsFd, path: &CStr, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    // SAFETY: path is NUL-terminated; the buffer's length is given.
    let n = check(unsafe {
        libc::readlinkat(dir.as_fd().as_raw_fd(), path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
    } as i64)?;
    Ok(&buffer[..n as usize])
}

pub fn unlinkat(dir: impl AsFd, path: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::unlinkat(dir.as_fd().as_raw_fd(), path.as_ptr(), flags) }))?;
    Ok(())
}

pub fn faccessat(dir: impl AsFd, path: &CStr, mode: i32, flags: i32) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::faccessat(dir.as_fd().as_raw_fd(), path.as_ptr(), mode, flags) }))?;
    Ok(())
}

pub fn fchmod(fd: impl AsFd, mode: u32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::fchmod(fd.as_fd().as_raw_fd(), mode) }))?;
    Ok(())
}

pub fn fchmodat(dir: impl AsFd, path: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::fchmodat(dir.as_fd().as_raw_fd(), path.as_ptr(), mode, 0) }))?;
    Ok(())
}

pub fn fchownat(dir: impl AsFd, path: &CStr, uid: u32, gid: u32, flags: i32) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::fchownat(dir.as_fd().as_raw_fd(), path.as_ptr(), uid, gid, flags) }))?;
    Ok(())
}

pub fn fchdir(dir: impl AsFd) -> io::Result<()> {
    // SAFETY: plain number.
    check(i64::from(unsafe { libc::fchdir(dir.as_fd().as_raw_fd()) }))?;
    Ok(())
}

pub fn chdir(path: &CStr) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::chdir(path.as_ptr()) }))?;
    Ok(())
}

/// The working directory as the kernel sees it; `ENOENT` when it is outside the root.
pub fn getcwd(buffer: &mut [u8]) -> io::Result<&[u8]> {
    // SAFETY: the buffer's length is given.
    let n = check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
    let path = &buffer[..(n as usize).saturating_sub(1)];
    // An unreachable directory is reported as "(unreachable)/...".
    if path.first() == Some(&b'/') { Ok(path) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
}

impl Stat {
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
    pub fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }
    pub fn is_symlink(&self) -> bool {
        self.kind() == libc::S_IFLNK
    }
    /// A character device with this number.
    pub fn is_char_device(&self, major: u32, minor: u32) -> bool {
        self.kind() == libc::S_IFCHR && self.rdev == libc::makedev(major, minor)
    }
}

pub fn fstat(fd: impl AsFd) -> io::Result<Stat> {
    fstatat(fd, c"", libc::AT_EMPTY_PATH)
}

pub fn fstatat(dir: impl AsFd, path: &CStr, flags: i32) -> io::Result<Stat> {
    let mut st = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: path is NUL-terminated, st is large enough.
    check(i64::from(unsafe {
        libc::fstatat(dir.as_fd().as_raw_fd(), path.as_ptr(), st.as_mut_ptr(), flags)
    }))?;
    // SAFETY: the call succeeded, so st is filled.
    let st = unsafe { st.assume_init() };
    Ok(Stat {
        dev: st.st_dev,
        ino: st.st_ino,
        mode: st.st_mode,
        uid: st.st_uid,
        gid: st.st_gid,
        rdev: st.st_rdev,
        size: st.st_size as u64,
    })
}

/// File-system type (`PROC_SUPER_MAGIC`, ...).
pub fn fs_type(fd: impl AsFd) -> io::Result<i64> {
    let mut st = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: st is large enough.
    check(i64::from(unsafe { libc::fstatfs(fd.as_fd().as_raw_fd(), st.as_mut_ptr()) }))?;
    // SAFETY: the call succeeded, so st is filled.
    Ok(unsafe { st.assume_init() }.f_type)
}

/// Mount flags (`ST_RDONLY`, ...) of the mount that `fd` is on.
pub fn mount_flags(fd: impl AsFd) -> io::Result<u64> {
    let mut st = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: st is large enough.
    check(i64::from(unsafe { libc::fstatvfs(fd.as_fd().as_raw_fd(), st.as_mut_ptr()) }))?;
    // SAFETY: the call succeeded, so st is filled.
    Ok(unsafe { st.assume_init() }.f_flag)
}

/// Whether `fd` is the root of a mount.
pub fn is_mount_root(fd: impl AsFd) -> io::Result<bool> {
    let mut st = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is NUL-terminated, st is large enough.
    check(i64::from(unsafe {
        libc::statx(fd.as_fd().as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, 0, st.as_mut_ptr())
    }))?;
    // SAFETY: zeroed and then filled.
    let st = unsafe { st.assume_init() };
    Ok(st.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

/// One `write(2)`; a short write is an error, as for a cgroup or sysctl file.
pub fn write_once(fd: impl AsFd, data: &[u8]) -> io::Result<()> {
    loop {
        // SAFETY: the buffer's length is given.
        let ret = unsafe { libc::write(fd.as_fd().as_raw_fd(), data.as_ptr().cast(), data.len()) };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) if n as usize == data.len() => return Ok(()),
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::EIO)),
        }
    }
}

/// Opens an existing file below `dir` and writes it in one call.
pub fn write_at(dir: impl AsFd, path: &CStr, data: &[u8]) -> io::Result<()> {
    write_once(openat(dir, path, libc::O_WRONLY | libc::O_NOFOLLOW, 0)?, data)
}

/// One `read(2)`.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer's length is given.
        let ret = unsafe { libc::read(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) => return Ok(n as usize),
        }
    }
}

/// Reads a small file completely; `bound` is the largest size accepted.
pub fn read_at(dir: impl AsFd, path: &CStr, bound: usize) -> io::Result<Vec<u8>> {
    let fd = openat(dir, path, libc::O_RDONLY, 0)?;
    let mut data = Vec::with_capacity(512.min(bound));
    let mut chunk = [0u8; 4096];
    loop {
        let n = read(&fd, &mut chunk)?;
        if n == 0 {
            return Ok(data);
        }
        if data.len() + n > bound {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        data.extend_from_slice(&chunk[..n]);
    }
}

/// `dup2(2)` on a number: the target descriptor is replaced and inherited by exec.
pub fn dup2(fd: impl AsFd, target: i32) -> io::Result<()> {
    // SAFETY: plain numbers. Replacing a standard stream is what the caller asks for.
    check(i64::from(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), target) }))?;
    Ok(())
}

/// `dup` with CLOEXEC, at `min` or above.
pub fn dup_above(fd: impl AsFd, min: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    check_fd(i64::from(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, min) }))
}

/// Clears or sets close-on-exec.
pub fn set_cloexec(fd: impl AsFd, on: bool) -> io::Result<()> {
    let flags = if on { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFD, flags) }))?;
    Ok(())
}

/// Whether this is an open descriptor that outlives an exec: here, one that the caller gave.
pub fn is_inherited(number: i32) -> bool {
    // SAFETY: plain numbers.
    unsafe { libc::fcntl(number, libc::F_GETFD) & libc::FD_CLOEXEC == 0 }
}

pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<()> {
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: plain numbers.
    let flags = check(i64::from(unsafe { libc::fcntl(raw, libc::F_GETFL) }))? as i32;
    let flags = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::fcntl(raw, libc::F_SETFL, flags) }))?;
    Ok(())
}

/// A pipe, both ends CLOEXEC: (read, write).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: fds has room for two numbers.
    check(i64::from(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }))?;
    Ok((check_fd(i64::from(fds[0]))?, check_fd(i64::from(fds[1]))?))
}

/// How much a pipe holds before its writer waits; returns what the kernel made of it, a power of two of pages.
pub fn set_pipe_size(fd: impl AsFd, bytes: usize) -> io::Result<usize> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: F_SETPIPE_SZ takes an integer; what is no pipe gives EBADF.
    let got = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Waits until a descriptor is readable (or hung up): `false` on timeout. `None` waits for ever.
pub fn wait_readable(fd: impl AsFd, timeout_ms: Option<i32>) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: one pollfd is passed and its count is 1.
        let ret = unsafe { libc::poll(&mut poll, 1, timeout_ms.unwrap_or(-1)) };
        match check(i64::from(ret)) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) => return Ok(n > 0),
        }
    }
}

/// A path as a C string; a NUL inside is `InvalidInput`.
pub fn c_path(path: impl AsRef<OsStr>) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(path.as_ref().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Names of a directory, read without allocation.
pub struct DirBuffer {
    bytes: [u8; 2048],
    len: usize,
    at: usize,
}

impl Default for DirBuffer {
    fn default() -> Self {
        DirBuffer::new()
    }
}

impl DirBuffer {
    pub fn new() -> DirBuffer {
        DirBuffer { bytes: [0; 2048], len: 0, at: 0 }
    }

    /// Reads the next names; `false` at the end.
    pub fn fill(&mut self, dir: impl AsFd) -> io::Result<bool> {
        // SAFETY: the buffer's length is given.
        let n = check(unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                dir.as_fd().as_raw_fd(),
                self.bytes.as_mut_ptr(),
                self.bytes.len(),
            )
        })?;
        self.len = n as usize;
        self.at = 0;
        Ok(n > 0)
    }

    pub fn next_name(&mut self) -> Option<&CStr> {
        // struct linux_dirent64: ino u64, off i64, reclen u16, type u8, name.
        let record = self.bytes.get(self.at..self.len)?;
        let size = usize::from(u16::from_ne_bytes([*record.get(16)?, *record.get(17)?]));
        self.at += size.max(19);
        CStr::from_bytes_until_nul(record.get(19..)?).ok()
    }
}

/// One `write(2)`, which may be short.
pub fn write(fd: impl AsFd, data: &[u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer's length is given.
        let ret = unsafe { libc::write(fd.as_fd().as_raw_fd(), data.as_ptr().cast(), data.len()) };
        match check(ret as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(n) => return Ok(n as usize),
        }
    }
}

/// A standard stream by number. It may be closed; then every use of it fails with `EBADF`.
pub fn standard(number: i32) -> BorrowedFd<'static> {
    // SAFETY: standard streams are not owned by anything in these programs and never closed.
    unsafe { BorrowedFd::borrow_raw(number.clamp(0, 2)) }
}

/// Waits until at least one of the descriptors is readable or hung up; absent ones never are.
pub fn poll_readable<const N: usize>(fds: &[Option<BorrowedFd<'_>>; N]) -> io::Result<[bool; N]> {
    poll_readable_within(fds, None)
}

/// As [`poll_readable`]; after the time none is ready.
pub fn poll_readable_within<const N: usize>(
    fds: &[Option<BorrowedFd<'_>>; N],
    timeout_ms: Option<i32>,
) -> io::Result<[bool; N]> {
    let mut polls = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: N entries are passed.
        match check(i64::from(unsafe {
            libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, timeout_ms.unwrap_or(-1))
        })) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
            Ok(_) => return Ok(polls.map(|p| p.revents != 0)),
        }
    }
}
