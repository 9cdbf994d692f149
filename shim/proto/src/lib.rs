//! The control protocol between a shim and whoever talks to it.
