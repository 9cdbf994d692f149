//! Anonymous files.

use crate::{check, check_fd};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

pub const ALL_SEALS: i32 = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;

/// A memory file that may be sealed, close-on-exec.
pub fn create(name: &CStr) -> io::Result<OwnedFd> {
    const MFD_EXEC: u32 = 0x10;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: name is NUL-terminated.
    let ret = unsafe { libc::memfd_create(name.as_ptr(), flags | MFD_EXEC) };
    if ret < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        // Kernels before 6.3 do not know MFD_EXEC and make every memfd executable.
        // SAFETY: name is NUL-terminated.
        return check_fd(i64::from(unsafe { libc::memfd_create(name.as_ptr(), flags) }));
    }
    check_fd(i64::from(ret))
}

pub fn seal(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_ADD_SEALS, ALL_SEALS) }))?;
    Ok(())
}

/// The seals of a memfd; an error for any other file.
pub fn seals(fd: impl AsFd) -> io::Result<i32> {
    // SAFETY: plain numbers.
    Ok(check(i64::from(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GET_SEALS) }))? as i32)
}
