//! `check` and `schema`: what needs no host.

use keel_api::exit;
use keel_manifest::Diagnostic;

use crate::cli::{Check, Schema, TextOrJson};
use crate::commands::apply::{say_diagnostics, sources};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::input::Input;
use crate::render::report::tally;
use crate::text::count;

pub(crate) fn check(context: &Context, args: &Check) -> Outcome {
    let input = Input::read(&sources(context, &args.files.filename)?)?;
    let (objects, problems) = input.parse(context.settings.asked_namespace.as_deref());
    let bad = problems.iter().any(|problem| args.strict || problem.is_error());
    match args.output {
        TextOrJson::Json => {
            let shown = serde_json::json!({
                "valid": !bad,
                "files": input.files.len(),
                "objects": objects.len(),
                "diagnostics": problems,
            });
            context.term.print(&format!("{shown:#}\n"))?;
        }
        TextOrJson::Text => {
            say_diagnostics(context.term, &problems);
            if objects.is_empty() && !bad {
                context.term.note("no objects in the input\n");
            }
            if !bad && !context.term.quiet {
                let (files, objects) = (count(input.files.len(), "file"), count(objects.len(), "object"));
                context.term.print(&format!("ok: {files}, {objects}{}\n", with_warnings(&problems)))?;
            }
        }
    }
    if bad { Err(Failure::silent(exit::INVALID)) } else { Ok(()) }
}

fn with_warnings(problems: &[Diagnostic]) -> String {
    match tally(problems) {
        none if none.is_empty() => none,
        some => format!(", {some}"),
    }
}

pub(crate) fn schema(context: &Context, args: &Schema) -> Outcome {
    let Some(schema) = keel_manifest::schema(args.kind.as_deref()) else {
        let kind = args.kind.as_deref().unwrap_or_default();
        return Err(Failure::invalid(format!("no kind `{kind}`"))
            .hint(format!("kinds: {}", keel_manifest::kinds().join(", "))));
    };
    Ok(context.term.print(&format!("{schema:#}\n"))?)
}
