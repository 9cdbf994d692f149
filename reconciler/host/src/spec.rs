//! A container of a pod, lowered to an OCI runtime spec. Pure: everything that it needs to know about the host and the
//! image is in [`Context`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use keel_manifest::Quantity;
use keel_manifest::model::{Container, PodSpec, SeccompProfile, SeccompType};
use keel_plan::{ContainerName, DesiredPod};
use serde_json::{Value, json};

use crate::seccomp;

/// Version of the runtime specification that the output follows.
const OCI_VERSION: &str = "1.2.0";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A fork bomb must not take the host down.
const DEFAULT_PIDS_LIMIT: i64 = 2048;
/// CFS period in microseconds; the kernel's default and Kubernetes'.
pub(crate) const CPU_PERIOD_US: u64 = 100_000;
/// Below a quota of 1 ms the kernel refuses.
const MIN_CPU_QUOTA_US: i64 = 1_000;
const MIN_CPU_SHARES: u64 = 2;
const MAX_CPU_SHARES: u64 = 262_144;

/// What a process keeps of root's powers: enough for the usual entrypoint that changes owner and user.
const DEFAULT_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
];

const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Where a container finds the socket that takes sd_notify messages.
const NOTIFY: &str = "/run/notify";

const READONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What the lowering must know besides the manifest.
#[derive(Clone, Debug)]
pub(crate) struct Context<'a> {
    pub(crate) pod: &'a DesiredPod,
    pub(crate) container: &'a Container,
    pub(crate) ip: Option<Ipv4Addr>,
    pub(crate) node_name: &'a str,
    pub(crate) host: HostResources,
    /// Where `seccompProfile.localhostProfile` is looked up.
    pub(crate) seccomp_profiles: &'a Path,
    pub(crate) hostname: &'a str,
    pub(crate) image: ImageDefaults,
    /// User as resolved inside the image.
    pub(crate) user: User,
    pub(crate) cgroup: String,
    /// `rootfs` in the bundle, relative.
    pub(crate) root_path: &'a str,
    /// Pinned namespaces of the pod.
    pub(crate) namespaces: &'a Path,
    /// Path of the pod's pid namespace, with `shareProcessNamespace`.
    pub(crate) pid_namespace: Option<PathBuf>,
    /// Host paths of volumes, by volume mount index.
    pub(crate) volume_mounts: Vec<BindMount>,
    pub(crate) shm: PathBuf,
    pub(crate) hosts: PathBuf,
    pub(crate) resolv_conf: PathBuf,
    pub(crate) hostname_file: PathBuf,
    /// Directory with the socket that takes sd_notify messages.
    pub(crate) notify: Option<PathBuf>,
    /// Hard limit of open files that the host lets us give.
    pub(crate) nofile: u64,
    /// Device nodes of the host, for privileged containers: (path, type, major, minor, mode).
    pub(crate) host_devices: Vec<HostDevice>,
    /// Bounding set of this host: a capability outside it cannot be given.
    pub(crate) available_capabilities: BTreeSet<String>,
}

/// What `fieldRef`, `resourceFieldRef` and quality of service ask about the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostResources {
    pub(crate) ip: Ipv4Addr,
    pub(crate) cores: u64,
    pub(crate) memory_bytes: u64,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct ImageDefaults {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) cmd: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) working_dir: String,
    pub(crate) stop_signal: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
    pub(crate) home: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct BindMount {
    pub(crate) source: PathBuf,
    pub(crate) target: String,
    pub(crate) read_only: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct HostDevice {
    pub(crate) path: String,
    pub(crate) kind: char,
    pub(crate) major: i64,
    pub(crate) minor: i64,
    pub(crate) mode: u32,
}

/// A manifest that is valid but cannot run with this image on this host.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("container {0}: neither the manifest nor the image says what to run (no command, no entrypoint)")]
    NoCommand(String),
    #[error("container {0}: runAsNonRoot is set, but the image runs as root (uid 0); set runAsUser")]
    RunsAsRoot(String),
    #[error("container {container}: capability {name} is not known")]
    UnknownCapability { container: String, name: String },
    #[error("container {container}: capability {name} is not available on this host")]
    UnavailableCapability { container: String, name: String },
    #[error("container {container}: seccomp profile {profile}: {message}")]
    Seccomp { container: String, profile: String, message: String },
}

