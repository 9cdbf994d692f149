//! The monitor in conmon's place: the real podman runs, executes, attaches, logs, stops and restarts through it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use keel_tests::image::{BUSYBOX, busybox_archive_in};
use keel_tests::{PATIENCE, bin};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// What a host without CAP_SYS_RESOURCE allows; podman asks for more and fails otherwise.
const LIMITS: [&str; 4] = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1024:1024"];
const SHORT: Duration = Duration::from_millis(20);

#[test]
fn run_prints_everything_and_passes_the_exit_code_on() {
    for podman in Podman::each() {
        let out = podman.run("run", &["--rm"], "seq 1 5000; echo grave >&2; exit 3");
        assert_eq!(out.status.code(), Some(3), "{out:?}");
        let expected: String = (1..=5000).map(|n| format!("{n}\n")).collect();
        assert!(out.stdout == expected.as_bytes(), "{} bytes", out.stdout.len());
        assert_eq!(String::from_utf8_lossy(&out.stderr), "grave\n");
    }
}

#[test]
fn run_feeds_its_input_to_the_end() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let mut command = podman.command("run", &["--rm", "-i"], "wc -c");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&vec![b'x'; 3_000_000]).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "3000000\n");
}

#[test]
fn a_detached_container_leaves_its_log_and_its_exit_code() {
    for podman in Podman::each() {
        let name = podman.start("detached", &[], "echo out; echo err >&2; printf part; exit 7");
        assert_eq!(podman.text(&["wait", &name]), "7\n");
        assert_eq!(podman.inspect(&name, "/State/Status"), "exited");
        let out = podman.podman(&["logs", &name]);
        assert_eq!(String::from_utf8_lossy(&out.stdout).trim_end(), "out\npart");
        assert_eq!(String::from_utf8_lossy(&out.stderr), "err\n");
    }
}

#[test]
fn logs_are_followed_until_the_container_ends() {
    for podman in Podman::each() {
        let name = podman.start("follow", &[], "for i in 1 2 3 4; do echo $i; sleep 0.2; done");
        assert_eq!(podman.text(&["logs", "-f", &name]), "1\n2\n3\n4\n");
    }
}

#[test]
fn a_container_with_a_terminal_has_its_size_and_its_line_ends() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let mut command = podman.command("run", &["--rm", "-it", "--name", "tty"], "read a; stty size; exit 5");
    let mut terminal = Terminal::spawn(&mut command, 33, 77);
    terminal.type_line("go");
    let seen = terminal.wait_for("33 77");
    assert!(seen.contains("33 77\r\n"), "{seen:?}");
    assert_eq!(terminal.exit_code(), 5);
}

#[test]
fn exec_has_its_own_output_input_and_exit_code() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let name = podman.start("exec", &[], "sleep 1000");
    // Quick ones: the end must not overtake the output.
    for n in 0..5 {
        let out = podman.podman(&["exec", &name, "sh", "-c", &format!("echo {n}; echo e >&2; exit 9")]);
        assert_eq!(out.status.code(), Some(9));
        assert_eq!(String::from_utf8_lossy(&out.stdout), format!("{n}\n"));
        assert_eq!(String::from_utf8_lossy(&out.stderr), "e\n");
    }
    let mut cat = podman.bare(&["exec", "-i", &name, "cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    cat.stdin.take().unwrap().write_all(b"hello").unwrap();
    assert_eq!(cat.wait_with_output().unwrap().stdout, b"hello");
    let missing = podman.podman(&["exec", &name, "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no-such-program"), "{missing:?}");
    podman.text(&["exec", "-d", &name, "sh", "-c", "echo done > /tmp/detached"]);
    let done = || podman.podman(&["exec", &name, "cat", "/tmp/detached"]).stdout == b"done\n";
    poll("the detached command", done);
}

#[test]
fn exec_in_a_terminal_has_its_size_and_its_exit_code() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let name = podman.start("exectty", &[], "sleep 1000");
    let mut command = podman.bare(&["exec", "-it", &name, "sh", "-c", "read a; stty size; exit 6"]);
    let mut terminal = Terminal::spawn(&mut command, 40, 100);
    terminal.type_line("go");
    terminal.wait_for("40 100\r\n");
    assert_eq!(terminal.exit_code(), 6);
}

