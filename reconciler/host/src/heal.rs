//! Damaged images: put right from what is here, else from their registry, else set aside with the reason.

use std::collections::BTreeSet;
use std::sync::Arc;

use keel_registry::{Client, Platform, PullOptions};
use keel_store::{Depth, Digest, LostImage, Report, Store};

use crate::error::{HostError, chain};
use crate::images::{DEMO_IMAGE, make_demo_image};

/// What a verification found and did.
#[derive(Debug, Default)]
pub struct Verified {
    pub report: Report,
    /// References that were pulled again and are what they were.
    pub pulled: Vec<String>,
    /// Images that are set aside (with repair) or should be.
    pub lost: Vec<Lost>,
}

#[derive(Debug)]
pub struct Lost {
    pub image: LostImage,
    /// Why pulling it again did not help, where that was tried.
    pub pull: Option<String>,
}

impl Lost {
    /// What is wrong with it, in one line.
    pub fn message(&self) -> String {
        match &self.pull {
            Some(error) => format!("{}; pulling it again: {error}", self.image.problem),
            None => self.image.problem.clone(),
        }
    }
}

/// Checks what is in the store. With `repair`, damage is healed: from kept blobs, then by pulling the very same manifest
/// again. What runs goes on meanwhile.
pub async fn verify_images(
    store: &Arc<Store>,
    registry: &Client,
    depth: Depth,
    repair: bool,
) -> Result<Verified, HostError> {
    let worker = store.clone();
    let report = tokio::task::spawn_blocking(move || worker.verify(depth, repair))
        .await
        .map_err(|error| HostError::Store(Box::new(error)))?
        .map_err(|error| HostError::Store(Box::new(error)))?;
    let mut verified = Verified { report, ..Verified::default() };
    for lost in std::mem::take(&mut verified.report.lost_images) {
        if !repair {
            verified.lost.push(Lost { image: lost, pull: None });
            continue;
        }
        match pull_again(store, registry, &lost).await {
            Ok(()) => verified.pulled.push(lost.reference),
            Err(error) => verified.lost.push(Lost { image: lost, pull: Some(chain(&*error)) }),
        }
    }
    if repair {
        for incomplete in incomplete_indexes(store, &verified.report)? {
            match pull_again(store, registry, &incomplete).await {
                Ok(()) => verified.pulled.push(incomplete.reference),
                Err(error) => verified.lost.push(Lost { image: incomplete, pull: Some(chain(&*error)) }),
            }
        }
    }
    Ok(verified)
}

/// Images that run, but whose index lost something for another platform.
fn incomplete_indexes(store: &Store, report: &Report) -> Result<Vec<LostImage>, HostError> {
    let images = store.images().map_err(|error| HostError::Store(Box::new(error)))?;
    let removed: BTreeSet<Digest> = report.damage.iter().map(|damage| damage.digest).collect();
    let incomplete = images.into_iter().filter_map(|image| {
        let index = image.index.as_ref()?;
        let gone = index.digests().find(|digest| removed.contains(digest) && !store.has_blob(digest))?;
        Some(LostImage {
            manifest: image.manifest_digest,
            index: Some(index.digest),
            pinned: image.pinned,
            problem: format!("{gone} of its index is damaged or gone"),
            reference: image.reference,
        })
    });
    Ok(incomplete.collect())
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// By digest: what a tag means now may be another image, and nobody asked for that one.
async fn pull_again(store: &Arc<Store>, registry: &Client, lost: &LostImage) -> Result<(), Failed> {
    if lost.reference == DEMO_IMAGE {
        let store = store.clone();
        return Ok(tokio::task::spawn_blocking(move || make_demo_image(&store)).await??);
    }
    let exact = format!("{}@{}", repository(&lost.reference), lost.index.unwrap_or(lost.manifest));
    let known = store.image(&exact)?.is_some();
    let options = PullOptions {
        platform: Platform::host(),
        pinned: lost.pinned,
        all_platforms: lost.index.is_some(),
        ..PullOptions::default()
    };
    let image = registry.pull_with(store, &exact, options, Arc::new(|_| {})).await?;
    if image.reference != lost.reference {
        store.tag_image(&image.reference, &lost.reference)?;
        if !known {
            store.remove_image(&image.reference)?;
        }
    }
    Ok(())
}

/// A canonical reference without tag and digest.
fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or(reference);
    match name.rsplit_once(':') {
        // A colon before a slash belongs to a port.
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::repository;

    #[test]
    fn the_repository_is_what_is_left_without_tag_and_digest() {
        for (reference, expected) in [
            ("docker.io/library/busybox:1.36", "docker.io/library/busybox"),
            ("localhost:5000/a/b:x", "localhost:5000/a/b"),
            ("localhost:5000/a/b@sha256:00", "localhost:5000/a/b"),
            ("host/a:x@sha256:00", "host/a"),
        ] {
            assert_eq!(repository(reference), expected);
        }
    }
}
