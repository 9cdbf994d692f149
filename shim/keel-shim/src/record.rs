//! Files that outlive a power failure.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use crate::error::{Context, Error};

/// Temporary file, sync, rename, sync of the directory. The temporary name starts with a dot, so that a watcher of the
/// directory can tell it from a record.
pub(crate) fn write_durably(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let no_parent = || Error::new(format!("{} is not a file name", path.display()));
    let dir = path.parent().ok_or_else(no_parent)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or_else(no_parent)?);
    name.push(".tmp");
    let temporary = dir.join(name);
    let mut file = File::create(&temporary).at("create", &temporary)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all());
    if let Err(e) = written.at("write", &temporary) {
        let _ = fs::remove_file(&temporary);
        return Err(e);
    }
    fs::rename(&temporary, path).at("rename to", path)?;
    File::open(dir).and_then(|dir| dir.sync_all()).at("sync", dir)
}
