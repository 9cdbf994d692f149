//! Why an action is planned, in words that a person can check.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::diff::FieldChange;
use crate::model::{ContainerName, Origin};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Reason {
    /// The pod is declared and does not exist.
    New { origin: Origin },
    /// First run of a container in its pod.
    FirstStart,
    /// The store does not have the image.
    ImageMissing,
    /// `imagePullPolicy: Always`, and a container is about to start.
    ImageRefresh,
    /// The spec changed.
    Changed { changes: Vec<FieldChange> },
    /// The run before it had another spec and is gone.
    Replaced,
    /// The run before it had the last good image; the declared one is whole again.
    ImageBack,
    /// The run ended and the restart policy wants another.
    Ended { code: i32, oom: bool, restart: u32 },
    /// Its monitor died with it.
    Lost { restart: u32 },
    /// A creation or start that did not come to its end.
    Interrupted,
    /// No manifest declares it any more.
    NotDeclared,
    /// A later run took its place; only the newest ended runs are kept.
    OldRun,
    /// Two live runs of one container: the newest stays.
    Duplicate,
    /// Fields that need no restart differ from the record.
    Record { changes: Vec<FieldChange> },
    /// Contents of mounted ConfigMaps or Secrets differ.
    VolumeContents,
    /// Addresses, names or published ports differ from what the host was last told.
    Network,
    /// Liveness or startup probe.
    ProbeFailed { probe: String, message: String },
    /// Somebody asked for it.
    Requested { by: String },
    /// An old pod of the same owner must be gone before new ones start.
    Recreate { changes: Vec<FieldChange> },
    /// One of its volumes holds more than it may.
    Evicted { message: String },
    /// Its container is not part of the pod any more.
    ContainerGone { container: ContainerName },
}

/// Changes named in a one-line reason; the rest is counted.
const SHOWN_CHANGES: usize = 3;

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::New { origin } if origin.file.is_empty() => f.write_str("declared, not there yet"),
            Reason::New { origin } => write!(f, "declared in {}:{}, not there yet", origin.file, origin.line),
            Reason::FirstStart => f.write_str("not started yet"),
            Reason::ImageMissing => f.write_str("image is not in the store"),
            Reason::ImageRefresh => f.write_str("imagePullPolicy is Always"),
            Reason::Changed { changes } | Reason::Record { changes } | Reason::Recreate { changes } => {
                write_changes(f, changes)
            }
            Reason::Replaced => f.write_str("the old run is gone"),
            Reason::ImageBack => f.write_str("the declared image is whole again"),
            Reason::Ended { code, oom, restart } => {
                let how = if *oom { ", out of memory" } else { "" };
                write!(f, "not running: exited {code}{how}, restart {restart}")
            }
            Reason::Lost { restart } => write!(f, "not running: lost with its monitor, restart {restart}"),
            Reason::Interrupted => f.write_str("left half-made by an interruption"),
            Reason::NotDeclared => f.write_str("no longer declared"),
            Reason::OldRun => f.write_str("an old run, replaced"),
            Reason::Duplicate => f.write_str("a newer run of this container is live"),
            Reason::VolumeContents => f.write_str("contents of a mounted ConfigMap or Secret changed"),
            Reason::Network => f.write_str("addresses, names or published ports changed"),
            Reason::ProbeFailed { probe, message } => write!(f, "{probe} probe failed: {message}"),
            Reason::Requested { by } => write!(f, "asked for by {by}"),
            Reason::Evicted { message } => f.write_str(message),
            Reason::ContainerGone { container } => write!(f, "container {container} is no longer declared"),
        }
    }
}

fn write_changes(f: &mut fmt::Formatter<'_>, changes: &[FieldChange]) -> fmt::Result {
    if changes.is_empty() {
        return f.write_str("contents of a referenced ConfigMap or Secret changed");
    }
    for (index, change) in changes.iter().take(SHOWN_CHANGES).enumerate() {
        write!(f, "{}{change}", if index == 0 { "" } else { "; " })?;
    }
    match changes.len().saturating_sub(SHOWN_CHANGES) {
        0 => Ok(()),
        more => write!(f, "; and {more} more"),
    }
}
