//! One cgroup in every hierarchy of the host.

use crate::devices::{DeviceRule, device_program, lower_v1_devices};
use crate::layout::{Hierarchy, Layout, Mode, Roots};
use crate::resources::Resources;
use crate::write::{Setting, lower_v1, lower_v2};
use keel_sys::{bpf, file};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cgroup path {0:?} is not a plain path")]
    Path(String),
    #[error("create cgroup {}", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("write {value:?} to {}", path.display())]
    Write { path: PathBuf, value: String, source: io::Error },
    #[error("cannot set {file}: the controller {controller:?} is not available")]
    NoController { controller: &'static str, file: String },
    #[error(
        "invalid configuration: linux.resources.unified: {file}: the v2 hierarchy of this host has no such control"
    )]
    Unified { file: String },
    #[error("device rule: {0}")]
    Device(String),
    #[error("load the device filter of {}", path.display())]
    DeviceFilter { path: PathBuf, source: io::Error },
    #[error("kill process {pid} of {}", path.display())]
    Kill { pid: i32, path: PathBuf, source: io::Error },
    #[error("container's cgroup is not empty: {}: {by}", path.display())]
    Occupied { path: PathBuf, by: String },
    #[error("remove cgroup {}", path.display())]
    Remove { path: PathBuf, source: io::Error },
    #[error("memory limit {limit} is not set: {used} bytes are in use")]
    InUse { limit: i64, used: u64 },
    #[error("{} did not become {wanted} in time", path.display())]
    Freeze { path: PathBuf, wanted: &'static str },
    #[error("no freezer: neither a v1 freezer nor cgroup v2 is available")]
    NoFreezer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// The directory of a cgroup in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub version: Version,
    /// v1 controllers; empty for v2.
    pub controllers: Vec<String>,
    pub mount: PathBuf,
    /// mount + relative path.
    pub dir: PathBuf,
}

impl Entry {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|c| c == controller)
    }
}

/// One path in all hierarchies. The value is only the names; the directories may or may not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    pub mode: Mode,
    pub entries: Vec<Entry>,
}

fn is_period(setting: &Setting) -> bool {
    matches!(setting.file.as_str(), "cpu.cfs_period_us" | "cpu.rt_period_us")
}

fn is_quota(setting: &Setting) -> bool {
    matches!(setting.file.as_str(), "cpu.cfs_quota_us" | "cpu.rt_runtime_us")
}

