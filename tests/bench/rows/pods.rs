//! From a file to running processes.

use std::fs;
use std::time::Instant;

use crate::engines::{engine, engines, present};
use crate::failure::{Doing, Outcome};
use crate::host::Work;
use crate::keel::{Keel, manifest};
use crate::report::{Aim, Measure};

/// Pods of the cold start.
const MANY: usize = 50;

/// One pod, image present: our two ways against the peers' one. The contenders take turns, so that a busy moment of the
/// host hits all of them.
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
        one_shot.sample("keel apply", ms(keel.apply(&file)?));
        keel.reset()?;
        let start = Instant::now();
        with_daemon.declare(&name)?;
        declared.sample("keel daemon", ms(with_daemon.await_running(start, &name)?));
        with_daemon.retract(&name)?;
        with_daemon.await_count(0)?;
        for engine in &engines {
            let took = ms(engine.start(&name)?);
            one_shot.sample(&format!("{} run -d", engine.name()), took);
            declared.sample(&format!("{} run -d", engine.name()), took);
            engine.remove(std::slice::from_ref(&name))?;
        }
    }
    drop(daemon);
    Ok(vec![one_shot.aim(Aim::Ratio("podman run -d", 0.2)), declared.aim(Aim::Ratio("podman run -d", 0.2))])
}

/// Fifty pods on a host where nothing runs, against fifty calls of podman.
pub(crate) fn many(work: &Work, count: usize) -> Outcome<Vec<Measure>> {
    let archive = keel_tests::image::busybox_archive_in(work.path());
    let keel = Keel::new(work, "many")?;
    keel.import(&archive)?;
    let names: Vec<String> = (0..MANY).map(|n| format!("many-{n}")).collect();
    for name in &names {
        keel.declare(name)?;
    }
    let podman = present("podman", engine("podman", work, &work.state("peers-many")?));
    if let Some(podman) = &podman {
        podman.load(&archive)?;
    }
    let mut measure = Measure::new("fifty", format!("{MANY} pods, cold"), "ms");
    for _ in 0..count {
        measure.sample("keel apply", ms(keel.apply(&keel.manifests)?));
        keel.reset()?;
        if let Some(podman) = &podman {
            let start = Instant::now();
            for name in &names {
                podman.start(name)?;
            }
            measure.sample("podman loop", ms(start.elapsed()));
            podman.remove(&names)?;
        }
    }
    Ok(vec![measure.aim(Aim::Ratio("podman loop", 0.1))])
}

fn ms(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
