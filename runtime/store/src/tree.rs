//! Whole trees, deeper than this process may open directories: every directory is opened by its path from the root
//! of the tree, without following anything.

use keel_sys::file;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Opens a directory of the tree; the root for the empty path. Fails when a link is in the way.
pub(crate) fn open_dir(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let resolve = file::RESOLVE_BENEATH | file::RESOLVE_NO_SYMLINKS | file::RESOLVE_NO_MAGICLINKS;
    let path = if path.is_empty() { CString::from(c".") } else { CString::new(path)? };
    file::openat2(root, &path, flags, 0, resolve)
}

/// Names in a directory, sorted.
pub(crate) fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut listing =
        nix::dir::Dir::from_fd(file::openat(dir, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?)?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort();
    Ok(names)
}

pub(crate) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// Removes a file or a directory with all that is below it.
pub(crate) fn remove(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match file::unlinkat(dir, name, 0) {
        Err(e) if e.raw_os_error() == Some(libc::EISDIR) => {}
        other => return other,
    }
    let root = open_dir(dir, name.to_bytes())?;
    let mut todo = vec![Vec::new()];
    let mut emptied: Vec<Vec<u8>> = Vec::new();
    while let Some(path) = todo.pop() {
        let here = open_dir(root.as_fd(), &path)?;
        for name in names(here.as_fd())? {
            match file::unlinkat(&here, &name, 0) {
                Err(e) if e.raw_os_error() == Some(libc::EISDIR) => todo.push(join(&path, name.to_bytes())),
                Err(e) => return Err(e),
                Ok(()) => {}
            }
        }
        emptied.push(path);
    }
    // Parents were emptied before their children, so the reverse is bottom up.
    for path in emptied.iter().rev().filter(|path| !path.is_empty()) {
        let split = path.iter().rposition(|&b| b == b'/');
        let (parent, name) = match split {
            Some(i) => (&path[..i], &path[i + 1..]),
            None => (&b""[..], &path[..]),
        };
        let parent = open_dir(root.as_fd(), parent)?;
        file::unlinkat(&parent, &CString::new(name)?, libc::AT_REMOVEDIR)?;
    }
    file::unlinkat(dir, name, libc::AT_REMOVEDIR)
}
