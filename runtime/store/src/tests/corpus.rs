//! Odd and hostile layers, each with the result that it must have. One `check` per line: a tar, and the listing of the
//! layer (then what was noted about it), or the error.

use super::import::mounted;
use super::{Bench, Tar, ingest, listing};
use crate::tar::{Entry, Kind};
use crate::{Digest, Options, Store};
use std::os::unix::fs::MetadataExt;

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text.push_str(&format!(": {e}"));
        source = e.source();
    }
    text
}

fn result(bench: &Bench, tar: &[u8]) -> String {
    let id = Digest::of(tar);
    if let Err(e) = ingest(&bench.store, tar, &id) {
        assert!(!bench.store.has_layer(&id));
        assert_eq!(listing(&bench.store.inner.layers_dir()), "", "an error leaves nothing");
        let text = chain(&e);
        let text = text.replace(&format!("cannot unpack layer {id}: "), "");
        return format!("error: {text}");
    }
    let record = bench.store.layer_record(&id).unwrap().unwrap();
    let fs = unsynced(bench, &id);
    // The census taken on the way is the one of what is there.
    let root = std::fs::File::open(&fs).unwrap();
    let counted = crate::census::take(std::os::fd::AsFd::as_fd(&root), true).unwrap();
    assert_eq!(record.census, counted, "{}", listing(&fs));
    let mut lines = vec![listing(&fs)];
    let implicit: Vec<_> = record.implicit_dirs.iter().filter(|d| !d.is_empty()).cloned().collect();
    if !implicit.is_empty() {
        lines.push(format!("implicit {}", implicit.join(" ")));
    }
    if record.opaque_root {
        lines.push("opaque root".into());
    }
    lines.extend(record.lower_links.iter().map(|(link, target)| format!("lower {link} = {target}")));
    lines.extend(record.dropped.iter().map(|(what, n)| format!("dropped {n} {what}")));
    lines.retain(|line| !line.is_empty());
    lines.join("\n")
}

/// The files of a layer that is not settled yet: a sync per case would be most of the time.
fn unsynced(bench: &Bench, id: &Digest) -> std::path::PathBuf {
    bench.store.inner.state().layers[id].join("fs")
}

#[track_caller]
fn check(tar: Vec<u8>, expected: &str) {
    assert_eq!(result(&Bench::new(), &tar), expected);
}

/// The mounted image of several layers, base first.
#[track_caller]
fn check_image(layers: &[Vec<u8>], expected: &str) {
    let bench = Bench::new();
    let image = bench.image("x", layers);
    assert_eq!(mounted(&bench, &image), expected);
}

fn tar() -> Tar {
    Tar::default()
}

fn plain(path: &str, kind: Kind) -> Entry {
    Entry::plain(path.into(), kind, 0o644)
}

/// An entry whose header is changed by hand; the checksum is put right.
fn patched(tar: Tar, entry: Entry, data: &[u8], patch: impl Fn(&mut [u8])) -> Tar {
    let start = tar.bytes.len();
    let mut tar = tar.with(entry, data);
    let header = tar.bytes.len() - data.len().next_multiple_of(512) - 512;
    assert!(header >= start);
    let block = &mut tar.bytes[header..header + 512];
    patch(block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar
}

fn typed(tar: Tar, kind: u8, path: &str, data: &[u8]) -> Tar {
    patched(tar, plain(path, Kind::File), data, |block| block[156] = kind)
}

fn pax(tar: Tar, records: &[(&str, &str)]) -> Tar {
    let mut all = String::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let len = (rest + 1..).find(|len| *len == rest + len.to_string().len()).unwrap();
        all.push_str(&format!("{len} {key}={value}\n"));
    }
    typed(tar, b'x', "pax", all.as_bytes())
}

#[test]
fn ordinary_entries() {
    check(tar().dir("d/", 0o750).file("d/f", "x").end(), "d: dir 750\nd/f: file 644 \"x\"");
    check(tar().end(), "");
    check(Vec::new(), "");
    check(tar().file("f", "x").bytes, "f: file 644 \"x\"");
    check(tar().file("f", "").end(), "f: file 644 \"\"");
    check(tar().file("a/b/f", "x").end(), "a: dir 755\na/b: dir 755\na/b/f: file 644 \"x\"\nimplicit a a/b");
    check(tar().file("d/f", "x").dir("d", 0o700).end(), "d: dir 700\nd/f: file 644 \"x\"");
    check(tar().symlink("l", "/etc/passwd").end(), "l: -> /etc/passwd");
    check(tar().symlink("l", "").end(), "error: entry \"l\": symbolic link to nothing");
    check(typed(tar(), b'7', "f", b"x").end(), "f: file 644 \"x\"");
    check(typed(tar(), 0, "f", b"x").end(), "f: file 644 \"x\"");
    check(typed(tar(), 0, "d/", b"").end(), "d: dir 644");
    check(
        typed(tar(), b'V', "label", b"").end(),
        "error: invalid tar header at byte 0: unknown entry type 'V'",
    );
    let name = "n".repeat(200);
    check(tar().file(&name, "x").end(), &format!("{name}: file 644 \"x\""));
    check(
        tar().file(&"n".repeat(256), "").end(),
        &format!("error: entry {:?}: one of its names is longer than 255 bytes", "n".repeat(256)),
    );
    let long = "d/".repeat(2050) + "f";
    check(tar().file(&long, "").end(), &format!("error: entry {long:?}: it is longer than 4095 bytes"));
    let raw = Entry::plain(b"\xff\xfe\n".to_vec(), Kind::File, 0o644);
    check(tar().entry(raw).end(), "\\xff\\xfe\\x0a: file 644 \"\"");
}

