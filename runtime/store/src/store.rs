//! The store as a whole: its directories, what is under way in it, and the moment when things become durable.

use crate::fsio::{self, At, FsError, TEMPORARY};
use crate::heal::Checked;
use crate::{Digest, Space, space};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A handle; clones share everything and may be used from any thread.
///
/// One process at a time may open a root for writing: the caller holds the lock on its state directory.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) root: PathBuf,
    pub(crate) options: Options,
    pub(crate) state: Mutex<State>,
    /// The layers directory, open since before anything was written: `syncfs` reports the write errors that have
    /// happened since its descriptor was opened, and none before.
    layers: File,
    /// Held while staged things are published and while image records change.
    commit: Mutex<()>,
    /// Held while one layer is looked at and put right. Taken before `commit`, never after it.
    healing: Mutex<()>,
}

/// What is under way in this process.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Complete and verified, but not yet synced and renamed: blob to the file it is in.
    pub(crate) blobs: BTreeMap<Digest, PathBuf>,
    /// The same for layers: diff id to the temporary directory that holds `fs` and `layer.json`.
    pub(crate) layers: BTreeMap<Digest, PathBuf>,
    /// Partial blobs with a writer.
    pub(crate) writing: std::collections::BTreeSet<Digest>,
    /// Digests that garbage collection must not touch, with the number of leases.
    pub(crate) leases: BTreeMap<Digest, usize>,
    /// Layers that need no look before they are used.
    pub(crate) checked: Checked,
}

/// Bounds that hostile images run into. The defaults let every image pass that somebody would run on purpose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Entries of one layer. Debian with a desktop has 300,000; each costs an inode.
    pub max_layer_entries: u64,
    /// Bytes of one layer after inflating.
    pub max_layer_bytes: u64,
    /// Inflated bytes per compressed byte. Deflate ends at 1032; real layers are below 20.
    pub max_ratio: u64,
    /// Inflated bytes from which on the ratio is looked at: small layers of zeros are common and harmless.
    pub ratio_from: u64,
    /// Processor time that unpacking one layer may take. A slow network takes none; real layers take seconds.
    pub max_layer_cpu: std::time::Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_layer_entries: 4_000_000,
            max_layer_bytes: 128 << 30,
            max_ratio: 200,
            ratio_from: 1 << 30,
            max_layer_cpu: std::time::Duration::from_secs(3600),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("image store {} cannot be used", path.display())]
    Unusable {
        path: PathBuf,
        #[source]
        source: FsError,
    },
    #[error("image store {} has layout version {found:?}; this program knows 1.0.0", path.display())]
    Version { path: PathBuf, found: String },
}

/// Keeps the digests it was made for from being collected while an image is being put together. Process-wide and in
/// memory: a process that dies leaves none behind.
#[derive(Debug)]
pub struct Lease {
    inner: Arc<Inner>,
    digests: Vec<Digest>,
}

impl Store {
    /// Opens the store at `root` and makes it when it is not there. Left-overs of a process that died are removed.
    pub fn open(root: &Path) -> Result<Store, OpenError> {
        Store::open_with(root, Options::default())
    }

    pub fn open_with(root: &Path, options: Options) -> Result<Store, OpenError> {
        let unusable = |source| OpenError::Unusable { path: root.to_owned(), source };
        let layers = root.join("layers");
        make_dirs(root).map_err(unusable)?;
        let inner = Inner {
            root: root.to_owned(),
            options,
            state: Mutex::default(),
            layers: File::open(&layers).at("open", &layers).map_err(unusable)?,
            commit: Mutex::default(),
            healing: Mutex::default(),
        };
        inner.state().checked = Checked::load(root);
        let store = Store { inner: Arc::new(inner) };
        store.check_layout()?;
        store.sweep().map_err(unusable)?;
        store.refresh_index().map_err(unusable)?;
        Ok(store)
    }

    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Free space and inodes of the file system that layers go to.
    pub fn space(&self) -> Result<Space, FsError> {
        let dir = self.inner.layers_dir();
        space::free(File::open(&dir).at("open", &dir)?, &dir)
    }

    /// Protects blobs and layers from garbage collection until the lease is dropped. Take it before asking whether
    /// they are there.
    pub fn lease(&self, digests: impl IntoIterator<Item = Digest>) -> Lease {
        let digests: Vec<Digest> = digests.into_iter().collect();
        let mut state = self.inner.state();
        for digest in &digests {
            *state.leases.entry(*digest).or_default() += 1;
        }
        drop(state);
        Lease { inner: Arc::clone(&self.inner), digests }
    }

    /// Makes every staged blob and layer durable with one `syncfs` and publishes it. Called by
    /// [`Store::commit_image`]; call it when a pull is given up, to keep the layers that are complete.
    pub fn settle(&self) -> Result<(), FsError> {
        let _commit = self.inner.commit();
        self.inner.settle_locked()
    }

