//! Layers: from the bytes of a blob to a directory named by the layer's diff id.

use crate::blob::{BlobError, BlobWriter, Partial};
use crate::census::Census;
use crate::fsio::{self, At, FsError, TEMPORARY};
use crate::path::show;
use crate::store::Inner;
use crate::stream::{Budget, LayerStream, Sums};
use crate::unpack::{self, Limits, UnpackError, Unpacked};
use crate::{Digest, Store, is_no_space};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

/// Network reads are gathered to pieces of this size: one hash, one write and one hand-over each.
const CHUNK: usize = 128 * 1024;
/// Pieces between the writer of a blob and the unpacker of its layer. Bounds memory; the network waits when unpacking
/// is slower.
const CHUNKS_IN_FLIGHT: usize = 8;
const MAX_RECORD: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("cannot unpack layer {diff_id}")]
    Unpack {
        diff_id: Digest,
        #[source]
        source: UnpackError,
    },
    #[error("layer {diff_id} has the wrong content: its diff id is {actual}")]
    WrongDiffId { diff_id: Digest, actual: Digest },
    #[error("the unpacking thread of layer {0} died")]
    Died(Digest),
}

/// `layer.json`: what is known about a layer without looking at its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) version: u32,
    pub(crate) diff_id: Digest,
    /// The blob it was unpacked from.
    pub(crate) blob: Digest,
    pub(crate) entries: u64,
    pub(crate) size_bytes: u64,
    pub(crate) census: Census,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) opaque_root: bool,
    /// Directories that only lower layers can describe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) implicit_dirs: Vec<String>,
    /// Hard links to files of lower layers: link to target.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) lower_links: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) dropped: BTreeMap<String, u64>,
}

impl Store {
    /// Whether the layer is unpacked: verified when it was, durable or about to be with the next commit. One without a
    /// readable record is not: unpacking it again takes its place.
    pub fn has_layer(&self, diff_id: &Digest) -> bool {
        self.inner.state().layers.contains_key(diff_id) || self.inner.is_published(diff_id)
    }

    /// Unpacks a layer from its compressed bytes, which end up nowhere else: checks both digests, is durable when it
    /// returns. Nothing is read when the layer is there.
    pub fn unpack_layer(&self, reader: impl Read, blob: &Digest, diff_id: &Digest) -> Result<(), LayerError> {
        if self.has_layer(diff_id) {
            return Ok(());
        }
        let (layer, sums) = self.inner.unpack_aside(reader, true, blob, diff_id)?;
        if let Some(actual) = sums.compressed
            && actual != *blob
        {
            return Err(BlobError::WrongDigest { digest: *blob, actual }.into());
        }
        layer.stage();
        Ok(self.settle()?)
    }

    /// Unpacks a layer from its kept blob; durable with the next commit.
    pub fn unpack_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), LayerError> {
        if self.has_layer(diff_id) {
            return Ok(());
        }
        self.inner.unpack_kept(blob, diff_id)?.stage();
        Ok(())
    }

    /// Takes a layer in while it arrives: one pass hashes, stores, inflates, hashes again and unpacks. Unpacking runs
    /// on a thread of its own; both results are durable with the next commit.
    pub fn layer_ingest(
        &self,
        blob: &Digest,
        size: u64,
        diff_id: &Digest,
    ) -> Result<LayerIngest, LayerError> {
        let writer = self.begin_blob(blob, size)?;
        let there = writer.written();
        let (to_worker, from_writer) = sync_channel(CHUNKS_IN_FLIGHT);
        let (to_writer, recycled) = sync_channel(CHUNKS_IN_FLIGHT);
        // What an earlier transfer left is unpacked from its file; the rest follows from memory.
        let resumed = match there {
            0 => None,
            _ => Some(File::open(writer.path()).at("open", writer.path())?),
        };
        let source = Pieces {
            resumed: resumed.map(|f| f.take(there)),
            from_writer,
            to_writer,
            piece: Vec::new(),
            at: 0,
        };
        let inner = Arc::clone(&self.inner);
        let (blob, diff_id) = (*blob, *diff_id);
        let worker = thread::Builder::new()
            .name("unpack".into())
            .spawn(move || inner.unpack_aside(source, false, &blob, &diff_id).map(|(layer, _)| layer))
            .at("start a thread to unpack in", &self.inner.layers_dir())?;
        Ok(LayerIngest {
            diff_id,
            writer: Some(writer),
            offset: there,
            piece: Vec::with_capacity(CHUNK),
            to_worker: Some(to_worker),
            recycled,
            worker: Some(worker),
        })
    }

    pub(crate) fn layer_record(&self, diff_id: &Digest) -> Result<Option<LayerRecord>, FsError> {
        let staged = self.inner.state().layers.get(diff_id).cloned();
        // A staged one may be published, and so be gone from its place, between the two looks.
        for dir in staged.into_iter().chain([self.inner.layer_dir(diff_id)]) {
            if let Some(record) = read_record(&dir)? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }
}

fn read_record(dir: &Path) -> Result<Option<LayerRecord>, FsError> {
    let path = dir.join("layer.json");
    let Some(bytes) = fsio::read_small(&path, MAX_RECORD)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(io::Error::from).at("read", &path)
}

