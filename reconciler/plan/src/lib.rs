//! Desired, observed, and the plan between them.
//!
//! Pure: no clock, no I/O, no random numbers, no iteration over unordered maps. The same input twice gives the
//! same output. Kept by `tests/it/walls.rs`.

pub mod model;

pub use model::*;
