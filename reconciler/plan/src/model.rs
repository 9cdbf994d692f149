//! The vocabulary that planner, engine, host and views share.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;

use keel_manifest::model::{Container, PodSpec, PullPolicy, RestartPolicy};
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch. Always a parameter, never read inside this crate.
pub type Millis = u64;

/// Identity of a pod: renaming or moving its file does not change it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodKey {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

macro_rules! text_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

text_newtype!(
    /// Host-side identity of a pod, a pure function of its key: `<name, at most 40 bytes>-<10 hex digits>`.
    PodId
);
text_newtype!(
    /// Host-side identity of one run of one container: `<pod id>.<container>.<attempt>`. Never used twice.
    ContainerId
);
text_newtype!(
    /// Name of a container inside its pod (DNS label).
    ContainerName
);
text_newtype!(
    /// Lower-case hex SHA-256, shortened to 16 digits, over the canonical JSON of a part of a spec.
    SpecHash
);

/// Where an object was declared. Provenance only, never identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub file: String,
    pub line: u32,
    pub column: u32,
}

/// The object that a pod was expanded from (a bare `Pod` owns itself). In the pod's namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Owner {
    pub kind: String,
    pub name: String,
}

/// Everything that should run. Built from manifests by `lower_desired`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    pub pods: BTreeMap<PodKey, Arc<DesiredPod>>,
    /// Pods that are declared but cannot run yet: what is missing, in words.
    pub unresolved: BTreeMap<PodKey, String>,
    /// Pods to leave exactly as they are: their last good version is unknown (broken file, no memory of it).
    pub frozen: BTreeSet<PodKey>,
    /// False until one complete, error-free read of every source: nothing is deleted before that.
    pub complete: bool,
    /// Declared Deployments, also those without pods.
    pub deployments: BTreeMap<PodKey, DesiredDeployment>,
    /// Objects declared twice. The first owner keeps the name, the other declaration has no effect.
    pub conflicts: Vec<Conflict>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredDeployment {
    pub replicas: u32,
    pub origin: Origin,
}

/// Two declarations of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// `Pod default/web`.
    pub object: String,
    pub kept: Origin,
    pub ignored: Origin,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DesiredPod {
    pub key: PodKey,
    pub id: PodId,
    pub owner: Owner,
    pub origin: Origin,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// As written, before defaults: what hashes and diffs are made of.
    pub spec: PodSpec,
    /// A change means: new pod (namespaces, volume set, pod-level security, init containers). The same for all
    /// replicas of one owner.
    pub sandbox_hash: SpecHash,
    /// A change means: swap the files of configMap and secret volumes, restart nothing.
    pub volumes_hash: SpecHash,
    /// In start order: init containers first, then the others as declared.
    pub containers: Vec<DesiredContainer>,
    /// Contents of referenced ConfigMaps and Secrets. Never serialized: records must not hold secrets.
    #[serde(skip)]
    pub resolved: Resolved,
}

impl DesiredPod {
    pub fn container(&self, name: &ContainerName) -> Option<&DesiredContainer> {
        self.containers.iter().find(|container| container.name == *name)
    }

    pub fn container_id(&self, name: &ContainerName, attempt: u32) -> ContainerId {
        ContainerId::of(&self.id, name, attempt)
    }

    /// The part of the spec behind a desired container.
    pub fn container_spec(&self, container: &DesiredContainer) -> Option<&Container> {
        match container.role {
            Role::Init => self.spec.init_containers.get(container.index),
            Role::Main => self.spec.containers.get(container.index),
        }
    }

