//! Readiness (sd_notify) and socket activation (sd_listen_fds) pass through the runtime.

use super::*;
use std::os::unix::net::UnixDatagram;

/// A container with the host's perl, which can speak over a datagram socket.
fn with_perl(script: &str) -> Case {
    let mut case = Case::new(script);
    for dir in ["/usr", "/lib", "/lib64"].iter().filter(|d| Path::new(d).exists()) {
        case.set(
            "/mounts/-",
            json!({"destination": dir, "type": "bind", "source": dir, "options": ["rbind", "ro"]}),
        );
    }
    case
}

const SEND: &str = "send() { perl -MSocket -e 'socket(S, AF_UNIX, SOCK_DGRAM, 0) and \
    connect(S, sockaddr_un($ENV{NOTIFY_SOCKET})) and send(S, $ARGV[0], 0) or die $!' \"$1\"; }; ";

fn no_perl() -> bool {
    let missing = !Path::new("/usr/bin/perl").exists();
    if missing {
        eprintln!("skipped: needs /usr/bin/perl to speak over a datagram socket");
    }
    missing
}

fn manager(case: &Case) -> (UnixDatagram, String) {
    let path = case.path("manager.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    (socket, path.display().to_string())
}

fn hear(socket: &UnixDatagram, wanted: &str) -> String {
    let mut all = String::new();
    let mut buffer = [0u8; 4096];
    while !all.contains(wanted) {
        let n = socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{wanted:?} after {all:?}: {e}"));
        all += &text(&buffer[..n]);
        all.push('\n');
    }
    all
}

/// Created, and a `start` under way that knows the manager's socket.
fn created_and_starting(case: &Case, manager: &str) -> std::process::Child {
    let bundle = case.bundle();
    let mut create = case.command(&["create", "--bundle", &bundle, &case.id]);
    let file = |name: &str| fs::File::create(case.path(name)).unwrap();
    let created =
        create.env("NOTIFY_SOCKET", manager).stdout(file("out")).stderr(file("err")).status().unwrap();
    assert!(created.success(), "{}", fs::read_to_string(case.path("err")).unwrap());
    case.command(&["start", &case.id]).env("NOTIFY_SOCKET", manager).spawn().unwrap()
}

#[test]
fn start_returns_when_the_container_is_ready_and_the_manager_learns_its_pid() {
    require!();
    if no_perl() {
        return;
    }
    let case = with_perl(&format!(
        "{SEND} touch /data/begun; while ! test -e /data/go; do sleep 0.02; done; send READY=1; sleep 1000"
    ));
    let (socket, path) = manager(&case);
    let mut start = created_and_starting(&case, &path);
    wait_for("the program to run", || case.rootfs().join("data/begun").exists());
    assert!(start.try_wait().unwrap().is_none(), "start returned before the container was ready");
    fs::write(case.rootfs().join("data/go"), "").unwrap();
    wait_for("the start to return", || start.try_wait().unwrap().is_some());
    assert!(start.wait().unwrap().success());
    let said =
        hear(&socket, "READY=1") + &if reference() { hear(&socket, "MAINPID=") } else { String::new() };
    assert!(said.contains(&format!("MAINPID={}", case.pid())), "{said}");
}

#[test]
fn a_container_that_ends_before_it_is_ready_does_not_hold_the_start() {
    require!();
    let case = Case::new("test -S $NOTIFY_SOCKET && echo there");
    let (_socket, path) = manager(&case);
    let mut start = created_and_starting(&case, &path);
    wait_for("the start to return", || start.try_wait().unwrap().is_some());
    assert!(start.wait().unwrap().success());
    case.wait_for_status("stopped");
    assert_eq!(case.written(), "there\n");
}

#[test]
fn a_foreground_run_passes_every_notice_on_also_from_another_user_namespace() {
    require!(ours);
    if no_perl() {
        return;
    }
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    let case = with_perl(&format!("{SEND} send STATUS=warm; send READY=1; send STOPPING=1"))
        .with("/linux/namespaces/-", json!({"type": "user"}))
        .with("/linux/uidMappings", map.clone())
        .with("/linux/gidMappings", map);
    std::os::unix::fs::chown(case.rootfs(), Some(100_000), Some(100_000)).unwrap();
    let (socket, path) = manager(&case);
    // The runtime's own directory must not be what closes the way.
    let state = case.path("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o711)).unwrap();
    let bundle = case.bundle();
    let output =
        case.command(&["run", "--bundle", &bundle, &case.id]).env("NOTIFY_SOCKET", &path).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = hear(&socket, "STOPPING=1");
    let order = ["STATUS=warm", "MAINPID=", "READY=1", "STOPPING=1"].map(|w| said.find(w).expect(w));
    assert!(order.is_sorted(), "{said}");
}

/// Runs the case with descriptor 3 open on a line, and these settings of the environment.
fn activated(case: &Case, settings: &str) -> String {
    fs::write(case.path("extra"), "handed over\n").unwrap();
    let bundle = case.bundle();
    let inner = case.command(&["run", "--bundle", &bundle, &case.id]);
    let output = Command::new("/bin/sh")
        .arg("-c")
        .arg(format!("exec 3<{}; {settings}; exec \"$@\"", case.path("extra").display()))
        .arg("sh")
        .arg(inner.get_program())
        .args(inner.get_args())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn descriptors_of_a_socket_activation_reach_the_program_under_its_own_pid() {
    require!();
    let script = "read line <&3; echo $LISTEN_FDS $LISTEN_PID $line";
    let ours = "export LISTEN_FDS=1 LISTEN_PID=$$";
    assert_eq!(activated(&Case::new(script), ours), "1 1 handed over\n");
    if !reference() {
        // Where the program is not number 1, the number is still its own.
        let script = "read line <&3; test $LISTEN_PID = $$ && test $$ != 1 && echo $LISTEN_FDS $line";
        assert_eq!(activated(&Case::new(script).without_namespace("pid"), ours), "1 handed over\n");
    }
}

#[test]
fn descriptors_that_were_meant_for_another_process_stay_outside() {
    require!(ours);
    let script = "test -e /proc/self/fd/3 && echo open; echo ${LISTEN_FDS-none}";
    // The test's own descriptor would be number 3.
    let script = &script.replace("/proc/self/fd/3", "/proc/$$/fd/3");
    assert_eq!(activated(&Case::new(script), "export LISTEN_FDS=1 LISTEN_PID=1"), "none\n");
}
