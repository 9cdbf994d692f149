//! What containers run well from is remembered beyond the boot, and takes the place of an image that is damaged and
//! cannot be had again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use keel_engine::ports::PortError;
use keel_plan::{
    ContainerName, ContainerState, DesiredContainer, DesiredPod, Millis, Observed, ObservedContainer,
    ObservedPod, PodId, PodKey,
};
use keel_store::{Digest, Image};

use crate::RealHost;
use crate::error::HostError;
use crate::observe::now;

/// A container that has run so long is no proof of a good program, but of an image that can be run.
const PROVEN_MS: u64 = 5_000;

/// What this process knows, so that a look at the host writes nothing twice.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Digest of the newest good image that is on disk.
    noted: BTreeMap<(PodId, ContainerName), String>,
    /// Images that are not here and could not be pulled.
    missed: BTreeSet<String>,
}

impl Known {
    pub(crate) fn pulled(&self, image: &str, failed: bool) {
        let mut inner = self.lock();
        if failed {
            inner.missed.insert(image.to_owned());
        } else {
            inner.missed.remove(image);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Whole at every moment.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl RealHost {
    /// What cannot be written now is written by a later look.
    pub(crate) fn note_good(&self, pods: &BTreeMap<PodKey, ObservedPod>) {
        let now = now();
        for pod in pods.values() {
            for run in pod.containers.iter().filter(|run| is_proven(run, now)) {
                let declared = pod.pod.containers.iter().find(|c| c.name == run.name && c.hash == run.hash);
                let Some(declared) = declared else { continue };
                if let Err(error) = self.note_one(&pod.pod, declared, &run.image_digest) {
                    tracing::warn!(container = %run.id, error = %error.chain(), "note its image as good");
                }
            }
        }
    }

    fn note_one(
        &self,
        pod: &DesiredPod,
        container: &DesiredContainer,
        digest: &str,
    ) -> Result<(), HostError> {
        let key = (pod.id.clone(), container.name.clone());
        if self.good.lock().noted.get(&key).is_some_and(|noted| noted == digest) {
            return Ok(());
        }
        let Ok(manifest) = digest.parse::<Digest>() else { return Ok(()) };
        self.store
            .note_good(&key.0.0, &key.1.0, &container.image, &manifest)
            .map_err(|source| HostError::Store(Box::new(source)))?;
        self.good.lock().noted.insert(key, digest.to_owned());
        Ok(())
    }

    /// Adds to an observation what is damaged, and what could run in its place.
    pub(crate) fn add_stand_ins(&self, observed: &mut Observed) -> Result<(), PortError> {
        let failed = |source| HostError::Store(Box::new(source));
        let aside = self.store.set_aside().map_err(failed)?;
        if aside.is_empty() {
            return Ok(());
        }
        let missed = self.good.lock().missed.clone();
        observed.damaged = aside.into_iter().map(|image| (image.clone(), missed.contains(&image))).collect();
        for owner in self.store.good_owners().map_err(failed)? {
            for name in self.store.good_containers(&owner).map_err(failed)? {
                if let Some(image) = self.store.last_good(&owner, &name).map_err(failed)? {
                    let key = (PodId(owner.clone()), ContainerName(name));
                    observed.last_good.insert(key, image.manifest_digest.to_string());
                }
            }
        }
        Ok(())
    }

    /// The image of a start, and whether it is the last good one.
    pub(crate) fn image_to_run(
        &self,
        pod: &DesiredPod,
        container: &DesiredContainer,
    ) -> Result<(Image, bool), HostError> {
        let missing = match self.image(&container.image) {
            Ok(image) => return Ok((image, false)),
            Err(error) => error,
        };
        let good = self.store.last_good(&pod.id.0, &container.name.0);
        let Some(image) = good.map_err(|source| HostError::Store(Box::new(source)))? else {
            return Err(missing);
        };
        let message = format!(
            "container {} of pod {} runs its last good image, {} ({}): {} is damaged and cannot be had again for now",
            container.name, pod.key, image.manifest_digest, image.reference, container.image
        );
        self.tell_storage("LastGoodImage", &message);
        Ok((image, true))
    }

    pub(crate) fn forget_good(&self, pod: &PodId) -> Result<(), HostError> {
        self.good.lock().noted.retain(|(id, _), _| id != pod);
        self.store.forget_good(&pod.0).map_err(|source| HostError::Store(Box::new(source)))
    }
}

fn is_proven(run: &ObservedContainer, now: Millis) -> bool {
    match &run.state {
        _ if run.stand_in => false,
        ContainerState::Running { pid: 1.., started_at } => started_at.saturating_add(PROVEN_MS) <= now,
        ContainerState::Exited(exit) => exit.code == 0,
        _ => false,
    }
}