    /// Between stop signal and kill. Never less than two seconds, as for the kubelet: even a pod that asks for none
    /// gets the chance to write its last lines.
    pub fn grace_ms(&self) -> u64 {
        const DEFAULT_S: u64 = 30;
        const FLOOR_S: u64 = 2;
        self.spec.termination_grace_period_seconds.unwrap_or(DEFAULT_S).max(FLOOR_S).saturating_mul(1000)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DesiredContainer {
    pub name: ContainerName,
    pub role: Role,
    /// Canonical, as the store names it: `docker.io/library/busybox:latest`.
    pub image: String,
    pub pull_policy: PullPolicy,
    pub restart: RestartPolicy,
    /// A change means: restart this container (for an init container: new pod).
    pub hash: SpecHash,
    /// Index into `spec.init_containers` or `spec.containers`, by role.
    pub index: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    Init,
    Main,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resolved {
    /// Per container: environment in order, before `$(VAR)` expansion.
    pub env: BTreeMap<ContainerName, Vec<EnvEntry>>,
    /// configMap and secret volumes by volume name.
    pub files: BTreeMap<String, VolumeFiles>,
    /// In the order of the pod.
    pub pull_secrets: Vec<PullSecret>,
}

/// Logins for registries from an `imagePullSecrets` entry.
#[derive(Clone, PartialEq, Eq)]
pub struct PullSecret {
    /// `Secret default/regcred`.
    pub name: String,
    /// The contents of a `config.json`, or what is wrong with the Secret.
    pub config: Result<Arc<[u8]>, String>,
}

impl fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PullSecret").field(&self.name).finish()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvEntry {
    pub name: String,
    pub value: EnvValue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EnvValue {
    /// As written in the manifest: `$(VAR)` is expanded.
    Literal(String),
    /// From a ConfigMap or Secret: taken as it is.
    Verbatim(String),
    /// `fieldRef.fieldPath`, known only once the pod has its addresses, e.g. `status.podIP`.
    Field(String),
    /// `resourceFieldRef`: the number, already divided and rounded up.
    Resource(String),
    /// `resourceFieldRef` of a limit that is not set, `limits.cpu` or `limits.memory`: what the host has, divided by
    /// so many thousandths and rounded up.
    Host { resource: String, divisor_millis: u64 },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeFiles {
    /// Relative path to (contents, mode bits).
    pub files: BTreeMap<String, (Arc<[u8]>, u32)>,
    pub secret: bool,
}

/// What the host looks like now. One complete read; partial reads are errors, not smaller observations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    pub pods: BTreeMap<PodKey, ObservedPod>,
    /// Canonical image references in the store, with manifest digest.
    pub images: BTreeMap<String, String>,
    /// References of images that were in the store, are damaged and set aside; and whether pulling one again has failed.
    pub damaged: BTreeMap<String, bool>,
    /// Containers that could run from an image that they ran well from before, with its manifest digest. Looked for only
    /// when something is damaged.
    pub last_good: BTreeMap<(PodId, ContainerName), String>,
    /// Hash of the endpoint list that the packet filter and hosts files were last made from.
    pub network: Option<SpecHash>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ObservedPod {
    /// The record written when the pod was created (or last updated live).
    pub pod: Arc<DesiredPod>,
    /// Changes with each creation; a delete names the incarnation that it was planned against.
    pub incarnation: u64,
    pub created_at: Millis,
    /// Namespaces, directories and cgroup exist. False after a crash in the middle of a creation.
    pub ready: bool,
    pub ip: Option<Ipv4Addr>,
    /// Every run that still has a directory, oldest first.
    pub containers: Vec<ObservedContainer>,
    /// A volume holds more than it may, in words: the pod is stopped and made anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_limit: Option<String>,
}

impl ObservedPod {
    /// The newest run of a container.
    pub fn latest(&self, name: &ContainerName) -> Option<&ObservedContainer> {
        self.containers.iter().filter(|run| run.name == *name).max_by_key(|run| run.attempt)
    }
}

impl ObservedContainer {
    pub fn is_running(&self) -> bool {
        matches!(self.state, ContainerState::Running { .. })
    }

    /// The process exists: the start is over.
    pub fn has_process(&self) -> bool {
        matches!(self.state, ContainerState::Running { pid: 1.., .. })
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ObservedContainer {
    pub id: ContainerId,
    pub name: ContainerName,
    pub role: Role,
    pub hash: SpecHash,
    /// 0 for the first run; counts up, never reused as long as the pod is declared or exists. Deleting a pod therefore
    /// deletes the exit records of its runs.
    pub attempt: u32,
    pub state: ContainerState,
    /// Manifest digest of the image it runs.
    #[serde(default)]
    pub image_digest: String,
    /// That image is the last good one, in the place of the declared one, which is damaged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stand_in: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "camelCase")]
pub enum ContainerState {
    /// A directory without a process: a start that died half-way. To be removed.
    Partial,
    /// `pid` 0: its monitor is still starting it.
    Running {
        pid: u32,
        started_at: Millis,
    },
    Exited(Exit),
    /// The monitor is gone and so is the process; nobody knows how it ended.
    Lost {
        noticed_at: Millis,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub code: i32,
    pub signal: i32,
    pub oom: bool,
    pub started_at: Millis,
    pub finished_at: Millis,
}

/// What must survive a restart of the daemon, per pod. Small, written on change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    pub pods: BTreeMap<PodId, PodMemory>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodMemory {
    /// Sandbox that these numbers belong to; another one starts afresh.
    pub sandbox_hash: SpecHash,
    pub containers: BTreeMap<ContainerName, ContainerMemory>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerMemory {
    /// Hash of the container spec that these numbers belong to; a changed spec starts afresh.
    pub hash: SpecHash,
    pub restarts: u32,
    /// What the next exit waits: 0 before the first one, so that the first restart is immediate.
    pub delay_ms: u64,
    pub backoff_until: Millis,
    /// The run that has already been counted, so that one exit is never counted twice.
    pub counted: Option<ContainerId>,
    /// Next attempt number. Saved before the attempt begins, so that no number is used twice.
    pub next_attempt: u32,
    /// The attempt that an `Always` image was refreshed for.
    pub refreshed_attempt: Option<u32>,
    pub last_exit: Option<Exit>,
}

/// One thing to do. Everything that the executor needs is inside; it makes no choices.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make the image present (or refresh it when `policy` is `Always`).
    /// `secrets`: those of every pod that is made of the image.
    Pull { image: String, policy: PullPolicy, pod: PodKey, secrets: Vec<PullSecret> },
    /// Directories, volumes, namespaces, network of a new pod. Repairs a half-made one.
    CreatePod { pod: Arc<DesiredPod> },
    /// Root file system, OCI spec, shim, process.
    StartContainer { pod: Arc<DesiredPod>, incarnation: u64, container: ContainerName, attempt: u32 },
    /// Stop signal, grace, then kill of the whole cgroup; returns when it is gone.
    StopContainer { pod: PodKey, id: ContainerId, grace_ms: u64 },
    /// Unmount and delete what a finished or partial run left. Its log stays.
    RemoveContainer { pod: PodKey, id: ContainerId },
    /// New contents for configMap and secret volumes, one atomic swap per volume. Rewrites the record too.
    SyncVolumes { pod: Arc<DesiredPod>, incarnation: u64 },
    /// Fields that need no restart changed (probes, grace, labels, origin): rewrite the record.
    UpdateRecord { pod: Arc<DesiredPod>, incarnation: u64 },
    /// Remove a pod whose containers are all gone.
    DeletePod { pod: PodKey, id: PodId, incarnation: u64 },
    /// Replace published ports and hosts files by what these endpoints say.
    SyncNetwork { endpoints: Vec<Endpoint>, hash: SpecHash },
}

/// A pod on the network, as other pods and the packet filter see it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Endpoint {
    pub pod: PodKey,
    pub id: PodId,
    pub ip: Ipv4Addr,
    /// Names that resolve to it: pod, owner, hostname, each also with `.<namespace>`.
    pub names: Vec<String>,
    pub ports: Vec<PublishedPort>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PublishedPort {
    /// `None`: every address of the host.
    pub host_ip: Option<Ipv4Addr>,
    pub host_port: u16,
    pub container_port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
}

/// Why a pod or container is not where it should be, and what ends the wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all_fields = "camelCase")]
pub enum Waiting {
    /// Image is being pulled, or will be as soon as there is room.
    ImagePull {
        image: String,
    },
    ImagePullBackOff {
        image: String,
        until: Millis,
        message: String,
    },
    ErrImageNeverPull {
        image: String,
    },
    CrashLoopBackOff {
        container: ContainerName,
        until: Millis,
    },
    /// A referenced object or key does not exist in the manifests.
    MissingReference {
        message: String,
    },
    /// A file that declares it is broken and no good version is known.
    Frozen,
    /// An init container has not finished.
    Initializing {
        container: ContainerName,
    },
    /// Old pods of the same owner are still stopping (Recreate).
    OldPods {
        pods: Vec<PodKey>,
    },
    /// Another pod holds the host port.
    PortTaken {
        port: u16,
        holder: PodKey,
    },
    /// The last try failed; the next comes at `until`.
    Retry {
        until: Millis,
        /// The error's word, e.g. `FailedMount`.
        error: String,
        message: String,
    },
    /// Too many actions are in flight.
    Queued,
}
