//! Applies one tar stream to a directory that becomes an overlay lower.
//!
//! Everything is done by name in a directory that is held open, after the name was checked to be one component:
//! the kernel never resolves a path that the image wrote, and never follows a link of it. Links in the middle of a
//! path (a layer that holds both `lib -> usr/lib` and `lib/x`) are read and taken apart here, inside the root.
//!
//! A layer is unpacked without its parents, so that layers can be unpacked in any order and shared by all images.
//! What needs a parent (a directory that the layer does not describe, a hard link into a lower layer) is reported in
//! [`Unpacked`] and settled when an image is put together.

use crate::census::{self, Census, Seen};
use crate::fsio::FsError;
use crate::path::{LayerPath, PathError, show};
use crate::stream::{LayerStream, Sums};
use crate::tar::{Entry, Kind, Sparse, TarError, TarReader};
use crate::tree;
use keel_sys::{file, writeback, xattr};
use nix::fcntl::AtFlags;
use nix::sys::stat::UtimensatFlags;
use nix::sys::time::TimeSpec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Directories with this attribute hide what lower layers have at the same place.
pub(crate) const OPAQUE: &CStr = c"trusted.overlay.opaque";

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
/// Other names of aufs' own (`.wh..wh.plnk`, `.wh..wh.aufs`); they mean nothing outside aufs.
const AUFS_MARK: &[u8] = b".wh..wh.";

/// Links read while resolving one path; the kernel's own limit.
const MAX_LINKS: usize = 40;
/// Runs of zeros this long become holes. Smaller ones would cost an extent each.
const MIN_HOLE: usize = 64 * 1024;
/// Write-back of a file this long starts when it is closed, so that the final `syncfs` finds less to do; for
/// smaller ones the call costs more than it saves.
const WRITEBACK_FROM: u64 = 256 * 1024;
/// `mtime` beyond 2^33 (the year 2242) is a broken writer; ext4 ends at 2^34.
const MAX_MTIME: i64 = 1 << 33;
/// Free space and inodes are looked at after this many bytes or entries.
const SPACE_CHECK_BYTES: u64 = 64 << 20;
const SPACE_CHECK_ENTRIES: u64 = 8192;
/// Unpacking stops before the disk is full to the last block: the daemon's own records must still fit.
const SPACE_RESERVE: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    #[error("entry {path:?}")]
    Path {
        path: String,
        #[source]
        source: PathError,
    },
    #[error("entry {path:?}: {problem}")]
    Entry { path: String, problem: String },
    #[error("entry {path:?}: cannot {op}")]
    Io {
        op: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("layer has more than {0} entries")]
    TooManyEntries(u64),
    #[error("unpacking takes more than {} s of processor time", .0.as_secs())]
    TooLong(Duration),
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// What was made, and what is left to do with the layers below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) entries: u64,
    /// Sum of the lengths of all files.
    pub(crate) bytes: u64,
    pub(crate) census: Census,
    /// The layer hides everything below it. Overlay has no mark for this on a root, the mount leaves lowers out.
    pub(crate) opaque_root: bool,
    /// Directories that exist only because something is in them.
    pub(crate) implicit_dirs: BTreeSet<Vec<u8>>,
    /// Link path to target path: hard links to files that are not in this layer.
    pub(crate) lower_links: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Things an image may not say, by what they are, with their count.
    pub(crate) dropped: BTreeMap<&'static str, u64>,
}

pub(crate) struct Limits {
    pub(crate) max_entries: u64,
    pub(crate) max_cpu: Duration,
}

/// Unpacks `stream` into the empty directory `root` and reads the stream to its end.
pub(crate) fn unpack<R: Read>(
    stream: LayerStream<R>,
    root: OwnedFd,
    root_path: &Path,
    limits: &Limits,
) -> Result<(Unpacked, Sums), UnpackError> {
    let mut tar = TarReader::new(stream);
    let mut target = Unpacker::new(root);
    let started = thread_cpu();
    while let Some(entry) = tar.next_entry()? {
        target.done.entries += 1;
        if target.done.entries > limits.max_entries {
            return Err(UnpackError::TooManyEntries(limits.max_entries));
        }
        target.apply(&entry, &mut tar)?;
        if target.is_time_to_look() {
            crate::space::require(target.root.as_fd(), root_path, SPACE_RESERVE, 16)?;
            if thread_cpu().saturating_sub(started) > limits.max_cpu {
                return Err(UnpackError::TooLong(limits.max_cpu));
            }
        }
    }
    let done = target.finish()?;
    let sums = tar.into_input().drain().map_err(UnpackError::Read)?;
    Ok((done, sums))
}

