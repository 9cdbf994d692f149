//! The command line: apply, daemon and everything to see.
//!
//! Commands that only look need no daemon: they read what is on disk and in the kernel. Commands that act go through
//! the daemon when one listens on the instance's socket, and otherwise take the lock and act in this process.
//!
//! Standard output is data, standard error is talk. Exit codes ([`keel_api::exit`]):
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done, or everything is as declared; also when the reader of standard output has gone |
//! | 1 | failed; with `plan --exit-code`: there is something to do |
//! | 2 | invalid input: manifest, flag or configuration |
//! | 3 | applied, but not ready in time; with `status --check`: not ready |
//! | 4 | no such object |
//! | 5 | the daemon cannot be reached, or another process holds the state lock |
//! | 6 | partly applied |
//! | 125, 126, 127 | `exec`: could not be tried, cannot be executed, not found; else the command's own code |

mod cli;
mod commands;
mod config;
mod context;
mod control;
mod crilog;
mod daemon;
mod failure;
mod images;
mod input;
mod instance;
mod object;
mod oneshot;
mod passwd;
mod render;
mod selector;
mod term;
mod text;
mod world;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::term::Term;

/// Directories that are made for containers are entered by any user, however private our caller's files are. Files that
/// are not for everybody name their mode.
const UMASK: u32 = 0o022;

fn main() -> ExitCode {
    keel_sys::process::umask(UMASK);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            if let Some(hint) = commands::usage_hint(&error, std::env::args_os()) {
                Term::plain().say(&format!("hint: {hint}\n"));
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(keel_api::exit::INVALID));
        }
    };
    let term = Term::detect(&cli.global);
    let code = match run(&cli) {
        Ok(code) => code,
        Err(failure) => {
            term.say(&failure.render(term.color_err));
            failure.code
        }
    };
    ExitCode::from(code)
}

/// The exit code of success is the command's only for `exec`.
fn run(cli: &Cli) -> Outcome<u8> {
    // No configuration, no state: it runs inside of containers.
    if let Command::Hello(args) = &cli.command {
        return done(commands::hello::hello(args));
    }
    let context = Context::new(&cli.global)?;
    let base =
        if matches!(cli.command, Command::Daemon(_)) { tracing::Level::INFO } else { tracing::Level::ERROR };
    context.start_logging(base);
    if acts(&cli.command) && keel_sys::process::geteuid() != 0 {
        return Err(Failure::failed("this changes the host, or looks into what only root may see")
            .hint("run as root"));
    }
    dispatch(&context, &cli.command)
}

/// What needs the lock, the store or the namespaces of a container.
fn acts(command: &Command) -> bool {
    match command {
        Command::Apply(_)
        | Command::Plan(_)
        | Command::Daemon(_)
        | Command::Delete(_)
        | Command::Restart(_)
        | Command::Reconcile(_)
        | Command::Exec(_)
        | Command::Attach(_)
        | Command::Image(_)
        | Command::System(_)
        | Command::RestartRun(_) => true,
        Command::Check(_)
        | Command::Get(_)
        | Command::Describe(_)
        | Command::Logs(_)
        | Command::Status(_)
        | Command::Events(_)
        | Command::Schema(_)
        | Command::Completion { .. }
        | Command::Version(_)
        | Command::Hello(_) => false,
    }
}

fn dispatch(context: &Context, command: &Command) -> Outcome<u8> {
    use commands::{apply, attach, check, delete, exec, image, logs, see, version};
    match command {
        Command::Apply(args) => done(apply::apply(context, args)),
        Command::Plan(args) => done(apply::plan(context, args)),
        Command::Check(args) => done(check::check(context, args)),
        Command::Schema(args) => done(check::schema(context, args)),
        Command::Daemon(args) => done(daemon::run(context, args)),
        Command::Logs(args) => done(logs::logs(context, args)),
        Command::Exec(args) => exec::exec(context, args),
        Command::Attach(args) => attach::attach(context, args),
        Command::Completion { shell } => done(version::completion(context, *shell)),
        Command::Version(args) => done(version::version(context, args)),
        Command::Get(args) => done(see::get(context, args)),
        Command::Describe(args) => done(see::describe(context, args)),
        Command::Status(args) => done(see::status(context, args)),
        Command::Events(args) => done(see::events(context, args)),
        Command::Delete(args) => done(delete::delete(context, args)),
        Command::Restart(args) => done(delete::restart(context, args)),
        Command::Reconcile(args) => done(delete::reconcile(context, args)),
        Command::Image(command) => done(image::image(context, command)),
        Command::System(cli::System::Reset(args)) => done(commands::system::reset(context, args)),
        Command::RestartRun(args) => done(commands::restart_run::restart_run(context, args)),
        // Answered before there was a context.
        Command::Hello(args) => done(commands::hello::hello(args)),
    }
}

fn done(outcome: Outcome) -> Outcome<u8> {
    outcome.map(|()| keel_api::exit::DONE)
}
