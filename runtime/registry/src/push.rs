//! An image from the store to a registry.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use keel_store::{Digest, Image, Store};
use reqwest::{Method, StatusCode, Url};

use crate::backoff::Backoff;
use crate::client::Client;
use crate::credentials::InlineAuth;
use crate::error::PullError;
use crate::progress::{LayerState, OnProgress, Tracker};
use crate::reference::Reference;
use crate::session::{Access, MANIFEST_LIMIT, Session};
use crate::transport::{FilePart, Incoming, Outgoing, Payload, same_origin};

/// How often the progress of an upload is looked at.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Why an image could not be pushed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    #[error("image {reference} is not in the store")]
    NotInStore { reference: String },

    #[error("{what} is not kept in the store in its packed form")]
    BlobGone { what: String },

    #[error("{what} cannot be read from the store")]
    Store {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    #[error(transparent)]
    Registry(#[from] PullError),
}

impl PushError {
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Registry(error) => error.is_retryable(),
            Self::Store { .. } => true,
            Self::NotInStore { .. } | Self::BlobGone { .. } => false,
        }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Registry(error) => error.hint(),
            Self::NotInStore { .. } => Some("`keel image ls` shows what is there".to_owned()),
            Self::BlobGone { .. } => Some("pull the image again, then push it".to_owned()),
            Self::Store { .. } => None,
        }
    }
}

/// A blob on its way out.
struct Upload {
    /// Its place among the layers; the config has none.
    layer: Option<usize>,
    digest: Digest,
    size: u64,
    path: PathBuf,
    what: String,
}

impl Client {
    /// Pushes the image stored as `source` to `target`; gives the digest that the registry has it by.
    pub async fn push(
        &self,
        store: &Arc<Store>,
        source: &str,
        target: &str,
        auth: &[InlineAuth],
        progress: OnProgress,
    ) -> Result<Digest, PushError> {
        let source = Reference::parse(source)?;
        let target = Reference::parse(target)?;
        let image = load(store, &source)?;
        let manifest = read_manifest(store, &image, &source)?;
        let uploads = plan(store, &image, &source)?;
        let tracker = Tracker::new(progress);
        // Mirrors are for reading; what is pushed goes where the name says.
        let endpoint = self.route(&target)?.pop().expect("a route ends with the registry itself");
        let mut session = self.session(&target, endpoint, &tracker, auth, Access::Push).await?;
        if source.registry() == target.registry() && source.repository() != target.repository() {
            session.mount_from(source.repository());
        }
        tracker.begin(image.layers.iter().map(|layer| (layer.blob_digest, layer.size)));
        futures_util::stream::iter(uploads)
            .map(|upload| send_blob(&session, upload, &tracker))
            .buffer_unordered(self.options.parallel_layers.max(1))
            .try_collect::<()>()
            .await?;
        send_manifest(&session, manifest, &image).await?;
        Ok(image.manifest_digest)
    }
}

fn load(store: &Store, source: &Reference) -> Result<Image, PushError> {
    match store.image(source.canonical()) {
        Ok(Some(image)) => Ok(image),
        Ok(None) => Err(PushError::NotInStore { reference: source.to_string() }),
        Err(error) => Err(PushError::Store { what: format!("image {source}"), source: Box::new(error) }),
    }
}

fn read_manifest(store: &Store, image: &Image, source: &Reference) -> Result<Bytes, PushError> {
    let what = format!("the manifest of {source}");
    match store.read_blob(&image.manifest_digest, MANIFEST_LIMIT) {
        Ok(Some(bytes)) => Ok(bytes.into()),
        Ok(None) => Err(PushError::BlobGone { what }),
        Err(error) => Err(PushError::Store { what, source: Box::new(error) }),
    }
}

/// Config and layers, each digest once. Layers that the publisher serves himself stay with him.
fn plan(store: &Store, image: &Image, source: &Reference) -> Result<Vec<Upload>, PushError> {
    let mut uploads = vec![upload(store, None, &image.config_digest, format!("the config of {source}"))?];
    for (index, layer) in image.layers.iter().enumerate() {
        let foreign = layer.media_type.contains("nondistributable") || layer.media_type.contains("foreign");
        if !foreign && uploads.iter().all(|u| u.digest != layer.blob_digest) {
            let what = format!("layer {} of {} of {source}", index + 1, image.layers.len());
            uploads.push(upload(store, Some(index), &layer.blob_digest, what)?);
        }
    }
    Ok(uploads)
}

