//! The last good text of every file, on disk: so that a daemon that starts with a broken file knows what it meant.
//!
//! One small file per manifest: a JSON line that says which, then the text. Mode 0600, for Secrets are in it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of the file format. Readers accept older ones and unknown fields.
const VERSION: u32 = 1;
/// Longest part of a name that is kept readable; a hash makes it unique.
const MAX_READABLE_BYTES: usize = 120;
/// Start of the name of a file that is being written.
const TEMPORARY: &str = ".new-";
/// End of the name of a file that could not be read back.
const QUARANTINE: &str = ".broken";

/// A directory of last good texts.
#[derive(Clone, Debug)]
pub struct Keep {
    dir: PathBuf,
}

/// What was read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Text by the manifest's relative path.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Files that could not be read, set aside, and why.
    pub problems: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", path.display())]
pub struct KeepError {
    pub operation: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    file: String,
}

impl Keep {
    /// Creates the directory when it is missing.
    pub fn open(dir: &Path) -> Result<Keep, KeepError> {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        created.map_err(|source| error("create directory", dir, source))?;
        Ok(Keep { dir: dir.to_owned() })
    }

    /// Everything that is kept. What cannot be read is reported, never an obstacle. Changes nothing: another process may
    /// be writing.
    pub fn load(&self) -> Result<Kept, KeepError> {
        self.read_all(|_| (), |_, _| "left out".into())
    }

    /// The same for the one process that writes: removes what a dead one left half written, and renames what cannot be
    /// read to `*.broken`.
    pub fn repair(&self) -> Result<Kept, KeepError> {
        // The version before is whole.
        let clean = |path: &Path| drop(fs::remove_file(path));
        self.read_all(clean, |path, name| {
            let aside = self.dir.join(format!("{name}{QUARANTINE}"));
            fs::rename(path, &aside).map_or_else(|e| format!("stays: {e}"), |()| "set aside".into())
        })
    }

    fn read_all(
        &self,
        unfinished: impl Fn(&Path),
        unreadable: impl Fn(&Path, &str) -> String,
    ) -> Result<Kept, KeepError> {
        let mut kept = Kept::default();
        let entries = fs::read_dir(&self.dir).map_err(|source| error("read directory", &self.dir, source))?;
        for entry in entries {
            let path = entry.map_err(|source| error("read directory", &self.dir, source))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(TEMPORARY) {
                unfinished(&path);
                continue;
            }
            if name.ends_with(QUARANTINE) {
                continue;
            }
            match read(&path) {
                Ok((file, text)) => {
                    kept.files.insert(file, text);
                }
                Err(reason) => {
                    let outcome = unreadable(&path, &name);
                    kept.problems.push(format!("{}: {reason}; {outcome}", path.display()));
                }
            }
        }
        kept.problems.sort();
        Ok(kept)
    }

    /// Makes the kept texts equal to `files`: writes what is new or changed, removes what is not named.
    pub fn store(&self, files: &BTreeMap<String, impl AsRef<[u8]>>) -> Result<(), KeepError> {
        let before = self.load()?.files;
        for (file, text) in files {
            if before.get(file).map(Vec::as_slice) != Some(text.as_ref()) {
                self.save(file, text.as_ref())?;
            }
        }
        for file in before.keys().filter(|f| !files.contains_key(*f)) {
            self.remove(file)?;
        }
        Ok(())
    }

    /// Durable when it returns: written beside, synced, renamed, directory synced.
    pub fn save(&self, file: &str, text: &[u8]) -> Result<(), KeepError> {
        let path = self.path(file);
        let temporary = self.dir.join(format!("{TEMPORARY}{}", name_of(file)));
        let header = serde_json::to_string(&Header { version: VERSION, file: file.to_owned() })
            .map_err(|e| error("encode header of", &path, e.into()))?;
        let mut out = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|source| error("create", &temporary, source))?;
        let written = out
            .write_all(header.as_bytes())
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.write_all(text))
            .and_then(|()| out.sync_all());
        if let Err(source) = written {
            let _ = fs::remove_file(&temporary);
            return Err(error("write", &temporary, source));
        }
        fs::rename(&temporary, &path).map_err(|source| error("rename to", &path, source))?;
        self.sync()
    }

    /// Forgets one file.
    pub fn remove(&self, file: &str) -> Result<(), KeepError> {
        let path = self.path(file);
        match fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(error("remove", &path, source)),
        }
    }

    fn sync(&self) -> Result<(), KeepError> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|source| error("sync directory", &self.dir, source))
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.join(name_of(file))
    }
}

fn read(path: &Path) -> Result<(String, Vec<u8>), String> {
    let bytes = fs::read(path).map_err(|e| format!("cannot read: {e}"))?;
    let end = bytes.iter().position(|b| *b == b'\n').ok_or("has no header line")?;
    let header: Header =
        serde_json::from_slice(&bytes[..end]).map_err(|e| format!("header does not parse: {e}"))?;
    if header.version > VERSION {
        return Err(format!("is of version {}, newer than {VERSION}", header.version));
    }
    Ok((header.file, bytes[end + 1..].to_vec()))
}

/// A flat name for a relative path: readable, then a hash of the whole.
fn name_of(file: &str) -> String {
    let readable = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' };
    let mut name: String = file.chars().map(readable).collect();
    name.truncate(MAX_READABLE_BYTES);
    let name = name.trim_start_matches('.');
    format!("{name}-{:016x}", fnv1a(file.as_bytes()))
}

/// FNV-1a, 64 bits: names only have to differ from each other.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn error(operation: &'static str, path: &Path, source: io::Error) -> KeepError {
    KeepError { operation, path: path.to_owned(), source }
}
