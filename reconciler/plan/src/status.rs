//! What a view shows: Kubernetes' words and shapes, computed from desired, observed and what the engine knows.

use std::collections::BTreeMap;
use std::sync::Arc;

use keel_manifest::model::RestartPolicy;
use serde::{Deserialize, Serialize};

use crate::account::{exit_of, wants_restart};
use crate::model::{
    ContainerId, ContainerMemory, ContainerState as RunState, Desired, DesiredContainer, DesiredPod, Exit,
    Memory, Millis, Observed, ObservedPod, Origin, Owner, PodId, PodKey, Role, Waiting,
};
use crate::phase::{Phase, phase};
use crate::pull::PullStatus;
use crate::time::timestamp;

/// Everything there is to see about pods and their owners.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// In key order.
    pub pods: Vec<Arc<PodStatus>>,
    pub deployments: Vec<DeploymentStatus>,
    /// False until every source was read once without an error.
    pub sources_complete: bool,
    pub conflicts: Vec<crate::model::Conflict>,
    /// Host or engine troubles that are not about one pod, in words.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    #[serde(flatten)]
    pub key: PodKey,
    pub id: PodId,
    pub owner: Owner,
    pub origin: Origin,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// False while it runs although no manifest declares it any more.
    pub declared: bool,
    pub phase: Phase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(rename = "podIP", default, skip_serializing_if = "Option::is_none")]
    pub pod_ip: Option<std::net::Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "timestamp::option")]
    pub start_time: Option<Millis>,
    pub conditions: Vec<Condition>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub init_container_statuses: Vec<ContainerStatus>,
    pub container_statuses: Vec<ContainerStatus>,
    /// What it waits for, typed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<Waiting>,
    /// Images of it that are on their way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pull: Vec<PullStatus>,
    /// True when the pod is what its manifest says: nothing to do and nothing waited for.
    pub up_to_date: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(with = "timestamp")]
    pub last_transition_time: Millis,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    pub name: String,
    pub image: String,
    #[serde(rename = "imageID")]
    pub image_id: String,
    /// `evenkeel://<id>` of the newest run; empty before the first.
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub restart_count: u32,
    pub ready: bool,
    pub started: bool,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_state: Option<State>,
    /// Number of the newest run, which is also the name of its log file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum State {
    Waiting {
        reason: String,
        #[serde(default, skip_serializing_if = "String::is_empty")]
        message: String,
    },
    Running {
        #[serde(with = "timestamp")]
        started_at: Millis,
    },
    Terminated {
        exit_code: i32,
        #[serde(default, skip_serializing_if = "is_zero")]
        signal: i32,
        reason: String,
        #[serde(with = "timestamp")]
        started_at: Millis,
        #[serde(with = "timestamp")]
        finished_at: Millis,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentStatus {
    #[serde(flatten)]
    pub key: PodKey,
    pub origin: Origin,
    /// Wanted.
    pub replicas: u32,
    pub updated_replicas: u32,
    pub ready_replicas: u32,
    pub available_replicas: u32,
    pub unavailable_replicas: u32,
    pub conditions: Vec<Condition>,
}

/// What only the engine knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Probe results of live runs.
    pub containers: BTreeMap<ContainerId, ContainerFacts>,
    /// Of the plan, and of retries and queues on top.
    pub waiting: BTreeMap<PodKey, Vec<Waiting>>,
    /// Pods with planned or running actions.
    pub busy: std::collections::BTreeSet<PodKey>,
    /// Pulls under way, by image.
    pub pulls: BTreeMap<String, PullStatus>,
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerFacts {
    pub started: bool,
    pub ready: bool,
    /// Last failure of the readiness or startup probe.
    pub message: Option<String>,
}

/// `previous` gives the transition times of conditions that did not change; parts that did not change are shared.
pub fn status(
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    facts: &Facts,
    previous: &Status,
    now: Millis,
) -> Status {
    let mut pods = Vec::with_capacity(desired.pods.len());
    let mut old = previous.pods.iter().peekable();
    let mut keys: Vec<&PodKey> =
        desired.pods.keys().chain(observed.pods.keys()).chain(desired.unresolved.keys()).collect();
    keys.extend(&desired.frozen);
    keys.sort();
    keys.dedup();
    for key in keys {
        while old.next_if(|before| before.key < *key).is_some() {}
        let before = old.next_if(|before| before.key == *key);
        let view = PodView { key, desired, observed, memory, facts };
        let mut pod = view.status();
        carry_times(&mut pod.conditions, before.map(|b| b.conditions.as_slice()).unwrap_or_default(), now);
        pods.push(match before {
            Some(before) if **before == pod => before.clone(),
            _ => Arc::new(pod),
        });
    }
    let deployments = deployments(desired, &pods, previous, now);
    Status {
        deployments,
        pods,
        sources_complete: desired.complete,
        conflicts: desired.conflicts.clone(),
        problems: facts.problems.clone(),
    }
}

/// One pod of [`status`]; condition times are 0.
pub fn pod_status(
    key: &PodKey,
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    facts: &Facts,
) -> PodStatus {
    PodView { key, desired, observed, memory, facts }.status()
}

impl PodStatus {
    pub fn is_ready(&self) -> bool {
        self.condition("Ready").is_some_and(|c| c.status == "True")
    }

    /// The first container that is neither ready nor over with success; with its code when it is over without. A
    /// container is over when it has ended and its pod has nothing left to do.
    pub fn unsettled(&self) -> Option<(&str, Option<i32>)> {
        let ended = |status: &ContainerStatus| match status.state {
            State::Terminated { exit_code, .. } => Some(exit_code),
            _ => None,
        };
        let mut all = self.init_container_statuses.iter().chain(&self.container_statuses);
        let open = all.find(|status| !status.ready && ended(status) != Some(0))?;
        Some((&open.name, ended(open)))
    }

    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.kind == kind)
    }
}

