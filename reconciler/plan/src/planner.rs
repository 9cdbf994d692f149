//! (desired, observed, memory, now) to the next actions, each with its reason, and what cannot be done yet.
//!
//! Level-triggered: a plan holds what can be done now; what depends on it follows from the next observation.
//!
//! ```text
//! pod      absent -> created -> init containers one after the other -> main containers side by side
//!          sandbox changed, not declared, volume over its limit: runs stopped (last started first) -> runs removed -> pod deleted
//! run      running --spec changed, new image present--> stopped -> next attempt
//!          ended --policy and back-off--> next attempt; the newest ended runs stay to be looked at
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use keel_manifest::model::PullPolicy;

use crate::account::{exit_of, is_finished, wants_restart};
use crate::diff::{FieldChange, diff};
use crate::endpoints::{PortTable, endpoints, endpoints_hash};
use crate::model::{
    Action, ContainerMemory, ContainerName, ContainerState, Desired, DesiredContainer, DesiredPod, Memory,
    Millis, Observed, ObservedContainer, ObservedPod, PodKey, PullSecret, Role, Waiting,
};
use crate::reason::Reason;

/// None, which means the kill at once: whoever fills the disk must not go on, and a program that ends well at a stop
/// signal would count as one that has done its work.
const EVICTION_GRACE_MS: u64 = 0;

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Wait before the second restart.
    pub backoff_initial_ms: u64,
    pub backoff_max_ms: u64,
    /// A run of this length makes the next restart immediate again.
    pub backoff_reset_ms: u64,
    /// Ended runs kept besides the newest, so that the exit before a restart can be looked at.
    pub keep_old_runs: usize,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            backoff_initial_ms: 10_000,
            backoff_max_ms: 300_000,
            backoff_reset_ms: 600_000,
            keep_old_runs: 1,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In an order that is safe to follow: removals before additions.
    pub actions: Vec<Planned>,
    /// Why pods are not where they should be. A pod without an entry is either done or acted on.
    pub waiting: BTreeMap<PodKey, Vec<Waiting>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    pub action: Action,
    pub reason: Reason,
}

/// What to do next. `memory` is the outcome of [`crate::account`] over the same observation.
pub fn plan(
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    settings: &Settings,
    now: Millis,
) -> Plan {
    let mut planner = Planner {
        desired,
        observed,
        memory,
        settings,
        now,
        ports: PortTable::of(desired, observed),
        old_pods: old_pods(desired, observed),
        pull_secrets: all_pull_secrets(desired),
        pulls: BTreeSet::new(),
        plan: Plan::default(),
    };
    planner.undeclared();
    for pod in desired.pods.values() {
        planner.pod(pod);
    }
    planner.held();
    planner.network();
    planner.plan
}

/// The logins that an image is pulled with: those of every pod that is made of it.
pub fn pull_secrets(desired: &Desired, image: &str) -> Vec<PullSecret> {
    all_pull_secrets(desired).remove(image).unwrap_or_default()
}

fn all_pull_secrets(desired: &Desired) -> BTreeMap<&str, Vec<PullSecret>> {
    let mut all: BTreeMap<&str, Vec<PullSecret>> = BTreeMap::new();
    for pod in desired.pods.values().filter(|pod| !pod.resolved.pull_secrets.is_empty()) {
        for container in &pod.containers {
            let known = all.entry(&container.image).or_default();
            for secret in &pod.resolved.pull_secrets {
                if !known.contains(secret) {
                    known.push(secret.clone());
                }
            }
        }
    }
    all
}