struct Unpacker {
    root: OwnedFd,
    done: Unpacked,
    /// The directory of the entry before: archives are sorted by directory, so nearly every entry is one `openat`.
    current: Option<Parent>,
    /// Directories that entries describe. Their times are set last, because every entry made in them changes those.
    dirs: BTreeMap<Vec<u8>, DirEntry>,
    /// Something was replaced, so the census has to be taken from what is there in the end.
    recount: bool,
    umask: u32,
    unchecked_bytes: u64,
}

struct DirEntry {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
}

/// An open directory of the layer.
struct Parent {
    /// As entries name it, perhaps through links of this layer.
    logical: Vec<u8>,
    /// Where it really is.
    physical: Vec<u8>,
    fd: OwnedFd,
    /// New files get the directory's group, so the group must be set even when it is 0.
    setgid: bool,
}

impl Unpacker {
    fn new(root: OwnedFd) -> Unpacker {
        Unpacker {
            root,
            // The root too is only described when an entry does.
            done: Unpacked { implicit_dirs: [Vec::new()].into(), ..Unpacked::default() },
            current: None,
            dirs: BTreeMap::new(),
            recount: false,
            umask: umask(),
            unchecked_bytes: 0,
        }
    }

    fn apply<R: io::BufRead>(&mut self, entry: &Entry, tar: &mut TarReader<R>) -> Result<(), UnpackError> {
        let path = LayerPath::parse(&entry.path)
            .map_err(|source| UnpackError::Path { path: show(&entry.path), source })?;
        let Some(path) = path else {
            return self.apply_root(entry);
        };
        if self.whiteout(&path)? {
            return Ok(());
        }
        match entry.kind {
            Kind::Dir => self.dir(&path, entry),
            Kind::File => self.file(&path, entry, tar),
            Kind::HardLink => self.hard_link(&path, entry),
            Kind::Symlink => self.symlink(&path, entry),
            Kind::Char if entry.device == (0, 0) => {
                // Overlay's own whiteout: an image that could make one would hide files without saying so.
                self.count_dropped("character device 0:0");
                Ok(())
            }
            Kind::Char | Kind::Block | Kind::Fifo => self.special(&path, entry),
        }
    }

    /// The root takes the attributes of its entry and keeps being a directory whatever the entry is.
    fn apply_root(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        if entry.kind != Kind::Dir {
            self.count_dropped("root that is not a directory");
            return Ok(());
        }
        let (uid, gid) = owner(entry)?;
        let root = self.root.as_fd();
        at(entry, "change the owner", file::fchownat(root, c".", uid, gid, libc::AT_SYMLINK_NOFOLLOW))?;
        let root = self.root.try_clone().map_err(|e| io_error(entry, "open the root", e))?;
        self.xattrs(root.as_fd(), c".", entry)?;
        at(entry, "change the mode", file::fchmodat(root.as_fd(), c".", entry.mode))?;
        self.dirs.insert(Vec::new(), DirEntry { mode: entry.mode, uid, gid, mtime: entry.mtime });
        self.done.implicit_dirs.remove(&b""[..]);
        Ok(())
    }

    /// Whether the entry was a whiteout (or aufs' own) and is dealt with.
    fn whiteout(&mut self, path: &LayerPath) -> Result<bool, UnpackError> {
        let bad = |problem: &str| {
            Err(UnpackError::Entry { path: show(&path.to_bytes()), problem: problem.to_owned() })
        };
        for parent in path.parent().to_bytes().split(|&b| b == b'/') {
            if parent.starts_with(AUFS_MARK) {
                self.count_dropped("aufs bookkeeping");
                return Ok(true);
            }
            if parent.starts_with(WHITEOUT) {
                return bad("a whiteout cannot be a directory");
            }
        }
        let Some(hidden) = path.name().to_bytes().strip_prefix(WHITEOUT) else {
            return Ok(false);
        };
        if path.name().to_bytes() == OPAQUE_MARK {
            self.opaque(path)?;
            return Ok(true);
        }
        match hidden {
            // With the prefix gone these name nothing, the directory itself, or its parent.
            b"" | b"." | b".." => return bad("a whiteout of nothing"),
            _ if hidden.starts_with(WHITEOUT) => {
                self.count_dropped("aufs bookkeeping");
                return Ok(true);
            }
            _ => {}
        }
        let parent = self.open_parent(path)?;
        let hidden = LayerPath::join(&parent.physical, hidden);
        self.hide(&hidden)?;
        Ok(true)
    }

