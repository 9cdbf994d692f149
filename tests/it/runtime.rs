//! Behaviour of the OCI runtime on the real kernel: one test per behaviour.
//!
//! `KEEL_RUNTIME` names the binary under test; with `KEEL_RUNTIME=runc` the same cases run against a reference. Cases
//! in which we are stricter on purpose say so by `ours_only`.

use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Long enough for a loaded machine; no test waits for it when all is well.
const DEADLINE: Duration = Duration::from_secs(20);

fn runtime() -> PathBuf {
    if let Some(path) = std::env::var_os("KEEL_RUNTIME") {
        return path.into();
    }
    let exe = std::env::current_exe().unwrap();
    let found = exe.ancestors().map(|dir| dir.join("keel-runtime")).find(|path| path.is_file());
    found.expect("build keel-runtime first, or name the binary with KEEL_RUNTIME")
}

/// A reference has its own ideas in these places.
fn reference() -> bool {
    std::env::var_os("KEEL_RUNTIME")
        .is_some_and(|p| Path::new(&p).file_name() != Some(OsStr::new("keel-runtime")))
}

/// Says why a test does nothing here.
fn cannot_run() -> bool {
    let busybox = Path::new("/bin/busybox").is_file();
    let root = nix::unistd::geteuid().is_root();
    if !root || !busybox {
        eprintln!("skipped: needs root ({root}) and a static /bin/busybox ({busybox})");
    }
    !root || !busybox
}

fn ours_only() -> bool {
    if reference() {
        eprintln!("skipped: the reference behaves differently here on purpose");
    }
    reference()
}

macro_rules! require {
    () => {
        if cannot_run() {
            return;
        }
    };
    (ours) => {
        if cannot_run() || ours_only() {
            return;
        }
    };
}

// Below the macro that they use.
mod activation;
mod cycles;
mod escapes;
mod fields;
mod netdev;
mod old_kernel;
mod peers;
mod rootless;
mod strict;

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A bundle with its container. Dropped, it leaves nothing behind.
struct Case {
    dir: TempDir,
    id: String,
    config: Value,
}

impl Case {
    /// A container that runs `sh -c script`.
    fn new(script: &str) -> Case {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::Builder::new().prefix("keel-it-runtime-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let case = Case {
            id: format!("keel-it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)),
            dir,
            config: config(script),
        };
        make_rootfs(&case.rootfs());
        case
    }

    fn with(mut self, path: &str, value: Value) -> Case {
        self.set(path, value);
        self
    }

    /// `path` is a JSON pointer; what is missing on the way is made.
    fn set(&mut self, path: &str, value: Value) {
        let mut at = &mut self.config;
        for key in path.trim_start_matches('/').split('/') {
            at = match at {
                Value::Array(list) => {
                    if key == "-" {
                        list.push(Value::Null);
                        list.last_mut().unwrap()
                    } else {
                        &mut list[key.parse::<usize>().unwrap()]
                    }
                }
                other => {
                    if other.is_null() {
                        *other = if key == "-" { json!([]) } else { json!({}) };
                    }
                    if key == "-" {
                        let list = other.as_array_mut().unwrap();
                        list.push(Value::Null);
                        list.last_mut().unwrap()
                    } else {
                        &mut other[key]
                    }
                }
            };
        }
        *at = value;
    }

    fn without_namespace(mut self, kind: &str) -> Case {
        let list = self.config["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|n| n["type"] != kind);
        self
    }

    fn join(self, kind: &str, path: &str) -> Case {
        let case = self.without_namespace(kind);
        case.with("/linux/namespaces/-", json!({"type": kind, "path": path}))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn rootfs(&self) -> PathBuf {
        self.path("rootfs")
    }

    fn command(&self, args: &[&str]) -> Command {
        // By rename: another command on the same bundle may be reading it.
        let temp = self.path(".config.json");
        fs::write(&temp, serde_json::to_vec(&self.config).unwrap()).unwrap();
        fs::rename(&temp, self.path("config.json")).unwrap();
        let mut command = Command::new(runtime());
        command.arg("--root").arg(self.path("state")).args(args).stdin(Stdio::null());
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// The command must succeed; the result is its standard output.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The command must fail; the result is its standard error.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(!output.status.success(), "{args:?} succeeded: {}", text(&output.stdout));
        text(&output.stderr)
    }

    fn bundle(&self) -> String {
        self.dir.path().display().to_string()
    }

    fn run(&self) -> Output {
        self.call(&["run", "--bundle", &self.bundle(), &self.id])
    }

    /// Output of a container that must end well.
    fn output(&self) -> String {
        let output = self.run();
        assert!(
            output.status.success(),
            "{}: {}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// `create`, with the standard streams in files, since the container keeps them.
    fn create(&self, more: &[&str]) -> Result<(), String> {
        let bundle = self.bundle();
        let mut args = vec!["create", "--bundle", &bundle];
        args.extend(more);
        args.push(&self.id);
        let mut command = self.command(&args);
        let file = |name: &str| fs::File::create(self.path(name)).unwrap();
        let status = command.stdout(file("out")).stderr(file("err")).status().unwrap();
        let error = fs::read_to_string(self.path("err")).unwrap();
        if status.success() { Ok(()) } else { Err(error) }
    }

    fn start(&self) -> &Case {
        self.create(&[]).unwrap();
        self.ok(&["start", &self.id]);
        self
    }

    fn written(&self) -> String {
        fs::read_to_string(self.path("out")).unwrap()
    }

    fn state(&self) -> Value {
        serde_json::from_str(&self.ok(&["state", &self.id])).unwrap()
    }

    fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    fn pid(&self) -> i32 {
        self.state()["pid"].as_i64().unwrap() as i32
    }

    fn wait_for_status(&self, wanted: &str) {
        wait_for(wanted, || self.status() == wanted);
    }

    fn exec(&self, args: &[&str]) -> Output {
        let mut all = vec!["exec"];
        all.extend(args);
        self.call(&all)
    }

    fn cgroup_dirs(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut found = Vec::new();
        for line in mounts.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            if matches!(words[2], "cgroup" | "cgroup2") {
                found.push(Path::new(words[1]).join(&self.id));
            }
        }
        found
    }

    fn cgroup_file(&self, v1: &str, v2: &str) -> String {
        let dirs = self.cgroup_dirs();
        let read = |name: &str| dirs.iter().find_map(|d| fs::read_to_string(d.join(name)).ok());
        read(v1).or_else(|| read(v2)).unwrap_or_else(|| panic!("{v1} or {v2}")).trim().to_owned()
    }

    /// Neither state nor cgroup is left.
    fn assert_gone(&self) {
        assert!(!self.path("state").join(&self.id).exists(), "state is left");
        for dir in self.cgroup_dirs() {
            assert!(!dir.exists(), "{} is left", dir.display());
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = self.call(&["delete", "--force", &self.id]);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn config(script: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_KILL", "CAP_SYS_ADMIN"],
                "effective": ["CAP_KILL", "CAP_SYS_ADMIN"],
                "permitted": ["CAP_KILL", "CAP_SYS_ADMIN"]
            }
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}
            ]
        }
    })
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "data"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let applets = "cat cut echo env grep head hostname id kill ls mkdir mount mkfifo nc pwd ps readlink rm sed sh \
                   sleep sort stat stty tail test touch tr true false tty umount wc yes dd mknod sysctl date seq nice";
    for applet in applets.split_whitespace() {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nworker:x:1000:1000::/data:/bin/sh\n")
        .unwrap();
}

/// A container in a cgroup that can be found from outside.
fn in_cgroup(case: Case) -> Case {
    // Directly below the root: a parent directory would stay when the container has gone.
    let path = format!("/{}", case.id);
    case.with("/linux/cgroupsPath", json!(path))
}

// --- life cycle ---------------------------------------------------------------------------------------------------

#[test]
fn run_returns_the_programs_exit_code() {
    require!();
    assert_eq!(Case::new("exit 7").run().status.code(), Some(7));
    let case = Case::new("kill -9 $$; sleep 100");
    // The init of a pid namespace is immune to its own SIGKILL, so ask a child.
    let case = case.with("/process/args/2", json!("sh -c 'kill -9 $$'; exit $?"));
    assert_eq!(case.run().status.code(), Some(137));
}

#[test]
fn run_removes_the_container_when_it_ends() {
    require!();
    let case = in_cgroup(Case::new("true"));
    case.output();
    case.assert_gone();
}

#[test]
fn a_container_goes_through_created_running_stopped() {
    require!();
    let case = Case::new("echo started; sleep 1000");
    case.create(&[]).unwrap();
    let state = case.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], case.id.as_str());
    assert_eq!(state["bundle"], case.bundle());
    assert_eq!(case.written(), "", "the program must not run before start");
    let pid = case.pid();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    case.ok(&["start", &case.id]);
    wait_for("output", || case.written() == "started\n");
    assert_eq!(case.status(), "running");
    assert_eq!(case.pid(), pid);
    case.ok(&["kill", &case.id, "KILL"]);
    case.wait_for_status("stopped");
    case.ok(&["delete", &case.id]);
    assert!(case.fails(&["state", &case.id]).contains("does not exist"));
}

