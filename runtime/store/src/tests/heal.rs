//! Damage that is met while the store is in use.

use super::{Bench, Tar, ingest, listing};
use crate::{BlobError, Depth, Digest, Image, LayerError, MountError, Roots};
use std::path::PathBuf;

fn layer(name: &str) -> Vec<u8> {
    Tar::default().dir("./", 0o755).file(name, name).end()
}

fn fs_of(bench: &Bench, image: &Image, n: usize) -> PathBuf {
    bench.store.inner.layer_dir(&image.layers[n].diff_id).join("fs")
}

/// As after a start of the machine: nobody has looked at anything yet.
fn restart(bench: &mut Bench) {
    let _ = std::fs::remove_file(bench.store.root().join("verified"));
    bench.reopen();
}

/// What a read-only root file system of the image shows.
fn shown(bench: &Bench, image: &Image) -> Result<String, MountError> {
    let target = bench.path("shown");
    std::fs::create_dir_all(&target).unwrap();
    bench.store.mount_rootfs(image, None, &target)?;
    let all = listing(&target);
    bench.store.unmount_rootfs(&target).unwrap();
    Ok(all)
}

#[test]
fn a_layer_without_a_readable_record_is_absent_and_unpacked_again() {
    let bench = Bench::new();
    let harm: [&dyn Fn(&std::path::Path); 4] = [
        &|dir| std::fs::write(dir.join("layer.json"), "{").unwrap(),
        &|dir| std::fs::remove_file(dir.join("layer.json")).unwrap(),
        &|dir| std::fs::remove_dir_all(dir.join("fs")).unwrap(),
        &|dir| {
            std::fs::remove_dir_all(dir).unwrap();
            std::fs::write(dir, "").unwrap();
        },
    ];
    for harm in harm {
        let image = bench.image("a", &[layer("a")]);
        let id = image.layers[0].diff_id;
        bench.store.remove_image("a").unwrap();
        harm(&bench.store.inner.layer_dir(&id));
        assert!(!bench.store.has_layer(&id));
        // What a pull does: the blob is there, the layer is not.
        bench.store.unpack_blob(&image.layers[0].blob_digest, &id).unwrap();
        let again = bench.image("a", &[layer("a")]);
        assert_eq!(shown(&bench, &again).unwrap(), "a: file 644 \"a\"");
        assert_eq!(bench.store.verify(Depth::Full, false).unwrap().damage, []);
    }
}

#[test]
fn after_a_start_of_the_machine_damage_is_healed_before_the_layer_is_used() {
    let mut bench = Bench::new();
    let image = bench.image("a", &[layer("a"), layer("b")]);
    std::fs::write(fs_of(&bench, &image, 0).join("a"), "").unwrap();
    // Within a boot nobody looks: what was written is what the kernel has.
    assert!(shown(&bench, &image).unwrap().contains("a: file 644 \"\""));
    restart(&mut bench);
    let whole = "a: file 644 \"a\"\nb: file 644 \"b\"";
    assert_eq!(shown(&bench, &image).unwrap(), whole);
    assert!(bench.store.needs_verify(), "only the layers of this image were looked at");
    // The look is noted for the processes of this boot, and only for them.
    let note = bench.store.root().join("verified");
    let noted = std::fs::read_to_string(&note).unwrap();
    bench.reopen();
    assert!(bench.store.inner.state().checked.has(&image.layers[0].diff_id));
    for other in ["", "x", "no such boot\nall\n", &noted[..10]] {
        std::fs::write(&note, other).unwrap();
        bench.reopen();
        assert!(!bench.store.inner.state().checked.has(&image.layers[0].diff_id), "{other:?}");
        assert_eq!(shown(&bench, &image).unwrap(), whole);
    }
}

#[test]
fn an_image_that_cannot_be_healed_is_set_aside_by_its_first_use_and_comes_back_with_the_next_pull() {
    let mut bench = Bench::new();
    let image = bench.image("a", &[layer("a"), layer("shared")]);
    bench.image("other", &[layer("other"), layer("shared")]);
    bench.image("whole", &[layer("whole")]);
    bench.store.drop_unpacked_blobs(&|| false).unwrap();
    std::fs::write(fs_of(&bench, &image, 1).join("shared"), "").unwrap();
    restart(&mut bench);
    let refused = shown(&bench, &image).unwrap_err();
    assert!(matches!(&refused, MountError::Damaged { layer, .. } if *layer == image.layers[1].diff_id));
    assert!(refused.to_string().contains("lengths, owners or modes"), "{refused}");
    let left: Vec<String> = bench.store.images().unwrap().into_iter().map(|image| image.reference).collect();
    assert_eq!(left, ["docker.io/library/whole:latest"]);
    let lost = bench.store.verify(Depth::Quick, true).unwrap().lost_images;
    let names: Vec<&str> = lost.iter().map(|lost| lost.reference.as_str()).collect();
    assert_eq!(names, ["docker.io/library/a:latest", "docker.io/library/other:latest"]);
    assert_eq!(lost[0].manifest, image.manifest_digest);
    bench.image("a", &[layer("a"), layer("shared")]);
    bench.image("other", &[layer("other"), layer("shared")]);
    assert_eq!(bench.store.verify(Depth::Full, false).unwrap().lost_images, []);
    assert_eq!(bench.store.images().unwrap().len(), 3);
}

#[test]
fn a_container_on_a_damaged_layer_keeps_it_until_it_ends() {
    let mut bench = Bench::new();
    let image = bench.image("a", &[layer("a"), layer("b")]);
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    bench.store.mount_rootfs(&image, None, &target).unwrap();
    std::fs::remove_file(fs_of(&bench, &image, 0).join("a")).unwrap();
    std::fs::write(fs_of(&bench, &image, 0).join("left"), "left").unwrap();
    let report = bench.store.verify(Depth::Quick, true).unwrap();
    assert!(report.damage[0].repaired && report.lost_images.is_empty(), "{report:?}");
    bench.reopen();
    bench.store.collect_garbage(&Roots { references: ["a".into()].into(), ..Roots::default() }).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("left")).unwrap(), "left");
    assert!(listing(&bench.store.inner.layers_dir()).contains(".aside-"));
    bench.store.unmount_rootfs(&target).unwrap();
    bench.reopen();
    assert!(!listing(&bench.store.inner.layers_dir()).contains(".aside-"));
    assert_eq!(bench.store.verify(Depth::Full, false).unwrap().damage, []);
}

#[test]
fn a_damaged_blob_is_given_up_when_it_is_needed() {
    let bench = Bench::new();
    let image = bench.image("a", &[layer("a")]);
    let (blob, id) = (image.layers[0].blob_digest, image.layers[0].diff_id);
    bench.store.inner.set_layer_aside(&id).unwrap();
    std::fs::write(bench.store.inner.blob_path(&blob), &layer("b")[..700]).unwrap();
    let refused = bench.store.unpack_blob(&blob, &id).unwrap_err();
    assert!(matches!(refused, LayerError::Blob(BlobError::WrongDigest { .. })), "{refused:?}");
    assert!(!bench.store.has_blob(&blob), "the next pull fetches it");
    ingest(&bench.store, &layer("a"), &Digest::of(&layer("a"))).unwrap();
    bench.store.settle().unwrap();
    assert_eq!(bench.store.verify(Depth::Full, false).unwrap().damage, []);
}
