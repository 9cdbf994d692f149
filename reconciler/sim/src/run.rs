//! One seed: a user, a host, a daemon that dies, and the core between them; checked at every step, and at the end for
//! convergence.

use std::collections::{BTreeMap, BTreeSet};

use keel_engine::ports::{ActionError, Done, Next, PortError, ProbeKind, ProbeOutcome};
use keel_engine::{Convergence, Core, Input, Now, Output, Settings, Ticket};
use keel_manifest::ObjectKey;
use keel_manifest::model::RestartPolicy;
use keel_plan::{
    Action, ContainerId, ContainerState, Desired, DesiredPod, Observed, PodKey, Reason, Role, Waiting,
    lower_desired,
};

use crate::checks::Checks;
use crate::manifests::{DEPLOYMENT_NAMES, Declared, POD_NAMES, objects};
use crate::rng::Rng;
use crate::world::{Step, StepResult, World, error, steps};

/// Wall clock at the start: any day will do.
const EPOCH_MS: u64 = 1_750_000_000_000;
/// Faults and edits happen in this time.
const STORM_MS: u64 = 900_000;
/// Then everything works, and the host must be as declared within this time. The longest wait is a back-off of 300 s,
/// and a start may need two of them in a row.
const CALM_MS: u64 = 1_500_000;
/// A converged host must stay as it is.
const STABLE_MS: u64 = 70_000;
const JUDGE_EVERY_MS: u64 = 1_000;
/// More steps than this in one run is a loop.
const MAX_STEPS: u64 = 60_000;

#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub steps: u64,
    pub actions: u64,
    pub crashes: u64,
}

/// How likely what goes wrong, in percent per occasion. Drawn per seed, so that many seeds see one fault alone.
struct Menu {
    crash: u64,
    action_fails: u64,
    reply_lost: u64,
    hang: u64,
    observe_fails: u64,
    hint_lost: u64,
    clock_jump: u64,
    run_ends: u64,
    reboot: u64,
    source_fails: u64,
    probe_fails: u64,
    foreign: u64,
    duplicate: u64,
}

impl Menu {
    fn draw(rng: &mut Rng) -> Menu {
        let mut dish = |percent: u64| if rng.chance(50) { rng.between(1, percent) } else { 0 };
        Menu {
            crash: dish(6),
            action_fails: dish(25),
            reply_lost: dish(15),
            hang: dish(4),
            observe_fails: dish(20),
            hint_lost: dish(80),
            clock_jump: dish(10),
            run_ends: dish(90),
            reboot: dish(3),
            source_fails: dish(30),
            probe_fails: dish(30),
            foreign: dish(30),
            duplicate: dish(30),
        }
    }
}

#[derive(Clone, Debug)]
enum Happening {
    /// The user, or fate.
    Storm,
    Step {
        life: u64,
        ticket: Ticket,
        index: usize,
    },
    /// Goes on although the daemon that asked for it is dead: a shim, a signal on its way.
    Orphan {
        action: Action,
        step: Step,
    },
    Reply {
        life: u64,
        ticket: Ticket,
        result: StepResult,
    },
    Snapshot {
        life: u64,
    },
    Observed {
        life: u64,
        result: Result<Observed, PortError>,
    },
    Probed {
        life: u64,
        ticket: Ticket,
        outcome: ProbeOutcome,
    },
    RunEnds {
        pod: PodKey,
        id: ContainerId,
        pid: u32,
        code: i32,
    },
    Hint {
        life: u64,
    },
    Wake {
        life: u64,
    },
    DaemonStarts {
        life: u64,
    },
}

pub(crate) struct Sim {
    rng: Rng,
    menu: Menu,
    calm: bool,
    mono: u64,
    wall_offset: i64,
    seq: u64,
    agenda: BTreeMap<(u64, u64), Happening>,
    world: World,
    core: Option<Core>,
    /// Number of the daemon's life; what belongs to an earlier one is lost.
    life: u64,
    flights: BTreeMap<Ticket, Action>,
    first_half: Option<Observed>,
    wake_at: u64,
    declared: Vec<Declared>,
    mode: u64,
    owners: BTreeMap<ObjectKey, String>,
    desired: Desired,
    checks: Checks,
    outcome: Outcome,
    trace: Option<Vec<String>>,
}

