//! The command line of an OCI runtime.

fn main() {}
