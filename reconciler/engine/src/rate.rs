//! How fast a pull goes and how long it will still take.

use std::fmt;

use crate::ports::Progress;

/// Long enough that one slow piece is no change of speed, short enough to be true now.
const WINDOW_MS: u64 = 5_000;

/// The last report of a pull, and its speed over the last whole window.
#[derive(Debug)]
pub(crate) struct PullRate {
    progress: Progress,
    window_ms: u64,
    window_bytes: u64,
    bytes_per_second: Option<u64>,
}

impl PullRate {
    pub(crate) fn new(now_ms: u64) -> PullRate {
        PullRate { progress: Progress::default(), window_ms: now_ms, window_bytes: 0, bytes_per_second: None }
    }

    pub(crate) fn take(&mut self, progress: Progress, now_ms: u64) {
        let passed = now_ms.saturating_sub(self.window_ms);
        if passed >= WINDOW_MS {
            let bytes = progress.done_bytes.saturating_sub(self.window_bytes);
            self.bytes_per_second = Some(bytes.saturating_mul(1000) / passed);
            self.window_ms = now_ms;
            self.window_bytes = progress.done_bytes;
        }
        self.progress = progress;
    }
}

impl fmt::Display for PullRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Progress { done_bytes, total_bytes, layers_done, layers_total, .. } = &self.progress;
        write!(f, "{done_bytes} of {total_bytes} bytes, {layers_done} of {layers_total} layers")?;
        let Some(rate) = self.bytes_per_second else { return Ok(()) };
        write!(f, ", {rate} bytes/s")?;
        match total_bytes.saturating_sub(*done_bytes).checked_div(rate) {
            Some(seconds) => write!(f, ", {seconds} s left"),
            None => f.write_str(", stalled"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_and_time_left_are_of_the_last_seconds() {
        let mut rate = PullRate::new(0);
        let mut at = |done_bytes: u64, now_ms: u64| {
            let progress =
                Progress { done_bytes, total_bytes: 100_000, layers_total: 2, ..Progress::default() };
            rate.take(progress, now_ms);
            rate.to_string()
        };
        assert_eq!(at(1_000, 1_000), "1000 of 100000 bytes, 0 of 2 layers");
        assert!(at(50_000, 5_000).ends_with(", 10000 bytes/s, 5 s left"));
        assert!(at(51_000, 6_000).ends_with(", 10000 bytes/s, 4 s left"), "the window is not over");
        assert!(at(60_000, 10_000).ends_with(", 2000 bytes/s, 20 s left"));
        assert!(at(60_000, 16_000).ends_with(", 0 bytes/s, stalled"));
    }
}