/// Runs one seed. `Err` says what was broken, with the last part of the trace.
pub fn run(seed: u64, trace: bool) -> Result<Outcome, String> {
    let mut sim = Sim::new(seed, trace);
    let result = sim.live();
    match result {
        Ok(()) => Ok(sim.outcome),
        Err(message) => {
            let trace = sim.trace.map(|lines| lines.join("\n") + "\n").unwrap_or_default();
            Err(format!("{trace}seed {seed}: {message}"))
        }
    }
}

impl Sim {
    fn new(seed: u64, trace: bool) -> Sim {
        let mut rng = Rng::new(seed);
        let menu = Menu::draw(&mut rng);
        let mut sim = Sim {
            rng,
            menu,
            calm: false,
            mono: 1_000,
            wall_offset: i64::try_from(EPOCH_MS).unwrap_or(0),
            seq: 0,
            agenda: BTreeMap::new(),
            world: World::default(),
            core: None,
            life: 0,
            flights: BTreeMap::new(),
            first_half: None,
            wake_at: u64::MAX,
            declared: Vec::new(),
            mode: 0,
            owners: BTreeMap::new(),
            desired: Desired::default(),
            checks: Checks::default(),
            outcome: Outcome::default(),
            trace: trace.then(Vec::new),
        };
        sim.populate();
        sim
    }

    fn now(&self) -> Now {
        Now { wall: self.mono.saturating_add_signed(self.wall_offset), mono: self.mono }
    }

