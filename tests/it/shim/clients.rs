//! Clients that do not do as they should, and what they must not cost.

use super::*;

/// Fills what lies between it and the container; returns how much that was. `bound` is more than there is room for.
fn feed(attached: &mut Attachment, bound: usize) -> usize {
    let chunk = [b'x'; 16_000];
    let mut sent = 0;
    while sent < bound && attached.write_stdin(&chunk).is_ok() {
        sent += chunk.len();
    }
    sent
}

fn attach_within(container: &Container<'_>, timeout: Duration) -> Attachment {
    let what = Attach { stdin: true, stdout: true, stderr: true, replay_kib: 0 };
    Client::connect_within(&container.dir, timeout).unwrap().attach(what).unwrap()
}

#[test]
fn input_that_the_container_does_not_take_is_taken_from_nobody() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &["--stdin"]);
    const BOUND: usize = 4 << 20;
    let timeout = Duration::from_millis(500);
    let mut first = attach_within(&container, timeout);
    assert!(feed(&mut first, BOUND) < BOUND);
    // Also not from who comes later, nor from those who leave theirs behind.
    let mut second = attach_within(&container, timeout);
    assert!(feed(&mut second, BOUND) < BOUND);
    for _ in 0..10 {
        feed(&mut attach_within(&container, Duration::from_millis(50)), BOUND);
    }
    poll("those have left", || container.client().state().unwrap().attachments == 2);
    let kb: u64 =
        status_field(container.shim_pid(), "RssAnon").trim().split(' ').next().unwrap().parse().unwrap();
    assert!(kb < 1500, "{kb} kB");
}

#[test]
fn input_ends_with_its_client_also_while_output_flows() {
    let Some(rig) = Rig::new() else { return };
    let script = "while :; do echo x; done & cat > /dev/null; exit 3";
    // Whether its end or the next output comes to the monitor first is by chance.
    let containers: Vec<_> = (0..6).map(|_| rig.run(script, &["--stdin-once"])).collect();
    for container in &containers {
        let mut attached = attach_within(container, PATIENCE);
        assert!(matches!(attached.next(Some(PATIENCE)).unwrap(), Event::Data { .. }));
        drop(attached);
        assert_eq!(container.exit().code, 3);
    }
}

#[test]
fn a_command_that_is_left_within_its_input_costs_no_time() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let script = "stty raw -echo; echo > /ready; while [ ! -e /go ]; do sleep 0.02; done
                  head -c 1000 > /dev/null; echo > /taken; cat > /dev/null";
    let process = json!({
        "terminal": true, "user": {"uid": 0, "gid": 0}, "cwd": "/",
        "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"]
    });
    let process = process.to_string();
    let client = Client::connect_within(&container.dir, Duration::from_millis(500)).unwrap();
    let exec = Exec { tty: true, stdin: true, process: process.as_bytes(), ..Exec::default() };
    let mut session = client.exec(exec).unwrap();
    let root = container.dir.join("rootfs");
    poll("the command", || root.join("ready").exists());
    let chunk = [b'x'; 16_000];
    assert!((0..100).any(|_| session.write_stdin(&chunk).is_err()), "a terminal has no end");
    drop(session);
    fs::write(root.join("go"), "").unwrap();
    poll("room in the terminal", || root.join("taken").exists());
    let spent = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", container.shim_pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = spent();
    std::thread::sleep(Duration::from_secs(1));
    assert!(spent() - before <= 2, "{} ticks of a second", spent() - before);
}

#[test]
fn so_much_of_the_earlier_output_comes_as_was_asked_for() {
    let Some(rig) = Rig::new() else { return };
    let short = rig.run("i=0; seq 1 60000; sleep 1000", &[]);
    short.wait_for_output("\n60000\n");
    let long = rig.run("head -c 60000 /dev/zero; echo; sleep 1000", &[]);
    long.wait_for_output("\0\n");
    let check = |container: &Container<'_>, replay_kib: u16, least: usize, most: usize| {
        let what = Attach { stdin: false, stdout: true, stderr: true, replay_kib };
        let mut attached = container.client().attach(what).unwrap();
        let mut seen = Vec::new();
        while seen.len() < least {
            match attached.next(Some(PATIENCE)).unwrap() {
                Event::Data { bytes, .. } => seen.extend_from_slice(bytes),
                other => panic!("{other:?} after {} of {least} bytes", seen.len()),
            }
        }
        assert!(seen.len() <= most, "{} bytes", seen.len());
        assert!(matches!(attached.next(Some(Duration::from_millis(100))), Err(ClientError::Timeout { .. })));
        seen
    };
    let seen = String::from_utf8(check(&short, 100, (100 << 10) - 6, 100 << 10)).unwrap();
    assert!(seen.ends_with("\n60000\n") && seen.starts_with(|c: char| c.is_ascii_digit()));
    let first: u32 = seen.lines().next().unwrap().parse().unwrap();
    assert_eq!(seen.lines().count() as u32, 60_001 - first, "whole lines, and none missing");
    // More than there is, and more than a socket holds.
    check(&short, 1000, (128 << 10) - 6, 128 << 10);
    // A line that is longer than what was asked for.
    assert_eq!(check(&long, 4, 4 << 10, 4 << 10).last(), Some(&b'\n'));
}

#[test]
fn a_connection_is_for_one_thing_and_a_terminal_has_a_sane_size() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    let exec = Exec { tty: true, rows: 5000, columns: 80, process: b"{}", ..Exec::default() };
    let refused = container.client().exec(exec).map(drop).unwrap_err();
    assert!(refused.to_string().contains("window size out of range"), "{refused}");
    let what = Attach { stdin: false, stdout: true, stderr: true, replay_kib: 0 };
    let attached = container.client().attach(what).unwrap();
    let mut socket = UnixStream::from(attached.as_fd().try_clone_to_owned().unwrap());
    let request = Request::Exec(Exec { process: b"{}", ..Exec::default() });
    socket.write_all(&request.encode().to_vec()).unwrap();
    let mut answer = [0; MAX_MESSAGE];
    let len = socket.read(&mut answer).unwrap();
    let Reply::Error { code, message } = Reply::decode(&answer[..len]).unwrap() else { panic!() };
    assert_eq!((code, message), (ErrorCode::Unsupported, "this connection is attached to the container"));
}

#[test]
fn two_who_adopt_at_once_make_one_monitor() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("sleep 1000", &[]);
    for _ in 0..6 {
        assert!(container.kill_shim());
        let answers: Vec<_> = std::thread::scope(|scope| {
            let adopting: Vec<_> = (0..3).map(|_| scope.spawn(|| container.adopt())).collect();
            adopting.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (adopted, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        assert_eq!(adopted.len(), 1, "{refused:?}");
        assert!(
            refused.iter().all(|answer| answer.as_ref().unwrap_err().contains("still runs")),
            "{refused:?}"
        );
    }
}