#[test]
fn an_id_is_taken_once() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    assert!(case.create(&[]).unwrap_err().contains("exist"));
    assert_eq!(case.status(), "running", "the first is untouched");
}

#[test]
fn ids_that_could_be_paths_are_refused() {
    require!();
    let case = Case::new("true");
    for id in ["..", "a/b", "", "a b", "/abs", "é"] {
        case.fails(&["run", "--bundle", &case.bundle(), id]);
    }
}

#[test]
fn an_unknown_container_does_not_exist() {
    require!();
    let case = Case::new("true");
    for args in [&["state", "nope"][..], &["start", "nope"], &["kill", "nope", "9"], &["delete", "nope"]] {
        assert!(case.fails(args).contains("does not exist"), "{args:?}");
    }
    case.ok(&["delete", "--force", "nope"]);
}

#[test]
fn start_is_for_created_containers_only() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    case.fails(&["start", &case.id]);
    case.ok(&["kill", &case.id, "9"]);
    case.wait_for_status("stopped");
    case.fails(&["start", &case.id]);
}

#[test]
fn delete_spares_what_runs_unless_forced() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    case.fails(&["delete", &case.id]);
    assert_eq!(case.status(), "running");
    case.ok(&["delete", "--force", &case.id]);
    case.assert_gone();
}

#[test]
fn a_created_container_can_be_deleted() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000"));
    case.create(&[]).unwrap();
    let pid = case.pid();
    case.ok(&["delete", &case.id]);
    case.assert_gone();
    wait_for("the process to go", || !alive(pid));
}

fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| !s.rsplit(')').next().unwrap().trim_start().starts_with('Z'))
}

#[test]
fn kill_knows_names_and_numbers() {
    require!();
    let case = Case::new("trap 'echo usr1' USR1; trap 'echo hup' HUP; while :; do sleep 0.05; done");
    case.start();
    // The traps must be set before the first signal.
    wait_for("traps", || {
        let status = fs::read_to_string(format!("/proc/{}/status", case.pid())).unwrap();
        let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap().trim().to_owned();
        u64::from_str_radix(&caught, 16).unwrap() & (1 << 9) != 0
    });
    for (word, want) in [("USR1", "usr1\n"), ("SIGHUP", "usr1\nhup\n"), ("10", "usr1\nhup\nusr1\n")] {
        case.ok(&["kill", &case.id, word]);
        wait_for(want, || case.written() == want);
    }
    case.fails(&["kill", &case.id, "NOSUCHSIGNAL"]);
}

#[test]
fn kill_of_a_stopped_container_fails() {
    require!();
    let case = Case::new("true");
    case.start();
    case.wait_for_status("stopped");
    case.fails(&["kill", &case.id, "KILL"]);
}

#[test]
fn without_a_pid_namespace_kill_reaches_every_process() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000 & echo $!; exec sleep 1000").without_namespace("pid"));
    case.start();
    wait_for("output", || case.written().ends_with('\n'));
    let child: i32 = case.written().trim().parse().unwrap();
    assert!(alive(child));
    case.ok(&["kill", "--all", &case.id, "KILL"]);
    wait_for("the child to go", || !alive(child));
    case.wait_for_status("stopped");
    case.ok(&["delete", &case.id]);
    case.assert_gone();
}

#[test]
fn options_may_stand_before_and_after_the_id() {
    require!(ours);
    let case = Case::new("exit 3");
    let bundle = case.bundle();
    assert_eq!(case.call(&["run", &case.id, "--bundle", &bundle]).status.code(), Some(3));
    assert_eq!(case.call(&["run", "-b", &bundle, &case.id]).status.code(), Some(3));
}

#[test]
fn the_pid_file_holds_the_inits_pid() {
    require!();
    let case = Case::new("sleep 1000");
    let file = case.path("pid");
    case.create(&["--pid-file", &file.display().to_string()]).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), case.pid().to_string());
}

#[test]
fn list_shows_containers_in_all_formats() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    assert_eq!(case.ok(&["list", "-q"]), format!("{}\n", case.id));
    let list: Value = serde_json::from_str(&case.ok(&["list", "-f", "json"])).unwrap();
    assert_eq!(list[0]["id"], case.id.as_str());
    assert_eq!(list[0]["status"], "running");
    let table = case.ok(&["list"]);
    assert!(table.starts_with("ID") && table.contains(&case.id), "{table}");
    case.fails(&["list", "-f", "xml"]);
}

#[test]
fn detached_run_leaves_the_container_running() {
    require!();
    let case = Case::new("sleep 1000");
    let bundle = case.bundle();
    let mut command = case.command(&["run", "--detach", "--bundle", &bundle, &case.id]);
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success());
    assert_eq!(case.status(), "running");
}

// --- failure ------------------------------------------------------------------------------------------------------

#[test]
fn a_missing_program_is_named_at_create() {
    require!();
    let case = in_cgroup(Case::new("").with("/process/args", json!(["no-such-program"])));
    let error = case.create(&[]).unwrap_err();
    assert!(
        error.contains("no-such-program") && error.contains("executable file not found in $PATH"),
        "{error}"
    );
    case.assert_gone();
}

#[test]
fn a_failed_create_leaves_nothing() {
    require!();
    let mount = json!({"destination": "/x", "type": "bind", "source": "/no/such/dir", "options": ["bind"]});
    let case = in_cgroup(Case::new("true").with("/mounts/-", mount));
    let error = case.create(&[]).unwrap_err();
    assert!(error.contains("/no/such/dir") && error.contains("no such file or directory"), "{error}");
    case.assert_gone();
}

#[test]
fn errors_go_to_the_json_log_too() {
    require!();
    let case = Case::new("true");
    let log = case.path("log");
    case.fails(&["--log", &log.display().to_string(), "--log-format", "json", "state", "nope"]);
    let lines = fs::read_to_string(&log).unwrap();
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(last["msg"].as_str().unwrap().contains("does not exist"));
}

#[test]
fn a_log_that_cannot_be_written_is_an_error() {
    require!();
    let case = Case::new("true");
    let log = case.path("missing/log").display().to_string();
    assert!(case.fails(&["--log", &log, "list"]).contains("missing/log"));
}

#[test]
fn a_malformed_version_is_refused() {
    require!(ours);
    for version in ["", "1", "x.y.z", "2.0.0"] {
        let case = Case::new("true").with("/ociVersion", json!(version));
        assert!(case.create(&[]).unwrap_err().contains("ociVersion"), "{version}");
    }
}

