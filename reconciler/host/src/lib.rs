//! The engine's ports over the real host: store, registry, network, shims, `/proc`.
//!
//! Makes no choices: what to do comes as an action, and what is there is read back. Containers are reached only through
//! processes (shim, runtime), so that another runtime can take the place of ours.

mod applied;
mod containers;
mod error;
pub mod events;
mod execprobe;
mod facts;
mod good;
mod heal;
mod ids;
mod images;
mod kept;
mod logs;
mod observe;
mod paths;
mod podinit;
mod pods;
mod probes;
mod records;
mod reset;
mod seccomp;
mod shims;
mod spec;
pub mod state;
mod storage;
mod sweep;
mod usage;
mod views;
mod volumes;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use keel_engine::ports::{ActionError, Done, Host, PortError, ProbeOutcome, ProbeRequest, Progress};
use keel_manifest::logging::LogSettings;
use keel_plan::{
    Action, ContainerId, ContainerState, Memory, Observed, ObservedPod, PodId, PodKey, PodMemory,
};

pub use applied::{Applied, Written};
pub use containers::container_runtime;
pub use error::HostError;
pub use events::EventLog;
pub use heal::{Lost, Verified, verify_images};
pub use images::{DEMO_IMAGE, Registries, client as registry_client, open_store, pull_status};
pub use observe::now;
pub use paths::{DEFAULT_ROOT, DEFAULT_RUN, Paths};
pub use pods::purge_network;
pub use reset::Removed;
pub use storage::{Eviction, StorageHooks, image_roots};
pub use usage::UsageWatch;
pub use views::{StatusFiles, declared_pod, offline_status, recorded_pods};
pub use watch::{ExitPoll, ExitWatch, FilterWatch, Lock, ShimWatch};

/// What an operator may set.
#[derive(Clone, Debug)]
pub struct HostConfig {
    pub runtime: PathBuf,
    pub shim: PathBuf,
    /// Chosen from free private ranges when absent.
    pub subnet: Option<ipnet::Ipv4Net>,
    /// For what a pod does not say itself.
    pub logs: LogSettings,
    pub registries: Registries,
    /// When room is made on the disk of images.
    pub eviction: Eviction,
    /// What containers write into their root file systems is never synced.
    pub volatile_rootfs: bool,
    /// Program and first arguments of what a shim calls, with a container's id, when nobody else is there to restart it.
    pub restart_command: Vec<OsString>,
}

pub struct RealHost {
    paths: Paths,
    config: HostConfig,
    facts: facts::Facts,
    store: Arc<keel_store::Store>,
    registry: keel_registry::Client,
    pulls: images::Pulls,
    good: good::Known,
    cgroups: keel_cgroup::Layout,
    net: once::OnceLock<keel_net::Net>,
    /// Written by whoever measures, see [`UsageWatch`].
    over_limit: usage::OverLimit,
    /// Held while an address is chosen and recorded: two pods must not choose the same one.
    addresses: Mutex<()>,
    shims: Arc<shims::Shims>,
    /// Where somebody waits for the end of shims.
    shim_ends: std::sync::OnceLock<Arc<watch::ShimEnds>>,
    storage: storage::Hooks,
    runtime: tokio::runtime::Handle,
}

impl RealHost {
    /// `runtime` drives pulls and probes; ports themselves block and must not be called on its threads.
    pub fn open(
        paths: Paths,
        config: HostConfig,
        runtime: tokio::runtime::Handle,
    ) -> Result<RealHost, HostError> {
        for (binary, path) in [("keel-runtime", &config.runtime), ("keel-shim", &config.shim)] {
            if !path.exists() {
                let hint = "it belongs next to keel, or name it with --runtime / --shim";
                return Err(HostError::NoBinary { binary, path: path.clone(), hint });
            }
        }
        paths.create().map_err(|source| state::PathError {
            operation: "create",
            path: paths.root().to_path_buf(),
            source,
        })?;
        let store = open_store(&paths)?;
        images::tell_damaged(&store, &paths)?;
        let registry = images::client(&config.registries);
        let cgroups = keel_cgroup::Layout::detect(&keel_cgroup::Roots::default())
            .map_err(|source| HostError::Cgroup { pod: "-".into(), source: Box::new(source) })?;
        Ok(RealHost {
            facts: facts::Facts::read(),
            store,
            registry,
            pulls: images::Pulls::default(),
            good: good::Known::default(),
            cgroups,
            net: once::OnceLock::new(),
            over_limit: usage::OverLimit::default(),
            addresses: Mutex::new(()),
            shims: Arc::new(shims::Shims::new(paths.clone(), config.clone())),
            shim_ends: std::sync::OnceLock::new(),
            storage: storage::Hooks::new(),
            runtime,
            paths,
            config,
        })
    }

    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    pub fn store(&self) -> &Arc<keel_store::Store> {
        &self.store
    }

    pub fn registry(&self) -> &keel_registry::Client {
        &self.registry
    }
}

impl Host for RealHost {
    fn observe(&self) -> Result<Observed, PortError> {
        let (mut pods, orphans) =
            observe::pods(&self.paths, |id| self.shims.can_recover(id)).map_err(HostError::from)?;
        self.note_over_limit(&mut pods);
        // Not a choice: a container without a monitor gets one, whatever the manifests say.
        self.shims.adopt_later(&orphans);
        self.keep_lost(&pods);
        self.follow_shims(&pods);
        self.note_good(&pods);
        let mut observed = Observed {
            pods,
            images: self.image_digests()?,
            network: self.observed_network()?,
            ..Observed::default()
        };
        self.add_stand_ins(&mut observed)?;
        Ok(observed)
    }

