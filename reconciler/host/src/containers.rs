//! Start, stop and removal of one run of a container. Everything happens through processes: the shim, and the runtime
//! that the shim calls.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keel_engine::ports::Done;
use keel_manifest::extension::{held_ports, notifies};
use keel_manifest::logging::LogSettings;
use keel_manifest::model::{Container, RestartPolicy};
use keel_plan::{ContainerId, ContainerName, ContainerState, DesiredContainer, DesiredPod, Role};
use nix::sys::signal::Signal;

use crate::RealHost;
use crate::error::HostError;
use crate::logs;
use crate::observe::{self, Orphan};
use crate::paths::Paths;
use crate::records::{ContainerRecord, PodRecord, RECORD_VERSION, runtime_of};
use crate::shims::run_to_end;
use crate::spec::{Context, ImageDefaults, User, lower_spec};
use crate::state::{
    At, Keep, PathError, names, read_json, remove_file, remove_tree, remove_tree_or_file, write_file,
    write_json,
};
use crate::volumes;

/// A delete kills and waits for the kernel; longer means that the runtime or the kernel is stuck.
const DELETE_TIMEOUT: Duration = Duration::from_secs(60);
/// After SIGKILL the kernel needs a moment; a process in uninterruptible sleep may need for ever.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// What a shim may take from the end of its container to its own: two seconds for last words, and a sync of its record.
const SHIM_TIMEOUT: Duration = Duration::from_secs(5);
/// After this long without a record it is asked what it is doing.
const RECORD_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a stop looks whether the container is gone when there is no shim to ask.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Runs before this one whose shim may still hold sockets; a start that failed has used up a number too.
const RUNS_BACK: usize = 16;
const DEFAULT_STOP_SIGNAL: Signal = Signal::SIGTERM;

impl RealHost {
    pub(crate) fn start_container(
        &self,
        pod: &Arc<DesiredPod>,
        incarnation: u64,
        name: &ContainerName,
        attempt: u32,
    ) -> Result<Done, HostError> {
        let record = self.current(pod, incarnation)?.filter(|record| record.ready);
        let Some(record) = record else { return Ok(Done::Stale) };
        let Some((desired, container)) = find(pod, name) else { return Ok(Done::Stale) };
        let id = ContainerId::of(&pod.id, name, attempt);
        if let Some(found) = read_json::<ContainerRecord>(&self.paths.container_record(&id))? {
            let (state, _) = observe::container_state(&self.paths, &id, found.created_at)?;
            match state {
                ContainerState::Running { .. } => return Ok(Done::Done),
                // This number is used up: the planner has not seen that run yet.
                ContainerState::Exited(_) | ContainerState::Lost { .. } => return Ok(Done::Stale),
                ContainerState::Partial => self.remove_container(&id)?,
            }
        }
        match self.try_start(pod, &record, desired, container, &id, attempt) {
            Ok(()) => Ok(Done::Done),
            Err(error) => {
                // A failed start leaves nothing; what cannot be removed now is found as `Partial` by the next round.
                if let Err(cleanup) = self.remove_container(&id) {
                    tracing::warn!(container = %id, error = %cleanup.chain(), "clean up after a failed start");
                }
                Err(error)
            }
        }
    }