struct Planner<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    memory: &'a Memory,
    settings: &'a Settings,
    now: Millis,
    ports: PortTable<'a>,
    /// Per Deployment: pods that still run its old template. They must be gone before a new one starts.
    old_pods: BTreeMap<(&'a str, &'a str), BTreeSet<&'a PodKey>>,
    /// Images with a planned pull: one is enough.
    pulls: BTreeSet<&'a str>,
    /// By image. An image is on the host once, so the logins of one pod that is made of it are those of all.
    pull_secrets: BTreeMap<&'a str, Vec<PullSecret>>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn act(&mut self, action: Action, reason: Reason) {
        self.plan.actions.push(Planned { action, reason });
    }

    fn wait(&mut self, pod: &PodKey, waiting: Waiting) {
        self.plan.waiting.entry(pod.clone()).or_default().push(waiting);
    }

    fn undeclared(&mut self) {
        if !self.desired.complete {
            return;
        }
        for (key, seen) in &self.observed.pods {
            let held = self.desired.frozen.contains(key) || self.desired.unresolved.contains_key(key);
            if !held && !self.desired.pods.contains_key(key) {
                self.tear_down(seen, seen.pod.grace_ms(), Reason::NotDeclared);
            }
        }
    }

    /// Pods that are left exactly as they are.
    fn held(&mut self) {
        for key in &self.desired.frozen {
            self.wait(key, Waiting::Frozen);
        }
        for (key, message) in &self.desired.unresolved {
            self.wait(key, Waiting::MissingReference { message: message.clone() });
        }
    }

    fn pod(&mut self, pod: &'a Arc<DesiredPod>) {
        if self.desired.frozen.contains(&pod.key) {
            return;
        }
        match self.observed.pods.get(&pod.key) {
            None => self.absent_pod(pod),
            Some(seen) if seen.pod.sandbox_hash != pod.sandbox_hash => self.changed_pod(pod, seen),
            Some(seen) if seen.over_limit.is_some() => {
                let message = seen.over_limit.clone().unwrap_or_default();
                self.tear_down(seen, EVICTION_GRACE_MS, Reason::Evicted { message });
            }
            Some(seen) if !seen.ready => {
                self.images(pod, Some(seen), pod.containers.iter());
                self.act(Action::CreatePod { pod: pod.clone() }, Reason::Interrupted);
            }
            Some(seen) => self.present_pod(pod, seen),
        }
    }

    fn absent_pod(&mut self, pod: &'a Arc<DesiredPod>) {
        if self.finished(pod) {
            return;
        }
        let (port_free, siblings_gone) = (self.port_free(pod), self.old_pods_gone(pod));
        // Images are fetched while the pod waits, so that they are there when its turn comes.
        self.images(pod, None, pod.containers.iter());
        if port_free && siblings_gone {
            self.act(Action::CreatePod { pod: pod.clone() }, Reason::New { origin: pod.origin.clone() });
        }
    }

    /// Completed before the host went down; restart policy and spec say that this was it.
    fn finished(&self, pod: &DesiredPod) -> bool {
        let Some(memory) = self.memory.pods.get(&pod.id) else { return false };
        let done = |container: &DesiredContainer| {
            memory.containers.get(&container.name).is_some_and(|m| is_finished(m, pod, container))
        };
        let failed = |container: &DesiredContainer| {
            let code = memory.containers.get(&container.name).and_then(|m| Some(m.last_exit.as_ref()?.code));
            container.role == Role::Init && done(container) && code.is_some_and(|code| code != 0)
        };
        memory.sandbox_hash == pod.sandbox_hash
            && (pod.containers.iter().filter(|c| c.role == Role::Main).all(done)
                || pod.containers.iter().any(failed))
    }

    fn changed_pod(&mut self, pod: &'a Arc<DesiredPod>, seen: &'a ObservedPod) {
        let present = self.images(pod, Some(seen), pod.containers.iter());
        // Never take down what serves before its successor can start.
        if present || !seen.containers.iter().any(ObservedContainer::is_running) {
            let reason = Reason::Recreate { changes: diff(&seen.pod, pod) };
            self.tear_down(seen, pod.grace_ms(), reason);
        }
    }

    fn tear_down(&mut self, seen: &ObservedPod, grace_ms: u64, reason: Reason) {
        let pod = &seen.pod.key;
        let live: Vec<_> = seen.containers.iter().filter(|run| run.is_running()).collect();
        let place = |run: &ObservedContainer| {
            seen.pod.containers.iter().position(|c| c.name == run.name).unwrap_or(usize::MAX)
        };
        if live.is_empty() {
            // The runs of init containers go last: as long as a main one is there, they prove that it may start, should
            // the pod be wanted again before it is gone.
            let main_left = seen.containers.iter().any(|run| run.role == Role::Main);
            let next = seen.containers.iter().rev().filter(|run| !main_left || run.role == Role::Main);
            for run in next {
                self.act(Action::RemoveContainer { pod: pod.clone(), id: run.id.clone() }, reason.clone());
            }
            if seen.containers.is_empty() {
                let (id, incarnation) = (seen.pod.id.clone(), seen.incarnation);
                self.act(Action::DeletePod { pod: pod.clone(), id, incarnation }, reason);
            }
            return;
        }
        let mut order = live;
        order.sort_by_key(|run| std::cmp::Reverse((place(run), run.attempt)));
        for run in order {
            let stop = Action::StopContainer { pod: pod.clone(), id: run.id.clone(), grace_ms };
            self.act(stop, reason.clone());
        }
    }

    fn present_pod(&mut self, pod: &'a Arc<DesiredPod>, seen: &'a ObservedPod) {
        let settled = Arc::ptr_eq(pod, &seen.pod) || same_record(pod, &seen.pod);
        let first_action = self.plan.actions.len();
        self.port_free(pod);
        self.runs_of_gone_containers(pod, seen);
        let stale = |run: &ObservedContainer| {
            run.is_running() && pod.container(&run.name).is_none_or(|c| c.hash != run.hash)
        };
        // The record changes when no run of the old spec is left: until then it tells what runs, and what changed.
        if !settled && !seen.containers.iter().any(stale) {
            self.record(pod, seen);
        }
        let volumes_current = seen.pod.volumes_hash == pod.volumes_hash;
        let changes = if settled { Vec::new() } else { diff(&seen.pod, pod) };
        if self.init_containers(pod, seen) {
            for container in pod.containers.iter().filter(|c| c.role == Role::Main) {
                self.container(pod, seen, container, &changes);
            }
        }
        if !volumes_current {
            // Nothing starts on the old files.
            let starts = |planned: &Planned| matches!(planned.action, Action::StartContainer { .. });
            let tail = self.plan.actions.split_off(first_action);
            self.plan.actions.extend(tail.into_iter().filter(|planned| !starts(planned)));
        }
    }

    fn record(&mut self, pod: &Arc<DesiredPod>, seen: &ObservedPod) {
        let incarnation = seen.incarnation;
        if seen.pod.volumes_hash == pod.volumes_hash {
            let changes = diff(&seen.pod, pod);
            self.act(Action::UpdateRecord { pod: pod.clone(), incarnation }, Reason::Record { changes });
        } else {
            self.act(Action::SyncVolumes { pod: pod.clone(), incarnation }, Reason::VolumeContents);
        }
    }

    fn runs_of_gone_containers(&mut self, pod: &DesiredPod, seen: &ObservedPod) {
        for run in seen.containers.iter().filter(|run| pod.container(&run.name).is_none()) {
            let reason = Reason::ContainerGone { container: run.name.clone() };
            self.stop_or_remove(pod, run, reason);
        }
    }

    fn stop_or_remove(&mut self, pod: &DesiredPod, run: &ObservedContainer, reason: Reason) {
        let (key, id) = (pod.key.clone(), run.id.clone());
        let action = match run.state {
            ContainerState::Running { .. } => {
                Action::StopContainer { pod: key, id, grace_ms: pod.grace_ms() }
            }
            ContainerState::Partial | ContainerState::Exited(_) | ContainerState::Lost { .. } => {
                Action::RemoveContainer { pod: key, id }
            }
        };
        self.act(action, reason);
    }

    /// True when all of them have succeeded. A run of a main container proves that they had.
    fn init_containers(&mut self, pod: &'a Arc<DesiredPod>, seen: &'a ObservedPod) -> bool {
        if seen.containers.iter().any(|run| run.role == Role::Main) {
            return true;
        }
        for container in pod.containers.iter().filter(|c| c.role == Role::Init) {
            let succeeded = seen.latest(&container.name).and_then(exit_of).is_some_and(|exit| exit.code == 0);
            if !succeeded {
                self.images(pod, Some(seen), pod.containers.iter().filter(|c| c.role == Role::Main));
                self.wait(&pod.key, Waiting::Initializing { container: container.name.clone() });
                self.container(pod, seen, container, &[]);
                return false;
            }
        }
        true
    }

    fn container(
        &mut self,
        pod: &'a Arc<DesiredPod>,
        seen: &'a ObservedPod,
        container: &'a DesiredContainer,
        changes: &[FieldChange],
    ) {
        let mut runs: Vec<&ObservedContainer> =
            seen.containers.iter().filter(|run| run.name == container.name).collect();
        runs.sort_by_key(|run| run.attempt);
        let live = runs.iter().rev().find(|run| run.is_running()).copied();
        self.tidy_runs(pod, &runs, live);
        match live {
            Some(run) if run.hash == container.hash && !run.stand_in => {}
            Some(run) if run.hash == container.hash => {
                if self.images(pod, Some(seen), std::iter::once(container)) {
                    self.stop_or_remove(pod, run, Reason::ImageBack);
                }
            }
            Some(run) => {
                if self.images(pod, Some(seen), std::iter::once(container)) {
                    let reason = Reason::Changed { changes: changes.to_vec() };
                    self.stop_or_remove(pod, run, reason);
                }
            }
            None => self.stopped_container(pod, seen, container, runs.last().copied()),
        }
    }

    /// Leftovers, duplicates, and ended runs beyond those that are kept.
    fn tidy_runs(&mut self, pod: &DesiredPod, runs: &[&ObservedContainer], live: Option<&ObservedContainer>) {
        let Some(newest) = runs.last().map(|run| run.attempt) else { return };
        let mut kept = 0;
        for run in runs.iter().rev() {
            match run.state {
                ContainerState::Partial => self.stop_or_remove(pod, run, Reason::Interrupted),
                ContainerState::Running { .. } => {
                    if live.is_some_and(|live| live.id != run.id) {
                        self.stop_or_remove(pod, run, Reason::Duplicate);
                    }
                }
                ContainerState::Exited(_) | ContainerState::Lost { .. } if run.attempt == newest => {}
                ContainerState::Exited(_) | ContainerState::Lost { .. } => {
                    kept += 1;
                    if kept > self.settings.keep_old_runs {
                        self.stop_or_remove(pod, run, Reason::OldRun);
                    }
                }
            }
        }
    }

    fn stopped_container(
        &mut self,
        pod: &'a Arc<DesiredPod>,
        seen: &'a ObservedPod,
        container: &'a DesiredContainer,
        latest: Option<&ObservedContainer>,
    ) {
        let memory = self.container_memory(pod, container);
        let until = memory.map_or(0, |m| m.backoff_until);
        let reason = match latest {
            // Earlier runs went with a pod that was evicted, or with the last boot; their back-off holds.
            None if until > self.now => {
                let name = container.name.clone();
                self.wait(&pod.key, Waiting::CrashLoopBackOff { container: name, until });
                return;
            }
            None => Reason::FirstStart,
            // Removed first; the next observation decides on.
            Some(ObservedContainer { state: ContainerState::Partial, .. }) => return,
            Some(run) if run.hash != container.hash => Reason::Replaced,
            Some(run) if run.stand_in && self.observed.images.contains_key(&container.image) => {
                Reason::ImageBack
            }
            Some(run) => {
                let Some(exit) = exit_of(run) else { return };
                if !wants_restart(container.restart, &exit) {
                    return;
                }
                if until > self.now {
                    let name = container.name.clone();
                    self.wait(&pod.key, Waiting::CrashLoopBackOff { container: name, until });
                    return;
                }
                let restart = memory.map_or(1, |m| m.restarts);
                match run.state {
                    ContainerState::Lost { .. } => Reason::Lost { restart },
                    _ => Reason::Ended { code: exit.code, oom: exit.oom, restart },
                }
            }
        };
        let attempt = self.next_attempt(pod, seen, container);
        let present = self.images(pod, Some(seen), std::iter::once(container));
        if (present || self.has_stand_in(pod, container)) && self.old_pods_gone(pod) {
            let start = Action::StartContainer {
                pod: pod.clone(),
                incarnation: seen.incarnation,
                container: container.name.clone(),
                attempt,
            };
            self.act(start, reason);
        }
    }

    fn container_memory(
        &self,
        pod: &DesiredPod,
        container: &DesiredContainer,
    ) -> Option<&'a ContainerMemory> {
        let memory = self.memory.pods.get(&pod.id).filter(|m| m.sandbox_hash == pod.sandbox_hash)?;
        memory.containers.get(&container.name).filter(|m| m.hash == container.hash)
    }

    /// The number of the next run: never one that was used before, whatever the spec was then.
    fn next_attempt(&self, pod: &DesiredPod, seen: &ObservedPod, container: &DesiredContainer) -> u32 {
        let seen = seen.latest(&container.name).map_or(0, |run| run.attempt.saturating_add(1));
        let memory = self.memory.pods.get(&pod.id).and_then(|m| m.containers.get(&container.name));
        memory.map_or(0, |m| m.next_attempt).max(seen)
    }

    /// True when these containers could start as far as images go; plans the pulls that are missing.
    fn images(
        &mut self,
        pod: &'a DesiredPod,
        seen: Option<&ObservedPod>,
        containers: impl Iterator<Item = &'a DesiredContainer>,
    ) -> bool {
        let mut all_present = true;
        for container in containers {
            let present = self.observed.images.contains_key(&container.image);
            let reason = match container.pull_policy {
                PullPolicy::Never if !present => {
                    all_present = false;
                    self.wait(&pod.key, Waiting::ErrImageNeverPull { image: container.image.clone() });
                    continue;
                }
                PullPolicy::Always if present && self.needs_refresh(pod, seen, container) => {
                    Reason::ImageRefresh
                }
                _ if present => continue,
                _ => Reason::ImageMissing,
            };
            all_present = false;
            let waiting = Waiting::ImagePull { image: container.image.clone() };
            if !self.plan.waiting.get(&pod.key).is_some_and(|all| all.contains(&waiting)) {
                self.wait(&pod.key, waiting);
            }
            if self.pulls.insert(&container.image) {
                let (image, policy) = (container.image.clone(), container.pull_policy);
                let secrets = self.pull_secrets.get(image.as_str()).cloned().unwrap_or_default();
                self.act(Action::Pull { image, policy, pod: pod.key.clone(), secrets }, reason);
            }
        }
        all_present
    }

    /// The declared image is damaged and cannot be had again for now, and the last good one is here.
    fn has_stand_in(&self, pod: &DesiredPod, container: &DesiredContainer) -> bool {
        let gone = |failed: &bool| *failed || container.pull_policy == PullPolicy::Never;
        self.observed.damaged.get(&container.image).is_some_and(gone)
            && self.observed.last_good.contains_key(&(pod.id.clone(), container.name.clone()))
    }

    /// A moving tag is looked up once for each new pod and each changed spec. A restart after a crash runs what ran
    /// before: it must neither depend on a registry nor be a silent upgrade.
    fn needs_refresh(
        &self,
        pod: &DesiredPod,
        seen: Option<&ObservedPod>,
        container: &DesiredContainer,
    ) -> bool {
        let same_sandbox = seen.filter(|seen| seen.pod.sandbox_hash == pod.sandbox_hash);
        let ran = same_sandbox.is_some_and(|seen| {
            seen.containers.iter().any(|run| run.name == container.name && run.hash == container.hash)
        });
        if ran {
            return false;
        }
        // The numbers may still be those of the old spec; a refresh for the new one is noted under its hash.
        let memory = self.memory.pods.get(&pod.id).and_then(|m| m.containers.get(&container.name));
        let Some(memory) = memory.filter(|m| m.hash == container.hash) else { return true };
        memory.refreshed_attempt.is_none_or(|attempt| attempt < memory.next_attempt)
    }

    fn port_free(&mut self, pod: &DesiredPod) -> bool {
        let Some((port, holder)) = self.ports.taken(&pod.key) else { return true };
        let waiting = Waiting::PortTaken { port, holder: holder.clone() };
        self.wait(&pod.key, waiting);
        false
    }

    fn old_pods_gone(&mut self, pod: &DesiredPod) -> bool {
        let owner = (pod.key.namespace.as_str(), pod.owner.name.as_str());
        if pod.owner.kind != "Deployment" {
            return true;
        }
        let Some(old) = self.old_pods.get(&owner) else { return true };
        let pods = old.iter().map(|key| (*key).clone()).collect();
        let waiting = Waiting::OldPods { pods };
        if !self.plan.waiting.get(&pod.key).is_some_and(|all| all.contains(&waiting)) {
            self.wait(&pod.key, waiting);
        }
        false
    }

    fn network(&mut self) {
        let hash = endpoints_hash(self.desired, self.observed, &self.ports);
        // A host that was never told anything publishes nothing.
        if hash.is_none() && self.observed.network.is_none() {
            return;
        }
        let hash = hash.unwrap_or_default();
        if self.observed.network.as_ref() != Some(&hash) {
            let endpoints = endpoints(self.desired, self.observed, &self.ports);
            self.act(Action::SyncNetwork { endpoints, hash }, Reason::Network);
        }
    }
}

