//! Image records: which reference means which manifest, config and layers.

use crate::blob::BlobError;
use crate::fixup::FixupError;
use crate::fsio::{self, At, FsError};
use crate::{Digest, Index, ReferenceError, Store, canonical_reference};
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The registries' own limit for manifests, and every client's.
pub const MAX_MANIFEST: u64 = 4 << 20;
pub const MAX_CONFIG: u64 = 4 << 20;
pub(crate) const MAX_RECORD: u64 = 1 << 20;
/// The kernel stacks at most 500 overlay layers.
const MAX_LAYERS: usize = 490;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// An image that is complete in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// Canonical: `docker.io/library/x:tag` or `...@sha256:...`.
    pub reference: String,
    pub manifest_digest: Digest,
    pub manifest_media_type: String,
    pub config_digest: Digest,
    pub config: ImageConfiguration,
    /// Base first.
    pub layers: Vec<Layer>,
    pub pulled_at_ms: u64,
    /// Of the unpacked layers, each counted once.
    pub size_bytes: u64,
    /// Garbage collection leaves it alone.
    pub pinned: bool,
    /// The images of all platforms, where they are kept beside this one.
    pub index: Option<Index>,
    /// Layer on top that makes up for what layers could not know of the layers below them.
    pub(crate) fixup: Option<Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub diff_id: Digest,
    pub blob_digest: Digest,
    pub media_type: String,
    /// Of the blob.
    pub size: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("a damaged layer cannot be unpacked again")]
    Heal(#[from] crate::LayerError),
}

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("manifest is longer than {MAX_MANIFEST} bytes")]
    ManifestTooLong,
    #[error("config is longer than {MAX_CONFIG} bytes")]
    ConfigTooLong,
    #[error("manifest type {0:?} is not an image manifest")]
    MediaType(String),
    #[error("manifest is not valid")]
    Manifest(#[source] serde_json::Error),
    #[error("config is not valid")]
    Config(#[source] serde_json::Error),
    #[error("{0}")]
    Mismatch(String),
    #[error("layer {0} is not in the store")]
    LayerMissing(Digest),
    #[error("{missing} of index {index} is not in the store")]
    IndexIncomplete { index: Digest, missing: Digest },
    #[error(transparent)]
    Fixup(#[from] FixupError),
}

/// `images/<name>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    version: u32,
    pub(crate) reference: String,
    pub(crate) manifest: ManifestRecord,
    pub(crate) config: Digest,
    pub(crate) layers: Vec<Layer>,
    pulled_at_ms: u64,
    size_bytes: u64,
    #[serde(default)]
    pub(crate) pinned: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<Index>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fixup: Option<Digest>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ManifestRecord {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
    pub(crate) size: u64,
}

impl Store {
    /// The image of a reference, which need not be in canonical form.
    pub fn image(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let Ok(reference) = canonical_reference(reference) else { return Ok(None) };
        let path = self.inner.record_path(&reference);
        match self.read_record(&path)? {
            Some(record) if record.reference == reference => Ok(self.load(record, &path)?),
            _ => Ok(None),
        }
    }

    /// All images, by reference.
    pub fn images(&self) -> Result<Vec<Image>, ImageError> {
        let mut images = Vec::new();
        for (path, record) in self.records()? {
            images.extend(self.load(record, &path)?);
        }
        images.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(images)
    }

    /// Publishes an image whose layers are in the store: staged layers become durable, the record is written last.
    pub fn commit_image(
        &self,
        reference: &str,
        manifest: &[u8],
        media_type: &str,
        config: &[u8],
        pinned: bool,
    ) -> Result<Image, CommitError> {
        self.commit_indexed(reference, manifest, media_type, config, pinned, None)
    }

    /// [`Store::commit_image`] with the index that the image is one of, all of whose blobs are in the store.
    pub fn commit_indexed(
        &self,
        reference: &str,
        manifest: &[u8],
        media_type: &str,
        config: &[u8],
        pinned: bool,
        index: Option<Index>,
    ) -> Result<Image, CommitError> {
        let reference = canonical_reference(reference)?;
        let lowered = lower(manifest, media_type, config)?;
        if let Some(index) = &index {
            let own = [Digest::of(manifest), Digest::of(config)];
            check_index(index, &own, |digest| self.has_blob(digest))?;
        }
        let _commit = self.inner.commit();
        let mut size_bytes = 0;
        let mut counted = std::collections::BTreeSet::new();
        let mut records = Vec::new();
        for layer in &lowered.layers {
            let record =
                self.layer_record(&layer.diff_id)?.ok_or(CommitError::LayerMissing(layer.diff_id))?;
            if counted.insert(layer.diff_id) {
                size_bytes += record.size_bytes;
            }
            records.push(record);
        }
        let fixup = self.fixup(&records)?;
        self.inner.settle_locked()?;
        // What was imported for a host without a registry stays, also when there is one once.
        let pinned =
            pinned || self.read_record(&self.inner.record_path(&reference))?.is_some_and(|r| r.pinned);
        let record = ImageRecord {
            version: 1,
            reference,
            manifest: ManifestRecord {
                digest: self.put_blob(manifest)?,
                media_type: media_type.to_owned(),
                size: manifest.len() as u64,
            },
            config: self.put_blob(config)?,
            layers: lowered.layers,
            pulled_at_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            size_bytes,
            pinned,
            index,
            fixup,
        };
        self.write_record(&record)?;
        Ok(record.into_image(lowered.config))
    }

    /// Gives an image one more reference. `None` when there is no image to give it to.
    pub fn tag_image(&self, reference: &str, new: &str) -> Result<Option<Image>, CommitError> {
        let new = canonical_reference(new)?;
        let Ok(reference) = canonical_reference(reference) else { return Ok(None) };
        let _commit = self.inner.commit();
        let path = self.inner.record_path(&reference);
        let Some(record) = self.read_record(&path)? else { return Ok(None) };
        let record = ImageRecord { reference: new, ..record };
        let target = self.inner.record_path(&record.reference);
        self.write_record(&record)?;
        Ok(self.load(record, &target)?)
    }

    /// Pins an image or lets garbage collection have it; `false` when there is no such image.
    pub fn pin_image(&self, reference: &str, pinned: bool) -> Result<bool, ImageError> {
        let Ok(reference) = canonical_reference(reference) else { return Ok(false) };
        let _commit = self.inner.commit();
        let Some(record) = self.read_record(&self.inner.record_path(&reference))? else { return Ok(false) };
        self.write_record(&ImageRecord { pinned, ..record })?;
        Ok(true)
    }

    /// The time of its record says when an image was last used; see [`Store::evict_images`]. Not worth an error.
    pub(crate) fn note_use(&self, image: &Image) {
        if let Ok(record) = std::fs::File::open(self.inner.record_path(&image.reference)) {
            let _ = record.set_modified(SystemTime::now());
        }
    }

    fn write_record(&self, record: &ImageRecord) -> Result<(), FsError> {
        let path = self.inner.record_path(&record.reference);
        let bytes = serde_json::to_vec_pretty(record).map_err(io::Error::from).at("write", &path)?;
        fsio::write_durably(&path, &bytes)?;
        // What an earlier damage has left is of no interest any more.
        fsio::remove_file(&aside(&path))?;
        self.refresh_index()
    }

    /// Readable records with their files, by file name.
    pub(crate) fn records(&self) -> Result<Vec<(PathBuf, ImageRecord)>, FsError> {
        let dir = self.inner.images_dir();
        let mut records = Vec::new();
        for name in fsio::list(&dir)? {
            let path = dir.join(&name);
            if path.extension().is_some_and(|e| e == "json")
                && let Some(record) = self.read_record(&path)?
            {
                records.push((path, record));
            }
        }
        Ok(records)
    }

    /// `None` when there is none or when it is damaged, which sets it aside.
    pub(crate) fn read_record(&self, path: &Path) -> Result<Option<ImageRecord>, FsError> {
        let Some(bytes) = fsio::read_what_is_left(path, MAX_RECORD)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Some(record)),
            Err(_) => {
                self.quarantine(path)?;
                Ok(None)
            }
        }
    }

    /// The record with its config; `None` sets a record aside whose config is lost or damaged.
    fn load(&self, record: ImageRecord, path: &Path) -> Result<Option<Image>, FsError> {
        let read = || self.read_blob(&record.config, MAX_CONFIG);
        // Asked twice: what is only hard to read is not lost.
        let found = match read() {
            Ok(Some(bytes)) => Ok(Some(bytes)),
            _ => read(),
        };
        let config = match found {
            Ok(Some(bytes)) => parse_config(&bytes).ok(),
            Ok(None) | Err(BlobError::WrongDigest { .. }) => None,
            Err(BlobError::Fs(e)) if !fsio::is_damage(&e.source) => return Err(e),
            Err(_) => None,
        };
        match config {
            Some(config) => Ok(Some(record.into_image(config))),
            None => {
                self.quarantine(path)?;
                Ok(None)
            }
        }
    }

    /// A damaged record keeps its bytes for a person to look at, under a name that nobody reads.
    pub(crate) fn quarantine(&self, path: &Path) -> Result<(), FsError> {
        std::fs::rename(path, aside(path)).at("set aside", path)
    }

    /// Rewrites `index.json` from the records when it says something else.
    pub(crate) fn refresh_index(&self) -> Result<(), FsError> {
        let records: Vec<ImageRecord> = self.records()?.into_iter().map(|(_, record)| record).collect();
        let bytes = index_json(&records);
        let path = self.inner.root.join("index.json");
        match fsio::read_small(&path, bytes.len() as u64) {
            Ok(Some(there)) if there == bytes => Ok(()),
            _ => fsio::write_durably(&path, &bytes),
        }
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    name.into()
}

/// The `index.json` of a layout that holds these images.
pub(crate) fn index_json(records: &[ImageRecord]) -> Vec<u8> {
    let manifests = records.iter().map(|record| {
        let (media_type, digest, size) = match &record.index {
            Some(index) => (&index.media_type, index.digest, index.size),
            None => (&record.manifest.media_type, record.manifest.digest, record.manifest.size),
        };
        json!({
            "mediaType": media_type,
            "digest": digest,
            "size": size,
            "annotations": { "org.opencontainers.image.ref.name": record.reference },
        })
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests.collect::<Vec<_>>(),
    });
    format!("{index:#}\n").into_bytes()
}

/// What manifest and config say together, checked against each other.
pub(crate) struct Lowered {
    pub(crate) config: ImageConfiguration,
    pub(crate) layers: Vec<Layer>,
}

/// The config that a manifest names.
pub(crate) fn config_digest(manifest: &[u8]) -> Result<Digest, CommitError> {
    let parsed: ImageManifest = serde_json::from_slice(manifest).map_err(CommitError::Manifest)?;
    let digest = parsed.config().digest().to_string();
    digest.parse().map_err(|e| CommitError::Mismatch(format!("{e}")))
}

/// Configs of old and of odd builders leave out what the specification asks for; every engine runs them.
fn parse_config(config: &[u8]) -> Result<ImageConfiguration, serde_json::Error> {
    serde_json::from_slice(config).or_else(|refused| {
        let mut value: Value = serde_json::from_slice(config)?;
        let Some(image) = value.as_object_mut() else { return Err(refused) };
        let or = |fields: &mut Map<String, Value>, name: &str, default: Value| {
            if fields.get(name).is_none_or(Value::is_null) {
                fields.insert(name.to_owned(), default);
            }
        };
        or(image, "architecture", "".into());
        or(image, "os", "linux".into());
        or(image, "rootfs", json!({"type": "layers"}));
        if let Some(rootfs) = image["rootfs"].as_object_mut() {
            or(rootfs, "diff_ids", json!([]));
        }
        // Sets, written as maps to nothing.
        for set in ["Volumes", "ExposedPorts"] {
            let found = image.get_mut("config").and_then(|config| config.get_mut(set)?.as_object_mut());
            for nothing in found.into_iter().flat_map(Map::values_mut).filter(|value| value.is_null()) {
                *nothing = json!({});
            }
        }
        serde_json::from_value(value)
    })
}

/// Pure: from the bytes of an image's manifest and config to its layers.
pub(crate) fn lower(manifest: &[u8], media_type: &str, config: &[u8]) -> Result<Lowered, CommitError> {
    if manifest.len() as u64 > MAX_MANIFEST {
        return Err(CommitError::ManifestTooLong);
    }
    if config.len() as u64 > MAX_CONFIG {
        return Err(CommitError::ConfigTooLong);
    }
    if !matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST) {
        return Err(CommitError::MediaType(media_type.to_owned()));
    }
    let parsed: ImageManifest = serde_json::from_slice(manifest).map_err(CommitError::Manifest)?;
    let image = parse_config(config).map_err(CommitError::Config)?;
    let stated = parsed.config().digest().to_string();
    let actual = Digest::of(config).to_string();
    if stated != actual {
        return Err(CommitError::Mismatch(format!("manifest names config {stated}, this one is {actual}")));
    }
    let diff_ids = image.rootfs().diff_ids();
    if diff_ids.len() != parsed.layers().len() {
        return Err(CommitError::Mismatch(format!(
            "manifest has {} layers, config has {}",
            parsed.layers().len(),
            diff_ids.len()
        )));
    }
    if diff_ids.len() > MAX_LAYERS {
        return Err(CommitError::Mismatch(format!("image has more than {MAX_LAYERS} layers")));
    }
    let digest = |text: &str| text.parse().map_err(|e| CommitError::Mismatch(format!("{e}")));
    let layers = parsed.layers().iter().zip(diff_ids).map(|(layer, diff_id)| {
        Ok(Layer {
            diff_id: digest(diff_id)?,
            blob_digest: digest(layer.digest().as_ref())?,
            media_type: layer.media_type().to_string(),
            size: layer.size(),
        })
    });
    Ok(Lowered { layers: layers.collect::<Result<_, CommitError>>()?, config: image })
}

