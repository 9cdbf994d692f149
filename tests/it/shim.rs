//! The container monitor with real containers: exits, logs, control, and its own death.

mod clients;
mod conmon;
mod load;
mod logs;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use keel_proto::{
    Attach, Attachment, Client, ClientError, ErrorCode, Event, Exec, ExitRecord, MAX_MESSAGE, Phase, Reply,
    Request, Session, SpareReaders, Stream,
};
use keel_tests::free_port;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// First among the options of a container: in place of a log in CRI format.
const NO_LOG: &str = "no log";
const RAW_LOG: &str = "raw log";

/// Nothing here takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn exit_code_and_every_byte_of_output_are_kept() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("echo out; echo err >&2; printf part; exit 3", &[]);
    let record = container.exit();
    assert_eq!(
        (record.code, record.signal, record.core, record.oom, record.lost),
        (3, 0, false, false, false)
    );
    assert_eq!(record.id, container.id);
    assert!(record.started_at_ms > 0 && record.finished_at_ms >= record.started_at_ms);
    let log = fs::read_to_string(container.log(0)).unwrap();
    assert_eq!(output(&log, "stdout"), "out\npart\n");
    assert_eq!(output(&log, "stderr"), "err\n");
    for line in log.lines() {
        let (time, rest) = line.split_at(30);
        assert!(time.ends_with('Z') && time.as_bytes()[19] == b'.', "{line}");
        assert!(time[20..29].bytes().all(|b| b.is_ascii_digit()), "{line}");
        assert!([" stdout F ", " stderr F ", " stdout P "].contains(&&rest[..10]), "{line}");
    }
    container.assert_gone();
}

#[test]
fn a_signal_is_recorded_as_a_signal() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    container.client().signal(9).unwrap();
    let record = container.exit();
    assert_eq!((record.code, record.signal), (137, 9));
    assert!(!record.oom);
}

#[test]
fn running_out_of_memory_is_recorded() {
    let Some(rig) = Rig::new() else { return };
    let limit = json!({"memory": {"limit": 32 << 20}});
    let container = rig.run_with("exec dd if=/dev/zero of=/dev/null bs=100M count=1", &[], limit).unwrap();
    let record = container.exit();
    assert_eq!((record.code, record.signal, record.oom), (137, 9, true));
}

#[test]
fn a_container_that_cannot_be_made_leaves_nothing_and_the_runtime_is_quoted() {
    let Some(rig) = Rig::new() else { return };
    let id = rig.id();
    let dir = rig.bundle(&id, &["/bin/no-such-program".into()], false, json!({}));
    let out = rig.command(&id, &dir).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.starts_with("error ") && text.contains("/bin/no-such-program"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    let mut left: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["config.json", "rootfs"]);
    assert!(!rig.exits().join(format!("{id}.json")).exists());
}

#[test]
fn a_bad_command_line_is_refused_with_its_reason() {
    let Some(rig) = Rig::new() else { return };
    let out = Command::new(&rig.shim).args(["run", "--id", "a", "--what"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert_eq!(String::from_utf8(out.stdout).unwrap(), "error unknown option --what\n");
}

#[test]
fn stop_waits_for_a_willing_container() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.05; done", &[]);
    container.wait_for_output("ready");
    container.client().stop(15, PATIENCE).unwrap();
    assert_eq!(container.exit().code, 4);
    assert!(container.output("stdout").ends_with("bye\n"));
}

#[test]
fn stop_kills_all_of_an_unwilling_container_after_the_grace_period() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("trap '' TERM; (trap '' TERM; sleep 1000) & echo ready; wait; sleep 1000", &[]);
    container.wait_for_output("ready");
    let begun = Instant::now();
    let mut client = container.client();
    client.stop(15, Duration::from_millis(300)).unwrap();
    assert_eq!(client.state().unwrap().phase, Phase::Stopping);
    let record = client.wait(Some(PATIENCE)).unwrap();
    assert_eq!((record.code, record.signal), (137, 9));
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(container.exit(), record);
    container.assert_gone();
}

#[test]
fn waiters_are_told_only_what_is_on_disk() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let mut waiter = container.client();
    container.client().signal(9).unwrap();
    let told = waiter.wait(Some(PATIENCE)).unwrap();
    let on_disk = ExitRecord::parse(&fs::read_to_string(&container.exit_file).unwrap()).unwrap();
    assert_eq!(told, on_disk);
}

#[test]
fn no_line_is_lost_or_doubled_when_the_shim_is_killed_again_and_again() {
    let Some(rig) = Rig::new() else { return };
    const LINES: u32 = 400_000;
    let options = ["--log-max-bytes", "500000", "--log-max-files", "1000"];
    let container = rig.run(&format!("seq 1 {LINES}; echo done >&2; sleep 0.2; exit 7"), &options);
    for _ in 0..5 {
        // In the middle of the flood, wherever that is.
        let before = container.log_size();
        poll("more output", || container.log_size() != before || container.exit_file.exists());
        if !container.kill_shim() {
            break;
        }
        assert_eq!(container.adopt().unwrap(), container.pid());
    }
    let record = container.exit();
    if record.lost {
        eprintln!("skipped in part: this kernel keeps no exit status for an adopter");
        assert_eq!((record.code, record.signal), (-1, 0));
    } else {
        assert_eq!(record.code, 7);
    }
    let seen = container.output("stdout");
    let mut expected = String::new();
    (1..=LINES).for_each(|n| expected.push_str(&format!("{n}\n")));
    let odd = seen.lines().zip(1..).find(|(line, n)| *line != n.to_string());
    assert!(seen == expected, "{} of {} bytes, {odd:?}", seen.len(), expected.len());
    assert_eq!(container.output("stderr"), "done\n");
    container.assert_gone();
}

#[test]
fn a_container_that_ended_without_a_shim_is_recorded_as_unknown_and_its_last_words_are_kept() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("while [ ! -e /go ]; do sleep 0.02; done; echo last words; exit 5", &[]);
    let _spares = SpareReaders::open(&container.dir).unwrap();
    assert!(container.kill_shim());
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let pid = container.pid();
    poll("the end of the container", || !Path::new(&format!("/proc/{pid}")).exists());
    container.adopt().unwrap();
    let record = container.exit();
    assert_eq!((record.code, record.signal, record.lost), (-1, 0, true));
    assert_eq!(container.output("stdout"), "last words\n");
    container.assert_gone();
}

