//! What the runtime remembers of a container: one directory per container, files replaced by rename.
//!
//! ```text
//! (no directory) --create--> creating --> created --start--> running <--pause/resume--> paused
//!                               |            |                  |                          |
//!                               '------------'------ exit ------'--------------------------'--> stopped --delete-->
//! ```
//! Only `creating` is recorded; the others are what the kernel says when asked.

use crate::error::{RuntimeError, io_error};
use crate::names;
use crate::spec::Spec;
use keel_cgroup::{Cgroup, Entry, Mode, Version};
use keel_sys::{errno, file, process, socket};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The version of the file's form.
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    #[serde(default)]
    pub oci_version: String,
    pub id: String,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// 0 while the container is being created.
    #[serde(default)]
    pub pid: i32,
    /// The process has its root and its namespaces, and whoever joins it sees what it sees. Before, it is half-way between
    /// the host and the container.
    #[serde(default = "yes")]
    pub ready: bool,
    /// Field 22 of `/proc/PID/stat`: with the pid it names one process for ever.
    #[serde(default)]
    pub start_time: u64,
    /// RFC 3339.
    pub created: String,
    #[serde(default)]
    pub owner: u32,
    pub cgroup_mode: String,
    pub cgroup_path: String,
    pub cgroup: Vec<CgroupDir>,
    /// Made by the systemd driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub systemd: Option<SystemdUnit>,
    #[serde(default)]
    pub own_pid_namespace: bool,
    /// The container keeps the session keyring of whoever made it.
    #[serde(default)]
    pub no_new_keyring: bool,
    /// Directories of the resctrl file system that go with the container.
    #[serde(default)]
    pub rdt: Vec<PathBuf>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// Earlier versions wrote no such field.
fn yes() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemdUnit {
    pub unit: String,
    /// Of the user's instance.
    pub user: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CgroupDir {
    pub v2: bool,
    pub controllers: Vec<String>,
    pub mount: PathBuf,
    pub dir: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// The document that `state` prints and hooks read.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StateDocument<'a> {
    pub oci_version: &'a str,
    pub id: &'a str,
    pub pid: i32,
    pub status: &'a str,
    pub bundle: &'a Path,
    pub rootfs: &'a Path,
    pub created: &'a str,
    pub owner: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: &'a BTreeMap<String, String>,
}

/// The directory of all containers.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// The directory of one container.
#[derive(Debug)]
pub struct ContainerDir {
    pub id: String,
    pub path: PathBuf,
    /// Of the one who made it: what is written goes there, also when the name is another's by now.
    own: Option<fs::File>,
}

pub(crate) const START_SOCKET: &str = "start.sock";

impl Store {
    pub fn new(root: impl Into<PathBuf>) -> Store {
        Store { root: root.into() }
    }

    fn dir(&self, id: &str) -> Result<ContainerDir, RuntimeError> {
        if !names::valid_id(id) {
            return Err(RuntimeError::InvalidId(id.to_owned()));
        }
        Ok(ContainerDir { id: id.to_owned(), path: self.root.join(id), own: None })
    }

    /// Where a container's directory is, whether it exists or not. Absolute.
    pub(crate) fn path_of(&self, id: &str) -> Result<PathBuf, RuntimeError> {
        let path = self.dir(id)?.path;
        std::path::absolute(&path).map_err(io_error("find", &path))
    }

    pub(crate) fn check_id(&self, id: &str) -> Result<(), RuntimeError> {
        self.dir(id).map(drop)
    }

    /// Claims the id: of two that try, one gets an error.
    pub fn create(&self, id: &str) -> Result<ContainerDir, RuntimeError> {
        let mut dir = self.dir(id)?;
        // The start socket in it is for the owner alone.
        let make = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path);
        match make(&dir.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mut builder = fs::DirBuilder::new();
                builder
                    .mode(0o711)
                    .recursive(true)
                    .create(&self.root)
                    .map_err(io_error("create", &self.root))?;
                make(&dir.path)
            }
            other => other,
        }
        .map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => RuntimeError::Exists(id.to_owned()),
            _ => io_error("create", &dir.path)(e),
        })?;
        dir.own = Some(fs::File::open(&dir.path).map_err(io_error("open", &dir.path))?);
        Ok(dir)
    }

    pub fn open(&self, id: &str) -> Result<ContainerDir, RuntimeError> {
        let dir = self.dir(id)?;
        match fs::symlink_metadata(&dir.path) {
            Ok(meta) if meta.is_dir() => Ok(dir),
            Ok(_) => Err(RuntimeError::NotFound(id.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(RuntimeError::NotFound(id.to_owned())),
            Err(e) => Err(io_error("open", &dir.path)(e)),
        }
    }

    /// All containers, by id. What is no container's directory is passed over.
    pub fn list(&self) -> Result<Vec<ContainerDir>, RuntimeError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io_error("read", &self.root)(e)),
        };
        let mut all: Vec<ContainerDir> = entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .filter_map(|e| self.dir(e.file_name().to_str()?).ok())
            .collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }
}

