//! What image commands and the daemon tell: progress layer by layer, data for scripts, what failed of several.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use keel_tests::image::{BUSYBOX, architecture};
use keel_tests::layout::{Layer, Layout, Packing};
use keel_tests::manifest::sleeper;
use keel_tests::registry::Registry;
use keel_tests::{Instance, eventually_or, is_ready};
use serde_json::{Value, json};

fn of(name: &str, image: &str) -> String {
    sleeper(name).replace(BUSYBOX, image)
}

/// The last event of a type, of a stream of them.
fn last(events: &str, kind: &str) -> Value {
    let mut values = events.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
    values.rfind(|event| event["type"] == kind).unwrap_or_else(|| panic!("no {kind} in {events}"))
}

#[test]
fn a_pull_in_json_has_each_layers_bytes_and_ends_with_data_and_result() {
    let registry = Registry::start();
    let (layout, digest) =
        Layout::of("two", &[Layer::busybox(Packing::Gzip), Layer::noise(Packing::Plain, "noise", 4 << 20)]);
    let image = registry.push_layout(&layout, "two", "app/two:1");
    let instance = Instance::new();
    let events = instance.keel(&["image", "pull", &image, "-o", "json"]).expect_code(0).stdout;
    let progress = last(&events, "progress");
    assert_eq!((&progress["image"], &progress["layersDone"]), (&json!(image), &json!(2)), "{progress}");
    let layers = progress["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for layer in layers {
        assert_eq!((&layer["state"], &layer["doneBytes"]), (&json!("done"), &layer["totalBytes"]), "{layer}");
        assert!(layer["digest"].as_str().unwrap().starts_with("sha256:"), "{layer}");
    }
    assert_eq!(last(&events, "data")["value"]["digest"], digest.as_str());
    assert_eq!(last(&events, "result")["exitCode"], 0);
}

#[test]
fn one_file_that_fails_keeps_no_other_from_being_imported() {
    let instance = Instance::new();
    let at = |name: &str| instance.path().join(name).display().to_string();
    fs::write(at("junk.tar"), "no archive at all").unwrap();
    let good = keel_tests::image::busybox_archive_in(instance.path()).display().to_string();
    let ran = instance.keel(&["image", "import", &at("junk.tar"), &good]).expect_code(6);
    assert!(ran.stderr.contains("junk.tar") && ran.stderr.contains("1 of 2 imported"), "{}", ran.all());
    assert!(instance.keel(&["image", "ls", "-o", "name"]).stdout.contains("busybox"));
    let none = instance.keel(&["image", "import", &at("junk.tar"), &at("absent.tar")]).expect_code(2);
    assert!(none.stderr.contains("0 of 2 imported"), "{}", none.all());

    let data = instance.keel(&["image", "import", &good, "-o", "json"]).expect_code(0).stdout;
    let images = last(&data, "data")["value"].clone();
    assert!(images[0]["reference"].as_str().unwrap().contains("busybox"), "{images}");
    let removed = instance.keel(&["image", "rm", "example.com/absent:1", BUSYBOX]).expect_code(6);
    assert!(removed.stderr.contains("1 of 2 removed"), "{}", removed.all());
}

#[test]
fn saving_tells_how_far_it_is_in_words_and_in_json() {
    let instance = Instance::new();
    instance.import_busybox();
    let at = |name: &str| instance.path().join(name).display().to_string();
    for (format, file) in [("oci-archive", "a.tar"), ("oci-dir", "dir"), ("docker-archive", "d.tar")] {
        let save = ["image", "save", BUSYBOX, "--format", format, "-o", &at(file), "--progress", "json"];
        let events = instance.keel(&save).expect_code(0).stdout;
        let progress = last(&events, "progress");
        assert!(progress["totalBytes"].as_u64() > Some(100_000), "{progress}");
        assert_eq!(progress["doneBytes"], progress["totalBytes"], "{format}");
        assert_eq!(last(&events, "data")["value"]["path"], at(file).as_str());
    }
    let ran = instance.keel(&["image", "save", BUSYBOX, "-o", &at("b.tar")]).expect_code(0);
    assert!(ran.stderr.contains("saving ") && ran.stderr.contains("100%"), "{}", ran.all());
    instance.keel(&["image", "save", BUSYBOX, "-o", "-", "--progress", "json"]).expect_code(2);
}

