//! What stays in memory while nothing happens.

use std::time::Duration;

use crate::engines::{Engine, engine, podman_with, present};
use crate::failure::{Doing, Failure, Outcome};
use crate::host::Work;
use crate::keel::{Keel, bin};
use crate::measure::{Footprint, footprint, parent, sleeps, sleeps_since};
use crate::report::{Aim, Measure};

const PODS: usize = 50;
const MONITORS: usize = 10;
/// Long enough that a poll once a second shows.
const IDLE: Duration = Duration::from_secs(10);
/// What was started must have come to rest, threads that wait for more work included.
const REST: Duration = Duration::from_secs(12);

pub(crate) fn memory(work: &Work, count: usize) -> Outcome<Vec<Measure>> {
    let archive = keel_tests::image::busybox_archive_in(work.path());
    let mut table = Table::new();
    ours(work, &archive, count, &mut table)?;
    let peers = work.state("peers-memory")?;
    for (name, monitor) in [("podman", "conmon"), ("ctr", "containerd-shim-runc-v2")] {
        let Some(engine) = present(name, engine(name, work, &peers)) else { continue };
        engine.load(&archive)?;
        let names = start(engine.as_ref(), "mon", MONITORS)?;
        table.monitors(monitor, &monitors_of(monitor)?)?;
        engine.remove(&names)?;
    }
    let conmon = work.path().join("conmon");
    std::os::unix::fs::symlink(bin("keel-shim")?, &conmon).doing_at("link", &conmon)?;
    let disk = work.state("peers-conmon")?;
    if let Some(podman) = present("podman", podman_with(conmon, work, &disk)) {
        podman.load(&archive)?;
        let names = start(podman.as_ref(), "own", MONITORS)?;
        table.monitors("keel-shim as podman's conmon", &monitors_of("keel-shim")?)?;
        podman.remove(&names)?;
    }
    if let Some(docker) = present("docker", engine("docker", work, &peers)) {
        docker.load(&archive)?;
        let names = start(docker.as_ref(), "mon", MONITORS)?;
        let shims = monitors_of("containerd-shim-runc-v2")?;
        table.shared("dockerd, containerd and shims, a tenth of", &[docker.daemons(), shims].concat())?;
        docker.remove(&names)?;
        let names = start(docker.as_ref(), "idle", PODS)?;
        std::thread::sleep(REST);
        table.daemon("dockerd + containerd", &docker.daemons(), count)?;
        docker.remove(&names)?;
    }
    Ok(table.measures())
}

fn ours(work: &Work, archive: &std::path::Path, count: usize, table: &mut Table) -> Outcome {
    let keel = Keel::new(work, "memory")?;
    keel.import(archive)?;
    for n in 0..PODS {
        keel.declare(&format!("idle-{n}"))?;
    }
    let daemon = keel.daemon()?;
    keel.await_count(PODS)?;
    std::thread::sleep(REST);
    table.daemon("keel daemon", &[daemon.pid()], count)?;
    for n in MONITORS..PODS {
        keel.retract(&format!("idle-{n}"))?;
    }
    keel.await_count(MONITORS)?;
    let shims: Vec<u32> = keel.running().into_iter().map(|(_, shim)| shim).collect();
    table.monitors("keel-shim", &shims)
}

fn start(engine: &dyn Engine, prefix: &str, count: usize) -> Outcome<Vec<String>> {
    let names: Vec<String> = (0..count).map(|n| format!("{prefix}-{n}")).collect();
    for name in &names {
        engine.start(name)?;
    }
    Ok(names)
}

/// The monitors that are ours to look at: this namespace's, by the name of their program and the containers below them.
fn monitors_of(program: &str) -> Outcome<Vec<u32>> {
    let own = std::fs::read_link("/proc/self/ns/mnt").doing("read the own mount namespace")?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").doing("read /proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let is_it = std::fs::read_link(entry.path().join("exe"))
            .is_ok_and(|exe| exe.file_name() == Some(program.as_ref()));
        let is_here = std::fs::read_link(entry.path().join("ns/mnt")).is_ok_and(|ns| ns == own);
        // One that a monitor has just forked is no monitor.
        let is_child = parent(pid).is_some_and(|parent| found.contains(&parent));
        if is_it && is_here && !is_child {
            found.push(pid);
        }
    }
    if found.len() < MONITORS {
        return Err(Failure::new(format!("{} of {MONITORS} {program} found", found.len())));
    }
    Ok(found)
}

/// A monitor, and the process that it may have split off.
fn with_helpers(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let is_helper = |child: &u32| {
        std::fs::read_to_string(format!("/proc/{child}/comm"))
            .is_ok_and(|name| name.trim_end() == "keel-helper")
    };
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(children.filter(is_helper)).collect()
}