#[test]
fn whoever_kept_the_pidfd_learns_how_a_container_without_a_shim_ended() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("while [ ! -e /go ]; do sleep 0.02; done; exit 5", &[]);
    let pidfd = container.client().spares().unwrap().pidfd.unwrap();
    assert!(container.kill_shim());
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let pid = container.pid();
    poll("the end of the container", || !Path::new(&format!("/proc/{pid}")).exists());
    container.adopt_with("--pidfd", &pidfd).unwrap();
    let record = container.exit();
    if record.lost {
        eprintln!("skipped in part: this kernel keeps no exit status in a pidfd");
    } else {
        assert_eq!((record.code, record.signal), (5, 0));
    }
}

#[test]
fn a_terminal_outlives_its_shim_where_somebody_keeps_it() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("echo one; read x; echo got $x; exit 8", &["--tty"]);
    container.wait_for_output("one");
    let terminal = container.client().spares().unwrap().terminal.unwrap();
    assert!(container.kill_shim());
    container.adopt_with("--terminal", &terminal).unwrap();
    drop(terminal);
    let what = Attach { stdin: true, stdout: true, stderr: false, replay_kib: 0 };
    let mut attached = container.client().attach(what).unwrap();
    attached.write_stdin(b"word\n").unwrap();
    let record = container.exit();
    assert!(record.lost || record.code == 8);
    let seen = container.output("stdout");
    assert!(seen.starts_with("one\r\n") && seen.ends_with("got word\r\n"), "{seen:?}");
}

#[test]
fn a_record_that_was_written_is_not_replaced_by_a_successor_that_knows_less() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    assert!(container.kill_shim());
    // As left by a shim that was killed between the record and the runtime's `delete`.
    let pid = container.pid();
    let record = ExitRecord { id: container.id.clone(), pid: pid as u32, code: 42, ..ExitRecord::default() };
    fs::write(&container.exit_file, record.to_json()).unwrap();
    assert_eq!(container.adopt().unwrap(), pid);
    assert_eq!(container.exit(), record);
    container.assert_gone();
}

#[test]
fn an_exit_record_that_the_disk_refuses_is_written_when_it_can_be() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let exits = rig.exits();
    fs::remove_dir(&exits).unwrap();
    let mut waiter = container.client();
    container.client().signal(9).unwrap();
    poll("the end", || container.client().state().is_ok_and(|s| s.phase == Phase::Recording));
    assert!(matches!(waiter.wait(Some(Duration::from_millis(50))), Err(ClientError::Timeout { .. })));
    fs::create_dir(&exits).unwrap();
    assert_eq!(container.exit().signal, 9);
}

#[test]
fn a_running_shim_is_not_replaced_and_a_foreign_directory_not_adopted() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let refused = container.adopt().unwrap_err();
    assert!(refused.starts_with("error shim ") && refused.contains("still runs"), "{refused}");
    let out = Command::new(&rig.shim).args(["adopt", "--dir", "/nowhere"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(out.stdout.starts_with(b"error open /nowhere"), "{out:?}");
}

/// Options that make a shim call a script which notes each call in `calls`, and answers with its `answers` in turn.
fn restarts(rig: &Rig, policy: &str, answers: &str) -> Vec<String> {
    let (calls, lock) = (rig.path().join("calls"), rig.path().join("lock"));
    fs::write(&lock, "").unwrap();
    let script = format!(
        "echo called >> {calls}; n=$(wc -l < {calls}); echo '{answers}' | cut -d, -f$n",
        calls = calls.display()
    );
    let words = ["/bin/sh", "-c", &script].map(|word| format!("--restart-command={word}"));
    let lock = format!("--restart-lock={}", lock.display());
    [format!("--restart={policy}"), lock].into_iter().chain(words).collect()
}

fn calls(rig: &Rig) -> usize {
    fs::read_to_string(rig.path().join("calls")).unwrap_or_default().lines().count()
}

#[track_caller]
fn run_restarted<'a>(rig: &'a Rig, script: &str, options: &[String]) -> Container<'a> {
    rig.run(script, &options.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_shim_that_nobody_else_relieves_calls_for_a_restart_until_it_is_done() {
    let Some(rig) = Rig::new() else { return };
    let container = run_restarted(&rig, "exit 3", &restarts(&rig, "on-failure", "wait 20,wait 20,done"));
    let shim = container.shim_pid();
    assert_eq!(container.exit().code, 3);
    poll("the shim goes", || !runs(shim));
    assert_eq!(calls(&rig), 3);
    container.assert_gone();
}

/// Holds a lock until it is dropped.
struct Owner(std::process::Child);

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_shim_waits_for_the_end_of_who_holds_the_lock() {
    let Some(rig) = Rig::new() else { return };
    let options = restarts(&rig, "always", "done");
    let lock = rig.path().join("lock");
    let owner = Command::new("flock")
        .arg("--no-fork")
        .arg(&lock)
        .args(["sh", "-c", "echo $$ > \"$0\"; exec sleep 1000"])
        .arg(&lock)
        .spawn();
    let owner = Owner(owner.unwrap());
    poll("the lock is held", || !fs::read_to_string(&lock).unwrap().is_empty());
    let container = run_restarted(&rig, "exit 0", &options);
    let shim = container.shim_pid();
    assert_eq!(container.client().wait(Some(PATIENCE)).unwrap().code, 0);
    poll("it rests", || container.client().state().is_ok_and(|s| s.phase == Phase::Resting));
    assert_eq!(calls(&rig), 0);
    drop(owner);
    poll("the shim goes", || !runs(shim));
    assert_eq!(calls(&rig), 1);
}

#[test]
fn nothing_is_restarted_after_success_a_requested_end_or_a_dismissal() {
    let Some(rig) = Rig::new() else { return };
    let options = restarts(&rig, "on-failure", "done");
    let succeeds = run_restarted(&rig, "exit 0", &options);
    let stopped =
        run_restarted(&rig, "trap 'exit 4' TERM; echo ready; while :; do sleep 0.02; done", &options);
    stopped.wait_for_output("ready");
    stopped.client().stop(15, PATIENCE).unwrap();
    let dismissed = run_restarted(&rig, "sleep 1000", &options);
    dismissed.client().dismiss().unwrap();
    dismissed.client().signal(9).unwrap();
    for container in [&succeeds, &stopped, &dismissed] {
        container.exit();
        poll("the shim goes", || !runs(container.shim_pid()));
    }
    assert_eq!(calls(&rig), 0);
}

/// A socket of the host that no run of these tests uses twice.
fn listen_option(port: u16) -> String {
    format!("--listen=http=tcp:127.0.0.1:{port}")
}

fn reaches(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// What the container has as its descriptors from 3 on, and what it was told of them.
const SHOW_SOCKETS: &str = "echo $LISTEN_FDS $LISTEN_PID; readlink /proc/self/fd/3; ";

#[test]
fn a_held_socket_goes_from_run_to_run_and_refuses_nobody_in_between() {
    let Some(rig) = Rig::new() else { return };
    let port = free_port();
    let first = rig.run(&format!("{SHOW_SOCKETS} exec sleep 1000"), &[&listen_option(port)]);
    first.wait_for_output("socket:");
    let told = first.output("stdout");
    assert!(told.starts_with("1 1\nsocket:["), "{told}");
    assert!(reaches(port));
    first.client().stop(9, PATIENCE).unwrap();
    first.client().wait(Some(PATIENCE)).unwrap();
    assert!(reaches(port), "between two runs");
    let from = format!("--listen-from={}", first.dir.display());
    let second = rig.run(&format!("{SHOW_SOCKETS} exec sleep 1000"), &[&listen_option(port), &from]);
    second.wait_for_output("socket:");
    assert_eq!(second.output("stdout"), told, "the same socket");
    first.client().dismiss().unwrap();
    first.exit();
    assert!(reaches(port));
    second.client().upgrade().unwrap();
    poll("it is held over an upgrade", || second.client().sockets().is_ok_and(|held| held.len() == 1));
    assert!(second.kill_shim());
    second.adopt().unwrap();
    assert_eq!(second.client().sockets().unwrap().len(), 1, "the container gives it back");
    second.client().signal(9).unwrap();
    second.exit();
    assert!(!reaches(port), "nobody is to come");
}

#[test]
fn a_socket_is_opened_in_the_network_that_is_named_and_one_that_cannot_be_opened_is_told() {
    let Some(rig) = Rig::new() else { return };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let option = listen_option(taken.local_addr().unwrap().port());
    let refused = rig.run_with("exec sleep 1000", &[&option], json!({})).map(drop).unwrap_err();
    assert!(refused.contains("open the socket http=tcp:127.0.0.1:"), "{refused}");
    let other = rig.run("exec sleep 1000", &[]);
    let network = format!("--netns=/proc/{}/ns/net", other.pid());
    let inside = rig.run(&format!("{SHOW_SOCKETS} exec sleep 1000"), &[&option, &network]);
    inside.wait_for_output("socket:");
    let held = inside.client().sockets().unwrap();
    let inode = fs::read_link(format!("/proc/{}/ns/net", other.pid())).unwrap();
    let inode = inode.to_string_lossy().replace("net:[", "").replace(']', "");
    assert!(held[0].0.ends_with(&format!("@{inode}")), "{held:?}");
}

#[test]
fn preserved_descriptors_reach_the_container_after_the_sockets() {
    let Some(rig) = Rig::new() else { return };
    let mut note = tempfile::tempfile().unwrap();
    note.write_all(b"words").unwrap();
    // What is open at 3 when the shim is called.
    let passed = format!("/proc/{}/fd/{}", std::process::id(), note.as_raw_fd());
    let (port, id) = (free_port(), rig.id());
    let script = "echo $LISTEN_FDS; readlink /proc/self/fd/3; cat <&4; [ ! -e /proc/self/fd/5 ] && echo only";
    let dir = rig.bundle(&id, &["/bin/sh".into(), "-c".into(), script.into()], false, json!({}));
    let mut inner = rig.command(&id, &dir);
    inner.args(["--preserve-fds", "1", &listen_option(port), "--log"]).arg(dir.join("0.log"));
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &format!("exec 3<{passed}; exec \"$@\""), "sh"]).arg(inner.get_program());
    let out = shell.args(inner.get_args()).output().unwrap();
    let exit_file = rig.exits().join(format!("{id}.json"));
    let container = Container { rig: &rig, id, dir, exit_file };
    container.report(out).unwrap();
    container.exit();
    let told = container.output("stdout");
    assert!(told.starts_with("1\nsocket:[") && told.ends_with("wordsonly\n"), "{told}");
}

