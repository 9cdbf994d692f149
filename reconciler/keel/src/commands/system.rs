//! `system reset`: the instance as if it had never run.

use std::io::{BufRead, IsTerminal, Write};

use keel_host::RealHost;

use crate::cli::Reset;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::instance::{COMMAND_PATIENCE, host_config, refused, take_lock};

pub(crate) fn reset(context: &Context, args: &Reset) -> Outcome {
    if !args.force && !confirmed(context)? {
        return Err(Failure::failed("nothing was changed"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start", "the runtime of the command", &error))?;
    // A shim may be restarting a container just now.
    let _lock = runtime.block_on(take_lock(context, COMMAND_PATIENCE))?;
    let host = RealHost::open(context.paths.clone(), host_config(context), runtime.handle().clone());
    let removed = host.map_err(refused)?.reset(args.state).map_err(refused)?;
    context.term.note(&format!("removed {} containers and {} pods\n", removed.containers, removed.pods));
    Ok(())
}

fn confirmed(context: &Context) -> Outcome<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::invalid("this removes every container of the instance")
            .hint("add --force if that is meant"));
    }
    eprint!("Remove every container, pod and network of {}? [y/N] ", context.paths.root().display());
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Failure::io("read", "standard input", &error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
