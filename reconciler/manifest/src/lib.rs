//! YAML to model, with diagnostics.
//!
//! Pure: no clock, no file system, no network, no random numbers; the same bytes give the same objects and messages.
//!
//! ```text
//! bytes -> tree (places, aliases, <<) -> walk (shapes of the model) -> model -> validate (values) -> Parsed
//!                                                                            \-> check (between objects)
//! ```

mod capability;
mod check;
mod diagnostic;
mod effective;
pub mod extension;
mod known;
mod object;
mod parse;
mod quantity;
mod report;
mod scalar;
mod schema;
#[cfg(test)]
mod tests;
mod tree;
mod validate;
mod walk;
mod yaml;

pub mod logging;
pub mod model;

pub use capability::CAPABILITIES;
pub use check::{check, check_change, place_in};
pub use diagnostic::{Diagnostic, Related, Severity};
pub use effective::{Effective, FileCondition, LastGood, effective};
pub use object::{Kind, Object, ObjectKey, Origin};
pub use parse::{MAX_FILE_BYTES, Parsed, parse};
pub use quantity::{Quantity, QuantityError};
pub use schema::{kinds, schema};
pub use yaml::to_yaml;
