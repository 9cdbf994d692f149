//! `config.json` lowered to operations. Pure: the same specification, request and facts give the same list.

mod mounts;
mod process;

pub(crate) use mounts::is_bind;
pub(crate) use process::lower_affinity;
pub use process::{ProcessContext, affinity_mask, lower_process};

use crate::names;
use crate::netdev::{self, NetDevice};
use crate::op::{HookProgram, NsKind, Op, Rel, StringArray};
use crate::rdt::{Rdt, lower_rdt};
use crate::spec::{Hook, IdMapping, Linux, Spec};
use keel_cgroup::{DeviceRule, DeviceSpec, Layout};
use std::collections::BTreeSet;
use std::ffi::CString;

/// What the lowering needs to know about the host.
#[derive(Clone, Debug)]
pub struct HostFacts {
    pub layout: Layout,
    /// Capabilities that this process can hand out, bit n = capability n.
    pub capabilities: u64,
    /// The highest capability that the kernel knows.
    pub last_capability: u32,
    pub euid: u32,
    pub apparmor: bool,
    pub selinux: bool,
    /// The mount of the resctrl file system; looked for only when the specification asks for it.
    pub resctrl: Option<std::path::PathBuf>,
}

/// What the command line asks for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub id: String,
    /// Absolute.
    pub rootfs: String,
    /// Absolute; where relative sources of mounts begin.
    pub bundle: String,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    /// Descriptors after the standard three that the container keeps.
    pub preserve_fds: u32,
    /// The preserved descriptors are those of a socket activation, so many.
    pub listen_fds: Option<u32>,
    /// The path of the container's cgroup, as [`Layout::cgroup`] takes it.
    pub cgroup: String,
    /// The container has no cgroup of its own and runs in its caller's.
    pub borrowed_cgroup: bool,
    /// Another process moves the container's into its cgroup.
    pub wait_for_cgroup: bool,
}

/// Both halves of the work.
#[derive(Debug)]
pub struct Lowered {
    /// The child's part, in order.
    pub ops: Vec<Op>,
    /// Flags of the clone.
    pub clone_flags: u64,
    /// Namespaces that the parent joins before the clone, because they take effect only for children.
    pub parent_joins: Vec<(NsKind, String)>,
    /// A new time namespace with these offsets, made by the parent before the clone.
    pub time_offsets: Option<String>,
    /// A user namespace that is joined before the clone, so that the new namespaces belong to it.
    pub user_join: Option<String>,
    /// Namespaces that the child joins, in the order of their slots.
    pub child_joins: Vec<(NsKind, String)>,
    /// A new user namespace with these maps.
    pub id_maps: Option<(Vec<IdMapping>, Vec<IdMapping>)>,
    /// Descriptors of user namespaces for idmapped mounts, in the order of their slots.
    pub idmaps: Vec<Idmap>,
    pub net_devices: Vec<NetDevice>,
    pub rdt: Option<Rdt>,
    /// Namespaces that parameters are set in: one that is joined must not be the runtime's own.
    pub sysctl_namespaces: Vec<NsKind>,
    /// Device rules, with those for the default devices.
    pub device_rules: Vec<DeviceSpec>,
    /// The container has its own pid namespace, so that its init's death is everybody's.
    pub own_pid_namespace: bool,
    /// What was asked for and is not given, where the specification wants no failure.
    pub warnings: Vec<String>,
}

/// Whose maps an idmapped mount has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Idmap {
    Own(Vec<IdMapping>, Vec<IdMapping>),
    /// Those of the user namespace at this path.
    Joined(String),
}

/// A field that cannot be carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
    #[error("{field} is not supported: {why}")]
    Unsupported { field: String, why: &'static str },
}

pub(crate) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Invalid { field: field.into(), problem: problem.into() }
}

pub(crate) fn unsupported(field: impl Into<String>, why: &'static str) -> SpecError {
    SpecError::Unsupported { field: field.into(), why }
}

pub(crate) fn c_string(field: &str, text: &str) -> Result<CString, SpecError> {
    CString::new(text).map_err(|_| invalid(field, "contains a NUL byte"))
}

pub(crate) fn rel(field: &str, path: &str) -> Result<Rel, SpecError> {
    Rel::new(path).ok_or_else(|| invalid(field, "contains a NUL byte"))
}

/// Namespaces of the specification, each kind at most once.
pub(crate) struct Namespaces {
    new: Vec<NsKind>,
    joined: Vec<(NsKind, String)>,
}