/// Until the process has its own root, whoever joins it stands in the host's.
#[test]
fn a_container_that_is_being_created_takes_no_command() {
    require!(ours);
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", ""]});
    let mut case = in_cgroup(Case::new("sleep 1000")).with("/hooks/createRuntime", json!([hook]));
    let go = case.path("go");
    let wait = format!("until test -e {}; do sleep 0.02; done", go.display());
    case.set("/hooks/createRuntime/0/args/2", json!(wait));
    let bundle = case.bundle();
    let mut child = case
        .command(&["create", "--bundle", &bundle, &case.id])
        .stdout(Stdio::null())
        .stderr(fs::File::create(case.path("err")).unwrap())
        .spawn()
        .unwrap();
    wait_for("the hook to run", || case.call(&["state", &case.id]).status.success() && case.pid() != 0);
    assert_eq!(case.status(), "creating");
    let said = case.fails(&["exec", &case.id, "true"]);
    assert!(said.contains("not running"), "{said}");
    fs::write(go, "").unwrap();
    assert!(child.wait().unwrap().success(), "{}", fs::read_to_string(case.path("err")).unwrap());
    assert_eq!(case.status(), "created");
    case.ok(&["exec", &case.id, "true"]);
}

#[test]
fn a_create_that_was_killed_can_be_deleted() {
    require!(ours);
    let hook = json!({"path": "/bin/sleep", "args": ["sleep", "1000"]});
    let case = in_cgroup(Case::new("true").with("/hooks/createRuntime", json!([hook])));
    let bundle = case.bundle();
    let mut child = case
        .command(&["create", "--bundle", &bundle, &case.id])
        .stdout(Stdio::null())
        .stderr(fs::File::create(case.path("err")).unwrap())
        .process_group(0)
        .spawn()
        .unwrap();
    wait_for("the hook to run", || {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", fs::read_to_string(case.path("err")).unwrap());
        let state = case.call(&["state", &case.id]);
        state.status.success() && children(child.id()).len() > 1
    });
    let left = children(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    case.ok(&["delete", "--force", &case.id]);
    case.assert_gone();
    for pid in left {
        // The hook is a host process of its own; a real one ends by itself.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        wait_for("the container's process to go", || !alive(pid));
    }
}

fn children(pid: u32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|p| p.parse().unwrap()).collect()
}

// --- exec, pause, update ------------------------------------------------------------------------------------------

#[test]
fn exec_runs_in_the_container_and_returns_its_code() {
    require!();
    let case = Case::new("sleep 1000").with("/hostname", json!("inside"));
    case.start();
    let output = case.exec(&[&case.id, "sh", "-c", "hostname; readlink /proc/1/exe; exit 5"]);
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(text(&output.stdout), "inside\n/bin/busybox\n");
    for ns in ["pid", "net", "ipc", "uts", "mnt", "cgroup"] {
        let own = case.exec(&[&case.id, "readlink", &format!("/proc/self/ns/{ns}")]);
        let init = case.exec(&[&case.id, "readlink", &format!("/proc/1/ns/{ns}")]);
        assert_eq!(own.stdout, init.stdout, "{ns}");
    }
}

#[test]
fn exec_overrides_a_variable_of_the_container() {
    require!(ours);
    let case = Case::new("sleep 1000").with("/process/env", json!(["PATH=/bin", "ONE=old"]));
    case.start();
    let output = case.exec(&["--env", "ONE=new", &case.id, "env"]);
    let lines = text(&output.stdout);
    assert_eq!(lines.lines().filter(|l| l.starts_with("ONE=")).collect::<Vec<_>>(), ["ONE=new"]);
}

#[test]
fn exec_takes_user_groups_cwd_and_env() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let script = "id -u; id -g; id -G; pwd; echo $A";
    let id = &case.id;
    let args = [
        "--user",
        "1000:100",
        "--additional-gids",
        "7",
        "--cwd",
        "/data",
        "--env",
        "A=b",
        id,
        "sh",
        "-c",
        script,
    ];
    let output = case.exec(&args);
    assert_eq!(text(&output.stdout), "1000\n100\n100 7\n/data\nb\n", "{}", text(&output.stderr));
}

#[test]
fn exec_refuses_users_that_are_not_numbers() {
    require!(ours);
    let case = Case::new("sleep 1000");
    case.start();
    for user in ["root", "1:", ":1", "-1", "1x"] {
        let output = case.exec(&["--user", user, &case.id, "id"]);
        assert_eq!(output.status.code(), Some(255), "{user}: {}", text(&output.stdout));
    }
}

#[test]
fn exec_takes_a_whole_process_from_a_file() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let process = json!({"user": {"uid": 3, "gid": 4}, "args": ["/bin/sh", "-c", "id -u; id -g; pwd"],
        "env": ["PATH=/bin"], "cwd": "/tmp"});
    let file = case.path("process.json");
    fs::write(&file, process.to_string()).unwrap();
    let output = case.exec(&["--process", &file.display().to_string(), &case.id]);
    assert_eq!(text(&output.stdout), "3\n4\n/tmp\n", "{}", text(&output.stderr));
}

#[test]
fn exec_of_a_missing_program_fails_with_255() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let output = case.exec(&[&case.id, "no-such-program"]);
    assert_eq!(output.status.code(), Some(255));
    assert!(text(&output.stderr).contains("executable file not found in $PATH"), "{}", text(&output.stderr));
}

#[test]
fn exec_needs_a_container_that_runs() {
    require!();
    let case = Case::new("true");
    case.start();
    case.wait_for_status("stopped");
    assert!(!case.exec(&[&case.id, "true"]).status.success());
}

#[test]
fn exec_adds_no_inheritable_capabilities() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let output =
        case.exec(&["--cap", "CAP_CHOWN", &case.id, "grep", "-E", "^Cap(Inh|Eff)", "/proc/self/status"]);
    let out = text(&output.stdout);
    assert!(out.contains("CapInh:\t0000000000000000"), "{out}{}", text(&output.stderr));
    assert!(out.contains("CapEff:\t0000000000200021"), "{out}");
}

#[test]
fn exec_joins_the_cgroup() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    let host = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let pid_file = case.path("exec.pid");
    let mut command = case.command(&[
        "exec",
        "--detach",
        "--pid-file",
        &pid_file.display().to_string(),
        &case.id,
        "sleep",
        "1000",
    ]);
    assert!(command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    assert_eq!(host(pid), host(case.pid()));
    assert!(host(pid).contains(&case.id), "{}", host(pid));
}

#[test]
fn exec_joins_a_cgroup_below_the_containers() {
    require!(ours);
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    let dir = case.cgroup_dirs().into_iter().find(|d| d.is_dir()).unwrap();
    fs::create_dir(dir.join("below")).unwrap();
    let exec = |sub: &str| case.exec(&["--cgroup", sub, &case.id, "cat", "/proc/self/cgroup"]);
    assert!(text(&exec("below").stdout).contains(&format!("/{}/below\n", case.id)));
    assert!(exec("/").status.success());
    for (wrong, why) in [
        ("..", "sub cgroup"),
        ("below/../..", "sub cgroup"),
        ("nope", "no such file"),
        ("nope:/", "controller"),
    ] {
        let output = exec(wrong);
        assert!(!output.status.success() && text(&output.stderr).contains(why), "{wrong}: {output:?}");
    }
}

#[test]
fn a_frozen_cgroup_is_refused_instead_of_waited_for() {
    require!(ours);
    let case = in_cgroup(Case::new("true"));
    let freezer = case.cgroup_dirs().into_iter().find(|d| d.starts_with("/sys/fs/cgroup/freezer"));
    let Some(freezer) = freezer else {
        eprintln!("skipped: no v1 freezer");
        return;
    };
    fs::create_dir(&freezer).unwrap();
    fs::write(freezer.join("freezer.state"), "FROZEN").unwrap();
    let result = case.create(&[]);
    fs::write(freezer.join("freezer.state"), "THAWED").unwrap();
    fs::remove_dir(&freezer).unwrap();
    let error = result.unwrap_err();
    assert!(error.contains("frozen") || error.contains("paused"), "{error}");
}

