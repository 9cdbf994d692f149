//! The status as files, and the status without a daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keel_plan::{
    ContainerFacts, ContainerId, ContainerName, ContainerState, Desired, Facts, Memory, Observed,
    ObservedPod, PodKey, PodStatus, Role, Status, Waiting, status,
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
/// `declared` is what would be in force; a pod that only has a record counts as declared too, since nobody ends it.
/// Probes do not run then: a container whose probe had spoken keeps its verdict as long as the same run lives.
pub fn offline_status(paths: &Paths, declared: Desired) -> Result<Status, HostError> {
    let (pods, _) = observe::pods(paths, |_| false)?;
    let last = last_status(&paths.status_dir())?;
    let before: BTreeMap<&PodKey, &PodStatus> = last.pods.iter().map(|pod| (&pod.key, &**pod)).collect();
    let mut desired = Desired { complete: true, ..declared };
    for (key, pod) in pods.iter().filter(|(key, _)| !desired.unresolved.contains_key(*key)) {
        desired.pods.entry(key.clone()).or_insert_with(|| pod.pod.clone());
    }
    let mut facts = Facts::default();
    for (key, pod) in &pods {
        for run in &pod.containers {
            if matches!(run.state, ContainerState::Running { .. }) && run.role == Role::Main {
                facts.containers.insert(
                    run.id.clone(),
                    verdict(before.get(key).copied(), &run.id, || {
                        let probed = pod.pod.containers.iter().find(|c| c.name == run.name);
                        let container = probed.and_then(|c| pod.pod.spec.containers.get(c.index));
                        container.is_some_and(|c| {
                            let notifies = keel_manifest::extension::notifies(&pod.pod.annotations, c);
                            c.readiness_probe.is_none() && c.startup_probe.is_none() && !notifies
                        })
                    }),
                );
            }
        }
    }
    for key in desired.pods.keys().chain(desired.unresolved.keys()) {
        let missing =
            desired.unresolved.get(key).map(|why| Waiting::MissingReference { message: why.clone() });
        let same = before.get(key).filter(|before| has_same_runs(before, pods.get(key)));
        // Nobody pulls or starts anything now; what is missing was asked above.
        let lasts = |w: &&Waiting| !w.is_progress() && !matches!(w, Waiting::MissingReference { .. });
        let waits = same.into_iter().flat_map(|before| before.waiting.iter().filter(lasts).cloned());
        let waiting: Vec<Waiting> = missing.into_iter().chain(waits).collect();
        if !waiting.is_empty() {
            facts.waiting.insert(key.clone(), waiting);
        }
    }
    let memory = memory(paths)?;
    let observed = Observed { pods, ..Observed::default() };
    Ok(status(&desired, &observed, &memory, &facts, &last, observe::now()))
}

/// Whether nothing has been started and nothing has ended since that status.
fn has_same_runs(before: &PodStatus, seen: Option<&ObservedPod>) -> bool {
    let known = before.init_container_statuses.iter().chain(&before.container_statuses);
    known.into_iter().all(|container| {
        let name = ContainerName(container.name.clone());
        match seen.and_then(|seen| seen.latest(&name)) {
            Some(run) => {
                container.container_id == format!("evenkeel://{}", run.id)
                    && container.pid.is_some() == run.has_process()
            }
            None => container.container_id.is_empty(),
        }
    })
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

fn last_status(dir: &Path) -> Result<Status, PathError> {
    Ok(read_json(&dir.join(WHOLE))?.unwrap_or_default())
}

pub(crate) fn memory(paths: &Paths) -> Result<Memory, PathError> {
    let mut all = Memory::default();
    for id in names(&paths.pod_states())? {
        let id = keel_plan::PodId(id);
        if let Some(memory) = read_json(&paths.pod_memory(&id))? {
            all.pods.insert(id, memory);
        }
    }
    // Nothing to count, but something to forget once it is not declared any more.
    for name in names(&paths.good_images())? {
        if let Some(id) = name.strip_suffix(".json") {
            all.pods.entry(keel_plan::PodId(id.to_owned())).or_default();
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
