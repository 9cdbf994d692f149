//! One container's restart on a host where nobody keeps the manifests true: what its shim calls when it has ended.
//!
//! The same observation, accounts and planner as the daemon's, over the pods as they were recorded when they were made.
//! Of the plan, only what follows in this pod is done: starts, of the next container too after an init container, and the
//! removal of runs that are kept no longer. What else there is to do waits for who knows the manifests.
//!
//! Answers with a line, `done` or `wait <milliseconds>`; a failure is one for the shim to try again after.

use std::sync::Arc;
use std::time::Duration;

use keel_engine::ports::Host;
use keel_host::{HostError, Lock, RealHost, now};
use keel_plan::{
    Action, ContainerName, Desired, DesiredPod, Memory, Observed, Planned, Reason, Settings, Waiting,
    account, plan, remember_attempt,
};

use crate::cli::RestartRun;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::instance::{host_config, refused};

/// Whoever holds the lock sees to this container too, or is over soon.
const HELD_MS: u64 = 1000;
/// Containers that have lost their shim get another one on the way; that may end first.
const SETTLE: Duration = Duration::from_secs(10);
/// Removal of a half-made run, start, removal of an old one; more means that the host does not do what it is told.
const ROUNDS: usize = 4;

pub(crate) fn restart_run(context: &Context, args: &RestartRun) -> Outcome {
    let _lock = match Lock::take(&context.paths) {
        Err(HostError::Locked { .. }) => {
            return say(context, Some(HELD_MS));
        }
        taken => taken.map_err(refused)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|error| Failure::io("start", "the runtime of the command", &error))?;
    let host = RealHost::open(context.paths.clone(), host_config(context), runtime.handle().clone());
    let host = host.map_err(refused)?;
    let answer = restart(&host, &args.container);
    host.settle(SETTLE);
    say(context, answer?)
}

fn say(context: &Context, wait_ms: Option<u64>) -> Outcome {
    let answer = wait_ms.map_or("done\n".to_owned(), |ms| format!("wait {ms}\n"));
    context.term.print(&answer).map_err(|error| Failure::io("write to", "the shim", &error))
}

/// `Some`: to be asked again in so many milliseconds.
fn restart(host: &RealHost, run: &str) -> Outcome<Option<u64>> {
    let settings = Settings::default();
    let mut memory = host.load_memory();
    let mut waits = None;
    for _ in 0..ROUNDS {
        let observed = host.observe().map_err(|e| failed("look at the host", &e.0))?;
        let Some((pod, name)) = latest_of(&observed, run) else { return Ok(None) };
        // Every recorded pod: names, ports and old pods of the others count too.
        let desired = Desired {
            pods: observed.pods.iter().map(|(key, seen)| (key.clone(), seen.pod.clone())).collect(),
            ..Desired::default()
        };
        let now = now();
        for id in account(&mut memory, &desired, &observed, &settings, now) {
            save(host, &memory, &id)?;
        }
        let plan = plan(&desired, &observed, &memory, &settings, now);
        let follows: Vec<&Action> =
            plan.actions.iter().filter_map(|planned| follows(planned, &pod)).collect();
        waits = back_off(plan.waiting.get(&pod.key), &name).map(|until| until.saturating_sub(now));
        if follows.is_empty() {
            break;
        }
        for action in follows {
            if let Action::StartContainer { container, attempt, .. } = action
                && let Some(container) = pod.container(container)
            {
                remember_attempt(&mut memory, &pod, container, *attempt);
                save(host, &memory, &pod.id)?;
            }
            host.perform(action, &|_| {}).map_err(|e| failed("restart the container", &e.message))?;
        }
    }
    Ok(waits)
}

fn follows<'a>(planned: &'a Planned, pod: &DesiredPod) -> Option<&'a Action> {
    let ours = match (&planned.action, &planned.reason) {
        (Action::StartContainer { pod: of, .. }, _) => of.key == pod.key,
        // An eviction is another matter.
        (Action::RemoveContainer { pod: of, .. }, Reason::OldRun | Reason::Interrupted) => *of == pod.key,
        _ => false,
    };
    ours.then_some(&planned.action)
}

fn failed(what: &str, why: &str) -> Failure {
    Failure::failed(format!("{what}: {why}"))
}

/// The container of a run that nothing has followed yet.
fn latest_of(observed: &Observed, run: &str) -> Option<(Arc<DesiredPod>, ContainerName)> {
    observed.pods.values().find_map(|seen| {
        let found = seen.containers.iter().find(|found| found.id.0 == run)?;
        let latest = seen.latest(&found.name)?;
        (latest.id == found.id).then(|| (seen.pod.clone(), found.name.clone()))
    })
}

fn save(host: &RealHost, memory: &Memory, id: &keel_plan::PodId) -> Outcome {
    let numbers = memory.pods.get(id);
    let saved = host.save_memory(id, numbers).and_then(|()| host.keep_memory(id, numbers));
    saved.map_err(|e| Failure::failed(format!("save restart counts: {}", e.0)))
}

fn back_off(waiting: Option<&Vec<Waiting>>, name: &ContainerName) -> Option<u64> {
    waiting?.iter().find_map(|waiting| match waiting {
        Waiting::CrashLoopBackOff { container, until } if container == name => Some(*until),
        _ => None,
    })
}
