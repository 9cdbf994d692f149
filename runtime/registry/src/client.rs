//! The client: options, and a pull from the reference to the committed image.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use keel_store::{Digest, Image, Index, IndexError, IndexWalk, LayerError, Lease, Partial, Platform, Store};
use tokio::sync::{Semaphore, oneshot};

use crate::auth::TokenCache;
use crate::backoff::{Backoff, RetryPolicy};
use crate::blob::{Feeder, Fetch, Pieces, pipe};
use crate::credentials::{self, InlineAuth};
use crate::endpoint::Endpoint;
use crate::error::PullError;
use crate::manifest::{self, Descriptor, Document, Manifest};
use crate::mirrors;
use crate::progress::{LayerState, OnProgress, PullProgress, Tracker};
use crate::push::DEFAULT_CHUNK_BYTES;
use crate::reference::Reference;
use crate::session::{Access, CONFIG_LIMIT, Fetched, MANIFEST_LIMIT, Session};
use crate::source::{Health, Source};
use crate::tls::Tls;
use crate::transport::{Timeouts, Transport};

/// Layers that one pull fetches and unpacks at a time; more helps no disk and costs memory.
pub const DEFAULT_PARALLEL_LAYERS: usize = 3;
/// An index may point to an index (rare, allowed); a longer chain is a trick.
const MAX_INDEX_DEPTH: usize = 3;

/// Everything that a host can configure about registries.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// docker's `config.json` and podman's `auth.json` files, first match wins. Read anew for each pull.
    pub auth_files: Vec<PathBuf>,
    /// Directories with one directory per `host[:port]`: `*.crt` authorities, `X.cert` + `X.key` client.
    pub certs_dirs: Vec<PathBuf>,
    /// Directories with one directory per `host[:port]`, or `_default`, that may hold containerd's `hosts.toml`.
    pub hosts_dirs: Vec<PathBuf>,
    /// podman's `registries.conf`, each with its `.d` directory.
    pub registries_conf: Vec<PathBuf>,
    /// PEM files of authorities to trust for every registry, beside the system's.
    pub extra_ca_files: Vec<PathBuf>,
    /// `host` or `host:port` whose certificate is not checked and that may speak plain http.
    pub insecure_registries: Vec<String>,
    pub parallel_layers: usize,
    /// Of a blob that is pushed, at a time; more where the registry asks for more.
    pub chunk_bytes: u64,
    pub timeouts: Timeouts,
    pub retry: RetryPolicy,
}

impl Default for ClientOptions {
    /// What docker and podman would use on this host.
    fn default() -> Self {
        Self {
            auth_files: credentials::default_auth_files(),
            certs_dirs: vec!["/etc/containers/certs.d".into(), "/etc/docker/certs.d".into()],
            hosts_dirs: vec!["/etc/containerd/certs.d".into()],
            registries_conf: mirrors::default_registries_conf(),
            extra_ca_files: Vec::new(),
            insecure_registries: Vec::new(),
            parallel_layers: DEFAULT_PARALLEL_LAYERS,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            timeouts: Timeouts::default(),
            retry: RetryPolicy::default(),
        }
    }
}

/// What one pull can ask for beyond the reference.
#[derive(Clone, Debug)]
pub struct PullOptions {
    pub platform: Platform,
    /// Logins that come with the workload; asked before the host's files.
    pub auth: Vec<InlineAuth>,
    /// Kept by garbage collection although nothing refers to it.
    pub pinned: bool,
    /// Keep an index whole, with the images of all its platforms.
    pub all_platforms: bool,
    /// Fetch packed layers that were given up for space, too: pushing and saving need them.
    pub packed: bool,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            auth: Vec::new(),
            pinned: false,
            all_platforms: false,
            packed: false,
        }
    }
}

/// Fetches images into a store. Cheap to share; holds connections, tokens and nothing else.
#[derive(Debug)]
pub struct Client {
    pub(crate) options: ClientOptions,
    pub(crate) transport: Transport,
    pub(crate) tokens: TokenCache,
    pub(crate) health: Health,
    flights: Flights,
}

