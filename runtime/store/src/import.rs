//! Images from files: OCI layout directories, OCI archives, and what `docker save` writes.

use crate::archive::{Archive, ArchiveError, Member};
use crate::digest::Hasher;
use crate::fsio::{At, FsError};
use crate::image::{self, CommitError, MAX_CONFIG, MAX_MANIFEST};
use crate::layer::LayerError;
use crate::platform::{self, Platform};
use crate::{BlobError, Digest, Image, Index, IndexError, IndexWalk, Reference, Store};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;

/// Layers unpacked at a time; more than the processors of a small host gain nothing.
const PARALLEL: usize = 4;
const PIECE: usize = 128 * 1024;
/// Images of one archive.
const MAX_IMAGES: usize = 1000;
/// Index in index in index: nobody nests deeper than two.
const MAX_NESTING: usize = 4;

/// How far an import or a save is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Reference of the image that is being read or written.
    pub reference: String,
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub layers_done: u32,
    pub layers_total: u32,
}

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Name for the image when the archive holds exactly one; wins over the archive's names.
    pub reference: Option<String>,
    /// Let garbage collection take the images like pulled ones. Without it they stay until they are removed:
    /// nothing could bring them back.
    pub unpinned: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("{} is no image: it has neither index.json (OCI) nor manifest.json (docker save)", .0.display())]
    NoImage(PathBuf),
    #[error("{} in {} is not valid", name, path.display())]
    Json {
        path: PathBuf,
        name: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("{} names {name}, which it does not hold", path.display())]
    Missing { path: PathBuf, name: String },
    #[error("{} in {} has the wrong content: its digest is {actual}", name, path.display())]
    WrongDigest { path: PathBuf, name: String, actual: Digest },
    #[error("image has no variant for {wanted}; it has {available}")]
    Platform { wanted: Platform, available: String },
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("cannot import {reference}")]
    Layer {
        reference: String,
        #[source]
        source: LayerError,
    },
    #[error("cannot import {reference}")]
    Commit {
        reference: String,
        #[source]
        source: CommitError,
    },
}

/// One image of an archive, lowered: all that is left is to move bytes.
struct Found {
    references: Vec<String>,
    manifest: Vec<u8>,
    media_type: String,
    config: Vec<u8>,
    layers: Vec<FoundLayer>,
    /// The index that it is one of, when the archive holds all of that.
    index: Option<Index>,
}

