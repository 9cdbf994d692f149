//! Every combination at small scope: from any state that a host can be found in, the plan leads to the desired one,
//! in a bounded number of rounds, and then stays still.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use keel_engine::ports::Done;
use keel_manifest::Object;
use keel_plan::{
    Action, ContainerState, Desired, DesiredPod, Exit, ObservedContainer, ObservedPod, PodKey, Settings,
    account, lower_desired, mark_refreshed, plan, remember_attempt,
};

use crate::checks::Checks;
use crate::world::{World, steps};

const NOW: u64 = 1_750_000_000_000;
/// Pull; stop, remove, delete; create, init, start; records and network between them.
const MAX_ROUNDS: usize = 12;

fn key(name: &str) -> PodKey {
    PodKey { namespace: "default".into(), name: name.into() }
}

fn lower(yaml: &str) -> Desired {
    let parsed = keel_manifest::parse("x.yaml", yaml.as_bytes());
    assert!(parsed.diagnostics.is_empty(), "{:?}", parsed.diagnostics);
    let objects: Vec<Object> = parsed.objects;
    lower_desired(&objects, &BTreeMap::new())
}

fn spec(image: &str, hostname: &str, init: bool, policy: &str) -> String {
    let init = if init { "initContainers: [{name: i, image: \"app:1\"}], " } else { "" };
    format!(
        "{{restartPolicy: {policy}, hostname: {hostname}, {init}containers: [{{name: c, image: \"{image}\"}}]}}"
    )
}

fn pods(specs: &[String]) -> Vec<Arc<DesiredPod>> {
    let make = |spec: &String| {
        let yaml = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {spec}\n");
        lower(&yaml).pods.into_values().next().unwrap()
    };
    specs.iter().map(make).collect()
}

fn states() -> Vec<ContainerState> {
    let exit = |code| {
        ContainerState::Exited(Exit { code, signal: 0, oom: false, started_at: NOW, finished_at: NOW })
    };
    vec![
        ContainerState::Partial,
        ContainerState::Running { pid: 7, started_at: NOW },
        exit(0),
        exit(1),
        ContainerState::Lost { noticed_at: NOW },
    ]
}

fn run(pod: &DesiredPod, name: &str, attempt: u32, state: &ContainerState) -> ObservedContainer {
    let container = pod.containers.iter().find(|c| c.name.0 == name).unwrap();
    ObservedContainer {
        id: pod.container_id(&container.name, attempt),
        name: container.name.clone(),
        role: container.role,
        hash: container.hash.clone(),
        attempt,
        state: state.clone(),
        image_digest: String::new(),
        stand_in: false,
    }
}

fn seen(pod: &Arc<DesiredPod>, ready: bool, containers: Vec<ObservedContainer>) -> ObservedPod {
    ObservedPod {
        pod: pod.clone(),
        incarnation: 99,
        created_at: NOW,
        ready,
        ip: None,
        containers,
        over_limit: None,
    }
}

/// Follows plans until nothing is left to do.
fn follow(desired: &Desired, mut world: World, what: &dyn Fn() -> String) -> usize {
    let settings = Settings::default();
    let mut now = NOW;
    for round in 0..MAX_ROUNDS {
        let mut memory = std::mem::take(&mut world.memory);
        account(&mut memory, desired, &world.observe(), &settings, now);
        let plan = plan(desired, &world.observe(), &memory, &settings, now);
        for planned in &plan.actions {
            match &planned.action {
                Action::StartContainer { pod, container, attempt, .. } => {
                    remember_attempt(&mut memory, pod, pod.container(container).unwrap(), *attempt);
                }
                Action::Pull { image, .. } => {
                    drop(mark_refreshed(&mut memory, desired, &plan.waiting, image))
                }
                _ => {}
            }
        }
        world.memory = memory;
        if plan.actions.is_empty() && plan.waiting.is_empty() {
            Checks::default()
                .matches(desired, &world, &BTreeSet::new())
                .unwrap_or_else(|e| panic!("{e}: {}", what()));
            return round;
        }
        for planned in &plan.actions {
            for step in steps(&planned.action) {
                let done = world.apply(&planned.action, *step, now);
                assert_eq!(done, Ok(Done::Done), "{:?} {}", planned.action, what());
            }
            assert_eq!(world.violations, Vec::<String>::new(), "{}", what());
        }
        // Init containers end, back-off passes.
        now += 400_000;
        let inits: Vec<_> =
            world.live_runs().map(|(pod, run)| (pod.clone(), run.id.clone(), run.name.clone())).collect();
        for (pod, id, name) in inits {
            if name.0 == "i" {
                world.end_run(&pod, &id, 0, now);
            }
        }
    }
    panic!("no end after {MAX_ROUNDS} rounds: {}", what());
}

