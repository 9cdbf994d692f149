//! Death at any moment: of the process, of the power, of the space on the disk.

use super::import::{run, sample};
use super::{Bench, Tar, ingest, listing};
use crate::{ConfigSpec, Content, Depth, Digest, FileSpec, LayerSpec, Partial, Roots, Store, is_no_space};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Runs [`worker`] in a process of its own, on the store at `root`.
fn spawn_worker(root: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::crash::worker", "--nocapture", "--include-ignored"])
        .env("KEEL_STORE_WORKER", root)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Not a test: commits images without end until somebody kills it. Prints a line for each.
#[test]
#[ignore = "the process that other tests kill"]
fn worker() {
    let Some(root) = std::env::var_os("KEEL_STORE_WORKER") else { return };
    let store = Store::open(Path::new(&root)).unwrap();
    println!("opened");
    for round in 0.. {
        let reference = format!("keel.test/i{}:{round}", std::process::id());
        let files = |n: usize| {
            let path = move |i| format!("d{n}/f{i}");
            let content = move |i: usize| Content::Bytes(format!("{round}-{i} ").repeat(2000).into_bytes());
            LayerSpec { files: (0..40).map(|i| FileSpec::new(path(i), 0o644, content(i))).collect() }
        };
        if store.build_image(&reference, &[files(0), files(1)], &ConfigSpec::default()).is_err() {
            return;
        }
        println!("committed {reference}");
        let [tag, other, copy] =
            ["tag", "other", "copy"].map(|name| format!("keel.test/{name}{}:{round}", std::process::id()));
        let done = store.tag_image(&reference, &tag).is_ok()
            && store.tag_image(&reference, &other).is_ok()
            && store.remove_image(&other).is_ok()
            && copy_by_archive(&store, &reference, &copy).is_some();
        if !done {
            return;
        }
        println!("committed {tag}\ncommitted {copy}");
        if round % 3 == 2 {
            let _ = store.collect_garbage(&Roots::default());
        }
    }
}

/// Saves an image and imports it under another name.
fn copy_by_archive(store: &Store, reference: &str, name: &str) -> Option<()> {
    let path = store.root().with_file_name("archive.tar");
    let mut file = std::fs::File::create(&path).ok()?;
    store.save(&[reference], crate::SaveFormat::OciArchive, &mut file, &|_| {}).ok()?;
    let options = crate::ImportOptions { reference: Some(name.to_owned()), unpinned: true };
    store.import(&path, &options, &|_| {}).ok().map(drop)
}

/// What must hold after any death: the store opens, every image it lists is whole, nothing unfinished is left.
pub(crate) fn check_store(root: &Path) -> Store {
    let store = Store::open(root).unwrap();
    let report = store.verify(Depth::Full, false).unwrap();
    assert!(report.damage.is_empty() && report.lost_images.is_empty(), "{report:?}");
    for image in store.images().unwrap() {
        assert!(image.layers.iter().all(|layer| store.has_layer(&layer.diff_id)));
    }
    for dir in ["", "layers", "images", "partial", "blobs/sha256"] {
        let unfinished = std::fs::read_dir(root.join(dir)).unwrap().map(|e| e.unwrap().file_name());
        assert!(unfinished.into_iter().all(|n| !n.to_string_lossy().starts_with(crate::fsio::TEMPORARY)));
    }
    store
}

/// Small and repeatable; a failing round prints its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Waits for the worker's n-th line.
fn read_lines(child: &mut Child, n: usize) -> BufReader<std::process::ChildStdout> {
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut seen = 0;
    let mut line = String::new();
    while seen < n {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the worker has died");
        seen += usize::from(line.contains("opened") || line.contains("committed"));
    }
    reader
}

#[test]
fn killed_at_any_moment_the_store_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let mut random = Random(1);
    for _ in 0..10 {
        let mut child = spawn_worker(&root);
        let _reader = read_lines(&mut child, 1);
        let wait = Instant::now() + Duration::from_millis(random.below(150));
        while Instant::now() < wait {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        check_store(&root);
    }
}

#[test]
fn a_killed_transfer_leaves_its_partial_blob_and_nothing_else() {
    let mut bench = Bench::new();
    let tar = Tar::default().file("f", &"x".repeat(3_000_000)).end();
    let id = Digest::of(&tar);
    let mut ingest = bench.store.layer_ingest(&id, tar.len() as u64, &id).unwrap();
    ingest.push(&tar[..2_000_000]).unwrap();
    // As a killed process would leave it: nobody cleans up.
    std::mem::forget(ingest);
    let layers = bench.store.inner.layers_dir();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !listing(&layers).contains("/fs/f: file") {
        assert!(Instant::now() < deadline, "the unpacker has begun");
        std::thread::yield_now();
    }
    bench.reopen();
    assert_eq!(listing(&layers), "");
    assert!(bench.store.partial_len(&id) > 1_000_000);
    let ingest = bench.store.layer_ingest(&id, tar.len() as u64, &id).unwrap();
    assert!(ingest.resumed());
    ingest.abort(Partial::Remove).unwrap();
    assert_eq!(bench.store.partial_len(&id), 0);
}

/// A mount that goes with its directory.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = crate::unmount_rootfs(&self.0);
    }
}

