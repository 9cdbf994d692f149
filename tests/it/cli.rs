//! The command line: what every command prints, and with which code it ends, with a daemon and without one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use keel_tests::image::BUSYBOX;
use keel_tests::manifest::{SLEEP, pod, sleeper};
use keel_tests::{Instance, PATIENCE, eventually, eventually_or, free_port};
use serde_json::Value;

/// A pod that has everything that a view can show.
fn rich() -> String {
    let spec = pod(
        "web",
        &format!(
            "{SLEEP}    env:\n    - {{name: PLAIN, value: visible}}\n    - {{name: TOKEN, valueFrom: {{secretKeyRef: {{name: s, key: token}}}}}}\n\
             \x20   ports: [{{containerPort: 80, name: http}}]\n    resources: {{limits: {{memory: 64Mi}}}}\n\
             \x20   readinessProbe: {{exec: {{command: ['true']}}, periodSeconds: 1}}\n\
             \x20   volumeMounts: [{{name: data, mountPath: /data}}]\n  - name: side\n    image: {BUSYBOX}\n{SLEEP}  volumes: [{{name: data, emptyDir: {{}}}}]\n"
        ),
    )
    .replace("metadata: {name: web}", "metadata: {name: web, labels: {app: web, tier: front}}");
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\nstringData: {{token: hunter2}}\n---\n{spec}---\n{}---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: dep}}\nspec:\n  replicas: 2\n  strategy: {{type: Recreate}}\n\
         \x20 selector: {{matchLabels: {{app: dep}}}}\n  template:\n    metadata: {{labels: {{app: dep}}}}\n    spec:\n\
         \x20     terminationGracePeriodSeconds: 1\n      containers:\n      - name: c\n        image: {BUSYBOX}\n        command: [sh, -c, 'trap \"exit 0\" TERM; sleep 100000 & wait']\n",
        sleeper("there").replace("{name: there}", "{name: there, namespace: other}"),
    )
}

fn lines(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

/// A command whose output is read line by line while it runs.
struct Running {
    child: std::process::Child,
    lines: Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().expect("keel runs");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, lines }
    }

    #[track_caller]
    fn line_with(&self, part: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(part) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no line with {part}: {error}; seen:\n{}", seen.join("\n")),
            }
        }
    }

    /// Waits for the end; the lines that are left, and the code.
    fn end(&mut self) -> (Vec<String>, i32) {
        let status = eventually("the command ends", || self.child.try_wait().unwrap());
        (self.lines.iter().collect(), status.code().unwrap_or(-1))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that lists must be the same with a daemon and without one.
fn views(instance: &Instance) {
    let table = instance.keel(&["get"]).expect_code(0).stdout;
    let rows = lines(&table);
    assert_eq!(rows[0], ["NAME", "READY", "STATUS", "RESTARTS", "AGE"], "{table}");
    assert!(rows.iter().any(|row| row[..4] == ["web", "2/2", "Running", "0"]), "{table}");
    assert!(!table.contains("there"), "another namespace is not shown: {table}");
    assert_eq!(instance.keel(&["ps"]).expect_code(0).stdout.lines().next(), table.lines().next());

    let wide = instance.keel(&["get", "-o", "wide"]).expect_code(0).stdout;
    assert!(lines(&wide)[0].ends_with(&["IP", "IMAGE", "DECLARED-IN"]), "{wide}");
    assert!(wide.contains(BUSYBOX), "{wide}");
    assert!(!instance.keel(&["get", "--no-headers"]).expect_code(0).stdout.contains("NAME"));

    let everywhere = instance.keel(&["get", "-A"]).expect_code(0).stdout;
    assert!(lines(&everywhere).iter().any(|row| row[..2] == ["other", "there"]), "{everywhere}");
    assert_eq!(
        instance.keel(&["get", "pods", "-n", "other", "-o", "name"]).expect_code(0).stdout,
        "pod/there\n"
    );
    let labelled = ["get", "pods", "-o", "name", "-l"];
    for (selector, names) in [
        ("app=web", "pod/web\n"),
        ("app=web,tier!=front", ""),
        ("app in (web,x)", "pod/web\n"),
        ("tier", "pod/web\n"),
    ] {
        let found = instance.keel(&[&labelled[..], &[selector]].concat()).expect_code(0).stdout;
        assert_eq!(found, names, "-l {selector}");
    }

    let one = instance.keel(&["get", "pod/web", "-o", "json"]).expect_code(0).json();
    assert_eq!((&one["apiVersion"], &one["kind"]), (&"v1".into(), &"Pod".into()));
    assert_eq!(one["metadata"]["name"], "web");
    assert_eq!(one["metadata"]["labels"]["app"], "web");
    assert_eq!(one["spec"]["containers"][0]["image"], BUSYBOX, "{one:#}");
    assert_eq!(one["spec"]["containers"][0]["ports"][0]["containerPort"], 80);
    assert_eq!(one["status"]["phase"], "Running");
    assert_eq!(one["status"]["containerStatuses"][1]["name"], "side");
    assert!(!one.to_string().contains("hunter2"));
    let list = instance.keel(&["get", "all", "-A", "-o", "json"]).expect_code(0).json();
    assert_eq!(list["kind"], "List");
    let kinds: Vec<&str> =
        list["items"].as_array().unwrap().iter().map(|item| item["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == "Pod").count(), 4, "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| **kind == "Deployment").count(), 1, "{kinds:?}");
    let yaml = instance.keel(&["get", "pod/web", "-o", "yaml"]).expect_code(0).stdout;
    for line in ["apiVersion: v1", "kind: Pod", "metadata:", "status:"] {
        assert!(yaml.lines().any(|found| found == line), "{line}: {yaml}");
    }

    let deployments = instance.keel(&["get", "deploy"]).expect_code(0).stdout;
    assert!(lines(&deployments).iter().any(|row| row[..2] == ["dep", "2/2"]), "{deployments}");
    let missing = instance.keel(&["get", "pod/nope"]).expect_code(4);
    assert!(missing.stderr.contains("nope") && missing.stdout.is_empty(), "{}", missing.all());
    instance.keel(&["get", "pod/nope", "--ignore-not-found"]).expect_code(0);
    let kind = instance.keel(&["get", "gadgets"]).expect_code(2);
    assert!(kind.stderr.contains("gadgets") && kind.stderr.contains("hint:"), "{}", kind.all());

    let text = instance.keel(&["describe", "pod/web"]).expect_code(0).stdout;
    for part in [
        "Name:",
        "web",
        "Namespace:",
        "app=web",
        "Containers:",
        "main:",
        "side:",
        "Image:",
        BUSYBOX,
        "State:",
        "Running since",
        "Ready:",
        "Restarts:",
        "Conditions:",
        "ContainersReady",
        "Events:",
        "Started",
        "Command:",
        "PLAIN",
        "visible",
        "TOKEN",
        "Secret s",
        "80/TCP",
        "/data",
        "Volumes:",
        "memory",
        "Readiness:",
    ] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    assert!(!text.contains("hunter2"), "a secret is shown:\n{text}");
    let text = instance.keel(&["describe", "deploy/dep"]).expect_code(0).stdout;
    assert!(text.contains("2 wanted") && text.contains("dep-"), "{text}");
    instance.keel(&["describe", "pod/nope"]).expect_code(4);

    let events = instance.keel(&["events"]).expect_code(0).stdout;
    assert!(events.contains("Pod/default/web") && !events.contains("Pod/other/there"), "{events}");
    let events = instance.keel(&["events", "--for", "pod/web", "-o", "json"]).expect_code(0).stdout;
    let parsed: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!parsed.is_empty());
    assert!(parsed.iter().all(|event| event["object"] == "Pod/default/web"), "{events}");

    let status = instance.keel(&["status", "--check"]).expect_code(0).stdout;
    assert!(status.contains("4 of 4"), "{status}");
    let status = instance.keel(&["status", "-o", "json"]).expect_code(0).json();
    assert_eq!(status["healthy"], true);
    let version = instance.keel(&["version", "-o", "json"]).expect_code(0).json();
    assert!(version["client"]["version"].is_string());
}

