//! Images of the store: what is asked, done in the one process that may write to the store. The daemon calls it for
//! its clients, a command calls it when there is no daemon.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use keel_api::{ControlError, ControlEvent, ErrorCode, EventSender, ImageRequest, SaveFormat, Status, exit};
use keel_engine::PullRate;
use keel_manifest::{Kind, Object};
use keel_plan::{ContainerStatus, PodStatus, PullStatus};
use keel_registry::{Client, OnProgress, PullError, PullOptions, PullProgress};
use keel_store::{Depth, Digest, Image, ImportOptions, Index, Roots, Store, Transfer};
use serde_json::{Value, json};

use crate::failure::chain;

/// Ends with one result. `status` says what is in use, `declared` what manifests name, when that is known.
pub(crate) async fn run(
    store: &Arc<Store>,
    registry: &Client,
    status: &Status,
    declared: Option<BTreeSet<String>>,
    request: ImageRequest,
    events: &EventSender,
) -> Result<(), ControlError> {
    if request == ImageRequest::Prune && declared.is_none() {
        return Err(ControlError::new(
            ErrorCode::Unavailable,
            "the manifests have not been read yet: what they declare is not pruned by mistake",
        ));
    }
    let message = match request {
        ImageRequest::Pull { image, all_platforms, packed } => {
            let options = PullOptions { all_platforms, packed, ..PullOptions::default() };
            pull(store, registry, &image, options, events).await?
        }
        ImageRequest::Referrers { image, artifact_type } => {
            referrers(registry, &image, artifact_type.as_deref(), events).await?
        }
        ImageRequest::Push { image, target } => {
            push(store, registry, &image, target.as_deref().unwrap_or(&image), events).await?
        }
        ImageRequest::Verify { full, repair } => verify(store, registry, full, repair, events).await?,
        request => {
            if let ImageRequest::Remove { image, force: false } = &request {
                refuse_used(&known(store, image)?, status)?;
            }
            let (store, roots, sender) = (
                Arc::clone(store),
                keel_host::image_roots(declared.unwrap_or_default(), status),
                events.clone(),
            );
            // Disk work is not for the threads that serve sockets.
            let done = tokio::task::spawn_blocking(move || blocking(&store, &roots, request, &sender));
            done.await.map_err(|_| ControlError::new(ErrorCode::Internal, "the operation was aborted"))??
        }
    };
    let result = ControlEvent::Result { exit_code: exit::DONE, message, hints: Vec::new() };
    let _ = events.send(result).await;
    Ok(())
}

async fn pull(
    store: &Arc<Store>,
    registry: &Client,
    image: &str,
    options: PullOptions,
    events: &EventSender,
) -> Result<String, ControlError> {
    let reference = keel_store::canonical_reference(image).map_err(|error| invalid(&error))?;
    let report = reporter(&reference, events);
    let pulled = registry.pull_with(store, &reference, options, report).await;
    let pulled = pulled.map_err(|error| not_had(&error))?;
    let _ = events.send(ControlEvent::Data { value: summary(&pulled) }).await;
    Ok(format!("{} {}", pulled.reference, pushed_digest(&pulled)))
}

fn not_had(error: &PullError) -> ControlError {
    let code = if error.is_not_found() { ErrorCode::NotFound } else { ErrorCode::Internal };
    error.hint().into_iter().fold(ControlError::new(code, chain(error)), ControlError::hint)
}

/// What its name means in a registry.
fn pushed_digest(image: &Image) -> Digest {
    image.index.as_ref().map_or(image.manifest_digest, |index| index.digest)
}

async fn referrers(
    registry: &Client,
    image: &str,
    artifact_type: Option<&str>,
    events: &EventSender,
) -> Result<String, ControlError> {
    let reference = keel_store::canonical_reference(image).map_err(|error| invalid(&error))?;
    let found = registry.referrers(&reference, artifact_type, &[]).await;
    let found = found.map_err(|error| not_had(&error))?;
    let _ = events.send(ControlEvent::Data { value: json!(found) }).await;
    Ok(String::new())
}

