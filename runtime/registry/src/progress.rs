//! What a pull tells while it runs.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keel_store::Digest;

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
    pub(crate) fn new(report: OnProgress, layers: impl Iterator<Item = (Digest, u64)>) -> Self {
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
        report(progress.clone());
        Self { state: Mutex::new((progress, None)), report }
    }

    pub(crate) fn fetched(&self, layer: usize, done_bytes: u64) {
        self.update(layer, done_bytes, LayerState::Fetching, false);
    }

    pub(crate) fn finished(&self, layer: usize, state: LayerState) {
        self.update(layer, u64::MAX, state, true);
    }

    fn update(&self, layer: usize, done_bytes: u64, state: LayerState, must_report: bool) {
        let snapshot = {
            let mut guard = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (progress, reported) = &mut *guard;
            let entry = &mut progress.layers[layer];
            let before = entry.done_bytes;
            entry.done_bytes = done_bytes.min(entry.total_bytes);
            progress.done_bytes = progress.done_bytes - before + entry.done_bytes;
            entry.state = state;
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
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").finish_non_exhaustive()
    }
}
