//! Images to files: OCI archives, OCI layout directories, and the archives that `docker load` reads.

use crate::blob::BlobError;
use crate::fsio::{self, At, FsError};
use crate::image::{self, ImageRecord, MAX_CONFIG};
use crate::stream::{Budget, LayerStream};
use crate::tar::{Entry, Kind};
use crate::{Digest, Reference, Store, Transfer, canonical_reference, tarwrite};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// A saved layer is what was taken in, so nothing it inflates to can be a surprise.
const NO_BUDGET: Budget = Budget { max_bytes: u64::MAX, max_ratio: u64::MAX, ratio_from: u64::MAX };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveFormat {
    /// A tar of an OCI layout: digests stay what they are.
    OciArchive,
    /// What `docker save` writes: docker and podman of any age load it. Layers are uncompressed.
    DockerArchive,
}

#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("image {0} is not in the store")]
    NoImage(String),
    #[error("blob {blob} of {reference} is not in the store any more: pull the image again to save it")]
    BlobMissing { reference: String, blob: Digest },
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
    #[error("layer {0} does not have its digest any more: `verify` repairs the store")]
    Damaged(Digest),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Blob(#[from] BlobError),
}

impl Store {
    /// Writes images as one archive.
    pub fn save(
        &self,
        references: &[&str],
        format: SaveFormat,
        out: &mut dyn Write,
        on_progress: &dyn Fn(Transfer),
    ) -> Result<(), SaveError> {
        let records = self.to_save(references)?;
        let _lease = self.lease(records.iter().flat_map(ImageRecord::blobs));
        let mut out = io::BufWriter::with_capacity(128 * 1024, out);
        match format {
            SaveFormat::OciArchive => self.save_oci(&records, &mut out, on_progress)?,
            SaveFormat::DockerArchive => self.save_docker(&records, &mut out, on_progress)?,
        }
        tarwrite::end(&mut out).and_then(|()| out.flush()).map_err(SaveError::Write)
    }

    /// Writes images as an OCI layout into the directory `dir`, which is made.
    pub fn save_layout(
        &self,
        references: &[&str],
        dir: &Path,
        on_progress: &dyn Fn(Transfer),
    ) -> Result<(), SaveError> {
        let records = self.to_save(references)?;
        let _lease = self.lease(records.iter().flat_map(ImageRecord::blobs));
        let to = dir.join("blobs/sha256");
        fs::create_dir_all(&to).at("create", &to)?;
        let meter = self.meter(&records, on_progress);
        for (record, blob) in each_blob(&records) {
            let from = self.kept_blob(record, &blob)?;
            let to = to.join(blob.hex());
            meter.bytes(record, fs::copy(&from, &to).at("copy to", &to)?);
            meter.part(record);
        }
        fsio::write_durably(&dir.join("oci-layout"), LAYOUT)?;
        Ok(fsio::write_durably(&dir.join("index.json"), &image::index_json(&records))?)
    }

    fn to_save(&self, references: &[&str]) -> Result<Vec<ImageRecord>, SaveError> {
        let mut records = Vec::new();
        for reference in references {
            let missing = || SaveError::NoImage((*reference).to_owned());
            let canonical = canonical_reference(reference).map_err(|_| missing())?;
            let path = self.inner.record_path(&canonical);
            records.push(self.read_record(&path)?.ok_or_else(missing)?);
        }
        Ok(records)
    }

    fn kept_blob(&self, record: &ImageRecord, blob: &Digest) -> Result<std::path::PathBuf, SaveError> {
        let missing = || SaveError::BlobMissing { reference: record.reference.clone(), blob: *blob };
        self.blob_path(blob).ok_or_else(missing)
    }

