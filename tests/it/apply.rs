//! One shot: `keel apply` without a daemon.

use keel_tests::image::BUSYBOX;
use keel_tests::manifest::{SLEEP, pod, server, sleeper};
use keel_tests::{Instance, eventually, free_port, http_get};

#[test]
fn apply_starts_a_pod_and_a_second_apply_does_nothing() {
    let instance = Instance::new();
    instance.import_busybox();
    let first = instance.apply(&sleeper("web")).expect_code(0);
    assert!(first.all().contains("web"), "{}", first.all());
    let pids = instance.pids();
    assert_eq!(pids.len(), 1);
    instance.apply(&sleeper("web")).expect_code(0);
    assert_eq!(instance.pids(), pids, "an unchanged manifest restarts nothing");
}

#[test]
fn a_published_port_answers_and_the_pod_outlives_the_command() {
    let instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    let manifest =
        server("web", "hello", &format!("    ports:\n    - containerPort: 80\n      hostPort: {port}\n"));
    instance.apply(&manifest).expect_code(0);
    let answer = eventually("the published port answers", || http_get(&format!("127.0.0.1:{port}"), "/"));
    assert_eq!((answer.0, answer.1.trim()), (200, "hello"));
}

#[test]
fn a_dry_run_touches_nothing() {
    let instance = Instance::new();
    instance.import_busybox();
    let ran = instance.keel_with_input(&["apply", "-f", "-", "--dry-run"], &sleeper("web")).expect_code(0);
    assert!(ran.all().contains("web"), "{}", ran.all());
    assert!(instance.pids().is_empty());
    assert!(instance.pods().is_empty());
}

#[test]
fn a_changed_variable_restarts_only_its_container() {
    let instance = Instance::new();
    instance.import_busybox();
    let two = |value: &str| {
        format!(
            "{}    env: [{{name: A, value: '{value}'}}]\n  - name: other\n    image: {BUSYBOX}\n{SLEEP}",
            sleeper("web")
        )
    };
    instance.apply(&two("1")).expect_code(0);
    let before = instance.pids();
    let ran = instance.apply(&two("2")).expect_code(0);
    assert!(ran.all().contains("env"), "the reason names the field: {}", ran.all());
    let after = instance.pids();
    assert_eq!((before.len(), after.len()), (2, 2));
    let pid = |pids: &std::collections::BTreeMap<String, u32>, name: &str| {
        pids.iter().find(|(id, _)| id.contains(&format!(".{name}."))).map(|(_, pid)| *pid)
    };
    assert_eq!(pid(&before, "other"), pid(&after, "other"));
    assert_ne!(pid(&before, "main"), pid(&after, "main"));
}

#[test]
fn prune_deletes_what_the_manifests_no_longer_name() {
    let instance = Instance::new();
    instance.import_busybox();
    instance.apply(&format!("{}---\n{}", sleeper("a"), sleeper("b"))).expect_code(0);
    instance.apply(&sleeper("a")).expect_code(0);
    assert_eq!(instance.pods().len(), 2, "without --prune nothing is deleted");
    instance.keel_with_input(&["apply", "-f", "-", "--prune", "--wait"], &sleeper("a")).expect_code(0);
    assert_eq!(instance.pods().keys().collect::<Vec<_>>(), ["a"]);
    let refused = instance.keel_with_input(&["apply", "-f", "-", "--prune"], "").expect_code(2);
    assert!(refused.all().contains("--allow-empty"), "{}", refused.all());
    instance.keel_with_input(&["apply", "-f", "-", "--prune", "--allow-empty", "--wait"], "").expect_code(0);
    assert!(instance.pods().is_empty());
}

#[test]
fn invalid_manifests_are_all_reported_and_nothing_is_touched() {
    let instance = Instance::new();
    instance.write("a.yaml", &sleeper("good"));
    instance.write(
        "b.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: b}\nspec:\n  containers:\n  - name: c\n    imagee: x\n",
    );
    instance.write(
        "sub/c.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: ../x}\nspec: {containers: [{name: c, image: y}]}\n",
    );
    let manifests = instance.manifests();
    let ran = instance.keel(&["apply", "-f", manifests.to_str().unwrap()]).expect_code(2);
    for part in ["b.yaml:7:5", "imagee", "did you mean", "image", "c.yaml:3", "../x"] {
        assert!(ran.all().contains(part), "{part} is missing in:\n{}", ran.all());
    }
    assert!(instance.pods().is_empty());
}

#[test]
fn what_is_not_ready_in_time_ends_with_code_3() {
    let instance = Instance::new();
    instance.import_busybox();
    let never = pod(
        "slow",
        &format!("{SLEEP}    readinessProbe: {{exec: {{command: ['false']}}, periodSeconds: 1}}\n"),
    );
    let ran =
        instance.keel_with_input(&["apply", "-f", "-", "--wait", "--timeout", "3s"], &never).expect_code(3);
    assert!(ran.all().contains("slow"), "{}", ran.all());
    assert_eq!(instance.pids().len(), 1, "it runs all the same");
}

