//! What layers cannot know of the layers below them, settled when an image is put together.
//!
//! A layer is unpacked alone. Two things in it need the layers below: a directory that it uses but does not describe
//! (which has the attributes that a lower layer gave it, while overlay shows those of the highest directory), and a
//! hard link to a file that only a lower layer has. Both are made up for in one small layer on top of the image,
//! named by the chain it belongs to. Most images need none.

use crate::fsio::{At, FsError};
use crate::layer::{LayerRecord, TemporaryLayer};
use crate::path::{show, unshow};
use crate::unpack::OPAQUE;
use crate::{Digest, Store};
use keel_sys::{file, xattr};
use nix::sys::stat::UtimensatFlags;
use nix::sys::time::TimeSpec;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum FixupError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("layer {layer} has a hard link {link:?} to {target:?}, which neither it nor a layer below has")]
    LinkTarget { layer: Digest, link: String, target: String },
    #[error("cannot {op} {path:?} in the top layer")]
    Io {
        op: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

/// What the top layer has to hold.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Directory to the layer (by position, base first) that describes it. Parents included.
    dirs: BTreeMap<Vec<u8>, usize>,
    /// File to the layer and the path there that it is a copy of.
    files: BTreeMap<Vec<u8>, (usize, Vec<u8>)>,
}

impl Store {
    /// The top layer that an image of these layers (base first) needs, made and staged when it is not there.
    pub(crate) fn fixup(&self, layers: &[LayerRecord]) -> Result<Option<Digest>, FixupError> {
        if layers.iter().all(|layer| layer.implicit_dirs.is_empty() && layer.lower_links.is_empty()) {
            return Ok(None);
        }
        let chain = Chain::open(self, layers)?;
        let plan = chain.plan()?;
        if plan == Plan::default() {
            return Ok(None);
        }
        let ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
        let id = id(&ids);
        if !self.has_layer(&id) {
            let layer = TemporaryLayer::new(&self.inner, id)?;
            let root = layer.path().join("fs");
            DirBuilder::new().mode(0o755).create(&root).at("create", &root)?;
            let handle = File::open(&root).at("open", &root)?;
            let size_bytes = chain.apply(&plan, handle.as_fd())?;
            layer.write_record(&LayerRecord {
                version: 1,
                diff_id: id,
                blob: id,
                entries: (plan.dirs.len() + plan.files.len()) as u64,
                size_bytes,
                census: crate::census::take(handle.as_fd(), true).at("read", &root)?,
                opaque_root: false,
                implicit_dirs: Vec::new(),
                lower_links: BTreeMap::new(),
                dropped: BTreeMap::new(),
            })?;
            layer.stage();
        }
        Ok(Some(id))
    }
}

/// The name of the top layer of a chain, base first.
pub(crate) fn id(chain: &[Digest]) -> Digest {
    let mut name = b"evenkeel fixup layer 1".to_vec();
    for diff_id in chain {
        name.extend_from_slice(diff_id.hex().as_bytes());
    }
    Digest::of(&name)
}

/// The layers of an image, base first, looked at as overlay would.
struct Chain<'a> {
    layers: &'a [LayerRecord],
    roots: Vec<OwnedFd>,
    implicit: Vec<BTreeSet<Vec<u8>>>,
    links: Vec<BTreeMap<Vec<u8>, Vec<u8>>>,
}

/// What a range of layers has at one path.
enum Seen {
    /// Nothing here, and nothing that would hide a lower layer's.
    Untouched,
    /// Hidden, or below something that is no directory.
    Hidden,
    /// A directory: the layers that make it up, highest first, and whether lower layers could add to it.
    Dir(Vec<usize>),
    /// Anything else, in this layer.
    Other(usize),
}

impl<'a> Chain<'a> {
    fn open(store: &Store, layers: &'a [LayerRecord]) -> Result<Chain<'a>, FixupError> {
        let mut chain = Chain { layers, roots: Vec::new(), implicit: Vec::new(), links: Vec::new() };
        for layer in layers {
            let staged = store.inner.state().layers.get(&layer.diff_id).cloned();
            let path: PathBuf = staged.unwrap_or_else(|| store.inner.layer_dir(&layer.diff_id)).join("fs");
            chain.roots.push(File::open(&path).at("open", &path)?.into());
            chain.implicit.push(layer.implicit_dirs.iter().filter_map(|path| unshow(path)).collect());
            let links = layer.lower_links.iter();
            chain.links.push(links.filter_map(|(l, t)| Some((unshow(l)?, unshow(t)?))).collect());
        }
        Ok(chain)
    }

    fn plan(&self) -> Result<Plan, FixupError> {
        let mut plan = Plan::default();
        let all = 0..self.layers.len();
        let undescribed: BTreeSet<&Vec<u8>> = self.implicit.iter().flatten().collect();
        for path in undescribed {
            if let Seen::Dir(holders) = self.look(all.clone(), path)?
                && let Some(by) = self.describer(&holders, path)
                && by != holders[0]
                && !self.same_attributes(by, holders[0], path)?
            {
                plan.dirs.insert(path.clone(), by);
            }
        }
        for (i, links) in self.links.iter().enumerate() {
            for (link, target) in links {
                if !matches!(self.look(i + 1..self.layers.len(), link)?, Seen::Untouched) {
                    continue;
                }
                let found = self.resolve(i, target)?.ok_or_else(|| FixupError::LinkTarget {
                    layer: self.layers[i].diff_id,
                    link: show(link),
                    target: show(target),
                })?;
                plan.files.insert(link.clone(), found);
            }
        }
        // Every directory of the top layer is the highest of its name, so all of them need the right attributes.
        let made: Vec<Vec<u8>> = plan.dirs.keys().chain(plan.files.keys()).cloned().collect();
        for path in made {
            let parents = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| &path[..i]);
            for parent in parents.chain([&b""[..]]) {
                if let Seen::Dir(holders) = self.look(all.clone(), parent)?
                    && !plan.dirs.contains_key(parent)
                {
                    let by = self.describer(&holders, parent).unwrap_or(holders[0]);
                    plan.dirs.insert(parent.to_vec(), by);
                }
            }
        }
        Ok(plan)
    }