    fn check_layout(&self) -> Result<(), OpenError> {
        let path = self.inner.root.join("oci-layout");
        let unusable = |source| OpenError::Unusable { path: self.inner.root.clone(), source };
        let current = fsio::read_small(&path, 4096).map_err(unusable)?;
        let version = current.as_deref().and_then(|bytes| {
            let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
            Some(value.get("imageLayoutVersion")?.as_str()?.to_owned())
        });
        match version.as_deref() {
            Some("1.0.0") => Ok(()),
            Some(other) => Err(OpenError::Version { path: self.inner.root.clone(), found: other.to_owned() }),
            // Absent or unreadable: it says nothing that is not known.
            None => fsio::write_durably(&path, b"{\"imageLayoutVersion\":\"1.0.0\"}\n").map_err(unusable),
        }
    }

    /// Removes what a dead process left unfinished. Partial blobs stay: the next pull goes on with them.
    fn sweep(&self) -> Result<(), FsError> {
        let inner = &self.inner;
        let unfinished = |name: &OsStr| name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes());
        for dir in [
            &inner.root,
            &inner.layers_dir(),
            &inner.images_dir(),
            &inner.good_dir(),
            &inner.partial_dir(),
            &inner.blobs_dir(),
        ] {
            for name in fsio::list(dir)? {
                if unfinished(&name) {
                    fsio::remove_tree(&dir.join(name))?;
                }
            }
        }
        self.sweep_aside()
    }
}

impl Inner {
    pub(crate) fn blobs_dir(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs_dir().join(digest.hex())
    }

    pub(crate) fn partial_dir(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub(crate) fn layers_dir(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(crate) fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.layers_dir().join(diff_id.hex())
    }

    pub(crate) fn good_dir(&self) -> PathBuf {
        self.root.join("good")
    }

    pub(crate) fn images_dir(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The state is plain data that no code leaves half changed, so a panic elsewhere does not spoil it.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn commit(&self) -> MutexGuard<'_, ()> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn healing(&self) -> MutexGuard<'_, ()> {
        self.healing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Store::settle`] for a caller that holds the commit lock.
    pub(crate) fn settle_locked(&self) -> Result<(), FsError> {
        // Taken out now and not while syncing: what is staged meanwhile waits for the next call.
        let (blobs, layers) = {
            let state = self.state();
            (state.blobs.clone(), state.layers.clone())
        };
        if blobs.is_empty() && layers.is_empty() {
            return Ok(());
        }
        let dir = self.layers_dir();
        keel_sys::writeback::syncfs(&self.layers).at("sync", &dir)?;
        for (digest, from) in &blobs {
            let to = self.blob_path(digest);
            match fs::rename(from, &to) {
                // An earlier call got this far and failed later.
                Err(e) if e.kind() == io::ErrorKind::NotFound && to.exists() => {}
                other => other.at("rename into place", &to)?,
            }
            if let Some(dir) = from.parent()
                && dir != self.partial_dir()
            {
                fsio::remove_tree(dir)?;
            }
        }
        for (diff_id, from) in &layers {
            let to = self.layer_dir(diff_id);
            let taken = [libc::ENOTEMPTY, libc::EEXIST, libc::ENOTDIR];
            match fs::rename(from, &to) {
                // Somebody else has published the same content.
                Err(e)
                    if e.raw_os_error().is_some_and(|e| taken.contains(&e)) && self.is_published(diff_id) =>
                {
                    fsio::remove_tree(from)?;
                }
                Err(e) if e.raw_os_error().is_some_and(|e| taken.contains(&e)) => {
                    self.set_layer_aside(diff_id)?;
                    fs::rename(from, &to).at("rename into place", &to)?;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound && to.exists() => {}
                other => other.at("rename into place", &to)?,
            }
        }
        if !blobs.is_empty() {
            fsio::sync_dir(&self.blobs_dir())?;
        }
        self.layers.sync_all().at("sync", &dir)?;
        let mut state = self.state();
        for (digest, from) in &blobs {
            state.blobs.remove(digest);
            // A second writer has a file of its own and says nothing about the first.
            if from.parent() != Some(&self.partial_dir()) {
                state.writing.remove(digest);
            }
        }
        for diff_id in layers.keys() {
            state.layers.remove(diff_id);
            state.checked.add(diff_id);
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        for digest in &self.digests {
            if let Some(count) = state.leases.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    state.leases.remove(digest);
                }
            }
        }
    }
}

fn make_dirs(root: &Path) -> Result<(), FsError> {
    make_dir(root, 0o711)?;
    for dir in ["blobs", "blobs/sha256", "good", "images"] {
        make_dir(&root.join(dir), 0o755)?;
    }
    // What is in images is nobody's business but root's: set-user-id files of all of them lie in there.
    for dir in ["layers", "partial"] {
        make_dir(&root.join(dir), 0o700)?;
    }
    Ok(())
}

fn make_dir(path: &Path, mode: u32) -> Result<(), FsError> {
    DirBuilder::new().recursive(true).mode(mode).create(path).at("create", path)
}
