//! Everything of an instance, undone.

use std::collections::BTreeSet;
use std::path::Path;

use keel_plan::{ContainerId, PodId};

use crate::RealHost;
use crate::error::HostError;
use crate::paths::{Paths, RUN_NAMES, STATE_NAMES};
use crate::pods::purge_network;
use crate::records::PodRecord;
use crate::state::{PathError, names, read_json, remove_file, remove_tree};
use crate::volumes::unmount;

/// How long a container may take to end by itself.
const GRACE_MS: u64 = 1000;

/// What a reset found, for the report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub containers: usize,
    pub pods: usize,
}

impl RealHost {
    /// Stops every container and removes every pod, the network and this boot's state. Images, logs of the state
    /// directory and applied manifests stay unless `state` says otherwise. Goes on after an error and returns the first.
    pub fn reset(&self, state: bool) -> Result<Removed, HostError> {
        let mut first: Result<(), HostError> = Ok(());
        let mut note = |result: Result<(), HostError>| {
            if let Err(error) = result {
                tracing::warn!(error = %error.chain(), "reset");
                if first.is_ok() {
                    first = Err(error);
                }
            }
        };
        let containers: BTreeSet<String> = names(&self.paths.containers())?
            .into_iter()
            .chain(names(&self.paths.container_states())?)
            .collect();
        std::thread::scope(|scope| {
            for id in &containers {
                scope.spawn(|| {
                    let _ = self.stop_container(&ContainerId(id.clone()), GRACE_MS);
                });
            }
        });
        for id in &containers {
            note(self.remove_container(&ContainerId(id.clone())));
        }
        let pods = names(&self.paths.pods())?;
        for id in &pods {
            let id = PodId(id.clone());
            let record = read_json::<PodRecord>(&self.paths.pod_record(&id))?;
            let incarnation = record.map_or(0, |record| record.incarnation);
            note(self.delete_pod(&id, incarnation).map(drop));
        }
        note(purge_network(&self.paths));
        note(self.remove_instance_cgroup());
        first?;
        clear_boot_state(&self.paths)?;
        if state {
            clear_state(&self.paths)?;
        }
        Ok(Removed { containers: containers.len(), pods: pods.len() })
    }

    fn remove_instance_cgroup(&self) -> Result<(), HostError> {
        let cgroup = self.cgroups.cgroup(&format!("/{}", self.paths.instance_name()));
        cgroup
            .and_then(|cgroup| if cgroup.exists() { cgroup.remove() } else { Ok(()) })
            .map_err(|source| HostError::Cgroup { pod: "-".into(), source: Box::new(source) })
    }
}

/// By name, never by listing: the directory may be somebody's home, named by mistake.
fn clear_boot_state(paths: &Paths) -> Result<(), HostError> {
    for name in RUN_NAMES {
        let path = paths.run().join(name);
        if path.is_dir() {
            unmount(&path)?;
        }
        remove(&path)?;
    }
    Ok(())
}

fn clear_state(paths: &Paths) -> Result<(), HostError> {
    for name in STATE_NAMES {
        remove(&paths.root().join(name))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), PathError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => remove_tree(path),
        _ => remove_file(path),
    }
}
