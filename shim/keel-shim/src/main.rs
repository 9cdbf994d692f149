//! The container monitor: one thread, one container.

fn main() {}
