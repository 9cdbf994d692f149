//! One shot: `keel apply` without a daemon.

use keel_tests::image::BUSYBOX;
use keel_tests::{Instance, http_get, free_port};

fn pod(name: &str, rest: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    image: {BUSYBOX}\n{rest}"
    )
}

fn sleeper(name: &str) -> String {
    pod(name, "    command: [sh, -c, 'trap \"exit 0\" TERM; while :; do sleep 0.1; done']\n")
}

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
    let manifest = pod(
        "web",
        &format!(
            "    command: [sh, -c, 'mkdir /www; echo hello > /www/index.html; exec httpd -f -p 80 -h /www']\n    ports:\n    - containerPort: 80\n      hostPort: {port}\n"
        ),
    );
    instance.apply(&manifest).expect_code(0);
    let answer = keel_tests::eventually("the published port answers", || http_get(&format!("127.0.0.1:{port}"), "/"));
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
