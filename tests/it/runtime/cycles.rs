//! Containers again and again, with the runtime killed at moments that nobody chose.

use super::*;

/// Cycles of one run; `KEEL_CYCLES=1000` for the long one.
const CYCLES: u64 = 40;

/// A small generator: a failing run is repeated with the seed that it prints.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect(name))
}

/// Processes whose command line has the word: the container's, and the runtime's own for this bundle.
fn processes_with(word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = text(&line).replace('\0', " ");
        if line.contains(word) && entry.file_name() != std::process::id().to_string().as_str() {
            found.push(format!("{}: {line}", entry.file_name().display()));
        }
    }
    found
}

#[test]
fn a_runtime_killed_at_any_moment_leaves_nothing_that_delete_does_not_remove() {
    require!(ours);
    let cycles = number("KEEL_CYCLES").unwrap_or(CYCLES);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("KEEL_SEED").unwrap_or(now.as_nanos() as u64 | 1);
    let mut dice = Dice(seed);
    let mut case = in_cgroup(Case::new("true"));
    // Found in the command line of every process that may be left.
    case.config["process"]["args"] = json!(["/bin/sh", "-c", format!("sleep 1000; : {}", case.bundle())]);
    let bundle = case.bundle();
    let pinned = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = pinned();
    let mut killed = 0;
    for cycle in 0..cycles {
        let lines: [&[&str]; 4] = [
            &["create", "--bundle", &bundle, &case.id],
            &["start", &case.id],
            &["kill", &case.id, "KILL"],
            &["delete", &case.id],
        ];
        for args in lines {
            let mut child = case.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            if dice.roll(4) == 0 {
                let moment = Instant::now() + Duration::from_micros(dice.roll(12_000));
                while Instant::now() < moment && child.try_wait().unwrap().is_none() {
                    std::hint::spin_loop();
                }
                killed += u64::from(child.try_wait().unwrap().is_none());
                let _ = child.kill();
            }
            child.wait().unwrap();
        }
        let output = case.call(&["delete", "--force", &case.id]);
        let at = format!("cycle {cycle}, KEEL_SEED={seed}");
        assert!(output.status.success(), "{at}: {}", text(&output.stderr));
        wait_for(&at, || processes_with(&bundle).is_empty());
        assert!(!case.path("state").join(&case.id).exists(), "{at}: state is left");
        let left: Vec<_> = case.cgroup_dirs().into_iter().filter(|d| d.exists()).collect();
        assert!(left.is_empty(), "{at}: {left:?}");
    }
    eprintln!("{cycles} cycles, {killed} commands killed, KEEL_SEED={seed}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&bundle), "KEEL_SEED={seed}: {mounts}");
    assert_eq!(fs::read_dir(case.path("state")).unwrap().count(), 0, "KEEL_SEED={seed}");
    let names: Vec<_> = fs::read_dir(case.dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(names.iter().all(|n| ["rootfs", "state", "config.json"].iter().any(|k| n == k)), "{names:?}");
    assert!(pinned() <= before + 8, "descriptors are left");
}
