//! `keel-runtime` against crun and runc, on one bundle.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::bundle::{Runtime, bundle};
use crate::engines::present;
use crate::failure::{Doing, Outcome};
use crate::host::Work;
use crate::keel::{bin, first_number};
use crate::measure::{usage, wall};
use crate::report::{Aim, Measure};

/// Before each call: a busy kernel has just paid for what an idle one makes the next caller wait for.
const GAP: Duration = Duration::from_millis(60);

struct Table {
    run: Measure,
    create: Measure,
    start: Measure,
    delete: Measure,
    exec: Measure,
    run_rss: Measure,
    create_rss: Measure,
    exec_rss: Measure,
}

pub(crate) fn runtimes(work: &Work, count: usize) -> Outcome<Vec<Measure>> {
    let short = bundle(work, "true", &["/bin/true"])?;
    let long = bundle(work, "sleep", &["/bin/sleep", "100000"])?;
    let peers = ["crun", "runc"].into_iter().filter_map(|name| present(name, Runtime::peer(work, name)));
    let all: Vec<Runtime> = std::iter::once(Runtime::ours(work)?).chain(peers).collect();
    let measure = |name: &str, unit| Measure::new("runtime", name, unit);
    let mut table = Table {
        run: measure("`run` of true", "ms").aim(Aim::Ratio("crun", 0.4)),
        create: measure("`create`", "ms"),
        start: measure("`start`", "ms"),
        delete: measure("`delete`", "ms"),
        exec: measure("`exec` of true", "ms").aim(Aim::Ratio("crun", 0.3)),
        run_rss: measure("`run`: peak RSS", "MB").aim(Aim::AtMost(4.0)),
        create_rss: measure("`create`: peak RSS", "MB"),
        exec_rss: measure("`exec`: peak RSS", "MB"),
    };
    // What a runtime leaves running becomes our child, and is reaped when we say so.
    set_child_subreaper(true).doing("become a subreaper")?;
    for runtime in &all {
        runtime.on_its_host(|| start_long(runtime, &long))?;
    }
    let measured = (0..count).try_for_each(|_| {
        all.iter().try_for_each(|runtime| runtime.on_its_host(|| round(runtime, &short, &mut table)))
    });
    for runtime in &all {
        let id = runtime.id("long");
        let pid = pid_of(runtime, &id);
        runtime.on_its_host(|| wall(&mut runtime.command(&["delete", "--force", &id])))?;
        reap(pid);
    }
    measured?;
    let mut measures = vec![
        table.run,
        table.create,
        table.start,
        table.delete,
        table.exec,
        table.run_rss,
        table.create_rss,
        table.exec_rss,
    ];
    measures.extend(sizes()?);
    Ok(measures)
}

fn start_long(runtime: &Runtime, bundle: &Path) -> Outcome {
    let id = runtime.id("long");
    create(runtime, &id, bundle)?;
    wall(&mut runtime.command(&["start", &id])).map(drop)
}

fn round(runtime: &Runtime, bundle: &Path, table: &mut Table) -> Outcome {
    let name = runtime.name;
    let (short, long) = (runtime.id("short"), runtime.id("long"));
    let timed = |measure: &mut Measure, command: &mut Command| -> Outcome {
        std::thread::sleep(GAP);
        measure.sample(name, wall(command)?.as_secs_f64() * 1000.0);
        Ok(())
    };
    let exec = || runtime.command(&["exec", &long, "/bin/true"]);
    let mut run = runtime.command(&["run", "--bundle"]);
    run.arg(bundle).arg(&short);
    timed(&mut table.run, &mut run)?;
    timed(&mut table.create, &mut creation(runtime, &short, bundle))?;
    timed(&mut table.start, &mut runtime.command(&["start", &short]))?;
    reap(pid_of(runtime, &short));
    timed(&mut table.delete, &mut runtime.command(&["delete", &short]))?;
    timed(&mut table.exec, &mut exec())?;
    let rss = |command: &Command| Ok(usage(command)?.peak_rss_kb / 1024.0);
    table.run_rss.sample(name, rss(&run)?);
    table.create_rss.sample(name, rss(&creation(runtime, &short, bundle))?);
    wall(&mut runtime.command(&["delete", "--force", &short]))?;
    reap(pid_of(runtime, &short));
    table.exec_rss.sample(name, rss(&exec())?);
    Ok(())
}

fn create(runtime: &Runtime, id: &str, bundle: &Path) -> Outcome {
    wall(&mut creation(runtime, id, bundle)).map(drop)
}

fn creation(runtime: &Runtime, id: &str, bundle: &Path) -> Command {
    let mut command = runtime.command(&["create", "--bundle"]);
    command.arg(bundle).arg("--pid-file").arg(pid_file(runtime, id)).arg(id);
    command
}

fn pid_file(runtime: &Runtime, id: &str) -> std::path::PathBuf {
    runtime.root().with_extension(format!("{id}.pid"))
}

fn pid_of(runtime: &Runtime, id: &str) -> Option<u32> {
    first_number(&pid_file(runtime, id))
}

fn reap(pid: Option<u32>) {
    if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
        let _ = waitpid(Pid::from_raw(pid), None);
    }
}

/// Programs, each beside those that do the same job.
fn sizes() -> Outcome<Vec<Measure>> {
    let jobs: [(&str, &str, &[&str]); 3] = [
        ("runtime", "keel-runtime", &["crun", "runc"]),
        ("monitor", "keel-shim", &["conmon", "containerd-shim-runc-v2"]),
        ("engine", "keel", &["podman", "containerd", "dockerd"]),
    ];
    let which = |name: &str| {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
    };
    let mut measures = Vec::new();
    for (job, ours, theirs) in jobs {
        let mut measure = Measure::new("runtime", format!("size of the program: {job}"), "kB");
        let theirs = theirs.iter().filter_map(|name| Some((*name, which(name)?)));
        for (name, path) in std::iter::once((ours, bin(ours)?)).chain(theirs) {
            let size = fs::metadata(&path).doing_at("read the size of", &path)?.len();
            measure.sample(name, size as f64 / 1024.0);
        }
        measures.push(if job == "runtime" { measure.aim(Aim::AtMost(2048.0)) } else { measure });
    }
    Ok(measures)
}
