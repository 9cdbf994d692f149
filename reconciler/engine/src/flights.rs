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
                Action::Pull { .. } => counted(is_pull) < settings.max_pulls,
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
        self.flights
            .insert(ticket, Flight { action, reason, started_ms: now_ms, deadline_ms, overdue: false });
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

fn is_pull(action: &Action) -> bool {
    matches!(action, Action::Pull { .. })
}

fn is_stop(action: &Action) -> bool {
    matches!(action, Action::StopContainer { .. })
}
