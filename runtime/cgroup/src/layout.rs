//! Which hierarchies this host has and where they are mounted.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Host paths. Every function takes them from here, so that a test can point elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    pub cgroup: PathBuf,
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots { cgroup: "/sys/fs/cgroup".into(), proc: "/proc".into() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    V1,
    /// Controllers on v1, and a v2 hierarchy beside them.
    Hybrid,
    V2,
}

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// v1: controllers, or `name=...`; v2: what `cgroup.controllers` of the root says is not read here, so empty.
    pub controllers: Vec<String>,
    pub mount: PathBuf,
    /// The cgroup of this process below the mount, beginning with `/`.
    pub own: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub mode: Mode,
    pub v1: Vec<Hierarchy>,
    pub v2: Option<Hierarchy>,
}

#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("no cgroup hierarchy is mounted below {}", .0.display())]
    None(PathBuf),
}

impl Layout {
    /// Reads the mount table and the membership of this process.
    pub fn detect(roots: &Roots) -> Result<Layout, LayoutError> {
        let at = |name: &str| roots.proc.join(name);
        let failed = |path: PathBuf| move |source| LayoutError::Read { path, source };
        let (cgroup, mountinfo) = (at("self/cgroup"), at("self/mountinfo"));
        let own = fs::read_to_string(&cgroup).map_err(failed(cgroup))?;
        let mounts = fs::File::open(&mountinfo).map_err(failed(mountinfo.clone()))?;
        let layout = Layout::read(BufReader::new(mounts), &own, &roots.cgroup).map_err(failed(mountinfo))?;
        if layout.v1.is_empty() && layout.v2.is_none() {
            return Err(LayoutError::None(roots.cgroup.clone()));
        }
        Ok(layout)
    }

    /// Reads no further than to the last hierarchy: a host with many containers has a long mount table, and the kernel
    /// takes its time to print it.
    fn read(mountinfo: impl BufRead, cgroup: &str, root: &Path) -> io::Result<Layout> {
        let mut mounts = String::new();
        let mut layout = Layout::parse(&mounts, cgroup, root);
        for line in mountinfo.split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            if !line.contains(" - cgroup") {
                continue;
            }
            mounts.push_str(&line);
            mounts.push('\n');
            layout = Layout::parse(&mounts, cgroup, root);
            if layout.v1.len() + usize::from(layout.v2.is_some()) == cgroup.lines().count() {
                break;
            }
        }
        Ok(layout)
    }

    /// `mountinfo` and `cgroup` are the texts of the files of these names below `/proc/self`.
    pub fn parse(mountinfo: &str, cgroup: &str, root: &Path) -> Layout {
        let mut layout = Layout { mode: Mode::V1, v1: Vec::new(), v2: None };
        for line in mountinfo.lines() {
            let Some(mount) = parse_mount(line).filter(|m| Path::new(m.point).starts_with(root)) else {
                continue;
            };
            match mount.kind {
                "cgroup2" if layout.v2.is_none() => {
                    layout.v2 = Some(Hierarchy {
                        controllers: Vec::new(),
                        mount: mount.point.into(),
                        own: below(mount.root, own_path(cgroup)),
                    });
                }
                "cgroup" => {
                    let Some((controllers, own)) = membership(cgroup, mount.options) else { continue };
                    if layout.v1.iter().all(|h| h.controllers != controllers) {
                        let own = below(mount.root, own);
                        layout.v1.push(Hierarchy { controllers, mount: mount.point.into(), own });
                    }
                }
                _ => {}
            }
        }
        let has_controllers = layout.v1.iter().flat_map(|h| &h.controllers).any(|c| !c.starts_with("name="));
        layout.mode = match (&layout.v2, has_controllers) {
            (Some(_), true) => Mode::Hybrid,
            (Some(_), false) => Mode::V2,
            (None, _) => Mode::V1,
        };
        layout
    }

    /// The v1 hierarchy of a controller.
    pub fn v1_of(&self, controller: &str) -> Option<&Hierarchy> {
        self.v1.iter().find(|h| h.controllers.iter().any(|c| c == controller))
    }
}

struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

fn parse_mount(line: &str) -> Option<Mount<'_>> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let mut right = right.split(' ');
    Some(Mount {
        root: left.next()?,
        point: left.next()?,
        kind: right.next()?,
        options: right.nth(1).unwrap_or(""),
    })
}

/// Controllers of a v1 mount by its super options, with this process's path in that hierarchy.
fn membership<'a>(cgroup: &'a str, options: &str) -> Option<(Vec<String>, &'a str)> {
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(list), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        if list.is_empty() {
            continue;
        }
        if list.split(',').all(|c| options.split(',').any(|o| o == c)) {
            return Some((list.split(',').map(str::to_owned).collect(), path));
        }
    }
    None
}

/// The path in the v2 hierarchy.
fn own_path(cgroup: &str) -> &str {
    cgroup.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or("/")
}

/// The path as seen through a mount whose root is not the hierarchy's root.
fn below(mount_root: &str, path: &str) -> String {
    match path.strip_prefix(mount_root.trim_end_matches('/')) {
        Some("") => "/".to_owned(),
        Some(rest) if rest.starts_with('/') => rest.to_owned(),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 24 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
29 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
30 25 0:26 / /somewhere/else rw - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_controllers_and_own_paths() {
        let own = "3:memory:/a/b\n2:cpu,cpuacct:/\n1:name=systemd:/x\n0::/u\n";
        let layout = Layout::parse(HYBRID, own, Path::new("/sys/fs/cgroup"));
        assert_eq!(layout.mode, Mode::Hybrid);
        assert_eq!(layout.v1.len(), 3);
        assert_eq!(layout.v1_of("cpuacct").unwrap().mount, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(layout.v1_of("memory").unwrap().own, "/a/b");
        assert_eq!(layout.v2.unwrap().own, "/u");
    }

    #[test]
    fn unified_alone_is_v2() {
        let table = "31 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let layout = Layout::parse(table, "0::/init.scope\n", Path::new("/sys/fs/cgroup"));
        assert_eq!(layout.mode, Mode::V2);
        assert_eq!(layout.v2.unwrap().own, "/init.scope");
    }

    #[test]
    fn mount_of_a_subtree_shortens_the_own_path() {
        assert_eq!(below("/docker/abc", "/docker/abc/x"), "/x");
        assert_eq!(below("/docker/abc", "/docker/abc"), "/");
        assert_eq!(below("/", "/a"), "/a");
        assert_eq!(below("/docker/abc", "/other"), "/other");
    }

    #[test]
    fn this_host_has_a_layout() {
        Layout::detect(&Roots::default()).expect("cgroups are mounted on every host that runs containers");
    }
}