    /// Whiteouts are for lower layers only: what this layer has at the place stays, before or after the mark.
    fn hide(&mut self, path: &LayerPath) -> Result<(), UnpackError> {
        let parent = self.open_parent(path)?;
        match file::mknodat(parent.fd, path.name(), libc::S_IFCHR, 0, 0) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                let stat = stat(parent.fd, path)?;
                if stat.is_dir() {
                    set_opaque(parent.fd, path)?;
                }
                Ok(())
            }
            other => {
                path_at(path, "make the whiteout", other)?;
                self.count(path)
            }
        }
    }

    fn opaque(&mut self, mark: &LayerPath) -> Result<(), UnpackError> {
        if mark.parent().is_empty() {
            self.done.opaque_root = true;
            return Ok(());
        }
        let parent = self.open_parent(mark)?;
        if parent.physical.is_empty() {
            self.done.opaque_root = true;
            return Ok(());
        }
        path_at(mark, "mark the directory opaque", xattr::lset_at(parent.fd, c".", OPAQUE, b"y"))
    }

    fn dir(&mut self, path: &LayerPath, entry: &Entry) -> Result<(), UnpackError> {
        let parent = self.open_parent(path)?;
        let real = LayerPath::join(&parent.physical, path.name().to_bytes());
        let create_mode = entry.mode & 0o777;
        let made = match file::mkdirat(parent.fd, path.name(), create_mode) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                if stat(parent.fd, path)?.is_dir() {
                    false
                } else {
                    self.remove(&real)?;
                    let parent = self.open_parent(path)?;
                    path_at(
                        path,
                        "create the directory",
                        file::mkdirat(parent.fd, path.name(), create_mode),
                    )?;
                    // What lower layers have here was hidden by the thing that this directory replaces.
                    set_opaque(parent.fd, path)?;
                    true
                }
            }
            other => path_at(path, "create the directory", other).map(|()| true)?,
        };
        let parent = self.open_parent(path)?;
        let fd = parent.fd.try_clone_to_owned().map_err(|e| io_error(entry, "open the directory", e))?;
        let (uid, gid) = owner(entry)?;
        let setgid = parent.setgid;
        if (uid, gid) != (0, 0) || setgid || !made {
            at(
                entry,
                "change the owner",
                file::fchownat(&fd, path.name(), uid, gid, libc::AT_SYMLINK_NOFOLLOW),
            )?;
        }
        self.xattrs(fd.as_fd(), path.name(), entry)?;
        // A group that is inherited comes with its bit.
        if !made || setgid || entry.mode != create_mode || entry.mode & self.umask != 0 {
            at(entry, "change the mode", file::fchmodat(&fd, path.name(), entry.mode))?;
        }
        let key = real.to_bytes();
        if let Some(current) = &mut self.current
            && current.physical == key
        {
            current.setgid = entry.mode & libc::S_ISGID != 0;
        }
        self.done.implicit_dirs.remove(&key);
        self.done.lower_links.remove(&key);
        self.dirs.insert(key, DirEntry { mode: entry.mode, uid, gid, mtime: entry.mtime });
        Ok(())
    }

    fn file<R: io::BufRead>(
        &mut self,
        path: &LayerPath,
        entry: &Entry,
        tar: &mut TarReader<R>,
    ) -> Result<(), UnpackError> {
        let (uid, gid) = owner(entry)?;
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY | libc::O_NOFOLLOW;
        let create_mode = entry.mode & 0o777;
        let create = |parent: BorrowedFd<'_>| file::openat(parent, path.name(), flags, create_mode);
        let mut parent = self.open_parent(path)?;
        let fd = match create(parent.fd) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                let real = LayerPath::join(&parent.physical, path.name().to_bytes());
                self.remove(&real)?;
                parent = self.open_parent(path)?;
                at(entry, "create the file", create(parent.fd))?
            }
            other => at(entry, "create the file", other)?,
        };
        let setgid = parent.setgid;
        let real = tree::join(&parent.physical, path.name().to_bytes());
        self.done.lower_links.remove(&real);
        let file = File::from(fd);
        let (len, crc) = match &entry.sparse {
            Some(sparse) => write_sparse(&file, sparse, entry, tar)?,
            None => write_data(&file, entry, tar)?,
        };
        // In this order: a change of owner clears set-id bits and capabilities.
        let chowned = (uid, gid) != (0, 0) || setgid;
        if chowned {
            at(entry, "change the owner", std::os::unix::fs::fchown(&file, Some(uid), Some(gid)))?;
        }
        for (name, value) in self.allowed_xattrs(entry) {
            set_xattr(entry, &name, |n| xattr::fset(&file, n, value))?;
        }
        if chowned || entry.mode & !0o777 != 0 || entry.mode & self.umask != 0 {
            at(entry, "change the mode", file::fchmod(&file, entry.mode))?;
        }
        let mtime = time_spec(entry.mtime);
        at(entry, "set the time", nix::sys::stat::futimens(&file, &mtime, &mtime).map_err(Into::into))?;
        if len >= WRITEBACK_FROM {
            // A hint only; the sync that counts reports errors.
            let _ = writeback::start(&file);
        }
        let mode = libc::S_IFREG | entry.mode;
        self.done.census.add_name(&real, &Seen { mode, uid, gid, detail: len, link: &[] });
        self.done.census.add_content(len, crc);
        self.done.bytes += len;
        self.unchecked_bytes += entry.size;
        Ok(())
    }

    /// Counts a name by looking at it.
    fn count(&mut self, path: &LayerPath) -> Result<(), UnpackError> {
        let mut census = self.done.census;
        let parent = self.open_parent(path)?;
        let real = tree::join(&parent.physical, path.name().to_bytes());
        path_at(path, "look at", census::add_path(&mut census, parent.fd, path.name(), &real))?;
        self.done.census = census;
        Ok(())
    }

    fn symlink(&mut self, path: &LayerPath, entry: &Entry) -> Result<(), UnpackError> {
        if entry.link.is_empty() {
            return Err(entry_error(entry, "symbolic link to nothing"));
        }
        let target = CString::new(&entry.link[..])
            .map_err(|_| entry_error(entry, "symbolic link target contains a NUL byte"))?;
        self.create(path, entry, "create the symbolic link", |parent| {
            file::symlinkat(&target, parent, path.name())
        })?;
        self.attributes(path, entry, false)
    }

    fn special(&mut self, path: &LayerPath, entry: &Entry) -> Result<(), UnpackError> {
        let (major, minor) = entry.device;
        // The kernel's limits; beyond them the number would wrap into another device.
        if major > 0xfff || minor > 0xf_ffff {
            return Err(entry_error(entry, &format!("device number {major}:{minor} is out of range")));
        }
        let kind = match entry.kind {
            Kind::Char => libc::S_IFCHR,
            Kind::Block => libc::S_IFBLK,
            _ => libc::S_IFIFO,
        };
        let made = self.create(path, entry, "create the device or fifo", |parent| {
            file::mknodat(parent, path.name(), kind | 0o600, major as u32, minor as u32)
        });
        match made {
            // Without CAP_MKNOD device nodes are left out, as every rootless engine does.
            Err(UnpackError::Io { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                self.count_dropped("device without permission to make it");
                Ok(())
            }
            Err(e) => Err(e),
            Ok(()) => self.attributes(path, entry, true),
        }
    }

    fn hard_link(&mut self, path: &LayerPath, entry: &Entry) -> Result<(), UnpackError> {
        let target = LayerPath::parse(&entry.link)
            .map_err(|source| UnpackError::Path { path: show(&entry.link), source })?
            .ok_or_else(|| entry_error(entry, "hard link to the root directory"))?;
        let found = self.find(&target)?;
        let Found::Here(target_dir, target) = found else {
            let Found::Below(target) = found else {
                return Err(entry_error(
                    entry,
                    "hard link whose target is below something that is no directory",
                ));
            };
            // Not in this layer: a lower one must have it. What is at the link's place gives way.
            let parent = self.open_parent(path)?;
            let real = LayerPath::join(&parent.physical, path.name().to_bytes());
            if file::fstatat(parent.fd, path.name(), libc::AT_SYMLINK_NOFOLLOW).is_ok() {
                self.remove(&real)?;
            }
            let target = target.to_bytes();
            let target = self.done.lower_links.get(&target).cloned().unwrap_or(target);
            self.done.lower_links.insert(real.to_bytes(), target);
            return Ok(());
        };
        let target_stat = at(
            entry,
            "look at the target",
            file::fstatat(&target_dir, target.name(), libc::AT_SYMLINK_NOFOLLOW),
        )?;
        if target_stat.is_dir() {
            return Err(entry_error(entry, "hard link to a directory"));
        }
        let parent = self.open_parent(path)?;
        if let Ok(here) = file::fstatat(parent.fd, path.name(), libc::AT_SYMLINK_NOFOLLOW)
            && (here.dev, here.ino) == (target_stat.dev, target_stat.ino)
        {
            return Ok(());
        }
        self.create(path, entry, "create the hard link", |parent| {
            nix::unistd::linkat(&target_dir, target.name(), parent, path.name(), AtFlags::empty())
                .map_err(Into::into)
        })?;
        self.count(path)
    }

    /// Makes something that is not a directory; what is in its place goes.
    fn create(
        &mut self,
        path: &LayerPath,
        entry: &Entry,
        op: &'static str,
        make: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<(), UnpackError> {
        let parent = self.open_parent(path)?;
        let real = LayerPath::join(&parent.physical, path.name().to_bytes());
        match make(parent.fd) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                self.remove(&real)?;
                let parent = self.open_parent(path)?;
                at(entry, op, make(parent.fd))?;
            }
            other => at(entry, op, other)?,
        }
        self.done.lower_links.remove(&real.to_bytes());
        Ok(())
    }

    /// Owner, extended attributes, mode and time of something that cannot be opened.
    fn attributes(&mut self, path: &LayerPath, entry: &Entry, has_mode: bool) -> Result<(), UnpackError> {
        let (uid, gid) = owner(entry)?;
        let parent = self.open_parent(path)?;
        let fd = parent.fd.try_clone_to_owned().map_err(|e| io_error(entry, "open the directory", e))?;
        at(entry, "change the owner", file::fchownat(&fd, path.name(), uid, gid, libc::AT_SYMLINK_NOFOLLOW))?;
        self.xattrs(fd.as_fd(), path.name(), entry)?;
        if has_mode {
            at(entry, "change the mode", file::fchmodat(&fd, path.name(), entry.mode))?;
        }
        let mtime = time_spec(entry.mtime);
        let set =
            nix::sys::stat::utimensat(&fd, path.name(), &mtime, &mtime, UtimensatFlags::NoFollowSymlink);
        at(entry, "set the time", set.map_err(Into::into))?;
        self.count(path)
    }

    fn xattrs(&mut self, dir: BorrowedFd<'_>, name: &CStr, entry: &Entry) -> Result<(), UnpackError> {
        for (key, value) in self.allowed_xattrs(entry) {
            set_xattr(entry, &key, |n| xattr::lset_at(dir, name, n, value))?;
        }
        Ok(())
    }

    /// An image may say what a file is, not what overlay, the integrity or the labelling system think of it.
    fn allowed_xattrs<'e>(&mut self, entry: &'e Entry) -> Vec<(CString, &'e [u8])> {
        let mut allowed = Vec::new();
        for (name, value) in &entry.xattrs {
            match xattr_policy(name) {
                None => self.count_dropped("extended attribute that an image may not set"),
                // A name with a NUL cannot be set by anyone.
                Some(name) => allowed.extend(CString::new(name).ok().map(|name| (name, &value[..]))),
            }
        }
        allowed
    }

    /// Removes what is at `real`, with everything below it.
    fn remove(&mut self, real: &LayerPath) -> Result<(), UnpackError> {
        let parent = self.open_parent(real)?;
        let removed = path_at(real, "remove the entry in its place", tree::remove(parent.fd, real.name()));
        // The directory held open may be gone, or be reached by another path now.
        self.current = None;
        let key = real.to_bytes();
        let below = |other: &Vec<u8>| {
            other.strip_prefix(&key[..]).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        self.done.implicit_dirs.retain(|path| !below(path));
        self.done.lower_links.retain(|path, _| !below(path));
        self.dirs.retain(|path, _| !below(path));
        self.recount = true;
        removed
    }

    /// The directory that `path` is to be made in; directories that are missing are made.
    fn open_parent(&mut self, path: &LayerPath) -> Result<OpenParent<'_>, UnpackError> {
        let logical = path.parent().to_bytes();
        if logical.is_empty() {
            // A set-group-id root is made so by an entry of the image; set the group always.
            return Ok(OpenParent { fd: self.root.as_fd(), physical: Vec::new(), setgid: true });
        }
        if self.current.as_ref().is_none_or(|current| current.logical != logical) {
            let (fd, physical) = match open_plain(self.root.as_fd(), path.parent()) {
                Ok(fd) => (fd, logical.to_vec()),
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => {
                    self.walk(path, true)?.ok_or_else(|| UnpackError::Entry {
                        path: show(&path.to_bytes()),
                        problem: "no parent".into(),
                    })?
                }
                Err(e) => return path_at(path, "open the directory", Err(e)),
            };
            let stat = path_at(path, "look at the directory", file::fstat(&fd))?;
            let setgid = stat.mode & libc::S_ISGID != 0;
            self.current = Some(Parent { logical: logical.to_vec(), physical, fd, setgid });
        }
        let Some(current) = &self.current else { unreachable!("set above") };
        Ok(OpenParent { fd: current.fd.as_fd(), physical: current.physical.clone(), setgid: current.setgid })
    }

    /// Where the target of a hard link is, without making anything.
    fn find(&mut self, target: &LayerPath) -> Result<Found, UnpackError> {
        let opened = if target.parent().is_empty() {
            Some((self.open_root(target)?, Vec::new()))
        } else {
            match open_plain(self.root.as_fd(), target.parent()) {
                Ok(fd) => Some((fd, target.parent().to_bytes().to_vec())),
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => {
                    self.walk(target, false)?
                }
                Err(e) => return path_at(target, "open the directory", Err(e)),
            }
        };
        let Some((fd, physical)) = opened else { return Ok(Found::Below(target.clone())) };
        let real = LayerPath::join(&physical, target.name().to_bytes());
        match file::fstatat(&fd, real.name(), libc::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.is_char_device(0, 0) => Ok(Found::Below(real)),
            Ok(_) => Ok(Found::Here(fd, real)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Found::Below(real)),
            Err(e) => path_at(target, "look at the link target", Err(e)),
        }
    }

    /// The slow way to a parent directory, name by name: makes what is missing (`None` when it may not), takes links
    /// of this layer apart inside the root.
    fn walk(&mut self, path: &LayerPath, make: bool) -> Result<Option<(OwnedFd, Vec<u8>)>, UnpackError> {
        let fail = |problem: &str| {
            Err(UnpackError::Entry { path: show(&path.to_bytes()), problem: problem.to_owned() })
        };
        let parent = path.parent().to_bytes();
        let mut todo: VecDeque<Vec<u8>> = parent.split(|&b| b == b'/').map(<[u8]>::to_vec).collect();
        // Where it is so far: one descriptor, however deep.
        let (mut at, mut dir) = (Vec::new(), self.open_root(path)?);
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    at.truncate(at.iter().rposition(|&b| b == b'/').unwrap_or(0));
                    let above = tree::open_dir(self.root.as_fd(), &at);
                    dir = path_at(path, "open the directory", above)?;
                    continue;
                }
                _ => {}
            }
            let physical = tree::join(&at, &name);
            let here = match LayerPath::parse(&physical) {
                Ok(Some(here)) => here,
                Ok(None) => continue,
                Err(source) => return Err(UnpackError::Path { path: show(&physical), source }),
            };
            let opened = file::openat(&dir, here.name(), libc::O_PATH | libc::O_NOFOLLOW, 0);
            let (fd, hidden) = match opened {
                Ok(fd) => {
                    let stat = path_at(&here, "look at", file::fstat(&fd))?;
                    if stat.is_dir() {
                        (at, dir) = (physical, fd);
                        continue;
                    }
                    if stat.is_symlink() {
                        links += 1;
                        if links > MAX_LINKS {
                            return fail("too many symbolic links in its path");
                        }
                        let mut buffer = [0; libc::PATH_MAX as usize];
                        let target =
                            path_at(&here, "read the link", file::readlinkat(&fd, c"", &mut buffer))?;
                        if target.starts_with(b"/") {
                            (at, dir) = (Vec::new(), self.open_root(path)?);
                        }
                        for part in target.split(|&b| b == b'/').rev() {
                            todo.push_front(part.to_vec());
                        }
                        continue;
                    }
                    (None, stat.is_char_device(0, 0))
                }
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => (Some(()), false),
                Err(e) => return path_at(&here, "open the directory", Err(e)),
            };
            if !make {
                return Ok(None);
            }
            if fd.is_none() {
                if !hidden {
                    return fail("its parent is not a directory");
                }
                path_at(&here, "replace the whiteout", file::unlinkat(&dir, here.name(), 0))?;
                self.recount = true;
            }
            path_at(&here, "create the directory", file::mkdirat(&dir, here.name(), 0o755))?;
            path_at(
                &here,
                "change the owner",
                file::fchownat(&dir, here.name(), 0, 0, libc::AT_SYMLINK_NOFOLLOW),
            )?;
            path_at(&here, "change the mode", file::fchmodat(&dir, here.name(), 0o755))?;
            if hidden {
                set_opaque(dir.as_fd(), &here)?;
            }
            let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
            let fd = path_at(&here, "open the directory", file::openat(&dir, here.name(), flags, 0))?;
            self.done.implicit_dirs.insert(physical.clone());
            (at, dir) = (physical, fd);
        }
        Ok(Some((dir, at)))
    }

    fn open_root(&self, path: &LayerPath) -> Result<OwnedFd, UnpackError> {
        path_at(path, "open the root", self.root.try_clone())
    }

    /// Now and then: is the disk nearly full (then unpacking stops with the error that a full one would give), does
    /// it take too long.
    fn is_time_to_look(&mut self) -> bool {
        let due = self.unchecked_bytes >= SPACE_CHECK_BYTES
            || self.done.entries.is_multiple_of(SPACE_CHECK_ENTRIES);
        if due {
            self.unchecked_bytes = 0;
        }
        due
    }

    /// Directory times, deepest first (setting one changes nothing above it, but the order costs nothing), and the
    /// directories' part of the census.
    fn finish(mut self) -> Result<Unpacked, UnpackError> {
        for (path, dir) in std::mem::take(&mut self.dirs).iter().rev() {
            let mtime = time_spec(dir.mtime);
            let set = |dir: BorrowedFd<'_>, name: &CStr| -> io::Result<()> {
                Ok(nix::sys::stat::utimensat(dir, name, &mtime, &mtime, UtimensatFlags::NoFollowSymlink)?)
            };
            match LayerPath::parse(path) {
                Ok(Some(name)) => {
                    let parent = self.open_parent(&name)?;
                    path_at(&name, "set the time", set(parent.fd, name.name()))?;
                    let (mode, uid, gid) = (libc::S_IFDIR | dir.mode, dir.uid, dir.gid);
                    self.done.census.add_name(path, &Seen { mode, uid, gid, detail: 0, link: &[] });
                }
                _ => set(self.root.as_fd(), c".").map_err(|source| UnpackError::Io {
                    op: "set the time",
                    path: "/".into(),
                    source,
                })?,
            }
        }
        for path in self.done.implicit_dirs.iter().filter(|path| !path.is_empty()) {
            let seen = Seen { mode: libc::S_IFDIR | 0o755, uid: 0, gid: 0, detail: 0, link: &[] };
            self.done.census.add_name(path, &seen);
        }
        if self.recount {
            let counted = census::take(self.root.as_fd(), true);
            self.done.census =
                counted.map_err(|source| UnpackError::Io { op: "read back", path: "/".into(), source })?;
        }
        Ok(self.done)
    }

    fn count_dropped(&mut self, what: &'static str) {
        *self.done.dropped.entry(what).or_default() += 1;
    }
}