    fn perform(&self, action: &Action, report: &(dyn Fn(Progress) + Sync)) -> Result<Done, ActionError> {
        let result = match action {
            Action::Pull { image, policy, secrets, .. } => self.pull(image, *policy, secrets, report),
            Action::CreatePod { pod } => self.create_pod(pod),
            Action::StartContainer { pod, incarnation, container, attempt } => {
                self.start_container(pod, *incarnation, container, *attempt)
            }
            Action::StopContainer { id, grace_ms, .. } => self.stop_container(id, *grace_ms),
            Action::RemoveContainer { id, .. } => self.remove(id),
            Action::SyncVolumes { pod, incarnation } => self.sync_volumes(pod, *incarnation),
            Action::UpdateRecord { pod, incarnation } => self.update_record(pod, *incarnation),
            Action::DeletePod { id, incarnation, .. } => self.delete_pod(id, *incarnation),
            Action::SyncNetwork { endpoints, hash } => self.sync_network(endpoints, hash),
        };
        Ok(result?)
    }

    fn cancel(&self, action: &Action) {
        if let Action::Pull { image, .. } = action {
            self.pulls.cancel(image);
        }
    }

    fn probe(&self, request: &ProbeRequest) -> ProbeOutcome {
        let runtime = match self.runtime_of(&request.container) {
            Ok(runtime) => runtime,
            Err(error) => return ProbeOutcome::Error(HostError::from(error).chain()),
        };
        let target = probes::Target {
            netns: (!request.pod.spec.host_network)
                .then(|| self.paths.pod_namespaces(&request.pod.id).join("net")),
            runtime,
            runtime_root: self.paths.runtime_root(),
            dir: self.paths.container(&request.container),
        };
        let bounded = ProbeRequest { timeout: request.timeout.min(probes::MAX_TIMEOUT), ..request.clone() };
        self.runtime.block_on(probes::run(&target, &bounded))
    }

    fn load_memory(&self) -> Memory {
        views::memory(&self.paths).unwrap_or_else(|error| {
            tracing::warn!(%error, "restart counts are lost");
            Memory::default()
        })
    }

    fn save_memory(&self, pod: &PodId, memory: Option<&PodMemory>) -> Result<(), PortError> {
        Ok(self.save_pod_memory(pod, memory)?)
    }

    fn keep_memory(&self, pod: &PodId, memory: Option<&PodMemory>) -> Result<(), PortError> {
        Ok(self.keep_pod_memory(pod, memory)?)
    }
}

impl RealHost {
    /// `hint` is called when something has changed that no watch tells of.
    pub fn on_change(&self, hint: impl Fn() + Send + Sync + 'static) {
        self.shims.on_change(Box::new(hint));
    }

    /// For a process that is about to end: what it does in the background may end first.
    pub fn settle(&self, timeout: Duration) {
        self.shims.settle(timeout);
    }

    /// For a thread of its own: shims that are killed. From now on every look at the host tells it which ones there are.
    pub fn shim_watch(&self) -> Result<ShimWatch, HostError> {
        let watch = ShimWatch::new(&self.paths)?;
        let _ = self.shim_ends.set(watch.ends());
        Ok(watch)
    }

    fn follow_shims(&self, pods: &BTreeMap<PodKey, ObservedPod>) {
        let Some(ends) = self.shim_ends.get() else { return };
        let runs = pods.values().flat_map(|pod| &pod.containers);
        let living: BTreeSet<_> = runs
            .filter(|run| matches!(run.state, ContainerState::Running { .. }))
            .map(|run| &run.id)
            .collect();
        ends.follow(&self.paths, &living);
        self.shims.kept.follow(&self.paths, &living);
    }

    fn keep_lost(&self, pods: &BTreeMap<PodKey, ObservedPod>) {
        for run in pods.values().flat_map(|pod| &pod.containers) {
            if let ContainerState::Lost { noticed_at } = run.state
                && !self.shims.is_adopting(&run.id)
                && let Err(error) = observe::record_lost(&self.paths, &run.id, noticed_at)
            {
                tracing::warn!(container = %run.id, error = %HostError::from(error).chain(), "record its loss");
            }
        }
    }

    /// A run that lives was restarted since the plan was made, or never ended: it is not touched.
    fn remove(&self, id: &ContainerId) -> Result<Done, HostError> {
        let created_at = 0;
        let (state, _) = observe::container_state(&self.paths, id, created_at)?;
        if matches!(state, ContainerState::Running { .. }) {
            return Ok(Done::Stale);
        }
        self.remove_container(id).map(|()| Done::Done)
    }
}

impl RealHost {
    /// For a thread of its own: `emptyDir` volumes on disk against their limits.
    pub fn usage_watch(&self) -> UsageWatch {
        UsageWatch::new(self.paths.clone(), self.over_limit.clone())
    }

    fn note_over_limit(&self, pods: &mut BTreeMap<PodKey, ObservedPod>) {
        let over = self.over_limit.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for pod in pods.values_mut() {
            pod.over_limit = over.get(&(pod.pod.id.clone(), pod.incarnation)).cloned();
        }
    }
}

/// `std::sync::OnceLock` with an initialiser that may fail.
mod once {
    use std::sync::{Mutex, OnceLock as Std};

    pub(crate) struct OnceLock<T> {
        cell: Std<T>,
        filling: Mutex<()>,
    }

    impl<T> OnceLock<T> {
        pub(crate) fn new() -> Self {
            OnceLock { cell: Std::new(), filling: Mutex::new(()) }
        }

        pub(crate) fn get_or_try_init<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<&T, E> {
            let _filling = self.filling.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if self.cell.get().is_none() {
                let made = make()?;
                let _ = self.cell.set(made);
            }
            Ok(self.cell.get().expect("set above under the lock"))
        }
    }
}
