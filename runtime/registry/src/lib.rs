//! The registry client: images from registries into the store.
//!
//! The only crate of the runtime half with an asynchronous runtime and TLS. It never touches the layout
//! of the store, never decompresses, and keeps no state on disk: bytes go from the network through a
//! bounded channel into the store's single pass, on a thread that may block.
//!
//! Everything that a registry sends is hostile until its digest says otherwise: documents have size
//! limits that hold while reading, bodies may not be longer than announced, waiting has deadlines,
//! and logins go to the host that they are filed for and to nobody else.

mod auth;
mod backoff;
mod blob;
mod client;
mod credentials;
mod endpoint;
mod error;
mod manifest;
mod mirrors;
mod progress;
mod push;
mod reference;
mod referrers;
mod session;
mod source;
mod tls;
mod transport;

#[cfg(test)]
mod tests;

pub use backoff::RetryPolicy;
pub use client::{Client, ClientOptions, DEFAULT_PARALLEL_LAYERS, PullOptions};
pub use credentials::{InlineAuth, default_auth_files};
pub use error::PullError;
pub use keel_store::Platform;
pub use progress::{LayerProgress, LayerState, OnProgress, PullProgress, Waiting};
pub use push::{DEFAULT_CHUNK_BYTES, PushError};
pub use referrers::{Referrer, Referrers};
pub use transport::Timeouts;
