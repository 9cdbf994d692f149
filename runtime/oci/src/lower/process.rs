//! From a container with a file system to a running program; the same for `exec`.

use super::{HostFacts, SpecError, c_string, capability_set, invalid, lower_hook, unsupported};
use crate::names;
use crate::op::{Op, StringArray};
use crate::seccomp;
use crate::spec::{Hook, IoPriority, Linux, MemoryPolicy, Personality, Process, Scheduler, User};
use keel_sys::cred::{Capabilities, NO_ID};
use keel_sys::process::SchedAttr;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;

/// What a process is started into.
pub struct ProcessContext<'a> {
    pub linux: Option<&'a Linux>,
    pub facts: &'a HostFacts,
    pub user_namespace: bool,
    pub preserve_fds: u32,
    pub listen_fds: Option<u32>,
    /// `startContainer`.
    pub hooks: &'a [Hook],
    /// A further process of a running container: there is no start to wait for.
    pub exec: bool,
    /// The caller's additional groups stay.
    pub keep_groups: bool,
}

pub fn lower_process(
    process: &Process,
    context: &ProcessContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<Op>, SpecError> {
    let mut ops = Vec::new();
    limits(process, context, &mut ops)?;
    let path = search_path(&process.env)?;
    let name = process.args.first().ok_or_else(|| invalid("process.args", "must not be empty"))?;
    ops.push(Op::OwnStdio { uid: process.user.uid });
    ops.push(Op::FindExecutable { name: c_string("process.args", name)?, path: path.clone() });
    labels(process, context, &mut ops)?;
    ops.push(Op::CloseUnneeded { first: 3 + context.preserve_fds });
    let mut descent = Vec::new();
    privileges(process, context, warnings, &mut descent)?;
    // A listener learns of the container with its creation, so its filter comes then.
    let listener = context.linux.and_then(|l| l.seccomp.as_ref()).is_some_and(|s| s.listener().is_some());
    let early = listener && !context.exec;
    if early {
        ops.append(&mut descent);
    }
    ops.push(Op::Ready);
    // Its program is the image's: it gets no more rights than the container's process, and the same filter.
    ops.append(&mut descent);
    for (i, hook) in context.hooks.iter().enumerate() {
        let mut program = lower_hook(&format!("hooks.startContainer[{i}]"), hook, &process.env)?;
        let has_home = process.env.iter().any(|e| e.starts_with("HOME="));
        program.home_of = (hook.env.is_none() && !has_home).then_some(process.user.uid);
        ops.push(Op::Hook { program, kind: "startContainer", number: i });
    }
    ops.push(exec(process, path, context.listen_fds)?);
    Ok(ops)
}

/// The directory list for a program name without a slash.
fn search_path(env: &[String]) -> Result<Option<CString>, SpecError> {
    let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH="));
    path.map(|p| c_string("process.env", p)).transpose()
}

fn limits(process: &Process, context: &ProcessContext<'_>, ops: &mut Vec<Op>) -> Result<(), SpecError> {
    let mut seen = Vec::new();
    for limit in &process.rlimits {
        let (resource, name) = names::rlimit(&limit.kind)
            .ok_or_else(|| invalid("process.rlimits", format!("unknown type {:?}", limit.kind)))?;
        if seen.contains(&resource) {
            return Err(invalid("process.rlimits", format!("{name} is given twice")));
        }
        seen.push(resource);
        ops.push(Op::Rlimit { name, resource, soft: limit.soft, hard: limit.hard });
    }
    if let Some(scheduler) = &process.scheduler {
        let cpu = context.linux.and_then(|l| l.resources.as_ref()).and_then(|r| r.cpu.as_ref());
        let confined = cpu.and_then(|c| c.cpus.as_ref()).is_some_and(|cpus| !cpus.is_empty());
        ops.push(Op::Scheduler { attr: lower_scheduler(scheduler)?, confined });
    }
    if let Some(priority) = &process.io_priority {
        ops.push(lower_io_priority(priority)?);
    }
    if let Some(personality) = context.linux.and_then(|l| l.personality.as_ref()) {
        ops.push(lower_personality(personality)?);
    }
    if let Some(policy) = context.linux.and_then(|l| l.memory_policy.as_ref()) {
        ops.push(lower_memory_policy(policy)?);
    }
    if context.exec
        && let Some(affinity) = &process.exec_cpu_affinity
    {
        ops.extend(lower_affinity("process.execCPUAffinity.final", affinity.last.as_deref())?);
    }
    Ok(())
}

/// The mask of a list of CPUs, as programs for it take it.
pub fn affinity_mask(list: &str) -> Option<String> {
    let mask = names::number_list(list).filter(|m| !m.is_empty())?;
    let hex: String = mask.iter().rev().map(|word| format!("{word:016x}")).collect();
    Some(format!("0x{}", hex.trim_start_matches('0')))
}

pub(crate) fn lower_affinity(field: &str, list: Option<&str>) -> Result<Option<Op>, SpecError> {
    let Some(list) = list.filter(|l| !l.is_empty()) else { return Ok(None) };
    let mask = names::number_list(list).filter(|m| !m.is_empty());
    let mask = mask.ok_or_else(|| invalid(field, format!("{list:?} is not a list of CPUs")))?;
    Ok(Some(Op::Affinity { mask }))
}

fn lower_scheduler(s: &Scheduler) -> Result<SchedAttr, SpecError> {
    let policy = match s.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(invalid("process.scheduler.policy", format!("unknown policy {other:?}"))),
    };
    let mut flags = 0;
    for flag in &s.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(invalid("process.scheduler.flags", format!("unknown flag {other:?}"))),
        };
    }
    if s.policy == "SCHED_DEADLINE" {
        check_deadline(s)?;
    }
    let priority = u32::try_from(s.priority)
        .map_err(|_| invalid("process.scheduler.priority", "must not be negative"))?;
    Ok(SchedAttr {
        size: 0,
        policy,
        flags,
        nice: s.nice,
        priority,
        runtime: s.runtime.unwrap_or(0),
        deadline: s.deadline.unwrap_or(0),
        period: s.period.unwrap_or(0),
    })
}

