//! Indexes that are kept whole: imported, saved, looked after.

use super::import::{have, run};
use super::{Bench, Tar, manifest};
use crate::{Depth, Digest, Image, ImportOptions, Roots, SaveFormat, Store};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "keel.test/multi:1";

/// An OCI layout with an index for this machine, one that is not this machine's, and an attestation.
struct Layout {
    dir: PathBuf,
    index: Digest,
    foreign_layer: Digest,
}

fn write(dir: &Path, media_type: &str, body: &[u8]) -> Value {
    let digest = Digest::of(body);
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("blobs/sha256").join(digest.hex()), body).unwrap();
    json!({"mediaType": media_type, "digest": digest, "size": body.len()})
}

fn layout(bench: &Bench) -> Layout {
    let dir = bench.path("layout-in");
    let mut entries = Vec::new();
    let mut foreign_layer = Digest::of(b"");
    for architecture in [&*crate::Platform::host().architecture, "riscv99"] {
        let tar = Tar::default().file("arch", architecture).end();
        let id = Digest::of(&tar);
        let (body, config) =
            manifest(&[(id, tar.len() as u64)], &[id], "application/vnd.oci.image.layer.v1.tar");
        let config = String::from_utf8(config).unwrap().replace("amd64", architecture).into_bytes();
        let (mut body, old): (Value, _) = (serde_json::from_slice(&body).unwrap(), config.len());
        body["config"]["digest"] = json!(Digest::of(&config));
        body["config"]["size"] = json!(old);
        write(&dir, "", &tar);
        write(&dir, "", &config);
        let mut entry = write(&dir, crate::image::OCI_MANIFEST, body.to_string().as_bytes());
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entries.push(entry);
        foreign_layer = id;
    }
    let statement = write(&dir, "application/vnd.in-toto+json", b"{\"_type\":\"x\"}");
    let nothing = write(&dir, "application/vnd.oci.image.config.v1+json", b"{}");
    let attestation = json!({"schemaVersion": 2, "mediaType": crate::image::OCI_MANIFEST,
                             "config": nothing, "layers": [statement]});
    let mut entry = write(&dir, crate::image::OCI_MANIFEST, attestation.to_string().as_bytes());
    entry["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    entries.push(entry);
    let index = json!({"schemaVersion": 2, "mediaType": crate::index::OCI_INDEX, "manifests": entries});
    let mut top = write(&dir, crate::index::OCI_INDEX, index.to_string().as_bytes());
    top["annotations"] = json!({"org.opencontainers.image.ref.name": NAME});
    let digest = Digest::of(index.to_string().as_bytes());
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(dir.join("index.json"), json!({"schemaVersion": 2, "manifests": [top]}).to_string()).unwrap();
    Layout { dir, index: digest, foreign_layer }
}

fn import(store: &Store, path: &Path) -> Image {
    store.import(path, &ImportOptions::default(), &|_| {}).unwrap().remove(0)
}

#[test]
fn an_index_that_is_imported_whole_is_saved_whole() {
    let bench = Bench::new();
    let layout = layout(&bench);
    let image = import(&bench.store, &layout.dir);
    let index = image.index.clone().unwrap();
    assert_eq!(index.digest, layout.index);
    assert_eq!(
        index.platforms(),
        [format!("linux/{}", crate::Platform::host().architecture), "linux/riscv99".into()]
    );
    // Only this machine's is unpacked.
    assert_eq!(fs::read_dir(bench.store.inner.layers_dir()).unwrap().count(), 1);

    let (archive, dir) = (bench.path("a.tar"), bench.path("layout-out"));
    let mut file = fs::File::create(&archive).unwrap();
    bench.store.save(&[NAME], SaveFormat::OciArchive, &mut file, &|_| {}).unwrap();
    bench.store.save_layout(&[NAME], &dir, &|_| {}).unwrap();
    for path in [&archive, &dir] {
        let again = import(&Bench::new().store, path);
        assert_eq!((&again.index, again.manifest_digest), (&Some(index.clone()), image.manifest_digest));
    }
    let tagged = bench.store.tag_image(NAME, "keel.test/other:1").unwrap().unwrap();
    assert_eq!(tagged.index, image.index);
    if have("skopeo") {
        let to = format!("dir:{}", bench.path("all").display());
        let copy = |from: String| {
            let mut skopeo = Command::new("skopeo");
            run(skopeo.args(["--insecure-policy", "copy", "-q", "--all", "--preserve-digests", &from, &to]));
            Digest::of(&fs::read(bench.path("all/manifest.json")).unwrap())
        };
        // From the archive, and from the store itself.
        assert_eq!(copy(format!("oci-archive:{}:{NAME}", archive.display())), layout.index);
        assert_eq!(copy(format!("oci:{}:{NAME}", bench.store.root().display())), layout.index);
    }
}

#[test]
fn an_archive_with_one_platform_of_its_index_gives_that_one() {
    let bench = Bench::new();
    let layout = layout(&bench);
    fs::remove_file(layout.dir.join("blobs/sha256").join(layout.foreign_layer.hex())).unwrap();
    assert_eq!(import(&bench.store, &layout.dir).index, None);
}

#[test]
fn an_index_is_kept_with_its_image_and_goes_with_it() {
    let bench = Bench::new();
    let layout = layout(&bench);
    let image = import(&bench.store, &layout.dir);
    let blobs = || fs::read_dir(bench.store.inner.blobs_dir()).unwrap().count();
    let before = blobs();
    assert_eq!(bench.store.collect_garbage(&Roots::default()).unwrap().blobs, 0);
    assert_eq!(blobs(), before);
    assert!(bench.store.usage().unwrap().images[0].index_bytes > 1000);
    assert_eq!(bench.store.verify(Depth::Full, false).unwrap().damage, []);

    bench.store.remove_image(&image.reference).unwrap();
    assert_eq!(bench.store.collect_garbage(&Roots::default()).unwrap().blobs, before as u64);
    assert_eq!(blobs(), 0);
}

#[test]
fn damage_of_another_platforms_blob_is_found_and_named() {
    let bench = Bench::new();
    let layout = layout(&bench);
    import(&bench.store, &layout.dir);
    let blob = bench.store.inner.blob_path(&layout.foreign_layer);
    let len = fs::metadata(&blob).unwrap().len();
    fs::write(&blob, vec![0; len as usize]).unwrap();
    let report = bench.store.verify(Depth::Full, false).unwrap();
    assert_eq!(report.damage.len(), 1);
    assert_eq!(
        (report.damage[0].digest, &report.damage[0].images[..]),
        (layout.foreign_layer, &[NAME.to_owned()][..])
    );
    // The image itself runs all the same.
    assert_eq!(report.lost_images, []);

    fs::remove_file(&blob).unwrap();
    fs::remove_file(bench.store.inner.blob_path(&layout.index)).unwrap();
    let report = bench.store.verify(Depth::Quick, false).unwrap();
    let damage: Vec<_> = report.damage.iter().map(|d| (d.digest, d.problem.as_str())).collect();
    assert_eq!(damage, [(layout.index, "it is not there")], "a layer may have been given up for space");
}

#[test]
fn a_full_disk_takes_the_layers_of_other_platforms_and_saving_says_so() {
    let bench = Bench::new();
    let layout = layout(&bench);
    import(&bench.store, &layout.dir);
    assert_eq!(bench.store.drop_unpacked_blobs(&|| false).unwrap().blobs, 2);
    assert!(!bench.store.has_blob(&layout.foreign_layer));
    // What is left are configs and the attestation.
    assert!(bench.store.usage().unwrap().images[0].index_bytes < 512);
    let error = bench.store.save(&[NAME], SaveFormat::OciArchive, &mut Vec::new(), &|_| {}).unwrap_err();
    assert!(error.to_string().contains("is not in the store any more"), "{error}");
}