#[test]
fn a_filter_that_knows_few_calls_does_not_hide_the_program() {
    require!(ours);
    let names = ["faccessat", "faccessat2", "access", "stat", "newfstatat", "statx", "close_range"];
    let case = Case::new("true").with("/process/noNewPrivileges", json!(false));
    let mut case = case.with("/process/args", json!(["true"]));
    case.set(
        "/linux/seccomp",
        json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}),
    );
    case.output();
}

#[test]
fn a_path_is_masked_once() {
    require!(ours);
    let script = "grep -c ' /tmp ' /proc/self/mounts";
    let case = Case::new(script).with("/linux/maskedPaths", json!(["/tmp", "/tmp/", "//tmp"]));
    assert_eq!(case.output(), "1\n");
}

#[test]
fn a_tmpfs_without_a_mode_looks_like_what_it_covers() {
    require!(ours);
    let case = Case::new("stat -c %a /covered")
        .with("/mounts/-", json!({"destination": "/covered", "type": "tmpfs"}));
    fs::create_dir(case.rootfs().join("covered")).unwrap();
    fs::set_permissions(case.rootfs().join("covered"), fs::Permissions::from_mode(0o710)).unwrap();
    assert_eq!(case.output(), "710\n");
}

#[test]
fn pause_stops_and_resume_continues() {
    require!();
    let case = in_cgroup(Case::new("while :; do echo x; sleep 0.01; done"));
    case.start();
    wait_for("output", || !case.written().is_empty());
    case.ok(&["pause", &case.id]);
    assert_eq!(case.status(), "paused");
    let before = case.written();
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(case.written(), before);
    assert!(!case.exec(&[&case.id, "true"]).status.success(), "exec in a paused container would hang");
    case.ok(&["resume", &case.id]);
    assert_eq!(case.status(), "running");
    wait_for("more output", || case.written().len() > before.len());
}

#[test]
fn a_paused_container_can_be_killed_and_deleted() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    case.ok(&["pause", &case.id]);
    case.ok(&["delete", "--force", &case.id]);
    case.assert_gone();
}

#[test]
fn ps_lists_the_containers_processes() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let pids: Vec<i32> = serde_json::from_str(&case.ok(&["ps", "-f", "json", &case.id])).unwrap();
    assert_eq!(pids, [case.pid()]);
    let table = case.ok(&["ps", &case.id]);
    assert!(table.lines().count() == 2 && table.contains("sleep 1000"), "{table}");
}

