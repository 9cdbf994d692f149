//! Blobs: written aside while they arrive, hashed on the way, published under their digest.

use crate::digest::Hasher;
use crate::fsio::{self, At, FsError, TEMPORARY};
use crate::midstate::Mark;
use crate::store::Inner;
use crate::{Digest, Store};
use std::collections::btree_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes hashed at a time when a partial blob is taken up again.
const REHASH_BUFFER: usize = 256 * 1024;
/// How often it is noted how far the hash of a blob has come. What comes after the note is hashed again when the process
/// is killed: some milliseconds.
pub(crate) const EVERY: u64 = 8 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("blob {digest} is longer than its stated size of {size} bytes")]
    TooLong { digest: Digest, size: u64 },
    #[error("blob {digest} ends after {got} of {size} bytes")]
    TooShort { digest: Digest, size: u64, got: u64 },
    #[error("blob {digest} is damaged")]
    Unreadable {
        digest: Digest,
        #[source]
        source: FsError,
    },
    #[error("blob {digest} has the wrong content: its digest is {actual}")]
    WrongDigest { digest: Digest, actual: Digest },
}

/// What becomes of the bytes that have arrived when a transfer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partial {
    /// The next [`Store::begin_blob`] for the digest goes on after them.
    Keep,
    Remove,
}

/// A blob that is arriving. Dropping it keeps what has arrived.
#[derive(Debug)]
pub struct BlobWriter {
    inner: Arc<Inner>,
    digest: Digest,
    size: u64,
    file: File,
    path: PathBuf,
    /// The shared partial file of this digest, which a later writer may go on with.
    resumable: bool,
    mark: Mark,
    written: u64,
    resumed: u64,
    hasher: HasherState,
    finished: bool,
}

struct HasherState(Hasher);

impl std::fmt::Debug for HasherState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hasher")
    }
}

impl Store {
    /// Whether the blob is there: verified when it was written, durable or about to be with the next commit.
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.inner.state().blobs.contains_key(digest) || self.inner.blob_path(digest).is_file()
    }

    /// Where the blob's bytes are, `None` when it is not there.
    pub fn blob_path(&self, digest: &Digest) -> Option<PathBuf> {
        if let Some(path) = self.inner.state().blobs.get(digest).filter(|path| path.is_file()) {
            return Some(path.clone());
        }
        let path = self.inner.blob_path(digest);
        path.is_file().then_some(path)
    }

    /// Content of a small blob (manifest, config), checked against its digest. `None` when it is not there.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>, BlobError> {
        let Some(path) = self.blob_path(digest) else { return Ok(None) };
        let Some(bytes) = fsio::read_small(&path, limit)? else { return Ok(None) };
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(BlobError::WrongDigest { digest: *digest, actual });
        }
        Ok(Some(bytes))
    }

    /// Bytes of the blob that an earlier transfer left behind.
    pub fn partial_len(&self, digest: &Digest) -> u64 {
        let path = self.inner.partial_dir().join(digest.hex()).join("data");
        fs::metadata(path).map_or(0, |m| m.len())
    }

    /// Starts a blob or goes on with a partial one: [`BlobWriter::written`] says where. A second writer of the same
    /// digest at the same time starts from nothing in a file of its own.
    pub fn begin_blob(&self, digest: &Digest, size: u64) -> Result<BlobWriter, BlobError> {
        let inner = &self.inner;
        let resumable = inner.state().writing.insert(*digest);
        let path = if resumable {
            let dir = inner.partial_dir().join(digest.hex());
            fs::create_dir_all(&dir).at("create", &dir)?;
            dir.join("data")
        } else {
            inner.partial_dir().join(format!("{TEMPORARY}{}", fsio::unique()))
        };
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(&path)
            .at("create", &path);
        let file = match opened {
            Ok(file) => file,
            Err(e) => {
                if resumable {
                    inner.state().writing.remove(digest);
                }
                return Err(e.into());
            }
        };
        let mut writer = BlobWriter {
            mark: Mark::beside(&path),
            inner: Arc::clone(inner),
            digest: *digest,
            size,
            file,
            path,
            resumable,
            written: 0,
            resumed: 0,
            hasher: HasherState(Hasher::default()),
            finished: false,
        };
        writer.take_up()?;
        Ok(writer)
    }

    /// Writes a small blob whole and durably.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, FsError> {
        let digest = Digest::of(bytes);
        let path = self.inner.blob_path(&digest);
        // Read it instead of trusting its name: it is small, and damage here is healed for free.
        match fsio::read_small(&path, bytes.len() as u64) {
            Ok(Some(there)) if there == bytes => {}
            _ => fsio::write_durably(&path, bytes)?,
        }
        Ok(digest)
    }
}

