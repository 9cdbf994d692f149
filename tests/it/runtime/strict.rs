//! What must not pass in silence: values that would mean more rights than they say, and states that nobody is in.

use super::*;
use nix::libc;

/// To the kernel it means "leave it as it is": the process would stay root.
const NO_ID: u32 = u32::MAX;

#[test]
fn an_id_that_is_none_never_leaves_the_process_root() {
    require!();
    for (field, value) in [
        ("/process/user/uid", json!(NO_ID)),
        ("/process/user/gid", json!(NO_ID)),
        ("/process/user/additionalGids", json!([5, NO_ID])),
    ] {
        let output = Case::new("id").with(field, value).run();
        assert!(!output.status.success(), "{field}: {}", text(&output.stdout));
    }
    let case = Case::new("sleep 1000");
    case.start();
    for user in [format!("{NO_ID}"), format!("1000:{NO_ID}")] {
        let output = case.exec(&["--user", &user, &case.id, "id"]);
        assert_eq!(output.status.code(), Some(255), "{user}: {}", text(&output.stdout));
    }
}

#[test]
fn a_field_for_another_system_is_refused() {
    require!(ours);
    let case = Case::new("true").with("/process/user/username", json!("somebody"));
    assert!(case.fails(&["run", "--bundle", &case.bundle(), &case.id]).contains("process.user.username"));
}

/// A session keyring with a key that is shown only to whoever has the keyring.
fn host_keyring() -> std::io::Result<()> {
    const JOIN_SESSION_KEYRING: i32 = 1;
    const SETPERM: i32 = 5;
    const SESSION: i32 = -3;
    const POSSESSOR_ALL: u32 = 0x3f00_0000;
    // SAFETY: names are NUL-terminated, the payload has the given length.
    unsafe {
        let ring = libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, c"keel-it".as_ptr(), 0, 0, 0);
        let (kind, name, payload) = (c"user".as_ptr(), c"keel-it-secret".as_ptr(), c"s".as_ptr());
        let key = libc::syscall(libc::SYS_add_key, kind, name, payload, 1, SESSION);
        for id in [key, ring] {
            if id < 0 || libc::syscall(libc::SYS_keyctl, SETPERM, id, POSSESSOR_ALL, 0, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

#[test]
fn exec_leaves_the_callers_keys_outside() {
    require!();
    let keys = |mut command: Command| {
        // SAFETY: system calls only.
        let output = unsafe { command.pre_exec(host_keyring) }.output();
        output.map(|output| text(&output.stdout))
    };
    let mut cat = Command::new("cat");
    cat.arg("/proc/keys");
    match keys(cat) {
        Ok(seen) => assert!(seen.contains("keel-it-secret"), "{seen}"),
        Err(e) => return eprintln!("skipped: no keyrings here: {e}"),
    }
    let case = Case::new("sleep 1000");
    case.start();
    let seen = keys(case.command(&["exec", &case.id, "cat", "/proc/keys"])).unwrap();
    assert!(seen.contains(&format!("_ses.{}", case.id)), "that of the container: {seen}");
    assert!(!seen.contains("keel-it-secret"), "{seen}");
}

/// Opens a block device of the host, if it can.
const OPEN: &str = "dd if=/dev/disk of=/dev/null count=0 2>&1; true";

fn with_disk(case: Case) -> Case {
    case.with("/linux/devices", json!([{"type": "b", "path": "/dev/disk", "major": 7, "minor": 0}]))
}

#[test]
fn without_device_rules_no_device_can_be_opened() {
    require!();
    for resources in [json!({}), Value::Null] {
        let case = with_disk(Case::new(OPEN)).with("/linux/resources", resources);
        let said = case.output();
        assert!(said.contains("not permitted"), "{said}");
    }
}

#[test]
fn a_device_rule_that_cannot_be_expressed_is_refused() {
    require!();
    if !Path::new("/sys/fs/cgroup/devices").is_dir() {
        return eprintln!("skipped: the device rules of cgroup v2 can express all");
    }
    let rules = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "access": "rwm"},
        {"allow": false, "type": "b", "major": 7, "minor": 0, "access": "rwm"}
    ]);
    let case = with_disk(Case::new(OPEN)).with("/linux/resources/devices", rules);
    let error = case.fails(&["run", "--bundle", &case.bundle(), &case.id]);
    assert!(error.contains("cgroup"), "{error}");
    case.assert_gone();
}

