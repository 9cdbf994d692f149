//! The command line: apply, daemon and everything to see.

fn main() {}