    fn at(&mut self, delay_ms: u64, happening: Happening) {
        self.seq += 1;
        self.agenda.insert((self.mono + delay_ms, self.seq), happening);
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        let at = self.mono;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>9.3} {}", at as f64 / 1000.0, text()));
        }
    }

    fn populate(&mut self) {
        for name in POD_NAMES {
            if self.rng.chance(60) {
                let declared = Declared::random(&mut self.rng, name, None);
                self.declared.push(declared);
            }
        }
        for name in DEPLOYMENT_NAMES {
            if self.rng.chance(50) {
                let replicas = u32::try_from(self.rng.between(1, 3)).unwrap_or(1);
                let declared = Declared::random(&mut self.rng, name, Some(replicas));
                self.declared.push(declared);
            }
        }
        if self.rng.chance(self.menu.foreign) {
            let name = (*self.rng.pick(&POD_NAMES)).to_owned();
            self.world.foreign.insert(PodKey { namespace: "default".into(), name });
        }
        self.lower();
        self.at(0, Happening::DaemonStarts { life: 0 });
        self.at(20_000, Happening::Storm);
    }

    fn lower(&mut self) {
        let objects = objects(&self.declared, self.mode);
        let mut desired = lower_desired(&objects, &self.owners);
        let winners = desired.pods.values().map(|pod| (pod.owner.clone(), pod.origin.file.clone()));
        self.owners = winners
            .map(|(owner, file)| {
                (ObjectKey { kind: owner.kind, namespace: "default".into(), name: owner.name }, file)
            })
            .collect();
        if !self.calm && self.rng.chance(self.menu.source_fails) {
            desired.complete = false;
        }
        if !self.calm && self.rng.chance(self.menu.source_fails / 3) {
            // One file is broken and its last good version is not known.
            let names: Vec<PodKey> = desired.pods.keys().cloned().collect();
            if !names.is_empty() {
                let key = self.rng.pick(&names).clone();
                desired.pods.remove(&key);
                desired.frozen.insert(key);
            }
        }
        self.checks.declared(&desired);
        self.desired = desired;
    }

    fn live(&mut self) -> Result<(), String> {
        while self.mono < STORM_MS {
            self.tick()?;
        }
        self.become_calm();
        let limit = self.mono + CALM_MS;
        let (mut good_since, mut judged_at) = (None, 0);
        loop {
            self.tick()?;
            if self.mono < judged_at + JUDGE_EVERY_MS {
                continue;
            }
            judged_at = self.mono;
            match (self.judge(), good_since) {
                (Ok(()), None) => good_since = Some(self.mono),
                (Ok(()), Some(since)) if self.mono >= since + STABLE_MS => {
                    return self.checks.at_end(&self.world);
                }
                (Ok(()), Some(_)) => {}
                (Err(message), _) => {
                    good_since = None;
                    if self.mono > limit {
                        return Err(format!("does not converge: {message}"));
                    }
                }
            }
        }
    }

    fn tick(&mut self) -> Result<(), String> {
        self.outcome.steps += 1;
        if self.outcome.steps > MAX_STEPS {
            return Err("too many steps: something loops".into());
        }
        let next = self.agenda.first_key_value().map(|((at, _), _)| *at).unwrap_or(u64::MAX);
        if self.wake_at < next {
            let life = self.life;
            self.agenda.insert((self.wake_at, 0), Happening::Wake { life });
            self.wake_at = u64::MAX;
        }
        let Some(((at, _), happening)) = self.agenda.pop_first() else {
            return Err("nothing left to happen".into());
        };
        self.mono = self.mono.max(at);
        self.happen(happening);
        match self.world.violations.pop().or_else(|| self.checks.violation()) {
            Some(violation) => Err(violation),
            None => Ok(()),
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Storm => self.storm(),
            Happening::DaemonStarts { life } if life == self.life => self.daemon_starts(),
            Happening::Wake { life } if life == self.life => self.feed(Input::Wake),
            Happening::Hint { life } if life == self.life => self.feed(Input::Hint),
            Happening::Snapshot { life } if life == self.life => self.snapshot(),
            Happening::Observed { life, result } if life == self.life => self.feed(Input::Observed(result)),
            Happening::Probed { life, ticket, outcome } if life == self.life => {
                self.feed(Input::ProbeFinished { ticket, outcome });
            }
            Happening::Reply { life, ticket, result } if life == self.life => {
                self.flights.remove(&ticket);
                self.say(|| format!("  reply {ticket:?} {result:?}"));
                self.feed(Input::ActionFinished { ticket, result });
            }
            Happening::Step { life, ticket, index } if life == self.life => self.step_action(ticket, index),
            Happening::Orphan { action, step } => {
                self.say(|| format!("  orphan {step:?}"));
                let now = self.now().wall;
                let _ = self.world.apply(&action, step, now);
                self.after_step(&action, step);
            }
            Happening::RunEnds { pod, id, pid, code } => self.run_ends(&pod, &id, pid, code),
            // Of an earlier life.
            _ => {}
        }
    }

    fn feed(&mut self, input: Input) {
        let now = self.now();
        let Some(core) = &mut self.core else { return };
        let outputs = core.step(input, now);
        for output in outputs {
            self.obey(output);
        }
    }

    fn obey(&mut self, output: Output) {
        match output {
            Output::Perform { ticket, action, reason } => self.perform(ticket, action, &reason),
            // A host may be too late with it at any time.
            Output::Cancel { .. } => {}
            Output::Observe => {
                let delay = self.rng.between(1, 30);
                self.at(delay, Happening::Snapshot { life: self.life });
            }
            Output::Probe { ticket, request } => {
                let live =
                    self.world.run(&request.pod.key, &request.container).is_some_and(|run| run.is_running());
                let outcome = if !live || (!self.calm && self.rng.chance(self.menu.probe_fails)) {
                    match request.kind {
                        ProbeKind::Startup if self.rng.chance(20) => {
                            ProbeOutcome::Error("no namespace".into())
                        }
                        _ => ProbeOutcome::Failure("refused".into()),
                    }
                } else {
                    ProbeOutcome::Success
                };
                let delay = self.rng.between(1, 50);
                self.at(delay, Happening::Probed { life: self.life, ticket, outcome });
            }
            Output::SaveMemory { pod, memory } => {
                self.checks.memory(&pod, self.world.memory.pods.get(&pod), memory.as_ref());
                match memory {
                    Some(memory) => drop(self.world.memory.pods.insert(pod, memory)),
                    None => drop(self.world.memory.pods.remove(&pod)),
                }
            }
            Output::WakeAt(at) => self.wake_at = at,
            Output::Event(event) => {
                self.say(|| format!("  event {} {}: {}", event.object, event.reason, event.message))
            }
            Output::Status(_) => {}
        }
    }

    fn perform(&mut self, ticket: Ticket, action: Action, reason: &Reason) {
        self.outcome.actions += 1;
        self.say(|| format!("perform {ticket:?} {} because {reason}", brief(&action)));
        let now = self.now();
        let probe_or_request = matches!(reason, Reason::ProbeFailed { .. } | Reason::Requested { .. });
        self.checks.planned(&action, probe_or_request, &self.desired, &self.world, now);
        self.checks.in_flight(self.flights.values().chain([&action]), &Settings::default());
        self.flights.insert(ticket, action);
        let delay = self.step_delay();
        self.at(delay, Happening::Step { life: self.life, ticket, index: 0 });
    }

    fn step_delay(&mut self) -> u64 {
        if !self.calm && self.rng.chance(self.menu.hang) {
            return self.rng.between(60_000, 200_000);
        }
        if self.rng.chance(10) { self.rng.between(100, 4_000) } else { self.rng.between(1, 40) }
    }

    fn step_action(&mut self, ticket: Ticket, index: usize) {
        let Some(action) = self.flights.get(&ticket).cloned() else { return };
        let all = steps(&action);
        let fails = !self.calm && self.rng.chance(self.menu.action_fails);
        let now = self.now().wall;
        let result =
            if fails { Err(self.failure(&action)) } else { self.world.apply(&action, all[index], now) };
        self.say(|| format!("  step {ticket:?} {:?} {result:?}", all[index]));
        if result == Ok(Done::Done) {
            self.after_step(&action, all[index]);
            if index + 1 < all.len() {
                let delay = self.step_delay();
                self.at(delay, Happening::Step { life: self.life, ticket, index: index + 1 });
                return;
            }
        }
        let lost = !self.calm && result.is_ok() && self.rng.chance(self.menu.reply_lost);
        let result = if lost { Err(error(Next::Retry, "Lost", "the answer was lost")) } else { result };
        let delay = self.rng.between(0, 10);
        self.at(delay, Happening::Reply { life: self.life, ticket, result });
    }

    fn failure(&mut self, action: &Action) -> ActionError {
        let next = if self.rng.chance(15) { Next::Blocked } else { Next::Retry };
        match action {
            Action::Pull { .. } => error(next, "ErrImagePull", "registry is down"),
            _ => error(next, "DiskFull", "no space left on device"),
        }
    }

    /// A new process lives as long as its manifest and the menu say.
    fn after_step(&mut self, action: &Action, step: Step) {
        let (Step::RunLive, Action::StartContainer { pod, container, attempt, .. }) = (step, action) else {
            return;
        };
        let id = pod.container_id(container, *attempt);
        let Some(run) = self.world.run(&pod.key, &id) else { return };
        let ContainerState::Running { pid, .. } = run.state else { return };
        if let Some(seen) = self.world.pods.get(&pod.key) {
            self.checks.started(seen, run, self.mono);
        }
        let policy = pod.spec.restart_policy.unwrap_or_default();
        let role = run.role;
        let ends = !self.calm && self.rng.chance(self.menu.run_ends);
        let (delay, code) = match (role, ends) {
            (Role::Init, false) => (self.rng.between(5, 2_000), 0),
            (Role::Main, false) if policy == RestartPolicy::Always || self.rng.chance(50) => return,
            (Role::Main, false) => (self.rng.between(5, 5_000), 0),
            (_, true) => {
                let delay = match self.rng.below(4) {
                    0 => self.rng.between(1, 30),
                    1 | 2 => self.rng.between(30, 60_000),
                    _ => self.rng.between(60_000, 900_000),
                };
                (delay, [0, 1, 137, -1][usize::try_from(self.rng.below(4)).unwrap_or(0)])
            }
        };
        self.at(delay, Happening::RunEnds { pod: pod.key.clone(), id, pid, code });
    }

    fn run_ends(&mut self, pod: &PodKey, id: &ContainerId, pid: u32, code: i32) {
        let same = self
            .world
            .run(pod, id)
            .is_some_and(|run| matches!(run.state, ContainerState::Running { pid: p, .. } if p == pid));
        let now = self.now().wall;
        if same && self.world.end_run(pod, id, code, now) {
            self.say(|| format!("{id} ends with {code}"));
            if self.calm || !self.rng.chance(self.menu.hint_lost) {
                let delay = self.rng.between(0, 5);
                self.at(delay, Happening::Hint { life: self.life });
            }
        }
    }

    /// Half of the world is read now and half when the answer comes: a host cannot be stopped to be looked at.
    fn snapshot(&mut self) {
        if !self.calm && self.rng.chance(self.menu.observe_fails) {
            self.first_half = None;
            self.at(5, Happening::Observed { life: self.life, result: Err(PortError("read error".into())) });
            return;
        }
        match self.first_half.take() {
            None => {
                self.first_half = Some(self.world.observe());
                let delay = if !self.calm && self.rng.chance(10) {
                    self.rng.between(100, 3_000)
                } else {
                    self.rng.between(0, 10)
                };
                self.at(delay, Happening::Snapshot { life: self.life });
            }
            Some(mut first) => {
                // Every other name is read late.
                let late = |pod: &PodKey| {
                    let names = POD_NAMES.iter().chain(&DEPLOYMENT_NAMES);
                    names.step_by(2).any(|name| pod.name.starts_with(name))
                };
                first.pods.retain(|pod, _| !late(pod));
                let second = self.world.pods.iter().filter(|(pod, _)| late(pod));
                first.pods.extend(second.map(|(pod, seen)| (pod.clone(), seen.clone())));
                let delay = self.rng.between(0, 20);
                self.at(delay, Happening::Observed { life: self.life, result: Ok(first) });
            }
        }
    }

    fn daemon_starts(&mut self) {
        self.say(|| "daemon starts".into());
        self.core = Some(Core::new(Settings::default(), self.world.memory.clone()));
        self.first_half = None;
        self.feed(Input::DesiredChanged(self.desired.clone()));
    }

    fn daemon_dies(&mut self) {
        self.say(|| "daemon dies".into());
        self.outcome.crashes += 1;
        self.core = None;
        self.life += 1;
        self.wake_at = u64::MAX;
        let flights = std::mem::take(&mut self.flights);
        for action in flights.into_values() {
            self.orphan(action);
        }
        let delay = self.rng.between(10, 20_000);
        self.at(delay, Happening::DaemonStarts { life: self.life });
    }

    /// A start that has reached its shim goes on without the daemon, and so does a stop.
    fn orphan(&mut self, action: Action) {
        let step = match &action {
            Action::StartContainer { pod, container, attempt, .. } => {
                let id = pod.container_id(container, *attempt);
                let begun =
                    self.world.run(&pod.key, &id).is_some_and(|run| run.state == ContainerState::Partial);
                if begun { Step::RunLive } else { return }
            }
            Action::StopContainer { .. } => Step::RunStopped,
            _ => return,
        };
        if self.rng.chance(50) {
            let delay = self.rng.between(1, 3_000);
            self.at(delay, Happening::Orphan { action, step });
        }
    }

    fn storm(&mut self) {
        if self.calm {
            return;
        }
        let delay = self.rng.between(500, 60_000);
        self.at(delay, Happening::Storm);
        if self.rng.chance(60) {
            self.edit();
        }
        if self.rng.chance(self.menu.clock_jump) {
            let by = i64::try_from(self.rng.between(1_000, 7_200_000)).unwrap_or(0);
            let by = if self.rng.chance(50) { by } else { -by };
            self.say(|| format!("clock is set by {by} ms"));
            self.wall_offset += by;
            self.checks.clock_set(self.mono);
        }
        let runs: Vec<(PodKey, ContainerId, u32)> = self
            .world
            .live_runs()
            .filter_map(|(pod, run)| match run.state {
                ContainerState::Running { pid, .. } => Some((pod.clone(), run.id.clone(), pid)),
                _ => None,
            })
            .collect();
        if !runs.is_empty() && self.rng.chance(self.menu.run_ends / 3) {
            let (pod, id, pid) = self.rng.pick(&runs).clone();
            let code = *self.rng.pick(&[0, 1, 137, -1]);
            self.run_ends(&pod, &id, pid, code);
        }
        if self.rng.chance(self.menu.reboot) {
            self.say(|| "host reboots".into());
            self.daemon_dies();
            self.agenda.retain(|_, happening| !matches!(happening, Happening::Orphan { .. }));
            self.world.reboot();
            self.checks.rebooted();
        } else if self.core.is_some() && self.rng.chance(self.menu.crash * 3) {
            self.daemon_dies();
        }
    }

    fn edit(&mut self) {
        match self.rng.below(10) {
            0 if self.declared.len() < 6 => {
                let name = *self.rng.pick(&POD_NAMES);
                if !self.declared.iter().any(|d| d.name == name) {
                    let declared = Declared::random(&mut self.rng, name, None);
                    self.declared.push(declared);
                }
            }
            1 if self.declared.len() < 6 => {
                let name = *self.rng.pick(&DEPLOYMENT_NAMES);
                if !self.declared.iter().any(|d| d.name == name) {
                    let declared = Declared::random(&mut self.rng, name, Some(2));
                    self.declared.push(declared);
                }
            }
            2 if !self.declared.is_empty() => {
                let index = usize::try_from(self.rng.below(self.declared.len() as u64)).unwrap_or(0);
                self.declared.remove(index);
            }
            3 => self.mode = self.rng.below(3),
            4 if !self.declared.is_empty() && self.rng.chance(self.menu.duplicate * 3) => {
                let mut twin = self.rng.pick(&self.declared.clone()).clone();
                twin.file = if self.rng.chance(50) { "aaa.yaml".into() } else { "zzz.yaml".into() };
                twin.edit(&mut self.rng);
                self.declared.push(twin);
            }
            _ if !self.declared.is_empty() => {
                let index = usize::try_from(self.rng.below(self.declared.len() as u64)).unwrap_or(0);
                let mut declared = self.declared[index].clone();
                declared.edit(&mut self.rng);
                self.say(|| format!("user edits {declared:?}"));
                self.declared[index] = declared;
            }
            _ => {}
        }
        self.declare();
    }

    fn declare(&mut self) {
        self.lower();
        self.say(|| "manifests change".into());
        self.feed(Input::DesiredChanged(self.desired.clone()));
    }

    fn become_calm(&mut self) {
        self.say(|| "calm".into());
        self.calm = true;
        self.world.foreign.clear();
        let forever: Vec<(PodKey, ContainerId)> = self
            .agenda
            .values()
            .filter_map(|happening| match happening {
                Happening::RunEnds { pod, id, code, .. } if *code != 0 => Some((pod.clone(), id.clone())),
                _ => None,
            })
            .collect();
        // What would still crash now is cured; init containers must come to an end, though.
        self.agenda.retain(|_, happening| match happening {
            Happening::RunEnds { pod, id, code, .. } => {
                let init = self.world.run(pod, id).is_some_and(|run| run.role == Role::Init);
                init || (*code == 0 && !forever.contains(&(pod.clone(), id.clone())))
            }
            _ => true,
        });
        if self.core.is_none() && !self.agenda.values().any(|h| matches!(h, Happening::DaemonStarts { .. })) {
            let life = self.life;
            self.at(1, Happening::DaemonStarts { life });
        }
        self.declare();
    }

    /// Is the host what the manifests say?
    fn judge(&self) -> Result<(), String> {
        let Some(core) = &self.core else { return Err("no daemon".into()) };
        if !self.flights.is_empty() || !core.is_idle() {
            return Err(format!("busy with {:?}", self.flights.values().map(brief).collect::<Vec<_>>()));
        }
        let status = core.status();
        if let Some(problem) = status.problems.first() {
            return Err(problem.clone());
        }
        let excused: BTreeSet<&PodKey> = status
            .pods
            .iter()
            .filter(|pod| pod.phase == keel_plan::Phase::Failed || pod.waiting.iter().any(excuses))
            .map(|pod| &pod.key)
            .chain(self.desired.pods.values().filter(|pod| is_never(pod)).map(|pod| &pod.key))
            .collect();
        match core.converged(None) {
            Convergence::Done => {}
            Convergence::Waiting(pods) | Convergence::Failed(pods) => {
                if let Some((key, message)) = pods.iter().find(|(key, _)| !excused.contains(key)) {
                    return Err(format!("{key}: {message}"));
                }
            }
        }
        self.checks.matches(&self.desired, &self.world, &excused)
    }
}

