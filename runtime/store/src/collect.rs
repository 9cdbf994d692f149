//! Removing images and what nothing needs any more.
//!
//! No counters: what is needed is computed from the records, from what the caller declares, and from what is mounted.

use crate::fixup;
use crate::fsio::{self, At, FsError, TEMPORARY};
use crate::image::{self, ImageError, ImageRecord, MAX_CONFIG, MAX_MANIFEST};
use crate::{Digest, Store, canonical_reference};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A partial blob that no pull has gone on with for this long is not coming back.
const PARTIAL_MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What must stay, besides pinned images.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    /// References that manifests declare, running or not; any spelling.
    pub references: BTreeSet<String>,
    /// Manifest digests of what runs; their layers are in use whatever their references mean now.
    pub manifests: BTreeSet<Digest>,
}

impl Roots {
    fn canonical(&self) -> BTreeSet<String> {
        self.references.iter().filter_map(|reference| canonical_reference(reference).ok()).collect()
    }

    fn need(&self, canonical: &BTreeSet<String>, record: &ImageRecord) -> bool {
        record.pinned
            || canonical.contains(&record.reference)
            || self.manifests.contains(&record.manifest.digest)
    }
}

/// What went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub images: Vec<String>,
    pub layers: u64,
    pub blobs: u64,
    pub partials: u64,
    pub freed_bytes: u64,
    /// Layers that nothing needs but a mounted root file system.
    pub layers_in_use: u64,
}

impl Store {
    /// Forgets a reference; `false` when there is none. Its layers and blobs go with the next
    /// [`Store::collect_garbage`].
    pub fn remove_image(&self, reference: &str) -> Result<bool, ImageError> {
        let Ok(reference) = canonical_reference(reference) else { return Ok(false) };
        let _commit = self.inner.commit();
        let path = self.inner.record_path(&reference);
        if !fsio::remove_file(&path)? {
            return Ok(false);
        }
        fsio::sync_dir(&self.inner.images_dir())?;
        self.refresh_index()?;
        Ok(true)
    }

    /// Removes images that are neither pinned nor among the roots, then blobs and layers that nothing reaches.
    pub fn collect_garbage(&self, roots: &Roots) -> Result<Collected, ImageError> {
        let _commit = self.inner.commit();
        let mut done = Collected::default();
        let references = roots.canonical();
        for (path, record) in self.records()? {
            if !roots.need(&references, &record) {
                fsio::remove_file(&path)?;
                done.images.push(record.reference);
            }
        }
        if !done.images.is_empty() {
            fsio::sync_dir(&self.inner.images_dir())?;
            self.refresh_index()?;
        }
        self.sweep_unreachable(&roots.manifests, &mut done)?;
        self.sweep_partials(PARTIAL_MAX_AGE, &mut done)?;
        self.sweep_aside()?;
        Ok(done)
    }

    /// Removes what no image reaches: left-overs of pulls that were given up, and of images that were removed.
    pub fn collect_unreachable(&self, running: &BTreeSet<Digest>) -> Result<Collected, ImageError> {
        let _commit = self.inner.commit();
        let mut done = Collected::default();
        self.sweep_unreachable(running, &mut done)?;
        self.sweep_partials(PARTIAL_MAX_AGE, &mut done)?;
        self.sweep_aside()?;
        Ok(done)
    }

    /// The last thing to go when the disk is full: images that are neither pinned nor among the roots, the least
    /// recently used first, each with all that only it reaches, until there is `enough` room.
    pub fn evict_images(&self, roots: &Roots, enough: &dyn Fn() -> bool) -> Result<Collected, ImageError> {
        let _commit = self.inner.commit();
        let mut done = Collected::default();
        let references = roots.canonical();
        for (path, record) in self.by_last_use()? {
            if enough() {
                break;
            }
            if roots.need(&references, &record) {
                continue;
            }
            fsio::remove_file(&path)?;
            fsio::sync_dir(&self.inner.images_dir())?;
            self.refresh_index()?;
            done.images.push(record.reference);
            self.sweep_unreachable(&roots.manifests, &mut done)?;
        }
        Ok(done)
    }