async fn push(
    store: &Arc<Store>,
    registry: &Client,
    image: &str,
    target: &str,
    events: &EventSender,
) -> Result<String, ControlError> {
    let source = known(store, image)?.reference;
    let target = keel_store::canonical_reference(target).map_err(|error| invalid(&error))?;
    let report = reporter(&target, events);
    let digest = registry.push(store, &source, &target, &[], report).await.map_err(|error| {
        let refused = ControlError::new(ErrorCode::Internal, chain(&error));
        error.hint().into_iter().fold(refused, ControlError::hint)
    })?;
    let value = json!({ "reference": target, "digest": digest });
    let _ = events.send(ControlEvent::Data { value }).await;
    Ok(format!("{target} {digest}"))
}

fn reporter(reference: &str, events: &EventSender) -> OnProgress {
    let (sender, shown, begin) = (events.clone(), reference.to_owned(), Instant::now());
    let rate = Mutex::new(PullRate::new(0));
    Arc::new(move |progress: PullProgress| {
        let now_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
        rate.take(keel_host::pull_status(&shown, progress), now_ms);
        // Progress that finds no room is superseded by the next one.
        let _ = sender.try_send(ControlEvent::Progress(rate.status().clone()));
    })
}

async fn verify(
    store: &Arc<Store>,
    registry: &Client,
    full: bool,
    repair: bool,
    events: &EventSender,
) -> Result<String, ControlError> {
    let depth = if full { Depth::Full } else { Depth::Quick };
    let verified = keel_host::verify_images(store, registry, depth, repair).await;
    let verified = verified.map_err(crate::instance::refused)?;
    let damage: Vec<Value> = verified
        .report
        .damage
        .iter()
        .map(|damage| {
            json!({
                "digest": damage.digest.to_string(),
                "problem": damage.problem,
                "images": damage.images,
                "repaired": damage.repaired,
            })
        })
        .collect();
    let lost: Vec<Value> = verified
        .lost
        .iter()
        .map(|lost| json!({ "reference": lost.image.reference, "problem": lost.message() }))
        .collect();
    // A damaged blob that is gone harms nobody: what it was for is there, or the image is lost.
    let whole = lost.is_empty() && (repair || damage.is_empty());
    let value = json!({
        "layers": verified.report.layers,
        "blobs": verified.report.blobs,
        "whole": whole,
        "damage": damage,
        "pulled": verified.pulled,
        "lost": lost,
    });
    let _ = events.send(ControlEvent::Data { value }).await;
    Ok(String::new())
}