#[test]
fn device_rules_without_a_devices_cgroup_are_an_error() {
    require!();
    if !Path::new("/sys/fs/cgroup/devices").is_dir() {
        return eprintln!("skipped: cgroup v2 always has device rules");
    }
    let case = with_disk(Case::new(OPEN));
    let inner = case.command(&["run", "--bundle", &case.bundle(), &case.id]);
    let mut outer = Command::new("unshare");
    outer.args(["--mount", "sh", "-c", "umount /sys/fs/cgroup/devices && exec \"$@\"", "sh"]);
    let output = outer.arg(inner.get_program()).args(inner.get_args()).output().unwrap();
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("devices"), "{}", text(&output.stderr));
    case.assert_gone();
}

#[test]
fn a_start_that_was_killed_leaves_a_container_that_runs() {
    require!(ours);
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, send, socket};
    use std::os::fd::AsRawFd;
    let case = Case::new("sleep 1000");
    case.create(&[]).unwrap();
    // As far as a killed `start` came: the word is said, and nobody has cleared up.
    let starter = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let name = case.path("state").join(&case.id).join("start.sock");
    connect(starter.as_raw_fd(), &UnixAddr::new(&name).unwrap()).unwrap();
    assert_eq!(case.status(), "created");
    send(starter.as_raw_fd(), b"start", nix::sys::socket::MsgFlags::empty()).unwrap();
    drop(starter);
    case.wait_for_status("running");
    assert!(case.fails(&["start", &case.id]).contains("already running"));
    assert!(case.fails(&["delete", &case.id]).contains("not stopped"));
    case.ok(&["pause", &case.id]);
    assert_eq!(case.status(), "paused");
}

#[test]
fn a_frozen_created_container_answers_any_number_of_questions() {
    require!(ours);
    let case = Case::new("true");
    case.create(&[]).unwrap();
    case.ok(&["pause", &case.id]);
    for _ in 0..20 {
        assert_eq!(case.status(), "created");
    }
}

#[test]
fn parameters_of_the_hosts_namespace_are_not_set() {
    require!();
    let forward = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let case = Case::new("true")
        .join("network", "/proc/self/ns/net")
        .with("/linux/sysctl", json!({"net.ipv4.ip_forward": forward.trim()}));
    let error = case.fails(&["run", "--bundle", &case.bundle(), &case.id]);
    assert!(error.contains("sysctl"), "{error}");
    case.assert_gone();
}

