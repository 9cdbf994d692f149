//! Bad input, bad registries, a full disk and damaged state: each is said with its place and what helps, and the rest
//! goes on.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keel_tests::image::{BUSYBOX, architecture};
use keel_tests::layout::{Layer, Layout, Packing};
use keel_tests::manifest::{pod, sleeper};
use keel_tests::registry::Registry;
use keel_tests::{Instance, eventually, eventually_or, is_alive, is_ready};
use serde_json::Value;

fn of(name: &str, image: &str) -> String {
    sleeper(name).replace(BUSYBOX, image)
}

/// Entities that name each other: some hundred bytes that would become gigabytes.
fn bomb() -> String {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for n in 1..12 {
        let all = vec![format!("*a{}", n - 1); 10].join(", ");
        text.push_str(&format!("a{n}: &a{n} [{all}]\n"));
    }
    text
}

/// Files that nobody can use, each with a word that the message about it must hold.
fn spoil(dir: &Path) -> Vec<(&'static str, &'static str)> {
    fs::create_dir(dir.join("folder.yaml")).unwrap();
    symlink("/nonexistent/x.yaml", dir.join("dangling.yaml")).unwrap();
    nix::unistd::mkfifo(&dir.join("pipe.yaml"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::write(dir.join("bomb.yaml"), bomb()).unwrap();
    fs::File::create(dir.join("big.yaml")).unwrap().set_len(50 << 20).unwrap();
    fs::write(dir.join("latin1.yaml"), b"apiVersion: v1\nkind: Pod\nmetadata: {name: caf\xe9}\n").unwrap();
    fs::write(dir.join("dots.yaml"), sleeper("../../etc")).unwrap();
    fs::write(dir.join("binary.yaml"), [0u8, 1, 2, 0, 255]).unwrap();
    fs::write(dir.join("deep.yaml"), "[".repeat(200_000)).unwrap();
    vec![
        ("dangling.yaml", ""),
        ("pipe.yaml", "regular"),
        ("bomb.yaml", ""),
        ("big.yaml", "1 MiB"),
        ("latin1.yaml", "UTF-8"),
        ("dots.yaml", "metadata.name"),
        ("binary.yaml", ""),
        ("deep.yaml", ""),
    ]
}

#[test]
fn files_that_cannot_be_used_are_named_and_the_good_one_beside_them_runs() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let dir = instance.manifests();
    let bad = spoil(&dir);
    instance.write("good.yaml", &sleeper("good"));
    instance.start_daemon();
    instance.await_ready("good");
    for (file, word) in bad {
        eventually_or(
            || format!("the status names {file} and {word:?}:\n{}", instance.keel(&["status"]).all()),
            || {
                let text = instance.keel(&["status"]).all();
                text.lines().any(|line| line.contains(file) && line.contains(word)).then_some(())
            },
        );
    }
    let rss = fs::read_to_string(format!("/proc/{}/status", instance.daemon_pid())).unwrap();
    let peak = rss.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
    let kb: u64 = peak.trim_end_matches(" kB").parse().unwrap();
    assert!(kb < 200_000, "no file costs more memory than it has bytes: {peak}");
    assert_eq!(instance.pids().len(), 1);
}

#[test]
fn check_and_apply_say_all_of_it_at_once_and_wait_for_no_pipe() {
    let instance = Instance::new();
    let dir = instance.manifests();
    let bad = spoil(&dir);
    instance.write("good.yaml", &sleeper("good"));
    for command in ["check", "apply"] {
        let child = instance
            .command(&[command, "-f", dir.to_str().unwrap()])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let waiting = std::thread::spawn(move || child.wait_with_output().unwrap());
        eventually(&format!("{command} ends"), || (!is_alive(pid)).then_some(()));
        let output = waiting.join().unwrap();
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(2), "{text}");
        for (file, word) in &bad {
            assert!(text.contains(file) && text.contains(word), "{command}: {file} and {word:?} in:\n{text}");
        }
        assert!(text.contains("help:") || text.contains("hint:"), "{text}");
    }
    assert!(instance.pids().is_empty());
    let missing = instance.keel(&["apply", "-f", "/nonexistent/dir"]).expect_code(2);
    assert!(missing.stderr.contains("/nonexistent/dir"), "{}", missing.all());
}

