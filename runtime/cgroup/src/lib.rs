//! cgroup v1, v2 and hybrid: create, limit, read and remove.
//!
//! Never: move a process that does not ask for it by another way than its own write of `0` to `tasks` (v1) or a clone
//! into the cgroup (v2), on the paths that start containers: a write of a pid waits for an RCU grace period.

#![forbid(unsafe_code)]

mod devices;
mod group;
mod layout;
mod resources;
mod stats;
mod write;

pub use devices::{Access, DeviceKind, DeviceRule, device_program};
pub use group::{Cgroup, CgroupError, Claim, Entry, Version};
pub use layout::{Hierarchy, Layout, LayoutError, Mode, Roots};
pub use resources::*;
pub use stats::*;
pub use write::{Setting, cannot_be_set, has_no_effect, lower_v1, lower_v2, shares_to_weight};