impl ContainerDir {
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn load(&self) -> Result<State, RuntimeError> {
        let path = self.file("state.json");
        let text = fs::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => RuntimeError::NotFound(self.id.clone()),
            _ => io_error("read", &path)(e),
        })?;
        let state: State =
            serde_json::from_slice(&text).map_err(|source| RuntimeError::Json { path, source })?;
        Ok(state)
    }

    pub fn save(&self, state: &State) -> Result<(), RuntimeError> {
        let path = self.own_file("state.json");
        let temp = self.own_file(".state.json");
        let text =
            serde_json::to_vec(state).map_err(|source| RuntimeError::Json { path: path.clone(), source })?;
        write_private(&temp, &text)?;
        fs::rename(&temp, &path).map_err(io_error("rename", &path))
    }

    pub fn save_config(&self, text: &[u8]) -> Result<(), RuntimeError> {
        write_private(&self.own_file("config.json"), text)
    }

    pub fn load_spec(&self) -> Result<Spec, RuntimeError> {
        let path = self.file("config.json");
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| RuntimeError::Json { path, source })
    }

    /// In a directory that was removed nothing can be made: a create that was overtaken by a delete fails there, and
    /// does not write over the next container of that id.
    fn own_file(&self, name: &str) -> PathBuf {
        match &self.own {
            Some(own) => format!("/proc/self/fd/{}/{name}", own.as_raw_fd()).into(),
            None => self.file(name),
        }
    }

    /// Whether the name has come to be another container's.
    fn is_lost(&self) -> bool {
        let Some(own) = &self.own else { return false };
        match (own.metadata(), fs::symlink_metadata(&self.path)) {
            (Ok(own), Ok(found)) => (own.dev(), own.ino()) != (found.dev(), found.ino()),
            _ => true,
        }
    }

    pub fn remove(&self) -> Result<(), RuntimeError> {
        if self.is_lost() {
            return Ok(());
        }
        match fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &self.path)(e)),
            _ => Ok(()),
        }
    }

    pub(crate) fn open_fd(&self) -> Result<OwnedFd, RuntimeError> {
        if let Some(own) = &self.own {
            return own.try_clone().map(OwnedFd::from).map_err(io_error("open", &self.path));
        }
        let open = || {
            let path = file::c_path(&self.path)?;
            file::openat(file::cwd(), &path, libc::O_PATH | libc::O_DIRECTORY, 0)
        };
        open().map_err(io_error("open", &self.path))
    }

    /// Whether somebody listens for the word to start: a `start` that was killed leaves the name of the socket.
    fn waits_for_start(&self) -> bool {
        if !self.file(START_SOCKET).exists() {
            return false;
        }
        // A frozen container takes no connections, and this must not wait for one.
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK;
        match self.open_fd().map(|dir| socket::connect_at(&dir, c"start.sock", kind)) {
            Ok(Err(e)) => errno(&e) == libc::EAGAIN,
            Ok(Ok(_)) => true,
            Err(_) => false,
        }
    }

    /// What the kernel says about the container now.
    pub fn status(&self, state: &State) -> Result<Status, RuntimeError> {
        if state.pid == 0 {
            return Ok(Status::Creating);
        }
        if !is_alive(state.pid, state.start_time) {
            return Ok(Status::Stopped);
        }
        if !state.ready {
            return Ok(Status::Creating);
        }
        if self.waits_for_start() {
            return Ok(Status::Created);
        }
        Ok(if state.cgroup().is_frozen()? { Status::Paused } else { Status::Running })
    }
}