struct OpenParent<'a> {
    fd: BorrowedFd<'a>,
    physical: Vec<u8>,
    setgid: bool,
}

enum Found {
    /// The open directory and the target in it.
    Here(OwnedFd, LayerPath),
    /// Only a lower layer can have it, at this path.
    Below(LayerPath),
}

/// Opens a directory when there is no link on the way to it.
fn open_plain(root: BorrowedFd<'_>, path: &CStr) -> io::Result<OwnedFd> {
    let resolve = file::RESOLVE_BENEATH
        | file::RESOLVE_NO_SYMLINKS
        | file::RESOLVE_NO_MAGICLINKS
        | file::RESOLVE_NO_XDEV;
    file::openat2(root, path, libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0, resolve)
}

/// `None` when images may not set it.
fn xattr_policy(name: &[u8]) -> Option<&[u8]> {
    let refused: [&[u8]; 6] = [
        b"trusted.",
        b"user.overlay.",
        b"security.selinux",
        b"security.ima",
        b"security.evm",
        b"security.apparmor",
    ];
    let known: [&[u8]; 3] = [b"user.", b"security.", b"system.posix_acl_"];
    let allowed = known.iter().any(|prefix| name.starts_with(prefix))
        && !refused.iter().any(|prefix| name.starts_with(prefix));
    allowed.then_some(name)
}

