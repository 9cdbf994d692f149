//! A host in memory. Actions have effect in steps, as on a real one, so that a death can come between any two.
//! It guards itself as the contract of `ports::Host` asks: what is not what the action was planned against is `Stale`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use keel_engine::ports::{ActionError, Done, Next};
use keel_plan::{
    Action, ContainerId, ContainerState, DesiredPod, Endpoint, Exit, Memory, Millis, Observed,
    ObservedContainer, ObservedPod, PodKey, Role, SpecHash,
};

#[derive(Clone, Debug, Default)]
pub struct World {
    pub pods: BTreeMap<PodKey, ObservedPod>,
    pub images: BTreeMap<String, String>,
    pub network: Option<SpecHash>,
    pub endpoints: Vec<Endpoint>,
    /// What a restart of the daemon finds again.
    pub memory: Memory,
    /// Pods of these names exist on the host and are not ours.
    pub foreign: BTreeSet<PodKey>,
    /// Broken promises of the engine, found while it acted.
    pub violations: Vec<String>,
    next_pid: u32,
    next_incarnation: u64,
}

/// One effect that either happened or did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The record exists, the pod is not ready.
    PodBegun,
    PodReady,
    /// A directory without a process.
    RunBegun,
    RunLive,
    RunStopped,
    RunRemoved,
    PodHalfDeleted,
    PodGone,
    ImagePresent,
    RecordWritten,
    NetworkWritten,
}

/// The steps of an action, in order.
pub(crate) fn steps(action: &Action) -> &'static [Step] {
    match action {
        Action::Pull { .. } => &[Step::ImagePresent],
        Action::CreatePod { .. } => &[Step::PodBegun, Step::PodReady],
        Action::StartContainer { .. } => &[Step::RunBegun, Step::RunLive],
        Action::StopContainer { .. } => &[Step::RunStopped],
        Action::RemoveContainer { .. } => &[Step::RunRemoved],
        Action::SyncVolumes { .. } | Action::UpdateRecord { .. } => &[Step::RecordWritten],
        Action::DeletePod { .. } => &[Step::PodHalfDeleted, Step::PodGone],
        Action::SyncNetwork { .. } => &[Step::NetworkWritten],
    }
}

pub(crate) type StepResult = Result<Done, ActionError>;

impl World {
    pub fn observe(&self) -> Observed {
        Observed {
            pods: self.pods.clone(),
            images: self.images.clone(),
            network: self.network.clone(),
            ..Observed::default()
        }
    }

    pub(crate) fn apply(&mut self, action: &Action, step: Step, now: Millis) -> StepResult {
        match (step, action) {
            (Step::ImagePresent, Action::Pull { image, .. }) => {
                self.images.insert(image.clone(), format!("sha256:{image}"));
                Ok(Done::Done)
            }
            (Step::PodBegun, Action::CreatePod { pod }) => self.begin_pod(pod, now),
            (Step::PodReady, Action::CreatePod { pod }) => self.finish_pod(pod),
            (
                Step::RunBegun | Step::RunLive,
                Action::StartContainer { pod, incarnation, container, attempt },
            ) => {
                let id = pod.container_id(container, *attempt);
                self.start(pod, *incarnation, &id, container, *attempt, step, now)
            }
            (Step::RunStopped, Action::StopContainer { pod, id, .. }) => {
                self.end_run(pod, id, 143, now);
                Ok(Done::Done)
            }
            (Step::RunRemoved, Action::RemoveContainer { pod, id }) => Ok(self.remove_run(pod, id)),
            (
                Step::RecordWritten,
                Action::SyncVolumes { pod, incarnation } | Action::UpdateRecord { pod, incarnation },
            ) => Ok(self.write_record(pod, *incarnation)),
            (Step::PodHalfDeleted | Step::PodGone, Action::DeletePod { pod, incarnation, .. }) => {
                Ok(self.delete_pod(pod, *incarnation, step))
            }
            (Step::NetworkWritten, Action::SyncNetwork { endpoints, hash }) => {
                self.check_ports(endpoints);
                self.endpoints = endpoints.clone();
                self.network = Some(hash.clone());
                Ok(Done::Done)
            }
            (step, action) => {
                Err(error(Next::Blocked, "Simulator", format!("{step:?} is no step of {action:?}")))
            }
        }
    }

