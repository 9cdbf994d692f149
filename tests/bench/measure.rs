//! What a command costs, and what a process is: wall clock, processor time, memory, wake-ups.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use crate::failure::{Doing, Failure, Outcome};

/// Runs a command to its end and answers how long that took. Its error output is part of a failure.
pub(crate) fn wall(command: &mut Command) -> Outcome<Duration> {
    let mut errors = tempfile::tempfile().doing("create a temporary file")?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors.try_clone().doing("share a file")?);
    let start = Instant::now();
    let status = command.status().doing(&format!("run {:?}", command.get_program()))?;
    let wall = start.elapsed();
    if status.success() {
        return Ok(wall);
    }
    let mut text = String::new();
    let _ = std::io::Seek::rewind(&mut errors).and_then(|()| errors.read_to_string(&mut text));
    Err(Failure::new(format!("{command:?} failed ({status}): {}", text.trim())))
}

/// Standard output of a command that must succeed.
pub(crate) fn output(command: &mut Command) -> Outcome<String> {
    let ran = command.stdin(Stdio::null()).output().doing(&format!("run {:?}", command.get_program()))?;
    if !ran.status.success() {
        let text = String::from_utf8_lossy(&ran.stderr);
        return Err(Failure::new(format!("{command:?} failed ({}): {}", ran.status, text.trim())));
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// What a command and all descendants that it waited for used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) wall_s: f64,
    pub(crate) cpu_s: f64,
    pub(crate) peak_rss_kb: f64,
}

const MEASURE: &str = "measure-one";

/// Runs a command below a process of its own, because the kernel keeps the usage of ended children only as a sum and a
/// maximum over all of them.
pub(crate) fn usage(command: &Command) -> Outcome<Usage> {
    let exe = std::env::current_exe().doing("find the running program")?;
    let report = tempfile::NamedTempFile::new().doing("create a temporary file")?;
    let mut below = Command::new(exe);
    below.arg(MEASURE).arg(report.path()).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => below.env(name, value),
            None => below.env_remove(name),
        };
    }
    wall(&mut below)?;
    let text = fs::read_to_string(report.path()).doing_at("read", report.path())?;
    let mut fields = text.split_whitespace().map(str::parse::<f64>);
    match (fields.next(), fields.next(), fields.next()) {
        (Some(Ok(wall_s)), Some(Ok(cpu_s)), Some(Ok(peak_rss_kb))) => {
            Ok(Usage { wall_s, cpu_s, peak_rss_kb })
        }
        _ => Err(Failure::new(format!("usage report is not understood: {text:?}"))),
    }
}

/// The other side of [`usage`]: `measure-one REPORT PROGRAM ARGUMENT...`. The exit code, if that is what we are.
pub(crate) fn measured_child(words: &[OsString]) -> Option<i32> {
    let [verb, report, program, arguments @ ..] = words else { return None };
    if verb != MEASURE {
        return None;
    }
    let start = Instant::now();
    let status = Command::new(program).args(arguments).status();
    let wall = start.elapsed();
    let Ok(used) = getrusage(UsageWho::RUSAGE_CHILDREN) else { return Some(125) };
    let seconds = |t: nix::sys::time::TimeVal| Duration::from_micros(micros(t)).as_secs_f64();
    let cpu = seconds(used.user_time()) + seconds(used.system_time());
    let text = format!("{} {cpu} {}\n", wall.as_secs_f64(), used.max_rss());
    if fs::write(report, text).is_err() {
        return Some(125);
    }
    match status {
        Ok(status) => Some(status.code().unwrap_or(128 + status.signal().unwrap_or(0))),
        Err(error) => {
            eprintln!("{}: {error}", program.display());
            Some(127)
        }
    }
}

fn micros(time: nix::sys::time::TimeVal) -> u64 {
    u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0)
}