/// Layers being fetched now, so that two pulls do not fetch the same one twice.
#[derive(Debug, Default)]
struct Flights(Mutex<BTreeMap<(String, Digest), Weak<Semaphore>>>);

/// A layer with all that its unpacking needs.
#[derive(Clone)]
struct LayerPlan {
    index: usize,
    descriptor: Descriptor,
    /// None of what is only kept: packed layers, and all that belongs to other platforms.
    diff_id: Option<Digest>,
    what: String,
}

/// What a pull goes for: the image, and the index that is kept with it.
struct Goal {
    fetched: Fetched,
    manifest: Manifest,
    config: Bytes,
    index: Option<Index>,
}

impl Client {
    pub fn new(options: ClientOptions) -> Self {
        let tls = Tls::new(options.certs_dirs.clone(), options.extra_ca_files.clone());
        let transport = Transport::new(tls, options.timeouts.clone(), options.insecure_registries.clone());
        Self {
            options,
            transport,
            tokens: TokenCache::default(),
            health: Health::default(),
            flights: Flights::default(),
        }
    }

    /// Makes the image of `reference` for `platform` present in `store`.
    ///
    /// Dropping the future cancels the pull: what was fetched of unfinished layers is discarded by the
    /// threads that unpack them, finished layers stay for the next try.
    pub async fn pull(
        &self,
        store: &Arc<Store>,
        reference: &str,
        platform: Platform,
        progress: OnProgress,
    ) -> Result<Image, PullError> {
        let options = PullOptions { platform, ..PullOptions::default() };
        self.pull_with(store, reference, options, progress).await
    }

    /// [`pull`](Self::pull) with logins of its own.
    pub async fn pull_with(
        &self,
        store: &Arc<Store>,
        reference: &str,
        options: PullOptions,
        progress: OnProgress,
    ) -> Result<Image, PullError> {
        let reference = Reference::parse(reference)?;
        if let Some(image) = complete_image(store, &reference, &options) {
            progress(PullProgress::default());
            return Ok(image);
        }
        let tracker = Tracker::new(progress);
        let source = self.source(&reference, &tracker, &options.auth).await?;
        let (top, fetched, manifest) = self.image_manifest(&source, &options.platform).await?;
        // Nothing that is put into the store meanwhile may be collected before the record names it.
        let mut leases = Vec::new();
        let index = match (&top.document, kept_index(store, &reference, &top.digest)) {
            // What is kept whole stays whole as long as its name means it.
            (Document::Index(_), Some(index)) => Some(index),
            (Document::Index(_), None) if options.all_platforms => {
                Some(whole_index(store, &source, &top, &mut leases).await?)
            }
            _ => None,
        };
        let config = match store.read_blob(&manifest.config.digest, CONFIG_LIMIT) {
            Ok(Some(there)) => there.into(),
            // Damage of a kept config is healed by fetching it again.
            Ok(None) | Err(_) => source.config(&manifest.config).await?,
        };
        let goal = Goal { fetched, manifest, config, index };
        let layers = plan_layers(store, &reference, &goal, &options)?;
        warn_about_platform(&reference, &goal.config, &options.platform);
        tracker.begin(layers.iter().map(|layer| (layer.descriptor.digest, layer.descriptor.size)));
        // From before the first look into the store until the image record names them all.
        let _lease = store.lease(goal.digests(&layers));
        let layers = missing_layers(store, layers, &tracker);
        preflight(store, &reference, &layers)?;
        let unfinished = Unfinished(Some(store.clone()));
        self.fetch_layers(store, &source, layers, &tracker).await?;
        let image = commit(store, &reference, goal, options.pinned).await?;
        unfinished.done();
        drop(leases);
        Ok(image)
    }

