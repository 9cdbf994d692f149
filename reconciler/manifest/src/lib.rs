//! YAML to model, with diagnostics.
//!
//! Pure: no clock, no file system, no network, no random numbers; the same bytes give the same objects and messages.

mod object;
mod quantity;

pub mod model;

pub use object::{Kind, Object, ObjectKey, Origin};
pub use quantity::{Quantity, QuantityError};
