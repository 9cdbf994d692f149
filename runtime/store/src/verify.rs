//! Whether what is on disk is still what was written, and putting it right.

use crate::blob::BlobError;
use crate::census::{self, Census};
use crate::digest::Hasher;
use crate::fsio::{self, At, FsError};
use crate::image::{ImageError, ImageRecord, MAX_CONFIG, MAX_MANIFEST};
use crate::layer::LayerRecord;
use crate::{Digest, Store, collect};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Names, types, owners, modes and lengths: what a power cut damages shows here. About a second per 100,000 files.
    Quick,
    /// All contents too, of layers and blobs.
    Full,
}

/// What was found, and done about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub layers: u64,
    pub blobs: u64,
    pub damage: Vec<Damage>,
    /// Images that cannot be run any more and were set aside (with repair) or would be: pull or import them again.
    pub lost_images: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Of a layer (its diff id) or a blob.
    pub digest: Digest,
    pub problem: String,
    /// References that need it.
    pub images: Vec<String>,
    pub repaired: bool,
}

impl Store {
    /// Whether the machine has been started since the store was last verified.
    pub fn needs_verify(&self) -> bool {
        let path = self.inner.root.join("verified");
        !matches!((fsio::read_small(&path, 4096), boot_id()), (Ok(Some(seen)), Some(boot)) if seen == boot)
    }

    /// Checks every layer and every blob that an image needs. With `repair`, damaged layers are unpacked again from
    /// their blobs, damaged blobs are removed, and images that cannot be made whole here are set aside.
    pub fn verify(&self, depth: Depth, repair: bool) -> Result<Report, ImageError> {
        let mut report = Report::default();
        let records: Vec<ImageRecord> = self.records()?.into_iter().map(|(_, record)| record).collect();
        self.verify_blobs(&records, depth, repair, &mut report)?;
        self.verify_layers(&records, depth, repair, &mut report)?;
        for record in records {
            let whole = record.layers.iter().map(|l| l.diff_id).chain(record.fixup).all(|id| {
                self.has_layer(&id) && !report.damage.iter().any(|d| d.digest == id && !d.repaired)
            });
            let readable = matches!(self.read_blob(&record.manifest.digest, MAX_MANIFEST), Ok(Some(_)))
                && matches!(self.read_blob(&record.config, MAX_CONFIG), Ok(Some(_)));
            if whole && readable {
                continue;
            }
            if repair {
                self.quarantine(&self.inner.record_path(&record.reference))?;
            }
            report.lost_images.push(record.reference);
        }
        if repair {
            let _commit = self.inner.commit();
            self.refresh_index()?;
            if let Some(boot) = boot_id() {
                fsio::write_durably(&self.inner.root.join("verified"), &boot)?;
            }
        }
        Ok(report)
    }

    fn verify_blobs(
        &self,
        records: &[ImageRecord],
        depth: Depth,
        repair: bool,
        report: &mut Report,
    ) -> Result<(), FsError> {
        let mut wanted: BTreeMap<Digest, Option<u64>> = BTreeMap::new();
        for record in records {
            wanted.insert(record.manifest.digest, Some(record.manifest.size));
            wanted.insert(record.config, None);
            wanted.extend(record.layers.iter().map(|layer| (layer.blob_digest, Some(layer.size))));
        }
        for (digest, size) in wanted {
            let path = self.inner.blob_path(&digest);
            // Blobs of unpacked layers may have been given up for space.
            let Ok(file) = File::open(&path) else { continue };
            report.blobs += 1;
            let len = file.metadata().at("look at", &path)?.len();
            let problem = match size {
                Some(size) if size != len => Some(format!("blob has {len} bytes instead of {size}")),
                // Manifests and configs are short and everything hangs on them.
                _ if depth == Depth::Full || len <= MAX_CONFIG => {
                    let actual = hash(file).at("read", &path)?;
                    (actual != digest).then(|| format!("blob has the wrong content: its digest is {actual}"))
                }
                _ => None,
            };
            if let Some(problem) = problem {
                let repaired = repair && fsio::remove_file(&path)?;
                let images = users(records, |record| {
                    record.manifest.digest == digest
                        || record.config == digest
                        || record.layers.iter().any(|layer| layer.blob_digest == digest)
                });
                report.damage.push(Damage { digest, problem, images, repaired });
            }
        }
        Ok(())
    }