    /// Counts the blobs of an OCI layout.
    fn meter<'a>(&self, records: &[ImageRecord], on_progress: &'a dyn Fn(Transfer)) -> Meter<'a> {
        let blobs = each_blob(records);
        let sizes =
            blobs.iter().filter_map(|(_, blob)| self.blob_path(blob)).filter_map(|path| path.metadata().ok());
        Meter::new(sizes.map(|found| found.len()).sum(), blobs.len(), on_progress)
    }

    fn save_oci(
        &self,
        records: &[ImageRecord],
        out: &mut impl Write,
        on_progress: &dyn Fn(Transfer),
    ) -> Result<(), SaveError> {
        let meter = self.meter(records, on_progress);
        tarwrite::file(out, "oci-layout", LAYOUT).map_err(SaveError::Write)?;
        tarwrite::file(out, "index.json", &image::index_json(records)).map_err(SaveError::Write)?;
        for (record, blob) in each_blob(records) {
            let path = self.kept_blob(record, &blob)?;
            let file = File::open(&path).at("open", &path)?;
            let size = file.metadata().at("look at", &path)?.len();
            copy(out, &format!("blobs/sha256/{}", blob.hex()), meter.count(record, file), size)?;
            meter.part(record);
        }
        Ok(())
    }

    fn save_docker(
        &self,
        records: &[ImageRecord],
        out: &mut impl Write,
        on_progress: &dyn Fn(Transfer),
    ) -> Result<(), SaveError> {
        let mut layers: Vec<(Digest, u64)> = records
            .iter()
            .flat_map(|record| record.layers.iter().map(|layer| (layer.diff_id, layer.size)))
            .collect();
        layers.sort_unstable();
        layers.dedup_by_key(|(diff_id, _)| *diff_id);
        // Each is read twice.
        let total = layers.iter().map(|(_, size)| 2 * size).sum();
        let meter = Meter::new(total, layers.len(), on_progress);
        let mut written = BTreeSet::new();
        let mut images: Vec<(Digest, serde_json::Value)> = Vec::new();
        for record in records {
            let tag = record.reference.parse::<Reference>().ok().filter(|r| r.tag.is_some());
            let tag = tag.map(|r| Reference { digest: None, ..r }.to_string());
            if let Some((_, image)) = images.iter_mut().find(|(config, _)| *config == record.config) {
                if let (Some(tags), Some(tag)) = (image["RepoTags"].as_array_mut(), tag) {
                    tags.push(tag.into());
                }
                continue;
            }
            let missing =
                || SaveError::BlobMissing { reference: record.reference.clone(), blob: record.config };
            let config = self.read_blob(&record.config, MAX_CONFIG)?.ok_or_else(missing)?;
            let config_name = format!("{}.json", record.config.hex());
            tarwrite::file(out, &config_name, &config).map_err(SaveError::Write)?;
            let mut names = Vec::new();
            for layer in &record.layers {
                let name = format!("{}.tar", layer.diff_id.hex());
                if written.insert(layer.diff_id) {
                    self.save_docker_layer(record, layer, &name, &meter, out)?;
                    meter.part(record);
                }
                names.push(name);
            }
            let tags: Vec<String> = tag.into_iter().collect();
            let image = serde_json::json!({ "Config": config_name, "RepoTags": tags, "Layers": names });
            images.push((record.config, image));
        }
        let images: Vec<_> = images.into_iter().map(|(_, image)| image).collect();
        let manifest = serde_json::Value::from(images).to_string();
        tarwrite::file(out, "manifest.json", manifest.as_bytes()).map_err(SaveError::Write)
    }

    /// The length stands before the data, so the layer is inflated twice; the first time tells whether it is whole.
    fn save_docker_layer(
        &self,
        record: &ImageRecord,
        layer: &crate::Layer,
        name: &str,
        meter: &Meter<'_>,
        out: &mut impl Write,
    ) -> Result<(), SaveError> {
        let path = self.kept_blob(record, &layer.blob_digest)?;
        let open = || -> Result<_, FsError> {
            let file = meter.count(record, File::open(&path).at("open", &path)?);
            LayerStream::new(file, false, NO_BUDGET).at("read", &path)
        };
        let sums = open()?.drain().at("read", &path)?;
        if sums.diff_id != layer.diff_id {
            return Err(SaveError::Damaged(layer.diff_id));
        }
        copy(out, name, open()?, sums.bytes)
    }
}

/// Counts what is read, and tells it.
struct Meter<'a> {
    done_bytes: Cell<u64>,
    total_bytes: u64,
    done: Cell<u32>,
    total: u32,
    on_progress: &'a dyn Fn(Transfer),
}

/// A file whose bytes are counted.
struct Counted<'a> {
    meter: &'a Meter<'a>,
    record: &'a ImageRecord,
    file: File,
}

impl<'a> Meter<'a> {
    fn new(total_bytes: u64, total: usize, on_progress: &'a dyn Fn(Transfer)) -> Meter<'a> {
        let total = total.try_into().unwrap_or(u32::MAX);
        Meter { done_bytes: Cell::new(0), total_bytes, done: Cell::new(0), total, on_progress }
    }

    fn count(&'a self, record: &'a ImageRecord, file: File) -> Counted<'a> {
        Counted { meter: self, record, file }
    }

    fn bytes(&self, record: &ImageRecord, n: u64) {
        self.done_bytes.set(self.done_bytes.get() + n);
        self.report(record);
    }

    /// One blob or layer is done.
    fn part(&self, record: &ImageRecord) {
        self.done.set(self.done.get() + 1);
        self.report(record);
    }

    fn report(&self, record: &ImageRecord) {
        (self.on_progress)(Transfer {
            reference: record.reference.clone(),
            done_bytes: self.done_bytes.get(),
            total_bytes: self.total_bytes,
            layers_done: self.done.get(),
            layers_total: self.total,
        });
    }
}

impl io::Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.meter.bytes(self.record, n as u64);
        Ok(n)
    }
}

const LAYOUT: &[u8] = b"{\"imageLayoutVersion\":\"1.0.0\"}\n";

fn copy(out: &mut impl Write, name: &str, mut from: impl io::Read, size: u64) -> Result<(), SaveError> {
    let mut entry = Entry::plain(name.as_bytes().to_vec(), Kind::File, 0o644);
    entry.size = size;
    tarwrite::header(out, &entry).map_err(SaveError::Write)?;
    let copied = io::copy(&mut io::Read::take(&mut from, size), out).map_err(SaveError::Write)?;
    if copied != size {
        return Err(SaveError::Write(io::ErrorKind::UnexpectedEof.into()));
    }
    tarwrite::pad(out, size).map_err(SaveError::Write)
}

/// Each blob once, with an image that needs it.
fn each_blob(records: &[ImageRecord]) -> Vec<(&ImageRecord, Digest)> {
    let mut seen = BTreeSet::new();
    let all = records.iter().flat_map(|record| record.blobs().into_iter().map(move |blob| (record, blob)));
    all.filter(|(_, blob)| seen.insert(*blob)).collect()
}