#[test]
fn attach_shows_output_and_feeds_input_and_its_end_ends_the_input() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let name = podman.start("attach", &["-i"], "cat; echo end; exit 4");
    let mut attach = podman.bare(&["attach", &name]);
    let mut child = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"one\n").unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut seen = [0; 4];
    output.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"one\n");
    drop(input);
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    // podman ends with an empty line of its own.
    assert_eq!(rest.trim_end(), "end");
    child.wait().unwrap();
    assert_eq!(podman.text(&["wait", &name]), "4\n");
    assert_eq!(podman.text(&["logs", &name]), "one\nend\n");
}

#[test]
fn a_client_that_stands_still_holds_up_neither_stop_nor_exec() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let script = "trap 'exit 4' TERM; (yes & wait) & while :; do sleep 0.05; done";
    let name = podman.start("stuck", &[], script);
    let mut attach = podman.bare(&["attach", "--no-stdin", "--sig-proxy=false", &name]);
    let mut child = attach.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    std::thread::sleep(SHORT * 10);
    assert_eq!(podman.text(&["exec", &name, "echo", "alive"]), "alive\n");
    let begun = Instant::now();
    podman.text(&["stop", "-t", "30", &name]);
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(podman.inspect(&name, "/State/ExitCode"), 4);
    kill(pid, Signal::SIGKILL).unwrap();
    child.wait().unwrap();
}

#[test]
fn stop_and_restart_work_and_the_log_goes_on() {
    for podman in Podman::each() {
        let script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.05; done";
        let name = podman.start("stop", &[], script);
        let lines = |count| {
            let logged = || podman.text(&["logs", &name]).lines().count() == count;
            poll("the next line", logged);
        };
        lines(1);
        podman.text(&["stop", "-t", "30", &name]);
        assert_eq!(podman.inspect(&name, "/State/ExitCode"), 4);
        podman.text(&["restart", &name]);
        lines(3);
        podman.text(&["restart", "-t", "30", &name]);
        lines(5);
        podman.text(&["kill", &name]);
        poll("the end", || podman.inspect(&name, "/State/ExitCode") == 137);
        assert_eq!(podman.text(&["logs", &name]), "ready\nbye\nready\nbye\nready\n");
    }
}

#[test]
fn the_exit_command_removes_and_restarts_as_podman_was_told() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let gone = podman.start("gone", &["--rm"], "true");
    poll("removal", || !podman.podman(&["container", "exists", &gone]).status.success());
    let again = podman.start("again", &["--restart=on-failure:2"], "echo try; exit 1");
    poll("two restarts", || podman.text(&["logs", &again]) == "try\ntry\ntry\n");
    poll("the end", || podman.inspect(&again, "/State/Status") == "exited");
    assert_eq!(podman.inspect(&again, "/RestartCount"), 2);
}

#[test]
fn a_container_killed_for_memory_is_known_as_that() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let script = "exec dd if=/dev/zero of=/dev/null bs=100M count=1";
    let name = podman.start("oom", &["--memory=32m", "--memory-swap=32m"], script);
    assert_eq!(podman.text(&["wait", &name]), "137\n");
    poll("the end", || podman.inspect(&name, "/State/Status") == "exited");
    assert_eq!(podman.inspect(&name, "/State/OOMKilled"), true);
}

#[test]
fn a_log_stays_below_its_size_and_ends_with_the_last_lines() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let name = podman.start("size", &["--log-opt", "max-size=20k"], "seq 1 20000");
    podman.text(&["wait", &name]);
    let log = PathBuf::from(podman.inspect(&name, "/HostConfig/LogConfig/Path").as_str().unwrap());
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.len() <= 20_000 && text.len() > 100, "{}", text.len());
    assert!(text.ends_with(" stdout F 20000\n"), "{text}");
    assert!(podman.text(&["logs", &name]).ends_with("19999\n20000\n"));
}

#[test]
fn a_container_is_killed_when_its_time_is_up() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let name = podman.start("timeout", &["--timeout=1"], "trap '' TERM; sleep 1000");
    poll("the end", || podman.inspect(&name, "/State/Status") == "exited");
    assert_eq!(podman.inspect(&name, "/State/ExitCode"), -1);
}