/// Everything that a record holds, except where it was declared: moving a file changes nothing.
fn same_record(a: &DesiredPod, b: &DesiredPod) -> bool {
    a.volumes_hash == b.volumes_hash
        && a.sandbox_hash == b.sandbox_hash
        && a.containers == b.containers
        && a.labels == b.labels
        && a.annotations == b.annotations
        && a.owner == b.owner
        && a.spec == b.spec
}

/// Pods of Deployments that still are, or still run, another version than the template asks for.
fn old_pods<'a>(
    desired: &'a Desired,
    observed: &'a Observed,
) -> BTreeMap<(&'a str, &'a str), BTreeSet<&'a PodKey>> {
    let mut templates: BTreeMap<(&str, &str), &DesiredPod> = BTreeMap::new();
    for pod in desired.pods.values().filter(|pod| pod.owner.kind == "Deployment") {
        templates.insert((pod.key.namespace.as_str(), pod.owner.name.as_str()), pod);
    }
    let mut old: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (key, seen) in &observed.pods {
        let owner = (key.namespace.as_str(), seen.pod.owner.name.as_str());
        if seen.pod.owner.kind != "Deployment" {
            continue;
        }
        if templates.get(&owner).is_some_and(|template| is_old(seen, template)) {
            old.entry(owner).or_default().insert(key);
        }
    }
    old
}

fn is_old(seen: &ObservedPod, template: &DesiredPod) -> bool {
    seen.pod.sandbox_hash != template.sandbox_hash
        || seen.containers.iter().any(|run| {
            run.is_running()
                && template.container(&run.name).is_none_or(|container| container.hash != run.hash)
        })
}

/// Name of the container that an action is about, if it is about one.
pub fn container_of(action: &Action, observed: &Observed) -> Option<ContainerName> {
    match action {
        Action::StartContainer { container, .. } => Some(container.clone()),
        Action::StopContainer { pod, id, .. } | Action::RemoveContainer { pod, id } => {
            let seen = observed.pods.get(pod)?;
            seen.containers.iter().find(|run| run.id == *id).map(|run| run.name.clone())
        }
        _ => None,
    }
}
