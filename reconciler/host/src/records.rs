//! The files that describe pods and containers of this boot.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keel_plan::{ContainerId, ContainerName, DesiredPod, Millis, PodId, PodKey, Role, SpecHash};
use serde::{Deserialize, Serialize};

use crate::paths::Paths;
use crate::state::{PathError, read_json};

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
    /// The host's id that is the pod's root, for a pod with users of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first_id: Option<u32>,
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
    /// See [`keel_plan::ObservedContainer::stand_in`].
    #[serde(default)]
    pub(crate) stand_in: bool,
    /// Number of the signal that asks for the end.
    #[serde(default)]
    pub(crate) stop_signal: i32,
    /// What made it: another runtime does not know it.
    #[serde(default)]
    pub(crate) runtime: Option<PathBuf>,
}

/// The runtime that made a container. `otherwise` for what has no record, and where that program is gone: an upgrade
/// that moves it leaves its state as it was.
pub(crate) fn runtime_of(paths: &Paths, id: &ContainerId, otherwise: &Path) -> Result<PathBuf, PathError> {
    let record = read_json::<ContainerRecord>(&paths.container_record(id))?;
    let recorded = record.and_then(|record| record.runtime).filter(|path| path.exists());
    Ok(recorded.unwrap_or_else(|| otherwise.to_owned()))
}
