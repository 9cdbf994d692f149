//! Mirrors: who is asked, in what order, and what becomes of one that fails.

use std::path::PathBuf;

use serde_json::json;

use super::fixture::{Content, Packing, noise};
use super::server::{Body, Reply, Request, Server, honest};
use super::{Bench, options};
use crate::{ClientOptions, PullError};

const BIG: usize = 3 << 20;

/// Three plain layers, so that a mirror has several chances.
fn content() -> Content {
    let mut content = Content::default();
    let parts: Vec<Vec<u8>> = (0..3).map(|seed| noise(BIG, seed)).collect();
    content.image(
        "1",
        "amd64",
        &[
            (Packing::Plain, &[("a", &parts[0])]),
            (Packing::Plain, &[("b", &parts[1])]),
            (Packing::Plain, &[("c", &parts[2])]),
        ],
    );
    content
}

/// A `hosts.toml` for the origin that names these hosts.
fn with_hosts(bench: &Bench, origin: &str, hosts: &[&Server]) -> ClientOptions {
    let dir = bench.path().join("hosts");
    std::fs::create_dir_all(dir.join(origin)).unwrap();
    let text: String = hosts.iter().map(|h| format!("[host.\"http://{}\"]\n", h.address)).collect();
    std::fs::write(dir.join(origin).join("hosts.toml"), text).unwrap();
    ClientOptions { hosts_dirs: vec![dir], parallel_layers: 1, ..options() }
}