impl Namespaces {
    fn parse(linux: &Linux) -> Result<Namespaces, SpecError> {
        let mut all = Namespaces { new: Vec::new(), joined: Vec::new() };
        for (i, ns) in linux.namespaces.iter().enumerate() {
            let field = format!("linux.namespaces[{i}]");
            let kind = NsKind::parse(&ns.kind).ok_or_else(|| {
                invalid(format!("{field}.type"), format!("unknown namespace {:?}", ns.kind))
            })?;
            if all.has(kind) {
                return Err(invalid(field, format!("duplicate {} namespace", ns.kind)));
            }
            match ns.path.as_deref() {
                None | Some("") => all.new.push(kind),
                Some(path) if path.starts_with('/') => all.joined.push((kind, path.to_owned())),
                Some(path) => return Err(invalid(field, format!("path {path:?} is not absolute"))),
            }
        }
        Ok(all)
    }

    pub(crate) fn is_new(&self, kind: NsKind) -> bool {
        self.new.contains(&kind)
    }

    /// New or joined: not the runtime's own.
    pub(crate) fn has(&self, kind: NsKind) -> bool {
        self.is_new(kind) || self.joined.iter().any(|(k, _)| *k == kind)
    }
}

/// The whole container, from the clone to the exec.
pub fn lower(spec: &Spec, request: &Request, facts: &HostFacts) -> Result<Lowered, SpecError> {
    check_version(&spec.oci_version)?;
    let default_linux = Linux::default();
    let linux = spec.linux.as_ref().unwrap_or(&default_linux);
    let namespaces = Namespaces::parse(linux)?;
    refuse_unsupported(spec, linux, &namespaces, facts)?;
    let mut out = Lowered {
        ops: Vec::with_capacity(64),
        clone_flags: 0,
        parent_joins: Vec::new(),
        time_offsets: None,
        user_join: None,
        child_joins: Vec::new(),
        id_maps: None,
        idmaps: Vec::new(),
        net_devices: net_devices(linux, &namespaces)?,
        rdt: linux.intel_rdt.as_ref().map(|rdt| lower_rdt(rdt, &request.id)).transpose()?,
        sysctl_namespaces: linux.sysctl.keys().filter_map(|key| sysctl_namespace(key)).collect(),
        device_rules: device_rules(linux, facts),
        own_pid_namespace: namespaces.is_new(NsKind::Pid),
        warnings: Vec::new(),
    };
    if linux.mount_label.as_deref().is_some_and(|l| !l.is_empty()) && !facts.selinux {
        // Unlike a process's label it takes nothing away from the container.
        out.warnings.push("linux.mountLabel has no effect: SELinux is not enabled on this host".to_owned());
    }
    let ignored = linux.resources.as_ref().and_then(|r| keel_cgroup::has_no_effect(r, facts.layout.mode));
    out.warnings.extend(
        ignored.map(|field| format!("linux.resources.{field} has no effect: kernels have no such limit")),
    );
    lower_namespaces(linux, &namespaces, &mut out)?;
    early(spec, request, &namespaces, &mut out)?;
    mounts::lower_rootfs(spec, linux, request, facts, &namespaces, &mut out)?;
    identity(spec, linux, &namespaces, &mut out.ops)?;
    if let Some(process) = &spec.process {
        if process.args.is_empty() {
            return Err(invalid("process.args", "must not be empty"));
        }
        let context = ProcessContext {
            linux: Some(linux),
            facts,
            user_namespace: namespaces.has(NsKind::User),
            preserve_fds: request.preserve_fds,
            listen_fds: request.listen_fds,
            hooks: spec.hooks.as_ref().map_or(&[], |h| h.start_container.as_slice()),
            exec: false,
            keep_groups: spec.keeps_groups(),
        };
        out.ops.extend(lower_process(process, &context, &mut out.warnings)?);
    } else {
        return Err(invalid("process", "is missing; a container without a process cannot be started"));
    }
    Ok(out)
}

/// 1.x.y with an optional suffix.
fn check_version(version: &str) -> Result<(), SpecError> {
    let core = version.split(['-', '+']).next().unwrap_or("");
    let parts: Vec<&str> = core.split('.').collect();
    let numeric = parts.len() == 3
        && parts.iter().all(|p| !p.is_empty() && p.len() < 10 && p.bytes().all(|c| c.is_ascii_digit()));
    if !numeric {
        return Err(invalid("ociVersion", format!("{version:?} is not a semantic version")));
    }
    if parts[0] != "1" {
        return Err(invalid("ociVersion", format!("unsupported version {version:?}: only 1.x is known")));
    }
    Ok(())
}