/// The whole `config.json`.
pub(crate) fn lower_spec(context: &Context<'_>) -> Result<Value, SpecError> {
    let security = context.container.security_context.as_ref();
    let privileged = security.and_then(|s| s.privileged).unwrap_or(false);
    let capabilities = lower_capabilities(context, privileged)?;
    let read_only = security.and_then(|s| s.read_only_root_filesystem).unwrap_or(false);
    let mut linux = json!({
        "cgroupsPath": context.cgroup,
        "namespaces": lower_namespaces(context),
        "resources": lower_resources(context, privileged),
        "rootfsPropagation": "rprivate",
    });
    if !privileged {
        linux["maskedPaths"] = json!(MASKED_PATHS);
        linux["readonlyPaths"] = json!(READONLY_PATHS);
    } else {
        linux["devices"] = context.host_devices.iter().map(lower_device).collect();
    }
    if let Some(profile) = lower_seccomp(context, privileged, &capabilities)? {
        linux["seccomp"] = profile;
    }
    Ok(json!({
        "ociVersion": OCI_VERSION,
        "root": {"path": context.root_path, "readonly": read_only},
        "process": lower_process(context, privileged, &capabilities)?,
        "mounts": lower_mounts(context, privileged),
        "linux": linux,
        "annotations": {
            "dev.evenkeel.pod": context.pod.key.to_string(),
            "dev.evenkeel.container": context.container.name,
        },
    }))
}

fn lower_process(
    context: &Context<'_>,
    privileged: bool,
    capabilities: &[String],
) -> Result<Value, SpecError> {
    let container = context.container;
    let Environment { all: env, declared } = environment(context);
    let args = command_line(context, &declared)?;
    if run_as_non_root(&context.pod.spec, container) && context.user.uid == 0 {
        return Err(SpecError::RunsAsRoot(container.name.clone()));
    }
    let security = container.security_context.as_ref();
    let escalate = security.and_then(|s| s.allow_privilege_escalation).unwrap_or(false);
    let cwd = container.working_dir.clone().filter(|dir| !dir.is_empty()).unwrap_or_else(|| {
        if context.image.working_dir.is_empty() { "/".into() } else { context.image.working_dir.clone() }
    });
    let mut gids: BTreeSet<u32> = context.user.additional_gids.iter().copied().collect();
    if let Some(pod) = context.pod.spec.security_context.as_ref() {
        gids.extend(&pod.supplemental_groups);
        gids.extend(pod.fs_group);
    }
    Ok(json!({
        "terminal": container.tty,
        "user": {"uid": context.user.uid, "gid": context.user.gid, "additionalGids": gids},
        "args": args,
        "env": env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>(),
        "cwd": cwd,
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": !privileged && !escalate,
        "oomScoreAdj": oom_score_adj(context),
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": context.nofile, "hard": context.nofile}],
    }))
}

/// `command` replaces the entrypoint and drops the image's arguments; `args` replaces the arguments.
fn command_line(
    context: &Context<'_>,
    variables: &BTreeMap<String, String>,
) -> Result<Vec<String>, SpecError> {
    let container = context.container;
    let expand =
        |words: &[String]| words.iter().map(|word| keel_plan::expand(word, variables)).collect::<Vec<_>>();
    let mut line = Vec::new();
    if container.command.is_empty() {
        line.extend(context.image.entrypoint.clone());
    } else {
        line.extend(expand(&container.command));
    }
    if !container.args.is_empty() {
        line.extend(expand(&container.args));
    } else if container.command.is_empty() {
        line.extend(context.image.cmd.clone());
    }
    if line.is_empty() { Err(SpecError::NoCommand(container.name.clone())) } else { Ok(line) }
}

struct Environment {
    all: Vec<(String, String)>,
    /// Those of the manifest: what `$(NAME)` in a command line may name. The image's variables are not its author's.
    declared: BTreeMap<String, String>,
}

