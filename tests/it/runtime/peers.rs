//! What callers have come to rely on with other runtimes, where the specification leaves it open.

use super::*;

#[test]
fn without_pivot_root_the_hosts_proc_is_not_reachable() {
    require!();
    // A procfs that is visible whole anywhere in the mount namespace lets a nested user namespace mount another.
    let script = "unshare -mrpf mount -t proc none /proc 2>&1 && echo mounted || true";
    let mut case = Case::new(script);
    symlink("busybox", case.rootfs().join("bin/unshare")).unwrap();
    case.set("/linux/maskedPaths", json!(["/proc/kcore", "/proc/keys"]));
    for set in ["bounding", "effective", "permitted"] {
        case.set(&format!("/process/capabilities/{set}/-"), json!("CAP_SETFCAP"));
    }
    let output = case.call(&["run", "--no-pivot", "--bundle", &case.bundle(), &case.id]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(said.contains("ermitted") || said.contains("denied"), "{said}");
    assert!(!said.contains("mounted\n"), "{said}");
}

#[test]
fn without_pivot_root_only_the_roots_own_mounts_are_left() {
    require!(ours);
    let case = Case::new("cut -d' ' -f5 /proc/self/mountinfo");
    let output = case.call(&["run", "--no-pivot", "--bundle", &case.bundle(), &case.id]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let places = text(&output.stdout);
    let mut places: Vec<&str> = places.lines().collect();
    places.sort_unstable();
    assert_eq!(places, ["/", "/dev", "/dev/pts", "/proc", "/sys"]);
}

#[test]
fn the_cpus_are_those_of_the_cgroup_and_not_of_the_caller() {
    require!(ours);
    let allowed = "grep Cpus_allowed_list /proc/self/status | tr -dc '0-9,-'";
    let all = text(&Command::new("/bin/sh").args(["-c", allowed]).output().unwrap().stdout);
    if !all.starts_with("0-") {
        eprintln!("skipped: needs the CPUs 0 and 1 ({all})");
        return;
    }
    let case = Case::new(&format!("{allowed}; sleep 1000"));
    case.command(&["list"]).output().unwrap();
    let here = |args: &[&str]| {
        let mut command = Command::new("taskset");
        command.args(["-c", "0"]).arg(runtime()).arg("--root").arg(case.path("state")).args(args);
        command.stdin(Stdio::null());
        command
    };
    let mut run = here(&["run", "--detach", "--bundle", &case.bundle(), &case.id]);
    let status = run.stdout(fs::File::create(case.path("out")).unwrap()).status().unwrap();
    assert!(status.success());
    wait_for("the container's line", || !case.written().is_empty());
    assert_eq!(case.written(), all);
    let exec = here(&["exec", &case.id, "sh", "-c", allowed]).output().unwrap();
    assert_eq!(text(&exec.stdout), all);
}

#[test]
fn a_pids_limit_of_zero_is_a_limit() {
    require!(ours);
    let case = in_cgroup(Case::new("sleep 1000"));
    let case = case
        .with("/linux/resources/pids", json!({"limit": 0}))
        .with("/process/args", json!(["sleep", "1000"]));
    case.start();
    assert_eq!(case.cgroup_file("pids.max", "pids.max").trim(), "1");
    case.ok(&["update", "--pids-limit", "-1", &case.id]);
    assert_eq!(case.cgroup_file("pids.max", "pids.max").trim(), "max");
}

#[test]
fn an_empty_home_is_as_good_as_none() {
    require!(ours);
    let case =
        Case::new("echo $HOME").with("/process/env/-", json!("HOME=")).with("/process/user/uid", json!(1000));
    assert_eq!(case.output(), "/data\n");
}

#[test]
fn a_hook_in_the_container_has_the_home_of_its_process() {
    require!();
    let script = "echo $HOME > /dev/shm/home";
    let mut case = Case::new("cat /dev/shm/home");
    case.set("/mounts/-", json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}));
    case.set("/hooks/startContainer", json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]));
    assert_eq!(case.output(), "/root\n");
}

#[test]
fn a_hook_in_the_container_before_the_pivot_begins_at_the_root() {
    require!();
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", "pwd > data/place"]}]);
    let case = Case::new("cat /data/place").with("/hooks/createContainer", hook);
    assert_eq!(case.output(), format!("{}\n", case.rootfs().display()));
}

