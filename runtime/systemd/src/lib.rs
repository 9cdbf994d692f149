//! The systemd cgroup driver: a container's cgroup is a scope that systemd makes, asked for over D-Bus.
//!
//! Never: anything on the way of a container that does not ask for this driver; writes to cgroup files, which
//! `keel-cgroup` does for both drivers.

#![forbid(unsafe_code)]

mod bus;
mod manager;
mod properties;
mod unit;

pub use bus::{BusError, Instance};
pub use manager::{Manager, SystemdError};
pub use properties::{PropertyError, annotated, limits};
pub use unit::{Unit, UnitError};

/// A unit's property as systemd's interface takes it.
pub type Property = (String, zbus::Variant<'static>);