    /// A run ends by itself, by a signal, or with its monitor (`code` below 0).
    pub fn end_run(&mut self, pod: &PodKey, id: &ContainerId, code: i32, now: Millis) -> bool {
        let Some(run) = self.run_mut(pod, id) else { return false };
        let ContainerState::Running { started_at, .. } = run.state else { return false };
        run.state = if code < 0 {
            ContainerState::Lost { noticed_at: now }
        } else {
            let signal = if code > 128 { code - 128 } else { 0 };
            ContainerState::Exited(Exit { code, signal, oom: false, started_at, finished_at: now })
        };
        true
    }

    /// Per-boot state is gone; images and memory stay.
    pub fn reboot(&mut self) {
        self.pods.clear();
        self.network = None;
        self.endpoints.clear();
    }

    pub fn run(&self, pod: &PodKey, id: &ContainerId) -> Option<&ObservedContainer> {
        self.pods.get(pod)?.containers.iter().find(|run| run.id == *id)
    }

    pub fn live_runs(&self) -> impl Iterator<Item = (&PodKey, &ObservedContainer)> {
        self.pods
            .iter()
            .flat_map(|(key, seen)| seen.containers.iter().map(move |run| (key, run)))
            .filter(|(_, run)| run.is_running())
    }

    fn run_mut(&mut self, pod: &PodKey, id: &ContainerId) -> Option<&mut ObservedContainer> {
        self.pods.get_mut(pod)?.containers.iter_mut().find(|run| run.id == *id)
    }

    fn begin_pod(&mut self, pod: &Arc<DesiredPod>, now: Millis) -> StepResult {
        if self.foreign.contains(&pod.key) {
            let message = format!("{} exists and is not ours", pod.id);
            return Err(error(Next::Blocked, "ForeignObject", message));
        }
        match self.pods.get_mut(&pod.key) {
            Some(seen) if seen.ready && seen.pod.sandbox_hash == pod.sandbox_hash => Ok(Done::Done),
            Some(seen) if seen.ready || !seen.containers.is_empty() => Ok(Done::Stale),
            Some(seen) => {
                seen.pod = pod.clone();
                Ok(Done::Done)
            }
            None => {
                self.next_incarnation += 1;
                let seen = ObservedPod {
                    pod: pod.clone(),
                    incarnation: self.next_incarnation,
                    created_at: now,
                    ready: false,
                    ip: None,
                    containers: Vec::new(),
                    over_limit: None,
                };
                self.pods.insert(pod.key.clone(), seen);
                Ok(Done::Done)
            }
        }
    }

