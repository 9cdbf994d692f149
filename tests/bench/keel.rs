//! Our side: the release binaries, and instances of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keel_tests::image::BUSYBOX;

use crate::engines::stop;
use crate::failure::{Doing, Failure, Outcome};
use crate::host::Work;
use crate::measure::{OFTEN, SELDOM, await_some, wall};

const BUILD: &str = "cargo build --release -p keel -p keel-shim -p keel-runtime";

/// A binary next to the running one, or where `KEEL_BIN_DIR` says.
pub(crate) fn bin(name: &str) -> Outcome<PathBuf> {
    let exe = std::env::current_exe().doing("find the running program")?;
    let dir = std::env::var_os("KEEL_BIN_DIR").map(PathBuf::from);
    let dir = dir.or_else(|| exe.parent().map(Path::to_path_buf)).unwrap_or_default();
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::new(format!("{} is missing; build it with: {BUILD}", path.display())))
}

/// What every engine runs: it ends as soon as it is told to.
pub(crate) const IDLE: [&str; 3] = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"];

/// A pod on the host's network, as the peers run theirs.
pub(crate) fn manifest(name: &str) -> String {
    let command = serde_json::json!(IDLE);
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  hostNetwork: true\n  \
         terminationGracePeriodSeconds: 2\n  containers:\n  - name: main\n    image: {BUSYBOX}\n    command: {command}\n"
    )
}

pub(crate) struct Keel {
    root: PathBuf,
    run: PathBuf,
    pub(crate) manifests: PathBuf,
    aside: PathBuf,
}

impl Keel {
    pub(crate) fn new(work: &Work, name: &str) -> Outcome<Keel> {
        Keel::at(work, name, work.state(name)?.join("root"))
    }

    pub(crate) fn at(work: &Work, name: &str, root: PathBuf) -> Outcome<Keel> {
        let state = work.state(name)?;
        let keel = Keel {
            root,
            run: work.run(name)?,
            manifests: state.join("manifests"),
            aside: state.join("aside"),
        };
        for dir in [&keel.root, &keel.manifests] {
            fs::create_dir_all(dir).doing_at("create", dir)?;
        }
        Ok(keel)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Outcome<Command> {
        let mut command = Command::new(bin("keel")?);
        command.arg("--root").arg(&self.root).arg("--run").arg(&self.run).args(arguments);
        Ok(command)
    }

    pub(crate) fn import(&self, archive: &Path) -> Outcome {
        wall(self.command(&["image", "import"])?.arg(archive)).map(drop)
    }

    pub(crate) fn reset(&self) -> Outcome {
        wall(&mut self.command(&["system", "reset", "--force"])?).map(drop)
    }

    pub(crate) fn delete(&self, pod: &str) -> Outcome {
        wall(&mut self.command(&["delete", "pod", pod])?).map(drop)
    }

    pub(crate) fn apply(&self, from: &Path) -> Outcome<Duration> {
        wall(self.command(&["--quiet", "apply", "--wait", "-f"])?.arg(from))
    }

    /// Puts a manifest into the directory, whole.
    pub(crate) fn declare(&self, name: &str) -> Outcome {
        fs::write(&self.aside, manifest(name)).doing_at("write", &self.aside)?;
        let path = self.file(name);
        fs::rename(&self.aside, &path).doing_at("rename a manifest to", &path)
    }

    pub(crate) fn retract(&self, name: &str) -> Outcome {
        let path = self.file(name);
        fs::remove_file(&path).doing_at("remove", &path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.manifests.join(format!("{name}.yaml"))
    }

    pub(crate) fn daemon(&self) -> Outcome<Daemon> {
        let log = self.root.join("daemon.log");
        let log = fs::File::create(&log).doing_at("create", &log)?;
        let mut command = self.command(&["daemon", "--allow-empty", "--manifests"])?;
        command.arg(&self.manifests).stdin(Stdio::null());
        command.stdout(log.try_clone().doing("share a file")?).stderr(log);
        let child = command.spawn().doing("start keel daemon")?;
        let daemon = Daemon { child };
        let socket = self.run.join("keel.sock");
        await_some("the daemon answers", SELDOM, || std::os::unix::net::UnixStream::connect(&socket).ok())?;
        Ok(daemon)
    }

    /// Time until the container of a pod that was just declared runs.
    pub(crate) fn await_running(&self, since: Instant, name: &str) -> Outcome<Duration> {
        await_some(&format!("pod {name} runs"), OFTEN, || {
            let running = self.running();
            running.iter().any(|(id, _)| id.starts_with(name)).then(|| since.elapsed())
        })
    }

    pub(crate) fn await_count(&self, count: usize) -> Outcome {
        await_some(&format!("{count} containers run"), SELDOM, || {
            (self.running().len() == count).then_some(())
        })
    }

    /// Container ids with the pids of their monitors.
    pub(crate) fn running(&self) -> Vec<(String, u32)> {
        let entries = fs::read_dir(self.run.join("containers")).into_iter().flatten().flatten();
        let running = entries.filter_map(|entry| {
            first_number(&entry.path().join("pid"))?;
            let shim = first_number(&entry.path().join("shim.pid"))?;
            Some((entry.file_name().to_string_lossy().into_owned(), shim))
        });
        running.collect()
    }
}

impl Drop for Keel {
    fn drop(&mut self) {
        if let Err(error) = self.reset() {
            eprintln!("bench: {error}");
        }
    }
}

pub(crate) struct Daemon {
    child: Child,
}

impl Daemon {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}

pub(crate) fn first_number(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}
