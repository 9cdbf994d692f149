//! What a registry can do to a pull, and what becomes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keel_store::Digest;
use serde_json::json;

use super::fixture::{Content, Packing, noise};
use super::server::{Body, Reply, Request, Server, honest};
use super::{Bench, eventually, options, recorder, silent};
use crate::manifest::OCI_MANIFEST;
use crate::{Client, ClientOptions, InlineAuth, LayerState, Platform, PullError, PullOptions};

/// Larger than every buffer between server and store, so that half of it is really half.
const BIG: usize = 3 << 20;

/// Two layers: a small gzip one and a big plain one. Gives the content and the digest of the big one.
fn two_layers() -> (Content, Digest) {
    let mut content = Content::default();
    let big = noise(BIG, 1);
    content.image(
        "1",
        "amd64",
        &[(Packing::Gzip, &[("etc/name", b"keel")]), (Packing::Plain, &[("big", &big)])],
    );
    let big = content.layers("1")[1];
    (content, big)
}

/// Pulls `two_layers` from a server that answers requests for the big layer as told.
async fn pull_big(
    answer: impl Fn(&Request, &[u8]) -> Option<Reply> + Send + Sync + 'static,
) -> (Result<keel_store::Image, PullError>, Server, Bench) {
    let (content, big) = two_layers();
    let bytes = content.blobs[&big].clone();
    let server =
        Server::start(content, move |r| if r.is_blob(&big) { answer(r, &bytes) } else { None }).await;
    let bench = Bench::new();
    let result = bench.pull(options(), &server.reference("1")).await;
    (result, server, bench)
}

