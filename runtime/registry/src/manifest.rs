//! Manifests and indexes: from bytes that a stranger sent to values that may be acted on.

use oci_client::manifest::{ImageIndexEntry, OciDescriptor, OciImageIndex, OciImageManifest};
use serde::Deserialize;

use crate::error::PullError;
use keel_store::{Digest, Platform};

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1";

/// Schema 1 is asked for as well, last: a registry that has nothing else then sends it, and the
/// message can name the real problem instead of "not found".
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
application/vnd.docker.distribution.manifest.list.v2+json, \
application/vnd.oci.image.manifest.v1+json, \
application/vnd.docker.distribution.manifest.v2+json, \
application/vnd.docker.distribution.manifest.v1+prettyjws;q=0.1";

/// More than the kernel stacks as overlay lowers, and enough for any image that was ever built in earnest.
const MAX_LAYERS: usize = 500;
/// A layer larger than this is a mistake or an attack: 1 TiB.
const MAX_LAYER_BYTES: u64 = 1 << 40;
/// An index is 4 MiB at most; the cap on entries keeps messages and loops short.
const MAX_INDEX_ENTRIES: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Index),
}

/// One image for one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) media_type: String,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    pub(crate) entries: Vec<IndexEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) descriptor: Descriptor,
    pub(crate) platform: Option<Platform>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// Other places of a "foreign" layer. Never asked with credentials.
    pub(crate) urls: Vec<String>,
}

/// The fields that decide what a document is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u64>,
    media_type: Option<String>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    manifests: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Reads a manifest or an index. `content_type` is what the registry called it.
pub(crate) fn lower_document(
    body: &[u8],
    content_type: Option<&str>,
    reference: &str,
    registry: &str,
) -> Result<Document, PullError> {
    let malformed = |detail: String| PullError::Malformed {
        what: format!("the manifest of {reference}"),
        registry: registry.to_owned(),
        detail,
    };
    let shape: Shape =
        serde_json::from_slice(body).map_err(|e| malformed(format!("not a JSON manifest: {e}")))?;
    let content_type = content_type.map(essence);
    let declared = shape.media_type.as_deref().or(content_type).unwrap_or("");
    if shape.schema_version == Some(1) || shape.fs_layers.is_some() || declared.starts_with(DOCKER_SCHEMA1) {
        return Err(PullError::Schema1 { reference: reference.to_owned() });
    }
    if shape.schema_version != Some(2) {
        return Err(malformed("schemaVersion is not 2".to_owned()));
    }
    // A document that is both would be one image for us and another one for whoever checked it.
    if shape.manifests.is_some() && (shape.config.is_some() || shape.layers.is_some()) {
        return Err(malformed("it is an index and an image at the same time".to_owned()));
    }
    let is_index = match (kind(shape.media_type.as_deref()), kind(content_type)) {
        (Some(inner), Some(outer)) if inner != outer => {
            return Err(malformed("mediaType and Content-Type contradict each other".to_owned()));
        }
        (Some(known), _) | (None, Some(known)) => known == Kind::Index,
        (None, None) => shape.manifests.is_some(),
    };
    if is_index {
        let index: OciImageIndex =
            serde_json::from_slice(body).map_err(|e| malformed(format!("not an image index: {e}")))?;
        lower_index(index).map(Document::Index).map_err(malformed)
    } else if shape.config.is_some() {
        let manifest: OciImageManifest =
            serde_json::from_slice(body).map_err(|e| malformed(format!("not an image manifest: {e}")))?;
        if let Some(what) = foreign_kind(&manifest) {
            return Err(PullError::NotAnImage { reference: reference.to_owned(), detail: what });
        }
        lower_manifest(manifest).map(Document::Manifest).map_err(malformed)
    } else {
        Err(PullError::NotAnImage {
            reference: reference.to_owned(),
            detail: format!("the registry calls it {declared:?}"),
        })
    }
}

/// What a document calls itself; OCI made it optional.
pub(crate) fn own_media_type(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
    }
    serde_json::from_slice::<Typed>(body).ok()?.media_type
}

/// Picks the entry that runs best on `wanted`; of equals, the first one.
pub(crate) fn choose<'a>(
    index: &'a Index,
    wanted: &Platform,
    reference: &str,
) -> Result<&'a Descriptor, PullError> {
    let offers = || index.entries.iter().filter_map(|e| Some((e, e.platform.as_ref()?)));
    let best = offers()
        .filter_map(|(entry, platform)| Some((wanted.distance(platform)?, entry)))
        .min_by_key(|(distance, _)| *distance);
    if let Some((_, entry)) = best {
        return Ok(&entry.descriptor);
    }
    // Hand-made indexes with one image and no word about its platform mean that image.
    if let [entry] = index.entries.as_slice()
        && entry.platform.is_none()
    {
        return Ok(&entry.descriptor);
    }
    Err(PullError::NoMatchingPlatform {
        reference: reference.to_owned(),
        wanted: wanted.to_string(),
        available: offers().filter(|(_, p)| p.os != "unknown").map(|(_, p)| p.to_string()).collect(),
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Index,
    Manifest,
}

fn kind(media_type: Option<&str>) -> Option<Kind> {
    match media_type? {
        OCI_INDEX | DOCKER_LIST => Some(Kind::Index),
        OCI_MANIFEST | DOCKER_MANIFEST => Some(Kind::Manifest),
        _ => None,
    }
}

/// A media type without its parameters.
pub(crate) fn essence(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or("").trim()
}

fn lower_index(index: OciImageIndex) -> Result<Index, String> {
    if index.manifests.len() > MAX_INDEX_ENTRIES {
        return Err(format!("more than {MAX_INDEX_ENTRIES} entries"));
    }
    let entries = index
        .manifests
        .into_iter()
        // Attestations and signatures travel as entries for "unknown/unknown" or with an artifact type.
        .filter(|entry| kind(Some(&entry.media_type)).is_some() && entry.artifact_type.is_none())
        .map(lower_entry)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Index { entries })
}

