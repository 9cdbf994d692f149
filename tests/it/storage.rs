//! What the store does on its own: damage, and room on the disk.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use keel_tests::image::{BUSYBOX, run};
use keel_tests::layout::{Layer, Layout, Packing};
use keel_tests::manifest::sleeper;
use keel_tests::registry::Registry;
use keel_tests::{Instance, eventually_or};

fn of(name: &str, image: &str) -> String {
    sleeper(name).replace(BUSYBOX, image)
}

/// Busybox and one file of this text.
fn version(text: &str) -> Layout {
    Layout::of("v", &[Layer::busybox(Packing::Gzip), Layer::files(Packing::Gzip, &[("version", text)])]).0
}

/// The file `version` in the layer of an image that is in the store.
fn version_file(instance: &Instance, image: &str) -> PathBuf {
    let seen = instance.keel(&["image", "inspect", image, "-o", "json"]).expect_code(0).json();
    let diff_id = seen["layers"][1]["diff_id"].as_str().unwrap().replace("sha256:", "");
    instance.root().join("layers").join(diff_id).join("fs/version")
}

fn blobs_of(instance: &Instance, image: &str) -> Vec<PathBuf> {
    let seen = instance.keel(&["image", "inspect", image, "-o", "json"]).expect_code(0).json();
    let digests = seen["layers"].as_array().unwrap().iter().map(|layer| &layer["blob_digest"]);
    let path = |digest: &serde_json::Value| {
        instance.root().join("blobs/sha256").join(digest.as_str().unwrap().replace("sha256:", ""))
    };
    digests.map(path).collect()
}

fn config(instance: &Instance, text: &str) -> Vec<String> {
    let path = instance.path().join("config.yaml");
    fs::write(&path, text).unwrap();
    vec!["--config".into(), path.to_str().unwrap().into()]
}

/// The next process takes this boot for another one.
fn start_the_machine_again(instance: &Instance) {
    let _ = fs::remove_file(instance.root().join("verified"));
}

fn await_event(instance: &Instance, words: &[&str]) {
    eventually_or(
        || format!("an event with {words:?} among {}", instance.keel(&["events"]).all()),
        || {
            let events = instance.keel(&["events"]).all();
            events.lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(())
        },
    );
}

/// A small file system below an instance's root; goes with it.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn below(instance: &Instance, size_mib: u64) -> SmallDisk {
        let root = instance.root();
        let size = format!("size={size_mib}m");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&root));
        SmallDisk(root)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a failed test leaves containers on it, whose end comes with the instance.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Busybox and noise that no compression shortens.
fn large(name: &str, mib: usize) -> Layout {
    Layout::of("v", &[Layer::busybox(Packing::Gzip), Layer::noise(Packing::Plain, name, mib << 20)]).0
}

fn images(instance: &Instance) -> Vec<String> {
    let listed = instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout;
    listed.lines().map(str::to_owned).collect()
}

#[test]
fn under_disk_pressure_blobs_go_then_unreferenced_images_and_never_what_manifests_declare() {
    let registry = Registry::start();
    let idle = registry.push_layout(&large("idle", 20), "v", "app/idle:1");
    let scaled_down = registry.push_layout(&large("scaled", 10), "v", "app/scaled:1");
    let web = registry.push_layout(&version("web"), "v", "app/web:1");
    let instance = Instance::new();
    let options = config(&instance, "storage: {evict_above: 40, evict_to: 30}\n");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut instance = instance.with(&options);
    // Goes before the instance does, whose directory it is mounted in.
    let _disk = SmallDisk::below(&instance, 100);
    for image in [&idle, &scaled_down, &web] {
        instance.keel(&["image", "pull", image]).expect_code(0);
    }
    // No container of it: declared all the same.
    let zero = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: zero}}\nspec:\n  replicas: 0\n  \
         selector: {{matchLabels: {{app: zero}}}}\n  template:\n    metadata: {{labels: {{app: zero}}}}\n    \
         spec: {{containers: [{{name: c, image: {scaled_down}}}]}}\n"
    );
    instance.write("zero.yaml", &zero);
    instance.write("web.yaml", &of("web", &web));
    let blob = blobs_of(&instance, &scaled_down)[1].clone();
    assert!(blob.exists());
    instance.start_daemon();
    await_event(&instance, &["Evicted", "blobs of unpacked layers"]);
    await_event(&instance, &["Evicted", "1 unreferenced images", &idle]);
    instance.await_ready("web");
    assert!(!blob.exists());
    let left = images(&instance);
    assert!(left.contains(&web) && left.contains(&scaled_down) && !left.contains(&idle), "{left:?}");
    instance.keel(&["image", "verify"]).expect_code(0);
    // The same roots for a prune, with the daemon and without it.
    instance.keel(&["image", "prune"]).expect_code(0);
    instance.stop_daemon();
    instance.keel(&["image", "prune"]).expect_code(0);
    assert_eq!(images(&instance), left);
    instance.keel(&["delete", "pod/web"]);
}

