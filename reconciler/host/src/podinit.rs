//! The one process that a pod needs only when its containers share a pid namespace: by the kernel's rule such a
//! namespace ends with its first process (pid_namespaces(7)), so that process must not be one of the containers.
//!
//! It is a container like the others, of the shim's own program and nothing else, that no planner knows.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::Duration;

use keel_plan::{ContainerId, DesiredPod, PodId};
use serde_json::json;

use crate::RealHost;
use crate::containers::private_dir;
use crate::error::HostError;
use crate::observe::{self, ProcessMark};
use crate::paths::Paths;
use crate::state::{At, Keep, write_file};

/// Not a DNS label, so no declared container can have it.
const NAME: &str = "pod_init";
/// It reacts to SIGKILL at once; longer means that the kernel is stuck.
const STOP_GRACE: Duration = Duration::from_secs(2);

impl RealHost {
    /// Where the namespace of the pod's first process is, for pods that share one. Without that process nothing starts:
    /// the next observation finds the pod incomplete and it is made whole.
    pub(crate) fn shared_pid_namespace(&self, pod: &DesiredPod) -> Result<Option<PathBuf>, HostError> {
        if !pod.spec.share_process_namespace || pod.spec.host_pid {
            return Ok(None);
        }
        match mark(&self.paths, &pod.id).filter(|mark| observe::is_alive(*mark)) {
            Some(mark) => Ok(Some(PathBuf::from(format!("/proc/{}/ns/pid", mark.pid)))),
            None => Err(HostError::Start {
                container: pod.key.to_string(),
                message: "the first process of the shared process namespace is gone".into(),
            }),
        }
    }

    pub(crate) fn start_pod_init(&self, pod: &DesiredPod, first_id: Option<u32>) -> Result<(), HostError> {
        if is_whole(&self.paths, pod) {
            return Ok(());
        }
        self.remove_pod_init(&pod.id)?;
        let id = id_of(&pod.id);
        let dir = self.paths.container(&id);
        let rootfs = self.paths.rootfs(&id);
        private_dir(&rootfs)?;
        fs::write(rootfs.join("init"), b"").at("create", rootfs.join("init"))?;
        private_dir(&rootfs.join("proc"))?;
        // What the runtime makes in there it makes as the pod's root.
        if first_id.is_some() {
            for path in [&rootfs, &rootfs.join("proc"), &rootfs.join("init")] {
                chown(path, first_id, first_id).at("change owner of", path)?;
            }
        }
        let config = self.pod_init_spec(pod, &id).to_string();
        write_file(&dir.join("config.json"), config.as_bytes(), Keep::Boot)?;
        let log = self.paths.log(&pod.id, NAME, 0);
        if let Some(parent) = log.parent() {
            private_dir(parent)?;
        }
        self.shims.start(&id, &["--log".into(), log.into()])
    }

    pub(crate) fn remove_pod_init(&self, pod: &PodId) -> Result<(), HostError> {
        let id = id_of(pod);
        if !self.paths.container(&id).exists() {
            return Ok(());
        }
        if let Ok(mut client) = keel_proto::Client::connect(&self.paths.container(&id))
            && client.stop(9, STOP_GRACE).is_ok()
        {
            let _ = client.wait(Some(STOP_GRACE));
        }
        self.remove_container(&id)
    }

    fn pod_init_spec(&self, pod: &DesiredPod, id: &ContainerId) -> serde_json::Value {
        let pinned = |kind: &str| json!(self.paths.pod_namespaces(&pod.id).join(kind));
        let mut namespaces =
            vec![json!({"type": "mount"}), json!({"type": "pid"}), json!({"type": "cgroup"})];
        if !pod.spec.host_ipc {
            namespaces.push(json!({"type": "ipc", "path": pinned("ipc")}));
        }
        if !pod.spec.host_network {
            namespaces.push(json!({"type": "network", "path": pinned("net")}));
            namespaces.push(json!({"type": "uts", "path": pinned("uts")}));
        }
        if pod.spec.has_own_users() {
            namespaces.push(json!({"type": "user", "path": pinned("user")}));
        }
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/init", "pause"],
                "env": [],
                "cwd": "/",
                "capabilities": {},
                "noNewPrivileges": true,
            },
            "mounts": [
                // Not for the process itself: runc looks at its own descriptors there before it starts one.
                {
                    "destination": "/proc",
                    "type": "proc",
                    "source": "proc",
                    "options": ["nosuid", "noexec", "nodev"],
                },
                {
                    "destination": "/init",
                    "type": "bind",
                    "source": self.config.shim,
                    "options": ["rbind", "rprivate", "ro", "nosuid", "nodev"],
                },
            ],
            "linux": {
                "cgroupsPath": self.paths.container_cgroup(&pod.id, id),
                "namespaces": namespaces,
                "resources": {"devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 2}},
            },
        })
    }
}

/// The pod whose first process that is, if it is one.
pub(crate) fn pod_of(id: &ContainerId) -> Option<PodId> {
    let pod = id.0.strip_suffix(".0")?.strip_suffix(NAME)?.strip_suffix('.')?;
    Some(PodId(pod.to_string()))
}

/// The pod has the first process that it needs, or needs none.
pub(crate) fn is_whole(paths: &Paths, pod: &DesiredPod) -> bool {
    !pod.spec.share_process_namespace
        || pod.spec.host_pid
        || mark(paths, &pod.id).is_some_and(observe::is_alive)
}

fn mark(paths: &Paths, pod: &PodId) -> Option<ProcessMark> {
    observe::read_mark(&paths.container(&id_of(pod)).join("pid")).ok().flatten()
}

pub(crate) fn id_of(pod: &PodId) -> ContainerId {
    ContainerId(format!("{pod}.{NAME}.0"))
}
