//! What `openat2` does, for kernels and sandboxes without it: one part of the path at a time, each by a descriptor.
//!
//! `..` goes back to the directory that was passed on the way, never to what its parent is by now, so nothing that is
//! moved or exchanged meanwhile can lead outside. Nothing here allocates.

use crate::file::{
    PROC_SUPER_MAGIC, RESOLVE_BENEATH, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV, fs_type, fstat, openat, readlinkat,
};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// As the kernel's own limit (`MAXSYMLINKS`).
const LINKS: u32 = 40;
/// Deeper directories are refused: each open one takes a descriptor.
const DEPTH: usize = 64;
/// `PATH_MAX`: for what is left of the path, with the text of links put before it.
const PATH: usize = 4096;
/// The inode of the root of a procfs, whose links (`self`, `mounts`) are plain text.
const PROC_ROOT: u64 = 1;

/// What is left to walk, at the end of the buffer.
struct Rest {
    bytes: [u8; PATH],
    start: usize,
}

impl Rest {
    fn push_front(&mut self, text: &[u8]) -> io::Result<()> {
        let start = self.start.checked_sub(text.len() + 1).ok_or(error(libc::ENAMETOOLONG))?;
        self.bytes[start..start + text.len()].copy_from_slice(text);
        self.bytes[start + text.len()] = b'/';
        self.start = start;
        Ok(())
    }

    /// The next part with a terminating zero in place of its slash.
    fn next(&mut self) -> Option<(usize, usize)> {
        while self.bytes.get(self.start) == Some(&b'/') {
            self.start += 1;
        }
        let len = self.bytes[self.start..].iter().position(|b| *b == b'/')?;
        let found = (self.start, self.start + len);
        self.bytes[found.1] = 0;
        self.start = found.1 + 1;
        (len > 0).then_some(found)
    }

