//! `apply`, `plan` and `delete`: the operations that report as they go.

use std::path::PathBuf;

use futures_util::future::join_all;
use keel_api::{
    ApplyRequest, ClientError, ControlError, ControlEvent, DeleteRequest, ErrorCode, EventSender,
    ImageRequest, Lines, RestartRequest, exit,
};
use keel_manifest::Diagnostic;
use tokio::sync::mpsc;

use crate::cli::{Apply, Plan, TextOrJson};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::input::Input;
use crate::render::progress::Progress;
use crate::render::report;
use crate::term::Term;

/// Reports that the printer may be behind before an operation in this process waits for it.
const EVENT_QUEUE: usize = 256;

pub(crate) fn apply(context: &Context, args: &Apply) -> Outcome {
    let request = ApplyRequest {
        prune: args.prune,
        allow_empty: args.allow_empty,
        wait: args.wait,
        timeout_ms: u64::try_from(args.timeout.as_millis()).ok().filter(|&ms| ms > 0),
        dry_run: args.dry_run,
        ..ApplyRequest::default()
    };
    run_apply(context, &args.files.filename, request, args.output).map(drop)
}

pub(crate) fn plan(context: &Context, args: &Plan) -> Outcome {
    let request = ApplyRequest {
        prune: args.prune,
        allow_empty: args.allow_empty,
        dry_run: true,
        ..ApplyRequest::default()
    };
    let anything = run_apply(context, &args.files.filename, request, args.output)?;
    if args.exit_code && anything { Err(Failure::silent(exit::FAILED)) } else { Ok(()) }
}

/// True when the plan had something in it.
fn run_apply(
    context: &Context,
    names: &[PathBuf],
    mut request: ApplyRequest,
    form: TextOrJson,
) -> Outcome<bool> {
    let input = Input::read(&sources(context, names)?)?;
    request.namespace = context.settings.asked_namespace.clone();
    let mut reporter = Reporter::new(context.term, form, request.dry_run);
    match input.request_files() {
        Some(files) if input.problems.is_empty() => request.files = files,
        _ => {
            reporter.event(&ControlEvent::Diagnostics { diagnostics: input.parse(None).1 })?;
            return Err(Failure::silent(exit::INVALID));
        }
    }
    match context.client().probe() {
        Ok(()) => through_daemon(context, Operation::Apply(request), &mut reporter)?,
        Err(ClientError::NoDaemon { .. }) => one_shot(context, Operation::Apply(request), &mut reporter)?,
        Err(error) => return Err(error.into()),
    }
    reporter.end()
}

/// `-f`, or the configured directory.
pub(crate) fn sources(context: &Context, names: &[PathBuf]) -> Outcome<Vec<PathBuf>> {
    match (names, &context.settings.manifests) {
        ([], Some(dir)) => Ok(vec![dir.clone()]),
        ([], None) => Err(Failure::invalid("no manifests named")
            .hint("name a directory, a file or standard input: -f DIR|FILE|-")),
        (names, _) => Ok(names.to_vec()),
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Apply(ApplyRequest),
    Restart(RestartRequest),
    Image(ImageRequest),
}

pub(crate) fn through_daemon(context: &Context, operation: Operation, reporter: &mut Reporter) -> Outcome {
    let client = context.client();
    client_runtime()?.block_on(async {
        let lines = match &operation {
            Operation::Apply(request) => client.apply(request).await?,
            Operation::Restart(request) => client.restart(request).await?,
            Operation::Image(request) => client.images(request).await?,
        };
        print_lines(lines, reporter).await
    })
}

async fn print_lines(mut lines: Lines<ControlEvent>, reporter: &mut Reporter) -> Outcome {
    while let Some(event) = lines.next().await? {
        reporter.event(&event)?;
    }
    Ok(())
}

async fn print_received(mut events: mpsc::Receiver<ControlEvent>, reporter: &mut Reporter) -> Outcome {
    let mut printed = Ok(());
    while let Some(event) = events.recv().await {
        // The operation goes on when nobody reads its reports any more.
        if printed.is_ok() {
            printed = reporter.event(&event);
        }
    }
    printed
}

/// Deletes all of them side by side. One result for each, in their order.
pub(crate) fn delete_each(
    context: &Context,
    requests: Vec<DeleteRequest>,
    reporters: &mut [Reporter],
) -> Outcome<Vec<Outcome>> {
    match context.client().probe() {
        Ok(()) => {
            let client = context.client();
            let each = requests.iter().zip(reporters).map(|(request, reporter)| async {
                print_lines(client.delete(request).await?, reporter).await
            });
            Ok(client_runtime()?.block_on(join_all(each)))
        }
        Err(ClientError::NoDaemon { .. }) => {
            let runtime = acting_runtime()?;
            let results = runtime.block_on(async {
                let (senders, receivers): (Vec<_>, Vec<_>) =
                    requests.iter().map(|_| mpsc::channel(EVENT_QUEUE)).unzip();
                let acting = crate::oneshot::delete(context, requests.into_iter().zip(senders));
                let printing = receivers.into_iter().zip(reporters);
                let printing = join_all(printing.map(|(events, reporter)| print_received(events, reporter)));
                let (acted, printed) = tokio::join!(acting, printing);
                let result = |(acted, printed): (Result<(), ControlError>, Outcome)| {
                    acted.map_err(Failure::from).and(printed)
                };
                Ok::<_, Failure>(acted?.into_iter().zip(printed).map(result).collect())
            });
            // A stop that was begun and is not waited for goes on without us.
            runtime.shutdown_background();
            results
        }
        Err(error) => Err(error.into()),
    }
}

/// The same, in this process.
pub(crate) fn one_shot(context: &Context, operation: Operation, reporter: &mut Reporter) -> Outcome {
    let runtime = acting_runtime()?;
    let outcome = runtime.block_on(async {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let acting = act(context, operation, sender);
        let (acted, printed) = tokio::join!(acting, print_received(receiver, reporter));
        acted?;
        printed
    });
    // A stop that was begun and is not waited for goes on without us.
    runtime.shutdown_background();
    outcome
}

async fn act(context: &Context, operation: Operation, events: EventSender) -> Result<(), ControlError> {
    match operation {
        Operation::Apply(request) => crate::oneshot::apply(context, request, events).await,
        Operation::Restart(request) => crate::oneshot::restart(context, request, events).await,
        Operation::Image(request) => crate::world::images(context, request, events).await,
    }
}

/// For acting in this process.
fn acting_runtime() -> Outcome<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start", "the runtime of the command", &error))
}