fn set_xattr(entry: &Entry, name: &CStr, set: impl Fn(&CStr) -> io::Result<()>) -> Result<(), UnpackError> {
    match set(name) {
        // The file system has no such attributes (tmpfs and `user.`): the file is worth more than its attribute.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        // ext4 says "no space" for a value that is longer than a block.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::ERANGE | libc::E2BIG)) => {
            let name = show(name.to_bytes());
            Err(entry_error(entry, &format!("extended attribute {name} does not fit the file system")))
        }
        other => at(entry, "set an extended attribute", other),
    }
}

fn set_opaque(parent: BorrowedFd<'_>, path: &LayerPath) -> Result<(), UnpackError> {
    path_at(path, "mark the directory opaque", xattr::lset_at(parent, path.name(), OPAQUE, b"y"))
}

fn stat(parent: BorrowedFd<'_>, path: &LayerPath) -> Result<file::Stat, UnpackError> {
    path_at(path, "look at", file::fstatat(parent, path.name(), libc::AT_SYMLINK_NOFOLLOW))
}

/// Owner of an entry. -1 means "do not change" to the kernel; every engine ends up with root for it.
fn owner(entry: &Entry) -> Result<(u32, u32), UnpackError> {
    let id = |id: u64| match u32::try_from(id) {
        Ok(u32::MAX) => Ok(0),
        Ok(id) => Ok(id),
        Err(_) => Err(entry_error(entry, &format!("owner {id} is out of range"))),
    };
    Ok((id(entry.uid)?, id(entry.gid)?))
}

