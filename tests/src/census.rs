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

/// What one instance has now, wherever it may be: the same as [`Census`], but blind to every other instance of the host.
/// A bridge, a packet filter table and a parent cgroup belong to the instance and go with `keel system reset`; everything
/// else belongs to pods and goes with them.
pub fn of(instance: &crate::Instance) -> Vec<String> {
    let tag = tag(instance);
    let dir = instance.path().display().to_string();
    let ours = |found: &String| found.contains(&dir) || found.contains(&tag);
    let mut found: Vec<String> = Census::take().found.into_iter().filter(ours).collect();
    found.extend(veths(&format!("ek{tag}")));
    let lists = [
        instance.run_dir().join("pods"),
        instance.run_dir().join("containers"),
        instance.run_dir().join("runtime"),
        instance.root().join("containers"),
        instance.root().join("exits"),
        instance.root().join("pods"),
        instance.root().join("logs"),
    ];
    for list in &lists {
        let entries = fs::read_dir(list).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| format!("file {}", entry.path().display())));
    }
    for cgroup in found.clone().iter().filter_map(|line| line.strip_prefix("cgroup ")) {
        let children = fs::read_dir(cgroup).into_iter().flatten().flatten();
        let dirs = children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        found.extend(dirs.map(|entry| format!("pod cgroup {}", entry.path().display())));
    }
    found.sort();
    found
}

/// Of [`of`], what belongs to pods.
pub fn of_pods(instance: &crate::Instance) -> Vec<String> {
    let own = |found: &String| {
        ["cgroup ", "table ", "link "].iter().any(|kind| found.starts_with(kind))
            || *found == format!("file {}", instance.path().display())
            || found.starts_with("process ") && found.contains(" daemon ")
    };
    of(instance).into_iter().filter(|found| !own(found)).collect()
}

/// What the engine names bridge, table and cgroup of this root after.
fn tag(instance: &crate::Instance) -> String {
    let root = instance.root().canonicalize().expect("the root of an instance exists");
    let mut child = Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("sha256sum runs");
    let mut input = child.stdin.take().expect("piped");
    std::io::Write::write_all(&mut input, root.as_os_str().as_encoded_bytes()).expect("sha256sum reads");
    drop(input);
    let output = child.wait_with_output().expect("sha256sum ends");
    String::from_utf8_lossy(&output.stdout).chars().take(6).collect()
}

fn veths(bridge: &str) -> Vec<String> {
    let entries = fs::read_dir(format!("/sys/class/net/{bridge}/brif")).into_iter().flatten().flatten();
    entries.map(|entry| format!("veth {}", entry.file_name().to_string_lossy())).collect()
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
