//! When to probe what, and what the results mean. The kubelet's rules:
//!
//! ```text
//! startup    unknown --success--> started;  --failureThreshold in a row--> kill, then on hold
//! liveness   (only once started) success;   --failureThreshold in a row--> kill, then on hold
//! readiness  (only once started) not ready --successThreshold in a row--> ready --failureThreshold--> not ready
//! ```
//! Below a threshold nothing changes. A probe that could not be run is tried again at once, three times at most, and
//! never counts. A worker lives as long as its run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use keel_manifest::extension::{STARTED_BY_NOTIFY, notifies};
use keel_manifest::model::{Container, Probe};
use keel_plan::{
    ContainerFacts, ContainerId, ContainerState, Desired, DesiredPod, Observed, ObservedContainer,
    ObservedPod, Role,
};

use crate::core::{Now, Ticket};
use crate::ports::{ProbeKind, ProbeOutcome, ProbeRequest};

/// Tries of a probe that could not be run, per period.
const MAX_ERRORS: u32 = 3;

#[derive(Default)]
pub(crate) struct Prober {
    workers: BTreeMap<(ContainerId, ProbeKind), Worker>,
    tickets: BTreeMap<Ticket, (ContainerId, ProbeKind)>,
    /// False until the first observation: what runs by then was started by a predecessor.
    adopted: bool,
}

struct Worker {
    pod: Arc<DesiredPod>,
    index: usize,
    ip: Option<std::net::Ipv4Addr>,
    due_ms: u64,
    in_flight: bool,
    result: Verdict,
    /// Last outcome and how often it came in a row.
    last: Option<bool>,
    in_a_row: u32,
    errors: u32,
    on_hold: bool,
    message: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Unknown,
    Success,
    Failure,
}

/// What a finished probe leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing that anybody can see.
    None,
    /// Started or ready changed.
    Changed,
    /// The run is to be stopped.
    Kill,
}

pub(crate) struct Finished {
    pub(crate) container: ContainerId,
    pub(crate) kind: ProbeKind,
    pub(crate) pod: Arc<DesiredPod>,
    /// `None` for a success.
    pub(crate) failure: Option<String>,
    pub(crate) effect: Effect,
    pub(crate) grace_ms: u64,
}

impl Prober {
    /// Makes the workers those of the runs that are live now.
    pub(crate) fn sync(&mut self, desired: &Desired, observed: &Observed, now: Now) {
        let mut kept = BTreeMap::new();
        for seen in observed.pods.values() {
            let declared = desired.pods.get(&seen.pod.key);
            for run in seen.containers.iter().filter(|run| run.has_process() && run.role == Role::Main) {
                // An old run is probed by its own spec until it is replaced.
                let pod = declared.filter(|pod| pod.container(&run.name).is_some_and(|c| c.hash == run.hash));
                let pod = pod.unwrap_or(&seen.pod);
                for kind in [ProbeKind::Startup, ProbeKind::Liveness, ProbeKind::Readiness] {
                    // A pod that goes away is not killed for it, but it still says whether it is ready.
                    let wanted = declared.is_some() || kind == ProbeKind::Readiness;
                    if wanted {
                        self.sync_worker(&mut kept, pod, seen, run, kind, now);
                    }
                }
            }
        }
        self.workers = kept;
        self.adopted = true;
    }

    fn sync_worker(
        &mut self,
        kept: &mut BTreeMap<(ContainerId, ProbeKind), Worker>,
        pod: &Arc<DesiredPod>,
        seen: &ObservedPod,
        run: &ObservedContainer,
        kind: ProbeKind,
        now: Now,
    ) {
        let Some(container) = pod.container(&run.name) else { return };
        let Some(probe) = pod.container_spec(container).and_then(|spec| probe_of(pod, spec, kind)) else {
            return;
        };
        let key = (run.id.clone(), kind);
        let worker = match self.workers.remove(&key) {
            Some(worker) => Worker { pod: pod.clone(), index: container.index, ip: seen.ip, ..worker },
            None => Worker {
                pod: pod.clone(),
                index: container.index,
                ip: seen.ip,
                due_ms: self.first_due(probe, run, kind, now),
                in_flight: false,
                result: match kind {
                    ProbeKind::Startup => Verdict::Unknown,
                    ProbeKind::Liveness => Verdict::Success,
                    ProbeKind::Readiness => Verdict::Failure,
                },
                last: None,
                in_a_row: 0,
                errors: 0,
                on_hold: false,
                message: None,
            },
        };
        kept.insert(key, worker);
    }