fn blocking(
    store: &Store,
    roots: &Roots,
    request: ImageRequest,
    events: &EventSender,
) -> Result<String, ControlError> {
    match request {
        ImageRequest::Pull { .. }
        | ImageRequest::Push { .. }
        | ImageRequest::Referrers { .. }
        | ImageRequest::Verify { .. } => {
            Err(ControlError::new(ErrorCode::Internal, "what asks registries is not a blocking operation"))
        }
        ImageRequest::List => {
            let images = store.images().map_err(|error| failed(&error))?;
            data(events, images.iter().map(summary).collect());
            Ok(String::new())
        }
        ImageRequest::Inspect { image } => {
            data(events, detail(&known(store, &image)?));
            Ok(String::new())
        }
        ImageRequest::Remove { image, .. } => {
            let reference = known(store, &image)?.reference;
            store.remove_image(&reference).map_err(|error| failed(&error))?;
            Ok(format!("removed {reference}; its layers go with: keel image prune"))
        }
        ImageRequest::Tag { image, reference } => {
            let from = known(store, &image)?.reference;
            let tagged = store.tag_image(&from, &reference).map_err(|error| failed(&error))?;
            Ok(tagged
                .map(|image| format!("{} {}", image.reference, image.manifest_digest))
                .unwrap_or_default())
        }
        ImageRequest::Usage => {
            let usage = store.usage().map_err(|error| failed(&error))?;
            data(
                events,
                json!({
                    "images": usage.images.iter().map(|image| json!({
                        "reference": image.reference,
                        "uniqueBytes": image.unique_bytes,
                        "sharedBytes": image.shared_bytes,
                        "otherPlatformsBytes": image.index_bytes,
                    })).collect::<Vec<_>>(),
                    "layersBytes": usage.layers_bytes,
                    "blobsBytes": usage.blobs_bytes,
                    "partialBytes": usage.partial_bytes,
                }),
            );
            Ok(String::new())
        }
        ImageRequest::Save { images, path, format } => {
            for image in &images {
                known(store, image)?;
            }
            let fail = |error: &dyn std::fmt::Display| {
                ControlError::new(ErrorCode::Internal, format!("write {}: {error}", path.display()))
            };
            save(store, &images, &path, format, &transfers(events), &fail)?;
            data(events, json!({ "path": path, "images": images }));
            Ok(format!("saved {} to {}", crate::text::count(images.len(), "image"), path.display()))
        }
        ImageRequest::Prune => {
            let gone = store.collect_garbage(roots).map_err(|error| failed(&error))?;
            for image in &gone.images {
                note(events, format!("removed {image}"));
            }
            let freed = crate::text::size(gone.freed_bytes);
            let counts = [(gone.images.len() as u64, "image"), (gone.layers, "layer"), (gone.blobs, "blob")];
            let counts = counts.map(|(n, noun)| crate::text::count(n as usize, noun)).join(", ");
            Ok(format!("{counts} removed; {freed} freed"))
        }
        ImageRequest::Import { path, name } => {
            let images = store.import(&path, &ImportOptions::default(), &transfers(events)).map_err(|error| {
                ControlError::new(ErrorCode::Invalid, format!("import {name}: {}", chain(&error))).hint(
                    "an archive is made by: skopeo copy SOURCE oci-archive:FILE:NAME, docker save or podman save",
                )
            })?;
            for image in &images {
                note(events, format!("imported {} {}", image.reference, pushed_digest(image)));
            }
            data(events, images.iter().map(summary).collect());
            Ok(crate::text::count(images.len(), "image"))
        }
    }
}

/// Tells how far an import or a save is, not too often.
fn transfers(events: &EventSender) -> impl Fn(Transfer) + Sync {
    let told = Mutex::new((Instant::now(), u32::MAX));
    move |transfer: Transfer| {
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.1 == transfer.layers_done && told.0.elapsed() < TRANSFER_INTERVAL {
            return;
        }
        *told = (Instant::now(), transfer.layers_done);
        // Progress that finds no room is superseded by the next one.
        let _ = events.try_send(ControlEvent::Progress(PullStatus {
            image: transfer.reference,
            done_bytes: transfer.done_bytes,
            total_bytes: transfer.total_bytes,
            layers_done: transfer.layers_done,
            layers_total: transfer.layers_total,
            ..PullStatus::default()
        }));
    }
}

/// Often enough for a bar, rarely enough for a stream of lines.
const TRANSFER_INTERVAL: Duration = Duration::from_millis(100);

/// A file that could not be written whole does not stay.
fn save(
    store: &Store,
    images: &[String],
    path: &Path,
    format: SaveFormat,
    on_progress: &dyn Fn(Transfer),
    fail: &dyn Fn(&dyn std::fmt::Display) -> ControlError,
) -> Result<(), ControlError> {
    let references: Vec<&str> = images.iter().map(String::as_str).collect();
    let archive = match format {
        SaveFormat::OciArchive => keel_store::SaveFormat::OciArchive,
        SaveFormat::DockerArchive => keel_store::SaveFormat::DockerArchive,
        SaveFormat::OciDirectory => {
            return store.save_layout(&references, path, on_progress).map_err(|error| fail(&chain(&error)));
        }
    };
    let mut file = std::fs::File::create(path).map_err(|error| fail(&error))?;
    let saved =
        store.save(&references, archive, &mut file, on_progress).map_err(|error| fail(&chain(&error)));
    if saved.is_err() {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(path);
    }
    saved
}

