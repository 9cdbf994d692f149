//! The reconcile core: inputs in, outputs out, no I/O and no clock of its own.
//!
//! ```text
//! DesiredChanged ─┐                                       ┌─> Perform (bounded, locked per pod and run)
//! Observed ───────┼─> account exits ─> plan ─> retries,   ├─> Observe (one at a time, after every action)
//! ActionFinished ─┤                            locks ─────┼─> Probe
//! ProbeFinished ──┤                                       ├─> SaveMemory, Event, Status
//! Wake, Hint ─────┘                                       └─> WakeAt
//! ```
//! An observation covers an action only if it was asked for after the action had finished; until then nothing new is
//! done to that pod. So an old view can make the core wait, but not act.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use keel_plan::{
    Action, ContainerId, ContainerName, Desired, DesiredPod, Facts, Memory, Millis, Observed, Plan, Planned,
    PodId, PodKey, PodMemory, Reason, Status, Waiting,
};

use crate::events::{Event, Events};
use crate::flights::{Flight, Flights, Work, pod_of};
use crate::ports::{ActionError, Done, Next, PortError, ProbeKind, ProbeOutcome, ProbeRequest, Progress};
use crate::probes::{Effect, Finished, Prober};
use crate::rate::PullRate;
use crate::retries::Retries;
use crate::settings::Settings;

/// Both clocks at one moment. `mono` never goes back and counts from anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    pub wall: Millis,
    pub mono: u64,
}

/// Names one `Perform` or `Probe` of this core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

#[derive(Clone, Debug)]
pub enum Input {
    DesiredChanged(Desired),
    /// The answer to `Output::Observe`.
    Observed(Result<Observed, PortError>),
    ActionFinished {
        ticket: Ticket,
        result: Result<Done, ActionError>,
    },
    Progress {
        ticket: Ticket,
        progress: Progress,
    },
    ProbeFinished {
        ticket: Ticket,
        outcome: ProbeOutcome,
    },
    /// Something on the host may have changed (an exit record, a pidfd). Never believed, only looked into.
    Hint,
    /// Stop the live runs of a pod (or one container of it) and let the restart policy go on.
    Restart {
        pod: PodKey,
        container: Option<ContainerName>,
        by: String,
    },
    /// Overrides the grace period of everything that is stopped in this pod, until the pod is gone.
    Grace {
        pod: PodKey,
        grace_ms: u64,
    },
    /// The moment asked for by `WakeAt`, or any other.
    Wake,
}

/// In the order given: a `SaveMemory` comes before the `Perform` that relies on it.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    Perform {
        ticket: Ticket,
        action: Action,
        reason: Reason,
    },
    /// What was asked for by this ticket is not wanted any more. It may end early, and is answered in any case.
    Cancel {
        ticket: Ticket,
    },
    /// Read the host once and answer with `Observed`. Not repeated before the answer.
    Observe,
    Probe {
        ticket: Ticket,
        request: ProbeRequest,
    },
    SaveMemory {
        pod: PodId,
        memory: Option<PodMemory>,
    },
    Event(Event),
    /// Only when it differs from the last one.
    Status(Arc<Status>),
    /// Monotonic. Replaces any earlier one.
    WakeAt(u64),
}

/// Where a set of pods is on its way.
#[derive(Clone, Debug, PartialEq)]
pub enum Convergence {
    /// Every pod is ready or has succeeded, every undeclared one is gone.
    Done,
    /// On the way: what each pod waits for.
    Waiting(Vec<(PodKey, String)>),
    /// Some cannot get there without a change; the others are done.
    Failed(Vec<(PodKey, String)>),
}

/// A step of the wall clock against the monotonic one that counts as set, not drifted.
const CLOCK_STEP_MS: i64 = 2_000;
/// A burst of changes makes one status; with many pods, one millisecond for every ten of them lies between two.
const STATUS_GAP_MS: u64 = 25;
const PODS_PER_STATUS_MS: u64 = 10;
const OBSERVE_RETRY_MS: u64 = 1_000;
const OBSERVE_RETRY_MAX_MS: u64 = 30_000;
const OBSERVE_DEADLINE_MS: u64 = 60_000;

pub struct Core {
    settings: Settings,
    memory: Memory,
    desired: Option<Desired>,
    observed: Option<Observed>,
    plan: Plan,
    queue: VecDeque<Planned>,
    flights: Flights,
    retries: Retries,
    prober: Prober,
    /// Runs to stop although nothing is wrong with their spec.
    kills: BTreeMap<ContainerId, Kill>,
    kills_changed: bool,
    cancels: Vec<Ticket>,
    graces: BTreeMap<PodKey, u64>,
    pulls: BTreeMap<String, PullRate>,
    events: Events,
    observing: Observing,
    /// Counts finished actions; an observation covers those before the number it was asked at.
    epoch: u64,
    /// What finished actions have touched, and when.
    touched: BTreeMap<Touched, Touch>,
    next_ticket: u64,
    clock: Option<Now>,
    replan: bool,
    status: Arc<Status>,
    status_stale: bool,
    status_at_ms: u64,
    saves: BTreeSet<PodId>,
    /// A crash back-off or retry that ends then makes a new plan necessary.
    plan_deadline_ms: Option<u64>,
}

