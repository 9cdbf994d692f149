//! How far the hash of a partial blob has come, beside the blob: whoever goes on with it need not hash it again.
//!
//! A mark is written after the bytes that it covers. It holds as long as the machine runs and the file has as many: what
//! a power cut has left of them is hashed again. A mark that is wrong in another way makes the digest of the whole wrong,
//! and the blob is fetched again. Unpacking reads all bytes in any case and finds those that are not what was hashed.
//!
//! `"keel sha256 <boot id>\n", length (8 bytes), state of the hash, SHA-256 of all that in hex digits`

use crate::digest::Hasher;
use crate::fsio::{self, At, FsError};
use crate::{Digest, blob::EVERY};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const LENGTH: usize = 8;
const SUM: usize = 64;
/// Several times what it is.
const MAX_MARK: u64 = 1024;

/// The mark of one partial blob, and what the last one covers.
#[derive(Debug)]
pub(crate) struct Mark {
    path: PathBuf,
    file: Option<File>,
    covered: u64,
}

impl Mark {
    /// The mark of the blob whose bytes are at `data`.
    pub(crate) fn beside(data: &Path) -> Mark {
        Mark { path: data.with_file_name("state"), file: None, covered: 0 }
    }

    /// The hash of the first bytes of a file of `len` bytes, and how many; the fresh one of none where there is no good
    /// mark.
    pub(crate) fn load(&mut self, len: u64) -> (Hasher, u64) {
        let found = fsio::read_small(&self.path, MAX_MARK).ok().flatten();
        match found.and_then(|mark| parse(&mark, &title()?)) {
            Some((hasher, covered)) if covered <= len => {
                self.covered = covered;
                (hasher, covered)
            }
            _ => (Hasher::default(), 0),
        }
    }

    pub(crate) fn is_due(&self, written: u64) -> bool {
        written - self.covered >= EVERY
    }

    /// Notes the hash of the first `written` bytes, which the file has.
    pub(crate) fn note(&mut self, hasher: &Hasher, written: u64) -> Result<(), FsError> {
        let Some(title) = title().filter(|_| written != self.covered) else { return Ok(()) };
        let file = match &self.file {
            Some(file) => file,
            None => {
                let mut options = OpenOptions::new();
                let opened = options.write(true).create(true).truncate(false).mode(0o644).open(&self.path);
                self.file.insert(opened.at("create", &self.path)?)
            }
        };
        // In its place: one that is torn by a power cut has the wrong sum.
        file.write_all_at(&render(&title, hasher, written), 0).at("write", &self.path)?;
        self.covered = written;
        Ok(())
    }
}

/// What the marks of this boot begin with.
fn title() -> Option<String> {
    Some(format!("keel sha256 {}\n", crate::heal::boot_id()?))
}

fn render(title: &str, hasher: &Hasher, covered: u64) -> Vec<u8> {
    let mut mark = [title.as_bytes(), &covered.to_le_bytes(), &hasher.save()].concat();
    let sum = Digest::of(&mark).hex();
    mark.extend_from_slice(sum.as_bytes());
    mark
}

fn parse(mark: &[u8], title: &str) -> Option<(Hasher, u64)> {
    let (said, sum) = mark.split_at_checked(mark.len().checked_sub(SUM)?)?;
    if sum != Digest::of(said).hex().as_bytes() {
        return None;
    }
    let (covered, state) = said.strip_prefix(title.as_bytes())?.split_at_checked(LENGTH)?;
    Some((Hasher::restore(state)?, u64::from_le_bytes(covered.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_goes_on_where_it_was() {
        for len in [0, 1, 63, 64, 1000] {
            let bytes: Vec<u8> = (0..1200).map(|i| i as u8).collect();
            let mut hasher = Hasher::default();
            hasher.update(&bytes[..len]);
            let mark = render("boot\n", &hasher, len as u64);
            let (mut again, covered) = parse(&mark, "boot\n").unwrap();
            assert_eq!(covered, len as u64);
            again.update(&bytes[len..]);
            assert_eq!(again.finish(), Digest::of(&bytes));
        }
    }

    #[test]
    fn a_mark_that_is_cut_or_changed_anywhere_is_none() {
        let title = title().unwrap();
        let mark = render(&title, &Hasher::default(), 77);
        assert!(mark.len() < MAX_MARK as usize);
        assert!(parse(&mark, &title).is_some());
        for at in 0..mark.len() {
            assert!(parse(&mark[..at], &title).is_none(), "{at}");
            let mut changed = mark.clone();
            changed[at] ^= 1;
            assert!(parse(&changed, &title).is_none(), "{at}");
        }
    }

    #[test]
    fn a_mark_of_another_boot_is_none() {
        let mark = render("keel sha256 another\n", &Hasher::default(), 77);
        assert!(parse(&mark, &title().unwrap()).is_none());
    }
}
