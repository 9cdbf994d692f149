//! All places that may have an image: asked in turn, the ones that failed lately last.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use keel_store::Digest;

use crate::backoff::{Backoff, RetryPolicy};
use crate::error::{PullError, with_places};
use crate::manifest::Descriptor;
use crate::progress::Tracker;
use crate::reference::Reference;
use crate::session::{CONFIG_LIMIT, Fetched, Session};

/// How long a place that failed is asked last; doubles while it goes on failing. Long enough that the layers of one
/// image do not each wait for a dead mirror, short enough that a restarted one is used again soon.
const SICK: Duration = Duration::from_secs(30);
const SICK_MAX: Duration = Duration::from_secs(600);
/// Places are as many as the configuration names; beyond this the memory starts afresh.
const MAX_SICK: usize = 256;

/// Which places failed lately. Shared by all pulls of a client.
#[derive(Debug, Default)]
pub(crate) struct Health(Mutex<BTreeMap<String, Sickness>>);

#[derive(Debug)]
struct Sickness {
    until: Instant,
    lasted: Duration,
}

impl Health {
    fn is_sick(&self, place: &str, now: Instant) -> bool {
        self.lock().get(place).is_some_and(|sickness| sickness.until > now)
    }

    fn well(&self, place: &str) {
        self.lock().remove(place);
    }

    fn sick(&self, place: &str, now: Instant) {
        let mut places = self.lock();
        if places.len() >= MAX_SICK && !places.contains_key(place) {
            places.clear();
        }
        let sickness =
            places.entry(place.to_owned()).or_insert_with(|| Sickness { until: now, lasted: Duration::ZERO });
        // Layers that fail together are one failure.
        if sickness.until <= now {
            sickness.lasted = (sickness.lasted * 2).clamp(SICK, SICK_MAX);
            sickness.until = now + sickness.lasted;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Sickness>> {
        // Whole at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One image's places, the registry that its name says last.
pub(crate) struct Source<'a> {
    pub(crate) reference: &'a Reference,
    pub(crate) tracker: &'a Tracker,
    pub(crate) retry: &'a RetryPolicy,
    sessions: Vec<Session<'a>>,
    health: &'a Health,
}

/// What a place is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// What a tag means.
    Resolve,
    /// Something whose digest is known.
    Pull,
}

/// Walks the places for one request, round by round with a pause between two.
pub(crate) struct Turns<'a> {
    source: &'a Source<'a>,
    need: Need,
    queue: VecDeque<usize>,
    failures: Vec<(usize, PullError)>,
    backoff: Backoff<'a>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(
        reference: &'a Reference,
        tracker: &'a Tracker,
        retry: &'a RetryPolicy,
        sessions: Vec<Session<'a>>,
        health: &'a Health,
    ) -> Self {
        Self { reference, tracker, retry, sessions, health }
    }

    pub(crate) fn places(&self) -> usize {
        self.sessions.len()
    }

    pub(crate) fn turns(&'a self, need: Need) -> Turns<'a> {
        let backoff = Backoff::new(self.retry, self.tracker);
        Turns { source: self, need, queue: VecDeque::new(), failures: Vec::new(), backoff }
    }

    /// Fetches a manifest or index by tag or digest, checked against the digest.
    pub(crate) async fn document(
        &self,
        selector: &str,
        expected: Option<&Digest>,
        size: Option<u64>,
    ) -> Result<Fetched, PullError> {
        let mut turns = self.turns(if expected.is_some() { Need::Pull } else { Need::Resolve });
        loop {
            match turns.session().document_once(selector, expected, size).await {
                Ok(fetched) => {
                    turns.succeeded();
                    return Ok(fetched);
                }
                Err(error) => turns.failed(error).await?,
            }
        }
    }

    /// The same by digest, whatever it is a manifest of.
    pub(crate) async fn raw(&self, digest: &Digest, size: u64) -> Result<Bytes, PullError> {
        let mut turns = self.turns(Need::Pull);
        loop {
            match turns.session().raw_once(&digest.to_string(), Some(digest), Some(size)).await {
                Ok(raw) => {
                    turns.succeeded();
                    return Ok(raw.body);
                }
                Err(error) => turns.failed(error).await?,
            }
        }
    }

    /// Fetches an image config, checked against its descriptor.
    pub(crate) async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, PullError> {
        let what = format!("the config of {}", self.reference);
        if descriptor.size > CONFIG_LIMIT {
            return Err(PullError::TooLarge {
                what,
                registry: self.reference.registry().to_owned(),
                limit: CONFIG_LIMIT,
            });
        }
        let mut turns = self.turns(Need::Pull);
        loop {
            match turns.session().config_once(descriptor, &what).await {
                Ok(body) => {
                    turns.succeeded();
                    return Ok(body);
                }
                Err(error) => turns.failed(error).await?,
            }
        }
    }

    /// What these places gave turned out to be wrong.
    pub(crate) fn blame(&self, places: impl IntoIterator<Item = usize>) {
        let now = Instant::now();
        for place in places {
            self.health.sick(self.sessions[place].place(), now);
        }
    }
}

impl<'a> Turns<'a> {
    /// The place whose turn it is.
    pub(crate) fn place(&mut self) -> usize {
        if self.queue.is_empty() {
            self.begin_round();
        }
        // Without any that may be asked, the last one has the last word.
        self.queue.front().copied().unwrap_or(self.source.sessions.len() - 1)
    }