impl Waiting {
    /// Kubernetes' word for it.
    pub fn reason(&self) -> &str {
        match self {
            Waiting::ImagePull { .. } => "Pulling",
            Waiting::ImagePullBackOff { .. } => "ImagePullBackOff",
            Waiting::ErrImageNeverPull { .. } => "ErrImageNeverPull",
            Waiting::CrashLoopBackOff { .. } => "CrashLoopBackOff",
            Waiting::MissingReference { .. } => "MissingReference",
            Waiting::Frozen => "ManifestInvalid",
            Waiting::Initializing { .. } => "PodInitializing",
            Waiting::OldPods { .. } => "WaitingForOldPods",
            Waiting::PortTaken { .. } => "PortTaken",
            Waiting::Retry { error, .. } => error,
            Waiting::Queued => "Queued",
        }
    }

    /// In words, without the time that is left.
    pub fn message(&self) -> String {
        match self {
            Waiting::ImagePull { image } => format!("pulling image {image}"),
            Waiting::ImagePullBackOff { image, message, .. } => format!("image {image}: {message}"),
            Waiting::ErrImageNeverPull { image } => {
                format!("image {image} is not in the store and imagePullPolicy is Never")
            }
            Waiting::CrashLoopBackOff { container, .. } => {
                format!("container {container} keeps ending; waiting before the next restart")
            }
            Waiting::MissingReference { message } | Waiting::Retry { message, .. } => message.clone(),
            Waiting::Frozen => "its manifest is invalid and no good version is known; left as it is".into(),
            Waiting::Initializing { container } => format!("init container {container} has not finished"),
            Waiting::OldPods { pods } => {
                let names: Vec<_> = pods.iter().map(ToString::to_string).collect();
                format!("old pods are still there: {}", names.join(", "))
            }
            Waiting::PortTaken { port, holder } => format!("host port {port} belongs to pod {holder}"),
            Waiting::Queued => "waiting for other actions to finish".into(),
        }
    }

    /// When the wait ends by itself, if it does.
    pub fn until(&self) -> Option<Millis> {
        match self {
            Waiting::ImagePullBackOff { until, .. }
            | Waiting::CrashLoopBackOff { until, .. }
            | Waiting::Retry { until, .. } => Some(*until),
            _ => None,
        }
    }

    /// Waits that are part of a normal start; the others need time, luck or a person.
    pub fn is_progress(&self) -> bool {
        matches!(
            self,
            Waiting::ImagePull { .. }
                | Waiting::Initializing { .. }
                | Waiting::OldPods { .. }
                | Waiting::Queued
        )
    }
}

struct PodView<'a> {
    key: &'a PodKey,
    desired: &'a Desired,
    observed: &'a Observed,
    memory: &'a Memory,
    facts: &'a Facts,
}

