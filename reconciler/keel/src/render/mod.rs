//! Views. Pure: a value in, text out.

pub(crate) mod contents;
pub(crate) mod objects;
pub(crate) mod progress;
pub(crate) mod report;
mod spec;
pub(crate) mod table;