    pub(crate) fn session(&mut self) -> &'a Session<'a> {
        let place = self.place();
        &self.source.sessions[place]
    }

    /// The current place did what it was asked for.
    pub(crate) fn succeeded(&mut self) {
        let place = self.place();
        self.source.health.well(self.source.sessions[place].place());
    }

    /// Progress was made: the next failure is a first one again.
    pub(crate) fn reset(&mut self) {
        self.backoff.reset();
        self.failures.clear();
    }

    /// On to the next place; after the last one a pause, or the end.
    pub(crate) async fn failed(&mut self, error: PullError) -> Result<(), PullError> {
        let place = self.place();
        self.queue.pop_front();
        if error.is_the_places_fault() {
            self.source.blame([place]);
        }
        if !self.queue.is_empty() {
            let next = &self.source.sessions[self.queue[0]].endpoint.registry;
            tracing::debug!(%error, %next, "asking elsewhere");
        }
        self.failures.push((place, error));
        if self.queue.is_empty() { self.end_round().await } else { Ok(()) }
    }

    fn begin_round(&mut self) {
        let now = Instant::now();
        let fits = |session: &Session<'_>| match self.need {
            Need::Resolve => session.endpoint.resolves,
            Need::Pull => session.endpoint.pulls,
        };
        let (sick, well): (Vec<usize>, Vec<usize>) = (0..self.source.sessions.len())
            .filter(|place| fits(&self.source.sessions[*place]))
            .partition(|place| self.source.health.is_sick(self.source.sessions[*place].place(), now));
        self.queue.extend(well.into_iter().chain(sick));
    }

    async fn end_round(&mut self) -> Result<(), PullError> {
        let mut failures = std::mem::take(&mut self.failures);
        let at = failures
            .iter()
            .rposition(|(place, _)| self.source.sessions[*place].endpoint.origin)
            .unwrap_or(failures.len() - 1);
        let (_, last) = failures.remove(at);
        // The last word of the registry itself is final; otherwise the most hopeful failure says how long to wait.
        let most_hopeful = failures
            .iter()
            .map(|(_, error)| error)
            .filter(|error| last.patience().is_some() && error.patience() > last.patience())
            .max_by_key(|error| error.patience());
        let delay = self.backoff.after(most_hopeful.unwrap_or(&last), crate::backoff::random());
        let others = failures
            .iter()
            .map(|(place, error)| (self.source.sessions[*place].endpoint.registry.as_str(), error));
        let error = with_places(last, others);
        self.backoff.pause_for(error, delay).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_goes_on_failing_is_avoided_for_longer() {
        let health = Health::default();
        let begin = Instant::now();
        let after = |s: u64| begin + Duration::from_secs(s);
        health.sick("m", begin);
        health.sick("m", begin);
        assert!(health.is_sick("m", after(29)) && !health.is_sick("m", after(31)), "two at once are one");
        health.sick("m", after(31));
        assert!(health.is_sick("m", after(90)) && !health.is_sick("m", after(92)));
        health.well("m");
        assert!(!health.is_sick("m", after(32)));
        health.sick("m", after(40));
        assert!(!health.is_sick("m", after(71)), "once well, it starts again");
    }
}
