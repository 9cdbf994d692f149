//! Counting exits: restart counts, back-off deadlines, and the forgetting of what no longer exists.
//!
//! The kubelet's numbers: the first restart is immediate, then 10 s doubling to 300 s, counted from the exit; ten
//! minutes of running start afresh.

use std::collections::BTreeSet;

use keel_manifest::model::RestartPolicy;

use crate::model::{
    ContainerMemory, ContainerState, Desired, DesiredContainer, DesiredPod, Exit, Memory, Millis, Observed,
    ObservedContainer, ObservedPod, PodId, PodMemory,
};
use crate::planner::Settings;

/// What Kubernetes reports for a container whose end nobody saw.
const LOST_EXIT_CODE: i32 = 137;

/// Brings the memory up to date with what is observed. Returns the pods whose memory changed; those that are no
/// longer in it are to be forgotten. Doing it twice changes nothing.
pub fn account(
    memory: &mut Memory,
    desired: &Desired,
    observed: &Observed,
    settings: &Settings,
    now: Millis,
) -> BTreeSet<PodId> {
    let (mut changed, mut wanted) = (BTreeSet::new(), 0);
    for (key, pod) in &desired.pods {
        let seen = observed.pods.get(key).filter(|seen| seen.pod.sandbox_hash == pod.sandbox_hash);
        let known = memory.pods.get_mut(&pod.id);
        if known.is_none() && !seen.is_some_and(|seen| seen.containers.iter().any(has_ended)) {
            continue;
        }
        let known = match known {
            Some(known) => known,
            None => memory.pods.entry(pod.id.clone()).or_default(),
        };
        wanted += 1;
        if account_pod(known, pod, seen, settings, now) {
            changed.insert(pod.id.clone());
        }
    }
    if wanted < memory.pods.len() {
        changed.extend(forget(memory, desired, observed));
    }
    changed
}

/// Uses up the number of an attempt. Called, and the memory saved, before the attempt begins: so the number is never used
/// again, whatever happens to it.
pub fn remember_attempt(memory: &mut Memory, pod: &DesiredPod, container: &DesiredContainer, attempt: u32) {
    let memory = memory.pods.entry(pod.id.clone()).or_default();
    memory.adopt(pod);
    let entry = memory.container_mut(container);
    entry.next_attempt = entry.next_attempt.max(attempt.saturating_add(1));
}

/// True when the restart policy wants another run after this exit.
pub fn wants_restart(policy: RestartPolicy, exit: &Exit) -> bool {
    match policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => exit.code != 0,
        RestartPolicy::Never => false,
    }
}

/// How a run ended, if it has.
pub fn exit_of(run: &ObservedContainer) -> Option<Exit> {
    match &run.state {
        ContainerState::Exited(exit) => Some(exit.clone()),
        ContainerState::Lost { noticed_at } => Some(Exit {
            code: LOST_EXIT_CODE,
            signal: 0,
            oom: false,
            started_at: *noticed_at,
            finished_at: *noticed_at,
        }),
        ContainerState::Running { .. } | ContainerState::Partial => None,
    }
}

/// The container ended for good in an earlier life of the host, whose per-boot records are gone.
pub(crate) fn is_finished(memory: &ContainerMemory, pod: &DesiredPod, container: &DesiredContainer) -> bool {
    let (Some(exit), Some(counted)) = (&memory.last_exit, &memory.counted) else { return false };
    let last = memory.next_attempt.checked_sub(1).map(|attempt| pod.container_id(&container.name, attempt));
    memory.hash == container.hash && last.as_ref() == Some(counted) && !wants_restart(container.restart, exit)
}

impl PodMemory {
    /// Numbers of a container, made fresh when they belong to another spec. Attempt numbers always go on.
    pub fn container_mut(&mut self, container: &DesiredContainer) -> &mut ContainerMemory {
        let entry = self.containers.entry(container.name.clone()).or_default();
        if entry.hash != container.hash {
            *entry = ContainerMemory {
                hash: container.hash.clone(),
                next_attempt: entry.next_attempt,
                last_exit: entry.last_exit.take(),
                ..ContainerMemory::default()
            };
        }
        entry
    }

