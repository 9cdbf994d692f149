//! Building small images from files of the host, the same bytes for the same input.

use crate::blob::BlobError;
use crate::digest::Hasher;
use crate::fsio::{self, At, FsError, TEMPORARY};
use crate::image::CommitError;
use crate::layer::LayerError;
use crate::tar::{Entry, Kind};
use crate::{Digest, Image, Store, tarwrite};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// One layer: what it holds, in the order it is written. Parent directories that nobody lists are added, root's and
/// 0755; every time is 1970.
#[derive(Clone, Debug, Default)]
pub struct LayerSpec {
    pub files: Vec<FileSpec>,
}

#[derive(Clone, Debug)]
pub struct FileSpec {
    /// Below the root, without leading slash.
    pub path: String,
    /// Permission bits with set-id and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub content: Content,
}

#[derive(Clone, Debug)]
pub enum Content {
    Dir,
    Bytes(Vec<u8>),
    /// Copied from this file of the host.
    File(PathBuf),
    Symlink(String),
    /// Link to another file of the layer.
    HardLink(String),
    /// Hides what lower layers have at this path.
    Whiteout,
}

/// What the image runs; the fields of an OCI image config.
#[derive(Clone, Debug, Default)]
pub struct ConfigSpec {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    /// `8080/tcp`.
    pub exposed_ports: Vec<String>,
    pub volumes: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub stop_signal: Option<String>,
    /// Garbage collection leaves the image alone.
    pub pinned: bool,
}