#[test]
fn owners_modes_and_times() {
    let owned = |uid, gid, mode| tar().entry(Entry { uid, gid, mode, ..plain("f", Kind::File) }).end();
    check(owned(1, 2, 0o6755), "f: file 6755 \"\" 1:2");
    check(owned(3_000_000_000, 0, 0o1), "f: file 1 \"\" 3000000000:0");
    check(owned(u64::from(u32::MAX), 7, 0o644), "f: file 644 \"\" 0:7");
    check(owned(1 << 32, 0, 0o644), "error: entry \"f\": owner 4294967296 is out of range");
    // A set-group-id directory gives its group to nobody that the archive gives another.
    let dir = Entry { gid: 9, mode: 0o2755, ..plain("d", Kind::Dir) };
    check(
        tar().entry(dir.clone()).file("d/f", "").dir("d/s", 0o755).end(),
        "d: dir 2755 0:9\nd/f: file 644 \"\"\nd/s: dir 755",
    );
    check(
        tar().entry(dir).file("d/i/f", "").end(),
        "d: dir 2755 0:9\nd/i: dir 755\nd/i/f: file 644 \"\"\nimplicit d/i",
    );

    let bench = Bench::new();
    let times = [(-5, 0), (1, 500_000_000), (1 << 40, 0), (1_700_000_000, 0)];
    let mut layer = tar().entry(Entry { mtime: (77, 0), ..plain("d", Kind::Dir) });
    for (i, mtime) in times.into_iter().enumerate() {
        layer = layer.entry(Entry { mtime, ..plain(&format!("d/{i}"), Kind::File) });
    }
    let root = Entry { mtime: (5, 0), mode: 0o711, uid: 3, ..plain("./", Kind::Dir) };
    let layer = layer.entry(root).end();
    ingest(&bench.store, &layer, &Digest::of(&layer)).unwrap();
    let fs = unsynced(&bench, &Digest::of(&layer));
    let stat = |name: &str| std::fs::metadata(fs.join(name)).unwrap();
    let seconds: Vec<i64> = (0..4).map(|i| stat(&format!("d/{i}")).mtime()).collect();
    assert_eq!(seconds, [0, 1, 1 << 33, 1_700_000_000]);
    assert_eq!(stat("d/1").mtime_nsec(), 500_000_000);
    assert_eq!(stat("d").mtime(), 77);
    assert_eq!((stat(".").mtime(), stat(".").mode() & 0o7777, stat(".").uid()), (5, 0o711, 3));
}

#[test]
fn no_path_leaves_the_root() {
    check(tar().file("/abs/f", "x").end(), "abs: dir 755\nabs/f: file 644 \"x\"\nimplicit abs");
    check(tar().file("../../f", "x").end(), "f: file 644 \"x\"");
    check(tar().file("a/../../b/./f", "x").end(), "b: dir 755\nb/f: file 644 \"x\"\nimplicit b");
    check(tar().entry(plain("..", Kind::Symlink)).end(), "dropped 1 root that is not a directory");
    check(
        tar().symlink("./", "/etc").file("passwd", "x").end(),
        "passwd: file 644 \"x\"\ndropped 1 root that is not a directory",
    );
    check(
        pax(tar(), &[("path", "a\0b")]).file("f", "").end(),
        "error: entry \"a\\\\x00b\": it contains a NUL byte",
    );
    // Links of the same layer are taken apart inside.
    check(
        tar().symlink("s", "real").file("s/in", "x").end(),
        "real: dir 755\nreal/in: file 644 \"x\"\ns: -> real\nimplicit real",
    );
    check(
        tar()
            .dir("usr/lib", 0o755)
            .symlink("lib", "/usr/lib")
            .file("lib/in", "x")
            .file("usr/lib/two", "")
            .end(),
        "lib: -> /usr/lib\nusr: dir 755\nusr/lib: dir 755\nusr/lib/in: file 644 \"x\"\nusr/lib/two: file 644 \"\"\nimplicit usr",
    );
    let outside = tempfile::tempdir().unwrap();
    let up = format!("../../../../../../../..{}", outside.path().display());
    let inside = outside.path().display().to_string();
    let name = &inside[1..];
    for target in [&up, &inside] {
        let result = result(&Bench::new(), &tar().symlink("s", target).file("s/evil", "x").end());
        assert!(result.contains(&format!("{name}/evil: file 644 \"x\"")), "{result}");
        assert_eq!(listing(outside.path()), "");
    }
    check(
        tar().symlink("a", "b").symlink("b", "a").file("a/f", "").end(),
        "error: entry \"a/f\": too many symbolic links in its path",
    );
    check(tar().file("f", "").file("f/x", "").end(), "error: entry \"f/x\": its parent is not a directory");
    // chmod, chown and times through a link reach the link's directory in the layer only.
    let inside = outside.path().join("victim");
    std::fs::write(&inside, "v").unwrap();
    let entry = Entry { mode: 0o777, uid: 5, ..plain("l", Kind::File) };
    check(tar().symlink("l", inside.to_str().unwrap()).entry(entry).end(), "l: file 777 \"\" 5:0");
    assert_eq!(listing(outside.path()), "victim: file 644 \"v\"");
}

