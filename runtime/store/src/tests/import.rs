//! Import, with the archives that skopeo, podman and docker write.

use super::{Bench, Tar, listing, manifest};
use crate::{
    ConfigSpec, Content, Digest, FileSpec, Image, ImportError, ImportOptions, LayerSpec, SaveError,
    SaveFormat,
};
use std::path::Path;
use std::process::Command;

/// `false`, said aloud, when a tool that is the oracle is not installed.
pub(crate) fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|out| out.status.success());
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

pub(crate) fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn skopeo(from: &str, to: &str) {
    run(Command::new("skopeo").args(["--insecure-policy", "copy", "-q", from, to]));
}

/// An image with a bit of everything.
pub(crate) fn sample(bench: &Bench, reference: &str) -> Image {
    let base = LayerSpec {
        files: vec![
            FileSpec::new("etc/os", 0o644, Content::Bytes(b"base".to_vec())),
            FileSpec::new("etc/gone", 0o644, Content::Bytes(b"gone".to_vec())),
            FileSpec::new("bin/a", 0o4755, Content::Bytes(vec![7; 100_000])),
            FileSpec::new("bin/b", 0o4755, Content::HardLink("bin/a".into())),
        ],
    };
    let top = LayerSpec {
        files: vec![
            FileSpec::new("etc/gone", 0, Content::Whiteout),
            FileSpec::new("link", 0o777, Content::Symlink("/etc/os".into())),
            FileSpec { uid: 5, gid: 6, ..FileSpec::new("own", 0o600, Content::Bytes(b"5".to_vec())) },
        ],
    };
    let config = ConfigSpec { cmd: vec!["/bin/a".into()], user: Some("5".into()), ..ConfigSpec::default() };
    bench.store.build_image(reference, &[base, top], &config).unwrap()
}

fn import(bench: &Bench, path: &Path) -> Result<Vec<Image>, ImportError> {
    bench.store.import(path, &ImportOptions::default(), &|_| {})
}

/// What the image looks like when it is mounted.
pub(crate) fn mounted(bench: &Bench, image: &Image) -> String {
    let target = bench.path("mnt");
    std::fs::create_dir_all(&target).unwrap();
    bench.store.mount_rootfs(image, None, &target).unwrap();
    let listing = listing(&target);
    bench.store.unmount_rootfs(&target).unwrap();
    listing
}

#[test]
fn skopeo_reads_the_store_and_every_format_comes_back() {
    if !have("skopeo") {
        return;
    }
    let bench = Bench::new();
    let image = sample(&bench, "keel.test/sample:1");
    let expected = mounted(&bench, &image);
    let source = format!("oci:{}:keel.test/sample:1", bench.store.root().display());
    for (to, same_manifest) in [
        ("oci-archive:A.tar:keel.test/sample:1", true),
        ("oci:A:keel.test/sample:1", true),
        ("docker-archive:A.tar:keel.test/sample:1", false),
    ] {
        let other = Bench::new();
        let path = other.path(if to.contains("A.tar") { "A.tar" } else { "A" });
        skopeo(
            &source,
            &to.replace("A.tar", path.to_str().unwrap())
                .replace("oci:A:", &format!("oci:{}:", path.display())),
        );
        let progress = std::sync::Mutex::new(Vec::new());
        let on_progress = |p| progress.lock().unwrap().push(p);
        let images = other.store.import(&path, &ImportOptions::default(), &on_progress).unwrap();
        let last = progress.into_inner().unwrap().pop().unwrap();
        assert_eq!((last.layers_done, last.layers_total), (2, 2));
        assert_eq!(images.len(), 1, "{to}");
        assert_eq!(images[0].reference, "keel.test/sample:1");
        assert!(images[0].pinned);
        assert_eq!(images[0].manifest_digest == image.manifest_digest, same_manifest);
        assert_eq!(images[0].config_digest, image.config_digest);
        assert_eq!(mounted(&other, &images[0]), expected, "{to}");

        // Compressed archives are unpacked on the way, from files and from streams.
        if path.is_file() {
            run(Command::new("gzip").arg("-1").arg(&path));
            let zipped = path.with_extension("tar.gz");
            let third = Bench::new();
            let images = import(&third, &zipped).unwrap();
            assert_eq!(mounted(&third, &images[0]), expected);
            let options = ImportOptions { reference: Some("named:2".into()), unpinned: true };
            let file = std::fs::File::open(&zipped).unwrap();
            let images = third.store.import_reader("stdin", file, &options, &|_| {}).unwrap();
            assert_eq!(images[0].reference, "docker.io/library/named:2");
            assert!(!images[0].pinned);
            assert_eq!(listing(&third.store.inner.partial_dir()), "");
        }
    }
}

