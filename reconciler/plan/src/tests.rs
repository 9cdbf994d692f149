//! Rules of the planner as small scripts: manifests in, plan as lines out, followed on paper round by round.

use std::collections::BTreeMap;
use std::time::Instant;

use keel_manifest::Object;

use crate::*;

const NOW: Millis = 1_750_000_000_000;

/// A host on paper: actions succeed at once.
struct Paper {
    desired: Desired,
    observed: Observed,
    memory: Memory,
    now: Millis,
    next_incarnation: u64,
}

fn objects(yaml: &str) -> Vec<Object> {
    let parsed = keel_manifest::parse("test.yaml", yaml.as_bytes());
    assert!(parsed.diagnostics.is_empty(), "{:?}", parsed.diagnostics);
    parsed.objects
}

fn lower(yaml: &str) -> Desired {
    lower_desired(&objects(yaml), &BTreeMap::new())
}

fn pod(name: &str, rest: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n{rest}\n---\n")
}

const MAIN: &str = "  containers: [{name: c, image: \"app:1\"}]";

/// The image went, and what ran before the host went down went with it.
#[test]
fn a_damaged_image_gives_way_to_the_last_good_one_once_it_cannot_be_pulled_and_only_until_it_can() {
    let mut paper = Paper::new(&pod("p", MAIN));
    let image = "docker.io/library/app:1".to_owned();
    let id = paper.desired.pods.values().next().unwrap().id.clone();
    let reason =
        |paper: &mut Paper| paper.plan().actions.iter().map(|p| p.reason.to_string()).collect::<Vec<_>>();
    let starts = |paper: &mut Paper| {
        paper.plan().actions.iter().any(|p| matches!(p.action, Action::StartContainer { .. }))
    };
    let create = paper.plan().actions[1].action.clone();
    paper.follow(&create, &BTreeMap::new());
    paper.observed.images.clear();
    assert!(!starts(&mut paper));
    paper.observed.damaged.insert(image.clone(), false);
    paper.observed.last_good.insert((id, ContainerName("c".into())), "sha256:1".into());
    assert!(!starts(&mut paper), "the pull comes first");
    paper.observed.damaged.insert(image.clone(), true);
    assert!(starts(&mut paper));
    let start = paper.plan().actions.into_iter().map(|p| p.action);
    for action in start.filter(|action| matches!(action, Action::StartContainer { .. })) {
        paper.follow(&action, &BTreeMap::new());
    }
    let run = |paper: &mut Paper| {
        paper.observed.pods.values_mut().next().unwrap().containers.last_mut().unwrap().stand_in = true;
    };
    run(&mut paper);
    assert_eq!(reason(&mut paper), ["image is not in the store"], "it is asked for while the other one runs");
    paper.observed.damaged.clear();
    paper.observed.images.insert(image, "sha256:2".into());
    assert_eq!(reason(&mut paper), ["the declared image is whole again"]);
}

impl Paper {
    fn new(yaml: &str) -> Paper {
        Paper {
            desired: lower(yaml),
            observed: Observed::default(),
            memory: Memory::default(),
            now: NOW,
            next_incarnation: 0,
        }
    }

    fn plan(&mut self) -> Plan {
        let settings = Settings::default();
        account(&mut self.memory, &self.desired, &self.observed, &settings, self.now);
        plan(&self.desired, &self.observed, &self.memory, &settings, self.now)
    }

