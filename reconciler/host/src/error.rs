//! What can go wrong with an action, and what the engine is told about it.

use std::path::PathBuf;

use keel_engine::ports::{ActionError, Next, PortError};

use crate::spec::SpecError;
use crate::state::PathError;
use crate::volumes::VolumeError;

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("another process works on {}{}", lock.display(), holder.as_ref().map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Locked { lock: PathBuf, holder: Option<u32> },
    #[error("{} is not empty and not a directory of evenkeel", dir.display())]
    Foreign { dir: PathBuf },
    #[error("pods of {} run with the run directory {}", root.display(), run.display())]
    OtherRun { root: PathBuf, run: PathBuf },
    #[error("image store")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("pod {0}: every range of ids for pods with users of their own is taken")]
    NoIds(String),
    #[error("image {0} is not in the store")]
    ImageMissing(String),
    #[error("image {0} is not in the store, and imagePullPolicy is Never")]
    NeverPulled(String),
    #[error("pull {image}{}", without.as_ref().map(|w| format!(" ({w})")).unwrap_or_default())]
    Pull {
        image: String,
        retry: bool,
        /// What is wrong with Secrets that should have helped.
        without: Option<String>,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("pull {0}: nobody wants it any more")]
    Cancelled(String),
    #[error("root file system of {container}")]
    RootFs {
        container: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("container {container}: user {user:?} of the image")]
    User {
        container: String,
        user: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("network of pod {pod}")]
    Network {
        pod: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("published ports and hosts files")]
    Publish(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("pod {pod}")]
    Port {
        pod: String,
        #[source]
        source: Box<keel_net::NetPortError>,
    },
    #[error("cgroup of pod {pod}")]
    Cgroup {
        pod: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("start container {container}: {message}")]
    Start { container: String, message: String },
    #[error("stop container {container}: {message}")]
    Stop { container: String, message: String },
    #[error("{binary} is not at {}; {hint}", path.display())]
    NoBinary { binary: &'static str, path: PathBuf, hint: &'static str },
}

impl HostError {
    /// The whole chain in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }

    fn reason(&self) -> &'static str {
        match self {
            HostError::ImageMissing(_) | HostError::Pull { .. } | HostError::Cancelled(_) => "ErrImagePull",
            HostError::NeverPulled(_) => "ErrImageNeverPull",
            HostError::NoIds(_) => "FailedCreatePodSandBox",
            HostError::Spec(_) | HostError::User { .. } => "CreateContainerConfigError",
            HostError::Volume(_) => "FailedMount",
            HostError::Network { .. } | HostError::Publish(_) => "FailedNetwork",
            HostError::Port { .. } => "PortInUse",
            HostError::RootFs { .. } | HostError::Cgroup { .. } | HostError::Start { .. } => {
                "CreateContainerError"
            }
            HostError::Stop { .. } => "FailedKillPod",
            HostError::Path(_)
            | HostError::Locked { .. }
            | HostError::Foreign { .. }
            | HostError::OtherRun { .. }
            | HostError::Store(_)
            | HostError::NoBinary { .. } => "HostError",
        }
    }

    /// What a person can do, one sentence.
    pub fn hint(&self) -> Option<String> {
        match self {
            HostError::Foreign { .. } => Some("name another directory, or empty this one".into()),
            HostError::OtherRun { run, .. } => Some(format!("use --run {}", run.display())),
            HostError::Locked { holder, .. } => Some(match holder {
                Some(pid) => format!("wait for pid {pid} or stop it"),
                None => "wait for it or stop it".into(),
            }),
            HostError::Pull { source, .. } => source.downcast_ref::<keel_registry::PullError>()?.hint(),
            HostError::NeverPulled(image) => {
                Some(format!("fetch it by hand: keel image pull {image}, or keel image import FILE"))
            }
            HostError::Port { source, .. } => match **source {
                keel_net::NetPortError::Port(keel_net::PortError::NoSuchAddress { .. }) => {
                    Some("hostIP must be an address of this host: ip -4 addr shows them".into())
                }
                _ => Some("stop what has the port, or choose another hostPort in the manifest".into()),
            },
            other if is_disk_full(other) => {
                Some("make room on that disk: keel image prune removes images that nothing uses".into())
            }
            _ => None,
        }
    }

    fn next(&self) -> Next {
        match self {
            HostError::Spec(_) | HostError::User { .. } | HostError::NeverPulled(_) => Next::Blocked,
            HostError::Pull { retry: false, .. } => Next::Blocked,
            HostError::Volume(VolumeError::BadVolume { .. } | VolumeError::SubPathEscapes { .. }) => {
                Next::Blocked
            }
            _ => Next::Retry,
        }
    }
}

impl From<HostError> for ActionError {
    fn from(error: HostError) -> ActionError {
        ActionError { next: error.next(), reason: error.reason(), message: error.chain(), hint: error.hint() }
    }
}

impl From<HostError> for PortError {
    fn from(error: HostError) -> PortError {
        PortError(error.chain())
    }
}

fn is_disk_full(error: &HostError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        if matches!(kind, Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// An error and its sources, joined by ": ", without repeating a source that the error already quotes.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}
