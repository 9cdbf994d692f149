//! `delete`, `restart` and `reconcile`.

use keel_api::{ClientError, DeleteRequest, RestartRequest, exit};

use crate::cli::{Delete, Reconcile, Restart};
use crate::commands::apply::{
    Operation, Reporter, client_runtime, delete_each, one_shot, say_diagnostics, through_daemon,
};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::input::Input;
use crate::object;

pub(crate) fn delete(context: &Context, args: &Delete) -> Outcome {
    let requests = if args.filename.is_empty() { named(context, args)? } else { declared(context, args)? };
    let names: Vec<String> =
        requests.iter().map(|request| format!("{} {}", request.kind, request.name)).collect();
    let mut reporters: Vec<Reporter> =
        names.iter().map(|_| Reporter::new(context.term, args.output, false)).collect();
    let results = delete_each(context, requests, &mut reporters)?;
    let mut worst = Ok(());
    for ((what, reporter), ran) in names.iter().zip(reporters).zip(results) {
        match ran.and_then(|()| reporter.end().map(drop)) {
            Err(failure) if failure.code == exit::NOT_FOUND && args.ignore_not_found => {}
            // The others are tried as well; the last failure is the command's.
            Err(failure) => {
                if let Err(earlier) = std::mem::replace(&mut worst, Err(failure)) {
                    context.term.say(&Failure::render(&earlier, context.term.color_err));
                }
            }
            Ok(()) => context.term.note(&format!("deleted {what}\n")),
        }
    }
    worst
}

fn named(context: &Context, args: &Delete) -> Outcome<Vec<DeleteRequest>> {
    let wanted = object::parse(&args.objects)?;
    let request = |wanted: object::Wanted| {
        let name = wanted.name.ok_or_else(|| {
            Failure::invalid(format!("delete every {}? name them", wanted.kind.word()))
                .hint("write KIND/NAME, e.g. pod/web")
        })?;
        Ok(lower(args, wanted.kind.name().to_owned(), context.settings.namespace.clone(), name))
    };
    wanted.into_iter().map(request).collect()
}

/// Dependents first: the reverse of the order in which they are declared.
fn declared(context: &Context, args: &Delete) -> Outcome<Vec<DeleteRequest>> {
    let (objects, problems) = Input::read(&args.filename)?.parse(context.settings.asked_namespace.as_deref());
    say_diagnostics(context.term, &problems);
    if problems.iter().any(keel_api::Diagnostic::is_error) {
        return Err(Failure::silent(exit::INVALID));
    }
    let request = |object: &keel_manifest::Object| {
        let key = object.key();
        lower(args, key.kind, key.namespace, key.name)
    };
    Ok(objects.iter().rev().map(request).collect())
}

fn lower(args: &Delete, kind: String, namespace: String, name: String) -> DeleteRequest {
    let grace_ms =
        if args.now { Some(0) } else { args.grace_period.map(|seconds| seconds.saturating_mul(1000)) };
    DeleteRequest { kind, namespace, name, wait: !args.no_wait, grace_ms }
}

pub(crate) fn restart(context: &Context, args: &Restart) -> Outcome {
    // Bare names are those of pods.
    let wanted = match args.objects.split_first() {
        Some((first, _)) if object::Kind::parse(first).is_some() => object::parse(&args.objects)?,
        _ => args.objects.iter().map(|word| object::parse_one(word)).collect::<Outcome<Vec<_>>>()?,
    };
    for wanted in wanted {
        let name = wanted.name.ok_or_else(|| {
            Failure::invalid(format!("restart every {}? name them", wanted.kind.word()))
                .hint("write KIND/NAME, e.g. pod/web")
        })?;
        let operation = Operation::Restart(RestartRequest {
            kind: wanted.kind.name().to_owned(),
            namespace: context.settings.namespace.clone(),
            name,
            container: args.container.clone(),
            wait: !args.no_wait,
            timeout_ms: u64::try_from(args.timeout.as_millis()).ok().filter(|&ms| ms > 0),
        });
        let mut reporter = Reporter::new(context.term, args.output, false);
        match context.client().probe() {
            Ok(()) => through_daemon(context, operation, &mut reporter)?,
            Err(ClientError::NoDaemon { .. }) => one_shot(context, operation, &mut reporter)?,
            Err(error) => return Err(error.into()),
        }
        reporter.end()?;
    }
    Ok(())
}

pub(crate) fn reconcile(context: &Context, args: &Reconcile) -> Outcome {
    Ok(client_runtime()?.block_on(context.client().reconcile(args.accept_removals))?)
}