/// Of processes together, their threads counted as `threads` says.
fn together(pids: &[u32], threads: fn(f64, f64) -> f64) -> Outcome<Footprint> {
    let mut sum = Footprint::default();
    for &pid in pids {
        let one = footprint(pid)?;
        sum.rss_kb += one.rss_kb;
        sum.pss_kb += one.pss_kb;
        sum.uss_kb += one.uss_kb;
        sum.fds += one.fds;
        sum.threads = threads(sum.threads, one.threads);
    }
    Ok(sum)
}

struct Table {
    daemon_rss: Measure,
    daemon_pss: Measure,
    daemon_uss: Measure,
    daemon_threads: Measure,
    daemon_sleeps: Measure,
    rss: Measure,
    pss: Measure,
    uss: Measure,
    processes: Measure,
    threads: Measure,
    fds: Measure,
    sleeps: Measure,
}

impl Table {
    fn new() -> Table {
        let daemon =
            |what: &str, unit| Measure::new("memory", format!("daemon with {PODS} pods: {what}"), unit);
        let monitor = |what: &str, unit| {
            Measure::new("memory", format!("monitor, {MONITORS} containers: {what}"), unit)
        };
        Table {
            daemon_rss: daemon("RSS", "MB").aim(Aim::AtMost(15.0)),
            daemon_pss: daemon("PSS", "MB"),
            daemon_uss: daemon("USS", "MB"),
            daemon_threads: daemon("threads", ""),
            daemon_sleeps: daemon("wake-ups in 10 s", ""),
            rss: monitor("RSS", "kB"),
            pss: monitor("PSS", "kB"),
            uss: monitor("USS", "kB").aim(Aim::AtMost(150.0)),
            processes: monitor("processes", ""),
            threads: monitor("threads of each process", "").aim(Aim::AtMost(1.0)),
            fds: monitor("descriptors", "").aim(Aim::AtMost(12.0)),
            sleeps: monitor("wake-ups in 10 s", "").aim(Aim::AtMost(0.0)),
        }
    }

    /// Looks `count` times during the idle period; several processes of one engine are added up.
    fn daemon(&mut self, name: &str, pids: &[u32], count: usize) -> Outcome {
        let before: Vec<_> = pids.iter().copied().map(sleeps).collect();
        for _ in 0..count {
            std::thread::sleep(IDLE / u32::try_from(count).unwrap_or(1));
            let sum = together(pids, |sum, one| sum + one)?;
            self.daemon_rss.sample(name, sum.rss_kb / 1024.0);
            self.daemon_pss.sample(name, sum.pss_kb / 1024.0);
            self.daemon_uss.sample(name, sum.uss_kb / 1024.0);
            self.daemon_threads.sample(name, sum.threads);
        }
        let since = pids.iter().zip(&before).map(|(&pid, before)| sleeps_since(pid, before));
        self.daemon_sleeps.sample(name, since.sum());
        Ok(())
    }

    /// One sample for each monitor, with its helper.
    fn monitors(&mut self, name: &str, pids: &[u32]) -> Outcome {
        std::thread::sleep(REST);
        let monitors: Vec<Vec<u32>> = pids.iter().copied().map(with_helpers).collect();
        self.idle(name, &monitors, 1.0)
    }

    /// Processes that serve all the containers: what one of these costs.
    fn shared(&mut self, name: &str, pids: &[u32]) -> Outcome {
        std::thread::sleep(REST);
        self.idle(name, &[pids.to_vec()], MONITORS as f64)
    }

    fn idle(&mut self, name: &str, groups: &[Vec<u32>], containers: f64) -> Outcome {
        let watch = |group: &Vec<u32>| group.iter().copied().map(sleeps).collect::<Vec<_>>();
        let before: Vec<_> = groups.iter().map(watch).collect();
        std::thread::sleep(IDLE);
        for (group, before) in groups.iter().zip(&before) {
            let woken: f64 = group.iter().zip(before).map(|(&pid, before)| sleeps_since(pid, before)).sum();
            self.sleeps.sample(name, woken / containers);
            let all = together(group, f64::max)?;
            self.rss.sample(name, all.rss_kb / containers);
            self.pss.sample(name, all.pss_kb / containers);
            self.uss.sample(name, all.uss_kb / containers);
            self.fds.sample(name, all.fds / containers);
            self.processes.sample(name, group.len() as f64 / containers);
            self.threads.sample(name, all.threads);
        }
        Ok(())
    }

    fn measures(self) -> Vec<Measure> {
        vec![
            self.daemon_rss,
            self.daemon_pss,
            self.daemon_uss,
            self.daemon_threads,
            self.daemon_sleeps,
            self.rss,
            self.pss,
            self.uss,
            self.processes,
            self.threads,
            self.fds,
            self.sleeps,
        ]
    }
}
