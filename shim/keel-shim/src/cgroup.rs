//! The container's cgroup: killing all of it, and what the kernel counted.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use keel_sys::process::kill;

use crate::error::{Context, Error};

const SIGKILL: i32 = 9;
/// Without a freezer, a container that forks while it is killed needs another look at its process list.
const PASSES: u32 = 8;

/// Directories of the container's own cgroup; absent where it shares one with others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cgroup {
    /// Unified hierarchy.
    pub(crate) unified: Option<PathBuf>,
    /// v1 controllers.
    pub(crate) memory: Option<PathBuf>,
    pub(crate) freezer: Option<PathBuf>,
    pub(crate) pids: Option<PathBuf>,
}

impl Cgroup {
    pub(crate) fn of(pid: i32) -> Result<Cgroup, Error> {
        let read = |path: String| fs::read_to_string(&path).at("read", Path::new(&path));
        let container = read(format!("/proc/{pid}/cgroup"))?;
        let own = read("/proc/self/cgroup".into())?;
        let path = Path::new("/proc/self/mountinfo");
        let mounts = fs::File::open(path).and_then(|file| cgroup_mounts(BufReader::new(file), &own));
        Ok(lower(&container, &own, &mounts.at("read", path)?))
    }

    /// SIGKILL to every process in it. `false` when there is no cgroup to do it by.
    pub(crate) fn kill(&self) -> bool {
        if let Some(dir) = &self.unified
            && fs::write(dir.join("cgroup.kill"), "1").is_ok()
        {
            // A container that is frozen in v1 dies only when thawed.
            self.freeze(false);
            return true;
        }
        let all = [&self.pids, &self.memory, &self.freezer, &self.unified];
        let Some(dir) = all.into_iter().flatten().next() else {
            return false;
        };
        self.freeze(true);
        for _ in 0..PASSES {
            if kill_listed(dir) == 0 {
                break;
            }
            self.freeze(false);
        }
        self.freeze(false);
        true
    }

    fn freeze(&self, frozen: bool) {
        if let Some(dir) = &self.freezer {
            // Best effort: the kill goes through without it unless the container forks faster than we list.
            let _ = fs::write(dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" });
        }
    }

    /// Whether the kernel has killed any of its processes for want of memory. To be asked before the cgroup is removed.
    pub(crate) fn oom_killed(&self) -> bool {
        let count = |dir: &Option<PathBuf>, file| {
            let path = dir.as_ref()?.join(file);
            counter(&fs::read_to_string(path).ok()?, "oom_kill")
        };
        let unified = count(&self.unified, "memory.events");
        let v1 = count(&self.memory, "memory.oom_control");
        unified.unwrap_or(0) + v1.unwrap_or(0) > 0
    }
}

/// `name value` on a line of its own.
fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
}

/// Kills what is listed in `dir` and below; returns how many there were.
fn kill_listed(dir: &Path) -> usize {
    let mut found = 0;
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        let list = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in list.lines().filter_map(|line| line.parse::<i32>().ok()) {
            // 0 stands for a process of another pid namespace, and would mean our own group to kill(2).
            if pid > 1 {
                found += 1;
                let _ = kill(pid, SIGKILL);
            }
        }
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        pending.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    found
}

const CONTROLLERS: [&str; 4] = ["", "memory", "freezer", "pids"];

/// The lines that [`lower`] needs. Ends with the last of them: a host with many containers has a long mount table, and
/// the kernel takes its time to print it.
fn cgroup_mounts(table: impl BufRead, own: &str) -> io::Result<String> {
    let mut mounts = String::new();
    for line in table.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if line.contains(" - cgroup") {
            mounts.push_str(&line);
            mounts.push('\n');
            let is_found =
                |controller| path_in(own, controller).is_none() || mount_point(&mounts, controller).is_some();
            if CONTROLLERS.into_iter().all(is_found) {
                break;
            }
        }
    }
    Ok(mounts)
}

/// From `/proc/<pid>/cgroup` of the container, the same of this process, and `/proc/self/mountinfo`.
fn lower(container: &str, own: &str, mounts: &str) -> Cgroup {
    let find = |controller: &str| {
        let path = path_in(container, controller)?;
        let own = path_in(own, controller).unwrap_or("/");
        // Killing a cgroup that holds this process, or the root, would hit others.
        let shared = path == "/" || own == path || own.starts_with(&format!("{path}/"));
        if shared { None } else { Some(mount_point(mounts, controller)?.join(path.trim_start_matches('/'))) }
    };
    Cgroup { unified: find(""), memory: find("memory"), freezer: find("freezer"), pids: find("pids") }
}

/// Lines are `hierarchy:controllers:path`; the unified one has no controllers.
fn path_in<'a>(text: &'a str, controller: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let controllers = parts.next()?;
        let path = parts.next()?;
        controllers.split(',').any(|c| c == controller).then_some(path)
    })
}

/// Lines are `id parent device root point options... - type source options`.
fn mount_point(mounts: &str, controller: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut file_system = file_system.split(' ');
        let (kind, options) = (file_system.next()?, file_system.nth(1)?);
        let fits = match controller {
            "" => kind == "cgroup2",
            controller => kind == "cgroup" && options.split(',').any(|o| o == controller),
        };
        (fits && root == "/").then(|| PathBuf::from(point))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:21 / /sys/fs/cgroup rw - tmpfs tmpfs rw
25 24 0:22 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory
26 24 0:23 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
27 24 0:24 /sub /elsewhere rw - cgroup cgroup rw,freezer
28 24 0:24 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
29 24 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn hybrid_hosts_have_both() {
        let container = "9:memory:/p/c\n4:pids:/p/c\n3:freezer:/p/c\n0::/p/c\n";
        let found = lower(container, "9:memory:/\n4:pids:/\n3:freezer:/\n0::/\n", MOUNTS);
        let at = |hierarchy| Some(PathBuf::from(format!("/sys/fs/cgroup/{hierarchy}/p/c")));
        assert_eq!(found.unified, at("unified"));
        assert_eq!(found.memory, at("memory"));
        assert_eq!(found.freezer, at("freezer"));
        assert_eq!(found.pids, at("pids"));
    }

    #[test]
    fn the_mount_table_is_read_no_further_than_needed() {
        let own = "9:memory:/\n3:freezer:/\n0::/\n";
        let table = format!("{MOUNTS}30 24 0:26 / /late rw - cgroup cgroup rw,pids\n");
        let found = cgroup_mounts(table.as_bytes(), own).unwrap();
        assert_eq!(found.lines().count(), 5, "tmpfs is skipped, the last line not reached: {found}");
        assert_eq!(lower("9:memory:/p\n0::/p\n", own, &found), lower("9:memory:/p\n0::/p\n", own, MOUNTS));
    }

    #[test]
    fn a_cgroup_that_holds_the_monitor_is_not_the_containers_own() {
        let shared = |container: &str, own: &str| lower(container, own, MOUNTS) == Cgroup::default();
        assert!(shared("0::/\n4:pids:/\n", "0::/\n4:pids:/\n"));
        assert!(shared("0::/a\n", "0::/a\n"));
        assert!(shared("0::/a\n", "0::/a/b\n"));
        assert!(!shared("0::/a\n", "0::/ab\n"));
        assert!(!shared("0::/a/b\n", "0::/a\n"));
        assert!(shared("1:devices:/a\n", ""));
    }

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let v2 = "low 0\noom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!(counter(v2, "oom_kill"), Some(2));
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n";
        assert_eq!(counter(v1, "oom_kill"), Some(1));
        assert_eq!(counter("oom_kill_disable 1\n", "oom_kill"), None);
    }
}
