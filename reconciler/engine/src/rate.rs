//! How fast a pull goes and how long it will still take, as a whole and layer by layer.

use keel_plan::{LayerState, PullStatus};

/// Long enough that one slow piece is no change of speed, short enough to be true now.
const WINDOW_MS: u64 = 5_000;
/// Of an image, between two events about it: a slow pull is four lines in the journal, not thousands.
const STEP_PERCENT: u64 = 25;

/// The last report of a pull, with its speed over the last whole window.
#[derive(Debug)]
pub struct PullRate {
    status: PullStatus,
    window_ms: u64,
    window_bytes: u64,
    /// By place in the image.
    window_layers: Vec<u64>,
    said_percent: u64,
}

impl PullRate {
    pub fn new(now_ms: u64) -> PullRate {
        PullRate {
            status: PullStatus::default(),
            window_ms: now_ms,
            window_bytes: 0,
            window_layers: Vec::new(),
            said_percent: 0,
        }
    }

    /// Takes a report, whose speeds are not looked at.
    pub fn take(&mut self, mut status: PullStatus, now_ms: u64) {
        let passed = now_ms.saturating_sub(self.window_ms);
        let over = passed >= WINDOW_MS;
        let rate = |done: u64, before: u64| done.saturating_sub(before).saturating_mul(1000) / passed.max(1);
        status.bytes_per_second = match over {
            true => Some(rate(status.done_bytes, self.window_bytes)),
            false => self.status.bytes_per_second,
        };
        for (at, layer) in status.layers.iter_mut().enumerate() {
            layer.bytes_per_second = match layer.state {
                LayerState::Fetching if over => {
                    Some(rate(layer.done_bytes, self.window_layers.get(at).copied().unwrap_or(0)))
                }
                LayerState::Fetching => self.status.layers.get(at).and_then(|before| before.bytes_per_second),
                LayerState::Queued | LayerState::Done | LayerState::Present => None,
            };
            layer.seconds_left = left(layer.total_bytes, layer.done_bytes, layer.bytes_per_second);
        }
        status.seconds_left = left(status.total_bytes, status.done_bytes, status.bytes_per_second);
        if over {
            self.window_ms = now_ms;
            self.window_bytes = status.done_bytes;
            self.window_layers = status.layers.iter().map(|layer| layer.done_bytes).collect();
        }
        self.status = status;
    }

    pub fn status(&self) -> &PullStatus {
        &self.status
    }

    /// Whether it is worth an event: a quarter further, and slow enough to have a speed.
    pub(crate) fn is_news(&mut self) -> bool {
        let percent = (self.status.done_bytes * 100).checked_div(self.status.total_bytes).unwrap_or(0);
        let step = percent - percent % STEP_PERCENT;
        let news = self.status.bytes_per_second.is_some() && step > self.said_percent && step < 100;
        if news {
            self.said_percent = step;
        }
        news
    }
}

fn left(total: u64, done: u64, rate: Option<u64>) -> Option<u64> {
    total.saturating_sub(done).checked_div(rate?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_plan::LayerStatus;

    #[test]
    fn speed_and_time_left_are_of_the_last_seconds() {
        let mut rate = PullRate::new(0);
        let mut at = |done_bytes: u64, now_ms: u64| {
            let progress =
                PullStatus { done_bytes, total_bytes: 100_000, layers_total: 2, ..PullStatus::default() };
            rate.take(progress, now_ms);
            rate.status().to_string()
        };
        assert_eq!(at(1_000, 1_000), "1000 of 100000 bytes, 0 of 2 layers");
        assert!(at(50_000, 5_000).ends_with(", 10000 bytes/s, 5 s left"));
        assert!(at(51_000, 6_000).ends_with(", 10000 bytes/s, 4 s left"), "the window is not over");
        assert!(at(60_000, 10_000).ends_with(", 2000 bytes/s, 20 s left"));
        assert!(at(60_000, 16_000).ends_with(", 0 bytes/s, stalled"));
    }

    fn layer(state: LayerState, done_bytes: u64) -> LayerStatus {
        LayerStatus {
            digest: "sha256:x".into(),
            state,
            done_bytes,
            total_bytes: 50_000,
            bytes_per_second: None,
            seconds_left: None,
        }
    }

    #[test]
    fn each_layer_has_a_speed_of_its_own_while_it_is_fetched() {
        let mut rate = PullRate::new(0);
        let mut at = |layers: [LayerStatus; 2], now_ms| {
            let done_bytes = layers.iter().map(|layer| layer.done_bytes).sum();
            let layers = layers.to_vec();
            rate.take(
                PullStatus { done_bytes, total_bytes: 100_000, layers, ..PullStatus::default() },
                now_ms,
            );
            rate.status().layers.iter().map(|l| (l.bytes_per_second, l.seconds_left)).collect::<Vec<_>>()
        };
        use LayerState::{Done, Fetching, Queued};
        assert_eq!(at([layer(Fetching, 5_000), layer(Queued, 0)], 1_000), [(None, None), (None, None)]);
        assert_eq!(
            at([layer(Fetching, 25_000), layer(Queued, 0)], 5_000),
            [(Some(5_000), Some(5)), (None, None)]
        );
        let both = at([layer(Fetching, 30_000), layer(Fetching, 10_000)], 10_000);
        assert_eq!(both, [(Some(1_000), Some(20)), (Some(2_000), Some(20))]);
        assert_eq!(
            at([layer(Done, 50_000), layer(Fetching, 20_000)], 11_000),
            [(None, None), (Some(2_000), Some(15))]
        );
    }

    #[test]
    fn a_quick_pull_is_no_news_and_a_slow_one_is_four_times_at_most() {
        let mut rate = PullRate::new(0);
        let mut news = Vec::new();
        for second in 1..=100 {
            let done_bytes = second * 1_000;
            rate.take(
                PullStatus { done_bytes, total_bytes: 100_000, ..PullStatus::default() },
                second * 1_000,
            );
            if rate.is_news() {
                news.push(second);
            }
        }
        assert_eq!(news, [25, 50, 75]);
        let mut quick = PullRate::new(0);
        quick.take(PullStatus { done_bytes: 90, total_bytes: 100, ..PullStatus::default() }, 4_000);
        assert!(!quick.is_news());
    }
}