#[test]
fn podman_save_comes_in() {
    if !have("podman") || !have("skopeo") {
        return;
    }
    let bench = Bench::new();
    let image = sample(&bench, "keel.test/sample:1");
    let expected = mounted(&bench, &image);
    let source = format!("oci:{}:keel.test/sample:1", bench.store.root().display());
    let (root, run_root) = (bench.path("podman"), bench.path("podman-run"));
    let store = format!("containers-storage:[vfs@{}+{}]", root.display(), run_root.display());
    skopeo(&source, &format!("{store}keel.test/sample:1"));
    skopeo(&source, &format!("{store}keel.test/other:2"));
    let podman = || {
        let mut podman = Command::new("podman");
        podman.arg("--root").arg(&root).arg("--runroot").arg(&run_root).args(["--storage-driver", "vfs"]);
        podman
    };
    let (one, multi) = (bench.path("oci.tar"), bench.path("multi.tar"));
    run(podman().args(["save", "-q", "--format", "oci-archive", "-o"]).arg(&one).arg("keel.test/sample:1"));
    let names = ["keel.test/sample:1", "keel.test/other:2"];
    run(podman().args(["save", "-q", "--format", "docker-archive", "-m", "-o"]).arg(&multi).args(names));
    for (path, references) in [(one, &names[..1]), (multi, &names[..])] {
        let other = Bench::new();
        let images = import(&other, &path).unwrap();
        let mut got: Vec<_> = images.iter().map(|i| i.reference.as_str()).collect();
        got.sort_unstable();
        let mut wanted = references.to_vec();
        wanted.sort_unstable();
        assert_eq!(got, wanted);
        assert_eq!(mounted(&other, &images[0]), expected);
    }
}

/// A layout with these files, as a directory.
fn layout(bench: &Bench, name: &str, index: &str, blobs: &[&[u8]]) -> std::path::PathBuf {
    let dir = bench.path(name);
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    std::fs::write(dir.join("index.json"), index).unwrap();
    for blob in blobs {
        std::fs::write(dir.join("blobs/sha256").join(Digest::of(blob).hex()), blob).unwrap();
    }
    dir
}

