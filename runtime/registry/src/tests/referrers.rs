//! What refers to an image, with the registry's list and with the clients' own.

use std::sync::Mutex;

use serde_json::json;

use super::fixture::{Content, Packing};
use super::real::{Registry, lab_is_here};
use super::server::{Body, Reply, Server};
use super::{Bench, options, silent};
use crate::manifest::{OCI_INDEX, OCI_MANIFEST};
use crate::{Client, PullError};
use keel_store::Digest;

/// An image under `1`, and one that has it as its subject under `about`.
fn content() -> (Content, Digest, Digest) {
    let mut content = Content::default();
    let subject = content.image("1", "amd64", &[(Packing::Gzip, &[("a", b"x")])]);
    let about = content.image("about", "amd64", &[(Packing::Gzip, &[("sig", b"y")])]);
    let (_, body) = &content.manifests[&about];
    let mut manifest: serde_json::Value = serde_json::from_slice(body).unwrap();
    let size = content.manifests[&subject].1.len();
    manifest["subject"] = json!({"mediaType": OCI_MANIFEST, "digest": subject, "size": size});
    manifest["artifactType"] = json!("application/vnd.example.signature+json");
    manifest["annotations"] = json!({"who": "me"});
    let about = content.manifest("about", OCI_MANIFEST, manifest.to_string().into_bytes());
    (content, subject, about)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_lists_gets_them_under_the_tag_of_the_digest() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let (content, subject, about) = content();
    let source = Server::honest(content).await;
    let bench = Bench::new();
    let registry = Registry::plain();
    let client = Client::new(options());
    let target = |tag: &str| format!("{}/keel/y:{tag}", registry.host());
    for tag in ["1", "about"] {
        bench.pull(options(), &source.reference(tag)).await.unwrap();
        client.push(&bench.store, &source.reference(tag), &target(tag), &[], silent()).await.unwrap();
    }
    // Once more: it is in the list once.
    client.push(&bench.store, &source.reference("about"), &target("about"), &[], silent()).await.unwrap();
    for reference in [target("1"), format!("{}/keel/y@{subject}", registry.host())] {
        let found = Client::new(options()).referrers(&reference, None, &[]).await.unwrap();
        assert!(found.by_tag);
        assert_eq!((found.subject, found.referrers.len()), (subject, 1));
        let only = &found.referrers[0];
        assert_eq!((only.digest, only.annotations["who"].as_str()), (about, "me"));
        assert_eq!(only.artifact_type.as_deref(), Some("application/vnd.example.signature+json"));
    }
    let other = client.referrers(&target("1"), Some("application/x"), &[]).await.unwrap();
    assert_eq!(other.referrers, []);
    assert_eq!(client.referrers(&target("about"), None, &[]).await.unwrap().referrers, []);
    let error = client.referrers(&target("absent"), None, &[]).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_another_clients_list_has_taken_out_is_put_back() {
    let (content, subject, about) = content();
    let list: Mutex<Option<String>> = Mutex::default();
    let others = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": OCI_MANIFEST, "digest": Digest::of(b"other"), "size": 1}]})
    .to_string();
    let served = content.clone();
    let server = Server::start(content, move |r| {
        let mut list = list.lock().unwrap();
        match (r.method.as_str(), r.target.contains("/manifests/sha256-")) {
            ("PUT", true) => {
                // The other client has read before and writes after.
                *list = Some(if r.before == 0 { others.clone() } else { r.body.clone() });
                Some(Reply::new(201))
            }
            ("PUT", false) => Some(Reply::new(201)),
            ("GET", true) => list.clone().map(|l| Reply::new(200).with("Content-Type", OCI_INDEX).text(l)),
            _ => Some(super::server::honest(&served, r)),
        }
    })
    .await;
    let bench = Bench::new();
    let reference = server.reference("about");
    bench.pull(options(), &reference).await.unwrap();
    let client = Client::new(options());
    client.push(&bench.store, &reference, &reference, &[], silent()).await.unwrap();
    let found = client.referrers(&server.reference("1"), None, &[]).await.unwrap();
    let digests: Vec<Digest> = found.referrers.iter().map(|r| r.digest).collect();
    assert_eq!((found.subject, digests), (subject, vec![Digest::of(b"other"), about]));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_push_at_once_lose_no_entry() {
    if !lab_is_here(&["docker-registry", "skopeo"]) {
        return;
    }
    let (mut content, subject, about) = content();
    let (_, body) = &content.manifests[&about];
    let manifest: serde_json::Value = serde_json::from_slice(body).unwrap();
    let tags: Vec<String> = (0..4).map(|n| format!("about-{n}")).collect();
    for tag in &tags {
        let mut manifest = manifest.clone();
        manifest["annotations"] = json!({"which": tag});
        content.manifest(tag, OCI_MANIFEST, manifest.to_string().into_bytes());
    }
    let source = Server::honest(content).await;
    let registry = Registry::plain();
    let target = |tag: &str| format!("{}/keel/y:{tag}", registry.host());
    let bench = Bench::new();
    for tag in tags.iter().map(String::as_str).chain(["1"]) {
        bench.pull(options(), &source.reference(tag)).await.unwrap();
    }
    let push = async |tag: &str| {
        let client = Client::new(options());
        client.push(&bench.store, &source.reference(tag), &target(tag), &[], silent()).await.unwrap();
    };
    push("1").await;
    futures_util::future::join_all(tags.iter().map(|tag| push(tag))).await;
    let found = Client::new(options()).referrers(&target("1"), None, &[]).await.unwrap();
    assert_eq!((found.subject, found.referrers.len()), (subject, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_lists_is_asked_page_by_page_and_told_nothing_twice() {
    let (content, subject, about) = content();
    let entry = |n: u8, kind: &str| json!({"mediaType": OCI_MANIFEST, "digest": Digest::of(&[n]), "size": 1, "artifactType": kind});
    let page = move |entries: Vec<serde_json::Value>| {
        let body = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        Reply::new(200).with("Content-Type", OCI_INDEX).body(Body::Whole(body.to_string().into_bytes()))
    };
    let served = content.clone();
    let server = Server::start(content, move |r| {
        if r.method == "PUT" && r.target.contains("/manifests/") {
            return Some(Reply::new(201).with("OCI-Subject", subject));
        }
        if !r.target.contains("/referrers/") {
            return (r.method == "HEAD").then(|| super::server::honest(&served, r));
        }
        Some(match r.target.contains("page=2") {
            true => page(vec![entry(3, "a/b+json")]),
            false => page(vec![entry(1, "a/b+json"), entry(2, "c/d")])
                .with("Link", format!("</v2/keel/x/referrers/{subject}?page=2>; rel=\"next\"")),
        })
    })
    .await;
    let client = Client::new(options());
    let found = client.referrers(&server.reference("1"), Some("a/b+json"), &[]).await.unwrap();
    assert!(!found.by_tag);
    let digests: Vec<Digest> = found.referrers.iter().map(|r| r.digest).collect();
    assert_eq!(digests, [Digest::of(&[1]), Digest::of(&[3])], "filtered here where the registry does not");
    assert!(server.seen_of("artifactType=a/b%2Bjson").len() == 1);

    let bench = Bench::new();
    let reference = server.reference("about");
    assert_eq!(bench.pull(options(), &reference).await.unwrap().manifest_digest, about);
    client.push(&bench.store, &reference, &reference, &[], silent()).await.unwrap();
    assert_eq!(server.seen_of("/manifests/sha256-").len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_list_of_referrers_is_refused() {
    let (content, subject, _) = content();
    let server = Server::start(content, move |r| {
        r.target.contains("/referrers/").then(|| {
            let next = format!("</v2/keel/x/referrers/{subject}?p={}>; rel=\"next\"", r.target.len());
            Reply::new(200).with("Link", next).text(r#"{"manifests":[]}"#)
        })
    })
    .await;
    let error = Client::new(options()).referrers(&server.reference("1"), None, &[]).await.unwrap_err();
    assert!(error.to_string().contains("more than 64 pages"), "{error}");
}
