//! Layers are looked at before their first use after the machine has started, and damaged ones are unpacked again.
//!
//! ```text
//! not checked ── a walk that reads no contents ──> checked, until the machine starts again
//!      └─ damaged ── from the kept blob ──> checked
//!                └── no good blob ──> set aside, with the images that need it: to be pulled again
//! ```

use crate::fsio::{self, FsError};
use crate::image::{ImageError, ImageRecord};
use crate::layer::{LayerError, LayerRecord};
use crate::mount::MountError;
use crate::store::Inner;
use crate::verify::Depth;
use crate::{Digest, Image, Store, is_no_space};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A line for each layer of a large host.
const MAX_CHECKED: u64 = 1 << 20;

/// Which layers have been looked at since the machine has started. Only a start can follow on a power cut.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    pub(crate) all: bool,
    layers: BTreeSet<Digest>,
}

impl Checked {
    /// Anything but the note of this boot says nothing.
    pub(crate) fn load(root: &Path) -> Checked {
        let noted = fsio::read_small(&note(root), MAX_CHECKED).ok().flatten().unwrap_or_default();
        let text = String::from_utf8_lossy(&noted);
        let mut lines = text.lines();
        let boot = boot_id();
        if boot.is_none() || lines.next() != boot.as_deref() {
            return Checked::default();
        }
        let all = lines.clone().any(|line| line == "all");
        Checked { all, layers: lines.filter_map(|line| line.parse().ok()).collect() }
    }

    pub(crate) fn has(&self, layer: &Digest) -> bool {
        self.all || self.layers.contains(layer)
    }

    pub(crate) fn add(&mut self, layer: &Digest) {
        self.layers.insert(*layer);
    }
}

impl Inner {
    /// For other processes of this boot; without it they look again.
    pub(crate) fn note_checked(&self) {
        let Some(mut text) = boot_id() else { return };
        {
            let state = self.state();
            if state.checked.all {
                text.push_str("\nall");
            } else {
                text.extend(state.checked.layers.iter().map(|layer| format!("\n{layer}")));
            }
        }
        text.push('\n');
        let _ = fsio::write_for_this_boot(&note(&self.root), text.as_bytes());
    }

    fn is_checked(&self, layer: &Digest) -> bool {
        self.state().checked.has(layer)
    }
}

impl Store {
    /// The records of the layers of an image (base first) that is about to be used: each is what was unpacked, or has
    /// been unpacked again. An image that cannot be made whole is set aside.
    pub(crate) fn sound_layers(&self, image: &Image) -> Result<Vec<LayerRecord>, MountError> {
        let staged = |id: &Digest| self.inner.state().layers.contains_key(id);
        if image.layers.iter().any(|layer| staged(&layer.diff_id)) {
            self.settle()?;
        }
        let mut records = Vec::new();
        for layer in &image.layers {
            records.push(self.sound_layer(&layer.diff_id, Some(&layer.blob_digest))?);
        }
        if let Some(fixup) = &image.fixup {
            self.sound_layer(fixup, None)?;
        }
        Ok(records)
    }

    fn sound_layer(&self, id: &Digest, blob: Option<&Digest>) -> Result<LayerRecord, MountError> {
        if let Some(record) = self.checked_record(id) {
            return Ok(record);
        }
        let _healing = self.inner.healing();
        // Others wait here for the one that looks.
        if let Some(record) = self.checked_record(id) {
            return Ok(record);
        }
        if let Some(problem) = self.layer_problem(id, Depth::Quick)
            && !self.rebuild(id, blob)?
        {
            self.set_images_aside(id)?;
            return Err(MountError::Damaged { layer: *id, problem });
        }
        self.inner.state().checked.add(id);
        self.inner.note_checked();
        self.checked_record(id)
            .ok_or_else(|| MountError::Damaged { layer: *id, problem: "layer.json is not readable".into() })
    }

