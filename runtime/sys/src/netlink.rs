//! Netlink: a socket that never blocks, framing, and requests with the kernel's own words in every error.

mod request;
mod socket;
pub mod wire;

pub use request::{Netlink, NetlinkError};
pub use socket::{NetlinkProtocol, NetlinkSocket};
