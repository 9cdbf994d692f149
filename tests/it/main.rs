//! The one integration-test binary: real binaries, real kernel, real registry.

mod apply;
mod walls;
