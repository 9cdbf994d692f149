//! The OCI runtime specification, lowered to operations and executed.
//!
//! Never: a choice in the code that touches the kernel. `lower` decides everything from the specification and the facts
//! about the host; `child` carries it out between clone and exec.

#![deny(unsafe_code)]

mod activation;
pub mod checkpoint;
#[expect(unsafe_code, reason = "the child of a clone works with raw memory of its parent")]
mod child;
mod container;
mod error;
mod exec;
pub mod foreground;
#[cfg(test)]
mod fuzz;
mod host;
mod launch;
pub mod lower;
pub mod names;
mod netdev;
pub mod op;
mod rdt;
mod scope;
pub mod seccomp;
pub mod spec;
pub mod state;
pub mod template;

#[cfg(all(test, debug_assertions))]
#[global_allocator]
static GUARD: child::ChildGuard = child::ChildGuard;

pub use activation::Notify;
#[cfg(debug_assertions)]
pub use child::ChildGuard;
pub use container::{CreateOptions, Created, Runtime};
pub use error::RuntimeError;
pub use exec::{ExecOptions, Executed, parse_user};
pub use host::observe;