    /// The highest of these layers that describes the directory and does not merely use it.
    fn describer(&self, holders: &[usize], path: &[u8]) -> Option<usize> {
        holders.iter().copied().find(|&i| !self.implicit[i].contains(path))
    }

    /// The file that a hard link of layer `below` means: in the highest layer under it, through links of those.
    fn resolve(&self, below: usize, target: &[u8]) -> Result<Option<(usize, Vec<u8>)>, FixupError> {
        for i in (0..below).rev() {
            if let Some(next) = self.links[i].get(target) {
                return self.resolve(i, next);
            }
            match self.look(i..i + 1, target)? {
                Seen::Other(i) => return Ok(Some((i, target.to_vec()))),
                Seen::Untouched => {}
                Seen::Hidden | Seen::Dir(_) => return Ok(None),
            }
            if self.layers[i].opaque_root {
                break;
            }
        }
        Ok(None)
    }

    /// What layers `range` together have at `path`.
    fn look(&self, range: std::ops::Range<usize>, path: &[u8]) -> Result<Seen, FixupError> {
        let mut here: Vec<(usize, OwnedFd)> = Vec::new();
        let mut hidden = false;
        for i in range.rev() {
            here.push((i, self.roots[i].try_clone().map_err(io_at("open", path))?));
            if self.layers[i].opaque_root {
                hidden = true;
                break;
            }
        }
        let names: Vec<&[u8]> = path.split(|&b| b == b'/').filter(|name| !name.is_empty()).collect();
        for (depth, name) in names.iter().enumerate() {
            let is_last = depth + 1 == names.len();
            let name = CString::new(*name).map_err(|e| io_at("open", path)(e.into()))?;
            let mut next = Vec::new();
            for (i, dir) in here {
                let stat = match file::fstatat(&dir, &name, libc::AT_SYMLINK_NOFOLLOW) {
                    Err(e) if e.raw_os_error() == Some(libc::ENOENT) => continue,
                    other => other.map_err(io_at("look at", path))?,
                };
                if !stat.is_dir() {
                    if is_last && next.is_empty() && !stat.is_char_device(0, 0) {
                        return Ok(Seen::Other(i));
                    }
                    hidden = true;
                    break;
                }
                let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
                next.push((i, file::openat(&dir, &name, flags, 0).map_err(io_at("open", path))?));
                let opaque = xattr::lget_at(&dir, &name, OPAQUE).map_err(io_at("look at", path))?;
                if opaque.as_deref() == Some(b"y") {
                    hidden = true;
                    break;
                }
            }
            here = next;
            if here.is_empty() {
                return Ok(if hidden { Seen::Hidden } else { Seen::Untouched });
            }
        }
        Ok(Seen::Dir(here.into_iter().map(|(i, _)| i).collect()))
    }

    fn same_attributes(&self, a: usize, b: usize, path: &[u8]) -> Result<bool, FixupError> {
        let read = |i: usize| -> Result<_, FixupError> {
            let dir = open_inside(self.roots[i].as_fd(), path).map_err(io_at("open", path))?;
            let stat = file::fstatat(&dir, c".", 0).map_err(io_at("look at", path))?;
            let xattrs = read_xattrs(dir.as_fd(), c".").map_err(io_at("read attributes of", path))?;
            Ok((stat.mode, stat.uid, stat.gid, xattrs))
        };
        Ok(read(a)? == read(b)?)
    }