#[test]
fn a_container_says_that_it_is_ready_and_only_harmless_words_go_further() {
    let Some(rig) = Rig::new() else { return };
    let manager = rig.path().join("manager.sock");
    let heard = std::os::unix::net::UnixDatagram::bind(&manager).unwrap();
    heard.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = format!("--notify-to={}", manager.display());
    let container = rig.run("exec sleep 1000", &[&to]);
    let ready = container.dir.join("ready");
    let say = |text: &str| {
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        socket.send_to(text.as_bytes(), container.dir.join("notify/notify.sock")).unwrap();
    };
    let hear = || {
        let mut buffer = [0; 100];
        let got = heard.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..got]).into_owned()
    };
    say("MAINPID=1\nFDSTORE=1");
    say("STATUS=warming up\nMAINPID=1");
    assert_eq!(hear(), "STATUS=warming up");
    assert!(!ready.exists());
    container.client().upgrade().unwrap();
    say("READY=1");
    assert_eq!(hear(), "READY=1");
    poll("it is ready", || ready.exists());
    assert!(container.kill_shim());
    container.adopt().unwrap();
    say("STOPPING=1");
    assert_eq!(hear(), "STOPPING=1", "the next shim listens too");
}

/// One run whose shim is killed just before its `n`-th system call of this name after the end. False: it had fewer.
fn killed_at_the_end(rig: &Rig, call: &str, n: u32) -> bool {
    let container = rig.run("while [ ! -e /go ]; do sleep 0.01; done; echo last words; exit 7", &[]);
    let spares = container.client().spares().unwrap();
    let trace = container.dir.join("trace");
    let shim = container.shim_pid();
    let mut tracer = Command::new("strace")
        .args(["-p", &shim.to_string(), "-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=KILL:when={n}")])
        .arg("-o")
        .arg(&trace)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    poll("the shim is traced", || {
        let status = fs::read_to_string(format!("/proc/{shim}/status")).unwrap_or_default();
        status.contains(&format!("TracerPid:\t{}\n", tracer.id()))
    });
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    poll("the shim goes", || !runs(shim));
    tracer.wait().unwrap();
    let killed = fs::read_to_string(&trace).unwrap().contains("+++ killed by SIGKILL +++");
    // Without this file the shim was at its last step, and there is nothing left to be done.
    if killed && container.dir.join("shim.conf").exists() {
        container.adopt_with("--pidfd", &spares.pidfd.unwrap()).unwrap();
    }
    let record = container.exit();
    assert_eq!((record.code, record.lost), (7, false), "{call} {n}");
    poll("the log is whole", || container.output("stdout") == "last words\n");
    poll("nothing is left", || !runs(container.shim_pid()));
    container.assert_gone();
    killed
}

#[test]
fn the_true_status_comes_out_wherever_the_end_of_a_container_is_interrupted() {
    let Some(rig) = Rig::new() else { return };
    if !Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
        let _ = writeln!(std::io::stderr(), "skipped: strace is not installed");
        return;
    }
    let calls = ["openat", "write", "fsync", "fdatasync", "rename", "unlink"];
    std::thread::scope(|scope| {
        for call in calls {
            let rig = &rig;
            scope.spawn(move || (1..).take_while(|n| killed_at_the_end(rig, call, *n)).count());
        }
    });
}

