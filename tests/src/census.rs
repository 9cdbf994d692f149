//! What an instance could leave in the kernel and on disk, counted.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Everything that bears our marks now. Two counts are compared; what the second has more is a leak.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub found: BTreeSet<String>,
}

impl Census {
    pub fn take() -> Census {
        let mut found = BTreeSet::new();
        found.extend(mounts());
        found.extend(links());
        found.extend(tables());
        found.extend(cgroups());
        found.extend(processes());
        found.extend(files());
        Census { found }
    }

    pub fn more_than(&self, before: &Census) -> Vec<String> {
        self.found.difference(&before.found).cloned().collect()
    }
}

fn mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter(|line| line.contains("evenkeel") || line.contains("keel-"))
        .filter_map(|line| line.split(' ').nth(4).map(|target| format!("mount {target}")))
        .collect()
}

fn links() -> Vec<String> {
    fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("ek"))
        .map(|name| format!("link {name}"))
        .collect()
}

fn tables() -> Vec<String> {
    let Ok(output) = Command::new("nft").args(["list", "tables"]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| line.contains("evenkeel"))
        .map(str::to_string)
        .collect()
}

fn cgroups() -> Vec<String> {
    let mut found = Vec::new();
    walk_cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
    found
}

/// Our cgroups are children of a hierarchy's root, which is at most two directories below the mount of all of them.
fn walk_cgroups(dir: &Path, depth: u32, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if name.starts_with("evenkeel") || name.starts_with("keel-") {
            found.push(format!("cgroup {}", entry.path().display()));
        } else if depth < 2 {
            walk_cgroups(&entry.path(), depth + 1, found);
        }
    }
}

fn processes() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        if pid == std::process::id() || !crate::is_alive(pid) {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&command).replace('\0', " ");
        let program = text.split(' ').next().unwrap_or_default();
        let name =
            Path::new(program).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if ["keel", "keel-shim", "keel-runtime"].contains(&name.as_str()) {
            found.push(format!("process {pid} {text}"));
        }
    }
    found
}

fn files() -> Vec<String> {
    let mut found = Vec::new();
    for dir in [std::env::temp_dir(), "/run".into(), "/dev/shm".into()] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("evenkeel") || name.starts_with("keel-") {
                found.push(format!("file {}", entry.path().display()));
            }
        }
    }
    found
}
