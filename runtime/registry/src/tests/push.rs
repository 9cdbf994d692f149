//! What we push, others pull.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::fixture::{Content, Packing, noise};
use super::real::{Registry, lab_is_here};
use super::server::{Body, Reply, Request, Server, honest};
use super::{Bench, options, recorder, silent};
use crate::{Client, ClientOptions, InlineAuth, LayerState, PullError, PushError};

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

/// A registry that takes uploads piece by piece, at most `limit` bytes, and keeps count.
fn pieces(limit: u64, least: u64) -> impl Fn(&Request) -> Option<Reply> {
    let there: Mutex<BTreeMap<String, u64>> = Mutex::default();
    move |r| {
        let mut there = there.lock().unwrap();
        let path = r.target.split('?').next().unwrap_or_default().to_owned();
        let place = |reply: Reply, path: &str| reply.with("Location", path);
        Some(match r.method.as_str() {
            "POST" => {
                let path = format!("{path}u{}", there.len());
                there.insert(path.clone(), 0);
                place(Reply::new(202), &path).with("OCI-Chunk-Min-Length", least)
            }
            "PATCH" => {
                let have = there[&path];
                let range = r.header("content-range").unwrap_or("0-0").to_owned();
                if !range.starts_with(&format!("{have}-")) {
                    return Some(place(Reply::new(416), &path).with("Range", format!("0-{}", have - 1)));
                }
                if r.body_len as u64 > limit {
                    return Some(Reply::new(413));
                }
                let now = have + r.body_len as u64;
                there.insert(path.clone(), now);
                place(Reply::new(202), &path).with("Range", format!("0-{}", now - 1))
            }
            "GET" => place(Reply::new(204), &path).with("Range", format!("0-{}", there[&path].max(1) - 1)),
            "PUT" => Reply::new(201),
            _ => honest(&Content::default(), r),
        })
    }
}

fn in_pieces(chunk_bytes: u64) -> Client {
    Client::new(ClientOptions { chunk_bytes, ..options() })
}

