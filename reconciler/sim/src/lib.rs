//! A model world, a fault menu and checkers around the same core that the daemon runs. Development only.
//!
//! Never: a clock, a thread, a system call, a random number that does not come from the seed.

mod checks;
#[cfg(test)]
mod exhaustive;
mod host;
mod manifests;
mod rng;
mod run;
mod world;

pub use host::SimHost;
pub use run::{Outcome, run};
pub use world::World;

#[cfg(test)]
mod tests {
    use super::*;

    /// Replays one seed with its trace: `KEEL_SIM_SEED=7 cargo test -p keel-sim one_seed -- --nocapture`.
    #[test]
    fn one_seed() {
        let Ok(seed) = std::env::var("KEEL_SIM_SEED") else { return };
        match run(seed.parse().unwrap(), true) {
            Ok(outcome) => println!("{outcome:?}"),
            Err(message) => panic!("{message}"),
        }
    }

    /// Failing seeds that are told before the rest is only counted.
    const SHOWN: usize = 10;

    /// `KEEL_SIM_SEEDS` sets the number, `KEEL_SIM_FIRST` the first one.
    #[test]
    fn every_seed_converges_and_breaks_no_promise() {
        let number =
            |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
        let (first, count) = (number("KEEL_SIM_FIRST", 1), number("KEEL_SIM_SEEDS", 2_000));
        let workers = std::thread::available_parallelism().map_or(2, |n| n.get() as u64);
        let started = std::time::Instant::now();
        let outcomes: Vec<(u64, Result<Outcome, String>)> = std::thread::scope(|scope| {
            let job = |worker| {
                let seeds = (first..first + count).filter(move |seed| seed % workers == worker);
                scope.spawn(move || seeds.map(|seed| (seed, run(seed, false))).collect::<Vec<_>>())
            };
            let jobs: Vec<_> = (0..workers).map(job).collect();
            jobs.into_iter().flat_map(|job| job.join().unwrap()).collect()
        });
        let good = || outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok());
        let sum = |field: fn(&Outcome) -> u64| good().map(field).sum::<u64>();
        println!(
            "{count} seeds, {} steps, {} actions, {} deaths of the daemon in {:?}",
            sum(|o| o.steps),
            sum(|o| o.actions),
            sum(|o| o.crashes),
            started.elapsed()
        );
        let bad: Vec<_> = outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().err()).collect();
        for message in bad.iter().take(SHOWN) {
            eprintln!("{message}");
        }
        let replay = "KEEL_SIM_SEED=<seed> cargo test -p keel-sim one_seed -- --nocapture";
        assert!(bad.is_empty(), "{} of {count} seeds failed; replay one: {replay}", bad.len());
    }
}
