//! The callers of an OCI runtime, as the distribution ships them, with keel-runtime: podman, containerd and dockerd, each
//! with its own state below a temporary directory.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use keel_tests::image::{BUSYBOX, busybox_archive_in};
use keel_tests::{bin, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Says why a caller cannot be tried here.
pub(super) fn missing(programs: &[&str]) -> bool {
    let there = |name: &&&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    let root = nix::unistd::geteuid().is_root();
    let absent: Vec<_> = programs.iter().filter(|name| !there(name)).collect();
    if !root || !absent.is_empty() {
        eprintln!("skipped: needs root ({root}); not installed: {absent:?}");
    }
    !root || !absent.is_empty()
}

pub(super) fn work() -> TempDir {
    tempfile::Builder::new().prefix("keel-it-callers-").tempdir().unwrap()
}

fn succeeds(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A daemon that is stopped, also when its test fails.
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command, socket: &Path, log: &Path) -> Daemon {
        let file = fs::File::create(log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let mut daemon = Daemon(command.spawn().unwrap());
        eventually("the daemon answers", || {
            let ended = daemon.0.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", fs::read_to_string(log).unwrap_or_default());
            UnixStream::connect(socket).ok()
        });
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        for _ in 0..750 {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// --- podman -------------------------------------------------------------------------------------------------------

pub(super) struct Podman {
    pub(super) dir: TempDir,
}

impl Podman {
    fn command(&self, arguments: &[&str]) -> Command {
        let at = |name: &str| self.dir.path().join(name);
        let mut command = Command::new("podman");
        command.arg("--root").arg(at("root")).arg("--runroot").arg(at("run")).arg("--tmpdir").arg(at("tmp"));
        command.args([
            "--storage-driver",
            "overlay",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
        ]);
        command.arg("--runtime").arg(bin("keel-runtime")).args(arguments);
        command
    }

    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        succeeds(&mut self.command(arguments))
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.command(&["rm", "-f", "-a", "-t", "0"]).output();
        // Mounted by podman to keep its store private.
        let _ = nix::mount::umount2(&self.dir.path().join("root/overlay"), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// What a host without CAP_SYS_RESOURCE allows; podman asks for more and fails otherwise.
const LIMITS: [&str; 4] = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];

#[test]
fn podman_runs_executes_logs_stops_and_removes() {
    if missing(&["podman", "conmon"]) {
        return;
    }
    let podman = Podman { dir: work() };
    let archive = busybox_archive_in(podman.dir.path());
    podman.ok(&["load", "-q", "-i", archive.to_str().unwrap()]);
    let run = |options: &[&str], program: &[&str]| {
        podman.ok(&[&["run", "--network=none"][..], &LIMITS, options, &[BUSYBOX], program].concat())
    };
    assert_eq!(
        run(&["--rm", "-e", "A=x"], &["sh", "-c", "echo $A; cat /proc/self/attr/current >/dev/null; id -u"]),
        "x\n0"
    );
    run(
        &["-d", "--name", "web"],
        &["sh", "-c", "echo said; trap 'exit 7' TERM; while :; do sleep 0.1; done"],
    );
    eventually("the log", || (podman.ok(&["logs", "web"]) == "said").then_some(()));
    assert_eq!(podman.ok(&["exec", "-w", "/tmp", "-e", "B=y", "web", "sh", "-c", "pwd; echo $B"]), "/tmp\ny");
    assert_eq!(podman.command(&["exec", "web", "sh", "-c", "exit 3"]).status().unwrap().code(), Some(3));
    podman.ok(&["pause", "web"]);
    podman.ok(&["unpause", "web"]);
    podman.ok(&["stop", "-t", "10", "web"]);
    assert_eq!(
        podman.ok(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "web"]),
        "exited 7"
    );
    podman.ok(&["rm", "web"]);
    assert_eq!(podman.ok(&["ps", "-a", "-q"]), "");
}

// --- containerd ---------------------------------------------------------------------------------------------------

/// Not needed here, and noisy where the kernel lacks what they want.
const DISABLED: [&str; 5] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

pub(super) struct Containerd {
    socket: PathBuf,
    _daemon: Daemon,
}

impl Containerd {
    pub(super) fn start(dir: &Path) -> Containerd {
        let at = |name: &str| dir.join(name);
        let socket = at("cd.sock");
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\noom_score = 0\ndisabled_plugins = {DISABLED:?}\n[grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {:?}\n",
            at("cd-root"),
            at("cd-state"),
            at("cd.ttrpc"),
        );
        fs::write(at("cd.toml"), config).unwrap();
        let mut command = Command::new("containerd");
        let daemon = Daemon::start(command.arg("--config").arg(at("cd.toml")), &socket, &at("cd.log"));
        Containerd { socket, _daemon: daemon }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(arguments);
        command
    }

    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        succeeds(&mut self.command(arguments))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.command(&["task", "rm", "-f", "web"]).output();
        let _ = self.command(&["container", "rm", "web"]).output();
    }
}

#[test]
fn containerd_runs_executes_stops_and_removes() {
    if missing(&["containerd", "ctr"]) {
        return;
    }
    let dir = work();
    let containerd = Containerd::start(dir.path());
    containerd.ok(&["image", "import", busybox_archive_in(dir.path()).to_str().unwrap()]);
    let runtime = bin("keel-runtime");
    let run = |options: &[&str], program: &[&str]| {
        let ours = ["run", "--runc-binary", runtime.to_str().unwrap()];
        containerd.ok(&[&ours[..], options, &[BUSYBOX, "web"], program].concat())
    };
    assert_eq!(run(&["--rm", "--env", "A=x"], &["sh", "-c", "echo $A; id -u"]), "x\n0");
    run(&["-d", "--null-io"], &["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"]);
    assert_eq!(containerd.ok(&["task", "exec", "--exec-id", "one", "web", "echo", "inside"]), "inside");
    containerd.ok(&["task", "pause", "web"]);
    assert!(containerd.ok(&["task", "ls"]).contains("PAUSED"));
    containerd.ok(&["task", "resume", "web"]);
    assert!(containerd.ok(&["task", "metrics", "web"]).contains("pids"));
    containerd.ok(&["task", "kill", "--signal", "SIGTERM", "web"]);
    eventually("the end", || containerd.ok(&["task", "ls"]).contains("STOPPED").then_some(()));
    // Its own exit code is the container's.
    let removed = containerd.command(&["task", "rm", "web"]).output().unwrap();
    assert!(String::from_utf8_lossy(&removed.stderr).contains("exit code 7"), "{removed:?}");
    containerd.ok(&["container", "rm", "web"]);
}

// --- dockerd ------------------------------------------------------------------------------------------------------

pub(super) struct Docker {
    address: String,
    _daemon: Daemon,
}

impl Docker {
    pub(super) fn start(dir: &Path, containerd: &Containerd) -> Docker {
        let at = |name: &str| dir.join(name);
        fs::write(at("docker.json"), "{}").unwrap();
        let socket = at("docker.sock");
        let address = format!("unix://{}", socket.display());
        let mut command = Command::new("dockerd");
        command.arg("--config-file").arg(at("docker.json")).arg("--containerd").arg(&containerd.socket);
        command.arg("--data-root").arg(at("docker")).arg("--exec-root").arg(at("docker-exec"));
        command.arg("--pidfile").arg(at("docker.pid")).args(["-H", &address, "-l", "warn"]);
        command.args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]);
        command.args(["--ip-masq=false", "--storage-driver=overlay2"]);
        command.arg(format!("--add-runtime=keel={}", bin("keel-runtime").display()));
        Docker { address, _daemon: Daemon::start(&mut command, &socket, &at("docker.log")) }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(["-H", &self.address]).args(arguments);
        command
    }

    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        succeeds(&mut self.command(arguments))
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ = self.command(&["rm", "-f", "web"]).output();
    }
}

