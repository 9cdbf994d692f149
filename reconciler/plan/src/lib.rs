//! Desired, observed, and the plan between them.
//!
//! Pure: no clock, no I/O, no random numbers, no iteration over unordered maps. The same input twice gives the
//! same output. Kept by `tests/it/walls.rs`.

mod account;
mod diff;
mod endpoints;
mod env;
mod hash;
mod image;
mod lower;
mod phase;
mod planner;
mod preview;
mod pull;
mod reason;
mod status;
mod time;

#[cfg(test)]
mod tests;

pub mod model;

pub use account::{account, exit_of, remember_attempt, wants_restart};
pub use diff::{FieldChange, diff};
pub use env::{expand, expand_env};
pub use image::canonical_image;
pub use lower::lower_desired;
pub use model::*;
pub use phase::Phase;
pub use planner::{Plan, Planned, Settings, container_of, plan, pull_secrets};
#[cfg(test)]
pub(crate) use preview::follow as preview_follow;
pub use preview::{mark_refreshed, preview};
pub use pull::{LayerState, LayerStatus, PullStatus};
pub use reason::Reason;
pub use status::{
    Condition, ContainerFacts, ContainerStatus, DeploymentStatus, Facts, PodStatus, State, Status,
    pod_status, status,
};
pub use time::rfc3339;