#[test]
fn an_unknown_image_and_a_registry_that_is_down_hold_up_nobody_else() {
    let registry = Registry::start();
    let mut instance = Instance::new();
    instance.import_busybox();
    let absent = format!("{}/no/such:1", registry.address);
    let down = "127.0.0.1:1/x/y:1";
    let odd = "Not A Reference";
    instance.write("absent.yaml", &of("absent", &absent));
    instance.write("down.yaml", &of("down", down));
    instance.write("odd.yaml", &of("odd", &format!("'{odd}'")));
    instance.write("good.yaml", &sleeper("good"));
    instance.start_daemon();
    instance.await_ready("good");
    for (name, image) in [("absent", absent.as_str()), ("down", down)] {
        eventually_or(
            || format!("pod {name} waits: {:#}\n{}", instance.pod(name)["status"], instance.daemon_log()),
            || {
                let text = instance.pod(name)["status"].to_string();
                (text.contains("ImagePull") && text.contains(image)).then_some(())
            },
        );
    }
    assert!(instance.keel(&["status"]).all().contains("odd.yaml"), "{}", instance.keel(&["status"]).all());
    for words in ["hint: check the spelling", "hint: check that the registry runs"] {
        eventually_or(
            || format!("the events say {words}: {}", instance.keel(&["events"]).all()),
            || instance.keel(&["events"]).all().contains(words).then_some(()),
        );
    }
}

#[test]
fn content_that_is_not_what_its_digest_says_never_runs() {
    let registry = Registry::start();
    let (layout, digest) = Layout::of(
        "x",
        &[Layer::busybox(Packing::Gzip), Layer::files(Packing::Plain, &[("evil.txt", "good content here")])],
    );
    let image = registry.push_layout(&layout, "x", "app/x:1");
    let manifest: Value = serde_json::from_slice(&fs::read(registry.blob(&digest)).unwrap()).unwrap();
    let blob = registry.blob(manifest["layers"][1]["digest"].as_str().unwrap());
    let genuine = fs::read(&blob).unwrap();
    let text = String::from_utf8_lossy(&genuine).into_owned();
    let at = text.find("good content").unwrap();
    let mut changed = genuine.clone();
    changed[at..at + 4].copy_from_slice(b"evil");
    fs::write(&blob, &changed).unwrap();
    let instance = Instance::new();
    instance.import_busybox();
    let both = format!("{}---\n{}", of("bad", &image), sleeper("good"));
    let ran = instance.keel_with_input(&["apply", "-f", "-"], &both).expect_code(6);
    assert!(ran.all().contains("as announced") && ran.stderr.contains("hint:"), "{}", ran.all());
    assert!(is_ready(&instance.pod("good")));
    assert_eq!(instance.pids().len(), 1);
    fs::write(&blob, &genuine[..genuine.len() - 512]).unwrap();
    let short = instance.keel(&["image", "pull", &image]).expect_code(1);
    assert!(short.stderr.contains("hint:"), "{}", short.all());
    fs::write(&blob, &genuine).unwrap();
    instance.apply(&of("bad", &image)).expect_code(0);
    let read = instance.keel(&["exec", "bad", "--", "cat", "/evil.txt"]).expect_code(0);
    assert_eq!(read.stdout, "good content here");
}

/// A small disk.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, size: &str) -> Disk {
        let options = format!("size={size}");
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), none, Some(options.as_str())).unwrap();
        Disk(at.to_path_buf())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        // The directory of the instance could not go with a mount inside it.
        let _ = fs::remove_dir_all(self.0.parent().unwrap());
    }
}

/// In the order in which they are dropped.
struct SmallHost {
    instance: Instance,
    _disk: Disk,
}

impl SmallHost {
    fn new(size: &str) -> SmallHost {
        let instance = Instance::new();
        let disk = Disk::mount(&instance.root(), size);
        SmallHost { instance, _disk: disk }
    }
}