    /// The plan of one round as text, without network actions; then it is followed.
    fn round(&mut self) -> String {
        let plan = self.plan();
        let lines: Vec<String> = plan
            .actions
            .iter()
            .filter(|planned| !matches!(planned.action, Action::SyncNetwork { .. }))
            .map(|planned| format!("{}: {}", brief(&planned.action), planned.reason))
            .collect();
        let waits = plan.waiting.iter().flat_map(|(pod, waits)| {
            waits.iter().map(move |wait| format!("{} waits: {}", pod.name, wait.reason()))
        });
        let text = lines.into_iter().chain(waits).collect::<Vec<_>>().join("\n");
        for planned in plan.actions {
            self.follow(&planned.action, &plan.waiting);
        }
        text
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            if self.plan().actions.is_empty() {
                return;
            }
            self.round();
        }
        panic!("does not settle: {}", self.round());
    }

    fn check(&mut self, expected: &str) {
        let lines =
            |text: &str| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n");
        assert_eq!(lines(&self.round()), lines(expected.trim()));
    }

    fn follow(&mut self, action: &Action, waiting: &BTreeMap<PodKey, Vec<Waiting>>) {
        preview_follow(action, &self.desired, waiting, &mut self.observed, &mut self.memory, self.now);
        if let Action::CreatePod { pod } = action {
            self.next_incarnation += 1;
            let made = self.observed.pods.get_mut(&pod.key).unwrap();
            made.incarnation = self.next_incarnation;
            made.created_at = self.now + self.next_incarnation;
        }
    }

    fn end(&mut self, pod: &str, container: &str, code: i32) {
        let key = PodKey { namespace: "default".into(), name: pod.into() };
        let seen = self.observed.pods.get_mut(&key).unwrap();
        let run = seen.containers.iter_mut().rfind(|run| run.name.0 == container).unwrap();
        let ContainerState::Running { started_at, .. } = run.state else { panic!("{} does not run", run.id) };
        run.state =
            ContainerState::Exited(Exit { code, signal: 0, oom: false, started_at, finished_at: self.now });
    }

    /// The run that was just stopped ended with this code.
    fn end_again(&mut self, pod: &str, container: &str, code: i32) {
        let runs = self.observed.pods.values_mut().flat_map(|seen| &mut seen.containers);
        for run in runs.filter(|run| run.name.0 == container && run.id.0.starts_with(pod)) {
            if let ContainerState::Exited(exit) = &mut run.state {
                exit.code = code;
            }
        }
    }

    fn memory_of(&self, pod: &str) -> &ContainerMemory {
        let id = PodId::of(&PodKey { namespace: "default".into(), name: pod.into() });
        &self.memory.pods[&id].containers["c"]
    }
}

fn brief(action: &Action) -> String {
    let run = |id: &ContainerId| id.0.split_once('.').map(|(_, run)| run.to_owned()).unwrap_or_default();
    match action {
        Action::Pull { image, .. } => format!("pull {image}"),
        Action::CreatePod { pod } => format!("create {}", pod.key.name),
        Action::StartContainer { pod, container, attempt, .. } => {
            format!("start {}.{container}.{attempt}", pod.key.name)
        }
        Action::StopContainer { pod, id, .. } => format!("stop {}.{}", pod.name, run(id)),
        Action::RemoveContainer { pod, id } => format!("remove {}.{}", pod.name, run(id)),
        Action::SyncVolumes { pod, .. } => format!("volumes {}", pod.key.name),
        Action::UpdateRecord { pod, .. } => format!("record {}", pod.key.name),
        Action::DeletePod { pod, .. } => format!("delete {}", pod.name),
        Action::SyncNetwork { endpoints, .. } => format!("network {}", endpoints.len()),
    }
}

#[test]
fn a_new_pod_is_pulled_created_and_started_and_then_left_alone() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.check(
        "pull docker.io/library/app:1: image is not in the store
         create web: declared in test.yaml:1, not there yet
         web waits: Pulling",
    );
    host.check("start web.c.0: not started yet");
    host.check("");
}

#[test]
fn the_image_is_there_before_the_old_container_stops() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    host.desired = lower(&pod("web", &MAIN.replace("app:1", "app:2")));
    host.check(
        "pull docker.io/library/app:2: image is not in the store
         web waits: Pulling",
    );
    host.check("stop web.c.0: containers[c].image changed: app:1 -> app:2");
    host.check(
        "record web: containers[c].image changed: app:1 -> app:2
         start web.c.1: the old run is gone",
    );
    host.check("");
}

