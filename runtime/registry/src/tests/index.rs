//! Whole indexes: pulled, kept, pushed.

use std::process::{Command, Stdio};

use super::fixture::{Content, Packing};
use super::real::{Registry, lab_is_here};
use super::server::{Reply, Server};
use super::{Bench, options, recorder, silent};
use crate::manifest::{OCI_INDEX, OCI_MANIFEST};
use crate::{Client, Platform, PullError, PullOptions};
use keel_store::{Digest, Image};
use serde_json::json;

/// An index of two images and an attestation under the tag `multi`.
pub(super) fn multi() -> (Content, Digest) {
    let mut content = Content::default();
    let base: (&str, &[u8]) = ("base", b"shared");
    let amd64 =
        content.image("amd64", "amd64", &[(Packing::Gzip, &[base]), (Packing::Gzip, &[("name", b"amd64")])]);
    let arm64 =
        content.image("arm64", "arm64", &[(Packing::Gzip, &[base]), (Packing::Zstd, &[("name", b"arm64")])]);
    let config = content.blob("application/vnd.oci.image.config.v1+json", b"{}".to_vec());
    let statement = content.blob("application/vnd.in-toto+json", b"{\"_type\":\"statement\"}".to_vec());
    let attestation =
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [statement]});
    let attestation = content.manifest("attestation", OCI_MANIFEST, attestation.to_string().into_bytes());
    content.index("multi", &[("amd64", None, amd64), ("arm64", Some("v8"), arm64)]);
    // The attestation is for no platform.
    let (_, body) = content.manifests.remove(&content.tags["multi"]).unwrap();
    let mut index: serde_json::Value = serde_json::from_slice(&body).unwrap();
    index["manifests"].as_array_mut().unwrap().push(json!({
        "mediaType": OCI_MANIFEST, "digest": attestation, "size": content.manifests[&attestation].1.len(),
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    }));
    let digest = content.manifest("multi", OCI_INDEX, index.to_string().into_bytes());
    (content, digest)
}

async fn pull_all(bench: &Bench, reference: &str) -> Result<Image, PullError> {
    let platform = Platform::parse("linux/amd64").unwrap();
    let wanted = PullOptions { platform, all_platforms: true, ..PullOptions::default() };
    Client::new(options()).pull_with(&bench.store, reference, wanted, silent()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_kept_whole_on_request_and_only_this_platform_is_unpacked() {
    let (content, index) = multi();
    let server = Server::honest(content.clone()).await;
    let bench = Bench::new();
    let reference = server.reference("multi");
    let image = bench.pull(options(), &reference).await.unwrap();
    assert_eq!(image.index, None, "nobody asked for it");

    let image = pull_all(&bench, &reference).await.unwrap();
    let kept = image.index.clone().unwrap();
    assert_eq!((kept.digest, kept.members.len()), (index, 3));
    assert_eq!(image.manifest_digest, content.tags["amd64"]);
    for digest in content.blobs.keys().chain(content.manifests.keys()) {
        assert!(bench.store.has_blob(digest), "{digest}");
    }
    let layers = std::fs::read_dir(bench.path().join("layers")).unwrap().count();
    assert_eq!(layers, 2);
    assert_eq!(bench.leftovers(), Vec::<String>::new());

    // Kept as long as its name means it, also by those who do not ask; and nothing is fetched twice.
    let before = server.seen_of("/blobs/").len();
    assert_eq!(bench.pull(options(), &reference).await.unwrap().index, Some(kept));
    assert_eq!(server.seen_of("/blobs/").len(), before);
    let by_digest = format!("{}/keel/x@{index}", server.address);
    pull_all(&bench, &by_digest).await.unwrap();
    let before = server.seen().len();
    let image = pull_all(&bench, &by_digest).await.unwrap();
    assert_eq!(image.index.unwrap().digest, index);
    assert_eq!(server.seen().len(), before, "what a digest names never changes");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_of_an_index_fails_the_pull_and_leaves_the_image_that_was_there() {
    let (content, _) = multi();
    let lost = content.layers("arm64")[1];
    let server = Server::start(content, move |r| r.is_blob(&lost).then(|| Reply::new(404))).await;
    let bench = Bench::new();
    let reference = server.reference("multi");
    let before = bench.pull(options(), &reference).await.unwrap();
    let error = pull_all(&bench, &reference).await.unwrap_err();
    assert!(matches!(error, PullError::BlobNotFound { .. }), "{error}");
    assert!(error.to_string().contains("of another platform"), "{error}");
    let after = bench.store.image(&reference).unwrap().unwrap();
    assert_eq!((after.manifest_digest, after.index), (before.manifest_digest, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_layers_that_were_given_up_come_back_on_request() {
    let (content, _) = multi();
    let server = Server::honest(content).await;
    let bench = Bench::new();
    let reference = server.reference("amd64");
    let image = bench.pull(options(), &reference).await.unwrap();
    assert_eq!(bench.store.drop_unpacked_blobs(&|| false).unwrap().blobs, 2);
    bench.pull(options(), &reference).await.unwrap();
    assert!(!bench.store.has_blob(&image.layers[0].blob_digest), "running it needs none");
    let wanted = PullOptions { packed: true, ..PullOptions::default() };
    Client::new(options()).pull_with(&bench.store, &reference, wanted, silent()).await.unwrap();
    assert!(image.layers.iter().all(|layer| bench.store.has_blob(&layer.blob_digest)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pushed_index_has_its_digest_and_all_its_images_for_others() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let (content, index) = multi();
    let registry = Registry::plain();
    registry.push(&content, "multi", &["--all", "--preserve-digests"]);
    let bench = Bench::new();
    let source = registry.reference("multi");
    pull_all(&bench, &source).await.unwrap();
    let client = Client::new(options());
    // To the same registry blobs are mounted, to another one they are sent.
    let other = Registry::plain();
    for target in [format!("{}/keel/moved:1", registry.host()), format!("{}/keel/y:2", other.host())] {
        let (report, seen) = recorder();
        assert_eq!(client.push(&bench.store, &source, &target, &[], report).await.unwrap(), index);
        let last = seen.lock().unwrap().last().cloned().unwrap();
        assert_eq!(
            (last.layers_done, last.layers_total),
            (3, 3),
            "one layer is shared, attestations are none"
        );
        let dir = tempfile::tempdir().unwrap();
        let output = Command::new("skopeo")
            .args(["copy", "--insecure-policy", "--quiet", "--src-tls-verify=false", "--all"])
            .arg("--preserve-digests")
            .arg(format!("docker://{target}"))
            .arg(format!("dir:{}", dir.path().display()))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(Digest::of(&std::fs::read(dir.path().join("manifest.json")).unwrap()), index);
        let again = Bench::new();
        assert_eq!(pull_all(&again, &target).await.unwrap().index.unwrap().digest, index);
    }
}
