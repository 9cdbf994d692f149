//! Root file systems: the layers of an image as overlay lowers, with or without a writable directory on top.

use crate::fsio::{At, FsError};
use crate::layer::LayerRecord;
use crate::store::Inner;
use crate::{Digest, Image, Store};
use keel_sys::{file, mount};
use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// `fsconfig(2)` takes values of at most 255 bytes.
const MAX_VALUE: usize = 255;
/// Where a directory that is held open has a short name.
const DESCRIPTORS: &str = "/proc/self/fd/";
/// Mounts on one directory that [`unmount_rootfs`] takes off; more than a crash or two cannot pile up.
const MAX_STACKED: usize = 16;
/// Never what the host's module parameters say: an image must look the same everywhere, and attributes in a
/// container's upper directory must not redirect it.
const OPTIONS: [(&CStr, &CStr); 3] =
    [(c"redirect_dir", c"nofollow"), (c"index", c"off"), (c"metacopy", c"off")];

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error(
        "layer {layer} is damaged ({problem}) and there is no good blob to make it from: the image has to be pulled again"
    )]
    Damaged { layer: Digest, problem: String },
    #[error("a damaged layer cannot be unpacked again")]
    Heal(#[from] crate::LayerError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("cannot mount overlay on {}: {step}{messages}", target.display())]
    Overlay {
        target: PathBuf,
        step: &'static str,
        /// The kernel's own words, when it has some.
        messages: String,
        #[source]
        source: io::Error,
    },
}

/// How a root file system is made, beside what it is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct RootfsOptions<'a> {
    /// The user namespace of the container: files of the image belong to its root and its users, without a copy of
    /// them. What the container writes has the host's numbers in the writable directory.
    pub user_namespace: Option<BorrowedFd<'a>>,
    /// Nothing the container writes is ever synced: faster, and worth nothing after a power cut. A writable directory
    /// that was used this way is emptied before it is used again.
    pub volatile: bool,
}

/// What is to be mounted, top first.
#[derive(Debug)]
pub(crate) struct Stack {
    pub(crate) lowers: Vec<PathBuf>,
    pub(crate) upper: Option<(PathBuf, PathBuf)>,
    pub(crate) volatile: bool,
    /// The layers that the lowers are.
    layers: Vec<Digest>,
    /// Held until the mount is made: lowers may be named by descriptor.
    _held: Vec<OwnedFd>,
}

impl Store {
    /// Mounts the image's root file system on the directory `target`: writable when there is an upper and a work
    /// directory (on one file system, both existing), else read-only. What is mounted on `target` is taken off first.
    pub fn mount_rootfs(
        &self,
        image: &Image,
        upper: Option<(&Path, &Path)>,
        target: &Path,
    ) -> Result<(), MountError> {
        self.mount_rootfs_with(image, upper, target, RootfsOptions::default())
    }

    pub fn mount_rootfs_with(
        &self,
        image: &Image,
        upper: Option<(&Path, &Path)>,
        target: &Path,
        options: RootfsOptions<'_>,
    ) -> Result<(), MountError> {
        let mut stack = Stack::new(self.lowers(image)?, upper);
        stack.volatile = options.volatile && upper.is_some();
        if let Some(user_namespace) = options.user_namespace {
            stack.map_ids(user_namespace, target)?;
        }
        self.note_use(image);
        unmount_rootfs(target)?;
        if let Some((upper, work)) = upper {
            // The kernel's own mark, there from a volatile mount on.
            if work.join("work/incompat/volatile").exists() {
                empty(upper)?;
                empty(work)?;
            }
            crate::fixup::adopt_root(&stack.lowers[0], upper)?;
        }
        apply(&self.inner, &stack, target)
    }

    pub fn unmount_rootfs(&self, target: &Path) -> Result<(), FsError> {
        unmount_rootfs(target)
    }

    fn lowers(&self, image: &Image) -> Result<Vec<PathBuf>, MountError> {
        let layers = self.sound_layers(image)?;
        let fs = |id: &Digest| self.inner.layer_dir(id).join("fs");
        let mut lowers: Vec<PathBuf> = Vec::new();
        lowers.extend(image.fixup.as_ref().map(fs));
        lowers.extend(visible(&layers).iter().map(fs));
        // Overlay wants two lowers when there is no upper; an image may have no layer at all.
        if lowers.len() < 2 {
            let empty = self.inner.layers_dir().join("empty");
            DirBuilder::new().recursive(true).mode(0o755).create(&empty).at("create", &empty)?;
            lowers.push(empty);
        }
        Ok(lowers)
    }
}

impl Stack {
    pub(crate) fn new(lowers: Vec<PathBuf>, upper: Option<(&Path, &Path)>) -> Stack {
        let upper = upper.map(|(upper, work)| (upper.to_owned(), work.to_owned()));
        let layer = |lower: &PathBuf| Digest::from_hex(lower.parent()?.file_name()?.to_str()?).ok();
        let layers = lowers.iter().filter_map(layer).collect();
        Stack { lowers, upper, volatile: false, layers, _held: Vec::new() }
    }

