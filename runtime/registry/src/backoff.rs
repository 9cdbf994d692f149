//! How long to wait before the next try. Pure: time and chance are parameters.

use std::time::{Duration, SystemTime};

use crate::error::{Patience, PullError};
use crate::progress::Tracker;

/// How one pull behaves when the other side does not.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// First delay; doubles with each failure in a row.
    pub base: Duration,
    /// Longest delay that we choose ourselves.
    pub cap: Duration,
    /// Longest `Retry-After` that is waited for inside a pull; beyond it the error is reported,
    /// so that whoever asked for the pull decides.
    pub retry_after_cap: Duration,
    /// Failures in a row before the error is reported.
    pub attempts: u32,
    /// The same for errors that rarely pass by themselves (refused, name not found, wrong digest).
    pub short_attempts: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(500),
            cap: Duration::from_secs(30),
            retry_after_cap: Duration::from_secs(120),
            attempts: 6,
            short_attempts: 2,
        }
    }
}

/// Counts failures in a row.
#[derive(Debug)]
pub(crate) struct Backoff<'a> {
    policy: &'a RetryPolicy,
    tracker: &'a Tracker,
    failures: u32,
}

impl<'a> Backoff<'a> {
    pub(crate) fn new(policy: &'a RetryPolicy, tracker: &'a Tracker) -> Self {
        Self { policy, tracker, failures: 0 }
    }

    /// Progress was made: the next failure is a first one again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The delay before the next try, or `None` when `error` is to be reported. `chance` is random.
    pub(crate) fn after(&mut self, error: &PullError, chance: u64) -> Option<Duration> {
        self.failures += 1;
        let attempts = match error.patience() {
            Patience::None => return None,
            Patience::Short => self.policy.short_attempts,
            Patience::Full => self.policy.attempts,
        };
        if self.failures >= attempts {
            return None;
        }
        let doubled = self.policy.base.saturating_mul(1 << (self.failures - 1).min(16));
        let delay = jitter(doubled.min(self.policy.cap), chance);
        match error {
            PullError::RateLimited { retry_after: Some(asked), .. }
            | PullError::Server { retry_after: Some(asked), .. } => {
                (*asked <= self.policy.retry_after_cap).then(|| delay.max(*asked))
            }
            _ => Some(delay),
        }
    }

    /// Waits before the next try, or gives the error back.
    pub(crate) async fn pause(&mut self, error: PullError) -> Result<(), PullError> {
        let delay = self.after(&error, random());
        self.pause_for(error, delay).await
    }

    /// The same with a delay that was decided on already.
    pub(crate) async fn pause_for(
        &mut self,
        error: PullError,
        delay: Option<Duration>,
    ) -> Result<(), PullError> {
        match delay {
            Some(delay) => {
                tracing::debug!(%error, delay_ms = delay.as_millis() as u64, "trying again");
                self.tracker.waiting(&error, delay);
                tokio::time::sleep(delay).await;
                Ok(())
            }
            None => Err(error),
        }
    }
}

/// Between half of `delay` and all of it, so that many hosts do not come back together.
pub(crate) fn jitter(delay: Duration, chance: u64) -> Duration {
    let half = delay / 2;
    half + half.mul_f64((chance >> 11) as f64 / (1u64 << 53) as f64)
}

/// Randomness for jitter only: the standard library's hash keys differ per call and per process.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// Reads `Retry-After`: seconds or an HTTP date (RFC 9110, 10.2.3).
pub(crate) fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let when = httpdate::parse_http_date(text).ok()?;
    Some(when.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent() -> Tracker {
        Tracker::new(std::sync::Arc::new(|_| {}))
    }

    fn limited(retry_after: Option<u64>) -> PullError {
        PullError::RateLimited { registry: "r".into(), retry_after: retry_after.map(Duration::from_secs) }
    }

    #[test]
    fn delays_double_stay_within_half_and_whole_and_end() {
        let policy = RetryPolicy::default();
        let tracker = silent();
        for chance in [0, u64::MAX / 2, u64::MAX] {
            let mut backoff = Backoff::new(&policy, &tracker);
            for expected_ms in [500, 1000, 2000, 4000, 8000] {
                let delay = backoff.after(&limited(None), chance).unwrap().as_millis();
                assert!((expected_ms / 2..=expected_ms).contains(&delay), "{delay}");
            }
            assert_eq!(backoff.after(&limited(None), chance), None);
            backoff.reset();
            assert!(backoff.after(&limited(None), chance).is_some());
        }
    }

    #[test]
    fn retry_after_is_kept_up_to_the_cap() {
        let policy = RetryPolicy::default();
        let tracker = silent();
        let after = |s| Backoff::new(&policy, &tracker).after(&limited(Some(s)), 0);
        assert_eq!(after(17), Some(Duration::from_secs(17)));
        assert_eq!(after(3600), None);
    }

    #[test]
    fn final_errors_are_not_tried_again() {
        let policy = RetryPolicy::default();
        let tracker = silent();
        let refused = PullError::Refused { registry: "r".into() };
        let unknown = PullError::UnknownCa { registry: "r".into() };
        assert_eq!(Backoff::new(&policy, &tracker).after(&unknown, 0), None);
        let mut backoff = Backoff::new(&policy, &tracker);
        assert!(backoff.after(&refused, 0).is_some());
        assert_eq!(backoff.after(&refused, 0), None);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let parse = |t| parse_retry_after(t, now).map(|d| d.as_secs());
        assert_eq!(parse("120"), Some(120));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:27 GMT"), Some(0));
        assert_eq!(parse("soon"), None);
        assert_eq!(parse("-1"), None);
    }
}