pub(crate) fn tmpfs(dir: &Path, options: &str) -> Mounted {
    let target = dir.join("small");
    std::fs::create_dir(&target).unwrap();
    let path = keel_sys::file::c_path(&target).unwrap();
    let options = std::ffi::CString::new(options).unwrap();
    keel_sys::mount::mount(c"tmpfs", &path, c"tmpfs", 0, Some(&options)).unwrap();
    Mounted(target)
}

#[test]
fn a_full_disk_is_said_and_leaves_no_half_layer() {
    let dir = tempfile::tempdir().unwrap();
    let many = (0..100).fold(Tar::default(), |tar, i| tar.file(&format!("f{i}"), "")).end();
    let large = Tar::default().file("f", &"x".repeat(6 << 20)).end();
    let zipped = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &large).unwrap();
        encoder.finish().unwrap()
    };
    for (options, blob, layer) in
        [("size=4m", &zipped, &large), ("size=4m", &large, &large), ("size=4m,nr_inodes=60", &many, &many)]
    {
        let small = tmpfs(dir.path(), options);
        let store = Store::open(&small.0.join("root")).unwrap();
        let id = Digest::of(layer);
        let error = ingest(&store, blob, &id).unwrap_err();
        assert!(is_no_space(&error), "{options}: {error:?}");
        assert!(!store.has_layer(&id));
        assert_eq!(listing(&store.inner.layers_dir()), "", "{options}");
        // With room the same pull goes through.
        store.drop_partials().unwrap();
        assert_eq!(listing(&store.inner.partial_dir()), "");
        let little = Tar::default().file("f", "x").end();
        ingest(&store, &little, &Digest::of(&little)).unwrap();
        store.settle().unwrap();
        drop(small);
        std::fs::remove_dir(dir.path().join("small")).unwrap();
    }
}

#[test]
fn an_import_that_cannot_fit_is_refused_with_the_figures_before_it_writes() {
    let bench = Bench::new();
    let small = tmpfs(bench.dir.path(), "size=4m,nr_inodes=30");
    let store = Store::open(&small.0.join("root")).unwrap();
    let large = Tar::default().file("f", &"x".repeat(3 << 20)).end();
    let many: Vec<Vec<u8>> = (0..8).map(|i| Tar::default().file("f", &i.to_string()).end()).collect();
    for (name, layers, free) in [("large", vec![large], "bytes"), ("many", many, "inodes")] {
        bench.image(name, &layers);
        let path = bench.path(name);
        let mut file = std::fs::File::create(&path).unwrap();
        bench.store.save(&[name], crate::SaveFormat::OciArchive, &mut file, &|_| {}).unwrap();
        let refused = store.import(&path, &crate::ImportOptions::default(), &|_| {}).unwrap_err();
        assert!(is_no_space(&refused), "{refused:?}");
        let said = super::corpus::chain(&refused);
        assert!(said.contains("are needed") && said.contains(free), "{said}");
        assert_eq!(listing(&store.inner.partial_dir()), "", "{name}");
        assert_eq!(listing(&store.inner.layers_dir()), "", "{name}");
    }
}

/// An ext4 of its own in a file; `None`, said aloud, where loop devices cannot be had.
fn ext4(dir: &Path) -> Option<Mounted> {
    let image = dir.join("disk");
    if !image.exists() {
        std::fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0"]).arg(&image));
    }
    let target = dir.join("mnt");
    std::fs::create_dir_all(&target).unwrap();
    let out = Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&target).output().unwrap();
    if !out.status.success() {
        eprintln!("SKIPPED: no loop device: {}", String::from_utf8_lossy(&out.stderr));
        return None;
    }
    Some(Mounted(target))
}

