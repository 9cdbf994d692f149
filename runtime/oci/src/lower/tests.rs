use super::*;
use keel_cgroup::{Hierarchy, Mode};

pub(crate) fn facts(mode: Mode) -> HostFacts {
    let hierarchy = |controllers: &[&str], mount: &str| Hierarchy {
        controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
        mount: mount.into(),
        own: "/".to_owned(),
    };
    let layout = match mode {
        Mode::V2 => Layout { mode, v1: vec![], v2: Some(hierarchy(&[], "/sys/fs/cgroup")) },
        _ => Layout {
            mode,
            v1: vec![
                hierarchy(&["memory"], "/sys/fs/cgroup/memory"),
                hierarchy(&["cpu", "cpuacct"], "/sys/fs/cgroup/cpu,cpuacct"),
            ],
            v2: None,
        },
    };
    HostFacts {
        layout,
        capabilities: !(1 << 24) & ((1 << 41) - 1),
        last_capability: 40,
        euid: 0,
        apparmor: false,
        selinux: false,
        resctrl: None,
    }
}

pub(crate) fn request() -> Request {
    Request {
        id: "c".to_owned(),
        rootfs: "/b/rootfs".to_owned(),
        cgroup: "/c".to_owned(),
        ..Request::default()
    }
}

/// Merges `extra` into a minimal document and lowers it.
fn lowered(extra: &str, mode: Mode) -> Result<Lowered, SpecError> {
    let mut document = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "env": ["PATH=/bin"]},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
    });
    let extra: serde_json::Value = serde_json::from_str(extra).unwrap();
    merge(&mut document, extra);
    let spec: Spec = serde_json::from_value(document).unwrap();
    lower(&spec, &request(), &facts(mode))
}

fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
    match (into, from) {
        (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// Operations that match the words, one a line, as `Debug` prints them.
fn golden(extra: &str, mode: Mode, words: &[&str]) -> String {
    let lowered = lowered(extra, mode).unwrap();
    lowered
        .ops
        .iter()
        .map(|op| format!("{op:?}\n"))
        .filter(|line| words.iter().any(|w| line.starts_with(w)))
        .collect()
}

fn names(ops: &[Op]) -> Vec<String> {
    let name = |op| format!("{op:?}").split([' ', '{']).next().unwrap_or("").to_owned();
    ops.iter().map(name).collect()
}

fn error(extra: &str) -> String {
    match lowered(extra, Mode::V1) {
        Ok(_) => panic!("accepted: {extra}"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn the_order_of_a_minimal_container() {
    let lowered = lowered("{}", Mode::V1).unwrap();
    assert_eq!(
        names(&lowered.ops).join(" "),
        "JoinCgroup ResetAffinity NotDumpable NewSession SessionKeyring PrivateProcfs Propagation BindRoot \
         DeviceNode DeviceNode DeviceNode DeviceNode DeviceNode DeviceNode \
         Symlink Symlink Symlink Symlink Symlink Directory PivotRoot OwnStdio FindExecutable CloseUnneeded Ready \
         WorkingDirectory BoundingSet KeepCapabilities Groups Gid Uid WorkingDirectory Capabilities Umask Exec"
    );
    assert_eq!(lowered.clone_flags, (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64);
    assert!(lowered.own_pid_namespace);
}

#[test]
fn joined_namespaces_go_to_the_side_that_can_join_them() {
    let lowered = lowered(
        r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"pid","path":"/p"},{"type":"network","path":"/n"},
        {"type":"uts","path":"/u"},{"type":"user","path":"/s"},{"type":"cgroup"}]}}"#,
        Mode::V1,
    )
    .unwrap();
    assert_eq!(lowered.parent_joins, [(NsKind::Pid, "/p".to_owned())]);
    let kinds: Vec<_> = lowered.child_joins.iter().map(|(k, _)| *k).collect();
    assert_eq!(kinds, [NsKind::Net, NsKind::Uts]);
    assert_eq!(lowered.user_join.as_deref(), Some("/s"));
    assert_eq!(lowered.clone_flags, libc::CLONE_NEWNS as u64);
    assert!(!lowered.own_pid_namespace);
    let words = names(&lowered.ops);
    let at = |w: &str| words.iter().position(|x| x == w).unwrap();
    assert!(at("JoinCgroup") < at("Unshare"), "the cgroup namespace begins at the container's cgroup");
}

#[test]
fn bind_mount_options() {
    let text = golden(
        r#"{"mounts":[{"destination":"/data","source":"/srv","type":"bind",
        "options":["rbind","rprivate","ro","nosuid","rnoexec"]}]}"#,
        Mode::V1,
        &["Bind {"],
    );
    assert_eq!(
        text,
        "Bind { source: \"/srv\", target: Target { path: /data, real: false, link: false }, recursive: true, follow: true, \
         attr: Attr { set: 3, clear: 0, propagation: 0, userns_fd: 0 }, loses: 2097164, \
         tree_attr: Attr { set: 8, clear: 0, propagation: 0, userns_fd: 0 }, \
         propagation: 262144, propagate_tree: true, only_procfs: false, idmap: None, outside: false }\n"
    );
}

