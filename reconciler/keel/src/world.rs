//! The only module that knows where the host keeps things and asks who knows: everything else of the command line asks
//! here.

use std::path::{Path, PathBuf};

use keel_api::{ClientError, Status};
use keel_plan::{ContainerId, ContainerName, PodId, PodKey, PodStatus};

use crate::commands::apply::client_runtime;
use crate::context::Context;
use crate::failure::{Failure, Outcome};

pub(crate) use interim::Paths;

/// The status of everything: the daemon's when there is one, else read from the host.
pub(crate) fn status(context: &Context) -> Outcome<Status> {
    let client = context.client();
    match client.probe() {
        Ok(()) => {
            let snapshot = client_runtime()?.block_on(client.status())?;
            Ok(std::sync::Arc::unwrap_or_clone(snapshot.status))
        }
        Err(ClientError::NoDaemon { .. }) => interim::offline_status(&context.paths),
        Err(error) => Err(error.into()),
    }
}

/// A running container, for `exec`.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) id: ContainerId,
    pub(crate) pid: u32,
    /// Bundle: `config.json` is there.
    pub(crate) bundle: PathBuf,
    pub(crate) runtime_root: PathBuf,
}

/// The run of `container` that is alive now.
pub(crate) fn running(context: &Context, pod: &PodStatus, container: &str) -> Outcome<Running> {
    let status = pod
        .container_statuses
        .iter()
        .chain(&pod.init_container_statuses)
        .find(|status| status.name == container)
        .ok_or_else(|| no_container(pod, container))?;
    let (Some(pid), Some(attempt)) = (status.pid, status.attempt) else {
        return Err(Failure::failed(format!("container {container} of pod {} is not running", pod.key.name))
            .hint(format!("see why: keel describe pod/{}", pod.key.name)));
    };
    let id = container_id(&pod.key, container, attempt);
    Ok(Running { bundle: context.paths.container(&id), runtime_root: context.paths.runtime_root(), id, pid })
}

pub(crate) fn no_container(pod: &PodStatus, container: &str) -> Failure {
    let names: Vec<&str> = pod
        .init_container_statuses
        .iter()
        .chain(&pod.container_statuses)
        .map(|status| status.name.as_str())
        .collect();
    Failure::not_found(format!("pod {} has no container {container}", pod.key.name))
        .hint(format!("containers: {}", names.join(", ")))
}

pub(crate) fn container_id(pod: &PodKey, container: &str, attempt: u32) -> ContainerId {
    ContainerId::of(&PodId::of(pod), &ContainerName(container.to_owned()), attempt)
}

/// Whether a run has ended, so that its log will not grow any more: its exit is recorded, or nothing of it is left.
pub(crate) fn has_ended(paths: &Paths, id: &ContainerId) -> bool {
    paths.exit_record(id).exists() || !paths.container(id).exists()
}

/// Until the host crate has them.
mod interim {
    use super::*;

    #[derive(Clone, Debug)]
    pub(crate) struct Paths {
        root: PathBuf,
        run: PathBuf,
    }

    impl Paths {
        pub(crate) fn new(root: &Path, run: &Path) -> Paths {
            Paths { root: root.to_owned(), run: run.to_owned() }
        }
        pub(crate) fn socket(&self) -> PathBuf {
            self.run.join("keel.sock")
        }
        pub(crate) fn runtime_root(&self) -> PathBuf {
            self.run.join("runtime")
        }
        pub(crate) fn container(&self, id: &ContainerId) -> PathBuf {
            self.run.join("containers").join(&id.0)
        }
        pub(crate) fn exits(&self) -> PathBuf {
            self.root.join("exits")
        }
        pub(crate) fn exit_record(&self, id: &ContainerId) -> PathBuf {
            self.exits().join(format!("{id}.json"))
        }
        pub(crate) fn pod_logs(&self, pod: &PodKey) -> PathBuf {
            self.root.join("logs").join(format!("{}_{}", pod.namespace, pod.name))
        }
        pub(crate) fn log(&self, pod: &PodKey, container: &str, attempt: u32) -> PathBuf {
            self.pod_logs(pod).join(container).join(format!("{attempt}.log"))
        }
    }

    pub(crate) fn offline_status(_: &Paths) -> Outcome<Status> {
        Err(Failure::new(keel_api::exit::UNAVAILABLE, "no daemon is running"))
    }
}
