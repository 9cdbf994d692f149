//! What the command line says, shows and refuses: rules that an outside reader found broken.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use keel_tests::image::BUSYBOX;
use keel_tests::manifest::{SLEEP, pod, sleeper};
use keel_tests::{Instance, bin, eventually, eventually_or, is_ready};

fn needs_config_map(name: &str) -> String {
    pod(name, &format!("{SLEEP}    envFrom: [{{configMapRef: {{name: absent}}}}]\n"))
}

fn busybox() -> Instance {
    let instance = Instance::new();
    instance.import_busybox();
    instance
}

#[test]
fn a_pod_that_waits_is_seen_without_a_daemon() {
    let instance = busybox();
    instance.keel_with_input(&["apply", "-f", "-"], &needs_config_map("waits"));
    let get = instance.keel(&["get"]).expect_code(0);
    assert!(get.stdout.contains("waits") && get.stdout.contains("MissingReference"), "{}", get.stdout);
    assert!(get.stderr.contains("no daemon is running: manifests are not watched"), "{}", get.stderr);
    assert_eq!(instance.keel(&["status", "--check"]).code(), 3);
    let described = instance.keel(&["describe", "pod/waits"]).expect_code(0).stdout;
    assert!(described.contains("absent"), "{described}");
}

#[test]
fn without_a_daemon_waits_and_ages_are_those_of_the_last_status() {
    let instance = busybox();
    // Without the probe it would be ready for a moment.
    let probe = "    readinessProbe: {exec: {command: ['false']}, periodSeconds: 1}\n";
    let broken = pod("broken", &format!("    command: ['false']\n{probe}"));
    instance.keel_with_input(&["apply", "-f", "-", "--wait", "--timeout", "4s"], &broken);
    let first = instance.pod("broken");
    let since = |pod: &serde_json::Value| pod["status"]["conditions"][0]["lastTransitionTime"].clone();
    assert_eq!(first["status"]["waiting"], instance.pod("broken")["status"]["waiting"]);
    assert!(first["status"]["waiting"].to_string().contains("rashLoop"), "{first:#}");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(since(&first), since(&instance.pod("broken")), "nothing has changed since");
}

