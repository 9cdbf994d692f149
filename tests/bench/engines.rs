//! The peers: each with its own state, started for a run and stopped after it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keel_tests::image::BUSYBOX;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::failure::{Doing, Failure, Outcome};
use crate::host::Work;
use crate::keel::IDLE;
use crate::measure::{SELDOM, Usage, await_some, cpu_with_children_s, output, peak_rss_kb, usage, wall};

/// An engine that can be given an image, and started containers of.
pub(crate) trait Engine {
    fn name(&self) -> &'static str;
    fn load(&self, archive: &Path) -> Outcome;
    /// Starts an idle container on the host's network; returns when the command does.
    fn start(&self, name: &str) -> Outcome<Duration>;
    fn remove(&self, names: &[String]) -> Outcome;
    /// Starts a container of the engine that runs `program`, mounted as `/bench`, and answers its process; its output goes
    /// where the engine's monitor is the cheapest, `log` if that takes a file.
    fn talk(&self, name: &str, program: &Path, words: &[&str], log: &Path) -> Outcome<u32>;
    /// Pulls from a registry on the loopback and unpacks.
    fn pull(&self, reference: &str) -> Outcome<Usage>;
    /// Long-running processes of the engine itself.
    fn daemons(&self) -> Vec<u32>;
}

/// Every engine that is installed and starts here; the others say why not.
pub(crate) fn engines(work: &Work, disk: &Path) -> Vec<Box<dyn Engine>> {
    NAMES.iter().filter_map(|name| present(name, engine(name, work, disk))).collect()
}

pub(crate) const NAMES: [&str; 3] = ["podman", "ctr", "docker"];

pub(crate) fn engine(name: &str, work: &Work, disk: &Path) -> Outcome<Box<dyn Engine>> {
    match name {
        "podman" => Ok(Box::new(Podman::new(work, disk)?)),
        "ctr" => Ok(Box::new(Containerd::new(work, disk)?)),
        _ => Ok(Box::new(Docker::new(work, disk)?)),
    }
}

pub(crate) fn present<T>(name: &str, found: Outcome<T>) -> Option<T> {
    found.inspect_err(|error| eprintln!("bench: {name} is left out: {error}")).ok()
}

fn installed(program: &str) -> Outcome {
    output(Command::new(program).arg("--version")).map(drop)
}

struct Podman {
    root: PathBuf,
    run: PathBuf,
    /// In place of its own.
    conmon: Option<PathBuf>,
}

/// podman with our monitor in conmon's place.
pub(crate) fn podman_with(conmon: PathBuf, work: &Work, disk: &Path) -> Outcome<Box<dyn Engine>> {
    let mut podman = Podman::new(work, disk)?;
    podman.conmon = Some(conmon);
    Ok(Box::new(podman))
}

