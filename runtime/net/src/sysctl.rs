//! Kernel settings under `/proc/sys/net`, which shows the network namespace of the thread that looks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const ROOT: &str = "/proc/sys/net";

#[derive(Debug, thiserror::Error)]
#[error("write {value:?} to {}", path.display())]
pub struct SysctlError {
    pub path: PathBuf,
    pub value: &'static str,
    pub source: io::Error,
}

/// Writes only what differs: a host with a read-only `/proc/sys` that is set up already is fine.
/// Answers whether it wrote. `Ok(None)`: this kernel has no such setting.
pub(crate) fn ensure(name: &str, value: &'static str) -> Result<Option<bool>, SysctlError> {
    let path = Path::new(ROOT).join(name);
    match fs::read_to_string(&path) {
        Ok(found) if found.split_whitespace().eq(value.split_whitespace()) => return Ok(Some(false)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        _ => {}
    }
    match fs::write(&path, value) {
        Ok(()) => Ok(Some(true)),
        Err(source) => Err(SysctlError { path, value, source }),
    }
}
