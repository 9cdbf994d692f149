//! How much of a processor the monitors need for the output of a container.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::bundle::{Runtime, bundle};
use crate::engines::{Engine, engine, present};
use crate::failure::{Doing, Failure, Outcome};
use crate::host::Work;
use crate::keel::{bin, first_number};
use crate::measure::{SELDOM, await_some, cpu_s, output, parent, wall, written};
use crate::report::{Aim, Measure};

/// Line length in bytes, newline included; how much of it is written; what a processor second should do.
const LOADS: [(usize, u64, Option<f64>); 3] =
    [(2, 16 << 20, Some(60.0)), (100, 256 << 20, Some(1000.0)), (16_000, 512 << 20, None)];
const GENERATE: &str = "generate-lines";
/// A monitor that used no processor for this long has nothing left to write.
const QUIET: Duration = Duration::from_millis(300);

pub(crate) fn logs(work: &Work, count: usize) -> Outcome<Vec<Measure>> {
    let runtime = Runtime::ours(work)?;
    let conmon = present("conmon", output(Command::new("conmon").arg("--version")));
    let mut measures = Vec::new();
    for (line, total, aim) in LOADS {
        let args = ["/bench", GENERATE, &line.to_string(), &total.to_string()];
        let bundle = bundle(work, &format!("log-{line}"), &args)?;
        let mut measure =
            Measure::new("log", format!("log of {line}-byte lines, per processor second"), "MB");
        measure.aim = aim.map(Aim::AtLeast);
        for _ in 0..count {
            measure.sample("keel-shim", rate(&runtime, total, || shim(work, &runtime, &bundle))?);
            if conmon.is_some() {
                measure.sample("conmon", rate(&runtime, total, || by_conmon(work, &runtime, &bundle))?);
            }
        }
        measures.push(measure);
    }
    let peers = work.state("peers-log")?;
    let archive = keel_tests::image::busybox_archive_in(work.path());
    for (engine_name, contender) in [("ctr", "containerd-shim, raw"), ("docker", "dockerd, json-file")] {
        let Some(engine) = present(engine_name, engine(engine_name, work, &peers)) else { continue };
        engine.load(&archive)?;
        for ((line, total, _), measure) in LOADS.iter().zip(&mut measures) {
            for n in 0..count.min(PEER_COUNT) {
                let name = format!("talk-{line}-{n}");
                measure
                    .sample(contender, by_engine(work, engine.as_ref(), &name, *line, total / PEER_SHARE)?);
            }
        }
    }
    Ok(measures)
}

/// dockerd writes 1 MB of two-byte lines a second.
const PEER_COUNT: usize = 3;
const PEER_SHARE: u64 = 8;

/// Of the daemons and the container's shim together, from the start of the container until they rest.
fn by_engine(work: &Work, engine: &dyn Engine, name: &str, line: usize, total: u64) -> Outcome<f64> {
    let exe = std::env::current_exe().doing("find the running program")?;
    let daemons = |shim: Option<u32>| engine.daemons().into_iter().chain(shim).map(cpu_s).sum::<f64>();
    let before = daemons(None);
    let log = work.run("log-peer")?.join(name);
    let container = engine.talk(name, &exe, &[GENERATE, &line.to_string(), &total.to_string()], &log)?;
    let shim = parent(container);
    let used = drained_by(container, total as f64, || daemons(shim) - before);
    engine.remove(&[name.to_owned()])?;
    let _ = fs::remove_file(&log);
    Ok(total as f64 / 1e6 / used?)
}

const ID: &str = "log";

/// A running container and its monitor.
struct Logged {
    monitor: u32,
    container: u32,
    dir: PathBuf,
}

fn rate(runtime: &Runtime, total: u64, start: impl FnOnce() -> Outcome<Logged>) -> Outcome<f64> {
    let logged = start()?;
    let measured = drained(&logged, total as f64);
    let logged_bytes: u64 =
        files(&logged.dir).iter().filter_map(|path| fs::metadata(path).ok()).map(|m| m.len()).sum();
    wall(&mut runtime.command(&["kill", ID, "KILL"]))?;
    await_some("the monitor ends", SELDOM, || (!keel_tests::is_alive(logged.monitor)).then_some(()))?;
    // Who wrote no exit record leaves the deletion to its caller.
    let _ = wall(&mut runtime.command(&["delete", "--force", ID]));
    fs::remove_dir_all(&logged.dir).doing_at("remove", &logged.dir)?;
    let cpu = measured?;
    if logged_bytes < total {
        return Err(Failure::new(format!("{logged_bytes} bytes of log for {total} bytes of output")));
    }
    Ok(total as f64 / 1e6 / cpu)
}

