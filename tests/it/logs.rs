//! Log drivers and options of pods: from an annotation or the daemon's configuration to what `keel logs` shows.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Stdio;

use keel_tests::manifest::pod;
use keel_tests::{Instance, eventually};

/// A pod with annotations that runs a script.
fn talker(name: &str, annotations: &str, script: &str) -> String {
    let text = pod(name, &format!("    command: [sh, -c, '{script}']\n"));
    text.replace(
        &format!("metadata: {{name: {name}}}"),
        &format!("metadata: {{name: {name}, annotations: {{{annotations}}}}}"),
    )
}

const STAY: &str = "trap \"exit 0\" TERM; sleep 100000 & wait";

fn log_files(instance: &Instance) -> Vec<PathBuf> {
    let pods = fs::read_dir(instance.root().join("logs")).into_iter().flatten().flatten();
    let main = pods.map(|pod| pod.path().join("main"));
    main.flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten()).map(|e| e.path()).collect()
}

#[test]
fn a_compressed_log_is_followed_and_read_as_any_other() {
    const LINES: u32 = 3000;
    let instance = Instance::new();
    instance.import_busybox();
    let options = "evenkeel.dev/log-opt: \"max-size=16k,max-file=50,compress=true\"";
    let script = format!(
        "usleep 300000; i=0; while [ $i -lt {LINES} ]; do echo number $i of the lines; i=$((i+1)); done; {STAY}"
    );
    instance.apply(&talker("talk", options, &script)).expect_code(0);
    let mut follow = instance.command(&["logs", "-f", "talk"]).stdout(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(follow.stdout.take().unwrap());
    let lines: Vec<String> = out.lines().map_while(Result::ok).take(LINES as usize).collect();
    follow.kill().unwrap();
    follow.wait().unwrap();
    let wanted: Vec<String> = (0..LINES).map(|n| format!("number {n} of the lines")).collect();
    assert!(lines == wanted, "{} lines of {}", lines.len(), wanted.len());
    eventually("rotated files are compressed", || {
        let files = log_files(&instance);
        let packed = files.iter().filter(|p| p.extension().is_some_and(|e| e == "gz")).count();
        (packed > 5 && packed + 1 == files.len()).then_some(())
    });
    let show = |more: &[&str]| instance.keel(&[&["logs", "talk"], more].concat()).expect_code(0).stdout;
    assert_eq!(show(&[]).lines().count(), LINES as usize);
    assert_eq!(show(&["--since", "1h"]).lines().count(), LINES as usize);
    let tail = show(&["--tail", "2500"]);
    assert_eq!((tail.lines().count(), tail.lines().next()), (2500, Some("number 500 of the lines")));
}

#[test]
fn a_raw_log_is_shown_as_it_was_written() {
    let instance = Instance::new();
    instance.import_busybox();
    let script = format!("echo one; echo two; printf tail; {STAY}");
    instance.apply(&talker("web", "evenkeel.dev/log-driver: raw", &script)).expect_code(0);
    let show = |more: &[&str]| instance.keel(&[&["logs", "web"], more].concat()).expect_code(0).stdout;
    eventually("everything is written", || show(&[]).contains("tail").then_some(()));
    assert_eq!(show(&["--tail", "1"]), "tail\n");
    assert_eq!(show(&["--since", "1h"]).lines().count(), 3);
    let files = log_files(&instance);
    assert_eq!(files.len(), 1, "{files:?}");
    assert_eq!(fs::read_to_string(&files[0]).unwrap(), "one\ntwo\ntail");
}

#[test]
fn output_that_is_kept_elsewhere_is_said_to_be() {
    let instance = Instance::new();
    instance.import_busybox();
    let config = instance.path().join("config.yaml");
    fs::write(&config, "logs: {driver: none}\n").unwrap();
    let with = ["--config", config.to_str().unwrap()];
    let apply = |text: &str| {
        instance.keel_with_input(&[&with[..], &["apply", "-f", "-"]].concat(), text).expect_code(0);
    };
    apply(&talker("mute", "", &format!("echo said; {STAY}")));
    apply(&talker("sys", "evenkeel.dev/log-driver: journald", &format!("echo said; {STAY}")));
    let show = |pod: &str| instance.keel(&[&with[..], &["logs", pod]].concat()).expect_code(1).stderr;
    let mute = show("mute");
    assert!(mute.contains("is kept nowhere: its log driver is none"), "{mute}");
    assert!(show("sys").contains("journalctl CONTAINER_NAME=sys-main"), "{}", show("sys"));
    assert_eq!(log_files(&instance), Vec::<PathBuf>::new());
}

#[test]
fn mistakes_in_log_annotations_have_a_place_and_a_way_out() {
    let instance = Instance::new();
    let check = |annotations: &str, column: usize, message: &str| {
        let text = talker("web", annotations, STAY);
        let ran = instance.keel_with_input(&["check", "-f", "-"], &text).expect_code(2);
        assert!(ran.stderr.contains(message), "{}", ran.stderr);
        assert!(ran.stderr.contains(&format!(":3:{column}")), "{}", ran.stderr);
    };
    let driver = |value: &str| format!("evenkeel.dev/log-driver: {value}");
    // After `metadata: {name: web, annotations: {evenkeel.dev/log-driver: `.
    check(&driver("jornald"), 62, "no log driver \"jornald\" (did you mean journald?)");
    check(&driver("\"none,raw\""), 62, "none excludes all other drivers");
    let option = |value: &str| format!("evenkeel.dev/log-opt: \"{value}\"");
    check(&option("max-size=10x"), 59, "max-size: \"10x\" is not a size such as 10m");
    check(&option("max-buffer-size=1m,mode=blocking"), 59, "max-buffer-size is for mode=non-blocking");
    check("evenkeel.dev/log-opts: x", 60, "is none of evenkeel.dev/log-driver, evenkeel.dev/log-opt");
}

#[test]
fn other_log_options_are_another_container_and_other_annotations_are_not() {
    let instance = Instance::new();
    instance.import_busybox();
    let apply = |annotations: &str| {
        instance.apply(&talker("web", annotations, STAY)).expect_code(0);
        instance.pids()
    };
    let first = apply("note: a");
    assert_eq!(apply("note: b"), first);
    let second = apply("note: b, evenkeel.dev/log-opt: \"mode=non-blocking\"");
    assert_ne!(second, first);
    assert_eq!(apply("note: c, evenkeel.dev/log-opt: \"mode=non-blocking\""), second);
}
