//! Which images containers have last run well from, in the order of their proof. Damage of the newest one does not keep
//! a container down: the one before it is still here, and no collection takes either.
//!
//! `good/<owner>.json`, an owner being whoever has containers: `{"version": 1, "good": {"<container>": [{..}, {..}]}}`

use crate::fsio::{self, At, FsError};
use crate::image::{self, ImageError, MAX_CONFIG, MAX_MANIFEST, MAX_RECORD};
use crate::{Digest, Image, Store};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The one that runs and the one before it. More would keep a disk full of images for a case that needs two damages.
const KEPT: usize = 2;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    version: u32,
    good: BTreeMap<String, Vec<Good>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Good {
    /// What it was called then.
    reference: String,
    manifest: Digest,
}

impl Store {
    /// Notes durably that a container has run well from this image; nothing is written when that is known.
    pub fn note_good(
        &self,
        owner: &str,
        container: &str,
        reference: &str,
        manifest: &Digest,
    ) -> Result<(), ImageError> {
        let _commit = self.inner.commit();
        let path = self.good_path(owner)?;
        let mut all = read(&path)?.unwrap_or_default();
        let list = all.good.entry(container.to_owned()).or_default();
        if list.first().is_some_and(|newest| newest.manifest == *manifest) {
            return Ok(());
        }
        list.retain(|good| good.manifest != *manifest);
        list.insert(0, Good { reference: reference.to_owned(), manifest: *manifest });
        list.truncate(KEPT);
        all.version = 1;
        let bytes = serde_json::to_vec_pretty(&all).map_err(io::Error::from).at("write", &path)?;
        Ok(fsio::write_durably(&path, &bytes)?)
    }

    /// The newest image that a container has run well from and that is whole as far as can be told without a look at its
    /// files. Mounting it looks at them.
    pub fn last_good(&self, owner: &str, container: &str) -> Result<Option<Image>, ImageError> {
        let all = read(&self.good_path(owner)?)?.unwrap_or_default();
        for good in all.good.get(container).into_iter().flatten() {
            if let Some(image) = self.image_of(&good.reference, &good.manifest)? {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// For an owner that is gone for good.
    pub fn forget_good(&self, owner: &str) -> Result<(), ImageError> {
        let _commit = self.inner.commit();
        Ok(fsio::remove_file(&self.good_path(owner)?).map(drop)?)
    }

    /// Those that something is noted of.
    pub fn good_owners(&self) -> Result<Vec<String>, ImageError> {
        let names = fsio::list(&self.inner.good_dir())?;
        Ok(names.iter().filter_map(|name| Some(name.to_str()?.strip_suffix(".json")?.to_owned())).collect())
    }

    /// The containers of an owner.
    pub fn good_containers(&self, owner: &str) -> Result<Vec<String>, ImageError> {
        Ok(read(&self.good_path(owner)?)?.unwrap_or_default().good.into_keys().collect())
    }

    pub(crate) fn good_manifests(&self) -> Result<BTreeSet<Digest>, FsError> {
        let dir = self.inner.good_dir();
        let mut found = BTreeSet::new();
        for name in fsio::list(&dir)?.iter().filter(|name| name.as_encoded_bytes().ends_with(b".json")) {
            let all = read(&dir.join(name))?.unwrap_or_default();
            found.extend(all.good.values().flatten().map(|good| good.manifest));
        }
        Ok(found)
    }

    /// An image by its manifest, whatever references mean now.
    fn image_of(&self, reference: &str, manifest: &Digest) -> Result<Option<Image>, ImageError> {
        // Damage of one of them is a reason to look for another one.
        let read = |digest: &Digest, limit| self.read_blob(digest, limit).ok().flatten();
        let lowered = (|| {
            let bytes = read(manifest, MAX_MANIFEST)?;
            let config_digest = image::config_digest(&bytes).ok()?;
            let config = read(&config_digest, MAX_CONFIG)?;
            Some((image::lower(&bytes, image::OCI_MANIFEST, &config).ok()?, config_digest))
        })();
        let Some((lowered, config_digest)) = lowered else { return Ok(None) };
        let _commit = self.inner.commit();
        let mut records = Vec::new();
        for layer in &lowered.layers {
            match self.layer_record(&layer.diff_id) {
                Ok(Some(record)) => records.push(record),
                _ => return Ok(None),
            }
        }
        let Ok(fixup) = self.fixup(&records) else { return Ok(None) };
        if fixup.is_some_and(|id| !self.inner.is_published(&id)) {
            self.inner.settle_locked()?;
        }
        Ok(Some(Image {
            reference: reference.to_owned(),
            manifest_digest: *manifest,
            manifest_media_type: image::OCI_MANIFEST.to_owned(),
            config_digest,
            config: lowered.config,
            size_bytes: records.iter().map(|record| record.size_bytes).sum(),
            layers: lowered.layers,
            pulled_at_ms: 0,
            pinned: false,
            fixup,
            index: None,
        }))
    }

    fn good_path(&self, owner: &str) -> Result<PathBuf, FsError> {
        let dir = self.inner.good_dir();
        if owner.is_empty() || owner.starts_with('.') || owner.contains('/') {
            return Err(io::Error::from(io::ErrorKind::InvalidInput)).at("name a file in", &dir);
        }
        Ok(dir.join(format!("{owner}.json")))
    }
}

/// `None` when there is none; one that does not read is set aside.
fn read(path: &Path) -> Result<Option<Owner>, FsError> {
    let Some(bytes) = fsio::read_what_is_left(path, MAX_RECORD)? else { return Ok(None) };
    let parsed = serde_json::from_slice(&bytes).ok();
    if parsed.is_none() {
        fs::rename(path, path.with_extension("json.damaged")).at("set aside", path)?;
    }
    Ok(parsed)
}