/// A layer that is arriving. Write the blob's bytes from [`LayerIngest::offset`] on, then [`LayerIngest::finish`].
/// Dropping it gives up and keeps what has arrived.
#[derive(Debug)]
pub struct LayerIngest {
    diff_id: Digest,
    writer: Option<BlobWriter>,
    offset: u64,
    piece: Vec<u8>,
    to_worker: Option<SyncSender<Vec<u8>>>,
    recycled: Receiver<Vec<u8>>,
    worker: Option<JoinHandle<Result<TemporaryLayer, LayerError>>>,
}

impl LayerIngest {
    /// Bytes of the blob that are there already: the transfer starts after them.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether bytes of an earlier transfer are used; see [`BlobWriter::resumed`].
    pub fn resumed(&self) -> bool {
        self.offset > 0
    }

    /// Adds bytes. Blocks while unpacking is behind. An error is final.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        while !bytes.is_empty() {
            let n = bytes.len().min(CHUNK - self.piece.len());
            self.piece.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.piece.len() == CHUNK {
                self.flush_piece()?;
            }
        }
        Ok(())
    }

    /// Checks the blob's size and digest and the layer's diff id. Blob and layer are complete; the next
    /// [`Store::commit_image`] or [`Store::settle`] makes them durable.
    pub fn finish(mut self) -> Result<(), LayerError> {
        self.flush_piece()?;
        drop(self.to_worker.take());
        let Some(mut writer) = self.writer.take() else { return Err(LayerError::Died(self.diff_id)) };
        if writer.written() < writer.size() {
            let (digest, size, got) = (*writer.digest(), writer.size(), writer.written());
            let _ = self.join();
            return Err(BlobError::TooShort { digest, size, got }.into());
        }
        let unpacked = self.join();
        let layer = match unpacked {
            Ok(layer) => layer,
            Err(e) => {
                // Wrong bytes are why unpacking failed, when they are wrong: that is the error to report.
                writer.verify_file()?;
                writer.remove()?;
                return Err(e);
            }
        };
        writer.stage()?;
        layer.stage();
        Ok(())
    }

    pub fn abort(mut self, partial: Partial) -> Result<(), LayerError> {
        if let Some(writer) = self.writer.take() {
            writer.abort(partial)?;
        }
        Ok(())
    }

    fn flush_piece(&mut self) -> Result<(), LayerError> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let (Some(writer), Some(to_worker)) = (&mut self.writer, &self.to_worker) else {
            return Err(LayerError::Died(self.diff_id));
        };
        writer.write(&self.piece)?;
        let next = self.recycled.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK));
        let piece = std::mem::replace(&mut self.piece, next);
        self.piece.clear();
        if to_worker.send(piece).is_ok() {
            return Ok(());
        }
        // The unpacker has stopped early; its reason is the one that matters.
        self.to_worker = None;
        match self.join() {
            // It read the archive's end and the stream's: more bytes than that cannot come.
            Ok(_) => Err(LayerError::Died(self.diff_id)),
            Err(e) => {
                if let Some(mut writer) = self.writer.take()
                    && (is_no_space(&e) || matches!(e, LayerError::Unpack { .. }))
                {
                    writer.remove()?;
                }
                Err(e)
            }
        }
    }

    fn join(&mut self) -> Result<TemporaryLayer, LayerError> {
        match self.worker.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(LayerError::Died(self.diff_id)),
        }
    }
}

impl io::Write for LayerIngest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LayerIngest {
    fn drop(&mut self) {
        // The unpacker sees the end of its input, fails or not, and removes what it made.
        drop(self.to_worker.take());
        let _ = self.join();
    }
}