#[test]
fn whiteouts() {
    check(tar().file(".wh.f", "").end(), "f: whiteout");
    check(tar().file("d/.wh.f", "").end(), "d: dir 755\nd/f: whiteout\nimplicit d");
    // What this layer has stays, in either order; a directory is the layer's own then.
    check(tar().file("f", "x").file(".wh.f", "").end(), "f: file 644 \"x\"");
    check(tar().file(".wh.f", "").file("f", "x").end(), "f: file 644 \"x\"");
    check(tar().file(".wh.f", "").file(".wh.f", "").end(), "f: whiteout");
    check(tar().dir("d", 0o755).file(".wh.d", "").end(), "d: dir 755 opaque");
    check(tar().file(".wh.d", "").dir("d", 0o700).end(), "d: dir 700 opaque");
    check(tar().file(".wh.d", "").file("d/f", "").end(), "d: dir 755 opaque\nd/f: file 644 \"\"\nimplicit d");
    check(
        tar().dir("d", 0o755).file("d/.wh..wh..opq", "").file("d/f", "").end(),
        "d: dir 755 opaque\nd/f: file 644 \"\"",
    );
    check(
        tar().dir("d", 0o755).file("d/f", "").file("d/.wh..wh..opq", "").end(),
        "d: dir 755 opaque\nd/f: file 644 \"\"",
    );
    check(tar().file("d/.wh..wh..opq", "").dir("d", 0o711).end(), "d: dir 711 opaque");
    check(tar().file(".wh..wh..opq", "").file("f", "").end(), "f: file 644 \"\"\nopaque root");
    for name in [".wh.", ".wh..", ".wh...", "d/.wh."] {
        check(tar().file(name, "").end(), &format!("error: entry {name:?}: a whiteout of nothing"));
    }
    check(
        tar()
            .dir(".wh..wh.plnk", 0o700)
            .file(".wh..wh.plnk/1.2", "")
            .file(".wh..wh.aufs", "")
            .file("f", "")
            .end(),
        "f: file 644 \"\"\ndropped 3 aufs bookkeeping",
    );
    check(tar().file(".wh.d/f", "").end(), "error: entry \".wh.d/f\": a whiteout cannot be a directory");
    check(
        tar().symlink("s", "d").file("s/.wh.f", "").end(),
        "d: dir 755\nd/f: whiteout\ns: -> d\nimplicit d",
    );
    let zero = plain("f", Kind::Char);
    check(tar().entry(zero).end(), "dropped 1 character device 0:0");

    let base = || tar().dir("d", 0o755).file("d/a", "a").file("d/b", "b").file("c", "c").end();
    check_image(
        &[base(), tar().file("d/.wh.a", "").file(".wh.c", "").end()],
        "d: dir 755\nd/b: file 644 \"b\"",
    );
    check_image(
        &[base(), tar().file(".wh.d", "").file("d/n", "n").end()],
        "c: file 644 \"c\"\nd: dir 755\nd/n: file 644 \"n\"",
    );
    check_image(&[base(), tar().file(".wh..wh..opq", "").file("n", "n").end()], "n: file 644 \"n\"");
    check_image(
        &[base(), tar().file(".wh.d", "").end(), base()],
        "c: file 644 \"c\"\nd: dir 755\nd/a: file 644 \"a\"\nd/b: file 644 \"b\"",
    );
    check_image(
        &[base(), tar().file("d", "now a file").end(), tar().dir("d", 0o700).end()],
        "c: file 644 \"c\"\nd: dir 700",
    );
}