#[test]
fn every_image_command_has_data_for_scripts() {
    let registry = Registry::start();
    let (layout, _) = Layout::of("b", &[Layer::busybox(Packing::Gzip)]);
    let image = registry.push_layout(&layout, "b", "app/b:1");
    let instance = Instance::new();
    let target = format!("{}/app/c:1", registry.address);
    for (command, streams) in [
        (vec!["pull", &image], true),
        (vec!["tag", &image, &target], true),
        (vec!["push", &target], true),
        (vec!["ls"], false),
        (vec!["inspect", &image], false),
        (vec!["history", &image], false),
        (vec!["du"], false),
        (vec!["verify"], false),
        (vec!["referrers", &image], false),
        (vec!["rm", &target], true),
        (vec!["prune"], true),
    ] {
        let ran = instance.keel(&[&["image"][..], &command, &["-o", "json"]].concat()).expect_code(0);
        match streams {
            true => assert_eq!(last(&ran.stdout, "result")["exitCode"], 0, "{command:?}"),
            false => assert!(!ran.json().is_null(), "{command:?}"),
        }
    }
}

#[test]
fn what_refers_to_an_image_is_listed_from_its_registry() {
    let registry = Registry::start();
    let mut layout = Layout::new();
    let subject = layout.image(Some("b"), architecture(), &[Layer::busybox(Packing::Gzip)]);
    let image = registry.push_layout(&layout, "b", "app/b:1");
    let instance = Instance::new();
    assert_eq!(instance.keel(&["image", "referrers", &image]).expect_code(0).stdout.lines().count(), 1);
    let about = layout.about("sig", &subject, "application/vnd.example.sig");
    let signature = format!("{}/app/b:sig", registry.address);
    instance.keel(&["image", "import", layout.path().to_str().unwrap()]).expect_code(0);
    instance.keel(&["image", "push", "sig", &signature]).expect_code(0);
    let found = instance.keel(&["image", "referrers", &image, "-o", "json"]).expect_code(0).json();
    assert_eq!(found["subject"], subject.as_str());
    assert_eq!(found["referrers"][0]["digest"], about.as_str(), "{found}");
    let text = instance.keel(&["image", "referrers", &image]).expect_code(0).stdout;
    assert!(text.contains(&about) && text.contains("application/vnd.example.sig"), "{text}");
    let other = instance.keel(&["image", "referrers", &image, "--type", "x/y"]).expect_code(0).stdout;
    assert!(!other.contains(&about), "{other}");
    let absent = format!("{}/app/absent:1", registry.address);
    instance.keel(&["image", "referrers", &absent]).expect_code(4);
    instance.keel(&["image", "pull", &absent]).expect_code(4);
}

#[test]
fn an_endless_manifest_costs_a_pull_no_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("{}/app/x:1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        while let Ok((mut connection, _)) = listener.accept() {
            let mut request = [0; 4096];
            // The first bytes of a TLS hello are no request.
            if matches!(connection.read(&mut request), Ok(n) if n > 0 && request[0] == b'G') {
                let _ = connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2147483648\r\n\r\n");
                while connection.write_all(&[b' '; 64 << 10]).is_ok() {}
            }
        }
    });
    let instance = Instance::new();
    let keel = instance.command(&["image", "pull", &image]);
    let arguments = keel.get_args().map(|a| a.to_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ");
    let program = keel.get_program().to_str().unwrap().to_owned();
    // Half a gigabyte of addresses is a quarter of what it would have to hold.
    let limited = format!("ulimit -v 524288; exec {program} {arguments}");
    let output = std::process::Command::new("sh").args(["-c", &limited]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("larger than the limit of 4194304 bytes"), "{said}");
}