/// Processor seconds of the monitor from its start until all output is in the log.
fn drained(logged: &Logged, total: f64) -> Outcome<f64> {
    drained_by(logged.container, total, || cpu_s(logged.monitor))
}

fn drained_by(container: u32, total: f64, cpu: impl Fn() -> f64) -> Outcome<f64> {
    await_some("the container has written its lines", SELDOM, || {
        (written(container) >= total).then_some(())
    })?;
    // Never close to anything: the first look has nothing to compare with.
    let mut last = f64::NAN;
    await_some("the monitor comes to rest", QUIET, || {
        let now = cpu();
        // A daemon does a little all the time; what a log costs is seen above that.
        let is_quiet = now > 0.0 && now - last < REST;
        last = now;
        is_quiet.then_some(now)
    })
}

/// Processor seconds within [`QUIET`]: a hundredth of a processor.
const REST: f64 = 0.003;

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|p| p.to_string_lossy().contains(".log")).collect()
}

fn shim(work: &Work, runtime: &Runtime, bundle: &Path) -> Outcome<Logged> {
    let dir = work.run("log-shim")?;
    let mut command = Command::new(bin("keel-shim")?);
    command.args(["run", "--id", ID, "--dir"]).arg(&dir).arg("--bundle").arg(bundle);
    command.arg("--runtime").arg(runtime.program()).arg("--runtime-root").arg(runtime.root());
    command.arg("--exit-file").arg(dir.join("exit.json")).arg("--log").arg(dir.join("0.log"));
    // As much as conmon keeps: everything.
    command.args(["--log-max-bytes", &u64::MAX.to_string(), "--log-max-files", "1"]);
    let said = output(&mut command)?;
    let container = said.trim().strip_prefix("ok ").and_then(|pid| pid.parse().ok());
    let container = container.ok_or_else(|| Failure::new(format!("keel-shim answers: {said}")))?;
    let monitor = await_some("keel-shim says its pid", SELDOM, || first_number(&dir.join("shim.pid")))?;
    Ok(Logged { monitor, container, dir })
}

fn by_conmon(work: &Work, runtime: &Runtime, bundle: &Path) -> Outcome<Logged> {
    let dir = work.run("log-conmon")?;
    let mut command = Command::new("conmon");
    command.args(["--api-version", "1", "-c", ID, "-u", ID, "-n", ID, "-r"]).arg(runtime.program());
    command.arg("-b").arg(bundle).arg("-p").arg(dir.join("pid")).arg("-P").arg(dir.join("monitor.pid"));
    command.arg("-l").arg(format!("k8s-file:{}", dir.join("0.log").display()));
    command.arg("--exit-dir").arg(&dir).arg("--persist-dir").arg(&dir).arg("--full-attach");
    command.arg("--runtime-arg=--root").arg(format!("--runtime-arg={}", runtime.root().display()));
    wall(&mut command)?;
    // conmon returns before the container exists.
    let container = await_some("conmon creates the container", SELDOM, || first_number(&dir.join("pid")))?;
    let monitor = await_some("conmon says its pid", SELDOM, || first_number(&dir.join("monitor.pid")))?;
    wall(&mut runtime.command(&["start", ID]))?;
    Ok(Logged { monitor, container, dir })
}

/// Inside the container: `generate-lines LINE TOTAL`, then waits to be killed.
pub(crate) fn generator(words: &[std::ffi::OsString]) -> Option<i32> {
    let [verb, line, total] = words else { return None };
    if verb != GENERATE {
        return None;
    }
    let number = |word: &std::ffi::OsString| word.to_string_lossy().parse::<u64>().ok();
    let (Some(line), Some(total)) = (number(line), number(total)) else { return Some(2) };
    let mut lines = Vec::new();
    while lines.len() < 64 << 10 {
        lines.resize(lines.len() + usize::try_from(line).unwrap_or(2) - 1, b'x');
        lines.push(b'\n');
    }
    let mut out = std::io::stdout().lock();
    let mut written = 0;
    while written < total {
        if out.write_all(&lines).is_err() {
            return Some(1);
        }
        written += lines.len() as u64;
    }
    drop(out);
    loop {
        std::thread::park();
    }
}