fn assert_whole(result: Result<keel_store::Image, PullError>, bench: &Bench) {
    let image = result.unwrap();
    assert_eq!(bench.file(&image, "etc/name"), b"keel");
    assert_eq!(bench.file(&image, "big"), noise(BIG, 1));
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_pull_reports_all_its_bytes_and_a_second_one_fetches_no_layer() {
    let (content, _) = two_layers();
    let total: u64 = content.layers("1").iter().map(|d| content.blobs[d].len() as u64).sum();
    let server = Server::honest(content).await;
    let bench = Bench::new();
    let client = Client::new(options());
    let (report, seen) = recorder();
    let platform = Platform::parse("linux/amd64").unwrap();
    let image = client.pull(&bench.store, &server.reference("1"), platform.clone(), report).await.unwrap();
    assert_eq!(image.layers.len(), 2);
    {
        let seen = seen.lock().unwrap();
        let (first, last) = (seen.first().unwrap(), seen.last().unwrap());
        assert_eq!((first.done_bytes, first.total_bytes, first.layers_total), (0, total, 2));
        assert_eq!((last.done_bytes, last.layers_done), (total, 2));
        assert!(last.layers.iter().all(|l| l.state == LayerState::Done));
        assert!(seen.windows(2).all(|w| w[0].done_bytes <= w[1].done_bytes));
    }
    let before = server.seen_of("/blobs/").len();
    let (report, seen) = recorder();
    client.pull(&bench.store, &server.reference("1"), platform, report).await.unwrap();
    assert_eq!(server.seen_of("/blobs/").len(), before, "nothing but the manifest is asked for");
    let seen = seen.lock().unwrap();
    assert!(seen.last().unwrap().layers.iter().all(|l| l.state == LayerState::Present));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_body_is_resumed_where_it_broke() {
    let (result, server, bench) = pull_big(|request, bytes| {
        (request.before == 0)
            .then(|| Reply::new(200).body(Body::Announced(bytes.len() as u64, bytes[..BIG / 2].to_vec())))
    })
    .await;
    assert_whole(result, &bench);
    let ranges: Vec<_> = server.seen().into_iter().filter_map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [format!("bytes={}-", BIG / 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_ignores_ranges_is_read_again_from_the_start() {
    let (result, server, bench) = pull_big(|request, bytes| {
        Some(match request.before {
            0 => Reply::new(200).body(Body::Announced(bytes.len() as u64, bytes[..BIG / 2].to_vec())),
            _ => Reply::new(200).body(Body::Chunked(bytes.to_vec())),
        })
    })
    .await;
    assert_whole(result, &bench);
    assert_eq!(server.seen_of("/blobs/").len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_range_is_refused() {
    let (result, _server, _bench) = pull_big(|request, bytes| {
        Some(match request.before {
            0 => Reply::new(200).body(Body::Announced(bytes.len() as u64, bytes[..BIG / 2].to_vec())),
            _ => Reply::new(206)
                .with("Content-Range", format!("bytes 0-{}/{}", bytes.len() - 1, bytes.len()))
                .body(Body::Whole(bytes.to_vec())),
        })
    })
    .await;
    assert!(matches!(result, Err(PullError::Malformed { .. })), "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_always_breaks_is_given_up_and_its_bytes_are_kept_for_the_next_pull() {
    let (content, big) = two_layers();
    let bytes = content.blobs[&big].clone();
    let good = Arc::new(AtomicUsize::new(0));
    let server = Server::start(content, {
        let good = good.clone();
        move |r| {
            let broken = r.is_blob(&big) && good.load(Ordering::SeqCst) == 0;
            broken.then(|| match r.header("range") {
                None => Reply::new(200).body(Body::Announced(bytes.len() as u64, bytes[..BIG / 2].to_vec())),
                Some(_) => Reply::new(500),
            })
        }
    })
    .await;
    let bench = Bench::new();
    let error = bench.pull(options(), &server.reference("1")).await.unwrap_err();
    assert!(matches!(error, PullError::Server { status: 500, .. }), "{error}");
    assert!(error.is_retryable());
    good.store(1, Ordering::SeqCst);
    let asked = server.seen_of(&big.to_string()).len();
    let image = bench.pull(options(), &server.reference("1")).await.unwrap();
    assert_eq!(bench.file(&image, "big"), noise(BIG, 1));
    let again = &server.seen_of(&big.to_string())[asked..];
    assert!(again[0].header("range").is_some_and(|r| r.starts_with("bytes=")), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_never_kept() {
    let (result, server, bench) = pull_big(|_, bytes| {
        let mut wrong = bytes.to_vec();
        wrong[BIG / 2] ^= 1;
        Some(Reply::new(200).body(Body::Whole(wrong)))
    })
    .await;
    let error = result.unwrap_err();
    assert!(matches!(error, PullError::WrongDigest { .. }), "{error}");
    assert!(error.to_string().contains("layer 2 of 2"), "{error}");
    assert!(error.hint().unwrap().contains("proxy"));
    eventually("only the good layer is kept", || bench.leftovers().is_empty()).await;
    assert!(bench.store.images().unwrap().is_empty());
    assert_eq!(server.seen_of("/blobs/").len(), 4, "the layer is tried twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_another_length_is_refused_before_it_is_read() {
    for change in [-1i64, 1] {
        let (result, _server, bench) = pull_big(move |_, bytes| {
            let length = bytes.len() as i64 + change;
            Some(Reply::new(200).body(Body::Announced(length as u64, bytes.to_vec())))
        })
        .await;
        let error = result.unwrap_err();
        assert!(matches!(error, PullError::WrongLength { .. }), "{error}");
        assert!(bench.store.images().unwrap().is_empty());
    }
    let (result, server, _bench) = pull_big(|_, _| Some(Reply::new(200).body(Body::Endless))).await;
    let error = result.unwrap_err();
    // What the endless body says is neither the layer's length nor its digest; which one shows first is chance.
    assert!(!matches!(error, PullError::Stalled { .. }), "{error}");
    assert!(server.sent() < 64 << 20, "{} bytes were read", server.sent());
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_dripping_are_stalls() {
    for body in [Body::Stall(BIG as u64 + 1536, vec![7; 100]), Body::Drip(BIG as u64 + 1536)] {
        let mut options = options();
        options.retry.attempts = 2;
        let (content, big) = two_layers();
        let server =
            Server::start(content, move |r| r.is_blob(&big).then(|| Reply::new(200).body(body.clone())))
                .await;
        let bench = Bench::new();
        let begin = Instant::now();
        let error = bench.pull(options, &server.reference("1")).await.unwrap_err();
        assert!(matches!(error, PullError::Stalled { .. }), "{error}");
        assert!(error.is_retryable());
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_connection_is_resumed_where_it_broke() {
    let (result, server, bench) = pull_big(|request, bytes| match request.before {
        0 => Some(Reply::new(200).body(Body::Reset(bytes.len() as u64, bytes[..BIG / 2].to_vec()))),
        1 => Some(Reply::new(200).body(Body::HangUp)),
        _ => None,
    })
    .await;
    assert_whole(result, &bench);
    let ranges: Vec<_> = server.seen().into_iter().filter_map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges.iter().all(|range| range == &ranges[0] && range != "bytes=0-"), "{ranges:?}");

    let (result, _server, _bench) = pull_big(|_, _| Some(Reply::new(200).body(Body::HangUp))).await;
    let error = result.unwrap_err();
    assert!(matches!(error, PullError::Connection { .. }), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_calls_itself_something_else_is_judged_by_what_it_is() {
    // A layer is inflated by its first bytes, whatever it is called.
    let mut content = Content::default();
    let zstd = content.image("1", "amd64", &[(Packing::Zstd, &[("a", b"x")])]);
    let (_, body) = content.manifests[&zstd].clone();
    let text = String::from_utf8(body).unwrap();
    let tag = |content: &mut Content, tag: &str, media_type: &str, text: String| {
        content.manifest(tag, media_type, text.into_bytes());
    };
    tag(&mut content, "gzip", crate::manifest::OCI_MANIFEST, text.replace("tar+zstd", "tar+gzip"));
    tag(&mut content, "lzma", crate::manifest::OCI_MANIFEST, text.replace("tar+zstd", "tar+lzma"));
    tag(&mut content, "index", crate::manifest::OCI_INDEX, format!(" {text}"));
    tag(&mut content, "octets", "application/octet-stream", format!("{text} "));
    tag(&mut content, "page", "text/html", "<html>log in first</html>".to_owned());
    let server = Server::honest(content).await;
    for (tag, expected) in [
        ("gzip", ""),
        // Without a type of its own it would be nothing; with one it is that.
        ("octets", ""),
        ("lzma", "layer of unsupported type"),
        ("index", "contradict each other"),
        ("page", "not a JSON manifest"),
    ] {
        let bench = Bench::new();
        match bench.pull(options(), &server.reference(tag)).await {
            Ok(image) => {
                assert_eq!(expected, "", "{tag}");
                assert_eq!(bench.file(&image, "a"), b"x");
            }
            Err(error) => {
                assert!(!expected.is_empty() && error.to_string().contains(expected), "{tag}: {error}");
                assert!(!error.is_retryable(), "{tag}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn short_trouble_is_waited_out() {
    let (result, server, bench) = pull_big(|request, bytes| {
        Some(match request.before {
            0 => Reply::new(429).with("Retry-After", 1),
            1 => Reply::new(500),
            2 => Reply::new(503),
            _ => Reply::new(200).body(Body::Whole(bytes.to_vec())),
        })
    })
    .await;
    assert_whole(result, &bench);
    assert_eq!(server.seen_of("/blobs/").len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_is_told_while_it_lasts() {
    let (content, big) = two_layers();
    let server = Server::start(content, move |r| {
        let limited = r.before == 0 && (r.is_blob(&big) || r.target.contains("/manifests/"));
        limited.then(|| Reply::new(429))
    })
    .await;
    let bench = Bench::new();
    let (report, seen) = recorder();
    let platform = Platform::parse("linux/amd64").unwrap();
    Client::new(options()).pull(&bench.store, &server.reference("1"), platform, report).await.unwrap();
    let seen = seen.lock().unwrap();
    let waits: Vec<_> =
        seen.iter().filter_map(|p| Some((p.layers_total, p.waiting.clone()?.reason))).collect();
    let reason = format!("{} limits the rate of requests", server.address);
    assert!(waits.contains(&(0, reason.clone())) && waits.contains(&(2, reason)), "{waits:?}");
    assert_eq!(seen.last().unwrap().waiting, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_honoured() {
    // 503: a registry in maintenance (RFC 9110, 15.6.4).
    for status in [429, 503] {
        let begin = Instant::now();
        let refuse = move || Reply::new(status).with("Retry-After", 1);
        let (result, _server, bench) = pull_big(move |request, _| (request.before == 0).then(refuse)).await;
        assert_whole(result, &bench);
        assert!(begin.elapsed() >= Duration::from_secs(1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_retry_after_is_reported_not_waited_for() {
    let begin = Instant::now();
    let (result, server, _bench) = pull_big(|_, _| Some(Reply::new(429).with("Retry-After", 3600))).await;
    let error = result.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} limits the rate of requests and asks to wait 3600 s", server.address)
    );
    assert!(error.is_retryable());
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn lasting_trouble_is_reported_with_the_registrys_words() {
    let (result, server, _bench) = pull_big(|_, _| {
        Some(Reply::new(500).text(r#"{"errors":[{"code":"UNKNOWN","message":"the disk is on fire"}]}"#))
    })
    .await;
    let error = result.unwrap_err().to_string();
    assert!(error.contains("answers 500") && error.contains("the disk is on fire"), "{error}");
    // One for each of the config and the good layer, and as often as the policy says for the other.
    assert_eq!(server.seen_of("/blobs/").len(), 2 + 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_layer_and_a_missing_image_have_their_own_messages() {
    let (result, _server, _bench) = pull_big(|_, _| Some(Reply::new(404))).await;
    assert!(matches!(result, Err(PullError::BlobNotFound { .. })), "{result:?}");
    let server = Server::honest(Content::default()).await;
    let bench = Bench::new();
    let error = bench.pull(options(), &server.reference("nope")).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
    assert!(error.to_string().ends_with("is not in the registry: there is no such thing"), "{error}");
    assert!(!error.is_retryable());
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listening_is_said_plainly() {
    // Bound and closed again: a port that was free a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let bench = Bench::new();
    let error = bench.pull(options(), &format!("{address}/x:1")).await.unwrap_err();
    assert_eq!(error.to_string(), format!("{address} refuses the connection"));
    assert!(error.is_retryable());
    let error = bench.pull(options(), "no-such-host.invalid/x:1").await.unwrap_err();
    assert!(matches!(error, PullError::Resolve { .. }), "{error}");
    let error = bench.pull(options(), "UPPER/case:1").await.unwrap_err();
    assert!(matches!(error, PullError::Reference { .. } | PullError::Resolve { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_in_references_bind() {
    let (mut content, _) = two_layers();
    let digest = content.tags["1"];
    let other = content.image("2", "amd64", &[(Packing::Gzip, &[("other", b"x")])]);
    let liar = content.clone();
    let server = Server::honest(content).await;
    let bench = Bench::new();
    for reference in [
        format!("{}/keel/x@{digest}", server.address),
        format!("{}/keel/x:1@{digest}", server.address),
        // the digest decides, whatever the tag says now
        format!("{}/keel/x:2@{digest}", server.address),
    ] {
        let image = bench.pull(options(), &reference).await.unwrap();
        assert_eq!((image.manifest_digest, image.reference), (digest, reference));
    }
    let asked = server.seen().len();
    bench.pull(options(), &format!("{}/keel/x@{digest}", server.address)).await.unwrap();
    assert_eq!(server.seen().len(), asked, "what a digest names is not asked for twice");
    let (_, other_body) = liar.manifests[&other].clone();
    let server = Server::start(liar, move |r| {
        r.target.contains("/manifests/").then(|| {
            Reply::new(200)
                .with("Content-Type", crate::manifest::OCI_MANIFEST)
                .body(Body::Whole(other_body.clone()))
        })
    })
    .await;
    let error = bench.pull(options(), &format!("{}/keel/x@{digest}", server.address)).await.unwrap_err();
    assert!(matches!(error, PullError::WrongDigest { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_documents_cost_little_memory() {
    let (content, _) = two_layers();
    for part in ["/manifests/", "/token"] {
        let server = Server::start(content.clone(), move |r| {
            if r.target.contains(part) {
                return Some(Reply::new(200).body(Body::Endless));
            }
            let host = r.header("host").unwrap_or("");
            r.header("authorization").is_none().then(|| challenge(host, ""))
        })
        .await;
        let bench = Bench::new();
        let error = bench.pull(options(), &server.reference("1")).await.unwrap_err();
        assert!(matches!(error, PullError::TooLarge { .. }), "{part}: {error}");
        // The limit, and what the kernel's socket buffers took.
        assert!(server.sent() < 24 << 20, "{part}: {} bytes were taken", server.sent());
    }
    // A config is as long as the manifest says, and that has a limit, too.
    for (size, body) in [(100, Body::Endless), (5 << 20, Body::Whole(vec![b' '; 5 << 20]))] {
        let mut content = content.clone();
        let (_, manifest) = &content.manifests[&content.tags["1"]];
        let mut manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
        manifest["config"]["size"] = json!(size);
        manifest["config"]["digest"] = json!(Digest::of(b"config"));
        content.manifest("1", OCI_MANIFEST, manifest.to_string().into_bytes());
        let server = Server::start(content, move |r| {
            r.is_blob(&Digest::of(b"config")).then(|| Reply::new(200).body(body.clone()))
        })
        .await;
        let error = Bench::new().pull(options(), &server.reference("1")).await.unwrap_err();
        assert!(matches!(error, PullError::TooLarge { limit: 4194304, .. }), "{error}");
        assert!(server.sent() < 24 << 20, "{} bytes were taken", server.sent());
    }
    let announced = Server::start(content, |r| {
        r.target.contains("/manifests/").then(|| Reply::new(200).body(Body::Stall(2 << 30, Vec::new())))
    })
    .await;
    let error = Bench::new().pull(options(), &announced.reference("1")).await.unwrap_err();
    assert!(matches!(error, PullError::TooLarge { limit: 4194304, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_error_page_is_left_unread() {
    for status in [403, 404, 500] {
        let mut options = options();
        options.retry.attempts = 1;
        let server =
            Server::start(Content::default(), move |_| Some(Reply::new(status).body(Body::Endless))).await;
        let error = Bench::new().pull(options, &server.reference("1")).await.unwrap_err();
        assert!(error.to_string().len() < 500, "{error}");
        assert!(server.sent() < 24 << 20, "{status}: {} bytes were taken", server.sent());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_stall_or_are_cut_or_reset_are_tried_again_and_given_up() {
    let (content, _) = two_layers();
    let config: Digest = {
        let (_, body) = &content.manifests[&content.tags["1"]];
        let manifest: serde_json::Value = serde_json::from_slice(body).unwrap();
        manifest["config"]["digest"].as_str().unwrap().parse().unwrap()
    };
    for part in ["/manifests/".to_owned(), "/token".to_owned(), config.to_string()] {
        for body in [Body::Stall(500, vec![b'{'; 100]), Body::Announced(500, vec![b'{'; 100]), Body::HangUp] {
            for lasting in [false, true] {
                let (content, part, body) = (content.clone(), part.clone(), body.clone());
                let served = content.clone();
                let server = Server::start(content, move |r| {
                    if r.target.contains(&part) && (lasting || r.before == 0) {
                        return Some(Reply::new(200).body(body.clone()));
                    }
                    if r.target.starts_with("/token") {
                        return Some(Reply::new(200).text(r#"{"token":"t"}"#));
                    }
                    if r.header("authorization") != Some("Bearer t") {
                        return Some(challenge(r.header("host").unwrap_or(""), ""));
                    }
                    Some(honest(&served, r))
                })
                .await;
                let mut options = options();
                options.retry.attempts = 2;
                options.timeouts.no_progress = Duration::from_millis(200);
                let result = Bench::new().pull(options, &server.reference("1")).await;
                match (lasting, result) {
                    (false, Ok(_)) => {}
                    (true, Err(error)) => assert!(error.is_retryable(), "{error}"),
                    (_, other) => panic!("lasting: {lasting}: {other:?}"),
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_1_and_foreign_platforms_are_named() {
    let (mut content, _) = two_layers();
    content.manifest(
        "old",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        br#"{"schemaVersion":1,"name":"x","tag":"old","fsLayers":[]}"#.to_vec(),
    );
    let amd64 = content.tags["1"];
    content.index("multi", &[("amd64", None, amd64)]);
    let server = Server::honest(content).await;
    let bench = Bench::new();
    let error = bench.pull(options(), &server.reference("old")).await.unwrap_err();
    assert!(matches!(error, PullError::Schema1 { .. }));
    assert!(error.hint().unwrap().contains("skopeo copy"));
    let riscv = Platform::parse("linux/riscv64").unwrap();
    let error = bench.pull_for(options(), &server.reference("multi"), riscv).await.unwrap_err();
    assert!(error.to_string().ends_with("has no image for linux/riscv64; it has linux/amd64"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_leads_to_the_image_of_the_platform() {
    let mut content = Content::default();
    let image = |content: &mut Content, name: &str, architecture| {
        content.image(name, architecture, &[(Packing::Zstd, &[("name", name.as_bytes())])])
    };
    let v6 = image(&mut content, "armv6", "arm");
    let v7 = image(&mut content, "armv7", "arm");
    let amd64 = image(&mut content, "amd64", "amd64");
    let index =
        content.index("multi", &[("arm", Some("v6"), v6), ("arm", Some("v7"), v7), ("amd64", None, amd64)]);
    let server = Server::honest(content).await;
    let bench = Bench::new();
    for (platform, name, digest) in
        [("linux/arm/v7", "armv7", v7), ("linux/arm/v6", "armv6", v6), ("linux/amd64/v3", "amd64", amd64)]
    {
        let platform = Platform::parse(platform).unwrap();
        let by_digest = format!("{}/keel/x@{index}", server.address);
        let image = bench.pull_for(options(), &by_digest, platform).await.unwrap();
        assert_eq!(image.manifest_digest, digest);
        assert_eq!(bench.file(&image, "name"), name.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_pull_stops_and_leaves_nothing_half_made() {
    let (content, big) = two_layers();
    let size = content.blobs[&big].len() as u64;
    let half = content.blobs[&big][..BIG / 2].to_vec();
    let server = Server::start(content, move |r| {
        (r.is_blob(&big) && r.before == 0).then(|| Reply::new(200).body(Body::Stall(size, half.clone())))
    })
    .await;
    let bench = Bench::new();
    let client = Client::new(ClientOptions {
        timeouts: crate::Timeouts { no_progress: Duration::from_secs(60), ..Default::default() },
        ..options()
    });
    let platform = Platform::parse("linux/amd64").unwrap();
    let reference = server.reference("1");
    {
        let pull = client.pull(&bench.store, &reference, platform.clone(), silent());
        tokio::pin!(pull);
        let stuck =
            eventually("half of the layer is there", || bench.store.partial_len(&big) > BIG as u64 / 4);
        tokio::select! {
            // Both futures are dropped when one of them ends.
            result = &mut pull => panic!("the pull ended: {result:?}"),
            () = stuck => {}
        }
    }
    let half_made = || bench.leftovers().iter().any(|name| name.starts_with("layers/"));
    eventually("the unpacking thread cleans up", || !half_made()).await;
    let small = bench.path().join("layers").read_dir().unwrap().count();
    assert_eq!(small, 1, "the complete layer is kept");
    assert!(bench.store.images().unwrap().is_empty());
    // The other end sees the connection close, and the next pull goes on where this one stopped.
    let image = client.pull(&bench.store, &reference, platform, silent()).await.unwrap();
    assert_eq!(bench.file(&image, "big"), noise(BIG, 1));
}

/// The bytes of the first half as they are, and two ways in which what is kept of them can be wrong.
#[tokio::test(flavor = "multi_thread")]
async fn kept_bytes_that_are_wrong_cost_one_more_transfer_and_no_pull() {
    for (name, wrong_bytes, transfers) in [("right", false, 1), ("wrong bytes", true, 2)] {
        let (content, big) = two_layers();
        let whole = content.blobs[&big].clone();
        let server = Server::honest(content).await;
        let bench = Bench::new();
        let mut kept = whole[..BIG / 2].to_vec();
        let mut writer = bench.store.begin_blob(&big, whole.len() as u64).unwrap();
        writer.write(&kept).unwrap();
        writer.abort(keel_store::Partial::Keep).unwrap();
        if wrong_bytes {
            // Where nobody hashes them again: unpacking reads them.
            kept[BIG / 4] ^= 1;
            std::fs::write(bench.path().join("partial").join(big.hex()).join("data"), &kept).unwrap();
        }
        let image = bench.pull(options(), &server.reference("1")).await.unwrap();
        assert_eq!(bench.file(&image, "big"), noise(BIG, 1), "{name}");
        assert_eq!(server.seen_of(&big.to_string()).len(), transfers, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_share_the_layers_on_their_way() {
    let (mut content, big) = two_layers();
    let body = content.manifests[&content.tags["1"]].clone();
    content.manifest("same", &body.0, body.1);
    let server = Server::honest(content).await;
    let bench = Bench::new();
    let client = Client::new(options());
    let platform = Platform::parse("linux/amd64").unwrap();
    let (one, two) = (server.reference("1"), server.reference("same"));
    let (one, two) = tokio::join!(
        client.pull(&bench.store, &one, platform.clone(), silent()),
        client.pull(&bench.store, &two, platform, silent()),
    );
    one.unwrap();
    two.unwrap();
    assert_eq!(server.seen_of(&big.to_string()).len(), 1);
    assert_eq!(bench.store.images().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_before_and_while_it_fills() {
    let mount = Tmpfs::mount("6m");
    let store = Arc::new(keel_store::Store::open(mount.path()).unwrap());
    let mut content = Content::default();
    // Too large for the disk as it is, and small but large when unpacked.
    content.image("large", "amd64", &[(Packing::Plain, &[("big", &noise(8 << 20, 1))])]);
    content.image("swells", "amd64", &[(Packing::Zstd, &[("zeros", &vec![1; 64 << 20])])]);
    let server = Server::honest(content).await;
    let client = Client::new(options());
    let platform = Platform::parse("linux/amd64").unwrap();
    for (tag, layers_asked) in [("large", 0), ("swells", 1)] {
        let reference = server.reference(tag);
        let before = server.seen_of("/blobs/").len();
        let pull = client.pull(&store, &reference, platform.clone(), silent());
        let error = pull.await.unwrap_err();
        assert!(matches!(error, PullError::DiskFull { .. }), "{error:?}");
        assert!(error.hint().unwrap().contains("keel image rm"));
        assert_eq!(server.seen_of("/blobs/").len() - before, 1 + layers_asked, "{tag}");
    }
    // The failed attempts have given the space back.
    eventually("space is free again", || store.space().unwrap().free_bytes > 5 << 20).await;
    drop((client, store));
}

/// A small file system of its own.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "keel-test"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Self(dir)
    }

    fn path(&self) -> &std::path::Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazy: a thread of a failed pull may still close its files.
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn pulls_and_pushes_can_be_spawned() {
    fn sendable<T: Send>(_: &T) {}
    let bench = Bench::new();
    let client = Client::new(options());
    let pull = client.pull(&bench.store, "x", Platform::host(), silent());
    sendable(&pull);
    let push = client.push(&bench.store, "x", "y", &[], silent());
    sendable(&push);
}

// --- logins ---

fn challenge(host: &str, error: &str) -> Reply {
    let value =
        format!(r#"Bearer realm="http://{host}/token",service="keel",scope="repository:keel/x:pull"{error}"#);
    Reply::new(401).with("WWW-Authenticate", value)
}

/// Options with a `config.json` that holds one entry for the server.
fn with_login(dir: &std::path::Path, host: &str, entry: serde_json::Value) -> ClientOptions {
    let path = dir.join("config.json");
    std::fs::write(&path, json!({"auths": {host: entry}}).to_string()).unwrap();
    ClientOptions { auth_files: vec![path], ..options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_logins_go_to_their_registry_and_nowhere_else() {
    let (content, big) = two_layers();
    let storage = Server::honest(content.clone()).await;
    let elsewhere = storage.address;
    let server = Server::start(content, move |r| {
        if !r.has_basic("keel:secret") {
            return Some(Reply::new(401).with("WWW-Authenticate", "Basic realm=\"x\""));
        }
        let moved = format!("http://u:p@{elsewhere}{}", r.target);
        r.is_blob(&big).then(|| Reply::new(307).with("Location", moved))
    })
    .await;
    let bench = Bench::new();
    let host = server.address.to_string();
    let login = json!({"username": "keel", "password": "secret"});
    let image = bench.pull(with_login(bench.path(), &host, login), &server.reference("1")).await.unwrap();
    assert_eq!(bench.file(&image, "big"), noise(BIG, 1));
    assert!(!storage.seen().is_empty());
    assert!(storage.seen().iter().all(|r| r.header("authorization").is_none()));
    assert!(server.seen()[0].header("authorization").is_none(), "the first request is anonymous");

    let error = bench.pull(options(), &server.reference("1")).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { had_credentials: false, .. }), "{error}");
    assert!(error.hint().unwrap().contains(&format!("docker login {host}")));
    let wrong = json!({"username": "keel", "password": "wrong"});
    let error = bench.pull(with_login(bench.path(), &host, wrong), &server.reference("1")).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { had_credentials: true, .. }), "{error}");
    assert!(!format!("{error:?}").contains("wrong\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_after_a_redirect_gets_no_login() {
    let (content, big) = two_layers();
    let thief = Server::start(Content::default(), |_| {
        Some(Reply::new(401).with("WWW-Authenticate", "Basic realm=\"give\""))
    })
    .await;
    let elsewhere = thief.address;
    let server = Server::start(content, move |r| {
        r.is_blob(&big).then(|| Reply::new(302).with("Location", format!("http://{elsewhere}/steal")))
    })
    .await;
    let bench = Bench::new();
    let login = json!({"username": "keel", "password": "secret"});
    let options = with_login(bench.path(), &server.address.to_string(), login);
    let error = bench.pull(options, &server.reference("1")).await.unwrap_err();
    assert!(matches!(error, PullError::Server { status: 401, .. }), "{error}");
    assert!(thief.seen().iter().all(|r| r.header("authorization").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn circles_of_redirects_end() {
    let (result, _server, _bench) = pull_big(|r, _| Some(Reply::new(302).with("Location", &r.target))).await;
    assert!(matches!(result, Err(PullError::Redirect { .. })), "{result:?}");
}

/// A registry with tokens: `token-<n>` for the n-th request to the token service, each good for `uses` requests.
async fn token_registry(
    content: Content,
    uses: usize,
    accepts: impl Fn(&Request) -> bool + Send + Sync + 'static,
) -> Server {
    let used = AtomicUsize::new(0);
    let issued = AtomicUsize::new(0);
    Server::start(content.clone(), move |r| {
        if r.target.starts_with("/token") {
            if !accepts(r) {
                return Some(Reply::new(401).text(r#"{"details":"incorrect username or password"}"#));
            }
            used.store(0, Ordering::SeqCst);
            let n = issued.fetch_add(1, Ordering::SeqCst) + 1;
            return Some(Reply::new(200).text(json!({"token": format!("token-{n}")}).to_string()));
        }
        let current = format!("Bearer token-{}", issued.load(Ordering::SeqCst));
        let known = r.header("authorization") == Some(&current);
        if known && used.fetch_add(1, Ordering::SeqCst) < uses {
            return Some(honest(&content, r));
        }
        Some(challenge(r.header("host").unwrap_or(""), ",error=\"invalid_token\""))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_fetched_with_the_login_used_and_renewed() {
    let (content, _) = two_layers();
    let server = token_registry(content, 2, |r| r.method == "GET" && r.has_basic("keel:secret")).await;
    let bench = Bench::new();
    let login = json!({"username": "keel", "password": "secret"});
    let mut options = with_login(bench.path(), &server.address.to_string(), login);
    options.parallel_layers = 1;
    bench.pull(options.clone(), &server.reference("1")).await.unwrap();
    let asked = server.seen_of("/token");
    assert_eq!(asked.len(), 2, "four requests, two per token");
    assert!(asked[0].target.contains("service=keel"), "{}", asked[0].target);
    assert!(asked[0].target.contains("scope=repository%3Akeel%2Fx%3Apull"), "{}", asked[0].target);
    let elsewhere = server.seen().into_iter().filter(|r| !r.target.starts_with("/token"));
    assert!(elsewhere.into_iter().all(|r| !r.has_basic("keel:secret")));

    let wrong = json!({"username": "keel", "password": "wrong"});
    let options = with_login(bench.path(), &server.address.to_string(), wrong);
    let error = bench.pull(options, &server.reference("1")).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { had_credentials: true, .. }), "{error}");
    assert!(error.to_string().contains("incorrect username"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_tokens_and_inline_logins_work() {
    let (content, _) = two_layers();
    let server = token_registry(content.clone(), 99, |r| r.header("authorization").is_none()).await;
    Bench::new().pull(options(), &server.reference("1")).await.unwrap();

    let server = token_registry(content, 99, |r| r.has_basic("pod:pw")).await;
    let bench = Bench::new();
    let inline = crate::InlineAuth {
        name: "secret default/regcred".into(),
        config_json: json!({"auths": {server.address.to_string(): {"username": "pod", "password": "pw"}}})
            .to_string()
            .into_bytes(),
    };
    let with = PullOptions { auth: vec![inline], ..PullOptions::default() };
    let client = Client::new(options());
    client.pull_with(&bench.store, &server.reference("1"), with, silent()).await.unwrap();
    let reference = server.reference("1");
    let without = client.pull_with(&bench.store, &reference, PullOptions::default(), silent());
    let error = without.await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { .. }), "another workload's token was used: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_login_that_comes_with_a_pull_is_tried_before_the_hosts() {
    let (content, _) = two_layers();
    let server = Server::start(content, |r| {
        (!r.has_basic("third:right")).then(|| Reply::new(401).with("WWW-Authenticate", "Basic realm=\"x\""))
    })
    .await;
    let host = server.address.to_string();
    let login = |name: &str, password: &str| InlineAuth {
        name: format!("Secret default/{name}"),
        config_json: json!({"auths": {&host: {"username": name, "password": password}}})
            .to_string()
            .into_bytes(),
    };
    let bench = Bench::new();
    let pull = async |auth: Vec<InlineAuth>| {
        let platform = Platform::parse("linux/amd64").unwrap();
        let options = PullOptions { auth, platform, ..PullOptions::default() };
        Client::new(super::options()).pull_with(&bench.store, &server.reference("1"), options, silent()).await
    };
    let wrong = pull(vec![login("first", "x"), login("second", "y")]).await.unwrap_err();
    assert!(matches!(wrong, PullError::Unauthorized { had_credentials: true, .. }), "{wrong}");
    pull(vec![login("first", "x"), login("second", "y"), login("third", "right")]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_tokens_are_exchanged_by_post() {
    let (content, _) = two_layers();
    let server = token_registry(content, 99, |r| {
        r.method == "POST"
            && r.header("authorization").is_none()
            && r.body.contains("grant_type=refresh_token")
            && r.body.contains("refresh_token=id%2Btoken")
            && r.body.contains("scope=repository%3Akeel%2Fx%3Apull")
    })
    .await;
    let bench = Bench::new();
    let options = with_login(bench.path(), &server.address.to_string(), json!({"identitytoken": "id+token"}));
    bench.pull(options, &server.reference("1")).await.unwrap();
    assert!(server.seen_of("/token").iter().all(|r| !r.target.contains("id%2Btoken")));
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_go_by_post_where_get_is_refused() {
    for refusal in [400, 401, 404, 405, 501] {
        let (content, _) = two_layers();
        let inner = content.clone();
        let server = Server::start(content, move |r| {
            if r.header("authorization") == Some("Bearer posted") {
                return Some(honest(&inner, r));
            }
            if !r.target.starts_with("/token") {
                return Some(challenge(r.header("host").unwrap_or(""), ""));
            }
            if r.method == "GET" {
                return Some(Reply::new(refusal).text(r#"{"details":"no GET"}"#));
            }
            let right = r.header("authorization").is_none()
                && r.body.contains("grant_type=password&username=keel&password=se%2Bcret")
                && r.body.contains("service=keel")
                && r.body.contains("scope=repository%3Akeel%2Fx%3Apull");
            Some(match right {
                true => Reply::new(200).text(r#"{"access_token":"posted"}"#),
                false => Reply::new(401).text(r#"{"details":"wrong password"}"#),
            })
        })
        .await;
        let bench = Bench::new();
        let pull = async |password: &str| {
            let login = json!({"username": "keel", "password": password});
            let options = with_login(bench.path(), &server.address.to_string(), login);
            bench.pull(options, &server.reference("1")).await
        };
        let error = pull("wrong").await.unwrap_err();
        assert!(matches!(error, PullError::Unauthorized { had_credentials: true, .. }), "{refusal}: {error}");
        let said = if refusal > 401 { "wrong password" } else { "no GET" };
        assert!(error.to_string().contains(said), "{refusal}: {error}");
        pull("se+cret").await.unwrap();
        assert_eq!(server.seen_of("/token").iter().filter(|r| r.target.contains("cret")).count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_realm_in_the_clear_elsewhere_gets_no_login() {
    let (content, _) = two_layers();
    let server = Server::start(content, |_| {
        Some(Reply::new(401).with("WWW-Authenticate", r#"Bearer realm="http://tokens.invalid/token""#))
    })
    .await;
    let error = Bench::new().pull(options(), &server.reference("1")).await.unwrap_err();
    assert!(error.to_string().contains("https only"), "{error}");
}