#[test]
fn readiness_reaches_the_hosts_service_manager_and_nothing_dangerous_does() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let host = podman.path().join("host.sock");
    let manager = UnixDatagram::bind(&host).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut buffer = [0; 4096];
        let len = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    for mode in ["container", "conmon"] {
        let name = format!("notify-{mode}");
        let sdnotify = format!("--sdnotify={mode}");
        let script = "echo ${NOTIFY_SOCKET:-none}; sleep 1000";
        let mut command = podman.command("run", &["-d", "--name", &name, &sdnotify], script);
        let child = command.env("NOTIFY_SOCKET", &host).stdout(Stdio::null()).spawn();
        let mut child = child.unwrap();
        let mut told = String::new();
        if mode == "container" {
            let logged = |text: &[u8]| text.ends_with(b"notify.sock\n");
            poll("the container", || logged(&podman.podman(&["logs", &name]).stdout));
            // As a service in the container would, from outside: the directory is mounted into it.
            let config = PathBuf::from(podman.inspect(&name, "/OCIConfigPath").as_str().unwrap());
            let inside = UnixDatagram::unbound().unwrap();
            // Socket paths end at 107 bytes.
            let dir = fs::File::open(config.with_file_name("notify")).unwrap();
            let socket = format!("/proc/self/fd/{}/notify.sock", dir.as_raw_fd());
            inside.send_to(b"MAINPID=1\nREADY=1\nFDSTORE=1\nSTATUS=at work", socket).unwrap();
        }
        while !told.contains("READY=1") {
            told += &next();
            told.push('\n');
        }
        assert!(child.wait().unwrap().success());
        assert!(!told.contains("MAINPID=1\n") && !told.contains("FDSTORE"), "{told}");
        assert!(told.contains("MAINPID="), "podman names the monitor: {told}");
        assert_eq!(told.contains("STATUS=at work"), mode == "container", "{told}");
    }
}

#[test]
fn inherited_sockets_reach_the_container_with_its_own_pid() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let script = "echo $LISTEN_FDS $LISTEN_PID; cat <&3";
    let mut command = podman.command("run", &["--rm"], script);
    // The descriptor comes from a shell, which knows its own pid too.
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap().replace('\'', r"'\''")))
        .collect();
    let passed = podman.path().join("passed");
    fs::write(&passed, "from descriptor 3\n").unwrap();
    let line = format!("LISTEN_FDS=1 LISTEN_PID=$$ exec {} 3<{}", words.join(" "), passed.display());
    command = Command::new("sh");
    let out = command.args(["-c", &line]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "1 1\nfrom descriptor 3\n", "{out:?}");
}

