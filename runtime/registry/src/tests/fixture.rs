//! Images made from nothing: tar, packing, config, manifest, index, OCI layout.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use keel_store::Digest;
use serde_json::{Value, json};

use crate::manifest::{OCI_INDEX, OCI_MANIFEST};

#[derive(Clone, Copy, Debug)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// Everything that a registry would serve for one repository.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    pub(super) blobs: BTreeMap<Digest, Vec<u8>>,
    /// By digest: media type and body.
    pub(super) manifests: BTreeMap<Digest, (String, Vec<u8>)>,
    pub(super) tags: BTreeMap<String, Digest>,
}

/// One layer: how it is packed, and its files.
pub(super) type LayerSpec<'a> = (Packing, &'a [(&'a str, &'a [u8])]);

impl Content {
    /// An OCI image for `linux/<architecture>` under `tag`; gives its manifest digest.
    pub(super) fn image(&mut self, tag: &str, architecture: &str, layers: &[LayerSpec<'_>]) -> Digest {
        let mut diff_ids = Vec::new();
        let mut descriptors = Vec::new();
        for (packing, files) in layers {
            let tar = tar(files);
            diff_ids.push(Digest::of(&tar).to_string());
            let packed = pack(*packing, &tar);
            let media_type = match packing {
                Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
                Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
                Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            };
            descriptors.push(self.blob(media_type, packed));
        }
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/bin/x"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [],
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": descriptors,
        });
        self.manifest(tag, OCI_MANIFEST, manifest.to_string().into_bytes())
    }

    /// An index over images that are already there.
    pub(super) fn index(&mut self, tag: &str, entries: &[(&str, Option<&str>, Digest)]) -> Digest {
        let entries: Vec<Value> = entries
            .iter()
            .map(|(architecture, variant, digest)| {
                let (media_type, body) = &self.manifests[digest];
                let mut platform = json!({"os": "linux", "architecture": architecture});
                if let Some(variant) = variant {
                    platform["variant"] = json!(variant);
                }
                json!({"mediaType": media_type, "digest": digest.to_string(), "size": body.len(),
                       "platform": platform})
            })
            .collect();
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        self.manifest(tag, OCI_INDEX, index.to_string().into_bytes())
    }

    pub(super) fn manifest(&mut self, tag: &str, media_type: &str, body: Vec<u8>) -> Digest {
        let digest = Digest::of(&body);
        self.manifests.insert(digest, (media_type.to_owned(), body));
        self.tags.insert(tag.to_owned(), digest);
        digest
    }

    /// Adds a blob; gives its descriptor.
    pub(super) fn blob(&mut self, media_type: &str, body: Vec<u8>) -> Value {
        let digest = Digest::of(&body);
        let size = body.len();
        self.blobs.insert(digest, body);
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": size})
    }

    /// Digests of the layers of the image under `tag`, lowest first.
    pub(super) fn layers(&self, tag: &str) -> Vec<Digest> {
        let (_, body) = &self.manifests[&self.tags[tag]];
        let manifest: Value = serde_json::from_slice(body).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        layers.iter().map(|l| l["digest"].as_str().unwrap().parse().unwrap()).collect()
    }

    /// Writes an OCI layout that skopeo reads.
    pub(super) fn write_layout(&self, dir: &Path) {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for (digest, body) in &self.blobs {
            std::fs::write(blobs.join(digest.hex()), body).unwrap();
        }
        for (digest, (_, body)) in &self.manifests {
            std::fs::write(blobs.join(digest.hex()), body).unwrap();
        }
        let entries: Vec<Value> = self
            .tags
            .iter()
            .map(|(tag, digest)| {
                let (media_type, body) = &self.manifests[digest];
                json!({"mediaType": media_type, "digest": digest.to_string(), "size": body.len(),
                       "annotations": {"org.opencontainers.image.ref.name": tag}})
            })
            .collect();
        let index = json!({"schemaVersion": 2, "manifests": entries});
        std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    }
}

/// A ustar archive of plain files.
pub(super) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, body) in files {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", body.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(body);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn pack(packing: Packing, tar: &[u8]) -> Vec<u8> {
    match packing {
        Packing::Plain => tar.to_vec(),
        Packing::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Packing::Zstd => zstd::encode_all(tar, 1).unwrap(),
    }
}

/// Bytes that do not compress, the same for the same seed.
pub(super) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
