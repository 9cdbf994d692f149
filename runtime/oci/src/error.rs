//! Errors of the runtime's commands.

use crate::lower::SpecError;
use keel_cgroup::{CgroupError, LayoutError};
use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error(
        "container id {0:?} is invalid: use letters, digits and \"_+-.\", beginning with a letter, digit or \"_+-\""
    )]
    InvalidId(String),
    #[error("container with id {0:?} already exists")]
    Exists(String),
    #[error("container {0:?} does not exist")]
    NotFound(String),
    #[error("container {id:?} is {status}: cannot {action}")]
    WrongState { id: String, status: &'static str, action: &'static str },
    #[error("container not running")]
    NotRunning,
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped { id: String, status: &'static str },
    #[error("{what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{what}")]
    Sys { what: &'static str, source: io::Error },
    #[error("parse {}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("config.json: {0}")]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Systemd(#[from] keel_systemd::SystemdError),
    #[error(transparent)]
    Unit(#[from] keel_systemd::UnitError),
    #[error(transparent)]
    Property(#[from] keel_systemd::PropertyError),
    #[error("linux.netDevices")]
    NetDevice(#[from] keel_sys::netlink::NetlinkError),
    #[error("{0}")]
    Child(String),
    #[error("container init died during the set-up: {0}")]
    ChildDied(String),
    #[error("{0}")]
    Hook(String),
    #[error("{0}")]
    Usage(String),
    #[error("container {0:?} is still there: its processes did not end within the deadline")]
    WontDie(String),
}

impl RuntimeError {
    /// The whole chain on one line, errno texts in lower case as callers of OCI runtimes expect them.
    pub fn chain(&self) -> String {
        let mut out = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            let text = match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                Some(errno) => keel_sys::errno_text(errno),
                None => error.to_string(),
            };
            if !out.contains(&text) {
                out.push_str(": ");
                out.push_str(&text);
            }
            next = error.source();
        }
        out
    }
}

pub(crate) fn io_error(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> RuntimeError {
    let path = path.into();
    move |source| RuntimeError::Io { what, path, source }
}

pub(crate) fn sys_error(what: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    move |source| RuntimeError::Sys { what, source }
}
