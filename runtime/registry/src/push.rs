//! An image from the store to a registry.

use std::collections::BTreeSet;
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

/// How much of a blob one request carries: proxies have limits, the lowest common one being 100 MB, and what is lost with
/// a connection is sent again.
pub const DEFAULT_CHUNK_BYTES: u64 = 64 << 20;
/// Proxies that take less than this are not meant for images.
const LEAST_CHUNK_BYTES: u64 = 256 << 10;
/// How often a registry may say that it is elsewhere before it gets the blob whole.
const MAX_MISPLACED: u32 = 3;
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

/// A manifest or an index on its way out.
pub(crate) struct Parcel {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
}

/// Where an upload stands.
struct Place {
    location: Url,
    from: u64,
    /// How much to send at a time.
    chunk: u64,
}

/// Why a piece did not arrive.
enum Broken {
    /// The registry takes no pieces, or no second one.
    NoPieces(PullError),
    /// The registry has another idea of what is there already.
    Misplaced(PullError),
    /// Something on the way takes no request of this size.
    TooMuch(PullError),
    Other(PullError),
}

impl From<PullError> for Broken {
    fn from(error: PullError) -> Self {
        Self::Other(error)
    }
}

impl Client {
    /// Pushes the image stored as `source` to `target`, with the index and all other platforms where they are kept;
    /// gives the digest that the registry has it by.
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
        let (parcels, last) = documents(&image);
        let uploads = plan(store, &image, &source)?;
        let tracker = Tracker::new(progress);
        let mut session = self.origin(&target, &tracker, auth, Access::Push).await?;
        if source.registry() == target.registry() && source.repository() != target.repository() {
            session.mount_from(source.repository());
        }
        tracker.begin(uploads.iter().filter(|u| u.layer.is_some()).map(|u| (u.digest, u.size)));
        let chunk = self.options.chunk_bytes.max(1);
        futures_util::stream::iter(uploads)
            .map(|upload| send_blob(&session, upload, &tracker, chunk))
            .buffer_unordered(self.options.parallel_layers.max(1))
            .try_collect::<()>()
            .await?;
        for parcel in &parcels {
            let body = read_document(store, parcel, &source)?;
            send_manifest(&session, body, parcel, &parcel.digest.to_string()).await?;
        }
        let body = read_document(store, &last, &source)?;
        send_manifest(&session, body, &last, &target.selector()).await?;
        Ok(last.digest)
    }

    /// Mirrors are for reading; what is pushed goes where the name says.
    pub(crate) async fn origin<'a>(
        &'a self,
        reference: &'a Reference,
        tracker: &'a Tracker,
        auth: &[InlineAuth],
        access: Access,
    ) -> Result<Session<'a>, PullError> {
        let endpoint = self.route(reference)?.pop().expect("a route ends with the registry itself");
        self.session(reference, endpoint, tracker, auth, access).await
    }
}

fn load(store: &Store, source: &Reference) -> Result<Image, PushError> {
    match store.image(source.canonical()) {
        Ok(Some(image)) => Ok(image),
        Ok(None) => Err(PushError::NotInStore { reference: source.to_string() }),
        Err(error) => Err(PushError::Store { what: format!("image {source}"), source: Box::new(error) }),
    }
}

/// What is pushed by digest, each before what lists it, and what the name of the target will mean.
fn documents(image: &Image) -> (Vec<Parcel>, Parcel) {
    let parcel = |digest: Digest, media_type: &str| Parcel { digest, media_type: media_type.to_owned() };
    match &image.index {
        Some(index) => {
            let members = index.members.iter().map(|member| parcel(member.digest, &member.media_type));
            (members.collect(), parcel(index.digest, &index.media_type))
        }
        None => (Vec::new(), parcel(image.manifest_digest, &image.manifest_media_type)),
    }
}

fn read_document(store: &Store, parcel: &Parcel, source: &Reference) -> Result<Bytes, PushError> {
    let what = format!("the manifest {} of {source}", parcel.digest);
    match store.read_blob(&parcel.digest, MANIFEST_LIMIT) {
        Ok(Some(bytes)) => Ok(bytes.into()),
        Ok(None) => Err(PushError::BlobGone { what }),
        Err(error) => Err(PushError::Store { what, source: Box::new(error) }),
    }
}