impl BlobWriter {
    /// Bytes that are there: where the transfer has to go on.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Adds bytes; refuses the first one beyond the stated size.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        if bytes.len() as u64 > self.size - self.written {
            return Err(BlobError::TooLong { digest: self.digest, size: self.size });
        }
        self.file.write_all(bytes).at("write", &self.path)?;
        self.hasher.0.update(bytes);
        self.written += bytes.len() as u64;
        if self.resumable && self.mark.is_due(self.written) {
            self.mark.note(&self.hasher.0, self.written)?;
        }
        Ok(())
    }

    /// Checks size and digest, makes the blob durable and publishes it. A wrong digest removes the partial blob; a
    /// short one keeps it.
    pub fn finish(mut self) -> Result<(), BlobError> {
        self.verify()?;
        self.file.sync_all().at("sync", &self.path)?;
        let to = self.inner.blob_path(&self.digest);
        fs::rename(&self.path, &to).at("rename into place", &to)?;
        fsio::sync_dir(fsio::parent(&to))?;
        self.finished = true;
        if self.resumable {
            fsio::remove_tree(fsio::parent(&self.path))?;
        }
        Ok(())
    }

    pub fn abort(mut self, partial: Partial) -> Result<(), BlobError> {
        if partial == Partial::Remove {
            self.remove()?;
        }
        Ok(())
    }

    /// Whether bytes of an earlier transfer are part of this one: then a wrong digest may be their fault, and a
    /// fresh start is worth a try.
    pub fn resumed(&self) -> bool {
        self.resumed > 0
    }

    /// As [`BlobWriter::finish`], but the next commit makes it durable.
    pub(crate) fn stage(mut self) -> Result<(), BlobError> {
        self.verify()?;
        {
            let mut state = self.inner.state();
            let published = self.inner.blob_path(&self.digest).is_file();
            if let Entry::Vacant(vacant) = state.blobs.entry(self.digest)
                && !published
            {
                vacant.insert(self.path.clone());
                self.finished = true;
                return Ok(());
            }
        }
        // Another transfer of the same blob was faster.
        Ok(self.remove()?)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn remove(&mut self) -> Result<(), FsError> {
        if self.resumable {
            fsio::remove_tree(fsio::parent(&self.path))
        } else {
            fsio::remove_file(&self.path).map(drop)
        }
    }

    pub(crate) fn verify(&mut self) -> Result<(), BlobError> {
        if self.written < self.size {
            return Err(BlobError::TooShort { digest: self.digest, size: self.size, got: self.written });
        }
        let actual = self.hasher.0.clone().finish();
        self.compare(actual)
    }

    /// Of the bytes in the file, where those of an earlier transfer may not be any more what was hashed then.
    pub(crate) fn verify_file(&mut self) -> Result<(), BlobError> {
        self.verify()?;
        if self.resumed == 0 {
            return Ok(());
        }
        let actual = crate::verify::hash(&self.file).at("read", &self.path)?;
        self.compare(actual)
    }

    fn compare(&mut self, actual: Digest) -> Result<(), BlobError> {
        if actual != self.digest {
            self.remove()?;
            return Err(BlobError::WrongDigest { digest: self.digest, actual });
        }
        Ok(())
    }

    /// Goes on with the hash of what is there; a partial file that is longer than the blob is worthless.
    fn take_up(&mut self) -> Result<(), FsError> {
        let there = self.file.metadata().at("look at", &self.path)?.len();
        if there > self.size {
            self.file.set_len(0).at("truncate", &self.path)?;
            return Ok(());
        }
        if self.resumable && there > 0 {
            (self.hasher.0, self.written) = self.mark.load(there);
            self.file.seek(SeekFrom::Start(self.written)).at("seek in", &self.path)?;
        }
        let mut buffer = vec![0; REHASH_BUFFER.min((there - self.written) as usize)];
        loop {
            let n = if buffer.is_empty() { 0 } else { self.file.read(&mut buffer).at("read", &self.path)? };
            if n == 0 {
                break;
            }
            self.hasher.0.update(&buffer[..n]);
            self.written += n as u64;
        }
        self.resumed = self.written;
        Ok(())
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        if self.resumable {
            if !self.finished {
                // Without it the next one hashes again what is there. Nothing to note it beside when it was removed.
                let _ = self.mark.note(&self.hasher.0, self.written);
            }
            let mut state = self.inner.state();
            // A staged blob keeps its name in the set until it is published.
            if state.blobs.get(&self.digest) != Some(&self.path) {
                state.writing.remove(&self.digest);
            }
        } else if !self.finished {
            let _ = self.remove();
        }
    }
}