#[test]
fn limits_are_set_and_updated() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000"))
        .with("/linux/resources/memory", json!({"limit": 64 << 20}))
        .with("/linux/resources/pids", json!({"limit": 40}))
        .with("/linux/resources/cpu", json!({"shares": 512, "quota": 50000, "period": 100000}));
    case.start();
    assert_eq!(case.cgroup_file("memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(case.cgroup_file("pids.max", "pids.max"), "40");
    case.ok(&["update", "--memory", "96M", "--pids-limit", "50", &case.id]);
    assert_eq!(case.cgroup_file("memory.limit_in_bytes", "memory.max"), (96 << 20).to_string());
    assert_eq!(case.cgroup_file("pids.max", "pids.max"), "50");
    let mut child = case.command(&["update", "-r", "-", &case.id]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(br#"{"pids": {"limit": 60}}"#).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(case.cgroup_file("pids.max", "pids.max"), "60");
}

#[test]
fn the_pids_limit_holds() {
    require!();
    let case =
        in_cgroup(Case::new("sleep 0.2 & sleep 0.2 & sleep 0.2 & sleep 0.2 & sleep 0.2 & wait; echo done"))
            .with("/linux/resources/pids", json!({"limit": 3}));
    let output = case.run();
    assert!(text(&output.stderr).contains("fork"), "{}", text(&output.stderr));
}

#[test]
fn events_print_statistics() {
    require!();
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    let event: Value = serde_json::from_str(&case.ok(&["events", "--stats", &case.id])).unwrap();
    assert_eq!(event["type"], "stats");
    assert_eq!(event["id"], case.id.as_str());
    assert_eq!(event["data"]["pids"]["current"], 1);
    assert!(event["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0);
    if Path::new("/sys/fs/cgroup/cpuset").exists() {
        assert!(event["data"]["cpuset"]["cpus"].as_array().is_some_and(|list| !list.is_empty()), "{event}");
    }
}

#[test]
fn the_parent_of_a_checkpoint_is_an_image_beside_it() {
    require!(ours);
    let case = Case::new("sleep 1000");
    case.start();
    let images = case.path("images").display().to_string();
    for parent in [case.bundle().as_str(), "../nothing"] {
        let args = ["checkpoint", "--pre-dump", "--image-path", &images, "--parent-path", parent, &case.id];
        let error = case.fails(&args);
        assert!(error.contains("--parent-path"), "{error}");
    }
    assert_eq!(case.status(), "running");
}

#[test]
fn a_container_whose_start_failed_has_stopped() {
    require!(ours);
    let hook = json!([{"path": "/bin/false"}]);
    for _ in 0..20 {
        let case = Case::new("true").with("/hooks/startContainer", hook.clone());
        case.create(&[]).unwrap();
        case.call(&["start", &case.id]);
        case.ok(&["delete", &case.id]);
    }
}

#[test]
fn a_checkpoint_without_criu_says_what_is_missing() {
    require!(ours);
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    let output = case.command(&["--criu", "/nowhere/criu", "checkpoint", &case.id]).output().unwrap();
    let error = text(&output.stderr);
    assert!(
        !output.status.success() && error.contains("/nowhere/criu") && error.contains("package"),
        "{error}"
    );
    let lazy = case.command(&["checkpoint", "--lazy-pages", &case.id]).output().unwrap();
    assert!(text(&lazy.stderr).contains("--lazy-pages is not supported"), "{}", text(&lazy.stderr));
}

#[test]
fn the_systemd_driver_takes_only_slice_prefix_and_name() {
    require!(ours);
    let case = Case::new("true").with("/linux/cgroupsPath", json!("/keel-it-path"));
    let bundle = case.bundle();
    let output = case.command(&["--systemd-cgroup", "run", "--bundle", &bundle, &case.id]).output().unwrap();
    assert!(text(&output.stderr).contains("slice:prefix:name"), "{}", text(&output.stderr));
}

#[test]
fn spec_writes_a_bundle_that_runs() {
    require!();
    let mut case = Case::new("");
    let bundle = case.path("fresh");
    fs::create_dir(&bundle).unwrap();
    let dir = bundle.display().to_string();
    case.ok(&["spec", "--bundle", &dir]);
    case.fails(&["spec", "--bundle", &dir]);
    let text = fs::read_to_string(bundle.join("config.json")).unwrap();
    case.config = serde_json::from_str(&text).unwrap();
    case.set("/process/terminal", json!(false));
    case.set("/process/args", json!(["echo", "works"]));
    case.set("/process/rlimits", json!([]));
    assert_eq!(case.output(), "works\n");
}

#[test]
fn features_is_a_document() {
    require!();
    let case = Case::new("");
    let features: Value = serde_json::from_str(&case.ok(&["features"])).unwrap();
    assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&json!("pid")));
    assert!(features["hooks"].as_array().unwrap().contains(&json!("createContainer")));
}

// --- namespaces ---------------------------------------------------------------------------------------------------

#[test]
fn new_namespaces_are_new_and_the_others_the_hosts() {
    require!();
    let script = "for n in pid net ipc uts mnt cgroup user; do echo $n $(readlink /proc/self/ns/$n); done";
    let case =
        Case::new(script).without_namespace("ipc").with("/linux/namespaces/-", json!({"type": "cgroup"}));
    for line in case.output().lines() {
        let (name, link) = line.split_once(' ').unwrap();
        let host = fs::read_link(format!("/proc/self/ns/{name}")).unwrap().display().to_string();
        let same = matches!(name, "ipc" | "user");
        assert_eq!(link == host, same, "{name}");
    }
}

#[test]
fn namespaces_of_a_pod_are_joined_by_path() {
    require!();
    let first = Case::new("sleep 1000").with("/hostname", json!("pod"));
    first.start();
    let ns = |name: &str| format!("/proc/{}/ns/{name}", first.pid());
    let script =
        "hostname; readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; ps | grep -c 'sleep 1000'";
    let second = Case::new(script)
        .join("network", &ns("net"))
        .join("ipc", &ns("ipc"))
        .join("uts", &ns("uts"))
        .join("pid", &ns("pid"));
    let output = second.output();
    let lines: Vec<&str> = output.lines().collect();
    let link = |name: &str| fs::read_link(ns(name)).unwrap().display().to_string();
    assert_eq!(lines[0], "pod");
    assert_eq!(lines[1], link("net"));
    assert_eq!(lines[2], link("ipc"));
    assert!(lines[3].parse::<u32>().unwrap() >= 1, "the first container's process is seen: {output}");
    assert_eq!(first.status(), "running", "the end of the second is not the end of the first");
}

#[test]
fn a_path_that_is_no_such_namespace_is_refused() {
    require!();
    for path in ["/proc/self/ns/uts", "/etc/passwd", "/no/such/ns"] {
        let case = Case::new("true").join("network", path);
        assert!(case.create(&[]).is_err(), "{path}");
    }
}

#[test]
fn a_new_network_namespace_has_its_loopback_up() {
    require!();
    assert!(Case::new("ip link show lo").output().contains("LOOPBACK,UP"));
}

#[test]
fn a_name_is_not_set_twice() {
    require!(ours);
    let case = Case::new("true").with("/linux/sysctl", json!({"kernel.hostname": "x"}));
    assert!(case.create(&[]).unwrap_err().contains("hostname"));
    let mut case = Case::new("true").with("/domainname", json!("a"));
    case.set("/linux/sysctl", json!({"kernel.domainname": "b"}));
    assert!(case.create(&[]).unwrap_err().contains("domainname"));
}

#[test]
fn hostname_is_set_inside_only() {
    require!();
    let before = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(Case::new("hostname").with("/hostname", json!("box")).output(), "box\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
}

#[test]
fn hostname_without_a_uts_namespace_is_refused() {
    require!();
    let case = Case::new("true").with("/hostname", json!("box")).without_namespace("uts");
    assert!(case.create(&[]).is_err());
}

#[test]
fn domainname_is_set() {
    require!(ours);
    let case = Case::new("cat /proc/sys/kernel/domainname").with("/domainname", json!("example.test"));
    assert_eq!(case.output(), "example.test\n");
}

#[test]
fn a_user_namespace_maps_ids() {
    require!();
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    let case =
        Case::new("cat /proc/self/uid_map | tr -s ' '; id -u; touch /data/f; ls -l /dev/null | cut -c1")
            .with("/linux/namespaces/-", json!({"type": "user"}))
            .with("/linux/uidMappings", map.clone())
            .with("/linux/gidMappings", map);
    std::os::unix::fs::chown(case.rootfs(), Some(100_000), Some(100_000)).unwrap();
    std::os::unix::fs::chown(case.rootfs().join("data"), Some(100_000), Some(100_000)).unwrap();
    assert_eq!(case.output(), " 0 100000 1000\n0\nc\n");
    assert_eq!(fs::metadata(case.rootfs().join("data/f")).unwrap().uid(), 100_000);
}

#[test]
fn a_device_bound_into_a_user_namespace_is_only_a_device() {
    require!(ours);
    let mut case = Case::new("grep ' /dev/null ' /proc/self/mounts");
    case.set("/linux/namespaces/-", json!({"type": "user"}));
    case.set("/linux/uidMappings", json!([{"containerID": 0, "hostID": 0, "size": 65536}]));
    case.set("/linux/gidMappings", json!([{"containerID": 0, "hostID": 0, "size": 65536}]));
    let line = case.output();
    assert!(line.contains("nosuid") && line.contains("noexec"), "{line}");
}

#[test]
fn exec_enters_the_user_namespace() {
    require!();
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    let case = Case::new("sleep 1000")
        .with("/linux/namespaces/-", json!({"type": "user"}))
        .with("/linux/uidMappings", map.clone())
        .with("/linux/gidMappings", map);
    std::os::unix::fs::chown(case.rootfs(), Some(100_000), Some(100_000)).unwrap();
    case.start();
    let output = case.exec(&[&case.id, "sh", "-c", "id -u; cat /proc/self/uid_map | tr -s ' '"]);
    assert_eq!(text(&output.stdout), "0\n 0 100000 1000\n", "{}", text(&output.stderr));
}

#[test]
fn a_time_namespace_has_its_offsets() {
    require!(ours);
    let case = Case::new("cut -d. -f1 /proc/uptime")
        .with("/linux/namespaces/-", json!({"type": "time"}))
        .with("/linux/timeOffsets", json!({"boottime": {"secs": 1_000_000}}));
    assert!(case.output().trim().parse::<u64>().unwrap() >= 1_000_000);
}

// --- file system --------------------------------------------------------------------------------------------------

#[test]
fn the_root_is_the_bundles_and_nothing_of_the_host_is_left() {
    require!();
    let case =
        Case::new("ls / | sort | tr '\\n' ' '; cut -d' ' -f5 /proc/self/mountinfo | sort -u | tr '\\n' ' '");
    let output = case.output();
    assert!(output.starts_with("bin data dev etc proc root sys tmp"), "{output}");
    assert!(!output.contains(&case.bundle()), "{output}");
    assert!(output.contains("/ /dev /dev/pts /proc /sys"), "{output}");
}

#[test]
fn a_read_only_root_is_read_only_and_its_mounts_are_not() {
    require!();
    let case = Case::new("touch /data/f 2>/dev/null && echo root; touch /tmp/f && echo tmp")
        .with("/root/readonly", json!(true))
        .with("/mounts/-", json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    assert_eq!(case.output(), "tmp\n");
}

#[test]
fn bind_mounts_of_directories_and_files() {
    require!();
    let mut case =
        Case::new("cat /made/up/here; cat /file; touch /made/up/ro-check && echo rw; touch /ro/f || echo ro");
    fs::create_dir_all(case.path("src")).unwrap();
    fs::write(case.path("src/here"), "dir\n").unwrap();
    fs::write(case.path("one"), "file\n").unwrap();
    let src = case.path("src");
    case.set(
        "/mounts/-",
        json!({"destination": "/made/up", "type": "bind", "source": src, "options": ["rbind"]}),
    );
    case.set(
        "/mounts/-",
        json!({"destination": "/ro", "type": "bind", "source": src, "options": ["bind", "ro"]}),
    );
    let one = case.path("one");
    case.set(
        "/mounts/-",
        json!({"destination": "/file", "type": "bind", "source": one, "options": ["bind"]}),
    );
    assert_eq!(case.output(), "dir\nfile\nrw\nro\n");
}

#[test]
fn a_recursive_attribute_reaches_mounts_below() {
    require!();
    let mut case = Case::new("touch /v/f || echo top; touch /v/sub/f || echo sub");
    let src = case.path("src");
    fs::create_dir_all(src.join("sub")).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "t"]).arg(src.join("sub")).status().unwrap();
    assert!(mounted.success());
    case.set(
        "/mounts/-",
        json!({"destination": "/v", "type": "bind", "source": src, "options": ["rbind", "rro"]}),
    );
    let output = case.run();
    let _ = Command::new("umount").arg(src.join("sub")).status();
    assert_eq!(text(&output.stdout), "top\nsub\n", "{}", text(&output.stderr));
}

#[test]
fn mount_options_show_in_the_mount_table() {
    require!();
    let case = Case::new("grep ' /tmp ' /proc/self/mounts").with(
        "/mounts/-",
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", "noexec", "noatime", "mode=750", "size=1m"]}),
    );
    let line = case.output();
    for option in ["nosuid", "nodev", "noexec", "noatime", "mode=750", "size=1024k"] {
        assert!(line.contains(option), "{option}: {line}");
    }
}

#[test]
fn tmpcopyup_keeps_what_the_image_has() {
    require!();
    let case =
        Case::new("cat /data/a/b; readlink /data/link; stat -c %a /data/a/b; touch /data/new && echo rw")
            .with(
                "/mounts/-",
                json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}),
            );
    let data = case.rootfs().join("data");
    fs::create_dir(data.join("a")).unwrap();
    fs::write(data.join("a/b"), "content\n").unwrap();
    fs::set_permissions(data.join("a/b"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("a/b", data.join("link")).unwrap();
    assert_eq!(case.output(), "content\na/b\n640\nrw\n");
    assert!(!data.join("new").exists());
}

#[test]
fn mounts_made_inside_stay_inside() {
    require!();
    let case = Case::new("mount -t tmpfs t /data && grep -c ' /data ' /proc/self/mounts");
    assert_eq!(case.output(), "1\n");
    let host = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!host.contains(&case.bundle()), "{host}");
}

#[test]
fn every_rootfs_propagation_starts() {
    // The reference takes "shared" over only when the bundle lies on a shared mount.
    require!(ours);
    for (word, tag) in [("shared", "shared:"), ("slave", ""), ("private", ""), ("unbindable", "unbindable")] {
        let case = Case::new("grep ' / / ' /proc/self/mountinfo || cat /proc/self/mountinfo")
            .with("/linux/rootfsPropagation", json!(word));
        let output = case.output();
        let root = output.lines().find(|l| l.split(' ').nth(4) == Some("/")).unwrap_or_default();
        assert!(root.contains(tag), "{word}: {root}");
        if word == "private" {
            assert!(!root.contains("shared:") && !root.contains("master:"), "{root}");
        }
    }
}

#[test]
fn masked_paths_are_empty_and_readonly_paths_are_read_only() {
    require!();
    let case =
        Case::new("cat /secret; ls /hidden; touch /hidden/f || echo masked; echo x > /frozen || echo frozen")
            .with("/linux/maskedPaths", json!(["/secret", "/hidden", "/no/such"]))
            .with("/linux/readonlyPaths", json!(["/frozen", "/no/such"]));
    fs::write(case.rootfs().join("secret"), "secret\n").unwrap();
    fs::create_dir(case.rootfs().join("hidden")).unwrap();
    fs::write(case.rootfs().join("hidden/f"), "secret\n").unwrap();
    fs::write(case.rootfs().join("frozen"), "old\n").unwrap();
    assert_eq!(case.output(), "masked\nfrozen\n");
    assert_eq!(fs::read_to_string(case.rootfs().join("frozen")).unwrap(), "old\n");
}

#[test]
fn every_container_has_the_default_devices() {
    require!();
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
                  for l in fd stdin stdout stderr ptmx; do test -L /dev/$l || echo no $l; done; echo x > /dev/null; \
                  head -c 4 /dev/zero | wc -c";
    assert_eq!(Case::new(script).output().trim(), "4");
}

#[test]
fn a_device_is_made_and_the_cgroup_guards_the_others() {
    require!();
    let mut case = Case::new(
        "stat -c '%a %t %T' /dev/probe; head -c 1 /dev/probe | wc -c; \
         mknod /tmp/mem c 1 11 && cat /tmp/mem 2>&1 | head -c 100; mknod /tmp/z c 1 5 && head -c 1 /tmp/z | wc -c",
    );
    for set in ["bounding", "effective", "permitted"] {
        case.set(&format!("/process/capabilities/{set}/-"), json!("CAP_MKNOD"));
    }
    case.set(
        "/linux/devices",
        json!([{"path": "/dev/probe", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640}]),
    );
    let output = case.output();
    let lines: Vec<&str> = output.lines().map(str::trim).collect();
    assert_eq!((lines[0], lines[1]), ("640 1 5", "1"), "{output}");
    assert!(output.contains("Operation not permitted"), "{output}");
    assert_eq!(*lines.last().unwrap(), "1", "{output}");
}

#[test]
fn the_working_directory_is_made() {
    require!();
    assert_eq!(Case::new("pwd").with("/process/cwd", json!("/made/for/me")).output(), "/made/for/me\n");
}

#[test]
fn an_idmapped_mount_shows_shifted_owners() {
    require!(ours);
    let mut case = Case::new("stat -c %u /v/f");
    let src = case.path("src");
    fs::create_dir(&src).unwrap();
    fs::write(src.join("f"), "").unwrap();
    let map = json!([{"containerID": 0, "hostID": 5000, "size": 1000}]);
    case.set(
        "/mounts/-",
        json!({"destination": "/v", "type": "bind", "source": src, "options": ["bind", "idmap"],
            "uidMappings": map, "gidMappings": map}),
    );
    assert_eq!(case.output(), "5000\n");
}

#[test]
fn the_cgroup_mount_shows_the_own_cgroup() {
    require!();
    let mut case = in_cgroup(Case::new(
        "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null; mkdir /sys/fs/cgroup/x 2>/dev/null || echo ro",
    ));
    case.set("/linux/resources/pids", json!({"limit": 33}));
    case.set("/linux/namespaces/-", json!({"type": "cgroup"}));
    case.set(
        "/mounts/-",
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}),
    );
    assert_eq!(case.output(), "33\nro\n");
    case.config["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "cgroup");
    assert_eq!(case.output(), "33\nro\n", "without a cgroup namespace");
}

// --- process ------------------------------------------------------------------------------------------------------

#[test]
fn capabilities_are_exactly_the_given_ones() {
    require!();
    let output = Case::new("grep ^Cap /proc/self/status").output();
    let sets = (1 << 5) | (1 << 21);
    for name in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(output.contains(&format!("{name}:\t{sets:016x}")), "{output}");
    }
    for name in ["CapInh", "CapAmb"] {
        assert!(output.contains(&format!("{name}:\t{:016x}", 0)), "{output}");
    }
}

