//! What a pull costs here: run by hand on an image layout, with the processor time that it took.

use super::Bench;
use crate::{Digest, ImportOptions, Store};
use std::path::Path;
use std::time::Instant;

/// `KEEL_STORE_IMPORT=layout KEEL_STORE_ROOT=dir cargo test --release -p keel-store speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement: needs an image layout of some size"]
fn import_a_layout() {
    let (Some(layout), Some(root)) =
        (std::env::var_os("KEEL_STORE_IMPORT"), std::env::var_os("KEEL_STORE_ROOT"))
    else {
        return;
    };
    let store = Store::open(Path::new(&root)).unwrap();
    let start = Instant::now();
    let images = store.import(Path::new(&layout), &ImportOptions::default(), &|_| {}).unwrap();
    println!("imported {} in {:.2} s", images[0].reference, start.elapsed().as_secs_f64());
    let start = Instant::now();
    let report = store.verify(crate::Depth::Quick, false).unwrap();
    println!(
        "verified {} layers in {:.3} s: {:?}",
        report.layers,
        start.elapsed().as_secs_f64(),
        report.damage
    );
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap());
}

#[test]
fn one_sync_makes_many_layers_durable() {
    let bench = Bench::new();
    let layers: Vec<Vec<u8>> = (0..128)
        .map(|i| super::Tar::default().file(&format!("f{i}"), "x").file("top", &i.to_string()).end())
        .collect();
    let image = bench.image("x", &layers);
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    // The most layers that docker makes, read-only and writable.
    let (upper, work) = (bench.path("u"), bench.path("w"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    for writable in [None, Some((&*upper, &*work))] {
        bench.store.mount_rootfs(&image, writable, &target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("top")).unwrap(), "127");
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 129);
        bench.store.unmount_rootfs(&target).unwrap();
    }
    crate::mount::check_classic(&bench.store, &image, &target);
    assert!(bench.store.has_layer(&Digest::of(&layers[0])));
}