struct Kill {
    pod: PodKey,
    grace_ms: u64,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Touched {
    Pod(PodKey),
    Image(String),
    Network,
}

struct Touch {
    epoch: u64,
    /// Set when it brought up something of this version.
    started: Option<Arc<DesiredPod>>,
}

#[derive(Default)]
struct Observing {
    /// Epoch at which the outstanding observation was asked for.
    asked: Option<u64>,
    asked_at_ms: u64,
    late: bool,
    wanted: bool,
    next_ms: u64,
    failures: u32,
    error: Option<String>,
}

impl Core {
    /// `memory` is what the host kept of earlier lives.
    pub fn new(settings: Settings, memory: Memory) -> Core {
        Core {
            settings,
            memory,
            desired: None,
            observed: None,
            plan: Plan::default(),
            queue: VecDeque::new(),
            flights: Flights::default(),
            retries: Retries::default(),
            prober: Prober::default(),
            kills: BTreeMap::new(),
            kills_changed: false,
            cancels: Vec::new(),
            graces: BTreeMap::new(),
            pulls: BTreeMap::new(),
            events: Events::default(),
            observing: Observing { wanted: true, ..Observing::default() },
            epoch: 0,
            touched: BTreeMap::new(),
            next_ticket: 0,
            clock: None,
            replan: false,
            status: Arc::default(),
            status_stale: true,
            status_at_ms: 0,
            saves: BTreeSet::new(),
            plan_deadline_ms: None,
        }
    }

    pub fn step(&mut self, input: Input, now: Now) -> Vec<Output> {
        self.notice_clock(now);
        self.take(input, now);
        if self.plan_deadline_ms.is_some_and(|at| at <= now.mono) {
            self.replan = true;
        }
        if self.replan {
            self.make_plan(now);
        }
        self.notice_overdue(now);
        let mut outputs: Vec<Output> =
            std::mem::take(&mut self.cancels).into_iter().map(|ticket| Output::Cancel { ticket }).collect();
        self.dispatch(now, &mut outputs);
        self.probe(now, &mut outputs);
        self.observe(now, &mut outputs);
        self.report(now, &mut outputs);
        outputs.extend(self.events.take().into_iter().map(Output::Event));
        outputs.extend(self.next_wake(now).map(Output::WakeAt));
        outputs
    }

    pub fn status(&self) -> Arc<Status> {
        self.status.clone()
    }

    /// The status as of now, however short the last one is ago: for the last word of an operation.
    pub fn fresh_status(&mut self, now: Now) -> Arc<Status> {
        self.status_at_ms = 0;
        self.report(now, &mut Vec::new());
        self.status.clone()
    }

    /// How far the pull of an image is.
    pub fn pull(&self, image: &str) -> Option<&keel_plan::PullStatus> {
        self.pulls.get(image).map(PullRate::status)
    }

    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    pub fn desired(&self) -> Option<&Desired> {
        self.desired.as_ref()
    }

    pub fn observed(&self) -> Option<&Observed> {
        self.observed.as_ref()
    }

    /// Actions under way, with their reasons.
    pub fn in_flight(&self) -> impl Iterator<Item = (&Action, &Reason)> {
        self.flights.actions()
    }

    /// True when nothing is under way, queued or unseen: all that is left are waits. An apply without `--wait` is over.
    pub fn is_idle(&self) -> bool {
        self.observed.is_some()
            && self.desired.is_some()
            && !self.replan
            && self.flights.is_empty()
            && self.queue.is_empty()
            && self.touched.is_empty()
            && self.kills.is_empty()
    }

    /// What would be done for this desired state, to the end, if everything succeeded.
    pub fn plan_preview(&self, desired: &Desired, observed: &Observed, now: Now) -> Plan {
        keel_plan::preview(desired, observed, &self.memory, &self.settings.plan, now.wall)
    }

    /// How far these pods are (`None`: all, declared or not). Asks nothing of the host: as of the last observation.
    pub fn converged(&self, pods: Option<&BTreeSet<PodKey>>) -> Convergence {
        let (Some(desired), Some(observed)) = (&self.desired, &self.observed) else {
            return Convergence::Waiting(Vec::new());
        };
        let facts = self.facts();
        let all: BTreeSet<PodKey>;
        let pods = match pods {
            Some(pods) => pods,
            None => {
                let held = desired.unresolved.keys().chain(&desired.frozen);
                let keys = desired.pods.keys().chain(observed.pods.keys()).chain(held);
                all = keys.cloned().collect();
                &all
            }
        };
        let (mut waiting, mut failed) = (Vec::new(), Vec::new());
        for key in pods {
            match self.pod_progress(key, desired, observed, &facts) {
                PodProgress::Done => {}
                PodProgress::Waiting(message) => waiting.push((key.clone(), message)),
                PodProgress::Failed(message) => failed.push((key.clone(), message)),
            }
        }
        let network = self.flights.has_network()
            || self.touched.contains_key(&Touched::Network)
            || self.plan.actions.iter().any(|p| matches!(p.action, Action::SyncNetwork { .. }));
        match (waiting.is_empty() && !network && !self.replan, failed.is_empty()) {
            (true, true) => Convergence::Done,
            (true, false) => Convergence::Failed(failed),
            (false, _) => {
                waiting.extend(failed);
                Convergence::Waiting(waiting)
            }
        }
    }

