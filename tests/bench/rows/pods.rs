//! From a file to running processes.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::engines::{engine, engines, present};
use crate::failure::{Doing, Outcome};
use crate::host::{Disk, Work};
use crate::keel::{Keel, manifest};
use crate::report::{Aim, Measure};

/// The kernel's teardown of a container is over by then.
const SETTLE: Duration = Duration::from_millis(300);
/// Pods of the cold start.
const MANY: usize = 50;

/// One pod, image present: our two ways against the peers' one. The contenders take turns, so that a busy moment of the
/// host hits all of them; each starts with a disk that has nothing left to write, so that nobody pays for the one before.
pub(crate) fn one(work: &Work, count: usize) -> Outcome<Vec<Measure>> {
    let archive = keel_tests::image::busybox_archive_in(work.path());
    let keel = Keel::new(work, "one-shot")?;
    keel.import(&archive)?;
    let with_daemon = Keel::new(work, "daemon")?;
    with_daemon.import(&archive)?;
    let engines = engines(work, &work.state("peers")?);
    for engine in &engines {
        engine.load(&archive)?;
    }
    let file = work.path().join("one.yaml");
    let mut one_shot = Measure::new("pod", "one pod, file to running: `keel apply`", "ms");
    let mut declared = Measure::new("pod", "one pod, file to running: `keel daemon`", "ms");
    let daemon = with_daemon.daemon()?;
    for round in 0..count {
        let name = format!("one-{round}");
        fs::write(&file, manifest(&name)).doing_at("write", &file)?;
        settle();
        one_shot.sample("keel apply", ms(keel.apply(&file)?));
        // A reset would keep what was applied, and the next round would start it again beside its own.
        keel.delete(&name)?;
        settle();
        let start = Instant::now();
        with_daemon.declare(&name)?;
        declared.sample("keel daemon", ms(with_daemon.await_running(start, &name)?));
        with_daemon.retract(&name)?;
        with_daemon.await_count(0)?;
        for engine in &engines {
            settle();
            let took = ms(engine.start(&name)?);
            one_shot.sample(&format!("{} run -d", engine.name()), took);
            declared.sample(&format!("{} run -d", engine.name()), took);
            engine.remove(std::slice::from_ref(&name))?;
        }
    }
    drop(daemon);
    Ok(vec![one_shot.aim(Aim::Ratio("podman run -d", 0.2)), declared.aim(Aim::Ratio("podman run -d", 0.2))])
}

/// Fifty pods on a host where nothing runs and nothing ran, against fifty calls of podman.
pub(crate) fn many(work: &Work, count: usize) -> Outcome<Vec<Measure>> {
    let archive = keel_tests::image::busybox_archive_in(work.path());
    let names: Vec<String> = (0..MANY).map(|n| format!("many-{n}")).collect();
    let mut measure = Measure::new("fifty", format!("{MANY} pods, cold"), "ms");
    let mut has_podman = true;
    for _ in 0..count {
        measure.sample("keel apply", ms(ours_cold(work, &archive, &names)?));
        if has_podman {
            let took = present("podman", podman_cold(work, &archive, &names));
            has_podman = took.is_some();
            took.into_iter().for_each(|took| measure.sample("podman loop", ms(took)));
        }
    }
    Ok(vec![measure.aim(Aim::Ratio("podman loop", 0.1))])
}

fn ours_cold(work: &Work, archive: &Path, names: &[String]) -> Outcome<Duration> {
    let disk = Disk::new(work)?;
    let keel = Keel::at(work, "many", disk.path.join("keel"))?;
    keel.import(archive)?;
    for name in names {
        keel.declare(name)?;
    }
    settle();
    let took = keel.apply(&keel.manifests)?;
    keel.reset()?;
    Ok(took)
}

fn podman_cold(work: &Work, archive: &Path, names: &[String]) -> Outcome<Duration> {
    let disk = Disk::new(work)?;
    let podman = engine("podman", work, &disk.path)?;
    podman.load(archive)?;
    settle();
    let start = Instant::now();
    for name in names {
        podman.start(name)?;
    }
    let took = start.elapsed();
    podman.remove(names)?;
    Ok(took)
}

/// What the contender before has left behind is over: nothing to write, and the kernel has taken its namespaces and
/// control groups down, which it does in the background with locks held that the next one needs.
fn settle() {
    nix::unistd::sync();
    std::thread::sleep(SETTLE);
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
