//! Thin, safe wrappers over the Linux system calls that the other crates need.