    fn verify_layers(
        &self,
        records: &[ImageRecord],
        depth: Depth,
        repair: bool,
        report: &mut Report,
    ) -> Result<(), ImageError> {
        let mut wanted: BTreeMap<Digest, Option<Digest>> = BTreeMap::new();
        for record in records {
            wanted.extend(record.layers.iter().map(|layer| (layer.diff_id, Some(layer.blob_digest))));
            wanted.extend(record.fixup.map(|id| (id, None)));
        }
        for (diff_id, blob) in wanted {
            report.layers += 1;
            let Some(problem) = self.layer_problem(&diff_id, depth)? else { continue };
            let repaired = repair
                && match blob {
                    Some(blob) => self.rebuild_layer(&diff_id, &blob)?,
                    None => self.rebuild_fixup(&diff_id, records)?,
                };
            let images = users(records, |record| {
                record.fixup == Some(diff_id) || record.layers.iter().any(|layer| layer.diff_id == diff_id)
            });
            report.damage.push(Damage { digest: diff_id, problem, images, repaired });
        }
        Ok(())
    }

    /// What is wrong with a layer; `None` when nothing is.
    fn layer_problem(&self, diff_id: &Digest, depth: Depth) -> Result<Option<String>, FsError> {
        let record: LayerRecord = match self.layer_record(diff_id) {
            Ok(Some(record)) if record.diff_id == *diff_id => record,
            Ok(None) => return Ok(Some("layer is not there".into())),
            Ok(Some(_)) => return Ok(Some("layer.json is of another layer".into())),
            Err(e) => return Ok(Some(format!("layer.json is not readable: {}", e.source))),
        };
        let path = self.inner.layer_dir(diff_id).join("fs");
        let root = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Some("layer has no files".into())),
            other => other.at("open", &path)?,
        };
        // An I/O error is damage too: the disk has lost what was written.
        let now: Census = match census::take(root.as_fd(), depth == Depth::Full) {
            Ok(now) => now,
            Err(e) => return Ok(Some(format!("layer is not readable: {e}"))),
        };
        let then = record.census;
        Ok(if now.names != then.names {
            Some(format!("layer has {} files and directories instead of {}", now.names, then.names))
        } else if now.meta != then.meta {
            Some("lengths, owners or modes of files have changed".into())
        } else if depth == Depth::Full && now.content != then.content {
            Some("contents of files have changed".into())
        } else {
            None
        })
    }

    /// Unpacks a damaged layer again from its blob and puts it in the old one's place; `false` when the blob is not
    /// there or damaged too, which removes the layer.
    fn rebuild_layer(&self, diff_id: &Digest, blob: &Digest) -> Result<bool, ImageError> {
        let rebuilt = match self.blob_path(blob) {
            None => None,
            Some(path) => {
                let file = File::open(&path).at("open", &path)?;
                match self.inner.unpack_aside(file, true, blob, diff_id) {
                    Ok((layer, sums)) if sums.compressed == Some(*blob) => Some(layer),
                    Err(crate::LayerError::Fs(e)) => return Err(e.into()),
                    Err(crate::LayerError::Blob(BlobError::Fs(e))) => return Err(e.into()),
                    _ => None,
                }
            }
        };
        let _commit = self.inner.commit();
        self.remove_layer(diff_id)?;
        match rebuilt {
            Some(layer) => {
                layer.stage();
                self.inner.settle_locked()?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn rebuild_fixup(&self, id: &Digest, records: &[ImageRecord]) -> Result<bool, ImageError> {
        let _commit = self.inner.commit();
        self.remove_layer(id)?;
        let Some(record) = records.iter().find(|record| record.fixup == Some(*id)) else { return Ok(false) };
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

    /// A container that runs on the layer keeps its directories open: they are only moved out of the way then, and
    /// removed by the next open.
    fn remove_layer(&self, diff_id: &Digest) -> Result<(), FsError> {
        let path = self.inner.layer_dir(diff_id);
        if !path.exists() {
            return Ok(());
        }
        if collect::mounted_layers(&self.inner.layers_dir())?.contains(diff_id) {
            let away = self.inner.layers_dir().join(format!("{}{}", fsio::TEMPORARY, fsio::unique()));
            return std::fs::rename(&path, away).at("move away", &path);
        }
        self.inner.discard_layer(&path)
    }
}

fn users(records: &[ImageRecord], uses: impl Fn(&ImageRecord) -> bool) -> Vec<String> {
    records.iter().filter(|record| uses(record)).map(|record| record.reference.clone()).collect()
}

fn hash(mut file: File) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..n]);
    }
}

fn boot_id() -> Option<Vec<u8>> {
    fsio::read_small(Path::new("/proc/sys/kernel/random/boot_id"), 4096).ok().flatten()
}
