//! Images to files: OCI archives, OCI layout directories, and the archives that `docker load` reads.

use crate::blob::BlobError;
use crate::fsio::{self, At, FsError};
use crate::image::{self, ImageRecord, MAX_CONFIG};
use crate::stream::{Budget, LayerStream};
use crate::tar::{Entry, Kind};
use crate::{Digest, Reference, Store, canonical_reference, tarwrite};
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
    ) -> Result<(), SaveError> {
        let records = self.to_save(references)?;
        let _lease = self.lease(records.iter().flat_map(blobs));
        let mut out = io::BufWriter::with_capacity(128 * 1024, out);
        match format {
            SaveFormat::OciArchive => self.save_oci(&records, &mut out)?,
            SaveFormat::DockerArchive => self.save_docker(&records, &mut out)?,
        }
        tarwrite::end(&mut out).and_then(|()| out.flush()).map_err(SaveError::Write)
    }

    /// Writes images as an OCI layout into the directory `dir`, which is made.
    pub fn save_layout(&self, references: &[&str], dir: &Path) -> Result<(), SaveError> {
        let records = self.to_save(references)?;
        let _lease = self.lease(records.iter().flat_map(blobs));
        let to = dir.join("blobs/sha256");
        fs::create_dir_all(&to).at("create", &to)?;
        for (record, blob) in each_blob(&records) {
            let from = self.kept_blob(record, &blob)?;
            let to = to.join(blob.hex());
            fs::copy(&from, &to).at("copy to", &to)?;
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

    fn save_oci(&self, records: &[ImageRecord], out: &mut impl Write) -> Result<(), SaveError> {
        tarwrite::file(out, "oci-layout", LAYOUT).map_err(SaveError::Write)?;
        tarwrite::file(out, "index.json", &image::index_json(records)).map_err(SaveError::Write)?;
        for (record, blob) in each_blob(records) {
            let path = self.kept_blob(record, &blob)?;
            let file = File::open(&path).at("open", &path)?;
            let size = file.metadata().at("look at", &path)?.len();
            copy(out, &format!("blobs/sha256/{}", blob.hex()), file, size)?;
        }
        Ok(())
    }

    fn save_docker(&self, records: &[ImageRecord], out: &mut impl Write) -> Result<(), SaveError> {
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
                    self.save_docker_layer(record, layer, &name, out)?;
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
        out: &mut impl Write,
    ) -> Result<(), SaveError> {
        let path = self.kept_blob(record, &layer.blob_digest)?;
        let open = || -> Result<_, FsError> {
            LayerStream::new(File::open(&path).at("open", &path)?, false, NO_BUDGET).at("read", &path)
        };
        let sums = open()?.drain().at("read", &path)?;
        if sums.diff_id != layer.diff_id {
            return Err(SaveError::Damaged(layer.diff_id));
        }
        copy(out, name, open()?, sums.bytes)
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

fn blobs(record: &ImageRecord) -> Vec<Digest> {
    let mut blobs = vec![record.manifest.digest, record.config];
    blobs.extend(record.layers.iter().map(|layer| layer.blob_digest));
    blobs
}

/// Each blob once, with an image that needs it.
fn each_blob(records: &[ImageRecord]) -> Vec<(&ImageRecord, Digest)> {
    let mut seen = BTreeSet::new();
    let all = records.iter().flat_map(|record| blobs(record).into_iter().map(move |blob| (record, blob)));
    all.filter(|(_, blob)| seen.insert(*blob)).collect()
}