#[test]
fn dockerd_runs_executes_logs_stops_and_removes() {
    if missing(&["containerd", "dockerd", "docker"]) {
        return;
    }
    let dir = work();
    let containerd = Containerd::start(dir.path());
    let docker = Docker::start(dir.path(), &containerd);
    docker.ok(&["load", "-q", "-i", busybox_archive_in(dir.path()).to_str().unwrap()]);
    let run = |options: &[&str], program: &[&str]| {
        docker.ok(&[&["run", "--runtime=keel", "--network=none"][..], options, &[BUSYBOX], program].concat())
    };
    assert_eq!(run(&["--rm", "-e", "A=x"], &["sh", "-c", "echo $A; id -u"]), "x\n0");
    run(
        &["-d", "--name", "web"],
        &["sh", "-c", "echo said; trap 'exit 7' TERM; while :; do sleep 0.1; done"],
    );
    eventually("the log", || (docker.ok(&["logs", "web"]) == "said").then_some(()));
    assert_eq!(docker.ok(&["exec", "-w", "/tmp", "-e", "B=y", "web", "sh", "-c", "pwd; echo $B"]), "/tmp\ny");
    assert_eq!(docker.command(&["exec", "web", "sh", "-c", "exit 3"]).status().unwrap().code(), Some(3));
    docker.ok(&["update", "--memory", "64m", "--memory-swap", "-1", "web"]);
    docker.ok(&["stop", "-t", "10", "web"]);
    assert_eq!(
        docker.ok(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "web"]),
        "exited 7"
    );
    docker.ok(&["rm", "web"]);
    assert_eq!(docker.ok(&["ps", "-a", "-q"]), "");
}