#[test]
fn types_change_and_the_last_entry_wins() {
    check(tar().file("f", "1").file("f", "22").end(), "f: file 644 \"22\"");
    check(tar().file("d/f", "").file("d", "x").end(), "d: file 644 \"x\"");
    check(tar().file("f", "").dir("f", 0o755).end(), "f: dir 755 opaque");
    check(
        tar().symlink("s", "/").dir("s", 0o755).file("s/f", "").end(),
        "s: dir 755 opaque\ns/f: file 644 \"\"",
    );
    check(tar().dir("d", 0o755).symlink("d", "x").end(), "d: -> x");
    check(tar().dir("d", 0o755).file("d/f", "").dir("d", 0o700).end(), "d: dir 700\nd/f: file 644 \"\"");
    check(tar().symlink("s", "/etc").file("s", "x").end(), "s: file 644 \"x\"");
    check(
        tar().dir("d", 0o755).file("d/e/f", "").file("d", "").file("d2", "").end(),
        "d: file 644 \"\"\nd2: file 644 \"\"",
    );
    check(
        tar().file("a/f", "").symlink("a", "b").file("a/f", "x").end(),
        "a: -> b\nb: dir 755\nb/f: file 644 \"x\"\nimplicit b",
    );
    // Deeper than there are file descriptors.
    let deep = "d/".repeat(2000);
    check(tar().file(&format!("{deep}f"), "").file("d", "x").end(), "d: file 644 \"x\"");
}

#[test]
fn hard_links() {
    check(tar().file("a", "x").hard_link("b", "a").end(), "a: file 644 \"x\"\nb: file 644 \"x\"");
    check(
        tar().file("a", "x").hard_link("d/b", "/a").end(),
        "a: file 644 \"x\"\nd: dir 755\nd/b: file 644 \"x\"\nimplicit d",
    );
    check(tar().file("a", "x").hard_link("b", "../../a").end(), "a: file 644 \"x\"\nb: file 644 \"x\"");
    check(tar().file("a", "x").hard_link("a", "a").end(), "a: file 644 \"x\"");
    check(
        tar().file("a", "x").file("b", "y").hard_link("b", "a").end(),
        "a: file 644 \"x\"\nb: file 644 \"x\"",
    );
    check(
        tar().symlink("s", "/etc/passwd").hard_link("h", "s").end(),
        "h: -> /etc/passwd\ns: -> /etc/passwd",
    );
    check(
        tar().file("d/a", "x").symlink("s", "d").hard_link("b", "s/a").end(),
        "b: file 644 \"x\"\nd: dir 755\nd/a: file 644 \"x\"\ns: -> d\nimplicit d",
    );
    check(tar().dir("d", 0o755).hard_link("h", "d").end(), "error: entry \"h\": hard link to a directory");
    check(tar().hard_link("h", "/").end(), "error: entry \"h\": hard link to the root directory");
    check(tar().hard_link("h", "../../../etc/passwd").end(), "lower h = etc/passwd");
    check(tar().hard_link("h", "x/y").hard_link("i", "h").end(), "lower h = x/y\nlower i = x/y");
    check(tar().hard_link("h", "x").file("h", "y").end(), "h: file 644 \"y\"");
    check(tar().file("h", "y").hard_link("h", "x").end(), "lower h = x");
    check(tar().file(".wh.x", "").hard_link("h", "x").end(), "x: whiteout\nlower h = x");

    let base =
        || tar().entry(Entry { mode: 0o4755, uid: 3, ..plain("a", Kind::File) }).file("d/b", "b").end();
    check_image(
        &[base(), tar().hard_link("h", "a").end()],
        "a: file 4755 \"\" 3:0\nd: dir 755\nd/b: file 644 \"b\"\nh: file 4755 \"\" 3:0",
    );
    check_image(
        &[base(), tar().hard_link("e/h", "d/b").end(), tar().hard_link("i", "e/h").end()],
        "a: file 4755 \"\" 3:0\nd: dir 755\nd/b: file 644 \"b\"\ne: dir 755\ne/h: file 644 \"b\"\ni: file 644 \"b\"",
    );
    check_image(
        &[base(), tar().hard_link("h", "a").end(), tar().file(".wh.h", "").file(".wh.a", "").end()],
        "d: dir 755\nd/b: file 644 \"b\"",
    );
    check_image(
        &[base(), tar().hard_link("a", "d/b").end()],
        "a: file 644 \"b\"\nd: dir 755\nd/b: file 644 \"b\"",
    );
    let bench = Bench::new();
    let lonely = tar().hard_link("h", "gone").end();
    ingest(&bench.store, &lonely, &Digest::of(&lonely)).unwrap();
    let id = Digest::of(&lonely);
    let (m, c) =
        super::manifest(&[(id, lonely.len() as u64)], &[id], "application/vnd.oci.image.layer.v1.tar");
    let error = bench.store.commit_image("x", &m, crate::image::OCI_MANIFEST, &c, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("layer {id} has a hard link \"h\" to \"gone\", which neither it nor a layer below has")
    );
}

