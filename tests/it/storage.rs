//! What the store does on its own: damage, and room on the disk.

use std::fs;
use std::path::PathBuf;

use keel_tests::image::BUSYBOX;
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
