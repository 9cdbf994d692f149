//! Indexes that are kept whole: the images of all platforms, of which only this machine's is unpacked.

use crate::Digest;
use crate::image::{DOCKER_MANIFEST, OCI_MANIFEST};
use crate::platform::Platform;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Documents of one index. The largest official image has 25 with its attestations; a record stays a small file.
const MAX_MEMBERS: usize = 512;
const MAX_BLOBS: usize = 4096;
/// Index in index in index: nobody nests deeper than two.
const MAX_NESTING: u32 = 4;
/// A layer larger than this is a mistake or an attack: 1 TiB.
const MAX_BLOB_BYTES: u64 = 1 << 40;

/// An index with all that it leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    pub digest: Digest,
    pub media_type: String,
    pub size: u64,
    /// What it lists at any depth, each before what lists it: a registry takes them in this order.
    pub members: Vec<Member>,
}

/// A document that an index lists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub digest: Digest,
    pub media_type: String,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Config and layers; none of an index. Layers that stay with their publisher are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blobs: Vec<Blob>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
    pub media_type: String,
}

#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("{digest} of the index is not valid")]
    Json {
        digest: Digest,
        #[source]
        source: serde_json::Error,
    },
    #[error("{digest} of the index has the wrong content: its digest is {actual}")]
    WrongDigest { digest: Digest, actual: Digest },
    #[error("the index lists a {0:?}, which is neither a manifest nor an index")]
    MediaType(String),
    #[error("the index lists a blob of {0} bytes")]
    TooLarge(u64),
    #[error("the index leads to more than {MAX_MEMBERS} manifests or {MAX_BLOBS} blobs")]
    TooMany,
    #[error("indexes are nested too deeply")]
    TooDeep,
}

/// Goes through an index whoever has its documents: asks for one after the other.
///
/// ```text
/// new(index) -> next() = Some(document) -> take(its bytes) -> next() ... -> next() = None -> finish()
/// ```
#[derive(Debug)]
pub struct IndexWalk {
    digest: Digest,
    media_type: String,
    size: u64,
    /// Lists come before what they list.
    members: Vec<Member>,
    todo: Vec<(Descriptor, u32)>,
    seen: BTreeSet<Digest>,
    blobs: usize,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

impl Index {
    pub fn is_index(media_type: &str) -> bool {
        matches!(media_type, OCI_INDEX | DOCKER_INDEX)
    }

    /// Every blob that it needs, itself first; some come more than once.
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        std::iter::once(self.digest).chain(self.members.iter().flat_map(Member::digests))
    }

    /// Whether it is the index itself or one of its documents.
    pub(crate) fn lists(&self, digest: &Digest) -> bool {
        self.digest == *digest || self.members.iter().any(|member| member.digest == *digest)
    }

    /// Config and layers of all its images, each once.
    pub fn blobs(&self) -> Vec<&Blob> {
        let mut seen = BTreeSet::new();
        let all = self.members.iter().flat_map(|member| &member.blobs);
        all.filter(|blob| seen.insert(blob.digest)).collect()
    }

    /// What its images are for, in the order of the index; attestations have no platform.
    pub fn platforms(&self) -> Vec<String> {
        let known = |member: &&Member| member.platform.as_deref().is_some_and(|p| !p.starts_with("unknown"));
        self.members.iter().rev().filter(known).filter_map(|member| member.platform.clone()).collect()
    }
}

impl Blob {
    /// Files of an image, not its config or an attestation.
    pub fn is_layer(&self) -> bool {
        self.media_type.contains(".layer.") || self.media_type.contains(".rootfs.")
    }
}

impl Member {
    fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        std::iter::once(self.digest).chain(self.blobs.iter().map(|blob| blob.digest))
    }
}

impl IndexWalk {
    pub fn new(body: &[u8], media_type: &str) -> Result<IndexWalk, IndexError> {
        let digest = Digest::of(body);
        let mut walk = IndexWalk {
            digest,
            media_type: media_type.to_owned(),
            size: body.len() as u64,
            members: Vec::new(),
            todo: Vec::new(),
            seen: BTreeSet::from([digest]),
            blobs: 0,
        };
        walk.list(parse(&digest, body)?.manifests, 1)?;
        Ok(walk)
    }

    /// The document to bring next: digest and length.
    pub fn next(&self) -> Option<(Digest, u64)> {
        self.todo.last().map(|(descriptor, _)| (descriptor.digest, descriptor.size))
    }

    /// Takes what [`IndexWalk::next`] asked for.
    pub fn take(&mut self, body: &[u8]) -> Result<(), IndexError> {
        let Some((descriptor, depth)) = self.todo.pop() else { return Ok(()) };
        let actual = Digest::of(body);
        if actual != descriptor.digest {
            return Err(IndexError::WrongDigest { digest: descriptor.digest, actual });
        }
        let document = parse(&descriptor.digest, body)?;
        let mut member = Member {
            digest: descriptor.digest,
            size: body.len() as u64,
            platform: descriptor.platform.as_ref().map(Platform::to_string),
            media_type: descriptor.media_type,
            blobs: Vec::new(),
        };
        if Index::is_index(&member.media_type) {
            self.members.push(member);
            return self.list(document.manifests, depth + 1);
        }
        for blob in document.config.into_iter().chain(document.layers) {
            if blob.size > MAX_BLOB_BYTES {
                return Err(IndexError::TooLarge(blob.size));
            }
            if !stays_with_its_publisher(&blob.media_type) {
                member.blobs.push(Blob { digest: blob.digest, size: blob.size, media_type: blob.media_type });
            }
        }
        self.blobs += member.blobs.len();
        if self.blobs > MAX_BLOBS {
            return Err(IndexError::TooMany);
        }
        self.members.push(member);
        Ok(())
    }

