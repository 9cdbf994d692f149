//! Tests of the whole store on the real kernel; they need root and a file system with `trusted.` attributes.

mod basics;
mod collect;
mod corpus;
mod crash;
mod fault;
mod fuzz;
mod heal;
mod import;
mod index;
mod rootfs;
mod speed;

use crate::tar::{Entry, Kind};
use crate::{Digest, Image, Store, tarwrite};
use std::path::Path;

/// A store in a directory that goes with it.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let dir = tempfile::Builder::new().prefix("keel-store-").tempdir().unwrap();
        let store = Store::open(&dir.path().join("root")).unwrap();
        Bench { dir, store }
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn reopen(&mut self) {
        let root = self.store.root().to_owned();
        self.store = Store::open(&root).unwrap();
    }

    /// Commits an image of uncompressed layers.
    pub(crate) fn image(&self, reference: &str, layers: &[Vec<u8>]) -> Image {
        for layer in layers {
            let id = Digest::of(layer);
            ingest(&self.store, layer, &id).unwrap();
        }
        let ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let blobs: Vec<(Digest, u64)> = layers.iter().map(|l| (Digest::of(l), l.len() as u64)).collect();
        let (manifest, config) = manifest(&blobs, &ids, "application/vnd.oci.image.layer.v1.tar");
        self.store.commit_image(reference, &manifest, crate::image::OCI_MANIFEST, &config, false).unwrap()
    }
}

impl Drop for Bench {
    /// What a failed test has left mounted keeps its directory from going.
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let targets = mounts.lines().rev().filter_map(|line| line.split(' ').nth(4));
        for target in targets.filter(|target| Path::new(target).starts_with(self.dir.path())) {
            let _ = crate::unmount_rootfs(Path::new(target));
        }
    }
}

pub(crate) fn ingest(store: &Store, blob: &[u8], diff_id: &Digest) -> Result<(), crate::LayerError> {
    let mut ingest = store.layer_ingest(&Digest::of(blob), blob.len() as u64, diff_id)?;
    let from = ingest.offset() as usize;
    for piece in blob[from..].chunks(10_000) {
        ingest.push(piece)?;
    }
    ingest.finish()
}

/// An OCI manifest and its config.
pub(crate) fn manifest(blobs: &[(Digest, u64)], diff_ids: &[Digest], media_type: &str) -> (Vec<u8>, Vec<u8>) {
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string();
    let layers: Vec<_> = blobs
        .iter()
        .map(|(digest, size)| serde_json::json!({"mediaType": media_type, "digest": digest, "size": size}))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": crate::image::OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": Digest::of(config.as_bytes()), "size": config.len()},
        "layers": layers,
    })
    .to_string();
    (manifest.into_bytes(), config.into_bytes())
}

/// Makes tars entry by entry.
#[derive(Default)]
pub(crate) struct Tar {
    pub(crate) bytes: Vec<u8>,
}

impl Tar {
    pub(crate) fn dir(self, path: &str, mode: u32) -> Tar {
        self.entry(Entry::plain(path.into(), Kind::Dir, mode))
    }

    pub(crate) fn file(self, path: &str, content: &str) -> Tar {
        self.with(Entry::plain(path.into(), Kind::File, 0o644), content.as_bytes())
    }

    pub(crate) fn link(self, path: &str, target: &str, kind: Kind) -> Tar {
        let mut entry = Entry::plain(path.into(), kind, 0o777);
        entry.link = target.into();
        self.entry(entry)
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Tar {
        self.link(path, target, Kind::Symlink)
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Tar {
        self.link(path, target, Kind::HardLink)
    }

    pub(crate) fn entry(self, entry: Entry) -> Tar {
        self.with(entry, b"")
    }

    pub(crate) fn with(mut self, mut entry: Entry, data: &[u8]) -> Tar {
        entry.size = data.len() as u64;
        tarwrite::header(&mut self.bytes, &entry).unwrap();
        self.bytes.extend_from_slice(data);
        tarwrite::pad(&mut self.bytes, data.len() as u64).unwrap();
        self
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        tarwrite::end(&mut self.bytes).unwrap();
        self.bytes
    }
}

/// Every path below `root` with what it is, sorted; one line each.
pub(crate) fn listing(root: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    fn walk(root: &Path, dir: &Path, lines: &mut Vec<String>) {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            let path = dir.join(&name);
            let m = std::fs::symlink_metadata(&path).unwrap();
            let shown = crate::path::show(path.strip_prefix(root).unwrap().as_os_str().as_bytes());
            let owner = if (m.uid(), m.gid()) == (0, 0) {
                String::new()
            } else {
                format!(" {}:{}", m.uid(), m.gid())
            };
            let t = m.file_type();
            let what = if t.is_dir() {
                let open = std::fs::File::open(dir).unwrap();
                let c = std::ffi::CString::new(name.as_bytes()).unwrap();
                let opaque = keel_sys::xattr::lget_at(&open, &c, crate::unpack::OPAQUE).unwrap();
                format!("dir {:o}{}", m.mode() & 0o7777, if opaque.is_some() { " opaque" } else { "" })
            } else if t.is_symlink() {
                let target = std::fs::read_link(&path).unwrap();
                format!("-> {}", crate::path::show(target.as_os_str().as_bytes()))
            } else if t.is_file() {
                let content = std::fs::read(&path).unwrap();
                let content = match content.len() {
                    0..=40 => format!("{:?}", String::from_utf8_lossy(&content)),
                    n => format!("{n} bytes"),
                };
                format!("file {:o} {content}", m.mode() & 0o7777)
            } else if t.is_char_device() && m.rdev() == 0 {
                "whiteout".to_owned()
            } else if t.is_fifo() {
                format!("fifo {:o}", m.mode() & 0o7777)
            } else {
                let kind = if t.is_char_device() { "char" } else { "block" };
                let rdev = m.rdev();
                format!("{kind} {:o} {}:{}", m.mode() & 0o7777, libc::major(rdev), libc::minor(rdev))
            };
            lines.push(format!("{shown}: {what}{owner}"));
            if t.is_dir() {
                walk(root, &path, lines);
            }
        }
    }
    let mut lines = Vec::new();
    walk(root, root, &mut lines);
    lines.join("\n")
}