    /// After the initial delay. Liveness probes of runs that a predecessor started are spread over one period, so that
    /// a restart of the daemon does not probe everything at once; readiness is wanted soon.
    fn first_due(&self, probe: &Probe, run: &ObservedContainer, kind: ProbeKind, now: Now) -> u64 {
        let (delay_s, period_s, _) = probe.times_s();
        let started_at = match run.state {
            ContainerState::Running { pid: 1.., started_at } => started_at,
            _ => now.wall,
        };
        let elapsed = now.wall.saturating_sub(started_at);
        let due = now.mono.saturating_add(seconds(delay_s).saturating_sub(elapsed));
        if self.adopted || kind != ProbeKind::Liveness {
            return due;
        }
        due.saturating_add(spread(&run.id) % seconds(period_s).max(1))
    }

    /// Probes that are due now, at most `room` of them. The caller makes the tickets.
    pub(crate) fn due(
        &mut self,
        now_ms: u64,
        max_probes: usize,
        mut ticket: impl FnMut() -> Ticket,
    ) -> Vec<(Ticket, ProbeRequest)> {
        let room = max_probes.saturating_sub(self.tickets.len());
        let ready: Vec<(ContainerId, ProbeKind)> = self
            .workers
            .iter()
            .filter(|(key, worker)| self.may_run(key, worker) && worker.due_ms <= now_ms)
            .map(|(key, _)| key.clone())
            .take(room)
            .collect();
        let mut out = Vec::with_capacity(ready.len());
        for key in ready {
            let Some(worker) = self.workers.get_mut(&key) else { continue };
            let Some(request) = worker.request(&key) else { continue };
            worker.in_flight = true;
            let ticket = ticket();
            self.tickets.insert(ticket, key);
            out.push((ticket, request));
        }
        out
    }

    pub(crate) fn next_due(&self, now_ms: u64, max_probes: usize) -> Option<u64> {
        if self.tickets.len() >= max_probes {
            return None;
        }
        let waiting = self.workers.iter().filter(|(key, worker)| self.may_run(key, worker));
        waiting.map(|(_, worker)| worker.due_ms.max(now_ms)).min()
    }

    pub(crate) fn finished(
        &mut self,
        ticket: Ticket,
        outcome: ProbeOutcome,
        now_ms: u64,
    ) -> Option<Finished> {
        let key = self.tickets.remove(&ticket)?;
        let worker = self.workers.get_mut(&key)?;
        let probe = worker.probe(key.1)?.clone();
        let (effect, failure) = worker.take(key.1, &probe, outcome, now_ms);
        let grace_s = probe.termination_grace_period_seconds;
        Some(Finished {
            container: key.0,
            kind: key.1,
            pod: worker.pod.clone(),
            failure,
            effect,
            grace_ms: grace_s.map_or_else(|| worker.pod.grace_ms(), |s| s.saturating_mul(1000)),
        })
    }

    pub(crate) fn facts(&self, run: &ContainerId) -> ContainerFacts {
        let result = |kind| self.workers.get(&(run.clone(), kind)).map(|worker| worker.result);
        let message = |kind| self.workers.get(&(run.clone(), kind)).and_then(|worker| worker.message.clone());
        let started = self.started(run);
        ContainerFacts {
            started,
            ready: started && result(ProbeKind::Readiness).is_none_or(|result| result == Verdict::Success),
            message: message(if started { ProbeKind::Readiness } else { ProbeKind::Startup }),
        }
    }

    fn started(&self, run: &ContainerId) -> bool {
        let startup = self.workers.get(&(run.clone(), ProbeKind::Startup));
        startup.is_none_or(|worker| worker.result == Verdict::Success)
    }

    fn may_run(&self, (run, kind): &(ContainerId, ProbeKind), worker: &Worker) -> bool {
        let turn = match kind {
            ProbeKind::Startup => worker.result != Verdict::Success,
            ProbeKind::Liveness | ProbeKind::Readiness => self.started(run),
        };
        turn && !worker.in_flight && !worker.on_hold
    }
}

impl Worker {
    fn probe(&self, kind: ProbeKind) -> Option<&Probe> {
        probe_of(&self.pod, self.pod.spec.containers.get(self.index)?, kind)
    }

