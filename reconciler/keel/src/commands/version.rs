//! `version` and `completion`.

use clap::CommandFactory;
use keel_api::ClientError;

use crate::cli::{Cli, TextOrJson, VersionArgs};
use crate::commands::apply::client_runtime;
use crate::context::Context;
use crate::failure::Outcome;

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

pub(crate) fn version(context: &Context, args: &VersionArgs) -> Outcome {
    let daemon = match context.client().probe() {
        Ok(()) => Some(client_runtime()?.block_on(context.client().version())?),
        Err(ClientError::NoDaemon { .. }) => None,
        // Not root: the command's own version is still an answer.
        Err(error) => {
            context.term.note(&format!("daemon: {}\n", crate::failure::chain(&error)));
            None
        }
    };
    match args.output {
        TextOrJson::Json => {
            let shown = serde_json::json!({ "client": { "version": VERSION }, "daemon": daemon });
            Ok(context.term.print(&format!("{shown:#}\n"))?)
        }
        TextOrJson::Text => {
            let daemon =
                daemon.map_or("not running".to_owned(), |d| format!("{} (pid {})", d.version, d.pid));
            Ok(context.term.print(&format!("keel {VERSION}\ndaemon {daemon}\n"))?)
        }
    }
}

pub(crate) fn completion(context: &Context, shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "keel", &mut script);
    Ok(context.term.print(&String::from_utf8_lossy(&script))?)
}