/// What this host or this runtime has no means for, and fields that contradict each other.
fn refuse_unsupported(
    spec: &Spec,
    linux: &Linux,
    namespaces: &Namespaces,
    facts: &HostFacts,
) -> Result<(), SpecError> {
    for (name, there) in [
        ("solaris", spec.solaris.is_some()),
        ("windows", spec.windows.is_some()),
        ("vm", spec.vm.is_some()),
        ("zos", spec.zos.is_some()),
        ("freebsd", spec.freebsd.is_some()),
        ("process.commandLine", spec.process.as_ref().is_some_and(|p| p.command_line.is_some())),
    ] {
        if there {
            return Err(unsupported(name, "this runtime makes Linux containers without a virtual machine"));
        }
    }
    if linux.intel_rdt.is_some() && facts.resctrl.is_none() {
        return Err(unsupported("linux.intelRdt", "no resctrl file system is mounted"));
    }
    let resources = linux.resources.as_ref();
    if let Some((field, why)) = resources.and_then(|r| keel_cgroup::cannot_be_set(r, facts.layout.mode)) {
        return Err(unsupported(format!("linux.resources.{field}"), why));
    }
    let mapped = !linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty();
    if mapped && !namespaces.has(NsKind::User) {
        return Err(invalid("linux.uidMappings", "needs a user namespace"));
    }
    if spec.mounts.iter().any(|m| m.destination.is_empty()) {
        return Err(invalid("mounts[].destination", "must not be empty"));
    }
    Ok(())
}

/// In the order of their names, so that a failure is the same one every time.
fn net_devices(linux: &Linux, namespaces: &Namespaces) -> Result<Vec<NetDevice>, SpecError> {
    if !linux.net_devices.is_empty() && !namespaces.has(NsKind::Net) {
        return Err(invalid("linux.netDevices", "needs a network namespace"));
    }
    let mut all: Vec<NetDevice> = Vec::new();
    for (host, device) in &linux.net_devices {
        let name = device.name.as_ref().filter(|n| !n.is_empty()).unwrap_or(host);
        for word in [host, name] {
            let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0';
            if word.is_empty()
                || word.len() > netdev::NAME_BYTES
                || matches!(word.as_str(), "." | "..")
                || word.contains(odd)
            {
                return Err(invalid("linux.netDevices", format!("{word:?} is not a device name")));
            }
        }
        let template = name.strip_suffix("%d").unwrap_or(name);
        if template.contains('%') || host.contains('%') {
            return Err(invalid(
                "linux.netDevices",
                format!("{name:?}: % is for a template that ends in %d"),
            ));
        }
        if template == name && all.iter().any(|d| d.name == *name) {
            return Err(invalid("linux.netDevices", format!("two devices have the name {name:?}")));
        }
        all.push(NetDevice { host: host.clone(), name: name.clone() });
    }
    Ok(all)
}

fn lower_namespaces(linux: &Linux, namespaces: &Namespaces, out: &mut Lowered) -> Result<(), SpecError> {
    for kind in &namespaces.new {
        // The cgroup namespace must be made after the join, the time namespace before its offsets are written.
        match kind {
            NsKind::Cgroup | NsKind::Time => {}
            _ => out.clone_flags |= kind.flag() as u64,
        }
    }
    if namespaces.is_new(NsKind::Time) {
        let mut lines = String::new();
        for (clock, offset) in &linux.time_offsets {
            if !matches!(clock.as_str(), "monotonic" | "boottime") {
                return Err(invalid("linux.timeOffsets", format!("unknown clock {clock:?}")));
            }
            lines.push_str(&format!("{clock} {} {}\n", offset.secs, offset.nanosecs));
        }
        out.time_offsets = Some(lines);
    } else if !linux.time_offsets.is_empty() {
        return Err(invalid("linux.timeOffsets", "needs a new time namespace"));
    }
    if namespaces.is_new(NsKind::User) {
        if linux.uid_mappings.is_empty() || linux.gid_mappings.is_empty() {
            return Err(invalid(
                "linux.uidMappings",
                "a new user namespace needs uidMappings and gidMappings",
            ));
        }
        out.id_maps = Some((linux.uid_mappings.clone(), linux.gid_mappings.clone()));
    }
    for (kind, path) in &namespaces.joined {
        match kind {
            NsKind::Pid | NsKind::Time => out.parent_joins.push((*kind, path.clone())),
            NsKind::User => out.user_join = Some(path.clone()),
            _ => out.child_joins.push((*kind, path.clone())),
        }
    }
    // The mount namespace last: it changes paths.
    out.child_joins.sort_by_key(|(kind, _)| *kind == NsKind::Mount);
    Ok(())
}

