//! Small files that must be whole or absent: written aside, renamed into place; unreadable ones are set apart, never fatal.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// An io error with the operation and the path.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}", path.display())]
pub struct PathError {
    pub operation: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

/// `result.at("open", path)` in place of six lines.
pub(crate) trait At<T> {
    fn at(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, PathError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, PathError> {
        self.map_err(|source| PathError { operation, path: path.as_ref().to_path_buf(), source })
    }
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, PathError> {
        self.map_err(io::Error::from).at(operation, path)
    }
}

/// How long the contents must survive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Until reboot: rename only.
    Boot,
    /// Through a power cut: fsync of the file, rename, fsync of the directory.
    Durable,
}

/// A name beside `path` that no other thread and no other process writes to.
fn aside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{count}.tmp", std::process::id()))
}

/// Replaces `path` by `contents`, mode 0600.
pub fn write_file(path: &Path, contents: &[u8], keep: Keep) -> Result<(), PathError> {
    let temporary = aside(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .at("create", &temporary)?;
    let written = file.write_all(contents).at("write", &temporary).and_then(|()| match keep {
        Keep::Boot => Ok(()),
        Keep::Durable => file.sync_all().at("fsync", &temporary),
    });
    if let Err(error) = written.and_then(|()| fs::rename(&temporary, path).at("rename to", path)) {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    if keep == Keep::Durable {
        let parent = path.parent().unwrap_or(Path::new("/"));
        File::open(parent).and_then(|dir| dir.sync_all()).at("fsync directory", parent)?;
    }
    Ok(())
}

pub fn write_json<T: Serialize>(path: &Path, value: &T, keep: Keep) -> Result<(), PathError> {
    let text = serde_json::to_vec(value).map_err(io::Error::other).at("encode", path)?;
    write_file(path, &text, keep)
}

/// `None` when the file does not exist, or does not parse: then it is renamed to `<name>.broken` for a person to look at,
/// since state is a cache that the next round rebuilds.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, PathError> {
    let problem = match fs::read(path) {
        Ok(text) => match serde_json::from_slice(&text) {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error.to_string(),
        },
        // Something of another kind in the way of the directory that the file would be in is as good as no file.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) if e.kind() == io::ErrorKind::IsADirectory => e.to_string(),
        Err(e) => return Err(e).at("read", path),
    };
    let aside = path.with_extension("broken");
    tracing::warn!(path = %path.display(), aside = %aside.display(), problem, "state file does not parse; set aside");
    fs::rename(path, &aside).at("set aside", path)?;
    Ok(None)
}

/// Names in a directory, sorted. What is missing, or no directory, is empty.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, PathError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(e).at("list", dir),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.at("list", dir)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes a file; absence is success.
pub(crate) fn remove_file(path: &Path) -> Result<(), PathError> {
    match fs::remove_file(path) {
        // A read-only file system says so before it looks for the name.
        Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem && path.symlink_metadata().is_err() => Ok(()),
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).at("remove", path),
        _ => Ok(()),
    }
}

/// Removes a tree without following symbolic links; absence is success. Mounts below must be gone already:
/// a mount point answers EBUSY, and nothing behind it is touched.
pub(crate) fn remove_tree(path: &Path) -> Result<(), PathError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).at("remove", path),
        _ => Ok(()),
    }
}

/// Whatever it is.
pub(crate) fn remove_tree_or_file(path: &Path) -> Result<(), PathError> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => remove_tree(path),
        _ => remove_file(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_is_set_aside_and_reads_as_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        write_file(&path, b"{\"a\":", Keep::Durable).unwrap();
        assert_eq!(read_json::<serde_json::Value>(&path).unwrap(), None);
        assert!(!path.exists());
        assert!(dir.path().join("x.broken").exists());
        write_json(&path, &vec![1, 2], Keep::Boot).unwrap();
        assert_eq!(read_json::<Vec<u8>>(&path).unwrap(), Some(vec![1, 2]));
    }
}