fn lower_entry(entry: ImageIndexEntry) -> Result<IndexEntry, String> {
    let platform = entry.platform.map(|p| Platform {
        os: p.os.to_string(),
        architecture: p.architecture.to_string(),
        variant: p.variant.filter(|v| !v.is_empty()),
    });
    Ok(IndexEntry {
        descriptor: Descriptor {
            digest: digest(&entry.digest)?,
            size: size(entry.size)?,
            media_type: entry.media_type,
            urls: Vec::new(),
        },
        platform,
    })
}

fn lower_manifest(manifest: OciImageManifest) -> Result<Manifest, String> {
    if manifest.layers.len() > MAX_LAYERS {
        return Err(format!("more than {MAX_LAYERS} layers"));
    }
    let layers = manifest
        .layers
        .into_iter()
        .map(|layer| {
            if !is_layer(&layer.media_type) {
                return Err(format!("layer of unsupported type {:?}", layer.media_type));
            }
            lower_descriptor(layer)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Manifest {
        media_type: manifest.media_type.unwrap_or_else(|| OCI_MANIFEST.to_owned()),
        config: lower_descriptor(manifest.config)?,
        layers,
    })
}

fn lower_descriptor(descriptor: OciDescriptor) -> Result<Descriptor, String> {
    Ok(Descriptor {
        digest: digest(&descriptor.digest)?,
        size: size(descriptor.size)?,
        media_type: descriptor.media_type,
        urls: descriptor.urls.unwrap_or_default(),
    })
}

fn digest(text: &str) -> Result<Digest, String> {
    text.parse().map_err(|_| format!("{:?} is not a sha256 digest", shorten(text)))
}

fn size(size: i64) -> Result<u64, String> {
    u64::try_from(size)
        .ok()
        .filter(|n| *n <= MAX_LAYER_BYTES)
        .ok_or_else(|| format!("a size of {size} bytes is not plausible"))
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

/// The config types of things that run. Some tools push configs as plain JSON or octets.
fn is_config(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
            | "application/json"
            | "application/octet-stream"
            | "text/plain"
            | ""
    )
}

fn is_layer(media_type: &str) -> bool {
    let Some(rest) = media_type
        .strip_prefix("application/vnd.oci.image.layer.v1.tar")
        .or_else(|| media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1.tar"))
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.diff.tar"))
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff.tar"))
    else {
        return false;
    };
    matches!(rest, "" | "+gzip" | ".gzip" | "+zstd" | ".zstd")
}

/// What the manifest describes when it is not an image to run.
fn foreign_kind(manifest: &OciImageManifest) -> Option<String> {
    if is_config(&manifest.config.media_type) {
        return None;
    }
    let kind = manifest.artifact_type.as_deref().unwrap_or(&manifest.config.media_type);
    Some(format!("it is an artifact of type {:?}", shorten(kind)))
}

/// The diff ids that the config announces, one per layer.
pub(crate) fn lower_diff_ids(config: &[u8], layers: usize) -> Result<Vec<Digest>, String> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Option<Vec<String>>,
    }
    let config: Config = serde_json::from_slice(config).map_err(|e| format!("not an image config: {e}"))?;
    let diff_ids = config
        .rootfs
        .diff_ids
        .unwrap_or_default()
        .iter()
        .map(|id| digest(id))
        .collect::<Result<Vec<_>, _>>()?;
    if diff_ids.len() != layers {
        return Err(format!("{} diff ids for {layers} layers", diff_ids.len()));
    }
    Ok(diff_ids)
}