#[test]
fn parents_that_only_a_lower_layer_describes() {
    let base = || {
        tar()
            .dir("./", 0o755)
            .entry(Entry { mode: 0o700, uid: 9, ..plain("d", Kind::Dir) })
            .dir("d/e", 0o711)
            .end()
    };
    let use_it = || tar().file("d/e/f", "x").end();
    check_image(&[base(), use_it()], "d: dir 700 9:0\nd/e: dir 711\nd/e/f: file 644 \"x\"");
    check_image(
        &[base(), tar().dir("d", 0o750).end(), use_it()],
        "d: dir 750\nd/e: dir 711\nd/e/f: file 644 \"x\"",
    );
    check_image(&[base(), use_it(), tar().file("d/e/.wh.f", "").end()], "d: dir 700 9:0\nd/e: dir 711");
    check_image(&[base(), tar().file(".wh.d", "").file("d/n", "").end()], "d: dir 755\nd/n: file 644 \"\"");
    check_image(&[base(), use_it(), tar().file(".wh.d", "").end()], "");
    // A link in a lower layer is hidden by a real directory, as overlay unpackers do.
    check_image(
        &[tar().dir("real", 0o755).symlink("s", "real").end(), tar().file("s/in", "x").end()],
        "real: dir 755\ns: dir 755\ns/in: file 644 \"x\"",
    );
    // The root of the image is the one that a layer describes.
    let bench = Bench::new();
    let image = bench.image("x", &[tar().dir("./", 0o711).end(), tar().file("f", "").end()]);
    let target = bench.path("mnt");
    std::fs::create_dir(&target).unwrap();
    for upper in [None, Some((bench.path("u"), bench.path("w")))] {
        if let Some((u, w)) = &upper {
            std::fs::create_dir(u).unwrap();
            std::fs::create_dir(w).unwrap();
        }
        bench.store.mount_rootfs(&image, upper.as_ref().map(|(u, w)| (&**u, &**w)), &target).unwrap();
        assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o7777, 0o711);
        bench.store.unmount_rootfs(&target).unwrap();
    }
}

#[test]
fn devices_fifos_and_attributes() {
    let device =
        |kind, major, minor| Entry { device: (major, minor), mode: 0o620, uid: 1, ..plain("n", kind) };
    check(tar().entry(device(Kind::Char, 1, 3)).end(), "n: char 620 1:3 1:0");
    check(tar().entry(device(Kind::Block, 8, 0)).end(), "n: block 620 8:0 1:0");
    check(tar().entry(device(Kind::Fifo, 0, 0)).end(), "n: fifo 620 1:0");
    check(
        tar().entry(device(Kind::Char, 4096, 0)).end(),
        "error: entry \"n\": device number 4096:0 is out of range",
    );
    check(
        tar().entry(device(Kind::Block, 0, 1 << 20)).end(),
        "error: entry \"n\": device number 0:1048576 is out of range",
    );

    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let names: [(&str, &[u8]); 7] = [
        ("user.x", b"1"),
        ("security.capability", &capability),
        ("trusted.overlay.redirect", b"/etc"),
        ("trusted.other", b"1"),
        ("user.overlay.opaque", b"y"),
        ("security.selinux", b"x"),
        ("unknown.x", b"1"),
    ];
    let xattrs: Vec<_> = names.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.to_vec())).collect();
    let file = Entry { xattrs: xattrs.clone(), uid: 5, mode: 0o755, ..plain("f", Kind::File) };
    let dir = Entry { xattrs, uid: 5, mode: 0o755, ..plain("d", Kind::Dir) };
    let bench = Bench::new();
    let layer = tar().entry(file).end();
    assert_eq!(
        result(&bench, &layer),
        "f: file 755 \"\" 5:0\ndropped 5 extended attribute that an image may not set"
    );
    let fs = std::fs::File::open(unsynced(&bench, &Digest::of(&layer))).unwrap();
    let mut kept = keel_sys::xattr::llist_at(&fs, c"f").unwrap();
    kept.sort();
    assert_eq!(kept, [c"security.capability".to_owned(), c"user.x".to_owned()]);
    // Capabilities are for files; the kernel takes them nowhere else. Overlay's are gone before it is asked.
    check(
        tar().entry(Entry { xattrs: vec![(b"trusted.overlay.opaque".to_vec(), b"y".to_vec())], ..dir }).end(),
        "d: dir 755 5:0\ndropped 1 extended attribute that an image may not set",
    );
    let huge = vec![(b"user.x".to_vec(), vec![b'x'; 60_000])];
    check(
        tar().entry(Entry { xattrs: huge, ..plain("f", Kind::File) }).end(),
        "error: entry \"f\": extended attribute user.x does not fit the file system",
    );
}