impl Podman {
    fn new(work: &Work, disk: &Path) -> Outcome<Podman> {
        installed("podman")?;
        Ok(Podman { root: disk.join("podman"), run: work.run("podman")?, conmon: None })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(&self.root).arg("--runroot").arg(self.run.join("root"));
        command.arg("--tmpdir").arg(self.run.join("tmp"));
        command.args(["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]);
        if let Some(conmon) = &self.conmon {
            command.arg("--conmon").arg(conmon);
        }
        command.args(["--runtime", "runc", "--events-backend", "file"]).args(arguments);
        command
    }
}

impl Engine for Podman {
    fn name(&self) -> &'static str {
        "podman"
    }

    fn load(&self, archive: &Path) -> Outcome {
        wall(self.command(&["load", "-q", "-i"]).arg(archive)).map(drop)
    }

    fn start(&self, name: &str) -> Outcome<Duration> {
        // The limits are what a host without CAP_SYS_RESOURCE allows; podman asks for more and fails otherwise.
        let options = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1024:1024"];
        let mut command = self.command(&["run", "-d", "--network=host", "--name", name]);
        wall(command.args(options).arg(BUSYBOX).args(IDLE))
    }

    fn remove(&self, names: &[String]) -> Outcome {
        wall(self.command(&["rm", "-f", "-t", "0"]).args(names)).map(drop)
    }

    fn talk(&self, name: &str, _: &Path, _: &[&str], _: &Path) -> Outcome<u32> {
        Err(Failure::new(format!("{name}: conmon is measured by itself")))
    }

    fn pull(&self, reference: &str) -> Outcome<Usage> {
        usage(&self.command(&["pull", "-q", "--tls-verify=false", reference]))
    }

    fn daemons(&self) -> Vec<u32> {
        Vec::new()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = wall(&mut self.command(&["rm", "-f", "-a", "-t", "0"]));
        // What podman mounts to keep its store private would keep the disk busy.
        let _ = nix::mount::umount2(&self.root.join("overlay"), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Not needed here, and noisy where the kernel lacks what they want.
const DISABLED: [&str; 5] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

struct Containerd {
    child: Child,
    socket: PathBuf,
}

impl Containerd {
    fn new(work: &Work, disk: &Path) -> Outcome<Containerd> {
        installed("ctr")?;
        Containerd::in_dirs(&work.run("containerd")?, &disk.join("containerd"))
    }

    fn in_dirs(run: &Path, root: &Path) -> Outcome<Containerd> {
        installed("containerd")?;
        let socket = run.join("cd.sock");
        let config = run.join("config.toml");
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\noom_score = 0\ndisabled_plugins = {DISABLED:?}\n[grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {:?}\n",
            root,
            run.join("state"),
            run.join("cd.ttrpc"),
        );
        fs::write(&config, text).doing_at("write", &config)?;
        let mut child = background(Command::new("containerd").arg("--config").arg(&config), run)?;
        answers(&mut child, "containerd", &socket, run)?;
        Ok(Containerd { child, socket })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(arguments);
        command
    }
}

impl Engine for Containerd {
    fn name(&self) -> &'static str {
        "ctr"
    }

    fn load(&self, archive: &Path) -> Outcome {
        wall(self.command(&["image", "import"]).arg(archive)).map(drop)
    }

    fn start(&self, name: &str) -> Outcome<Duration> {
        wall(self.command(&["run", "-d", "--net-host", BUSYBOX, name]).args(IDLE))
    }

    fn remove(&self, names: &[String]) -> Outcome {
        for name in names {
            wall(&mut self.command(&["task", "rm", "-f", name]))?;
            wall(&mut self.command(&["container", "rm", name]))?;
        }
        Ok(())
    }

    fn talk(&self, name: &str, program: &Path, words: &[&str], log: &Path) -> Outcome<u32> {
        let mount = format!("type=bind,src={},dst=/bench,options=rbind:ro", program.display());
        let mut command = self.command(&["run", "-d", "--net-host", "--mount", &mount]);
        command.arg("--log-uri").arg(format!("file://{}", log.display())).args([BUSYBOX, name, "/bench"]);
        wall(command.args(words))?;
        let tasks = output(&mut self.command(&["task", "ls"]))?;
        let pid =
            tasks.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
        pid.ok_or_else(|| Failure::new(format!("no task {name} in: {tasks}")))
    }

    fn pull(&self, reference: &str) -> Outcome<Usage> {
        with_daemons(self, || {
            usage(&self.command(&["image", "pull", "--plain-http", "--snapshotter", "overlayfs", reference]))
        })
    }

    fn daemons(&self) -> Vec<u32> {
        vec![self.child.id()]
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let names = output(&mut self.command(&["container", "ls", "-q"])).unwrap_or_default();
        for name in names.lines() {
            let _ = wall(&mut self.command(&["task", "rm", "-f", name]));
            let _ = wall(&mut self.command(&["container", "rm", name]));
        }
        stop(&mut self.child);
    }
}

struct Docker {
    child: Child,
    address: String,
    /// Dropped last: the daemon needs it until its end.
    containerd: Containerd,
}

impl Docker {
    fn new(work: &Work, disk: &Path) -> Outcome<Docker> {
        installed("docker")?;
        installed("dockerd")?;
        let run = work.run("docker")?;
        let containerd =
            Containerd::in_dirs(&work.run("docker-containerd")?, &disk.join("docker-containerd"))?;
        let config = run.join("config.json");
        fs::write(&config, "{}").doing_at("write", &config)?;
        let socket = run.join("docker.sock");
        let address = format!("unix://{}", socket.display());
        let mut command = Command::new("dockerd");
        command.arg("--config-file").arg(&config).arg("--containerd").arg(&containerd.socket);
        command.arg("--data-root").arg(disk.join("docker")).arg("--exec-root").arg(run.join("exec"));
        command.arg("--pidfile").arg(run.join("pid")).args(["-H", &address, "-l", "warn"]);
        command.args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]);
        command.args(["--ip-masq=false", "--storage-driver=overlay2"]);
        let mut child = background(&mut command, &run)?;
        answers(&mut child, "dockerd", &socket, &run)?;
        Ok(Docker { child, address, containerd })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(["-H", &self.address]).args(arguments);
        command
    }
}

impl Engine for Docker {
    fn name(&self) -> &'static str {
        "docker"
    }