impl PodView<'_> {
    /// Each image once, in the order of the containers.
    fn pulls(&self, pod: Option<&Arc<DesiredPod>>) -> Vec<PullStatus> {
        let images = pod.into_iter().flat_map(|pod| &pod.containers).map(|container| &container.image);
        let mut pulls: Vec<PullStatus> = Vec::new();
        for pull in images.filter_map(|image| self.facts.pulls.get(image)) {
            if pulls.iter().all(|other| other.image != pull.image) {
                pulls.push(pull.clone());
            }
        }
        pulls
    }

    fn status(&self) -> PodStatus {
        let wanted = self.desired.pods.get(self.key);
        let seen = self.observed.pods.get(self.key);
        let waiting = self.facts.waiting.get(self.key).cloned().unwrap_or_default();
        let pod = wanted.or(seen.map(|seen| &seen.pod));
        // Until every source has been read nobody knows what is not declared.
        let declared = !self.desired.complete
            || wanted.is_some()
            || self.desired.unresolved.contains_key(self.key)
            || self.desired.frozen.contains(self.key);
        let of = |role| -> Vec<ContainerStatus> {
            let containers = pod.into_iter().flat_map(|pod| pod.containers.iter().map(move |c| (pod, c)));
            containers
                .filter(|(_, c)| c.role == role)
                .map(|(pod, c)| self.container(pod, c, seen, &waiting))
                .collect()
        };
        let (init, main) = (of(Role::Init), of(Role::Main));
        let policy = pod.and_then(|pod| pod.spec.restart_policy).unwrap_or_default();
        let phase = if pod.is_some() { phase(policy, &init, &main) } else { Phase::Pending };
        let blocker = waiting.iter().find(|w| !w.is_progress()).or(waiting.first());
        let over_limit = seen.and_then(|seen| seen.over_limit.clone());
        let (reason, message) = match (declared, blocker) {
            (false, _) => (Some("Terminating".into()), Some("no longer declared".into())),
            (true, _) if over_limit.is_some() => (Some("Evicted".into()), over_limit),
            (true, Some(waiting)) => (Some(waiting.reason().into()), Some(waiting.message())),
            (true, None) => (None, None),
        };
        PodStatus {
            key: self.key.clone(),
            id: pod.map_or_else(|| PodId::of(self.key), |pod| pod.id.clone()),
            owner: pod.map_or_else(
                || Owner { kind: "Pod".into(), name: self.key.name.clone() },
                |pod| pod.owner.clone(),
            ),
            origin: pod.map(|pod| pod.origin.clone()).unwrap_or_default(),
            labels: pod.map(|pod| pod.labels.clone()).unwrap_or_default(),
            declared,
            conditions: conditions(phase, policy, &init, &main, seen),
            phase,
            reason,
            message,
            pod_ip: seen.and_then(|seen| seen.ip),
            start_time: seen.map(|seen| seen.created_at),
            init_container_statuses: init,
            container_statuses: main,
            pull: self.pulls(pod),
            up_to_date: declared && waiting.is_empty() && !self.facts.busy.contains(self.key),
            waiting,
        }
    }

    fn container(
        &self,
        pod: &DesiredPod,
        container: &DesiredContainer,
        seen: Option<&ObservedPod>,
        waiting: &[Waiting],
    ) -> ContainerStatus {
        let memory = self.memory.pods.get(&pod.id).and_then(|m| m.containers.get(&container.name));
        let latest = seen.and_then(|seen| seen.latest(&container.name));
        let facts = latest.and_then(|run| self.facts.containers.get(&run.id));
        let running = latest.is_some_and(|run| run.has_process());
        let ended = latest
            .and_then(exit_of)
            .or_else(|| finished_before(memory, seen))
            .or_else(|| proven_by_main(container, latest.is_some(), seen));
        let backing_off = waiting.iter().any(
            |w| matches!(w, Waiting::CrashLoopBackOff { container: name, .. } if *name == container.name),
        );
        let state = match latest.map(|run| &run.state) {
            Some(RunState::Running { pid: 1.., started_at }) => State::Running { started_at: *started_at },
            _ => match &ended {
                Some(exit) if !backing_off => terminated(exit),
                _ => self.waiting_state(container, seen, waiting, backing_off),
            },
        };
        let previous = seen.and_then(|seen| {
            let older = seen.containers.iter().filter(|run| run.name == container.name);
            let older = older.filter(|run| latest.is_some_and(|latest| run.attempt < latest.attempt));
            older.max_by_key(|run| run.attempt).and_then(exit_of)
        });
        let remembered = memory.filter(|m| m.hash == container.hash).and_then(|m| m.last_exit.clone());
        let last_state = match &state {
            State::Waiting { .. } => ended.or(remembered),
            State::Running { .. } => previous.or(remembered),
            State::Terminated { .. } => previous,
        };
        let succeeded = matches!(state, State::Terminated { exit_code: 0, .. });
        ContainerStatus {
            name: container.name.0.clone(),
            image: container.image.clone(),
            image_id: latest.map(|run| run.image_digest.clone()).unwrap_or_default(),
            container_id: latest.map(|run| format!("evenkeel://{}", run.id)).unwrap_or_default(),
            restart_count: memory.map_or(0, |m| restarts_done(m, container, latest.map(|run| &run.id))),
            ready: match container.role {
                Role::Main => running && facts.is_some_and(|f| f.ready),
                Role::Init => succeeded,
            },
            started: running && facts.is_some_and(|f| f.started),
            last_state: last_state.as_ref().map(terminated),
            attempt: latest.map(|run| run.attempt),
            pid: latest.and_then(|run| match run.state {
                RunState::Running { pid: pid @ 1.., .. } => Some(pid),
                _ => None,
            }),
            state,
        }
    }

    fn waiting_state(
        &self,
        container: &DesiredContainer,
        seen: Option<&ObservedPod>,
        waiting: &[Waiting],
        backing_off: bool,
    ) -> State {
        let about_image = |w: &&Waiting| match w {
            Waiting::ImagePull { image }
            | Waiting::ImagePullBackOff { image, .. }
            | Waiting::ErrImageNeverPull { image } => *image == container.image,
            _ => false,
        };
        let found = match backing_off {
            true => waiting.iter().find(
                |w| matches!(w, Waiting::CrashLoopBackOff { container: name, .. } if *name == container.name),
            ),
            false => waiting.iter().find(about_image).or_else(|| {
                let other = |w: &&Waiting| match w {
                    Waiting::Initializing { .. } => container.role == Role::Main,
                    Waiting::CrashLoopBackOff { .. }
                    | Waiting::ImagePull { .. }
                    | Waiting::ImagePullBackOff { .. }
                    | Waiting::ErrImageNeverPull { .. } => false,
                    _ => true,
                };
                waiting.iter().find(other)
            }),
        };
        match found {
            Some(Waiting::ImagePull { image }) => State::Waiting {
                reason: "Pulling".into(),
                message: self.facts.pulls.get(image).map(PullStatus::to_string).unwrap_or_default(),
            },
            Some(waiting) => State::Waiting { reason: waiting.reason().into(), message: waiting.message() },
            None if seen.is_some() || container.role == Role::Main => {
                State::Waiting { reason: "ContainerCreating".into(), message: String::new() }
            }
            None => State::Waiting { reason: "PodInitializing".into(), message: String::new() },
        }
    }
}