/// What can stay so for ever and is nobody's fault but the manifest's.
fn excuses(waiting: &Waiting) -> bool {
    matches!(
        waiting,
        Waiting::PortTaken { .. } | Waiting::MissingReference { .. } | Waiting::ErrImageNeverPull { .. }
    )
}

/// A container that failed stays as it is.
fn is_never(pod: &DesiredPod) -> bool {
    pod.spec.restart_policy == Some(RestartPolicy::Never)
}

pub(crate) fn brief(action: &Action) -> String {
    match action {
        Action::Pull { image, .. } => format!("pull {image}"),
        Action::CreatePod { pod } => format!("create {}", pod.key),
        Action::StartContainer { pod, container, attempt, .. } => {
            format!("start {}.{container}.{attempt}", pod.key)
        }
        Action::StopContainer { id, .. } => format!("stop {id}"),
        Action::RemoveContainer { id, .. } => format!("remove {id}"),
        Action::SyncVolumes { pod, .. } => format!("sync volumes {}", pod.key),
        Action::UpdateRecord { pod, .. } => format!("record {}", pod.key),
        Action::DeletePod { pod, incarnation, .. } => format!("delete {pod} {incarnation}"),
        Action::SyncNetwork { endpoints, .. } => format!("network of {}", endpoints.len()),
    }
}
