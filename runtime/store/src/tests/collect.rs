//! Garbage collection and what it must never take.

use super::{Bench, Tar, ingest, listing};
use crate::{Digest, Roots};

fn layer(name: &str) -> Vec<u8> {
    Tar::default().dir("./", 0o755).file(name, name).end()
}

fn roots(references: &[&str]) -> Roots {
    Roots { references: references.iter().map(|r| (*r).to_owned()).collect(), ..Roots::default() }
}

#[test]
fn declared_pinned_leased_running_and_mounted_images_stay() {
    let bench = Bench::new();
    let store = &bench.store;
    let declared = bench.image("declared", &[layer("base"), layer("declared")]);
    let dropped = bench.image("dropped", &[layer("base"), layer("dropped")]);
    let pinned = bench.image("pinned", &[layer("pinned")]);
    let running = bench.image("running", &[layer("running")]);
    bench.image("running", &[layer("newer")]);
    assert!(store.pin_image("pinned", true).unwrap());
    let leased = layer("leased");
    ingest(store, &leased, &Digest::of(&leased)).unwrap();
    store.settle().unwrap();
    let lease = store.lease([Digest::of(&leased)]);

    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    store.mount_rootfs(&dropped, None, &target).unwrap();
    let mut keep = roots(&["declared"]);
    keep.manifests.insert(running.manifest_digest);
    let done = store.collect_garbage(&keep).unwrap();
    assert_eq!(done.images, ["docker.io/library/dropped:latest", "docker.io/library/running:latest"]);
    assert_eq!((done.layers, done.layers_in_use), (1, 1), "{done:?}");
    assert_eq!(listing(&target), "base: file 644 \"base\"\ndropped: file 644 \"dropped\"");
    for image in [&declared, &pinned, &running] {
        for layer in &image.layers {
            assert!(store.has_layer(&layer.diff_id) && store.has_blob(&layer.blob_digest));
        }
    }
    assert!(store.has_layer(&Digest::of(&leased)));

    store.unmount_rootfs(&target).unwrap();
    drop(lease);
    let done = store.collect_garbage(&keep).unwrap();
    assert_eq!((done.layers, done.layers_in_use), (2, 0));
    assert!(!store.has_layer(&Digest::of(&leased)) && !store.has_layer(&dropped.layers[1].diff_id));
    assert_eq!(store.collect_garbage(&keep).unwrap(), crate::Collected::default());

    store.remove_image("pinned").unwrap();
    assert!(!store.remove_image("pinned").unwrap());
    store.collect_garbage(&Roots::default()).unwrap();
    assert_eq!(listing(&store.inner.layers_dir()), "");
    assert_eq!(listing(&store.inner.blobs_dir()), "");
    assert!(store.images().unwrap().is_empty());
}

#[test]
fn usage_says_what_removal_frees() {
    let bench = Bench::new();
    bench.image("a", &[layer("base"), layer("a")]);
    bench.image("b", &[layer("base"), layer("bb")]);
    bench.store.tag_image("b", "c").unwrap().unwrap();
    let usage = bench.store.usage().unwrap();
    let lines: Vec<_> = usage.images.iter().map(|i| (i.unique_bytes, i.shared_bytes)).collect();
    assert_eq!(lines, [(1, 4), (0, 6), (0, 6)]);
    assert_eq!(usage.layers_bytes, 7);
    let freed = bench.store.drop_unpacked_blobs(&|| false).unwrap();
    assert_eq!(freed.blobs, 3);
    assert!(bench.store.usage().unwrap().blobs_bytes + freed.freed_bytes == usage.blobs_bytes);
    assert_eq!(bench.store.verify(crate::Depth::Full, false).unwrap().damage, []);
}

#[test]
fn damaged_records_are_set_aside_and_reported_missing() {
    let mut bench = Bench::new();
    bench.image("a", &[layer("a")]);
    let b = bench.image("b", &[layer("b")]);
    bench.image("c", &[layer("c")]);
    let records = bench.store.inner.images_dir();
    std::fs::write(bench.store.inner.record_path("docker.io/library/a:latest"), "{\"version\":").unwrap();
    std::fs::write(bench.store.inner.blob_path(&b.config_digest), "").unwrap();
    std::fs::write(bench.store.root().join("index.json"), "").unwrap();
    std::fs::write(bench.store.root().join("oci-layout"), "x").unwrap();
    bench.reopen();
    let left: Vec<_> = bench.store.images().unwrap().into_iter().map(|i| i.reference).collect();
    assert_eq!(left, ["docker.io/library/c:latest"]);
    assert!(bench.store.image("a").unwrap().is_none());
    assert_eq!(listing(&records).matches(".damaged").count(), 2);
    // Putting the image in again heals it.
    bench.image("b", &[layer("b")]);
    assert!(bench.store.image("b").unwrap().is_some());
}

#[test]
fn under_pressure_unreferenced_images_go_by_last_use_and_only_as_many_as_needed() {
    let bench = Bench::new();
    let store = &bench.store;
    let all = ["old", "used", "newer", "declared", "pinned"];
    let images: Vec<_> = all.iter().map(|name| bench.image(name, &[layer("base"), layer(name)])).collect();
    store.pin_image("pinned", true).unwrap();
    let running = bench.image("moved", &[layer("running")]).manifest_digest;
    bench.image("moved", &[layer("moved")]);
    for (age, name) in all.iter().enumerate() {
        let record = store.inner.record_path(&format!("docker.io/library/{name}:latest"));
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(1000 - age as u64);
        std::fs::File::open(record).unwrap().set_modified(then).unwrap();
    }
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    store.mount_rootfs(&images[1], None, &target).unwrap();
    store.unmount_rootfs(&target).unwrap();
    let mut keep = roots(&["declared"]);
    keep.manifests.insert(running);
    let gone = |looks: usize| {
        let left = std::cell::Cell::new(looks);
        let enough = || left.replace(left.get().saturating_sub(1)) == 0;
        let done = store.evict_images(&keep, &enough).unwrap();
        done.images.iter().map(|name| name.split(['/', ':']).nth(2).unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(gone(0), [""; 0]);
    assert_eq!(gone(1), ["old"]);
    assert!(!store.has_layer(&images[0].layers[1].diff_id) && store.has_layer(&images[0].layers[0].diff_id));
    assert_eq!(gone(usize::MAX), ["newer", "moved", "used"]);
    let left: Vec<String> = store.images().unwrap().into_iter().map(|image| image.reference).collect();
    assert_eq!(left, ["docker.io/library/declared:latest", "docker.io/library/pinned:latest"]);
    assert!(store.has_layer(&Digest::of(&layer("running"))), "what runs stays whatever its name means now");
    assert_eq!(store.verify(crate::Depth::Full, false).unwrap().lost_images, []);
}

#[test]
fn blobs_of_unpacked_layers_go_one_by_one_and_pinned_ones_last() {
    let bench = Bench::new();
    let first = bench.image("pinned", &[layer("p")]);
    bench.store.pin_image("pinned", true).unwrap();
    let second = bench.image("other", &[layer("o")]);
    let gone = |image: &crate::Image| !bench.store.has_blob(&image.layers[0].blob_digest);
    bench.store.drop_unpacked_blobs(&|| gone(&second)).unwrap();
    assert!(gone(&second) && !gone(&first));
    // A layer that is damaged needs its blob.
    std::fs::write(bench.store.inner.layer_dir(&first.layers[0].diff_id).join("layer.json"), "").unwrap();
    bench.store.drop_unpacked_blobs(&|| false).unwrap();
    assert!(!gone(&first));
}
