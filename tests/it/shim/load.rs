//! Clients that stand still, and more output than anybody wants.

use std::io::BufRead as _;

use keel_proto::Request;

use super::*;

/// A client in a process of its own, which a signal can stop. It says a message in hexadecimal on each line.
pub(super) struct Listener {
    child: std::process::Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Listener {
    /// `None`, with the reason, where this cannot run.
    pub(super) fn connect(socket: &Path, first_message: &[u8]) -> Option<Listener> {
        const SCRIPT: &str = "use Socket; $| = 1; socket(S, PF_UNIX, SOCK_SEQPACKET, 0);
            connect(S, sockaddr_un($ARGV[0])) or die $!; send(S, pack('H*', $ARGV[1]), 0) if length $ARGV[1];
            print \"connected\\n\";
            print unpack('H*', $b), \"\\n\" while defined recv(S, $b, 1 << 20, 0) && length $b";
        let hex: String = first_message.iter().map(|b| format!("{b:02x}")).collect();
        let mut perl = Command::new("perl");
        perl.args(["-e", SCRIPT]).arg(socket).arg(hex).stdout(Stdio::piped());
        let Ok(mut child) = perl.spawn() else {
            let _ = writeln!(std::io::stderr(), "skipped: perl is not installed");
            return None;
        };
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "connected");
        Some(Listener { child, lines })
    }

    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let line = self.lines.next()?.unwrap();
        let byte = |at| u8::from_str_radix(&line[at..at + 2], 16).unwrap();
        Some((0..line.len()).step_by(2).map(byte).collect())
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_attachment_stopped_by_a_signal_blocks_nobody_and_is_told_what_it_missed() {
    let Some(rig) = Rig::new() else { return };
    const BYTES: usize = 4_000_000;
    let line = "y".repeat(999);
    let script = format!("while [ ! -e /go ]; do sleep 0.02; done; yes {line} | head -c {BYTES}; sleep 1000");
    let container = rig.run(&script, &[]);
    let request = Request::Attach(Attach { stdin: false, stdout: true, stderr: true, replay_kib: 0 });
    let message = request.encode();
    let socket = container.dir.join("ctl.sock");
    let Some(mut client) = Listener::connect(&socket, &[message.head(), message.body].concat()) else {
        return;
    };
    assert!(matches!(Reply::decode(&client.next().unwrap()), Ok(Reply::Ok)));
    client.signal(Signal::SIGSTOP);
    fs::write(container.dir.join("rootfs/go"), "").unwrap();
    poll("all output in the log", || container.output("stdout").len() == BYTES);
    assert_eq!(container.client().state().unwrap().attachments, 1);
    client.signal(Signal::SIGCONT);
    let mut seen = 0;
    let missed = loop {
        match Reply::decode(&client.next().expect("it is not dropped")).unwrap() {
            Reply::Data { bytes, .. } => seen += bytes.len(),
            Reply::Gap { bytes } => break bytes,
            _ => panic!("something else"),
        }
    };
    assert!(seen > 0 && missed > 0);
    assert_eq!(seen as u64 + missed, BYTES as u64);
}

/// Resident, in kB: the most so far.
fn peak_kb(pid: i32) -> u64 {
    status_field(pid, "VmHWM").trim().trim_end_matches(" kB").trim().parse().unwrap()
}

/// How much a process has written, in bytes.
fn written(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn output_without_end_and_without_lines_costs_neither_answers_nor_memory_nor_disk() {
    let Some(rig) = Rig::new() else { return };
    const SECONDS: f64 = 1.5;
    /// Three times what an idle monitor has: its buffers are part of it.
    const MOST_KB: u64 = 4096;
    const LOG_BYTES: u64 = 2_000_000;
    let bounds = ["--log-max-bytes", "1000000", "--log-max-files", "2"];
    for kind in ["lines", RAW_LOG, NO_LOG] {
        let options: Vec<&str> = match kind {
            NO_LOG => vec![NO_LOG],
            RAW_LOG => [&[RAW_LOG], &bounds[..]].concat(),
            _ => bounds.to_vec(),
        };
        let script = "while [ ! -e /go ]; do sleep 0.02; done; exec dd if=/dev/zero bs=1M";
        let container = rig.run(script, &options);
        let before = written(container.pid());
        fs::write(container.dir.join("rootfs/go"), "").unwrap();
        poll("output", || written(container.pid()) > before + (1 << 20));
        let (begun, first) = (Instant::now(), written(container.pid()));
        let mut slowest = Duration::ZERO;
        while begun.elapsed().as_secs_f64() < SECONDS {
            let asked = Instant::now();
            // A new connection each time.
            assert_eq!(container.client().state().unwrap().phase, Phase::Running);
            slowest = slowest.max(asked.elapsed());
            assert!(log_bytes(&container) <= LOG_BYTES, "{kind}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let rate = (written(container.pid()) - first) as f64 / begun.elapsed().as_secs_f64() / 1e6;
        let peak = peak_kb(container.shim_pid());
        let _ = writeln!(
            std::io::stderr(),
            "{kind}: {rate:.0} MB/s, slowest answer {} ms, peak {peak} kB",
            slowest.as_millis()
        );
        assert!(peak < MOST_KB, "{kind}: {peak} kB");
        container.client().stop(9, Duration::ZERO).unwrap();
        assert_eq!(container.exit().signal, 9, "{kind}");
    }
}

/// Sizes of all files of a log.
fn log_bytes(container: &Container<'_>) -> u64 {
    let files = fs::read_dir(&container.dir).unwrap().flatten();
    let logs = files.filter(|e| e.file_name().to_string_lossy().starts_with("0.log"));
    logs.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}
