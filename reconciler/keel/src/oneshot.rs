//! Acting without a daemon: the same controller and engine, for as long as the command lives.

use keel_api::{ApplyRequest, Control, ControlError, DeleteRequest, EventSender};

use crate::context::Context;
use crate::instance::Instance;

pub(crate) async fn apply(
    context: &Context,
    request: ApplyRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let instance = Instance::open(context, false)?;
    instance.controller.begin().await?;
    let result = instance.controller.apply(request, events).await;
    leave(instance).await;
    result
}

pub(crate) async fn delete(
    context: &Context,
    request: DeleteRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let instance = Instance::open(context, false)?;
    instance.controller.begin().await?;
    let result = instance.controller.delete(request, events).await;
    leave(instance).await;
    result
}

/// The engine's thread is joined where waiting is allowed.
async fn leave(instance: Instance) {
    let _ = tokio::task::spawn_blocking(move || instance.close()).await;
}