/// What comes before any mount.
fn early(
    spec: &Spec,
    request: &Request,
    namespaces: &Namespaces,
    out: &mut Lowered,
) -> Result<(), SpecError> {
    let ops = &mut out.ops;
    // While /proc is the host's and the file belongs to whoever runs this.
    if let Some(value) = spec.process.as_ref().and_then(|p| p.oom_score_adj) {
        ops.push(Op::OomScoreAdj { value });
    }
    if request.wait_for_cgroup {
        ops.push(Op::WaitCgroup);
    }
    ops.push(Op::JoinCgroup);
    ops.push(Op::ResetAffinity);
    for (slot, (kind, _)) in out.child_joins.iter().enumerate() {
        ops.push(Op::Join { kind: *kind, slot });
    }
    if namespaces.is_new(NsKind::User) {
        ops.push(Op::WaitIdMaps);
    }
    if namespaces.has(NsKind::User) {
        ops.push(Op::BecomeRoot { keep_groups: spec.keeps_groups() });
    }
    if namespaces.is_new(NsKind::Net) {
        ops.push(Op::LoopbackUp);
    }
    ops.push(Op::NotDumpable);
    ops.push(Op::NewSession);
    if !request.no_new_keyring {
        ops.push(session_keyring(&request.id)?);
    }
    if namespaces.is_new(NsKind::Cgroup) {
        ops.push(Op::Unshare { kind: NsKind::Cgroup });
    }
    ops.push(Op::PrivateProcfs);
    Ok(())
}

pub(crate) fn session_keyring(id: &str) -> Result<Op, SpecError> {
    Ok(Op::SessionKeyring { name: c_string("id", &format!("_ses.{id}"))? })
}

/// Names and kernel parameters of the new namespaces.
fn identity(spec: &Spec, linux: &Linux, namespaces: &Namespaces, ops: &mut Vec<Op>) -> Result<(), SpecError> {
    let named = |name: &Option<String>| name.clone().filter(|n| !n.is_empty());
    if let Some(name) = named(&spec.hostname) {
        if !namespaces.has(NsKind::Uts) {
            return Err(invalid("hostname", "unable to set hostname without a private UTS namespace"));
        }
        ops.push(Op::Hostname { name });
    }
    if let Some(name) = named(&spec.domainname) {
        if !namespaces.has(NsKind::Uts) {
            return Err(invalid("domainname", "unable to set domainname without a private UTS namespace"));
        }
        ops.push(Op::Domainname { name });
    }
    for (key, value) in &linux.sysctl {
        check_sysctl(key, namespaces)?;
        check_name_sysctl(spec, key, value)?;
        // Dots separate, unless the key is written with slashes already.
        let path = if key.contains('/') { key.clone() } else { key.replace('.', "/") };
        let path = c_string("linux.sysctl", &format!("sys/{path}"))?;
        ops.push(Op::Sysctl { path, value: value.clone() });
    }
    Ok(())
}

/// The namespace that a parameter belongs to.
fn sysctl_namespace(key: &str) -> Option<NsKind> {
    const IPC: [&str; 12] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_next_id",
        "kernel.shm_rmid_forced",
        "kernel.auto_msgmni",
        "kernel.msg_next_id",
        "kernel.sem_next_id",
    ];
    let dotted = key.replace('/', ".");
    Some(match dotted.as_str() {
        key if IPC.contains(&key) || key.starts_with("fs.mqueue.") => NsKind::Ipc,
        key if key.starts_with("net.") => NsKind::Net,
        key if key.starts_with("user.") => NsKind::User,
        "kernel.domainname" | "kernel.hostname" => NsKind::Uts,
        _ => return None,
    })
}

