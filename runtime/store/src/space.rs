//! Free space and inodes.

use crate::fsio::{At, FsError};
use crate::{Digest, Store};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// What is left on a file system for this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free_bytes: u64,
    pub used_bytes: u64,
    /// `None` where inodes are made on demand (btrfs, xfs in part).
    pub free_inodes: Option<u64>,
    pub used_inodes: u64,
}

impl Space {
    /// Of bytes or of inodes, whichever is scarcer; rounded up, as `df` does.
    pub fn used_percent(&self) -> u8 {
        let percent = |used: u64, free: u64| match u128::from(used) + u128::from(free) {
            0 => 0,
            all => (u128::from(used) * 100).div_ceil(all) as u8,
        };
        let inodes = self.free_inodes.map_or(0, |free| percent(self.used_inodes, free));
        percent(self.used_bytes, self.free_bytes).max(inodes)
    }
}

/// What a layer that is not there takes besides its content: its directory and record, the root of its files, its blob.
const INODES_OF_LAYER: u64 = 4;

impl Store {
    /// Refuses what cannot fit before it has filled the disk; gives the error of a full one, with the figures. Each layer
    /// (blob, its size, diff id) needs its own size for the blob and, where it is unpacked, at least that again. How many
    /// files it has is not known yet.
    pub fn preflight(
        &self,
        layers: impl IntoIterator<Item = (Digest, u64, Option<Digest>)>,
    ) -> Result<(), FsError> {
        let (mut bytes, mut inodes) = (0u64, 0u64);
        for (blob, size, diff_id) in layers {
            if !self.has_blob(&blob) {
                bytes = bytes.saturating_add(size.saturating_sub(self.partial_len(&blob)));
                inodes += 1;
            }
            if diff_id.is_some_and(|diff_id| !self.has_layer(&diff_id)) {
                bytes = bytes.saturating_add(size);
                inodes += INODES_OF_LAYER - 1;
            }
        }
        // Not knowing the free space is no reason to refuse.
        let Ok(space) = self.space() else { return Ok(()) };
        if space.free_bytes >= bytes && space.free_inodes.is_none_or(|free| free >= inodes) {
            return Ok(());
        }
        let free_inodes = match space.free_inodes {
            Some(free) => format!(" and {free} inodes"),
            None => String::new(),
        };
        let figures = format!(
            "at least {bytes} bytes and {inodes} inodes are needed, {} bytes{free_inodes} are free",
            space.free_bytes
        );
        Err(io::Error::new(io::ErrorKind::StorageFull, figures)).at("make room in", &self.inner.layers_dir())
    }
}

pub(crate) fn free(fd: impl AsFd, path: &Path) -> Result<Space, FsError> {
    let stat = nix::sys::statvfs::fstatvfs(fd).at("look at the free space of", path)?;
    let free_inodes = (stat.files() > 0).then_some(stat.files_available());
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok(Space {
        free_bytes: bytes(stat.blocks_available()),
        used_bytes: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
        free_inodes,
        used_inodes: stat.files().saturating_sub(stat.files_free()),
    })
}

/// Fails with `ENOSPC` when less is left.
pub(crate) fn require(fd: impl AsFd, path: &Path, bytes: u64, inodes: u64) -> Result<(), FsError> {
    let space = free(fd, path)?;
    if space.free_bytes < bytes || space.free_inodes.is_some_and(|free| free < inodes) {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC)).at("write to", path);
    }
    Ok(())
}
