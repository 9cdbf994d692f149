//! The only module that knows where the host keeps things and asks who knows: everything else of the command line asks
//! here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use keel_api::{ClientError, ControlError, ErrorCode, Event, EventSender, ImageRequest, Status};
use keel_plan::{ContainerId, ContainerName, PodId, PodKey, PodStatus, lower_desired};

use crate::commands::apply::client_runtime;
use crate::context::Context;
use crate::failure::{Failure, Outcome};

pub(crate) use keel_host::Paths;

/// The status of everything: the daemon's when there is one, else read from the host.
pub(crate) fn status(context: &Context) -> Outcome<Status> {
    let client = context.client();
    match client.probe() {
        Ok(()) => {
            let snapshot = client_runtime()?.block_on(client.status())?;
            Ok(std::sync::Arc::unwrap_or_clone(snapshot.status))
        }
        Err(ClientError::NoDaemon { .. }) => offline(context),
        Err(error) => Err(error.into()),
    }
}

fn offline(context: &Context) -> Outcome<Status> {
    let declared = lower_desired(&crate::oneshot::declared(context)?, &BTreeMap::new());
    keel_host::offline_status(&context.paths, declared).map_err(|error| Failure::failed(error.chain()))
}

/// Declared ConfigMaps and Secrets. They are on disk, whoever acts.
pub(crate) fn contents(context: &Context) -> Outcome<Vec<keel_manifest::Object>> {
    let mut objects = crate::oneshot::declared(context)?;
    objects.retain(crate::render::contents::is_contents);
    Ok(objects)
}

pub(crate) fn has_daemon(context: &Context) -> bool {
    context.client().probe().is_ok()
}

/// What a pod was made from. Not part of the status: it is on disk, whoever acts.
pub(crate) fn declared(context: &Context, key: &PodKey) -> Option<std::sync::Arc<keel_plan::DesiredPod>> {
    keel_host::declared_pod(&context.paths, &PodId::of(key))
}

/// The daemon's process, when one answers.
pub(crate) fn daemon(context: &Context) -> Option<u32> {
    let client = context.client();
    client.probe().ok()?;
    client_runtime().ok()?.block_on(client.version()).ok().map(|about| about.pid)
}

/// What happened, oldest first: the daemon's word, else the log on disk.
pub(crate) fn events(context: &Context) -> Outcome<Vec<Event>> {
    let client = context.client();
    match client.probe() {
        Ok(()) => client_runtime()?.block_on(async {
            let mut lines = client.events(0, false).await?;
            let mut events = Vec::new();
            while let Some(event) = lines.next().await? {
                events.push(event);
            }
            Ok(events)
        }),
        Err(ClientError::NoDaemon { .. }) => {
            Ok(keel_host::events::read(&context.paths).into_iter().map(event).collect())
        }
        Err(error) => Err(error.into()),
    }
}

fn event(found: keel_host::events::Event) -> Event {
    let keel_host::events::Event { seq, time_ms, warning, object, reason, message, count } = found;
    Event { seq, time_ms, warning, object, reason, message, count }
}

/// Images without a daemon: the lock keeps other writers of the store away meanwhile.
pub(crate) async fn images(
    context: &Context,
    request: ImageRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let lock = crate::instance::take_lock(context, crate::instance::COMMAND_PATIENCE).await?;
    let store = keel_host::open_store(&context.paths).map_err(crate::instance::refused)?;
    let registry = keel_host::registry_client(&crate::instance::registries(context));
    let status =
        offline(context).map_err(|failure| ControlError::new(ErrorCode::Internal, failure.message))?;
    let declared = crate::oneshot::declared(context)
        .map_err(|failure| ControlError::new(ErrorCode::Internal, failure.message))?;
    let declared = Some(crate::images::declared(&declared));
    let result = crate::images::run(&store, &registry, &status, declared, request, &events).await;
    drop(lock);
    result
}

/// A running container, for `exec`.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) id: ContainerId,
    pub(crate) pid: u32,
    /// Bundle: `config.json` is there.
    pub(crate) bundle: PathBuf,
    pub(crate) runtime_root: PathBuf,
    /// What made it: another one does not know it.
    pub(crate) runtime: PathBuf,
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
    let runtime = keel_host::container_runtime(&context.paths, &id, &context.settings.runtime)
        .map_err(|error| Failure::failed(error.chain()))?;
    let (bundle, runtime_root) = (context.paths.container(&id), context.paths.runtime_root());
    Ok(Running { bundle, runtime_root, runtime, id, pid })
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
