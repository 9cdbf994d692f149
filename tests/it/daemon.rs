//! The loop: `keel daemon` over a directory.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;

use keel_tests::manifest::{SLEEP, pod, sleeper};
use keel_tests::{Instance, eventually, eventually_or, is_alive, is_ready};
use serde_json::Value;

fn restarts(pod: &Value) -> u64 {
    pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0)
}

/// Waits until the daemon has looked at the directory again after a change.
fn settle(instance: &Instance) {
    instance.keel(&["reconcile"]).expect_code(0);
}

#[test]
fn files_come_change_and_go() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.start_daemon();
    instance.write("web.yaml", &sleeper("web"));
    instance.await_ready("web");
    let first = instance.pids();
    instance.write("web.yaml", &pod("web", &format!("{SLEEP}    env: [{{name: A, value: b}}]\n")));
    eventually("the change arrives", || {
        let now = instance.pids();
        (now.len() == 1 && now != first).then_some(())
    });
    instance.write("other.yaml", &sleeper("other"));
    instance.await_ready("other");
    fs::remove_file(instance.manifests().join("web.yaml")).unwrap();
    eventually("the pod of the removed file goes", || instance.pod("web").is_null().then_some(()));
    assert!(is_ready(&instance.pod("other")));
}

#[test]
fn twenty_pods_keep_their_processes_when_the_daemon_is_killed() {
    let mut instance = Instance::new();
    instance.import_busybox();
    for n in 0..20 {
        instance.write(&format!("p{n}.yaml"), &sleeper(&format!("p{n}")));
    }
    instance.start_daemon();
    let ready = |instance: &Instance| {
        let pods = instance.pods();
        (pods.len() == 20 && pods.values().all(is_ready)).then_some(())
    };
    eventually_or(|| format!("20 pods are ready\n{}", instance.daemon_log()), || ready(&instance));
    let before = instance.pids();
    assert_eq!(before.len(), 20);
    for _ in 0..3 {
        instance.kill_daemon();
        assert!(before.values().all(|pid| is_alive(*pid)), "containers outlive the daemon");
        instance.start_daemon();
        settle(&instance);
        eventually("all are ready again", || ready(&instance));
        assert_eq!(instance.pids(), before, "the same processes");
    }
    assert!(instance.stop_daemon().success());
    assert!(before.values().all(|pid| is_alive(*pid)), "containers outlive SIGTERM");
}

#[test]
fn two_hundred_pods_in_one_directory() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let text: BTreeMap<String, String> =
        (0..200).map(|n| (format!("p{n}.yaml"), sleeper(&format!("p{n}")))).collect();
    for (name, text) in &text {
        instance.write(name, text);
    }
    instance.start_daemon();
    eventually_or(
        || format!("200 pods are ready: {}\n{}", instance.pids().len(), instance.daemon_log()),
        || (instance.pods().values().filter(|pod| is_ready(pod)).count() == 200).then_some(()),
    );
    for name in text.keys() {
        fs::remove_file(instance.manifests().join(name)).unwrap();
    }
    fs::write(instance.manifests().join("keep.yaml"), sleeper("keep")).unwrap();
    eventually("so many do not go without a word", || {
        instance.keel(&["status"]).all().contains("200 of the 200 objects").then_some(())
    });
    instance.keel(&["reconcile", "--accept-removals"]).expect_code(0);
    eventually_or(
        || format!("only one pod is left: {}", instance.pids().len()),
        || (instance.pods().keys().collect::<Vec<_>>() == ["keep"]).then_some(()),
    );
}

#[test]
fn every_way_of_saving_a_file_is_one_change() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let text = |value: u32| pod("web", &format!("{SLEEP}    env: [{{name: V, value: '{value}'}}]\n"));
    let dir = instance.manifests();
    let path = dir.join("web.yaml");
    fs::write(&path, text(0)).unwrap();
    instance.start_daemon();
    instance.await_ready("web");
    let mut runs = 1;
    let mut expect_one_more = |instance: &Instance, way: &str| {
        runs += 1;
        let wanted = format!(".main.{}", runs - 1);
        eventually_or(
            || format!("{way}: run {wanted}, have {:?}\n{}", instance.pids(), instance.daemon_log()),
            || instance.pids().keys().any(|id| id.ends_with(&wanted)).then_some(()),
        );
        settle(instance);
        assert_eq!(instance.pids().len(), 1, "{way}");
        assert!(instance.pids().keys().all(|id| id.ends_with(&wanted)), "{way}: more than one restart");
    };
    // Truncate and write, in two steps.
    let mut file = fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut file, text(1).as_bytes()).unwrap();
    drop(file);
    expect_one_more(&instance, "truncate and write");
    // Rename over.
    fs::write(dir.join(".web.new"), text(2)).unwrap();
    fs::rename(dir.join(".web.new"), &path).unwrap();
    expect_one_more(&instance, "rename over");
    // vim: a probe file, the old one moved to a backup, a new one written, the backup removed.
    fs::write(dir.join("4913"), "").unwrap();
    fs::remove_file(dir.join("4913")).unwrap();
    fs::rename(&path, dir.join("web.yaml~")).unwrap();
    fs::write(&path, text(3)).unwrap();
    fs::remove_file(dir.join("web.yaml~")).unwrap();
    expect_one_more(&instance, "vim");
}

