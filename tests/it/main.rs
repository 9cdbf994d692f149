//! The one integration-test binary: real binaries, real kernel, real registry.

mod apply;
mod runtime;
mod shim;
mod walls;