fn ready(instance: &Instance, count: usize) {
    eventually_or(
        || {
            format!(
                "{count} pods are ready\n{}\n{}",
                instance.keel(&["get", "-A"]).all(),
                instance.daemon_log()
            )
        },
        || (instance.pods().values().filter(|pod| keel_tests::is_ready(pod)).count() == count).then_some(()),
    );
}

#[test]
fn views_are_the_same_with_a_daemon_and_without_one() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.apply(&rich()).expect_code(0);
    views(&instance);
    assert_eq!(instance.keel(&["version", "-o", "json"]).json()["daemon"], Value::Null);
    let pid = instance.start_daemon();
    ready(&instance, 4);
    views(&instance);
    assert_eq!(instance.keel(&["version", "-o", "json"]).json()["daemon"]["pid"], pid);
    assert!(instance.keel(&["status"]).stdout.contains(&format!("running (pid {pid})")));
    instance.stop_daemon();
    views(&instance);
}

#[test]
fn an_instance_that_never_ran_is_empty_and_healthy() {
    let instance = Instance::new();
    let ran = instance.keel(&["get"]).expect_code(0);
    assert_eq!(ran.stdout, "");
    assert!(ran.stderr.contains("nothing in namespace default"), "{}", ran.stderr);
    assert_eq!(instance.keel(&["get", "-o", "json"]).expect_code(0).json()["items"], Value::Array(vec![]));
    instance.keel(&["events"]).expect_code(0);
    instance.keel(&["status", "--check"]).expect_code(0);
    instance.keel(&["image", "ls"]).expect_code(0);
    instance.keel(&["logs", "web"]).expect_code(4);
    instance.keel(&["exec", "web", "--", "true"]).expect_code(4);
    instance.keel(&["reconcile"]).expect_code(5);
    let watch = instance.keel(&["events", "-w"]).expect_code(5);
    assert!(watch.stderr.contains("hint:"), "{}", watch.stderr);
    let watch = instance.keel(&["get", "-w"]).expect_code(5);
    assert!(watch.stderr.contains("hint:"), "{}", watch.stderr);
}

#[test]
fn a_watch_prints_each_change_and_the_events_of_it() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.start_daemon();
    let table = Running::start(instance.command(&["get", "-w"]));
    let data = Running::start(instance.command(&["get", "-w", "-o", "json"]));
    let events = Running::start(instance.command(&["events", "-w", "--for", "pod/web"]));
    instance.write("web.yaml", &sleeper("web"));
    let other = sleeper("other");
    instance.write("other.yaml", &other);
    table.line_with("NAME");
    let line = table.line_with("1/1");
    assert!(line.starts_with("web") || line.starts_with("other"), "{line}");
    loop {
        let item: Value = serde_json::from_str(&data.line_with("\"web\"")).unwrap();
        if keel_tests::is_ready(&item) {
            break;
        }
    }
    let started = events.line_with("Started");
    assert!(started.contains("Pod/default/web"), "{started}");
}