#[test]
fn an_upgraded_shim_keeps_process_container_and_log() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("printf 'one '; while [ ! -e /go ]; do sleep 0.02; done; echo two; exit 6", &[]);
    container.wait_for_output("one ");
    let before = fs::read_to_string(container.dir.join("shim.pid")).unwrap();
    let upgrade =
        || Command::new(&rig.shim).arg("upgrade").arg("--dir").arg(&container.dir).output().unwrap();
    assert_eq!(upgrade().stdout, b"ok\n");
    let state = container.client().state().unwrap();
    assert_eq!((state.phase, state.adopted), (Phase::Running, false));
    let mut session = container.exec("exec sleep 1000", false, false).unwrap();
    let refused = String::from_utf8(upgrade().stdout).unwrap();
    assert!(refused.starts_with("error shim refuses: not while"), "{refused}");
    session.signal(9).unwrap();
    assert_eq!(converse(&mut session).2, 137);
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let record = container.exit();
    assert_eq!((record.code, record.lost), (6, false));
    assert!(record.max_rss_kb > 0);
    assert_eq!(fs::read_to_string(container.dir.join("shim.pid")).unwrap(), before);
    assert_eq!(container.output("stdout"), "one two\n");
}

#[test]
fn attachments_see_output_and_the_end_and_earlier_output_on_request() {
    let Some(rig) = Rig::new() else { return };
    let script = "echo early; echo hidden >&2; while [ ! -e /go ]; do sleep 0.02; done; echo late; exit 2";
    let container = rig.run(script, &[]);
    container.wait_for_output("early");
    let what = Attach { stdin: false, stdout: true, stderr: false, replay_kib: 16 };
    let mut with = container.client().attach(what).unwrap();
    let mut without = container.client().attach(Attach { replay_kib: 0, ..what }).unwrap();
    assert_eq!(container.client().state().unwrap().attachments, 2);
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    assert_eq!(follow(&mut with), ("early\nlate\n".into(), 0, 2));
    assert_eq!(follow(&mut without), ("late\n".into(), 0, 2));
}

#[test]
fn a_client_that_does_not_read_blocks_nobody_and_is_told_what_it_missed() {
    let Some(rig) = Rig::new() else { return };
    const BYTES: usize = 4_000_000;
    let line = "y".repeat(999);
    let script = format!("while [ ! -e /go ]; do sleep 0.02; done; yes {line} | head -c {BYTES}; sleep 1000");
    let container = rig.run(&script, &[]);
    let what = Attach { stdin: false, stdout: true, stderr: true, replay_kib: 0 };
    let mut stuck = container.client().attach(what).unwrap();
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    poll("all output in the log", || container.output("stdout").len() == BYTES);
    let mut seen = 0;
    let missed = loop {
        match stuck.next(Some(PATIENCE)).unwrap() {
            Event::Data { bytes, .. } => seen += bytes.len(),
            Event::Gap { bytes } => break bytes,
            Event::Exited(record) => panic!("{record:?}"),
        }
    };
    assert!(seen > 0 && missed > 0);
    assert_eq!(seen as u64 + missed, BYTES as u64);
}

#[test]
fn input_reaches_the_container_and_ends_with_the_attachment() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("cat; echo end", &["--stdin-once"]);
    let what = Attach { stdin: true, stdout: true, stderr: true, replay_kib: 0 };
    let mut attached = container.client().attach(what).unwrap();
    // More than pipe and socket hold together: the container's pace is the client's.
    let line = format!("{}\n", "x".repeat(999));
    for _ in 0..400 {
        attached.write_stdin(line.as_bytes()).unwrap();
    }
    attached.close_stdin().unwrap();
    assert_eq!(container.exit().code, 0);
    let seen = container.output("stdout");
    assert_eq!(seen.len(), 400_000 + 4);
    assert!(seen.ends_with("x\nend\n"));
}

#[test]
fn a_terminal_has_the_size_it_was_given() {
    let Some(rig) = Rig::new() else { return };
    let container =
        rig.run("while [ ! -e /go ]; do sleep 0.02; done; stty size; read x; echo got $x", &["--tty"]);
    let mut client = container.client();
    assert!(client.state().unwrap().tty);
    client.resize(33, 121).unwrap();
    assert!(matches!(client.resize(0, 1), Err(ClientError::Refused { .. })));
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let what = Attach { stdin: true, stdout: true, stderr: false, replay_kib: 4 };
    let mut attached = client.attach(what).unwrap();
    attached.write_stdin(b"word\n").unwrap();
    assert_eq!(container.exit().code, 0);
    let seen = container.output("stdout");
    assert!(seen.contains("33 121\r\n") && seen.ends_with("got word\r\n"), "{seen:?}");
}

#[test]
fn a_terminal_that_is_closed_and_opened_again_is_still_heard_and_costs_nothing_meanwhile() {
    let Some(rig) = Rig::new() else { return };
    let script = "echo one; exec < /dev/null > /dev/null 2>&1; while [ ! -e /go ]; do sleep 0.02; done
                  echo two > /dev/pts/0 && echo three > /dev/pts/0; exit $?";
    let container = rig.run(script, &["--tty"]);
    container.wait_for_output("one");
    let switches = || status_field(container.shim_pid(), "voluntary_ctxt_switches");
    poll("rest", || {
        let before = switches();
        std::thread::sleep(Duration::from_secs(1));
        switches() == before
    });
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    assert_eq!(container.exit().code, 0);
    assert_eq!(container.output("stdout"), "one\r\ntwo\r\nthree\r\n");
}