#[test]
fn a_failing_hook_is_told_with_what_it_said() {
    require!();
    let hook = json!([{"path": "/bin/busybox", "args": ["sh", "-c", "echo the reason >&2; exit 3"]}]);
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer"] {
        let case = Case::new("true").with(&format!("/hooks/{kind}"), hook.clone());
        let output = case.run();
        assert!(!output.status.success(), "{kind}");
        let error = text(&output.stderr);
        assert!(error.contains(" hook #0"), "{error}");
        assert!(error.contains("the reason"), "{kind}: {error}");
    }
    // The words pass from the container to a `start` command, too.
    let case = Case::new("true").with("/hooks/startContainer", hook);
    case.create(&[]).unwrap();
    if !reference() {
        assert!(case.fails(&["start", &case.id]).contains("the reason"));
    }
}

#[test]
fn a_hooks_child_that_holds_its_error_stream_delays_nothing() {
    require!(ours);
    let script = "sleep 5 < /dev/null > /dev/null & exit 0";
    let case = Case::new("true")
        .with("/hooks/createRuntime", json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]));
    let begin = Instant::now();
    case.output();
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

/// Files of the host that only root may reach, in a directory closed to others.
fn closed_directory(case: &Case) -> PathBuf {
    let dir = case.path("closed");
    fs::create_dir_all(dir.join("inner")).unwrap();
    fs::write(dir.join("inner/file"), "found\n").unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

fn with_user_namespace(case: Case) -> Case {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    case.with("/linux/namespaces/-", json!({"type": "user"}))
        .with("/linux/uidMappings", map.clone())
        .with("/linux/gidMappings", map)
}

fn bind(source: &Path, destination: &str, options: &[&str], case: &mut Case) {
    case.set(
        "/mounts/-",
        json!({"source": source, "destination": destination, "type": "bind", "options": options}),
    );
}

#[test]
fn a_bind_source_need_not_be_reachable_for_the_containers_root() {
    require!();
    let mut case = with_user_namespace(Case::new("cat /data/file"));
    let dir = closed_directory(&case);
    bind(&dir.join("inner"), "/data", &["rbind"], &mut case);
    own_by(&case.rootfs(), 100_000);
    assert_eq!(case.output(), "found\n");
}

#[test]
fn what_the_host_forbids_on_a_mount_is_not_allowed_in_a_user_namespace() {
    require!(ours);
    let mut case = with_user_namespace(Case::new("true"));
    let dir = case.path("volume");
    fs::create_dir(&dir).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "ro,nosuid", "t"]).arg(&dir).status();
    assert!(mounted.unwrap().success());
    bind(&dir, "/data", &["rbind", "rw"], &mut case);
    own_by(&case.rootfs(), 100_000);
    let output = case.run();
    let _ = Command::new("umount").arg(&dir).status();
    let error = text(&output.stderr);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(error.contains("permitted") || error.contains("locked"), "{error}");
}

/// A file system in `dir` whose mount has these options; taken away in the end.
struct HostMount(PathBuf);

