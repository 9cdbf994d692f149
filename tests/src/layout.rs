//! OCI layouts made by hand: any number of layers, each packed as the test wants it, and an index over several images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::image::{architecture, busybox_rootfs, run, sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// One layer: files by path. A name of `.wh.<name>` is a whiteout.
#[derive(Clone, Debug)]
pub struct Layer {
    packing: Packing,
    files: Vec<(String, Vec<u8>)>,
    busybox: bool,
}

impl Layer {
    /// The busybox root file system.
    pub fn busybox(packing: Packing) -> Layer {
        Layer { packing, files: Vec::new(), busybox: true }
    }

    /// The same files, packed another way.
    pub fn packed(self, packing: Packing) -> Layer {
        Layer { packing, ..self }
    }

    pub fn files(packing: Packing, files: &[(&str, &str)]) -> Layer {
        let files = files.iter().map(|(path, text)| (path.to_string(), text.as_bytes().to_vec())).collect();
        Layer { packing, files, busybox: false }
    }

    /// One file of bytes that do not compress.
    pub fn noise(packing: Packing, path: &str, size: usize) -> Layer {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let bytes = (0..size)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_be_bytes()[0]
            })
            .collect();
        Layer { packing, files: vec![(path.to_string(), bytes)], busybox: false }
    }
}

/// A directory that skopeo reads as `oci:<dir>:<tag>`.
pub struct Layout {
    dir: TempDir,
    entries: Vec<Value>,
}

impl Default for Layout {
    fn default() -> Layout {
        Layout::new()
    }
}

impl Layout {
    pub fn new() -> Layout {
        let dir = tempfile::Builder::new().prefix("evenkeel-lay-").tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("blobs/sha256")).expect("a directory for blobs");
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("write the marker");
        Layout { dir, entries: Vec::new() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Adds an image and answers the digest of its manifest. Without a tag it is only there to be named by an index.
    pub fn image(&mut self, tag: Option<&str>, architecture: &str, layers: &[Layer]) -> String {
        let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
        for layer in layers {
            let tar = self.tar(layer);
            diff_ids.push(format!("sha256:{}", sha256(&tar)));
            let (blob, suffix) = pack(&tar, layer.packing);
            let (digest, size) = self.blob(&fs::read(blob).expect("the blob was just written"));
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            descriptors.push(json!({"mediaType": media_type, "digest": digest, "size": size}));
        }
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let (config, config_size) = self.blob(config.to_string().as_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
            "layers": descriptors,
        });
        let (digest, size) = self.blob(manifest.to_string().as_bytes());
        self.entry(tag, json!({"mediaType": MANIFEST, "digest": digest, "size": size}));
        digest
    }

    /// Adds an image that has another one as its subject, as signatures do.
    pub fn about(&mut self, tag: &str, subject: &str, artifact_type: &str) -> String {
        let image = self.image(None, architecture(), &[Layer::files(Packing::Gzip, &[("about", subject)])]);
        let read = |digest: &str| fs::read(self.blob_path(digest)).expect("the image is there");
        let size = read(subject).len();
        let mut manifest: Value = serde_json::from_slice(&read(&image)).expect("it is JSON");
        manifest["subject"] = json!({"mediaType": MANIFEST, "digest": subject, "size": size});
        manifest["artifactType"] = json!(artifact_type);
        let (digest, size) = self.blob(manifest.to_string().as_bytes());
        self.entry(Some(tag), json!({"mediaType": MANIFEST, "digest": digest, "size": size}));
        digest
    }

    /// Adds an index over images that are there already, as (architecture, digest).
    pub fn index(&mut self, tag: &str, images: &[(&str, &str)]) -> String {
        let manifests: Vec<Value> = images
            .iter()
            .map(|(architecture, digest)| {
                let size = fs::metadata(self.blob_path(digest)).expect("the image is there").len();
                json!({"mediaType": MANIFEST, "digest": digest, "size": size,
                       "platform": {"architecture": architecture, "os": "linux"}})
            })
            .collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let (digest, size) = self.blob(index.to_string().as_bytes());
        self.entry(Some(tag), json!({"mediaType": INDEX, "digest": digest, "size": size}));
        digest
    }

    /// One image for this machine in one go.
    pub fn of(tag: &str, layers: &[Layer]) -> (Layout, String) {
        let mut layout = Layout::new();
        let digest = layout.image(Some(tag), architecture(), layers);
        (layout, digest)
    }

    fn tar(&self, layer: &Layer) -> PathBuf {
        let tree = self.dir.path().join("tree");
        fs::create_dir_all(&tree).expect("a directory for the tree");
        if layer.busybox {
            busybox_rootfs(&tree);
        }
        for (path, bytes) in &layer.files {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().expect("below the tree")).expect("a directory of the layer");
            fs::write(path, bytes).expect("write a file of the layer");
        }
        let tar = self.dir.path().join("layer.tar");
        let mut command = Command::new("tar");
        command.args(["--numeric-owner", "--owner=0", "--group=0", "--mtime=@0", "--sort=name", "-C"]);
        run(command.arg(&tree).arg("-cf").arg(&tar).arg("."));
        fs::remove_dir_all(&tree).expect("remove the tree");
        tar
    }

    fn blob(&self, bytes: &[u8]) -> (String, u64) {
        let aside = self.dir.path().join("blob");
        fs::write(&aside, bytes).expect("write a blob");
        let digest = format!("sha256:{}", sha256(&aside));
        fs::rename(&aside, self.blob_path(&digest)).expect("name a blob");
        (digest, bytes.len() as u64)
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.path().join("blobs").join(digest.replace(':', "/"))
    }

    fn entry(&mut self, tag: Option<&str>, mut descriptor: Value) {
        if let Some(tag) = tag {
            descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
            self.entries.push(descriptor);
        }
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": self.entries});
        fs::write(self.dir.path().join("index.json"), index.to_string()).expect("write the index");
    }
}

fn pack(tar: &Path, packing: Packing) -> (PathBuf, &'static str) {
    let shell = |program: &str, end: &str| {
        let packed = tar.with_extension(end);
        run(Command::new("sh").arg("-c").arg(format!(
            "{program} < {} > {}",
            tar.display(),
            packed.display()
        )));
        packed
    };
    match packing {
        Packing::Plain => (tar.to_path_buf(), ""),
        Packing::Gzip => (shell("gzip -n", "gz"), "+gzip"),
        Packing::Zstd => (shell("zstd -q", "zst"), "+zstd"),
    }
}
