//! Acting without a daemon: the same controller and engine, for as long as the command lives.

use std::time::Duration;

use futures_util::future::join_all;
use keel_api::{ApplyRequest, Control, ControlError, DeleteRequest, ErrorCode, EventSender, RestartRequest};

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::instance::{COMMAND_PATIENCE, Instance};

pub(crate) async fn apply(
    context: &Context,
    request: ApplyRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let timeout = request.timeout_ms.map_or(COMMAND_PATIENCE, Duration::from_millis);
    let instance = open(context, timeout.min(COMMAND_PATIENCE)).await?;
    let result = instance.controller.apply(request, events).await;
    instance.close().await;
    result
}

/// All at once: grace periods run side by side. One result for each.
pub(crate) async fn delete(
    context: &Context,
    requests: impl IntoIterator<Item = (DeleteRequest, EventSender)>,
) -> Result<Vec<Result<(), ControlError>>, ControlError> {
    let instance = open(context, COMMAND_PATIENCE).await?;
    let results = requests.into_iter().map(|(request, events)| instance.controller.delete(request, events));
    let results = join_all(results).await;
    instance.close().await;
    Ok(results)
}

pub(crate) async fn restart(
    context: &Context,
    request: RestartRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let instance = open(context, COMMAND_PATIENCE).await?;
    let result = instance.controller.restart(request, events).await;
    instance.close().await;
    result
}

async fn open(context: &Context, patience: Duration) -> Result<Instance, ControlError> {
    let instance = Instance::open(context, false, patience).await?;
    let declared = crate::daemon::last_declared(context)
        .map_err(|failure| ControlError::new(ErrorCode::Internal, failure.message))?;
    instance.controller.restore(declared).await;
    instance.controller.begin().await?;
    Ok(instance)
}

/// Everything that is declared while nobody reads a directory.
pub(crate) fn declared(context: &Context) -> Outcome<Vec<keel_manifest::Object>> {
    let applied = keel_host::Applied::open(&context.paths).load();
    let mut objects = applied.map_err(|error| Failure::failed(error.chain()))?;
    for object in crate::daemon::last_declared(context)? {
        objects.entry(object.key()).or_insert(object);
    }
    Ok(objects.into_values().collect())
}
