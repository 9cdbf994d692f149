//! What goes over the wire. JSON, camelCase; readers ignore unknown fields, so that a newer daemon can say more.

use std::sync::Arc;

use keel_manifest::Diagnostic;
use keel_plan::{Millis, PullStatus, Status};
use serde::{Deserialize, Serialize};

/// Exit codes of `keel`, also carried in [`ControlEvent::Result`].
pub mod exit {
    pub const DONE: u8 = 0;
    pub const FAILED: u8 = 1;
    /// Invalid manifest or flags.
    pub const INVALID: u8 = 2;
    /// Applied, but not ready in time.
    pub const NOT_READY: u8 = 3;
    /// No such object.
    pub const NOT_FOUND: u8 = 4;
    /// The daemon cannot be reached, or another process holds the state lock.
    pub const UNAVAILABLE: u8 = 5;
    /// Some actions were carried out, others were not.
    pub const PARTIAL: u8 = 6;
}

/// `POST /keel/v1/apply`. Answered by a stream of [`ControlEvent`], one JSON object a line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApplyRequest {
    pub files: Vec<InputFile>,
    /// Where objects go that name no namespace; those that name another one are refused. `None`: `default`, and any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Delete applied objects that these files no longer name.
    #[serde(default)]
    pub prune: bool,
    /// Confirms a prune that would delete everything.
    #[serde(default)]
    pub allow_empty: bool,
    /// End only when every applied pod is ready, or `timeout_ms` is over.
    #[serde(default)]
    pub wait: bool,
    /// `None`: no deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Plan only.
    #[serde(default)]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// As the user named it: goes into diagnostics and provenance.
    pub name: String,
    pub text: String,
}

/// `POST /keel/v1/delete`. Answered by a stream of [`ControlEvent`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeleteRequest {
    /// `Pod`, `Deployment`, ...
    pub kind: String,
    pub namespace: String,
    pub name: String,
    /// End only when everything of it is gone.
    #[serde(default)]
    pub wait: bool,
    /// Overrides the pod's `terminationGracePeriodSeconds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// `POST /keel/v1/restart`. Answered by a stream of [`ControlEvent`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartRequest {
    /// `Pod`, or what pods are made from.
    pub kind: String,
    pub namespace: String,
    pub name: String,
    /// Only this container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// End only when everything is ready again, or `timeout_ms` is over.
    #[serde(default)]
    pub wait: bool,
    /// `None`: no deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// `POST /keel/v1/images`. Answered by a stream of [`ControlEvent`]. The store has one process that writes to it: the
/// daemon when there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase")]
#[serde(rename_all_fields = "camelCase")]
pub enum ImageRequest {
    Pull {
        image: String,
        /// Keeps an index whole, with the images of all platforms.
        #[serde(default)]
        all_platforms: bool,
        /// Fetches packed layers that were given up for space, too.
        #[serde(default)]
        packed: bool,
    },
    /// `path` is absolute, on the daemon's host; `name` is how the user called it.
    Import {
        path: std::path::PathBuf,
        name: String,
    },
    Remove {
        image: String,
        /// Also one that a pod is made of.
        #[serde(default)]
        force: bool,
    },
    /// One more reference for an image.
    Tag {
        image: String,
        reference: String,
    },
    /// What refers to it in its registry: signatures, lists of contents.
    Referrers {
        image: String,
        #[serde(default)]
        artifact_type: Option<String>,
    },
    /// `target` is another name to push it by.
    Push {
        image: String,
        #[serde(default)]
        target: Option<String>,
    },
    /// `path` is absolute, on the daemon's host.
    Save {
        images: Vec<String>,
        path: std::path::PathBuf,
        #[serde(default)]
        format: SaveFormat,
    },
    Usage,
    List,
    Inspect {
        image: String,
    },
    /// Checks what is on disk.
    Verify {
        /// Reads all contents, and not only names, owners, modes and lengths.
        #[serde(default)]
        full: bool,
        /// Heals what is damaged, or sets it aside.
        #[serde(default)]
        repair: bool,
    },
    Prune,
}

