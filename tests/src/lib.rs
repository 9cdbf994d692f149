//! What every integration test stands on: the built binaries, an instance of its own in temporary directories, and the
//! certainty that nothing of it is left when the test ends.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

pub mod census;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod registry;

/// Long enough for a busy two-core machine; every wait polls, so a pass never takes this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The directory of the binaries under test: next to the running test, or as `KEEL_BIN_DIR` says.
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("KEEL_BIN_DIR") {
        return PathBuf::from(dir);
    }
    let exe = std::env::current_exe().expect("a running program has a path");
    exe.ancestors()
        .skip(1)
        .find(|dir| dir.join("keel").is_file())
        .unwrap_or_else(|| panic!("no keel binary above {}: cargo build --workspace --bins", exe.display()))
        .to_path_buf()
}

pub fn bin(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(path.is_file(), "{} is not built: cargo build --workspace --bins", path.display());
    path
}

/// One instance: own root, own run directory, own manifests. Dropping it stops and removes everything of it.
pub struct Instance {
    dir: TempDir,
    extra: Vec<String>,
    daemon: Option<Child>,
    /// Where the next daemon tells that it is ready, as systemd would.
    pub notify_socket: Option<PathBuf>,
}

pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    #[track_caller]
    pub fn expect_code(self, code: i32) -> Ran {
        assert_eq!(self.code(), code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Instance {
    pub fn new() -> Instance {
        assert!(nix::unistd::geteuid().is_root(), "these tests run containers: run them as root");
        let dir = tempfile::Builder::new().prefix("evenkeel-it-").tempdir().expect("a temporary directory");
        for name in ["root", "run", "manifests"] {
            fs::create_dir(dir.path().join(name)).expect("a directory in the temporary directory");
        }
        Instance { dir, extra: Vec::new(), daemon: None, notify_socket: None }
    }

    /// More global options for every call, e.g. `--runtime`.
    pub fn with(mut self, options: &[&str]) -> Instance {
        self.extra = options.iter().map(|option| option.to_string()).collect();
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn manifests(&self) -> PathBuf {
        self.dir.path().join("manifests")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(bin("keel"));
        command.arg("--root").arg(self.root()).arg("--run").arg(self.run_dir()).args(&self.extra);
        command.args(arguments).env_remove("KEEL_ROOT").env_remove("KEEL_RUN").stdin(Stdio::null());
        command
    }

    pub fn keel(&self, arguments: &[&str]) -> Ran {
        self.command(arguments).output().expect("keel runs").into()
    }

    pub fn keel_with_input(&self, arguments: &[&str], input: &str) -> Ran {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("keel runs");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("keel reads its input");
        child.wait_with_output().expect("keel ends").into()
    }

    /// Writes a manifest aside and renames it into place.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.manifests().join(name);
        let aside = self.dir.path().join("aside.tmp");
        fs::write(&aside, text).expect("write a manifest");
        fs::create_dir_all(path.parent().expect("below manifests")).expect("a subfolder");
        fs::rename(&aside, &path).expect("rename a manifest into place");
    }

    /// Imports the busybox image: no registry, no network.
    pub fn import_busybox(&self) {
        let archive = image::busybox_archive_in(self.path());
        self.keel(&["image", "import", archive.to_str().expect("UTF-8")]).expect_code(0);
    }

    pub fn apply(&self, text: &str) -> Ran {
        self.keel_with_input(&["apply", "-f", "-", "--wait", "--timeout", "60s"], text)
    }

    /// Starts `keel daemon` over the manifest directory and waits until it answers.
    pub fn start_daemon(&mut self) -> u32 {
        self.start_daemon_with(&[])
    }

    pub fn start_daemon_with(&mut self, options: &[&str]) -> u32 {
        assert!(self.daemon.is_none(), "a daemon runs already");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("daemon.log"))
            .expect("a log file");
        let manifests = self.manifests();
        let mut arguments = vec!["daemon", "--manifests", manifests.to_str().expect("UTF-8")];
        arguments.extend(options);
        let mut command = self.command(&arguments);
        if let Some(socket) = &self.notify_socket {
            command.env("NOTIFY_SOCKET", socket);
        }
        let child = command
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("keel daemon starts");
        let pid = child.id();
        self.daemon = Some(child);
        let socket = self.run_dir().join("keel.sock");
        eventually("the daemon answers", || {
            if let Some(child) = &mut self.daemon
                && let Ok(Some(status)) = child.try_wait()
            {
                panic!("the daemon ended: {status}\n{}", self.daemon_log());
            }
            std::os::unix::net::UnixStream::connect(&socket).is_ok().then_some(())
        });
        pid
    }

    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("a daemon runs").id()
    }

    pub fn kill_daemon(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            child.kill().expect("kill the daemon");
            child.wait().expect("reap the daemon");
        }
    }

    /// SIGTERM, then waits for the end.
    pub fn stop_daemon(&mut self) -> ExitStatus {
        let mut child = self.daemon.take().expect("a daemon runs");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signal the daemon");
        eventually("the daemon ends", || child.try_wait().expect("wait for the daemon"))
    }

    /// `keel get pods -A -o json`, the items by name.
    pub fn pods(&self) -> std::collections::BTreeMap<String, Value> {
        let ran = self.keel(&["get", "pods", "-A", "-o", "json"]).expect_code(0);
        let list = ran.json();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items
            .into_iter()
            .map(|item| (item["metadata"]["name"].as_str().unwrap_or_default().to_string(), item))
            .collect()
    }

    pub fn pod(&self, name: &str) -> Value {
        self.pods().remove(name).unwrap_or(Value::Null)
    }

    #[track_caller]
    pub fn await_ready(&self, name: &str) -> Value {
        eventually_or(
            || format!("pod {name} is ready: {:#}\n{}", self.pod(name)["status"], self.daemon_log()),
            || Some(self.pod(name)).filter(is_ready),
        )
    }

    /// Host pids of the running containers of all pods, by container id.
    pub fn pids(&self) -> std::collections::BTreeMap<String, u32> {
        let mut pids = std::collections::BTreeMap::new();
        for entry in fs::read_dir(self.run_dir().join("containers")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path().join("pid")).unwrap_or_default();
            if let Some(pid) = text.split_whitespace().next().and_then(|pid| pid.parse().ok())
                && is_alive(pid)
            {
                pids.insert(entry.file_name().to_string_lossy().into_owned(), pid);
            }
        }
        pids
    }
}

impl Default for Instance {
    fn default() -> Instance {
        Instance::new()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.kill_daemon();
        let ran = self.keel(&["system", "reset", "--force"]);
        if ran.code() != 0 && !std::thread::panicking() {
            panic!("system reset failed: {}", ran.all());
        }
        if std::thread::panicking() {
            eprintln!("--- daemon log\n{}", self.daemon_log());
        }
    }
}

pub fn is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"]
        .as_array()
        .is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

/// A zombie is not alive.
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with(['Z', 'X'])))
        .unwrap_or(false)
}

#[track_caller]
pub fn eventually<T>(what: &str, poll: impl FnMut() -> Option<T>) -> T {
    eventually_or(|| what.to_string(), poll)
}

/// Polls until there is a value; panics with `what` when patience ends.
#[track_caller]
pub fn eventually_or<T>(what: impl Fn() -> String, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {}", what());
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// Status and body of `GET http://<address><path>`; `None` while nothing answers.
pub fn http_get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let status = text.split(' ').nth(1)?.parse().ok()?;
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default();
    Some((status, body))
}

/// A TCP port that nothing uses now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}