#[test]
fn logs_show_what_was_asked_for() {
    let instance = Instance::new();
    instance.import_busybox();
    let two = pod(
        "web",
        &format!(
            "    command: [sh, -c, 'for i in 1 2 3 4 5; do echo line $i; done; echo oops >&2; usleep 300000; printf tail; trap \"exit 0\" TERM; sleep 100000 & wait']\n  \
             - name: side\n    image: {BUSYBOX}\n    command: [sh, -c, 'echo aside; trap \"exit 0\" TERM; sleep 100000 & wait']\n"
        ),
    );
    instance.apply(&two).expect_code(0);
    let logs = |more: &[&str]| instance.keel(&[&["logs", "web"], more].concat()).expect_code(0).stdout;
    eventually("everything is written", || logs(&[]).ends_with("tail\n").then_some(()));
    let all = logs(&[]);
    for n in 1..=5 {
        assert!(all.contains(&format!("line {n}\n")), "{all}");
    }
    assert!(!all.contains("aside"));
    assert_eq!(logs(&["-c", "side"]), "aside\n");
    assert_eq!(logs(&["side"]), "aside\n");
    assert_eq!(logs(&["--tail", "1", "-c", "side"]), "aside\n");
    assert_eq!(logs(&["--tail", "0", "-c", "side"]), "");
    assert_eq!(logs(&["--tail", "2"]), "oops\ntail\n");
    assert_eq!(logs(&["--since", "1h", "side"]), "aside\n");
    assert_eq!(logs(&["--since-time", "2099-01-01T00:00:00Z", "side"]), "");
    assert_eq!(logs(&["--prefix", "side"]), "[pod/web/side] aside\n");
    let stamped = logs(&["--timestamps", "side"]);
    let (time, text) = stamped.split_once(' ').unwrap();
    assert!(time.len() == 30 && time.ends_with('Z') && text == "aside\n", "{stamped}");
    let both = logs(&["--all-containers", "--prefix"]);
    assert!(both.contains("[pod/web/main] line 1\n") && both.contains("[pod/web/side] aside\n"), "{both}");

    let ran = instance.keel(&["logs", "web", "-c", "nope"]).expect_code(4);
    assert!(ran.stderr.contains("main, side"), "{}", ran.stderr);
    instance.keel(&["logs", "nope"]).expect_code(4);
    instance.keel(&["logs", "web", "-p", "side"]).expect_code(4);
}

#[test]
fn the_log_of_the_run_before_is_there_after_a_restart() {
    let instance = Instance::new();
    instance.import_busybox();
    let text = |value: &str| {
        pod(
            "web",
            &format!(
                "    command: [sh, -c, 'echo run {value}; trap \"exit 0\" TERM; sleep 100000 & wait']\n"
            ),
        )
    };
    instance.apply(&text("one")).expect_code(0);
    instance.apply(&text("two")).expect_code(0);
    eventually("the second run speaks", || {
        (instance.keel(&["logs", "web"]).stdout == "run two\n").then_some(())
    });
    assert_eq!(instance.keel(&["logs", "-p", "web"]).expect_code(0).stdout, "run one\n");
}

#[test]
fn a_followed_log_goes_on_over_rotations_and_ends_with_its_container() {
    const LINES: u32 = 3000;
    let instance = Instance::new();
    instance.import_busybox();
    let config = instance.path().join("config.yaml");
    fs::write(&config, "logs: {max_bytes: 16384, max_files: 50}\n").unwrap();
    let go = instance.path().join("go");
    let manifest = pod(
        "talk",
        &format!(
            "    command: [sh, -c, 'until test -e /flag/go; do usleep 10000; done; i=0; while [ $i -lt {LINES} ]; do echo number $i of the lines; i=$((i+1)); done']\n    volumeMounts: [{{name: f, mountPath: /flag}}]\n"
        ),
    )
    .replace("spec:\n", "spec:\n  restartPolicy: Never\n")
        + &format!("  volumes: [{{name: f, hostPath: {{path: {}}}}}]\n", instance.path().display());
    let with = ["--config", config.to_str().unwrap()];
    instance.keel_with_input(&[&with[..], &["apply", "-f", "-"]].concat(), &manifest).expect_code(0);
    let mut follow = Running::start(instance.command(&["logs", "-f", "talk"]));
    fs::write(go, "").unwrap();
    let (lines, code) = follow.end();
    assert_eq!(code, 0);
    let wanted: Vec<String> = (0..LINES).map(|n| format!("number {n} of the lines")).collect();
    assert_eq!(lines.len(), wanted.len());
    assert_eq!(lines, wanted);
    let parts = eventually("there were rotations", || {
        let dir = fs::read_dir(instance.root().join("logs")).ok()?.flatten().next()?.path().join("talk");
        let dir = if dir.exists() { dir } else { dir.with_file_name("main") };
        Some(fs::read_dir(dir).ok()?.count())
    });
    assert!(parts > 3, "{parts} parts");
    assert_eq!(instance.keel(&["logs", "talk"]).expect_code(0).stdout.lines().count(), LINES as usize);
    assert_eq!(
        instance.keel(&["logs", "talk", "--tail", "1000"]).expect_code(0).stdout.lines().next().unwrap(),
        format!("number {} of the lines", LINES - 1000)
    );
}

#[test]
fn exec_runs_inside_and_ends_with_the_commands_code() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.apply(&pod("web", &format!("{SLEEP}    env: [{{name: OWN, value: its}}]\n"))).expect_code(0);
    let exec = |options: &[&str], command: &[&str]| {
        instance.keel(&[&["exec", "web"], options, &["--"], command].concat())
    };
    assert_eq!(exec(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]).expect_code(7).stdout, "out\n");
    assert_eq!(exec(&[], &["sh", "-c", "echo err >&2"]).expect_code(0).stderr, "err\n");
    assert_eq!(exec(&[], &["sh", "-c", "kill -9 $$"]).code(), 137);
    assert_eq!(exec(&[], &["sh", "-c", "echo $OWN $FROM_IMAGE"]).expect_code(0).stdout, "its yes\n");
    assert_eq!(exec(&["-e", "A=b c", "-e", "OWN=x"], &["sh", "-c", "echo $A $OWN"]).stdout, "b c x\n");
    assert_eq!(exec(&["-w", "/tmp"], &["pwd"]).expect_code(0).stdout, "/tmp\n");
    assert_eq!(exec(&["-u", "app"], &["id", "-u"]).expect_code(0).stdout, "1000\n");
    assert_eq!(
        exec(&["-u", "12:34"], &["sh", "-c", "echo $(id -u) $(id -g)"]).expect_code(0).stdout,
        "12 34\n"
    );
    assert_eq!(exec(&["-c", "main"], &["echo", "x"]).expect_code(0).stdout, "x\n");
    let ran = instance.keel_with_input(&["exec", "-i", "web", "--", "cat"], "through\n").expect_code(0);
    assert_eq!(ran.stdout, "through\n");
    let none = instance.keel_with_input(&["exec", "web", "--", "cat"], "through\n").expect_code(0);
    assert_eq!(none.stdout, "", "without -i there is no input");

    for (command, code) in [(&["no-such-command"][..], 127), (&["/etc/passwd"], 126), (&["/etc"], 126)] {
        let ran = exec(&[], command).expect_code(code);
        assert!(ran.stderr.lines().any(|line| line.starts_with("error: ")), "{}", ran.stderr);
    }
    exec(&["-c", "nope"], &["true"]).expect_code(4);
    instance.keel(&["exec", "nope", "--", "true"]).expect_code(4);
    exec(&["-u", "nobody-here"], &["true"]).expect_code(125);
    instance.start_daemon();
    assert_eq!(instance.keel(&["exec", "web", "--", "echo", "with"]).expect_code(0).stdout, "with\n");
}

