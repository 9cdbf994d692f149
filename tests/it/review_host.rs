//! The host's side of a container's life, where something else goes wrong: talkative and hanging probes, a killed shim, a
//! changed runtime, a private umask.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use keel_tests::manifest::{SLEEP, pod, sleeper};
use keel_tests::{Instance, Ran, bin, eventually, eventually_or, is_alive, is_ready};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn probed(name: &str, kind: &str, script: &str, timing: &str) -> String {
    pod(name, &format!("{SLEEP}    {kind}:\n      exec: {{command: [sh, -c, '{script}']}}\n{timing}"))
}

/// Processes with that word among their arguments.
fn processes(word: &str) -> usize {
    let commands = fs::read_dir("/proc").unwrap().flatten();
    let read = commands.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    read.filter(|line| line.split(|byte| *byte == 0).any(|found| found == word.as_bytes())).count()
}

fn mark(path: PathBuf) -> Option<u32> {
    fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}

fn shim_of(instance: &Instance, id: &str) -> Option<u32> {
    mark(instance.run_dir().join("containers").join(id).join("shim.pid"))
}

fn end(pid: u32) {
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    eventually("a killed process is gone", || (!is_alive(pid)).then_some(()));
}

#[test]
fn a_probe_may_say_more_than_anybody_reads() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let talk = "head -c 300000 /dev/zero >&2 && head -c 300000 /dev/zero && head -c 300000 /dev/zero >&2";
    let timing = "      timeoutSeconds: 20\n      periodSeconds: 1\n      failureThreshold: 1\n";
    instance.write("talks.yaml", &probed("talks", "readinessProbe", talk, timing));
    instance.start_daemon();
    instance.await_ready("talks");
}

fn a_probe_leaves_nothing(mut instance: Instance, word: &str) {
    instance.import_busybox();
    let timing = "      timeoutSeconds: 2\n      periodSeconds: 600\n      failureThreshold: 9\n";
    let hang = format!("sleep {word} & sleep {word}");
    instance.write("hangs.yaml", &probed("hangs", "readinessProbe", &hang, timing));
    instance.start_daemon();
    eventually_or(
        || format!("the probe runs\n{}", instance.daemon_log()),
        || (processes(word) == 2).then_some(()),
    );
    let before = Instant::now();
    eventually("what the probe started is gone", || (processes(word) == 0).then_some(()));
    assert!(before.elapsed() < Duration::from_secs(20), "{:?}", before.elapsed());
    assert!(!is_ready(&instance.pod("hangs")));
}

#[test]
fn a_probe_that_hangs_leaves_no_process() {
    a_probe_leaves_nothing(Instance::new(), "71234501");
}

#[test]
fn a_probe_that_hangs_leaves_no_process_with_runc() {
    if !Path::new("/usr/bin/runc").exists() && !Path::new("/usr/sbin/runc").exists() {
        return eprintln!("skipped: no runc here");
    }
    a_probe_leaves_nothing(Instance::new().with(&["--runtime", &runc()]), "71234502");
}

fn runc() -> String {
    let found = ["/usr/bin/runc", "/usr/sbin/runc"].into_iter().find(|path| Path::new(path).exists());
    found.unwrap_or("/usr/bin/runc").to_string()
}

#[test]
fn a_container_cannot_write_to_what_the_host_keeps_in_memory() {
    let instance = Instance::new();
    instance.import_busybox();
    instance.apply(&sleeper("web")).expect_code(0);
    for file in ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"] {
        let ran = instance.keel(&["exec", "web", "--", "sh", "-c", &format!("echo x >> {file}")]);
        assert_ne!(ran.code(), 0, "{file}");
        assert!(ran.all().contains("Read-only"), "{file}: {}", ran.all());
        instance.keel(&["exec", "web", "--", "cat", file]).expect_code(0);
    }
}