    fn try_start(
        &self,
        pod: &Arc<DesiredPod>,
        record: &PodRecord,
        desired: &DesiredContainer,
        container: &Container,
        id: &ContainerId,
        attempt: u32,
    ) -> Result<(), HostError> {
        let (image, stand_in) = self.image_to_run(pod, desired)?;
        let dir = self.paths.container(id);
        private_dir(&dir)?;
        let defaults = image_defaults(&image.config);
        let mut made = ContainerRecord {
            version: RECORD_VERSION,
            id: id.clone(),
            pod: pod.key.clone(),
            pod_id: pod.id.clone(),
            name: desired.name.clone(),
            role: desired.role,
            hash: desired.hash.clone(),
            attempt,
            created_at: observe::now(),
            image_digest: image.manifest_digest.to_string(),
            stand_in,
            stop_signal: stop_signal(container, &defaults),
            runtime: Some(self.config.runtime.clone()),
        };
        write_json(&self.paths.container_record(id), &made, Keep::Boot)?;
        self.mount_rootfs(pod, &image, id)?;
        let user = self.user(pod, container, &image.config, id)?;
        let log = self.paths.log(&pod.id, &desired.name.0, attempt);
        let log_dir = log.parent().unwrap_or(Path::new("/"));
        private_dir(log_dir)?;
        prune_logs(log_dir, attempt)?;
        let spec = lower_spec(&Context {
            pod,
            container,
            ip: record.ip,
            node_name: &self.facts.node_name,
            host: self.facts.resources(),
            seccomp_profiles: &self.paths.seccomp_profiles(),
            hostname: &self.hostname(pod),
            image: defaults,
            user,
            cgroup: self.paths.container_cgroup(&pod.id, id),
            root_path: "rootfs",
            namespaces: &self.paths.pod_namespaces(&pod.id),
            pid_namespace: self.shared_pid_namespace(pod)?,
            volume_mounts: volumes::bind_mounts(&self.paths, pod, container, id)?,
            notify: notifies(&pod.annotations, container).then(|| dir.join(keel_proto::file::NOTIFY)),
            shm: if pod.spec.host_ipc { PathBuf::from("/dev/shm") } else { self.paths.pod_shm(&pod.id) },
            hosts: self.paths.pod_file(&pod.id, "hosts"),
            resolv_conf: self.paths.pod_file(&pod.id, "resolv.conf"),
            hostname_file: self.paths.pod_file(&pod.id, "hostname"),
            nofile: self.facts.nofile,
            host_devices: if is_privileged(container) { crate::facts::host_devices() } else { Vec::new() },
            available_capabilities: self.facts.capabilities.clone(),
        })?;
        let config =
            serde_json::to_vec(&spec).map_err(io::Error::other).at("encode", dir.join("config.json"))?;
        write_file(&dir.join("config.json"), &config, Keep::Boot)?;
        made.created_at = observe::now();
        write_json(&self.paths.container_record(id), &made, Keep::Boot)?;
        // What follows an init container that has succeeded is to be seen to as well.
        let restart = if desired.role == Role::Init { RestartPolicy::Always } else { desired.restart };
        let logs = LogSettings::of(&pod.annotations).or(&self.config.logs);
        let mut words = logs::options(&logs, &pod.key, &desired.name.0, &log);
        words.extend(self.shims.restarts(id, restart));
        words.extend(self.sockets(pod, container, attempt));
        if notifies(&pod.annotations, container) {
            words.push("--notify".into());
        }
        words.extend(container.tty.then(|| "--tty".into()));
        words.extend(container.stdin.then(|| "--stdin".into()));
        words.extend((container.stdin && container.stdin_once).then(|| "--stdin-once".into()));
        self.shims.start(id, &words)?;
        self.dismiss_earlier(pod, desired, attempt);
        Ok(())
    }

