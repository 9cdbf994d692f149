use std::future::Future;

use tokio::sync::mpsc;

use crate::types::{
    ApplyRequest, ControlError, ControlEvent, DeleteRequest, ErrorCode, Event, ImageRequest, RestartRequest,
    Snapshot,
};

/// Where a long operation reports. Bounded by the server; a closed channel means that nobody listens any more, which is
/// no reason to stop half-way: the implementation finishes what it has begun and drops further reports.
pub type EventSender = mpsc::Sender<ControlEvent>;

/// What the server asks of the engine's driver. Implemented by the driver; the tests of this crate have a second one.
///
/// Long operations report through the sender and end with exactly one [`ControlEvent::Result`]; their `Err` is for
/// requests that were refused before anything was reported, and becomes an HTTP error instead of a stream.
pub trait Control: Send + Sync + 'static {
    /// Validates, plans and, unless it is a dry run, carries out. With `wait` it ends when every applied pod is ready.
    fn apply(
        &self,
        request: ApplyRequest,
        events: EventSender,
    ) -> impl Future<Output = Result<(), ControlError>> + Send;

    fn delete(
        &self,
        request: DeleteRequest,
        events: EventSender,
    ) -> impl Future<Output = Result<(), ControlError>> + Send;

    /// Stops what runs of the named pods, and lets their restart policy go on.
    fn restart(
        &self,
        _request: RestartRequest,
        _events: EventSender,
    ) -> impl Future<Output = Result<(), ControlError>> + Send {
        std::future::ready(Err(ControlError::new(ErrorCode::Unavailable, "this daemon restarts nothing")))
    }

    /// Images of the store. An instance without a store has none.
    fn images(
        &self,
        _request: ImageRequest,
        _events: EventSender,
    ) -> impl Future<Output = Result<(), ControlError>> + Send {
        std::future::ready(Err(ControlError::new(ErrorCode::Unavailable, "this daemon serves no images")))
    }

    /// The current status at once; with `after`, only once its revision differs from that one.
    fn status(&self, after: Option<u64>) -> impl Future<Output = Result<Snapshot, ControlError>> + Send;

    /// Events with a sequence number above `after`, oldest first. With `wait` and none at hand, returns once there is
    /// at least one.
    fn events_since(
        &self,
        after: u64,
        wait: bool,
    ) -> impl Future<Output = Result<Vec<Event>, ControlError>> + Send;

    /// Reads every source and the host again now. Returns once that round is over. `accept_removals`: a directory that
    /// was not taken at its word, because most of what it declared has gone from it, is now.
    fn reconcile(&self, accept_removals: bool) -> impl Future<Output = Result<(), ControlError>> + Send;

    /// `Err` says what is missing until the first complete round.
    fn ready(&self) -> Result<(), String>;
}