/// Runs the test again in a mount namespace of its own, where nobody's new namespace can take a copy of its mounts and
/// keep their file systems alive. `true` in there.
pub(crate) fn in_private_namespace(test: &str) -> bool {
    if std::env::var_os("KEEL_STORE_PRIVATE").is_some() {
        return true;
    }
    let test_binary = std::env::current_exe().unwrap();
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(test_binary)
        .args(["--exact", test, "--nocapture"])
        .env("KEEL_STORE_PRIVATE", "1")
        .status();
    assert!(status.unwrap().success());
    false
}

#[test]
fn after_a_power_cut_every_listed_image_is_whole() {
    if !in_private_namespace("tests::crash::after_a_power_cut_every_listed_image_is_whole") {
        return;
    }
    let rounds: u32 = std::env::var("KEEL_POWER_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(7);
    let mut promised: Vec<String> = Vec::new();
    for round in 0..rounds {
        let Some(disk) = ext4(dir.path()) else { return };
        let root = disk.0.join("root");
        if round > 0 {
            let store = check_store(&root);
            // What was said to be done is there; the worker's own collection takes whole rounds of images away.
            let there: Vec<String> = store.images().unwrap().into_iter().map(|i| i.reference).collect();
            if let Some(last) = promised.last() {
                assert!(there.contains(last), "round {round}: {last} is lost, there is {there:?}");
            }
            store.collect_garbage(&Roots::default()).unwrap();
        }
        promised.clear();
        let mut child = spawn_worker(&root);
        let mut reader = read_lines(&mut child, 1);
        let cut = Instant::now() + Duration::from_millis(random.below(400));
        while Instant::now() < cut {
            std::thread::yield_now();
        }
        let handle = std::fs::File::open(&disk.0).unwrap();
        keel_sys::writeback::ext4_shutdown(&handle, false).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap() > 0 {
            promised.extend(line.trim().rsplit_once("committed ").map(|(_, name)| name.to_owned()));
            line.clear();
        }
        // Every third image is followed by a collection that takes all of them.
        if promised
            .last()
            .is_some_and(|name| name.rsplit_once(':').unwrap().1.parse::<u32>().unwrap() % 3 == 2)
        {
            promised.clear();
        }
        drop(handle);
    }
}

#[test]
fn damage_is_found_and_healed_from_the_blob() {
    let bench = Bench::new();
    let store = &bench.store;
    let image = sample(&bench, "keel.test/sample:1");
    assert!(store.needs_verify());
    let whole = store.verify(Depth::Full, true).unwrap();
    assert_eq!((whole.layers, whole.blobs, &whole.damage[..]), (2, 4, &[][..]));
    assert!(!store.needs_verify());
    let base = store.inner.layer_dir(&image.layers[0].diff_id);
    let harm: [(&dyn Fn(), Depth); 4] = [
        // What a power cut does to others.
        (&|| std::fs::write(base.join("fs/bin/a"), "").unwrap(), Depth::Quick),
        (&|| std::fs::remove_file(base.join("fs/etc/os")).unwrap(), Depth::Quick),
        (&|| std::fs::write(base.join("fs/etc/os"), "esab").unwrap(), Depth::Full),
        (&|| std::fs::write(base.join("layer.json"), "{").unwrap(), Depth::Quick),
    ];
    for (harm, depth) in harm {
        harm();
        let found = store.verify(depth, false).unwrap();
        assert_eq!(found.damage.len(), 1);
        assert_eq!(found.damage[0].images, ["keel.test/sample:1"]);
        assert_eq!(found.lost_images.len(), 1);
        let healed = store.verify(depth, true).unwrap();
        assert!(healed.damage[0].repaired && healed.lost_images.is_empty(), "{healed:?}");
        assert_eq!(store.verify(Depth::Full, false).unwrap().damage, []);
    }
    // Without the blob the image is known to be lost, and not run.
    std::fs::remove_file(store.inner.blob_path(&image.layers[0].blob_digest)).unwrap();
    std::fs::write(base.join("fs/bin/a"), "").unwrap();
    let lost = store.verify(Depth::Quick, true).unwrap();
    assert_eq!(lost.lost_images[0].reference, "keel.test/sample:1");
    assert_eq!(lost.lost_images[0].manifest, image.manifest_digest);
    assert!(store.image("keel.test/sample:1").unwrap().is_none());
    assert!(!store.has_layer(&image.layers[0].diff_id));
    sample(&bench, "keel.test/sample:1");
    assert_eq!(store.verify(Depth::Full, false).unwrap().damage, []);
}
