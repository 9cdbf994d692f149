//! Fields of the specification that one value inside the container shows.

use super::*;
use nix::libc;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The next connection, which must come.
fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let mut got = None;
    wait_for("a connection", || {
        got = listener.accept().ok();
        got.is_some()
    });
    let (socket, _) = got.unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// A descriptor and the text that came with it: one message, or a whole document.
fn receive(listener: &UnixListener, whole: bool) -> (String, OwnedFd) {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::FromRawFd;
    let mut socket = accept(listener);
    let mut data = [0u8; 4096];
    let mut space = nix::cmsg_space!([i32; 2]);
    let mut parts = [std::io::IoSliceMut::new(&mut data)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let fds = message.cmsgs().unwrap().find_map(|c| match c {
        ControlMessageOwned::ScmRights(fds) => Some(fds[0]),
        _ => None,
    });
    // SAFETY: the descriptor has just been received and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fds.expect("no descriptor came")) };
    let bytes = message.bytes;
    let mut said = text(&data[..bytes]);
    while whole && serde_json::from_str::<Value>(&said).is_err() {
        let n = socket.read(&mut data).unwrap();
        assert!(n > 0, "cut off: {said}");
        said += &text(&data[..n]);
    }
    (said, fd)
}

/// The pid that a pidfd is for.
fn pid_of(pidfd: &OwnedFd) -> i32 {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
    info.lines().find_map(|l| l.strip_prefix("Pid:")).unwrap().trim().parse().unwrap()
}

/// Answers one notification with an error that nothing else gives.
fn answer_with(listener: &OwnedFd, errno: i32) {
    // From linux/seccomp.h: _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, struct seccomp_notif_resp).
    const RECV: u64 = 0xc050_2100;
    const SEND: u64 = 0xc018_2101;
    let mut notice = [0u64; 10];
    // SAFETY: the kernel writes one struct of 80 bytes.
    let received = unsafe { libc::ioctl(listener.as_raw_fd(), RECV as _, notice.as_mut_ptr()) };
    assert_eq!(received, 0, "{}", std::io::Error::last_os_error());
    // id, value, error and flags.
    let mut reply = [notice[0], 0, u64::from((-errno) as u32)];
    // SAFETY: the kernel reads one struct of 24 bytes.
    let sent = unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, reply.as_mut_ptr()) };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
}

fn notifying(case: Case, socket: &Path) -> Case {
    case.with(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "listenerPath": socket,
            "listenerMetadata": "some \"metadata\"",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]
        }),
    )
}

#[test]
fn a_seccomp_listener_gets_the_descriptor_with_the_process_state() {
    require!();
    let case =
        Case::new("mkdir /data/x; sleep 1000").with("/annotations", json!({"big": "x".repeat(20_000)}));
    let socket = case.path("agent.sock");
    let case = notifying(case, &socket);
    let listener = UnixListener::bind(&socket).unwrap();
    case.start();
    let (said, fd) = receive(&listener, true);
    let state: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(state["fds"], json!(["seccompFd"]));
    assert_eq!(state["metadata"], "some \"metadata\"");
    assert_eq!(state["pid"], case.pid(), "as the runtime sees it");
    assert_eq!(state["state"]["id"], case.id);
    assert_eq!(state["state"]["pid"], case.pid());
    assert!(state["ociVersion"].as_str().unwrap().starts_with("1."));
    answer_with(&fd, libc::EXDEV);
    wait_for("the answer", || fs::read_to_string(case.path("err")).unwrap().contains("ross-device"));
}

