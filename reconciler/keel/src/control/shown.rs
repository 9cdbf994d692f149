//! What an operation shows of the engine's work, and in which words.

use std::collections::BTreeSet;

use keel_api::{ActionFailure, ControlEvent, PlannedAction, WaitingObject};
use keel_engine::Report;
use keel_plan::{Action, Desired, Plan, PodKey, Reason};

/// Which part of the engine's work belongs to an operation, for the plan and for the reports alike.
pub(super) struct Shown {
    pub(super) targets: BTreeSet<PodKey>,
    /// What the targets are made of: a pull for another pod is not this operation's.
    images: BTreeSet<String>,
    /// Those of them that are to be there in the end.
    pub(super) stays: BTreeSet<PodKey>,
    /// Steps that follow from others are told only where there is nothing else, or where they fail.
    minor: bool,
}

impl Shown {
    pub(super) fn of(plan: &Plan, targets: BTreeSet<PodKey>, desired: &Desired) -> Shown {
        let is_there =
            |key: &&PodKey| desired.pods.contains_key(*key) || desired.unresolved.contains_key(*key);
        let stays = targets.iter().filter(is_there).cloned().collect();
        let pods = targets.iter().filter_map(|key| desired.pods.get(key));
        let images = pods.flat_map(|pod| pod.containers.iter().map(|c| c.image.clone())).collect();
        let mut shown = Shown { targets, images, stays, minor: false };
        let mut actions = plan.actions.iter().map(|planned| &planned.action);
        shown.minor = !actions.any(|action| shown.concerns(action) && !is_minor(action));
        shown
    }

    fn concerns(&self, action: &Action) -> bool {
        match action {
            Action::Pull { image, .. } => self.images.contains(image),
            Action::SyncNetwork { .. } => true,
            Action::CreatePod { pod }
            | Action::StartContainer { pod, .. }
            | Action::SyncVolumes { pod, .. }
            | Action::UpdateRecord { pod, .. } => self.targets.contains(&pod.key),
            Action::StopContainer { pod, .. }
            | Action::RemoveContainer { pod, .. }
            | Action::DeletePod { pod, .. } => self.targets.contains(pod),
        }
    }

    fn shows(&self, action: &Action) -> bool {
        self.concerns(action) && (self.minor || !is_minor(action))
    }

    pub(super) fn plan(&self, plan: &Plan) -> ControlEvent {
        let shown = plan.actions.iter().filter(|planned| self.shows(&planned.action));
        let waiting = plan.waiting.iter().filter(|(key, _)| self.targets.contains(*key));
        ControlEvent::Plan {
            actions: shown.map(|planned| planned_action(&planned.action, &planned.reason)).collect(),
            waiting: waiting.flat_map(|(key, waits)| waits.iter().map(|w| waiting_object(key, w))).collect(),
        }
    }

    pub(super) fn report(&self, report: Report) -> Option<ControlEvent> {
        match report {
            Report::Started { action, reason } if self.shows(&action) => {
                let planned = planned_action(&action, &reason);
                Some(ControlEvent::ActionStarted { verb: planned.verb, object: planned.object })
            }
            Report::Finished { action, took, result }
                if self.shows(&action) || (result.is_err() && self.concerns(&action)) =>
            {
                let (verb, object) = verb_and_object(&action);
                let error = result.err().map(|error| ActionFailure {
                    reason: error.reason.to_string(),
                    message: error.message.clone(),
                    // An image that cannot be had now may come by itself.
                    retry: error.next == keel_engine::ports::Next::Retry
                        || matches!(action, keel_plan::Action::Pull { .. }),
                    hint: error.hint.clone(),
                });
                let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
                Some(ControlEvent::ActionFinished { verb: verb.into(), object, duration_ms, error })
            }
            Report::Progress(progress) if self.images.contains(&progress.image) => {
                Some(ControlEvent::Progress(progress))
            }
            _ => None,
        }
    }
}

/// What is left of a container after its stop, and the network after any change of pods.
fn is_minor(action: &Action) -> bool {
    matches!(action, Action::RemoveContainer { .. } | Action::SyncNetwork { .. })
}

fn planned_action(action: &Action, reason: &Reason) -> PlannedAction {
    let (verb, object) = verb_and_object(action);
    PlannedAction { verb: verb.into(), object, detail: String::new(), reason: reason.to_string() }
}

/// The words of every view for an action.
fn verb_and_object(action: &Action) -> (&'static str, String) {
    let short = |key: &PodKey| {
        if key.namespace == "default" { key.name.clone() } else { key.to_string() }
    };
    match action {
        Action::Pull { image, .. } => ("pull", format!("image/{image}")),
        Action::CreatePod { pod } => ("create", format!("pod/{}", short(&pod.key))),
        Action::StartContainer { pod, container, .. } => {
            ("start", format!("container/{}.{container}", short(&pod.key)))
        }
        Action::StopContainer { pod, id, .. } => ("stop", container_of(pod, id)),
        Action::RemoveContainer { pod, id, .. } => ("remove", container_of(pod, id)),
        Action::SyncVolumes { pod, .. } => ("refresh", format!("volumes of pod/{}", short(&pod.key))),
        Action::UpdateRecord { pod, .. } => ("update", format!("pod/{}", short(&pod.key))),
        Action::DeletePod { pod, .. } => ("delete", format!("pod/{}", short(pod))),
        Action::SyncNetwork { endpoints, .. } => (
            "publish",
            format!("network of {} pod{}", endpoints.len(), if endpoints.len() == 1 { "" } else { "s" }),
        ),
    }
}

/// `<pod>.<container>`: the number of the run is not what a person calls it by.
fn container_of(pod: &PodKey, id: &keel_plan::ContainerId) -> String {
    let mut parts = id.0.rsplit('.');
    let name = parts.nth(1).unwrap_or(&id.0);
    match pod.namespace.as_str() {
        "default" => format!("container/{}.{name}", pod.name),
        _ => format!("container/{pod}.{name}"),
    }
}

pub(super) fn waiting_object(key: &PodKey, wait: &keel_plan::Waiting) -> WaitingObject {
    WaitingObject { object: format!("pod/{key}"), reason: wait.reason().into(), message: wait.message() }
}