#[test]
fn ambient_capabilities_reach_an_ordinary_user() {
    require!();
    let list = json!(["CAP_NET_BIND_SERVICE"]);
    let all =
        json!({"bounding": list, "effective": list, "permitted": list, "inheritable": list, "ambient": list});
    let case = Case::new("grep -E '^Cap(Eff|Amb)' /proc/self/status")
        .with("/process/capabilities", all)
        .with("/process/user", json!({"uid": 1000, "gid": 1000}));
    let output = case.output();
    assert_eq!(output.matches("0000000000000400").count(), 2, "{output}");
}

#[test]
fn an_ordinary_user_without_ambient_capabilities_has_none() {
    require!();
    let case =
        Case::new("grep ^CapEff /proc/self/status").with("/process/user", json!({"uid": 1000, "gid": 1000}));
    assert_eq!(case.output(), "CapEff:\t0000000000000000\n");
}

#[test]
fn user_groups_and_umask() {
    require!();
    let case = Case::new("id -u; id -g; id -G; umask; touch /tmp/f; stat -c %a /tmp/f")
        .with("/process/user", json!({"uid": 1000, "gid": 50, "additionalGids": [7, 8], "umask": 0o027}));
    fs::set_permissions(case.rootfs().join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    assert_eq!(case.output(), "1000\n50\n50 7 8\n0027\n640\n");
}

#[test]
fn home_comes_from_the_images_passwd() {
    require!();
    let user = |uid: u32| Case::new("echo $HOME").with("/process/user", json!({"uid": uid, "gid": 0}));
    assert_eq!(user(0).output(), "/root\n");
    assert_eq!(user(1000).output(), "/data\n");
    assert_eq!(user(4242).output(), "/\n");
    assert_eq!(user(0).with("/process/env/-", json!("HOME=/given")).output(), "/given\n");
}

#[test]
fn no_new_privs_is_set_when_asked() {
    require!();
    for (on, want) in [(true, "NoNewPrivs:\t1\n"), (false, "NoNewPrivs:\t0\n")] {
        let case = Case::new("grep NoNewPrivs /proc/self/status").with("/process/noNewPrivileges", json!(on));
        assert_eq!(case.output(), want);
    }
}

#[test]
fn rlimits_are_set() {
    require!();
    let case = Case::new("ulimit -n; ulimit -Hn; ulimit -c").with(
        "/process/rlimits",
        json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]),
    );
    assert_eq!(case.output(), "100\n200\n0\n");
}