/// The reading end of an ingest: first the file of an earlier transfer, then pieces from memory.
struct Pieces {
    resumed: Option<io::Take<File>>,
    from_writer: Receiver<Vec<u8>>,
    to_writer: SyncSender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Some(resumed) = &mut self.resumed {
            match resumed.read(out)? {
                0 => self.resumed = None,
                n => return Ok(n),
            }
        }
        if self.at == self.piece.len() {
            let Ok(next) = self.from_writer.recv() else { return Ok(0) };
            let used = std::mem::replace(&mut self.piece, next);
            self.at = 0;
            // The writer may have stopped taking them back.
            let _ = self.to_writer.try_send(used);
        }
        let n = out.len().min(self.piece.len() - self.at);
        out[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl Inner {
    /// Whether a layer is in its place, with a record that says so.
    pub(crate) fn is_published(&self, diff_id: &Digest) -> bool {
        let dir = self.layer_dir(diff_id);
        matches!(read_record(&dir), Ok(Some(record)) if record.diff_id == *diff_id) && dir.join("fs").is_dir()
    }

    /// Unpacks a kept blob. One that turns out to be damaged is removed, so that the next pull fetches it.
    pub(crate) fn unpack_kept(
        self: &Arc<Self>,
        blob: &Digest,
        diff_id: &Digest,
    ) -> Result<TemporaryLayer, LayerError> {
        let staged = self.state().blobs.get(blob).cloned();
        let path = staged.filter(|path| path.is_file()).unwrap_or_else(|| self.blob_path(blob));
        let file = File::open(&path).at("open", &path)?;
        let reader = file.try_clone().at("open", &path)?;
        let failed = match self.unpack_aside(reader, true, blob, diff_id) {
            Ok((layer, sums)) if sums.compressed == Some(*blob) => return Ok(layer),
            Ok(_) => None,
            Err(e) if is_no_space(&e) || matches!(e, LayerError::Fs(_)) => return Err(e),
            Err(e) => Some(e),
        };
        // Unpacking may have ended early: only the digest of the whole tells whose fault it is.
        let actual = crate::verify::hash(&file).at("read", &path);
        match (failed, actual) {
            (Some(e), Ok(actual)) if actual == *blob => Err(e),
            (_, actual) => {
                fsio::remove_file(&path)?;
                let digest = *blob;
                Err(match actual {
                    Ok(actual) => BlobError::WrongDigest { digest, actual },
                    Err(source) => BlobError::Unreadable { digest, source },
                }
                .into())
            }
        }
    }

    pub(crate) fn unpack_aside(
        self: &Arc<Self>,
        reader: impl Read,
        hash_compressed: bool,
        blob: &Digest,
        diff_id: &Digest,
    ) -> Result<(TemporaryLayer, Sums), LayerError> {
        let layer = TemporaryLayer::new(self, *diff_id)?;
        let fail = |source| LayerError::Unpack { diff_id: *diff_id, source };
        let options = &self.options;
        let budget = Budget {
            max_bytes: options.max_layer_bytes,
            max_ratio: options.max_ratio,
            ratio_from: options.ratio_from,
        };
        let fs_path = layer.path.join("fs");
        DirBuilder::new().mode(0o755).create(&fs_path).at("create", &fs_path)?;
        let root = File::open(&fs_path).at("open", &fs_path)?;
        keel_sys::file::fchmod(&root, 0o755).at("change the mode of", &fs_path)?;
        let stream =
            LayerStream::new(reader, hash_compressed, budget).map_err(|e| fail(UnpackError::Read(e)))?;
        let limits = Limits { max_entries: options.max_layer_entries, max_cpu: options.max_layer_cpu };
        let (unpacked, sums) = unpack::unpack(stream, root.into(), &fs_path, &limits).map_err(fail)?;
        if sums.diff_id != *diff_id {
            return Err(LayerError::WrongDiffId { diff_id: *diff_id, actual: sums.diff_id });
        }
        layer.write_record(&LayerRecord::new(*blob, *diff_id, &unpacked))?;
        Ok((layer, sums))
    }
}

impl LayerRecord {
    fn new(blob: Digest, diff_id: Digest, unpacked: &Unpacked) -> LayerRecord {
        LayerRecord {
            version: 1,
            diff_id,
            blob,
            entries: unpacked.entries,
            size_bytes: unpacked.bytes,
            census: unpacked.census,
            opaque_root: unpacked.opaque_root,
            implicit_dirs: unpacked.implicit_dirs.iter().map(|path| show(path)).collect(),
            lower_links: unpacked.lower_links.iter().map(|(l, t)| (show(l), show(t))).collect(),
            dropped: unpacked.dropped.iter().map(|(what, n)| ((*what).to_owned(), *n)).collect(),
        }
    }
}

/// A layer directory under a temporary name; removed when it is dropped before it is staged.
#[derive(Debug)]
pub(crate) struct TemporaryLayer {
    inner: Arc<Inner>,
    diff_id: Digest,
    path: PathBuf,
    staged: bool,
}

impl TemporaryLayer {
    pub(crate) fn new(inner: &Arc<Inner>, diff_id: Digest) -> Result<TemporaryLayer, FsError> {
        let path = inner.layers_dir().join(format!("{TEMPORARY}{}", fsio::unique()));
        DirBuilder::new().mode(0o700).create(&path).at("create", &path)?;
        Ok(TemporaryLayer { inner: Arc::clone(inner), diff_id, path, staged: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write_record(&self, record: &LayerRecord) -> Result<(), FsError> {
        let path = self.path.join("layer.json");
        let bytes = serde_json::to_vec_pretty(record).map_err(io::Error::from).at("write", &path)?;
        // Not synced here: the sync that covers the files covers it.
        fs::write(&path, bytes).at("write", &path)
    }

    /// Complete: the next commit publishes it.
    pub(crate) fn stage(mut self) {
        let mut state = self.inner.state();
        // Two pulls of one layer at the same time: the first one stays.
        if self.inner.is_published(&self.diff_id) {
            return;
        }
        if let std::collections::btree_map::Entry::Vacant(vacant) = state.layers.entry(self.diff_id) {
            vacant.insert(self.path.clone());
            self.staged = true;
        }
    }
}

impl Drop for TemporaryLayer {
    fn drop(&mut self) {
        if !self.staged {
            // What cannot be removed now is swept by the next open.
            let _ = fsio::remove_tree(&self.path);
        }
    }
}
