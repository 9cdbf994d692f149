//! Logs of the monitor: kinds, bounds, compression, and what a slow or broken one costs.

use super::*;

/// All files of a log, oldest first, compressed ones as `zcat` reads them.
fn whole_log(container: &Container<'_>) -> String {
    let mut text = None;
    poll("a log whose files can be read", || {
        text = read_log(container);
        text.is_some()
    });
    text.unwrap_or_default()
}

/// `None` when a file was moved while it was read.
fn read_log(container: &Container<'_>) -> Option<String> {
    let mut texts = Vec::new();
    for n in 0.. {
        let path = container.log(n);
        let packed = PathBuf::from(format!("{}.gz", path.display()));
        match fs::read_to_string(&path) {
            Ok(text) => texts.push(text),
            Err(_) if packed.exists() => {
                let out = Command::new("zcat").arg(&packed).output().unwrap();
                if !out.status.success() {
                    return None;
                }
                texts.push(String::from_utf8(out.stdout).unwrap());
            }
            Err(_) => break,
        }
    }
    texts.reverse();
    Some(texts.concat())
}

/// Sizes of all files of a log.
fn log_bytes(container: &Container<'_>) -> u64 {
    let files = fs::read_dir(&container.dir).unwrap().flatten();
    let logs = files.filter(|e| e.file_name().to_string_lossy().starts_with("0.log"));
    logs.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

fn children_of(pid: i32, name: &str) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let pids = text.split_ascii_whitespace().map(|pid| pid.parse::<i32>().unwrap());
    let is_it =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    pids.filter(is_it).collect()
}

fn numbers(upto: u32) -> String {
    (1..=upto).map(|n| format!("{n}\n")).collect()
}