    fn finish_pod(&mut self, pod: &Arc<DesiredPod>) -> StepResult {
        let last = u8::try_from(self.next_incarnation % 250).unwrap_or(0);
        let Some(seen) = self.pods.get_mut(&pod.key) else { return Ok(Done::Stale) };
        if !seen.ready {
            seen.ready = true;
            seen.ip = (!pod.spec.host_network).then(|| Ipv4Addr::new(10, 88, 0, last.saturating_add(2)));
        }
        Ok(Done::Done)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one action")]
    fn start(
        &mut self,
        pod: &Arc<DesiredPod>,
        incarnation: u64,
        id: &ContainerId,
        name: &keel_plan::ContainerName,
        attempt: u32,
        step: Step,
        now: Millis,
    ) -> StepResult {
        let Some(wanted) = pod.container(name).cloned() else { return Ok(Done::Stale) };
        let image = self.images.get(&wanted.image).cloned();
        let Some(seen) = self.pods.get_mut(&pod.key) else { return Ok(Done::Stale) };
        if seen.incarnation != incarnation || !seen.ready {
            return Ok(Done::Stale);
        }
        let existing = seen.containers.iter().position(|run| run.id == *id);
        if step == Step::RunBegun {
            match existing.map(|index| &seen.containers[index].state) {
                None => {}
                Some(ContainerState::Partial) => return Ok(Done::Done),
                Some(_) => return Ok(Done::Stale),
            }
            seen.containers.push(ObservedContainer {
                id: id.clone(),
                name: name.clone(),
                role: wanted.role,
                hash: wanted.hash.clone(),
                attempt,
                state: ContainerState::Partial,
                image_digest: image.clone().unwrap_or_default(),
                stand_in: false,
            });
            return Ok(Done::Done);
        }
        // Removed meanwhile: a start that goes on after its daemon died finds no directory any more.
        let Some(index) = existing else { return Ok(Done::Stale) };
        if seen.containers[index].is_running() {
            return Ok(Done::Done);
        }
        let violation = start_violation(seen, pod, id, wanted.role, image.is_some());
        self.next_pid += 1;
        let pid = self.next_pid;
        seen.containers[index].state = ContainerState::Running { pid, started_at: now };
        self.violations.extend(violation);
        self.check_recreate(pod);
        Ok(Done::Done)
    }

    fn remove_run(&mut self, pod: &PodKey, id: &ContainerId) -> Done {
        let Some(seen) = self.pods.get_mut(pod) else { return Done::Done };
        match seen.containers.iter().position(|run| run.id == *id) {
            None => Done::Done,
            Some(index) if seen.containers[index].is_running() => Done::Stale,
            Some(index) => {
                seen.containers.remove(index);
                Done::Done
            }
        }
    }

    fn write_record(&mut self, pod: &Arc<DesiredPod>, incarnation: u64) -> Done {
        match self.pods.get_mut(&pod.key) {
            Some(seen) if seen.incarnation == incarnation && seen.pod.sandbox_hash == pod.sandbox_hash => {
                seen.pod = pod.clone();
                Done::Done
            }
            _ => Done::Stale,
        }
    }

    fn delete_pod(&mut self, pod: &PodKey, incarnation: u64, step: Step) -> Done {
        let Some(seen) = self.pods.get_mut(pod) else { return Done::Done };
        if seen.incarnation != incarnation || !seen.containers.is_empty() {
            return Done::Stale;
        }
        match step {
            Step::PodHalfDeleted => {
                seen.ready = false;
                seen.ip = None;
            }
            _ => drop(self.pods.remove(pod)),
        }
        Done::Done
    }

    fn check_ports(&mut self, endpoints: &[Endpoint]) {
        let mut taken = BTreeSet::new();
        for port in endpoints.iter().flat_map(|endpoint| &endpoint.ports) {
            if !taken.insert((port.host_ip, port.host_port, port.protocol.clone())) {
                self.violations.push(format!("host port {} is published twice", port.host_port));
            }
        }
    }

    /// Two versions of one Deployment never run at the same time.
    fn check_recreate(&mut self, pod: &DesiredPod) {
        if pod.owner.kind != "Deployment" {
            return;
        }
        let siblings = self
            .pods
            .values()
            .filter(|seen| seen.pod.owner == pod.owner && seen.pod.key.namespace == pod.key.namespace);
        for seen in siblings {
            let live = seen.containers.iter().filter(|run| run.is_running() && run.role == Role::Main);
            for run in live {
                let other = pod.container(&run.name).is_none_or(|c| c.hash != run.hash);
                if other || seen.pod.sandbox_hash != pod.sandbox_hash {
                    self.violations.push(format!("{} runs beside a new version in {}", run.id, pod.key));
                }
            }
        }
    }
}

/// What must hold when a process is made.
fn start_violation(
    seen: &ObservedPod,
    pod: &DesiredPod,
    id: &ContainerId,
    role: Role,
    image_present: bool,
) -> Option<String> {
    let run = seen.containers.iter().find(|run| run.id == *id)?;
    let twin = seen.containers.iter().find(|other| other.is_running() && other.name == run.name);
    let succeeded = |name: &keel_plan::ContainerName| {
        let exit = seen.latest(name).and_then(keel_plan::exit_of);
        exit.is_some_and(|exit| exit.code == 0)
    };
    let before = pod.containers.iter().take_while(|c| c.name != run.name);
    let unfinished = before.filter(|c| c.role == Role::Init).find(|c| !succeeded(&c.name));
    if let Some(twin) = twin {
        Some(format!("{id} started while {} is live", twin.id))
    } else if !image_present {
        Some(format!("{id} started without its image"))
    } else if let Some(init) = unfinished {
        Some(format!("{id} started before init container {} succeeded", init.name))
    } else if role == Role::Init && seen.containers.iter().any(|other| other.role == Role::Main) {
        Some(format!("init {id} started after a main container"))
    } else {
        None
    }
}

pub(crate) fn error(next: Next, reason: &'static str, message: impl Into<String>) -> ActionError {
    ActionError { next, message: message.into(), reason, hint: None }
}
