//! OCI bundles that every runtime takes: the default specification, without what this host may not grant.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::failure::{Doing, Failure, Outcome};
use crate::host::Work;
use crate::keel::bin;
use crate::measure::output;

/// A directory with `config.json` and a root file system of a static busybox, and this very program as `/bench`.
pub(crate) fn bundle(work: &Work, name: &str, args: &[&str]) -> Outcome<PathBuf> {
    let dir = work.run("bundles")?.join(name);
    let rootfs = dir.join("rootfs");
    fs::create_dir_all(&rootfs).doing_at("create", &rootfs)?;
    keel_tests::image::busybox_rootfs(&rootfs);
    for sub in ["proc", "sys", "dev"] {
        let path = rootfs.join(sub);
        fs::create_dir_all(&path).doing_at("create", &path)?;
    }
    let exe = std::env::current_exe().doing("find the running program")?;
    fs::copy(&exe, rootfs.join("bench")).doing_at("copy", &exe)?;
    let config = dir.join("config.json");
    fs::write(&config, spec(&dir, args)?.to_string()).doing_at("write", &config)?;
    Ok(dir)
}

fn spec(dir: &Path, args: &[&str]) -> Outcome<Value> {
    output(Command::new(bin("keel-runtime")?).args(["spec", "--bundle"]).arg(dir))?;
    let path = dir.join("config.json");
    let text = fs::read_to_string(&path).doing_at("read", &path)?;
    let mut spec: Value = serde_json::from_str(&text).doing_at("parse", &path)?;
    // Old releases know no newer version, and take this one as it is.
    spec["ociVersion"] = json!("1.0.2");
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(args);
    // More open files than now needs a capability that not every host grants.
    if let Some(process) = spec["process"].as_object_mut() {
        process.remove("rlimits");
    }
    Ok(spec)
}

#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    pub(crate) name: &'static str,
    program: PathBuf,
    root: PathBuf,
}

impl Runtime {
    pub(crate) fn ours(work: &Work) -> Outcome<Runtime> {
        Ok(Runtime { name: "keel-runtime", program: bin("keel-runtime")?, root: work.run("keel-runtime")? })
    }

    pub(crate) fn peer(work: &Work, name: &'static str) -> Outcome<Runtime> {
        output(Command::new(name).arg("--version"))?;
        Ok(Runtime { name, program: name.into(), root: work.run(name)? })
    }

    /// An id of this runtime alone: all of them make a control group of that name in one place.
    pub(crate) fn id(&self, name: &str) -> String {
        format!("bench-{}-{name}", self.name)
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).args(arguments);
        command
    }

    /// Runs `act` where this runtime finds the control groups that it understands: crun refuses a host that has the
    /// second version mounted beside the first, and is given one without.
    pub(crate) fn on_its_host<T: Send>(&self, act: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
        let beside = Path::new("/sys/fs/cgroup/unified");
        if self.name != "crun" || !beside.is_dir() {
            return act();
        }
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                unshare(CloneFlags::CLONE_NEWNS).doing("make a mount namespace")?;
                umount2(beside, MntFlags::MNT_DETACH).doing_at("unmount", beside)?;
                act()
            });
            thread.join().map_err(|_| Failure::new("a measuring thread panicked"))?
        })
    }
}
