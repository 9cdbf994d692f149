//! The loop. Placeholder until the driver is wired in.

use crate::cli::Daemon;
use crate::context::Context;
use crate::failure::{Failure, Outcome};

pub(crate) fn run(_: &Context, _: &Daemon) -> Outcome {
    Err(Failure::failed("this build has no daemon"))
}
