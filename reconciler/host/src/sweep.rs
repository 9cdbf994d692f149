//! What no record names: left by a start or a removal that was cut off, or by an earlier boot.
//!
//! Everything is recorded before it is made and forgotten after it is gone, but a directory and the record inside it are
//! two steps. Whoever dies between them leaves something that no round will ever look at.

use std::collections::BTreeSet;

use keel_cgroup::CgroupError;
use keel_plan::{ContainerId, PodId};

use crate::RealHost;
use crate::error::HostError;
use crate::podinit;
use crate::records::{ContainerRecord, PodRecord};
use crate::state::{names, read_json, remove_file, remove_tree};

impl RealHost {
    /// Removes all of it. For the beginning, while nothing acts yet; whoever calls holds the lock. What cannot be removed
    /// is said and left for the next start: it stops nothing.
    pub fn sweep(&self) {
        let note = |result: Result<(), HostError>| {
            if let Err(error) = result {
                tracing::warn!(error = %error.chain(), "leftovers");
            }
        };
        note(self.sweep_containers());
        note(self.sweep_pods());
        note(self.sweep_exits());
        note(self.sweep_cgroups());
    }

    /// Runs without a record, and runs of pods without one: nobody could reach them.
    fn sweep_containers(&self) -> Result<(), HostError> {
        let found: BTreeSet<String> = names(&self.paths.containers())?
            .into_iter()
            .chain(names(&self.paths.container_states())?)
            .collect();
        for id in found.into_iter().map(ContainerId) {
            let record = read_json::<ContainerRecord>(&self.paths.container_record(&id))?;
            // A pod's first process has no record of its own: it is its pod's.
            let pod = record.map(|record| record.pod_id).or_else(|| podinit::pod_of(&id));
            let reachable = match pod {
                Some(pod) => self.has_pod_record(&pod)?,
                None => false,
            };
            if !reachable {
                tracing::info!(container = %id, "removing what an interrupted start or removal left");
                self.remove_container(&id)?;
            }
        }
        Ok(())
    }

    fn sweep_pods(&self) -> Result<(), HostError> {
        for id in names(&self.paths.pods())?.into_iter().map(PodId) {
            if !self.has_pod_record(&id)? {
                tracing::info!(pod = %id, "removing what an interrupted creation or removal left");
                self.delete_pod(&id, 0)?;
            }
        }
        // A pod whose numbers are known is forgotten by the engine, which knows whether it is still declared.
        for id in names(&self.paths.pod_states())?.into_iter().map(PodId) {
            let known = self.paths.pod_memory(&id).exists() || self.paths.pod_run_memory(&id).exists();
            if !known && !self.has_pod_record(&id)? {
                remove_tree(&self.paths.pod_state(&id))?;
            }
        }
        Ok(())
    }

    /// The number of a run may come again once its pod has been forgotten: an old record would speak for the new run.
    fn sweep_exits(&self) -> Result<(), HostError> {
        for name in names(&self.paths.exits())? {
            let Some(id) = name.strip_suffix(".json") else { continue };
            if !self.paths.container(&ContainerId(id.to_string())).exists() {
                remove_file(&self.paths.exits().join(&name))?;
            }
        }
        Ok(())
    }

    /// Somebody has emptied the run directory under living pods: what still runs in their cgroups runs twice soon.
    fn sweep_cgroups(&self) -> Result<(), HostError> {
        let failed = |pod: &str, source: CgroupError| HostError::Cgroup {
            pod: pod.to_string(),
            source: Box::new(source),
        };
        let parent = self.cgroups.cgroup(&format!("/{}", self.paths.instance_name()));
        let parent = parent.map_err(|source| failed("-", source))?;
        let mut found = BTreeSet::new();
        for entry in &parent.entries {
            found.extend(names(&entry.dir)?.into_iter().filter(|name| entry.dir.join(name).is_dir()));
        }
        for id in found.into_iter().map(PodId) {
            if !self.has_pod_record(&id)? {
                let cgroup = self.cgroups.cgroup(&self.paths.pod_cgroup(&id));
                cgroup
                    .and_then(|cgroup| cgroup.kill_all().and_then(|()| cgroup.remove()))
                    .map_err(|source| failed(&id.0, source))?;
            }
        }
        Ok(())
    }

    fn has_pod_record(&self, id: &PodId) -> Result<bool, HostError> {
        Ok(read_json::<PodRecord>(&self.paths.pod_record(id))?.is_some())
    }
}