/// What images are written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SaveFormat {
    #[default]
    OciArchive,
    OciDirectory,
    DockerArchive,
}

/// One line of the answer to `apply` and `delete`. A stream ends with exactly one [`ControlEvent::Result`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ControlEvent {
    /// Problems of the manifests. Any error among them means that nothing was touched.
    Diagnostics {
        diagnostics: Vec<Diagnostic>,
    },
    /// Sent once, before the first action.
    Plan {
        actions: Vec<PlannedAction>,
        waiting: Vec<WaitingObject>,
    },
    ActionStarted {
        verb: String,
        object: String,
    },
    ActionFinished {
        verb: String,
        object: String,
        duration_ms: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<ActionFailure>,
    },
    /// Progress of an image that is pulled, pushed, imported or saved.
    Progress(PullStatus),
    /// What a pod waits for has changed.
    PodWaiting {
        pod: String,
        waiting: WaitingObject,
    },
    PodReady {
        pod: String,
        after_ms: u64,
    },
    /// Something worth saying that is neither an error nor an action.
    Note {
        message: String,
    },
    /// What was asked for: a list of images, the description of one.
    Data {
        value: serde_json::Value,
    },
    /// The end.
    Result {
        exit_code: u8,
        message: String,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        hints: Vec<String>,
    },
}

/// One planned action, in the words that every view prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedAction {
    /// `pull`, `create`, `start`, `restart`, `stop`, `update`, `delete`, ...
    pub verb: String,
    /// `pod/web`, `container/web.nginx`, `image/docker.io/library/nginx:1.27`.
    pub object: String,
    /// What exactly, e.g. `containers[0].image: a -> b`. May be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Why.
    pub reason: String,
}

/// What cannot be done yet, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingObject {
    pub object: String,
    /// CamelCase word, e.g. `ImagePullBackOff`.
    pub reason: String,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionFailure {
    /// CamelCase word, e.g. `ErrImagePull`.
    pub reason: String,
    /// The whole chain, one line.
    pub message: String,
    /// False: pointless until the manifest or the host changes.
    pub retry: bool,
    /// What a person can do, one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// `GET /keel/v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Changes whenever the status does.
    pub revision: u64,
    pub status: Arc<Status>,
}

/// One thing that happened, as `keel events` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Counts up, never reused while the daemon's run directory lives.
    pub seq: u64,
    pub time_ms: Millis,
    /// Something is wrong, or may be.
    pub warning: bool,
    /// `Pod/default/web`, `File/web.yaml`, `Image/docker.io/library/nginx:1.27`.
    pub object: String,
    /// CamelCase word, e.g. `Started`, `BackOff`.
    pub reason: String,
    pub message: String,
    /// How often in a row; a repetition updates the count instead of adding a line.
    #[serde(default = "one")]
    pub count: u32,
}

fn one() -> u32 {
    1
}

/// `GET /keel/v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionInfo {
    pub version: String,
    pub api: String,
    pub pid: u32,
    pub root: String,
    pub run: String,
}

/// A refused or failed request. The body of every answer that is not 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    pub code: ErrorCode,
    /// The whole chain, one line.
    pub message: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hints: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ErrorCode {
    /// The request itself is wrong.
    Invalid,
    NotFound,
    /// Something else that is declared, runs or works is in the way.
    Conflict,
    Denied,
    /// Not now: starting, stopping.
    Unavailable,
    Internal,
}

impl ControlError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        ControlError { code, message: message.into(), hints: Vec::new() }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    pub fn exit_code(&self) -> u8 {
        match self.code {
            ErrorCode::Invalid => exit::INVALID,
            ErrorCode::NotFound => exit::NOT_FOUND,
            ErrorCode::Denied | ErrorCode::Unavailable => exit::UNAVAILABLE,
            ErrorCode::Conflict | ErrorCode::Internal => exit::FAILED,
        }
    }
}