#[test]
fn extension_headers() {
    let fail = |what: &str| format!("error: invalid tar header at byte {what}");
    let long = "l".repeat(150);
    let link =
        typed(typed(tar(), b'L', "././@LongLink", long.as_bytes()), b'K', "././@LongLink", b"target\0");
    check(link.symlink("short", "x").end(), &format!("{long}: -> target"));
    // PAX wins over GNU, and its size is for the file, not for the headers in between.
    let both = pax(tar(), &[("path", "p"), ("size", "3")]);
    check(
        patched(typed(both, b'L', "x", b"gnu"), plain("f", Kind::File), b"abc", |b| b[124..135].fill(b'0'))
            .end(),
        "p: file 644 \"abc\"",
    );
    check(
        pax(tar(), &[("uid", "70000000"), ("gid", "1"), ("mtime", "-1.5"), ("comment", "x=y")])
            .file("f", "")
            .end(),
        "f: file 644 \"\" 70000000:1",
    );
    check(pax(tar(), &[("path", "")]).file("f", "").end(), "f: file 644 \"\"");
    check(pax(tar(), &[("uid", "x")]).file("f", "").end(), &fail("0: PAX: malformed value of uid"));
    check(pax(tar(), &[("size", "-1")]).file("f", "").end(), &fail("0: PAX: malformed value of size"));
    for (bytes, problem) in [
        (&b"99 path=x\n"[..], "record has the wrong length"),
        (b"10 path=xx", "record has the wrong length"),
        (b"path=x\n", "record without a length"),
        (b"x path=x\n", "malformed length"),
        (b"8 pathx\n", "record without a value"),
        (b"0 \n", "record has the wrong length"),
    ] {
        check(typed(tar(), b'x', "pax", bytes).file("f", "").end(), &fail(&format!("0: PAX: {problem}")));
    }
    check(
        pax(pax(tar(), &[("path", "a")]), &[("path", "b")]).file("f", "").end(),
        &fail("1024: two PAX headers before one entry"),
    );
    check(pax(tar(), &[("path", "a")]).end(), &fail("1024: extension header without an entry"));
    check(typed(tar(), b'g', "global", b"18 comment=abcdef\n").file("f", "").end(), "f: file 644 \"\"");
    let many = (0..17).fold(tar(), |tar, _| typed(tar, b'L', "x", b"name"));
    check(many.file("f", "").end(), &fail("16384: too many extension headers before one entry"));
    let big = vec![b'x'; (1 << 20) + 1];
    check(
        typed(tar(), b'L', "x", &big).file("f", "").end(),
        &fail("0: extension headers of one entry are longer than 1 MiB"),
    );
}