pub(crate) fn time_spec((seconds, nanos): (i64, u32)) -> TimeSpec {
    match seconds {
        ..0 => TimeSpec::new(0, 0),
        0..MAX_MTIME => TimeSpec::new(seconds, i64::from(nanos)),
        _ => TimeSpec::new(MAX_MTIME, 0),
    }
}

/// Copies the data to the file, leaving holes for long runs of zeros: length and checksum.
fn write_data<R: io::BufRead>(
    file: &File,
    entry: &Entry,
    tar: &mut TarReader<R>,
) -> Result<(u64, u32), UnpackError> {
    let mut crc = flate2::Crc::new();
    write_region(file, entry, tar, (0, entry.size), &mut crc)?;
    Ok((entry.size, crc.sum()))
}

fn write_sparse<R: io::BufRead>(
    file: &File,
    sparse: &Sparse,
    entry: &Entry,
    tar: &mut TarReader<R>,
) -> Result<(u64, u32), UnpackError> {
    let mut crc = flate2::Crc::new();
    let mut end = 0;
    for &(offset, len) in &sparse.regions {
        census::update_zeros(&mut crc, offset - end);
        write_region(file, entry, tar, (offset, len), &mut crc)?;
        end = offset + len;
    }
    census::update_zeros(&mut crc, sparse.len - end);
    at(entry, "set the length", file.set_len(sparse.len))?;
    Ok((sparse.len, crc.sum()))
}