#[test]
fn sysctls_of_the_containers_namespaces_are_written() {
    require!();
    let case = Case::new("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni")
        .with("/linux/sysctl", json!({"net.ipv4.ip_forward": "1", "kernel.shmmni": "777"}));
    assert_eq!(case.output(), "1\n777\n");
    let host = Case::new("true").with("/linux/sysctl", json!({"kernel.panic": "1"}));
    assert!(host.create(&[]).is_err());
    let no_net = Case::new("true")
        .without_namespace("network")
        .with("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
    assert!(no_net.create(&[]).is_err());
}

#[test]
fn the_oom_score_is_adjusted() {
    require!();
    let case = Case::new("cat /proc/self/oom_score_adj").with("/process/oomScoreAdj", json!(321));
    assert_eq!(case.output(), "321\n");
}

#[test]
fn seccomp_denies_by_number_and_by_argument() {
    require!();
    let rules = json!([
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30},
        {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
         "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}
    ]);
    for nnp in [true, false] {
        let case = Case::new(
            "mkdir /tmp/x 2>&1; kill -0 $$ && echo zero; kill -10 $$ 2>&1; grep Seccomp: /proc/self/status",
        )
        .with("/process/noNewPrivileges", json!(nnp))
        .with("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));
        let output = case.output();
        assert!(output.contains("Read-only file system"), "{output}");
        assert!(output.contains("zero") && output.contains("not permitted"), "{output}");
        assert!(output.contains("Seccomp:\t2"), "{output}");
    }
}

#[test]
fn a_container_that_waits_for_its_start_holds_no_descriptor_of_its_maker() {
    require!(ours);
    let case = Case::new("true");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let bundle = case.bundle();
    let mut create = case.command(&["create", "--bundle", &bundle, &case.id]);
    let file = |name: &str| fs::File::create(case.path(name)).unwrap();
    create.stdout(file("out")).stderr(file("err"));
    let script = r#"exec 9>&0 </dev/null; exec "$0" "$@""#;
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", script]).arg(create.get_program()).args(create.get_args()).stdin(writer);
    assert!(shell.stdout(file("out")).stderr(file("err")).status().unwrap().success());
    drop(shell);
    assert_eq!(case.status(), "created");
    // The end comes only when nobody holds the other end any more.
    let end = std::thread::spawn(move || reader.read(&mut [0]).unwrap());
    wait_for("the end of the pipe", || end.is_finished());
    let fds = format!("/proc/{}/fd", case.pid());
    for entry in fs::read_dir(fds).unwrap().flatten() {
        let to = fs::read_link(entry.path()).unwrap().display().to_string();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        assert!(number < 3 || to.starts_with("socket:"), "{number} is {to}");
    }
}

#[test]
fn only_standard_streams_and_preserved_descriptors_are_open() {
    require!();
    let script = "ls /proc/self/fd | tr '\\n' ' '";
    let mut case = Case::new(script);
    // The listing itself holds one more.
    assert_eq!(case.output().trim(), "0 1 2 3");
    case.config["process"]["args"][2] = json!("read line <&3; echo $line");
    let bundle = case.bundle();
    fs::write(case.path("extra"), "preserved\n").unwrap();
    let mut command = Command::new("/bin/sh");
    let exe = runtime();
    command.arg("-c").arg(format!(
        "exec 3<{} 9</dev/zero; exec {} --root {} run --preserve-fds 1 --bundle {bundle} {}",
        case.path("extra").display(),
        exe.display(),
        case.path("state").display(),
        case.id
    ));
    fs::write(case.path("config.json"), case.config.to_string()).unwrap();
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(text(&output.stdout), "preserved\n", "{}", text(&output.stderr));
}

// --- hooks --------------------------------------------------------------------------------------------------------

fn hook(case: &Case, name: &str) -> Value {
    let log = case.path("hooks.log");
    // busybox lies in the image and on the host at the same path, so the same hook runs on both sides.
    let script = format!("read -r state; echo {name} \"$state\" >> {}", log.display());
    json!([{"path": "/bin/busybox", "args": ["sh", "-c", script]}])
}

#[test]
fn hooks_run_in_order_with_the_state() {
    require!();
    let mut case = Case::new("true");
    for (name, wanted) in [
        ("prestart", true),
        ("createRuntime", true),
        ("createContainer", true),
        ("poststart", true),
        ("poststop", true),
    ] {
        if wanted {
            let value = hook(&case, name);
            case.set(&format!("/hooks/{name}"), value);
        }
    }
    case.set(
        "/hooks/startContainer",
        json!([{"path": "/bin/busybox", "args": ["sh", "-c", "cat > /tmp/start-state"]}]),
    );
    case.output();
    let log = fs::read_to_string(case.path("hooks.log")).unwrap();
    let names: Vec<&str> = log.lines().map(|l| l.split(' ').next().unwrap()).collect();
    assert_eq!(names, ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]);
    for line in log.lines() {
        let state: Value = serde_json::from_str(line.split_once(' ').unwrap().1).unwrap();
        assert_eq!(state["id"], case.id.as_str(), "{line}");
        assert_eq!(state["bundle"], case.bundle(), "{line}");
    }
    let inside = fs::read_to_string(case.rootfs().join("tmp/start-state")).unwrap();
    let state: Value = serde_json::from_str(&inside).unwrap();
    assert_eq!(state["id"], case.id.as_str());
}

#[test]
fn a_failing_hook_before_the_start_fails_the_create() {
    require!();
    for name in ["prestart", "createRuntime", "createContainer"] {
        let case =
            in_cgroup(Case::new("true")).with(&format!("/hooks/{name}"), json!([{"path": "/bin/false"}]));
        assert!(case.create(&[]).is_err(), "{name}");
        case.assert_gone();
    }
}

#[test]
fn a_failing_poststart_hook_fails_the_start_and_ends_the_container() {
    require!(ours);
    let mut case = in_cgroup(Case::new("sleep 1000"));
    let mark = case.path("poststop-ran");
    case.set("/hooks/poststart", json!([{"path": "/bin/false"}]));
    case.set("/hooks/poststop", json!([{"path": "/bin/touch", "args": ["touch", mark]}]));
    case.create(&[]).unwrap();
    assert!(case.fails(&["start", &case.id]).contains("poststart"));
    case.assert_gone();
    assert!(mark.exists());
}

#[test]
fn a_hook_without_an_environment_has_that_of_whoever_runs_it() {
    require!(ours);
    let mut case = Case::new("cat /tmp/inside").with("/process/env", json!(["PATH=/bin", "ONE=two"]));
    let file = case.path("outside");
    let outside = format!("/usr/bin/env > {}", file.display());
    case.set("/hooks/createRuntime", json!([{"path": "/bin/sh", "args": ["sh", "-c", outside]}]));
    let inside = ["sh", "-c", "env > /tmp/inside"];
    case.set("/hooks/startContainer", json!([{"path": "/bin/busybox", "args": inside}]));
    assert!(case.output().contains("ONE=two"));
    let path = format!("PATH={}", std::env::var("PATH").unwrap());
    assert!(fs::read_to_string(&file).unwrap().lines().any(|line| line == path));
    case.set("/hooks/createRuntime/0/env", json!([]));
    case.output();
    assert!(!fs::read_to_string(&file).unwrap().lines().any(|line| line == path));
}

#[test]
fn a_failing_poststop_hook_is_only_told() {
    require!();
    let case = in_cgroup(Case::new("true")).with("/hooks/poststop", json!([{"path": "/bin/false"}]));
    case.output();
    case.assert_gone();
}

#[test]
fn a_hook_that_hangs_is_ended_by_its_timeout() {
    require!();
    let hook = json!([{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]);
    let case = Case::new("true").with("/hooks/createRuntime", hook);
    let begun = Instant::now();
    assert!(case.create(&[]).is_err());
    assert!(begun.elapsed() < DEADLINE);
}

// --- terminal -----------------------------------------------------------------------------------------------------

/// Receives the terminal that a runtime sends to a console socket.
fn receive_terminal(listener: &UnixListener) -> fs::File {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::{AsRawFd, FromRawFd};
    let (socket, _) = listener.accept().unwrap();
    let mut data = [0u8; 256];
    let mut space = nix::cmsg_space!([i32; 2]);
    let mut parts = [std::io::IoSliceMut::new(&mut data)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    for control in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the descriptor has just been received and belongs to nobody else.
            return unsafe { fs::File::from_raw_fd(fds[0]) };
        }
    }
    panic!("no descriptor came");
}

fn read_until(terminal: &mut fs::File, wanted: &str) -> String {
    let mut seen = String::new();
    let mut chunk = [0u8; 1024];
    while !seen.contains(wanted) {
        match terminal.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(n) => seen.push_str(&text(&chunk[..n])),
        }
    }
    assert!(seen.contains(wanted), "{seen:?}");
    seen
}