#[test]
fn paths_to_be_protected_are_absolute() {
    for field in ["maskedPaths", "readonlyPaths"] {
        let text = error(&format!(r#"{{"linux":{{"namespaces":[{{"type":"mount"}}],"{field}":["../x"]}}}}"#));
        assert!(text.contains(field) && text.contains("not absolute"), "{text}");
    }
}

#[test]
fn a_tmpfs_that_is_copied_up_turns_read_only_after_the_copy() {
    let text = golden(
        r#"{"mounts":[{"destination":"/var","type":"tmpfs","source":"t",
        "options":["ro","nodev","tmpcopyup","size=1m"]}]}"#,
        Mode::V1,
        &["FileSystem {"],
    );
    assert_eq!(
        text,
        "FileSystem { kind: \"tmpfs\", target: Target { path: /var, real: false, link: false }, options: \
         [FsOption { key: \"source\", value: Some(\"t\") }, FsOption { key: \"size\", value: Some(\"1m\") }], \
         attr: 4, propagation: 0, copy_up: true, read_only_after: true }\n"
    );
}

#[test]
fn the_cgroup_mount_by_layout() {
    let mount = r#"{"mounts":[{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro"]}],
        "linux":{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"cgroup"}]}}"#;
    let v1 = lowered(mount, Mode::V1).unwrap();
    let words: Vec<String> = names(&v1.ops)
        .into_iter()
        .skip_while(|w| w != "FileSystem")
        .take_while(|w| w != "DeviceNode")
        .collect();
    assert_eq!(words.join(" "), "FileSystem FileSystem FileSystem Symlink Symlink Remount");
    let v2 = golden(mount, Mode::V2, &["FileSystem {"]);
    assert!(v2.starts_with("FileSystem { kind: \"cgroup2\""), "{v2}");
    // Without a cgroup namespace the container sees its own cgroup, bound.
    let own = golden(&mount.replace(r#",{"type":"cgroup"}"#, ""), Mode::V2, &["Bind {"]);
    assert!(own.starts_with("Bind { source: \"/sys/fs/cgroup/c\""), "{own}");
}

#[test]
fn mounts_that_would_hide_or_forge_proc_are_refused() {
    for (mount, word) in [
        (r#"{"destination":"/proc","type":"tmpfs"}"#, "over /proc"),
        (
            r#"{"destination":"/proc/self/attr","type":"bind","source":"/x","options":["bind"]}"#,
            "below /proc",
        ),
        (r#"{"destination":"/proc/../proc/sys","type":"tmpfs"}"#, "below /proc"),
        (r#"{"destination":"/","type":"tmpfs"}"#, "over the root"),
        (r#"{"destination":"/a"}"#, "needs a type"),
        (r#"{"destination":"/a","type":"bind"}"#, "needs a source"),
    ] {
        let text = error(&format!(r#"{{"mounts":[{mount}]}}"#));
        assert!(text.contains(word), "{mount}: {text}");
    }
    let lxcfs = r#"{"mounts":[{"destination":"/proc/cpuinfo","source":"/x","options":["bind"]}]}"#;
    assert!(lowered(lxcfs, Mode::V1).is_ok());
}

#[test]
fn proc_and_sysfs_want_real_directories() {
    let text = golden(
        r#"{"mounts":[{"destination":"/proc","type":"proc"},{"destination":"/sys","type":"sysfs"}]}"#,
        Mode::V1,
        &["FileSystem {"],
    );
    assert_eq!(text.matches("real: true").count(), 2, "{text}");
}

#[test]
fn the_filter_comes_as_late_as_the_right_to_install_it_allows() {
    let seccomp = r#""linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}}"#;
    let order = |nnp: bool| {
        let lowered = lowered(&format!(r#"{{"process":{{"noNewPrivileges":{nnp}}},{seccomp}}}"#), Mode::V1);
        let words = names(&lowered.unwrap().ops);
        let at = |w: &str| words.iter().rposition(|x| x == w).unwrap();
        (at("Seccomp"), at("WorkingDirectory"), at("Capabilities"), at("Exec"))
    };
    let (filter, directory, drop, _) = order(false);
    assert!(directory < filter && filter + 1 == drop);
    let (filter, _, drop, exec) = order(true);
    assert!(drop < filter && filter + 1 == exec);
}

#[test]
fn a_capability_that_cannot_be_granted_is_a_warning() {
    let caps = r#"{"process":{"capabilities":{"bounding":["CAP_SYS_RESOURCE","CAP_KILL","CAP_NOPE"],
        "permitted":["CAP_KILL"],"effective":["CAP_KILL"]}}}"#;
    let lowered = lowered(caps, Mode::V1).unwrap();
    assert_eq!(lowered.warnings.len(), 2, "{:?}", lowered.warnings);
    assert!(golden(caps, Mode::V1, &["BoundingSet"]).contains("keep: 32"));
    assert!(golden(caps, Mode::V1, &["Capabilities"]).contains("inheritable: 0"));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    for (extra, word) in [
        (r#"{"ociVersion":"2.0.0"}"#, "ociVersion"),
        (r#"{"ociVersion":"1.0"}"#, "ociVersion"),
        (r#"{"ociVersion":""}"#, "ociVersion"),
        (r#"{"process":{"args":[]}}"#, "process.args"),
        (r#"{"process":{"cwd":"relative"}}"#, "process.cwd"),
        (r#"{"process":{"env":["NOEQUALS"]}}"#, "process.env"),
        (r#"{"process":{"rlimits":[{"type":"RLIMIT_NOPE"}]}}"#, "process.rlimits"),
        (r#"{"process":{"apparmorProfile":"x"}}"#, "process.apparmorProfile"),
        (r#"{"process":{"scheduler":{"policy":"X"}}}"#, "process.scheduler"),
        (r#"{"hostname":"h"}"#, "hostname"),
        (r#"{"linux":{"sysctl":{"net.ipv4.ip_forward":"1"}}}"#, "linux.sysctl"),
        (r#"{"linux":{"sysctl":{"kernel.panic":"1"}}}"#, "linux.sysctl"),
        (r#"{"linux":{"rootfsPropagation":"sideways"}}"#, "linux.rootfsPropagation"),
        (r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"pid"}]}}"#, "linux.namespaces[1]"),
        (r#"{"linux":{"namespaces":[{"type":"blob"}]}}"#, "linux.namespaces[0]"),
        (r#"{"linux":{"namespaces":[{"type":"pid","path":"x"}]}}"#, "linux.namespaces[0]"),
        (r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"user"}]}}"#, "linux.uidMappings"),
        (r#"{"linux":{"intelRdt":{}}}"#, "linux.intelRdt"),
        (r#"{"process":{"selinuxLabel":"u:r:t"}}"#, "process.selinuxLabel"),
        (r#"{"vm":{}}"#, "vm"),
        (r#"{"linux":{"netDevices":{"eth0":{}}}}"#, "linux.netDevices"),
        (r#"{"hooks":{"createContainer":[{"path":"relative"}]}}"#, "hooks.createContainer[0]"),
        (r#"{"linux":{"devices":[{"type":"z","path":"/dev/x"}]}}"#, "linux.devices[0]"),
    ] {
        let text = error(extra);
        assert!(text.contains(word), "{extra}: {text}");
    }
}

#[test]
fn every_spelling_of_propagation() {
    for word in ["private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"] {
        assert!(
            lowered(&format!(r#"{{"linux":{{"rootfsPropagation":"{word}"}}}}"#), Mode::V1).is_ok(),
            "{word}"
        );
    }
}

#[test]
fn versions_of_the_first_major_are_accepted() {
    for version in ["1.0.0", "1.0.2-dev", "1.3.0", "1.99.0+x"] {
        assert!(lowered(&format!(r#"{{"ociVersion":"{version}"}}"#), Mode::V1).is_ok(), "{version}");
    }
}

#[test]
fn selinux_labels_go_to_the_exec_and_to_new_file_systems_only() {
    let document = serde_json::json!({
        "ociVersion": "1.3.0",
        "process": {"args": ["true"], "cwd": "/", "selinuxLabel": "u:r:container_t"},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc"},
            {"destination": "/tmp", "type": "tmpfs"},
            {"destination": "/srv", "type": "bind", "source": "/srv"}
        ],
        "linux": {"namespaces": [{"type": "mount"}], "mountLabel": "u:o:file_t", "maskedPaths": ["/proc/x"]}
    });
    let spec: Spec = serde_json::from_value(document).unwrap();
    let facts = HostFacts { selinux: true, ..facts(Mode::V1) };
    let ops = lower(&spec, &request(), &facts).unwrap().ops;
    let labelled = |op: &Op| format!("{op:?}").contains("file_t");
    let words: Vec<String> =
        ops.iter().filter(|op| labelled(op)).map(|op| names(std::slice::from_ref(op)).join("")).collect();
    assert_eq!(words, ["FileSystem", "Mask"]);
    let exec = ops.iter().find(|op| matches!(op, Op::ExecLabel { .. })).map(|op| format!("{op:?}"));
    assert_eq!(exec.as_deref(), Some(r#"ExecLabel { file: "attr/exec", label: "u:r:container_t" }"#));
}

#[test]
fn controls_that_a_version_of_cgroups_lacks_are_refused_by_name() {
    let refused = |resources: &str, mode| {
        let extra = format!(r#"{{"linux":{{"resources":{resources}}}}}"#);
        lowered(&extra, mode).err().map(|e| e.to_string()).unwrap_or_default()
    };
    for (text, field) in [
        (r#"{"memory": {"swappiness": 10}}"#, "memory.swappiness"),
        (r#"{"memory": {"disableOOMKiller": true}}"#, "memory.disableOOMKiller"),
        (r#"{"cpu": {"realtimeRuntime": 5}}"#, "cpu.realtimeRuntime"),
        (r#"{"blockIO": {"leafWeight": 10}}"#, "blockIO.leafWeight"),
        (r#"{"network": {"classID": 1}}"#, "network.classID"),
    ] {
        assert!(refused(text, Mode::V2).contains(field), "{text}");
        assert_eq!(refused(text, Mode::Hybrid), "", "{text}");
    }
    assert!(refused(r#"{"unified": {"memory.high": "1"}}"#, Mode::V1).contains("unified"));
    assert_eq!(refused(r#"{"unified": {"memory.high": "1"}}"#, Mode::V2), "");
}
