//! Reading and planning five thousand manifests, without a kernel.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use keel_manifest::Object;
use keel_plan::{Desired, Memory, Observed, Settings, account, lower_desired, plan};

use crate::failure::{Failure, Outcome};
use crate::report::{Aim, Measure};

const MANIFESTS: usize = 5_000;
/// Any moment will do.
const NOW: u64 = 1_700_000_000_000;

pub(crate) fn plans(count: usize) -> Outcome<Vec<Measure>> {
    let texts: Vec<String> = (0..MANIFESTS).map(manifest).collect();
    let objects = parse(&texts)?;
    let desired = lower_desired(&objects, &BTreeMap::new());
    let settings = Settings::default();
    let running = all_running(&desired);
    let mut parsing = Measure::new("plan", format!("parse {MANIFESTS} manifests"), "ms");
    let mut lowering = Measure::new("plan", format!("lower {MANIFESTS} manifests"), "ms");
    let mut cold =
        Measure::new("plan", format!("plan {MANIFESTS} pods, none runs"), "ms").aim(Aim::AtMost(50.0));
    let mut steady =
        Measure::new("plan", format!("plan {MANIFESTS} pods, all run"), "ms").aim(Aim::AtMost(50.0));
    for _ in 0..count {
        timed(&mut parsing, || parse(&texts).map(|objects| objects.len()))?;
        timed(&mut lowering, || Ok(lower_desired(&objects, &BTreeMap::new())))?;
        timed(&mut cold, || Ok(round(&desired, &Observed::default(), &settings)))?;
        let actions = timed(&mut steady, || Ok(round(&desired, &running, &settings)))?;
        if actions != 0 {
            return Err(Failure::new(format!("{actions} actions are planned where all is done")));
        }
    }
    Ok(vec![parsing, lowering, cold, steady])
}

/// What the loop does with each observation.
fn round(desired: &Desired, observed: &Observed, settings: &Settings) -> usize {
    let mut memory = Memory::default();
    account(&mut memory, desired, observed, settings, NOW);
    black_box(plan(desired, observed, &memory, settings, NOW)).actions.len()
}

fn timed<T>(measure: &mut Measure, act: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let start = Instant::now();
    let made = black_box(act()?);
    measure.sample("keel", start.elapsed().as_secs_f64() * 1000.0);
    Ok(made)
}

fn parse(texts: &[String]) -> Outcome<Vec<Object>> {
    let mut objects = Vec::new();
    for text in texts {
        let parsed = keel_manifest::parse("bench.yaml", text.as_bytes());
        if let Some(problem) = parsed.diagnostics.first() {
            return Err(Failure::new(problem.render(false)));
        }
        objects.extend(parsed.objects);
    }
    let problems = keel_manifest::check(&objects);
    problems.first().map_or(Ok(objects), |problem| Err(Failure::new(problem.render(false))))
}

/// A pod as people write them: ports, environment, resources, probes, volumes.
fn manifest(n: usize) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: web-{n}
  namespace: team-{}
  labels: {{app: web, tier: front, shard: '{n}'}}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: docker.io/library/nginx:1.27
    args: [-g, daemon off;]
    env:
    - {{name: LISTEN, value: '0.0.0.0:80'}}
    - {{name: SHARD, value: '{n}'}}
    ports:
    - {{containerPort: 80, name: http}}
    resources:
      limits: {{cpu: 500m, memory: 64Mi}}
    readinessProbe:
      httpGet: {{path: /healthz, port: http}}
      periodSeconds: 5
    volumeMounts:
    - {{name: cache, mountPath: /var/cache}}
  volumes:
  - name: cache
    emptyDir: {{sizeLimit: 16Mi}}
",
        n % 16
    )
}

/// What is seen after everything that the plan said has been done.
fn all_running(desired: &Desired) -> Observed {
    let mut observed = Observed::default();
    for (key, pod) in &desired.pods {
        observed.pods.insert(key.clone(), observed_pod(pod));
        for container in &pod.containers {
            observed.images.insert(container.image.clone(), "sha256:0".into());
        }
    }
    observed
}

fn observed_pod(pod: &std::sync::Arc<keel_plan::DesiredPod>) -> keel_plan::ObservedPod {
    let containers = pod.containers.iter().map(|container| keel_plan::ObservedContainer {
        id: pod.container_id(&container.name, 0),
        name: container.name.clone(),
        role: container.role,
        hash: container.hash.clone(),
        attempt: 0,
        state: keel_plan::ContainerState::Running { pid: 1, started_at: NOW - 1000 },
        image_digest: "sha256:0".into(),
        stand_in: false,
    });
    keel_plan::ObservedPod {
        containers: containers.collect(),
        pod: pod.clone(),
        incarnation: 1,
        created_at: NOW - 1000,
        ready: true,
        ip: None,
        over_limit: None,
    }
}