#[test]
fn commands_have_their_own_streams_and_status() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let mut plain = container.exec("echo out; echo err >&2; exit 5", false, false).unwrap();
    assert_eq!(converse(&mut plain), ("out\n".into(), "err\n".into(), 5));
    let mut fed = container.exec("cat; exit 6", false, true).unwrap();
    let line = format!("{}\n", "x".repeat(999));
    for _ in 0..30 {
        fed.write_stdin(line.as_bytes()).unwrap();
    }
    fed.close_stdin().unwrap();
    assert_eq!(converse(&mut fed), (line.repeat(30), String::new(), 6));
    let mut killed = container.exec("echo ready; sleep 1000", false, false).unwrap();
    assert!(matches!(killed.next(Some(PATIENCE)), Ok(Event::Data { .. })));
    killed.signal(9).unwrap();
    assert_eq!(converse(&mut killed).2, 137);
    let refused = container.client().exec(Exec {
        process: json!({"args": ["/no/such"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
            .to_string()
            .as_bytes(),
        ..Exec::default()
    });
    match refused {
        Err(ClientError::Refused { code: ErrorCode::Failed, message }) => {
            assert!(message.contains("/no/such"), "{message}")
        }
        other => panic!("{:?}", other.err()),
    }
    // None of this is the container's own output, and nothing is left of it.
    assert_eq!(container.output("stdout"), "");
    let left = fs::read_dir(&container.dir).unwrap().flatten();
    assert_eq!(left.filter(|e| e.file_name().to_string_lossy().starts_with("exec-")).count(), 0);
    assert_eq!(container.client().state().unwrap().phase, Phase::Running);
}

#[test]
fn a_command_can_have_a_terminal() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let mut session = container.exec("read a; stty size; exit 3", true, true).unwrap();
    session.resize(44, 99).unwrap();
    session.write_stdin(b"go\n").unwrap();
    let (out, _, code) = converse(&mut session);
    assert_eq!(code, 3);
    assert!(out.ends_with("44 99\r\n"), "{out:?}");
}

#[test]
fn a_command_whose_client_is_slow_waits_and_one_whose_client_is_gone_goes_on() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    const BYTES: usize = 3_000_000;
    let mut slow = container.exec(&format!("yes | head -c {BYTES}; echo end >&2"), false, false).unwrap();
    let left = container.exec("yes | head -c 300000; echo > /left; sleep 1000", false, false).unwrap();
    drop(left);
    // Ended long before its output is read.
    let mut unread = container.exec("yes | head -c 150000; echo > /unread", false, false).unwrap();
    poll("the end of the unread one", || container.dir.join("rootfs/unread").exists());
    poll("the end of the one left alone", || container.dir.join("rootfs/left").exists());
    let (out, err, code) = converse(&mut slow);
    assert_eq!((out.len(), err.ends_with("end\n"), code), (BYTES, true, 0));
    assert_eq!(converse(&mut unread).0.len(), 150_000);
}

#[test]
fn commands_end_with_the_container() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let mut session = container.exec("sleep 1000", false, false).unwrap();
    container.client().signal(9).unwrap();
    assert_eq!(converse(&mut session).2, 137);
    container.exit();
    container.assert_gone();
}

#[test]
fn what_does_not_fit_the_container_is_refused() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let refused = |result: Result<(), ClientError>| match result {
        Err(ClientError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(container.client().resize(10, 10)), ErrorCode::Unsupported);
    let what = Attach { stdin: true, stdout: true, stderr: true, replay_kib: 0 };
    assert_eq!(refused(container.client().attach(what).map(drop)), ErrorCode::Unsupported);
    assert_eq!(refused(container.client().signal(0)), ErrorCode::Malformed);
    assert_eq!(refused(container.client().signal(65)), ErrorCode::Malformed);
    assert_eq!(container.client().state().unwrap().phase, Phase::Running);
}

#[test]
fn nonsense_is_answered_and_survived() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let say = |bytes: &[u8]| {
        let client = container.client();
        let mut socket = UnixStream::from(client.as_fd().try_clone_to_owned().unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        // On a socket of packets, one write is one message.
        socket.write_all(bytes).unwrap();
        let mut answer = [0; MAX_MESSAGE];
        let len = socket.read(&mut answer).unwrap();
        match Reply::decode(&answer[..len]).unwrap() {
            Reply::Error { code, .. } => code,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(say(&[1]), ErrorCode::Malformed);
    assert_eq!(say(&[9, 1, 0, 0]), ErrorCode::Version);
    assert_eq!(say(&[1, 255, 0, 0]), ErrorCode::Malformed);
    assert_eq!(say(&[1, 3, 0, 0, 15]), ErrorCode::Malformed);
    assert_eq!(say(&vec![1; MAX_MESSAGE * 3]), ErrorCode::Malformed);
    assert_eq!(say(&[1, 6, 0, 0, 65]), ErrorCode::Unsupported);
    assert_eq!(container.client().state().unwrap().phase, Phase::Running);
}

#[test]
fn another_user_is_refused_even_where_the_socket_can_be_reached() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    const SCRIPT: &str = "use Socket; socket(S, PF_UNIX, SOCK_SEQPACKET, 0);
        connect(S, sockaddr_un($ARGV[0])) or die $!; recv(S, $b, 999, 0); print substr $b, 5";
    for dir in [rig.path(), &container.dir] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let socket = container.dir.join("ctl.sock");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    let mut perl = Command::new("perl");
    let said =
        std::os::unix::process::CommandExt::uid(&mut perl, 65534).args(["-e", SCRIPT]).arg(&socket).output();
    let Ok(said) = said else {
        let _ = writeln!(std::io::stderr(), "skipped: perl is not installed");
        return;
    };
    assert_eq!(String::from_utf8_lossy(&said.stdout), "only root may control this container", "{said:?}");
    assert_eq!(container.client().state().unwrap().phase, Phase::Running);
}

#[test]
fn a_crash_is_recorded_with_its_core_dump_and_what_it_used() {
    let Some(rig) = Rig::new() else { return };
    if fs::read_to_string("/proc/sys/kernel/core_pattern").is_ok_and(|pattern| pattern.trim().is_empty()) {
        let _ = writeln!(std::io::stderr(), "skipped: this host writes no core dumps");
        return;
    }
    // Deeper than the stack of the shell.
    let container = rig.run("ulimit -c unlimited; f() { f; }; f", &[]);
    let record = container.exit();
    assert_eq!((record.code, record.signal, record.core, record.lost), (139, 11, true, false));
    assert!(record.user_us + record.system_us > 0 && record.max_rss_kb > 1000, "{record:?}");
}

/// A container among the processes of the host.
fn without_pid_namespace<'a>(rig: &'a Rig, script: &str) -> Container<'a> {
    let id = rig.id();
    let dir = rig.bundle(&id, &["/bin/sh".into(), "-c".into(), script.into()], false, json!({}));
    let path = dir.join("config.json");
    let config = fs::read_to_string(&path).unwrap().replace("{\"type\":\"pid\"},", "");
    fs::write(&path, config).unwrap();
    let out = rig.command(&id, &dir).arg("--log").arg(dir.join("0.log")).output().unwrap();
    let exit_file = rig.exits().join(format!("{id}.json"));
    let container = Container { rig, id, dir, exit_file };
    container.report(out).unwrap();
    container
}

