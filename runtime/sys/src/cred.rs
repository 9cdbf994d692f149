//! Credentials: ids, capabilities, resource limits.

use crate::check;
use std::io;

/// To the kernel this number means "as it is", so that a change to it would keep root's rights.
pub const NO_ID: u32 = u32::MAX;

fn an_id(id: u32) -> io::Result<u32> {
    if id == NO_ID { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(id) }
}

/// Changes this thread's ids by raw system call: glibc's wrappers signal other threads, of which there are none.
pub fn setresuid(uid: u32) -> io::Result<()> {
    let uid = an_id(uid)?;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

pub fn setresgid(gid: u32) -> io::Result<()> {
    let gid = an_id(gid)?;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    Ok(())
}

pub fn setgroups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the count is given.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// Sets of capabilities, bit n = capability n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

pub fn capset(caps: &Capabilities) -> io::Result<()> {
    let header = CapHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let word = |shift: u32| CapData {
        effective: (caps.effective >> shift) as u32,
        permitted: (caps.permitted >> shift) as u32,
        inheritable: (caps.inheritable >> shift) as u32,
    };
    let data = [word(0), word(32)];
    // SAFETY: version 3 takes one header and two data words.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

pub fn capget() -> io::Result<Capabilities> {
    let mut header = CapHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 fills one header and two data words.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | (u64::from(high) << 32);
    Ok(Capabilities {
        effective: join(data[0].effective, data[1].effective),
        permitted: join(data[0].permitted, data[1].permitted),
        inheritable: join(data[0].inheritable, data[1].inheritable),
    })
}

/// Whether the capability is in the bounding set; `EINVAL` for one that the kernel does not know.
pub fn bounding_has(cap: u32) -> io::Result<bool> {
    // SAFETY: plain numbers.
    Ok(check(i64::from(unsafe { libc::prctl(libc::PR_CAPBSET_READ, u64::from(cap), 0, 0, 0) }))? == 1)
}

pub fn bounding_drop(cap: u32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, u64::from(cap), 0, 0, 0) }))?;
    Ok(())
}

pub fn ambient_clear() -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }))?;
    Ok(())
}

pub fn ambient_raise(cap: u32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, u64::from(cap), 0, 0)
    }))?;
    Ok(())
}

/// Keeps the permitted set over a change of user.
pub fn set_keep_caps(on: bool) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, u64::from(on), 0, 0, 0) }))?;
    Ok(())
}

pub fn setrlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: limit lives for the call; 0 is this process; the old value is not wanted.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &raw const limit,
            std::ptr::null_mut::<libc::rlimit64>(),
        )
    })?;
    Ok(())
}

/// (soft, hard)
pub fn getrlimit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit lives for the call; 0 is this process; no new value is given.
    check(unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::null::<libc::rlimit64>(), &raw mut limit)
    })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}