    /// All places that may have the image.
    async fn source<'a>(
        &'a self,
        reference: &'a Reference,
        tracker: &'a Tracker,
        inline: &[InlineAuth],
    ) -> Result<Source<'a>, PullError> {
        let mut sessions = Vec::new();
        for endpoint in self.route(reference)? {
            let (name, origin) = (endpoint.registry.clone(), endpoint.origin);
            match self.session(reference, endpoint, tracker, inline, Access::Pull).await {
                Ok(session) => sessions.push(session),
                Err(error) if !origin => tracing::warn!(%error, mirror = name, "the mirror is not used"),
                Err(error) => return Err(error),
            }
        }
        Ok(Source::new(reference, tracker, &self.options.retry, sessions, &self.health))
    }

    /// Where the image may be, the registry that its name says last.
    pub(crate) fn route(&self, reference: &Reference) -> Result<Vec<Endpoint>, PullError> {
        let options = &self.options;
        let hosts_dirs: Vec<PathBuf> =
            options.certs_dirs.iter().chain(&options.hosts_dirs).cloned().collect();
        mirrors::route(reference, &hosts_dirs, &options.registries_conf)
    }

    pub(crate) async fn session<'a>(
        &'a self,
        reference: &'a Reference,
        endpoint: Endpoint,
        tracker: &'a Tracker,
        inline: &[InlineAuth],
        access: Access,
    ) -> Result<Session<'a>, PullError> {
        let credentials =
            credentials::find(inline, &self.options.auth_files, &endpoint.registry, &endpoint.repository)
                .await?;
        Ok(Session::new(self, tracker, reference, endpoint, credentials, access))
    }

    /// From the reference through indexes to one image; gives what the reference itself means, too.
    async fn image_manifest(
        &self,
        source: &Source<'_>,
        platform: &Platform,
    ) -> Result<(Fetched, Fetched, Manifest), PullError> {
        let reference = source.reference;
        let top = source.document(&reference.selector(), reference.digest(), None).await?;
        let mut fetched = top.clone();
        for _ in 0..MAX_INDEX_DEPTH {
            let index = match fetched.document.clone() {
                Document::Manifest(manifest) => return Ok((top, fetched, manifest)),
                Document::Index(index) => index,
            };
            let entry = manifest::choose(&index, platform, reference.canonical())?;
            let selector = entry.digest.to_string();
            fetched = source.document(&selector, Some(&entry.digest), Some(entry.size)).await?;
        }
        match fetched.document.clone() {
            Document::Manifest(manifest) => Ok((top, fetched, manifest)),
            Document::Index(_) => Err(PullError::Malformed {
                what: format!("the manifest of {reference}"),
                registry: reference.registry().to_owned(),
                detail: format!("more than {MAX_INDEX_DEPTH} indexes inside each other"),
            }),
        }
    }

    async fn fetch_layers(
        &self,
        store: &Arc<Store>,
        source: &Source<'_>,
        layers: Vec<LayerPlan>,
        tracker: &Tracker,
    ) -> Result<(), PullError> {
        futures_util::stream::iter(layers)
            .map(|layer| self.fetch_layer(store, source, layer, tracker))
            .buffer_unordered(self.options.parallel_layers.max(1))
            .try_collect::<()>()
            .await
    }

    async fn fetch_layer(
        &self,
        store: &Arc<Store>,
        source: &Source<'_>,
        layer: LayerPlan,
        tracker: &Tracker,
    ) -> Result<(), PullError> {
        let flight = self.flights.of(source.reference.host(), layer.descriptor.digest);
        // Never closed, so acquiring cannot fail; a cancelled holder gives the permit back.
        let _permit = flight.acquire().await;
        if layer.is_there(store) {
            tracker.finished(layer.index, LayerState::Present);
            return Ok(());
        }
        let mut backoff = Backoff::new(source.retry, source.tracker);
        let mut blamed = BTreeSet::new();
        loop {
            let failure = match ingest(store, source, &layer, tracker).await {
                Ok(()) => break,
                Err(failure) => failure,
            };
            let from_new_places = !failure.served.is_subset(&blamed);
            blamed.extend(failure.served);
            match failure.error {
                // Bytes of an earlier pull may be what is wrong; they are gone now.
                error if error.is_the_data() && failure.resumed => {
                    tracing::debug!(%error, "fetching it from its start");
                }
                // The transfer has tried as often as the policy says.
                error if failure.of_transfer => return Err(error),
                // Other places may have the true bytes.
                error if error.is_the_data() && from_new_places && blamed.len() < source.places() => {
                    tracing::debug!(%error, "asking elsewhere");
                }
                error => backoff.pause(error).await?,
            }
        }
        tracker.finished(layer.index, LayerState::Done);
        Ok(())
    }
}