/// An index that is kept is there to be passed on, so nothing of it may be missing.
fn check_index(index: &Index, own: &[Digest; 2], has: impl Fn(&Digest) -> bool) -> Result<(), CommitError> {
    let [manifest, _] = own;
    if index.members.iter().all(|member| member.digest != *manifest) {
        return Err(CommitError::Mismatch(format!("index {} does not list {manifest}", index.digest)));
    }
    match index.digests().find(|digest| !own.contains(digest) && !has(digest)) {
        Some(missing) => Err(CommitError::IndexIncomplete { index: index.digest, missing }),
        None => Ok(()),
    }
}

impl ImageRecord {
    /// All blobs that it needs; some may come twice.
    pub(crate) fn blobs(&self) -> Vec<Digest> {
        let mut blobs = vec![self.manifest.digest, self.config];
        blobs.extend(self.layers.iter().map(|layer| layer.blob_digest));
        blobs.extend(self.index.iter().flat_map(Index::digests));
        blobs
    }

    fn into_image(self, config: ImageConfiguration) -> Image {
        Image {
            reference: self.reference,
            manifest_digest: self.manifest.digest,
            manifest_media_type: self.manifest.media_type,
            config_digest: self.config,
            config,
            layers: self.layers,
            pulled_at_ms: self.pulled_at_ms,
            size_bytes: self.size_bytes,
            pinned: self.pinned,
            index: self.index,
            fixup: self.fixup,
        }
    }
}

impl crate::store::Inner {
    /// Readable and unique: the reference with what a file name cannot hold replaced, and a piece of its digest.
    pub(crate) fn record_path(&self, reference: &str) -> PathBuf {
        let readable: String = reference
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' })
            .take(120)
            .collect();
        let unique = &Digest::of(reference.as_bytes()).hex()[..12];
        self.images_dir().join(format!("{readable}-{unique}.json"))
    }
}