/// The pod is gone with the last boot, but its containers had completed.
fn finished_before(memory: Option<&ContainerMemory>, seen: Option<&ObservedPod>) -> Option<Exit> {
    match seen {
        None => memory.filter(|m| m.counted.is_some()).and_then(|m| m.last_exit.clone()),
        Some(_) => None,
    }
}

/// The run of an init container is gone, but a main container has run: it had succeeded.
fn proven_by_main(container: &DesiredContainer, has_run: bool, seen: Option<&ObservedPod>) -> Option<Exit> {
    let seen = seen.filter(|_| container.role == Role::Init && !has_run)?;
    let proven = seen.containers.iter().any(|run| run.role == Role::Main);
    let at = seen.created_at;
    proven.then_some(Exit { code: 0, signal: 0, oom: false, started_at: at, finished_at: at })
}

fn terminated(exit: &Exit) -> State {
    let reason = match exit {
        Exit { oom: true, .. } => "OOMKilled",
        Exit { code: 0, .. } => "Completed",
        Exit { code: 137, signal: 0, .. } => "ContainerStatusUnknown",
        _ => "Error",
    };
    State::Terminated {
        exit_code: exit.code,
        signal: exit.signal,
        reason: reason.into(),
        started_at: exit.started_at,
        finished_at: exit.finished_at,
    }
}