/// A process at rest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Footprint {
    pub(crate) rss_kb: f64,
    pub(crate) pss_kb: f64,
    /// Memory that would come back if the process ended.
    pub(crate) uss_kb: f64,
    pub(crate) threads: f64,
    pub(crate) fds: f64,
}

pub(crate) fn footprint(pid: u32) -> Outcome<Footprint> {
    let proc = proc(pid);
    let path = proc.join("smaps_rollup");
    let text = fs::read_to_string(&path).doing_at("read", &path)?;
    let count = |name: &str| -> Outcome<f64> {
        let path = proc.join(name);
        // The directory itself is open while a process counts its own descriptors, never for another one's.
        Ok(fs::read_dir(&path).doing_at("read", &path)?.count() as f64)
    };
    Ok(Footprint {
        rss_kb: field(&text, "Rss:"),
        pss_kb: field(&text, "Pss:"),
        uss_kb: field(&text, "Private_Clean:") + field(&text, "Private_Dirty:"),
        threads: count("task")?,
        fds: count("fd")?,
    })
}

/// `VmHWM`: the largest resident set so far.
pub(crate) fn peak_rss_kb(pid: u32) -> f64 {
    field(&fs::read_to_string(proc(pid).join("status")).unwrap_or_default(), "VmHWM:")
}

/// How often each thread of a process went to sleep so far: the wake-ups, when it is idle.
pub(crate) fn sleeps(pid: u32) -> BTreeMap<String, f64> {
    threads(pid, "status", |text| field(text, "voluntary_ctxt_switches:"))
}

/// What was added since; threads that ended meanwhile are not counted.
pub(crate) fn sleeps_since(pid: u32, before: &BTreeMap<String, f64>) -> f64 {
    sleeps(pid).iter().map(|(thread, count)| count - before.get(thread).unwrap_or(&0.0)).sum()
}

/// Processor seconds of a running process' threads, to the nanosecond.
pub(crate) fn cpu_s(pid: u32) -> f64 {
    let running = |text: &str| text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok());
    threads(pid, "schedstat", |text| running(text).unwrap_or(0.0) / 1e9).values().sum()
}

/// Processor seconds of a process, its ended threads, and the children that it waited for, to the clock tick.
pub(crate) fn cpu_with_children_s(pid: u32) -> f64 {
    /// `USER_HZ`, part of the kernel's interface.
    const TICKS_A_SECOND: f64 = 100.0;
    let stat = fs::read_to_string(proc(pid).join("stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(") ") else { return 0.0 };
    // utime, stime, cutime and cstime are the fields 14 to 17; `rest` begins at the third.
    rest.split(' ').skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>()
        / TICKS_A_SECOND
}

/// Bytes that a process has handed to `write` so far.
pub(crate) fn written(pid: u32) -> f64 {
    field(&fs::read_to_string(proc(pid).join("io")).unwrap_or_default(), "wchar:")
}

pub(crate) fn parent(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(proc(pid).join("status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn threads(pid: u32, file: &str, read: impl Fn(&str) -> f64) -> BTreeMap<String, f64> {
    let tasks = fs::read_dir(proc(pid).join("task")).into_iter().flatten().flatten();
    let value = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join(file)).unwrap_or_default();
        (task.file_name().to_string_lossy().into_owned(), read(&text))
    };
    tasks.map(value).collect()
}

fn proc(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// The number after a name at the start of a line; 0 when there is none.
fn field(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

/// Polls until there is a value.
pub(crate) fn await_some<T>(what: &str, every: Duration, mut poll: impl FnMut() -> Option<T>) -> Outcome<T> {
    /// A busy machine pulls a large image in well under this.
    const PATIENCE: Duration = Duration::from_secs(120);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = poll() {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(Failure::new(format!("not within {} s: {what}", PATIENCE.as_secs())));
        }
        std::thread::sleep(every);
    }
}

pub(crate) const OFTEN: Duration = Duration::from_micros(500);
pub(crate) const SELDOM: Duration = Duration::from_millis(20);
