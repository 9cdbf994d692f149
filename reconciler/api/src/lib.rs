//! The control API of the daemon.
