//! In conmon's place without podman: what its options and pipes do.

use std::fs::File;
use std::io::BufRead as _;
use std::process::Child;

use super::load::Listener;
use super::*;

/// A container created and started as an engine would do it, with the monitor in the foreground.
struct ByHand<'a> {
    rig: &'a Rig,
    id: String,
    dir: PathBuf,
    monitor: Child,
    sync: std::io::BufReader<File>,
}

impl ByHand<'_> {
    fn create<'a>(rig: &'a Rig, script: &str, options: &[&str]) -> ByHand<'a> {
        let id = rig.id();
        let dir = rig.bundle(&id, &["/bin/sh".into(), "-c".into(), script.into()], false, json!({}));
        for sub in ["exits", "persist"] {
            fs::create_dir(dir.join(sub)).unwrap();
        }
        let (ours, theirs) = nix::unistd::pipe().unwrap();
        fcntl(&ours, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        let mut command = Command::new(&rig.shim);
        command.args(["conmon", "--sync", "-c", &id, "-u", &id, "-n", &id, "-r"]).arg(&rig.runtime);
        command.args(["--runtime-arg", "--root", "--runtime-arg"]).arg(rig.path().join("runtime"));
        command.arg("-b").arg(&dir).arg("-p").arg(dir.join("pidfile")).arg("-P").arg(dir.join("conmon.pid"));
        command.arg("-l").arg(format!("k8s-file:{}", dir.join("0.log").display()));
        command.arg("--exit-dir").arg(dir.join("exits")).arg("--persist-dir").arg(dir.join("persist"));
        if !options.contains(&"--socket-dir-path") {
            command.arg("--full-attach");
        }
        command.args(options);
        command.env("_OCI_SYNCPIPE", theirs.as_raw_fd().to_string()).stdin(Stdio::null());
        let monitor = command.spawn().unwrap();
        ByHand { rig, id, dir, monitor, sync: std::io::BufReader::new(ours.into()) }
    }

    fn answer(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.sync.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn start(&self) {
        let mut start = Command::new(&self.rig.runtime);
        start.arg("--root").arg(self.rig.path().join("runtime")).args(["start", &self.id]);
        assert!(start.status().unwrap().success());
    }

    fn pid(&self) -> i32 {
        self.monitor.id().try_into().unwrap()
    }

    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.dir.join(file)).unwrap_or_default()
    }

    fn exit_code(&mut self) -> Option<i32> {
        self.monitor.wait().unwrap().code()
    }
}

