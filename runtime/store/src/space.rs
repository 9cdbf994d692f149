//! Free space and inodes.

use crate::fsio::{At, FsError};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// What is left on a file system for this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free_bytes: u64,
    /// `None` where inodes are made on demand (btrfs, xfs in part).
    pub free_inodes: Option<u64>,
}

pub(crate) fn free(fd: impl AsFd, path: &Path) -> Result<Space, FsError> {
    let stat = nix::sys::statvfs::fstatvfs(fd).at("look at the free space of", path)?;
    let free_inodes = (stat.files() > 0).then_some(stat.files_available());
    Ok(Space { free_bytes: stat.blocks_available().saturating_mul(stat.fragment_size()), free_inodes })
}

/// Fails with `ENOSPC` when less is left.
pub(crate) fn require(fd: impl AsFd, path: &Path, bytes: u64, inodes: u64) -> Result<(), FsError> {
    let space = free(fd, path)?;
    if space.free_bytes < bytes || space.free_inodes.is_some_and(|free| free < inodes) {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC)).at("write to", path);
    }
    Ok(())
}