#[test]
fn a_pull_that_finds_the_disk_full_makes_room_for_itself() {
    let registry = Registry::start();
    let idle = registry.push_layout(&large("idle", 20), "v", "app/idle:1");
    let wanted = registry.push_layout(&large("wanted", 20), "v", "app/wanted:1");
    let instance = Instance::new();
    let _disk = SmallDisk::below(&instance, 80);
    instance.keel(&["image", "pull", &idle]).expect_code(0);
    let ran = instance.apply(&of("web", &wanted)).expect_code(0);
    assert_eq!(instance.pids().len(), 1, "{}", ran.all());
    await_event(&instance, &["Evicted", "blobs of unpacked layers"]);
    instance.keel(&["delete", "pod/web"]).expect_code(0);
}

#[test]
fn damage_is_healed_from_the_registry_at_the_start_and_said() {
    let registry = Registry::start();
    let image = registry.push_layout(&version("one"), "v", "app/v:1");
    let mut instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    let file = version_file(&instance, &image);
    for blob in blobs_of(&instance, &image) {
        fs::remove_file(blob).unwrap();
    }
    fs::write(&file, "").unwrap();
    // The tag means something else by now; nobody asked for that.
    registry.push_layout(&version("two"), "v", "app/v:1");
    start_the_machine_again(&instance);
    instance.start_daemon();
    await_event(&instance, &[&format!("Image/{image}"), "Repaired", "pulled again"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "one");
    instance.write("web.yaml", &of("web", &image));
    instance.await_ready("web");
    assert_eq!(instance.keel(&["exec", "web", "--", "cat", "/version"]).expect_code(0).stdout, "one");
}

#[test]
fn what_cannot_be_healed_is_set_aside_with_the_reason_and_what_runs_runs_on() {
    let mut registry = Registry::start();
    let one = registry.push_layout(&version("one"), "v", "app/v:1");
    let two = registry.push_layout(&version("two"), "v", "app/v:2");
    let mut instance = Instance::new();
    instance.write("web.yaml", &of("web", &one));
    instance.start_daemon();
    instance.await_ready("web");
    let before = instance.pids();
    instance.keel(&["image", "pull", &two]).expect_code(0);
    let file = version_file(&instance, &two);
    for blob in blobs_of(&instance, &two) {
        fs::remove_file(blob).unwrap();
    }
    instance.kill_daemon();
    fs::write(&file, "").unwrap();
    registry.stop();
    start_the_machine_again(&instance);
    instance.start_daemon();
    await_event(&instance, &[&format!("Image/{two}"), "Damaged", "lengths", &registry.address]);
    instance.keel(&["image", "inspect", &two]).expect_code(4);
    instance.write("web.yaml", &of("web", &two));
    await_event(&instance, &["ErrImagePull"]);
    assert_eq!(instance.pids(), before, "the last good version runs on");
    let checked = instance.keel(&["image", "verify"]).expect_code(1);
    assert!(checked.stdout.contains(&format!("lost {two}")), "{}", checked.all());
    registry.resume();
    let healed = instance.keel(&["image", "verify", "--repair"]).expect_code(0);
    assert!(healed.stdout.contains(&format!("pulled again {two}")), "{}", healed.all());
    instance.keel(&["image", "verify", "-o", "json"]).expect_code(0);
}

/// What a container has run well from is noted: the digest of this image.
fn await_noted(instance: &Instance, image: &str) {
    let seen = instance.keel(&["image", "inspect", image, "-o", "json"]).expect_code(0).json();
    let digest = seen["digest"].as_str().unwrap_or_else(|| panic!("{seen:#}")).to_owned();
    eventually_or(
        || format!("{image} ({digest}) among what was noted"),
        || {
            // A look at the host is what notes it.
            instance.keel(&["reconcile"]);
            let notes = fs::read_dir(instance.root().join("good")).unwrap().flatten();
            notes
                .into_iter()
                .any(|note| fs::read_to_string(note.path()).is_ok_and(|text| text.contains(&digest)))
                .then_some(())
        },
    );
}

#[test]
fn after_a_power_cut_a_damaged_image_gives_way_to_the_last_good_one_until_it_is_whole() {
    let mut registry = Registry::start();
    let image = registry.push_layout(&version("one"), "v", "app/v:1");
    let mut instance = Instance::new();
    instance.write("web.yaml", &of("web", &image));
    instance.start_daemon();
    instance.await_ready("web");
    await_noted(&instance, &image);
    // The same tag, another image; then a collection that would take the first one, and a damage of the second one.
    registry.push_layout(&version("two"), "v", "app/v:1");
    instance.keel(&["image", "pull", &image]).expect_code(0);
    instance.keel(&["image", "prune"]).expect_code(0);
    let file = version_file(&instance, &image);
    for blob in blobs_of(&instance, &image) {
        fs::remove_file(blob).unwrap();
    }
    registry.stop();
    crate::crash::power_cut(&mut instance);
    fs::write(&file, "").unwrap();
    start_the_machine_again(&instance);
    instance.start_daemon();
    await_event(&instance, &["LastGoodImage", "container main of pod default/web", &image]);
    let version = || instance.keel(&["exec", "web", "--", "cat", "/version"]).stdout;
    instance.await_ready("web");
    assert_eq!(version(), "one");
    registry.resume();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    eventually_or(|| format!("the declared image, now {}", version()), || (version() == "two").then_some(()));
    // Who is not declared any more holds no image.
    fs::remove_file(instance.manifests().join("web.yaml")).unwrap();
    let notes = instance.root().join("good");
    eventually_or(
        || format!("no note is left: {}", instance.daemon_log()),
        || {
            instance.keel(&["reconcile", "--accept-removals"]);
            fs::read_dir(&notes).unwrap().next().is_none().then_some(())
        },
    );
}

#[test]
fn verification_heals_from_the_kept_blob_without_a_registry() {
    let registry = Registry::start();
    let image = registry.push_layout(&version("one"), "v", "app/v:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    drop(registry);
    let file = version_file(&instance, &image);
    fs::write(&file, "eno").unwrap();
    instance.keel(&["image", "verify", "--quick"]).expect_code(0);
    let found = instance.keel(&["image", "verify", "-o", "json"]).expect_code(1).json();
    assert_eq!(found["damage"][0]["repaired"], false, "{found:#}");
    let healed = instance.keel(&["image", "verify", "--repair"]).expect_code(0);
    assert!(healed.stdout.contains("repaired sha256:"), "{}", healed.all());
    assert_eq!(fs::read_to_string(&file).unwrap(), "one");
}

#[test]
fn a_lost_record_and_a_damaged_layer_json_do_not_keep_an_image_from_being_pulled() {
    let registry = Registry::start();
    let image = registry.push_layout(&version("one"), "v", "app/v:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    let file = version_file(&instance, &image);
    fs::write(file.parent().unwrap().with_file_name("layer.json"), "{").unwrap();
    for record in fs::read_dir(instance.root().join("images")).unwrap() {
        fs::remove_file(record.unwrap().path()).unwrap();
    }
    instance.keel(&["image", "pull", &image]).expect_code(0);
    instance.apply(&of("web", &image)).expect_code(0);
    assert_eq!(instance.keel(&["exec", "web", "--", "cat", "/version"]).expect_code(0).stdout, "one");
}