/// A terminal and who sits at it.
struct Terminal {
    pty: nix::pty::OpenptyResult,
    output: std::sync::mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn open() -> Terminal {
        let size = nix::pty::Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = nix::pty::openpty(Some(&size), None).unwrap();
        let mut reader = fs::File::from(pty.master.try_clone().unwrap());
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 || sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal { pty, output, seen: String::new() }
    }

    fn run(&self, mut command: std::process::Command) -> std::process::Child {
        let slave = || -> OwnedFd { self.pty.slave.try_clone().unwrap() };
        command.stdin(slave()).stdout(slave()).stderr(slave()).spawn().unwrap()
    }

    fn write(&self, keys: &[u8]) {
        fs::File::from(self.pty.master.try_clone().unwrap()).write_all(keys).unwrap();
    }

    fn expect(&mut self, part: &str) {
        let deadline = std::time::Instant::now() + PATIENCE;
        let end = loop {
            if let Some(at) = self.seen.find(part) {
                break at + part.len();
            }
            assert!(std::time::Instant::now() < deadline, "{part:?} is missing in {:?}", self.seen);
            if let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(100)) {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
            }
        };
        self.seen.drain(..end);
    }
}

#[test]
fn attach_shows_types_resizes_and_is_left_by_its_keys() {
    let instance = Instance::new();
    instance.import_busybox();
    let shell =
        "    command: [sh, -c, 'echo ready; read a; echo got-$a; sh']\n    stdin: true\n    tty: true\n";
    instance.apply(&pod("web", shell)).expect_code(0);
    let mut terminal = Terminal::open();
    let mut child = terminal.run(instance.command(&["attach", "-it", "web", "--replay", "4"]));
    terminal.expect("ready");
    terminal.write(b"one\r");
    terminal.expect("got-one");
    terminal.expect("#");
    terminal.write(b"test -t 0 && echo is-a-$((40+2))-terminal\r");
    terminal.expect("is-a-42-terminal");
    // The first of the keys alone is for the container; both leave it, and it goes on.
    terminal.write(&[0x10, 0x11]);
    terminal.expect("detached");
    assert_eq!(eventually("attach ends", || child.try_wait().unwrap()).code(), Some(0));
    assert_eq!(instance.pids().len(), 1);

    let mut child = terminal.run(instance.command(&["attach", "-it", "web", "--detach-keys", "ctrl-x,x"]));
    terminal.write(b"echo again-$((1+1))\r");
    terminal.expect("again-2");
    terminal.write(b"stty size || ttysize\r");
    terminal.expect("33 77");
    terminal.write(&[0x18, b'x']);
    assert_eq!(eventually("attach ends", || child.try_wait().unwrap()).code(), Some(0));
    assert_eq!(instance.pids().len(), 1);
}

#[test]
fn attach_passes_input_on_and_ends_with_the_containers_code() {
    let instance = Instance::new();
    instance.import_busybox();
    let count = "    command: [sh, -c, 'echo hello; wc -c; exit 7']\n    stdin: true\n    stdinOnce: true\n";
    let once = pod("count", count).replace("spec:\n", "spec:\n  restartPolicy: Never\n");
    instance.apply(&once).expect_code(0);
    let bytes = "x".repeat(3 << 20);
    let ran = instance.keel_with_input(&["attach", "-i", "count", "--replay", "1"], &bytes).expect_code(7);
    assert_eq!(ran.stdout, format!("hello\n{}\n", 3 << 20), "{}", ran.stderr);

    instance.apply(&sleeper("deaf")).expect_code(0);
    let ran = instance.keel(&["attach", "-i", "deaf"]).expect_code(1);
    assert!(ran.stderr.contains("stdin: true"), "{}", ran.stderr);
    let ran = instance.keel(&["attach", "deaf", "--detach-keys", "ctrl-1"]).expect_code(2);
    assert!(ran.stderr.contains("ctrl-1"), "{}", ran.stderr);
    instance.keel(&["attach", "nope"]).expect_code(4);
}

#[test]
fn exec_gives_a_terminal_and_passes_size_and_keys_on() {
    let instance = Instance::new();
    instance.import_busybox();
    instance.apply(&sleeper("web")).expect_code(0);
    let mut terminal = Terminal::open();
    let mut child = terminal.run(instance.command(&["exec", "-it", "web", "--", "sh"]));
    terminal.expect("#");
    terminal.write(b"test -t 0 && test -t 1 && echo is-a-$((40+2))-terminal\n");
    terminal.expect("is-a-42-terminal");
    // What the terminal says to its size is asked of it inside.
    terminal.write(b"busybox stty size 2>/dev/null || ttysize\n");
    terminal.write(b"echo done-$((1+1))\n");
    terminal.expect("done-2");
    // Ctrl-C reaches the command, not us.
    terminal.write(b"sleep 1000\n");
    std::thread::sleep(Duration::from_millis(300));
    terminal.write(&[3]);
    terminal.write(b"echo alive-$((2+3))\n");
    terminal.expect("alive-5");
    terminal.write(b"exit 9\n");
    let status = eventually("exec ends", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(9));
}