#[test]
fn a_notification_that_nobody_could_answer_is_refused() {
    require!(ours);
    for (seccomp, word) in [
        (json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/x"}), "defaultAction"),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x",
                   "syscalls": [{"names": ["sendmsg"], "action": "SCMP_ACT_NOTIFY"}]}),
            "sendmsg",
        ),
    ] {
        let case = Case::new("true").with("/linux/seccomp", seccomp);
        let error = case.fails(&["run", "--bundle", &case.bundle(), &case.id]);
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_limit_that_is_not_set_is_refused_or_told() {
    require!(ours);
    let with = |field: &str, value: Value| {
        let case = Case::new("true").with(field, value);
        let output = case.run();
        (output.status.success(), text(&output.stderr))
    };
    let (ran, said) = with("/linux/resources/memory/swappiness", json!(200));
    assert!(!ran && said.contains("memory.swappiness"), "{said}");
    let (ran, said) = with("/linux/resources/memory/kernel", json!(1 << 20));
    assert!(ran && said.contains("memory.kernel has no effect"), "{said}");
    let (ran, said) = with("/linux/resources/network", json!({"classID": 0, "priorities": []}));
    assert!(ran && said.is_empty(), "zero is none: {said}");
}

#[test]
fn an_oom_score_that_cannot_be_had_is_told() {
    require!(ours);
    let output = Case::new("cat /proc/self/oom_score_adj").with("/process/oomScoreAdj", json!(-900)).run();
    let told = text(&output.stderr).contains("process.oomScoreAdj");
    assert!(output.status.success());
    assert_eq!(text(&output.stdout).trim() != "-900", told, "{output:?}");
}

#[test]
fn preserved_descriptors_must_be_there() {
    require!(ours);
    let case = Case::new("sleep 1000");
    case.start();
    for count in ["1", "4294967295"] {
        let output = case.exec(&["--preserve-fds", count, &case.id, "true"]);
        assert_eq!(output.status.code(), Some(255), "{}", text(&output.stderr));
    }
}

#[test]
fn a_configuration_without_an_end_is_refused() {
    require!(ours);
    let case = Case::new("sleep 1000");
    case.start();
    let output = case.exec(&["--process", "/dev/zero", &case.id]);
    assert!(text(&output.stderr).contains("larger than"), "{}", text(&output.stderr));
}

#[test]
fn errors_of_the_command_line_reach_the_log() {
    require!();
    let case = Case::new("true");
    let log = case.path("log.json");
    let log = log.to_str().unwrap();
    for args in [&["create", "--nope", "x"][..], &["create"], &["features", "x"], &["no-command"]] {
        let _ = fs::remove_file(log);
        case.fails(&[&["--log", log, "--log-format", "json"], args].concat());
        let line: Value = serde_json::from_str(&fs::read_to_string(log).unwrap()).unwrap();
        assert_eq!(line["level"], "error", "{args:?}: {line}");
    }
}

/// Makes a "restored process" in the cgroup it is in, as CRIU does.
const CRIU: &str = r#"#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --pidfile ] && file=$2; shift; done
sleep 1000 >/dev/null 2>&1 &
echo $! > "$file"
echo $! > "$(dirname "$0")/restored"
"#;

#[test]
fn a_restore_that_cannot_write_the_pid_file_leaves_nothing() {
    require!(ours);
    let case = in_cgroup(Case::new("true"));
    let criu = case.path("criu");
    fs::write(&criu, CRIU).unwrap();
    fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(case.path("image")).unwrap();
    let (criu, image) = (criu.display().to_string(), case.path("image").display().to_string());
    let bundle = case.bundle();
    let args = ["--criu", &criu, "restore", "--detach", "--image-path", &image, "--bundle", &bundle];
    let error = case.fails(&[&args[..], &["--pid-file", "/nowhere/pid", &case.id]].concat());
    assert!(error.contains("/nowhere"), "{error}");
    let pid: i32 = fs::read_to_string(case.path("restored")).unwrap().trim().parse().unwrap();
    wait_for("the restored process to go", || !alive(pid));
    case.assert_gone();
    assert!(case.call(&[&args[..], &[&case.id]].concat()).status.success());
    let pid: i32 = fs::read_to_string(case.path("restored")).unwrap().trim().parse().unwrap();
    assert!(alive(pid), "without the failure it stays");
    case.ok(&["delete", "--force", &case.id]);
}

#[test]
fn of_creates_in_one_cgroup_one_has_it_and_lives() {
    require!(ours);
    for round in 0..10 {
        let cgroup = format!("/keel-it-shared-{}-{round}", std::process::id());
        let new = || Case::new("true").with("/linux/cgroupsPath", json!(cgroup));
        let cases = [new(), new(), new(), new()];
        let spawned: Vec<_> = cases
            .iter()
            .map(|case| {
                let mut create = case.command(&["create", "--bundle", &case.bundle(), &case.id]);
                let file = |name: &str| fs::File::create(case.path(name)).unwrap();
                create.stdout(file("out")).stderr(file("err")).spawn().unwrap()
            })
            .collect();
        let succeeded: Vec<bool> = spawned.into_iter().map(|mut c| c.wait().unwrap().success()).collect();
        let won: Vec<&Case> = cases.iter().zip(&succeeded).filter(|(_, ok)| **ok).map(|(c, _)| c).collect();
        assert_eq!(won.len(), 1, "{succeeded:?}");
        assert_eq!(won[0].status(), "created");
        for (loser, _) in cases.iter().zip(&succeeded).filter(|(_, ok)| !**ok) {
            let said = fs::read_to_string(loser.path("err")).unwrap();
            assert!(said.contains("container's cgroup"), "{said}");
        }
        won[0].ok(&["delete", "--force", &won[0].id]);
    }
}

#[test]
fn a_broken_state_is_told_by_list_and_cleared_by_a_forced_delete() {
    require!(ours);
    let mut case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    let pid = case.pid();
    let dir = case.path("state").join(&case.id);
    fs::write(dir.join("state.json"), "{").unwrap();
    let other = format!("{}-whole", case.id);
    case.set("/linux/cgroupsPath", json!(format!("/{other}")));
    let mut create = case.command(&["create", "--bundle", &case.bundle(), &other]);
    assert!(create.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let output = case.call(&["list"]);
    case.ok(&["delete", "--force", &other]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains(&other), "{}", text(&output.stdout));
    let said = text(&output.stderr);
    assert!(said.contains("warning") && said.contains(&case.id), "{said}");
    let output = case.call(&["delete", "--force", &case.id]);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("not known"), "{said}");
    wait_for("the container's process to go", || !alive(pid));
    case.assert_gone();
}

#[test]
fn a_failing_poststop_hook_is_told_in_the_log_after_the_state_is_gone() {
    require!(ours);
    let mut case = Case::new("true");
    let gone = format!("test ! -e {}/{} && exit 7; exit 3", case.path("state").display(), case.id);
    case.set("/hooks/poststop", json!([{"path": "/bin/sh", "args": ["sh", "-c", gone]}]));
    case.create(&[]).unwrap();
    let log = case.path("log.json").display().to_string();
    case.ok(&["--log", &log, "--log-format", "json", "delete", "--force", &case.id]);
    let line: Value = serde_json::from_str(&fs::read_to_string(log).unwrap()).unwrap();
    assert_eq!(line["level"], "warning");
    let said = line["msg"].as_str().unwrap();
    assert!(said.contains("poststop") && said.contains("exit status 7"), "{said}");
}

/// Lets `keyctl(2)` answer an error.
fn without_keyctl(error: i32) -> std::io::Result<()> {
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let filter = [
        line(LOAD, 0, 0, 0),
        line(JUMP_EQUAL, 0, 1, libc::SYS_keyctl as u32),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | error as u32),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and its filter outlive the call.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[test]
fn the_callers_keyring_is_never_kept_in_silence() {
    require!();
    for (error, fine) in [(libc::EPERM, false), (libc::EDQUOT, false), (libc::ENOSYS, true)] {
        let run = |more: &[&str]| {
            let case = Case::new("true");
            let bundle = case.bundle();
            let mut command = case.command(&[&["run", "--bundle", &bundle], more, &[&case.id]].concat());
            // SAFETY: a system call only.
            unsafe { command.pre_exec(move || without_keyctl(error)) }.output().unwrap()
        };
        let output = run(&[]);
        let said = text(&output.stderr);
        assert_eq!(output.status.success(), fine, "{error}: {said}");
        assert!(fine || said.contains("keyring"), "{said}");
        assert!(run(&["--no-new-keyring"]).status.success());
    }
}

#[test]
fn a_create_that_was_overtaken_leaves_the_next_of_that_id_alone() {
    require!(ours);
    let mut case = in_cgroup(Case::new("sleep 1000"));
    let (here, go) = (case.path("here").display().to_string(), case.path("go").display().to_string());
    let wait = format!("touch {here}; until test -e {go}; do /bin/busybox usleep 2000; done");
    case.set("/hooks/createRuntime", json!([{"path": "/bin/sh", "args": ["sh", "-c", wait]}]));
    let mut slow = case.command(&["create", "--bundle", &case.bundle(), &case.id]);
    let file = |name: &str| fs::File::create(case.path(name)).unwrap();
    let mut slow = slow.stdout(file("out")).stderr(file("slow")).spawn().unwrap();
    wait_for("the hook to run", || Path::new(&here).exists());
    case.ok(&["delete", "--force", &case.id]);
    case.set("/hooks", json!({}));
    case.start();
    let state = case.state();
    fs::write(&go, "").unwrap();
    assert!(!slow.wait().unwrap().success());
    assert_eq!(case.state(), state);
    assert_eq!(case.status(), "running");
    case.ok(&["exec", &case.id, "true"]);
}