    fn request(&self, key: &(ContainerId, ProbeKind)) -> Option<ProbeRequest> {
        let (_, _, timeout_s) = self.probe(key.1)?.times_s();
        Some(ProbeRequest {
            pod: self.pod.clone(),
            container: key.0.clone(),
            container_index: self.index,
            ip: self.ip,
            kind: key.1,
            timeout: Duration::from_secs(u64::from(timeout_s)),
        })
    }

    fn take(
        &mut self,
        kind: ProbeKind,
        probe: &Probe,
        outcome: ProbeOutcome,
        now_ms: u64,
    ) -> (Effect, Option<String>) {
        let (_, period_s, _) = probe.times_s();
        self.in_flight = false;
        let failure = match outcome {
            ProbeOutcome::Success => None,
            ProbeOutcome::Failure(message) => Some(message),
            ProbeOutcome::Error(_) => {
                self.errors += 1;
                if self.errors >= MAX_ERRORS {
                    self.errors = 0;
                    self.due_ms = now_ms.saturating_add(seconds(period_s));
                }
                return (Effect::None, None);
            }
        };
        self.errors = 0;
        // A slow probe must not be followed by a burst of those that it delayed.
        self.due_ms = self.due_ms.saturating_add(seconds(period_s)).max(now_ms);
        (self.judge(kind, probe, failure.clone()), failure)
    }

    fn judge(&mut self, kind: ProbeKind, probe: &Probe, failure: Option<String>) -> Effect {
        let success = failure.is_none();
        self.in_a_row = if self.last == Some(success) { self.in_a_row.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let (successes, failures) = probe.thresholds();
        if self.in_a_row < if success { successes } else { failures } {
            return Effect::None;
        }
        let verdict = if success { Verdict::Success } else { Verdict::Failure };
        let message_changed = self.message != failure;
        self.message = failure;
        let changed = self.result != verdict;
        self.result = verdict;
        match (kind, verdict) {
            (ProbeKind::Startup | ProbeKind::Liveness, Verdict::Failure) => {
                self.on_hold = true;
                Effect::Kill
            }
            _ if changed || message_changed => Effect::Changed,
            _ => Effect::None,
        }
    }
}

fn probe_of<'a>(pod: &DesiredPod, container: &'a Container, kind: ProbeKind) -> Option<&'a Probe> {
    match kind {
        ProbeKind::Startup if notifies(&pod.annotations, container) => Some(&STARTED_BY_NOTIFY),
        ProbeKind::Startup => container.startup_probe.as_ref(),
        ProbeKind::Liveness => container.liveness_probe.as_ref(),
        ProbeKind::Readiness => container.readiness_probe.as_ref(),
    }
}

fn seconds(count: u32) -> u64 {
    u64::from(count) * 1000
}