    /// The record's time is the image's last use: when it was committed, tagged or last mounted.
    fn by_last_use(&self) -> Result<Vec<(PathBuf, ImageRecord)>, FsError> {
        let mut records = self.records()?;
        let used = |path: &Path| {
            fs::metadata(path).and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
        };
        records.sort_by_cached_key(|(path, _)| used(path));
        Ok(records)
    }

    fn sweep_unreachable(&self, running: &BTreeSet<Digest>, done: &mut Collected) -> Result<(), ImageError> {
        let kept: Vec<ImageRecord> = self.records()?.into_iter().map(|(_, record)| record).collect();
        let needed = self.needed(&kept, running)?;
        self.sweep_blobs(&needed, done)?;
        Ok(self.sweep_layers(&needed, done)?)
    }

    /// Removes every partial blob that nobody is writing: the first thing to go when the disk is full.
    pub fn drop_partials(&self) -> Result<Collected, FsError> {
        let mut done = Collected::default();
        self.sweep_partials(Duration::ZERO, &mut done)?;
        Ok(done)
    }

    /// Removes the compressed blobs of layers that are unpacked or for other platforms: the next thing to go when the
    /// disk is full. Images run as before; saving, pushing and repairing them needs the blobs again. Those of images
    /// that came without a registry go last, until there is `enough` room.
    pub fn drop_unpacked_blobs(&self, enough: &dyn Fn() -> bool) -> Result<Collected, ImageError> {
        let _commit = self.inner.commit();
        let mut done = Collected::default();
        let mut records = self.by_last_use()?;
        records.sort_by_key(|(_, record)| record.pinned);
        for (_, record) in records {
            let unpacked = record.layers.iter().filter(|layer| self.inner.is_published(&layer.diff_id));
            let mut spare: Vec<Digest> = unpacked.map(|layer| layer.blob_digest).collect();
            spare.extend(other_platforms(&record));
            for blob in spare {
                if enough() {
                    return Ok(done);
                }
                let path = self.inner.blob_path(&blob);
                let leased = self.inner.state().leases.contains_key(&blob);
                let len = fs::metadata(&path).map_or(0, |m| m.len());
                if !leased && fsio::remove_file(&path)? {
                    done.blobs += 1;
                    done.freed_bytes += len;
                }
            }
        }
        Ok(done)
    }

    /// Blobs and layers that something reaches.
    fn needed(
        &self,
        records: &[ImageRecord],
        running: &BTreeSet<Digest>,
    ) -> Result<BTreeSet<Digest>, ImageError> {
        let mut needed: BTreeSet<Digest> = BTreeSet::new();
        for record in records {
            needed.extend(record.blobs());
            needed.extend(record.layers.iter().map(|layer| layer.diff_id));
            needed.extend(record.fixup);
        }
        for manifest in running.union(&self.good_manifests()?) {
            needed.insert(*manifest);
            // Damage here must not stop the collection; what is mounted is kept below in any case.
            let Ok(Some(bytes)) = self.read_blob(manifest, MAX_MANIFEST) else { continue };
            let Ok(config) = image::config_digest(&bytes) else { continue };
            needed.insert(config);
            let Ok(Some(config)) = self.read_blob(&config, MAX_CONFIG) else { continue };
            if let Ok(lowered) = image::lower(&bytes, image::OCI_MANIFEST, &config) {
                let ids: Vec<Digest> = lowered.layers.iter().map(|layer| layer.diff_id).collect();
                needed.insert(fixup::id(&ids));
                needed.extend(lowered.layers.iter().flat_map(|layer| [layer.blob_digest, layer.diff_id]));
            }
        }
        let state = self.inner.state();
        needed.extend(state.leases.keys());
        needed.extend(state.blobs.keys());
        needed.extend(state.layers.keys());
        needed.extend(&state.writing);
        Ok(needed)
    }

