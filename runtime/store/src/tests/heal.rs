//! Damage that is met while the store is in use.

use super::import::run;
use super::rootfs::UserNamespace;
use super::{Bench, Tar, ingest, listing, manifest};
use crate::{BlobError, Depth, Digest, Image, LayerError, MountError, RootfsOptions, Roots, Store};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;

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
    keeps_its_damaged_layer(|store, image, target| store.mount_rootfs(image, None, target).unwrap());
}

#[test]
fn so_does_one_whose_layers_are_mounted_by_descriptor() {
    // As kernels without `lowerdir+` have it.
    keeps_its_damaged_layer(crate::mount::mount_classic);
    keeps_its_damaged_layer(|store, image, target| {
        let namespace = UserNamespace::new();
        let options = RootfsOptions { user_namespace: Some(namespace.1.as_fd()), ..RootfsOptions::default() };
        store.mount_rootfs_with(image, None, target, options).unwrap();
    });
}

fn keeps_its_damaged_layer(mount: impl Fn(&Store, &Image, &std::path::Path)) {
    let mut bench = Bench::new();
    let image = bench.image("a", &[layer("a"), layer("b")]);
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    mount(&bench.store, &image, &target);
    std::fs::remove_file(fs_of(&bench, &image, 0).join("a")).unwrap();
    std::fs::write(fs_of(&bench, &image, 0).join("left"), "left").unwrap();
    let report = bench.store.verify(Depth::Quick, true).unwrap();
    assert!(report.damage[0].repaired && report.lost_images.is_empty(), "{report:?}");
    bench.reopen();
    bench.store.collect_garbage(&Roots { references: ["a".into()].into(), ..Roots::default() }).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("left")).unwrap(), "left");
    assert!(listing(&bench.store.inner.layers_dir()).contains(".aside-"));
    // Nothing is known of it any more but that it is mounted.
    bench.store.collect_garbage(&Roots::default()).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("b")).unwrap(), "b");
    bench.image("a", &[layer("a"), layer("b")]);
    bench.store.unmount_rootfs(&target).unwrap();
    bench.reopen();
    assert!(!listing(&bench.store.inner.layers_dir()).contains(".aside-"));
    assert_eq!(bench.store.verify(Depth::Full, false).unwrap().damage, []);
    bench.store.collect_garbage(&Roots::default()).unwrap();
    assert_eq!(listing(&bench.store.inner.layers_dir()), "");
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

#[test]
fn what_a_container_ran_well_from_stays_and_the_newest_whole_one_takes_its_place() {
    let mut bench = Bench::new();
    let notes = bench.store.root().join("good/pod.json");
    let images: Vec<Image> = ["one", "two", "three"].map(|name| bench.image("a", &[layer(name)])).into();
    for image in &images {
        bench.store.note_good("pod", "c", "a", &image.manifest_digest).unwrap();
    }
    let good = |bench: &Bench| bench.store.last_good("pod", "c").unwrap().map(|image| image.manifest_digest);
    let collect = |bench: &Bench| {
        bench.store.collect_garbage(&Roots::default()).unwrap();
        bench.store.evict_images(&Roots::default(), &|| false).unwrap();
    };
    collect(&bench);
    assert!(bench.store.images().unwrap().is_empty());
    assert_eq!(good(&bench), Some(images[2].manifest_digest));
    assert!(!bench.store.has_layer(&images[0].layers[0].diff_id), "two are enough");

    // Damage of the newest one is found when it is used, and the one before it is what is left.
    bench.store.drop_unpacked_blobs(&|| false).unwrap();
    std::fs::write(fs_of(&bench, &images[2], 0).join("three"), "").unwrap();
    std::fs::remove_file(bench.store.inner.blob_path(&images[2].layers[0].blob_digest)).unwrap();
    restart(&mut bench);
    let newest = bench.store.last_good("pod", "c").unwrap().unwrap();
    assert!(matches!(shown(&bench, &newest), Err(MountError::Damaged { .. })));
    let older = bench.store.last_good("pod", "c").unwrap().unwrap();
    assert_eq!(shown(&bench, &older).unwrap(), "two: file 644 \"two\"");

    // Going back to an older one makes it the newest.
    bench.store.note_good("pod", "c", "a", &images[1].manifest_digest).unwrap();
    let text = std::fs::read_to_string(&notes).unwrap();
    let place = |image: &Image| text.find(&image.manifest_digest.to_string()).unwrap();
    assert!(place(&images[1]) < place(&images[2]));

    // A note that does not read is set aside; a pod that is gone holds nothing.
    std::fs::write(&notes, "{").unwrap();
    assert_eq!(good(&bench), None);
    assert!(notes.with_extension("json.damaged").exists());
    bench.store.note_good("pod", "c", "a", &images[1].manifest_digest).unwrap();
    assert_eq!(bench.store.good_owners().unwrap(), ["pod"]);
    bench.store.forget_good("pod").unwrap();
    collect(&bench);
    assert!(!bench.store.has_layer(&images[1].layers[0].diff_id));
    assert!(bench.store.note_good("../x", "c", "a", &images[1].manifest_digest).is_err());
}

/// A disk whose second half fails: an ext4 on a file that ends before its file system does. Reads there end with an I/O
/// error of the device.
struct FailingDisk {
    dir: PathBuf,
    device: String,
}

const GOOD_HALF: u64 = 24 << 20;

