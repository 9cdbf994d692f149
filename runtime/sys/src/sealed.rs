//! A copy of the own binary that no container can write to.
//!
//! Between clone and exec a process inside a container still is this program, so `/proc/PID/exe` leads to its file; and
//! a program called `/proc/self/exe` makes the container execute it. Run from a read-only overlay that is mounted
//! nowhere, or from a sealed memory file, there is nothing behind these links that could be changed.

use crate::{check_fd, file, memfd, mount, process};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Executes the program again from a sealed copy, unless it already runs from one. Returns only when it does.
pub fn ensure() -> io::Result<()> {
    if executed_by_fd() && is_sealed()? {
        return Ok(());
    }
    let fd = match overlay() {
        Ok(fd) => fd,
        Err(_) => memory_copy()?,
    };
    let args: Vec<CString> =
        std::env::args_os().map(|a| CString::new(a.as_bytes())).collect::<Result<_, _>>()?;
    let mut pointers: Vec<_> = args.iter().map(|a| a.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the arguments are C strings that outlive the call; the environment is the process's own.
    Err(unsafe { process::fexecve(&fd, &pointers, libc::environ.cast()) })
}

/// Whether the kernel was given a descriptor instead of a path.
fn executed_by_fd() -> bool {
    // SAFETY: the entry is a C string in the process's own memory, or 0.
    let name = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const libc::c_char;
    // SAFETY: as above.
    !name.is_null() && unsafe { CStr::from_ptr(name) }.to_bytes().starts_with(b"/dev/fd/")
}

fn is_sealed() -> io::Result<bool> {
    let exe = file::openat(file::cwd(), c"/proc/self/exe", libc::O_RDONLY, 0)?;
    if let Ok(seals) = memfd::seals(&exe) {
        return Ok(seals & memfd::ALL_SEALS == memfd::ALL_SEALS);
    }
    let read_only = file::mount_flags(&exe)? & libc::ST_RDONLY != 0;
    Ok(read_only && file::fs_type(&exe)? == file::OVERLAYFS_SUPER_MAGIC)
}

/// The binary seen through an overlay without an upper directory: nothing is copied, nothing can be written.
fn overlay() -> io::Result<OwnedFd> {
    let exe = std::env::current_exe()?;
    let missing = || io::Error::from_raw_os_error(libc::ENOENT);
    let dir = exe.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes();
    if dir.iter().any(|c| b":\\,".contains(c)) {
        // They have a meaning in the option below; such a path is rare enough for the copy.
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // An overlay without an upper needs two lowers; the second only has to exist. Both in one option, which kernels
    // before 6.7 (`lowerdir+`) know too.
    let lowers = CString::new([dir, b":/sys/kernel"].concat())?;
    let name = file::c_path(exe.file_name().ok_or_else(missing)?)?;
    let fs = mount::fsopen(c"overlay")?;
    mount::fsconfig(&fs, c"lowerdir", Some(&lowers))?;
    let attr = mount::ATTR_RDONLY | mount::ATTR_NODEV | mount::ATTR_NOSUID;
    let tree = mount::fsmount(&fs, attr)?;
    let original = file::fstatat(file::cwd(), c"/proc/self/exe", 0)?;
    let fd = file::openat(&tree, &name, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
    let seen = file::fstat(&fd)?;
    // A binary that was replaced meanwhile is not this program.
    if (seen.size, seen.ino) != (original.size, original.ino) {
        return Err(missing());
    }
    Ok(fd)
}

fn memory_copy() -> io::Result<OwnedFd> {
    let exe = file::openat(file::cwd(), c"/proc/self/exe", libc::O_RDONLY, 0)?;
    let copy = memfd::create(c"keel-runtime")?;
    let mut rest = file::fstat(&exe)?.size as usize;
    while rest > 0 {
        // SAFETY: both descriptors are open; a null offset uses the file's position.
        let ret = unsafe { libc::sendfile(copy.as_raw_fd(), exe.as_raw_fd(), std::ptr::null_mut(), rest) };
        match ret {
            0 => return Err(io::Error::from_raw_os_error(libc::EIO)),
            n if n < 0 => return Err(io::Error::last_os_error()),
            n => rest -= n as usize,
        }
    }
    memfd::seal(&copy)?;
    // Executing needs a descriptor that is not open for writing.
    let path = CString::new(format!("/proc/self/fd/{}", copy.as_raw_fd()))?;
    // SAFETY: path is NUL-terminated.
    check_fd(i64::from(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) }))
}