#[test]
fn exec_tells_the_seccomp_listener_too() {
    require!();
    let case = Case::new("sleep 1000");
    let socket = case.path("agent.sock");
    let case = notifying(case, &socket);
    let listener = UnixListener::bind(&socket).unwrap();
    case.start();
    receive(&listener, true);
    let child = case
        .command(&["exec", &case.id, "mkdir", "/data/x"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (said, fd) = receive(&listener, true);
    let state: Value = serde_json::from_str(&said).unwrap();
    assert_ne!(state["pid"], case.pid());
    assert_eq!(state["state"]["pid"], case.pid());
    assert_eq!(state["state"]["status"], "running");
    answer_with(&fd, libc::EXDEV);
    let output = child.wait_with_output().unwrap();
    assert!(text(&output.stderr).contains("ross-device"), "{}", text(&output.stderr));
}

#[test]
fn a_listener_that_is_not_there_fails_the_create() {
    require!();
    let case = Case::new("true");
    let socket = case.path("nobody.sock");
    let case = notifying(case, &socket);
    assert!(case.run().status.code() != Some(0));
    case.fails(&["state", &case.id]);
}

#[test]
fn the_pidfd_socket_gets_a_pidfd_of_the_process() {
    require!(ours);
    let case = Case::new("sleep 1000");
    let path = case.path("pidfd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let path = path.display().to_string();
    case.create(&["--pidfd-socket", &path]).unwrap();
    assert_eq!(pid_of(&receive(&listener, false).1), case.pid());
    case.ok(&["start", &case.id]);
    let mut child =
        case.command(&["exec", "--pidfd-socket", &path, &case.id, "sleep", "1000"]).spawn().unwrap();
    let pidfd = receive(&listener, false).1;
    assert!(pid_of(&pidfd) > 0 && pid_of(&pidfd) != case.pid());
    // SAFETY: a null siginfo is allowed.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<u8>(),
            0,
        )
    };
    assert_eq!(sent, 0);
    assert_eq!(child.wait().unwrap().code(), Some(137));
}

#[test]
fn the_scheduler_is_set_before_the_program_runs() {
    require!(ours);
    // proc_pid_stat(5): 19 is the nice value, 41 the policy.
    let script = "cut -d' ' -f19,41 /proc/self/stat";
    let with = |value: Value| Case::new(script).with("/process/scheduler", value);
    assert_eq!(with(json!({"policy": "SCHED_BATCH", "nice": 5})).output(), "5 3\n");
    // Its nice value is the caller's.
    let idle = with(json!({"policy": "SCHED_IDLE"})).output();
    assert!(idle.ends_with(" 5\n"), "{idle}");
    assert_eq!(with(json!({"policy": "SCHED_OTHER", "nice": -3})).output(), "-3 0\n");
    for (field, value) in [
        ("policy", json!({"policy": "SCHED_NONE"})),
        ("flags", json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_NONE"]})),
    ] {
        let error = with(value).create(&[]).unwrap_err();
        assert!(error.contains(&format!("process.scheduler.{field}")), "{error}");
    }
}

#[test]
fn the_io_priority_is_set() {
    require!(ours);
    let with = |value: Value| Case::new("/bin/busybox ionice").with("/process/ioPriority", value);
    assert_eq!(
        with(json!({"class": "IOPRIO_CLASS_BE", "priority": 6})).output().trim(),
        "best-effort: prio 6"
    );
    assert!(with(json!({"class": "IOPRIO_CLASS_IDLE"})).output().contains("idle"));
    for (field, value) in [
        ("class", json!({"class": "IOPRIO_CLASS_NONE"})),
        ("priority", json!({"class": "IOPRIO_CLASS_BE", "priority": 8})),
    ] {
        let error = with(value).create(&[]).unwrap_err();
        assert!(error.contains(&format!("process.ioPriority.{field}")), "{error}");
    }
}

#[test]
fn exec_runs_on_the_cpus_that_its_affinity_names() {
    require!(ours);
    let allowed = "grep Cpus_allowed_list /proc/self/status | tr -dc '0-9,-'";
    let case = Case::new(&format!("{allowed}; sleep 1000"));
    let all = Command::new("/bin/sh").args(["-c", allowed]).output().unwrap();
    let all = text(&all.stdout);
    if !all.contains(['-', ',']) {
        eprintln!("skipped: one CPU ({all}) can show no affinity");
        return;
    }
    let case = case.with("/process/execCPUAffinity", json!({"initial": "0", "final": "1"}));
    case.start();
    let on = |case: &Case| text(&case.exec(&[&case.id, "sh", "-c", allowed]).stdout);
    assert_eq!(on(&case), "1");
    wait_for("the container's own line", || !case.written().is_empty());
    assert_eq!(case.written(), all, "the container's own process is not concerned");
    let process = |affinity: Value| {
        let mut process = case.config["process"].clone();
        process["execCPUAffinity"] = affinity;
        process["args"][2] = json!(allowed);
        let path = case.path("process.json");
        fs::write(&path, process.to_string()).unwrap();
        case.exec(&["--process", path.to_str().unwrap(), &case.id])
    };
    assert_eq!(text(&process(json!({"final": "0"})).stdout), "0");
    for list in ["x", "1-0", "99999999"] {
        for key in ["initial", "final"] {
            let output = process(json!({key: list}));
            assert!(!output.status.success(), "{list}");
            let error = text(&output.stderr);
            assert!(error.contains(&format!("process.execCPUAffinity.{key}")), "{error}");
        }
    }
}

#[test]
fn the_memory_policy_is_set() {
    require!(ours);
    if !Path::new("/proc/self/numa_maps").exists() {
        eprintln!("skipped: this kernel knows no memory nodes");
        return;
    }
    let with = |value: Value| {
        Case::new("cut -d' ' -f2 /proc/self/numa_maps | sort | head -1").with("/linux/memoryPolicy", value)
    };
    assert_eq!(with(json!({"mode": "MPOL_BIND", "nodes": "0"})).output(), "bind:0\n");
    assert_eq!(
        with(json!({"mode": "MPOL_INTERLEAVE", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]})).output(),
        "interleave=static:0\n"
    );
    assert_eq!(with(json!({"mode": "MPOL_DEFAULT"})).output(), "default\n");
    for (field, value) in [
        ("mode", json!({"mode": "MPOL_NONE"})),
        ("flags", json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_NONE"]})),
        ("nodes", json!({"mode": "MPOL_BIND", "nodes": "0-"})),
    ] {
        let error = with(value).create(&[]).unwrap_err();
        assert!(error.contains(&format!("linux.memoryPolicy.{field}")), "{error}");
    }
    // The kernel's own no to a mode that needs nodes.
    let error = with(json!({"mode": "MPOL_BIND"})).create(&[]).unwrap_err();
    assert!(error.contains("memory policy"), "{error}");
}

#[test]
fn the_personality_is_that_of_32_bit_programs() {
    require!(ours);
    let case = Case::new("/bin/busybox uname -m").with("/linux/personality", json!({"domain": "LINUX32"}));
    assert_eq!(case.output(), "i686\n");
    for (field, value) in
        [("domain", json!({"domain": "BSD"})), ("flags", json!({"domain": "LINUX", "flags": ["ADDR_NO"]}))]
    {
        let error = Case::new("true").with("/linux/personality", value).create(&[]).unwrap_err();
        assert!(error.contains(&format!("linux.personality.{field}")), "{error}");
    }
}

#[test]
fn both_clocks_of_a_time_namespace_are_set_off_also_for_exec() {
    require!(ours);
    let case = Case::new("tr -s ' ' < /proc/self/timens_offsets; sleep 1000")
        .with("/linux/namespaces/-", json!({"type": "time"}))
        .with(
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 500, "nanosecs": 250}, "boottime": {"secs": 86400}}),
        );
    case.start();
    let offsets = "monotonic 500 250\nboottime 86400 0\n";
    wait_for("the offsets", || case.written() == offsets);
    let output = case.exec(&[&case.id, "tr", "-s", " "]);
    assert!(output.status.success());
    let output = case.exec(&[&case.id, "sh", "-c", "tr -s ' ' < /proc/self/timens_offsets"]);
    assert_eq!(text(&output.stdout), offsets);
    let wrong = Case::new("true").with("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}));
    assert!(wrong.create(&[]).unwrap_err().contains("linux.timeOffsets"));
    let wrong = Case::new("true")
        .with("/linux/namespaces/-", json!({"type": "time"}))
        .with("/linux/timeOffsets", json!({"realtime": {"secs": 1}}));
    assert!(wrong.create(&[]).unwrap_err().contains("linux.timeOffsets"));
}

