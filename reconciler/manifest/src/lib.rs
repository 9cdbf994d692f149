//! YAML to model, with diagnostics. Pure.

pub mod model;