/// Passes connections on, and what comes back only so fast.
struct Slow {
    address: String,
    /// Bytes that came back so far.
    passed: Arc<AtomicU64>,
}

impl Slow {
    fn before(registry: &Registry, bytes_per_second: usize) -> Slow {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let to = registry.address.clone();
        let passed: Arc<AtomicU64> = Arc::default();
        let count = passed.clone();
        // The threads end with their connections, and those with the registry and the client.
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let Ok(far) = TcpStream::connect(&to) else { return };
                let (near_reads, far_writes) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let count = count.clone();
                std::thread::spawn(move || pass(near_reads, far_writes, usize::MAX, &AtomicU64::new(0)));
                std::thread::spawn(move || pass(far, near, bytes_per_second, &count));
            }
        });
        Slow { address, passed }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, bytes_per_second: usize, count: &AtomicU64) {
    const STEPS: usize = 20;
    let mut buffer = vec![0; (bytes_per_second / STEPS).clamp(1, 64 << 10)];
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 || to.write_all(&buffer[..n]).is_err() {
            break;
        }
        count.fetch_add(n as u64, Ordering::Relaxed);
        if bytes_per_second != usize::MAX {
            std::thread::sleep(Duration::from_millis(1000 / STEPS as u64));
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[test]
fn a_slow_pull_is_told_layer_by_layer_in_status_and_events() {
    let registry = Registry::start();
    let (layout, _) = Layout::of(
        "slow",
        &[Layer::noise(Packing::Plain, "one", 4 << 20), Layer::noise(Packing::Plain, "two", 5 << 20)],
    );
    registry.push_layout(&layout, "slow", "app/slow:1");
    let slow = Slow::before(&registry, 400 << 10);
    let mut instance = Instance::new();
    instance.start_daemon();
    let manifest = instance.path().join("web.yaml");
    fs::write(&manifest, of("web", &format!("{}/app/slow:1", slow.address))).unwrap();
    // Through the daemon, whose events the command passes on.
    let mut apply = instance.command(&["apply", "-o", "json", "-f", manifest.to_str().unwrap()]);
    let mut apply = Ended(apply.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let pull = eventually_or(
        || instance.keel(&["get", "pod/web", "-o", "yaml"]).all(),
        || {
            let pull = instance.pod("web")["status"]["pull"][0].clone();
            let layers = pull["layers"].as_array()?;
            (layers.len() == 2 && layers.iter().all(|layer| layer["secondsLeft"].is_u64())).then_some(pull)
        },
    );
    assert!(pull["bytesPerSecond"].as_u64() > Some(10_000), "{pull}");
    let layer = &pull["layers"][1];
    assert_eq!(
        (&layer["state"], &layer["totalBytes"].as_u64().map(|n| n >> 20)),
        (&json!("fetching"), &Some(5))
    );
    assert!(layer["doneBytes"].as_u64() > Some(0) && layer["bytesPerSecond"].is_u64(), "{layer}");
    let yaml = instance.keel(&["get", "pod/web", "-o", "yaml"]).expect_code(0).stdout;
    assert!(yaml.contains("secondsLeft:"), "{yaml}");
    let events = eventually_or(
        || instance.keel(&["events"]).all(),
        || Some(instance.keel(&["events"]).all()).filter(|events| events.contains("s left; layer ")),
    );
    assert!(events.contains("bytes/s"), "{events}");
    let said = BufReader::new(apply.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let told = said.map(|line| serde_json::from_str::<Value>(&line).unwrap());
    let has_speed = |event: &Value| event["layers"][1]["secondsLeft"].is_u64();
    assert!(told.take(1000).any(|event| event["type"] == "progress" && has_speed(&event)));
}

/// A command that is not waited for.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pull_of_all_platforms_that_is_killed_goes_on_where_it_was() {
    const SIZE: usize = 4 << 20;
    let registry = Registry::start();
    let mut layout = Layout::new();
    let own = layout.image(None, architecture(), &[Layer::busybox(Packing::Gzip)]);
    let other = if architecture() == "arm64" { "amd64" } else { "arm64" };
    let foreign = layout.image(None, other, &[Layer::noise(Packing::Plain, "noise", SIZE)]);
    let index = layout.index("multi", &[(architecture(), &own), (other, &foreign)]);
    registry.push_layout(&layout, "multi", "app/multi:1");
    let slow = Slow::before(&registry, 2 << 20);
    let image = format!("{}/app/multi:1", slow.address);
    let instance = Instance::new();
    let arrived = || {
        let partial = fs::read_dir(instance.root().join("partial")).into_iter().flatten().flatten();
        partial.filter_map(|dir| fs::metadata(dir.path().join("data")).ok()).map(|m| m.len()).max()
    };
    for step in 1..=3 {
        let mut pull = instance.command(&["image", "pull", "-a", &image]);
        let pull = Ended(pull.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let enough = step * (SIZE as u64) / 5;
        eventually_or(|| format!("{:?} bytes", arrived()), || (arrived() > Some(enough)).then_some(()));
        drop(pull);
        assert_eq!(
            instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout,
            "",
            "half is nothing"
        );
    }
    instance.keel(&["image", "pull", "-a", &image]).expect_code(0);
    let seen = instance.keel(&["image", "inspect", &image]).expect_code(0).json();
    assert_eq!(seen["index"]["digest"], index.as_str());
    instance.keel(&["image", "verify"]).expect_code(0);
    let passed = slow.passed.load(Ordering::Relaxed);
    assert!(passed < 2 * SIZE as u64, "{passed} bytes for {SIZE}: what was there came again");
}

#[test]
fn pulls_that_hang_keep_no_other_waiting_and_are_few_per_registry() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let address = silent.local_addr().unwrap();
    let registry = Registry::start();
    let (layout, _) = Layout::of("b", &[Layer::busybox(Packing::Gzip)]);
    let image = registry.push_layout(&layout, "b", "app/b:1");
    let mut instance = Instance::new();
    for n in 0..6 {
        // Before the good one in every order.
        instance.write(&format!("a{n}.yaml"), &of(&format!("a{n}"), &format!("{address}/app/a{n}:1")));
    }
    instance.write("web.yaml", &of("web", &image));
    instance.start_daemon();
    eventually_or(|| instance.keel(&["get"]).all(), || Some(instance.pod("web")).filter(is_ready));
    let mut held = Vec::new();
    let first = |connection: &mut TcpStream| {
        connection.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        let mut byte = [0; 1];
        connection.read(&mut byte).unwrap()
    };
    eventually_or(
        || instance.keel(&["get"]).all(),
        || {
            if let Ok((mut connection, _)) = silent.accept() {
                assert_eq!(first(&mut connection), 1);
                held.push(connection);
            }
            (held.len() == 3).then_some(())
        },
    );
    assert!(silent.accept().is_err(), "a fourth pull from one registry waits for its turn");
    // One that ends gives its place to the next.
    held.pop();
    eventually_or(|| "no other pull begins".to_owned(), || silent.accept().ok());
}

#[test]
fn never_means_never_and_says_what_to_do() {
    let registry = Registry::start();
    let (layout, _) = Layout::of("b", &[Layer::busybox(Packing::Gzip)]);
    let image = registry.push_layout(&layout, "b", "app/b:1");
    let before = registry.requests(&["/v2/app/b/"]);
    let mut instance = Instance::new();
    let pod = of("web", &image).replace("    command", "    imagePullPolicy: Never\n    command");
    instance.write("web.yaml", &pod);
    instance.start_daemon();
    let waits = |word: &str| {
        eventually_or(
            || format!("{:#}", instance.pod("web")["status"]),
            || instance.pod("web")["status"].to_string().contains(word).then_some(()),
        );
    };
    waits("ErrImageNeverPull");
    assert_eq!(registry.requests(&["/v2/app/b/"]), before);
    instance.keel(&["image", "pull", &image]).expect_code(0);
    eventually_or(|| instance.keel(&["get"]).all(), || Some(instance.pod("web")).filter(is_ready));
}