#[derive(Clone)]
struct FoundLayer {
    /// Its name in the archive.
    name: String,
    blob: Digest,
    size: u64,
    /// None of what is kept packed: it belongs to an image for another platform.
    diff_id: Option<Digest>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct DockerImage {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

impl Store {
    /// Imports every image of `path`: an OCI layout directory, an OCI archive or a docker archive, also compressed.
    /// Of an image for several platforms this machine's is unpacked; the others are kept when the archive has them all.
    pub fn import(
        &self,
        path: &Path,
        options: &ImportOptions,
        on_progress: &(dyn Fn(Transfer) + Sync),
    ) -> Result<Vec<Image>, ImportError> {
        let archive = Archive::open(self, path)?;
        self.import_archive(&archive, options, on_progress)
    }

    /// As [`Store::import`], from a stream; `name` is for messages. The archive lies on disk meanwhile.
    pub fn import_reader(
        &self,
        name: &str,
        reader: impl Read,
        options: &ImportOptions,
        on_progress: &(dyn Fn(Transfer) + Sync),
    ) -> Result<Vec<Image>, ImportError> {
        let archive = Archive::spool(self, Path::new(name), reader)?;
        self.import_archive(&archive, options, on_progress)
    }

    fn import_archive(
        &self,
        archive: &Archive,
        options: &ImportOptions,
        on_progress: &(dyn Fn(Transfer) + Sync),
    ) -> Result<Vec<Image>, ImportError> {
        let mut found = lower(archive)?;
        if let Some(reference) = &options.reference {
            match &mut found[..] {
                [one] => one.references = vec![reference.clone()],
                _ => {
                    let text = format!("archive holds {} images; one name does not fit them", found.len());
                    return Err(ImportError::Invalid(text));
                }
            }
        }
        let mut images = Vec::new();
        for found in &mut found {
            if found.references.is_empty() {
                found.references.push(format!("localhost/imported@{}", Digest::of(&found.manifest)));
            }
            images.extend(self.import_one(archive, found, !options.unpinned, on_progress)?);
        }
        Ok(images)
    }

    fn import_one(
        &self,
        archive: &Archive,
        found: &Found,
        pinned: bool,
        on_progress: &(dyn Fn(Transfer) + Sync),
    ) -> Result<Vec<Image>, ImportError> {
        let reference = found.references.first().cloned().unwrap_or_default();
        let all = found.all_layers();
        let leased = all.iter().flat_map(|layer| [Some(layer.blob), layer.diff_id]).flatten();
        let _lease = self.lease(leased.chain(found.index.iter().flat_map(Index::digests)));
        let needed = all.iter().map(|layer| (layer.blob, layer.size, layer.diff_id));
        self.preflight(needed)
            .map_err(|source| ImportError::Layer { reference: reference.clone(), source: source.into() })?;
        let total_bytes = all.iter().map(|layer| layer.size).sum();
        let done_bytes = AtomicU64::new(0);
        let layers_done = AtomicU32::new(0);
        let report = |bytes: u64, layers: u32| {
            let progress = Transfer {
                reference: reference.clone(),
                done_bytes: done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes,
                total_bytes,
                layers_done: layers_done.fetch_add(layers, Ordering::Relaxed) + layers,
                layers_total: all.len() as u32,
            };
            on_progress(progress);
        };
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        let work = || {
            while let Some(layer) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                let result = self.import_layer(archive, layer, &|bytes| report(bytes, 0));
                match result {
                    Ok(()) => report(0, 1),
                    Err(e) => {
                        next.store(usize::MAX / 2, Ordering::Relaxed);
                        let mut failed = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        failed.get_or_insert(e);
                    }
                }
            }
        };
        let threads = PARALLEL.min(thread::available_parallelism().map_or(1, usize::from));
        thread::scope(|scope| {
            for _ in 1..threads.min(all.len()) {
                scope.spawn(work);
            }
            work();
        });
        if let Some(source) = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            return Err(ImportError::Layer { reference, source });
        }
        if let Some(index) = &found.index {
            for digest in [index.digest].into_iter().chain(index.members.iter().map(|member| member.digest)) {
                self.put_blob(&read_blob(archive, &digest, MAX_MANIFEST)?)?;
            }
        }
        let mut images = Vec::new();
        for reference in &found.references {
            let (manifest, media_type, config) = (&found.manifest, &found.media_type, &found.config);
            let image = self
                .commit_indexed(reference, manifest, media_type, config, pinned, found.index.clone())
                .map_err(|source| ImportError::Commit { reference: reference.clone(), source })?;
            images.push(image);
        }
        Ok(images)
    }

    fn import_layer(
        &self,
        archive: &Archive,
        layer: &FoundLayer,
        report: &dyn Fn(u64),
    ) -> Result<(), LayerError> {
        let there = self.partial_len(&layer.blob);
        match self.import_layer_once(archive, layer, report) {
            // Bytes of an earlier transfer may be what is wrong; they are gone now.
            Err(LayerError::Blob(BlobError::WrongDigest { .. }) | LayerError::Unpack { .. })
                if there > 0 && self.partial_len(&layer.blob) == 0 =>
            {
                self.import_layer_once(archive, layer, report)
            }
            other => other,
        }
    }

