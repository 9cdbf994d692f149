//! Ways out of a container that runtimes have had, each tried here. Those that are not here are in the parent module
//! under "escapes", and for the parsers beside them.

use super::*;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// CVE-2021-30465, CVE-2024-45310: a directory on the way to a mount target becomes a link while the runtime works.
/// A reference from before the second, like runc 1.1.5, fails this and makes a directory on the host.
#[test]
fn a_target_that_is_exchanged_for_a_link_meanwhile_leads_nowhere() {
    require!(ours);
    let mut case = Case::new("true");
    let victim = case.path("victim");
    fs::create_dir(&victim).unwrap();
    let (place, link) = (case.rootfs().join("data/x"), case.rootfs().join("data/y"));
    fs::create_dir(&place).unwrap();
    symlink(format!("../../../../../../..{}", victim.display()), &link).unwrap();
    for n in 0..8 {
        case.set(
            "/mounts/-",
            json!({"destination": format!("/data/x/sub{n}/deep"), "type": "tmpfs", "source": "tmpfs"}),
        );
    }
    let stop = Arc::new(AtomicBool::new(false));
    let racer = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::Relaxed) {
                let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &place, nix::fcntl::AT_FDCWD, &link, exchange)
                    .unwrap();
            }
        }
    });
    for _ in 0..15 {
        // It may fail: what counts is what it did on the host.
        let _ = case.run();
    }
    stop.store(true, Ordering::Relaxed);
    racer.join().unwrap();
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "something was made on the host");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&case.bundle()), "{mounts}");
}

/// CVE-2021-43784: more of a configuration than a 16-bit length can tell must not become another configuration.
#[test]
fn lists_beyond_every_length_field_are_refused_whole() {
    require!();
    let maps: Vec<Value> =
        (0..70_000).map(|n| json!({"containerID": n, "hostID": 100_000 + n, "size": 1})).collect();
    let case = in_cgroup(Case::new("true"))
        .with("/linux/namespaces/-", json!({"type": "user"}))
        .with("/linux/uidMappings", json!(maps))
        .with("/linux/gidMappings", json!(maps));
    assert!(case.create(&[]).is_err());
    let _ = case.call(&["delete", "--force", &case.id]);
    case.assert_gone();
    let path = format!("/proc/self/ns/../{}net", "ns/../".repeat(12_000));
    let case = Case::new("true").join("network", &path);
    assert!(case.create(&[]).is_err());
}

/// CVE-2022-29162, CVE-2022-27650, CVE-2025-27612: capabilities that are inherited must be asked for.
#[test]
fn the_template_gives_no_inheritable_and_no_ambient_capabilities() {
    require!(ours);
    let case = Case::new("true");
    let dir = case.path("fresh");
    fs::create_dir(&dir).unwrap();
    case.ok(&["spec", "--bundle", dir.to_str().unwrap()]);
    let spec: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let sets = &spec["process"]["capabilities"];
    assert!(
        sets["bounding"].is_array() && sets["inheritable"].is_null() && sets["ambient"].is_null(),
        "{sets}"
    );
}

/// CVE-2025-52565: what the image has in the place of the console must not take the terminal somewhere else.
#[test]
fn a_console_that_is_a_link_takes_the_terminal_nowhere() {
    require!(ours);
    let script = "stat -c %F /dev/console /etc/victim > /data/seen";
    let mut case = Case::new(script).with("/process/terminal", json!(true));
    case.config["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != "/dev");
    let victim = case.rootfs().join("etc/victim");
    fs::write(&victim, "mine\n").unwrap();
    symlink("/etc/victim", case.rootfs().join("dev/console")).unwrap();
    let socket = case.path("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    case.create(&["--console-socket", socket.to_str().unwrap()]).unwrap();
    let _terminal = receive_terminal(&listener);
    case.ok(&["start", &case.id]);
    // On the link itself, not on what it names.
    let seen = || fs::read_to_string(case.rootfs().join("data/seen")).unwrap_or_default();
    wait_for("what is where", || seen().lines().count() == 2);
    assert_eq!(seen(), "character special file\nregular file\n");
    assert_eq!(fs::read_to_string(victim).unwrap(), "mine\n");
}

/// CVE-2025-52881, CVE-2019-16884: a container that has put files of its own over /proc gets no write of the runtime.
#[test]
fn a_forged_proc_gets_nothing_of_an_exec() {
    require!(ours);
    let forge = "mount -t tmpfs forged /proc && mkdir -p /proc/self/attr /proc/1 && \
        touch /proc/self/oom_score_adj /proc/self/attr/exec /proc/forged && sleep 1000";
    let case = Case::new(forge);
    case.start();
    wait_for("the forged files", || case.exec(&[&case.id, "test", "-e", "/proc/forged"]).status.success());
    let mut process = case.config["process"].clone();
    process["oomScoreAdj"] = json!(700);
    process["args"][2] = json!("sleep 1000");
    let (file, pid_file) = (case.path("process.json"), case.path("exec.pid"));
    fs::write(&file, process.to_string()).unwrap();
    let args = [
        "exec",
        "-d",
        "--pid-file",
        pid_file.to_str().unwrap(),
        "--process",
        file.to_str().unwrap(),
        &case.id,
    ];
    let status = case.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success());
    let pid = fs::read_to_string(pid_file).unwrap();
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap(), "700\n");
    let forged = case.exec(&[&case.id, "cat", "/proc/self/oom_score_adj", "/proc/self/attr/exec"]);
    assert_eq!((forged.status.code(), text(&forged.stdout)), (Some(0), String::new()));
}

/// CVE-2020-15257: who shares the host's network must not reach a socket of the runtime.
#[test]
fn the_start_socket_is_a_path_for_the_owner_alone() {
    require!(ours);
    let case = Case::new("true");
    case.create(&[]).unwrap();
    let dir = case.path("state").join(&case.id);
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o077, 0);
    for name in ["config.json", "state.json"] {
        assert_eq!(fs::metadata(dir.join(name)).unwrap().mode() & 0o077, 0, "{name}");
    }
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let abstract_ones: Vec<&str> =
        sockets.lines().filter(|l| l.contains(" @") && l.contains(&case.id)).collect();
    assert!(abstract_ones.is_empty(), "{abstract_ones:?}");
}

/// A sub-cgroup or a cgroup path must not lead to somebody else's group.
#[test]
fn cgroup_paths_with_dots_are_refused() {
    require!(ours);
    let case = in_cgroup(Case::new("sleep 1000"));
    case.start();
    for path in ["..", "../other", "a/../../other"] {
        let output = case.exec(&["--cgroup", path, &case.id, "true"]);
        assert!(!output.status.success(), "{path}");
        assert!(text(&output.stderr).contains("cgroup"), "{}", text(&output.stderr));
    }
    let other = Case::new("true").with("/linux/cgroupsPath", json!("/keel-it-x/../../etc"));
    assert!(other.create(&[]).unwrap_err().contains("cgroupsPath"));
}

/// CVE-2025-24965: what the runtime itself adds to the root must not be written through a link of the image.
#[test]
fn the_notify_directory_stays_inside_when_run_is_a_link() {
    require!();
    let case = Case::new("true");
    let victim = case.path("victim");
    fs::create_dir(&victim).unwrap();
    symlink(format!("../../../../../../..{}", victim.display()), case.rootfs().join("run")).unwrap();
    let bundle = case.bundle();
    let _ = case
        .command(&["run", "--bundle", &bundle, &case.id])
        .env("NOTIFY_SOCKET", case.path("manager.sock"))
        .output()
        .unwrap();
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "something was made on the host");
}