/// Image environment first, then the manifest's; later names win and keep their first place.
fn environment(context: &Context<'_>) -> Environment {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: String| match env.iter_mut().find(|(n, _)| n == name) {
        Some(entry) => entry.1 = value,
        None => env.push((name.to_string(), value)),
    };
    set("PATH", DEFAULT_PATH.to_string());
    set("HOSTNAME", context.hostname.to_string());
    for entry in &context.image.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        set(name, value.to_string());
    }
    let name = ContainerName(context.container.name.clone());
    let declared = context.pod.resolved.env.get(&name).map(Vec::as_slice).unwrap_or_default();
    let host_millis = |resource: &str| match resource {
        "limits.cpu" => context.host.cores.saturating_mul(1000),
        _ => context.host.memory_bytes.saturating_mul(1000),
    };
    let declared = keel_plan::expand_env(declared, &|field| field_value(context, field), &host_millis);
    for (name, value) in &declared {
        set(name, value.clone());
    }
    let held = keel_manifest::extension::held_ports(&context.pod.annotations, context.container);
    let held: Vec<&str> = held.map(|(name, _)| name).collect();
    if !held.is_empty() {
        set("LISTEN_FDNAMES", held.join(":"));
    }
    if context.notify.is_some() {
        set("NOTIFY_SOCKET", format!("{NOTIFY}/notify.sock"));
    }
    if !env.iter().any(|(name, _)| name == "HOME") {
        env.push(("HOME".into(), context.user.home.clone().unwrap_or_else(|| "/".into())));
    }
    if context.container.tty && !env.iter().any(|(name, _)| name == "TERM") {
        env.push(("TERM".into(), "xterm".into()));
    }
    Environment { all: env, declared: declared.into_iter().collect() }
}

/// `fieldRef` paths of the downward API. Unknown ones were refused when the manifest was read.
fn field_value(context: &Context<'_>, field: &str) -> String {
    let pod = context.pod;
    let host_ip = || context.host.ip.to_string();
    // On the host's network the pod has the host's address.
    let ip = || context.ip.map_or_else(host_ip, |ip| ip.to_string());
    match field {
        "metadata.name" => pod.key.name.clone(),
        "metadata.namespace" => pod.key.namespace.clone(),
        "metadata.uid" => pod.id.0.clone(),
        "spec.nodeName" => context.node_name.to_string(),
        "spec.serviceAccountName" => "default".to_string(),
        "status.podIP" | "status.podIPs" => ip(),
        "status.hostIP" | "status.hostIPs" => host_ip(),
        _ => {
            let keyed = |prefix: &str| field.strip_prefix(prefix)?.strip_suffix("']").map(str::to_string);
            if let Some(key) = keyed("metadata.labels['") {
                pod.labels.get(&key).cloned().unwrap_or_default()
            } else if let Some(key) = keyed("metadata.annotations['") {
                pod.annotations.get(&key).cloned().unwrap_or_default()
            } else {
                String::new()
            }
        }
    }
}

pub(crate) fn run_as_non_root(pod: &PodSpec, container: &Container) -> bool {
    container
        .security_context
        .as_ref()
        .and_then(|s| s.run_as_non_root)
        .or_else(|| pod.security_context.as_ref().and_then(|s| s.run_as_non_root))
        .unwrap_or(false)
}

fn lower_capabilities(context: &Context<'_>, privileged: bool) -> Result<Vec<String>, SpecError> {
    if privileged {
        return Ok(context.available_capabilities.iter().cloned().collect());
    }
    let container = &context.container.name;
    let mut held: BTreeSet<String> = DEFAULT_CAPABILITIES.iter().map(|name| name.to_string()).collect();
    let Some(change) = context.container.security_context.as_ref().and_then(|s| s.capabilities.as_ref())
    else {
        return Ok(held.into_iter().filter(|name| context.available_capabilities.contains(name)).collect());
    };
    let normal = |name: &str| {
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if bare == "ALL" || keel_manifest::CAPABILITIES.contains(&bare) {
            Ok(format!("CAP_{bare}"))
        } else {
            Err(SpecError::UnknownCapability { container: container.clone(), name: name.to_string() })
        }
    };
    // Kubernetes' order: "drop ALL" empties the default set, "add ALL" fills it, single names have the last word.
    let add = change.add.iter().map(|name| normal(name)).collect::<Result<Vec<_>, _>>()?;
    let drop = change.drop.iter().map(|name| normal(name)).collect::<Result<Vec<_>, _>>()?;
    if drop.iter().any(|name| name == "CAP_ALL") {
        held.clear();
    }
    if add.iter().any(|name| name == "CAP_ALL") {
        held.extend(context.available_capabilities.iter().cloned());
    }
    for name in &drop {
        held.remove(name);
    }
    held.retain(|name| context.available_capabilities.contains(name));
    for name in add.into_iter().filter(|name| name != "CAP_ALL") {
        if !context.available_capabilities.contains(&name) {
            return Err(SpecError::UnavailableCapability { container: container.clone(), name });
        }
        held.insert(name);
    }
    Ok(held.into_iter().collect())
}