#[test]
fn fields_that_need_no_restart_change_the_record_only() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    let probe = "  containers: [{name: c, image: \"app:1\", livenessProbe: {tcpSocket: {port: 80}}}]";
    host.desired = lower(&pod("web", &format!("{probe}\n  terminationGracePeriodSeconds: 5")));
    let text = host.round();
    assert!(text.starts_with("record web: containers[c].livenessProbe added"), "{text}");
    host.check("");
}

#[test]
fn a_changed_sandbox_replaces_the_pod_in_reverse_order() {
    let two = "  containers: [{name: a, image: \"app:1\"}, {name: b, image: \"app:1\"}]";
    let mut host = Paper::new(&pod("web", two));
    host.settle();
    host.desired = lower(&pod("web", &format!("{two}\n  hostname: other")));
    host.check(
        "stop web.b.0: hostname added: other
         stop web.a.0: hostname added: other",
    );
    host.check(
        "remove web.b.0: hostname added: other
         remove web.a.0: hostname added: other",
    );
    host.check("delete web: hostname added: other");
    host.check("create web: declared in test.yaml:1, not there yet");
    host.check("start web.a.1: not started yet\nstart web.b.1: not started yet");
    host.check("");
}

#[test]
fn the_first_restart_is_immediate_then_ten_seconds_doubling_to_five_minutes() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    for (restart, wait_s) in [0, 10, 20, 40, 80, 160, 300, 300].into_iter().enumerate() {
        host.end("web", "c", 1);
        let before = host.plan();
        let started = before.actions.iter().any(|p| matches!(p.action, Action::StartContainer { .. }));
        assert_eq!(started, wait_s == 0, "restart {restart}");
        host.now += wait_s * 1000;
        let text = host.round();
        let line = format!("not running: exited 1, restart {}", restart + 1);
        assert!(text.contains(&line), "{text}");
        host.now += 1000;
        host.settle();
        assert_eq!(host.memory_of("web").restarts as usize, restart + 1);
    }
    host.now += 600_000;
    host.end("web", "c", 1);
    assert!(host.round().contains("start web.c.9"), "ten minutes of running start afresh");
}

#[test]
fn a_pod_over_a_limit_is_made_anew_with_the_back_off_of_a_crash() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    for (attempt, wait_s) in [0, 10, 20].into_iter().enumerate() {
        for seen in host.observed.pods.values_mut() {
            seen.over_limit = Some("volume v is over its sizeLimit of 1Mi".into());
        }
        host.check(&format!("stop web.c.{attempt}: volume v is over its sizeLimit of 1Mi"));
        host.check(&format!("remove web.c.{attempt}: volume v is over its sizeLimit of 1Mi"));
        host.check("delete web: volume v is over its sizeLimit of 1Mi");
        host.check("create web: declared in test.yaml:1, not there yet");
        if wait_s > 0 {
            host.check("web waits: CrashLoopBackOff");
        }
        host.now += wait_s * 1000;
        host.check(&format!("start web.c.{}: not started yet", attempt + 1));
        assert_eq!(host.memory_of("web").restarts as usize, attempt + 1);
    }
}

#[test]
fn a_job_over_a_limit_has_failed_and_does_not_come_again() {
    let mut host = Paper::new(&pod("web", &format!("  restartPolicy: Never\n{MAIN}")));
    host.settle();
    for seen in host.observed.pods.values_mut() {
        seen.over_limit = Some("too much".into());
    }
    host.check("stop web.c.0: too much");
    host.end_again("web", "c", 137);
    host.check("remove web.c.0: too much");
    host.check("delete web: too much");
    host.check("");
}

#[test]
fn one_exit_is_counted_once_and_a_clock_set_back_does_not_hold_a_restart() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    host.end("web", "c", 1);
    host.settle();
    host.end("web", "c", 1);
    for _ in 0..5 {
        host.plan();
    }
    assert_eq!(host.memory_of("web").restarts, 2);
    host.now -= 3_600_000;
    host.plan();
    assert!(host.memory_of("web").backoff_until <= host.now + 20_000);
}

#[test]
fn nothing_is_deleted_while_sources_are_incomplete() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    host.desired = Desired { complete: false, ..Desired::default() };
    host.check("");
    host.desired.complete = true;
    host.check("stop web.c.0: no longer declared");
    host.check("remove web.c.0: no longer declared");
    host.check("delete web: no longer declared");
    host.check("");
}

