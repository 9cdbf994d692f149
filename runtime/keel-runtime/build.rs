//! What the released binary does without.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=no-unwind.ld");
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|v| v.split(',').any(|v| v == value));
    let (glibc, fixed) = (is("CARGO_CFG_TARGET_ENV", "gnu"), is("CARGO_CFG_TARGET_FEATURE", "crt-static"));
    if !(glibc && fixed && is("PROFILE", "release")) {
        return;
    }
    // A panic ends the process with its message; a stripped binary has no names for a backtrace either.
    println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}/no-unwind.ld", env!("CARGO_MANIFEST_DIR"));
    println!("cargo::rustc-link-arg-bins=-Wl,--defsym=pthread_getattr_np=keel_stack_unknown");
}
