//! What must hold at every step, written without a look at the planner.

use std::collections::{BTreeMap, BTreeSet};

use keel_engine::{Now, Settings};
use keel_plan::{
    Action, ContainerId, ContainerName, ContainerState, Desired, DesiredPod, ObservedContainer, ObservedPod,
    PodId, PodKey, PodMemory, Role, SpecHash,
};

use crate::world::World;

/// The kubelet's numbers.
const FIRST_DELAY_MS: u64 = 10_000;
const LONGEST_DELAY_MS: u64 = 300_000;
const RESET_MS: u64 = 600_000;
/// Wall clock and monotonic time of one exit are noted at slightly different moments.
const SLACK_MS: u64 = 50;
/// Newest, one kept, one about to be removed, one left over from an interruption, and one more that is on its way.
const MAX_RUNS: usize = 6;

#[derive(Default)]
pub(crate) struct Checks {
    found: Vec<String>,
    backoff: BTreeMap<(PodKey, ContainerName), Backoff>,
    clock_set_at: Option<u64>,
    used: BTreeSet<ContainerId>,
}

/// Restarts of one container spec in one pod, by the monotonic clock.
struct Backoff {
    sandbox: SpecHash,
    hash: SpecHash,
    incarnation: u64,
    started_at: u64,
    runs_in_a_row: u32,
}

impl Checks {
    pub(crate) fn violation(&mut self) -> Option<String> {
        self.found.pop()
    }

    pub(crate) fn clock_set(&mut self, mono: u64) {
        self.clock_set_at = Some(mono);
    }

    pub(crate) fn rebooted(&mut self) {
        self.backoff.clear();
    }

    /// What is taken out or changed starts afresh, also when the change is taken back.
    pub(crate) fn declared(&mut self, desired: &Desired) {
        self.backoff.retain(|(pod, name), entry| {
            let Some(wanted) = desired.pods.get(pod) else { return true };
            let hash = wanted.container(name).map(|container| &container.hash);
            wanted.sandbox_hash == entry.sandbox && hash == Some(&entry.hash)
        });
    }

    /// An action leaves the core.
    pub(crate) fn planned(
        &mut self,
        action: &Action,
        asked_for: bool,
        desired: &Desired,
        world: &World,
        now: Now,
    ) {
        match action {
            Action::StopContainer { pod, id, .. } if !asked_for => self.stop(pod, id, desired, world),
            Action::DeletePod { pod, .. } => {
                let same = |wanted: &DesiredPod| {
                    world.pods.get(pod).is_some_and(|seen| seen.pod.sandbox_hash == wanted.sandbox_hash)
                };
                if desired.pods.get(pod).is_some_and(|wanted| same(wanted)) {
                    self.found.push(format!("{pod} is deleted although it is as declared"));
                }
                self.undeclared(pod, desired);
            }
            Action::StartContainer { pod, container, attempt, .. } => {
                if !self.used.insert(pod.container_id(container, *attempt)) {
                    self.found.push(format!("attempt {attempt} of {}/{container} is used twice", pod.key));
                }
                self.start(pod, container, world, now);
            }
            _ => {}
        }
        for seen in world.pods.values() {
            let mut runs: BTreeMap<&ContainerName, usize> = BTreeMap::new();
            for run in &seen.containers {
                *runs.entry(&run.name).or_default() += 1;
            }
            if let Some((name, count)) = runs.into_iter().find(|(_, count)| *count > MAX_RUNS) {
                self.found.push(format!("{count} runs of {}/{name} pile up", seen.pod.key));
            }
        }
    }

