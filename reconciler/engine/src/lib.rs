//! The reconcile core without I/O, and the driver that runs it.
//!
//! Never: system calls, the store, the registry, the network, a shim. Those are behind [`ports`], so that the simulator
//! is as good a host as a real one. Kept by `tests/it/walls.rs`.

pub mod ports;
