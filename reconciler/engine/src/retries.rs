//! When a failed action may be tried again: 10 s doubling to 300 s, at once at 300 s when trying is pointless until
//! something changes; pulls always double, as the kubelet does.

use std::collections::{BTreeMap, BTreeSet};

use keel_plan::PodKey;

use crate::flights::Work;
use crate::ports::{ActionError, Next};
use crate::settings::Settings;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Retry {
    delay_ms: u64,
    /// Monotonic.
    pub(crate) until_ms: u64,
    pub(crate) error: ActionError,
}

/// A success that changes nothing is a failure after this many repetitions: without the limit a host that forgets what
/// it did would be asked for it in a tight loop.
const MAX_FRUITLESS: u32 = 4;
/// Successes further apart than this are not a loop.
const FRUITLESS_WINDOW_MS: u64 = 30_000;
/// A failure this long after its wait says nothing about the next try.
const EXPIRY_MS: u64 = 600_000;

#[derive(Default)]
pub(crate) struct Retries {
    failed: BTreeMap<Work, Retry>,
    /// Successes (or stale plans) in a row whose effect has not shown.
    fruitless: BTreeMap<Work, (u32, u64)>,
}

impl Retries {
    pub(crate) fn failed(&mut self, work: Work, error: ActionError, settings: &Settings, now_ms: u64) {
        let before = self.failed.get(&work).map_or(0, |retry| retry.delay_ms);
        let delay_ms = match error.next {
            // An image that is not there is often on its way: the push was forgotten, or the mirror is behind.
            Next::Blocked if !matches!(work, Work::Pull(_)) => settings.retry_max_ms,
            Next::Blocked | Next::Retry => {
                before.saturating_mul(2).clamp(settings.retry_initial_ms, settings.retry_max_ms)
            }
        };
        self.fruitless.remove(&work);
        self.failed.insert(work, Retry { delay_ms, until_ms: now_ms.saturating_add(delay_ms), error });
    }

    /// `Some` when it succeeded once too often without effect.
    pub(crate) fn succeeded(&mut self, work: &Work, now_ms: u64) -> Option<ActionError> {
        self.failed.remove(work);
        self.fruitless(work, now_ms)
    }

    /// Like a success that shows no effect: the plan was made on an old view, and a new one is on its way.
    pub(crate) fn fruitless(&mut self, work: &Work, now_ms: u64) -> Option<ActionError> {
        let (times, last) = self.fruitless.entry(work.clone()).or_default();
        *times += 1;
        *last = now_ms;
        if *times <= MAX_FRUITLESS {
            return None;
        }
        let message = format!("done {times} times, and each time the host looked as before");
        Some(ActionError { next: Next::Retry, message, reason: "NoEffect", hint: None })
    }

    /// The wait that is not over, if any.
    pub(crate) fn waiting(&self, work: &Work, now_ms: u64) -> Option<&Retry> {
        self.failed.get(work).filter(|retry| retry.until_ms > now_ms)
    }

    pub(crate) fn error(&self, work: &Work) -> Option<&ActionError> {
        self.failed.get(work).map(|retry| &retry.error)
    }

    /// Forgets successes whose effect shows: the work is not planned any more. `settled` is false for work that the
    /// observation does not cover yet. Starts are remembered longer, since the leftover of one hides the plan for
    /// the next.
    pub(crate) fn keep_planned(
        &mut self,
        planned: &BTreeSet<Work>,
        settled: impl Fn(&Work) -> bool,
        now_ms: u64,
    ) {
        self.failed.retain(|_, retry| retry.until_ms.saturating_add(EXPIRY_MS) > now_ms);
        self.fruitless.retain(|work, (_, last)| {
            let open = planned.contains(work) || !settled(work) || matches!(work, Work::Start(..));
            open && last.saturating_add(FRUITLESS_WINDOW_MS) > now_ms
        });
    }

    /// A changed declaration deserves a try at once.
    pub(crate) fn forget_pod(&mut self, pod: &PodKey, images: &BTreeSet<&str>) {
        let about = |work: &Work| match work {
            Work::Pull(image) => images.contains(image.as_str()),
            other => other.pod() == Some(pod),
        };
        self.failed.retain(|work, _| !about(work));
        self.fruitless.retain(|work, _| !about(work));
    }

    pub(crate) fn next_deadline(&self, now_ms: u64) -> Option<u64> {
        self.failed.values().map(|retry| retry.until_ms).filter(|until| *until > now_ms).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_waits_longest_but_a_pull_comes_back_soon_and_ever_later() {
        let error = ActionError { next: Next::Blocked, message: "no".into(), reason: "X", hint: None };
        let settings = Settings::default();
        let mut retries = Retries::default();
        let mut delays = |work: Work, times: usize| -> Vec<u64> {
            let mut now = 0;
            let mut all = Vec::new();
            for _ in 0..times {
                retries.failed(work.clone(), error.clone(), &settings, now);
                let until = retries.next_deadline(now).unwrap();
                all.push((until - now) / 1000);
                now = until;
            }
            retries.succeeded(&work, now);
            all
        };
        assert_eq!(delays(Work::Pull("x".into()), 7), [10, 20, 40, 80, 160, 300, 300]);
        let key = PodKey { namespace: "default".into(), name: "web".into() };
        assert_eq!(delays(Work::Create(key), 2), [300, 300]);
    }
}