#[test]
fn an_idle_monitor_never_wakes() {
    let Some(podman) = Podman::new(Driver::File) else { return };
    let name = podman.start("idle", &[], "echo on; sleep 1000");
    let monitor = podman.inspect(&name, "/State/ConmonPid").as_i64().unwrap();
    let switches = || {
        let status = fs::read_to_string(format!("/proc/{monitor}/status")).unwrap();
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.map(|line| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
    };
    let asleep = || {
        let before = switches();
        std::thread::sleep(Duration::from_millis(1500));
        switches() == before
    };
    poll("a second and a half of sleep", asleep);
    assert_eq!(fs::read_dir(format!("/proc/{monitor}/task")).unwrap().count(), 1);
}

#[test]
fn a_wrong_command_line_is_refused_before_anything_is_started() {
    let check = |words: &str, expected: &str| {
        let out = Command::new(bin("keel-shim")).arg("conmon").args(words.split_whitespace()).output();
        let out = out.unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{words}");
        assert!(text.contains(expected), "{words}: {text}");
    };
    check("", "Container ID not provided. Use --cid");
    check("--cid a --what", "Unknown option --what");
    check("--cid a", "Container UUID not provided. Use --cuuid");
    check("-c a -u a", "Runtime path not provided. Use --runtime");
    check("-ca -ua -r /no/such", "Runtime path /no/such is not valid");
    check("-ca -ua -r /bin/sh", "Log driver not provided. Use --log-path");
    check("-ca -ua -r /bin/sh -l what:x", "No such log driver what");
    check("-ca -ua -r /bin/sh -l k8s-file:/no/such/log", "Failed to open log file");
    check("-ca -ua -r /bin/sh -l none -e", "Exec process spec path not provided");
    check("-ca --seccomp-notify-socket /s", "seccomp notifications are not supported");
    check("-ca --timeout x", "Cannot parse integer value");
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Driver {
    File,
    Journal,
}

/// A podman with a store of its own that calls this project's monitor and runtime.
struct Podman {
    store: Arc<Store>,
    driver: Driver,
}

impl Podman {
    /// With each log driver that works here.
    fn each() -> impl Iterator<Item = Podman> {
        [Driver::File, Driver::Journal].into_iter().filter_map(Podman::new)
    }

    /// `None`, with the reason, where this cannot run.
    fn new(driver: Driver) -> Option<Podman> {
        match Store::of(driver) {
            Ok(store) => Some(Podman { store, driver }),
            Err(why) => {
                let _ = writeln!(std::io::stderr(), "skipped: {why}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.store.dir.path()
    }

    fn bare(&self, words: &[&str]) -> Command {
        let mut command = self.store.command();
        command.args(words);
        command
    }

    fn command(&self, verb: &str, options: &[&str], script: &str) -> Command {
        let driver = if self.driver == Driver::File { "k8s-file" } else { "journald" };
        let mut command = self.bare(&[verb, "--network=none", "--log-driver", driver]);
        command.args(LIMITS).args(options).args([BUSYBOX, "sh", "-c", script]);
        command
    }

    fn run(&self, verb: &str, options: &[&str], script: &str) -> Output {
        self.command(verb, options, script).output().unwrap()
    }

    /// Starts a detached container; its name is unique in the store.
    fn start(&self, name: &str, options: &[&str], script: &str) -> String {
        let name = format!("{name}-{:?}", self.driver).to_lowercase();
        let options = [&["-d", "--name", name.as_str()], options].concat();
        let out = self.run("run", &options, script);
        assert!(out.status.success(), "{out:?}");
        name
    }

    fn podman(&self, words: &[&str]) -> Output {
        self.bare(words).output().unwrap()
    }

    /// Standard output of a command that must work.
    #[track_caller]
    fn text(&self, words: &[&str]) -> String {
        let out = self.podman(words);
        assert!(out.status.success(), "{words:?}: {out:?}");
        String::from_utf8(out.stdout).unwrap()
    }

    fn inspect(&self, name: &str, pointer: &str) -> Value {
        let all: Value = serde_json::from_str(&self.text(&["container", "inspect", name])).unwrap();
        all[0].pointer(pointer).cloned().unwrap_or(Value::Null)
    }
}

/// Shared by the tests that run at the same time, because filling it takes longer than most of them. The last one
/// removes it.
struct Store {
    dir: tempfile::TempDir,
    journal: Option<Journal>,
}

impl Store {
    fn of(driver: Driver) -> Result<Arc<Store>, String> {
        static SHARED: [Mutex<Weak<Store>>; 2] = [Mutex::new(Weak::new()), Mutex::new(Weak::new())];
        let mut shared = SHARED[driver as usize].lock().unwrap_or_else(|e| e.into_inner());
        if let Some(store) = shared.upgrade() {
            return Ok(store);
        }
        let store = Arc::new(Store::new(driver)?);
        *shared = Arc::downgrade(&store);
        Ok(store)
    }

    fn new(driver: Driver) -> Result<Store, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("containers need root".into());
        }
        if !Command::new("podman").arg("--version").output().is_ok_and(|out| out.status.success()) {
            return Err("podman is not installed".into());
        }
        if !Path::new("/bin/busybox").exists() {
            return Err("busybox is not installed".into());
        }
        let dir = tempfile::Builder::new().prefix("keel-podman-").tempdir().unwrap();
        std::os::unix::fs::symlink(bin("keel-shim"), dir.path().join("conmon")).unwrap();
        let journal = match driver {
            Driver::File => None,
            Driver::Journal => Some(Journal::start(dir.path())?),
        };
        let store = Store { dir, journal };
        let archive = busybox_archive_in(store.dir.path());
        let out = store.command().args(["load", "-q", "-i"]).arg(archive).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        Ok(store)
    }

    fn command(&self) -> Command {
        let dir = self.dir.path();
        let mut command = match &self.journal {
            None => Command::new("podman"),
            Some(journal) => journal.enter("podman"),
        };
        command.arg("--root").arg(dir.join("root")).arg("--runroot").arg(dir.join("run"));
        command.arg("--tmpdir").arg(dir.join("tmp"));
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
        command.args(["--events-backend", if self.journal.is_some() { "journald" } else { "file" }]);
        command.arg("--conmon").arg(dir.join("conmon"));
        command.arg("--runtime").arg(bin("keel-runtime"));
        command.stdin(Stdio::null());
        command
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.command().args(["rm", "-f", "-a", "-t", "0"]).output();
        // Monitors run podman once more after the end, in the background; it would make the directory anew.
        let begun = Instant::now();
        while mentioned_by_a_process(self.dir.path()) && begun.elapsed() < PATIENCE {
            std::thread::sleep(SHORT);
        }
        let removed = || {
            // podman keeps its store to itself with mounts on it.
            for point in ["root/vfs", "root/overlay"] {
                let flags = nix::mount::MntFlags::MNT_DETACH;
                while nix::mount::umount2(&self.dir.path().join(point), flags).is_ok() {}
            }
            let _ = fs::remove_dir_all(self.dir.path());
            !self.dir.path().exists()
        };
        while !removed() && begun.elapsed() < PATIENCE {
            std::thread::sleep(SHORT);
        }
    }
}

fn mentioned_by_a_process(dir: &Path) -> bool {
    let dir = dir.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.any(|line| String::from_utf8_lossy(&line).contains(dir))
}

/// journald in a mount namespace of its own, for hosts that have none or want theirs left alone.
struct Journal {
    daemon: Child,
}

impl Journal {
    fn start(dir: &Path) -> Result<Journal, String> {
        const DAEMON: &str = "/lib/systemd/systemd-journald";
        if !Path::new(DAEMON).exists() || !Path::new("/etc/machine-id").exists() {
            return Err("journald is not installed".into());
        }
        let ready = dir.join("journal-ready");
        let script = format!(
            "set -e; mount --make-rprivate /; mkdir -p /run/systemd /run/log /etc/systemd
             mount -t tmpfs none /run/systemd; mount -t tmpfs none /run/log; mount -t tmpfs none /etc/systemd
             printf '[Journal]\\nStorage=volatile\\nAudit=no\\nReadKMsg=no\\nRateLimitBurst=0\\n' \
                > /etc/systemd/journald.conf
             mkdir -p /run/systemd/journal /run/log/journal; touch {}; exec {DAEMON}",
            ready.display()
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).stdout(Stdio::null()).stderr(Stdio::null());
        let daemon = command.stdin(Stdio::null()).spawn().map_err(|e| format!("unshare: {e}"))?;
        let mut journal = Journal { daemon };
        let socket = format!("/proc/{}/root/run/systemd/journal/socket", journal.daemon.id());
        let begun = Instant::now();
        while !(ready.exists() && Path::new(&socket).exists()) {
            if begun.elapsed() > PATIENCE || !matches!(journal.daemon.try_wait(), Ok(None)) {
                return Err("journald does not start here".into());
            }
            std::thread::sleep(SHORT);
        }
        Ok(journal)
    }

    fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &self.daemon.id().to_string(), program]);
        command
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A command with a terminal, and the other side of that.
struct Terminal {
    child: Child,
    master: fs::File,
    seen: String,
}

impl Terminal {
    fn spawn(command: &mut Command, rows: u16, columns: u16) -> Terminal {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
        let side = || Stdio::from(slave.try_clone().unwrap());
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        // The command's copies are to be the last ones.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        drop::<OwnedFd>(slave);
        Terminal { child, master: master.into(), seen: String::new() }
    }

    fn type_line(&mut self, line: &str) {
        self.master.write_all(format!("{line}\r").as_bytes()).unwrap();
    }

    fn wait_for(&mut self, text: &str) -> String {
        let mut buffer = [0; 4096];
        while !self.seen.contains(text) {
            let got = self.master.read(&mut buffer).unwrap_or(0);
            assert!(got > 0, "{text:?} never came: {:?}", self.seen);
            self.seen += &String::from_utf8_lossy(&buffer[..got]);
        }
        self.seen.clone()
    }

    fn exit_code(mut self) -> i32 {
        // Until its last user is gone, so that nobody waits for us to read.
        let _ = self.master.read_to_end(&mut Vec::new());
        self.child.wait().unwrap().code().unwrap_or(-1)
    }
}

#[track_caller]
fn poll(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(SHORT);
    }
}