impl HostMount {
    fn new(dir: PathBuf, options: &str) -> HostMount {
        let mount = |args: &[&str]| {
            assert!(Command::new("mount").args(args).arg(&dir).status().unwrap().success());
        };
        fs::create_dir(&dir).unwrap();
        mount(&["-t", "tmpfs", "-o", "rw,strictatime", "t"]);
        // On the mount alone: what its file system has, no mount of it can be without.
        mount(&["-o", &format!("remount,bind,{options}")]);
        HostMount(dir)
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The attributes with which a directory of the host comes into a container.
fn attributes(host: &str, options: &[&str], user_namespace: bool) -> Vec<String> {
    let mut case = Case::new("grep ' /data ' /proc/self/mounts | cut -d' ' -f4");
    if user_namespace {
        case = with_user_namespace(case);
        own_by(&case.rootfs(), 100_000);
    }
    let dir = HostMount::new(case.path("volume"), host);
    bind(&dir.0, "/data", options, &mut case);
    let line = case.output();
    let of_the_file_system = ["inode64", "uid=", "gid=", "mode=", "size="];
    let words = line.trim().split(',').filter(|w| !of_the_file_system.iter().any(|o| w.starts_with(o)));
    words.map(str::to_owned).collect()
}

#[test]
fn one_attribute_of_a_bind_mount_names_the_whole_set() {
    require!();
    let get = |host, options: &[&str]| attributes(host, options, false).join(",");
    assert_eq!(get("ro,nosuid,noexec,noatime", &["bind"]), "ro,nosuid,noexec,noatime");
    assert_eq!(get("nosuid,nodev,noexec,noatime", &["rbind", "ro"]), "ro,noatime");
    assert_eq!(get("ro", &["bind", "nosuid", "nodev"]).replace(",relatime", ""), "rw,nosuid,nodev");
}

#[test]
fn the_mode_of_access_times_stays_until_another_is_named() {
    require!();
    let get = |options: &[&str]| attributes("noatime", options, false).join(",");
    assert_eq!(get(&["bind", "nodev", "atime"]), "rw,nodev,noatime");
    assert_eq!(get(&["bind", "nodev", "norelatime"]), "rw,nodev,noatime");
    assert_eq!(get(&["bind", "relatime"]), "rw,relatime");
    assert_eq!(get(&["bind", "nodiratime"]), "rw,nodiratime,relatime");
}

#[test]
fn what_the_host_has_locked_stays_in_a_user_namespace_where_nobody_names_it() {
    require!(ours);
    let get = |host, options: &[&str]| attributes(host, options, true).join(",");
    assert_eq!(get("ro,noexec,noatime", &["bind", "nosuid"]), "ro,nosuid,noexec,noatime");
    assert_eq!(get("nodev,nosymfollow,noatime", &["bind", "ro"]), "ro,nodev,noatime");
}

#[test]
fn a_user_begins_in_a_directory_that_only_root_may_enter() {
    require!();
    let mut case = Case::new("pwd; sleep 1000").with("/process/user", json!({"uid": 1000, "gid": 1000}));
    let home = case.rootfs().join("closed");
    fs::create_dir(&home).unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
    case.set("/process/cwd", json!("/closed"));
    case.start();
    wait_for("the container's line", || !case.written().is_empty());
    assert_eq!(case.written(), "/closed\n");
    let exec = case.exec(&["--cwd", "/closed", &case.id, "pwd"]);
    assert_eq!(text(&exec.stdout), "/closed\n", "{}", text(&exec.stderr));
}

#[test]
fn the_callers_groups_stay_when_an_annotation_asks_for_it() {
    require!(ours);
    for user_namespace in [false, true] {
        let mut case = Case::new("grep Groups: /proc/self/status");
        if user_namespace {
            case = with_user_namespace(case);
            own_by(&case.rootfs(), 100_000);
        }
        let groups = |case: &Case| {
            // Writes the bundle's configuration.
            drop(case.command(&["list"]));
            let mut run = Command::new("setpriv");
            run.args(["--groups", "100007"]).arg(runtime()).arg("--root").arg(case.path("state"));
            let output = run.args(["run", "--bundle", &case.bundle(), &case.id]).output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
            text(&output.stdout).split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(groups(&case), "");
        case.set("/annotations/run.oci.keep_original_groups", json!("1"));
        assert_eq!(groups(&case), if user_namespace { "7" } else { "100007" });
    }
}

#[test]
fn an_idmapped_mount_goes_into_a_user_namespace() {
    require!(ours);
    let mut case = with_user_namespace(Case::new("stat -c %u /data/file"));
    let dir = case.path("volume");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "").unwrap();
    bind(&dir, "/data", &["rbind", "idmap"], &mut case);
    own_by(&case.rootfs(), 100_000);
    assert_eq!(case.output(), "0\n");
}

fn own_by(path: &Path, uid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(uid)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).unwrap() {
            own_by(&entry.unwrap().path(), uid);
        }
    }
}

#[test]
fn a_destination_may_be_given_as_the_host_sees_it() {
    require!(ours);
    let mut case = Case::new("cat /data/file");
    fs::write(case.path("file"), "found\n").unwrap();
    let inside = case.rootfs().join("data/file");
    bind(&case.path("file"), inside.to_str().unwrap(), &["bind"], &mut case);
    assert_eq!(case.output(), "found\n");
}

#[test]
fn a_bind_source_may_be_a_mount_that_came_before_it() {
    require!();
    let mut case = Case::new("cat /tmp/file");
    let volume = case.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "found\n").unwrap();
    bind(&volume, "/data", &["rbind"], &mut case);
    bind(&case.rootfs().join("data"), "/tmp", &["rbind"], &mut case);
    assert_eq!(case.output(), "found\n");
}

