//! What a pull tells while it runs.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keel_store::Digest;

use crate::error::PullError;

/// Bars are redrawn and events are sent at most this often; the last word of each layer always comes.
const INTERVAL: Duration = Duration::from_millis(100);

/// The state of a whole pull. Sizes are of compressed layers; the few kilobytes of documents are not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub layers_done: u32,
    pub layers_total: u32,
    /// In the order of the manifest, lowest first.
    pub layers: Vec<LayerProgress>,
    /// Something failed and is tried again after a pause; gone with the next bytes.
    pub waiting: Option<Waiting>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What failed, one line.
    pub reason: String,
    pub delay: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    pub digest: Digest,
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub state: LayerState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerState {
    /// Waits for its turn.
    Queued,
    Fetching,
    /// Fetched, unpacked and verified.
    Done,
    /// Was there before.
    Present,
}

pub type OnProgress = Arc<dyn Fn(PullProgress) + Send + Sync>;

/// Collects the layers' progress and passes it on, not too often.
pub(crate) struct Tracker {
    state: Mutex<(PullProgress, Option<Instant>)>,
    report: OnProgress,
}

impl Tracker {
    pub(crate) fn new(report: OnProgress) -> Self {
        Self { state: Mutex::default(), report }
    }

    /// The layers are known now.
    pub(crate) fn begin(&self, layers: impl Iterator<Item = (Digest, u64)>) {
        let layers: Vec<LayerProgress> = layers
            .map(|(digest, total_bytes)| LayerProgress {
                digest,
                done_bytes: 0,
                total_bytes,
                state: LayerState::Queued,
            })
            .collect();
        let progress = PullProgress {
            total_bytes: layers.iter().map(|l| l.total_bytes).sum(),
            layers_total: layers.len() as u32,
            layers,
            ..PullProgress::default()
        };
        self.lock().0 = progress.clone();
        (self.report)(progress);
    }

    /// The next try comes after `delay`.
    pub(crate) fn waiting(&self, error: &PullError, delay: Duration) {
        let snapshot = {
            let mut guard = self.lock();
            guard.0.waiting = Some(Waiting { reason: error.to_string(), delay });
            guard.0.clone()
        };
        (self.report)(snapshot);
    }

    pub(crate) fn fetched(&self, layer: usize, done_bytes: u64) {
        self.update(layer, done_bytes, LayerState::Fetching, false);
    }

    pub(crate) fn finished(&self, layer: usize, state: LayerState) {
        self.update(layer, u64::MAX, state, true);
    }

    fn update(&self, layer: usize, done_bytes: u64, state: LayerState, must_report: bool) {
        let snapshot = {
            let mut guard = self.lock();
            let (progress, reported) = &mut *guard;
            let entry = &mut progress.layers[layer];
            let before = entry.done_bytes;
            entry.done_bytes = done_bytes.min(entry.total_bytes);
            progress.done_bytes = progress.done_bytes - before + entry.done_bytes;
            entry.state = state;
            progress.waiting = None;
            if must_report {
                progress.layers_done += 1;
            }
            let now = Instant::now();
            if !must_report && reported.is_some_and(|at| now - at < INTERVAL) {
                return;
            }
            *reported = Some(now);
            progress.clone()
        };
        (self.report)(snapshot);
    }

    fn lock(&self) -> MutexGuard<'_, (PullProgress, Option<Instant>)> {
        // Numbers for people: worth showing even after a panic in a callback.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").finish_non_exhaustive()
    }
}
