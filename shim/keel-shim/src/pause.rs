//! The first process of a pod whose containers share a pid namespace: it reaps, and does nothing else.

use std::process::ExitCode;

use keel_sys::monitor::{reap, shed_memory};
use keel_sys::process::{block_signals, read_signal};

use crate::error::{Context, Error};

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;

/// Ends on SIGTERM or SIGINT, and the namespace with it.
pub(crate) fn run() -> Result<ExitCode, Error> {
    // To the first process of a namespace no signal has a default action; taken from a descriptor they arrive.
    let signals = block_signals().doing("block signals")?;
    // Whoever ended before.
    let mut last = SIGCHLD;
    loop {
        match last {
            SIGTERM | SIGINT => return Ok(ExitCode::SUCCESS),
            SIGCHLD => while let Ok(Some(_)) = reap(-1) {},
            _ => {}
        }
        shed_memory();
        last = read_signal(&signals).doing("wait for signals")?;
    }
}
