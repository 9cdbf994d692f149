//! Start order, end, restart.

use std::time::{Duration, Instant};

use keel_tests::image::BUSYBOX;
use keel_tests::{eventually, eventually_or};

use super::{WAIT, await_phase, container_status, fresh, job, logs, main_status, pod, up};

#[test]
fn a_pod_that_is_done_has_succeeded_or_failed() {
    let instance = fresh();
    instance.apply(&job("good", "", "command: ['true']")).expect_code(0);
    await_phase(&instance, "good", "Succeeded");
    // It may run for a moment before it fails: then the apply has seen what was asked for.
    instance.apply(&job("bad", "", "command: [sh, -c, 'exit 7']"));
    await_phase(&instance, "bad", "Failed");
    let ended = &main_status(&instance, "bad")["state"]["terminated"];
    assert_eq!((&ended["exitCode"], &ended["reason"]), (&7.into(), &"Error".into()), "{ended:#}");
    assert_eq!(main_status(&instance, "good")["state"]["terminated"]["reason"], "Completed");
    assert_eq!(main_status(&instance, "bad")["restartCount"], 0);
}

#[test]
fn on_failure_restarts_until_it_succeeds() {
    let mut instance = fresh();
    let script = "n=$(cat /v/n 2>/dev/null || echo 0); echo $((n+1)) > /v/n; [ $n = 1 ]";
    instance.write(
        "retry.yaml",
        &pod(
            "retry",
            "restartPolicy: OnFailure\nvolumes: [{name: v, emptyDir: {}}]",
            &format!("command: [sh, -c, '{script}']\nvolumeMounts: [{{name: v, mountPath: /v}}]"),
        ),
    );
    instance.start_daemon();
    await_phase(&instance, "retry", "Succeeded");
    assert_eq!(main_status(&instance, "retry")["restartCount"], 1);
}

#[test]
fn always_restarts_also_what_ended_well() {
    let mut instance = fresh();
    instance.write("again.yaml", &pod("again", "", "command: ['true']"));
    instance.start_daemon();
    eventually_or(
        || format!("it is restarted: {:#}", instance.pod("again")["status"]),
        || main_status(&instance, "again")["restartCount"].as_u64().filter(|count| *count >= 1),
    );
    eventually_or(
        || format!("the second restart waits: {:#}", main_status(&instance, "again")),
        || {
            (main_status(&instance, "again")["state"]["waiting"]["reason"] == "CrashLoopBackOff")
                .then_some(())
        },
    );
    assert_eq!(instance.pod("again")["status"]["phase"], "Running", "as the kubelet says it");
}

/// Until a container has set its trap it would end at once.
fn await_log(instance: &keel_tests::Instance, pod: &str, text: &str) {
    eventually("the container is ready", || {
        instance.keel(&["logs", pod]).stdout.contains(text).then_some(())
    });
}

#[test]
fn the_stop_signal_comes_first_and_the_kill_after_the_grace() {
    let instance = up(&format!(
        "{}---\n{}",
        pod(
            "polite",
            "volumes: [{name: v, hostPath: {path: /tmp}}]",
            "command: [sh, -c, 'trap \"echo told; exit 0\" TERM; echo trapped; sleep 100000 & wait']"
        ),
        pod(
            "stubborn",
            "",
            "command: [sh, -c, 'trap \"\" TERM; echo trapped; while :; do sleep 1000; done']"
        ),
    ));
    await_log(&instance, "polite", "trapped");
    await_log(&instance, "stubborn", "trapped");
    let began = Instant::now();
    instance.keel(&["delete", "pod/polite"]).expect_code(0);
    let polite = began.elapsed();
    assert!(polite < Duration::from_millis(1900), "it ends at the signal, not after the grace: {polite:?}");
    let began = Instant::now();
    instance.keel(&["delete", "pod/stubborn"]).expect_code(0);
    let stubborn = began.elapsed();
    assert!(stubborn >= Duration::from_millis(2000), "it has its two seconds: {stubborn:?}");
    assert!(stubborn < Duration::from_secs(8), "and no more: {stubborn:?}");
    assert!(instance.pids().is_empty());
}

#[test]
fn init_containers_run_in_order_and_leave_their_results() {
    let init = |name: &str, script: &str| {
        format!(
            "- name: {name}\n  image: {BUSYBOX}\n  command: [sh, -c, '{script}']\n  volumeMounts: [{{name: v, mountPath: /v}}]\n"
        )
    };
    let fields = format!(
        "volumes: [{{name: v, emptyDir: {{}}}}]\ninitContainers:\n{}{}",
        init("first", "usleep 200000; echo first >> /v/log"),
        init("second", "echo second >> /v/log"),
    );
    let instance =
        up(&job("once", &fields, "command: [cat, /v/log]\nvolumeMounts: [{name: v, mountPath: /v}]"));
    assert_eq!(logs(&instance, "once"), "first\nsecond");
    for name in ["first", "second"] {
        let status = container_status(&instance, "once", "initContainerStatuses", name);
        assert_eq!(status["state"]["terminated"]["reason"], "Completed", "{status:#}");
    }
}

#[test]
fn a_failed_init_container_keeps_the_others_from_starting() {
    let instance = fresh();
    let fields = format!(
        "initContainers:\n- {{name: first, image: '{BUSYBOX}', command: [sh, -c, 'exit 3']}}\n- {{name: second, image: '{BUSYBOX}', command: ['true']}}\n"
    );
    let ran = instance.apply(&job("bad", &fields, WAIT));
    assert_eq!(ran.code(), 1, "{}", ran.all());
    let pod = await_phase(&instance, "bad", "Failed");
    assert!(instance.pids().is_empty(), "{pod:#}");
    let first = container_status(&instance, "bad", "initContainerStatuses", "first");
    assert_eq!(first["state"]["terminated"]["exitCode"], 3, "{first:#}");
    let second = container_status(&instance, "bad", "initContainerStatuses", "second");
    assert!(second["state"]["waiting"].is_object(), "{second:#}");
    assert!(main_status(&instance, "bad")["state"]["waiting"].is_object());
}

#[test]
fn an_init_container_is_tried_again_where_the_policy_restarts() {
    let mut instance = fresh();
    let script = "test -f /v/seen && exit 0; touch /v/seen; exit 1";
    let fields = format!(
        "volumes: [{{name: v, emptyDir: {{}}}}]\ninitContainers:\n- {{name: init, image: '{BUSYBOX}', command: [sh, -c, '{script}'], volumeMounts: [{{name: v, mountPath: /v}}]}}\n"
    );
    instance.write("web.yaml", &pod("web", &fields, WAIT));
    instance.start_daemon();
    instance.await_ready("web");
    let init = container_status(&instance, "web", "initContainerStatuses", "init");
    assert_eq!(init["restartCount"], 1, "{init:#}");
}
