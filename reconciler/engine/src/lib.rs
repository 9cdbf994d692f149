//! The reconcile core without I/O, and the driver that runs it.
//!
//! Never: system calls, the store, the registry, the network, a shim. Those are behind [`ports`], so that the simulator
//! is as good a host as a real one. Kept by `tests/it/walls.rs`.

mod core;
mod driver;
mod events;
mod flights;
mod probes;
mod rate;
mod retries;
mod settings;
mod writer;

pub mod ports;

pub use crate::core::{Convergence, Core, Input, Now, Output, Ticket};
pub use driver::{Ended, Engine, EventSink, Handle, Report, Standing};
pub use events::{Event, EventKind};
pub use rate::PullRate;
pub use settings::Settings;