    /// Makes what the plan says in the empty directory `root`; the bytes copied.
    fn apply(&self, plan: &Plan, root: BorrowedFd<'_>) -> Result<u64, FixupError> {
        // Sorted, so parents come first.
        for path in plan.dirs.keys().filter(|path| !path.is_empty()) {
            let (dir, name) = split(root, path).map_err(io_at("open", path))?;
            file::mkdirat(&dir, &name, 0o700).map_err(io_at("create", path))?;
        }
        let mut bytes = 0;
        for (path, (layer, source)) in &plan.files {
            bytes +=
                copy_file(self.roots[*layer].as_fd(), source, root, path).map_err(io_at("copy", path))?;
        }
        for (path, layer) in plan.dirs.iter().rev() {
            let from = open_inside(self.roots[*layer].as_fd(), path).map_err(io_at("open", path))?;
            let to = open_inside(root, path).map_err(io_at("open", path))?;
            copy_attributes(from.as_fd(), c".", to.as_fd(), c".")
                .map_err(io_at("set attributes of", path))?;
        }
        Ok(bytes)
    }
}

fn io_at(op: &'static str, path: &[u8]) -> impl Fn(io::Error) -> FixupError {
    move |source| FixupError::Io { op, path: show(path), source }
}

/// Opens a directory of a layer; no link is followed. The root for the empty path.
fn open_inside(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    if path.is_empty() {
        return root.try_clone_to_owned();
    }
    let path = CString::new(path)?;
    let resolve = file::RESOLVE_BENEATH | file::RESOLVE_NO_SYMLINKS | file::RESOLVE_NO_MAGICLINKS;
    file::openat2(root, &path, libc::O_PATH | libc::O_DIRECTORY, 0, resolve)
}

fn split(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<(OwnedFd, CString)> {
    let (parent, name) = match path.iter().rposition(|&b| b == b'/') {
        Some(i) => (&path[..i], &path[i + 1..]),
        None => (&b""[..], path),
    };
    Ok((open_inside(root, parent)?, CString::new(name)?))
}

/// Copies anything but a directory with all its attributes; the bytes of a regular file.
fn copy_file(from: BorrowedFd<'_>, source: &[u8], to: BorrowedFd<'_>, target: &[u8]) -> io::Result<u64> {
    let (from, source) = split(from, source)?;
    let (to, target) = split(to, target)?;
    let stat = file::fstatat(&from, &source, libc::AT_SYMLINK_NOFOLLOW)?;
    let mut bytes = 0;
    match stat.kind() {
        libc::S_IFREG => {
            let mut input = File::from(file::openat(&from, &source, libc::O_RDONLY | libc::O_NOFOLLOW, 0)?);
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY | libc::O_NOFOLLOW;
            let mut output = File::from(file::openat(&to, &target, flags, 0o600)?);
            bytes = io::copy(&mut input, &mut output)?;
        }
        libc::S_IFLNK => {
            let mut buffer = [0; libc::PATH_MAX as usize];
            let link = CString::new(file::readlinkat(&from, &source, &mut buffer)?)?;
            file::symlinkat(&link, &to, &target)?;
        }
        kind => {
            let (major, minor) = (libc::major(stat.rdev), libc::minor(stat.rdev));
            file::mknodat(&to, &target, kind | 0o600, major, minor)?;
        }
    }
    copy_attributes(from.as_fd(), &source, to.as_fd(), &target)?;
    Ok(bytes)
}

/// Owner, extended attributes, mode and times, in the order in which none undoes another.
fn copy_attributes(from: BorrowedFd<'_>, source: &CStr, to: BorrowedFd<'_>, target: &CStr) -> io::Result<()> {
    let stat = file::fstatat(from, source, libc::AT_SYMLINK_NOFOLLOW)?;
    file::fchownat(to, target, stat.uid, stat.gid, libc::AT_SYMLINK_NOFOLLOW)?;
    for (name, value) in read_xattrs(from, source)? {
        xattr::lset_at(to, target, &name, &value)?;
    }
    if !stat.is_symlink() {
        file::fchmodat(to, target, stat.mode & 0o7777)?;
    }
    let times = nix::sys::stat::fstatat(from, source, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let mtime = TimeSpec::new(times.st_mtime, times.st_mtime_nsec);
    nix::sys::stat::utimensat(to, target, &mtime, &mtime, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

/// Without overlay's own: those say how a layer stacks, not what the file is.
fn read_xattrs(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<BTreeMap<CString, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for key in xattr::llist_at(dir, name)? {
        if !key.to_bytes().starts_with(b"trusted.overlay.")
            && let Some(value) = xattr::lget_at(dir, name, &key)?
        {
            all.insert(key, value);
        }
    }
    Ok(all)
}

/// Gives the root of a fresh writable directory the attributes that `/` of the image has: overlay shows those of the
/// highest directory.
pub(crate) fn adopt_root(lower: &std::path::Path, upper: &std::path::Path) -> Result<(), FsError> {
    let is_empty = std::fs::read_dir(upper).at("list", upper)?.next().is_none();
    if !is_empty {
        return Ok(());
    }
    let from = File::open(lower).at("open", lower)?;
    let to = File::open(upper).at("open", upper)?;
    let (a, b) = (from.metadata().at("look at", lower)?, to.metadata().at("look at", upper)?);
    if (a.mode(), a.uid(), a.gid()) == (b.mode(), b.uid(), b.gid()) {
        return Ok(());
    }
    copy_attributes(from.as_fd(), c".", to.as_fd(), c".").at("set attributes of", upper)
}