#[test]
fn a_relative_bind_source_begins_at_the_bundle() {
    require!();
    let mut case = Case::new("cat /data/file");
    fs::create_dir(case.path("volume")).unwrap();
    fs::write(case.path("volume/file"), "found\n").unwrap();
    bind(Path::new("volume"), "/data", &["rbind"], &mut case);
    assert_eq!(case.output(), "found\n");
}

#[test]
fn a_dangling_link_as_target_is_followed_within_the_root() {
    require!(ours);
    let mut case = Case::new("cat /jump/deep/file; cat /etc/hosts; readlink /etc/hosts");
    let outside = case.path("outside");
    symlink(&outside, case.rootfs().join("jump")).unwrap();
    symlink("../jump/deep/file", case.rootfs().join("etc/hosts")).unwrap();
    fs::write(case.path("file"), "found\n").unwrap();
    bind(&case.path("file"), "/etc/hosts", &["bind"], &mut case);
    assert_eq!(case.output(), "found\nfound\n../jump/deep/file\n");
    assert!(!outside.exists(), "a link of the image leads to the host");
    // Links that lead to each other have no end.
    let mut case = Case::new("true");
    symlink("b", case.rootfs().join("a")).unwrap();
    symlink("a", case.rootfs().join("b")).unwrap();
    fs::write(case.path("file"), "").unwrap();
    bind(&case.path("file"), "/a", &["bind"], &mut case);
    assert!(!case.run().status.success());
}

#[test]
fn a_created_container_ends_on_a_signal_that_asks_for_it() {
    require!();
    for signal in ["TERM", "INT", "HUP"] {
        let case = Case::new("sleep 1000");
        case.create(&[]).unwrap();
        case.ok(&["kill", &case.id, signal]);
        case.wait_for_status("stopped");
    }
    // The program has its own way with it: as the init of a pid namespace it does not notice.
    let case = Case::new("sleep 1000");
    case.start();
    case.ok(&["kill", &case.id, "INT"]);
    assert_eq!(case.exec(&[&case.id, "true"]).status.code(), Some(0));
    assert_eq!(case.status(), "running");
}

#[test]
fn a_terminal_is_the_users_and_its_group_that_of_the_devpts() {
    require!();
    let mut case = Case::new("stat -c '%u %g' /dev/console $(tty)").with("/process/terminal", json!(true));
    case.set("/process/user", json!({"uid": 1000, "gid": 100}));
    case.set("/mounts/2/options/-", json!("gid=5"));
    let path = case.path("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    case.create(&["--console-socket", &path.display().to_string()]).unwrap();
    let mut terminal = receive_terminal(&listener);
    case.ok(&["start", &case.id]);
    read_until(&mut terminal, "1000 5\r\n1000 5\r\n");
}

#[test]
fn a_shorter_period_comes_with_a_quota_that_its_parent_can_give() {
    require!();
    let cpu = Path::new("/sys/fs/cgroup/cpu");
    if !cpu.join("cpu.cfs_quota_us").exists() && !cpu.join("cpu.shares").exists() {
        eprintln!("skipped: needs the CPU controller of cgroup v1");
        return;
    }
    let parent = format!("keel-it-parent-{}", std::process::id());
    let dir = cpu.join(&parent);
    let case = Case::new("sleep 1000").with("/linux/cgroupsPath", json!(format!("/{parent}/container")));
    case.start();
    let write = |file: &str, value: &str| fs::write(dir.join(file), value).unwrap();
    write("cpu.cfs_quota_us", "50000");
    case.ok(&["update", "--cpu-quota", "20000", &case.id]);
    let result = case.call(&["update", "--cpu-period", "10000", "--cpu-quota", "3000", &case.id]);
    let read = |file: &str| fs::read_to_string(dir.join("container").join(file)).unwrap().trim().to_owned();
    let now = (read("cpu.cfs_period_us"), read("cpu.cfs_quota_us"));
    case.ok(&["delete", "--force", &case.id]);
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(hierarchy.path().join(&parent));
    }
    assert!(result.status.success(), "{}", text(&result.stderr));
    assert_eq!(now, ("10000".to_owned(), "3000".to_owned()));
}

#[test]
fn a_unified_control_that_the_v2_hierarchy_lacks_is_an_invalid_configuration() {
    require!();
    let hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists();
    if !hybrid {
        eprintln!("skipped: needs cgroup v1 and v2 side by side");
        return;
    }
    let mut case = in_cgroup(Case::new("true"));
    case.set("/linux/resources/unified", json!({"memory.min": "131072"}));
    let error = text(&case.run().stderr);
    assert!(error.contains("invalid configuration"), "{error}");
    case.assert_gone();
}

