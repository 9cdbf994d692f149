//! The packet-filter table: rendered whole from what is published, replaced whole in one transaction.
//!
//! `lower` decides what the table says (pure), `model` is that table as data, `encode` turns it into
//! nf_tables messages, `observe` reads back what the kernel has,
//! `conntrack` makes the kernel forget flows that the replaced table has steered, `watch` tells of changes.

pub(crate) mod conntrack;
pub(crate) mod encode;
pub(crate) mod lower;
pub(crate) mod model;
pub(crate) mod observe;
pub(crate) mod watch;
