//! One module per command. Each takes the context and its arguments, and ends with a failure or not at all.

pub(crate) mod apply;
pub(crate) mod check;
pub(crate) mod delete;
pub(crate) mod exec;
pub(crate) mod hello;
pub(crate) mod image;
pub(crate) mod logs;
pub(crate) mod see;
pub(crate) mod system;
pub(crate) mod version;