fn upload(store: &Store, layer: Option<usize>, digest: &Digest, what: String) -> Result<Upload, PushError> {
    let Some(path) = store.blob_path(digest) else { return Err(PushError::BlobGone { what }) };
    match std::fs::metadata(&path) {
        Ok(metadata) => Ok(Upload { layer, digest: *digest, size: metadata.len(), path, what }),
        Err(error) => Err(PushError::Store { what, source: Box::new(error) }),
    }
}

async fn send_blob(session: &Session<'_>, upload: Upload, tracker: &Tracker) -> Result<(), PullError> {
    let state = if session.has_blob(&upload.digest, &upload.what).await? {
        LayerState::Present
    } else {
        transfer(session, &upload, tracker).await?;
        LayerState::Done
    };
    if let Some(layer) = upload.layer {
        tracker.finished(layer, state);
    }
    Ok(())
}

/// Sends a blob over as many connections as it takes; each one goes on where the registry says it stopped.
async fn transfer(session: &Session<'_>, upload: &Upload, tracker: &Tracker) -> Result<(), PullError> {
    let mut backoff = Backoff::new(session.retry, session.tracker);
    let mut place: Option<(Url, u64)> = None;
    loop {
        match transfer_once(session, upload, tracker, &mut place).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                backoff.pause(error).await?;
                place = match place {
                    Some((location, _)) => session.upload_state(location).await,
                    None => None,
                };
            }
        }
    }
}

async fn transfer_once(
    session: &Session<'_>,
    upload: &Upload,
    tracker: &Tracker,
    place: &mut Option<(Url, u64)>,
) -> Result<(), PullError> {
    let (location, from) = match place.clone() {
        Some(known) => known,
        None => match session.begin_upload(upload).await? {
            Some(location) => (location, 0),
            // Mounted from another repository of the same registry.
            None => return Ok(()),
        },
    };
    *place = Some((location.clone(), from));
    let location = match upload.size.saturating_sub(from) {
        0 => location,
        rest => {
            let part =
                FilePart { path: upload.path.clone(), from, len: rest, taken: Arc::new(AtomicU64::new(0)) };
            let taken = part.taken.clone();
            let sending = session.send_part(upload, location, part);
            let location = report_while(sending, tracker, upload.layer, from, &taken).await?;
            *place = Some((location.clone(), upload.size));
            location
        }
    };
    session.end_upload(upload, location).await
}

/// Runs `sending` and tells the tracker what it has taken.
async fn report_while<T>(
    sending: impl Future<Output = T>,
    tracker: &Tracker,
    layer: Option<usize>,
    from: u64,
    taken: &AtomicU64,
) -> T {
    let mut sending = std::pin::pin!(sending);
    loop {
        // Polling the same pinned future again after the interval loses nothing.
        match tokio::time::timeout(PROGRESS_INTERVAL, sending.as_mut()).await {
            Ok(result) => return result,
            Err(_) => {
                if let Some(layer) = layer {
                    tracker.fetched(layer, from + taken.load(Ordering::Relaxed));
                }
            }
        }
    }
}

async fn send_manifest(session: &Session<'_>, body: Bytes, image: &Image) -> Result<(), PullError> {
    let mut backoff = Backoff::new(session.retry, session.tracker);
    loop {
        match session.put_manifest(body.clone(), image).await {
            Ok(()) => return Ok(()),
            Err(error) => backoff.pause(error).await?,
        }
    }
}