#[test]
fn no_new_pod_of_a_deployment_starts_before_the_old_ones_are_gone() {
    let yaml = |image: &str| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web}}\nspec:\n  replicas: 2\n  selector: {{matchLabels: {{a: b}}}}\n  strategy: {{type: Recreate}}\n  template:\n    metadata: {{labels: {{a: b}}}}\n    spec: {{containers: [{{name: c, image: \"{image}\"}}]}}\n"
        )
    };
    let mut host = Paper::new(&yaml("app:1"));
    host.settle();
    host.desired = lower(&yaml("app:2"));
    host.round();
    host.check(
        "stop web-0.c.0: containers[c].image changed: app:1 -> app:2
         stop web-1.c.0: containers[c].image changed: app:1 -> app:2",
    );
    // One of them still runs: the other must wait for it.
    let key = PodKey { namespace: "default".into(), name: "web-1".into() };
    host.observed.pods.get_mut(&key).unwrap().containers[0].state =
        ContainerState::Running { pid: 1, started_at: NOW };
    host.check(
        "record web-0: containers[c].image changed: app:1 -> app:2
         stop web-1.c.0: containers[c].image changed: app:1 -> app:2
         web-0 waits: WaitingForOldPods",
    );
    host.check(
        "start web-0.c.1: the old run is gone
         record web-1: containers[c].image changed: app:1 -> app:2
         start web-1.c.1: the old run is gone",
    );
    host.check("");
}

/// A pod whose only container takes its environment as `env` says, beside a ConfigMap with a binary key.
fn env_of(env: &str) -> Result<Vec<(String, String)>, String> {
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: \"1\"}\nbinaryData: {b: eA==}\n---\n";
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {nul: AAEC}\n---\n";
    let main = format!("  containers: [{{name: c, image: \"app:1\", {env}}}]");
    let desired = lower(&format!("{map}{secret}{}", pod("web", &main)));
    if let Some(problem) = desired.unresolved.values().next() {
        return Err(problem.to_string());
    }
    let pod = desired.pods.values().next().unwrap();
    Ok(expand_env(&pod.resolved.env[&pod.containers[0].name], &|_| String::new(), &|_| 0))
}

#[test]
fn environments_take_no_binary_data() {
    assert_eq!(env_of("envFrom: [{configMapRef: {name: m}}]").unwrap(), [("a".to_owned(), "1".to_owned())]);
    let by_key = "env: [{name: B, valueFrom: {configMapKeyRef: {name: m, key: b}}}]";
    assert_eq!(env_of(by_key).unwrap_err(), "ConfigMap default/m has no key \"b\"");
    let problem = env_of("envFrom: [{secretRef: {name: s}}]").unwrap_err();
    assert!(problem.contains("\"nul\" of Secret default/s is not text"), "{problem}");
}

#[test]
fn init_containers_run_in_order_and_a_failed_one_holds_the_rest() {
    let spec = "  restartPolicy: Never\n  initContainers: [{name: i, image: \"app:1\"}, {name: j, image: \"app:1\"}]\n";
    let mut host = Paper::new(&pod("job", &format!("{spec}{MAIN}")));
    host.round();
    host.check("start job.i.0: not started yet\njob waits: PodInitializing");
    host.check("start job.j.0: not started yet\njob waits: PodInitializing");
    let key = PodKey { namespace: "default".into(), name: "job".into() };
    let seen = host.observed.pods.get_mut(&key).unwrap();
    seen.containers[1].state =
        ContainerState::Exited(Exit { code: 1, signal: 0, oom: false, started_at: NOW, finished_at: NOW });
    host.check("job waits: PodInitializing");
    let status = pod_status(&key, &host.desired, &host.observed, &host.memory, &Facts::default());
    assert_eq!(status.phase, Phase::Failed);
}

#[test]
fn a_completed_pod_does_not_run_again_after_a_reboot() {
    let mut host = Paper::new(&pod("job", &format!("  restartPolicy: OnFailure\n{MAIN}")));
    host.settle();
    host.end("job", "c", 0);
    host.settle();
    host.observed.pods.clear();
    host.check("");
    let key = PodKey { namespace: "default".into(), name: "job".into() };
    let status = pod_status(&key, &host.desired, &host.observed, &host.memory, &Facts::default());
    assert_eq!(status.phase, Phase::Succeeded);
}

#[test]
fn the_first_owner_of_a_host_port_keeps_it() {
    let port = "  containers: [{name: c, image: \"app:1\", ports: [{containerPort: 80, hostPort: 8080}]}]";
    let mut host = Paper::new(&pod("zeta", port));
    host.settle();
    host.desired = lower(&(pod("zeta", port) + &pod("alpha", port)));
    host.check("alpha waits: PortTaken");
    host.desired = lower(&pod("alpha", port));
    host.settle();
    assert_eq!(host.observed.pods.len(), 1);
    assert_eq!(host.observed.pods.keys().next().unwrap().name, "alpha");
}

#[test]
fn a_changed_config_map_swaps_volumes_and_restarts_only_users_of_its_environment() {
    let yaml = |value: &str| {
        let volume = "  containers: [{name: c, image: \"app:1\", volumeMounts: [{name: v, mountPath: /v}]}]\n  volumes: [{name: v, configMap: {name: m}}]";
        let env = "  containers: [{name: c, image: \"app:1\", envFrom: [{configMapRef: {name: m}}]}]";
        let map =
            format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\ndata: {{KEY: \"{value}\"}}\n");
        pod("env", env) + &pod("vol", volume) + &map
    };
    let mut host = Paper::new(&yaml("1"));
    host.settle();
    host.desired = lower(&yaml("2"));
    host.check(
        "stop env.c.0: contents of a referenced ConfigMap or Secret changed
         volumes vol: contents of a mounted ConfigMap or Secret changed",
    );
    host.check(
        "record env: contents of a referenced ConfigMap or Secret changed
         start env.c.1: the old run is gone",
    );
    host.check("");
}

#[test]
fn a_missing_reference_holds_the_pod_and_says_what_is_missing() {
    let env = "  containers: [{name: c, image: \"app:1\", envFrom: [{secretRef: {name: s}}]}]";
    let mut host = Paper::new(&pod("web", env));
    let key = PodKey { namespace: "default".into(), name: "web".into() };
    assert_eq!(host.desired.unresolved[&key], "Secret default/s does not exist");
    host.check("web waits: MissingReference");
    host.desired = lower(&pod("web", &env.replace("name: s", "name: s, optional: true")));
    host.settle();
    assert_eq!(host.observed.pods.len(), 1);
}

#[test]
fn of_two_declarations_the_recorded_owner_counts_and_the_other_is_named() {
    let parse = |file: &str, image: &str| {
        keel_manifest::parse(file, pod("web", &MAIN.replace("app:1", image)).as_bytes()).objects
    };
    let all = [parse("a.yaml", "a:1"), parse("b.yaml", "b:1")].concat();
    let first = lower_desired(&all, &BTreeMap::new());
    assert_eq!(first.pods.values().next().unwrap().origin.file, "a.yaml");
    let owners = BTreeMap::from([(all[0].key(), "b.yaml".to_owned())]);
    let owned = lower_desired(&all, &owners);
    assert_eq!(owned.pods.values().next().unwrap().origin.file, "b.yaml");
    assert_eq!(owned.conflicts[0].ignored.file, "a.yaml");
}

#[test]
fn moving_a_declaration_changes_nothing() {
    let mut host = Paper::new(&pod("web", MAIN));
    host.settle();
    let moved = keel_manifest::parse("other.yaml", pod("web", MAIN).as_bytes()).objects;
    host.desired = lower_desired(&moved, &BTreeMap::new());
    host.check("");
}

#[test]
fn secrets_are_not_in_records_reasons_or_differences() {
    let yaml = |value: &str| {
        let env = format!(
            "  containers: [{{name: c, image: \"app:1\", env: [{{name: DB_PASSWORD, value: {value}}}], envFrom: [{{secretRef: {{name: s}}}}]}}]"
        );
        pod("web", &env)
            + &format!(
                "apiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\nstringData: {{TOKEN: {value}}}\n"
            )
    };
    let mut host = Paper::new(&yaml("hunter1"));
    host.settle();
    host.desired = lower(&yaml("hunter2"));
    let text = host.round();
    assert!(text.contains("stop web.c.0") && !text.contains("hunter"), "{text}");
    let resolved = serde_json::to_string(host.desired.pods.values().next().unwrap()).unwrap();
    assert!(!resolved.contains("TOKEN"), "{resolved}");
}

#[test]
fn an_image_is_pulled_with_the_logins_of_all_its_pods() {
    let with = |name: &str, secrets: &str| pod(name, &format!("  imagePullSecrets: [{secrets}]\n{MAIN}"));
    let yaml = with("a", "{name: absent}, {name: new}")
        + &with("b", "{name: old}, {name: new}")
        + &with("c", "")
        + "apiVersion: v1\nkind: Secret\nmetadata: {name: new}\ntype: kubernetes.io/dockerconfigjson\n\
           stringData: {.dockerconfigjson: '{\"auths\":{\"r\":{\"auth\":\"bmV3\"}}}'}\n---\n\
           apiVersion: v1\nkind: Secret\nmetadata: {name: old}\ntype: kubernetes.io/dockercfg\n\
           stringData: {.dockercfg: '{\"r\":{\"auth\":\"b2xk\"}}'}\n";
    let plan = Paper::new(&yaml).plan();
    let pulls: Vec<_> = plan
        .actions
        .iter()
        .filter_map(|p| match &p.action {
            Action::Pull { secrets, .. } => Some(secrets),
            _ => None,
        })
        .collect();
    assert_eq!(pulls.len(), 1);
    let shown: Vec<String> = pulls[0]
        .iter()
        .map(|s| match &s.config {
            Ok(config) => format!("{}: {}", s.name, String::from_utf8_lossy(config)),
            Err(problem) => format!("{}: {problem}", s.name),
        })
        .collect();
    assert_eq!(
        shown,
        [
            "Secret default/absent: Secret default/absent does not exist",
            "Secret default/new: {\"auths\":{\"r\":{\"auth\":\"bmV3\"}}}",
            "Secret default/old: {\"auths\":{\"r\":{\"auth\":\"b2xk\"}}}",
        ]
    );
    assert!(!format!("{plan:?}").contains("bmV3"), "no secret in a message");
}

#[test]
fn another_pull_secret_restarts_nothing() {
    let yaml = |secrets: &str| pod("web", &format!("{secrets}{MAIN}"));
    let mut host = Paper::new(&yaml(""));
    host.settle();
    host.desired = lower(&yaml("  imagePullSecrets: [{name: s}]\n"));
    let text = host.round();
    assert!(text.starts_with("record web: "), "{text}");
    assert_eq!(host.round(), "");
}

/// `cargo test --release -p keel-plan plan_time -- --nocapture` prints the figures; here it is only a sanity bound.
#[test]
fn plan_time_of_five_thousand_pods() {
    let yaml: String = (0..5000).map(|index| pod(&format!("pod-{index}"), MAIN)).collect();
    let objects = objects(&yaml);
    let started = Instant::now();
    let desired = lower_desired(&objects, &BTreeMap::new());
    println!("lower 5000: {:?}", started.elapsed());
    let mut host = Paper { desired, ..Paper::new("") };
    let cold = Instant::now();
    host.plan();
    println!("plan 5000, nothing there: {:?}", cold.elapsed());
    host.settle();
    let mut times: Vec<_> = (0..11)
        .map(|_| {
            let started = Instant::now();
            assert!(host.plan().actions.is_empty());
            started.elapsed()
        })
        .collect();
    times.sort();
    println!("plan 5000, nothing to do: median {:?}", times[5]);
    assert!(times[0].as_secs() < 2, "{times:?}");
}
