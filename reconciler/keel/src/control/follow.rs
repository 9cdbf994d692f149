//! An operation from its first step to its exit code.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use keel_api::{ControlError, ControlEvent, EventSender, WaitingObject, exit};
use keel_engine::{Convergence, Handle, Report, Standing};
use keel_plan::{PodKey, Status};
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::shown::{Shown, waiting_object};
use super::{end, ended, say};

/// How long an operation is followed.
pub(super) struct Wait {
    /// Until ready; otherwise until everything was begun.
    pub(super) ready: bool,
    pub(super) timeout: Option<Duration>,
}

/// Reports until the pods are where they should be, cannot get there, or time is over.
pub(super) async fn follow(
    engine: &Handle,
    shown: Shown,
    wait: Wait,
    mut reports: broadcast::Receiver<Report>,
    events: &EventSender,
) -> Result<(), ControlError> {
    let targets = &shown.targets;
    let started = Instant::now();
    let deadline = wait.timeout.map(|timeout| started + timeout);
    let mut steps = engine.steps();
    let mut told = Told::default();
    // What failed actions had to say, each once.
    let mut hints: BTreeSet<String> = BTreeSet::new();
    loop {
        while let Ok(report) = reports.try_recv() {
            if let Some(event) = shown.report(report) {
                hints.extend(hint_of(&event));
                say(events, event).await;
            }
        }
        steps.borrow_and_update();
        let standing = engine.standing(Some(targets.clone())).await.map_err(ended)?;
        let status = match &standing.convergence {
            Convergence::Waiting(_) if !standing.idle => engine.status().borrow().clone(),
            _ => engine.fresh_status().await.map_err(ended)?,
        };
        told.tell(&status, &shown, &standing.convergence, started, events).await;
        if let Some(outcome) = judge(&standing, &status, targets, wait.ready) {
            return outcome.end(targets, &hints, events).await;
        }
        tokio::select! {
            // Cancel-safe: a step that is missed here is seen by the next `standing`.
            changed = steps.changed() => changed.map_err(|_| ended(keel_engine::Ended))?,
            () = until(deadline) => {
                let message = not_ready(&standing);
                let hints = with_last(&hints, "see what they wait for with: keel describe, keel logs");
                return end(events, exit::NOT_READY, &message, &hints).await;
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Where an operation ended.
enum Outcome {
    Done,
    Failed(Vec<(PodKey, String)>),
}

impl Outcome {
    async fn end(
        self,
        targets: &BTreeSet<PodKey>,
        hints: &BTreeSet<String>,
        events: &EventSender,
    ) -> Result<(), ControlError> {
        let failed = match self {
            Outcome::Done => {
                let message = match targets.len() {
                    0 => "nothing to do".to_string(),
                    1 => "1 pod is as declared".to_string(),
                    n => format!("{n} pods are as declared"),
                };
                return end(events, exit::DONE, &message, &[]).await;
            }
            Outcome::Failed(failed) => failed,
        };
        let lines: Vec<String> = failed.iter().map(|(pod, message)| about(pod, message)).collect();
        let code = if failed.len() == targets.len() { exit::FAILED } else { exit::PARTIAL };
        let hints = with_last(hints, "see more with: keel describe, keel logs, keel events");
        end(events, code, &lines.join("\n"), &hints).await
    }
}

fn with_last<'a>(hints: &'a BTreeSet<String>, last: &'a str) -> Vec<&'a str> {
    hints.iter().map(String::as_str).chain([last]).collect()
}

fn hint_of(event: &ControlEvent) -> Option<String> {
    match event {
        ControlEvent::ActionFinished { error: Some(failure), .. } => failure.hint.clone(),
        _ => None,
    }
}

/// `None`: go on. Without `--wait` an operation is over when nothing is under way any more.
fn judge(standing: &Standing, status: &Status, targets: &BTreeSet<PodKey>, ready: bool) -> Option<Outcome> {
    match &standing.convergence {
        Convergence::Done => Some(Outcome::Done),
        Convergence::Failed(failed) => Some(Outcome::Failed(failed.clone())),
        Convergence::Waiting(_) if ready || !standing.idle => None,
        Convergence::Waiting(_) => {
            // Begun and merely not ready yet is what was asked for; waiting for a retry is not.
            let stuck = |pod: &&Arc<keel_plan::PodStatus>| {
                targets.contains(&pod.key) && pod.waiting.iter().any(|w| !w.is_progress())
            };
            let failed: Vec<(PodKey, String)> = status
                .pods
                .iter()
                .filter(stuck)
                .map(|pod| {
                    let message = pod.waiting.iter().find(|w| !w.is_progress()).map(|w| w.message());
                    (pod.key.clone(), message.unwrap_or_default())
                })
                .collect();
            Some(if failed.is_empty() { Outcome::Done } else { Outcome::Failed(failed) })
        }
    }
}

fn not_ready(standing: &Standing) -> String {
    let waiting = match &standing.convergence {
        Convergence::Waiting(list) | Convergence::Failed(list) => list.as_slice(),
        Convergence::Done => &[],
    };
    let lines: Vec<String> = waiting.iter().map(|(pod, message)| about(pod, message)).collect();
    format!("not ready in time\n{}", lines.join("\n"))
}

/// Errors of the host name their pod themselves.
fn about(pod: &PodKey, message: &str) -> String {
    let prefix = format!("pod {pod}: ");
    if message.starts_with(&prefix) { message.to_owned() } else { prefix + message }
}

/// What has been said about each pod, so that nothing is said twice.
#[derive(Default)]
struct Told {
    ready: BTreeSet<PodKey>,
    waiting: BTreeMap<PodKey, WaitingObject>,
}

impl Told {
    async fn tell(
        &mut self,
        status: &Status,
        shown: &Shown,
        convergence: &Convergence,
        started: Instant,
        events: &EventSender,
    ) {
        let unsettled = match convergence {
            Convergence::Done => &[],
            Convergence::Waiting(pods) | Convergence::Failed(pods) => pods.as_slice(),
        };
        for pod in status.pods.iter().filter(|pod| shown.stays.contains(&pod.key)) {
            // The status may be older than the change; the engine's own word is not.
            let settled = !unsettled.iter().any(|(key, _)| *key == pod.key);
            if settled && pod.is_ready() {
                if self.ready.insert(pod.key.clone()) {
                    let after_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                    say(events, ControlEvent::PodReady { pod: pod.key.to_string(), after_ms }).await;
                }
                continue;
            }
            if settled {
                continue;
            }
            let Some(wait) = pod.waiting.iter().find(|w| !w.is_progress()) else { continue };
            let waiting = waiting_object(&pod.key, wait);
            if self.waiting.get(&pod.key) != Some(&waiting) {
                self.waiting.insert(pod.key.clone(), waiting.clone());
                say(events, ControlEvent::PodWaiting { pod: pod.key.to_string(), waiting }).await;
            }
        }
    }
}