#[test]
fn headers() {
    let fail = |what: &str| format!("error: invalid tar header at byte {what}");
    let mut broken = tar().file("f", "x").end();
    broken[0] ^= 1;
    check(broken, &fail("0: wrong checksum"));
    let signed = |block: &mut [u8]| block[1] = 0xff;
    let mut layer = patched(tar(), plain("fx", Kind::File), b"", signed).end();
    let sum: i64 = layer[..512]
        .iter()
        .enumerate()
        .map(|(i, &b)| if (148..156).contains(&i) { 32 } else { i64::from(b as i8) })
        .sum();
    layer[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    check(layer, "f\\xff: file 644 \"\"");
    check(
        tar().file("f", "xyz").bytes[..514].to_vec(),
        "error: archive ends in the middle of an entry (at byte 514)",
    );
    check(
        tar().file("f", "x").bytes[..100].to_vec(),
        "error: archive ends in the middle of an entry (at byte 100)",
    );
    // What fills up the last block may be missing, as in layers that `umoci insert` writes.
    for len in [513, 700, 1023] {
        check(tar().file("f", "x").bytes[..len].to_vec(), "f: file 644 \"x\"");
    }
    check([vec![0; 512], tar().file("f", "").end()].concat(), &fail("0: a lone zero block"));
    check([tar().file("f", "1").bytes, vec![0; 512]].concat(), "f: file 644 \"1\"");
    // What follows the end mark belongs to the digest and to nothing else.
    check([tar().file("f", "1").end(), tar().file("g", "2").end()].concat(), "f: file 644 \"1\"");
    let base256 = |block: &mut [u8]| {
        block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
        block[136..148].copy_from_slice(&[0xff; 12]);
    };
    check(patched(tar(), plain("f", Kind::File), b"abc", base256).end(), "f: file 644 \"abc\"");
    let negative = |block: &mut [u8]| block[124..136].copy_from_slice(&[0xff; 12]);
    check(patched(tar(), plain("f", Kind::File), b"", negative).end(), &fail("0: negative size"));
    let huge = |block: &mut [u8]| {
        block[124..136]
            .copy_from_slice(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
    };
    check(patched(tar(), plain("f", Kind::File), b"", huge).end(), &fail("0: malformed size"));
    check(
        patched(tar(), plain("f", Kind::File), b"", |b| b[100..107].copy_from_slice(b"rwxr-xr")).end(),
        &fail("0: malformed mode"),
    );
    check(
        patched(tar(), plain("f", Kind::File), b"", |b| b[345..350].copy_from_slice(b"pre/x")).end(),
        "pre: dir 755\npre/x: dir 755\npre/x/f: file 644 \"\"\nimplicit pre pre/x",
    );
    let gnu = |b: &mut [u8]| {
        b[257..265].copy_from_slice(b"ustar  \0");
        b[345..350].copy_from_slice(b"times");
    };
    check(patched(tar(), plain("f", Kind::File), b"", gnu).end(), "f: file 644 \"\"");
}

#[test]
fn sparse_files() {
    let fail = |what: &str| format!("error: invalid tar header at byte {what}");
    let content = |layer: Vec<u8>| {
        let bench = Bench::new();
        ingest(&bench.store, &layer, &Digest::of(&layer)).unwrap();
        let path = unsynced(&bench, &Digest::of(&layer)).join("f");
        let m = std::fs::metadata(&path).unwrap();
        (std::fs::read(&path).unwrap(), m.blocks() * 512)
    };
    let mut expected = vec![0; 1 << 20];
    expected[65536..65539].copy_from_slice(b"abc");
    expected[1_000_000..1_000_003].copy_from_slice(b"def");
    let map = "65536,3,1000000,3";
    let v00 = [
        ("GNU.sparse.size", "1048576"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.offset", "65536"),
        ("GNU.sparse.numbytes", "3"),
        ("GNU.sparse.offset", "1000000"),
        ("GNU.sparse.numbytes", "3"),
    ];
    let v01 = [("GNU.sparse.size", "1048576"), ("GNU.sparse.map", map), ("GNU.sparse.name", "f")];
    let v10 = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.realsize", "1048576"),
        ("GNU.sparse.name", "f"),
    ];
    let mut with_map = b"2\n65536\n3\n1000000\n3\n".to_vec();
    with_map.resize(512, 0);
    with_map.extend_from_slice(b"abcdef");
    let sized = [("size", "518")].into_iter().chain(v10).collect::<Vec<_>>();
    let old = |b: &mut [u8]| {
        b[156] = b'S';
        b[257..265].copy_from_slice(b"ustar  \0");
        for (i, n) in [65536u64, 3, 1_000_000, 3].into_iter().enumerate() {
            b[386 + i * 12..386 + i * 12 + 11].copy_from_slice(format!("{n:011o}").as_bytes());
        }
        b[483..494].copy_from_slice(format!("{:011o}", 1 << 20).as_bytes());
    };
    for layer in [
        pax(tar(), &v00).file("f", "abcdef"),
        pax(tar(), &v01).file("GNUSparseFile.0/f", "abcdef"),
        typed(pax(tar(), &v10), b'0', "GNUSparseFile.0/f", &with_map),
        typed(pax(tar(), &sized), b'0', "GNUSparseFile.0/f", &with_map),
        patched(tar(), plain("f", Kind::File), b"abcdef", old),
    ] {
        let (bytes, on_disk) = content(layer.file("after", "x").end());
        assert!(bytes == expected && on_disk < 100_000, "{on_disk}");
    }
    let sparse = |map: &str| {
        pax(tar(), &[("GNU.sparse.size", "100"), ("GNU.sparse.map", map)]).file("f", "abcdef").end()
    };
    check(sparse("50,3,40,3"), &fail("1024: sparse regions out of order or range"));
    check(sparse("0,3,98,3"), &fail("1024: sparse regions out of order or range"));
    check(sparse("0,3,18446744073709551615,3"), &fail("1024: sparse regions out of order or range"));
    check(sparse("0,3"), &fail("1024: sparse map covers 3 bytes of 6"));
    check(sparse("0,3,50"), &fail("1024: malformed sparse map"));
    let many = "0,0,".repeat(10_001);
    check(sparse(&many), &fail("0: PAX: malformed value of GNU.sparse.map"));
    let endless = |b: &mut [u8]| {
        b[156] = b'S';
        b[482] = 1;
    };
    let mut blocks = vec![0; 512 * 3];
    blocks[504] = 1;
    check(
        [patched(tar(), plain("f", Kind::File), b"", endless).bytes, blocks].concat(),
        &fail("512: empty sparse map block"),
    );
    // Long runs of zeros become holes without anybody asking.
    let mut zeros = vec![0; 8 << 20];
    zeros[5 << 20] = 1;
    let (bytes, on_disk) = content(tar().with(plain("f", Kind::File), &zeros).end());
    assert!(bytes == zeros && on_disk < 1 << 20, "{on_disk}");
}

#[test]
fn bounds() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { max_layer_entries: 3, max_layer_bytes: 1 << 20, ..Options::default() };
    let store = Store::open_with(&dir.path().join("root"), options).unwrap();
    let fail = |tar: Vec<u8>| chain(&ingest(&store, &tar, &Digest::of(&tar)).unwrap_err());
    let four = tar().file("a", "").file("b", "").file("c", "").file("d", "").end();
    assert!(fail(four).ends_with("layer has more than 3 entries"));
    let big = tar().with(plain("f", Kind::File), &vec![1; 2 << 20]).end();
    assert!(fail(big).ends_with("layer inflates to more than 1048576 bytes"));
    let options = Options { max_ratio: 100, ratio_from: 1 << 20, ..Options::default() };
    let wary = Store::open_with(&dir.path().join("wary"), options).unwrap();
    let zeros = |len| {
        let tar = tar().with(plain("f", Kind::File), &vec![0; len]).end();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &tar).unwrap();
        (gzip.finish().unwrap(), Digest::of(&tar))
    };
    let (bomb, id) = zeros(4 << 20);
    let refused = chain(&ingest(&wary, &bomb, &id).unwrap_err());
    assert!(refused.ends_with("layer inflates to more than 100 times its size"), "{refused}");
    let (small, id) = zeros(1 << 19);
    ingest(&wary, &small, &id).unwrap();
    let options = Options { max_layer_cpu: std::time::Duration::ZERO, ..Options::default() };
    let hasty = Store::open_with(&dir.path().join("hasty"), options).unwrap();
    let many = (0..8192).fold(tar().file("a", ""), |tar, _| tar.hard_link("a", "a")).end();
    let refused = chain(&ingest(&hasty, &many, &Digest::of(&many)).unwrap_err());
    assert!(refused.contains("more than 0 s of processor time"), "{refused}");
    for magic in [&b"BZh91AY"[..], b"\xfd7zXZ\0\0"] {
        assert!(fail(magic.to_vec()).contains("only gzip, zstd and no compression are OCI layers"));
    }
    assert_eq!(listing(&store.inner.layers_dir()), "");
}