fn write_region<R: io::BufRead>(
    file: &File,
    entry: &Entry,
    tar: &mut TarReader<R>,
    (start, len): (u64, u64),
    crc: &mut flate2::Crc,
) -> Result<(), UnpackError> {
    let mut done = 0;
    let mut written_to = 0;
    while done < len {
        let n = {
            let piece = tar.data()?;
            let n = (piece.len() as u64).min(len - done) as usize;
            if n == 0 {
                return Err(entry_error(entry, "its data ends early"));
            }
            let piece = &piece[..n];
            crc.update(piece);
            if n < MIN_HOLE || piece[0] != 0 || piece.iter().any(|&b| b != 0) {
                at(entry, "write the file", file.write_all_at(piece, start + done))?;
                written_to = done + n as u64;
            }
            n
        };
        tar.consume(n);
        done += n as u64;
    }
    if written_to < len {
        at(entry, "set the length", file.set_len(start + len))?;
    }
    Ok(())
}

/// Zero where it cannot be read: then there is no limit.
fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}

/// The process's file mode mask, which can otherwise only be read by changing it.
fn umask() -> u32 {
    let all = 0o777;
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return all };
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(all)
}

fn entry_error(entry: &Entry, problem: &str) -> UnpackError {
    UnpackError::Entry { path: show(&entry.path), problem: problem.to_owned() }
}

fn io_error(entry: &Entry, op: &'static str, source: io::Error) -> UnpackError {
    UnpackError::Io { op, path: show(&entry.path), source }
}

fn at<T>(entry: &Entry, op: &'static str, result: io::Result<T>) -> Result<T, UnpackError> {
    result.map_err(|source| io_error(entry, op, source))
}

fn path_at<T>(path: &LayerPath, op: &'static str, result: io::Result<T>) -> Result<T, UnpackError> {
    result.map_err(|source| UnpackError::Io { op, path: show(&path.to_bytes()), source })
}