#[test]
fn a_full_disk_fails_one_pull_leaves_no_half_and_everything_else_goes_on() {
    let registry = Registry::start();
    let mut layout = Layout::new();
    let base = Layer::busybox(Packing::Gzip);
    layout.image(Some("small"), architecture(), std::slice::from_ref(&base));
    layout.image(Some("big"), architecture(), &[base, Layer::noise(Packing::Gzip, "noise", 48 << 20)]);
    let small = registry.push_layout(&layout, "small", "app/small:1");
    let big = registry.push_layout(&layout, "big", "app/big:1");
    let small_host = SmallHost::new("32m");
    let instance = &small_host.instance;
    let both = format!("{}---\n{}", of("big", &big), of("small", &small));
    let ran = instance.keel_with_input(&["apply", "-f", "-"], &both).expect_code(6);
    assert!(ran.all().contains("space") || ran.all().contains("full"), "{}", ran.all());
    assert!(ran.stderr.contains("hint:") && ran.stderr.contains("image"), "{}", ran.all());
    assert!(is_ready(&instance.pod("small")), "{}", ran.all());
    let partial = fs::read_dir(instance.root().join("partial")).map_or(0, Iterator::count);
    assert_eq!(partial, 0, "what did not fit is removed again");
    let listed = instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout;
    assert_eq!(listed.trim(), small, "no half image");
    instance.apply(&of("more", &small)).expect_code(0);
}

#[test]
fn a_second_daemon_on_one_state_directory_is_told_what_to_do() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("web.yaml", &sleeper("web"));
    let pid = instance.start_daemon();
    instance.await_ready("web");
    let manifests = instance.manifests();
    let ran = instance.keel(&["daemon", "--manifests", manifests.to_str().unwrap()]).expect_code(5);
    assert!(ran.stderr.contains(&pid.to_string()) && ran.stderr.contains("hint:"), "{}", ran.all());
    // Another run directory does not make it another instance: the state is the same.
    let elsewhere = instance.path().join("other-run");
    let root = instance.root();
    let mut second = std::process::Command::new(keel_tests::bin("keel"));
    second.args(["--root", root.to_str().unwrap(), "--run", elsewhere.to_str().unwrap()]);
    second.args(["apply", "-f", manifests.to_str().unwrap()]);
    let output = second.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{text}");
    assert!(text.contains("hint:"), "{text}");
    assert!(is_ready(&instance.pod("web")));
}

/// Files below `dir`, at most `depth` directories down, that `wanted` accepts.
fn find(dir: &Path, depth: usize, wanted: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => found.extend(find(&path, depth - 1, wanted)),
            Ok(kind) if kind.is_file() && wanted(&path) => found.push(path),
            _ => {}
        }
    }
    found
}

/// Damages every such file in one way, and sees the daemon start, say so and make everything right.
fn survives(instance: &mut Instance, what: &str, files: &dyn Fn(&Instance) -> Vec<PathBuf>, said: &str) {
    for way in ["truncated", "garbage", "empty"] {
        instance.kill_daemon();
        let files = files(instance);
        assert!(!files.is_empty() || way != "truncated", "{what} {way}: there is such a file");
        for file in &files {
            let text = fs::read(file).unwrap();
            let bad = match way {
                "truncated" => text[..text.len() / 2].to_vec(),
                "garbage" => vec![0xff; text.len().max(8)],
                _ => Vec::new(),
            };
            fs::write(file, bad).unwrap();
        }
        let before = instance.daemon_log().len();
        instance.start_daemon();
        instance.keel(&["reconcile"]).expect_code(0);
        let log = |instance: &Instance| instance.daemon_log()[before..].to_string();
        for name in ["web", "hand"] {
            eventually_or(
                || format!("{what} {way}: pod {name} is ready\n{}", log(instance)),
                || Some(instance.pod(name)).filter(is_ready),
            );
        }
        let words = log(instance);
        assert!(files.is_empty() || words.contains(said), "{what} {way}: the log names {said}:\n{words}");
        let runs = instance.pids();
        assert_eq!(runs.len(), 2, "{what} {way}: one process for each container: {runs:?}");
        let damaged = |file: &&PathBuf| match fs::read(file) {
            // Gone until there is something to write.
            Err(_) => false,
            Ok(text) => {
                file.extension().is_some_and(|end| end == "json")
                    && serde_json::from_slice::<Value>(&text).is_err()
            }
        };
        let left: Vec<&PathBuf> = files.iter().filter(damaged).collect();
        // Layers are verified once a boot.
        assert!(
            left.is_empty() || ["exits", "layers"].contains(&what),
            "{what} {way}: nothing damaged stays in place: {left:?}"
        );
    }
}

