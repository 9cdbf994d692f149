//! Actions under way: what they lock, how many there may be, and when one takes too long.

use std::collections::{BTreeMap, BTreeSet};

use keel_plan::{Action, ContainerId, ContainerName, PodKey, Reason, SpecHash};

use crate::core::Ticket;
use crate::settings::Settings;

/// What an action needs for itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lock {
    /// The pod as a whole: no other action on it, and none on its containers.
    Pod(PodKey),
    /// Starts of one container: one at a time, whatever the attempt.
    Start(PodKey, ContainerName),
    /// One run.
    Run(PodKey, ContainerId),
    Image(String),
    Network,
}

/// Identity of an action for retries: the same work, whenever it is planned.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    Pull(String),
    Create(PodKey),
    Start(PodKey, ContainerName),
    Stop(PodKey, ContainerId),
    Remove(PodKey, ContainerId),
    Volumes(PodKey),
    Record(PodKey),
    Delete(PodKey),
    Network(SpecHash),
}

pub(crate) struct Flight {
    pub(crate) action: Action,
    pub(crate) reason: Reason,
    pub(crate) started_ms: u64,
    /// When it takes suspiciously long. Pulls move it with their progress.
    pub(crate) deadline_ms: u64,
    pub(crate) overdue: bool,
    /// Nobody wants it any more, and the host was told; how it ends does not matter.
    pub(crate) cancelled: bool,
}

/// An action that hangs (a dead network file system, a stuck kernel) gives its place free after its deadline, so that
/// the rest of the host goes on. More than this many hanging ones mean that the host is beyond help: nothing new starts.
const MAX_OVERDUE: usize = 64;
const DEADLINE_MS: u64 = 60_000;
/// Beyond the grace period: kill, reap, log drain.
const STOP_EXTRA_MS: u64 = 20_000;

#[derive(Default)]
pub(crate) struct Flights {
    flights: BTreeMap<Ticket, Flight>,
    locks: BTreeSet<Lock>,
    pods: BTreeMap<PodKey, usize>,
}

impl Work {
    pub(crate) fn of(action: &Action) -> Work {
        match action {
            Action::Pull { image, .. } => Work::Pull(image.clone()),
            Action::CreatePod { pod } => Work::Create(pod.key.clone()),
            Action::StartContainer { pod, container, .. } => Work::Start(pod.key.clone(), container.clone()),
            Action::StopContainer { pod, id, .. } => Work::Stop(pod.clone(), id.clone()),
            Action::RemoveContainer { pod, id } => Work::Remove(pod.clone(), id.clone()),
            Action::SyncVolumes { pod, .. } => Work::Volumes(pod.key.clone()),
            Action::UpdateRecord { pod, .. } => Work::Record(pod.key.clone()),
            Action::DeletePod { pod, .. } => Work::Delete(pod.clone()),
            Action::SyncNetwork { hash, .. } => Work::Network(hash.clone()),
        }
    }

    pub(crate) fn pod(&self) -> Option<&PodKey> {
        match self {
            Work::Create(pod)
            | Work::Start(pod, _)
            | Work::Stop(pod, _)
            | Work::Remove(pod, _)
            | Work::Volumes(pod)
            | Work::Record(pod)
            | Work::Delete(pod) => Some(pod),
            Work::Pull(_) | Work::Network(_) => None,
        }
    }
}

/// The pod that an action changes. A pull changes none.
pub(crate) fn pod_of(action: &Action) -> Option<&PodKey> {
    match action {
        Action::CreatePod { pod }
        | Action::StartContainer { pod, .. }
        | Action::SyncVolumes { pod, .. }
        | Action::UpdateRecord { pod, .. } => Some(&pod.key),
        Action::StopContainer { pod, .. }
        | Action::RemoveContainer { pod, .. }
        | Action::DeletePod { pod, .. } => Some(pod),
        Action::Pull { .. } | Action::SyncNetwork { .. } => None,
    }
}

fn locks(action: &Action) -> Vec<Lock> {
    match action {
        Action::Pull { image, .. } => vec![Lock::Image(image.clone())],
        Action::SyncNetwork { .. } => vec![Lock::Network],
        Action::StartContainer { pod, container, attempt, .. } => vec![
            Lock::Start(pod.key.clone(), container.clone()),
            Lock::Run(pod.key.clone(), pod.container_id(container, *attempt)),
        ],
        Action::StopContainer { pod, id, .. } | Action::RemoveContainer { pod, id } => {
            vec![Lock::Run(pod.clone(), id.clone())]
        }
        Action::CreatePod { pod } | Action::SyncVolumes { pod, .. } | Action::UpdateRecord { pod, .. } => {
            vec![Lock::Pod(pod.key.clone())]
        }
        Action::DeletePod { pod, .. } => vec![Lock::Pod(pod.clone())],
    }
}

impl Flights {
    /// False while something under way excludes it.
    pub(crate) fn is_free(&self, action: &Action) -> bool {
        let locks = locks(action);
        if locks.iter().any(|lock| self.locks.contains(lock)) {
            return false;
        }
        let Some(pod) = pod_of(action) else { return true };
        match locks.first() {
            Some(Lock::Pod(_)) => !self.pods.contains_key(pod),
            // What a start relies on (the runs of init containers) stays until it has ended.
            _ if matches!(action, Action::RemoveContainer { .. }) => {
                !self.locks.contains(&Lock::Pod(pod.clone())) && !self.has_start(pod)
            }
            _ => !self.locks.contains(&Lock::Pod(pod.clone())),
        }
    }