    /// The shim is told what to hold, and who held it before.
    fn sockets(&self, pod: &DesiredPod, container: &Container, attempt: u32) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        for (name, port) in held_ports(&pod.annotations, container) {
            let protocol = port.protocol.unwrap_or_default().as_str().to_ascii_lowercase();
            words.push("--listen".into());
            words.push(format!("{name}={protocol}:0.0.0.0:{}", port.container_port).into());
        }
        if words.is_empty() {
            return words;
        }
        if !pod.spec.host_network {
            words.extend(["--netns".into(), self.paths.pod_namespaces(&pod.id).join("net").into()]);
        }
        let name = ContainerName(container.name.clone());
        let before = (0..attempt).rev().map(|n| self.paths.container(&ContainerId::of(&pod.id, &name, n)));
        // Of older ones nothing is left.
        let before = before.take(RUNS_BACK).find(|dir| dir.join(keel_proto::file::CONTROL).exists());
        words.extend(before.into_iter().flat_map(|dir| ["--listen-from".into(), dir.into()]));
        words
    }

    /// Shims of what ran before this need not see to what follows any more.
    fn dismiss_earlier(&self, pod: &DesiredPod, started: &DesiredContainer, attempt: u32) {
        let inits = pod.containers.iter().filter(|c| c.role == Role::Init);
        let before: Vec<&ContainerName> =
            inits.map(|c| &c.name).take_while(|name| **name != started.name).collect();
        if attempt == 0 && before.is_empty() {
            return;
        }
        for id in names(&self.paths.containers()).unwrap_or_default().into_iter().map(ContainerId) {
            let run = id.0.strip_prefix(&format!("{}.", pod.id)).and_then(|rest| rest.rsplit_once('.'));
            let Some((name, Ok(number))) = run.map(|(name, number)| (name, number.parse::<u32>())) else {
                continue;
            };
            if name == started.name.0 && number < attempt || before.iter().any(|before| before.0 == name) {
                self.dismiss(&id);
            }
        }
    }

    /// A shim that has gone, or is too old to stay, needs no word.
    fn dismiss(&self, id: &ContainerId) {
        if let Ok(mut client) = keel_proto::Client::connect_within(&self.paths.container(id), SHIM_TIMEOUT) {
            let _ = client.dismiss();
        }
    }

    fn mount_rootfs(
        &self,
        pod: &DesiredPod,
        image: &keel_store::Image,
        id: &ContainerId,
    ) -> Result<(), HostError> {
        let target = self.paths.rootfs(id);
        private_dir(&target)?;
        let state = self.paths.container_state(id);
        let (upper, work) = (state.join("upper"), state.join("work"));
        // Also under a read-only root: mount points that the image lacks are made in the upper directory.
        private_dir(&upper)?;
        private_dir(&work)?;
        let layer = Some((upper.as_path(), work.as_path()));
        let users = match pod.spec.has_own_users() {
            true => {
                let path = self.paths.pod_namespaces(&pod.id).join("user");
                Some(fs::File::open(&path).at("open", &path)?)
            }
            false => None,
        };
        let options = keel_store::RootfsOptions {
            volatile: self.config.volatile_rootfs,
            user_namespace: users.as_ref().map(AsFd::as_fd),
        };
        self.store
            .mount_rootfs_with(image, layer, &target, options)
            .map_err(|source| HostError::RootFs { container: id.to_string(), source: Box::new(source) })
    }

    /// The manifest's user wins over the image's; names are looked up inside the image.
    fn user(
        &self,
        pod: &DesiredPod,
        container: &Container,
        config: &oci_spec::image::ImageConfiguration,
        id: &ContainerId,
    ) -> Result<User, HostError> {
        let own = container.security_context.as_ref();
        let shared = pod.spec.security_context.as_ref();
        let uid = own.and_then(|s| s.run_as_user).or_else(|| shared.and_then(|s| s.run_as_user));
        let gid = own.and_then(|s| s.run_as_group).or_else(|| shared.and_then(|s| s.run_as_group));
        let named = config.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default();
        let wanted = uid.map_or(named, |uid| uid.to_string());
        let found =
            keel_store::resolve_user(&self.paths.rootfs(id), &wanted).map_err(|source| HostError::User {
                container: container.name.clone(),
                user: wanted.clone(),
                source: Box::new(source),
            })?;
        Ok(User {
            uid: found.uid,
            gid: gid.unwrap_or(found.gid),
            additional_gids: found.additional_gids,
            home: found.home,
        })
    }

    /// Asks the shim, which carries the stop through even if this process dies meanwhile; returns once the run is over.
    pub(crate) fn stop_container(&self, id: &ContainerId, grace_ms: u64) -> Result<Done, HostError> {
        let Some(record) = read_json::<ContainerRecord>(&self.paths.container_record(id))? else {
            return Ok(Done::Stale);
        };
        let grace = Duration::from_millis(grace_ms);
        let deadline = Instant::now() + grace + KILL_TIMEOUT;
        let stop = |message: String| HostError::Stop { container: id.to_string(), message };
        loop {
            let (state, orphaned) = observe::container_state(&self.paths, id, record.created_at)?;
            if !matches!(state, ContainerState::Running { .. }) {
                return Ok(Done::Done);
            }
            if orphaned {
                self.shims.adopt(&Orphan {
                    id: id.clone(),
                    pod: record.pod_id.clone(),
                    name: record.name.0.clone(),
                    attempt: record.attempt,
                })?;
            }
            match keel_proto::Client::connect(&self.paths.container(id)) {
                Ok(mut client) => {
                    // Without a grace there is nothing that a signal could be used for.
                    let signal = match grace_ms {
                        0 => Signal::SIGKILL as u8,
                        _ => u8::try_from(record.stop_signal).unwrap_or(DEFAULT_STOP_SIGNAL as u8),
                    };
                    client.stop(signal, grace).map_err(|e| stop(e.to_string()))?;
                    if self.await_record(id, &mut client, deadline)? {
                        return Ok(Done::Done);
                    }
                }
                // The shim may just have gone because the container ended.
                Err(error) if Instant::now() > deadline => return Err(stop(error.to_string())),
                Err(_) => {}
            }
            if Instant::now() > deadline {
                return Err(stop(format!("still running {KILL_TIMEOUT:?} after the kill")));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// False: not by the deadline, or the shim has gone meanwhile.
    fn await_record(
        &self,
        id: &ContainerId,
        client: &mut keel_proto::Client,
        deadline: Instant,
    ) -> Result<bool, HostError> {
        let mut unrecorded = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match client.wait(Some(left.min(RECORD_TIMEOUT))) {
                Ok(_) => return Ok(true),
                Err(keel_proto::ClientError::Timeout { .. }) if Instant::now() < deadline => {}
                Err(_) => return Ok(false),
            }
            let state = keel_proto::Client::connect(&self.paths.container(id)).and_then(|mut c| c.state());
            let recording = state.is_ok_and(|state| state.phase == keel_proto::Phase::Recording);
            unrecorded = if recording { unrecorded + 1 } else { 0 };
            // Once may be a slow disk.
            if unrecorded > 1 {
                let path = self.paths.exit_record(id);
                let message = format!("it has ended, but its shim cannot write {}", path.display());
                return Err(HostError::Stop { container: id.to_string(), message });
            }
        }
    }

    /// Removes what a run left, except its log. Absence of any part is success.
    pub(crate) fn remove_container(&self, id: &ContainerId) -> Result<(), HostError> {
        let dir = self.paths.container(id);
        let shim = observe::read_mark(&dir.join("shim.pid"))?;
        if self.paths.runtime_root().join(&id.0).exists() {
            self.runtime_delete(id)?;
        }
        if let Some(shim) = shim
            && observe::is_alive(shim)
        {
            self.dismiss(id);
            self.end_shim(id, shim)?;
        }
        self.store
            .unmount_rootfs(&self.paths.rootfs(id))
            .map_err(|source| HostError::RootFs { container: id.to_string(), source: Box::new(source) })?;
        volumes::unpin(&self.paths, id)?;
        remove_tree(&self.paths.container_state(id))?;
        // The record last: until then the next round still knows that there is something to remove. And the exit before
        // it: the number of this run comes again once the pod is forgotten.
        let record = self.paths.container_record(id);
        for path in names(&dir)?.into_iter().map(|name| dir.join(name)).filter(|path| *path != record) {
            remove_tree_or_file(&path)?;
        }
        remove_file(&self.paths.exit_record(id))?;
        remove_file(&record)?;
        Ok(remove_tree(&dir)?)
    }

    /// `delete --force` ends whatever still runs and removes the runtime's own state.
    fn runtime_delete(&self, id: &ContainerId) -> Result<(), HostError> {
        let runtime = self.runtime_of(id)?;
        let failed = |message: String| HostError::Stop {
            container: id.to_string(),
            message: format!("{} delete: {message}", runtime.display()),
        };
        let arguments = |command: &mut Command| {
            command.arg("--root").arg(self.paths.runtime_root()).args(["delete", "--force"]).arg(&id.0);
        };
        let (status, text) =
            run_to_end(&runtime, arguments, DELETE_TIMEOUT).map_err(|error| failed(error.to_string()))?;
        match status.success() || text.contains("does not exist") {
            true => Ok(()),
            false => Err(failed(text.trim().to_string())),
        }
    }

    /// The runtime that made a container, for everything that is done with it later.
    pub(crate) fn runtime_of(&self, id: &ContainerId) -> Result<PathBuf, PathError> {
        runtime_of(&self.paths, id, &self.config.runtime)
    }

    /// A shim goes by itself once its container is gone. One that cannot, because no disk takes its record, is killed:
    /// the container is no more, and the record is what gets removed next.
    fn end_shim(&self, id: &ContainerId, shim: observe::ProcessMark) -> Result<(), HostError> {
        let stuck = |message: String| HostError::Stop { container: id.to_string(), message };
        if await_death(shim, SHIM_TIMEOUT) {
            return Ok(());
        }
        tracing::warn!(container = %id, pid = shim.pid, "its shim does not end, and is killed");
        // Asked after the descriptor was opened: it is that process, or one that has gone.
        if let Ok(pidfd) = keel_sys::process::pidfd_open(shim.pid.cast_signed())
            && observe::is_alive(shim)
        {
            let killed = keel_sys::process::pidfd_send_signal(&pidfd, Signal::SIGKILL as i32);
            killed.map_err(|e| stuck(format!("kill shim {}: {e}", shim.pid)))?;
        }
        match await_death(shim, KILL_TIMEOUT) {
            true => Ok(()),
            false => Err(stuck(format!("shim {} does not end", shim.pid))),
        }
    }
}

fn await_death(process: observe::ProcessMark, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while observe::is_alive(process) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    true
}

/// The runtime that made a container, `otherwise` when that is not known.
pub fn container_runtime(paths: &Paths, id: &ContainerId, otherwise: &Path) -> Result<PathBuf, HostError> {
    Ok(runtime_of(paths, id, otherwise)?)
}

fn find<'a>(pod: &'a DesiredPod, name: &ContainerName) -> Option<(&'a DesiredContainer, &'a Container)> {
    let desired = pod.containers.iter().find(|c| c.name == *name)?;
    let list = match desired.role {
        Role::Init => &pod.spec.init_containers,
        Role::Main => &pod.spec.containers,
    };
    list.get(desired.index).map(|container| (desired, container))
}

