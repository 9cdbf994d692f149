//! The file-descriptor mount API (Linux 5.2 and later; `mount_setattr` 5.12).

use crate::{check, check_fd};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

pub const ATTR_RDONLY: u64 = 0x01;
pub const ATTR_NOSUID: u64 = 0x02;
pub const ATTR_NODEV: u64 = 0x04;
pub const ATTR_NOEXEC: u64 = 0x08;
/// The field of the three access-time modes; `attr_clr` must name it whole to change the mode.
pub const ATTR_ATIME: u64 = 0x70;
pub const ATTR_RELATIME: u64 = 0x00;
pub const ATTR_NOATIME: u64 = 0x10;
pub const ATTR_STRICTATIME: u64 = 0x20;
pub const ATTR_NODIRATIME: u64 = 0x80;
pub const ATTR_IDMAP: u64 = 0x0010_0000;
pub const ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;

const OPEN_TREE_CLONE: u32 = 1;
const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const AT_RECURSIVE: u32 = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

/// `struct mount_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    pub set: u64,
    pub clear: u64,
    /// One of `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0 for no change.
    pub propagation: u64,
    pub userns_fd: u64,
}

impl Attr {
    /// Owners are shown as this user namespace maps them.
    pub fn idmap(userns: impl AsFd) -> Attr {
        Attr { set: ATTR_IDMAP, userns_fd: userns.as_fd().as_raw_fd() as u64, ..Attr::default() }
    }
}

/// A detached copy of the mount at `path` (of the tree below it, with `recursive`).
pub fn clone_tree(dir: impl AsFd, path: &CStr, recursive: bool, follow: bool) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    if !follow {
        flags |= libc::AT_SYMLINK_NOFOLLOW as u32;
    }
    // SAFETY: path is NUL-terminated.
    check_fd(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_fd().as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches a detached mount on the file or directory that `target` is.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated and empty.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            target.as_fd().as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Changes the attributes of the mount that `fd` is on.
pub fn set_attr(fd: impl AsFd, attr: &Attr, recursive: bool) -> io::Result<()> {
    set_attr_at(fd, c"", attr, recursive)
}

pub fn set_attr_at(dir: impl AsFd, path: &CStr, attr: &Attr, recursive: bool) -> io::Result<()> {
    let flags = if recursive { AT_RECURSIVE } else { 0 } | libc::AT_EMPTY_PATH as u32;
    // SAFETY: path is NUL-terminated; attr has the layout and size given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            attr as *const Attr,
            size_of::<Attr>(),
        )
    })?;
    Ok(())
}

/// A file system being configured.
pub fn fsopen(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: kind is NUL-terminated; 1 is FSOPEN_CLOEXEC.
    check_fd(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), 1) })
}

/// One option: a flag when there is no value.
pub fn fsconfig(fs: impl AsFd, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
    let (cmd, value) = match value {
        Some(v) => (FSCONFIG_SET_STRING, v.as_ptr()),
        None => (FSCONFIG_SET_FLAG, ptr::null()),
    };
    // SAFETY: key and value are NUL-terminated (value null for a flag).
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_fd().as_raw_fd(), cmd, key.as_ptr(), value, 0) })?;
    Ok(())
}

/// Creates the file system and a detached mount of it with these attributes.
pub fn fsmount(fs: impl AsFd, attr: u64) -> io::Result<OwnedFd> {
    let raw = fs.as_fd().as_raw_fd();
    // SAFETY: the command takes no key and no value.
    check(unsafe {
        libc::syscall(libc::SYS_fsconfig, raw, FSCONFIG_CMD_CREATE, ptr::null::<u8>(), ptr::null::<u8>(), 0)
    })?;
    // SAFETY: plain numbers; 1 is FSMOUNT_CLOEXEC.
    check_fd(unsafe { libc::syscall(libc::SYS_fsmount, raw, 1, attr) })
}

/// The classic `mount(2)`, for what the new API has no word for.
pub fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: u64, data: Option<&CStr>) -> io::Result<()> {
    let data = data.map_or(ptr::null(), |d| d.as_ptr());
    // SAFETY: all strings are NUL-terminated or null.
    check(i64::from(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.cast())
    }))?;
    Ok(())
}

pub fn umount(path: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::umount2(path.as_ptr(), flags) }))?;
    Ok(())
}

pub fn pivot_root(new: &CStr, old: &CStr) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, new.as_ptr(), old.as_ptr()) })?;
    Ok(())
}

pub fn chroot(path: &CStr) -> io::Result<()> {
    // SAFETY: path is NUL-terminated.
    check(i64::from(unsafe { libc::chroot(path.as_ptr()) }))?;
    Ok(())
}