/// The kernel answers all of these with the same number.
fn check_deadline(s: &Scheduler) -> Result<(), SpecError> {
    // Below it the kernel's clock is too coarse, above it its sums overflow.
    const RUNTIME: std::ops::RangeInclusive<u64> = 1024..=(1 << 63) - 1;
    let wrong = |problem: String| {
        Err(invalid("process.scheduler", format!("sched_setattr: `SCHED_DEADLINE` {problem}")))
    };
    let Some(runtime) = s.runtime else { return wrong("requires `runtime`".to_owned()) };
    let Some(deadline) = s.deadline else { return wrong("requires `deadline`".to_owned()) };
    if runtime == 0 {
        return wrong("runtime must be greater than 0".to_owned());
    }
    if !RUNTIME.contains(&runtime) {
        return wrong(format!("runtime {runtime} must be between {} and {}", RUNTIME.start(), RUNTIME.end()));
    }
    if runtime > deadline {
        return wrong(format!("runtime {runtime} must be <= deadline {deadline}"));
    }
    match s.period.filter(|p| *p != 0) {
        Some(period) if deadline > period => wrong(format!("deadline {deadline} must be <= period {period}")),
        _ => Ok(()),
    }
}

fn lower_io_priority(p: &IoPriority) -> Result<Op, SpecError> {
    let class = match p.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => return Err(invalid("process.ioPriority.class", format!("unknown class {other:?}"))),
    };
    let level = u32::try_from(p.priority).ok().filter(|l| *l < 8);
    let level = level.ok_or_else(|| invalid("process.ioPriority.priority", "is not between 0 and 7"))?;
    Ok(Op::IoPriority { class, level })
}

fn lower_personality(p: &Personality) -> Result<Op, SpecError> {
    if !p.flags.is_empty() {
        return Err(unsupported("linux.personality.flags", "the specification defines none"));
    }
    match p.domain.as_str() {
        "LINUX" => Ok(Op::Personality { value: 0 }),
        "LINUX32" => Ok(Op::Personality { value: 8 }),
        other => Err(invalid("linux.personality.domain", format!("unknown domain {other:?}"))),
    }
}