fn settled(registry: &Registry) -> Instance {
    let (layout, _) = Layout::of("x", &[Layer::busybox(Packing::Gzip)]);
    let image = registry.push_layout(&layout, "x", "app/x:1");
    let mut instance = Instance::new();
    instance.write("web.yaml", &of("web", &image));
    instance.write(
        "once.yaml",
        &pod("once", "    command: ['true']\n  restartPolicy: Never\n").replace(BUSYBOX, &image),
    );
    instance.apply(&of("hand", &image)).expect_code(0);
    instance.start_daemon();
    instance.await_ready("web");
    eventually("the short one has ended", || {
        (instance.pod("once")["status"]["phase"] == "Succeeded").then_some(())
    });
    instance
}

fn named(name: &'static str) -> impl Fn(&Path) -> bool {
    move |path| path.file_name().is_some_and(|found| found == name)
}

#[test]
fn damaged_records_of_this_boot_are_rebuilt() {
    let registry = Registry::start();
    let mut instance = settled(&registry);
    let run = instance.run_dir();
    for name in ["pod.json", "container.json", "network.json"] {
        let files = |_: &Instance| find(&run, 2, &named(name));
        survives(&mut instance, name, &files, name.strip_suffix(".json").unwrap());
    }
}

#[test]
fn damaged_state_that_outlives_a_boot_is_rebuilt() {
    let registry = Registry::start();
    let mut instance = settled(&registry);
    let root = instance.root();
    let json = |path: &Path| path.extension().is_some_and(|end| end == "json");
    let memory = |instance: &Instance| {
        let mut files = find(&root.join("pods"), 1, &named("memory.json"));
        files.extend(find(&instance.run_dir().join("memory"), 0, &json));
        files
    };
    survives(&mut instance, "memory", &memory, "memory");
    let exits = |_: &Instance| find(&root.join("exits"), 0, &json);
    survives(&mut instance, "exits", &exits, "exit record");
    let images = |instance: &Instance| {
        let image = format!("{}/app/x:1", registry.address);
        instance.keel(&["image", "pull", &image]).expect_code(0);
        find(&root.join("images"), 1, &json)
    };
    survives(&mut instance, "images", &images, "images");
    let layers = |_: &Instance| find(&root.join("layers"), 1, &named("layer.json"));
    survives(&mut instance, "layers", &layers, "");
    let index = |_: &Instance| vec![root.join("index.json"), root.join("oci-layout")];
    survives(&mut instance, "index", &index, "");
    let sources = |_: &Instance| find(&root.join("sources"), 0, &|_| true);
    survives(&mut instance, "sources", &sources, "");
}

#[test]
fn a_damaged_applied_object_is_left_running_until_it_is_applied_again_or_deleted() {
    let registry = Registry::start();
    let mut instance = settled(&registry);
    let image = format!("{}/app/x:1", registry.address);
    let deployment = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: dep}}\nspec:\n  selector: {{matchLabels: {{a: b}}}}\n  strategy: {{type: Recreate}}\n  template:\n    metadata: {{labels: {{a: b}}}}\n    spec:\n      containers: [{{name: main, image: '{image}', command: [sleep, '100000']}}]\n"
    );
    instance.apply(&deployment).expect_code(0);
    let applied = instance.root().join("applied");
    let files = find(&applied, 0, &|path| path.extension().is_some_and(|end| end == "json"));
    assert_eq!(files.len(), 2, "{files:?}");
    let pids = instance.pids();
    for round in ["at once", "and after another start"] {
        instance.kill_daemon();
        for file in files.iter().filter(|file| file.exists()) {
            fs::write(file, "{\"version\":").unwrap();
        }
        instance.start_daemon();
        instance.keel(&["reconcile"]).expect_code(0);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(instance.pids(), pids, "{round}: {}", instance.daemon_log());
        let status = instance.keel(&["status"]).all();
        assert!(status.contains("hand") && status.contains("damaged"), "{status}");
    }
    instance.apply(&of("hand", &image)).expect_code(0);
    assert_eq!(instance.pids(), pids, "applied again it is the same");
    instance.keel(&["delete", "deployment/dep"]).expect_code(0);
    eventually("it can be deleted", || (instance.pids().len() == 2).then_some(()));
    assert!(!instance.keel(&["status"]).all().contains("damaged"));
}