#[test]
fn status_check_tells_by_its_code_whether_all_is_well() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.apply(&sleeper("good")).expect_code(0);
    instance.keel(&["status", "--check"]).expect_code(0);
    let never = pod(
        "bad",
        &format!("{SLEEP}    readinessProbe: {{exec: {{command: ['false']}}, periodSeconds: 1}}\n"),
    );
    instance.write("bad.yaml", &never);
    instance.start_daemon();
    eventually("the pod runs", || (instance.pids().len() == 2).then_some(()));
    let ran = instance.keel(&["status", "--check"]).expect_code(3);
    assert!(ran.stdout.contains("bad"), "{}", ran.stdout);
    instance.keel(&["status"]).expect_code(0);
    assert_eq!(instance.keel(&["status", "--check", "-o", "json"]).expect_code(3).json()["healthy"], false);
}

#[test]
fn delete_obeys_where_an_object_is_declared() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("filed.yaml", &sleeper("filed"));
    instance.start_daemon();
    instance.await_ready("filed");
    instance.apply(&format!("{}---\n{}", sleeper("applied"), sleeper("second"))).expect_code(0);
    let refused = instance.keel(&["delete", "pod/filed"]);
    assert_ne!(refused.code(), 0);
    for part in ["filed.yaml:1", "hint:", "remove it from that file"] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    instance.keel(&["delete", "pod/applied"]).expect_code(0);
    assert!(instance.pod("applied").is_null());
    instance.keel(&["delete", "pod/applied"]).expect_code(4);
    instance.keel(&["delete", "pod/applied", "--ignore-not-found"]).expect_code(0);
    assert!(keel_tests::is_ready(&instance.pod("filed")));
    instance.stop_daemon();
    let alone = instance.keel(&["delete", "pod", "second"]).expect_code(0);
    assert!(alone.all().contains("second"), "{}", alone.all());
    assert!(instance.pod("second").is_null());
    assert!(keel_tests::is_ready(&instance.pod("filed")), "what the directory declares is left alone");
    instance.keel(&["delete", "pod/nope"]).expect_code(4);
    instance.keel(&["delete", "pods"]).expect_code(2);
}

#[test]
fn a_pod_of_a_deployment_is_not_deleted_alone_without_saying_so() {
    let instance = Instance::new();
    instance.import_busybox();
    instance.apply(&rich()).expect_code(0);
    let name = instance.pods().keys().find(|name| name.starts_with("dep-")).unwrap().clone();
    let refused = instance.keel(&["delete", &format!("pod/{name}")]);
    assert_ne!(refused.code(), 0);
    assert!(refused.stderr.contains("deployment/dep"), "{}", refused.stderr);
    instance.keel(&["delete", "deploy/dep"]).expect_code(0);
    assert!(!instance.pods().keys().any(|name| name.starts_with("dep-")));
}

#[test]
fn a_grace_period_on_the_command_line_wins() {
    let instance = Instance::new();
    instance.import_busybox();
    let deaf = |name: &str| {
        pod(name, "    command: [sh, -c, 'trap \"\" TERM; while true; do sleep 100000; done']\n")
            .replace("terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 600")
    };
    instance.apply(&format!("{}---\n{}", deaf("a"), deaf("b"))).expect_code(0);
    let begun = std::time::Instant::now();
    instance.keel(&["delete", "pod/a", "--grace-period", "1"]).expect_code(0);
    instance.keel(&["delete", "pod/b", "--now"]).expect_code(0);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(instance.pids().is_empty());
}

#[test]
fn plan_says_what_apply_does_and_why_and_shows_no_secret() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let text = |value: &str| rich().replace("value: visible", &format!("value: {value}"));
    let plan_of = |text: &str| {
        text.split_once("plan:").map(|(_, rest)| {
            rest.lines()
                .take_while(|line| {
                    line.is_empty()
                        || line.starts_with([' ', ':'])
                        || line.contains("action")
                        || line.contains("nothing")
                })
                .map(str::to_string)
                .collect::<Vec<_>>()
        })
    };
    let file = instance.path().join("all.yaml");
    fs::write(&file, text("visible")).unwrap();
    let name = file.to_str().unwrap();
    let plan = instance.keel(&["plan", "-f", name]).expect_code(0).all();
    let applied = instance.keel(&["apply", "-f", name, "--wait", "--timeout", "60s"]).expect_code(0).all();
    assert!(plan_of(&plan).is_some_and(|lines| lines.len() > 2), "{plan}");
    assert_eq!(plan_of(&plan), plan_of(&applied), "{plan}\n{applied}");
    instance.keel(&["plan", "-f", name, "--exit-code"]).expect_code(0);
    fs::write(&file, text("changed").replace("hunter2", "hunter3")).unwrap();
    let check = |instance: &Instance| {
        let plan = instance.keel(&["diff", "-f", name]).expect_code(0).all();
        for part in ["container", "web", "env[PLAIN]"] {
            assert!(plan.contains(part), "{part} is missing in:\n{plan}");
        }
        assert!(!plan.contains("hunter"), "a secret is shown:\n{plan}");
        instance.keel(&["plan", "-f", name, "--exit-code"]).expect_code(1);
        let data = instance.keel(&["plan", "-f", name, "-o", "json"]).expect_code(0).stdout;
        assert!(!data.contains("hunter"), "a secret is shown:\n{data}");
        let events: Vec<Value> = data.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(events.iter().any(|event| event["type"] == "plan"), "{data}");
        assert_eq!(events.last().unwrap()["exitCode"], 0, "{data}");
    };
    check(&instance);
    instance.start_daemon();
    check(&instance);
    let pids = instance.pids();
    let applied = instance.keel(&["apply", "-f", name, "--wait", "--timeout", "60s"]).expect_code(0).all();
    assert!(!applied.contains("hunter"), "{applied}");
    assert_ne!(instance.pids(), pids);
    for dir in [instance.run_dir().join("status"), instance.run_dir().join("pods")] {
        let grep = Command::new("grep").args(["-rl", "hunter3"]).arg(&dir).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&grep.stdout), "", "a secret is in a record");
    }
    let log = instance.daemon_log();
    assert!(!log.contains("hunter"), "{log}");
}