#[test]
fn a_user_namespace_is_joined_and_owns_the_new_ones() {
    require!(ours);
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    let sandbox = Case::new("sleep 1000")
        .with("/linux/namespaces/-", json!({"type": "user"}))
        .with("/linux/uidMappings", map.clone())
        .with("/linux/gidMappings", map.clone());
    std::os::unix::fs::chown(sandbox.rootfs(), Some(100_000), Some(100_000)).unwrap();
    sandbox.start();
    // As the members of a pod: the mappings are given once more, for idmapped mounts.
    let of = |kind: &str| format!("/proc/{}/ns/{kind}", sandbox.pid());
    let member = Case::new("id -u; tr -s ' ' < /proc/self/uid_map; hostname inside; hostname; mount -t tmpfs x /tmp && echo mounted")
        .join("user", &of("user"))
        .join("network", &of("net"))
        .join("pid", &of("pid"))
        .with("/linux/uidMappings", map.clone())
        .with("/linux/gidMappings", map);
    std::os::unix::fs::chown(member.rootfs(), Some(100_000), Some(100_000)).unwrap();
    assert_eq!(member.output(), "0\n 0 100000 1000\ninside\nmounted\n");
}

/// Nothing that a configuration asks for is passed over: what cannot be done here is refused by the name of its field.
#[test]
fn what_cannot_be_done_here_is_refused_by_name() {
    require!(ours);
    let mut cases = vec![
        ("/windows", json!({"layerFolders": []}), "windows"),
        ("/solaris", json!({}), "solaris"),
        ("/zos", json!({}), "zos"),
        ("/freebsd", json!({}), "freebsd"),
        ("/vm", json!({"kernel": {"path": "/vmlinuz"}}), "vm"),
        ("/process/commandLine", json!("cmd"), "process.commandLine"),
        ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 1, "size": 1}]), "linux.uidMappings"),
        (
            "/mounts/-",
            json!({"destination": "/data", "type": "bind", "source": "/tmp", "options": ["bind", "nonsense=1"]}),
            "nonsense=1",
        ),
        (
            "/mounts/-",
            json!({"destination": "/tmp", "type": "tmpfs", "options": ["idmap"]}),
            "id mappings are for bind mounts",
        ),
        (
            "/mounts/-",
            json!({"destination": "/data", "type": "bind", "source": "/tmp", "options": ["bind"],
                   "gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}),
            "uidMappings and gidMappings",
        ),
        ("/mounts/-", json!({"destination": "/dev", "options": ["remount", "size=5"]}), "size=5"),
        ("/linux/rootfsPropagation", json!("loud"), "linux.rootfsPropagation"),
        ("/linux/netDevices", json!({"a/b": {}}), "linux.netDevices"),
        ("/linux/netDevices", json!({"lo": {"name": "far-too-long-a-name"}}), "linux.netDevices"),
    ];
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        cases.push(("/process/selinuxLabel", json!("u:r:t:s0"), "process.selinuxLabel"));
    }
    if !Path::new("/sys/module/apparmor/parameters/enabled").exists() {
        cases.push(("/process/apparmorProfile", json!("some"), "process.apparmorProfile"));
    }
    if !fs::read_to_string("/proc/self/mounts").unwrap().contains(" resctrl ") {
        cases.push(("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"));
    }
    for (path, value, field) in cases {
        let case = Case::new("true").with(path, value);
        let error = case.create(&[]).expect_err(path);
        assert!(error.contains(field), "{path}: {error}");
        case.fails(&["state", &case.id]);
    }
}

