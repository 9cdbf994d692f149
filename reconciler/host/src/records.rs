//! The files that describe pods and containers of this boot.

use std::net::Ipv4Addr;
use std::sync::Arc;

use keel_plan::{ContainerId, ContainerName, DesiredPod, Millis, PodId, PodKey, Role, SpecHash};
use serde::{Deserialize, Serialize};

/// Version of both record formats. Readers accept older ones and ignore fields that they do not know.
pub(crate) const RECORD_VERSION: u32 = 1;

/// `pods/<id>/pod.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    pub(crate) version: u32,
    pub(crate) incarnation: u64,
    pub(crate) created_at: Millis,
    /// Written false before the first side effect and true after the last.
    pub(crate) ready: bool,
    pub(crate) ip: Option<Ipv4Addr>,
    pub(crate) pod: Arc<DesiredPod>,
}

/// `containers/<id>/container.json`, written before the first side effect of a start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) version: u32,
    pub(crate) id: ContainerId,
    pub(crate) pod: PodKey,
    pub(crate) pod_id: PodId,
    pub(crate) name: ContainerName,
    pub(crate) role: Role,
    pub(crate) hash: SpecHash,
    pub(crate) attempt: u32,
    pub(crate) created_at: Millis,
    #[serde(default)]
    pub(crate) image_digest: String,
    /// Number of the signal that asks for the end.
    #[serde(default)]
    pub(crate) stop_signal: i32,
}