fn lower_seccomp(
    context: &Context<'_>,
    privileged: bool,
    capabilities: &[String],
) -> Result<Option<Value>, SpecError> {
    let profile = context
        .container
        .security_context
        .as_ref()
        .and_then(|s| s.seccomp_profile.as_ref())
        .or_else(|| context.pod.spec.security_context.as_ref().and_then(|s| s.seccomp_profile.as_ref()));
    match profile {
        _ if privileged => Ok(None),
        None => Ok(Some(seccomp::default_profile(capabilities))),
        Some(SeccompProfile { kind, localhost_profile }) => match kind {
            SeccompType::Unconfined => Ok(None),
            SeccompType::Localhost => {
                let name = localhost_profile.clone().unwrap_or_default();
                let error = |message: String| SpecError::Seccomp {
                    container: context.container.name.clone(),
                    profile: name.clone(),
                    message,
                };
                let relative = Path::new(&name);
                if !relative.components().all(|part| matches!(part, std::path::Component::Normal(_))) {
                    return Err(error("it must be a relative path without `..`".into()));
                }
                let path = context.seccomp_profiles.join(relative);
                let text =
                    std::fs::read(&path).map_err(|e| error(format!("read {}: {e}", path.display())))?;
                serde_json::from_slice(&text).map(Some).map_err(|e| error(e.to_string()))
            }
            SeccompType::RuntimeDefault => Ok(Some(seccomp::default_profile(capabilities))),
        },
    }
}

fn lower_namespaces(context: &Context<'_>) -> Value {
    let spec = &context.pod.spec;
    let pinned = |kind: &str| json!(context.namespaces.join(kind));
    let mut list = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    if !spec.host_network {
        list.push(json!({"type": "network", "path": pinned("net")}));
        list.push(json!({"type": "uts", "path": pinned("uts")}));
    }
    if !spec.host_ipc {
        list.push(json!({"type": "ipc", "path": pinned("ipc")}));
    }
    if spec.has_own_users() {
        list.push(json!({"type": "user", "path": pinned("user")}));
    }
    if !spec.host_pid {
        list.push(match &context.pid_namespace {
            Some(path) => json!({"type": "pid", "path": path}),
            None => json!({"type": "pid"}),
        });
    }
    Value::Array(list)
}

