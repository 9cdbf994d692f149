//! Acting without a daemon. Placeholder until the driver is wired in.

use keel_api::{ApplyRequest, ControlError, DeleteRequest, ErrorCode, EventSender};

use crate::context::Context;

pub(crate) async fn apply(_: &Context, _: ApplyRequest, _: EventSender) -> Result<(), ControlError> {
    Err(ControlError::new(ErrorCode::Unavailable, "this build cannot act without a daemon"))
}

pub(crate) async fn delete(_: &Context, _: DeleteRequest, _: EventSender) -> Result<(), ControlError> {
    Err(ControlError::new(ErrorCode::Unavailable, "this build cannot act without a daemon"))
}
