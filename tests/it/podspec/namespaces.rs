//! What a pod shares with the host and its containers with each other; names.

use std::fs;

use keel_tests::image::BUSYBOX;
use keel_tests::{eventually, eventually_or};

use super::{WAIT, fresh, job, logs, pid_of, pod, sh, sh_in, up};

fn ns(pid: &str, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("the process lives").display().to_string()
}

fn two(name: &str, fields: &str) -> String {
    format!("{}  - name: other\n    image: {BUSYBOX}\n    {WAIT}\n", pod(name, fields, WAIT))
}

#[test]
fn containers_of_a_pod_share_network_names_and_ipc_and_nothing_with_the_host() {
    let instance = up(&two("web", ""));
    let (main, other) = (pid_of(&instance, "main").to_string(), pid_of(&instance, "other").to_string());
    for kind in ["net", "uts", "ipc"] {
        assert_eq!(ns(&main, kind), ns(&other, kind), "{kind}");
    }
    for kind in ["pid", "mnt", "cgroup"] {
        assert_ne!(ns(&main, kind), ns(&other, kind), "{kind}");
    }
    for kind in ["net", "uts", "ipc", "pid", "mnt", "cgroup"] {
        assert_ne!(ns(&main, kind), ns("self", kind), "{kind}");
    }
    sh(&instance, "web", "echo hi > /dev/shm/x");
    assert_eq!(sh_in(&instance, "web", "other", "cat /dev/shm/x"), "hi", "/dev/shm is the pod's");
}

#[test]
fn the_hosts_namespaces_are_joined_one_by_one() {
    for (field, kinds) in
        [("hostNetwork: true", &["net", "uts"][..]), ("hostPID: true", &["pid"]), ("hostIPC: true", &["ipc"])]
    {
        let instance = up(&pod("web", field, WAIT));
        let pid = pid_of(&instance, "main").to_string();
        for kind in ["net", "uts", "ipc", "pid", "mnt", "cgroup"] {
            let same = ns(&pid, kind) == ns("self", kind);
            assert_eq!(same, kinds.contains(&kind), "{field}: {kind}");
        }
    }
}

#[test]
fn with_host_pid_the_hosts_processes_are_seen() {
    let instance = up(&pod("web", "hostPID: true", WAIT));
    let own = std::process::id();
    let seen = sh(&instance, "web", &format!("tr '\\0' ' ' < /proc/{own}/cmdline"));
    assert!(seen.contains("it"), "{seen}");
    assert_eq!(sh(&instance, "web", &format!("test -d /proc/{own} && echo there")), "there");
}

#[test]
fn a_shared_process_namespace_has_one_first_process_that_outlives_containers() {
    let manifest = two("web", "shareProcessNamespace: true");
    let instance = up(&manifest);
    let (main, other) = (pid_of(&instance, "main"), pid_of(&instance, "other"));
    assert_eq!(ns(&main.to_string(), "pid"), ns(&other.to_string(), "pid"));
    assert_ne!(ns(&main.to_string(), "pid"), ns("self", "pid"));
    let first = sh(&instance, "web", "tr '\\0' ' ' < /proc/1/cmdline");
    assert!(first.contains("pause"), "{first}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(main.cast_signed()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    eventually("the container has ended", || {
        (!instance.pids().values().any(|pid| *pid == main)).then_some(())
    });
    instance.apply(&manifest).expect_code(0);
    assert_eq!(pid_of(&instance, "other"), other, "the neighbour runs on");
    assert_ne!(pid_of(&instance, "main"), main);
    assert_eq!(ns(&pid_of(&instance, "main").to_string(), "pid"), ns(&other.to_string(), "pid"));
}

#[test]
fn orphans_in_a_shared_process_namespace_are_reaped() {
    let instance = up(&two("web", "shareProcessNamespace: true"));
    sh(&instance, "web", "(sh -c 'sleep 0.05 & exec true') ; true");
    eventually_or(
        || format!("no zombie is left:\n{}", sh(&instance, "web", "grep -h ^State /proc/[0-9]*/status")),
        || {
            (!sh(&instance, "web", "grep -h ^State: /proc/[0-9]*/status 2>/dev/null || true").contains('Z'))
                .then_some(())
        },
    );
}

#[test]
fn host_name_aliases_and_neighbours_are_in_the_hosts_file() {
    let instance = up(&format!(
        "{}---\n{}",
        pod("plain", "", WAIT),
        pod("named", "hostname: custom\nhostAliases: [{ip: 10.9.8.7, hostnames: [db, db.internal]}]", WAIT),
    ));
    assert_eq!(sh(&instance, "plain", "hostname; cat /etc/hostname"), "plain\nplain");
    assert_eq!(sh(&instance, "named", "hostname; cat /etc/hostname"), "custom\ncustom");
    let hosts = sh(&instance, "named", "cat /etc/hosts");
    let has = |ip: &str, name: &str| {
        hosts.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next() == Some(ip) && words.any(|word| word == name)
        })
    };
    assert!(has("127.0.0.1", "localhost"), "{hosts}");
    assert!(has("10.9.8.7", "db") && has("10.9.8.7", "db.internal"), "{hosts}");
    let ip = |name: &str| instance.pod(name)["status"]["podIP"].as_str().unwrap().to_string();
    assert!(has(&ip("named"), "custom"), "{hosts}");
    assert!(has(&ip("plain"), "plain"), "{hosts}");
}

#[test]
fn resolv_conf_follows_policy_and_config() {
    let print = "command: [cat, /etc/resolv.conf]";
    let config = "dnsConfig: {nameservers: [192.0.2.53], searches: [corp.example], options: [{name: ndots, value: '3'}, {name: edns0}]}";
    let instance = up(&format!(
        "{}---\n{}---\n{}",
        job("none", &format!("dnsPolicy: None\n{config}"), print),
        job("added", &format!("dnsPolicy: Default\n{config}"), print),
        job("plain", "", print),
    ));
    let none = logs(&instance, "none");
    assert_eq!(
        none.lines().filter(|line| line.starts_with("nameserver")).collect::<Vec<_>>(),
        ["nameserver 192.0.2.53"]
    );
    assert!(none.contains("search corp.example"), "{none}");
    assert!(none.contains("ndots:3") && none.contains("edns0"), "{none}");
    let added = logs(&instance, "added");
    assert!(added.contains("192.0.2.53") && added.contains("corp.example"), "{added}");
    let plain = logs(&instance, "plain");
    assert!(plain.contains("nameserver") && !plain.contains("192.0.2.53"), "{plain}");
}

#[test]
fn a_shared_process_namespace_comes_back_when_its_first_process_is_killed() {
    let mut instance = fresh();
    instance.write("web.yaml", &two("web", "shareProcessNamespace: true"));
    instance.start_daemon();
    instance.await_ready("web");
    let before = instance.pids();
    let first = pid_of(&instance, "pod_init").cast_signed();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL).unwrap();
    eventually_or(
        || format!("everything runs anew: {:?}\n{}", instance.pids(), instance.daemon_log()),
        || {
            let now = instance.pids();
            (now.len() == 3 && now.values().all(|pid| !before.values().any(|old| old == pid))).then_some(())
        },
    );
    instance.await_ready("web");
    let pids = ["pod_init", "main", "other"].map(|name| pid_of(&instance, name).to_string());
    assert_eq!(ns(&pids[0], "pid"), ns(&pids[1], "pid"));
    assert_eq!(ns(&pids[0], "pid"), ns(&pids[2], "pid"));
}