#[test]
fn an_index_gives_this_machines_image() {
    let bench = Bench::new();
    let tar = Tar::default().file("f", "x").end();
    let id = Digest::of(&tar);
    let (m, c) = manifest(&[(id, tar.len() as u64)], &[id], "application/vnd.oci.image.layer.v1.tar");
    let host = crate::Platform::host();
    let index = |arch: &str| {
        let entry = |arch: &str, digest: Digest| {
            serde_json::json!({"mediaType": crate::image::OCI_MANIFEST, "digest": digest, "size": 1,
                "platform": {"os": "linux", "architecture": arch}})
        };
        serde_json::json!({"schemaVersion": 2, "manifests": [
            entry("riscv99", Digest::of(b"not there")), entry(arch, Digest::of(&m)),
            {"mediaType": crate::image::OCI_MANIFEST, "digest": Digest::of(b"attestation"), "size": 1,
             "platform": {"os": "unknown", "architecture": "unknown"}}]})
        .to_string()
    };
    let top = |nested: &str, name: &str| {
        serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.index.v1+json", "digest": Digest::of(nested.as_bytes()),
            "size": nested.len(), "annotations": {"org.opencontainers.image.ref.name": name}}]})
        .to_string()
    };
    let nested = index(&host.architecture);
    let dir = layout(&bench, "good", &top(&nested, "multi"), &[nested.as_bytes(), &m, &c, &tar]);
    let images = import(&bench, &dir).unwrap();
    assert_eq!(images[0].reference, "docker.io/library/multi:latest");
    assert_eq!(images[0].manifest_digest, Digest::of(&m));

    let nested = index("sparc");
    let dir = layout(&bench, "bad", &top(&nested, "multi"), &[nested.as_bytes(), &m, &c, &tar]);
    let error = import(&bench, &dir).unwrap_err().to_string();
    assert_eq!(error, format!("image has no variant for {host}; it has linux/riscv99, linux/sparc"));

    // One that is alone in its index is for what the index says, too.
    let alone = serde_json::json!({"schemaVersion": 2, "manifests": [
        {"mediaType": crate::image::OCI_MANIFEST, "digest": Digest::of(&m), "size": 1,
         "platform": {"os": "linux", "architecture": "sparc"}}]})
    .to_string();
    let dir = layout(&bench, "alone", &top(&alone, "multi"), &[alone.as_bytes(), &m, &c, &tar]);
    let error = import(&bench, &dir).unwrap_err().to_string();
    assert_eq!(error, format!("image has no variant for {host}; it has linux/sparc"));
}

#[test]
fn broken_archives_say_what_is_wrong() {
    let bench = Bench::new();
    let check = |path: &Path, expected: &str| {
        let error = import(&bench, path).map(drop).unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(e) = source {
            text.push_str(&format!(": {e}"));
            source = e.source();
        }
        assert!(text.contains(expected), "{text:?} has no {expected:?}");
    };
    check(&bench.path("nothing"), "cannot open");
    let file = bench.path("file");
    std::fs::write(&file, Tar::default().file("hello", "x").end()).unwrap();
    check(&file, "is no image: it has neither index.json");
    std::fs::write(&file, vec![b'x'; 5000]).unwrap();
    check(&file, "is not a readable archive");
    std::fs::write(&file, Tar::default().file("manifest.json", "[").end()).unwrap();
    check(&file, "manifest.json in");
    let docker = |layer: &str| {
        let config = serde_json::json!({"rootfs": {"diff_ids": [Digest::of(b"")]}}).to_string();
        let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": [layer]}]);
        Tar::default().file("c.json", &config).file("manifest.json", &manifest.to_string())
    };
    std::fs::write(&file, docker("l/layer.tar").end()).unwrap();
    check(&file, "names l/layer.tar, which it does not hold");
    // Paths out of the archive name nothing.
    std::fs::write(&file, docker("../../../etc/passwd").end()).unwrap();
    check(&file, "which it does not hold");
    let loops = docker("l").symlink("l", "m").symlink("m", "l").end();
    std::fs::write(&file, loops).unwrap();
    check(&file, "which it does not hold");
    std::fs::write(&file, docker("l").file("l", "not this").end()).unwrap();
    check(&file, "has the wrong content");

    let index = serde_json::json!({"manifests": [{"digest": Digest::of(b"x"), "size": 1}]}).to_string();
    let dir = layout(&bench, "layout", &index, &[]);
    check(&dir, "which it does not hold");
    std::fs::write(dir.join("blobs/sha256").join(Digest::of(b"x").hex()), "y").unwrap();
    check(&dir, "has the wrong content");
    assert!(bench.store.images().unwrap().is_empty());
    assert_eq!(listing(&bench.store.inner.layers_dir()), "");
}

