//! The one integration-test binary: real binaries, real kernel, real registry.

mod activation;
mod apply;
mod badinput;
mod callers;
mod cli;
mod conmon;
mod crash;
mod daemon;
mod images;
mod images_peers;
mod images_pull;
mod images_told;
mod logs;
mod manifests;
mod network;
mod podspec;
mod review_cli;
mod review_host;
mod runtime;
mod seccomp;
mod shim;
mod storage;
mod vm;
mod walls;