#[test]
fn a_data_symlink_swap_is_one_change() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let dir = instance.manifests();
    let revision = |n: u32| {
        let at = dir.join(format!("..rev{n}"));
        fs::create_dir(&at).unwrap();
        for name in ["a", "b"] {
            fs::write(
                at.join(format!("{name}.yaml")),
                pod(name, &format!("{SLEEP}    env: [{{name: V, value: '{n}'}}]\n")),
            )
            .unwrap();
        }
        symlink(format!("..rev{n}"), dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    revision(1);
    for name in ["a", "b"] {
        symlink(format!("..data/{name}.yaml"), dir.join(format!("{name}.yaml"))).unwrap();
    }
    instance.start_daemon();
    instance.await_ready("a");
    instance.await_ready("b");
    revision(2);
    eventually_or(
        || format!("both pods run anew: {:?}\n{}", instance.pids(), instance.daemon_log()),
        || {
            let pids = instance.pids();
            (pids.len() == 2 && pids.keys().all(|id| id.ends_with(".main.1"))).then_some(())
        },
    );
}

#[test]
fn a_broken_file_keeps_its_last_good_version_even_over_a_restart() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web"));
    instance.start_daemon();
    instance.await_ready("web");
    let pids = instance.pids();
    instance
        .write("web.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: x");
    eventually("the status names the broken file", || {
        instance.keel(&["status"]).all().contains("web.yaml").then_some(())
    });
    settle(&instance);
    assert_eq!(instance.pids(), pids);
    instance.kill_daemon();
    instance.start_daemon();
    settle(&instance);
    assert_eq!(instance.pids(), pids, "the last good version is known to the next daemon");
    instance.write("web.yaml", &sleeper("web"));
    eventually("the file is good again", || {
        (!instance.keel(&["status"]).all().contains("invalid")).then_some(())
    });
    assert_eq!(instance.pids(), pids);
}

#[test]
fn a_directory_that_vanishes_or_is_suddenly_empty_deletes_nothing() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web"));
    instance.start_daemon();
    instance.await_ready("web");
    let pids = instance.pids();
    let aside = instance.path().join("aside");
    fs::rename(instance.manifests(), &aside).unwrap();
    eventually("the status says that the directory is gone", || {
        instance.keel(&["status"]).all().contains("does not exist").then_some(())
    });
    assert_eq!(instance.pids(), pids);
    fs::create_dir(instance.manifests()).unwrap();
    eventually("the status says that it is empty", || {
        instance.keel(&["status"]).all().contains("suddenly empty").then_some(())
    });
    assert_eq!(instance.pids(), pids);
    instance.kill_daemon();
    instance.start_daemon();
    settle(&instance);
    assert_eq!(instance.pids(), pids, "also for a daemon that starts over the empty directory");
    instance.kill_daemon();
    instance.start_daemon_with(&["--allow-empty"]);
    eventually("with --allow-empty it is taken at its word", || instance.pids().is_empty().then_some(()));
}