    fn import_layer_once(
        &self,
        archive: &Archive,
        layer: &FoundLayer,
        report: &dyn Fn(u64),
    ) -> Result<(), LayerError> {
        let to_unpack = layer.diff_id.filter(|diff_id| !self.has_layer(diff_id));
        if self.has_blob(&layer.blob) {
            return match &to_unpack {
                Some(diff_id) => self.unpack_blob(&layer.blob, diff_id),
                None => Ok(()),
            };
        }
        let path = archive.path().join(&layer.name);
        let member = archive.member(&layer.name)?;
        let member = member.ok_or(io::Error::from(io::ErrorKind::NotFound)).at("open", &path)?;
        let Some(diff_id) = to_unpack else {
            let mut writer = self.begin_blob(&layer.blob, layer.size)?;
            copy(member, writer.written(), &path, report, |bytes| Ok(writer.write(bytes)?))?;
            return Ok(writer.finish()?);
        };
        let mut ingest = self.layer_ingest(&layer.blob, layer.size, &diff_id)?;
        copy(member, ingest.offset(), &path, report, |bytes| ingest.push(bytes))?;
        ingest.finish()
    }
}

impl Found {
    /// With what is only kept.
    fn all_layers(&self) -> Vec<FoundLayer> {
        let mut all = self.layers.clone();
        for blob in self.index.iter().flat_map(Index::blobs) {
            if self.layers.iter().all(|layer| layer.blob != blob.digest) {
                let name = blob_name(&blob.digest);
                all.push(FoundLayer { name, blob: blob.digest, size: blob.size, diff_id: None });
            }
        }
        all
    }
}

fn copy(
    mut member: Member,
    skip: u64,
    path: &Path,
    report: &dyn Fn(u64),
    mut push: impl FnMut(&[u8]) -> Result<(), LayerError>,
) -> Result<(), LayerError> {
    member.skip(skip);
    let mut piece = vec![0; PIECE];
    loop {
        let n = member.read(&mut piece).at("read", path)?;
        if n == 0 {
            return Ok(());
        }
        push(&piece[..n])?;
        report(n as u64);
    }
}

/// Reads what an archive says about its images. Touches no store.
fn lower(archive: &Archive) -> Result<Vec<Found>, ImportError> {
    // Recent docker writes both; the OCI half has the digests.
    if let Some(index) = archive.read("index.json", MAX_MANIFEST)? {
        return lower_oci(archive, &index);
    }
    match archive.read("manifest.json", MAX_MANIFEST)? {
        Some(manifest) => lower_docker(archive, &manifest),
        None => Err(ImportError::NoImage(archive.path().to_owned())),
    }
}

fn lower_oci(archive: &Archive, index: &[u8]) -> Result<Vec<Found>, ImportError> {
    let index: List = json(archive, "index.json", index)?;
    if index.manifests.is_empty() {
        return Err(ImportError::Invalid("index.json lists no image".into()));
    }
    // Entries of one name are one image for several platforms.
    let mut groups: Vec<(Option<String>, Vec<Descriptor>)> = Vec::new();
    for descriptor in index.manifests {
        let name = reference_of(&descriptor.annotations);
        let same = groups.iter_mut().find(|(other, group)| {
            *other == name && (name.is_some() || group.iter().all(|d| d.platform.is_some()))
        });
        match same {
            Some((_, group)) => group.push(descriptor),
            None => groups.push((name, vec![descriptor])),
        }
    }
    if groups.len() > MAX_IMAGES {
        return Err(ImportError::Invalid(format!("archive holds more than {MAX_IMAGES} images")));
    }
    let mut all: Vec<Found> = Vec::new();
    for (name, group) in groups {
        let index = match &group[..] {
            [one] if Index::is_index(&one.media_type) => whole_index(archive, one)?,
            _ => None,
        };
        let descriptor = choose(archive, group, 0)?;
        let manifest = read_blob(archive, &descriptor.digest, MAX_MANIFEST)?;
        let media_type = media_type(&descriptor, &manifest);
        let found = Found { index, ..lower_manifest(archive, name, manifest, media_type)? };
        // The same image under two names comes once, with both.
        match all.iter_mut().find(|other| other.manifest == found.manifest && other.index == found.index) {
            Some(other) => other.references.extend(found.references),
            None => all.push(found),
        }
    }
    Ok(all)
}