    fn pod_progress(
        &self,
        key: &PodKey,
        desired: &Desired,
        observed: &Observed,
        facts: &Facts,
    ) -> PodProgress {
        let waits = facts.waiting.get(key).map(Vec::as_slice).unwrap_or_default();
        if let Some(message) = self.hopeless(key, desired, waits) {
            return PodProgress::Failed(message);
        }
        let held = desired.unresolved.contains_key(key) || desired.frozen.contains(key);
        if !desired.pods.contains_key(key) && !held {
            return match observed.pods.contains_key(key) {
                true => PodProgress::Waiting("stopping".into()),
                false => PodProgress::Done,
            };
        }
        let status = keel_plan::pod_status(key, desired, observed, &self.memory, facts);
        // A failed pod waits for an init container that will never finish.
        let failed = status.phase == keel_plan::Phase::Failed;
        if let Some(wait) = waits.iter().find(|w| !w.is_progress()).or(waits.first()).filter(|_| !failed) {
            return PodProgress::Waiting(wait.message());
        }
        match status.phase {
            _ if facts.busy.contains(key) => PodProgress::Waiting("being worked on".into()),
            keel_plan::Phase::Succeeded => PodProgress::Done,
            keel_plan::Phase::Failed => PodProgress::Failed("a container ended with an error".into()),
            _ => match status.unsettled() {
                None => PodProgress::Done,
                Some((container, Some(code))) => {
                    PodProgress::Failed(format!("container {container} ended with code {code}"))
                }
                Some((container, None)) => {
                    PodProgress::Waiting(format!("container {container} is not ready"))
                }
            },
        }
    }

    /// Why this pod cannot get there by waiting.
    fn hopeless(&self, key: &PodKey, desired: &Desired, waits: &[Waiting]) -> Option<String> {
        let blocked = |work: &Work| {
            self.retries.error(work).filter(|error| error.next == Next::Blocked).map(|e| e.message.clone())
        };
        let by_wait = waits.iter().find_map(|wait| match wait {
            Waiting::ErrImageNeverPull { .. } | Waiting::MissingReference { .. } | Waiting::Frozen => {
                Some(wait.message())
            }
            Waiting::ImagePullBackOff { image, .. } => blocked(&Work::Pull(image.clone())),
            _ => None,
        });
        let waits_for_retry = waits.iter().any(|wait| matches!(wait, Waiting::Retry { .. }));
        by_wait.or_else(|| {
            let pod = desired.pods.get(key).filter(|_| waits_for_retry)?;
            let starts = pod.containers.iter().map(|c| Work::Start(key.clone(), c.name.clone()));
            starts.chain([Work::Create(key.clone())]).find_map(|work| blocked(&work))
        })
    }

    fn take(&mut self, input: Input, now: Now) {
        match input {
            Input::DesiredChanged(desired) => self.take_desired(desired),
            Input::Observed(result) => self.take_observed(result, now),
            Input::ActionFinished { ticket, result } => self.take_finished(ticket, result, now),
            Input::Progress { ticket, progress } => {
                self.flights.progress(ticket, now.mono);
                let image = progress.image.clone();
                let rate = self.pulls.entry(image.clone()).or_insert_with(|| PullRate::new(now.mono));
                rate.take(progress, now.mono);
                if rate.is_news() {
                    let message = pull_message(rate.status());
                    self.events.normal(format!("Image/{image}"), "Pulling", message);
                }
                self.status_stale = true;
            }
            Input::ProbeFinished { ticket, outcome } => {
                if let Some(finished) = self.prober.finished(ticket, outcome, now.mono) {
                    self.take_probe(finished);
                }
            }
            Input::Hint => self.observing.wanted = true,
            Input::Restart { pod, container, by } => self.take_restart(&pod, container.as_ref(), &by),
            Input::Grace { pod, grace_ms } => drop(self.graces.insert(pod, grace_ms)),
            Input::Wake => {}
        }
    }

