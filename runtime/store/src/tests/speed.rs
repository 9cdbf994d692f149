//! What a pull costs here: run by hand on an image layout, with the processor time that it took.

use super::{Bench, Tar};
use crate::{Digest, ImportOptions, Partial, Store};
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

/// What going on with nine tenths of a large blob costs, with and without the mark beside it:
/// `cargo test --release -p keel-store resume_at -- --ignored --nocapture`
#[test]
#[ignore = "a measurement: 300 MB on the disk"]
fn resume_at_nine_tenths() {
    let cpu = || {
        let used = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        seconds(used.user_time()) + seconds(used.system_time())
    };
    let tar = Tar::default().file("f", &"abcdefgh".repeat(300 << 17)).end();
    let (id, kept) = (Digest::of(&tar), tar.len() / 10 * 9);
    for marked in [true, false, true, false, true, false] {
        let bench = Bench::new();
        let mut writer = bench.store.begin_blob(&id, tar.len() as u64).unwrap();
        writer.write(&tar[..kept]).unwrap();
        writer.abort(Partial::Keep).unwrap();
        let mark = bench.store.inner.partial_dir().join(id.hex()).join("state");
        let unmark = || {
            if !marked {
                std::fs::remove_file(&mark).unwrap();
            }
        };
        unmark();
        let before = cpu();
        let writer = bench.store.begin_blob(&id, tar.len() as u64).unwrap();
        let opened = cpu();
        drop(writer);
        unmark();
        let start = cpu();
        super::ingest(&bench.store, &tar, &id).unwrap();
        println!("marked {marked}: to take it up {:.3} s, whole {:.3} s", opened - before, cpu() - start);
    }
}

#[test]
fn an_image_of_128_layers_is_mounted_by_both_interfaces() {
    let bench = Bench::new();
    let layers: Vec<Vec<u8>> = (0..128)
        .map(|i| Tar::default().file(&format!("f{i}"), "x").file("top", &i.to_string()).end())
        .collect();
    let image = bench.image("x", &layers);
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    // The most layers that docker makes, read-only and writable.
    let (upper, work) = (bench.path("u"), bench.path("w"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    crate::mount::check_by_context(&bench.store, &image, &target);
    for writable in [None, Some((&*upper, &*work))] {
        bench.store.mount_rootfs(&image, writable, &target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("top")).unwrap(), "127");
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 129);
        bench.store.unmount_rootfs(&target).unwrap();
    }
    crate::mount::check_classic(&bench.store, &image, &target);
    assert!(bench.store.has_layer(&Digest::of(&layers[0])));
}