#[test]
fn the_second_of_two_commands_waits_for_the_first() {
    let instance = busybox();
    let slow = pod(
        "slow",
        &format!("{SLEEP}    readinessProbe: {{exec: {{command: [test, -e, /tmp/go]}}, periodSeconds: 1}}\n"),
    );
    let file = instance.path().join("slow.yaml");
    fs::write(&file, slow).unwrap();
    let mut first = instance
        .command(&["apply", "-f", file.to_str().unwrap(), "--wait"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the first command works", || (!instance.pids().is_empty()).then_some(()));
    let refused = instance.keel_with_input(&["apply", "-f", "-", "--timeout", "1s"], &sleeper("b"));
    assert_eq!(refused.code(), 5, "{}", refused.all());
    let wait = format!("wait for pid {} or stop it", first.id());
    assert!(refused.stderr.contains(&wait), "{}", refused.stderr);
    assert!(refused.stderr.contains(&format!("waiting for pid {}", first.id())), "{}", refused.stderr);

    let file = instance.path().join("b.yaml");
    fs::write(&file, sleeper("b")).unwrap();
    let second = instance
        .command(&["apply", "-f", file.to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    instance.keel(&["exec", "slow", "--", "touch", "/tmp/go"]).expect_code(0);
    assert!(first.wait().unwrap().success());
    assert!(second.wait_with_output().unwrap().status.success());
    eventually("both are there", || (instance.pids().len() == 2).then_some(()));
}

#[test]
fn an_operation_tells_nothing_of_other_pods() {
    let instance = busybox();
    let absent = sleeper("absent").replace(BUSYBOX, "127.0.0.1:1/absent:1");
    let first = instance.keel_with_input(&["apply", "-f", "-"], &absent);
    assert!(first.all().contains("127.0.0.1:1"), "{}", first.all());
    let other = instance.keel_with_input(&["apply", "-f", "-", "--wait"], &sleeper("other")).expect_code(0);
    assert!(!other.all().contains("127.0.0.1:1"), "{}", other.all());
}

#[test]
fn an_image_in_use_is_removed_only_by_force() {
    let instance = busybox();
    instance.apply(&sleeper("user")).expect_code(0);
    let refused = instance.keel(&["image", "rm", BUSYBOX]).expect_code(1);
    assert!(
        refused.stderr.contains("default/user") && refused.stderr.contains("--force"),
        "{}",
        refused.stderr
    );
    instance.keel(&["image", "rm", "--force", BUSYBOX]).expect_code(0);
}

#[test]
fn whoever_is_not_root_is_told_to_be_root() {
    let instance = Instance::new();
    for command in
        [&["apply", "-f", "x.yaml"][..], &["delete", "pod/x"], &["image", "ls"], &["exec", "x", "--", "ls"]]
    {
        let copy = instance.path().join("keel");
        fs::copy(bin("keel"), &copy).unwrap();
        fs::set_permissions(instance.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut ran = std::process::Command::new(&copy);
        ran.arg("--root").arg(instance.root()).arg("--run").arg(instance.run_dir()).args(command).uid(65534);
        let ran: keel_tests::Ran = ran.output().unwrap().into();
        assert!(ran.stderr.contains("hint: run as root"), "{command:?}: {}", ran.all());
        assert_eq!(ran.code(), 1);
    }
}

#[test]
fn what_a_file_declares_is_not_deleted_and_that_is_a_failure() {
    let mut instance = busybox();
    instance.write("web.yaml", &sleeper("web"));
    instance.start_daemon();
    instance.await_ready("web");
    let refused = instance.keel(&["delete", "pod/web"]).expect_code(1);
    assert!(refused.stderr.contains("remove it from that file"), "{}", refused.stderr);
}

#[test]
fn what_is_planned_is_what_is_reported_by_the_same_names() {
    let instance = busybox();
    let verbs = |text: &str, skip: usize| -> Vec<String> {
        let mut found: Vec<String> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|words| words.len() > 2 && ["ok", "+", "-", "~", "<"].contains(&words[0]))
            .map(|words| words[1..1 + skip].join(" "))
            .collect();
        found.sort();
        found
    };
    let compare = |text: &str| {
        let ran = instance
            .keel_with_input(&["apply", "-f", "-", "--wait", "--timeout", "60s"], text)
            .expect_code(0);
        let (plan, report): (Vec<&str>, Vec<&str>) =
            ran.stdout.lines().partition(|line| line.starts_with("  "));
        let (plan, report) = (verbs(&plan.join("\n"), 2), verbs(&report.join("\n"), 2));
        assert_eq!(plan, report, "{}", ran.stdout);
        assert_eq!(ran.stdout.matches("\nready ").count(), 1, "{}", ran.stdout);
        (plan, ran.stdout)
    };
    let (plan, _) = compare(&sleeper("web"));
    assert!(plan.contains(&"start container/web.main".to_owned()), "{plan:?}");
    let changed = sleeper("web").replace("sleep 100000", "sleep 100001");
    let (plan, said) = compare(&changed);
    assert!(plan.contains(&"stop container/web.main".to_owned()), "{plan:?}");
    let (ready, stopped) = (said.find("\nready").unwrap(), said.rfind("ok start").unwrap());
    assert!(ready > stopped, "ready is said of the new containers: {said}");
}

#[test]
fn config_maps_and_secrets_are_listed_without_secrets() {
    let instance = Instance::new();
    let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {port: '80'}\n---\n\
                apiVersion: v1\nkind: Secret\nmetadata: {name: sec}\nstringData: {token: hunter2}\n";
    instance.keel_with_input(&["apply", "-f", "-"], text).expect_code(0);
    let maps = instance.keel(&["get", "configmap"]).expect_code(0).stdout;
    assert!(maps.contains("conf") && maps.contains("port") && maps.contains("<stdin>:1"), "{maps}");
    for command in [
        &["get", "secret"][..],
        &["get", "secret", "-o", "json"],
        &["describe", "secret/sec"],
        &["get", "secret/sec", "-o", "yaml"],
    ] {
        let shown = instance.keel(command).expect_code(0).all();
        assert!(shown.contains("token") && !shown.contains("hunter2"), "{command:?}: {shown}");
    }
    instance.keel(&["get", "configmap/absent"]).expect_code(4);
    instance.keel(&["delete", "configmap/conf"]).expect_code(0);
}

#[test]
fn a_mistake_is_told_once_with_what_was_meant() {
    let instance = busybox();
    let twice = sleeper("a") + "---\n" + &sleeper("a");
    let said = instance.keel_with_input(&["apply", "-f", "-"], &twice).expect_code(2).stderr;
    assert_eq!(said.matches("declared twice").count(), 1, "{said}");
    let file = instance.manifests().join("a.yaml");
    fs::write(&file, sleeper("a")).unwrap();
    let (dir, file) = (instance.manifests(), file);
    let both = ["check", "-f", dir.to_str().unwrap(), "-f", file.to_str().unwrap()];
    assert!(instance.keel(&both).expect_code(0).stdout.contains("1 file, 1 object"));
    let empty = instance.keel_with_input(&["apply", "-f", "-"], "").expect_code(0);
    assert!(empty.stderr.contains("no objects in the input"), "{}", empty.all());
    let path = instance.keel(&["apply", "dir"]).expect_code(2).stderr;
    assert!(path.contains("hint: did you mean -f dir?"), "{path}");

    instance.apply(&sleeper("a")).expect_code(0);
    let absent = instance.keel(&["exec", "a", "--", "/no/such"]).expect_code(127).stderr;
    assert_eq!(absent.matches("/no/such").count(), 1, "{absent}");
    assert!(instance.keel(&["exec", "a", "ls"]).expect_code(2).stderr.contains("keel exec POD -- COMMAND"));
}

#[test]
fn a_restart_makes_new_containers() {
    let mut instance = busybox();
    instance.apply(&sleeper("web")).expect_code(0);
    let restarts = || instance.pod("web")["status"]["containerStatuses"][0]["restartCount"].as_u64();
    let before = instance.pids();
    instance.keel(&["restart", "pod/web"]).expect_code(0);
    assert_eq!(restarts(), Some(1));
    assert_ne!(before, instance.pids());
    assert!(is_ready(&instance.pod("web")));
    instance.keel(&["restart", "pod/absent"]).expect_code(4);

    instance.start_daemon();
    instance.await_ready("web");
    instance.keel(&["restart", "web", "-c", "main"]).expect_code(0);
    eventually_or(
        || format!("{:#}", instance.pod("web")),
        || (instance.pod("web")["status"]["containerStatuses"][0]["restartCount"] == 2).then_some(()),
    );
    instance.keel(&["restart", "web", "-c", "other"]).expect_code(4);
}

#[test]
fn an_image_has_more_names_and_travels_as_an_archive() {
    let instance = busybox();
    instance.keel(&["image", "tag", BUSYBOX, "other:1"]).expect_code(0);
    let archive = instance.path().join("saved.tar");
    let archive = archive.to_str().unwrap();
    instance.keel(&["image", "save", "other:1", "-o", archive]).expect_code(0);
    instance.keel(&["image", "rm", "other:1"]).expect_code(0);
    instance.keel(&["image", "import", archive]).expect_code(0);
    let names = instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout;
    assert!(names.contains("docker.io/library/other:1"), "{names}");
    instance.keel(&["image", "tag", "absent", "x"]).expect_code(4);
}
