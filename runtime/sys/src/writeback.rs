//! Starting and forcing write-back.

use crate::check;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Starts writing the dirty pages of a file without waiting for them (`sync_file_range(2)`, `WRITE` only). A hint:
/// it makes nothing durable, it only leaves less for the `syncfs` that does.
pub fn start(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: plain numbers; offset and length 0 mean the whole file.
    check(i64::from(unsafe {
        libc::sync_file_range(fd.as_fd().as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE)
    }))?;
    Ok(())
}

/// `syncfs(2)`: everything written to the file system that `fd` is on, and the errors since the last call.
pub fn syncfs(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: plain number.
    check(i64::from(unsafe { libc::syncfs(fd.as_fd().as_raw_fd()) }))?;
    Ok(())
}

/// Stops an ext4 at once, as a power cut would (`EXT4_IOC_SHUTDOWN`): what has not reached the disk is lost, the
/// journal too unless `flush_log`. For tests; every later operation on the file system fails until it is mounted again.
pub fn ext4_shutdown(fd: impl AsFd, flush_log: bool) -> io::Result<()> {
    // _IOR('X', 125, __u32)
    const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
    let flags: u32 = if flush_log { 1 } else { 2 };
    // SAFETY: the request reads one 32-bit number, which lives for the call.
    check(i64::from(unsafe {
        libc::ioctl(fd.as_fd().as_raw_fd(), EXT4_IOC_SHUTDOWN as _, &raw const flags)
    }))?;
    Ok(())
}