fn is_refused(error: &CgroupError) -> bool {
    matches!(error, CgroupError::Write { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
}

/// How long a removal is tried again while the kernel still finishes the exit of the last process.
pub(crate) const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
/// How long freezing may take; a process in uninterruptible sleep delays it.
pub(crate) const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
/// Rounds of "signal everything" on v1, where a fork may race with the reading of the list.
const KILL_ROUNDS: usize = 100;

impl Layout {
    /// The cgroup at `path`: absolute is below the root of each mount, relative below this process's own cgroup.
    pub fn cgroup(&self, path: &str) -> Result<Cgroup, CgroupError> {
        let plain = path.split('/').all(|part| part != ".." && part != "." && !part.contains('\0'));
        let relative = path.trim_matches('/');
        if !plain || relative.is_empty() {
            return Err(CgroupError::Path(path.to_owned()));
        }
        let entry = |version, h: &Hierarchy| {
            let base =
                if path.starts_with('/') { h.mount.clone() } else { h.mount.join(h.own.trim_matches('/')) };
            Entry {
                version,
                controllers: h.controllers.clone(),
                mount: h.mount.clone(),
                dir: base.join(relative),
            }
        };
        let mut entries: Vec<Entry> = self.v1.iter().map(|h| entry(Version::V1, h)).collect();
        entries.extend(self.v2.iter().map(|h| entry(Version::V2, h)));
        Ok(Cgroup { mode: self.mode, entries })
    }
}

impl Cgroup {
    /// From directories recorded earlier (see [`Cgroup::entries`]).
    pub fn from_entries(mode: Mode, entries: Vec<Entry>) -> Cgroup {
        Cgroup { mode, entries }
    }

    pub fn v2(&self) -> Option<&Entry> {
        self.entries.iter().find(|e| e.version == Version::V2)
    }

    /// The directory that holds a controller's files: v1's own, or v2's.
    pub fn dir_of(&self, controller: &str) -> Option<&Path> {
        match self.mode {
            Mode::V2 => self.v2().map(|e| e.dir.as_path()),
            _ => self.entries.iter().find(|e| e.has(controller)).map(|e| e.dir.as_path()),
        }
    }

    /// Makes the directories, with parents; what exists is left as it is.
    pub fn create(&self) -> Result<(), CgroupError> {
        self.entries.iter().try_for_each(|entry| self.create_entry(entry).map(drop))
    }

    /// Whether this call made the last directory.
    fn create_entry(&self, entry: &Entry) -> Result<bool, CgroupError> {
        let made = match (self.mode, entry.version) {
            (Mode::V2, Version::V2) => create_v2(entry)?,
            _ => create_dirs(&entry.mount, &entry.dir)?,
        };
        if entry.has("cpuset") {
            fill_cpuset(&entry.mount, &entry.dir)?;
        }
        Ok(made)
    }

    /// As [`Cgroup::create`], for one container alone: others that want the same cgroup are refused while the claim
    /// lasts, and it is refused where processes are.
    pub fn claim(&self) -> Result<Claim, CgroupError> {
        let mut claim = Claim { mode: self.mode, made: Vec::new(), lock: None };
        // The lock is on the directory whose processes count, so that comes first.
        let Some(first) = self.listing_entry() else { return Ok(claim) };
        let made = self.create_entry(first)?;
        let occupied = |by: String| CgroupError::Occupied { path: first.dir.clone(), by };
        let lock = fs::File::from(open_dir(&first.dir)?);
        match lock.try_lock() {
            Err(fs::TryLockError::WouldBlock) => {
                return Err(occupied("another container is being created in it".to_owned()));
            }
            Err(fs::TryLockError::Error(source)) => {
                return Err(CgroupError::Open { path: first.dir.clone(), source });
            }
            Ok(()) => claim.lock = Some(lock),
        }
        let count = self.pids()?.len();
        if count > 0 {
            return Err(occupied(format!("{count} process(es) found")));
        }
        if made {
            claim.note(first)?;
        }
        for entry in self.entries.iter().filter(|e| *e != first) {
            if self.create_entry(entry)? {
                claim.note(entry)?;
            }
        }
        Ok(claim)
    }

    pub fn exists(&self) -> bool {
        self.entries.iter().any(|e| e.dir.exists())
    }

    /// Writes limits and device rules. An empty list of device rules changes nothing.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        self.apply_devices(resources)?;
        self.apply_limits(resources)
    }

    /// `checkBeforeUpdate`: v2 would reclaim, and kill when that does not help; v1 refuses by itself.
    pub fn check_memory(&self, resources: &Resources) -> Result<(), CgroupError> {
        let Some(memory) = resources.memory.as_ref().filter(|m| m.check_before_update == Some(true)) else {
            return Ok(());
        };
        let (Some(limit), Mode::V2, Some(entry)) = (memory.limit.filter(|l| *l > 0), self.mode, self.v2())
        else {
            return Ok(());
        };
        let path = entry.dir.join("memory.current");
        let text = fs::read_to_string(&path).map_err(|source| CgroupError::Read { path, source })?;
        let used = text.trim().parse().unwrap_or(0);
        if used > limit as u64 { Err(CgroupError::InUse { limit, used }) } else { Ok(()) }
    }

    /// Writes limits only, as for an update of a running container.
    pub fn apply_limits(&self, resources: &Resources) -> Result<(), CgroupError> {
        if self.mode == Mode::V2 {
            for setting in lower_v2(resources) {
                if let Some(entry) = self.v2() {
                    write_setting(&entry.dir, &setting)?;
                }
            }
            return Ok(());
        }
        let mut settings = lower_v1(resources).into_iter().peekable();
        while let Some(setting) = settings.next() {
            match self.dir_of(setting.controller) {
                Some(dir) => match self.write_v1(dir, &setting) {
                    // With the old quota the new period may be more than the parent has to give.
                    Err(e)
                        if is_period(&setting) && is_refused(&e) && settings.peek().is_some_and(is_quota) =>
                    {
                        let quota = settings.next().map_or(Ok(()), |quota| self.write_v1(dir, &quota));
                        quota.and_then(|()| self.write_v1(dir, &setting))?;
                    }
                    other => other?,
                },
                None if setting.optional => {}
                None => {
                    return Err(CgroupError::NoController {
                        controller: setting.controller,
                        file: setting.file,
                    });
                }
            }
        }
        if let (Mode::Hybrid, false, Some(entry)) = (self.mode, resources.unified.is_empty(), self.v2()) {
            let only = Resources { unified: resources.unified.clone(), ..Default::default() };
            for setting in lower_v2(&only) {
                match write_setting(&entry.dir, &setting) {
                    Err(CgroupError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        return Err(CgroupError::Unified { file: setting.file });
                    }
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// A limit above the present swap limit is refused by v1 until the swap limit is raised: then the other order.
    fn write_v1(&self, dir: &Path, setting: &Setting) -> Result<(), CgroupError> {
        let result = write_setting(dir, setting);
        let Err(CgroupError::Write { source, .. }) = &result else { return result };
        if setting.file == "memory.limit_in_bytes" && source.raw_os_error() == Some(libc::EINVAL) {
            let swap = Setting { file: "memory.memsw.limit_in_bytes".to_owned(), ..setting.clone() };
            write_setting(dir, &swap)?;
            return write_setting(dir, setting);
        }
        result
    }

    fn apply_devices(&self, resources: &Resources) -> Result<(), CgroupError> {
        if resources.devices.is_empty() {
            return Ok(());
        }
        let rules = resources
            .devices
            .iter()
            .map(DeviceRule::from_spec)
            .collect::<Result<Vec<_>, _>>()
            .map_err(CgroupError::Device)?;
        self.set_devices(&rules)
    }

    /// Replaces the device rules.
    pub fn set_devices(&self, rules: &[DeviceRule]) -> Result<(), CgroupError> {
        if self.mode == Mode::V2 {
            let Some(entry) = self.v2() else { return Ok(()) };
            let error = |source| CgroupError::DeviceFilter { path: entry.dir.clone(), source };
            let dir = open_dir(&entry.dir)?;
            let program = bpf::load_device_filter(&device_program(rules)).map_err(error)?;
            return bpf::replace_device_filter(&dir, &program).map_err(error);
        }
        let controller = "devices";
        let dir = self
            .dir_of(controller)
            .ok_or_else(|| CgroupError::NoController { controller, file: "devices.deny".to_owned() })?;
        let mut allow = OpenFile::new(dir.join("devices.allow"));
        let mut deny = OpenFile::new(dir.join("devices.deny"));
        for (yes, line) in lower_v1_devices(rules).map_err(CgroupError::Device)? {
            let file = if yes { &mut allow } else { &mut deny };
            file.write(&line)?;
        }
        Ok(())
    }

    /// v1 `tasks` files, opened for writing: a single-threaded process joins by writing `0` to each.
    pub fn open_tasks(&self) -> Result<Vec<OwnedFd>, CgroupError> {
        self.entries
            .iter()
            .filter(|e| e.version == Version::V1)
            .map(|e| {
                let path = e.dir.join("tasks");
                open_write(&path).map_err(|source| CgroupError::Open { path, source })
            })
            .collect()
    }

    /// The v2 directory, for a clone into the cgroup.
    pub fn open_v2(&self) -> Result<Option<OwnedFd>, CgroupError> {
        self.v2().map(|e| open_dir(&e.dir)).transpose()
    }

    /// The v2 directory for one more process beside `pid`. A cgroup that passes controllers on may have no processes
    /// itself: a container that makes cgroups of its own moves its processes down, and the new one has to go there.
    pub fn open_v2_beside(&self, pid: i32, roots: &Roots) -> Result<Option<OwnedFd>, CgroupError> {
        let Some(entry) = self.v2() else { return Ok(None) };
        let passed_on = fs::read_to_string(entry.dir.join("cgroup.subtree_control")).unwrap_or_default();
        if !passed_on.trim().is_empty() {
            let path = roots.proc.join(format!("{pid}/cgroup"));
            let text = fs::read_to_string(&path).map_err(|source| CgroupError::Read { path, source })?;
            let below = text.lines().find_map(|l| l.strip_prefix("0::")).map(|own| {
                let dir = entry.mount.join(own.trim_start_matches('/'));
                (dir.starts_with(&entry.dir) && !own.contains("..")).then_some(dir)
            });
            if let Some(Some(dir)) = below {
                return open_dir(&dir).map(Some);
            }
        }
        open_dir(&entry.dir).map(Some)
    }

    /// Moves another process in, the slow way (see the crate's head).
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for entry in &self.entries {
            write_value(&entry.dir.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Processes of this cgroup and of all below it.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = BTreeSet::new();
        if let Some(entry) = self.listing_entry() {
            collect_pids(&entry.dir, &mut pids)?;
        }
        Ok(pids.into_iter().collect())
    }

    /// Kills every process of the subtree. Returns when each has been signalled, not when each is gone.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        if let Some(entry) = self.v2() {
            match write_value(&entry.dir.join("cgroup.kill"), "1") {
                Ok(()) if self.mode == Mode::V2 => {
                    return Ok(());
                }
                Ok(()) | Err(CgroupError::Write { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        let frozen = self.mode != Mode::V2 && self.request_freeze(true).is_ok();
        let result = self.signal_until_quiet(libc::SIGKILL);
        if frozen {
            // A frozen task dies only when it is thawed.
            match self.request_freeze(false) {
                Err(CgroupError::Write { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        result
    }

    fn signal_until_quiet(&self, signal: i32) -> Result<(), CgroupError> {
        let mut seen = BTreeSet::new();
        for _ in 0..KILL_ROUNDS {
            let new: Vec<i32> = self.pids()?.into_iter().filter(|p| *p > 0 && !seen.contains(p)).collect();
            if new.is_empty() {
                return Ok(());
            }
            for pid in new {
                seen.insert(pid);
                self.signal_one(pid, signal)?;
            }
        }
        Ok(())
    }

    fn signal_one(&self, pid: i32, signal: i32) -> Result<(), CgroupError> {
        match keel_sys::process::kill(pid, signal) {
            Err(source) if source.raw_os_error() != Some(libc::ESRCH) => {
                let path = self.entries.first().map(|e| e.dir.clone()).unwrap_or_default();
                Err(CgroupError::Kill { pid, path, source })
            }
            _ => Ok(()),
        }
    }

    /// Sends a signal once to every process of the subtree.
    pub fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            return self.kill_all();
        }
        for pid in self.pids()? {
            self.signal_one(pid, signal)?;
        }
        Ok(())
    }

    /// Stops (or continues) all processes and waits until they are.
    pub fn freeze(&self, on: bool) -> Result<(), CgroupError> {
        let wanted = if on { "frozen" } else { "thawed" };
        let deadline = Instant::now() + FREEZE_DEADLINE;
        loop {
            // v1 may stay in FREEZING while a process is being forked; asking again helps it along.
            self.request_freeze(on)?;
            if self.is_frozen()? == on {
                return Ok(());
            }
            if Instant::now() > deadline {
                let path = self.freezer_dir().map(|(dir, _)| dir.to_owned()).unwrap_or_default();
                let _ = self.request_freeze(false);
                return Err(CgroupError::Freeze { path, wanted });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Where processes are stopped: the freezer of v1, or the v2 cgroup.
    pub fn freezer_dir(&self) -> Option<(&Path, Version)> {
        let v1 = self.entries.iter().find(|e| e.has("freezer")).map(|e| (e.dir.as_path(), Version::V1));
        v1.or_else(|| self.v2().map(|e| (e.dir.as_path(), Version::V2)))
    }

    fn request_freeze(&self, on: bool) -> Result<(), CgroupError> {
        match self.freezer_dir().ok_or(CgroupError::NoFreezer)? {
            (dir, Version::V1) => {
                write_value(&dir.join("freezer.state"), if on { "FROZEN" } else { "THAWED" })
            }
            (dir, Version::V2) => write_value(&dir.join("cgroup.freeze"), if on { "1" } else { "0" }),
        }
    }

    /// Whether all processes are stopped. A cgroup that is gone is not.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let Some((dir, version)) = self.freezer_dir() else { return Ok(false) };
        let path = match version {
            Version::V1 => dir.join("freezer.state"),
            Version::V2 => dir.join("cgroup.events"),
        };
        match fs::read_to_string(&path) {
            Ok(text) => Ok(match version {
                Version::V1 => text.trim() == "FROZEN",
                Version::V2 => text.lines().any(|l| l == "frozen 1"),
            }),
            Err(e) if gone(&e) => Ok(false),
            Err(source) => Err(CgroupError::Read { path, source }),
        }
    }

    /// Kills by the OOM killer in this cgroup so far.
    pub fn oom_kills(&self) -> u64 {
        let (Some(dir), v2) = (self.dir_of("memory"), self.mode == Mode::V2) else { return 0 };
        let path = dir.join(if v2 { "memory.events" } else { "memory.oom_control" });
        let text = fs::read_to_string(path).unwrap_or_default();
        let count =
            text.lines().find_map(|l| l.strip_prefix("oom_kill ")).and_then(|n| n.trim().parse().ok());
        count.unwrap_or(0)
    }

    /// Removes the cgroup and everything below it, trying again while the last processes are still exiting.
    /// Directories that are not there are no error.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + REMOVE_DEADLINE;
        for entry in &self.entries {
            remove_tree(&entry.dir, deadline)?;
        }
        Ok(())
    }

    fn listing_entry(&self) -> Option<&Entry> {
        // `name=systemd` may have been moved by an init system inside; a real controller has not.
        match self.mode {
            Mode::V2 => self.v2(),
            _ => ["freezer", "pids", "memory", "devices", "cpu"]
                .into_iter()
                .find_map(|c| self.entries.iter().find(|e| e.has(c)))
                .or(self.entries.first()),
        }
    }
}

/// What [`Cgroup::claim`] made: it goes, with the processes in it, unless it is kept.
#[derive(Debug)]
pub struct Claim {
    mode: Mode,
    /// With the number that the directory has for ever: another of the same name is another's.
    made: Vec<(Entry, u64)>,
    lock: Option<fs::File>,
}

impl Claim {
    fn note(&mut self, entry: &Entry) -> Result<(), CgroupError> {
        let found = fs::metadata(&entry.dir);
        let found = found.map_err(|source| CgroupError::Open { path: entry.dir.clone(), source })?;
        self.made.push((entry.clone(), found.ino()));
        Ok(())
    }

    /// The container stands, and what was made goes when it is deleted.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let made = std::mem::take(&mut self.made).into_iter();
        let still = |(entry, number): (Entry, u64)| {
            fs::metadata(&entry.dir).is_ok_and(|found| found.ino() == number).then_some(entry)
        };
        let made = Cgroup::from_entries(self.mode, made.filter_map(still).collect());
        if !made.entries.is_empty() {
            let _ = made.kill_all();
            let _ = made.remove();
        }
        // The container's process has a copy of the descriptor, so that closing it would not unlock.
        if let Some(lock) = self.lock.take() {
            let _ = lock.unlock();
        }
    }
}

fn gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Whether this call made it.
fn create_dirs(mount: &Path, dir: &Path) -> Result<bool, CgroupError> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && dir != mount => {
            let parent = dir.parent().unwrap_or(mount);
            create_dirs(mount, parent)?;
            create_dirs(mount, dir)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(CgroupError::Create { path: dir.to_owned(), source }),
        Ok(()) => Ok(true),
    }
}

/// On v2 a controller is available below only when each ancestor passes it on.
fn create_v2(entry: &Entry) -> Result<bool, CgroupError> {
    let mut made = false;
    let mut here = entry.mount.clone();
    let rest = entry.dir.strip_prefix(&entry.mount).unwrap_or(Path::new("")).to_owned();
    for part in rest.components() {
        delegate(&here);
        here.push(part);
        made = create_dirs(&entry.mount, &here)?;
    }
    Ok(made)
}

/// Best effort: what could not be passed on shows when a limit is written.
fn delegate(dir: &Path) {
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let enabled = read("cgroup.subtree_control");
    let missing: Vec<String> = read("cgroup.controllers")
        .split_whitespace()
        .filter(|c| !enabled.split_whitespace().any(|e| e == *c))
        .map(|c| format!("+{c}"))
        .collect();
    if missing.is_empty() {
        return;
    }
    let file = dir.join("cgroup.subtree_control");
    if write_value(&file, &missing.join(" ")).is_err() {
        for one in &missing {
            let _ = write_value(&file, one);
        }
    }
}

/// A new v1 cpuset is empty, and nothing can join it before it has CPUs and memory nodes.
fn fill_cpuset(mount: &Path, dir: &Path) -> Result<(), CgroupError> {
    let read = |dir: &Path, file: &str| {
        let path = dir.join(file);
        fs::read_to_string(&path).map_err(|source| CgroupError::Read { path, source })
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if !read(dir, file)?.trim().is_empty() || dir == mount {
            continue;
        }
        let parent = dir.parent().unwrap_or(mount);
        if read(parent, file)?.trim().is_empty() {
            fill_cpuset(mount, parent)?;
        }
        write_value(&dir.join(file), read(parent, file)?.trim())?;
    }
    Ok(())
}

fn write_setting(dir: &Path, setting: &Setting) -> Result<(), CgroupError> {
    let path = dir.join(&setting.file);
    if let Some(or) = setting.or
        && !path.exists()
        && dir.join(or).exists()
    {
        return write_setting(dir, &Setting { file: or.to_owned(), or: None, ..setting.clone() });
    }
    match write_value(&path, &setting.value) {
        Err(CgroupError::Write { source, .. })
            if setting.optional
                && matches!(source.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV)) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn write_value(path: &Path, value: &str) -> Result<(), CgroupError> {
    let done = open_write(path).and_then(|fd| file::write_once(&fd, value.as_bytes()));
    done.map_err(|source| CgroupError::Write { path: path.to_owned(), value: value.to_owned(), source })
}

fn open_write(path: &Path) -> io::Result<OwnedFd> {
    // A cgroup file is never created: with O_CREAT a missing file would answer EPERM instead of ENOENT.
    file::openat(file::cwd(), &file::c_path(path)?, libc::O_WRONLY, 0)
}

fn open_dir(path: &Path) -> Result<OwnedFd, CgroupError> {
    let open = || file::openat(file::cwd(), &file::c_path(path)?, libc::O_RDONLY | libc::O_DIRECTORY, 0);
    open().map_err(|source| CgroupError::Open { path: path.to_owned(), source })
}

/// A file that is opened at its first write.
struct OpenFile {
    path: PathBuf,
    file: Option<fs::File>,
}

impl OpenFile {
    fn new(path: PathBuf) -> OpenFile {
        OpenFile { path, file: None }
    }

    fn write(&mut self, value: &str) -> Result<(), CgroupError> {
        let error = |source| CgroupError::Write { path: self.path.clone(), value: value.to_owned(), source };
        if self.file.is_none() {
            self.file = Some(fs::OpenOptions::new().write(true).open(&self.path).map_err(error)?);
        }
        match &mut self.file {
            Some(file) => file.write_all(value.as_bytes()).map_err(error),
            None => Ok(()),
        }
    }
}

fn subdirs(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn collect_pids(dir: &Path, pids: &mut BTreeSet<i32>) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.procs");
    match fs::read_to_string(&path) {
        Ok(text) => pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok())),
        Err(e) if gone(&e) => return Ok(()),
        // A threaded cgroup has no list of processes of its own; its domain has.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(source) => return Err(CgroupError::Read { path, source }),
    }
    for sub in subdirs(dir) {
        collect_pids(&sub, pids)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path, deadline: Instant) -> Result<(), CgroupError> {
    let mut pause = Duration::from_micros(200);
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if gone(&e) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                let below = subdirs(dir);
                for sub in &below {
                    remove_tree(sub, deadline)?;
                }
                if Instant::now() > deadline {
                    return Err(CgroupError::Remove { path: dir.to_owned(), source: e });
                }
                if below.is_empty() {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
            }
            Err(source) => return Err(CgroupError::Remove { path: dir.to_owned(), source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{Memory, Pids};
    use std::process::{Command, Stdio};

    fn test_group(name: &str) -> Option<Cgroup> {
        let layout = Layout::detect(&Roots::default()).unwrap();
        let group = layout.cgroup(&format!("/keel-cgroup-test-{}-{name}/leaf", std::process::id())).unwrap();
        match group.create() {
            Ok(()) => Some(group),
            Err(e) => {
                eprintln!("skipped: cannot create a cgroup here: {e}");
                None
            }
        }
    }

    fn parent(group: &Cgroup) -> Cgroup {
        let mut parent = group.clone();
        for e in &mut parent.entries {
            e.dir.pop();
        }
        parent
    }

    #[test]
    fn a_process_in_the_cgroup_is_listed_killed_and_the_cgroup_removed() {
        let Some(group) = test_group("kill") else { return };
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        group.add(child.id() as i32).unwrap();
        assert_eq!(parent(&group).pids().unwrap(), [child.id() as i32]);
        parent(&group).kill_all().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
        parent(&group).remove().unwrap();
        assert!(!parent(&group).exists());
    }

    #[test]
    fn a_cgroup_is_claimed_once_and_only_what_was_made_goes() {
        let Some(group) = test_group("claim") else { return };
        let top = parent(&group);
        group.remove().unwrap();
        let first = group.claim().unwrap();
        assert!(matches!(group.claim(), Err(CgroupError::Occupied { .. })));
        assert!(group.exists(), "the loser leaves it");
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        group.add(child.id() as i32).unwrap();
        first.keep();
        assert!(matches!(group.claim(), Err(CgroupError::Occupied { .. })));
        assert!(child.try_wait().unwrap().is_none(), "the loser kills nobody");
        group.kill_all().unwrap();
        child.wait().unwrap();
        drop(group.claim().unwrap());
        assert!(group.exists(), "it was there before");
        group.remove().unwrap();
        let stale = group.claim().unwrap();
        group.remove().unwrap();
        group.create().unwrap();
        drop(stale);
        assert!(group.exists(), "another of that name is another's");
        top.remove().unwrap();
    }

    #[test]
    fn limits_are_written_and_freezing_freezes() {
        let Some(group) = test_group("limits") else { return };
        let resources = Resources {
            memory: Some(Memory { limit: Some(32 << 20), ..Default::default() }),
            pids: Some(Pids { limit: Some(7) }),
            ..Default::default()
        };
        group.apply(&resources).unwrap();
        let pids = group.dir_of("pids").unwrap().join("pids.max");
        assert_eq!(fs::read_to_string(pids).unwrap().trim(), "7");
        group.freeze(true).unwrap();
        assert!(group.is_frozen().unwrap());
        group.freeze(false).unwrap();
        assert_eq!(group.oom_kills(), 0);
        parent(&group).remove().unwrap();
    }

    #[test]
    fn dots_in_a_path_are_refused() {
        let layout = Layout::detect(&Roots::default()).unwrap();
        for path in ["", "/", "/a/../b", "..", "a/./b"] {
            assert!(layout.cgroup(path).is_err(), "{path}");
        }
    }
}