impl Flights {
    fn of(&self, host: &str, digest: Digest) -> Arc<Semaphore> {
        let mut flights = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        flights.retain(|_, flight| flight.strong_count() > 0);
        let key = (host.to_owned(), digest);
        if let Some(flight) = flights.get(&key).and_then(Weak::upgrade) {
            return flight;
        }
        let flight = Arc::new(Semaphore::new(1));
        flights.insert(key, Arc::downgrade(&flight));
        flight
    }
}

struct Failure {
    error: PullError,
    /// The places that the bytes came from.
    served: BTreeSet<usize>,
    /// Bytes of an earlier pull were used.
    resumed: bool,
    /// Fetching failed, not storing.
    of_transfer: bool,
}

/// One pass: network -> bounded channel -> the store's hash, blob, inflate, hash, files.
async fn ingest(
    store: &Arc<Store>,
    source: &Source<'_>,
    layer: &LayerPlan,
    tracker: &Tracker,
) -> Result<(), Failure> {
    let (feeder, pieces) = pipe();
    let (opened, offset) = oneshot::channel();
    let job = tokio::task::spawn_blocking({
        let (store, plan) = (store.clone(), layer.clone());
        move || take_in(&store, &plan, pieces, opened)
    });
    // No offset: the store has an error to tell.
    let offset = offset.await.ok();
    let fed = match offset {
        Some(offset) => feed(source, layer, tracker, feeder, offset).await,
        None => Ok(BTreeSet::new()),
    };
    let stored = job.await;
    let resumed = offset.is_some_and(|n| n > 0);
    let (served, error) = match (fed, stored) {
        (Ok(_), Ok(Ok(()))) => return Ok(()),
        (Err(error), _) => {
            return Err(Failure { error, served: BTreeSet::new(), resumed, of_transfer: true });
        }
        (Ok(served), Ok(Err(error))) => {
            (served, PullError::from_layer(&layer.what, source.reference.registry(), error))
        }
        (Ok(served), Err(panic)) => {
            (served, PullError::Setup { detail: format!("unpacking ended abnormally: {panic}") })
        }
    };
    if error.is_the_data() {
        source.blame(served.iter().copied());
    }
    Err(Failure { error, served, resumed, of_transfer: false })
}

/// The asynchronous half: registry to channel; gives the places that the bytes came from. A store that stops taking has its own error to tell.
async fn feed(
    source: &Source<'_>,
    layer: &LayerPlan,
    tracker: &Tracker,
    feeder: Feeder,
    offset: u64,
) -> Result<BTreeSet<usize>, PullError> {
    tracker.fetched(layer.index, offset);
    let mut fetch = Fetch::new(source, &layer.descriptor, &layer.what, offset);
    while let Some(piece) = fetch.next().await? {
        if feeder.feed(piece).await.is_err() {
            return Ok(fetch.served());
        }
        tracker.fetched(layer.index, fetch.done());
    }
    let _ = feeder.end().await;
    Ok(fetch.served())
}

/// The blocking half: channel to store. What has arrived is kept when the other half gives up.
fn take_in(
    store: &Store,
    layer: &LayerPlan,
    mut pieces: Pieces,
    opened: oneshot::Sender<u64>,
) -> Result<(), LayerError> {
    let descriptor = &layer.descriptor;
    let Some(diff_id) = &layer.diff_id else {
        let mut writer = store.begin_blob(&descriptor.digest, descriptor.size)?;
        if opened.send(writer.written()).is_err() {
            return Ok(writer.abort(Partial::Keep)?);
        }
        while let Some(bytes) = pieces.next() {
            writer.write(&bytes)?;
        }
        let stored = if pieces.is_complete() { writer.finish() } else { writer.abort(Partial::Keep) };
        return Ok(stored?);
    };
    if store.has_blob(&descriptor.digest) {
        match store.unpack_blob(&descriptor.digest, diff_id) {
            // It was damaged and is gone: it comes from the registry.
            Err(_) if !store.has_blob(&descriptor.digest) => {}
            other => return other,
        }
    }
    let mut ingest = store.layer_ingest(&descriptor.digest, descriptor.size, diff_id)?;
    if opened.send(ingest.offset()).is_err() {
        return ingest.abort(Partial::Keep);
    }
    while let Some(bytes) = pieces.next() {
        ingest.push(&bytes)?;
    }
    if pieces.is_complete() { ingest.finish() } else { ingest.abort(Partial::Keep) }
}