    fn checked_record(&self, id: &Digest) -> Option<LayerRecord> {
        let record = self.layer_record(id).ok().flatten()?;
        (record.diff_id == *id && self.inner.is_checked(id)).then_some(record)
    }

    /// Puts a new copy of a damaged layer in its place. `false` when there is nothing good to make it from: then the
    /// place is free. For a caller that holds the lock for healing.
    pub(crate) fn rebuild(&self, id: &Digest, blob: Option<&Digest>) -> Result<bool, LayerError> {
        match blob {
            Some(blob) => self.rebuild_layer(id, blob),
            None => self.rebuild_fixup(id),
        }
    }

    fn rebuild_layer(&self, id: &Digest, blob: &Digest) -> Result<bool, LayerError> {
        let rebuilt = if self.has_blob(blob) {
            match self.inner.unpack_kept(blob, id) {
                Ok(layer) => Some(layer),
                // The disk's fault and not the blob's: the next try may go through.
                Err(e) if is_no_space(&e) || matches!(e, LayerError::Fs(_)) => return Err(e),
                Err(_) => None,
            }
        } else {
            None
        };
        let _commit = self.inner.commit();
        self.inner.set_layer_aside(id)?;
        let Some(layer) = rebuilt else { return Ok(false) };
        layer.stage();
        self.inner.settle_locked()?;
        Ok(true)
    }

    fn rebuild_fixup(&self, id: &Digest) -> Result<bool, LayerError> {
        let _commit = self.inner.commit();
        self.inner.set_layer_aside(id)?;
        let records = self.records()?;
        let Some((_, record)) = records.iter().find(|(_, record)| record.fixup == Some(*id)) else {
            return Ok(false);
        };
        let mut layers = Vec::new();
        for layer in &record.layers {
            match self.layer_record(&layer.diff_id) {
                Ok(Some(record)) => layers.push(record),
                _ => return Ok(false),
            }
        }
        if self.fixup(&layers).is_err() {
            return Ok(false);
        }
        self.inner.settle_locked()?;
        Ok(true)
    }

    /// The images that cannot be used without this layer: they count as not there, so that whoever declares one pulls
    /// it again.
    fn set_images_aside(&self, layer: &Digest) -> Result<(), FsError> {
        let _commit = self.inner.commit();
        for (path, _) in self.records()?.into_iter().filter(|(_, record)| needs(record, layer)) {
            self.quarantine(&path)?;
        }
        self.refresh_index()
    }

    /// References whose images were here, are damaged and have not come back.
    pub fn set_aside(&self) -> Result<Vec<String>, ImageError> {
        Ok(self.records_aside()?.into_iter().map(|(_, record)| record.reference).collect())
    }

    /// Records that were set aside and still read, of images that are not there: by file.
    pub(crate) fn records_aside(&self) -> Result<Vec<(PathBuf, ImageRecord)>, ImageError> {
        let dir = self.inner.images_dir();
        let mut aside = Vec::new();
        for name in fsio::list(&dir)? {
            let path = dir.join(name);
            let is_aside = path.extension().is_some_and(|extension| extension == "damaged");
            if is_aside
                && let Ok(Some(bytes)) = fsio::read_small(&path, crate::image::MAX_RECORD)
                && let Ok(record) = serde_json::from_slice::<ImageRecord>(&bytes)
                && !self.inner.record_path(&record.reference).exists()
            {
                aside.push((path, record));
            }
        }
        Ok(aside)
    }
}

pub(crate) fn needs(record: &ImageRecord, layer: &Digest) -> bool {
    record.fixup == Some(*layer) || record.layers.iter().any(|own| own.diff_id == *layer)
}

fn note(root: &Path) -> PathBuf {
    root.join("verified")
}

pub(crate) fn boot_id() -> Option<String> {
    let bytes = fsio::read_small(Path::new("/proc/sys/kernel/random/boot_id"), 4096).ok().flatten()?;
    Some(String::from_utf8(bytes).ok()?.trim().to_owned())
}