#[test]
fn an_image_that_is_nowhere_fails_its_pod_and_no_other() {
    let instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    let missing = sleeper("bad").replace(BUSYBOX, &format!("127.0.0.1:{port}/no/such:1"));
    let never = missing.replace("    command", "    imagePullPolicy: Never\n    command");
    let ran = instance.apply(&format!("{}---\n{never}", sleeper("good"))).expect_code(6);
    assert!(ran.all().contains("imagePullPolicy is Never"), "{}", ran.all());
    let down = instance.keel_with_input(&["apply", "-f", "-"], &missing).expect_code(1);
    assert!(down.all().contains(&format!("127.0.0.1:{port}")), "{}", down.all());
    assert_eq!(instance.pids().len(), 1);
}

#[test]
fn runc_can_take_the_place_of_the_runtime() {
    let instance = Instance::new().with(&["--runtime", "/usr/sbin/runc"]);
    instance.import_busybox();
    let port = free_port();
    let manifest =
        server("web", "by-runc", &format!("    ports:\n    - containerPort: 80\n      hostPort: {port}\n"));
    instance.apply(&manifest).expect_code(0);
    let answer = eventually("runc's container answers", || http_get(&format!("127.0.0.1:{port}"), "/"));
    assert_eq!(answer.1.trim(), "by-runc");
    let ran = instance.keel(&["exec", "web", "--", "echo", "inside"]).expect_code(0);
    assert_eq!(ran.stdout.trim(), "inside");
}

#[test]
fn two_roots_never_disturb_each_other() {
    let (a, b) = (Instance::new(), Instance::new());
    for instance in [&a, &b] {
        instance.import_busybox();
        instance.apply(&sleeper("web")).expect_code(0);
    }
    let kept = b.pids();
    a.keel(&["delete", "pod/web"]).expect_code(0);
    assert!(a.pids().is_empty());
    a.keel(&["system", "reset", "--force"]).expect_code(0);
    assert_eq!(b.pids(), kept);
    b.apply(&sleeper("web")).expect_code(0);
    assert_eq!(b.pids(), kept);
}

#[test]
fn a_second_actor_on_one_state_directory_is_told_who_holds_it() {
    let mut instance = Instance::new();
    let pid = instance.start_daemon();
    let manifests = instance.manifests();
    let ran = instance.keel(&["daemon", "--manifests", manifests.to_str().unwrap()]).expect_code(5);
    assert!(ran.all().contains(&pid.to_string()), "{}", ran.all());
}

#[test]
fn an_immutable_map_is_not_changed() {
    let instance = Instance::new();
    let map = |value: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\nimmutable: true\ndata: {{v: '{value}'}}\n"
        )
    };
    instance.keel_with_input(&["apply", "-f", "-"], &map("1")).expect_code(0);
    let refused = instance.keel_with_input(&["apply", "-f", "-"], &map("2")).expect_code(2);
    assert!(refused.stderr.contains("ConfigMap default/x is immutable"), "{}", refused.all());
    assert!(refused.stderr.contains(":3:"), "{}", refused.all());
    instance.keel_with_input(&["apply", "-f", "-"], &map("1")).expect_code(0);
    instance.keel(&["delete", "configmap", "x"]).expect_code(0);
    instance.keel_with_input(&["apply", "-f", "-"], &map("2")).expect_code(0);
}

#[test]
fn several_objects_are_stopped_side_by_side() {
    let instance = Instance::new();
    instance.import_busybox();
    // Deaf to the stop signal: each takes its whole grace period.
    let deaf = |name: &str| pod(name, "    command: [sh, -c, 'trap \"\" TERM; sleep 100000 & wait']\n");
    let all = [deaf("a"), deaf("b"), deaf("c")].join("---\n");
    instance.keel_with_input(&["apply", "-f", "-", "--wait"], &all).expect_code(0);
    let ran = instance.keel(&["delete", "pod/a", "pod/b", "pod/c", "-o", "json"]).expect_code(0);
    let stops = |event: &str| -> Vec<usize> {
        let lines = ran.stdout.lines().enumerate();
        lines.filter(|(_, l)| l.contains(event) && l.contains("\"stop\"")).map(|(at, _)| at).collect()
    };
    let (started, finished) = (stops("actionStarted"), stops("actionFinished"));
    assert_eq!((started.len(), finished.len()), (3, 3), "{}", ran.all());
    assert!(started.last() < finished.first(), "{}", ran.all());
    assert!(instance.pids().is_empty());
}

#[test]
fn the_namespace_that_is_asked_for_is_that_of_objects_without_one() {
    let instance = Instance::new();
    let map = |metadata: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{{metadata}}}\n");
    instance.keel_with_input(&["-n", "other", "apply", "-f", "-"], &map("name: x")).expect_code(0);
    let listed = instance.keel(&["get", "cm", "-A", "-o", "name"]).expect_code(0);
    let there = instance.keel(&["-n", "other", "get", "cm", "x"]).expect_code(0);
    assert!(there.stdout.contains('x'), "{}\n{}", there.all(), listed.all());
    instance.keel(&["get", "cm", "x"]).expect_code(4);
    let wrong = map("name: y, namespace: third");
    let refused = instance.keel_with_input(&["-n", "other", "apply", "-f", "-"], &wrong).expect_code(2);
    assert!(refused.stderr.contains("third, and other was asked for"), "{}", refused.all());
    instance.keel_with_input(&["-n", "other", "delete", "-f", "-"], &map("name: x")).expect_code(0);
    instance.keel(&["-n", "other", "get", "cm", "x"]).expect_code(4);
}