    /// What the mount is to be called: a collection that cannot see the layers in its options finds them by this.
    fn source(&self, inner: &Inner, by_name: bool) -> Result<CString, FsError> {
        let source = if by_name { "overlay".to_owned() } else { inner.note_stack(&self.layers)? };
        CString::new(source).map_err(io::Error::from).at("name a mount of", &inner.layers_dir())
    }

    /// Puts detached copies of the lowers, whose owners are those of the namespace, in the place of the lowers.
    fn map_ids(&mut self, user_namespace: BorrowedFd<'_>, target: &Path) -> Result<(), MountError> {
        let attr = mount::Attr {
            set: mount::ATTR_IDMAP,
            userns_fd: user_namespace.as_raw_fd() as u64,
            ..mount::Attr::default()
        };
        for lower in &mut self.lowers {
            let failed = |step| move |source| overlay_error(target, step, None, source);
            let path = file::c_path(&*lower).map_err(failed("name a layer"))?;
            let copy = mount::clone_tree(file::cwd(), &path, false, false).map_err(failed("open a layer"))?;
            mount::set_attr(&copy, &attr, false).map_err(failed("map the owners of a layer"))?;
            *lower = format!("{DESCRIPTORS}{}", copy.as_raw_fd()).into();
            self._held.push(copy);
        }
        Ok(())
    }
}

/// Removes what is in a directory.
fn empty(dir: &Path) -> Result<(), FsError> {
    for name in crate::fsio::list(dir)? {
        crate::fsio::remove_tree(&dir.join(name))?;
    }
    Ok(())
}

/// The layers that can be seen, top first. A layer that occurs twice counts where it is highest (all it has is seen
/// there, and the kernel refuses to stack a directory twice); one that hides everything below ends the stack.
fn visible(layers: &[LayerRecord]) -> Vec<Digest> {
    let mut seen = BTreeSet::new();
    let mut ids = Vec::new();
    for layer in layers.iter().rev() {
        if seen.insert(layer.diff_id) {
            ids.push(layer.diff_id);
        }
        if layer.opaque_root {
            break;
        }
    }
    ids
}

/// Takes off whatever is mounted on `target`; nothing mounted, or no such directory, is success. A busy mount is
/// detached and goes when its last user does.
pub fn unmount_rootfs(target: &Path) -> Result<(), FsError> {
    const NOFOLLOW: i32 = libc::UMOUNT_NOFOLLOW;
    let path = file::c_path(target).at("unmount", target)?;
    for _ in 0..MAX_STACKED {
        let done = match mount::umount(&path, NOFOLLOW) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                mount::umount(&path, NOFOLLOW | libc::MNT_DETACH)
            }
            other => other,
        };
        match done {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => return Ok(()),
            Err(e) => return Err(e).at("unmount", target),
        }
    }
    Ok(())
}

fn apply(inner: &Inner, stack: &Stack, target: &Path) -> Result<(), MountError> {
    match apply_by_context(inner, stack, target) {
        Err(Attempt::Unsupported) => apply_classic(inner, stack, target),
        Err(Attempt::Failed(e)) => Err(e),
        Ok(()) => Ok(()),
    }
}

enum Attempt {
    /// The kernel is older than the interface; nothing was done.
    Unsupported,
    Failed(MountError),
}

/// The new interface (Linux 6.7 for `lowerdir+`): one call per layer, no limit but the kernel's 500 layers.
fn apply_by_context(inner: &Inner, stack: &Stack, target: &Path) -> Result<(), Attempt> {
    let context = match mount::fsopen(c"overlay") {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => return Err(Attempt::Unsupported),
        other => other.map_err(|e| Attempt::Failed(overlay_error(target, "open a context", None, e)))?,
    };
    let failed = |step, source| Attempt::Failed(overlay_error(target, step, Some(&context), source));
    let mut by_name = true;
    for (i, lower) in stack.lowers.iter().enumerate() {
        let (value, _held) = value(lower).map_err(|e| failed("name a layer", e))?;
        by_name &= !value.to_bytes().starts_with(DESCRIPTORS.as_bytes());
        match mount::fsconfig(&context, c"lowerdir+", Some(&value)) {
            Err(e) if i == 0 && e.raw_os_error() == Some(libc::EINVAL) => return Err(Attempt::Unsupported),
            other => other.map_err(|e| failed("add a layer", e))?,
        }
    }
    if let Some((upper, work)) = &stack.upper {
        for (key, path) in [(c"upperdir", upper), (c"workdir", work)] {
            let (value, _held) = value(path).map_err(|e| failed("name the writable directory", e))?;
            mount::fsconfig(&context, key, Some(&value))
                .map_err(|e| failed("set the writable directory", e))?;
        }
    }
    for (key, value) in OPTIONS {
        mount::fsconfig(&context, key, Some(value)).map_err(|e| failed("set an option", e))?;
    }
    if stack.volatile {
        mount::fsconfig(&context, c"volatile", None).map_err(|e| failed("set an option", e))?;
    }
    let source = stack.source(inner, by_name).map_err(|e| Attempt::Failed(e.into()))?;
    mount::fsconfig(&context, c"source", Some(&source)).map_err(|e| failed("set the source", e))?;
    let mounted = match mount::fsmount(&context, 0) {
        // Before 6.5 a context takes any option, and finds out here which it does not know.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Err(Attempt::Unsupported),
        other => other.map_err(|e| failed("create the file system", e))?,
    };
    let path = file::c_path(target).map_err(|e| failed("open the target", e))?;
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let at = file::openat(file::cwd(), &path, flags, 0).map_err(|e| failed("open the target", e))?;
    mount::attach(mounted, at).map_err(|e| failed("attach it", e))
}

