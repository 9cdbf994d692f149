//! The status as files, and the status without a daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keel_plan::{
    ContainerFacts, ContainerId, ContainerState, Desired, DesiredDeployment, Facts, Memory, Observed, PodKey,
    PodStatus, Role, Status, status,
};

use crate::containers::private_dir;
use crate::error::HostError;
use crate::observe;
use crate::paths::{Paths, bounded_name};
use crate::state::{Keep, PathError, names, read_json, remove_file, write_file, write_json};

/// Writes what changed: one file for each pod and one for the whole, for people and tools without an API.
#[derive(Debug)]
pub struct StatusFiles {
    dir: PathBuf,
    written: BTreeMap<PodKey, Arc<PodStatus>>,
}

impl StatusFiles {
    pub fn open(paths: &Paths) -> Result<StatusFiles, HostError> {
        let dir = paths.status_dir();
        private_dir(&dir)?;
        for name in names(&dir)? {
            remove_file(&dir.join(name))?;
        }
        Ok(StatusFiles { dir, written: BTreeMap::new() })
    }

    pub fn write(&mut self, status: &Status) -> Result<(), PathError> {
        for pod in &status.pods {
            if self.written.get(&pod.key).is_some_and(|before| Arc::ptr_eq(before, pod)) {
                continue;
            }
            let text = serde_json::to_string_pretty(pod).unwrap_or_default() + "\n";
            write_file(&self.file(&pod.key), text.as_bytes(), Keep::Boot)?;
            self.written.insert(pod.key.clone(), pod.clone());
        }
        let gone: Vec<PodKey> = self
            .written
            .keys()
            .filter(|key| !status.pods.iter().any(|pod| pod.key == **key))
            .cloned()
            .collect();
        for key in gone {
            remove_file(&self.file(&key))?;
            self.written.remove(&key);
        }
        write_json(&self.dir.join(WHOLE), status, Keep::Boot)
    }

    fn file(&self, key: &PodKey) -> PathBuf {
        self.dir.join(format!("{}.json", bounded_name(&format!("pod_{}_{}", key.namespace, key.name))))
    }
}

const WHOLE: &str = "status.json";

/// The status as the last engine left it, with states read anew: for a host whose daemon is away or was never there.
/// Probes do not run then: a container whose probe had spoken keeps its verdict as long as the same run lives.
pub fn offline_status(
    paths: &Paths,
    deployments: BTreeMap<PodKey, DesiredDeployment>,
) -> Result<Status, HostError> {
    let (pods, _) = observe::pods(paths)?;
    let last = last_status(&paths.status_dir());
    let desired = Desired {
        pods: pods.iter().map(|(key, pod)| (key.clone(), pod.pod.clone())).collect(),
        deployments,
        complete: true,
        ..Desired::default()
    };
    let mut facts = Facts::default();
    for (key, pod) in &pods {
        for run in &pod.containers {
            if matches!(run.state, ContainerState::Running { .. }) && run.role == Role::Main {
                facts.containers.insert(
                    run.id.clone(),
                    verdict(last.get(key), &run.id, || {
                        let probed = pod.pod.containers.iter().find(|c| c.name == run.name);
                        let container = probed.and_then(|c| pod.pod.spec.containers.get(c.index));
                        container.is_some_and(|c| c.readiness_probe.is_none() && c.startup_probe.is_none())
                    }),
                );
            }
        }
    }
    let memory = memory(paths)?;
    let observed = Observed { pods, ..Observed::default() };
    Ok(status(&desired, &observed, &memory, &facts, &Status::default(), observe::now()))
}

/// Every pod that has a record, with the object that it was made from.
pub fn recorded_pods(paths: &Paths) -> Result<Vec<(PodKey, keel_plan::Owner)>, HostError> {
    let mut found = Vec::new();
    for id in names(&paths.pods())? {
        let record = read_json::<crate::records::PodRecord>(&paths.pod_record(&keel_plan::PodId(id)))?;
        found.extend(record.map(|record| (record.pod.key.clone(), record.pod.owner.clone())));
    }
    Ok(found)
}

/// The pod as it was declared when it was created or last changed; nothing while there is no such pod.
pub fn declared_pod(paths: &Paths, id: &keel_plan::PodId) -> Option<Arc<keel_plan::DesiredPod>> {
    let record = read_json::<crate::records::PodRecord>(&paths.pod_record(id)).ok()??;
    Some(record.pod)
}

fn verdict(last: Option<&PodStatus>, id: &ContainerId, unprobed: impl Fn() -> bool) -> ContainerFacts {
    let wanted = format!("evenkeel://{id}");
    let before = last.and_then(|pod| pod.container_statuses.iter().find(|c| c.container_id == wanted));
    match before {
        Some(before) => ContainerFacts { started: before.started, ready: before.ready, message: None },
        None => ContainerFacts { started: true, ready: unprobed(), message: None },
    }
}

fn last_status(dir: &Path) -> BTreeMap<PodKey, PodStatus> {
    let mut found = BTreeMap::new();
    for name in names(dir).unwrap_or_default() {
        // Beside them lie files that are being written.
        if name.starts_with("pod_")
            && name.ends_with(".json")
            && let Ok(Some(pod)) = read_json::<PodStatus>(&dir.join(name))
        {
            found.insert(pod.key.clone(), pod);
        }
    }
    found
}

pub(crate) fn memory(paths: &Paths) -> Result<Memory, PathError> {
    let mut all = Memory::default();
    for id in names(&paths.pod_states())? {
        let id = keel_plan::PodId(id);
        if let Some(memory) = read_json(&paths.pod_memory(&id))? {
            all.pods.insert(id, memory);
        }
    }
    for name in names(&paths.memories())? {
        if let Some(id) = name.strip_suffix(".json")
            && let Some(memory) = read_json(&paths.memories().join(&name))?
        {
            all.pods.insert(keel_plan::PodId(id.to_owned()), memory);
        }
    }
    Ok(all)
}