#[test]
fn one_pod_in_any_state_becomes_the_declared_one() {
    let mut count = 0;
    let mut deepest = 0;
    for (init, policy) in [(false, "Always"), (true, "Always"), (false, "OnFailure"), (true, "OnFailure")] {
        let versions = pods(&[
            spec("app:1", "one", init, policy),
            spec("app:2", "one", init, policy),
            spec("app:1", "two", init, policy),
        ]);
        let mut desireds = vec![Desired { complete: true, ..Desired::default() }];
        desireds.extend(versions.iter().map(|pod| Desired {
            complete: true,
            pods: BTreeMap::from([(pod.key.clone(), pod.clone())]),
            ..Desired::default()
        }));
        let mut worlds: Vec<Option<ObservedPod>> = vec![None];
        for version in &versions {
            worlds.push(Some(seen(version, false, Vec::new())));
            worlds.push(Some(seen(version, true, Vec::new())));
            let before: Vec<ObservedContainer> =
                if init { vec![run(version, "i", 0, &states()[2])] } else { Vec::new() };
            for state in states() {
                if init {
                    worlds.push(Some(seen(version, true, vec![run(version, "i", 0, &state)])));
                }
                let with =
                    |more: Vec<ObservedContainer>| Some(seen(version, true, [before.clone(), more].concat()));
                worlds.push(with(vec![run(version, "c", 0, &state)]));
                for older in states().iter().filter(|older| !matches!(older, ContainerState::Running { .. }))
                {
                    worlds.push(with(vec![run(version, "c", 0, older), run(version, "c", 1, &state)]));
                    // A run of an earlier spec under the record of the present one.
                    worlds.push(with(vec![run(&versions[1], "c", 0, older), run(version, "c", 1, &state)]));
                }
            }
        }
        for desired in &desireds {
            for found in &worlds {
                for image_present in [false, true] {
                    let mut world = World::default();
                    world.pods.extend(found.clone().map(|pod| (key("p"), pod)));
                    if image_present {
                        for image in ["docker.io/library/app:1", "docker.io/library/app:2"] {
                            world.images.insert(image.into(), "sha256:x".into());
                        }
                    }
                    let what = || {
                        format!(
                            "init {init} {policy}\nwant {:?}\nfound {found:?}",
                            desired.pods.values().map(|p| &p.spec).collect::<Vec<_>>()
                        )
                    };
                    deepest = deepest.max(follow(desired, world, &what));
                    count += 1;
                }
            }
        }
    }
    println!("{count} states of one pod, at most {deepest} rounds");
}

#[test]
fn two_replicas_in_any_states_become_the_declared_version_without_overlap() {
    let deployment = |image: &str, hostname: &str| {
        let spec = spec(image, hostname, false, "Always");
        lower(&format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\nspec: {{replicas: 2, selector: {{matchLabels: {{a: b}}}}, strategy: {{type: Recreate}}, template: {{metadata: {{labels: {{a: b}}}}, spec: {spec}}}}}\n"
        ))
    };
    let versions = [deployment("app:1", "one"), deployment("app:2", "one"), deployment("app:1", "two")];
    let mut count = 0;
    for wanted in &versions {
        let found = |name: &str| -> Vec<Option<ObservedPod>> {
            let mut all = vec![None];
            for version in &versions {
                let pod = &version.pods[&key(name)];
                all.push(Some(seen(pod, false, Vec::new())));
                for state in states() {
                    all.push(Some(seen(pod, true, vec![run(pod, "c", 0, &state)])));
                }
            }
            all
        };
        for first in found("d-0") {
            for second in found("d-1") {
                // Two live versions side by side are no state that the engine leaves behind.
                let mut world = World::default();
                world.pods.extend(first.clone().map(|pod| (key("d-0"), pod)));
                world.pods.extend(second.clone().map(|pod| (key("d-1"), pod)));
                let what = || format!("found {first:?} and {second:?}");
                follow(wanted, world, &what);
                count += 1;
            }
        }
    }
    println!("{count} states of two replicas");
}