impl FailingDisk {
    /// `None`, said aloud, where loop devices cannot be had. Its first half only, for now.
    fn new(dir: &std::path::Path) -> Option<FailingDisk> {
        std::fs::File::create(dir.join("disk")).unwrap().set_len(GOOD_HALF).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0"]).arg(dir.join("disk")));
        std::fs::create_dir(dir.join("mnt")).unwrap();
        let out = Command::new("losetup").args(["-f", "--show"]).arg(dir.join("disk")).output().unwrap();
        if !out.status.success() {
            eprintln!("SKIPPED: no loop device: {}", String::from_utf8_lossy(&out.stderr));
            return None;
        }
        let device = String::from_utf8(out.stdout).unwrap().trim().to_owned();
        let disk = FailingDisk { dir: dir.to_owned(), device };
        disk.mount();
        Some(disk)
    }

    fn root(&self) -> PathBuf {
        self.dir.join("mnt/root")
    }

    fn mount(&self) {
        run(Command::new("mount").arg(&self.device).arg(self.dir.join("mnt")));
    }

    fn unmount(&self) {
        run(Command::new("umount").arg(self.dir.join("mnt")));
    }

    /// Whatever is written from now on is in the second half.
    fn fill_first_half(&self) {
        let filler = std::fs::File::create(self.dir.join("mnt/filler")).unwrap();
        let piece = vec![1; 64 << 10];
        while std::io::Write::write_all(&mut &filler, &piece).is_ok() {}
        drop(filler);
        self.unmount();
        let file = std::fs::File::options().write(true).open(self.dir.join("disk")).unwrap();
        file.set_len(3 * GOOD_HALF).unwrap();
        run(Command::new("losetup").arg("-c").arg(&self.device));
        run(Command::new("e2fsck").args(["-fp"]).arg(&self.device));
        run(Command::new("resize2fs").arg(&self.device));
        self.mount();
    }

    fn fail(&self) {
        self.unmount();
        run(Command::new("blockdev").arg("--flushbufs").arg(&self.device));
        let file = std::fs::File::options().write(true).open(self.dir.join("disk")).unwrap();
        file.set_len(GOOD_HALF).unwrap();
        self.mount();
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.join("mnt")).output();
        let _ = Command::new("losetup").arg("-d").arg(&self.device).output();
    }
}

#[test]
fn what_a_failing_disk_has_lost_is_healed_from_the_blob_or_set_aside_with_the_error() {
    if !super::crash::in_private_namespace(
        "tests::heal::what_a_failing_disk_has_lost_is_healed_from_the_blob_or_set_aside_with_the_error",
    ) {
        return;
    }
    let tar = Tar::default().dir("./", 0o755).file("f", &"0123456789abcdef".repeat(16 << 10)).end();
    let id = Digest::of(&tar);
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Lost {
        Content,
        Layer,
        LayerAndBlob,
    }
    for lost in [Lost::Content, Lost::Layer, Lost::LayerAndBlob] {
        let dir = tempfile::Builder::new().prefix("keel-store-").tempdir().unwrap();
        let Some(disk) = FailingDisk::new(dir.path()) else { return };
        let target = dir.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let shown = |store: &Store| {
            let image = store.image("a").unwrap().unwrap();
            store.mount_rootfs(&image, None, &target)?;
            let shown = std::fs::read(target.join("f"));
            store.unmount_rootfs(&target).unwrap();
            Ok::<_, MountError>(shown)
        };
        let commit = |store: &Store| {
            ingest(store, &tar, &id).unwrap();
            let blobs = [(id, tar.len() as u64)];
            let (manifest, config) = manifest(&blobs, &[id], "application/vnd.oci.image.layer.v1.tar");
            store.commit_image("a", &manifest, crate::image::OCI_MANIFEST, &config, false).unwrap();
        };
        commit(&Store::open(&disk.root()).unwrap());
        disk.fill_first_half();
        {
            // The same bytes once more, in the other half.
            let store = Store::open(&disk.root()).unwrap();
            match lost {
                Lost::Content => {
                    let file = store.inner.layer_dir(&id).join("fs/f");
                    let copy = file.with_file_name("copy");
                    std::fs::copy(&file, &copy).unwrap();
                    std::fs::rename(&copy, &file).unwrap();
                }
                Lost::Layer => {
                    store.inner.set_layer_aside(&id).unwrap();
                    store.unpack_blob(&id, &id).unwrap();
                    store.settle().unwrap();
                }
                Lost::LayerAndBlob => {
                    store.drop_unpacked_blobs(&|| false).unwrap();
                    store.inner.set_layer_aside(&id).unwrap();
                    ingest(&store, &tar, &id).unwrap();
                    store.settle().unwrap();
                }
            }
        }
        disk.fail();
        let _ = std::fs::remove_file(disk.root().join("verified"));
        let store = Store::open(&disk.root()).unwrap();
        match lost {
            Lost::Content => {
                let read = shown(&store).unwrap().map(|_| "readable").unwrap_err();
                assert_eq!(read.raw_os_error(), Some(libc::EIO), "it is the device that fails");
                let healed = store.verify(Depth::Full, true).unwrap();
                assert!(healed.damage[0].problem.contains("Input/output error"), "{healed:?}");
                assert!(healed.damage[0].repaired && healed.lost_images.is_empty(), "{healed:?}");
            }
            Lost::Layer => {}
            Lost::LayerAndBlob => {
                let refused = shown(&store).unwrap_err();
                assert!(matches!(refused, MountError::Damaged { .. }), "{refused:?}");
                assert!(refused.to_string().contains("Input/output error"), "{refused}");
                assert_eq!(store.set_aside().unwrap(), ["docker.io/library/a:latest"]);
                commit(&store);
            }
        }
        let whole = shown(&store).unwrap().unwrap() == tar[1024..1024 + (256 << 10)];
        assert!(whole, "{lost:?}");
        assert_eq!(store.verify(Depth::Full, false).unwrap().damage, []);
    }
}