#[test]
fn apply_through_the_daemon_ends_like_apply_alone() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("filed.yaml", &sleeper("filed"));
    instance.start_daemon();
    instance.await_ready("filed");
    // 0: done, and a second time nothing to do.
    let first = instance.apply(&sleeper("web")).expect_code(0);
    for part in ["plan:", "create", "pod/web", "start", "container/web.main", "1 pod is as declared"] {
        assert!(first.all().contains(part), "{part}: {}", first.all());
    }
    let pids = instance.pids();
    let second = instance.apply(&sleeper("web")).expect_code(0);
    assert!(second.all().contains("nothing to do"), "{}", second.all());
    assert_eq!(instance.pids(), pids);
    // 2: invalid; the object of a file; nothing is touched.
    let invalid = instance
        .apply("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {containerz: []}\n")
        .expect_code(2);
    assert!(invalid.all().contains("containerz"), "{}", invalid.all());
    let filed =
        instance.apply(&pod("filed", &format!("{SLEEP}    env: [{{name: A, value: b}}]\n"))).expect_code(2);
    for part in ["filed.yaml:1", "hint:"] {
        assert!(filed.all().contains(part), "{part}: {}", filed.all());
    }
    instance.apply(&sleeper("filed")).expect_code(0);
    // 3: not in time.
    let never = pod(
        "slow",
        &format!("{SLEEP}    readinessProbe: {{exec: {{command: ['false']}}, periodSeconds: 1}}\n"),
    );
    let slow =
        instance.keel_with_input(&["apply", "-f", "-", "--wait", "--timeout", "2s"], &never).expect_code(3);
    assert!(slow.all().contains("slow"), "{}", slow.all());
    // 1: failed; 6: one of two.
    let port = free_port();
    let missing = sleeper("bad").replace(BUSYBOX, &format!("127.0.0.1:{port}/no/such:1"));
    let failed = instance.keel_with_input(&["apply", "-f", "-"], &missing).expect_code(1);
    assert!(failed.all().contains(&format!("127.0.0.1:{port}")), "{}", failed.all());
    let never = missing
        .replace("    command", "    imagePullPolicy: Never\n    command")
        .replace("name: bad", "name: bad2");
    let partly = instance
        .keel_with_input(
            &["apply", "-f", "-", "--wait", "--timeout", "30s"],
            &format!("{}---\n{never}", sleeper("good")),
        )
        .expect_code(6);
    assert!(partly.all().contains("imagePullPolicy is Never"), "{}", partly.all());
    // JSON lines, ending with the result.
    let data =
        instance.keel_with_input(&["apply", "-f", "-", "-o", "json"], &sleeper("third")).expect_code(0);
    let events: Vec<Value> = data.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.first().unwrap()["type"], "plan", "{}", data.stdout);
    assert_eq!(events.last().unwrap()["type"], "result", "{}", data.stdout);
    // What was applied outlives the daemon.
    instance.kill_daemon();
    instance.start_daemon();
    instance.await_ready("third");
    for (name, pid) in pids {
        assert_eq!(instance.pids().get(&name), Some(&pid));
    }
}

/// Another implementation's verdict, where there is one.
fn examples_fit(instance: &Instance, schema: &Value) {
    const SCRIPT: &str = "import glob, json, jsonschema, sys, yaml\n\
        check = jsonschema.Draft202012Validator(json.load(open(sys.argv[1])))\n\
        check.check_schema(check.schema)\n\
        files = glob.glob(sys.argv[2] + '/**/*.*', recursive=True)\n\
        for file in files:\n for object in yaml.safe_load_all(open(file)):\n  check.validate(object)\n\
        assert files\n";
    if !Command::new("python3")
        .args(["-c", "import jsonschema, yaml"])
        .output()
        .is_ok_and(|o| o.status.success())
    {
        eprintln!(
            "skipped: no python3 with jsonschema and yaml, the examples are not held against the schema"
        );
        return;
    }
    let path = instance.path().join("schema.json");
    fs::write(&path, schema.to_string()).unwrap();
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/manifests");
    let ran: keel_tests::Ran =
        Command::new("python3").args(["-c", SCRIPT]).arg(&path).arg(examples).output().unwrap().into();
    assert_eq!(ran.code(), 0, "{}", ran.all());
}

#[test]
fn schema_describes_every_kind() {
    let instance = Instance::new();
    let all = instance.keel(&["schema"]).expect_code(0).json();
    assert!(all["$schema"].as_str().unwrap().contains("json-schema.org"));
    for kind in ["Pod", "Deployment", "ConfigMap", "Secret"] {
        let one = instance.keel(&["schema", kind]).expect_code(0).json();
        assert_eq!(one["title"], kind);
        assert!(all["$defs"][kind].is_object(), "{kind} is in the schema of everything");
    }
    assert_eq!(all["$defs"]["List"]["properties"]["items"]["items"]["$ref"], "#");
    examples_fit(&instance, &all);
    let ran = instance.keel(&["schema", "Gadget"]);
    assert_eq!(ran.code(), 2, "{}", ran.all());
}

#[test]
fn completion_scripts_are_scripts() {
    let instance = Instance::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = instance.keel(&["completion", shell]).expect_code(0).stdout;
        assert!(script.contains("describe") && script.contains("reconcile"), "{shell}");
        if Command::new(shell).arg("--version").output().is_err() {
            eprintln!("skipped: {shell} is not installed, its syntax is not checked");
            continue;
        }
        let path = instance.path().join(format!("completion.{shell}"));
        fs::write(&path, script).unwrap();
        let checked = Command::new(shell).arg("-n").arg(&path).output().unwrap();
        assert!(checked.status.success(), "{shell}: {}", String::from_utf8_lossy(&checked.stderr));
    }
    instance.keel(&["completion", "tcsh"]).expect_code(2);
}