#[test]
fn namespaces_are_joined_that_the_user_namespace_does_not_own() {
    require!();
    // Both with a new user namespace and with a joined one.
    struct Holder(std::process::Child);
    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let mut command = Command::new("unshare");
    command.args(["-n", "-i", "-u", "sleep", "1000"]).stdout(Stdio::null()).stderr(Stdio::null());
    let holder = Holder(command.spawn().unwrap());
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", holder.0.id());
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    wait_for("the namespaces", || fs::read_link(path("uts")).is_ok_and(|ns| ns != own("uts")));
    let wanted: Vec<String> =
        ["net", "ipc"].iter().map(|k| fs::read_link(path(k)).unwrap().display().to_string()).collect();
    let show = "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; sleep 1000";
    let joined = |case: Case| {
        let mut case = case.join("network", &path("net")).join("ipc", &path("ipc"));
        // Without rights to the network namespace there is no new sysfs.
        case.config["mounts"].as_array_mut().unwrap().retain(|m| m["type"] != "sysfs");
        own_by(&case.rootfs(), 100_000);
        case
    };
    let first = joined(with_user_namespace(Case::new(show)));
    let result = first.create(&[]);
    let ran = result.is_ok() && first.call(&["start", &first.id]).status.success();
    assert!(ran, "a new user namespace: {result:?}");
    let second = joined(Case::new(show).with(
        "/linux/namespaces/-",
        json!({"type": "user", "path": format!("/proc/{}/ns/user", first.pid())}),
    ));
    if reference() {
        // It wants maps for a namespace that has its own.
        return;
    }
    let other = second.create(&[]);
    let both = other.is_ok() && second.call(&["start", &second.id]).status.success();
    if both {
        wait_for("the names", || {
            first.written().lines().count() == 2 && second.written().lines().count() == 2
        });
    }
    assert!(both, "a joined user namespace: {other:?}");
    for case in [&first, &second] {
        assert_eq!(case.written().lines().collect::<Vec<_>>(), wanted);
    }
}

#[test]
fn a_hook_of_the_image_has_no_more_rights_than_the_process() {
    require!();
    let script = "grep -E '^(Uid|CapEff|Seccomp):' /proc/self/status >&2; exit 1";
    let mut case = Case::new("true").with("/process/user", json!({"uid": 1000, "gid": 1000}));
    case.set(
        "/linux/seccomp",
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}
        ]}),
    );
    case.set("/hooks/startContainer", json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]));
    let error = text(&case.run().stderr);
    for wanted in ["1000", "0000000000000000", "2"] {
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
    assert!(error.contains("Uid:") && !error.contains("Seccomp:\t0"), "{error}");
}

#[test]
fn a_deadline_on_some_cpus_is_refused_with_the_reason() {
    require!(ours);
    let mut case = Case::new("true").with("/linux/resources/cpu", json!({"cpus": "0"}));
    case.set(
        "/process/scheduler",
        json!({"policy": "SCHED_DEADLINE", "runtime": 42_000, "deadline": 1_000_000, "period": 1_000_000}),
    );
    let error = text(&case.run().stderr);
    assert!(error.contains("process scheduler can't be used together with AllowedCPUs"), "{error}");
}

#[test]
fn every_command_has_help() {
    require!(ours);
    let case = Case::new("true");
    for command in
        ["create", "run", "start", "state", "list", "kill", "delete", "exec", "ps", "pause", "resume"]
    {
        let help = case.ok(&[command, "--help"]);
        assert!(help.starts_with(&format!("NAME:\n   keel-runtime {command} - ")), "{help}");
        assert_eq!(case.ok(&["help", command]), help);
    }
    assert!(case.ok(&["create", "-h"]).contains("--console-socket VALUE"));
    assert!(case.fails(&["foo", "-h"]).contains("No help topic for 'foo'"));
}