fn lower_manifest(
    archive: &Archive,
    name: Option<String>,
    manifest: Vec<u8>,
    media_type: String,
) -> Result<Found, ImportError> {
    let fail = |source| ImportError::Commit { reference: name.clone().unwrap_or_default(), source };
    let config = image::config_digest(&manifest).map_err(fail)?;
    let config = read_blob(archive, &config, MAX_CONFIG)?;
    let lowered = image::lower(&manifest, &media_type, &config).map_err(fail)?;
    let layers = lowered.layers.into_iter().map(|layer| FoundLayer {
        name: blob_name(&layer.blob_digest),
        blob: layer.blob_digest,
        size: layer.size,
        diff_id: Some(layer.diff_id),
    });
    let layers = layers.collect();
    Ok(Found { references: name.into_iter().collect(), manifest, media_type, config, layers, index: None })
}

/// `None` when something is missing: many tools write one platform only, with the index that names them all.
fn whole_index(archive: &Archive, descriptor: &Descriptor) -> Result<Option<Index>, ImportError> {
    let body = read_blob(archive, &descriptor.digest, MAX_MANIFEST)?;
    let mut walk = IndexWalk::new(&body, &descriptor.media_type)?;
    while let Some((digest, _)) = walk.next() {
        if archive.member(&blob_name(&digest))?.is_none() {
            return Ok(None);
        }
        walk.take(&read_blob(archive, &digest, MAX_MANIFEST)?)?;
    }
    let index = walk.finish();
    for blob in index.blobs() {
        if archive.member(&blob_name(&blob.digest))?.is_none() {
            return Ok(None);
        }
    }
    Ok(Some(index))
}

/// Goes down through indexes to the manifest for this machine.
fn choose(archive: &Archive, mut group: Vec<Descriptor>, nesting: usize) -> Result<Descriptor, ImportError> {
    // A single one is what its author says; in an index even that has to be for this machine, if it says what for.
    let chosen = if let [one] = &group[..]
        && (nesting == 0 || one.platform.is_none())
    {
        0
    } else {
        let platforms: Vec<Option<Platform>> = group.iter().map(|d| d.platform.clone()).collect();
        platform::choose(&platforms).ok_or_else(|| {
            let known: Vec<String> =
                platforms.iter().flatten().filter(|p| p.os != "unknown").map(Platform::to_string).collect();
            ImportError::Platform { wanted: Platform::host(), available: known.join(", ") }
        })?
    };
    let descriptor = group.swap_remove(chosen);
    if !Index::is_index(&descriptor.media_type) {
        return Ok(descriptor);
    }
    if nesting == MAX_NESTING {
        return Err(ImportError::Invalid("indexes are nested too deeply".into()));
    }
    let bytes = read_blob(archive, &descriptor.digest, MAX_MANIFEST)?;
    let index: List = json(archive, &blob_name(&descriptor.digest), &bytes)?;
    let runnable: Vec<Descriptor> = index
        .manifests
        .into_iter()
        .filter(|d| d.platform.as_ref().is_none_or(|p| p.os != "unknown"))
        .collect();
    if runnable.is_empty() {
        return Err(ImportError::Platform { wanted: Platform::host(), available: "none".into() });
    }
    choose(archive, runnable, nesting + 1)
}

/// Without a type in the descriptor the manifest's own, which OCI made optional; then it is OCI's.
fn media_type(descriptor: &Descriptor, manifest: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Typed {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
    }
    if !descriptor.media_type.is_empty() {
        return descriptor.media_type.clone();
    }
    let own = serde_json::from_slice::<Typed>(manifest).ok().and_then(|typed| typed.media_type);
    own.unwrap_or_else(|| image::OCI_MANIFEST.to_owned())
}

/// containerd and docker write the whole name in one annotation, skopeo and podman in the other; docker writes only
/// the tag there.
fn reference_of(annotations: &BTreeMap<String, String>) -> Option<String> {
    let names = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
    let mut valid = names.iter().filter_map(|name| annotations.get(*name)?.parse::<Reference>().ok());
    valid.next().map(|reference| reference.to_string())
}