#[test]
fn without_a_mount_namespace_hooks_run_and_what_needs_mounts_is_refused() {
    require!(ours);
    let bare = || {
        let mut case = Case::new("echo ran").without_namespace("mount");
        case.config.as_object_mut().unwrap().remove("mounts");
        case
    };
    let mut case = bare();
    for kind in ["createRuntime", "createContainer"] {
        let hook = hook(&case, kind);
        case.set(&format!("/hooks/{kind}"), hook);
    }
    assert_eq!(case.output(), "ran\n");
    let log = fs::read_to_string(case.path("hooks.log")).unwrap();
    assert!(log.contains("createRuntime") && log.contains("createContainer"), "{log}");
    for (path, value) in [
        ("/root/readonly", json!(true)),
        ("/linux/maskedPaths", json!(["/etc"])),
        ("/linux/readonlyPaths", json!(["/etc"])),
        ("/linux/rootfsPropagation", json!("private")),
        ("/linux/devices", json!([{"type": "c", "path": "/dev/x", "major": 1, "minor": 3}])),
    ] {
        let error = bare().with(path, value).create(&[]).expect_err(path);
        assert!(error.contains(&path[1..].replace('/', ".")), "{path}: {error}");
    }
}

/// A weight needs an I/O scheduler that has one; where the kernel has none, silence would be a lie.
#[test]
fn a_limit_that_the_kernel_has_no_file_for_fails_the_create() {
    require!(ours);
    let probe = in_cgroup(Case::new("sleep 1000"));
    probe.start();
    let has = |name: &str| probe.cgroup_dirs().iter().any(|d| d.join(name).exists());
    let weight = ["blkio.weight", "blkio.bfq.weight", "io.weight", "io.bfq.weight"].iter().any(|f| has(f));
    let case = in_cgroup(Case::new("true")).with("/linux/resources/blockIO", json!({"weight": 100}));
    assert_eq!(case.create(&[]).is_ok(), weight);
    let case = in_cgroup(Case::new("true")).with("/linux/resources/blockIO", json!({"leafWeight": 100}));
    let error = case.create(&[]).err();
    assert!(has("blkio.leaf_weight") || error.is_some_and(|e| e.contains("leaf")));
}