#[test]
fn the_console_socket_gets_the_containers_terminal() {
    require!();
    let case = Case::new("tty; test -c /dev/console && stty size; read line; echo got $line")
        .with("/process/terminal", json!(true))
        .with("/process/consoleSize", json!({"height": 33, "width": 77}));
    let path = case.path("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    case.create(&["--console-socket", &path.display().to_string()]).unwrap();
    let mut terminal = receive_terminal(&listener);
    case.ok(&["start", &case.id]);
    read_until(&mut terminal, "33 77");
    terminal.write_all(b"hello\n").unwrap();
    read_until(&mut terminal, "got hello");
}

#[test]
fn exec_gets_a_terminal_too() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let path = case.path("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = path.display().to_string();
    let mut child = case
        .command(&[
            "exec",
            "--detach",
            "--tty",
            "--console-socket",
            &socket,
            &case.id,
            "sh",
            "-c",
            "tty; read x",
        ])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut terminal = receive_terminal(&listener);
    read_until(&mut terminal, "/dev/pts/");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_terminal_and_a_console_socket_belong_together() {
    require!();
    let with_tty = Case::new("true").with("/process/terminal", json!(true));
    assert!(with_tty.create(&[]).is_err());
    let without = Case::new("true");
    let path = without.path("console.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    assert!(without.create(&["--console-socket", &path.display().to_string()]).is_err());
}

// --- escapes ------------------------------------------------------------------------------------------------------

/// An image that brings a link where a kernel file system goes must not start (CVE-2019-19921, CVE-2023-27561).
#[test]
fn proc_and_sys_must_not_be_links() {
    require!();
    for name in ["proc", "sys"] {
        let case = Case::new("true");
        let place = case.rootfs().join(name);
        fs::remove_dir(&place).unwrap();
        symlink("/tmp", &place).unwrap();
        assert!(case.create(&[]).is_err(), "{name}");
    }
}

/// CVE-2026-41579: devices must not be made behind a link.
#[test]
fn dev_must_not_lead_outside() {
    require!(ours);
    let mut case = Case::new("true");
    case.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
    let victim = case.path("victim");
    fs::create_dir(&victim).unwrap();
    fs::remove_dir(case.rootfs().join("dev")).unwrap();
    symlink(&victim, case.rootfs().join("dev")).unwrap();
    let _ = case.create(&[]);
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "something was made on the host");
}

/// CVE-2021-30465, CVE-2024-45310: a link on the way to a mount target is resolved within the root.
#[test]
fn a_link_in_a_mount_target_stays_within_the_root() {
    require!();
    let mut case = Case::new("ls /inside; test -e /inside/there/f && echo mounted");
    let (victim, src) = (case.path("victim"), case.path("src"));
    fs::create_dir(&victim).unwrap();
    fs::create_dir(&src).unwrap();
    fs::write(src.join("f"), "").unwrap();
    fs::create_dir(case.rootfs().join("inside")).unwrap();
    symlink("/inside", case.rootfs().join("link")).unwrap();
    symlink(format!("/../../../../..{}", victim.display()), case.rootfs().join("out")).unwrap();
    case.set(
        "/mounts/-",
        json!({"destination": "/link/there", "type": "bind", "source": src, "options": ["bind"]}),
    );
    assert_eq!(case.output(), "there\nmounted\n");
    case.set(
        "/mounts/-",
        json!({"destination": "/out/there", "type": "bind", "source": src, "options": ["bind"]}),
    );
    let _ = case.run();
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "something was made on the host");
}

/// CVE-2025-31133: a link instead of the null device must not turn a masked path into something else.
#[test]
fn masking_never_uses_the_images_null_device() {
    require!(ours);
    let mut case = Case::new("cat /secret");
    // No tmpfs on /dev, so that what the image brings is there.
    case.config["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != "/dev");
    case.set("/linux/maskedPaths", json!(["/secret"]));
    fs::write(case.rootfs().join("secret"), "secret\n").unwrap();
    symlink("/secret", case.rootfs().join("dev/null")).unwrap();
    let error = case.create(&[]).unwrap_err();
    assert!(error.contains("/dev/null"), "{error}");
}

/// CVE-2024-21626: a working directory behind a leaked descriptor is outside the root.
#[test]
fn the_working_directory_must_be_inside() {
    require!();
    for fd in 3..12 {
        let case = Case::new("ls ../../..").with("/process/cwd", json!(format!("/proc/self/fd/{fd}")));
        let output = case.run();
        assert!(!output.status.success(), "{fd}: {}", text(&output.stdout));
    }
}

/// CVE-2019-5736: the container must never get a writable way to the runtime's own file.
#[test]
fn the_runtimes_binary_cannot_be_reached_from_inside() {
    require!();
    if reference() {
        eprintln!("skipped: a reference may be a script or a link");
        return;
    }
    let before = fs::read(runtime()).unwrap();
    let case = Case::new("sleep 1000");
    symlink("/proc/self/exe", case.rootfs().join("bin/evil")).unwrap();
    case.start();
    // `evil` executes whatever the process was before: the runtime. It must be a copy that cannot be written.
    let mut child = case.command(&["exec", &case.id, "/bin/evil", "list"]).spawn().unwrap();
    let attack = "for p in /proc/[0-9]*; do (echo x >> $p/exe) 2>/dev/null && echo written $p; done";
    for _ in 0..20 {
        let output = case.exec(&[&case.id, "sh", "-c", attack]);
        assert_eq!(text(&output.stdout), "");
    }
    let _ = child.wait();
    assert!(before == fs::read(runtime()).unwrap(), "the binary was changed");
}

/// CVE-2019-16884: a mount must not hide or forge what the runtime and the kernel say under /proc.
#[test]
fn mounts_over_proc_are_refused() {
    require!();
    for destination in ["/proc/self/attr", "/proc/sys", "/proc/1"] {
        let mut case = Case::new("true");
        let src = case.path("src");
        fs::create_dir(&src).unwrap();
        case.set(
            "/mounts/-",
            json!({"destination": destination, "type": "bind", "source": src, "options": ["bind"]}),
        );
        assert!(case.create(&[]).is_err(), "{destination}");
    }
}

/// What a container leaves behind adds up: here a few, and nothing of them may be seen.
#[test]
fn nothing_is_left_after_many_containers() {
    require!();
    let case = in_cgroup(Case::new("true"));
    for _ in 0..20 {
        case.output();
        case.start();
        case.wait_for_status("stopped");
        case.ok(&["delete", &case.id]);
        case.assert_gone();
    }
    // Only of this bundle: other tests mount at the same time.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&case.bundle()), "{mounts}");
    assert_eq!(fs::read_dir(case.path("state")).unwrap().count(), 0);
}