    pub fn finish(mut self) -> Index {
        self.members.reverse();
        Index { digest: self.digest, media_type: self.media_type, size: self.size, members: self.members }
    }

    /// The last one is brought first.
    fn list(&mut self, entries: Vec<Descriptor>, depth: u32) -> Result<(), IndexError> {
        if depth > MAX_NESTING {
            return Err(IndexError::TooDeep);
        }
        for entry in entries.into_iter().rev() {
            let known = Index::is_index(&entry.media_type)
                || matches!(entry.media_type.as_str(), OCI_MANIFEST | DOCKER_MANIFEST);
            if !known {
                return Err(IndexError::MediaType(entry.media_type.chars().take(100).collect()));
            }
            if self.seen.insert(entry.digest) {
                self.todo.push((entry, depth));
            }
        }
        if self.seen.len() > MAX_MEMBERS { Err(IndexError::TooMany) } else { Ok(()) }
    }
}

/// Layers that a manifest names by their publisher's address and that may not be passed on.
pub fn stays_with_its_publisher(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

fn parse(digest: &Digest, body: &[u8]) -> Result<Document, IndexError> {
    serde_json::from_slice(body).map_err(|source| IndexError::Json { digest: *digest, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    #[derive(Default)]
    struct Documents(BTreeMap<Digest, Vec<u8>>);

    impl Documents {
        fn add(&mut self, media_type: &str, body: &Value) -> Value {
            let body = body.to_string().into_bytes();
            let digest = Digest::of(&body);
            let descriptor = json!({"mediaType": media_type, "digest": digest, "size": body.len()});
            self.0.insert(digest, body);
            descriptor
        }

        fn walk(&self, index: &Value) -> Result<Index, IndexError> {
            let mut walk = IndexWalk::new(index.to_string().as_bytes(), OCI_INDEX)?;
            while let Some((digest, size)) = walk.next() {
                assert_eq!(self.0[&digest].len() as u64, size);
                walk.take(&self.0[&digest])?;
            }
            Ok(walk.finish())
        }
    }

    fn image(documents: &mut Documents, seed: u8, architecture: &str) -> Value {
        let blob = |n: u8, kind: &str| json!({"mediaType": kind, "digest": Digest::of(&[n]), "size": n});
        let manifest = json!({
            "schemaVersion": 2,
            "config": blob(seed, "application/vnd.oci.image.config.v1+json"),
            "layers": [
                blob(seed + 1, "application/vnd.oci.image.layer.v1.tar+gzip"),
                blob(99, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
                blob(98, "application/vnd.oci.image.layer.v1.tar"),
            ],
        });
        let mut descriptor = documents.add(OCI_MANIFEST, &manifest);
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        descriptor
    }

    #[test]
    fn members_come_before_what_lists_them_and_blobs_come_once() {
        let mut documents = Documents::default();
        let (one, two) = (image(&mut documents, 1, "amd64"), image(&mut documents, 11, "arm64"));
        let inner = documents.add(OCI_INDEX, &json!({"schemaVersion": 2, "manifests": [two, one]}));
        let index = documents.walk(&json!({"schemaVersion": 2, "manifests": [one, inner]})).unwrap();
        let order: Vec<Value> = index.members.iter().map(|member| json!(member.digest)).collect();
        assert_eq!(order, [two["digest"].clone(), inner["digest"].clone(), one["digest"].clone()]);
        assert_eq!(index.platforms(), ["linux/amd64", "linux/arm64"]);
        // Two configs, two layers of their own, one that both have; none of the publisher's.
        assert_eq!(index.blobs().len(), 5);
    }

    #[test]
    fn an_index_has_bounds() {
        let mut documents = Documents::default();
        let mut inner = image(&mut documents, 1, "amd64");
        for _ in 0..MAX_NESTING {
            inner = documents.add(OCI_INDEX, &json!({"schemaVersion": 2, "manifests": [inner]}));
        }
        let deep = documents.walk(&json!({"schemaVersion": 2, "manifests": [inner]}));
        assert!(matches!(deep, Err(IndexError::TooDeep)), "{deep:?}");

        let many: Vec<Value> = (0..=MAX_MEMBERS)
            .map(|n| json!({"mediaType": OCI_MANIFEST, "digest": Digest::of(&n.to_le_bytes()), "size": 1}))
            .collect();
        let many = documents.walk(&json!({"schemaVersion": 2, "manifests": many}));
        assert!(matches!(many, Err(IndexError::TooMany)), "{many:?}");

        let odd = json!([{"mediaType": "text/plain", "digest": Digest::of(b""), "size": 0}]);
        let odd = documents.walk(&json!({"schemaVersion": 2, "manifests": odd}));
        assert!(odd.unwrap_err().to_string().contains("text/plain"));

        let one = image(&mut documents, 1, "amd64");
        let mut walk = IndexWalk::new(json!({"manifests": [one]}).to_string().as_bytes(), OCI_INDEX).unwrap();
        assert!(matches!(walk.take(b"{}"), Err(IndexError::WrongDigest { .. })));
    }
}
