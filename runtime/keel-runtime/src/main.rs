//! The command line of an OCI runtime.

#![forbid(unsafe_code)]

mod args;
mod checkpoint;
mod commands;
mod log;
mod update;

use args::{Command, Globals};
use keel_oci::checkpoint::{HELPER, action, helper};
use log::Log;
use std::process::ExitCode;
use std::rc::Rc;

#[cfg(debug_assertions)]
#[global_allocator]
static GUARD: keel_oci::ChildGuard = keel_oci::ChildGuard;

fn main() -> ExitCode {
    // Not in the help: this program starts itself with it.
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(HELPER) {
        eprintln!("keel-runtime: error: {}", helper(&words.collect::<Vec<_>>()).chain());
        return ExitCode::from(1);
    }
    if std::env::args_os().len() == 1
        && let Some(goes_on) = action()
    {
        return ExitCode::from(u8::from(!goes_on));
    }
    let mut globals = Globals::default();
    let parsed = args::parse(std::env::args_os().skip(1), &mut globals);
    let log = match Log::open(&globals) {
        Ok(log) => Rc::new(log),
        Err(e) => {
            eprintln!("keel-runtime: error: {e}");
            return ExitCode::from(1);
        }
    };
    let command = match parsed {
        Ok(command) => command,
        Err(e) => {
            log.error(&e.to_string());
            return ExitCode::from(1);
        }
    };
    match command {
        Command::Help => {
            help();
            ExitCode::SUCCESS
        }
        Command::HelpOn(known) => {
            print!("{}", known.help());
            ExitCode::SUCCESS
        }
        Command::Version => {
            version();
            ExitCode::SUCCESS
        }
        Command::Run { name, options, positional } => {
            if commands::needs_sealed_binary(&name)
                && let Err(e) = keel_sys::sealed::ensure()
            {
                log.error(&format!("seal the own binary: {e}"));
                return ExitCode::from(1);
            }
            match commands::run(&globals, &name, &options, &positional, &log) {
                Ok(code) => ExitCode::from(code),
                Err(e) => {
                    log.error(&e.chain());
                    // An exec that could not be carried out is told apart from a program that ended with 1.
                    ExitCode::from(if name == "exec" { 255 } else { 1 })
                }
            }
        }
    }
}

fn help() {
    println!("keel-runtime - a runtime for OCI bundles, with runc's command line\n");
    println!("usage: keel-runtime [global options] COMMAND [options] [CONTAINER-ID] [arguments]\n");
    println!("commands:");
    for name in args::command_names() {
        println!("  {name}");
    }
    println!("\nglobal options:");
    println!("  --root DIR           where the state of containers is kept");
    println!("  --log FILE           where errors are also written");
    println!("  --log-format FORMAT  text or json");
    println!("  --debug              more in the log");
    println!("  --systemd-cgroup     cgroups are scopes of systemd; cgroupsPath is slice:prefix:name");
    println!("  --version            print the version");
}

fn version() {
    println!("keel-runtime version {}", env!("CARGO_PKG_VERSION"));
    println!("spec: {}", commands::SPEC_VERSION);
}

fn root(globals: &Globals) -> std::path::PathBuf {
    globals.root.clone().unwrap_or_else(|| {
        let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| keel_sys::process::geteuid() != 0);
        match own {
            Some(dir) => std::path::Path::new(&dir).join("keel-runtime"),
            None => "/run/keel-runtime".into(),
        }
    })
}
