//! The container monitor: one thread, one container.
//!
//! Never: an async runtime, an argument or serialisation library, a second thread, a wait on the daemon, or memory that
//! grows with what the container does.
//!
//! ```text
//! keel-shim run    validates, forks off ──> setup ──> execve of itself ──> hold (until the container has ended)
//! keel-shim adopt  validates, forks off ──> adopt ──> execve of itself ──> hold
//! ```
//! Set-up may use memory freely because `execve` throws it away; `hold` is what an idle container pays for. The same
//! `execve` is how a running shim changes to a newer binary.

mod adopt;
mod args;
mod cgroup;
mod clients;
mod compress;
mod confine;
mod conmon;
mod cri;
mod error;
mod helper;
mod hold;
mod journal;
mod log;
mod machine;
mod memory;
mod notify;
mod pause;
mod process;
mod progress;
mod pump;
mod record;
mod replay;
mod rotation;
mod runtime;
mod sessions;
mod setup;
mod sockets;
mod writer;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use args::Command;
use error::Error;

/// A command line that cannot be understood.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let mut words: Vec<_> = std::env::args_os().collect();
    let program = if words.is_empty() { None } else { Some(words.remove(0)) };
    if let Some(code) = conmon::called(program.as_deref(), &words) {
        return code;
    }
    match Command::parse(&words) {
        Ok(Command::Help) => print(args::HELP),
        Ok(Command::Version) => print(concat!("keel-shim ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::Run(options)) => finish(setup::launch(&words, &options.dir)),
        Ok(Command::Adopt(options)) => finish(setup::launch(&words, &options.dir)),
        Ok(Command::Upgrade(dir)) => finish(upgrade(&dir)),
        Ok(Command::Setup(options)) => setup::run(*options),
        Ok(Command::SetupAdopt(options)) => adopt::run(&options),
        Ok(Command::Call(call)) => finish(sockets::become_program(&call)),
        Ok(Command::Pause) => finish(pause::run()),
        Ok(Command::Compress) => finish(compress::run()),
        Ok(Command::WriteLog(options)) => finish(writer::run(&options)),
        Ok(Command::Hold(inherited)) => finish(hold::run(&inherited)),
        Err(e) => {
            eprintln!("keel-shim: {e}");
            eprintln!("hint: keel-shim --help");
            println!("error {e}");
            ExitCode::from(USAGE)
        }
    }
}

fn upgrade(dir: &Path) -> Result<ExitCode, Error> {
    let done = keel_proto::Client::connect(dir).and_then(|mut client| client.upgrade());
    done.map_err(|e| Error::new(e.to_string()))?;
    println!("ok");
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> ExitCode {
    // A reader that has gone away wanted no more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn finish(result: Result<ExitCode, Error>) -> ExitCode {
    result.unwrap_or_else(|e| {
        println!("error {}", e.one_line());
        ExitCode::FAILURE
    })
}