/// The old interface has one page for all options. Every directory is held open and named by its descriptor, which is
/// short and free of the characters that the option parser would take for its own.
fn apply_classic(inner: &Inner, stack: &Stack, target: &Path) -> Result<(), MountError> {
    let failed = |step, source| overlay_error(target, step, None, source);
    let mut held = Vec::new();
    let mut name = |path: &Path| -> io::Result<String> {
        let fd = open_dir(path)?;
        let name = format!("{DESCRIPTORS}{}", fd.as_raw_fd());
        held.push(fd);
        Ok(name)
    };
    let lowers: Vec<String> = stack
        .lowers
        .iter()
        .map(|lower| name(lower))
        .collect::<io::Result<_>>()
        .map_err(|e| failed("open a layer", e))?;
    let mut options = format!("lowerdir={}", lowers.join(":"));
    if let Some((upper, work)) = &stack.upper {
        for (key, path) in [("upperdir", upper), ("workdir", work)] {
            let name = name(path).map_err(|e| failed("open the writable directory", e))?;
            options.push_str(&format!(",{key}={name}"));
        }
    }
    for (key, value) in OPTIONS {
        options.push_str(&format!(",{}={}", key.to_string_lossy(), value.to_string_lossy()));
    }
    if stack.volatile {
        options.push_str(",volatile");
    }
    let options = CString::new(options).map_err(|e| failed("write the options", e.into()))?;
    let path = file::c_path(target).map_err(|e| failed("open the target", e))?;
    let source = stack.source(inner, false)?;
    mount::mount(&source, &path, c"overlay", 0, Some(&options)).map_err(|e| failed("mount it", e))
}

/// A path as a value for the kernel: itself, or by descriptor when it is too long or has the escape character that
/// overlay takes out of some values. The descriptor must live until the value has been used.
fn value(path: &Path) -> io::Result<(CString, Option<OwnedFd>)> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() <= MAX_VALUE && !bytes.contains(&b'\\') && path.is_absolute() {
        return Ok((file::c_path(path)?, None));
    }
    let fd = open_dir(path)?;
    let name = CString::new(format!("{DESCRIPTORS}{}", fd.as_raw_fd())).map_err(io::Error::from)?;
    Ok((name, Some(fd)))
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    file::openat(file::cwd(), &file::c_path(path)?, libc::O_PATH | libc::O_DIRECTORY, 0)
}

fn overlay_error(
    target: &Path,
    step: &'static str,
    context: Option<&OwnedFd>,
    source: io::Error,
) -> MountError {
    let mut messages = String::new();
    if let Some(context) = context {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = nix::unistd::read(context.as_fd(), &mut buffer) {
            // One message per read: a severity letter, a space, the text.
            let text = String::from_utf8_lossy(&buffer[..n]);
            messages.push_str(": ");
            messages.push_str(text.trim().trim_start_matches("e ").trim_start_matches("w "));
        }
    }
    MountError::Overlay { target: target.to_owned(), step, messages, source }
}

/// The way of `lowerdir+`, where the kernel has it.
#[cfg(test)]
pub(crate) fn check_by_context(store: &Store, image: &Image, target: &Path) {
    let stack = Stack::new(store.lowers(image).unwrap(), None);
    match apply_by_context(&store.inner, &stack, target) {
        Ok(()) => {}
        Err(Attempt::Unsupported) => return eprintln!("SKIPPED: this kernel has no lowerdir+"),
        Err(Attempt::Failed(e)) => panic!("{e:?}"),
    }
    assert_eq!(std::fs::read_dir(target).unwrap().count(), 129);
    unmount_rootfs(target).unwrap();
}

/// The way of older kernels, which the new ones still have.
#[cfg(test)]
pub(crate) fn mount_classic(store: &Store, image: &Image, target: &Path) {
    let stack = Stack::new(store.lowers(image).unwrap(), None);
    apply_classic(&store.inner, &stack, target).unwrap();
}

#[cfg(test)]
pub(crate) fn check_classic(store: &Store, image: &Image, target: &Path) {
    mount_classic(store, image, target);
    assert_eq!(std::fs::read_dir(target).unwrap().count(), 129);
    unmount_rootfs(target).unwrap();
}
