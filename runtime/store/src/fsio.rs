//! Files of the store itself: every error says what was done to which path, and every write that matters is
//! temporary file, fsync, rename, fsync of the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An operation on one path that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {}", path.display())]
pub struct FsError {
    pub op: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

/// Whether an error chain ends in a full disk or an exhausted quota: the caller may free space and try again.
pub fn is_no_space(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && matches!(io.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether the disk has lost what was written: it says so, or the file system finds its own structures wrong.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EUCLEAN | libc::EBADMSG))
}

/// Names the operation and the path of an io error.
pub(crate) trait At<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, FsError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, FsError> {
        self.map_err(|source| FsError { op, path: path.to_owned(), source })
    }
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, FsError> {
        self.map_err(io::Error::from).at(op, path)
    }
}

/// Replaces `path` by `bytes`: after a power cut it holds the old or the new content, never part of either.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), FsError> {
    replace(path, bytes, true)?;
    sync_dir(parent(path))
}

/// As [`write_durably`], for what means nothing after a power cut.
pub(crate) fn write_for_this_boot(path: &Path, bytes: &[u8]) -> Result<(), FsError> {
    replace(path, bytes, false)
}

fn replace(path: &Path, bytes: &[u8], durably: bool) -> Result<(), FsError> {
    let dir = parent(path);
    let temporary = dir.join(format!("{TEMPORARY}{}", unique()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&temporary)
            .at("create", &temporary)?;
        file.write_all(bytes).at("write", &temporary)?;
        if durably {
            file.sync_all().at("sync", &temporary)?;
        }
        fs::rename(&temporary, path).at("rename into place", path)
    })();
    if let Err(e) = written {
        // The first failure is the one to report; a left-over is swept by the next open.
        let _ = fs::remove_file(&temporary);
        return Err(e);
    }
    Ok(())
}

/// Makes names created, renamed or removed in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), FsError> {
    File::open(dir).at("open", dir)?.sync_all().at("sync", dir)
}

pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// `true` when it was there.
pub(crate) fn remove_file(path: &Path) -> Result<bool, FsError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.at("remove", path).map(|()| true),
    }
}

/// Removes a file or a directory with all that is below it; nothing there is success.
pub(crate) fn remove_tree(path: &Path) -> Result<(), FsError> {
    use std::os::fd::AsFd;
    let dir = parent(path);
    let removed = File::open(dir).and_then(|dir| {
        let name = keel_sys::file::c_path(path.file_name().unwrap_or_default())?;
        crate::tree::remove(dir.as_fd(), &name)
    });
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", path),
    }
}

/// The content of a file of at most `limit` bytes, `None` when there is no such file.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FsError> {
    use std::io::Read;
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.at("open", path)?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).at("read", path)?;
    if bytes.len() as u64 > limit {
        let too_long = io::Error::other(format!("longer than the limit of {limit} bytes"));
        return Err(too_long).at("read", path);
    }
    Ok(Some(bytes))
}

/// As [`read_small`], with nothing for what the disk does not give any more. It is asked twice: what is only hard to read
/// is not lost.
pub(crate) fn read_what_is_left(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FsError> {
    let damaged = |e: &FsError| is_damage(&e.source);
    match read_small(path, limit) {
        Err(e) if damaged(&e) => match read_small(path, limit) {
            Err(e) if damaged(&e) => Ok(Some(Vec::new())),
            other => other,
        },
        other => other,
    }
}

/// The names in a directory, sorted; empty when the directory is not there.
pub(crate) fn list(dir: &Path) -> Result<Vec<std::ffi::OsString>, FsError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.at("list", dir)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.at("list", dir)?.file_name());
    }
    names.sort();
    Ok(names)
}

/// Names that start like this are unfinished: [`crate::Store::open`] removes them.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// A name part that no other call in any living process of this boot has made.
pub(crate) fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{SystemTime, UNIX_EPOCH};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    format!("{}-{:x}-{}", std::process::id(), nanos, NEXT.fetch_add(1, Ordering::Relaxed))
}