    pub(crate) fn in_flight<'a>(&mut self, actions: impl Iterator<Item = &'a Action>, settings: &Settings) {
        let (mut pulls, mut starts) = (0, BTreeSet::new());
        for action in actions {
            match action {
                Action::Pull { .. } => pulls += 1,
                Action::StartContainer { pod, container, .. } if !starts.insert((&pod.key, container)) => {
                    self.found.push(format!("two starts of {}/{container} at once", pod.key));
                }
                _ => {}
            }
        }
        // Hanging ones are not counted by the core; the menu makes few of them.
        if pulls > settings.max_pulls + 8 {
            self.found.push(format!("{pulls} pulls at once"));
        }
    }

    pub(crate) fn memory(&mut self, pod: &PodId, before: Option<&PodMemory>, after: Option<&PodMemory>) {
        if after.is_none() {
            self.used.retain(|id| !id.0.starts_with(&format!("{pod}.")));
        }
        let (Some(before), Some(after)) = (before, after) else { return };
        for (name, new) in &after.containers {
            let Some(old) = before.containers.get(name) else { continue };
            if new.next_attempt < old.next_attempt {
                self.found.push(format!("attempts of {pod}.{name} go back"));
            }
            let same = before.sandbox_hash == after.sandbox_hash && old.hash == new.hash;
            if same && new.restarts < old.restarts {
                self.found
                    .push(format!("restarts of {pod}.{name} go from {} to {}", old.restarts, new.restarts));
            }
            if same && new.restarts > old.restarts + 1 {
                self.found
                    .push(format!("restarts of {pod}.{name} jump from {} to {}", old.restarts, new.restarts));
            }
        }
    }

    /// A process was made. Failed starts are not restarts.
    pub(crate) fn started(&mut self, seen: &ObservedPod, run: &ObservedContainer, mono: u64) {
        let fresh = || Backoff {
            sandbox: seen.pod.sandbox_hash.clone(),
            hash: run.hash.clone(),
            incarnation: seen.incarnation,
            started_at: mono,
            runs_in_a_row: 0,
        };
        let entry = self.backoff.entry((seen.pod.key.clone(), run.name.clone())).or_insert_with(fresh);
        if entry.hash != run.hash || entry.incarnation != seen.incarnation {
            *entry = fresh();
        }
        entry.runs_in_a_row += 1;
        entry.started_at = mono;
    }

    /// The wait before a restart is at least what the kubelet would wait. Skipped where the wall clock, by which exits
    /// are dated, was set during the run.
    fn start(&mut self, pod: &DesiredPod, name: &ContainerName, world: &World, now: Now) {
        let Some(seen) = world.pods.get(&pod.key) else { return };
        let Some(wanted) = pod.container(name) else { return };
        let same = |run: &&ObservedContainer| run.name == *name && run.hash == wanted.hash;
        let last = seen.containers.iter().filter(same).max_by_key(|run| run.attempt);
        let ended_at = last.and_then(keel_plan::exit_of).map(|exit| exit.finished_at);
        let entry = self.backoff.get_mut(&(pod.key.clone(), name.clone()));
        let entry = entry.filter(|entry| entry.hash == wanted.hash && entry.incarnation == seen.incarnation);
        let (Some(ended_at), Some(entry)) = (ended_at, entry) else { return };
        if self.clock_set_at.is_some_and(|at| at >= entry.started_at) {
            entry.runs_in_a_row = 0;
            return;
        }
        let waited = now.wall.saturating_sub(ended_at);
        let ran = (now.mono - entry.started_at).saturating_sub(waited);
        if ran + SLACK_MS >= RESET_MS {
            entry.runs_in_a_row = 1;
        }
        // The first restart is immediate.
        let must_wait = match entry.runs_in_a_row {
            0 | 1 => 0,
            runs => (FIRST_DELAY_MS << (runs - 2).min(10)).min(LONGEST_DELAY_MS),
        };
        if waited + SLACK_MS < must_wait {
            self.found.push(format!("{}/{name} restarts after {waited} ms, {must_wait} ms are due", pod.key));
        }
    }

    /// A live run is stopped only for a reason that can be seen without the planner.
    fn stop(&mut self, pod: &PodKey, id: &ContainerId, desired: &Desired, world: &World) {
        self.undeclared(pod, desired);
        let Some(seen) = world.pods.get(pod) else { return };
        let Some(run) = seen.containers.iter().find(|run| run.id == *id) else { return };
        self.backoff.remove(&(pod.clone(), run.name.clone()));
        let Some(wanted) = desired.pods.get(pod).filter(|_| run.is_running()) else { return };
        let container = wanted.container(&run.name);
        let same =
            container.is_some_and(|c| c.hash == run.hash) && seen.pod.sandbox_hash == wanted.sandbox_hash;
        let twin = seen
            .containers
            .iter()
            .any(|other| other.is_running() && other.name == run.name && other.id != run.id);
        if same && !twin {
            self.found.push(format!("{id} is stopped although it is as declared"));
        }
        // Pull before stop: the successor can start at once.
        let needed = match seen.pod.sandbox_hash == wanted.sandbox_hash {
            true => container.into_iter().collect::<Vec<_>>(),
            false => wanted.containers.iter().collect(),
        };
        if let Some(missing) = needed.iter().find(|c| !world.images.contains_key(&c.image)) {
            self.found.push(format!("{id} is stopped before image {} is there", missing.image));
        }
    }

    fn undeclared(&mut self, pod: &PodKey, desired: &Desired) {
        let held = desired.frozen.contains(pod) || desired.unresolved.contains_key(pod);
        if held || (!desired.pods.contains_key(pod) && !desired.complete) {
            self.found
                .push(format!("{pod} is taken down although the sources are incomplete or it is frozen"));
        }
    }

    /// The host is what the manifests say, apart from excused pods.
    pub(crate) fn matches(
        &self,
        desired: &Desired,
        world: &World,
        excused: &BTreeSet<&PodKey>,
    ) -> Result<(), String> {
        for (key, pod) in desired.pods.iter().filter(|(key, _)| !excused.contains(key)) {
            let Some(seen) = world.pods.get(key) else {
                let ends = pod.spec.restart_policy.unwrap_or_default()
                    != keel_manifest::model::RestartPolicy::Always;
                let finished = ends && world.memory.pods.contains_key(&pod.id);
                if finished { continue } else { return Err(format!("{key} does not exist")) }
            };
            if seen.pod.sandbox_hash != pod.sandbox_hash || !seen.ready {
                return Err(format!("{key} is another pod"));
            }
            if seen.pod.labels != pod.labels
                || seen.pod.spec != pod.spec
                || seen.pod.volumes_hash != pod.volumes_hash
            {
                return Err(format!("the record of {key} is old"));
            }
            for container in pod.containers.iter().filter(|c| c.role == Role::Main) {
                let run =
                    seen.latest(&container.name).ok_or_else(|| format!("{key} has no {}", container.name))?;
                let policy = pod.spec.restart_policy.unwrap_or_default();
                let over =
                    keel_plan::exit_of(run).is_some_and(|exit| !keel_plan::wants_restart(policy, &exit));
                if run.hash != container.hash || !(run.is_running() || over) {
                    return Err(format!("{} is {:?}", run.id, run.state));
                }
            }
        }
        for (key, seen) in &world.pods {
            let known = desired.pods.contains_key(key) || desired.unresolved.contains_key(key);
            if !known {
                return Err(format!("{key} is left over"));
            }
            if let Some(run) = seen
                .containers
                .iter()
                .find(|run| run.state == ContainerState::Partial && !excused.contains(key))
            {
                return Err(format!("{} is half-made", run.id));
            }
        }
        Ok(())
    }

    pub(crate) fn at_end(&self, world: &World) -> Result<(), String> {
        let ips: Vec<_> = world.pods.values().filter_map(|seen| seen.ip).collect();
        match world.network.is_none() && !ips.is_empty() {
            true => Err("the network was never told".into()),
            false => Ok(()),
        }
    }
}
