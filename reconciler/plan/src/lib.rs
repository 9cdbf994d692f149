//! Desired, observed, and the plan between them.
//!
//! Pure: no clock, no I/O, no random numbers, no iteration over unordered maps. The same input twice gives the
//! same output. Kept by `tests/it/walls.rs`.

mod env;
mod hash;
mod image;
mod lower;

pub mod model;

pub use env::{expand, expand_env};
pub use image::canonical_image;
pub use lower::lower_desired;
pub use model::*;
