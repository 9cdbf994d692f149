//! Acting without a daemon: the same controller and engine, for as long as the command lives.

use keel_api::{ApplyRequest, Control, ControlError, DeleteRequest, ErrorCode, EventSender};

use crate::context::Context;
use crate::instance::Instance;

pub(crate) async fn apply(
    context: &Context,
    request: ApplyRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let instance = open(context).await?;
    let result = instance.controller.apply(request, events).await;
    instance.close().await;
    result
}

pub(crate) async fn delete(
    context: &Context,
    request: DeleteRequest,
    events: EventSender,
) -> Result<(), ControlError> {
    let instance = open(context).await?;
    let result = instance.controller.delete(request, events).await;
    instance.close().await;
    result
}

async fn open(context: &Context) -> Result<Instance, ControlError> {
    let instance = Instance::open(context, false)?;
    let declared = crate::daemon::last_declared(context)
        .map_err(|failure| ControlError::new(ErrorCode::Internal, failure.message))?;
    instance.controller.restore(declared).await;
    instance.controller.begin().await?;
    Ok(instance)
}