    fn take_desired(&mut self, desired: Desired) {
        for (key, pod) in &desired.pods {
            let before = self.desired.as_ref().and_then(|before| before.pods.get(key));
            let same = before.is_some_and(|before| Arc::ptr_eq(before, pod) || **before == **pod);
            if !same {
                let images = pod.containers.iter().map(|c| c.image.as_str()).collect();
                self.retries.forget_pod(key, &images);
            }
        }
        let uses = |image: &str| desired.pods.values().any(|p| p.containers.iter().any(|c| c.image == image));
        let held = |pod: &PodKey| desired.unresolved.contains_key(pod) || desired.frozen.contains(pod);
        // An incomplete view is no reason to stop anything.
        let cancelled = self.flights.cancel_pulls(|image, pod| !desired.complete || uses(image) || held(pod));
        self.cancels.extend(cancelled);
        self.desired = Some(desired);
        self.replan = true;
        self.status_stale = true;
    }

    fn take_observed(&mut self, result: Result<Observed, PortError>, now: Now) {
        let covered = self.observing.asked.take().unwrap_or(0);
        self.observing.late = false;
        self.status_stale = true;
        match result {
            Ok(observed) => {
                self.observing.failures = 0;
                self.observing.error = None;
                self.observing.next_ms = now.mono.saturating_add(self.settings.observe_every_ms);
                self.touched.retain(|_, touch| touch.epoch > covered);
                self.graces.retain(|pod, _| observed.pods.contains_key(pod));
                self.observed = Some(observed);
                self.replan = true;
            }
            Err(error) => {
                let failures = self.observing.failures.min(10);
                let wait = OBSERVE_RETRY_MS.saturating_mul(1 << failures).min(OBSERVE_RETRY_MAX_MS);
                self.observing.failures = failures + 1;
                self.observing.next_ms = now.mono.saturating_add(wait);
                // Not at once again, even if something else asked for it meanwhile.
                self.observing.wanted = false;
                self.events.warning("Host", "Unreadable", error.0.clone());
                self.observing.error = Some(error.0);
            }
        }
    }

    fn take_finished(&mut self, ticket: Ticket, result: Result<Done, ActionError>, now: Now) {
        // A reply for a ticket that is not ours (or twice) is nothing to act on.
        let Some(flight) = self.flights.end(ticket) else { return };
        let work = Work::of(&flight.action);
        self.epoch += 1;
        let touch = Touch { epoch: self.epoch, started: brings_up(&flight.action).cloned() };
        self.touched.insert(touched(&flight.action), touch);
        self.observing.wanted = true;
        self.status_stale = true;
        if let Action::Pull { image, .. } = &flight.action {
            self.pulls.remove(image);
        }
        let failed = match result {
            // Whoever wants the image again gets it from the start.
            _ if flight.cancelled => {
                self.replan = true;
                None
            }
            Ok(Done::Done) => {
                self.note_success(&flight, now);
                self.retries.succeeded(&work, now.mono)
            }
            Ok(Done::Stale) => self.retries.fruitless(&work, now.mono),
            Err(error) if self.use_local_image(&flight.action, &error) => None,
            Err(error) => Some(error),
        };
        if let Some(error) = failed {
            let reason = error.reason;
            self.events.warning(object(&flight.action), reason, with_hint(&error));
            if !self.is_outdated(&flight.action) {
                self.retries.failed(work, error, &self.settings, now.mono);
            }
            self.replan = true;
        }
    }

    /// What was tried is not what is declared now: its failure says nothing about the next try.
    fn is_outdated(&self, action: &Action) -> bool {
        if let Action::Pull { image, secrets, .. } = action {
            let now = self.desired.as_ref().map(|desired| keel_plan::pull_secrets(desired, image));
            return now.is_some_and(|now| now != *secrets);
        }
        let Some(tried) = brings_up(action) else { return false };
        let declared = self.desired.as_ref().and_then(|desired| desired.pods.get(&tried.key));
        declared.is_some_and(|declared| !Arc::ptr_eq(declared, tried) && **declared != **tried)
    }

    fn note_success(&mut self, flight: &Flight, now: Now) {
        let object = object(&flight.action);
        let took_ms = now.mono.saturating_sub(flight.started_ms);
        match &flight.action {
            Action::Pull { image, policy, .. } => {
                if *policy == keel_manifest::model::PullPolicy::Always {
                    self.mark_refreshed(image);
                }
                self.events.normal(object, "Pulled", format!("image {image} is present ({took_ms} ms)"));
            }
            Action::CreatePod { .. } => self.events.normal(object, "Created", "pod created"),
            Action::StartContainer { container, .. } => {
                self.events.normal(object, "Started", format!("container {container} started"));
            }
            Action::StopContainer { id, .. } => {
                self.events.normal(object, "Stopped", format!("container {id} stopped"));
            }
            Action::SyncVolumes { .. } => {
                self.events.normal(
                    object,
                    "VolumesUpdated",
                    "configMap and secret volumes have new contents",
                );
            }
            Action::DeletePod { .. } => self.events.normal(object, "Deleted", "pod deleted"),
            Action::RemoveContainer { .. } | Action::UpdateRecord { .. } | Action::SyncNetwork { .. } => {}
        }
    }

