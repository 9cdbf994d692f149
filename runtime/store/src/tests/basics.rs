//! The way of an ordinary image: in, committed, mounted, gone.

use super::{Bench, Tar, ingest, listing, manifest};
use crate::{BlobError, ConfigSpec, Content, Digest, FileSpec, LayerError, LayerSpec, Partial};
use std::io::Write;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn an_image_goes_in_and_is_mounted() {
    let bench = Bench::new();
    let base =
        Tar::default().dir("./", 0o755).dir("etc/", 0o755).file("etc/a", "lower").file("etc/b", "b").end();
    let top = Tar::default().dir("etc/", 0o750).file("etc/a", "upper").file("etc/.wh.b", "").end();
    let image = bench.image("x", &[base, top]);
    assert_eq!(image.reference, "docker.io/library/x:latest");
    assert_eq!(bench.store.image("x").unwrap().unwrap().manifest_digest, image.manifest_digest);
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();

    bench.store.mount_rootfs(&image, None, &target).unwrap();
    assert_eq!(listing(&target), "etc: dir 750\netc/a: file 644 \"upper\"");
    let refused = std::fs::write(target.join("new"), "").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));

    // A second mount takes the place of the first.
    let (upper, work) = (bench.path("upper"), bench.path("work"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    bench.store.mount_rootfs(&image, Some((&upper, &work)), &target).unwrap();
    std::fs::write(target.join("new"), "1").unwrap();
    assert_eq!(listing(&upper), "new: file 644 \"1\"");
    bench.store.unmount_rootfs(&target).unwrap();
    assert_eq!(listing(&target), "");
    bench.store.unmount_rootfs(&target).unwrap();
    bench.store.unmount_rootfs(&bench.path("nothing")).unwrap();
}

#[test]
fn all_compressions_give_the_same_layer() {
    let tar = Tar::default().dir("d/", 0o755).file("d/f", &"x".repeat(300_000)).end();
    let id = Digest::of(&tar);
    let zstd = zstd::stream::encode_all(&tar[..], 3).unwrap();
    let two_members = [gzip(&tar[..1000]), gzip(&tar[1000..])].concat();
    for blob in [tar.clone(), gzip(&tar), two_members, zstd] {
        let bench = Bench::new();
        ingest(&bench.store, &blob, &id).unwrap();
        assert!(bench.store.has_layer(&id) && bench.store.has_blob(&Digest::of(&blob)));
        bench.store.settle().unwrap();
        assert!(bench.store.has_layer(&id) && bench.store.has_blob(&Digest::of(&blob)));
        assert_eq!(
            listing(&bench.store.inner.layer_dir(&id).join("fs")),
            "d: dir 755\nd/f: file 644 300000 bytes"
        );
        assert_eq!(listing(&bench.store.inner.partial_dir()), "");

        let bench = Bench::new();
        bench.store.unpack_layer(&blob[..], &Digest::of(&blob), &id).unwrap();
        assert!(bench.store.has_layer(&id) && !bench.store.has_blob(&Digest::of(&blob)));
    }
}

#[test]
fn wrong_bytes_leave_nothing() {
    let tar = Tar::default().file("f", "content").end();
    let (blob, id) = (gzip(&tar), Digest::of(&tar));
    let digest = Digest::of(&blob);
    let other = Digest::of(b"other");
    let bench = Bench::new();
    let layers = bench.store.inner.layers_dir();

    assert!(matches!(ingest(&bench.store, &blob, &other), Err(LayerError::WrongDiffId { .. })));
    let mut damaged = blob.clone();
    damaged[30] ^= 1;
    let mut ingest = bench.store.layer_ingest(&digest, damaged.len() as u64, &id).unwrap();
    let pushed = ingest.push(&damaged);
    let error = pushed.and_then(|()| ingest.finish()).unwrap_err();
    assert!(matches!(error, LayerError::Blob(BlobError::WrongDigest { .. })), "{error:?}");
    assert_eq!(bench.store.partial_len(&digest), 0);
    assert!(!bench.store.has_layer(&id) && !bench.store.has_blob(&digest));
    assert_eq!(listing(&layers), "");

    let mut short = bench.store.begin_blob(&digest, blob.len() as u64).unwrap();
    short.write(&blob[..10]).unwrap();
    assert!(matches!(short.finish(), Err(BlobError::TooShort { got: 10, .. })));
    assert_eq!(bench.store.partial_len(&digest), 10);
    let mut long = bench.store.begin_blob(&digest, blob.len() as u64).unwrap();
    assert_eq!(long.written(), 10);
    long.write(&blob[10..]).unwrap();
    assert!(matches!(long.write(b"x"), Err(BlobError::TooLong { .. })));
    long.abort(Partial::Remove).unwrap();
    assert_eq!(bench.store.partial_len(&digest), 0);
}

#[test]
fn a_transfer_goes_on_where_it_stopped() {
    let mut bench = Bench::new();
    let tar = Tar::default().file("f", &"0123456789".repeat(100_000)).end();
    let blob = gzip(&tar);
    let (digest, id) = (Digest::of(&blob), Digest::of(&tar));
    let half = blob.len() / 2;
    let mut writer = bench.store.begin_blob(&digest, blob.len() as u64).unwrap();
    writer.write(&blob[..half]).unwrap();
    // A second writer at the same time does not disturb the first.
    let mut second = bench.store.begin_blob(&digest, blob.len() as u64).unwrap();
    assert_eq!(second.written(), 0);
    second.write(&blob[..5]).unwrap();
    drop(second);
    drop(writer);
    bench.reopen();
    assert_eq!(bench.store.partial_len(&digest), half as u64);
    let mut ingest = bench.store.layer_ingest(&digest, blob.len() as u64, &id).unwrap();
    assert_eq!(ingest.offset(), half as u64);
    assert!(ingest.resumed());
    ingest.write_all(&blob[half..]).unwrap();
    ingest.finish().unwrap();
    bench.store.settle().unwrap();
    assert!(bench.store.has_layer(&id) && bench.store.has_blob(&digest));
}

/// What is there of a partial blob, and what its mark makes of it.
#[test]
fn a_resumed_transfer_hashes_nothing_that_an_earlier_one_has_hashed() {
    let bench = Bench::new();
    let tar = Tar::default().file("f", &"x".repeat(300_000)).end();
    let (id, size, kept) = (Digest::of(&tar), tar.len() as u64, 200_000);
    let data = bench.store.inner.partial_dir().join(id.hex()).join("data");
    let state = data.with_file_name("state");
    let begin = || {
        let mut writer = bench.store.begin_blob(&id, size).unwrap();
        writer.write(&tar[writer.written() as usize..kept]).unwrap();
        writer.abort(Partial::Keep).unwrap();
    };
    let finish = || {
        let mut writer = bench.store.begin_blob(&id, size).unwrap();
        writer.write(&tar[writer.written() as usize..]).unwrap();
        writer.finish()
    };
    // The bytes change where nobody may look at them again: only whoever does could tell.
    begin();
    std::fs::write(&data, vec![b'?'; kept]).unwrap();
    finish().unwrap();
    std::fs::remove_file(bench.store.inner.blob_path(&id)).unwrap();

    // Shorter than its mark: a power cut took the rest. No mark, a torn one, bytes after the mark: hashed as they are.
    let harm: [&dyn Fn(); 4] = [
        &|| std::fs::write(&data, &tar[..kept - 1]).unwrap(),
        &|| std::fs::remove_file(&state).unwrap(),
        &|| std::fs::write(&state, &std::fs::read(&state).unwrap()[..40]).unwrap(),
        &|| std::fs::write(&data, &tar[..kept + 50]).unwrap(),
    ];
    for harm in harm {
        begin();
        harm();
        let there = std::fs::metadata(&data).unwrap().len();
        assert_eq!(bench.store.begin_blob(&id, size).unwrap().written(), there);
        finish().unwrap();
        assert_eq!(bench.store.read_blob(&id, size).unwrap().as_ref(), Some(&tar));
        std::fs::remove_file(bench.store.inner.blob_path(&id)).unwrap();
    }

    // A mark of other bytes is found at the end, and all that it spoiled goes.
    let other = bench.store.inner.partial_dir().join(Digest::of(b"other").hex());
    let mut writer = bench.store.begin_blob(&Digest::of(b"other"), size).unwrap();
    writer.write(&vec![b'o'; kept]).unwrap();
    writer.abort(Partial::Keep).unwrap();
    begin();
    std::fs::copy(other.join("state"), &state).unwrap();
    assert!(matches!(finish(), Err(BlobError::WrongDigest { .. })));
    assert_eq!(bench.store.partial_len(&id), 0);
    finish().unwrap();
}

#[test]
fn commit_checks_what_belongs_together() {
    let bench = Bench::new();
    let tar = Tar::default().file("f", "").end();
    let id = Digest::of(&tar);
    let (m, c) = manifest(&[(id, tar.len() as u64)], &[id], "application/vnd.oci.image.layer.v1.tar");
    let commit = |m: &[u8], kind: &str, c: &[u8]| {
        bench.store.commit_image("x", m, kind, c, false).map(drop).unwrap_err().to_string()
    };
    let oci = crate::image::OCI_MANIFEST;
    assert_eq!(commit(&m, oci, &c), format!("layer {id} is not in the store"));
    assert!(commit(&m, oci, b"{").starts_with("config is not valid"));
    assert!(commit(b"{}", oci, &c).starts_with("manifest is not valid"));
    assert!(commit(&m, "application/vnd.docker.distribution.manifest.v1+json", &c).contains("v1+json"));
    let (_, other) = manifest(&[], &[], "x");
    assert!(commit(&m, oci, &other).starts_with("manifest names config"));
    assert!(bench.store.images().unwrap().is_empty());
}

#[test]
fn configs_of_odd_builders_are_read_as_every_engine_reads_them() {
    let bench = Bench::new();
    let tar = Tar::default().file("f", "").end();
    ingest(&bench.store, &tar, &Digest::of(&tar)).unwrap();
    let commit = |layers: &[Digest], config: &serde_json::Value| {
        let config = config.to_string();
        let blobs: Vec<_> = layers
            .iter()
            .map(|id| {
                serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": id, "size": tar.len()})
            })
            .collect();
        let manifest = serde_json::json!({"schemaVersion": 2, "layers": blobs, "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config.as_bytes()), "size": config.len()}});
        let manifest = manifest.to_string();
        let oci = crate::image::OCI_MANIFEST;
        bench.store.commit_image("x", manifest.as_bytes(), oci, config.as_bytes(), false)
    };
    let id = Digest::of(&tar);
    let rootfs = serde_json::json!({"type": "layers", "diff_ids": [id]});
    for odd in [
        serde_json::json!({"rootfs": rootfs, "os": "linux", "config": {"Cmd": ["/f"]}}),
        serde_json::json!({"rootfs": rootfs, "architecture": "amd64", "os": null, "config": {"Cmd": ["/f"]}}),
        serde_json::json!({"rootfs": rootfs, "architecture": "amd64", "os": "linux", "config": {
            "Cmd": ["/f"], "Volumes": {"/v": null}, "ExposedPorts": {"80/tcp": null}, "Env": null}}),
    ] {
        commit(&[id], &odd).unwrap();
        let image = bench.store.image("x").unwrap().unwrap();
        let run = image.config.config().as_ref().unwrap();
        assert_eq!(run.cmd().as_deref().unwrap(), ["/f"], "{odd}");
        assert_eq!(image.config.os().to_string(), "linux");
    }
    for rootfs in
        [serde_json::json!({"type": "layers"}), serde_json::json!({"type": "layers", "diff_ids": null})]
    {
        let nothing = serde_json::json!({"architecture": "amd64", "os": "linux", "rootfs": rootfs});
        assert!(commit(&[], &nothing).unwrap().layers.is_empty());
    }
    let wrong = serde_json::json!({"architecture": 1, "os": "linux", "rootfs": rootfs});
    assert!(commit(&[id], &wrong).unwrap_err().to_string().starts_with("config is not valid"));
}

#[test]
fn built_images_are_reproducible_and_run() {
    let layer = LayerSpec {
        files: vec![
            FileSpec::new("bin/tool", 0o755, Content::File("/proc/self/exe".into())),
            FileSpec::new("etc/motd", 0o644, Content::Bytes(b"hi".to_vec())),
            FileSpec::new("sh", 0o777, Content::Symlink("bin/tool".into())),
            FileSpec::new("tmp", 0o1777, Content::Dir),
        ],
    };
    let config = ConfigSpec {
        entrypoint: vec!["/bin/tool".into()],
        env: vec!["A=b".into()],
        exposed_ports: vec!["80/tcp".into()],
        ..ConfigSpec::default()
    };
    let digests: Vec<Digest> = (0..2)
        .map(|_| {
            let bench = Bench::new();
            let image =
                bench.store.build_image("evenkeel.dev/hello", std::slice::from_ref(&layer), &config).unwrap();
            let run = image.config.config().as_ref().unwrap();
            assert_eq!(run.entrypoint().as_deref().unwrap(), ["/bin/tool"]);
            let fs = bench.store.inner.layer_dir(&image.layers[0].diff_id).join("fs");
            assert!(listing(&fs).contains("etc/motd: file 644 \"hi\"\nsh: -> bin/tool\ntmp: dir 1777"));
            image.manifest_digest
        })
        .collect();
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn many_pulls_of_one_layer_at_once_give_one_layer() {
    let bench = Bench::new();
    let tar = Tar::default().dir("./", 0o755).file("f", &"x".repeat(500_000)).end();
    let (blob, id) = (gzip(&tar), Digest::of(&tar));
    let (m, c) = manifest(
        &[(Digest::of(&blob), blob.len() as u64)],
        &[id],
        "application/vnd.oci.image.layer.v1.tar+gzip",
    );
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                bench.store.collect_garbage(&crate::Roots::default()).unwrap();
            }
        });
        let pulls: Vec<_> = (0..6)
            .map(|i| {
                let (bench, blob, m, c) = (&bench, &blob, &m, &c);
                scope.spawn(move || {
                    let _lease = bench.store.lease([Digest::of(blob), id]);
                    ingest(&bench.store, blob, &id).unwrap();
                    let oci = crate::image::OCI_MANIFEST;
                    bench.store.commit_image(&format!("x:{i}"), m, oci, c, true).unwrap();
                })
            })
            .collect();
        let results: Vec<_> = pulls.into_iter().map(|pull| pull.join()).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        collector.join().unwrap();
        assert!(results.iter().all(Result::is_ok));
    });
    assert_eq!(bench.store.images().unwrap().len(), 6);
    assert_eq!(bench.store.verify(crate::Depth::Full, false).unwrap().damage, []);
    bench.store.settle().unwrap();
    assert_eq!(listing(&bench.store.inner.partial_dir()), "");
}

#[test]
fn long_and_odd_paths_are_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("x".repeat(200)).join("comma, colon: space \\ end");
    std::fs::create_dir_all(&base).unwrap();
    let store = crate::Store::open(&base.join("root")).unwrap();
    let bench = Bench { dir, store };
    let image = bench.image("x", &[Tar::default().file("a", "1").end(), Tar::default().file("b", "2").end()]);
    let (upper, work, target) = (base.join("u:p"), base.join("w,k"), base.join("m"));
    for dir in [&upper, &work, &target] {
        std::fs::create_dir(dir).unwrap();
    }
    bench.store.mount_rootfs(&image, Some((&upper, &work)), &target).unwrap();
    std::fs::write(target.join("c"), "3").unwrap();
    assert_eq!(listing(&target), "a: file 644 \"1\"\nb: file 644 \"2\"\nc: file 644 \"3\"");
    bench.store.unmount_rootfs(&target).unwrap();
    assert_eq!(listing(&upper), "c: file 644 \"3\"");
}