#[test]
fn what_a_container_leaves_to_its_monitor_is_reaped_at_once() {
    let Some(rig) = Rig::new() else { return };
    let script = "( (while [ ! -e /go ]; do sleep 0.02; done; exit 3) & echo $! ); exec sleep 1000";
    let container = without_pid_namespace(&rig, script);
    container.wait_for_output("\n");
    let orphan: i32 = container.output("stdout").trim().parse().unwrap();
    poll("it is the monitor's", || status_field(orphan, "PPid") == container.shim_pid().to_string());
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    poll("not even a zombie is left", || !Path::new(&format!("/proc/{orphan}")).exists());
    assert_eq!(container.client().state().unwrap().phase, Phase::Running);
}

#[test]
fn a_process_that_was_given_the_containers_number_is_not_touched() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let pid = container.pid();
    assert!(container.kill_shim());
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    poll("the container ends", || !runs(pid));
    let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
    let number = bystander.id();
    // As if its number had come round again.
    let memory = container.dir.join("shim.conf");
    let text =
        fs::read_to_string(&memory).unwrap().replace(&format!("\0pid={pid}\0"), &format!("\0pid={number}\0"));
    fs::write(&memory, text).unwrap();
    container.adopt().unwrap();
    let record = container.exit();
    assert_eq!((record.code, record.lost, record.pid), (-1, true, number));
    assert!(bystander.try_wait().unwrap().is_none(), "it lives");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[test]
fn the_first_process_of_a_shared_namespace_reaps_and_ends_on_request() {
    let Some(rig) = Rig::new() else { return };
    let child = Command::new(&rig.shim).arg("pause").spawn().unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let blocks = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("SigBlk:\tfffffffe")
    };
    poll("signals taken", blocks);
    kill(pid, Signal::SIGUSR1).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    assert!({ child }.wait().unwrap().success());
}

#[test]
fn the_number_of_clients_is_bounded_and_the_container_is_not_disturbed() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let mut clients: Vec<_> = (0..16).map(|_| container.client()).collect();
    clients.iter_mut().for_each(|client| assert!(client.state().is_ok()));
    match container.client().state() {
        Err(ClientError::Refused { code: ErrorCode::Busy, .. } | ClientError::Closed { .. }) => {}
        other => panic!("{other:?}"),
    }
    drop(clients);
    poll("a free place", || container.client().state().is_ok());
}

#[test]
fn logs_rotate_and_a_moved_log_is_reopened() {
    let Some(rig) = Rig::new() else { return };
    let script = "seq 1 2000; while [ ! -e /go ]; do sleep 0.02; done; echo after";
    let container = rig.run(script, &["--log-max-bytes", "20000", "--log-max-files", "3"]);
    container.wait_for_output("2000");
    assert!(container.log(1).exists() && container.log(2).exists() && !container.log(3).exists());
    for n in 0..3 {
        assert!(fs::metadata(container.log(n)).unwrap().len() <= 20_000);
        assert_eq!(fs::metadata(container.log(n)).unwrap().permissions().mode() & 0o777, 0o640);
    }
    let numbers: Vec<u32> = container.output("stdout").lines().map(|l| l.parse().unwrap()).collect();
    assert_eq!(numbers, (2001 - numbers.len() as u32..=2000).collect::<Vec<_>>());
    fs::rename(container.log(0), rig.path().join("moved")).unwrap();
    container.client().reopen().unwrap();
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    container.exit();
    let log = fs::read_to_string(container.log(0)).unwrap();
    assert_eq!(output(&log, "stdout"), "after\n");
}

#[test]
fn a_full_disk_stops_neither_the_container_nor_the_counting() {
    let Some(rig) = Rig::new() else { return };
    let disk = Disk::mount(&rig.path().join("small"), "size=256k");
    let log = disk.0.join("0.log");
    let script = "seq 1 100000; echo full >&2; while [ ! -e /go ]; do sleep 0.02; done; echo after; exit 1";
    let container = rig.run(script, &["--log", log.to_str().unwrap()]);
    poll("loss", || container.client().state().unwrap().log_lost_lines > 0);
    poll("silence", || {
        let lost = container.client().state().unwrap().log_lost_lines;
        let quiet = Instant::now() + Duration::from_millis(300);
        while Instant::now() < quiet {
            if container.client().state().unwrap().log_lost_lines != lost {
                return false;
            }
        }
        true
    });
    disk.grow("size=64m");
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let record = container.exit();
    assert_eq!(record.code, 1);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().all(|l| l.len() >= 40 && l.as_bytes()[29] == b'Z'), "half a record");
    let marker = text.lines().find(|l| l.contains("stderr F keel-shim: ")).expect("marker");
    let lost = record.log_lost_lines;
    assert!(
        marker.contains(&format!("keel-shim: {lost} lines ({} bytes)", record.log_lost_bytes)),
        "{marker}"
    );
    let kept = text.lines().filter(|l| &l[38..39] == "F" && !l.contains("keel-shim: ")).count() as u64;
    assert_eq!(kept + lost, 100_000 + 2);
    assert!(text.ends_with("stdout F after\n"));
}

/// The number in hexadecimal behind a name in `/proc/PID/status`.
fn status_field(pid: i32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    line.unwrap_or_else(|| panic!("no {name}")).to_owned()
}

fn assert_confined(pid: i32) {
    // The container runs a moment before its monitor has settled.
    poll("confinement", || status_field(pid, "Seccomp") == "2");
    let kept = 1 << 1 | 1 << 5;
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        let held = u64::from_str_radix(&status_field(pid, set), 16).unwrap();
        assert_eq!(held & !kept, 0, "{set} {held:x}");
    }
    assert_eq!(status_field(pid, "NoNewPrivs"), "1");
}

/// The process that a monitor has split off.
fn helper_of(shim: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
    let mut children = children.split_whitespace().map(|pid| pid.parse::<i32>().unwrap());
    children.find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|n| n == "keel-helper\n"))
}

/// It takes its name a moment after it was made.
fn await_helper(shim: i32) -> i32 {
    poll("the helper", || helper_of(shim).is_some());
    helper_of(shim).unwrap()
}

#[test]
fn a_monitor_is_confined_and_what_it_starts_is_not() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let shim = container.shim_pid();
    assert_confined(shim);
    let filters = status_field(shim, "Seccomp_filters");
    assert_eq!(status_field(container.pid(), "NoNewPrivs"), "0");
    let show =
        "while read k v; do case $k in NoNewPrivs:|Seccomp:) echo $k$v;; esac; done < /proc/self/status";
    let mut session = container.exec(show, false, false).unwrap();
    assert_eq!(converse(&mut session).0, "NoNewPrivs:0\nSeccomp:0\n");
    container.client().upgrade().unwrap();
    poll("it answers again", || Client::connect(&container.dir).is_ok_and(|mut c| c.state().is_ok()));
    assert_confined(shim);
    assert_eq!(status_field(shim, "Seccomp_filters"), filters, "an upgrade adds none");
    let mut session = container.exec("echo after", false, false).unwrap();
    assert_eq!(converse(&mut session).0, "after\n");
    assert!(container.kill_shim());
    container.adopt().unwrap();
    assert_confined(container.shim_pid());
    container.client().signal(9).unwrap();
    container.exit();
    container.assert_gone();
}