    fn sweep_blobs(&self, needed: &BTreeSet<Digest>, done: &mut Collected) -> Result<(), FsError> {
        let dir = self.inner.blobs_dir();
        for (name, digest) in digests(&dir)? {
            if !needed.contains(&digest) {
                let path = dir.join(name);
                done.freed_bytes += fs::metadata(&path).map_or(0, |m| m.len());
                fsio::remove_file(&path)?;
                done.blobs += 1;
            }
        }
        Ok(())
    }

    fn sweep_layers(&self, needed: &BTreeSet<Digest>, done: &mut Collected) -> Result<(), FsError> {
        let dir = self.inner.layers_dir();
        let mounted = mounted_layers(&dir)?;
        for (name, id) in digests(&dir)? {
            if needed.contains(&id) {
                continue;
            }
            if mounted.contains(&id) {
                done.layers_in_use += 1;
                continue;
            }
            done.freed_bytes += self.layer_record(&id).ok().flatten().map_or(0, |record| record.size_bytes);
            self.inner.discard_layer(&dir.join(name))?;
            done.layers += 1;
        }
        Ok(())
    }

    fn sweep_partials(&self, max_age: Duration, done: &mut Collected) -> Result<(), FsError> {
        let dir = self.inner.partial_dir();
        for (name, digest) in digests(&dir)? {
            let path = dir.join(name);
            let data = fs::metadata(path.join("data"));
            let modified =
                data.as_ref().ok().and_then(|m| m.modified().ok()).unwrap_or(SystemTime::UNIX_EPOCH);
            let age = SystemTime::now().duration_since(modified).unwrap_or_default();
            // The lock is held so that no writer starts on what is being removed.
            let state = self.inner.state();
            if age >= max_age && !state.writing.contains(&digest) {
                done.freed_bytes += data.map_or(0, |m| m.len());
                fsio::remove_tree(&path)?;
                done.partials += 1;
            }
        }
        Ok(())
    }
}

