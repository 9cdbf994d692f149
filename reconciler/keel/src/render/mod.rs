//! Views. Pure: a value in, text out.

pub(crate) mod objects;
pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod table;