impl FileSpec {
    pub fn new(path: impl Into<String>, mode: u32, content: Content) -> FileSpec {
        FileSpec { path: path.into(), mode, uid: 0, gid: 0, content }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl Store {
    /// Builds an image and commits it under `reference`.
    pub fn build_image(
        &self,
        reference: &str,
        layers: &[LayerSpec],
        config: &ConfigSpec,
    ) -> Result<Image, BuildError> {
        let mut built = Vec::new();
        for layer in layers {
            built.push(self.build_layer(layer)?);
        }
        let _lease = self.lease(built.iter().flat_map(|layer| [layer.blob, layer.diff_id]));
        for layer in &built {
            self.unpack_blob(&layer.blob, &layer.diff_id)?;
        }
        let config_bytes = config_json(config, &built).to_string().into_bytes();
        let manifest = manifest_json(&config_bytes, &built).to_string();
        let media_type = crate::image::OCI_MANIFEST;
        Ok(self.commit_image(reference, manifest.as_bytes(), media_type, &config_bytes, config.pinned)?)
    }

    /// Writes the layer's tar, gzip-compressed, as a blob.
    fn build_layer(&self, layer: &LayerSpec) -> Result<BuiltLayer, BuildError> {
        let path = self.inner.partial_dir().join(format!("{TEMPORARY}{}", fsio::unique()));
        let built = write_layer(layer, &path);
        let moved = built.and_then(|built| {
            let to = self.inner.blob_path(&built.blob);
            File::open(&path).at("open", &path)?.sync_all().at("sync", &path)?;
            fs::rename(&path, &to).at("rename into place", &to)?;
            fsio::sync_dir(fsio::parent(&to))?;
            Ok(built)
        });
        if moved.is_err() {
            let _ = fs::remove_file(&path);
        }
        Ok(moved?)
    }
}

struct BuiltLayer {
    blob: Digest,
    size: u64,
    diff_id: Digest,
}

fn write_layer(layer: &LayerSpec, path: &std::path::Path) -> Result<BuiltLayer, FsError> {
    let file = Hashing::new(File::create(path).at("create", path)?);
    let compressor = flate2::GzBuilder::new().mtime(0).write(file, flate2::Compression::new(6));
    let mut tar = Hashing::new(compressor);
    let mut parents = BTreeSet::new();
    for spec in &layer.files {
        for (i, _) in spec.path.match_indices('/') {
            let parent = &spec.path[..i];
            if !parent.is_empty() && parents.insert(parent.to_owned()) {
                let entry = Entry::plain(format!("{parent}/").into_bytes(), Kind::Dir, 0o755);
                tarwrite::header(&mut tar, &entry).at("write", path)?;
            }
        }
        if matches!(spec.content, Content::Dir) {
            parents.insert(spec.path.trim_end_matches('/').to_owned());
        }
        write_file(&mut tar, spec, path)?;
    }
    tarwrite::end(&mut tar).at("write", path)?;
    let (compressor, diff_id, _) = tar.finish();
    let file = compressor.finish().at("write", path)?;
    let (_, blob, size) = file.finish();
    Ok(BuiltLayer { blob, size, diff_id })
}

fn write_file(tar: &mut impl Write, spec: &FileSpec, path: &std::path::Path) -> Result<(), FsError> {
    let mut entry = Entry::plain(spec.path.clone().into_bytes(), Kind::File, spec.mode & 0o7777);
    entry.uid = spec.uid.into();
    entry.gid = spec.gid.into();
    match &spec.content {
        Content::Dir => {
            entry.kind = Kind::Dir;
            if !entry.path.ends_with(b"/") {
                entry.path.push(b'/');
            }
        }
        Content::Symlink(target) => {
            entry.kind = Kind::Symlink;
            entry.mode = 0o777;
            entry.link = target.clone().into_bytes();
        }
        Content::HardLink(target) => {
            entry.kind = Kind::HardLink;
            entry.link = target.clone().into_bytes();
        }
        Content::Whiteout => {
            let at = entry.path.iter().rposition(|&b| b == b'/').map_or(0, |i| i + 1);
            entry.path.splice(at..at, b".wh.".iter().copied());
        }
        Content::Bytes(bytes) => {
            entry.size = bytes.len() as u64;
            tarwrite::header(tar, &entry).at("write", path)?;
            tar.write_all(bytes).at("write", path)?;
            return tarwrite::pad(tar, entry.size).at("write", path);
        }
        Content::File(source) => {
            let mut file = File::open(source).at("open", source)?;
            entry.size = file.metadata().at("look at", source)?.len();
            tarwrite::header(tar, &entry).at("write", path)?;
            let copied = io::copy(&mut io::Read::take(&mut file, entry.size), tar).at("copy", source)?;
            if copied != entry.size {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).at("copy", source);
            }
            return tarwrite::pad(tar, entry.size).at("write", path);
        }
    }
    tarwrite::header(tar, &entry).at("write", path)
}

fn config_json(config: &ConfigSpec, layers: &[BuiltLayer]) -> serde_json::Value {
    let set = |names: &[String]| -> serde_json::Map<String, serde_json::Value> {
        names.iter().map(|name| (name.clone(), serde_json::json!({}))).collect()
    };
    let mut run = serde_json::Map::new();
    let mut put = |key: &str, value: serde_json::Value| {
        let empty = value.is_null()
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty);
        if !empty {
            run.insert(key.to_owned(), value);
        }
    };
    put("User", serde_json::json!(config.user));
    put("ExposedPorts", set(&config.exposed_ports).into());
    put("Env", serde_json::json!(config.env));
    put("Entrypoint", serde_json::json!(config.entrypoint));
    put("Cmd", serde_json::json!(config.cmd));
    put("Volumes", set(&config.volumes).into());
    put("WorkingDir", serde_json::json!(config.working_dir));
    put("Labels", serde_json::json!(config.labels));
    put("StopSignal", serde_json::json!(config.stop_signal));
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
    let history: Vec<_> = layers
        .iter()
        .map(|_| serde_json::json!({ "created": "1970-01-01T00:00:00Z", "created_by": "keel" }))
        .collect();
    serde_json::json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": crate::Platform::host().architecture,
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": history,
    })
}

fn manifest_json(config: &[u8], layers: &[BuiltLayer]) -> serde_json::Value {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": layer.blob,
                "size": layer.size,
            })
        })
        .collect();
    serde_json::json!({
        "schemaVersion": 2,
        "mediaType": crate::image::OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config),
            "size": config.len(),
        },
        "layers": layers,
    })
}

/// Hashes and counts what is written.
pub(crate) struct Hashing<W> {
    inner: W,
    hasher: Hasher,
    count: u64,
}

impl<W: Write> Hashing<W> {
    pub(crate) fn new(inner: W) -> Hashing<W> {
        Hashing { inner, hasher: Hasher::default(), count: 0 }
    }

    pub(crate) fn finish(self) -> (W, Digest, u64) {
        (self.inner, self.hasher.finish(), self.count)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
