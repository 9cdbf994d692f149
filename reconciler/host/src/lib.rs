//! The engine's ports over the real host.