#[test]
fn a_closed_pipe_is_success() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance
        .apply(&pod(
            "web",
            "    command: [sh, -c, 'seq 1 20000; trap \"exit 0\" TERM; sleep 100000 & wait']\n",
        ))
        .expect_code(0);
    eventually("the log is written", || {
        (instance.keel(&["logs", "web", "--tail", "1"]).stdout == "20000\n").then_some(())
    });
    instance.start_daemon();
    let manifests = instance.path().join("m.yaml");
    fs::write(&manifests, sleeper("web2")).unwrap();
    let file = manifests.to_str().unwrap();
    for arguments in [
        &["get"][..],
        &["get", "-o", "json"],
        &["describe", "pod/web"],
        &["logs", "web"],
        &["events"],
        &["status"],
        &["schema"],
        &["completion", "bash"],
        &["version"],
        &["image", "ls"],
        &["plan", "-f", file],
        &["apply", "-f", file],
        &["--help"],
        &["get", "-w"],
        &["logs", "-f", "web"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child = instance.command(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let status = eventually_or(|| format!("{arguments:?} ends"), || child.try_wait().unwrap());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(0), "{arguments:?}: {said}");
        assert!(
            !said.contains("anic") && !said.to_lowercase().contains("broken pipe"),
            "{arguments:?}: {said}"
        );
    }
    instance.await_ready("web2");
}

#[test]
fn output_has_colours_only_when_asked_for() {
    let instance = Instance::new();
    instance.import_busybox();
    instance.apply(&sleeper("web")).expect_code(0);
    let bad = instance.path().join("bad.yaml");
    fs::write(&bad, "kind: Pod\nspec: {x: [\n").unwrap();
    let commands: [&[&str]; 7] = [
        &["get"],
        &["status"],
        &["events"],
        &["describe", "pod/web"],
        &["check", "-f", bad.to_str().unwrap()],
        &["get", "pod/nope"],
        &["bad-command"],
    ];
    for arguments in commands {
        let ran = instance.keel(arguments);
        assert!(!ran.all().contains('\x1b'), "{arguments:?}: {:?}", ran.all());
    }
    assert!(instance.keel(&["--color", "always", "get"]).stdout.contains('\x1b'));
    // On a terminal: colours, unless NO_COLOR says otherwise.
    let on_terminal = |no_color: &str| {
        let pty = nix::pty::openpty(None, None).unwrap();
        let mut command = instance.command(&["get"]);
        command.env("NO_COLOR", no_color).env("TERM", "xterm").stdout(pty.slave.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        let mut reader = fs::File::from(pty.master);
        let mut buffer = [0; 4096];
        let n = reader.read(&mut buffer).unwrap();
        child.wait().unwrap();
        drop(pty.slave);
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    };
    assert!(on_terminal("").contains('\x1b'));
    assert!(!on_terminal("1").contains('\x1b'));
}

#[test]
fn configuration_comes_from_flags_then_environment_then_file() {
    let instance = Instance::new();
    let config = instance.path().join("config.yaml");
    let (root, run) = (instance.root(), instance.run_dir());
    fs::write(&config, format!("root: {}\nrun: {}\n", root.display(), run.display())).unwrap();
    let bare = |arguments: &[&str], environment: &[(&str, &str)]| -> keel_tests::Ran {
        let mut command = Command::new(keel_tests::bin("keel"));
        for name in ["KEEL_ROOT", "KEEL_RUN", "KEEL_CONFIG", "KEEL_NAMESPACE"] {
            command.env_remove(name);
        }
        command
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap()
            .into()
    };
    instance.import_busybox();
    let images = |ran: keel_tests::Ran| ran.expect_code(0).stdout.contains("busybox");
    let file = config.to_str().unwrap();
    assert!(images(bare(&["--config", file, "image", "ls"], &[])));
    assert!(images(bare(&["image", "ls"], &[("KEEL_CONFIG", file)])));
    let (root, run) = (root.to_str().unwrap(), run.to_str().unwrap());
    assert!(images(bare(&["image", "ls"], &[("KEEL_ROOT", root), ("KEEL_RUN", run)])));
    let elsewhere = instance.path().join("elsewhere");
    let (other, other_run) = (elsewhere.join("root"), elsewhere.join("run"));
    let (other, other_run) = (other.to_str().unwrap(), other_run.to_str().unwrap());
    let environment = [("KEEL_ROOT", other), ("KEEL_RUN", other_run), ("KEEL_CONFIG", file)];
    assert!(!images(bare(&["image", "ls"], &environment)), "environment wins over the file");
    assert!(
        images(bare(&["--root", root, "--run", run, "image", "ls"], &environment)),
        "a flag wins over the environment"
    );
    let namespace = bare(&["--config", file, "get"], &[("KEEL_NAMESPACE", "elsewhere")]);
    assert!(namespace.stderr.contains("namespace elsewhere"), "{}", namespace.all());

    fs::write(&config, "root: /x\nrooot: /y\n").unwrap();
    let unknown = bare(&["--config", file, "get"], &[]).expect_code(2);
    for part in [file, "rooot", "hint:"] {
        assert!(unknown.stderr.contains(part), "{part}: {}", unknown.stderr);
    }
    bare(&["--config", "/no/such/config.yaml", "get"], &[]).expect_code(2);
}

#[test]
fn flags_that_make_no_sense_are_invalid_input() {
    let instance = Instance::new();
    for arguments in [
        &["get", "--no-such-flag"][..],
        &["no-such-command"],
        &["apply"],
        &["apply", "-f", "/no/such/file"],
        &["logs"],
        &["exec", "web"],
        &["get", "-o", "xml"],
        &["logs", "web", "--since", "soon"],
        &["get", "-l", "a=b=c"],
        &["daemon"],
        &["--runtime", "/no/such/runtime", "apply", "-f", "/dev/null"],
    ] {
        let ran = instance.keel(arguments);
        assert_eq!(ran.code(), 2, "{arguments:?}: {}", ran.all());
        assert!(!ran.stderr.is_empty(), "{arguments:?}");
    }
    let help = instance.keel(&["--help"]).expect_code(0).stdout;
    assert!(help.contains("Exit codes"), "{help}");
}

#[test]
fn the_status_is_in_files_too() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web"));
    instance.start_daemon();
    instance.await_ready("web");
    let dir = instance.run_dir().join("status");
    let read = |name: &str| -> Option<Value> {
        serde_json::from_str(&fs::read_to_string(dir.join(name)).ok()?).ok()
    };
    let ready = |pod: &Value| {
        let all = pod["conditions"].as_array().cloned().unwrap_or_default();
        all.iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True" && c["lastTransitionTime"].is_string())
    };
    eventually_or(
        || format!("{:?}", read("pod_default_web.json")),
        || read("pod_default_web.json").filter(ready),
    );
    let whole = read("status.json").unwrap();
    assert_eq!(whole["pods"][0]["name"], "web", "{whole:#}");
    instance.write("other.yaml", &sleeper("other"));
    eventually("another pod has a file", || read("pod_default_other.json").filter(ready));
    fs::remove_file(instance.manifests().join("web.yaml")).unwrap();
    eventually("the file goes with its pod", || (!dir.join("pod_default_web.json").exists()).then_some(()));
    instance.write("broken.yaml", "kind: Pod\nmetadata: [\n");
    eventually_or(
        || format!("{:?}", read("status.json")),
        || read("status.json").filter(|whole| whole["problems"].to_string().contains("broken.yaml")),
    );
}

