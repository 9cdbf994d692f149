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
pub use server::serve;
pub use socket::{ListenError, Listener};
pub use types::{
    ActionFailure, ApplyRequest, ControlError, ControlEvent, DeleteRequest, Diagnostic, ErrorCode, Event,
    EventType, InputFile, PlannedAction, Severity, Snapshot, Status, VersionInfo, WaitingObject, exit,
};