fn conditions(
    phase: Phase,
    policy: RestartPolicy,
    init: &[ContainerStatus],
    main: &[ContainerStatus],
    seen: Option<&ObservedPod>,
) -> Vec<Condition> {
    let condition = |kind: &str, holds: bool, reason: &str, message: String| Condition {
        kind: kind.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: (!holds && !reason.is_empty()).then(|| reason.into()),
        message: (!holds && !message.is_empty()).then_some(message),
        last_transition_time: 0,
    };
    let names = |all: &[ContainerStatus], missing: fn(&ContainerStatus) -> bool| {
        all.iter().filter(|c| missing(c)).map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ")
    };
    let uninitialized = names(init, |c| !c.ready);
    let unready = names(main, |c| !c.ready);
    let initialized = uninitialized.is_empty() || phase == Phase::Succeeded;
    let ready = unready.is_empty() && !main.is_empty() && initialized;
    let (reason, message) = match phase {
        Phase::Succeeded => ("PodCompleted", String::new()),
        Phase::Failed if policy != RestartPolicy::Always => ("PodFailed", String::new()),
        _ if !initialized => ("ContainersNotInitialized", format!("not finished: {uninitialized}")),
        _ => ("ContainersNotReady", format!("not ready: {unready}")),
    };
    let sandbox = seen.is_some_and(|seen| seen.ready);
    vec![
        condition("PodScheduled", true, "", String::new()),
        condition("PodReadyToStartContainers", sandbox, "", String::new()),
        condition(
            "Initialized",
            initialized,
            "ContainersNotInitialized",
            format!("not finished: {uninitialized}"),
        ),
        condition("ContainersReady", ready, reason, message.clone()),
        condition("Ready", ready, reason, message),
    ]
}

/// A condition keeps its time while its status stays.
fn carry_times(conditions: &mut [Condition], before: &[Condition], now: Millis) {
    for condition in conditions {
        let same = before.iter().find(|b| b.kind == condition.kind && b.status == condition.status);
        condition.last_transition_time = same.map_or(now, |b| b.last_transition_time);
    }
}

fn deployments(
    desired: &Desired,
    pods: &[Arc<PodStatus>],
    previous: &Status,
    now: Millis,
) -> Vec<DeploymentStatus> {
    let mut counts: BTreeMap<(&str, &str), (u32, u32)> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.owner.kind == "Deployment" && pod.declared) {
        let entry = counts.entry((&pod.key.namespace, &pod.owner.name)).or_default();
        entry.0 += u32::from(pod.up_to_date);
        entry.1 += u32::from(pod.is_ready());
    }
    let all = desired.deployments.iter().map(|(key, deployment)| {
        let owner = (key.namespace.as_str(), key.name.as_str());
        let (updated, ready) = counts.get(&owner).copied().unwrap_or_default();
        let replicas = deployment.replicas;
        let condition = |kind: &str, holds: bool, reason: &str, message: String| Condition {
            kind: kind.into(),
            status: if holds { "True" } else { "False" }.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_transition_time: 0,
        };
        let available = ready >= replicas;
        let word = if available { "MinimumReplicasAvailable" } else { "MinimumReplicasUnavailable" };
        let progress =
            if available && updated >= replicas { "NewReplicaSetAvailable" } else { "ReplicaSetUpdated" };
        let mut conditions = vec![
            condition("Available", available, word, format!("{ready} of {replicas} pods are ready")),
            condition("Progressing", true, progress, format!("{updated} of {replicas} pods are up to date")),
        ];
        let before = previous.deployments.iter().find(|before| before.key == *key);
        carry_times(&mut conditions, before.map(|b| b.conditions.as_slice()).unwrap_or_default(), now);
        DeploymentStatus {
            key: key.clone(),
            origin: deployment.origin.clone(),
            replicas,
            updated_replicas: updated,
            ready_replicas: ready,
            available_replicas: ready,
            unavailable_replicas: replicas.saturating_sub(ready),
            conditions,
        }
    });
    all.collect()
}

/// Kubernetes counts restarts that were made: the one that the newest exit asks for is counted in memory already.
fn restarts_done(
    memory: &ContainerMemory,
    container: &DesiredContainer,
    newest: Option<&ContainerId>,
) -> u32 {
    let counted = memory.counted.is_some() && memory.counted.as_ref() == newest;
    let wanted = |exit: &Exit| wants_restart(container.restart, exit);
    let pending = counted && memory.last_exit.as_ref().is_some_and(wanted);
    memory.restarts.saturating_sub(u32::from(pending))
}

fn is_zero(value: &i32) -> bool {
    *value == 0
}
