//! The whole way from here to the desired state, as `keel plan` prints it: plans are followed on paper until nothing
//! is left to do, assuming that everything succeeds.

use std::collections::BTreeMap;

use keel_manifest::model::PullPolicy;

use crate::account::{account, remember_attempt};
use crate::model::{
    Action, ContainerState, Desired, DesiredContainer, Exit, Memory, Millis, Observed, ObservedContainer,
    ObservedPod, PodId, PodKey, Role, Waiting,
};
use crate::planner::{Plan, Settings, plan};

/// Far above what any pod needs (create, each init container, start); a plan that never settles ends here.
const MAX_ROUNDS: usize = 64;

/// All actions in order; `waiting` holds what is still waited for at the end. Actions that are no news to a reader
/// (network tables, removal of old runs) are left out.
pub fn preview(
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    settings: &Settings,
    now: Millis,
) -> Plan {
    let (mut observed, mut memory) = (observed.clone(), memory.clone());
    let mut whole = Plan::default();
    for _ in 0..MAX_ROUNDS {
        account(&mut memory, desired, &observed, settings, now);
        let mut next = plan(desired, &observed, &memory, settings, now);
        next.actions.retain(|planned| !matches!(planned.action, Action::SyncNetwork { .. }));
        whole.waiting = next.waiting;
        if next.actions.is_empty() {
            break;
        }
        for planned in next.actions {
            follow(&planned.action, desired, &whole.waiting, &mut observed, &mut memory, now);
            if !matches!(planned.action, Action::RemoveContainer { .. }) {
                whole.actions.push(planned);
            }
        }
    }
    whole
}

/// What the world looks like after a success.
pub(crate) fn follow(
    action: &Action,
    desired: &Desired,
    waiting: &BTreeMap<PodKey, Vec<Waiting>>,
    observed: &mut Observed,
    memory: &mut Memory,
    now: Millis,
) {
    match action {
        Action::Pull { image, .. } => {
            observed.images.entry(image.clone()).or_default();
            mark_refreshed(memory, desired, waiting, image);
        }
        Action::CreatePod { pod } => {
            let made = ObservedPod {
                pod: pod.clone(),
                incarnation: 0,
                created_at: now,
                ready: true,
                ip: None,
                containers: Vec::new(),
                over_limit: None,
            };
            let kept = observed.pods.insert(pod.key.clone(), made);
            if let (Some(kept), Some(made)) = (kept, observed.pods.get_mut(&pod.key)) {
                made.containers = kept.containers;
            }
        }
        Action::StartContainer { pod, container, attempt, .. } => {
            let (Some(seen), Some(wanted)) = (observed.pods.get_mut(&pod.key), pod.container(container))
            else {
                return;
            };
            remember_attempt(memory, pod, wanted, *attempt);
            let state = match wanted.role {
                Role::Main => ContainerState::Running { pid: 0, started_at: now },
                Role::Init => ContainerState::Exited(exit(0, now)),
            };
            seen.containers.push(ObservedContainer {
                id: pod.container_id(container, *attempt),
                name: container.clone(),
                role: wanted.role,
                hash: wanted.hash.clone(),
                attempt: *attempt,
                state,
                image_digest: String::new(),
                stand_in: false,
            });
        }
        Action::StopContainer { pod, id, .. } => {
            let runs = observed.pods.get_mut(pod).into_iter().flat_map(|seen| &mut seen.containers);
            for run in runs.filter(|run| run.id == *id) {
                run.state = ContainerState::Exited(exit(0, now));
            }
        }
        Action::RemoveContainer { pod, id } => {
            if let Some(seen) = observed.pods.get_mut(pod) {
                seen.containers.retain(|run| run.id != *id);
            }
        }
        Action::SyncVolumes { pod, .. } | Action::UpdateRecord { pod, .. } => {
            if let Some(seen) = observed.pods.get_mut(&pod.key) {
                seen.pod = pod.clone();
            }
        }
        Action::DeletePod { pod, .. } => drop(observed.pods.remove(pod)),
        Action::SyncNetwork { hash, .. } => observed.network = Some(hash.clone()),
    }
}

/// Notes that a moving tag was looked up for the next run of every container that waits for it. Returns the pods whose
/// memory changed.
pub fn mark_refreshed(
    memory: &mut Memory,
    desired: &Desired,
    waiting: &BTreeMap<PodKey, Vec<Waiting>>,
    image: &str,
) -> Vec<PodId> {
    let mut changed = Vec::new();
    let waits =
        |waits: &[Waiting]| waits.iter().any(|w| matches!(w, Waiting::ImagePull { image: i } if i == image));
    let pods = waiting.iter().filter(|(_, all)| waits(all)).filter_map(|(key, _)| desired.pods.get(key));
    for pod in pods {
        let always = |c: &&DesiredContainer| c.image == image && c.pull_policy == PullPolicy::Always;
        for container in pod.containers.iter().filter(always) {
            let entry = memory.pods.entry(pod.id.clone()).or_default();
            entry.adopt(pod);
            let entry = entry.container_mut(container);
            entry.refreshed_attempt = Some(entry.next_attempt);
            changed.push(pod.id.clone());
        }
    }
    changed
}

fn exit(code: i32, now: Millis) -> Exit {
    Exit { code, signal: 0, oom: false, started_at: now, finished_at: now }
}