/// A label for files takes nothing from the container, and without SELinux nobody reads it.
#[test]
fn a_mount_label_without_selinux_is_no_obstacle() {
    require!(ours);
    if Path::new("/sys/fs/selinux/enforce").exists() {
        eprintln!("skipped: SELinux is enabled here");
        return;
    }
    let case = Case::new("cat /proc/mounts").with("/linux/mountLabel", json!("u:r:t:s0"));
    let case = case.with("/linux/maskedPaths", json!(["/proc/acpi"]));
    let mounts = case.output();
    assert!(!mounts.contains("context="), "{mounts}");
}

#[test]
fn parameters_of_a_tmpfs_do_nothing_to_a_bind_mount() {
    require!();
    let case = Case::new("stat -c %a /data").with(
        "/mounts/-",
        json!({"destination": "/data", "type": "bind", "source": "/tmp", "options": ["bind", "mode=700", "size=1k"]}),
    );
    let outside = fs::metadata("/tmp").unwrap().permissions().mode() & 0o7777;
    assert_eq!(case.output().trim(), format!("{outside:o}"));
}

/// The filter is the program's: the runtime's own calls before it are not subject to it.
#[test]
fn a_filter_may_forbid_what_the_runtime_itself_needs() {
    require!(ours);
    for no_new_privileges in [false, true] {
        for (uid, groups) in [(0, "0"), (1000, "1000")] {
            let rules = json!([{
                "names": ["getcwd", "chdir", "fchdir", "setresuid", "setresgid", "setgroups"],
                "action": "SCMP_ACT_ERRNO",
            }]);
            let case = Case::new(
                "cd / 2>/dev/null || echo forbidden; id -G; grep -E '^(CapEff|CapPrm)' /proc/self/status",
            )
            .with("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
            .with("/process/noNewPrivileges", json!(no_new_privileges))
            .with("/process/user", json!({"uid": uid, "gid": uid}));
            let caps = if uid == 0 {
                "CapPrm:\t0000000000200020\nCapEff:\t0000000000200020\n"
            } else {
                "CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n"
            };
            assert_eq!(case.output(), format!("forbidden\n{groups}\n{caps}"), "{no_new_privileges} {uid}");
        }
    }
}

/// The older kind of hook comes from a time when nothing was told of a container that is not there yet.
#[test]
fn a_prestart_hook_is_told_that_the_container_is_created() {
    require!(ours);
    let case = Case::new("true");
    let told = case.path("told");
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", format!("cat >> {}", told.display())]}]);
    for (kind, status) in [("prestart", "created"), ("createRuntime", "creating")] {
        let mut case = Case::new("true");
        case.set(&format!("/hooks/{kind}"), hook.clone());
        let _ = fs::remove_file(&told);
        case.output();
        let state: Value = serde_json::from_str(&fs::read_to_string(&told).unwrap()).unwrap();
        assert_eq!(state["status"], status, "{kind}");
    }
}

#[test]
fn a_seccomp_listener_learns_of_a_container_that_is_only_created() {
    require!();
    let case = Case::new("mkdir /data/x; sleep 1000");
    let socket = case.path("agent.sock");
    let case = notifying(case, &socket).with("/process/user", json!({"uid": 1000, "gid": 1000}));
    let listener = UnixListener::bind(&socket).unwrap();
    case.create(&[]).unwrap();
    // In one piece: agents exist that read once.
    let (said, fd) = receive(&listener, false);
    let state: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(state["pid"], case.pid());
    case.ok(&["start", &case.id]);
    answer_with(&fd, libc::EXDEV);
    wait_for("the answer", || fs::read_to_string(case.path("err")).unwrap().contains("ross-device"));
}

#[test]
fn inheritable_capabilities_beyond_the_bounding_set_fail_the_create() {
    require!();
    let list = json!(["CAP_SYS_ADMIN"]);
    let caps = json!({"effective": list, "permitted": list, "inheritable": list});
    let case = Case::new("true").with("/process/capabilities", caps);
    let error = case.create(&[]).unwrap_err();
    assert!(error.contains("operation not permitted"), "{error}");
}

#[test]
fn capabilities_that_nobody_knows_are_named_in_one_warning() {
    require!();
    let case = Case::new("true");
    let caps = json!({"bounding": ["CAP_KILL", "CAP_NOPE"], "permitted": ["CAP_NOPE", "CAP_ALSO_NOT"]});
    let output = case.with("/process/capabilities", caps).run();
    assert!(output.status.success());
    let said = text(&output.stderr);
    assert!(said.contains("ignoring unknown or unavailable capabilities: [CAP_ALSO_NOT CAP_NOPE]"), "{said}");
}

#[test]
fn the_debug_log_of_exec_has_the_initial_affinity() {
    require!(ours);
    let affinity = json!({"initial": "0", "final": "0"});
    let case = Case::new("sleep 1000").with("/process/execCPUAffinity", affinity);
    case.start();
    let output = case.call(&["--debug", "exec", &case.id, "true"]);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("affinity: 0x1\"\n"), "{said}");
}