#[test]
fn a_helper_goes_with_its_monitor_and_is_not_needed_for_the_record() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    assert_confined(container.shim_pid());
    let first = await_helper(container.shim_pid());
    assert!(container.kill_shim());
    poll("the helper goes", || !runs(first));
    container.adopt().unwrap();
    assert_confined(container.shim_pid());
    let second = await_helper(container.shim_pid());
    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    let refused = container.exec("true", false, false).map(drop).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { code: ErrorCode::Failed, .. }), "{refused}");
    container.client().signal(9).unwrap();
    let record = container.exit();
    assert!(record.lost || record.signal == 9);
}

#[test]
fn an_idle_shim_has_one_thread_few_descriptors_and_never_wakes() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("echo hello; sleep 1000", &[]);
    container.wait_for_output("hello");
    let proc = PathBuf::from(format!("/proc/{}", container.shim_pid()));
    let switches = || {
        let status = fs::read_to_string(proc.join("status")).unwrap();
        assert!(status.contains("Threads:\t1\n"));
        let line = status.lines().find(|l| l.starts_with("voluntary_ctxt_switches")).unwrap();
        line.split('\t').nth(1).unwrap().parse::<u64>().unwrap()
    };
    // The buffers of the first output are given back once; after that there is nothing to do.
    poll("rest", || {
        let before = switches();
        std::thread::sleep(Duration::from_secs(2));
        switches() == before
    });
    let helper = await_helper(container.shim_pid());
    assert_eq!(status_field(helper, "Threads"), "1");
    let count = |pid: i32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let (own, helpers) = (count(container.shim_pid()), count(helper));
    assert!(own + helpers <= 12, "{own} and {helpers} descriptors");
}

#[test]
fn what_a_library_says_in_a_monitor_or_its_helper_reaches_no_file_and_no_container() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    assert_confined(container.shim_pid());
    let helper = await_helper(container.shim_pid());
    let link = |pid: i32, number: i32| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}"));
        link.map_or("nothing".to_owned(), |link| link.to_string_lossy().into_owned())
    };
    let shim = container.shim_pid();
    assert_eq!((link(shim, 0), link(shim, 1)), ("/dev/null".into(), "anon_inode:[eventpoll]".into()));
    assert!(link(shim, 2).starts_with("socket:"), "{}", link(shim, 2));
    assert_eq!((link(helper, 0), link(helper, 1)), ("nothing".into(), "nothing".into()));
    assert!(link(helper, 2).starts_with("socket:"), "{}", link(helper, 2));
}

#[test]
fn long_directories_work() {
    let Some(mut rig) = Rig::new() else { return };
    rig.deep = "d".repeat(120);
    let container = rig.run("stty size; exit 9", &["--tty"]);
    assert_eq!(container.exit().code, 9);
}

// The rig.

/// Text that a stream of a log stands for.
fn output(log: &str, stream: &str) -> String {
    let mut text = String::new();
    for record in log.split_terminator('\n') {
        let mut parts = record.splitn(4, ' ').skip(1);
        if parts.next() == Some(stream) {
            let whole = parts.next() == Some("F");
            text.push_str(parts.next().unwrap_or_default());
            if whole {
                text.push('\n');
            }
        }
    }
    text
}

/// Everything an attachment says: output, missed bytes, exit code.
fn follow(attached: &mut Attachment) -> (String, u64, i32) {
    let (mut text, mut missed) = (String::new(), 0);
    loop {
        match attached.next(Some(PATIENCE)).unwrap() {
            Event::Data { stream, bytes } => {
                assert_eq!(stream, Stream::Stdout);
                text.push_str(std::str::from_utf8(bytes).unwrap());
            }
            Event::Gap { bytes } => missed += bytes,
            Event::Exited(record) => return (text, missed, record.code),
        }
    }
}

/// Everything a command says: stdout, stderr, exit code.
fn converse(session: &mut Session) -> (String, String, i32) {
    let (mut out, mut err) = (String::new(), String::new());
    loop {
        match session.next(Some(PATIENCE)).unwrap() {
            Event::Data { stream, bytes } => {
                let text = if stream == Stream::Stdout { &mut out } else { &mut err };
                text.push_str(std::str::from_utf8(bytes).unwrap());
            }
            Event::Gap { bytes } => panic!("{bytes} bytes are missing"),
            Event::Exited(record) => return (out, err, record.code),
        }
    }
}

fn poll(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Rig {
    shim: PathBuf,
    runtime: PathBuf,
    temp: tempfile::TempDir,
    deep: String,
}

impl Rig {
    /// `None`, with the reason, where this cannot run.
    fn new() -> Option<Rig> {
        let skip = |why: &str| {
            let _ = writeln!(std::io::stderr(), "skipped: {why}");
            None
        };
        if !nix::unistd::geteuid().is_root() {
            return skip("containers need root");
        }
        let Some(shim) = find("KEEL_SHIM", "keel-shim") else {
            return skip("keel-shim is not built");
        };
        let runtime = find("KEEL_RUNTIME", "keel-runtime").unwrap_or_else(|| "runc".into());
        let version = Command::new(&runtime).arg("--version").stdout(Stdio::null()).status();
        if !version.is_ok_and(|status| status.success()) {
            return skip("neither keel-runtime nor runc is there");
        }
        if !Path::new("/bin/busybox").exists() {
            return skip("busybox is not installed");
        }
        let temp = tempfile::Builder::new().prefix("keel-shim-").tempdir().unwrap();
        Some(Rig { shim, runtime, temp, deep: String::new() })
    }

    fn path(&self) -> &Path {
        self.temp.path()
    }

    fn exits(&self) -> PathBuf {
        self.path().join("exits")
    }

    fn id(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("shimtest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn run(&self, script: &str, options: &[&str]) -> Container<'_> {
        self.run_with(script, options, json!({})).unwrap()
    }

    fn run_with(
        &self,
        script: &str,
        options: &[&str],
        resources: serde_json::Value,
    ) -> Result<Container<'_>, String> {
        let id = self.id();
        let words = ["/bin/sh".into(), "-c".into(), script.into()];
        let dir = self.bundle(&id, &words, options.contains(&"--tty"), resources);
        let exit_file = self.exits().join(format!("{id}.json"));
        let log = dir.join("0.log");
        let mut command = self.command(&id, &dir);
        let options = match options.split_first() {
            Some((&NO_LOG, rest)) => rest,
            Some((&RAW_LOG, rest)) => {
                command.args(["--log-raw".as_ref(), log.as_os_str()]);
                rest
            }
            _ => {
                command.args(["--log".as_ref(), log.as_os_str()]);
                options
            }
        };
        let out = command.args(options).output();
        let container = Container { rig: self, id, dir, exit_file };
        container.report(out.unwrap())?;
        Ok(container)
    }

    fn command(&self, id: &str, dir: &Path) -> Command {
        let mut command = Command::new(&self.shim);
        command.arg("run").args(["--id", id]).arg("--dir").arg(dir).arg("--bundle").arg(dir);
        command.arg("--runtime").arg(&self.runtime).arg("--runtime-root").arg(self.path().join("runtime"));
        command.arg("--exit-file").arg(self.exits().join(format!("{id}.json")));
        command
    }

    fn bundle(&self, id: &str, words: &[String], terminal: bool, resources: serde_json::Value) -> PathBuf {
        let dir = self.path().join(&self.deep).join(id);
        let bin = dir.join("rootfs/bin");
        for sub in ["bin", "proc", "dev"] {
            fs::create_dir_all(dir.join("rootfs").join(sub)).unwrap();
        }
        fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for applet in ["sh", "sleep", "seq", "cat", "yes", "head", "dd", "stty", "readlink"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        let namespaces = ["pid", "mount", "uts", "ipc", "network"].map(|kind| json!({"type": kind}));
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": terminal, "user": {"uid": 0, "gid": 0}, "cwd": "/",
                "args": words, "env": ["PATH=/bin"],
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}
            ],
            "linux": {
                "cgroupsPath": format!("/keel-shim-test/{id}"),
                "namespaces": namespaces, "resources": resources
            }
        });
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        dir
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Fails while another test has a container in it; the last one removes it.
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join("keel-shim-test"));
        }
        let _ = fs::remove_dir("/sys/fs/cgroup/keel-shim-test");
    }
}

