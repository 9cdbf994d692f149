//! Archives made of hostile pieces and then damaged. Any result will do but a panic, a hang, or a change outside of the
//! layer.
//!
//! An archive is a pure function of its number. The numbers in [`CORPUS`] are run by every `cargo test`; the target
//! itself goes through new ones for as long as it is told to and says which one has failed:
//!
//! ```text
//! KEEL_FUZZ_SECONDS=600 cargo test -p keel-store fuzz::target -- --ignored --nocapture
//! ```

use super::{Tar, ingest, listing};
use crate::tar::{Entry, Kind};
use crate::{Digest, Options, Store, tarwrite};
use std::path::Path;
use std::time::{Duration, Instant};

/// As many as a second or two allows.
const CORPUS: std::ops::Range<u64> = 0..300;
/// Archives that have failed once.
const FAILED_ONCE: &[u64] = &[];

struct Random(u64);

impl Random {
    /// The number of the archive is mixed, so that neighbours have nothing in common.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// Few, so that entries meet.
const PARTS: &[&str] = &[
    "a",
    "b",
    "c",
    "a",
    "b",
    "..",
    ".",
    "",
    ".wh.a",
    ".wh.b",
    ".wh..wh..opq",
    ".wh.",
    ".wh..",
    ".wh...",
    ".wh..wh.plnk",
    "outside",
    "\u{fc}",
];
const TARGETS: &[&str] =
    &["a", "/a", "../../outside", "/outside", "..", "/", "b/a", "a/../../outside/canary", "."];
const RECORDS: &[&str] = &[
    "path",
    "linkpath",
    "size",
    "uid",
    "mtime",
    "SCHILY.xattr.user.x",
    "SCHILY.xattr.trusted.overlay.redirect",
    "SCHILY.xattr.trusted.overlay.opaque",
    "SCHILY.xattr.user.overlay.opaque",
    "GNU.sparse.map",
    "GNU.sparse.size",
    "GNU.sparse.major",
    "GNU.sparse.realsize",
    "GNU.sparse.name",
    "hdrcharset",
    "",
];
const VALUES: &[&str] =
    &["a", "/outside/canary", "../x", "0", "5", "-1", "99999999999999999999", "y", "0,3,8,1", "1", "\0"];

fn path(random: &mut Random) -> String {
    let parts: Vec<&str> = (0..=random.below(3)).map(|_| random.of(PARTS)).collect();
    let root = if random.below(6) == 0 { "/" } else { "" };
    format!("{root}{}", parts.join("/"))
}

fn record(key: &str, value: &str) -> String {
    let body = format!(" {key}={value}\n");
    let mut len = body.len() + 1;
    while format!("{len}{body}").len() != len {
        len = format!("{len}{body}").len();
    }
    format!("{len}{body}")
}

fn archive(number: u64) -> Vec<u8> {
    let mut random = Random(number);
    let mut bytes = Vec::new();
    for _ in 0..=random.below(12) {
        if random.below(4) == 0 {
            let records: String =
                (0..=random.below(3)).map(|_| record(random.of(RECORDS), random.of(VALUES))).collect();
            let pax = Tar::default().with(Entry::plain("pax".into(), Kind::File, 0o644), records.as_bytes());
            let start = bytes.len();
            bytes.extend(pax.bytes);
            bytes[start + 156] = random.of(b"xxxg");
        }
        let kinds =
            [Kind::Dir, Kind::File, Kind::File, Kind::Symlink, Kind::HardLink, Kind::Char, Kind::Fifo];
        let kind = random.of(&kinds);
        let mode = random.of(&[0o755, 0o4711, 0, 0o1777]);
        let mut entry = Entry::plain(path(&mut random).into(), kind, mode);
        if matches!(kind, Kind::Symlink | Kind::HardLink) {
            entry.link = random.of(TARGETS).into();
        }
        entry.device = (random.below(3) as _, random.below(2) as _);
        let data = vec![b'x'; if kind == Kind::File { random.below(3000) } else { 0 }];
        entry.size = data.len() as u64;
        let mut one = Vec::new();
        // Some names cannot be written; readers must bear them all the same, but from damage.
        if tarwrite::header(&mut one, &entry).is_ok() {
            one.extend_from_slice(&data);
            tarwrite::pad(&mut one, data.len() as u64).unwrap();
            bytes.extend(one);
        }
    }
    tarwrite::end(&mut bytes).unwrap();
    // Half of them stay well-formed.
    for _ in 0..random.below(8).saturating_sub(3) {
        let at = random.below(bytes.len());
        bytes[at] = random.of(b"\0/.190=5SLxKg\xff");
    }
    if random.below(10) == 0 {
        bytes.truncate(random.below(bytes.len()));
    }
    // Without right checksums nothing behind the header would ever be reached.
    for block in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].copy_from_slice(b"        ");
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
    bytes
}