/// Architecture and system that the config claims, for a warning where they do not fit.
pub(crate) fn lower_config_platform(config: &[u8]) -> Option<Platform> {
    #[derive(Deserialize)]
    struct Config {
        os: Option<String>,
        architecture: Option<String>,
        variant: Option<String>,
    }
    let config: Config = serde_json::from_slice(config).ok()?;
    Some(Platform {
        os: config.os?,
        architecture: config.architecture?,
        variant: config.variant.filter(|v| !v.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lower(body: &str, content_type: &str) -> Result<Document, PullError> {
        let content_type = Some(content_type).filter(|t| !t.is_empty());
        lower_document(body.as_bytes(), content_type, "x:1", "r")
    }

    fn d(n: u8) -> String {
        format!("sha256:{}", format!("{n:02x}").repeat(32))
    }

    fn image(layer_type: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":2}},
               "layers":[{{"mediaType":"{layer_type}","digest":"{}","size":10}}]}}"#,
            d(1),
            d(2)
        )
    }

    #[test]
    fn every_layer_type_of_both_families_is_read() {
        for layer in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ] {
            let Ok(Document::Manifest(m)) = lower(&image(layer), OCI_MANIFEST) else {
                panic!("{layer} was not read")
            };
            assert_eq!(m.layers[0].size, 10);
        }
        let encrypted = lower(&image("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "");
        assert!(encrypted.unwrap_err().to_string().contains("encrypted"));
    }

    #[test]
    fn what_is_not_one_clear_image_is_refused() {
        let both = format!(
            r#"{{"schemaVersion":2,"manifests":[],"layers":[],"config":{{"mediaType":"","digest":"{}","size":2}}}}"#,
            d(1)
        );
        let helm = image("application/vnd.oci.image.layer.v1.tar+gzip")
            .replace("application/vnd.oci.image.config.v1+json", "application/vnd.cncf.helm.config.v1+json");
        let cases: [(&str, &str, &str); 8] = [
            (&both, OCI_INDEX, "at the same time"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "", "schema 1"),
            ("{}", "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
            ("not json", "", "not a JSON manifest"),
            (r#"{"schemaVersion":3}"#, "", "schemaVersion is not 2"),
            (
                r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#,
                OCI_MANIFEST,
                "contradict",
            ),
            (&helm, OCI_MANIFEST, "helm"),
            (r#"{"schemaVersion":2}"#, "text/html", "text/html"),
        ];
        for (body, content_type, expected) in cases {
            let error = lower(body, content_type).unwrap_err();
            assert!(error.to_string().contains(expected), "{error} should say {expected}");
            assert!(!error.is_retryable(), "{error}");
        }
    }

    #[test]
    fn hostile_numbers_and_digests_are_refused() {
        for (from, to) in [
            (d(2), "sha256:../../../etc/passwd".to_owned()),
            (r#""size":10"#.to_owned(), r#""size":-1"#.to_owned()),
            (r#""size":10"#.to_owned(), r#""size":9223372036854775807"#.to_owned()),
        ] {
            let body = image("application/vnd.oci.image.layer.v1.tar").replace(&from, &to);
            assert!(matches!(lower(&body, ""), Err(PullError::Malformed { .. })), "{to}");
        }
        let layer = format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{}","size":10}}"#,
            d(2)
        );
        let layers = |n: usize| {
            let layers = vec![layer.as_str(); n].join(",");
            image("application/vnd.oci.image.layer.v1.tar").replace(&layer, &layers)
        };
        assert!(lower(&layers(MAX_LAYERS), "").is_ok());
        let error = lower(&layers(MAX_LAYERS + 1), "").unwrap_err();
        assert!(error.to_string().contains("more than 500 layers"), "{error}");
        let entry = format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{}","size":10}}"#, d(2));
        let many = vec![entry.as_str(); MAX_INDEX_ENTRIES + 1].join(",");
        let error = lower(&format!(r#"{{"schemaVersion":2,"manifests":[{many}]}}"#), OCI_INDEX).unwrap_err();
        assert!(error.to_string().contains("more than 4096 entries"), "{error}");
        assert!(lower_diff_ids(br#"{"rootfs":{"type":"layers","diff_ids":[]}}"#, 1).is_err());
        assert!(lower_diff_ids(br#"{"rootfs":{"diff_ids":["sha256:1"]}}"#, 1).is_err());
    }

    fn index(entries: &[(&str, u8)]) -> Index {
        let entries: Vec<String> = entries
            .iter()
            .map(|(platform, n)| {
                let p = Platform::parse(platform).unwrap();
                format!(
                    r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{}","size":5,"platform":{{"os":"{}","architecture":"{}","variant":"{}"}}}}"#,
                    d(*n), p.os, p.architecture, p.variant.unwrap_or_default()
                )
            })
            .collect();
        let body = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        match lower(&body, OCI_INDEX).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!("an index was read as an image"),
        }
    }

    #[test]
    fn the_best_entry_of_an_index_is_chosen() {
        let index =
            index(&[("unknown/unknown", 1), ("linux/arm/v6", 2), ("linux/arm/v7", 3), ("linux/amd64", 4)]);
        let pick = |p: &str| choose(&index, &Platform::parse(p).unwrap(), "x:1");
        assert_eq!(pick("linux/arm/v7").unwrap().digest.to_string(), d(3));
        assert_eq!(pick("linux/arm/v6").unwrap().digest.to_string(), d(2));
        assert_eq!(pick("linux/amd64/v3").unwrap().digest.to_string(), d(4));
        let error = pick("linux/riscv64").unwrap_err().to_string();
        assert_eq!(
            error,
            "x:1 has no image for linux/riscv64; it has linux/arm/v6, linux/arm/v7, linux/amd64"
        );
    }
}