    fn load(&self, archive: &Path) -> Outcome {
        wall(self.command(&["load", "-q", "-i"]).arg(archive)).map(drop)
    }

    fn start(&self, name: &str) -> Outcome<Duration> {
        wall(self.command(&["run", "-d", "--network=host", "--name", name, BUSYBOX]).args(IDLE))
    }

    fn remove(&self, names: &[String]) -> Outcome {
        wall(self.command(&["rm", "-f"]).args(names)).map(drop)
    }

    fn talk(&self, name: &str, program: &Path, words: &[&str], _: &Path) -> Outcome<u32> {
        let mount = format!("{}:/bench:ro", program.display());
        let mut command = self.command(&["run", "-d", "--network=host", "--name", name, "-v", &mount]);
        wall(command.args([BUSYBOX, "/bench"]).args(words))?;
        let pid = output(&mut self.command(&["inspect", "-f", "{{.State.Pid}}", name]))?;
        pid.trim().parse().map_err(|_| Failure::new(format!("docker says {pid:?} for the process of {name}")))
    }

    fn pull(&self, reference: &str) -> Outcome<Usage> {
        with_daemons(self, || usage(&self.command(&["pull", "-q", reference])))
    }

    fn daemons(&self) -> Vec<u32> {
        vec![self.child.id(), self.containerd.child.id()]
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let names = output(&mut self.command(&["ps", "-a", "-q"])).unwrap_or_default();
        let names: Vec<String> = names.lines().map(str::to_owned).collect();
        if !names.is_empty() {
            let _ = self.remove(&names);
        }
        stop(&mut self.child);
    }
}

/// Adds what the daemons behind a command used meanwhile.
fn with_daemons(engine: &dyn Engine, act: impl FnOnce() -> Outcome<Usage>) -> Outcome<Usage> {
    let cpu = || engine.daemons().into_iter().map(cpu_with_children_s).sum::<f64>();
    let before = cpu();
    let mut used = act()?;
    used.cpu_s += cpu() - before;
    let peaks = engine.daemons().into_iter().map(peak_rss_kb);
    used.peak_rss_kb += peaks.sum::<f64>();
    Ok(used)
}

fn background(command: &mut Command, run: &Path) -> Outcome<Child> {
    let log = run.join("daemon.log");
    let file = fs::File::create(&log).doing_at("create", &log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone().doing("share a file")?).stderr(file);
    command.spawn().doing(&format!("start {:?}", command.get_program()))
}

fn answers(child: &mut Child, name: &str, socket: &Path, run: &Path) -> Outcome {
    let connected = await_some(&format!("{name} answers"), SELDOM, || match child.try_wait() {
        Ok(Some(status)) => Some(Err(status)),
        _ => std::os::unix::net::UnixStream::connect(socket).ok().map(Ok),
    });
    let why = match connected {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(status)) => format!("{name} ended ({status})"),
        Err(error) => error.to_string(),
    };
    stop(child);
    let log = fs::read_to_string(run.join("daemon.log")).unwrap_or_default();
    Err(Failure::new(format!("{why}: {}", log.lines().last().unwrap_or_default())))
}

/// SIGTERM, and SIGKILL for who does not listen.
pub(crate) fn stop(child: &mut Child) {
    const GRACE: Duration = Duration::from_secs(15);
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(SELDOM);
    }
    let _ = child.kill();
    let _ = child.wait();
}
