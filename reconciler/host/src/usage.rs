//! `emptyDir.sizeLimit` on disk: measured from time to time, as the kubelet does it.
//!
//! A project quota would stop the write itself, but needs a file system that is mounted with it, which few are; a file
//! system of its own for each volume needs tools and fixed sizes. So a volume may outgrow its limit for as long as lies
//! between two looks; then its pod is stopped and made anew, with an empty volume. On tmpfs (`medium: Memory`) the kernel
//! enforces the limit and nothing is measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keel_manifest::model::StorageMedium;
use keel_plan::PodId;
use nix::fcntl::OFlag;

use crate::error::HostError;
use crate::paths::Paths;
use crate::records::PodRecord;
use crate::state::{names, read_json};
use crate::volumes;

/// Between two looks. What a fast disk takes in this time is what a volume can be over its limit by.
const PERIOD: Duration = Duration::from_secs(10);
/// A look takes at most this part of one core's time: after a long one the pause is longer.
const IDLE_FACTOR: u32 = 20;
/// Every entry counts for at least this much, so that a walk over many empty files ends too.
const ENTRY_BYTES: u64 = 512;
/// Each level keeps a descriptor open. What is nested deeper cannot be measured and counts as over the limit.
const MAX_DEPTH: usize = 128;

/// Pods with a volume that is over its limit, and what to say about it.
pub(crate) type OverLimit = Arc<Mutex<BTreeMap<(PodId, u64), String>>>;

/// Measures. Its owner decides on which thread.
#[derive(Debug)]
pub struct UsageWatch {
    paths: Paths,
    over: OverLimit,
    pause: Duration,
}

impl UsageWatch {
    pub(crate) fn new(paths: Paths, over: OverLimit) -> UsageWatch {
        UsageWatch { paths, over, pause: PERIOD }
    }

    /// Returns when other pods are over a limit than before.
    pub fn wait(&mut self) -> Result<(), HostError> {
        loop {
            std::thread::sleep(self.pause);
            let started = Instant::now();
            let found = self.measure();
            self.pause = PERIOD.max(started.elapsed() * IDLE_FACTOR);
            let mut over = self.over.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if *over != found {
                *over = found;
                return Ok(());
            }
        }
    }

    /// What cannot be read now is looked at the next time.
    fn measure(&self) -> BTreeMap<(PodId, u64), String> {
        let mut found = BTreeMap::new();
        for id in names(&self.paths.pods()).unwrap_or_default().into_iter().map(PodId) {
            if let Ok(Some(record)) = read_json::<PodRecord>(&self.paths.pod_record(&id))
                && let Some(message) = over_limit(&self.paths, &record)
            {
                found.insert((id, record.incarnation), message);
            }
        }
        found
    }
}

fn over_limit(paths: &Paths, record: &PodRecord) -> Option<String> {
    record.pod.spec.volumes.iter().find_map(|volume| {
        let empty = volume.empty_dir.as_ref().filter(|empty| empty.medium != Some(StorageMedium::Memory))?;
        let limit = volumes::size_limit(empty)?;
        let dir = paths.pod_disk_volume(&record.pod.id, &volume.name);
        let written = empty.size_limit.as_ref().map(|limit| limit.0.as_str()).unwrap_or_default();
        match Walk::over(&dir, limit) {
            Ok(true) => Some(format!("volume {} is over its sizeLimit of {written}", volume.name)),
            Err(TooDeep) => Some(format!(
                "volume {} with sizeLimit {written} is nested deeper than {MAX_DEPTH} directories and cannot be measured",
                volume.name
            )),
            Ok(false) => None,
        }
    })
}

struct TooDeep;

/// Adds up what a directory occupies, and stops as soon as that is more than the limit.
struct Walk {
    left: u64,
    /// Files with several names count once.
    linked: BTreeSet<u64>,
}

impl Walk {
    fn over(dir: &Path, limit: u64) -> Result<bool, TooDeep> {
        let mut walk = Walk { left: limit, linked: BTreeSet::new() };
        Ok(!walk.enter(dir, 0)?)
    }

    /// False when the limit is passed. The directory is opened before it is listed, and its entries by way of the
    /// descriptor: whoever writes in it may exchange a name for a link at any time.
    fn enter(&mut self, dir: &Path, depth: usize) -> Result<bool, TooDeep> {
        if depth > MAX_DEPTH {
            return Err(TooDeep);
        }
        let Ok(opened) = open_directory(dir) else { return Ok(true) };
        let here = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        let Ok(entries) = fs::read_dir(&here) else { return Ok(true) };
        for entry in entries.flatten() {
            let path = here.join(entry.file_name());
            let Ok(found) = fs::symlink_metadata(&path) else { continue };
            let counted = found.is_dir() || found.nlink() == 1 || self.linked.insert(found.ino());
            let bytes = if counted { found.blocks().saturating_mul(512).max(ENTRY_BYTES) } else { 0 };
            let Some(left) = self.left.checked_sub(bytes) else { return Ok(false) };
            self.left = left;
            if found.is_dir() && !self.enter(&path, depth + 1)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn open_directory(dir: &Path) -> io::Result<File> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_a_directory_occupies_is_compared_with_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let over = |limit: u64| Walk::over(dir.path(), limit).is_ok_and(|over| over);
        assert!(!over(1));
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/a"), vec![1; 100_000]).unwrap();
        fs::hard_link(dir.path().join("sub/a"), dir.path().join("b")).unwrap();
        symlink("/", dir.path().join("root")).unwrap();
        assert!(over(90_000));
        assert!(!over(150_000), "a second name holds nothing, and links lead nowhere");
    }

    #[test]
    fn many_empty_files_and_deep_nesting_end_too() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..100 {
            fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        assert!(Walk::over(dir.path(), 20_000).is_ok_and(|over| over));
        let mut deep = dir.path().to_path_buf();
        for _ in 0..=MAX_DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(deep).unwrap();
        assert!(Walk::over(dir.path(), 1 << 30).is_err());
    }
}
