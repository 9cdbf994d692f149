//! Extended attributes: of an open file, and of a name in a directory without following it.

use crate::check;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `fsetxattr(2)`; replaces an attribute that is there.
pub fn fset(fd: impl AsFd, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated, `value` is valid for its length.
    check(i64::from(unsafe {
        libc::fsetxattr(fd.as_fd().as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    }))?;
    Ok(())
}

/// Sets an attribute of `file` in `dir` without following `file` when it is a symlink and without opening it (a
/// fifo or a device must not be opened). `setxattrat(2)` is newer (6.13) than the kernels that must work, so this
/// goes through `/proc/self/fd`, whose entry leads to exactly the directory that is open.
pub fn lset_at(dir: impl AsFd, file: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = proc_path(&dir, file)?;
    // SAFETY: both strings are NUL-terminated, `value` is valid for its length.
    check(i64::from(unsafe {
        libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    }))?;
    Ok(())
}

/// The value of one attribute of `file` in `dir`, `None` when it is not set or not supported there.
pub fn lget_at(dir: impl AsFd, file: &CStr, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let path = proc_path(&dir, file)?;
    let value = grow(|buffer| {
        // SAFETY: both strings are NUL-terminated, the buffer is valid for its length (0 asks for the size).
        check(unsafe {
            libc::lgetxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
        } as i64)
    });
    match value {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The names of all attributes of `file` in `dir`, in the file system's order.
pub fn llist_at(dir: impl AsFd, file: &CStr) -> io::Result<Vec<CString>> {
    let path = proc_path(&dir, file)?;
    let names = grow(|buffer| {
        // SAFETY: the path is NUL-terminated, the buffer is valid for its length (0 asks for the size).
        check(unsafe { libc::llistxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
    });
    let names = match names {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let names = names.split(|&b| b == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

fn proc_path(dir: &impl AsFd, file: &CStr) -> io::Result<CString> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()).into_bytes();
    path.extend_from_slice(file.to_bytes());
    CString::new(path).map_err(io::Error::other)
}

/// Asks for the size, then for the value, until both agree; another process may change it in between.
fn grow(read: impl Fn(&mut [u8]) -> io::Result<i64>) -> io::Result<Vec<u8>> {
    loop {
        let size = read(&mut [])?;
        if size == 0 {
            return Ok(Vec::new());
        }
        let mut buffer = vec![0; size as usize];
        match read(&mut buffer) {
            Ok(n) => {
                buffer.truncate(n as usize);
                return Ok(buffer);
            }
            Err(e) if e.raw_os_error() == Some(libc::ERANGE) => {}
            Err(e) => return Err(e),
        }
    }
}
