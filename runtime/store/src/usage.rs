//! How much space images take, from records alone.

use crate::fsio::{self, FsError};
use crate::image::ImageError;
use crate::{Digest, Store};
use std::collections::BTreeMap;
use std::fs;

/// Sizes are of file contents; file system overhead and holes are not looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub images: Vec<ImageUsage>,
    /// Unpacked layers of all images, each once.
    pub layers_bytes: u64,
    /// All blobs.
    pub blobs_bytes: u64,
    /// Blobs that are still arriving or were given up.
    pub partial_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageUsage {
    pub reference: String,
    /// Layers that no other manifest uses: what removing the image frees.
    pub unique_bytes: u64,
    pub shared_bytes: u64,
    /// Blobs of other platforms, where the image is kept with its index.
    pub index_bytes: u64,
}

impl Store {
    pub fn usage(&self) -> Result<Usage, ImageError> {
        let records = self.records()?;
        // Two references to one manifest share everything, and neither frees anything.
        let mut sizes: BTreeMap<Digest, u64> = BTreeMap::new();
        let mut users: BTreeMap<Digest, usize> = BTreeMap::new();
        let ids = |record: &crate::image::ImageRecord| {
            let mut ids: Vec<Digest> = record.layers.iter().map(|layer| layer.diff_id).collect();
            ids.extend(record.fixup);
            ids.sort();
            ids.dedup();
            ids
        };
        for (_, record) in &records {
            for id in ids(record) {
                *users.entry(id).or_default() += 1;
                if let std::collections::btree_map::Entry::Vacant(vacant) = sizes.entry(id) {
                    // A damaged layer is reported by verification, not by a sum.
                    vacant.insert(self.layer_record(&id).ok().flatten().map_or(0, |layer| layer.size_bytes));
                }
            }
        }
        let mut usage = Usage { layers_bytes: sizes.values().sum(), ..Usage::default() };
        for (_, record) in &records {
            let (unique, shared): (Vec<_>, Vec<_>) = ids(record).into_iter().partition(|id| users[id] == 1);
            let sum = |ids: &[Digest]| ids.iter().map(|id| sizes[id]).sum();
            usage.images.push(ImageUsage {
                reference: record.reference.clone(),
                unique_bytes: sum(&unique),
                shared_bytes: sum(&shared),
                index_bytes: self.index_bytes(record),
            });
        }
        usage.images.sort_by(|a, b| a.reference.cmp(&b.reference));
        usage.blobs_bytes = sum_files(&self.inner.blobs_dir(), "")?;
        usage.partial_bytes = sum_files(&self.inner.partial_dir(), "data")?;
        Ok(usage)
    }
}

impl Store {
    fn index_bytes(&self, record: &crate::image::ImageRecord) -> u64 {
        let own = |digest: &Digest| {
            *digest == record.config || record.layers.iter().any(|layer| layer.blob_digest == *digest)
        };
        let Some(index) = &record.index else { return 0 };
        let others = index.blobs().into_iter().filter(|blob| !own(&blob.digest));
        // Some may have been given up for space.
        others.filter(|blob| self.has_blob(&blob.digest)).map(|blob| blob.size).sum()
    }
}

/// Lengths of the entries of `dir`, or of the file `inner` in each of them.
fn sum_files(dir: &std::path::Path, inner: &str) -> Result<u64, FsError> {
    let mut sum = 0;
    for name in fsio::list(dir)? {
        let path = if inner.is_empty() { dir.join(name) } else { dir.join(name).join(inner) };
        sum += fs::metadata(path).map_or(0, |m| m.len());
    }
    Ok(sum)
}