fn lower_docker(archive: &Archive, manifest: &[u8]) -> Result<Vec<Found>, ImportError> {
    let images: Vec<DockerImage> = json(archive, "manifest.json", manifest)?;
    if images.is_empty() || images.len() > MAX_IMAGES {
        let text = format!("manifest.json lists {} images (1 to {MAX_IMAGES} make sense)", images.len());
        return Err(ImportError::Invalid(text));
    }
    images.into_iter().map(|image| lower_docker_image(archive, image)).collect()
}

/// `docker save` has no manifest: one is made, with the layers as they lie in the archive.
fn lower_docker_image(archive: &Archive, image: DockerImage) -> Result<Found, ImportError> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Option<Vec<Digest>>,
    }
    let config = read_named(archive, &image.config, MAX_CONFIG)?;
    let diff_ids = json::<Config>(archive, &image.config, &config)?.rootfs.diff_ids.unwrap_or_default();
    let names = image.layers.unwrap_or_default();
    if names.len() != diff_ids.len() {
        let text =
            format!("manifest.json lists {} layers, {} has {}", names.len(), image.config, diff_ids.len());
        return Err(ImportError::Invalid(text));
    }
    let mut layers = Vec::new();
    let mut descriptors = Vec::new();
    for (name, diff_id) in names.into_iter().zip(diff_ids) {
        let (blob, size, kind) = docker_layer(archive, &name, diff_id)?;
        descriptors.push(serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar{kind}"), "digest": blob, "size": size,
        }));
        layers.push(FoundLayer { name, blob, size, diff_id: Some(diff_id) });
    }
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": image::OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config),
            "size": config.len(),
        },
        "layers": descriptors,
    });
    Ok(Found {
        references: image.tags.unwrap_or_default(),
        manifest: manifest.to_string().into_bytes(),
        media_type: image::OCI_MANIFEST.to_owned(),
        config,
        layers,
        index: None,
    })
}

/// A layer's blob as it lies in the archive. Uncompressed, as docker writes them, its digest is the diff id that the
/// config gives; a compressed one has to be read for it.
fn docker_layer(
    archive: &Archive,
    name: &str,
    diff_id: Digest,
) -> Result<(Digest, u64, &'static str), ImportError> {
    let missing = || ImportError::Missing { path: archive.path().to_owned(), name: name.to_owned() };
    let path = archive.path().join(name);
    let mut member = archive.member(name)?.ok_or_else(missing)?;
    let size = member.size;
    let mut magic = [0; 4];
    let n = member.read(&mut magic).at("read", &path)?;
    let kind = match &magic[..n] {
        [0x1f, 0x8b, ..] => "+gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
        _ => return Ok((diff_id, size, "")),
    };
    let mut member = archive.member(name)?.ok_or_else(missing)?;
    let mut hasher = Hasher::default();
    let mut piece = vec![0; PIECE];
    loop {
        let n = member.read(&mut piece).at("read", &path)?;
        if n == 0 {
            return Ok((hasher.finish(), size, kind));
        }
        hasher.update(&piece[..n]);
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn read_blob(archive: &Archive, digest: &Digest, limit: u64) -> Result<Vec<u8>, ImportError> {
    let name = blob_name(digest);
    let bytes = read_named(archive, &name, limit)?;
    let actual = Digest::of(&bytes);
    if actual == *digest {
        Ok(bytes)
    } else {
        Err(ImportError::WrongDigest { path: archive.path().to_owned(), name, actual })
    }
}

fn read_named(archive: &Archive, name: &str, limit: u64) -> Result<Vec<u8>, ImportError> {
    let missing = || ImportError::Missing { path: archive.path().to_owned(), name: name.to_owned() };
    archive.read(name, limit)?.ok_or_else(missing)
}

fn json<'a, T: Deserialize<'a>>(archive: &Archive, name: &str, bytes: &'a [u8]) -> Result<T, ImportError> {
    serde_json::from_slice(bytes).map_err(|source| ImportError::Json {
        path: archive.path().to_owned(),
        name: name.to_owned(),
        source,
    })
}