/// By environment, or beside this test program's target directory.
fn find(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    let me = std::env::current_exe().ok()?;
    me.ancestors().map(|dir| dir.join(name)).find(|path| path.is_file())
}

struct Container<'a> {
    rig: &'a Rig,
    id: String,
    dir: PathBuf,
    exit_file: PathBuf,
}

impl Container<'_> {
    fn report(&self, out: Output) -> Result<i32, String> {
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        match text.strip_prefix("ok ") {
            Some(pid) if out.status.success() => Ok(pid.trim().parse().unwrap()),
            _ => Err(text),
        }
    }

    fn client(&self) -> Client {
        Client::connect(&self.dir).unwrap()
    }

    fn exec(&self, script: &str, tty: bool, stdin: bool) -> Result<Session, ClientError> {
        let process = json!({
            "terminal": tty, "user": {"uid": 0, "gid": 0}, "cwd": "/",
            "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"]
        });
        let process = process.to_string();
        self.client().exec(Exec { tty, stdin, process: process.as_bytes(), ..Exec::default() })
    }

    fn exit(&self) -> ExitRecord {
        poll("the exit record", || self.exit_file.exists());
        let record = ExitRecord::parse(&fs::read_to_string(&self.exit_file).unwrap()).unwrap();
        let pid = self.shim_pid();
        poll("the end of the shim", || !runs(pid));
        record
    }

    fn log(&self, n: u32) -> PathBuf {
        self.dir.join(if n == 0 { "0.log".into() } else { format!("0.log.{n}") })
    }

    fn log_size(&self) -> u64 {
        let sizes = (0..).map_while(|n| fs::metadata(self.log(n)).ok()).map(|m| m.len());
        sizes.sum()
    }

    /// Text of a stream, through all rotated files.
    fn output(&self, stream: &str) -> String {
        let mut files: Vec<_> = (0..).map_while(|n| fs::read_to_string(self.log(n)).ok()).collect();
        files.reverse();
        output(&files.concat(), stream)
    }

    fn wait_for_output(&self, text: &str) {
        poll("output", || self.output("stdout").contains(text));
    }

    fn pid(&self) -> i32 {
        first_number(&self.dir.join("pid"))
    }

    fn shim_pid(&self) -> i32 {
        first_number(&self.dir.join("shim.pid"))
    }

    /// `false` when it had ended by itself.
    fn kill_shim(&self) -> bool {
        let pid = self.shim_pid();
        if self.exit_file.exists() || !runs(pid) {
            return false;
        }
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        poll("the death of the shim", || !runs(pid));
        true
    }

    fn adopt(&self) -> Result<i32, String> {
        let out = Command::new(&self.rig.shim).arg("adopt").arg("--dir").arg(&self.dir).output().unwrap();
        self.report(out)
    }

    /// With a descriptor that was kept.
    fn adopt_with(&self, option: &str, fd: &OwnedFd) -> Result<i32, String> {
        let flags = |on: bool| if on { FdFlag::FD_CLOEXEC } else { FdFlag::empty() };
        fcntl(fd, FcntlArg::F_SETFD(flags(false))).unwrap();
        let mut command = Command::new(&self.rig.shim);
        command.arg("adopt").arg("--dir").arg(&self.dir).args([option, &fd.as_raw_fd().to_string()]);
        let out = command.output().unwrap();
        fcntl(fd, FcntlArg::F_SETFD(flags(true))).unwrap();
        self.report(out)
    }

    /// The runtime knows it no more, and its cgroup and sockets are gone.
    fn assert_gone(&self) {
        assert!(!self.rig.path().join("runtime").join(&self.id).exists());
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            assert!(!hierarchy.path().join("keel-shim-test").join(&self.id).exists());
        }
        let sockets = fs::read_dir(&self.dir).unwrap().flatten();
        assert_eq!(sockets.filter(|e| e.file_type().unwrap().is_socket()).count(), 0);
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let root = self.rig.path().join("runtime");
        let mut delete = Command::new(&self.rig.runtime);
        delete.arg("--root").arg(root).args(["delete", "--force", &self.id]);
        let _ = delete.stdout(Stdio::null()).stderr(Stdio::null()).status();
        // It ends after its container; a test that broke it must not leave it behind.
        let pid = self.shim_pid();
        let deadline = Instant::now() + Duration::from_secs(5);
        while pid > 1 && runs(pid) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if pid > 1 && runs(pid) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn first_number(path: &Path) -> i32 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// A zombie does not: whoever is its parent may take its time.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}

/// A small file system that can be full.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, size: &str) -> Disk {
        fs::create_dir_all(at).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(size)).unwrap();
        Disk(at.to_owned())
    }

    fn grow(&self, size: &str) {
        let flags = nix::mount::MsFlags::MS_REMOUNT;
        nix::mount::mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, Some(size)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
