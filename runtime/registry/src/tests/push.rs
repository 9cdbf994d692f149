//! What we push, others pull.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::fixture::{Content, Packing, noise};
use super::real::{Registry, lab_is_here};
use super::server::{Reply, Server, honest};
use super::{Bench, options, recorder, silent};
use crate::{Client, InlineAuth, LayerState, PullError, PushError};

const BIG: usize = 6 << 20;

fn content() -> Content {
    let mut content = Content::default();
    let big = noise(BIG, 5);
    content.image(
        "1",
        "amd64",
        &[
            (Packing::Gzip, &[("a", b"x")]),
            (Packing::Zstd, &[("big", &big)]),
            (Packing::Plain, &[("c", b"z")]),
        ],
    );
    content
}

/// A store with the image of `content`, and the reference it was pulled by.
async fn pulled() -> (Bench, String, keel_store::Digest) {
    let content = content();
    let digest = content.tags["1"];
    let server = Server::honest(content).await;
    let bench = Bench::new();
    let reference = server.reference("1");
    bench.pull(options(), &reference).await.unwrap();
    (bench, reference, digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pushed_image_keeps_its_digest_and_others_pull_it() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let (bench, source, digest) = pulled().await;
    let registry = Registry::plain();
    let target = registry.reference("pushed");
    let client = Client::new(options());
    let (report, seen) = recorder();
    let pushed = client.push(&bench.store, &source, &target, &[], report).await.unwrap();
    assert_eq!(pushed, digest);
    let last = seen.lock().unwrap().last().cloned().unwrap();
    assert_eq!((last.layers_done, last.done_bytes), (3, last.total_bytes));

    // by ourselves, into another store
    let other = Bench::new();
    let image = other.pull(options(), &target).await.unwrap();
    assert_eq!(image.manifest_digest, digest);
    assert_eq!(other.file(&image, "big"), noise(BIG, 5));

    // by skopeo
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("skopeo")
        .args(["copy", "--insecure-policy", "--quiet", "--src-tls-verify=false", "--preserve-digests"])
        .arg(format!("docker://{target}"))
        .arg(format!("dir:{}", dir.path().display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = std::fs::read(dir.path().join("manifest.json")).unwrap();
    assert_eq!(keel_store::Digest::of(&manifest), digest);

    // by the other client library
    let _ = rustls::crypto::ring::default_provider().install_default();
    let oracle = oci_client::Client::new(oci_client::client::ClientConfig {
        protocol: oci_client::client::ClientProtocol::Http,
        ..Default::default()
    });
    let reference: oci_client::Reference = target.parse().unwrap();
    let anonymous = oci_client::secrets::RegistryAuth::Anonymous;
    let (manifest, found) = oracle.pull_image_manifest(&reference, &anonymous).await.unwrap();
    assert_eq!(found, digest.to_string());
    let mut blob = Vec::new();
    oracle.pull_blob(&reference, &manifest.layers[1], &mut blob).await.unwrap();
    assert_eq!(keel_store::Digest::of(&blob), image.layers[1].blob_digest);

    // Again: everything is there. To another repository of the registry: blobs are mounted, not sent.
    let (report, seen) = recorder();
    client.push(&bench.store, &source, &target, &[], report).await.unwrap();
    let layers = seen.lock().unwrap().last().cloned().unwrap().layers;
    assert!(layers.iter().all(|l| l.state == LayerState::Present));
    let moved = format!("{}/keel/elsewhere:1", registry.host());
    other.pull(options(), &target).await.unwrap();
    client.push(&other.store, &target, &moved, &[], silent()).await.unwrap();
    assert_eq!(Bench::new().pull(options(), &moved).await.unwrap().manifest_digest, digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_manifests_are_pushed_as_they_are() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let registry = Registry::plain();
    let mut content = Content::default();
    content.image("d", "amd64", &[(Packing::Gzip, &[("a", b"x")])]);
    registry.push(&content, "d", &["--format", "v2s2"]);
    let bench = Bench::new();
    let source = registry.reference("d");
    let digest = bench.pull(options(), &source).await.unwrap().manifest_digest;
    let target = format!("{}/other/name:d2", registry.host());
    let client = Client::new(options());
    assert_eq!(client.push(&bench.store, &source, &target, &[], silent()).await.unwrap(), digest);
    let image = Bench::new().pull(options(), &target).await.unwrap();
    assert_eq!(image.manifest_media_type, crate::manifest::DOCKER_MANIFEST);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_logs_in_and_is_refused_clearly() {
    if !lab_is_here(&["docker-registry", "htpasswd"]) {
        return;
    }
    let passwords = tempfile::NamedTempFile::new().unwrap();
    let status = Command::new("htpasswd")
        .arg("-Bbc")
        .arg(passwords.path())
        .args(["keel", "secret"])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let auth = json!({"htpasswd": {"realm": "r", "path": passwords.path()}});
    let registry = Registry::start(|_| json!({}), auth);
    let (bench, source, digest) = pulled().await;
    let client = Client::new(options());
    let target = registry.reference("1");
    let login = |password: &str| InlineAuth {
        name: "test".into(),
        config_json: json!({"auths": {registry.host(): {"username": "keel", "password": password}}})
            .to_string()
            .into_bytes(),
    };
    let push = async |auth: &[InlineAuth]| client.push(&bench.store, &source, &target, auth, silent()).await;
    assert_eq!(push(&[login("secret")]).await.unwrap(), digest);
    for auth in [vec![], vec![login("wrong")]] {
        let error = push(&auth).await.unwrap_err();
        assert!(matches!(error, PushError::Registry(PullError::Unauthorized { .. })), "{error}");
        assert!(!error.is_retryable());
    }
    let error = client.push(&bench.store, "nothing:1", &target, &[], silent()).await.unwrap_err();
    assert!(matches!(error, PushError::NotInStore { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_upload_goes_on_where_the_registry_stopped() {
    let (bench, source, digest) = pulled().await;
    let patches = AtomicUsize::new(0);
    let server = Server::start(Content::default(), move |r| {
        let place = |reply: Reply| reply.with("Location", "/v2/keel/x/blobs/uploads/u");
        Some(match r.method.as_str() {
            "POST" => place(Reply::new(202)),
            "PATCH" if r.body_len > BIG && patches.fetch_add(1, Ordering::SeqCst) == 0 => Reply::new(503),
            "PATCH" => place(Reply::new(202)),
            // what the registry kept of the broken request
            "GET" => place(Reply::new(204).with("Range", format!("0-{}", BIG / 2 - 1))),
            "PUT" => Reply::new(201),
            _ => honest(&Content::default(), r),
        })
    })
    .await;
    let client = Client::new(options());
    let pushed = client.push(&bench.store, &source, &server.reference("1"), &[], silent()).await.unwrap();
    assert_eq!(pushed, digest);
    let patches: Vec<_> = server.seen().into_iter().filter(|r| r.method == "PATCH").collect();
    let resumed: Vec<_> = patches
        .iter()
        .filter(|r| r.header("content-range").is_some_and(|c| c.starts_with(&format!("{}-", BIG / 2))))
        .collect();
    assert_eq!(resumed.len(), 1, "{:?}", patches.iter().map(|r| &r.headers).collect::<Vec<_>>());
    assert!(resumed[0].body_len < BIG);
    assert_eq!(server.seen().iter().filter(|r| r.method == "POST").count(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_to_another_host_carries_no_login() {
    let (bench, source, _) = pulled().await;
    let storage = Server::start(Content::default(), |r| {
        Some(match r.method.as_str() {
            "PATCH" => Reply::new(202).with("Location", "/there?x=y"),
            _ => Reply::new(201),
        })
    })
    .await;
    let elsewhere = storage.address;
    let server = Server::start(Content::default(), move |r| {
        if !r.has_basic("keel:secret") {
            return Some(Reply::new(401).with("WWW-Authenticate", "Basic realm=\"x\""));
        }
        Some(match r.method.as_str() {
            "POST" => Reply::new(202).with("Location", format!("http://{elsewhere}/there")),
            "HEAD" => Reply::new(404),
            _ => Reply::new(201),
        })
    })
    .await;
    let login = InlineAuth {
        name: "test".into(),
        config_json:
            json!({"auths": {server.address.to_string(): {"username": "keel", "password": "secret"}}})
                .to_string()
                .into_bytes(),
    };
    let client = Client::new(options());
    client.push(&bench.store, &source, &server.reference("1"), &[login], silent()).await.unwrap();
    assert_eq!(storage.seen().len(), 8, "two requests for each of four blobs");
    assert!(storage.seen().iter().all(|r| r.header("authorization").is_none()));
}
