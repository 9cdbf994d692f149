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
    assert!(case.fails(&["start", &case.id]).contains("the reason"));
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