    /// False while its kind has no room.
    pub(crate) fn has_room(&self, action: &Action, settings: &Settings) -> bool {
        let counted = |wanted: fn(&Action) -> bool| {
            self.flights.values().filter(|f| !f.overdue && wanted(&f.action)).count()
        };
        let overdue = self.flights.values().filter(|f| f.overdue).count();
        overdue < MAX_OVERDUE
            && match action {
                Action::Pull { image, .. } => {
                    let same = |f: &&Flight| matches!(&f.action, Action::Pull { image: other, .. } if registry(other) == registry(image));
                    let of_registry = self.flights.values().filter(|f| !f.overdue).filter(same).count();
                    counted(is_pull) < settings.max_pulls && of_registry < settings.max_pulls_per_registry
                }
                Action::StopContainer { .. } => counted(is_stop) < settings.max_stops,
                Action::SyncNetwork { .. } => true,
                _ => counted(|a| !is_pull(a) && !is_stop(a)) < settings.max_actions,
            }
    }

    pub(crate) fn begin(&mut self, ticket: Ticket, action: Action, reason: Reason, now_ms: u64) {
        self.locks.extend(locks(&action));
        if let Some(pod) = pod_of(&action) {
            *self.pods.entry(pod.clone()).or_default() += 1;
        }
        let allowed = match &action {
            Action::StopContainer { grace_ms, .. } => grace_ms.saturating_add(STOP_EXTRA_MS),
            _ => DEADLINE_MS,
        };
        let deadline_ms = now_ms.saturating_add(allowed);
        self.flights.insert(
            ticket,
            Flight { action, reason, started_ms: now_ms, deadline_ms, overdue: false, cancelled: false },
        );
    }

    pub(crate) fn end(&mut self, ticket: Ticket) -> Option<Flight> {
        let flight = self.flights.remove(&ticket)?;
        for lock in locks(&flight.action) {
            self.locks.remove(&lock);
        }
        if let Some(pod) = pod_of(&flight.action)
            && let Some(count) = self.pods.get_mut(pod)
        {
            *count -= 1;
            if *count == 0 {
                self.pods.remove(pod);
            }
        }
        Some(flight)
    }

    pub(crate) fn progress(&mut self, ticket: Ticket, now_ms: u64) {
        if let Some(flight) = self.flights.get_mut(&ticket) {
            flight.deadline_ms = now_ms.saturating_add(DEADLINE_MS);
            flight.overdue = false;
        }
    }

    /// Marks the pulls under way that fail `wanted`; gives those that were not marked before.
    pub(crate) fn cancel_pulls(&mut self, wanted: impl Fn(&str, &PodKey) -> bool) -> Vec<Ticket> {
        let mut cancelled = Vec::new();
        for (ticket, flight) in &mut self.flights {
            if let Action::Pull { image, pod, .. } = &flight.action
                && !flight.cancelled
                && !wanted(image, pod)
            {
                flight.cancelled = true;
                cancelled.push(*ticket);
            }
        }
        cancelled
    }

    /// Flights whose deadline has just passed.
    pub(crate) fn newly_overdue(&mut self, now_ms: u64) -> Vec<(Action, u64)> {
        let late = self.flights.values_mut().filter(|f| !f.overdue && f.deadline_ms <= now_ms);
        late.map(|flight| {
            flight.overdue = true;
            (flight.action.clone(), now_ms.saturating_sub(flight.started_ms))
        })
        .collect()
    }

    pub(crate) fn overdue(&self) -> impl Iterator<Item = &Flight> {
        self.flights.values().filter(|flight| flight.overdue)
    }

    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.flights.values().filter(|f| !f.overdue).map(|f| f.deadline_ms).min()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    pub(crate) fn has_pod(&self, pod: &PodKey) -> bool {
        self.pods.contains_key(pod)
    }

    fn has_start(&self, pod: &PodKey) -> bool {
        self.locks.iter().any(|lock| matches!(lock, Lock::Start(key, _) if key == pod))
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &PodKey> {
        self.pods.keys()
    }

    pub(crate) fn has_network(&self) -> bool {
        self.locks.contains(&Lock::Network)
    }

    pub(crate) fn actions(&self) -> impl Iterator<Item = (&Action, &Reason)> {
        self.flights.values().map(|flight| (&flight.action, &flight.reason))
    }
}

/// References are canonical: the registry is all before the first slash.
fn registry(image: &str) -> &str {
    image.split('/').next().unwrap_or(image)
}

fn is_pull(action: &Action) -> bool {
    matches!(action, Action::Pull { .. })
}

fn is_stop(action: &Action) -> bool {
    matches!(action, Action::StopContainer { .. })
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_manifest::model::PullPolicy;

    #[test]
    fn a_slow_registry_holds_up_only_its_own_images() {
        let pull = |image: &str| Action::Pull {
            image: image.into(),
            policy: PullPolicy::IfNotPresent,
            pod: PodKey { namespace: "default".into(), name: "web".into() },
            secrets: Vec::new(),
        };
        let settings = Settings { max_pulls: 5, max_pulls_per_registry: 2, ..Settings::default() };
        let mut flights = Flights::default();
        let mut begin = |ticket: u64, image: &str| {
            let free = flights.has_room(&pull(image), &settings);
            if free {
                flights.begin(Ticket(ticket), pull(image), Reason::ImageMissing, 0);
            }
            free
        };
        assert!(begin(1, "slow.example/a:1") && begin(2, "slow.example/b:1"));
        assert!(!begin(3, "slow.example/c:1"));
        assert!(begin(4, "slow.example.org/c:1") && begin(5, "quick:5000/c:1") && begin(6, "quick:5000/d:1"));
        assert!(!begin(7, "third.example/a:1"), "five of all");
    }
}
