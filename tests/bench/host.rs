//! Where a run of the benchmark lives: a mount namespace and a temporary directory that end with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::failure::{Doing, Failure, Outcome};
use crate::measure::{output, wall};

/// `state` is on the disk, as `/var/lib` is; `run` is a tmpfs, as `/run` is. All engines get directories in both.
pub(crate) struct Work {
    dir: TempDir,
}

impl Work {
    /// Moves this process into a mount namespace of its own. Nobody else's mounts stay alive because of us, and none of
    /// ours outlives us.
    pub(crate) fn new() -> Outcome<Work> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Failure::new("containers are started here: run this as root"));
        }
        unshare(CloneFlags::CLONE_NEWNS).doing("make a mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .doing("make all mounts private")?;
        for target in container_mounts() {
            let _ = umount2(&target, MntFlags::MNT_DETACH);
        }
        let dir =
            tempfile::Builder::new().prefix("ekbench-").tempdir().doing("create a temporary directory")?;
        let work = Work { dir };
        for name in ["state", "run"] {
            let path = work.dir.path().join(name);
            fs::create_dir(&path).doing_at("create", &path)?;
        }
        let run = work.dir.path().join("run");
        mount(Some("tmpfs"), &run, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .doing_at("mount a tmpfs on", &run)?;
        Ok(work)
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn state(&self, name: &str) -> Outcome<PathBuf> {
        self.sub("state", name)
    }

    pub(crate) fn run(&self, name: &str) -> Outcome<PathBuf> {
        self.sub("run", name)
    }

    fn sub(&self, kind: &str, name: &str) -> Outcome<PathBuf> {
        let path = self.dir.path().join(kind).join(name);
        fs::create_dir_all(&path).doing_at("create", &path)?;
        Ok(path)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        unmount_below(self.dir.path());
    }
}

/// Root file systems and namespaces of containers that run on this host.
fn container_mounts() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let of_a_container = |line: &&str| line.contains(" - nsfs ") || line.contains(" - overlay ");
    let target = |line: &str| line.split(' ').nth(4).map(PathBuf::from);
    text.lines().filter(of_a_container).filter_map(target).filter(|path| path != Path::new("/")).collect()
}

/// A new ext4 in a file: creating inodes just after a large deletion is several times slower on ext4, so that no run may
/// inherit the file system of another.
pub(crate) struct Disk {
    file: PathBuf,
    pub(crate) path: PathBuf,
}

impl Disk {
    const SIZE_BYTES: u64 = 8 << 30;

    pub(crate) fn new(work: &Work) -> Outcome<Disk> {
        let disk = Disk { file: work.path().join("disk.ext4"), path: work.path().join("disk") };
        let file = fs::File::create(&disk.file).doing_at("create", &disk.file)?;
        file.set_len(Disk::SIZE_BYTES).doing_at("set the length of", &disk.file)?;
        fs::create_dir_all(&disk.path).doing_at("create", &disk.path)?;
        wall(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
                .arg(&disk.file),
        )?;
        wall(Command::new("mount").args(["-o", "loop"]).arg(&disk.file).arg(&disk.path))?;
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount_below(&self.path);
        let _ = fs::remove_file(&self.file);
    }
}

/// Engines leave mounts in their directories, and what is mounted cannot be removed.
fn unmount_below(dir: &Path) {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let below: Vec<PathBuf> = targets.filter(|target| target.starts_with(dir)).collect();
    // The newest mount is the last line and may cover an older one. What is detached is written back later, while
    // somebody else is measured: only for those who are busy.
    for target in below.iter().rev() {
        let _ = umount2(target, MntFlags::empty()).or_else(|_| umount2(target, MntFlags::MNT_DETACH));
    }
}

/// What a reader must know to judge the numbers.
pub(crate) fn facts() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let version = |program: &str, arguments: &[&str]| {
        let text = output(Command::new(program).args(arguments)).ok()?;
        text.lines().next().map(str::to_owned)
    };
    let model = read("/proc/cpuinfo");
    let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    json!({
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpu": model.trim_start_matches([' ', '\t', ':']),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "load": read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
        "podman": version("podman", &["--version"]),
        "containerd": version("containerd", &["--version"]),
        "dockerd": version("dockerd", &["--version"]),
        "runc": version("runc", &["--version"]),
        "crun": version("crun", &["--version"]),
        "conmon": version("conmon", &["--version"]),
    })
}

pub(crate) fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}