#[test]
fn deep_paths_cost_no_descriptors() {
    let exe = std::env::current_exe().unwrap();
    let name = "tests::corpus::types_change_and_the_last_entry_wins";
    let out = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 40; exec \"$0\" --exact \"$1\""])
        .arg(exe)
        .arg(name)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
}

/// Random damage to real archives: any result will do but a panic, a hang, or a file outside. The seed is fixed;
/// `KEEL_FUZZ_ROUNDS` asks for more.
#[test]
fn damaged_archives_harm_nobody() {
    let rounds: u64 = std::env::var("KEEL_FUZZ_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let whole = pax(tar(), &[("path", "pax/name"), ("SCHILY.xattr.user.x", "1"), ("mtime", "5.25")])
        .file("short", "content")
        .dir("d", 0o1777)
        .symlink("d/up", "../..")
        .file("d/up/through", "x")
        .hard_link("link", "pax/name")
        .file("d/.wh.gone", "")
        .file(".wh..wh..opq", "");
    let whole =
        pax(whole, &[("GNU.sparse.size", "100000"), ("GNU.sparse.map", "5,3,90000,3")]).file("s", "abcdef");
    let whole = typed(whole, b'L', "././@LongLink", b"gnu/long/name").entry(plain("x", Kind::Fifo)).end();
    let dir = tempfile::tempdir().unwrap();
    let options = Options { max_layer_entries: 1000, max_layer_bytes: 1 << 24, ..Options::default() };
    let store = Store::open_with(&dir.path().join("root"), options).unwrap();
    let mut random = 12_345u64;
    let mut next = |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % n
    };
    let mut good = 0;
    for _ in 0..rounds {
        let mut bytes = whole.clone();
        for _ in 0..=next(4) {
            let at = next(bytes.len());
            bytes[at] = [0, b'/', b'.', b'1', b'9', 0xff, b'5', b'='][next(8)];
        }
        if next(8) == 0 {
            bytes.truncate(next(bytes.len()));
        }
        // Without right checksums nothing behind the header would ever be reached.
        for block in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
            block[148..156].copy_from_slice(b"        ");
            let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
            block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        }
        let id = Digest::of(&bytes);
        if ingest(&store, &bytes, &id).is_ok() {
            good += 1;
            let fs = store.inner.state().layers.remove(&id).unwrap();
            crate::fsio::remove_tree(&fs).unwrap();
        }
    }
    assert!(good > 0 && good < rounds, "{good} of {rounds}");
    assert_eq!(listing(&store.inner.layers_dir()), "");
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["root"]);
}