#[test]
fn a_daemon_that_ends_while_a_command_waits_is_said_with_code_5() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("keep.yaml", &sleeper("keep"));
    for kill in [true, false] {
        instance.start_daemon();
        instance.await_ready("keep");
        let mut command = instance.command(&["get", "-w"]);
        command.stderr(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 4];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        if kill {
            instance.kill_daemon();
        } else {
            instance.stop_daemon();
        }
        let ran: keel_tests::Ran = child.wait_with_output().unwrap().into();
        assert_eq!(ran.code(), 5, "{}", ran.all());
        assert!(ran.stderr.contains("gone away") && ran.stderr.contains("hint:"), "{}", ran.stderr);
    }
}

#[test]
fn an_apply_whose_command_is_killed_is_carried_through_by_the_daemon() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.start_daemon();
    let file = instance.path().join("m.yaml");
    fs::write(&file, sleeper("web")).unwrap();
    let mut apply = Running::start(instance.command(&["apply", "-f", file.to_str().unwrap(), "--wait"]));
    apply.line_with("plan:");
    apply.child.kill().unwrap();
    apply.child.wait().unwrap();
    instance.await_ready("web");
}

#[test]
fn a_followed_log_ends_when_its_pod_is_deleted() {
    let instance = Instance::new();
    instance.import_busybox();
    let text = "    command: [sh, -c, 'echo here; trap \"echo bye; exit 0\" TERM; sleep 100000 & wait']\n";
    instance.apply(&pod("web", text)).expect_code(0);
    let mut follow = Running::start(instance.command(&["logs", "-f", "web"]));
    follow.line_with("here");
    instance.keel(&["delete", "pod/web"]).expect_code(0);
    let (left, code) = follow.end();
    assert_eq!((left, code), (vec!["bye".to_string()], 0));
}

#[test]
fn a_failing_probe_is_one_line_of_the_log_however_often_it_fails() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let never = format!("{SLEEP}    readinessProbe: {{exec: {{command: ['false']}}, periodSeconds: 1}}\n");
    instance.write("bad.yaml", &pod("bad", &never));
    instance.start_daemon();
    eventually("it fails three times", || {
        let text = instance.keel(&["events", "--for", "pod/bad", "-o", "json"]).stdout;
        let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|event| event["reason"] == "Unhealthy")
            .any(|event| event["count"].as_u64() >= Some(3))
            .then_some(())
    });
    let log = instance.daemon_log();
    assert_eq!(log.lines().filter(|line| line.contains("Unhealthy")).count(), 1, "{log}");
}

/// The daemon may be stopped for an upgrade, say: its pods are not the command's.
#[test]
fn a_command_without_the_daemon_leaves_the_directorys_pods_alone() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("filed.yaml", &sleeper("filed"));
    instance.start_daemon();
    instance.await_ready("filed");
    let filed = instance.pids();
    instance.stop_daemon();
    instance.apply(&sleeper("web")).expect_code(0);
    let (id, pid) = filed.first_key_value().unwrap();
    assert_eq!(instance.pids().get(id), Some(pid));
    instance.keel_with_input(&["apply", "-f", "-", "--prune", "--allow-empty", "--wait"], "").expect_code(0);
    assert_eq!(instance.pids(), filed);
    let refused = instance.keel(&["delete", "pod/filed"]);
    assert!(refused.code() != 0 && refused.stderr.contains("filed.yaml:1"), "{}", refused.all());
    // The same directory by hand: what is on disk now is what holds.
    instance.write("filed.yaml", &pod("filed", &format!("{SLEEP}    env: [{{name: A, value: b}}]\n")));
    let manifests = instance.manifests();
    instance.keel(&["apply", "-f", manifests.to_str().unwrap(), "--wait"]).expect_code(0);
    let changed = instance.pids();
    assert!(changed.len() == 1 && changed != filed, "{changed:?}");
    instance.start_daemon();
    instance.keel(&["reconcile"]).expect_code(0);
    instance.await_ready("filed");
    assert_eq!(instance.pids(), changed);
}

#[test]
fn a_broken_file_is_an_event_and_a_line_of_the_log() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.start_daemon();
    let find = |reason: &str| {
        let text = instance.keel(&["events", "-o", "json"]).expect_code(0).stdout;
        text.lines().any(|line| line.contains("File/broken.yaml") && line.contains(reason)).then_some(())
    };
    instance.write("broken.yaml", "kind: Pod\nmetadata: [\n");
    eventually("a warning", || find("ManifestInvalid"));
    assert!(instance.daemon_log().contains("broken.yaml"), "{}", instance.daemon_log());
    instance.write("broken.yaml", &sleeper("whole"));
    eventually("the end of it", || find("ManifestValid"));
}