    /// A registry that cannot be reached does not keep down what can run: a moving tag that is present is used as it is.
    fn use_local_image(&mut self, action: &Action, error: &ActionError) -> bool {
        let Action::Pull { image, .. } = action else { return false };
        let present = self.observed.as_ref().is_some_and(|observed| observed.images.contains_key(image));
        if present {
            let message = format!("{}; the copy in the store is used", with_hint(error));
            self.events.warning(object(action), "RefreshFailed", message);
            self.mark_refreshed(image);
        }
        present
    }

    fn mark_refreshed(&mut self, image: &str) {
        if let Some(desired) = &self.desired {
            let changed = keel_plan::mark_refreshed(&mut self.memory, desired, &self.plan.waiting, image);
            self.saves.extend(changed);
        }
    }

    fn take_probe(&mut self, finished: Finished) {
        let Finished { container, kind, pod, failure, effect, grace_ms } = finished;
        let object = format!("Pod/{}", pod.key);
        if let Some(message) = &failure {
            let message = format!("{} probe of {container} failed: {message}", probe_name(kind));
            self.events.warning(object, "Unhealthy", message);
        }
        match effect {
            Effect::None => {}
            Effect::Changed => self.status_stale = true,
            Effect::Kill => {
                self.status_stale = true;
                let message = failure.unwrap_or_default();
                let reason = Reason::ProbeFailed { probe: probe_name(kind).into(), message };
                self.kills.insert(container, Kill { pod: pod.key.clone(), grace_ms, reason });
                self.kills_changed = true;
            }
        }
    }

    fn take_restart(&mut self, pod: &PodKey, container: Option<&ContainerName>, by: &str) {
        let Some(seen) = self.observed.as_ref().and_then(|observed| observed.pods.get(pod)) else { return };
        let grace_ms = seen.pod.grace_ms();
        for run in seen.containers.iter().filter(|run| run.is_running()) {
            if container.is_none_or(|name| *name == run.name) {
                let reason = Reason::Requested { by: by.to_owned() };
                self.kills.insert(run.id.clone(), Kill { pod: pod.clone(), grace_ms, reason });
                self.kills_changed = true;
            }
        }
    }

    fn make_plan(&mut self, now: Now) {
        let (Some(desired), Some(observed)) = (&self.desired, &self.observed) else {
            self.replan = false;
            return;
        };
        self.replan = false;
        let before = self.exits_counted();
        let changed = keel_plan::account(&mut self.memory, desired, observed, &self.settings.plan, now.wall);
        self.prober.sync(desired, observed, now);
        self.plan = keel_plan::plan(desired, observed, &self.memory, &self.settings.plan, now.wall);
        self.kills.retain(|id, kill| is_live(observed, &kill.pod, id));
        self.tell_exits(&changed, &before);
        self.saves.extend(changed);
        let planned: BTreeSet<Work> = self.plan.actions.iter().map(|p| Work::of(&p.action)).collect();
        let touched = &self.touched;
        self.retries.keep_planned(&planned, |work| !is_touched(touched, work), now.mono);
        self.fill_queue(now);
        self.plan_deadline_ms = self.plan_deadline(now);
        self.status_stale = true;
    }

    /// What may go out now: not under way, not touched since the observation, not waiting for a retry.
    fn fill_queue(&mut self, now: Now) {
        let kills = self.kills.iter().map(|(id, kill)| Planned {
            action: Action::StopContainer { pod: kill.pod.clone(), id: id.clone(), grace_ms: kill.grace_ms },
            reason: kill.reason.clone(),
        });
        let planned: Vec<Planned> = kills.chain(self.plan.actions.iter().cloned()).collect();
        self.queue.clear();
        for mut planned in planned {
            let work = Work::of(&planned.action);
            let waits = self.retries.waiting(&work, now.mono).is_some();
            if !waits && self.may_go(&planned.action, &work) {
                self.override_grace(&mut planned.action);
                self.queue.push_back(planned);
            }
        }
    }

    /// The last observation is true for what this action touches, and nothing under way excludes it.
    fn may_go(&self, action: &Action, work: &Work) -> bool {
        !is_touched(&self.touched, work) && self.flights.is_free(action) && !self.other_version_moves(action)
    }

    /// Another version of the same Deployment is coming up, or has since the observation: only the next one shows it.
    fn other_version_moves(&self, action: &Action) -> bool {
        let Some(pod) = brings_up(action).filter(|pod| pod.owner.kind == "Deployment") else { return false };
        let flying = self.flights.actions().filter_map(|(action, _)| brings_up(action));
        let unseen = self.touched.values().filter_map(|touch| touch.started.as_ref());
        flying.chain(unseen).any(|other| {
            other.key.namespace == pod.key.namespace && other.owner == pod.owner && !same_version(other, pod)
        })
    }

    fn override_grace(&self, action: &mut Action) {
        if let Action::StopContainer { pod, grace_ms, .. } = action
            && let Some(wanted) = self.graces.get(pod)
        {
            *grace_ms = *wanted;
        }
    }