fn lower_memory_policy(p: &MemoryPolicy) -> Result<Op, SpecError> {
    let mut mode = match p.mode.as_str() {
        "MPOL_DEFAULT" => 0,
        "MPOL_PREFERRED" => 1,
        "MPOL_BIND" => 2,
        "MPOL_INTERLEAVE" => 3,
        "MPOL_LOCAL" => 4,
        "MPOL_PREFERRED_MANY" => 5,
        "MPOL_WEIGHTED_INTERLEAVE" => 6,
        other => {
            return Err(invalid("linux.memoryPolicy.mode", format!("invalid memory policy mode {other:?}")));
        }
    };
    for flag in &p.flags {
        mode |= match flag.as_str() {
            "MPOL_F_STATIC_NODES" => 1 << 15,
            "MPOL_F_RELATIVE_NODES" => 1 << 14,
            "MPOL_F_NUMA_BALANCING" => 1 << 13,
            other => {
                return Err(invalid(
                    "linux.memoryPolicy.flags",
                    format!("invalid memory policy flag {other:?}"),
                ));
            }
        };
    }
    let nodes = names::number_list(&p.nodes).ok_or_else(|| {
        invalid("linux.memoryPolicy.nodes", format!("invalid memory policy node list {:?}", p.nodes))
    })?;
    let count: u32 = nodes.iter().map(|word| word.count_ones()).sum();
    if matches!(mode, 0 | 4) && count != 0 {
        let problem = format!("mode requires 0 nodes but got {count}");
        return Err(invalid("linux.memoryPolicy.nodes", problem));
    }
    Ok(Op::MemoryPolicy { mode, nodes })
}

/// Labels of the security modules, for the exec to come.
fn labels(process: &Process, context: &ProcessContext<'_>, ops: &mut Vec<Op>) -> Result<(), SpecError> {
    let given = |label: &Option<String>| label.clone().filter(|l| !l.is_empty());
    if let Some(profile) = given(&process.apparmor_profile)
        && profile != "unconfined"
    {
        if !context.facts.apparmor {
            return Err(unsupported("process.apparmorProfile", "AppArmor is not enabled on this host"));
        }
        let file = CString::from(c"attr/apparmor/exec");
        ops.push(Op::ExecLabel { file, label: format!("exec {profile}") });
    }
    if let Some(label) = given(&process.selinux_label) {
        if !context.facts.selinux {
            return Err(unsupported("process.selinuxLabel", "SELinux is not enabled on this host"));
        }
        ops.push(Op::ExecLabel { file: CString::from(c"attr/exec"), label });
    }
    Ok(())
}

/// The descent from root of the container to the user's rights. Each step gives up what the next no longer needs.
fn privileges(
    process: &Process,
    context: &ProcessContext<'_>,
    warnings: &mut Vec<String>,
    ops: &mut Vec<Op>,
) -> Result<(), SpecError> {
    let filter = context.linux.and_then(|l| l.seccomp.as_ref()).map(seccomp::compile).transpose()?;
    let mut filter = filter.map(|f| Op::Seccomp { filter: Box::new(f) });
    if process.no_new_privileges {
        ops.push(Op::NoNewPrivileges);
    }
    let caps = process.capabilities.clone().unwrap_or_default();
    let mut unknown = BTreeSet::new();
    let mut set = |names: &[String]| capability_set(names, context.facts, &mut unknown, warnings);
    let bounding = set(&caps.bounding);
    let permitted = set(&caps.permitted);
    let effective = set(&caps.effective);
    let inheritable = set(&caps.inheritable);
    let ambient = set(&caps.ambient);
    let unknown: Vec<String> = unknown.into_iter().collect();
    let ignored = format!("ignoring unknown or unavailable capabilities: [{}]", unknown.join(" "));
    if inheritable & !bounding != 0 {
        // The kernel says so too, but only when the container is started.
        let problem = "operation not permitted: holds more than process.capabilities.bounding";
        let cause = if unknown.is_empty() { String::new() } else { format!(" ({ignored})") };
        return Err(invalid("process.capabilities.inheritable", format!("{problem}{cause}")));
    }
    if !unknown.is_empty() {
        warnings.push(ignored);
    }
    for name in &caps.ambient {
        let bit = names::capability(name).map_or(0, |n| 1 << n);
        if ambient & bit & !(permitted & inheritable) != 0 {
            warnings
                .push(format!("can't raise ambient capability {name}: it is not permitted and inheritable"));
        }
    }
    ops.push(Op::WorkingDirectory { path: cwd(process)?, early: true });
    ops.push(Op::BoundingSet { keep: bounding, last: context.facts.last_capability });
    ops.push(Op::KeepCapabilities);
    let user = &process.user;
    check_ids(user)?;
    if !context.keep_groups {
        ops.push(Op::Groups { gids: user.additional_gids.clone() });
    }
    ops.push(Op::Gid { gid: user.gid });
    ops.push(Op::Uid { uid: user.uid });
    ops.push(Op::WorkingDirectory { path: cwd(process)?, early: false });
    if !process.no_new_privileges
        && let Some(filter) = filter.take()
    {
        // Without no_new_privs the filter needs a capability, which goes right after it: as little as can be of this
        // descent is left for the filter to forbid.
        let admin = 1 << names::CAP_SYS_ADMIN;
        let permitted = permitted | inheritable | admin;
        ops.push(Op::Capabilities { caps: Capabilities { effective: admin, permitted, inheritable: 0 } });
        ops.push(filter);
    }
    ops.push(Op::Capabilities {
        caps: Capabilities { effective: effective & permitted, permitted, inheritable },
    });
    if ambient != 0 {
        ops.push(Op::Ambient { caps: ambient & permitted & inheritable });
    }
    ops.push(Op::Umask { mask: user.umask.unwrap_or(0o022) & 0o777 });
    ops.extend(filter);
    Ok(())
}