#[test]
fn a_container_stays_with_the_runtime_that_made_it() {
    if !Path::new(&runc()).exists() {
        return eprintln!("skipped: no runc here");
    }
    let instance = Instance::new().with(&["--runtime", &runc()]);
    instance.import_busybox();
    instance.apply(&sleeper("web")).expect_code(0);
    let ours = |arguments: &[&str]| -> Ran {
        let mut command = Command::new(bin("keel"));
        command.arg("--root").arg(instance.root()).arg("--run").arg(instance.run_dir());
        command.args(arguments).output().unwrap().into()
    };
    assert_eq!(ours(&["exec", "web", "--", "echo", "hello"]).expect_code(0).stdout, "hello\n");
    let (id, pid) = instance.pids().into_iter().next().unwrap();
    // Without its shim, it is the engine that has to call the runtime.
    end(shim_of(&instance, &id).unwrap());
    ours(&["delete", "pod", "web"]).expect_code(0);
    assert!(!is_alive(pid));
    assert!(!instance.run_dir().join("runtime").join(&id).exists());
}

#[test]
fn a_command_that_could_not_be_tried_is_not_one_that_was_not_found() {
    let instance = Instance::new();
    instance.import_busybox();
    instance.apply(&sleeper("web")).expect_code(0);
    instance.keel(&["exec", "web", "--", "no-such-command"]).expect_code(127);
    let (id, _) = instance.pids().into_iter().next().unwrap();
    let config = instance.run_dir().join("containers").join(&id).join("config.json");
    let text = fs::read(&config).unwrap();
    fs::remove_file(&config).unwrap();
    instance.keel(&["exec", "web", "--", "true"]).expect_code(125);
    fs::write(&config, text).unwrap();
    let state = instance.run_dir().join("runtime").join(&id);
    let aside = instance.path().join("aside");
    fs::rename(&state, &aside).unwrap();
    instance.keel(&["exec", "web", "--", "true"]).expect_code(125);
    fs::rename(&aside, &state).unwrap();
}

#[test]
fn a_killed_shim_is_noticed_at_once() {
    /// The periodic look is every 20 s.
    const SOON: Duration = Duration::from_secs(8);
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web"));
    instance.start_daemon();
    instance.await_ready("web");
    let pids = instance.pids();
    let (id, _) = pids.iter().next().unwrap();
    for _ in 0..3 {
        let first = shim_of(&instance, id).unwrap();
        let before = Instant::now();
        end(first);
        eventually_or(
            || format!("another shim\n{}", instance.daemon_log()),
            || shim_of(&instance, id).filter(|pid| *pid != first && is_alive(*pid)),
        );
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        instance.keel(&["reconcile"]).expect_code(0);
    }
    assert_eq!(instance.pids(), pids);
}

#[test]
fn a_lost_run_was_lost_once() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web").replace("spec:\n", "spec:\n  restartPolicy: Never\n"));
    instance.start_daemon();
    instance.await_ready("web");
    let (id, pid) = instance.pids().into_iter().next().unwrap();
    instance.kill_daemon();
    end(shim_of(&instance, &id).unwrap());
    end(pid);
    instance.start_daemon();
    let record = || fs::read_to_string(instance.root().join(format!("exits/{id}.json"))).ok();
    let first = eventually("the loss is recorded", record);
    assert!(first.contains("\"lost\":true"), "{first}");
    instance.keel(&["reconcile"]).expect_code(0);
    assert_eq!(record().unwrap(), first);
}

#[test]
fn a_private_umask_does_not_close_directories_of_volumes() {
    let instance = Instance::new();
    instance.import_busybox();
    let host = instance.path().join("made/deep");
    let manifest = pod(
        "web",
        &format!(
            "{SLEEP}    volumeMounts: [{{name: v, mountPath: /v}}]\n  volumes:\n  - name: v\n    hostPath: {{path: {}, \
             type: DirectoryOrCreate}}\n",
            host.display()
        ),
    );
    let file = instance.path().join("web.yaml");
    fs::write(&file, manifest).unwrap();
    let keel = instance.command(&["apply", "--wait", "--timeout", "60s", "-f", file.to_str().unwrap()]);
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "umask 077; exec \"$@\"", "sh"]).arg(keel.get_program()).args(keel.get_args());
    Ran::from(shell.output().unwrap()).expect_code(0);
    for dir in [host.as_path(), host.parent().unwrap()] {
        let mode = fs::metadata(dir).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o755, "{}", dir.display());
    }
}
