//! The control API of the daemon: the types on the wire, the server, and the client that the command line uses.
//!
//! Never acts by itself: the server turns requests into calls of [`Control`], which the engine's driver implements, and
//! answers into views. Never opens a port to the network: a unix socket for root and the daemon's own user, loopback
//! only when asked.

mod client;
mod control;
mod server;
mod socket;
mod types;

#[cfg(test)]
mod tests;

pub use client::{Client, ClientError, Lines};
pub use control::{Control, EventSender};
pub use keel_manifest::{Diagnostic, Severity};
pub use keel_plan::Status;
pub use server::serve;
pub use socket::{ListenError, Listener};
pub use types::{
    ActionFailure, ApplyRequest, ControlError, ControlEvent, DeleteRequest, ErrorCode, Event, ImageRequest,
    InputFile, PlannedAction, RestartRequest, SaveFormat, Snapshot, VersionInfo, WaitingObject, exit,
};