fn check_ids(user: &User) -> Result<(), SpecError> {
    for (field, ids) in [
        ("process.user.uid", &[user.uid][..]),
        ("process.user.gid", &[user.gid]),
        ("process.user.additionalGids", &user.additional_gids),
    ] {
        if ids.contains(&NO_ID) {
            return Err(invalid(field, format!("{NO_ID} is the number for no id")));
        }
    }
    if user.username.as_deref().is_some_and(|name| !name.is_empty()) {
        return Err(unsupported("process.user.username", "it is for Windows; Linux takes uid and gid"));
    }
    Ok(())
}

fn cwd(process: &Process) -> Result<CString, SpecError> {
    if !process.cwd.starts_with('/') {
        return Err(invalid("process.cwd", format!("{:?} must be an absolute path", process.cwd)));
    }
    c_string("process.cwd", &process.cwd)
}

fn exec(process: &Process, path: Option<CString>, listen_fds: Option<u32>) -> Result<Op, SpecError> {
    let nul = |field: &'static str| move || invalid(field, "contains a NUL byte");
    for entry in &process.env {
        if entry.split_once('=').is_none_or(|(key, _)| key.is_empty()) {
            return Err(invalid("process.env", format!("{entry:?} is not NAME=VALUE")));
        }
    }
    let mut env = last_of_each(&process.env);
    // An empty one is as good as none.
    env.retain(|e| e != "HOME=");
    let has_home = env.iter().any(|e| e.starts_with("HOME="));
    if let Some(count) = listen_fds {
        env.retain(|e| !e.starts_with("LISTEN_FDS=") && !e.starts_with("LISTEN_PID="));
        env.push(format!("LISTEN_FDS={count}"));
    }
    Ok(Op::Exec {
        args: StringArray::new(&process.args).ok_or_else(nul("process.args"))?,
        env: StringArray::new(&env).ok_or_else(nul("process.env"))?,
        path,
        home_of: (!has_home).then_some(process.user.uid),
        listen_pid: listen_fds.is_some(),
    })
}

/// Of a name that is given more than once the last value, in the place of the first: programs differ in which they take.
fn last_of_each(env: &[String]) -> Vec<String> {
    let mut places = BTreeMap::new();
    let mut out: Vec<String> = Vec::with_capacity(env.len());
    for entry in env {
        let name = entry.split_once('=').map_or(entry.as_str(), |(name, _)| name);
        match places.get(name) {
            Some(&place) => {
                let old: &mut String = &mut out[place];
                old.clone_from(entry);
            }
            None => {
                places.insert(name, out.len());
                out.push(entry.clone());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_name_counts() {
        let env = ["A=1", "B=2", "A=3", "AB=4", "A="].map(str::to_owned);
        assert_eq!(last_of_each(&env), ["A=", "B=2", "AB=4"]);
    }
}