fn known(store: &Store, image: &str) -> Result<Image, ControlError> {
    let reference = keel_store::canonical_reference(image).map_err(|error| invalid(&error))?;
    store.image(&reference).map_err(|error| failed(&error))?.ok_or_else(|| {
        ControlError::new(ErrorCode::NotFound, format!("no image {reference}"))
            .hint("see what is there: keel image ls")
    })
}

/// A pod whose image is gone cannot be started again without a registry.
fn refuse_used(image: &Image, status: &Status) -> Result<(), ControlError> {
    let digest = image.manifest_digest.to_string();
    let uses = |container: &ContainerStatus| {
        let canonical = keel_store::canonical_reference(&container.image);
        canonical.is_ok_and(|reference| reference == image.reference)
            || (container.image.contains('@') && container.image.ends_with(&digest))
    };
    let containers =
        |pod: &PodStatus| pod.init_container_statuses.iter().chain(&pod.container_statuses).any(uses);
    let pods: Vec<String> =
        status.pods.iter().filter(|pod| containers(pod)).map(|pod| pod.key.to_string()).collect();
    if pods.is_empty() {
        return Ok(());
    }
    Err(ControlError::new(
        ErrorCode::Conflict,
        format!("image {} is in use by pod {}", image.reference, pods.join(", ")),
    )
    .hint("remove it all the same: --force"))
}

/// Images of all containers that objects describe, whether they run or not.
pub(crate) fn declared<'a>(objects: impl IntoIterator<Item = &'a Object>) -> BTreeSet<String> {
    let spec = |object: &'a Object| match &object.kind {
        Kind::Pod(pod) => Some(&pod.spec),
        Kind::Deployment(deployment) => Some(&deployment.spec.template.spec),
        Kind::ConfigMap(_) | Kind::Secret(_) => None,
    };
    let specs = objects.into_iter().filter_map(spec);
    let containers = specs.flat_map(|spec| spec.init_containers.iter().chain(&spec.containers));
    containers.map(|container| container.image.clone()).collect()
}

fn summary(image: &Image) -> Value {
    let mut summary = json!({
        "reference": image.reference,
        "digest": image.manifest_digest.to_string(),
        "sizeBytes": image.size_bytes,
        "layers": image.layers.len(),
        "pulledAtMs": image.pulled_at_ms,
        "pinned": image.pinned,
    });
    if let Some(index) = &image.index {
        summary["index"] = json!(index.digest);
        summary["platforms"] = json!(index.platforms());
    }
    summary
}

fn detail(image: &Image) -> Value {
    let mut whole = summary(image);
    whole["layers"] = json!(image.layers);
    whole["configDigest"] = json!(image.config_digest.to_string());
    whole["config"] = json!(image.config);
    if let Some(index) = &image.index {
        whole["index"] = index_detail(index);
    }
    whole
}

fn index_detail(index: &Index) -> Value {
    let manifests = index.members.iter().map(|member| {
        let blobs = member
            .blobs
            .iter()
            .map(|blob| json!({"digest": blob.digest, "mediaType": blob.media_type, "size": blob.size}));
        json!({
            "digest": member.digest,
            "mediaType": member.media_type,
            "size": member.size,
            "platform": member.platform,
            "blobs": blobs.collect::<Vec<_>>(),
        })
    });
    json!({
        "digest": index.digest,
        "mediaType": index.media_type,
        "size": index.size,
        "manifests": manifests.collect::<Vec<_>>(),
    })
}

/// Blocking operations run on threads that may wait for the printer.
fn data(events: &EventSender, value: Value) {
    let _ = events.blocking_send(ControlEvent::Data { value });
}

fn note(events: &EventSender, message: String) {
    let _ = events.blocking_send(ControlEvent::Note { message });
}

fn failed(error: &(dyn std::error::Error + 'static)) -> ControlError {
    ControlError::new(ErrorCode::Internal, chain(error))
}

fn invalid(error: &(dyn std::error::Error + 'static)) -> ControlError {
    ControlError::new(ErrorCode::Invalid, chain(error))
}