/// A number that differs between runs and is the same for one: FNV-1a.
fn spread(id: &ContainerId) -> u64 {
    id.0.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_plan::{ContainerName, ObservedPod, lower_desired};
    use std::collections::BTreeMap;

    struct Bench {
        prober: Prober,
        desired: Desired,
        observed: Observed,
        now: Now,
        tickets: u64,
    }

    impl Bench {
        /// A container that has just started, with these probes.
        fn new(probes: &str) -> Bench {
            let yaml = format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [{{name: c, image: i, {probes}}}]}}\n"
            );
            let parsed = keel_manifest::parse("p.yaml", yaml.as_bytes());
            assert!(parsed.diagnostics.is_empty(), "{:?}", parsed.diagnostics);
            let desired = lower_desired(&parsed.objects, &BTreeMap::new());
            let now = Now { wall: 1_000_000, mono: 0 };
            let mut bench =
                Bench { prober: Prober::default(), desired, observed: Observed::default(), now, tickets: 0 };
            // The first observation is empty: nothing is adopted.
            bench.sync();
            bench.run(0);
            bench.sync();
            bench
        }

        fn run(&mut self, attempt: u32) {
            let pod = self.desired.pods.values().next().unwrap().clone();
            let container = pod.containers[0].clone();
            let run = ObservedContainer {
                id: pod.container_id(&container.name, attempt),
                name: container.name,
                role: Role::Main,
                hash: container.hash,
                attempt,
                state: ContainerState::Running { pid: 1, started_at: self.now.wall },
                image_digest: String::new(),
                stand_in: false,
            };
            let seen = ObservedPod {
                pod: pod.clone(),
                incarnation: 1,
                created_at: 0,
                ready: true,
                ip: None,
                containers: vec![run],
                over_limit: None,
            };
            self.observed.pods.insert(pod.key.clone(), seen);
        }

        fn sync(&mut self) {
            self.prober.sync(&self.desired, &self.observed, self.now);
        }

        /// Kinds of the probes that go out at this second.
        fn at(&mut self, second: u64) -> Vec<(Ticket, ProbeKind)> {
            self.now = Now { wall: 1_000_000 + second * 1000, mono: second * 1000 };
            let tickets = &mut self.tickets;
            let due = self.prober.due(self.now.mono, 32, || {
                *tickets += 1;
                Ticket(*tickets)
            });
            due.into_iter().map(|(ticket, request)| (ticket, request.kind)).collect()
        }

        /// The only probe of this second ends so.
        fn answer(&mut self, second: u64, outcome: ProbeOutcome) -> Effect {
            let due = self.at(second);
            assert_eq!(due.len(), 1, "at {second}: {due:?}");
            self.prober.finished(due[0].0, outcome, self.now.mono).unwrap().effect
        }

        fn facts(&self) -> ContainerFacts {
            let pod = self.desired.pods.values().next().unwrap();
            self.prober.facts(&pod.container_id(&ContainerName("c".into()), 0))
        }
    }

    fn failure() -> ProbeOutcome {
        ProbeOutcome::Failure("refused".into())
    }

    #[test]
    fn readiness_starts_false_and_follows_its_thresholds() {
        let mut bench = Bench::new(
            "readinessProbe: {tcpSocket: {port: 1}, initialDelaySeconds: 5, successThreshold: 2, failureThreshold: 2}",
        );
        assert!(bench.facts().started && !bench.facts().ready);
        assert_eq!(bench.at(4), []);
        assert_eq!(bench.answer(5, ProbeOutcome::Success), Effect::None);
        assert_eq!(bench.at(14), []);
        assert_eq!(bench.answer(15, ProbeOutcome::Success), Effect::Changed);
        assert!(bench.facts().ready);
        assert_eq!(bench.answer(25, failure()), Effect::None);
        assert!(bench.facts().ready, "one failure is below the threshold");
        assert_eq!(bench.answer(35, failure()), Effect::Changed);
        assert!(!bench.facts().ready);
    }

    #[test]
    fn a_failed_liveness_probe_kills_once_and_holds_until_the_next_run() {
        let mut bench = Bench::new("livenessProbe: {tcpSocket: {port: 1}, periodSeconds: 1}");
        assert!(bench.facts().ready);
        assert_eq!(bench.answer(0, failure()), Effect::None);
        assert_eq!(bench.answer(1, failure()), Effect::None);
        assert_eq!(bench.answer(2, failure()), Effect::Kill);
        assert_eq!(bench.at(60), []);
        bench.run(1);
        bench.sync();
        assert_eq!(bench.answer(60, ProbeOutcome::Success), Effect::None);
    }

    #[test]
    fn until_started_only_the_startup_probe_runs_and_afterwards_it_does_not() {
        let mut bench = Bench::new(
            "startupProbe: {tcpSocket: {port: 1}, periodSeconds: 1}, livenessProbe: {tcpSocket: {port: 1}}, readinessProbe: {tcpSocket: {port: 1}}",
        );
        assert!(!bench.facts().started);
        assert_eq!(bench.answer(0, failure()), Effect::None);
        let due = bench.at(1);
        assert_eq!(due.iter().map(|(_, kind)| *kind).collect::<Vec<_>>(), [ProbeKind::Startup]);
        bench.prober.finished(due[0].0, ProbeOutcome::Success, 1000);
        assert!(bench.facts().started && !bench.facts().ready);
        let kinds: Vec<_> = bench.at(1).into_iter().map(|(_, kind)| kind).collect();
        assert_eq!(kinds, [ProbeKind::Liveness, ProbeKind::Readiness]);
    }

    #[test]
    fn a_probe_that_cannot_run_is_tried_three_times_and_never_counts() {
        let mut bench = Bench::new("livenessProbe: {tcpSocket: {port: 1}, failureThreshold: 1}");
        for _ in 0..3 {
            assert_eq!(bench.answer(0, ProbeOutcome::Error("no namespace".into())), Effect::None);
        }
        assert_eq!(bench.at(9), []);
        assert_eq!(bench.answer(10, failure()), Effect::Kill);
    }
}