    fn dispatch(&mut self, now: Now, outputs: &mut Vec<Output>) {
        let mut later = VecDeque::new();
        let mut performs = Vec::new();
        if std::mem::take(&mut self.kills_changed) {
            self.fill_queue(now);
        }
        while let Some(planned) = self.queue.pop_front() {
            if is_touched(&self.touched, &Work::of(&planned.action)) || !self.flights.is_free(&planned.action)
            {
                continue;
            }
            if !self.flights.has_room(&planned.action, &self.settings) {
                later.push_back(planned);
                continue;
            }
            performs.push(self.begin(planned, now));
        }
        self.queue = later;
        let saves = std::mem::take(&mut self.saves);
        outputs.extend(saves.into_iter().map(|pod| {
            let memory = self.memory.pods.get(&pod).cloned();
            Output::SaveMemory { pod, memory }
        }));
        outputs.extend(performs);
    }

    fn begin(&mut self, planned: Planned, now: Now) -> Output {
        let Planned { action, reason } = planned;
        let ticket = self.ticket();
        match &action {
            Action::StartContainer { pod, container, attempt, .. } => {
                self.remember_attempt(pod, container, *attempt);
            }
            Action::StopContainer { .. } if matches!(reason, Reason::Evicted { .. }) => {
                self.events.warning(object(&action), "Evicted", reason.to_string());
            }
            Action::StopContainer { id, .. } => {
                self.events.normal(object(&action), "Killing", format!("stopping container {id}: {reason}"));
            }
            Action::Pull { image, .. } => {
                self.events.normal(object(&action), "Pulling", format!("pulling image {image}: {reason}"));
            }
            _ => {}
        }
        self.flights.begin(ticket, action.clone(), reason.clone(), now.mono);
        self.status_stale = true;
        Output::Perform { ticket, action, reason }
    }

    /// Before the attempt, so that its number is never used again, whatever happens to it.
    fn remember_attempt(&mut self, pod: &DesiredPod, container: &ContainerName, attempt: u32) {
        let Some(container) = pod.container(container) else { return };
        keel_plan::remember_attempt(&mut self.memory, pod, container, attempt);
        self.saves.insert(pod.id.clone());
    }

    fn probe(&mut self, now: Now, outputs: &mut Vec<Output>) {
        let next = &mut self.next_ticket;
        let due = self.prober.due(now.mono, self.settings.max_probes, || {
            *next += 1;
            Ticket(*next)
        });
        outputs.extend(due.into_iter().map(|(ticket, request)| Output::Probe { ticket, request }));
    }

    fn observe(&mut self, now: Now, outputs: &mut Vec<Output>) {
        if self.observing.asked.is_some() {
            let late = now.mono.saturating_sub(self.observing.asked_at_ms) >= OBSERVE_DEADLINE_MS;
            if late && !self.observing.late {
                self.observing.late = true;
                self.events.warning("Host", "SlowObservation", "reading the host takes more than a minute");
            }
            return;
        }
        let failing = self.observing.failures > 0;
        if now.mono >= self.observing.next_ms || (self.observing.wanted && !failing) {
            self.observing.asked = Some(self.epoch);
            self.observing.asked_at_ms = now.mono;
            self.observing.wanted = false;
            outputs.push(Output::Observe);
        }
    }

    fn report(&mut self, now: Now, outputs: &mut Vec<Output>) {
        let (Some(desired), Some(observed)) = (&self.desired, &self.observed) else { return };
        if !self.status_stale || now.mono < self.status_at_ms {
            return;
        }
        self.status_stale = false;
        let gap_ms = STATUS_GAP_MS.max(desired.pods.len() as u64 / PODS_PER_STATUS_MS);
        self.status_at_ms = now.mono.saturating_add(gap_ms);
        let facts = self.facts();
        let status = keel_plan::status(desired, observed, &self.memory, &facts, &self.status, now.wall);
        if *self.status != status {
            self.status = Arc::new(status);
            outputs.push(Output::Status(self.status.clone()));
        }
    }

    fn facts(&self) -> Facts {
        let mut facts = Facts { waiting: self.plan.waiting.clone(), ..Facts::default() };
        let runs = self.observed.iter().flat_map(|o| o.pods.values()).flat_map(|seen| &seen.containers);
        for run in runs.filter(|run| run.is_running()) {
            facts.containers.insert(run.id.clone(), self.prober.facts(&run.id));
        }
        self.add_retries(&mut facts);
        let busy = self.queue.iter().filter_map(|planned| pod_of(&planned.action)).cloned();
        facts.busy.extend(busy);
        facts.busy.extend(self.flights.pods().cloned());
        facts.busy.extend(self.kills.values().map(|kill| kill.pod.clone()));
        facts.busy.extend(self.touched.keys().filter_map(|touched| match touched {
            Touched::Pod(pod) => Some(pod.clone()),
            _ => None,
        }));
        for planned in &self.queue {
            if let Some(pod) = pod_of(&planned.action).filter(|pod| !self.flights.has_pod(pod)) {
                facts.waiting.entry(pod.clone()).or_default().push(Waiting::Queued);
            }
        }
        for waits in facts.waiting.values_mut() {
            waits.dedup();
        }
        facts.pulls = self.pulls.iter().map(|(image, rate)| (image.clone(), rate.status().clone())).collect();
        facts.problems = self.problems();
        facts
    }

