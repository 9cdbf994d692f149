//! The contract between a shim and whoever talks to it: control messages, exit record, file names, a blocking client.
//!
//! Never: serde, an async runtime, or a version of a message that an older peer could misread. The shim pays for every
//! page of this crate once per container.

mod client;
mod exit;
pub mod json;
mod message;

pub use client::{Attachment, Client, ClientError, Event, Session, SpareReaders, Spares};
pub use exit::{ExitRecord, ParseExitError};
pub use message::{
    Attach, DecodeError, Encoded, ErrorCode, Exec, MAX_DATA, MAX_MESSAGE, Phase, Reply, Request, State,
    Stream, VERSION,
};

/// Names of the files in a shim's directory.
pub mod file {
    /// Control socket.
    pub const CONTROL: &str = "ctl.sock";
    /// `<pid> <start time>` of the shim; start time is field 22 of `/proc/<pid>/stat`.
    pub const SHIM_PID: &str = "shim.pid";
    /// The same of the container's first process.
    pub const PID: &str = "pid";
    /// FIFOs that are the container's standard streams (without a terminal).
    pub const STDIN: &str = "stdin";
    pub const STDOUT: &str = "stdout";
    pub const STDERR: &str = "stderr";
    /// Which output is on its way into the log, for a successor to go on exactly there.
    pub const PROGRESS: &str = "progress";
    /// There once the container has said `READY=1` (sd_notify).
    pub const READY: &str = "ready";
    /// Directory with the socket `notify.sock` for such messages, to be mounted into the container.
    pub const NOTIFY: &str = "notify";
    /// What the shim must remember to be re-executed or replaced.
    pub const MEMORY: &str = "shim.conf";
}