fn blob_requests(server: &Server) -> usize {
    server.seen_of("/blobs/").len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_has_everything_is_all_that_is_asked() {
    let origin = Server::honest(Content::default()).await;
    let mirror = Server::honest(content()).await;
    let bench = Bench::new();
    let options = with_hosts(&bench, &origin.address.to_string(), &[&mirror]);
    let image = bench.pull(options, &origin.reference("1")).await.unwrap();
    assert_eq!(bench.file(&image, "b"), noise(BIG, 1));
    assert_eq!(origin.seen().len(), 0);
    let ns = format!("?ns={}", origin.address).replace(':', "%3A");
    assert!(mirror.seen().iter().all(|r| r.target.ends_with(&ns)), "{:?}", mirror.seen()[0].target);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_without_the_image_is_no_obstacle_and_is_asked_again() {
    let origin = Server::honest(content()).await;
    let mirror = Server::honest(Content::default()).await;
    let bench = Bench::new();
    let options = with_hosts(&bench, &origin.address.to_string(), &[&mirror]);
    bench.pull(options, &origin.reference("1")).await.unwrap();
    assert_eq!(blob_requests(&mirror), 4, "config and three layers");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_mirror_is_remembered() {
    let origin = Server::honest(content()).await;
    let broken = Server::start(content(), |_| Some(Reply::new(503))).await;
    let bench = Bench::new();
    let mut options = with_hosts(&bench, &origin.address.to_string(), &[&broken]);
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let file = bench.path().join("hosts").join(origin.address.to_string()).join("hosts.toml");
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("[host.\"http://{closed}\"]\n{before}")).unwrap();
    options.timeouts.connect = std::time::Duration::from_secs(1);
    bench.pull(options, &origin.reference("1")).await.unwrap();
    assert_eq!(broken.seen().len(), 1, "one failure is enough");
    assert_eq!(blob_requests(&origin), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_body_of_a_mirror_is_completed_elsewhere_from_where_it_ended() {
    let served = content();
    let short = move |request: &Request| {
        let Body::Whole(bytes) = honest(&served, request).body else { unreachable!() };
        let cut = bytes.len() / 2;
        (bytes.len() == BIG + 1536 || bytes.len() > BIG).then(|| {
            // The length is announced as what it is, and as a lie: both happen.
            let body = if request.before.is_multiple_of(2) {
                Body::Announced(bytes.len() as u64, bytes[..cut].to_vec())
            } else {
                Body::Whole(bytes[..cut].to_vec())
            };
            Reply::new(200).body(body)
        })
    };
    let origin = Server::honest(content()).await;
    let mirror = Server::start(content(), short).await;
    let bench = Bench::new();
    let options = with_hosts(&bench, &origin.address.to_string(), &[&mirror]);
    let image = bench.pull(options, &origin.reference("1")).await.unwrap();
    for (name, seed) in [("a", 0), ("b", 1), ("c", 2)] {
        assert_eq!(bench.file(&image, name), noise(BIG, seed));
    }
    let layers = |server: &Server| -> Vec<Option<String>> {
        let blobs = server.seen_of("/blobs/");
        blobs.iter().map(|r| r.header("range").map(str::to_owned)).collect()
    };
    assert_eq!(layers(&mirror), [None, None], "the config, and one layer before it is known as broken");
    let from_origin = layers(&origin);
    assert_eq!(from_origin.len(), 3, "{from_origin:?}");
    assert!(from_origin[0].as_ref().is_some_and(|r| r.starts_with("bytes=")), "{from_origin:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_every_mirror_still_leave_the_registry_itself() {
    let wrong = |request: &Request| {
        let Body::Whole(mut bytes) = honest(&content(), request).body else { unreachable!() };
        (bytes.len() > BIG).then(|| {
            bytes[1000] ^= 1;
            Reply::new(200).body(Body::Whole(bytes))
        })
    };
    let origin = Server::honest(content()).await;
    let mirrors = [Server::start(content(), wrong).await, Server::start(content(), wrong).await];
    let bench = Bench::new();
    let options = with_hosts(&bench, &origin.address.to_string(), &[&mirrors[0], &mirrors[1]]);
    let image = bench.pull(options, &origin.reference("1")).await.unwrap();
    assert_eq!(bench.file(&image, "a"), noise(BIG, 0));
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_registry_itself_a_mirror_that_hiccups_is_asked_again() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mirror = Server::start(content(), |r| {
        (r.target.contains("/blobs/") && r.before == 0).then(|| Reply::new(500))
    })
    .await;
    let bench = Bench::new();
    let options = with_hosts(&bench, &closed.to_string(), &[&mirror]);
    bench.pull(options, &format!("{closed}/keel/x:1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_fail_each_is_named() {
    let origin = Server::honest(Content::default()).await;
    let mirror = Server::start(content(), |_| Some(Reply::new(500))).await;
    let bench = Bench::new();
    let options = with_hosts(&bench, &origin.address.to_string(), &[&mirror]);
    let error = bench.pull(options, &origin.reference("1")).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("is not in the registry"), "{text}");
    assert!(text.contains(&format!("{}: ", mirror.address)) && text.contains("500"), "{text}");
    assert!(error.is_retryable(), "the mirror may get well");
    assert_eq!(mirror.seen().len(), 1, "the registry's own no is final");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_gets_its_own_login_and_headers_and_nobody_elses() {
    let guarded = |login: &'static str| {
        move |r: &Request| {
            (!r.has_basic(login)).then(|| Reply::new(401).with("WWW-Authenticate", "Basic realm=\"x\""))
        }
    };
    let origin = Server::start(content(), guarded("origin:secret")).await;
    let mirror = Server::start(Content::default(), guarded("mirror:other")).await;
    let bench = Bench::new();
    let mut options = with_hosts(&bench, &origin.address.to_string(), &[&mirror]);
    let file = bench.path().join("hosts").join(origin.address.to_string()).join("hosts.toml");
    let mut text = std::fs::read_to_string(&file).unwrap();
    text.push_str(&format!("[host.\"http://{}\".header]\nx-site = \"7\"\n", mirror.address));
    std::fs::write(&file, text).unwrap();
    let auth = json!({"auths": {
        origin.address.to_string(): {"username": "origin", "password": "secret"},
        mirror.address.to_string(): {"username": "mirror", "password": "other"},
    }});
    let path: PathBuf = bench.path().join("auth.json");
    std::fs::write(&path, auth.to_string()).unwrap();
    options.auth_files = vec![path];
    bench.pull(options, &origin.reference("1")).await.unwrap();
    let own = |r: &Request| r.header("authorization").is_none() || r.has_basic("mirror:other");
    assert!(mirror.seen().iter().all(own));
    assert!(mirror.seen().iter().any(|r| r.has_basic("mirror:other")));
    assert!(mirror.seen().iter().all(|r| r.header("x-site") == Some("7")));
    assert!(origin.seen().iter().all(|r| r.header("x-site").is_none() && !r.has_basic("mirror:other")));
}

#[tokio::test(flavor = "multi_thread")]
async fn podmans_file_moves_and_blocks() {
    let origin = Server::honest(Content::default()).await;
    let elsewhere = Server::honest(content()).await;
    let bench = Bench::new();
    let conf = bench.path().join("registries.conf");
    std::fs::write(
        &conf,
        format!(
            "[[registry]]\nprefix = \"{0}\"\nlocation = \"{1}/moved\"\n\
             [[registry]]\nprefix = \"{0}/no\"\nblocked = true\n",
            origin.address, elsewhere.address
        ),
    )
    .unwrap();
    let options = ClientOptions { registries_conf: vec![conf], ..options() };
    bench.pull(options.clone(), &origin.reference("1")).await.unwrap();
    assert_eq!(origin.seen().len(), 0);
    assert!(elsewhere.seen().iter().all(|r| r.target.starts_with("/v2/moved/keel/x/")));
    let blocked = bench.pull(options, &format!("{}/no/x:1", origin.address)).await.unwrap_err();
    assert!(matches!(blocked, PullError::Blocked { .. }), "{blocked}");
}