impl Drop for ByHand<'_> {
    fn drop(&mut self) {
        let mut delete = Command::new(&self.rig.runtime);
        delete.arg("--root").arg(self.rig.path().join("runtime")).args(["delete", "--force", &self.id]);
        let _ = delete.stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

fn own_capabilities() -> String {
    status_field(std::process::id().try_into().unwrap(), "CapEff")
}

#[test]
fn the_monitor_is_confined_and_its_exit_command_is_not_and_comes_late_enough() {
    let Some(rig) = Rig::new() else { return };
    let words = ["--exit-command", "/bin/sh", "--exit-command-arg", "-c", "--exit-command-arg"];
    let script = format!(
        "cat /proc/self/status > {dir}/told; readlink /proc/self/fd/1 > {dir}/stdout; echo $PPID > {dir}/ppid",
        dir = rig.path().display()
    );
    let options = [&words[..], &[&script, "--exit-delay", "1", "--api-version"]].concat();
    let mut container = ByHand::create(&rig, "while [ ! -e /go ]; do sleep 0.02; done; exit 7", &options);
    let pid = container.answer()["data"].as_i64().unwrap();
    assert_eq!(container.text("pidfile").trim(), pid.to_string());
    assert_eq!(container.text("conmon.pid").trim(), container.pid().to_string());
    container.start();
    assert_confined(container.pid());
    let (shim, helper) = (container.pid(), await_helper(container.pid()));
    assert_eq!(fs::read_dir(format!("/proc/{helper}/fd")).unwrap().count(), 1);
    assert_eq!(status_field(i32::try_from(pid).unwrap(), "NoNewPrivs"), "0");
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    poll("the exit file", || container.dir.join("exits").join(&container.id).exists());
    let ended = Instant::now();
    assert!(!rig.path().join("told").exists(), "the exit command does not wait");
    assert_eq!(container.exit_code(), Some(7));
    assert!(ended.elapsed() > Duration::from_millis(700));
    assert_eq!(container.text(&format!("exits/{}", container.id)), "7");
    assert_eq!(container.text("persist/exit"), "7");
    let told = fs::read_to_string(rig.path().join("told")).unwrap();
    for line in ["NoNewPrivs:\t0", "Seccomp:\t0", &format!("CapEff:\t{}", own_capabilities())] {
        assert!(told.contains(line), "{line}: {told}");
    }
    assert_eq!(
        fs::read_to_string(rig.path().join("stdout")).unwrap().trim(),
        rig.path().join("stdout").to_str().unwrap()
    );
    assert_eq!(fs::read_to_string(rig.path().join("ppid")).unwrap().trim(), shim.to_string());
    poll("the helper goes", || !runs(helper));
}

#[test]
fn without_an_exit_command_there_is_no_second_process() {
    let Some(rig) = Rig::new() else { return };
    let mut container = ByHand::create(&rig, "sleep 1000", &["--api-version"]);
    container.answer();
    container.start();
    assert_confined(container.pid());
    assert_eq!(helper_of(container.pid()), None);
    assert_eq!(status_field(container.pid(), "Threads"), "1");
    let open = fs::read_dir(format!("/proc/{}/fd", container.pid())).unwrap().flatten();
    let open: Vec<_> = open.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    // What the caller leaves open is kept open.
    let inherited = fs::read_dir("/proc/self/fd").unwrap().flatten().filter(|entry| {
        let number: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap_or("02000000");
        number > 2 && i64::from_str_radix(flags, 8).unwrap() & 0o2_000_000 == 0
    });
    assert!(open.len() <= 11 + inherited.count(), "{open:?}");
}

#[test]
fn the_key_of_an_answer_is_that_of_the_callers_generation() {
    let Some(rig) = Rig::new() else { return };
    let mut container = ByHand::create(&rig, "sleep 1000", &[]);
    let answer = container.answer();
    assert!(answer["pid"].as_i64().is_some_and(|pid| pid > 1) && answer.get("data").is_none(), "{answer}");
}

#[test]
fn what_the_runtime_refuses_is_told_in_its_words() {
    let Some(rig) = Rig::new() else { return };
    let mut container = ByHand::create(&rig, "true", &["--api-version", "--runtime-opt", "--no-such-option"]);
    let answer = container.answer();
    assert_eq!(answer["data"], -1, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("no-such-option"), "{answer}");
    assert_eq!(container.exit_code(), Some(1));
}

#[test]
fn nothing_is_logged_beyond_the_global_bound() {
    let Some(rig) = Rig::new() else { return };
    let options = ["--api-version", "--log-global-size-max", "0x400", "--no-sync-log"];
    let mut container = ByHand::create(&rig, "seq 1 10000", &options);
    container.answer();
    container.start();
    assert_eq!(container.exit_code(), Some(0));
    let len = container.text("0.log").len();
    assert!((500..=1024).contains(&len), "{len}");
}

#[test]
fn a_client_stopped_by_a_signal_delays_output_and_nothing_of_it_is_lost_when_it_goes() {
    let Some(rig) = Rig::new() else { return };
    const BYTES: usize = 4_000_000;
    let line = "y".repeat(999);
    let script = format!("while [ ! -e /go ]; do sleep 0.02; done; yes {line} | head -c {BYTES}; exit 5");
    let mut container = ByHand::create(&rig, &script, &["--api-version"]);
    container.answer();
    container.start();
    let Some(client) = Listener::connect(&container.dir.join("attach"), b"") else { return };
    client.signal(Signal::SIGSTOP);
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    // It rests at what the client's socket holds.
    let mut before = usize::MAX;
    poll("rest", || {
        let len = container.text("0.log").len();
        let rests = len == before && len > 0;
        before = len;
        std::thread::sleep(Duration::from_millis(300));
        rests
    });
    assert!(before < BYTES, "{before}");
    client.signal(Signal::SIGKILL);
    assert_eq!(container.exit_code(), Some(5));
    assert_eq!(output(&container.text("0.log"), "stdout").len(), BYTES);
}

#[test]
fn the_input_ends_with_its_first_client_unless_it_is_to_be_left_open() {
    let Some(rig) = Rig::new() else { return };
    for (options, expected) in [(&[][..], "one\n"), (&["--leave-stdin-open"], "one\ntwo\n")] {
        let options = [&["--api-version", "-i"], options].concat();
        let mut container = ByHand::create(&rig, "read a; echo $a; if read b; then echo $b; fi", &options);
        container.answer();
        container.start();
        let socket = container.dir.join("attach");
        let Some(first) = Listener::connect(&socket, b"one\n") else { return };
        poll("the first line", || output(&container.text("0.log"), "stdout") == "one\n");
        drop(first);
        let second = (expected != "one\n").then(|| Listener::connect(&socket, b"two\n"));
        assert_eq!(container.exit_code(), Some(0));
        assert_eq!(output(&container.text("0.log"), "stdout"), expected);
        drop(second);
    }
}

#[test]
fn a_short_way_to_the_attach_socket_is_there_as_long_as_the_container() {
    let Some(rig) = Rig::new() else { return };
    let sockets = rig.path().join("sockets");
    fs::create_dir(&sockets).unwrap();
    let options = ["--api-version", "--socket-dir-path", sockets.to_str().unwrap()];
    let mut container =
        ByHand::create(&rig, "while [ ! -e /go ]; do sleep 0.02; done; echo seen; exit 3", &options);
    container.answer();
    let link = sockets.join(&container.id);
    assert_eq!(fs::read_link(&link).unwrap(), container.dir);
    container.start();
    let Some(mut client) = Listener::connect(&link.join("attach"), b"") else { return };
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    // The stream's byte, then output.
    assert_eq!(client.next().unwrap(), b"\x02seen\n");
    assert_eq!(client.next(), None);
    assert_eq!(container.exit_code(), Some(3));
    assert!(fs::symlink_metadata(&link).is_err());
}