impl Store {
    /// Removes the layers that were set aside and that no mount can be using. A mount names a layer, not the directory
    /// that it had then, so the good layer in its place keeps the bad one until it is not mounted either.
    pub(crate) fn sweep_aside(&self) -> Result<(), FsError> {
        let dir = self.inner.layers_dir();
        let notes = format!(".{STACK}");
        let names = fsio::list(&dir)?;
        let (aside, notes) = (with_prefix(&names, ASIDE), with_prefix(&names, &notes));
        if aside.is_empty() && notes.is_empty() {
            return Ok(());
        }
        let mounted = mounted_layers(&dir)?;
        for (name, rest) in aside {
            let id = rest.get(..64).and_then(|hex| Digest::from_hex(hex).ok());
            if !id.is_some_and(|id| mounted.contains(&id)) {
                fsio::remove_tree(&dir.join(name))?;
            }
        }
        // While its layers are there, a mount may be about to be made.
        for (name, _) in notes {
            let path = dir.join(name);
            let layers = read_stack(&path)?;
            let all_there = layers.iter().all(|id| mounted.contains(id) || self.inner.layer_dir(id).exists());
            if layers.is_empty() || !all_there {
                fsio::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Layers of an index that do not run here. Configs are small, and this machine's may be among them.
fn other_platforms(record: &ImageRecord) -> Vec<Digest> {
    let own: BTreeSet<Digest> = record.layers.iter().map(|layer| layer.blob_digest).collect();
    let blobs = record.index.iter().flat_map(|index| &index.members).flat_map(|member| &member.blobs);
    let layers = blobs.filter(|blob| blob.is_layer());
    layers.map(|blob| blob.digest).filter(|digest| !own.contains(digest)).collect()
}

/// Names of damaged layers that a container may still run on: this, the diff id, and something unique.
const ASIDE: &str = ".aside-";

/// A mount whose options name its layers by descriptors is called this and a piece of a digest; a file of that name, with
/// a dot in front, lists them.
const STACK: &str = "overlay-";
/// 500 layers.
const MAX_STACK: u64 = 64 << 10;

fn read_stack(path: &Path) -> Result<Vec<Digest>, FsError> {
    let text = fsio::read_small(path, MAX_STACK)?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&text).lines().filter_map(|hex| Digest::from_hex(hex).ok()).collect())
}

impl crate::store::Inner {
    /// Notes the layers of a mount that cannot tell them; gives what the mount is to be called.
    pub(crate) fn note_stack(&self, layers: &[Digest]) -> Result<String, FsError> {
        let text: String = layers.iter().map(|id| format!("{}\n", id.hex())).collect();
        let name = format!("{STACK}{}", &Digest::of(text.as_bytes()).hex()[..16]);
        let path = self.layers_dir().join(format!(".{name}"));
        if fsio::read_small(&path, MAX_STACK)?.as_deref() != Some(text.as_bytes()) {
            fsio::write_for_this_boot(&path, text.as_bytes())?;
        }
        Ok(name)
    }

    /// Gives the place of a layer free. A container that runs on it goes on.
    pub(crate) fn set_layer_aside(&self, diff_id: &Digest) -> Result<(), FsError> {
        let away = self.layers_dir().join(format!("{ASIDE}{}-{}", diff_id.hex(), fsio::unique()));
        let path = self.layer_dir(diff_id);
        match fs::rename(&path, &away) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.at("set aside", &path),
        }
    }

    /// First out of sight by one rename, so that a crash in the middle leaves no half layer, then removed.
    pub(crate) fn discard_layer(&self, path: &Path) -> Result<(), FsError> {
        let away = self.layers_dir().join(format!("{TEMPORARY}{}", fsio::unique()));
        fs::rename(path, &away).at("move away", path)?;
        fsio::sync_dir(&self.layers_dir())?;
        fsio::remove_tree(&away)
    }
}

/// Names that begin so, with what follows.
fn with_prefix<'n>(names: &'n [OsString], prefix: &str) -> Vec<(&'n OsString, &'n str)> {
    names.iter().filter_map(|name| Some((name, name.to_str()?.strip_prefix(prefix)?))).collect()
}

/// Entries of a directory that are named by a digest.
fn digests(dir: &Path) -> Result<Vec<(OsString, Digest)>, FsError> {
    let names = fsio::list(dir)?.into_iter();
    Ok(names.filter_map(|name| Some((name.clone(), Digest::from_hex(name.to_str()?).ok()?))).collect())
}

/// Layers below `layers` that are part of an overlay mounted in this mount namespace.
pub(crate) fn mounted_layers(layers: &Path) -> Result<BTreeSet<Digest>, FsError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).at("read", path)?;
    let prefix = escape(layers.as_os_str());
    let mut found = BTreeSet::new();
    for line in text.split(|&b| b == b'\n').filter(|line| line.windows(9).any(|w| w == b" overlay ")) {
        let source =
            line.split(|&b| b == b' ').rev().nth(1).and_then(|source| std::str::from_utf8(source).ok());
        if let Some(name) = source.filter(|source| source.starts_with(STACK) && !source.contains('/')) {
            found.extend(read_stack(&layers.join(format!(".{name}")))?);
        }
        let mut rest = line;
        while let Some(at) = rest.windows(prefix.len()).position(|w| w == prefix) {
            rest = &rest[at + prefix.len()..];
            let hex = rest.get(..64).and_then(|hex| std::str::from_utf8(hex).ok());
            found.extend(hex.and_then(|hex| Digest::from_hex(hex).ok()));
        }
    }
    Ok(found)
}

/// A directory's path with a slash, as the kernel writes it in mount options.
fn escape(path: &OsStr) -> Vec<u8> {
    let mut out = Vec::new();
    for &byte in path.as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend_from_slice(format!("\\{byte:03o}").as_bytes()),
            _ => out.push(byte),
        }
    }
    out.push(b'/');
    out
}