pub(crate) fn client_runtime() -> Outcome<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start", "the runtime of the command", &error))
}

/// Prints an operation's reports, and knows in the end how it went.
pub(crate) struct Reporter {
    term: Term,
    form: TextOrJson,
    /// A plan that was asked for is data, one on the way to its execution as well unless `--quiet`.
    dry_run: bool,
    progress: Progress,
    planned: bool,
    result: Option<(u8, String, Vec<String>)>,
    data: Option<serde_json::Value>,
}

impl Reporter {
    pub(crate) fn new(term: Term, form: TextOrJson, dry_run: bool) -> Reporter {
        Reporter {
            term,
            form,
            dry_run,
            progress: Progress::new(term),
            planned: false,
            result: None,
            data: None,
        }
    }

    /// The word for what takes long, if not pulling.
    pub(crate) fn doing(mut self, word: &'static str) -> Reporter {
        self.progress.word = word;
        self
    }

    pub(crate) fn event(&mut self, event: &ControlEvent) -> Outcome {
        if let ControlEvent::Plan { actions, waiting } = event {
            self.planned = !(actions.is_empty() && waiting.is_empty());
        }
        if let ControlEvent::Data { value } = event {
            self.data = Some(value.clone());
        }
        if let ControlEvent::Result { exit_code, message, hints } = event {
            self.progress.clear();
            self.result = Some((*exit_code, message.clone(), hints.clone()));
        }
        match self.form {
            TextOrJson::Json => self.json(event),
            TextOrJson::Text => self.text(event),
        }
    }

    pub(crate) fn take_data(&mut self) -> Option<serde_json::Value> {
        self.data.take()
    }

    /// The operation's result as the command's.
    pub(crate) fn end(self) -> Outcome<bool> {
        match self.result {
            Some((exit::DONE, message, _)) => {
                if self.form == TextOrJson::Text && !message.is_empty() && !self.dry_run {
                    self.term.note(&format!("{message}\n"));
                }
                Ok(self.planned)
            }
            Some((code, message, hints)) => Err(Failure { code, message, hints }),
            None => Err(ControlError::new(ErrorCode::Unavailable, "the operation broke off before its end")
                .hint("look at the state with: keel status")
                .into()),
        }
    }

    fn json(&self, event: &ControlEvent) -> Outcome {
        let line = serde_json::to_string(event).map_err(|error| Failure::of(&error))?;
        Ok(self.term.print(&(line + "\n"))?)
    }

    fn text(&mut self, event: &ControlEvent) -> Outcome {
        match event {
            ControlEvent::Diagnostics { diagnostics } => {
                self.progress.aside(|| say_diagnostics(self.term, diagnostics));
            }
            ControlEvent::Note { message } => self.progress.aside(|| self.term.note(&format!("{message}\n"))),
            ControlEvent::Progress(pull) => self.progress.update(pull),
            _ => {
                if let ControlEvent::ActionFinished { object, .. } = event {
                    self.progress.finish(object.strip_prefix("image/").unwrap_or(object));
                }
                let quiet = self.term.quiet && !self.dry_run;
                if let Some(text) = report::render_simple(event, self.term.color_out).filter(|_| !quiet) {
                    self.progress.aside(|| self.term.print(&text))?;
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn say_diagnostics(term: Term, diagnostics: &[Diagnostic]) {
    let errors = diagnostics.iter().any(Diagnostic::is_error);
    if errors || !term.quiet {
        term.say(&report::render_diagnostics(diagnostics, term.color_err));
        let tally = report::tally(diagnostics);
        if !tally.is_empty() {
            term.say(&format!("{tally}\n"));
        }
    }
}