fn lower_mounts(context: &Context<'_>, privileged: bool) -> Vec<Value> {
    let system = |target: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": source, "options": options});
    let writable = if privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        system("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        system("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        system(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        system("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        system("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", writable]),
        system("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", writable]),
    ];
    // What belongs to the host's root belongs to the pod's, and what the pod writes to the host's users of those numbers.
    let mapped = context.pod.spec.has_own_users().then_some("idmap");
    let bind = |source: &Path, target: &str, options: &[&str]| {
        let mut all = vec!["rbind", "rprivate"];
        all.extend(mapped);
        all.extend(options);
        json!({"destination": target, "type": "bind", "source": source, "options": all})
    };
    /// The host rewrites these in place. A container that could write them could fill the host's memory; in Kubernetes it
    /// can, so an image that edits its own hosts file needs `hostAliases` here.
    const READ_ONLY: &[&str] = &["ro", "nosuid", "nodev", "noexec"];
    let taken: BTreeSet<&str> =
        context.volume_mounts.iter().map(|m| m.target.trim_end_matches('/')).collect();
    for (source, target, options) in [
        (&context.shm, "/dev/shm", &["nosuid", "noexec", "nodev"][..]),
        (&context.hosts, "/etc/hosts", READ_ONLY),
        (&context.resolv_conf, "/etc/resolv.conf", READ_ONLY),
        (&context.hostname_file, "/etc/hostname", READ_ONLY),
    ] {
        if !taken.contains(target) {
            mounts.push(bind(source, target, options));
        }
    }
    if let Some(notify) = &context.notify {
        mounts.push(bind(notify, NOTIFY, READ_ONLY));
    }
    // Parents before children, whatever the order in the manifest.
    let mut volumes: Vec<&BindMount> = context.volume_mounts.iter().collect();
    volumes.sort_by_key(|m| m.target.split('/').filter(|part| !part.is_empty()).count());
    for mount in volumes {
        let mut options = vec!["rbind", "rprivate"];
        options.extend(mapped);
        options.push(if mount.read_only { "ro" } else { "rw" });
        mounts.push(
            json!({"destination": mount.target, "type": "bind", "source": mount.source, "options": options}),
        );
    }
    mounts
}

fn lower_device(device: &HostDevice) -> Value {
    json!({"path": device.path, "type": device.kind.to_string(), "major": device.major, "minor": device.minor,
        "fileMode": device.mode, "uid": 0, "gid": 0})
}

fn lower_resources(context: &Context<'_>, privileged: bool) -> Value {
    let wanted = Wanted::of(context.container);
    let mut cpu = json!({"shares": cpu_shares(wanted.cpu_request.or(wanted.cpu_limit))});
    if let Some(millis) = wanted.cpu_limit {
        cpu["period"] = json!(CPU_PERIOD_US);
        cpu["quota"] = json!(cpu_quota(millis));
    }
    let mut resources = json!({"cpu": cpu, "pids": {"limit": DEFAULT_PIDS_LIMIT}});
    if let Some(bytes) = wanted.memory_limit {
        resources["memory"]["limit"] = json!(bytes);
    }
    // What was asked for is the last to be taken back when the host runs short.
    if let Some(bytes) = wanted.memory_request {
        resources["memory"]["reservation"] = json!(bytes);
    }
    resources["devices"] = json!([{"allow": privileged, "access": "rwm"}]);
    resources
}

/// Requests and limits as numbers: thousandths of a core, bytes. Zero means "not given", as in Kubernetes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) cpu_request: Option<u64>,
    pub(crate) cpu_limit: Option<u64>,
    pub(crate) memory_request: Option<u64>,
    pub(crate) memory_limit: Option<u64>,
}

impl Wanted {
    pub(crate) fn of(container: &Container) -> Wanted {
        let Some(resources) = &container.resources else { return Wanted::default() };
        let cpu = |list: &BTreeMap<String, Quantity>| {
            list.get("cpu").and_then(|q| q.millicores().ok()).filter(|n| *n > 0)
        };
        let memory = |list: &BTreeMap<String, Quantity>| {
            list.get("memory").and_then(|q| q.bytes().ok()).filter(|n| *n > 0)
        };
        Wanted {
            cpu_request: cpu(&resources.requests),
            cpu_limit: cpu(&resources.limits),
            memory_request: memory(&resources.requests),
            memory_limit: memory(&resources.limits),
        }
    }
}

/// Kubernetes' conversion: 1024 shares a core, at least 2.
pub(crate) fn cpu_shares(millis: Option<u64>) -> u64 {
    millis.map_or(MIN_CPU_SHARES, |millis| (millis * 1024 / 1000).clamp(MIN_CPU_SHARES, MAX_CPU_SHARES))
}

pub(crate) fn cpu_quota(millis: u64) -> i64 {
    i64::try_from(millis * CPU_PERIOD_US / 1000).unwrap_or(i64::MAX).max(MIN_CPU_QUOTA_US)
}

/// The kubelet's quality-of-service numbers, without the negative one: it needs a privilege that many hosts lack.
fn oom_score_adj(context: &Context<'_>) -> i64 {
    let wanted: Vec<Wanted> = context.pod.spec.containers.iter().map(Wanted::of).collect();
    if wanted.iter().all(|w| *w == Wanted::default()) {
        return 1000;
    }
    let guaranteed = |w: &Wanted| {
        w.cpu_limit.is_some()
            && w.memory_limit.is_some()
            && w.cpu_request.is_none_or(|request| Some(request) == w.cpu_limit)
            && w.memory_request.is_none_or(|request| Some(request) == w.memory_limit)
    };
    if wanted.iter().all(guaranteed) {
        return 0;
    }
    let request = Wanted::of(context.container).memory_request.unwrap_or(0);
    let share = 1000u64.saturating_sub(request.saturating_mul(1000) / context.host.memory_bytes.max(1));
    i64::try_from(share.clamp(2, 999)).unwrap_or(999)
}