#[test]
fn a_device_is_made_in_a_user_namespace() {
    require!(ours);
    let case = with_user_namespace(Case::new(
        "stat -c '%F %t:%T %u:%g %a' /dev/made; head -c 0 /dev/made && echo opened",
    ));
    let case = case
        .with(
            "/linux/devices/-",
            json!({"path": "/dev/made", "type": "c", "major": 1, "minor": 7,
            "uid": 10, "gid": 11, "fileMode": 0o644}),
        )
        .with(
            "/linux/resources/devices/-",
            json!({"allow": true, "type": "c", "major": 1, "minor": 7, "access": "rwm"}),
        );
    own_by(&case.rootfs(), 100_000);
    assert_eq!(case.output(), "character special file 1:7 10:11 644\nopened\n");
    // An id without a place in the map is nobody's.
    let case = with_user_namespace(Case::new("true")).with(
        "/linux/devices/-",
        json!({"path": "/dev/made", "type": "c", "major": 1, "minor": 7, "uid": 99_999}),
    );
    own_by(&case.rootfs(), 100_000);
    let error = text(&case.run().stderr);
    assert!(error.contains("99999 has no place in its uid_map"), "{error}");
}

#[test]
fn a_start_waits_for_the_create_to_be_done() {
    require!(ours);
    let mut case = in_cgroup(Case::new("echo started; sleep 1000"));
    let script = "sleep 0.3";
    case.set("/hooks/createRuntime", json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]));
    let bundle = case.bundle();
    let mut create = case.command(&["create", "--bundle", &bundle, &case.id]);
    let mut create = create.stdout(fs::File::create(case.path("out")).unwrap()).spawn().unwrap();
    wait_for("a state", || case.call(&["state", &case.id]).status.success());
    assert_eq!(case.status(), "creating");
    case.ok(&["start", &case.id]);
    assert!(create.wait().unwrap().success());
    wait_for("output", || case.written() == "started\n");
}

#[test]
fn the_configuration_may_be_another_file() {
    require!(ours);
    let case = Case::new("echo other");
    case.call(&["list"]);
    fs::create_dir(case.path("sub")).unwrap();
    fs::rename(case.path("config.json"), case.path("sub/other.json")).unwrap();
    let mut command = Command::new(runtime());
    command.arg("--root").arg(case.path("state")).args([
        "run",
        "--bundle",
        &case.bundle(),
        "--config",
        "sub/other.json",
        &case.id,
    ]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(text(&output.stdout), "other\n", "{}", text(&output.stderr));
}

#[test]
fn an_impossible_deadline_is_told_with_its_reason() {
    require!(ours);
    for (given, wanted) in [
        (json!({"deadline": 2_000_000}), "requires `runtime`"),
        (json!({"runtime": 1_000_000}), "requires `deadline`"),
        (json!({"runtime": 0, "deadline": 2_000_000}), "must be greater than 0"),
        (json!({"runtime": 100, "deadline": 2_000_000}), "must be between"),
        (json!({"runtime": 3_000_000, "deadline": 2_000_000}), "must be <= deadline"),
        (json!({"runtime": 1_000_000, "deadline": 2_000_000, "period": 1_500_000}), "must be <= period"),
    ] {
        let mut case = Case::new("true").with("/process/scheduler", given);
        case.set("/process/scheduler/policy", json!("SCHED_DEADLINE"));
        let error = text(&case.run().stderr);
        assert!(error.contains("process.scheduler") && error.contains(wanted), "{wanted}: {error}");
    }
}

#[test]
fn a_capability_that_nobody_knows_is_not_given_to_an_exec() {
    require!();
    let case = Case::new("sleep 1000");
    case.start();
    let output = case.exec(&["--cap", "CAP_NONSENSE", &case.id, "true"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("CAP_NONSENSE"), "it must be told: {}", text(&output.stderr));
}

#[test]
fn a_mount_may_cover_a_link_itself() {
    require!(ours);
    let mut case = Case::new("cat /data/link");
    symlink("nowhere", case.rootfs().join("data/link")).unwrap();
    fs::write(case.path("file"), "found\n").unwrap();
    bind(&case.path("file"), "/data/link", &["bind", "dest-nofollow"], &mut case);
    assert_eq!(case.output(), "found\n");
    assert!(!case.rootfs().join("data/nowhere").exists());
    let mut case = Case::new("readlink /data/link");
    symlink("nowhere", case.rootfs().join("data/link")).unwrap();
    symlink("elsewhere", case.path("other")).unwrap();
    bind(&case.path("other"), "/data/link", &["bind", "dest-nofollow", "src-nofollow"], &mut case);
    assert_eq!(case.output(), "elsewhere\n");
}