    /// Makes the numbers those of this sandbox; true when they were another's.
    pub fn adopt(&mut self, pod: &DesiredPod) -> bool {
        if self.sandbox_hash == pod.sandbox_hash {
            return false;
        }
        self.sandbox_hash = pod.sandbox_hash.clone();
        for entry in self.containers.values_mut() {
            entry.start_afresh();
        }
        true
    }

    /// A container that was taken out of the spec starts afresh when it comes back.
    fn forget_undeclared(&mut self, pod: &DesiredPod) -> bool {
        let mut changed = false;
        for (name, entry) in &mut self.containers {
            if !entry.hash.0.is_empty() && pod.container(name).is_none() {
                entry.start_afresh();
                changed = true;
            }
        }
        changed
    }
}

impl ContainerMemory {
    fn start_afresh(&mut self) {
        *self = ContainerMemory { next_attempt: self.next_attempt, ..ContainerMemory::default() };
    }
}

fn account_pod(
    memory: &mut PodMemory,
    pod: &DesiredPod,
    seen: Option<&ObservedPod>,
    settings: &Settings,
    now: Millis,
) -> bool {
    let mut changed = memory.adopt(pod);
    changed |= memory.forget_undeclared(pod);
    for container in &pod.containers {
        let latest = seen.and_then(|seen| seen.latest(&container.name));
        let ended =
            latest.filter(|run| run.hash == container.hash).and_then(|run| Some((run, exit_of(run)?)));
        if let Some(entry) = memory.containers.get_mut(&container.name) {
            changed |= clamp(entry, now);
        }
        if let Some((run, exit)) = ended {
            let entry = memory.container_mut(container);
            if entry.counted.as_ref() != Some(&run.id) {
                count(entry, run, exit, container, settings, now);
                changed = true;
            }
        }
    }
    changed
}

fn count(
    entry: &mut ContainerMemory,
    run: &ObservedContainer,
    exit: Exit,
    container: &DesiredContainer,
    settings: &Settings,
    now: Millis,
) {
    // A record from the future is a clock that was set back since.
    let finished = exit.finished_at.min(now);
    if finished.saturating_sub(exit.started_at) >= settings.backoff_reset_ms {
        entry.delay_ms = 0;
    }
    if wants_restart(container.restart, &exit) {
        entry.restarts = entry.restarts.saturating_add(1);
        entry.backoff_until = if entry.delay_ms == 0 { 0 } else { finished + entry.delay_ms };
        entry.delay_ms =
            entry.delay_ms.saturating_mul(2).clamp(settings.backoff_initial_ms, settings.backoff_max_ms);
    }
    entry.counted = Some(run.id.clone());
    entry.next_attempt = entry.next_attempt.max(run.attempt.saturating_add(1));
    entry.last_exit = Some(exit);
}

/// No deadline lies further ahead than the longest wait it can stand for: a clock that was set back must not keep a
/// container down.
fn clamp(entry: &mut ContainerMemory, now: Millis) -> bool {
    let latest = now.saturating_add(entry.delay_ms);
    let beyond = entry.backoff_until > latest;
    if beyond {
        entry.backoff_until = latest;
    }
    beyond
}

fn has_ended(run: &ObservedContainer) -> bool {
    matches!(run.state, ContainerState::Exited(_) | ContainerState::Lost { .. })
}

fn forget(memory: &mut Memory, desired: &Desired, observed: &Observed) -> Vec<PodId> {
    if !desired.complete {
        return Vec::new();
    }
    let held: Vec<PodId> = desired.unresolved.keys().chain(&desired.frozen).map(PodId::of).collect();
    let declared = desired.pods.values().map(|pod| &pod.id);
    let seen = observed.pods.values().map(|seen| &seen.pod.id);
    let known: BTreeSet<&PodId> = declared.chain(seen).chain(&held).collect();
    let gone: Vec<PodId> = memory.pods.keys().filter(|id| !known.contains(id)).cloned().collect();
    for id in &gone {
        memory.pods.remove(id);
    }
    gone
}