#[test]
fn rotated_files_are_compressed_and_no_line_goes_with_them() {
    let Some(rig) = Rig::new() else { return };
    let options = ["--log-compress", "--log-max-bytes", "1000000", "--log-max-files", "50"];
    let container = rig.run("seq 1 100000; sleep 1000", &options);
    container.wait_for_output("100000");
    let all_packed = || {
        let rotated = (1..).take_while(|n| container.log(*n).exists() || packed(&container, *n).exists());
        rotated.map(|n| packed(&container, n).exists() && !container.log(n).exists()).collect::<Vec<_>>()
    };
    poll("compression", || {
        let done = all_packed();
        done.len() >= 4 && done.iter().all(|done| *done)
    });
    assert_eq!(output(&whole_log(&container), "stdout"), numbers(100_000));
    assert!(log_bytes(&container) < 2_000_000, "{}", log_bytes(&container));
    assert_eq!(fs::metadata(packed(&container, 1)).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(!container.dir.join("0.log.packing").exists());
    assert_eq!(children_of(container.shim_pid(), "keel-shim"), Vec::<i32>::new());
}

fn packed(container: &Container<'_>, n: u32) -> PathBuf {
    container.dir.join(format!("0.log.{n}.gz"))
}

#[test]
fn compression_survives_the_shim_and_loses_nothing_over_its_death() {
    let Some(rig) = Rig::new() else { return };
    let options = ["--log-compress", "--log-max-bytes", "400000", "--log-max-files", "100"];
    let container = rig.run("seq 1 200000; sleep 1000", &options);
    for _ in 0..4 {
        let before = log_bytes(&container);
        poll("more output", || log_bytes(&container) != before);
        container.kill_shim();
        container.adopt().unwrap();
    }
    poll("everything in the log", || {
        output(&whole_log(&container), "stdout").len() == numbers(200_000).len()
    });
    poll("compression", || packed(&container, 1).exists() && !container.log(1).exists());
    assert!(output(&whole_log(&container), "stdout") == numbers(200_000));
}

#[test]
fn all_files_of_a_log_keep_within_their_budget() {
    let Some(rig) = Rig::new() else { return };
    const BUDGET: u64 = 350_000;
    let budget = BUDGET.to_string();
    let options = ["--log-max-bytes", "100000", "--log-max-files", "1000", "--log-max-total", &budget];
    let container = rig.run("seq 1 50000; sleep 1000", &options);
    poll("the last line", || {
        assert!(log_bytes(&container) <= BUDGET);
        container.output("stdout").ends_with("\n50000\n")
    });
    assert!(log_bytes(&container) > BUDGET - 200_000);
    assert!(numbers(50_000).ends_with(&container.output("stdout")));
}

#[test]
fn a_raw_log_is_the_output_byte_by_byte_whatever_kills_the_shim() {
    let Some(rig) = Rig::new() else { return };
    const LINES: u32 = 400_000;
    let options = [RAW_LOG, "--log-max-bytes", "300000", "--log-max-files", "1000"];
    let container = rig.run(&format!("seq 1 {LINES}; echo end >&2; sleep 1000"), &options);
    for _ in 0..4 {
        let before = log_bytes(&container);
        poll("more output", || log_bytes(&container) != before);
        container.kill_shim();
        container.adopt().unwrap();
    }
    poll("everything in the log", || whole_log(&container).len() >= numbers(LINES).len() + 4);
    let seen = whole_log(&container).replacen("end\n", "", 1);
    assert!(seen == numbers(LINES), "{} of {}", seen.len(), numbers(LINES).len());
    for n in 1..5 {
        let text = fs::read_to_string(container.log(n)).unwrap();
        assert!(text.ends_with('\n') && text.len() <= 300_000, "{n}: {}", text.len());
    }
    // Attachments see it too.
    let what = Attach { stdin: false, stdout: true, stderr: true, replay_kib: 1 };
    let mut attached = container.client().attach(what).unwrap();
    match attached.next(Some(PATIENCE)).unwrap() {
        Event::Data { bytes, .. } => {
            assert!(bytes.ends_with(b"400000\nend\n") || bytes.ends_with(b"400000\n"))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_raw_log_goes_on_after_a_full_disk_and_says_what_is_missing() {
    let Some(rig) = Rig::new() else { return };
    let disk = Disk::mount(&rig.path().join("small"), "size=256k");
    let log = disk.0.join("0.log");
    let script = "seq 1 100000; while [ ! -e /go ]; do sleep 0.02; done; echo after; exit 1";
    let container = rig.run(script, &[NO_LOG, "--log-raw", log.to_str().unwrap()]);
    let all = numbers(100_000).len() as u64;
    poll("the end of the output", || {
        let lost = container.client().state().unwrap().log_lost_bytes;
        lost > 0 && lost + fs::metadata(&log).unwrap().len() >= all
    });
    disk.grow("size=64m");
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let record = container.exit();
    let text = fs::read_to_string(&log).unwrap();
    let (before, after) = text.split_once("\nkeel-shim: ").expect("marker");
    assert!(numbers(100_000).starts_with(before));
    let (lines, bytes) = (record.log_lost_lines, record.log_lost_bytes);
    let told = format!("{lines} lines ({bytes} bytes) of output are missing here: No space left on device");
    assert!(after.starts_with(&told) && after.ends_with("\nafter\n"), "{after}");
    assert_eq!(before.len() as u64 + bytes, all);
    assert_eq!(before.matches('\n').count() as u64 + lines, 100_000);
}

#[test]
fn without_a_log_output_goes_to_attachments_only() {
    let Some(rig) = Rig::new() else { return };
    let container = rig.run("while [ ! -e /go ]; do sleep 0.02; done; seq 1 100000; exit 3", &[NO_LOG]);
    let what = Attach { stdin: false, stdout: true, stderr: true, replay_kib: 0 };
    let mut attached = container.client().attach(what).unwrap();
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let (seen, missed, code) = follow(&mut attached);
    assert_eq!((seen.len() as u64 + missed, code), (numbers(100_000).len() as u64, 3));
    assert_eq!(log_bytes(&container), 0);
    assert_eq!(container.exit().log_lost_lines, 0);
}

/// Of a log: how many lines the container wrote, and how many the monitor says are missing.
fn kept_and_told(text: &str) -> (u64, u64) {
    let (mut kept, mut told) = (0, 0);
    for line in text.lines() {
        match line.split_once(" stderr F keel-shim: ") {
            Some((_, marker)) => told += marker.split(' ').next().unwrap().parse::<u64>().unwrap(),
            None => kept += u64::from(&line[38..39] == "F"),
        }
    }
    (kept, told)
}

#[test]
fn a_log_that_hangs_does_not_stop_a_container_that_shall_not_wait_and_every_line_is_accounted_for() {
    let Some(rig) = Rig::new() else { return };
    // As a process that waits for a disk.
    let (container, writer) = far_behind(&rig);
    kill(writer, Signal::SIGCONT).unwrap();
    // Until there is room for more.
    poll("the buffer in the log", || container.log_size() > 50_000);
    fs::write(container.dir.join("rootfs/on"), "").unwrap();
    let record = container.exit();
    assert_eq!(record.code, 4);
    let text = fs::read_to_string(container.log(0)).unwrap();
    let (kept, told) = kept_and_told(&text);
    assert_eq!((kept + told, told), (500_001, record.log_lost_lines));
    assert!(text.ends_with("stdout F last\n"));
    assert!(!runs(writer.as_raw()));
}

/// A container whose log is far behind, and the process that is to write it, which stands still.
fn far_behind(rig: &Rig) -> (Container<'_>, Pid) {
    let script = "while [ ! -e /go ]; do sleep 0.02; done; seq 1 500000; echo > /written
                  while [ ! -e /on ]; do sleep 0.02; done; echo last; exit 4";
    let container = rig.run(script, &["--log-buffer", "65536", "--log-max-bytes", "100000000"]);
    poll("the writer runs", || !children_of(container.shim_pid(), "keel-log").is_empty());
    let writer = Pid::from_raw(children_of(container.shim_pid(), "keel-log")[0]);
    kill(writer, Signal::SIGSTOP).unwrap();
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    poll("the container is done", || container.dir.join("rootfs/written").exists());
    poll("loss", || container.client().state().unwrap().log_lost_lines > 100_000);
    (container, writer)
}

#[test]
fn a_log_catches_up_and_says_what_it_missed_though_nothing_more_is_written() {
    let Some(rig) = Rig::new() else { return };
    let (container, writer) = far_behind(&rig);
    kill(writer, Signal::SIGCONT).unwrap();
    poll("the last of it", || {
        let (kept, told) = kept_and_told(&fs::read_to_string(container.log(0)).unwrap());
        kept + told == 500_000 && told == container.client().state().unwrap().log_lost_lines
    });
    container.client().signal(9).unwrap();
    container.exit();
}

#[test]
fn an_upgrade_takes_no_line_along_that_a_log_has_not_taken_yet() {
    let Some(rig) = Rig::new() else { return };
    let (container, writer) = far_behind(&rig);
    std::thread::scope(|scope| {
        scope.spawn(|| container.client().upgrade().unwrap());
        // The upgrade is to find the writer stopped; should it come later, there is less to wait for.
        std::thread::sleep(Duration::from_millis(200));
        kill(writer, Signal::SIGCONT).unwrap();
    });
    fs::write(container.dir.join("rootfs/on"), "").unwrap();
    let record = container.exit();
    assert_eq!(record.code, 4);
    let (kept, told) = kept_and_told(&fs::read_to_string(container.log(0)).unwrap());
    assert_eq!((kept + told, told), (500_001, record.log_lost_lines));
}

#[test]
fn a_writer_that_is_killed_is_replaced_and_what_it_had_is_counted() {
    let Some(rig) = Rig::new() else { return };
    let script =
        "i=0; while [ ! -e /go ]; do i=$((i+1)); echo $i; sleep 0.01; done; echo $i > /count; exit 0";
    let container = rig.run(script, &["--log-buffer", "65536"]);
    container.wait_for_output("3\n");
    let writer = children_of(container.shim_pid(), "keel-log")[0];
    kill(Pid::from_raw(writer), Signal::SIGKILL).unwrap();
    poll("another writer", || {
        let writers = children_of(container.shim_pid(), "keel-log");
        writers.first().is_some_and(|pid| *pid != writer)
    });
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    let record = container.exit();
    let count: u64 = fs::read_to_string(container.dir.join("rootfs/count")).unwrap().trim().parse().unwrap();
    let (kept, told) = kept_and_told(&fs::read_to_string(container.log(0)).unwrap());
    assert_eq!((kept + told, told), (count, record.log_lost_lines));
}

#[test]
fn a_moved_log_is_reopened_in_its_place_also_by_a_writer() {
    for options in [&["--log-buffer", "65536"] as &[_], &[RAW_LOG]] {
        let Some(rig) = Rig::new() else { return };
        let container = rig.run("echo before; while [ ! -e /go ]; do sleep 0.02; done; echo after", options);
        poll("output", || fs::read_to_string(container.log(0)).is_ok_and(|t| t.contains("before")));
        fs::rename(container.log(0), rig.path().join("moved")).unwrap();
        fs::write(container.log(0), "kept\n").unwrap();
        container.client().reopen().unwrap();
        fs::write(container.dir.join("rootfs/go"), "").unwrap();
        container.exit();
        let text = fs::read_to_string(container.log(0)).unwrap();
        assert!(text.starts_with("kept\n") && text.ends_with("after\n"), "{text}");
        assert!(!text.contains("before"), "{text}");
    }
}

#[test]
fn the_journal_gets_each_line_beside_the_file() {
    let Some(rig) = Rig::new() else { return };
    let run = rig.path().join("systemd");
    fs::create_dir_all(run.join("journal")).unwrap();
    let journald = std::os::unix::net::UnixDatagram::bind(run.join("journal/socket")).unwrap();
    journald.set_read_timeout(Some(PATIENCE)).unwrap();
    let id = rig.id();
    let dir =
        rig.bundle(&id, &["/bin/sh".into(), "-c".into(), "echo out; echo bad >&2".into()], false, json!({}));
    let mut command = rig.command(&id, &dir);
    command.arg("--log").arg(dir.join("0.log")).args(["--log-journal", "--log-name", "web"]);
    command.args(["--log-tag", "tag", "--log-label", "POD=p"]);
    // In a mount namespace whose journal is ours.
    let script =
        "mount --make-rprivate / && mkdir -p /run/systemd && mount --bind \"$0\" /run/systemd && exec \"$@\"";
    let mut inside = Command::new("unshare");
    inside
        .args(["--mount", "sh", "-c", script])
        .arg(&run)
        .arg(command.get_program())
        .args(command.get_args());
    let out = inside.output().unwrap();
    let container = Container { rig: &rig, exit_file: rig.exits().join(format!("{id}.json")), id, dir };
    container.report(out).unwrap();
    let mut messages = [0; 2].map(|_| {
        let mut buffer = vec![0; 4096];
        let len = journald.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    });
    messages.sort();
    assert!(messages[0].starts_with("MESSAGE=bad\nPRIORITY=3\n"), "{messages:?}");
    assert!(messages[1].starts_with("MESSAGE=out\nPRIORITY=6\n"), "{messages:?}");
    let fields = ["CONTAINER_NAME=web\n", "CONTAINER_TAG=tag\n", "SYSLOG_IDENTIFIER=tag\n", "POD=p\n"];
    assert!(fields.iter().all(|field| messages[1].contains(field)), "{messages:?}");
    container.exit();
    assert_eq!(container.output("stdout"), "out\n");
}

/// Peak of the resident set, kB.
fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Bytes that the container's process has written.
fn written(pid: i32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Besides its buffers and its code, which a debug build has more of.
const MOST_KB: u64 = 4096;

#[test]
fn lines_without_an_end_and_output_without_a_pause_cost_no_memory_and_no_answers() {
    for (script, options) in [
        ("exec cat /dev/zero", &[] as &[&str]),
        ("exec yes ''", &[]),
        ("exec cat /dev/zero", &["--log-buffer", "1048576"]),
        ("exec cat /dev/zero", &[RAW_LOG]),
    ] {
        let Some(rig) = Rig::new() else { return };
        let bounds = ["--log-max-bytes", "4000000", "--log-max-files", "2"];
        let container = rig.run(script, &[options, &bounds].concat());
        let mut client = container.client();
        let endless = script.ends_with("zero");
        // 100 MB of one line, or as much as comes in a second.
        let deadline = Instant::now() + Duration::from_secs(if endless { 60 } else { 1 });
        while Instant::now() < deadline && written(container.pid()) < 100 << 20 {
            let asked = Instant::now();
            assert_eq!(client.state().unwrap().phase, Phase::Running);
            assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        }
        assert!(!endless || written(container.pid()) >= 100 << 20);
        let peak = peak(container.shim_pid());
        assert!(peak < MOST_KB, "{script}: {peak} kB");
        assert!(log_bytes(&container) <= 8_000_000 + 200_000);
        client.stop(9, PATIENCE).unwrap();
        assert_eq!(container.exit().signal, 9);
    }
}
