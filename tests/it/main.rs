//! The one integration-test binary: real binaries, real kernel, real registry.

mod apply;
mod daemon;
mod manifests;
mod runtime;
mod shim;
mod walls;