impl Session<'_> {
    async fn has_blob(&self, digest: &Digest, what: &str) -> Result<bool, PullError> {
        let mut backoff = Backoff::new(self.retry, self.tracker);
        loop {
            let answer = match self.head(&format!("blobs/{digest}")).await {
                Ok(response) if response.status().is_success() => Ok(true),
                Ok(response) if response.status() == StatusCode::NOT_FOUND => Ok(false),
                Ok(response) => Err(self.refusal(response, what).await),
                Err(error) => Err(error),
            };
            match answer {
                Ok(there) => return Ok(there),
                Err(error) => backoff.pause(error).await?,
            }
        }
    }

    /// Opens an upload. `None`: the registry took the blob from the repository that it was pulled from.
    async fn begin_upload(&self, upload: &Upload) -> Result<Option<Url>, PullError> {
        let mut url = self.address("blobs/uploads/")?;
        if let Some(from) = self.mountable() {
            url.query_pairs_mut().append_pair("mount", &upload.digest.to_string()).append_pair("from", from);
        }
        let response = self.call(|| Outgoing { method: Method::POST, ..Outgoing::get(url.clone()) }).await?;
        match response.status() {
            StatusCode::CREATED => Ok(None),
            StatusCode::ACCEPTED => self.location(&response, &upload.what).map(Some),
            _ => Err(self.refusal(response, &upload.what).await),
        }
    }

    /// Sends the rest of a blob; gives where to go on.
    async fn send_part(&self, upload: &Upload, location: Url, part: FilePart) -> Result<Url, PullError> {
        let response = self
            .call_at(&location, || Outgoing {
                method: Method::PATCH,
                content_type: Some("application/octet-stream".to_owned()),
                content_range: Some(format!("{}-{}", part.from, part.from + part.len - 1)),
                body: Payload::File(part.clone()),
                ..Outgoing::get(location.clone())
            })
            .await?;
        match response.status() {
            StatusCode::ACCEPTED | StatusCode::NO_CONTENT | StatusCode::CREATED => {
                self.location(&response, &upload.what)
            }
            _ => Err(self.refusal(response, &upload.what).await),
        }
    }

    async fn end_upload(&self, upload: &Upload, mut location: Url) -> Result<(), PullError> {
        location.query_pairs_mut().append_pair("digest", &upload.digest.to_string());
        let response = self
            .call_at(&location, || Outgoing {
                method: Method::PUT,
                content_type: Some("application/octet-stream".to_owned()),
                body: Payload::Bytes(Bytes::new()),
                ..Outgoing::get(location.clone())
            })
            .await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(self.refusal(response, &upload.what).await)
    }

    /// Where an interrupted upload stands, `None` when it has to start anew.
    async fn upload_state(&self, location: Url) -> Option<(Url, u64)> {
        let response = self.call_at(&location, || Outgoing::get(location.clone())).await.ok()?;
        if !response.status().is_success() {
            return None;
        }
        let last: u64 = response.header("range")?.rsplit_once('-')?.1.parse().ok()?;
        let next = response.location().unwrap_or(location);
        // An empty upload is reported as 0-0, which is not told from one byte: that byte is sent again.
        (last > 0).then_some((next, last + 1))
    }

    async fn put_manifest(&self, body: Bytes, image: &Image) -> Result<(), PullError> {
        let url = self.address(&format!("manifests/{}", self.reference.selector()))?;
        let what = format!("the manifest of {}", self.reference);
        let response = self
            .call(|| Outgoing {
                method: Method::PUT,
                content_type: Some(image.manifest_media_type.clone()),
                body: Payload::Bytes(body.clone()),
                ..Outgoing::get(url.clone())
            })
            .await?;
        if !response.status().is_success() {
            return Err(self.refusal(response, &what).await);
        }
        match response.header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok()) {
            Some(stored) if stored != image.manifest_digest => Err(PullError::WrongDigest {
                what,
                registry: self.reference.registry().to_owned(),
                expected: image.manifest_digest,
                actual: stored.to_string(),
            }),
            _ => Ok(()),
        }
    }

    fn location(&self, response: &Incoming, what: &str) -> Result<Url, PullError> {
        response.location().map_err(|detail| PullError::Redirect {
            registry: self.reference.registry().to_owned(),
            request: format!("the upload of {what}"),
            detail,
        })
    }

    /// As `call`, but the login stays at home when the upload goes to another host.
    async fn call_at(&self, location: &Url, outgoing: impl Fn() -> Outgoing) -> Result<Incoming, PullError> {
        if self.base().is_some_and(|base| same_origin(base, location)) {
            self.call(outgoing).await
        } else {
            self.transport.send(outgoing()).await
        }
    }
}
