//! Plans and the course of an operation. The only renderer of both: `plan`, `apply` with and without a daemon, and
//! `delete` print through it.

use keel_api::{ActionFailure, ControlEvent, PlannedAction, WaitingObject};
use keel_manifest::{Diagnostic, Severity};

use crate::render::table::Table;
use crate::term::Paint;
use crate::text::{count, took};

/// A plan, one line per action with its reason, then what has to wait.
pub(crate) fn render_plan(actions: &[PlannedAction], waiting: &[WaitingObject], color: bool) -> String {
    let paint = Paint(color);
    if actions.is_empty() && waiting.is_empty() {
        return "plan: nothing to do\n".to_owned();
    }
    let mut table = Table::default();
    for action in actions {
        let line = format!("{} {}", sign(&action.verb), action.verb);
        table.row(vec![tone(paint, &action.verb, &line), action.object.clone(), why(action)]);
    }
    for waits in waiting {
        let line = paint.cyan(". wait");
        table.row(vec![line, waits.object.clone(), reason(&waits.reason, &waits.message)]);
    }
    format!("{}\n{}", summary(actions, waiting), table.render(2))
}

fn summary(actions: &[PlannedAction], waiting: &[WaitingObject]) -> String {
    let mut text = format!("plan: {}", count(actions.len(), "action"));
    if !waiting.is_empty() {
        text.push_str(&format!(", {} waiting", waiting.len()));
    }
    text
}

fn why(action: &PlannedAction) -> String {
    match action.detail.as_str() {
        "" => action.reason.clone(),
        detail => format!("{}: {detail}", action.reason),
    }
}

fn reason(word: &str, message: &str) -> String {
    if message.is_empty() { word.to_owned() } else { format!("{word}: {message}") }
}

fn sign(verb: &str) -> char {
    match verb {
        "create" | "start" => '+',
        "delete" | "remove" | "stop" => '-',
        "pull" => '<',
        _ => '~',
    }
}

fn tone(paint: Paint, verb: &str, text: &str) -> String {
    match sign(verb) {
        '+' => paint.green(text),
        '-' => paint.red(text),
        '<' => paint.cyan(text),
        _ => paint.yellow(text),
    }
}

pub(crate) fn render_finished(
    verb: &str,
    object: &str,
    duration_ms: u64,
    error: Option<&ActionFailure>,
    color: bool,
) -> String {
    let paint = Paint(color);
    match error {
        None => format!("{} {verb} {object} {}\n", paint.green("ok"), paint.faint(&took(duration_ms))),
        Some(error) => {
            let next =
                if error.retry { "tried again later" } else { "not tried again until something changes" };
            let what = reason(&error.reason, &error.message);
            format!("{} {verb} {object}: {what} ({next})\n", paint.red("failed"))
        }
    }
}

/// Everything that is one line and needs no memory; `None` for the rest.
pub(crate) fn render_simple(event: &ControlEvent, color: bool) -> Option<String> {
    let paint = Paint(color);
    Some(match event {
        ControlEvent::Plan { actions, waiting } => render_plan(actions, waiting, color),
        ControlEvent::ActionFinished { verb, object, duration_ms, error } => {
            render_finished(verb, object, *duration_ms, error.as_ref(), color)
        }
        ControlEvent::PodWaiting { pod, waiting } => {
            format!("{} {pod} {}\n", paint.cyan("waiting"), reason(&waiting.reason, &waiting.message))
        }
        ControlEvent::PodReady { pod, after_ms } => {
            format!("{} {pod} {}\n", paint.green("ready"), paint.faint(&took(*after_ms)))
        }
        _ => return None,
    })
}

/// All messages, then how many.
pub(crate) fn render_diagnostics(diagnostics: &[Diagnostic], color: bool) -> String {
    let mut text = String::new();
    for diagnostic in diagnostics {
        text.push_str(&diagnostic.render(color));
        text.push('\n');
    }
    text
}

/// `2 errors, 1 warning`; empty when there are none.
pub(crate) fn tally(diagnostics: &[Diagnostic]) -> String {
    let of = |severity| diagnostics.iter().filter(|d| d.severity == severity).count();
    match (of(Severity::Error), of(Severity::Warning)) {
        (0, 0) => String::new(),
        (errors, 0) => count(errors, "error"),
        (0, warnings) => count(warnings, "warning"),
        (errors, warnings) => format!("{}, {}", count(errors, "error"), count(warnings, "warning")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(verb: &str, object: &str, detail: &str, reason: &str) -> PlannedAction {
        PlannedAction {
            verb: verb.into(),
            object: object.into(),
            detail: detail.into(),
            reason: reason.into(),
        }
    }

    #[test]
    fn a_plan_says_what_and_why() {
        let actions = [
            action("pull", "image/docker.io/library/nginx:1.27", "", "not in the store"),
            action("restart", "container/default/web.app", "image: a -> b", "spec changed"),
            action("delete", "pod/default/old", "", "no longer declared"),
        ];
        let waiting = [WaitingObject {
            object: "pod/default/db".into(),
            reason: "MissingReference".into(),
            message: "ConfigMap db-conf does not exist".into(),
        }];
        assert_eq!(
            render_plan(&actions, &waiting, false),
            "plan: 3 actions, 1 waiting\n  \
             < pull      image/docker.io/library/nginx:1.27   not in the store\n  \
             ~ restart   container/default/web.app            spec changed: image: a -> b\n  \
             - delete    pod/default/old                      no longer declared\n  \
             . wait      pod/default/db                       MissingReference: ConfigMap db-conf does not exist\n"
        );
        assert_eq!(render_plan(&[], &[], true), "plan: nothing to do\n");
    }

    #[test]
    fn a_failed_action_says_what_comes_next() {
        let error = ActionFailure {
            reason: "ErrImagePull".into(),
            message: "no such image".into(),
            retry: true,
            hint: None,
        };
        assert_eq!(
            render_finished("pull", "image/x", 10, Some(&error), false),
            "failed pull image/x: ErrImagePull: no such image (tried again later)\n"
        );
        assert_eq!(render_finished("pull", "image/x", 1230, None, false), "ok pull image/x 1.23s\n");
    }
}