/// Unpacks the archives; gives how many were good.
fn run(numbers: impl Iterator<Item = u64>, dir: &Path) -> u64 {
    let outside = dir.join("outside");
    std::fs::create_dir_all(&outside).unwrap();
    std::fs::write(outside.join("canary"), "canary").unwrap();
    let options = Options { max_layer_entries: 1000, max_layer_bytes: 1 << 24, ..Options::default() };
    let store = Store::open_with(&dir.join("root"), options).unwrap();
    let mut good = 0;
    for number in numbers {
        let bytes = archive(number);
        let id = Digest::of(&bytes);
        let started = Instant::now();
        match ingest(&store, &bytes, &id) {
            Err(crate::LayerError::Died(_)) => panic!("archive {number} makes the unpacker panic"),
            Err(_) => {}
            Ok(()) => {
                good += 1;
                let layer = store.inner.state().layers.remove(&id).unwrap();
                // What it says it has made is what is there.
                let record: crate::layer::LayerRecord =
                    serde_json::from_slice(&std::fs::read(layer.join("layer.json")).unwrap()).unwrap();
                let root = std::fs::File::open(layer.join("fs")).unwrap();
                let found = crate::census::take(std::os::fd::AsFd::as_fd(&root), true).unwrap();
                assert_eq!(found, record.census, "archive {number}: {}", listing(&layer.join("fs")));
                crate::fsio::remove_tree(&layer).unwrap();
            }
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "archive {number} takes {:?}",
            started.elapsed()
        );
        assert_eq!(listing(&store.inner.layers_dir()), "", "archive {number} leaves something");
        assert_eq!(listing(&outside), "canary: file 644 \"canary\"", "archive {number} reaches outside");
        let mut around: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        around.sort();
        assert_eq!(around, ["outside", "root"], "archive {number} reaches outside");
        {
            let mut state = store.inner.state();
            state.blobs.clear();
            state.writing.clear();
        }
        store.drop_partials().unwrap();
    }
    good
}

#[test]
fn no_archive_of_the_corpus_panics_or_reaches_outside() {
    let dir = tempfile::tempdir().unwrap();
    let good = run(CORPUS.chain(FAILED_ONCE.iter().copied()), dir.path());
    // Both sides are reached.
    let all = CORPUS.end - CORPUS.start;
    assert!(good > all / 20 && good < all, "{good} of {all} are good");
}

#[test]
#[ignore = "the fuzz target: runs for KEEL_FUZZ_SECONDS"]
fn target() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let until = Instant::now() + Duration::from_secs(number("KEEL_FUZZ_SECONDS").unwrap_or(60));
    let first = number("KEEL_FUZZ_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    let dir = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0u64);
    let numbers = (first..).take_while(|_| Instant::now() < until).inspect(|_| count.set(count.get() + 1));
    let good = run(numbers, dir.path());
    println!("{} archives from {first} on, {good} of them good", count.get());
}