impl LayerPlan {
    fn is_there(&self, store: &Store) -> bool {
        match &self.diff_id {
            Some(diff_id) => store.has_layer(diff_id),
            None => store.has_blob(&self.descriptor.digest),
        }
    }
}

impl Goal {
    fn digests(&self, layers: &[LayerPlan]) -> Vec<Digest> {
        let layers = layers.iter().flat_map(|layer| [Some(layer.descriptor.digest), layer.diff_id]).flatten();
        let own = [self.fetched.digest, self.manifest.config.digest];
        own.into_iter().chain(layers).chain(self.index.iter().flat_map(Index::digests)).collect()
    }
}

/// Brings all documents of an index into the store.
async fn whole_index(
    store: &Arc<Store>,
    source: &Source<'_>,
    top: &Fetched,
    leases: &mut Vec<Lease>,
) -> Result<Index, PullError> {
    let what = format!("the index of {}", source.reference);
    let malformed = |error: IndexError| PullError::Malformed {
        what: what.clone(),
        registry: source.reference.registry().to_owned(),
        detail: crate::error::with_causes(&error),
    };
    let mut walk = IndexWalk::new(&top.body, &top.media_type).map_err(malformed)?;
    let mut keep = async |body: Bytes| {
        leases.push(store.lease([Digest::of(&body)]));
        let store = store.clone();
        match tokio::task::spawn_blocking(move || store.put_blob(&body)).await {
            Ok(put) => put.map(drop).map_err(|error| PullError::store(what.clone(), error)),
            Err(panic) => Err(PullError::Setup { detail: format!("storing ended abnormally: {panic}") }),
        }
    };
    keep(top.body.clone()).await?;
    while let Some((digest, size)) = walk.next() {
        let body = match store.read_blob(&digest, MANIFEST_LIMIT) {
            Ok(Some(there)) => there.into(),
            Ok(None) | Err(_) => source.raw(&digest, size).await?,
        };
        walk.take(&body).map_err(malformed)?;
        keep(body).await?;
    }
    Ok(walk.finish())
}

/// The index that is kept for the reference, if it is this one and nothing of it is missing.
fn kept_index(store: &Store, reference: &Reference, digest: &Digest) -> Option<Index> {
    let index = store.image(reference.canonical()).ok()??.index?;
    (index.digest == *digest && index.digests().all(|digest| store.has_blob(&digest))).then_some(index)
}

/// Reports what is there already; gives the rest.
fn missing_layers(store: &Store, layers: Vec<LayerPlan>, tracker: &Tracker) -> Vec<LayerPlan> {
    let (there, missing): (Vec<_>, Vec<_>) = layers.into_iter().partition(|layer| layer.is_there(store));
    for layer in there {
        tracker.finished(layer.index, LayerState::Present);
    }
    missing
}

/// Refuses a pull that cannot fit before it has filled the disk.
fn preflight(store: &Store, reference: &Reference, layers: &[LayerPlan]) -> Result<(), PullError> {
    let needed = layers.iter().map(|l| (l.descriptor.digest, l.descriptor.size, l.diff_id));
    store
        .preflight(needed)
        .map_err(|source| PullError::DiskFull { what: format!("image {reference}"), source: source.into() })
}

/// A pull under way. One that fails or is dropped publishes the layers that are complete: the next try need
/// not fetch them again, and nothing waits in temporary directories for a commit that may never come.
struct Unfinished(Option<Arc<Store>>);

