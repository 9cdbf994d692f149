//! Probes that run a command in the container, through the runtime's `exec`.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use keel_engine::ports::{ProbeKind, ProbeOutcome, ProbeRequest};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;

use crate::probes::{MAX_BODY_BYTES, Target, shorten};
use crate::state::remove_file;

/// Output that is on its way when the command ends. What a process that outlives it has to say is not waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// After SIGKILL the runtime goes at once; it is reaped in the background when it does not.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// Of the processes of one probe.
const MAX_PROCESSES: usize = 1024;
/// Of the runtime's log of one call.
const MAX_LOG_BYTES: usize = 64 << 10;

/// Within its own timeout: what it started is ended before the answer.
pub(crate) async fn run(target: &Target, request: &ProbeRequest, command: &[String]) -> ProbeOutcome {
    let kind = match request.kind {
        ProbeKind::Startup => "startup",
        ProbeKind::Liveness => "liveness",
        ProbeKind::Readiness => "readiness",
    };
    let log = target.dir.join(format!("{kind}.log"));
    if let Err(error) = remove_file(&log) {
        return ProbeOutcome::Error(crate::error::chain(&error));
    }
    let mut exec = tokio::process::Command::new(&target.runtime);
    exec.arg("--root").arg(&target.runtime_root).arg("--log").arg(&log).args([
        "--log-format",
        "json",
        "exec",
    ]);
    exec.arg(&request.container.0).args(command);
    exec.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = match exec.spawn() {
        Ok(child) => child,
        Err(e) => return ProbeOutcome::Error(format!("run {}: {e}", target.runtime.display())),
    };
    let mut text = Vec::new();
    let ended = tokio::time::timeout(request.timeout, end_of(&mut child, &mut text)).await;
    let complaint = complaint(&log);
    let _ = remove_file(&log);
    match ended {
        Ok(Ok(status)) => judge(status, complaint.as_deref(), &text),
        Ok(Err(e)) => ProbeOutcome::Error(format!("wait for the command: {e}")),
        Err(_) => {
            kill(&mut child).await;
            ProbeOutcome::Failure(format!("no answer within {:?}", request.timeout))
        }
    }
}

/// Both outputs are read to their ends, since a full or closed pipe would stop a healthy command; the first bytes are kept.
async fn end_of(child: &mut Child, text: &mut Vec<u8>) -> std::io::Result<ExitStatus> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut complaints = Vec::new();
    let status = {
        let reading = async { tokio::join!(keep(stdout, text), keep(stderr, &mut complaints)) };
        tokio::pin!(reading);
        tokio::select! {
            // Both are cancel-safe here: what was read is kept, and an exit status stays until it is taken.
            _ = &mut reading => child.wait().await,
            status = child.wait() => {
                let _ = tokio::time::timeout(LAST_WORDS, &mut reading).await;
                status
            }
        }
    };
    if text.is_empty() {
        *text = complaints;
    }
    status
}

async fn keep(from: Option<impl AsyncRead + Unpin>, text: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut chunk = [0; 4096];
    while let Ok(n) = from.read(&mut chunk).await {
        if n == 0 {
            return;
        }
        let room = MAX_BODY_BYTES - text.len();
        text.extend_from_slice(&chunk[..n.min(room)]);
    }
}

fn judge(status: ExitStatus, complaint: Option<&str>, text: &[u8]) -> ProbeOutcome {
    match complaint {
        _ if status.success() => ProbeOutcome::Success,
        // The runtime has not started it: not running yet, or not any more.
        Some(why) if !is_about_command(why) => ProbeOutcome::Error(why.to_string()),
        _ => {
            let said = shorten(text);
            ProbeOutcome::Failure(format!("command {}: {said}", describe(status)).trim_end().to_string())
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exited {code}"),
        None => status.to_string(),
    }
}

/// The last error that the runtime itself had.
fn complaint(log: &Path) -> Option<String> {
    let text = fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_LOG_BYTES)]).into_owned();
    text.lines().rev().find_map(|line| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let is_error = matches!(entry["level"].as_str(), Some("error" | "fatal"));
        is_error.then(|| shorten(entry["msg"].as_str().unwrap_or("unknown error").as_bytes()))
    })
}

/// A command that cannot be executed will not be executable later: that is a verdict. The words are runc's, which every
/// OCI runtime repeats because callers match on them.
fn is_about_command(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    message.contains("exec")
        && [
            "executable file",
            "no such file or directory",
            "permission denied",
            "exec format error",
            "is a directory",
        ]
        .iter()
        .any(|words| message.contains(words))
        && !message.contains("does not exist")
}

/// The runtime and everything that it started: the command, and what the command started.
async fn kill(child: &mut Child) {
    const SIGKILL: i32 = 9;
    if let Some(pid) = child.id() {
        for process in descendants(pid) {
            // It may have ended in between.
            let _ = keel_sys::process::pidfd_send_signal(&process, SIGKILL);
        }
    }
    let _ = child.start_kill();
    let _ = tokio::time::timeout(KILL_TIMEOUT, child.wait()).await;
}

/// Parents before children. `root` is our own child and not reaped yet, so its number is its own.
fn descendants(root: u32) -> Vec<OwnedFd> {
    let mut numbers = vec![root];
    let mut found = Vec::new();
    let mut next = 0;
    while let Some(parent) = numbers.get(next).copied()
        && next < MAX_PROCESSES
    {
        next += 1;
        for pid in children(parent) {
            let Ok(pidfd) = keel_sys::process::pidfd_open(pid.cast_signed()) else { continue };
            // Asked after the descriptor was opened: it is that child, or one that has gone.
            if parent_of(pid) == Some(parent) {
                numbers.push(pid);
                found.push(pidfd);
            }
        }
    }
    found
}

/// `/proc/<pid>/task/<tid>/children` (proc_tid_children(5)): each thread has its own.
fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn what_the_runtime_could_not_do_is_no_verdict() {
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        let verdict = |status, complaint| judge(status, complaint, b"said");
        assert_eq!(verdict(code(0), None), ProbeOutcome::Success);
        assert_eq!(verdict(code(3), None), ProbeOutcome::Failure("command exited 3: said".into()));
        assert_eq!(verdict(code(255), None), ProbeOutcome::Failure("command exited 255: said".into()));
        for why in [
            "container \"x\" is created: cannot exec",
            "container not running",
            "cannot exec in a stopped container",
            "container does not exist",
        ] {
            assert_eq!(verdict(code(255), Some(why)), ProbeOutcome::Error(why.into()));
        }
        let missing =
            "exec failed: unable to start container process: exec: \"x\": executable file not found in $PATH";
        assert!(matches!(verdict(code(255), Some(missing)), ProbeOutcome::Failure(_)));
    }

    #[test]
    fn processes_below_a_process_are_found_to_the_last() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "/bin/sh -c '/bin/sleep 1000 & wait' & wait"])
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while descendants(child.id()).len() < 2 {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        for process in descendants(child.id()) {
            keel_sys::process::pidfd_send_signal(process, 9).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