/// Configs and layers, each digest once. Layers that the publisher serves himself stay with him.
fn plan(store: &Store, image: &Image, source: &Reference) -> Result<Vec<Upload>, PushError> {
    let own = image.layers.iter().map(|layer| (layer.blob_digest, layer.media_type.as_str(), true));
    let own = std::iter::once((image.config_digest, "", false)).chain(own);
    let others = image.index.iter().flat_map(|index| index.blobs());
    let others = others.map(|blob| (blob.digest, blob.media_type.as_str(), blob.is_layer()));
    let (mut uploads, mut layers): (Vec<Upload>, usize) = (Vec::new(), 0);
    let mut seen = BTreeSet::new();
    for (digest, media_type, is_layer) in own.chain(others) {
        if keel_store::stays_with_its_publisher(media_type) || !seen.insert(digest) {
            continue;
        }
        let kind = if is_layer { "layer" } else { "config" };
        let what = format!("{kind} {} of {source}", &digest.hex()[..12]);
        let layer = is_layer.then_some(layers);
        layers += usize::from(is_layer);
        uploads.push(upload(store, layer, &digest, what)?);
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

async fn send_blob(
    session: &Session<'_>,
    upload: Upload,
    tracker: &Tracker,
    chunk: u64,
) -> Result<(), PullError> {
    let state = if session.has_blob(&upload.digest, &upload.what).await? {
        LayerState::Present
    } else {
        transfer(session, &upload, tracker, chunk).await?;
        LayerState::Done
    };
    if let Some(layer) = upload.layer {
        tracker.finished(layer, state);
    }
    Ok(())
}

/// Sends a blob over as many connections as it takes; each one goes on where the registry says it stopped.
///
/// ```text
/// POST -> PATCH piece .. PATCH piece -> PUT digest
///           |  broken: GET the location says where to go on
///           |  no pieces taken: POST -> PUT all of it
///           |  too much at a time: POST, and smaller pieces
/// ```
async fn transfer(
    session: &Session<'_>,
    upload: &Upload,
    tracker: &Tracker,
    mut chunk: u64,
) -> Result<(), PullError> {
    let mut backoff = Backoff::new(session.retry, session.tracker);
    let mut place: Option<Place> = None;
    let mut misplaced = 0;
    loop {
        match transfer_once(session, upload, tracker, &mut place, chunk).await {
            Ok(()) => return Ok(()),
            Err(Broken::NoPieces(error)) => {
                tracing::debug!(%error, "the registry takes no pieces");
                return send_whole(session, upload, tracker).await;
            }
            Err(Broken::Misplaced(error)) if misplaced == MAX_MISPLACED => {
                tracing::debug!(%error, "the registry takes no pieces in order");
                return send_whole(session, upload, tracker).await;
            }
            Err(Broken::Misplaced(_)) => misplaced += 1,
            Err(Broken::TooMuch(error)) if chunk <= LEAST_CHUNK_BYTES => return Err(error),
            Err(Broken::TooMuch(error)) => {
                tracing::debug!(%error, chunk, "smaller pieces");
                chunk = (chunk.min(upload.size) / 4).max(LEAST_CHUNK_BYTES);
                place = None;
            }
            Err(Broken::Other(error)) => backoff.pause(error).await?,
        }
        place = match place {
            Some(place) => session.upload_state(place).await,
            None => None,
        };
    }
}

async fn transfer_once(
    session: &Session<'_>,
    upload: &Upload,
    tracker: &Tracker,
    place: &mut Option<Place>,
    chunk: u64,
) -> Result<(), Broken> {
    if place.is_none() {
        match session.begin_upload(upload, chunk).await? {
            Some(begun) => *place = Some(begun),
            // Mounted from another repository of the same registry.
            None => return Ok(()),
        }
    }
    let Some(place) = place else { return Ok(()) };
    while place.from < upload.size {
        let len = place.chunk.min(upload.size - place.from);
        let part = upload.part(place.from, len);
        let taken = part.taken.clone();
        let sending = session.send_part(upload, place.location.clone(), part);
        let (location, next) = report_while(sending, tracker, upload.layer, place.from, &taken).await?;
        place.location = location;
        // Less may have been kept than was sent, never more, and never nothing.
        place.from = next
            .filter(|next| (place.from + 1..=place.from + len).contains(next))
            .unwrap_or(place.from + len);
    }
    Ok(session.end_upload(upload, place.location.clone()).await?)
}

/// One request with all of it, for registries that know no other way.
async fn send_whole(session: &Session<'_>, upload: &Upload, tracker: &Tracker) -> Result<(), PullError> {
    let mut backoff = Backoff::new(session.retry, session.tracker);
    loop {
        let sent = match session.begin_upload(upload, u64::MAX).await {
            Ok(Some(place)) => {
                let part = upload.part(0, upload.size);
                let taken = part.taken.clone();
                let sending = session.put_whole(upload, place.location, part);
                report_while(sending, tracker, upload.layer, 0, &taken).await
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        match sent {
            Ok(()) => return Ok(()),
            Err(error) => backoff.pause(error).await?,
        }
    }
}

impl Upload {
    fn part(&self, from: u64, len: u64) -> FilePart {
        FilePart { path: self.path.clone(), from, len, taken: Arc::new(AtomicU64::new(0)) }
    }
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

async fn send_manifest(
    session: &Session<'_>,
    body: Bytes,
    parcel: &Parcel,
    selector: &str,
) -> Result<(), PullError> {
    let mut backoff = Backoff::new(session.retry, session.tracker);
    loop {
        match session.put_manifest(body.clone(), parcel, selector).await {
            Ok(true) => return Ok(()),
            Ok(false) => break,
            Err(error) => backoff.pause(error).await?,
        }
    }
    session.list_as_referrer(&body, parcel).await
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
    async fn begin_upload(&self, upload: &Upload, chunk: u64) -> Result<Option<Place>, PullError> {
        let mut url = self.address("blobs/uploads/")?;
        if let Some(from) = self.mountable() {
            url.query_pairs_mut().append_pair("mount", &upload.digest.to_string()).append_pair("from", from);
        }
        let response = self.call(|| Outgoing { method: Method::POST, ..Outgoing::get(url.clone()) }).await?;
        match response.status() {
            StatusCode::CREATED => Ok(None),
            StatusCode::ACCEPTED => {
                let least = response.header("oci-chunk-min-length").and_then(|text| text.parse().ok());
                let location = self.location(&response, &upload.what)?;
                Ok(Some(Place { location, from: 0, chunk: chunk.max(least.unwrap_or(0)) }))
            }
            _ => Err(self.refusal(response, &upload.what).await),
        }
    }

    /// Sends a piece of a blob; gives where to go on, and from which byte if the registry says that.
    async fn send_part(
        &self,
        upload: &Upload,
        location: Url,
        part: FilePart,
    ) -> Result<(Url, Option<u64>), Broken> {
        let response = self
            .call_at(&location, || Outgoing {
                method: Method::PATCH,
                content_type: Some("application/octet-stream".to_owned()),
                content_range: Some(format!("{}-{}", part.from, part.from + part.len - 1)),
                body: Payload::File(part.clone()),
                ..Outgoing::get(location.clone())
            })
            .await?;
        match response.status().as_u16() {
            201 | 202 | 204 => Ok((self.location(&response, &upload.what)?, range_end(&response))),
            413 => Err(Broken::TooMuch(self.refusal(response, &upload.what).await)),
            416 => Err(Broken::Misplaced(self.refusal(response, &upload.what).await)),
            400 | 404 | 405 | 411 | 415 | 501 => {
                Err(Broken::NoPieces(self.refusal(response, &upload.what).await))
            }
            _ => Err(Broken::Other(self.refusal(response, &upload.what).await)),
        }
    }

    async fn end_upload(&self, upload: &Upload, location: Url) -> Result<(), PullError> {
        self.put_blob(upload, location, Payload::Bytes(Bytes::new())).await
    }

    async fn put_whole(&self, upload: &Upload, location: Url, part: FilePart) -> Result<(), PullError> {
        self.put_blob(upload, location, Payload::File(part)).await
    }

    async fn put_blob(&self, upload: &Upload, mut location: Url, body: Payload) -> Result<(), PullError> {
        location.query_pairs_mut().append_pair("digest", &upload.digest.to_string());
        let response = self
            .call_at(&location, || Outgoing {
                method: Method::PUT,
                content_type: Some("application/octet-stream".to_owned()),
                body: body.clone(),
                ..Outgoing::get(location.clone())
            })
            .await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(self.refusal(response, &upload.what).await)
    }

    /// Where an interrupted upload stands, `None` when it has to start anew.
    async fn upload_state(&self, place: Place) -> Option<Place> {
        let location = place.location;
        let response = self.call_at(&location, || Outgoing::get(location.clone())).await.ok()?;
        if !response.status().is_success() {
            return None;
        }
        let next = range_end(&response)?;
        let location = response.location().unwrap_or(location);
        // An empty upload is reported as 0-0, which is not told from one byte: that byte is sent again.
        (next > 1).then_some(Place { location, from: next, chunk: place.chunk })
    }

    /// `false`: it is about another manifest, and the registry does not keep a list of such.
    pub(crate) async fn put_manifest(
        &self,
        body: Bytes,
        parcel: &Parcel,
        selector: &str,
    ) -> Result<bool, PullError> {
        let url = self.address(&format!("manifests/{selector}"))?;
        let what = format!("the manifest of {}", self.reference);
        let response = self
            .call(|| Outgoing {
                method: Method::PUT,
                content_type: Some(parcel.media_type.clone()),
                body: Payload::Bytes(body.clone()),
                ..Outgoing::get(url.clone())
            })
            .await?;
        if !response.status().is_success() {
            return Err(self.refusal(response, &what).await);
        }
        match response.header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok()) {
            Some(stored) if stored != parcel.digest => Err(PullError::WrongDigest {
                what,
                registry: self.reference.registry().to_owned(),
                expected: parcel.digest,
                actual: stored.to_string(),
            }),
            _ => Ok(response.header("oci-subject").is_some()),
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
    pub(crate) async fn call_at(
        &self,
        location: &Url,
        outgoing: impl Fn() -> Outgoing,
    ) -> Result<Incoming, PullError> {
        if self.base().is_some_and(|base| same_origin(base, location)) {
            self.call(outgoing).await
        } else {
            self.transport.send(outgoing()).await
        }
    }
}

/// The byte after those that are there: `0-9` is 10.
fn range_end(response: &Incoming) -> Option<u64> {
    let last: u64 = response.header("range")?.rsplit_once('-')?.1.parse().ok()?;
    last.checked_add(1)
}
