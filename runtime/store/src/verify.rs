//! Whether what is on disk is still what was written, and putting it right.

use crate::census::{self, Census};
use crate::digest::Hasher;
use crate::fsio::{self, At, FsError};
use crate::image::{ImageError, ImageRecord, MAX_CONFIG, MAX_MANIFEST};
use crate::{Digest, Store, heal};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

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
    /// Images that cannot be run and were set aside (with repair, or earlier) or would be: pull or import them again.
    pub lost_images: Vec<LostImage>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostImage {
    pub reference: String,
    /// What has to be pulled to have the same image again.
    pub manifest: Digest,
    /// The index that was kept with it.
    pub index: Option<Digest>,
    pub pinned: bool,
    pub problem: String,
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
        !self.inner.state().checked.all
    }

    /// Checks every layer and every blob that an image needs. With `repair`, damaged layers are unpacked again from
    /// their blobs, damaged blobs are removed, and images that cannot be made whole here are set aside.
    pub fn verify(&self, depth: Depth, repair: bool) -> Result<Report, ImageError> {
        let mut report = Report::default();
        for (_, record) in self.records_aside()? {
            report.lost_images.push(LostImage::new(record, "set aside as damaged earlier".into()));
        }
        let records: Vec<ImageRecord> = self.records()?.into_iter().map(|(_, record)| record).collect();
        self.verify_blobs(&records, depth, repair, &mut report)?;
        self.verify_layers(&records, depth, repair, &mut report)?;
        for record in records {
            let Some(problem) = self.why_lost(&record, &report) else { continue };
            if repair {
                let _commit = self.inner.commit();
                self.quarantine(&self.inner.record_path(&record.reference))?;
            }
            report.lost_images.push(LostImage::new(record, problem));
        }
        if repair {
            let _commit = self.inner.commit();
            self.refresh_index()?;
            self.sweep_aside()?;
            self.inner.state().checked.all = true;
            self.inner.note_checked();
        }
        Ok(report)
    }

    /// Why an image cannot be used; `None` when it can.
    fn why_lost(&self, record: &ImageRecord, report: &Report) -> Option<String> {
        for id in record.layers.iter().map(|layer| layer.diff_id).chain(record.fixup) {
            if let Some(damage) = report.damage.iter().find(|damage| damage.digest == id && !damage.repaired)
            {
                return Some(format!("layer {id} is damaged: {}", damage.problem));
            }
        }
        let unreadable = |what: &str, digest: &Digest, limit| match self.read_blob(digest, limit) {
            Ok(Some(_)) => None,
            Ok(None) => Some(format!("its {what} {digest} is not there")),
            Err(e) => Some(format!("its {what} cannot be used: {e}")),
        };
        unreadable("manifest", &record.manifest.digest, MAX_MANIFEST)
            .or_else(|| unreadable("config", &record.config, MAX_CONFIG))
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
            let Some(index) = &record.index else { continue };
            wanted.insert(index.digest, Some(index.size));
            wanted.extend(index.members.iter().map(|member| (member.digest, Some(member.size))));
            wanted.extend(index.blobs().iter().map(|blob| (blob.digest, Some(blob.size))));
        }
        for (digest, size) in wanted {
            let path = self.inner.blob_path(&digest);
            let Ok(file) = File::open(&path) else {
                // Blobs of layers may have been given up for space; what names them never is.
                let images = users(records, |record| record.index.as_ref().is_some_and(|i| i.lists(&digest)));
                if !images.is_empty() {
                    let problem = "it is not there".into();
                    report.damage.push(Damage { digest, problem, images, repaired: false });
                }
                continue;
            };
            report.blobs += 1;
            let len = file.metadata().at("look at", &path)?.len();
            let problem = match size {
                Some(size) if size != len => Some(format!("blob has {len} bytes instead of {size}")),
                // Manifests and configs are short and everything hangs on them.
                _ if depth == Depth::Full || len <= MAX_CONFIG => match hash(&file) {
                    Ok(actual) if actual == digest => None,
                    Ok(actual) => Some(format!("blob has the wrong content: its digest is {actual}")),
                    Err(e) => Some(format!("blob is not readable: {e}")),
                },
                _ => None,
            };
            if let Some(problem) = problem {
                let repaired = repair && fsio::remove_file(&path)?;
                let images = users(records, |record| record.blobs().contains(&digest));
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
            let healing = self.inner.healing();
            let Some(problem) = self.layer_problem(&diff_id, depth) else { continue };
            let repaired = repair && self.rebuild(&diff_id, blob.as_ref())?;
            drop(healing);
            let images = users(records, |record| heal::needs(record, &diff_id));
            report.damage.push(Damage { digest: diff_id, problem, images, repaired });
        }
        Ok(())
    }

    /// What is wrong with a layer; `None` when nothing is.
    pub(crate) fn layer_problem(&self, diff_id: &Digest, depth: Depth) -> Option<String> {
        let record = match self.layer_record(diff_id) {
            Ok(Some(record)) if record.diff_id == *diff_id => record,
            Ok(None) => return Some("it is not there".into()),
            Ok(Some(_)) => return Some("layer.json is of another layer".into()),
            Err(e) => return Some(format!("layer.json is not readable: {}", e.source)),
        };
        let path = self.inner.layer_dir(diff_id).join("fs");
        // An I/O error is damage too: the disk has lost what was written.
        let root = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Some("it has no files".into()),
            Err(e) => return Some(format!("its files are not readable: {e}")),
            Ok(root) => root,
        };
        let now: Census = match census::take(root.as_fd(), depth == Depth::Full) {
            Ok(now) => now,
            Err(e) => return Some(format!("its files are not readable: {e}")),
        };
        let then = record.census;
        if now.names != then.names {
            Some(format!("it has {} files and directories instead of {}", now.names, then.names))
        } else if now.meta != then.meta {
            Some("lengths, owners or modes of files have changed".into())
        } else if depth == Depth::Full && now.content != then.content {
            Some("contents of files have changed".into())
        } else {
            None
        }
    }
}

impl LostImage {
    fn new(record: ImageRecord, problem: String) -> LostImage {
        LostImage {
            pinned: record.pinned,
            manifest: record.manifest.digest,
            index: record.index.map(|index| index.digest),
            reference: record.reference,
            problem,
        }
    }
}

fn users(records: &[ImageRecord], uses: impl Fn(&ImageRecord) -> bool) -> Vec<String> {
    records.iter().filter(|record| uses(record)).map(|record| record.reference.clone()).collect()
}

/// The digest of a whole file, wherever its position is.
pub(crate) fn hash(file: &File) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    loop {
        let n = file.read_at(&mut buffer, at)?;
        at += n as u64;
        if n == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..n]);
    }
}