impl Unfinished {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some(store) = self.0.take() else { return };
        // Outside of a runtime (it is shutting down) the next commit or the next start does it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn_blocking(move || {
            if let Err(error) = store.settle() {
                tracing::debug!(%error, "complete layers of an unfinished pull were not kept");
            }
        });
    }
}

/// What a digest names never changes: an image that is here under it needs no registry.
fn complete_image(store: &Store, reference: &Reference, options: &PullOptions) -> Option<Image> {
    let digest = reference.digest()?;
    let image = store.image(reference.canonical()).ok()??;
    // An index digest says nothing about which of its images is here, unless all are.
    let of_index = image.index.as_ref().is_some_and(|index| index.digest == *digest);
    let unpacked = image.layers.iter().all(|layer| store.has_layer(&layer.diff_id));
    let packed = || image.layers.iter().all(|layer| store.has_blob(&layer.blob_digest));
    let whole = || kept_index(store, reference, digest).is_some();
    let complete = (image.manifest_digest == *digest || of_index)
        && unpacked
        && (!options.packed || packed())
        && (!options.all_platforms || !of_index || whole());
    complete.then_some(image)
}

/// Matches layers with the diff ids of the config.
fn plan_layers(
    store: &Store,
    reference: &Reference,
    goal: &Goal,
    options: &PullOptions,
) -> Result<Vec<LayerPlan>, PullError> {
    let manifest = &goal.manifest;
    let diff_ids = manifest::lower_diff_ids(&goal.config, manifest.layers.len()).map_err(|detail| {
        PullError::Malformed {
            what: format!("the config of {reference}"),
            registry: reference.registry().to_owned(),
            detail,
        }
    })?;
    let total = manifest.layers.len();
    let whole = options.packed || goal.index.is_some();
    let unpacked_only = |layer: &Descriptor, diff_id: &Digest| {
        whole && store.has_layer(diff_id) && !store.has_blob(&layer.digest)
    };
    let mut plans: Vec<LayerPlan> = manifest
        .layers
        .iter()
        .zip(diff_ids)
        .enumerate()
        .map(|(index, (descriptor, diff_id))| LayerPlan {
            index,
            what: format!(
                "layer {} of {total} ({}) of {reference}",
                index + 1,
                &descriptor.digest.hex()[..12]
            ),
            diff_id: (!unpacked_only(descriptor, &diff_id)).then_some(diff_id),
            descriptor: descriptor.clone(),
        })
        .collect();
    for blob in goal.index.iter().flat_map(Index::blobs) {
        if blob.digest != manifest.config.digest && plans.iter().all(|p| p.descriptor.digest != blob.digest) {
            plans.push(LayerPlan {
                index: plans.len(),
                what: format!("{} of another platform of {reference}", &blob.digest.hex()[..12]),
                descriptor: Descriptor {
                    media_type: blob.media_type.clone(),
                    digest: blob.digest,
                    size: blob.size,
                    urls: Vec::new(),
                },
                diff_id: None,
            });
        }
    }
    Ok(plans)
}

/// A single image is what its author says, right or wrong; the index has no part in it. Only a word of warning.
fn warn_about_platform(reference: &Reference, config: &[u8], wanted: &Platform) {
    if let Some(claimed) = manifest::lower_config_platform(config)
        && wanted.distance(&claimed).is_none()
    {
        tracing::warn!(image = %reference, %claimed, %wanted, "the image says it is for another platform");
    }
}

async fn commit(
    store: &Arc<Store>,
    reference: &Reference,
    goal: Goal,
    pinned: bool,
) -> Result<Image, PullError> {
    let store = store.clone();
    let canonical = reference.canonical().to_owned();
    let registry = reference.registry().to_owned();
    let job = tokio::task::spawn_blocking(move || {
        let Goal { fetched, manifest, config, index } = goal;
        store.commit_indexed(&canonical, &fetched.body, &manifest.media_type, &config, pinned, index)
    });
    let what = format!("image {reference}");
    match job.await {
        Ok(Ok(image)) => Ok(image),
        Ok(Err(error)) => Err(PullError::from_commit(&what, &registry, error)),
        Err(panic) => Err(PullError::Setup { detail: format!("storing ended abnormally: {panic}") }),
    }
}
