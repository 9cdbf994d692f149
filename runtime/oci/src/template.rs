//! Texts of the `spec` and `features` commands. Plain text: a document model only for these would cost more than all
//! other uses of JSON in the program.

use crate::names;
use std::fmt::Write;

/// A `config.json` to begin with. On v1 a container sees its place in the hierarchies, as other runtimes have it.
pub fn config(rootless: bool, unified: bool) -> String {
    const CAPS: &str = r#"["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]"#;
    // The network namespace of an ordinary user stays the caller's, whose sysfs can only be bound; one group is all
    // that is mapped.
    let (sys, gid, namespaces, maps) = if rootless {
        (
            r#""type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]"#,
            "",
            ["pid", "ipc", "uts", "mount", "cgroup", "user"],
            format!(
                r#"
        "uidMappings": [{{"containerID": 0, "hostID": {}, "size": 1}}],
        "gidMappings": [{{"containerID": 0, "hostID": {}, "size": 1}}],"#,
                keel_sys::process::geteuid(),
                keel_sys::process::getegid()
            ),
        )
    } else {
        (
            r#""type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]"#,
            r#", "gid=5""#,
            ["pid", "network", "ipc", "uts", "mount", "cgroup"],
            "\n        \"resources\": {\"devices\": [{\"allow\": false, \"access\": \"rwm\"}]},".to_owned(),
        )
    };
    let namespaces = namespaces.iter().filter(|n| unified || **n != "cgroup");
    let namespaces: Vec<String> = namespaces.map(|n| format!("{{\"type\": \"{n}\"}}")).collect();
    let namespaces = namespaces.join(", ");
    format!(
        r#"{{
    "ociVersion": "1.3.0",
    "process": {{
        "terminal": true,
        "user": {{"uid": 0, "gid": 0}},
        "args": ["sh"],
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {{
            "bounding": {CAPS},
            "effective": {CAPS},
            "permitted": {CAPS}
        }},
        "rlimits": [{{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}}],
        "noNewPrivileges": true
    }},
    "root": {{"path": "rootfs", "readonly": true}},
    "hostname": "keel",
    "mounts": [
        {{"destination": "/proc", "type": "proc", "source": "proc"}},
        {{"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}},
        {{"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"{gid}]}},
        {{"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}},
        {{"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"]}},
        {{"destination": "/sys", {sys}}},
        {{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}}
    ],
    "linux": {{{maps}
        "namespaces": [{namespaces}],
        "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
    }}
}}
"#
    )
}

/// A JSON list of words that need no escapes.
fn list<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::new();
    for word in words {
        let _ = write!(out, "{}\"{word}\"", if out.is_empty() { "" } else { ", " });
    }
    format!("[{out}]")
}

/// The features document of the specification.
pub fn features() -> String {
    const HOOKS: &str = "prestart createRuntime createContainer startContainer poststart poststop";
    const MOUNT_OPTIONS: &str = "async atime bind defaults dev diratime dirsync exec idmap iversion lazytime loud mand \
        noatime nodev nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow \
        private ratime rbind rdev rdiratime relatime remount rexec ridmap rnoatime rnodev rnodiratime rnoexec \
        rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw rshared rslave rstrictatime \
        rsuid rsymfollow runbindable rw shared silent slave strictatime suid symfollow sync tmpcopyup unbindable";
    const NAMESPACES: &str = "cgroup ipc mount network pid time user uts";
    const ACTIONS: &str = "SCMP_ACT_ALLOW SCMP_ACT_ERRNO SCMP_ACT_KILL SCMP_ACT_KILL_PROCESS SCMP_ACT_KILL_THREAD \
        SCMP_ACT_LOG SCMP_ACT_NOTIFY SCMP_ACT_TRACE SCMP_ACT_TRAP";
    const OPERATORS: &str =
        "SCMP_CMP_EQ SCMP_CMP_GE SCMP_CMP_GT SCMP_CMP_LE SCMP_CMP_LT SCMP_CMP_MASKED_EQ SCMP_CMP_NE";
    const ARCHS: &str = "SCMP_ARCH_AARCH64 SCMP_ARCH_X32 SCMP_ARCH_X86 SCMP_ARCH_X86_64";
    const FLAGS: &str = "SECCOMP_FILTER_FLAG_LOG SECCOMP_FILTER_FLAG_SPEC_ALLOW SECCOMP_FILTER_FLAG_TSYNC \
        SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";
    const MODES: &str = "MPOL_BIND MPOL_DEFAULT MPOL_INTERLEAVE MPOL_LOCAL MPOL_PREFERRED MPOL_PREFERRED_MANY \
        MPOL_WEIGHTED_INTERLEAVE";
    const MODE_FLAGS: &str = "MPOL_F_NUMA_BALANCING MPOL_F_RELATIVE_NODES MPOL_F_STATIC_NODES";
    let words = |text: &'static str| list(text.split_whitespace());
    let caps: Vec<String> = names::capability_names().collect();
    format!(
        r#"{{
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.3.0",
    "hooks": {hooks},
    "mountOptions": {options},
    "linux": {{
        "namespaces": {namespaces},
        "capabilities": {caps},
        "cgroup": {{"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true}},
        "seccomp": {{
            "enabled": true,
            "actions": {actions},
            "operators": {operators},
            "archs": {archs},
            "knownFlags": {flags},
            "supportedFlags": {flags}
        }},
        "apparmor": {{"enabled": true}},
        "selinux": {{"enabled": true}},
        "intelRdt": {{"enabled": true, "schemata": true, "monitoring": true}},
        "memoryPolicy": {{"modes": {modes}, "flags": {mode_flags}}},
        "netDevices": {{"enabled": true}},
        "mountExtensions": {{"idmap": {{"enabled": true}}}}
    }},
    "potentiallyUnsafeConfigAnnotations": ["org.systemd.property."]
}}"#,
        hooks = words(HOOKS),
        options = words(MOUNT_OPTIONS),
        namespaces = words(NAMESPACES),
        caps = list(caps.iter().map(String::as_str)),
        actions = words(ACTIONS),
        operators = words(OPERATORS),
        archs = words(ARCHS),
        flags = words(FLAGS),
        modes = words(MODES),
        mode_flags = words(MODE_FLAGS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Spec;

    #[test]
    fn both_texts_are_documents() {
        for rootless in [false, true] {
            let spec: Spec = serde_json::from_str(&config(rootless, rootless)).unwrap();
            assert_eq!(spec.linux.unwrap().uid_mappings.len(), usize::from(rootless));
        }
        let features: serde_json::Value = serde_json::from_str(&features()).unwrap();
        assert_eq!(features["linux"]["capabilities"].as_array().unwrap().len(), 41);
    }
}
