//! One number for a whole layer: what its files are and what is in them, without a list of them.
//!
//! Each name gives a hash of its path, type, owner, mode and length, each file a checksum of its content; a layer's
//! census is their sum, so the order does not matter and unpacking computes it on the way. It finds what a power cut
//! or a failing disk does (files that are empty, short, missing or changed); it is no defence against root.

use crate::path::show;
use crate::tree;
use keel_sys::file;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

const BUFFER: usize = 256 * 1024;
/// Zeros that [`update_zeros`] adds at once.
const LARGEST_RUN: u64 = 1 << 31;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Sum(u128);

/// Names without the root, and the sums over them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Census {
    pub(crate) names: u64,
    /// What a walk without reading can see.
    pub(crate) meta: Sum,
    /// Of the content of regular files; hard-linked ones count once.
    pub(crate) content: Sum,
}

impl Census {
    pub(crate) fn add_name(&mut self, path: &[u8], stat: &Seen<'_>) {
        let mut hasher = Sha256::new();
        for number in [u64::from(stat.mode), stat.uid.into(), stat.gid.into(), stat.detail] {
            hasher.update(number.to_le_bytes());
        }
        hasher.update((path.len() as u64).to_le_bytes());
        hasher.update(path);
        hasher.update(stat.link);
        self.names += 1;
        self.meta.add(hasher);
    }

    pub(crate) fn add_content(&mut self, len: u64, crc: u32) {
        let mut hasher = Sha256::new();
        hasher.update(len.to_le_bytes());
        hasher.update(crc.to_le_bytes());
        self.content.add(hasher);
    }
}

/// What is counted of one name.
pub(crate) struct Seen<'a> {
    /// With the type bits; without permissions for links, which have none.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Length of a regular file, number of a device.
    pub(crate) detail: u64,
    pub(crate) link: &'a [u8],
}

impl Sum {
    fn add(&mut self, hasher: Sha256) {
        let hash: [u8; 32] = hasher.finalize().into();
        let mut low = [0; 16];
        low.copy_from_slice(&hash[..16]);
        self.0 = self.0.wrapping_add(u128::from_le_bytes(low));
    }
}

impl From<Sum> for String {
    fn from(sum: Sum) -> String {
        format!("{:032x}", sum.0)
    }
}

impl TryFrom<String> for Sum {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Sum, Self::Error> {
        u128::from_str_radix(&text, 16).map(Sum)
    }
}

/// Takes the census of a directory that is there. Without `content` nothing is read and that sum is 0.
pub(crate) fn take(root: BorrowedFd<'_>, content: bool) -> io::Result<Census> {
    let mut census = Census::default();
    let mut linked = BTreeSet::new();
    let mut buffer = if content { vec![0; BUFFER] } else { Vec::new() };
    let mut todo = vec![Vec::new()];
    while let Some(dir) = todo.pop() {
        let here = tree::open_dir(root, &dir)?;
        for name in tree::names(here.as_fd())? {
            let path = tree::join(&dir, name.to_bytes());
            let stat = add_path(&mut census, here.as_fd(), &name, &path)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", show(&path))))?;
            if stat.is_dir() {
                todo.push(path);
            } else if content && stat.kind() == libc::S_IFREG && linked.insert(stat.ino) {
                let flags = libc::O_RDONLY | libc::O_NOFOLLOW;
                let file = File::from(file::openat(&here, &name, flags, 0)?);
                let (len, crc) = checksum(file, &mut buffer)?;
                census.add_content(len, crc);
            }
        }
    }
    Ok(census)
}

/// Adds one name by looking at it.
pub(crate) fn add_path(
    census: &mut Census,
    dir: BorrowedFd<'_>,
    name: &CStr,
    path: &[u8],
) -> io::Result<file::Stat> {
    let stat = file::fstatat(dir, name, libc::AT_SYMLINK_NOFOLLOW)?;
    let mut buffer = [0; libc::PATH_MAX as usize];
    let link = if stat.is_symlink() { file::readlinkat(dir, name, &mut buffer)? } else { &[] };
    let detail = match stat.kind() {
        libc::S_IFREG => stat.size,
        libc::S_IFCHR | libc::S_IFBLK => stat.rdev,
        _ => 0,
    };
    let mode = if stat.is_symlink() { libc::S_IFLNK } else { stat.mode };
    census.add_name(path, &Seen { mode, uid: stat.uid, gid: stat.gid, detail, link });
    Ok(stat)
}

fn checksum(mut file: File, buffer: &mut [u8]) -> io::Result<(u64, u32)> {
    let mut crc = flate2::Crc::new();
    let mut len = 0;
    loop {
        let n = file.read(buffer)?;
        if n == 0 {
            return Ok((len, crc.sum()));
        }
        crc.update(&buffer[..n]);
        len += n as u64;
    }
}

/// Feeds a checksum with a run of zeros, in a time that grows with the number of its digits only.
pub(crate) fn update_zeros(crc: &mut flate2::Crc, mut len: u64) {
    let mut block = flate2::Crc::new();
    block.update(&[0]);
    let mut size = 1u64;
    while len > 0 {
        // Lengths are kept in 32 bits there, so the last block is taken as often as needed.
        if size == LARGEST_RUN {
            for _ in 0..len / LARGEST_RUN {
                crc.combine(&block);
            }
            return;
        }
        if len & size != 0 {
            crc.combine(&block);
            len -= size;
        }
        let same = clone(&block);
        block.combine(&same);
        size *= 2;
    }
}

/// `flate2::Crc` has no `Clone`; combining with a fresh one gives the same.
fn clone(crc: &flate2::Crc) -> flate2::Crc {
    let mut copy = flate2::Crc::new();
    copy.combine(crc);
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_need_not_be_read() {
        for len in [0usize, 1, 2, 3, 511, 512, 100_000] {
            let mut quick = flate2::Crc::new();
            quick.update(b"before");
            update_zeros(&mut quick, len as u64);
            quick.update(b"after");
            let mut slow = flate2::Crc::new();
            slow.update(&[b"before", &vec![0; len][..], b"after"].concat());
            assert_eq!(quick.sum(), slow.sum(), "{len}");
        }
    }
}
