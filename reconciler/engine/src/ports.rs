//! What the engine needs from a host. Implemented by `keel-host` on the real one and by `keel-sim` in memory.

use keel_plan::{Action, ContainerId, DesiredPod, Memory, Observed, PodId, PodMemory};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

/// Every method blocks; the driver calls them on threads that may block.
pub trait Host: Send + Sync {
    /// One complete read of the world. An error means "unknown", never "empty".
    fn observe(&self) -> Result<Observed, PortError>;

    /// Does one action. Idempotent: done twice, or begun by a predecessor that died, the result is the same.
    fn perform(&self, action: &Action, report: &(dyn Fn(Progress) + Sync)) -> Result<Done, ActionError>;

    /// Nobody wants this any more: what can be broken off without harm is. `perform` still answers.
    fn cancel(&self, _action: &Action) {}

    /// One try of one probe, within its timeout.
    fn probe(&self, request: &ProbeRequest) -> ProbeOutcome;

    /// What cannot be read counts as forgotten: counts start at 0 again, nothing else is lost.
    fn load_memory(&self) -> Memory;

    /// `None` forgets the pod. Written on each start and each exit, before what relies on it is done, on the engine's
    /// thread: it must be cheap. A rename in memory survives a restart of the daemon.
    fn save_memory(&self, pod: &PodId, memory: Option<&PodMemory>) -> Result<(), PortError>;

    /// The same for longer than this boot, where that takes longer. Comes some time after `save_memory`, in the same
    /// order for each pod; what was replaced meanwhile is left out, but no `None`.
    fn keep_memory(&self, pod: &PodId, memory: Option<&PodMemory>) -> Result<(), PortError>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    Done,
    /// The object is not the one that the action was planned against; nothing was touched.
    Stale,
}

/// An action's error says what next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ActionError {
    pub next: Next,
    /// The whole chain, one line.
    pub message: String,
    /// CamelCase word for events and conditions, e.g. `FailedMount`, `ErrImagePull`, `PortInUse`.
    pub reason: &'static str,
    /// What a person can do, one sentence.
    pub hint: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Worth another try after the usual back-off.
    Retry,
    /// Pointless until the manifest, the host or a registry changes; tried again at the slowest rate, a pull with the
    /// usual back-off.
    Blocked,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PortError(pub String);

/// Progress of a pull; the only action that is long enough to have any. Speeds are added here, a host leaves them out.
pub use keel_plan::PullStatus as Progress;

#[derive(Clone, Debug, PartialEq)]
pub struct ProbeRequest {
    pub pod: Arc<DesiredPod>,
    pub container: ContainerId,
    pub container_index: usize,
    pub ip: Option<Ipv4Addr>,
    pub kind: ProbeKind,
    pub timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeOutcome {
    Success,
    Failure(String),
    /// The probe itself could not be run: no verdict, state unchanged.
    Error(String),
}