fn is_privileged(container: &Container) -> bool {
    container.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false)
}

fn image_defaults(config: &oci_spec::image::ImageConfiguration) -> ImageDefaults {
    let Some(config) = config.config() else { return ImageDefaults::default() };
    ImageDefaults {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone(),
    }
}

fn stop_signal(container: &Container, image: &ImageDefaults) -> i32 {
    let declared = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref());
    declared.or(image.stop_signal.as_deref()).and_then(signal_number).unwrap_or(DEFAULT_STOP_SIGNAL as i32)
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.
fn signal_number(text: &str) -> Option<i32> {
    /// glibc keeps the first two real-time signals for itself.
    const SIGRTMIN: i32 = 34;
    const SIGRTMAX: i32 = 64;
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return (1..=SIGRTMAX).contains(&number).then_some(number);
    }
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = bare.strip_prefix("RTMIN") {
        return Some(SIGRTMIN + offset.strip_prefix('+').map_or(Some(0), |n| n.parse().ok())?);
    }
    if let Some(offset) = bare.strip_prefix("RTMAX") {
        return Some(SIGRTMAX - offset.strip_prefix('-').map_or(Some(0), |n| n.parse().ok())?);
    }
    Signal::from_str(&format!("SIG{bare}")).ok().map(|signal| signal as i32)
}

/// The log of the run before stays for `logs --previous`; older ones go.
fn prune_logs(dir: &Path, attempt: u32) -> Result<(), PathError> {
    for name in names(dir)? {
        let number = name.split('.').next().and_then(|text| text.parse::<u32>().ok());
        if number.is_some_and(|number| number + 1 < attempt) {
            remove_file(&dir.join(name))?;
        }
    }
    Ok(())
}

pub(crate) fn private_dir(dir: &Path) -> Result<(), PathError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).at("create directory", dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_in_every_spelling() {
        for (text, number) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGNOPE", None),
            ("0", None),
            ("65", None),
        ] {
            assert_eq!(signal_number(text), number, "{text}");
        }
    }
}