impl State {
    pub fn cgroup(&self) -> Cgroup {
        let mode = match self.cgroup_mode.as_str() {
            "v2" => Mode::V2,
            "hybrid" => Mode::Hybrid,
            _ => Mode::V1,
        };
        let entries = self
            .cgroup
            .iter()
            .map(|d| Entry {
                version: if d.v2 { Version::V2 } else { Version::V1 },
                controllers: d.controllers.clone(),
                mount: d.mount.clone(),
                dir: d.dir.clone(),
            })
            .collect();
        Cgroup::from_entries(mode, entries)
    }

    pub(crate) fn new(
        spec: &Spec,
        id: &str,
        bundle: &Path,
        rootfs: &Path,
        cgroup: &Cgroup,
        path: &str,
    ) -> State {
        let mode = match cgroup.mode {
            Mode::V1 => "v1",
            Mode::Hybrid => "hybrid",
            Mode::V2 => "v2",
        };
        State {
            version: VERSION,
            oci_version: spec.oci_version.clone(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            rootfs: rootfs.to_owned(),
            pid: 0,
            start_time: 0,
            created: now_rfc3339(),
            owner: process::geteuid(),
            cgroup_mode: mode.to_owned(),
            cgroup_path: path.to_owned(),
            systemd: None,
            cgroup: cgroup
                .entries
                .iter()
                .map(|e| CgroupDir {
                    v2: e.version == Version::V2,
                    controllers: e.controllers.clone(),
                    mount: e.mount.clone(),
                    dir: e.dir.clone(),
                })
                .collect(),
            own_pid_namespace: false,
            no_new_keyring: false,
            rdt: Vec::new(),
            ready: false,
            annotations: spec.annotations.clone(),
        }
    }

    /// The document of the specification for this moment. A stopped container has no pid.
    pub fn document<'a>(&'a self, status: Status) -> StateDocument<'a> {
        StateDocument {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: if status == Status::Stopped { 0 } else { self.pid },
            status: status.as_str(),
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            owner: if self.owner == 0 { "root".to_owned() } else { String::new() },
            annotations: &self.annotations,
        }
    }

    /// A pidfd of the container's init, for certain: the pid may have been given to another process since.
    pub fn init_pidfd(&self) -> Option<OwnedFd> {
        if self.pid <= 0 {
            return None;
        }
        let fd = process::pidfd_open(self.pid).ok()?;
        is_alive(self.pid, self.start_time).then_some(fd)
    }
}

/// Environments hold secrets, and the directory is not always closed to others.
fn write_private(path: &Path, text: &[u8]) -> Result<(), RuntimeError> {
    let open = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open.and_then(|mut file| file.write_all(text)).map_err(io_error("write", path))
}

/// Start time of a process, and whether it is a zombie. `None` when there is none.
fn stat(pid: i32) -> Option<(u64, bool)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, also parentheses.
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((start, matches!(state, "Z" | "X" | "x")))
}

pub(crate) fn start_time(pid: i32) -> Option<u64> {
    stat(pid).map(|(start, _)| start)
}

/// Whether this very process exists and is not a zombie.
pub fn is_alive(pid: i32, start_time: u64) -> bool {
    stat(pid).is_some_and(|(start, zombie)| start == start_time && !zombie)
}

pub fn now_rfc3339() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    rfc3339(now.as_secs(), now.subsec_nanos())
}

fn rfc3339(seconds: u64, nanos: u32) -> String {
    let (year, month, day) = civil(seconds / 86_400);
    let of_day = seconds % 86_400;
    let (h, m, s) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{nanos:09}Z")
}

/// Year, month and day of a day number since 1970-01-01, counted in eras of 400 years that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(rfc3339(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(951_782_400, 5), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(rfc3339(1_767_225_599, 0), "2025-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn a_create_that_was_overtaken_writes_nothing_for_the_next_of_that_id() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let slow = store.create("a").unwrap();
        slow.save_config(b"slow").unwrap();
        store.open("a").unwrap().remove().unwrap();
        let next = store.create("a").unwrap();
        next.save_config(b"next").unwrap();
        assert!(slow.save_config(b"slow").is_err());
        slow.remove().unwrap();
        assert_eq!(fs::read(next.file("config.json")).unwrap(), b"next");
        next.remove().unwrap();
        assert!(!next.path.exists());
    }

    #[test]
    fn this_process_is_alive_and_another_start_time_is_not_it() {
        let pid = process::getpid();
        let start = start_time(pid).unwrap();
        assert!(is_alive(pid, start));
        assert!(!is_alive(pid, start + 1));
    }
}