    /// Failed work becomes a wait of its pod, with the time of the next try.
    fn add_retries(&self, facts: &mut Facts) {
        let Some(now) = self.clock else { return };
        let until = |at_ms: u64| now.wall.saturating_add(at_ms.saturating_sub(now.mono));
        for waits in facts.waiting.values_mut() {
            for wait in waits {
                let Waiting::ImagePull { image } = wait else { continue };
                if let Some(retry) = self.retries.waiting(&Work::Pull(image.clone()), now.mono) {
                    let (image, message) = (image.clone(), retry.error.message.clone());
                    *wait = Waiting::ImagePullBackOff { image, until: until(retry.until_ms), message };
                }
            }
        }
        for planned in &self.plan.actions {
            let work = Work::of(&planned.action);
            let (Some(pod), Some(retry)) = (work.pod(), self.retries.waiting(&work, now.mono)) else {
                continue;
            };
            let (error, message) = (retry.error.reason.into(), retry.error.message.clone());
            let wait = Waiting::Retry { until: until(retry.until_ms), error, message };
            facts.waiting.entry(pod.clone()).or_default().push(wait);
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = Vec::new();
        problems.extend(self.observing.error.iter().map(|error| format!("the host cannot be read: {error}")));
        if self.observing.late {
            problems.push("reading the host takes more than a minute".into());
        }
        problems.extend(self.flights.overdue().map(|f| format!("{} does not end", describe(&f.action))));
        let network = self.plan.actions.iter().map(|p| Work::of(&p.action));
        let network = network.filter(|work| matches!(work, Work::Network(_)));
        problems.extend(
            network
                .filter_map(|work| self.retries.error(&work))
                .map(|error| format!("network: {}", error.message)),
        );
        problems
    }

    fn notice_overdue(&mut self, now: Now) {
        for (action, took_ms) in self.flights.newly_overdue(now.mono) {
            let message = format!("{} is not done after {} s", describe(&action), took_ms / 1000);
            self.events.warning(object(&action), "Slow", message);
            self.status_stale = true;
        }
    }

    /// A wall clock that was set takes the back-off deadlines with it: the waits stay as long as they were.
    fn notice_clock(&mut self, now: Now) {
        let before = self.clock.replace(now);
        let Some(before) = before else { return };
        let difference = |a: u64, b: u64| a.cast_signed().wrapping_sub(b.cast_signed());
        let step = difference(now.wall, before.wall) - difference(now.mono, before.mono);
        if step.abs() < CLOCK_STEP_MS {
            return;
        }
        self.events.normal("Host", "ClockChanged", format!("the clock was set by {} s", step / 1000));
        self.replan = true;
        for (pod, memory) in &mut self.memory.pods {
            for entry in memory.containers.values_mut().filter(|entry| entry.backoff_until > 0) {
                entry.backoff_until = entry.backoff_until.saturating_add_signed(step);
                self.saves.insert(pod.clone());
            }
        }
    }

    /// When the plan changes by itself: the end of a back-off or of a retry's wait.
    fn plan_deadline(&self, now: Now) -> Option<u64> {
        let waits = self.plan.waiting.values().flatten();
        let backoff = waits
            .filter_map(|wait| match wait {
                Waiting::CrashLoopBackOff { until, .. } => Some(*until),
                _ => None,
            })
            .min()
            .map(|until| now.mono.saturating_add(until.saturating_sub(now.wall)));
        backoff.into_iter().chain(self.retries.next_deadline(now.mono)).min()
    }

    fn next_wake(&self, now: Now) -> Option<u64> {
        let observe = match self.observing.asked {
            Some(_) if self.observing.late => None,
            Some(_) => Some(self.observing.asked_at_ms.saturating_add(OBSERVE_DEADLINE_MS)),
            None => Some(self.observing.next_ms),
        };
        let status = self.status_stale.then_some(self.status_at_ms).filter(|_| self.observed.is_some());
        let probes = self.prober.next_due(now.mono, self.settings.max_probes);
        let deadlines = [observe, status, probes, self.plan_deadline_ms, self.flights.next_deadline()];
        deadlines.into_iter().flatten().min()
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Counted runs per pod, to tell afterwards which exits are new.
    fn exits_counted(&self) -> BTreeMap<PodId, BTreeMap<ContainerName, ContainerId>> {
        let Some(observed) = &self.observed else { return BTreeMap::new() };
        let ended = observed.pods.values().filter(|seen| seen.containers.iter().any(|run| !run.is_running()));
        ended
            .filter_map(|seen| {
                let memory = self.memory.pods.get(&seen.pod.id)?;
                let counted = memory.containers.iter();
                let counted = counted.filter_map(|(name, m)| Some((name.clone(), m.counted.clone()?)));
                Some((seen.pod.id.clone(), counted.collect()))
            })
            .collect()
    }

    fn tell_exits(
        &mut self,
        changed: &BTreeSet<PodId>,
        before: &BTreeMap<PodId, BTreeMap<ContainerName, ContainerId>>,
    ) {
        let Some(desired) = &self.desired else { return };
        for pod in desired.pods.values().filter(|pod| changed.contains(&pod.id)) {
            let Some(memory) = self.memory.pods.get(&pod.id) else { continue };
            for (name, entry) in &memory.containers {
                let known = before.get(&pod.id).and_then(|counted| counted.get(name));
                let (Some(counted), Some(exit)) = (&entry.counted, &entry.last_exit) else { continue };
                if known == Some(counted) {
                    continue;
                }
                let object = format!("Pod/{}", pod.key);
                let how = if exit.oom { " (out of memory)" } else { "" };
                let message = format!("container {name} exited with code {}{how}", exit.code);
                if exit.code == 0 {
                    self.events.normal(object.clone(), "Exited", message);
                } else {
                    self.events.warning(object.clone(), "Exited", message);
                }
                if entry.backoff_until > 0 {
                    self.events.warning(
                        object,
                        "BackOff",
                        format!("container {name} waits before its next restart"),
                    );
                }
            }
        }
    }
}

enum PodProgress {
    Done,
    Waiting(String),
    Failed(String),
}

fn touched(action: &Action) -> Touched {
    match (action, pod_of(action)) {
        (_, Some(pod)) => Touched::Pod(pod.clone()),
        (Action::Pull { image, .. }, None) => Touched::Image(image.clone()),
        (_, None) => Touched::Network,
    }
}

/// The pod that comes up, wholly or in part, by this action.
fn brings_up(action: &Action) -> Option<&Arc<DesiredPod>> {
    match action {
        Action::CreatePod { pod } | Action::StartContainer { pod, .. } => Some(pod),
        _ => None,
    }
}

fn same_version(a: &DesiredPod, b: &DesiredPod) -> bool {
    let hashes = |pod: &DesiredPod| -> Vec<_> { pod.containers.iter().map(|c| c.hash.clone()).collect() };
    a.sandbox_hash == b.sandbox_hash && hashes(a) == hashes(b)
}

fn is_touched(touched: &BTreeMap<Touched, Touch>, work: &Work) -> bool {
    let key = match (work, work.pod()) {
        (_, Some(pod)) => Touched::Pod(pod.clone()),
        (Work::Pull(image), None) => Touched::Image(image.clone()),
        (_, None) => Touched::Network,
    };
    touched.contains_key(&key)
}

fn is_live(observed: &Observed, pod: &PodKey, id: &ContainerId) -> bool {
    let runs = observed.pods.get(pod).into_iter().flat_map(|seen| &seen.containers);
    runs.into_iter().any(|run| run.id == *id && run.is_running())
}

fn with_hint(error: &ActionError) -> String {
    match &error.hint {
        Some(hint) => format!("{} (hint: {hint})", error.message),
        None => error.message.clone(),
    }
}

fn object(action: &Action) -> String {
    match (action, pod_of(action)) {
        (_, Some(pod)) => format!("Pod/{pod}"),
        (Action::Pull { image, .. }, None) => format!("Image/{image}"),
        (_, None) => "Host".into(),
    }
}

fn pull_message(pull: &keel_plan::PullStatus) -> String {
    let under_way = pull.layers.iter().filter(|layer| layer.state == keel_plan::LayerState::Fetching);
    let layers = under_way.map(|layer| {
        let name = layer.digest.rsplit(':').next().unwrap_or_default().chars().take(12).collect::<String>();
        let left = layer.seconds_left.map(|left| format!(", {left} s left")).unwrap_or_default();
        format!("; layer {name}: {} of {} bytes{left}", layer.done_bytes, layer.total_bytes)
    });
    format!("pulling image {}: {pull}{}", pull.image, layers.collect::<String>())
}

fn describe(action: &Action) -> String {
    match action {
        Action::Pull { image, .. } => format!("pull of {image}"),
        Action::CreatePod { pod } => format!("creation of pod {}", pod.key),
        Action::StartContainer { pod, container, .. } => format!("start of {}/{container}", pod.key),
        Action::StopContainer { id, .. } => format!("stop of {id}"),
        Action::RemoveContainer { id, .. } => format!("removal of {id}"),
        Action::SyncVolumes { pod, .. } => format!("update of the volumes of pod {}", pod.key),
        Action::UpdateRecord { pod, .. } => format!("update of the record of pod {}", pod.key),
        Action::DeletePod { pod, .. } => format!("deletion of pod {pod}"),
        Action::SyncNetwork { .. } => "update of published ports and hosts files".into(),
    }
}

fn probe_name(kind: ProbeKind) -> &'static str {
    match kind {
        ProbeKind::Startup => "startup",
        ProbeKind::Liveness => "liveness",
        ProbeKind::Readiness => "readiness",
    }
}