    fn is_empty(&self) -> bool {
        self.bytes[self.start..].iter().all(|b| *b == b'/')
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

pub(crate) fn open(
    root: BorrowedFd<'_>,
    path: &CStr,
    flags: i32,
    mode: u32,
    resolve: u64,
) -> io::Result<OwnedFd> {
    let known =
        RESOLVE_BENEATH | RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV;
    if resolve & !known != 0 || resolve & (RESOLVE_BENEATH | RESOLVE_IN_ROOT) == 0 {
        return Err(error(libc::EINVAL));
    }
    let inside = resolve & RESOLVE_IN_ROOT != 0;
    let device = fstat(root)?.dev;
    // The last part must then be a directory, and is followed.
    let slash = path.to_bytes().ends_with(b"/");
    let mut rest = Rest { bytes: [b'/'; PATH], start: PATH };
    if path.to_bytes().starts_with(b"/") && !inside {
        return Err(error(libc::EXDEV));
    }
    rest.push_front(path.to_bytes())?;
    let mut stack: [Option<OwnedFd>; DEPTH] = [const { None }; DEPTH];
    let mut depth = 0;
    let mut links = 0;
    while let Some((from, to)) = rest.next() {
        let mut name = [0u8; 256];
        let place = name.get_mut(..to - from).filter(|n| n.len() < 256).ok_or(error(libc::ENAMETOOLONG))?;
        place.copy_from_slice(&rest.bytes[from..to]);
        let name = CStr::from_bytes_until_nul(&name).map_err(|_| error(libc::EINVAL))?;
        if name == c"." {
            continue;
        }
        if name == c".." {
            match depth {
                0 if inside => {}
                0 => return Err(error(libc::EXDEV)),
                _ => {
                    depth -= 1;
                    stack[depth] = None;
                }
            }
            continue;
        }
        let here = stack[..depth].last().and_then(Option::as_ref).map_or(root, AsFd::as_fd);
        let last = rest.is_empty();
        let found = match openat(here, name, libc::O_PATH | libc::O_NOFOLLOW, 0) {
            Err(e) if last && flags & libc::O_CREAT != 0 && e.raw_os_error() == Some(libc::ENOENT) => {
                return openat(here, name, flags | libc::O_NOFOLLOW, mode);
            }
            other => other?,
        };
        let st = fstat(&found)?;
        if resolve & RESOLVE_NO_XDEV != 0 && st.dev != device {
            return Err(error(libc::EXDEV));
        }
        if st.is_symlink() && !(last && !slash && flags & libc::O_NOFOLLOW != 0) {
            links += 1;
            if resolve & RESOLVE_NO_SYMLINKS != 0 || links > LINKS {
                return Err(error(libc::ELOOP));
            }
            let magic = fs_type(&found)? == PROC_SUPER_MAGIC && fstat(here)?.ino != PROC_ROOT;
            if magic {
                // Its text is not what it leads to.
                return Err(error(libc::ELOOP));
            }
            let mut text = [0u8; PATH];
            let text = readlinkat(&found, c"", &mut text)?;
            if text.starts_with(b"/") {
                if !inside {
                    return Err(error(libc::EXDEV));
                }
                stack[..depth].fill_with(|| None);
                depth = 0;
            }
            rest.push_front(text)?;
            continue;
        }
        if last {
            if (flags & libc::O_DIRECTORY != 0 || slash) && !st.is_dir() {
                return Err(error(libc::ENOTDIR));
            }
            if flags & libc::O_PATH != 0 {
                return Ok(found);
            }
            let opened = openat(here, name, flags | libc::O_NOFOLLOW, mode)?;
            // What was judged is what was opened.
            let now = fstat(&opened)?;
            return if (now.dev, now.ino) == (st.dev, st.ino) {
                Ok(opened)
            } else {
                Err(error(libc::EAGAIN))
            };
        }
        if !st.is_dir() {
            return Err(error(libc::ENOTDIR));
        }
        *stack.get_mut(depth).ok_or(error(libc::ENAMETOOLONG))? = Some(found);
        depth += 1;
    }
    // The path ended in `.`, `..` or nothing: the directory itself.
    let here = stack[..depth].last().and_then(Option::as_ref).map_or(root, AsFd::as_fd);
    openat(here, c".", flags & !(libc::O_NOFOLLOW | libc::O_CREAT), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file;
    use std::os::unix::fs::symlink;

    /// The same file or the same error as the kernel's call, for every path and every combination of flags.
    #[test]
    fn the_walk_finds_what_openat2_finds() {
        let dir = std::env::temp_dir().join(format!("keel-walk-{}", std::process::id()));
        let root = dir.join("root");
        std::fs::create_dir_all(root.join("a/b/c")).unwrap();
        std::fs::write(root.join("a/file"), "").unwrap();
        std::fs::write(dir.join("outside"), "").unwrap();
        for (to, link) in [
            ("/a", "absolute"),
            ("a/b", "relative"),
            ("../../outside", "out"),
            ("/../outside", "out-absolute"),
            ("loop", "loop"),
            ("a/file", "to-file"),
            ("absent", "dangling"),
            ("../file", "a/b/up"),
            ("/proc/self/fd/0", "magic"),
        ] {
            symlink(to, root.join(link)).unwrap();
        }
        std::fs::create_dir(root.join("proc")).unwrap();
        let root_fd =
            file::openat(file::cwd(), &file::c_path(&root).unwrap(), libc::O_PATH | libc::O_DIRECTORY, 0)
                .unwrap();
        let paths = [
            c"",
            c".",
            c"..",
            c"a",
            c"a/",
            c"a/b/c",
            c"/a/b",
            c"a/../a/file",
            c"../outside",
            c"a/../../outside",
            c"absolute/b",
            c"relative/c",
            c"relative/up",
            c"out",
            c"out-absolute",
            c"loop",
            c"loop/x",
            c"to-file",
            c"to-file/x",
            c"a/file/",
            c"dangling",
            c"dangling/x",
            c"absent/x",
            c"a/b/../..",
            c"magic",
            c"a//b/./c",
            c"absolute/",
            c"to-file/",
        ];
        let mut compared = 0;
        for path in paths.into_iter().filter(|p| !p.is_empty()) {
            for base in [RESOLVE_IN_ROOT, RESOLVE_BENEATH] {
                for more in [0, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_XDEV] {
                    for flags in [
                        libc::O_PATH,
                        libc::O_PATH | libc::O_NOFOLLOW,
                        libc::O_PATH | libc::O_DIRECTORY,
                        libc::O_RDONLY | libc::O_NONBLOCK,
                    ] {
                        let identity = |opened: io::Result<OwnedFd>| match opened {
                            Ok(fd) => fstat(&fd).map(|st| (st.dev, st.ino)).map_err(|e| e.raw_os_error()),
                            Err(e) => Err(e.raw_os_error()),
                        };
                        let kernel = file::openat2(&root_fd, path, flags, 0, base | more);
                        let walked = open(root_fd.as_fd(), path, flags, 0, base | more);
                        assert_eq!(
                            identity(walked),
                            identity(kernel),
                            "{path:?} {flags:#o} {:#x}",
                            base | more
                        );
                        compared += 1;
                    }
                }
            }
        }
        assert_eq!(compared, (paths.len() - 1) * 2 * 4 * 4);
        // Files below a procfs are no way out either.
        let slash = file::openat(file::cwd(), c"/", libc::O_PATH | libc::O_DIRECTORY, 0).unwrap();
        for path in [c"proc/self/root/etc", c"proc/self/fd/0", c"proc/self/exe"] {
            let walked = open(slash.as_fd(), path, libc::O_PATH, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
            assert_eq!(walked.unwrap_err().raw_os_error(), Some(libc::ELOOP), "{path:?}");
        }
        assert!(open(slash.as_fd(), c"proc/self/status", libc::O_RDONLY, 0, RESOLVE_IN_ROOT).is_ok());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
