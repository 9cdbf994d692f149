//! Where everything of one evenkeel instance lives. No other module builds a path from a literal.

use std::io;
use std::path::{Path, PathBuf};

use keel_plan::{ContainerId, PodId};
use sha2::{Digest, Sha256};

pub const DEFAULT_ROOT: &str = "/var/lib/evenkeel";
pub const DEFAULT_RUN: &str = "/run/evenkeel";

/// The two directories of an instance and the tag that keeps its kernel objects apart from another instance's.
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
    run: PathBuf,
    tag: String,
}

impl Paths {
    /// `root` outlives a reboot, `run` does not. The tag is empty for the default root and otherwise six hex digits
    /// of a hash of it, so that two roots share no bridge, table, link or cgroup.
    pub fn new(root: &Path, run: &Path) -> Paths {
        let root = absolute(root);
        let run = absolute(run);
        let tag = if root == Path::new(DEFAULT_ROOT) {
            String::new()
        } else {
            hex(&Sha256::digest(root.as_os_str().as_encoded_bytes()))[..6].to_string()
        };
        Paths { root, run, tag }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn run(&self) -> &Path {
        &self.run
    }

    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// `evenkeel` or `evenkeel-<tag>`: cgroup parent and packet filter table.
    pub fn instance_name(&self) -> String {
        if self.tag.is_empty() { "evenkeel".to_string() } else { format!("evenkeel-{}", self.tag) }
    }

    pub fn bridge_name(&self) -> String {
        if self.tag.is_empty() { "ek0".to_string() } else { format!("ek{}", self.tag) }
    }

    /// Exclusive while something acts on the instance; holds the pid of the holder.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    /// The same for the state that outlives a boot: one root with two run directories is still one instance.
    pub fn root_lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub fn socket(&self) -> PathBuf {
        self.run.join("keel.sock")
    }

    pub fn network_record(&self) -> PathBuf {
        self.run.join("network.json")
    }

    pub fn events(&self) -> PathBuf {
        self.run.join("events.jsonl")
    }

    pub fn status_dir(&self) -> PathBuf {
        self.run.join("status")
    }

    pub fn runtime_root(&self) -> PathBuf {
        self.run.join("runtime")
    }

    pub fn pods(&self) -> PathBuf {
        self.run.join("pods")
    }

    pub fn pod(&self, id: &PodId) -> PathBuf {
        self.pods().join(&id.0)
    }

    pub fn pod_record(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("pod.json")
    }

    pub fn pod_namespaces(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("ns")
    }

    pub fn pod_shm(&self, id: &PodId) -> PathBuf {
        self.pod(id).join("shm")
    }

    pub fn pod_file(&self, id: &PodId, name: &str) -> PathBuf {
        self.pod(id).join(name)
    }

    /// Volumes that end with the boot: configMap, secret, emptyDir in memory.
    pub fn pod_run_volume(&self, id: &PodId, volume: &str) -> PathBuf {
        self.pod(id).join("volumes").join(volume)
    }

    pub fn pod_state(&self, id: &PodId) -> PathBuf {
        self.root.join("pods").join(&id.0)
    }

    pub fn pod_states(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// The store's notes of what pods ran well from, by pod.
    pub fn good_images(&self) -> PathBuf {
        self.root.join("good")
    }

    /// Counts and back-off of this boot, newer than what is on disk.
    pub fn pod_run_memory(&self, id: &PodId) -> PathBuf {
        self.memories().join(format!("{id}.json"))
    }

    pub fn memories(&self) -> PathBuf {
        self.run.join("memory")
    }

    pub fn pod_memory(&self, id: &PodId) -> PathBuf {
        self.pod_state(id).join("memory.json")
    }

    /// Volumes on disk: emptyDir.
    pub fn pod_disk_volume(&self, id: &PodId, volume: &str) -> PathBuf {
        self.pod_state(id).join("volumes").join(volume)
    }

    pub fn containers(&self) -> PathBuf {
        self.run.join("containers")
    }

    pub fn container(&self, id: &ContainerId) -> PathBuf {
        self.containers().join(&id.0)
    }

    pub fn container_record(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("container.json")
    }

    pub fn rootfs(&self, id: &ContainerId) -> PathBuf {
        self.container(id).join("rootfs")
    }

    pub fn container_states(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// Writable layer: `upper/` and `work/`.
    pub fn container_state(&self, id: &ContainerId) -> PathBuf {
        self.container_states().join(&id.0)
    }

    /// Profiles that `seccompProfile.localhostProfile` names, put there by the host's owner.
    pub fn seccomp_profiles(&self) -> PathBuf {
        self.root.join("seccomp")
    }

    /// Which run directory this state was last used with, in which boot.
    pub(crate) fn instance_record(&self) -> PathBuf {
        self.root.join("instance.json")
    }

    /// The store's image records.
    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn exits(&self) -> PathBuf {
        self.root.join("exits")
    }

    pub fn exit_record(&self, id: &ContainerId) -> PathBuf {
        self.exits().join(format!("{id}.json"))
    }

    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub fn pod_logs(&self, pod: &PodId) -> PathBuf {
        self.logs().join(&pod.0)
    }

    pub fn log(&self, pod: &PodId, container: &str, attempt: u32) -> PathBuf {
        self.pod_logs(pod).join(container).join(format!("{attempt}.log"))
    }

    pub fn applied(&self) -> PathBuf {
        self.root.join("applied")
    }

    pub fn sources(&self) -> PathBuf {
        self.root.join("sources")
    }

    /// Path below a cgroup hierarchy, as `linux.cgroupsPath` wants it.
    pub fn pod_cgroup(&self, id: &PodId) -> String {
        format!("/{}/{id}", self.instance_name())
    }

    pub fn container_cgroup(&self, pod: &PodId, id: &ContainerId) -> String {
        format!("{}/{id}", self.pod_cgroup(pod))
    }

    /// Creates both directories with the modes they need (0700: state holds secrets and sockets).
    pub fn create(&self) -> io::Result<()> {
        for dir in [
            self.root.clone(),
            self.run.clone(),
            self.pods(),
            self.containers(),
            self.runtime_root(),
            self.memories(),
            self.status_dir(),
            self.pod_states(),
            self.container_states(),
            self.exits(),
            self.logs(),
            self.applied(),
            self.sources(),
        ] {
            create_private_dir(&dir)?;
        }
        Ok(())
    }
}

fn create_private_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| io::Error::new(e.kind(), format!("create directory {}: {e}", dir.display())))
}

/// Everything that an instance makes in its state directory. Nothing else there is ever removed.
pub(crate) const STATE_NAMES: &[&str] = &[
    "applied",
    "blobs",
    "containers",
    "exits",
    "good",
    "images",
    "index.json",
    "instance.json",
    "layers",
    "lock",
    "logs",
    "oci-layout",
    "partial",
    "pods",
    "quarantine",
    "sources",
    "trash",
    "verified",
];

/// The same for the run directory, without the lock, which whoever removes them holds.
pub(crate) const RUN_NAMES: &[&str] =
    &["containers", "events.jsonl", "keel.sock", "memory", "network.json", "pods", "runtime", "status"];

/// A file name of at most 255 bytes for a name that may have more: cut, and told apart by a hash.
pub(crate) fn bounded_name(name: &str) -> String {
    /// Leaves room for a suffix and for the name of a temporary file.
    const MAX_BYTES: usize = 200;
    if name.len() <= MAX_BYTES {
        return name.to_string();
    }
    let hash = hex(&Sha256::digest(name.as_bytes()));
    let mut end = MAX_BYTES - 13;
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{}", &name[..end], &hash[..12])
}

/// Canonical where it exists, else made absolute: the tag must not depend on the working directory.
fn absolute(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_path_buf())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_root_has_no_tag_and_others_differ() {
        let default = Paths::new(Path::new(DEFAULT_ROOT), Path::new(DEFAULT_RUN));
        assert_eq!(default.instance_name(), "evenkeel");
        assert_eq!(default.bridge_name(), "ek0");
        let a = Paths::new(Path::new("/tmp/a-root"), Path::new("/tmp/a-run"));
        let b = Paths::new(Path::new("/tmp/b-root"), Path::new("/tmp/a-run"));
        assert_ne!(a.instance_name(), b.instance_name());
        assert!(a.bridge_name().len() <= 15);
    }
}