#[test]
fn what_is_saved_others_load_and_it_comes_back_the_same() {
    let bench = Bench::new();
    let image = sample(&bench, "keel.test/sample:1");
    bench.store.tag_image("keel.test/sample:1", "keel.test/other:2").unwrap().unwrap();
    let expected = mounted(&bench, &image);
    let names = ["keel.test/sample:1", "keel.test/other:2"];
    let (oci, docker, layout) = (bench.path("oci.tar"), bench.path("docker.tar"), bench.path("layout"));
    for (path, format) in [(&oci, SaveFormat::OciArchive), (&docker, SaveFormat::DockerArchive)] {
        let mut file = std::fs::File::create(path).unwrap();
        let progress = std::sync::Mutex::new(Vec::new());
        bench.store.save(&names, format, &mut file, &|p| progress.lock().unwrap().push(p)).unwrap();
        let last = progress.into_inner().unwrap().pop().unwrap();
        assert_eq!((last.done_bytes, last.layers_done), (last.total_bytes, last.layers_total), "{format:?}");
        assert!(last.layers_total >= 2);
    }
    bench.store.save_layout(&names, &layout, &|_| {}).unwrap();
    for path in [&oci, &docker, &layout] {
        let other = Bench::new();
        let images = import(&other, path).unwrap();
        let mut references: Vec<_> = images.iter().map(|i| i.reference.as_str()).collect();
        references.sort_unstable();
        assert_eq!(references, ["keel.test/other:2", "keel.test/sample:1"]);
        assert!(images.iter().all(|i| i.config_digest == image.config_digest));
        assert_eq!(images[0].manifest_digest == image.manifest_digest, *path != docker);
        assert_eq!(mounted(&other, &images[0]), expected);
    }
    if have("skopeo") {
        let to = format!("dir:{}", bench.path("dir").display());
        skopeo(&format!("oci-archive:{}:keel.test/sample:1", oci.display()), &to);
        skopeo(&format!("oci:{}:keel.test/other:2", layout.display()), &to);
        skopeo(&format!("docker-archive:{}:keel.test/other:2", docker.display()), &to);
    }
    if have("podman") {
        // It loads several images from a docker archive only.
        let one = bench.path("one.tar");
        let mut file = std::fs::File::create(&one).unwrap();
        bench.store.save(&names[..1], SaveFormat::OciArchive, &mut file, &|_| {}).unwrap();
        for path in [&one, &docker] {
            let mut podman = Command::new("podman");
            podman.arg("--root").arg(bench.path("p")).arg("--runroot").arg(bench.path("pr"));
            run(podman.args(["--storage-driver", "vfs", "load", "-q", "-i"]).arg(path));
        }
    }
    assert!(matches!(
        bench.store.save(&["nothing"], SaveFormat::OciArchive, &mut Vec::new(), &|_| {}),
        Err(SaveError::NoImage(_))
    ));
    std::fs::remove_file(bench.store.inner.blob_path(&image.layers[0].blob_digest)).unwrap();
    let error = bench.store.save(&names, SaveFormat::OciArchive, &mut Vec::new(), &|_| {}).unwrap_err();
    assert!(error.to_string().contains("pull the image again to save it"));
}

#[test]
fn umoci_unpacks_the_same_root_file_system() {
    if !have("umoci") || !have("skopeo") {
        return;
    }
    let bench = Bench::new();
    let image = sample(&bench, "keel.test/sample:1");
    let layout = bench.path("layout");
    let source = format!("oci:{}:keel.test/sample:1", bench.store.root().display());
    skopeo(&source, &format!("oci:{}:t", layout.display()));
    let bundle = bench.path("bundle");
    run(Command::new("umoci").args(["unpack", "--image", &format!("{}:t", layout.display())]).arg(&bundle));
    assert_eq!(listing(&bundle.join("rootfs")), mounted(&bench, &image));
}