/// Content-Range of the pieces of the large layer, in order.
fn ranges(server: &Server) -> Vec<String> {
    let patches = server.seen().into_iter().filter(|r| r.method == "PATCH" && r.body_len > 4096);
    patches.filter_map(|r| r.headers.get("content-range").cloned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_goes_in_bounded_pieces_of_at_least_what_the_registry_asks_for() {
    let (bench, source, digest) = pulled().await;
    for (least, piece) in [(0, 1 << 20), (2 << 20, 2 << 20)] {
        let server = Server::start(Content::default(), pieces(piece, least)).await;
        let (report, seen) = recorder();
        let target = server.reference("1");
        let client = in_pieces(1 << 20);
        assert_eq!(client.push(&bench.store, &source, &target, &[], report).await.unwrap(), digest);
        let ranges = ranges(&server);
        // The few bytes of the last piece are left out above.
        assert_eq!(ranges.len() as u64, BIG as u64 / piece, "{ranges:?}");
        assert_eq!(ranges[1], format!("{piece}-{}", 2 * piece - 1));
        let seen = seen.lock().unwrap();
        assert!(seen.windows(2).all(|w| w[0].done_bytes <= w[1].done_bytes), "never back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_that_are_too_much_for_a_proxy_get_smaller() {
    let (bench, source, digest) = pulled().await;
    let target = |server: &Server| server.reference("1");
    let server = Server::start(Content::default(), pieces(1 << 20, 0)).await;
    let client = in_pieces(64 << 20);
    let pushed = client.push(&bench.store, &source, &target(&server), &[], silent()).await;
    assert_eq!(pushed.unwrap(), digest);
    assert!(ranges(&server).len() < 24, "{:?}", ranges(&server));
    let hopeless = Server::start(Content::default(), pieces(100 << 10, 0)).await;
    let error = client.push(&bench.store, &source, &target(&hopeless), &[], silent()).await.unwrap_err();
    assert!(error.to_string().contains("413"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_a_broken_connection_lost_is_sent_again_and_no_other() {
    let (bench, source, digest) = pulled().await;
    let honest_pieces = pieces(1 << 20, 0);
    let lost = AtomicUsize::new(0);
    let server = Server::start(Content::default(), move |r| {
        let third = r.header("content-range").is_some_and(|c| c.starts_with("2097152-"));
        if third && lost.fetch_add(1, Ordering::SeqCst) == 0 {
            return Some(Reply::new(202).body(Body::HangUp));
        }
        honest_pieces(r)
    })
    .await;
    let pushed = in_pieces(1 << 20).push(&bench.store, &source, &server.reference("1"), &[], silent()).await;
    assert_eq!(pushed.unwrap(), digest);
    let ranges = ranges(&server);
    let twice: Vec<_> = ranges.iter().filter(|r| ranges.iter().filter(|o| o == r).count() == 2).collect();
    assert_eq!(twice.len(), 2, "{ranges:?}");
    assert!(twice[0].starts_with("2097152-"));
    assert!(server.seen().iter().any(|r| r.method == "GET" && r.target.contains("/uploads/")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_elsewhere_is_followed_and_one_that_takes_no_pieces_gets_it_whole() {
    let (bench, source, digest) = pulled().await;
    // It drops the second piece of the large layer once, says so, and is told again from there.
    let honest_pieces = pieces(1 << 20, 0);
    let dropped = AtomicUsize::new(0);
    let server = Server::start(Content::default(), move |r| {
        let second = r.header("content-range").is_some_and(|c| c.starts_with("1048576-"));
        if second && dropped.fetch_add(1, Ordering::SeqCst) == 0 {
            let place = r.target.split('?').next().unwrap_or_default().to_owned();
            return Some(Reply::new(416).with("Location", place).with("Range", "0-1048575"));
        }
        honest_pieces(r)
    })
    .await;
    let target = server.reference("1");
    let client = in_pieces(1 << 20);
    assert_eq!(client.push(&bench.store, &source, &target, &[], silent()).await.unwrap(), digest);
    assert!(server.seen().iter().all(|r| r.method != "PUT" || r.body_len < 4096), "never whole");

    for status in [405, 501, 416] {
        let server = Server::start(Content::default(), move |r| {
            Some(match r.method.as_str() {
                "POST" => Reply::new(202).with("Location", "/v2/keel/x/blobs/uploads/u"),
                "PATCH" => Reply::new(status),
                "PUT" => Reply::new(201),
                _ => Reply::new(404),
            })
        })
        .await;
        let target = server.reference("1");
        assert_eq!(client.push(&bench.store, &source, &target, &[], silent()).await.unwrap(), digest);
        let whole: Vec<_> = server
            .seen()
            .into_iter()
            .filter(|r| r.method == "PUT" && r.target.contains("digest=sha256%3A"))
            .collect();
        assert_eq!(whole.len(), 4);
        assert!(whole.iter().any(|r| r.body_len > BIG));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_runs_out_between_pieces_is_renewed() {
    let (bench, source, digest) = pulled().await;
    let uploads = pieces(1 << 20, 0);
    let (used, issued) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let server = Server::start(Content::default(), move |r| {
        let host = r.header("host").unwrap_or("");
        if r.target.starts_with("/token") {
            assert!(r.target.contains("push"), "{}", r.target);
            used.store(0, Ordering::SeqCst);
            let token = format!("t{}", issued.fetch_add(1, Ordering::SeqCst) + 1);
            return Some(Reply::new(200).text(json!({"token": token}).to_string()));
        }
        let good = format!("Bearer t{}", issued.load(Ordering::SeqCst));
        if r.header("authorization") != Some(&good) || used.fetch_add(1, Ordering::SeqCst) >= 3 {
            let realm = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
            return Some(Reply::new(401).with("WWW-Authenticate", realm));
        }
        uploads(r)
    })
    .await;
    let client = Client::new(ClientOptions { chunk_bytes: 1 << 20, parallel_layers: 1, ..options() });
    let pushed = client.push(&bench.store, &source, &server.reference("1"), &[], silent()).await.unwrap();
    assert_eq!(pushed, digest);
    assert!(server.seen_of("/token").len() > 4);
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