/// Only parameters that belong to a namespace of the container may be set.
fn check_sysctl(key: &str, namespaces: &Namespaces) -> Result<(), SpecError> {
    if key.split(['.', '/']).any(|part| part.is_empty()) {
        return Err(invalid("linux.sysctl", format!("{key:?} is not a parameter name")));
    }
    let needs = sysctl_namespace(key)
        .ok_or_else(|| invalid("linux.sysctl", format!("{key:?} is not in a separate kernel namespace")))?;
    if !namespaces.has(needs) {
        return Err(invalid(
            "linux.sysctl",
            format!("{key:?} is not allowed in the host's {} namespace", needs.spec_name()),
        ));
    }
    Ok(())
}

/// A name that two fields set is set by one of them in silence.
fn check_name_sysctl(spec: &Spec, key: &str, value: &str) -> Result<(), SpecError> {
    let (field, other) = match key.replace('/', ".").as_str() {
        "kernel.hostname" => ("hostname", None),
        "kernel.domainname" => ("domainname", spec.domainname.as_deref().or(Some(""))),
        _ => return Ok(()),
    };
    match other {
        Some(name) if name.is_empty() || name == value => Ok(()),
        _ => {
            Err(invalid("linux.sysctl", format!("{key:?} conflicts with the field {field:?}: use that one")))
        }
    }
}

/// The specification's rules, then those for the devices that every container has. What no rule names is denied, also where
/// there is no rule: whoever wants all devices says so.
fn device_rules(linux: &Linux, facts: &HostFacts) -> Vec<DeviceSpec> {
    if facts.euid != 0 {
        // An ordinary user has no right to the rules, and its user namespace no right to devices.
        return Vec::new();
    }
    let given = linux.resources.as_ref().map_or(&[][..], |r| r.devices.as_slice());
    let rule = |kind: &str, major: i64, minor: Option<i64>, access: &str| DeviceSpec {
        allow: true,
        kind: Some(kind.to_owned()),
        major: Some(major),
        minor,
        access: Some(access.to_owned()),
    };
    let mut rules = Vec::new();
    if !given.first().is_some_and(|first| DeviceRule::from_spec(first).is_ok_and(|rule| rule.is_everything()))
    {
        rules.push(DeviceSpec { access: Some("rwm".to_owned()), ..DeviceSpec::default() });
    }
    rules.extend_from_slice(given);
    // mknod of any device is harmless without the right to open it.
    rules.push(rule("c", -1, None, "m"));
    rules.push(rule("b", -1, None, "m"));
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)] {
        rules.push(rule("c", major, Some(minor), "rwm"));
    }
    rules.push(rule("c", 136, None, "rwm"));
    rules
}

/// A hook without an environment of its own gets `inherited`: in the container that of its process, else the runtime's.
pub(crate) fn lower_hook(field: &str, hook: &Hook, inherited: &[String]) -> Result<HookProgram, SpecError> {
    if !hook.path.starts_with('/') {
        return Err(invalid(format!("{field}.path"), format!("{:?} is not absolute", hook.path)));
    }
    if hook.timeout.is_some_and(|t| t <= 0) {
        return Err(invalid(format!("{field}.timeout"), "must be greater than zero"));
    }
    let nul = || invalid(field, "contains a NUL byte");
    let args = if hook.args.is_empty() { vec![hook.path.clone()] } else { hook.args.clone() };
    Ok(HookProgram {
        path: c_string(field, &hook.path)?,
        args: StringArray::new(&args).ok_or_else(nul)?,
        env: StringArray::new(hook.env.as_deref().unwrap_or(inherited)).ok_or_else(nul)?,
        home_of: None,
        timeout_ms: hook.timeout.map(|t| t.saturating_mul(1000).min(i64::from(i32::MAX)) as i32),
    })
}

/// A set of capabilities, reduced to what can be given. Unknown names are collected, the rest becomes warnings.
pub(crate) fn capability_set(
    names: &[String],
    facts: &HostFacts,
    unknown: &mut BTreeSet<String>,
    warnings: &mut Vec<String>,
) -> u64 {
    let mut set = 0;
    for name in names {
        match names::capability(name) {
            Some(n) if facts.capabilities & (1 << n) != 0 => set |= 1 << n,
            Some(_) => {
                let warning = format!("capability {name} cannot be granted here and is left out");
                if !warnings.contains(&warning) {
                    warnings.push(warning);
                }
            }
            None => {
                unknown.insert(name.clone());
            }
        }
    }
    set
}

#[cfg(test)]
pub(crate) mod tests;