#[test]
fn most_of_a_directory_going_at_once_waits_for_a_word() {
    let mut instance = Instance::new();
    let config =
        |n: usize| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c{n}}}\ndata: {{a: '1'}}\n");
    for n in 0..8 {
        instance.write(&format!("c{n}.yaml"), &config(n));
    }
    instance.start_daemon();
    let names = |instance: &Instance| -> Vec<String> {
        let ran = instance.keel(&["get", "configmap", "-o", "name"]).expect_code(0);
        ran.stdout.lines().map(str::to_owned).collect()
    };
    eventually("all are there", || (names(&instance).len() == 8).then_some(()));
    // Moved to one file: nothing is gone.
    let all: Vec<String> = (0..8).map(config).collect();
    for n in 0..8 {
        fs::remove_file(instance.manifests().join(format!("c{n}.yaml"))).unwrap();
    }
    instance.write("all.yaml", &all.join("---\n"));
    settle(&instance);
    assert_eq!(names(&instance).len(), 8);
    instance.write("all.yaml", &all[..3].join("---\n"));
    eventually("the status says what would go", || {
        instance.keel(&["status"]).all().contains("5 of the 8 objects").then_some(())
    });
    assert_eq!(names(&instance).len(), 8);
    instance.kill_daemon();
    instance.start_daemon();
    eventually("it says so again", || {
        instance.keel(&["status"]).all().contains("5 of the 8 objects").then_some(())
    });
    assert_eq!(names(&instance).len(), 8, "also for a daemon that starts over it");
    instance.keel(&["reconcile", "--accept-removals"]).expect_code(0);
    eventually("confirmed, it is taken at its word", || (names(&instance).len() == 3).then_some(()));
    instance.write("all.yaml", &all[0]);
    eventually("a few may go", || (names(&instance).len() == 1).then_some(()));
    fs::remove_file(instance.manifests().join("all.yaml")).unwrap();
    eventually("an empty directory is asked about", || {
        instance.keel(&["status"]).all().contains("--accept-removals").then_some(())
    });
    instance.keel(&["reconcile", "--accept-removals"]).expect_code(0);
    eventually("and taken at its word", || names(&instance).is_empty().then_some(()));
}

#[test]
fn crash_back_off_counts_and_survives_the_daemon() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("bad.yaml", &pod("bad", "    command: [sh, -c, 'exit 3']\n"));
    instance.start_daemon();
    let waiting = |pod: &Value| {
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    };
    let pod = eventually_or(
        || format!("{:#}\n{}", instance.pod("bad")["status"], instance.daemon_log()),
        || Some(instance.pod("bad")).filter(waiting),
    );
    assert_eq!(restarts(&pod), 1, "the first restart is immediate: {:#}", pod["status"]);
    let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!(last["exitCode"], 3, "{:#}", pod["status"]);
    instance.kill_daemon();
    instance.start_daemon();
    settle(&instance);
    let pod = eventually_or(
        || format!("the back-off goes on: {:#}", instance.pod("bad")["status"]),
        || Some(instance.pod("bad")).filter(waiting),
    );
    assert!(restarts(&pod) >= 1, "{:#}", pod["status"]);
}

#[test]
fn a_failing_liveness_probe_restarts_the_container() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let probe = "    livenessProbe: {exec: {command: [test, -e, /tmp/alive]}, periodSeconds: 1, failureThreshold: 1}\n";
    let command = "    command: [sh, -c, 'touch /tmp/alive; trap \"exit 0\" TERM; sleep 100000 & wait']\n";
    instance.write("web.yaml", &pod("web", &format!("{command}{probe}")));
    instance.start_daemon();
    instance.await_ready("web");
    let before = instance.pids();
    instance.keel(&["exec", "web", "--", "rm", "/tmp/alive"]).expect_code(0);
    eventually_or(
        || format!("it is restarted: {:#}\n{}", instance.pod("web")["status"], instance.daemon_log()),
        || {
            let now = instance.pids();
            (now.len() == 1 && now != before).then_some(())
        },
    );
    eventually("the restart is counted", || (restarts(&instance.pod("web")) == 1).then_some(()));
}

#[test]
fn a_killed_shim_is_replaced_and_its_container_lives() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web"));
    instance.start_daemon();
    instance.await_ready("web");
    let pids = instance.pids();
    let id = pids.keys().next().unwrap().clone();
    let shim = |instance: &Instance| -> Option<i32> {
        let text =
            fs::read_to_string(instance.run_dir().join("containers").join(&id).join("shim.pid")).ok()?;
        text.split(' ').next()?.parse().ok()
    };
    let first = shim(&instance).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL).unwrap();
    settle(&instance);
    eventually_or(
        || format!("a new shim adopts it\n{}", instance.daemon_log()),
        || shim(&instance).filter(|pid| *pid != first && is_alive(*pid as u32)),
    );
    assert_eq!(instance.pids(), pids);
    fs::remove_file(instance.manifests().join("web.yaml")).unwrap();
    instance.write("keep.yaml", &sleeper("keep"));
    eventually("it can still be stopped", || instance.pod("web").is_null().then_some(()));
}

#[test]
fn readiness_is_told_to_systemd() {
    let mut instance = Instance::new();
    let socket = instance.path().join("notify");
    let listener = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    listener.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    instance.notify_socket = Some(socket);
    instance.start_daemon();
    let mut buffer = [0; 4096];
    let n = listener.recv(&mut buffer).unwrap();
    assert!(
        String::from_utf8_lossy(&buffer[..n]).contains("READY=1"),
        "{}",
        String::from_utf8_lossy(&buffer[..n])
    );
}
