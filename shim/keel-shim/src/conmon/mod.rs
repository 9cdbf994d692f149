//! conmon's face of the monitor: its command line, its pipes to the caller, its sockets and files, so that podman and CRI-O
//! can use this program in conmon's place.
//!
//! ```text
//! conmon ARGS       checks, waits for the start pipe, starts the next, writes its pid, ends
//!   conmon-setup    sockets and FIFOs, runtime create (or exec, restore), answers on the sync pipe, execve ──>
//!   conmon-hold     output to the log and the clients, until the end; exit files; exit command
//! ```
//! The hold phase is confined like the native one; what its exit command needs is kept for that in a helper (see `helper`).
//!
//! Never: a copy of what the native face has. Output goes through the same pump, log and formatter.

mod cli;
mod clients;
mod control;
mod hold;
mod parent;
mod setup;

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::ExitCode;

use crate::error::Error;
use cli::Options;
use hold::Handed;

/// Callers read the version, and switch features on by it.
const VERSION: &str = "2.2.1";
const SETUP: &str = "conmon-setup";
const HOLD: &str = "conmon-hold";
const LISTEN: &str = "conmon-listen";

/// `None` when this is not a call of conmon.
pub(crate) fn called(program: Option<&OsStr>, words: &[OsString]) -> Option<ExitCode> {
    let (first, rest) = words.split_first().map_or((None, words), |(first, rest)| (first.to_str(), rest));
    Some(match first.unwrap_or_default() {
        SETUP => parsed(rest, |options| setup::run(&options, rest)),
        HOLD => hold_phase(rest),
        LISTEN => setup::become_runtime(rest),
        "conmon" => parsed(rest, |options| setup::launch(&options, rest)),
        _ if Path::new(program?).file_name() == Some(OsStr::new("conmon")) => {
            parsed(words, |options| setup::launch(&options, words))
        }
        _ => return None,
    })
}

fn parsed(words: &[OsString], run: impl FnOnce(Options) -> ExitCode) -> ExitCode {
    match Options::parse(words) {
        Ok(options) if options.help => crate::print(cli::HELP),
        Ok(options) if options.version => crate::print(&format!(
            "conmon version {VERSION}\ncommit: keel-shim {}\n",
            env!("CARGO_PKG_VERSION")
        )),
        Ok(options) => run(options),
        Err(e) => {
            eprintln!("conmon: option parsing failed: {e}");
            ExitCode::FAILURE
        }
    }
}

fn hold_phase(words: &[OsString]) -> ExitCode {
    let Some((handed, rest)) = words.split_first_chunk::<{ hold::WORDS }>() else { return ExitCode::FAILURE };
    // Before anything else opens files.
    let handed = Handed::decode(handed);
    parsed(rest, |options| match handed.and_then(|handed| hold::run(options.clone(), handed)) {
        Ok(code) => code,
        Err(e) => {
            say(&options, &e);
            ExitCode::FAILURE
        }
    })
}

/// To whoever started us, and to syslog if that is wanted.
fn say(options: &Options, error: &Error) {
    let text = format!("conmon {}: {error}", options.cid);
    let _ = writeln!(std::io::stderr(), "{text}");
    if options.syslog
        && let Ok(socket) = UnixDatagram::unbound()
    {
        /// Facility "daemon", severity "error".
        const PRIORITY: u32 = 3 * 8 + 3;
        let message = format!("<{PRIORITY}>conmon[{}]: {text}", std::process::id());
        // A syslog that is not there is no reason not to go on.
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(message.as_bytes(), "/dev/log");
    }
}