#[test]
fn the_letter_a_in_a_devices_access_is_passed_over() {
    require!();
    let rules = json!([
        {"allow": false, "access": "rwm"},
        {"allow": false, "type": "c", "major": 1, "minor": 11, "access": "rwa"}
    ]);
    let case = in_cgroup(Case::new("cat /dev/null && echo read"));
    assert_eq!(case.with("/linux/resources/devices", rules).output(), "read\n");
}

#[test]
fn the_debug_log_tells_each_step_in_the_format_of_the_log() {
    require!(ours);
    let filter = json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG"]});
    let case = Case::new("true").with("/linux/seccomp", filter);
    let run = ["run", "--bundle", &case.bundle(), &case.id];
    let said = text(&case.call(&[&["--debug"][..], &run].concat()).stderr);
    for line in ["level=debug msg=\"seccomp filter flags: 2\"", ": pivot_root\"", ": exec /bin/sh\""] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(said.lines().all(|line| line.starts_with("time=")), "{said}");
    let log = case.path("log").display().to_string();
    let output = case.call(&[&["--debug", "--log-format", "json", "--log", &log][..], &run].concat());
    assert_eq!(text(&output.stderr), "");
    let log = fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|l| l["level"] == "debug" && l["msg"] == "seccomp filter flags: 2"), "{log}");
}

/// Callers that only look at the words must see that something went wrong.
#[test]
fn an_error_says_that_it_is_one() {
    require!();
    let said = Case::new("true").fails(&["kill", "nobody", "KILL"]);
    assert!(said.contains("error"), "{said}");
}

#[test]
fn without_device_rules_only_the_common_devices_open() {
    require!();
    let mut case = Case::new(
        "mknod /tmp/loop b 7 0 && head -c 1 /tmp/loop 2>&1; mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero | wc -c",
    );
    for set in ["bounding", "effective", "permitted"] {
        case.set(&format!("/process/capabilities/{set}/-"), json!("CAP_MKNOD"));
    }
    case.config["linux"].as_object_mut().unwrap().remove("resources");
    assert_eq!(case.output(), "head: /tmp/loop: Operation not permitted\n1\n");
}
