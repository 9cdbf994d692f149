//! Room on the disk that images are on: what can be had again goes first, and what is declared, runs or is pinned never.
//!
//! ```text
//! above `evict_above` percent, or a pull has found the disk full
//!   -> partial blobs -> blobs of unpacked layers -> unreferenced images, least recently used first
//! until `evict_to` percent; each step that frees something is an event
//! ```

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use keel_store::{Collected, Digest, ImageError, Roots, Space, Store};

use crate::RealHost;
use crate::error::chain;

/// In percent of the space or of the inodes, whichever is scarcer. The defaults are the kubelet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eviction {
    pub above: u8,
    pub to: u8,
}

impl Default for Eviction {
    fn default() -> Eviction {
        Eviction { above: 85, to: 80 }
    }
}

/// Takes the reason and the message of a warning.
type Tell = Box<dyn Fn(&str, &str) + Send + Sync>;

/// What an image collection has to know and whom it tells.
pub struct StorageHooks {
    /// `None` as long as it is not known what is declared: then no image goes.
    pub roots: Box<dyn Fn() -> Option<Roots> + Send + Sync>,
    pub tell: Tell,
}

pub(crate) type Hooks = OnceLock<StorageHooks>;

impl RealHost {
    pub fn on_storage(&self, hooks: StorageHooks) {
        let _ = self.storage.set(hooks);
    }

    /// One look, for a thread that may block.
    pub fn relieve_disk(&self) {
        Relief::of(self, false).run();
    }

    /// Removes what nothing reaches any more. Left-overs are small, so rarely is enough.
    pub fn collect_unreachable(&self) {
        let Some(roots) = self.storage.get().and_then(|hooks| (hooks.roots)()) else { return };
        match self.store.collect_unreachable(&roots.manifests) {
            Ok(done) if done.layers + done.blobs + done.partials > 0 => {
                tracing::info!(
                    layers = done.layers,
                    blobs = done.blobs,
                    bytes = done.freed_bytes,
                    "collected"
                );
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(error = chain(&error), "collect what nothing reaches"),
        }
    }

    pub(crate) fn tell_storage(&self, reason: &str, message: &str) {
        Relief::of(self, false).tell(reason, message);
    }

    /// After a pull has found the disk full: whether something was freed.
    pub(crate) fn make_room(&self) -> bool {
        Relief::of(self, true).run()
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Partials,
    Blobs,
    Images,
}

struct Relief<'a> {
    store: &'a Arc<Store>,
    hooks: Option<&'a StorageHooks>,
    limits: Eviction,
    /// The disk was found full, whatever its numbers say now that the pull has given its space back.
    forced: bool,
}

impl<'a> Relief<'a> {
    fn of(host: &'a RealHost, forced: bool) -> Relief<'a> {
        Relief { store: &host.store, hooks: host.storage.get(), limits: host.config.eviction, forced }
    }

    /// Whether something was freed.
    fn run(&self) -> bool {
        let Some(before) = self.used() else { return false };
        if !self.forced && before <= self.limits.above {
            return false;
        }
        let enough = || self.used().is_none_or(|used| used <= self.limits.to);
        let roots = self.hooks.and_then(|hooks| (hooks.roots)());
        let mut freed = 0;
        for step in [Step::Partials, Step::Blobs, Step::Images] {
            let until = self.until(&enough);
            let done = match (step, &roots) {
                (Step::Partials, _) => self.store.drop_partials().map_err(ImageError::from),
                (Step::Blobs, _) => self.store.drop_unpacked_blobs(&until),
                (Step::Images, Some(roots)) => self.store.evict_images(roots, &until),
                (Step::Images, None) => Ok(Collected::default()),
            };
            match done {
                Ok(done) if done != Collected::default() => {
                    freed += done.freed_bytes;
                    self.tell_step(before, step, &done);
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(error = chain(&error), ?step, "make room"),
            }
            if enough() && (!self.forced || freed > 0) {
                return freed > 0;
            }
        }
        if let Some(used) = self.used().filter(|used| *used > self.limits.above) {
            let message = format!(
                "{used}% of the disk or its inodes are used (limit {}%) and nothing is left to remove: the rest belongs to declared, running or pinned images, or to others",
                self.limits.above
            );
            self.tell("DiskPressure", &message);
        }
        freed > 0
    }

    /// A forced step goes through at least until the numbers are right; one that finds them right goes through whole,
    /// since they have not kept the disk from being full.
    fn until<'f>(&self, enough: &'f dyn Fn() -> bool) -> impl Fn() -> bool + 'f {
        let whole = self.forced && enough();
        move || !whole && enough()
    }

    fn used(&self) -> Option<u8> {
        self.store.space().ok().map(|space: Space| space.used_percent())
    }

    fn tell_step(&self, before: u8, step: Step, done: &Collected) {
        let (count, what) = match step {
            Step::Partials => (done.partials, "partial blobs"),
            Step::Blobs => (done.blobs, "blobs of unpacked layers"),
            Step::Images => (done.images.len() as u64, "unreferenced images"),
        };
        let names = match done.images.is_empty() {
            true => String::new(),
            false => format!(" ({})", done.images.join(", ")),
        };
        let mib = done.freed_bytes >> 20;
        let message = format!("disk {before}% used: removed {count} {what}{names}, {mib} MiB");
        self.tell("Evicted", &message);
    }

    fn tell(&self, reason: &str, message: &str) {
        match self.hooks {
            Some(hooks) => (hooks.tell)(reason, message),
            None => tracing::warn!(reason, "{message}"),
        }
    }
}

/// What manifests declare and what runs, as the roots of a collection.
pub fn image_roots(declared: BTreeSet<String>, status: &keel_plan::Status) -> Roots {
    let containers = || {
        status.pods.iter().flat_map(|pod| pod.init_container_statuses.iter().chain(&pod.container_statuses))
    };
    let digest = |id: &str| id.rsplit_once('@').map_or(id, |(_, digest)| digest).parse::<Digest>().ok();
    let mut references = declared;
    references.extend(containers().map(|container| container.image.clone()));
    let manifests = containers().filter_map(|container| digest(&container.image_id)).collect();
    Roots { references, manifests }
}
