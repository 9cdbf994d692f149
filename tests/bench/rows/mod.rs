//! The rows of the table, one module for each group of measures.

pub(crate) mod log;
pub(crate) mod memory;
pub(crate) mod plan;
pub(crate) mod pods;
pub(crate) mod pull;
pub(crate) mod runtime;
