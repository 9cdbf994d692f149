//! Images to and from other tools: what we push or save they take, what they push or save we run, digests kept.

use std::fs;
use std::process::Command;

use keel_tests::Instance;
use keel_tests::image::{BUSYBOX, architecture, run};
use keel_tests::layout::{Layer, Layout, Packing};
use keel_tests::manifest::sleeper;
use keel_tests::registry::Registry;

use crate::callers::{Containerd, Docker, Podman, missing, work};

/// A pod that only ever uses what is in the store.
fn never(name: &str, image: &str) -> String {
    sleeper(name).replace(BUSYBOX, image).replace("    command", "    imagePullPolicy: Never\n    command")
}

fn content() -> [Layer; 2] {
    [Layer::busybox(Packing::Gzip), Layer::files(Packing::Gzip, &[("mark", "here")])]
}

/// An index of this machine's image and one for another kind; gives its digest and this machine's.
fn multi() -> (Layout, String, String) {
    let mut layout = Layout::new();
    let own = layout.image(None, architecture(), &content());
    let other = if architecture() == "arm64" { "amd64" } else { "arm64" };
    let foreign = layout.image(None, other, &[Layer::files(Packing::Gzip, &[("mark", "foreign")])]);
    let index = layout.index("multi", &[(architecture(), &own), (other, &foreign)]);
    (layout, index, own)
}

fn digest_of(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    format!("sha256:{}", keel_tests::image::sha256(file.path()))
}

/// What a registry has under a name, by skopeo.
fn digest_in_registry(reference: &str) -> String {
    let mut command = Command::new("skopeo");
    command.args(["inspect", "--raw", "--tls-verify=false", &format!("docker://{reference}")]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    digest_of(&output.stdout)
}

fn runs(instance: &Instance, name: &str, image: &str) {
    instance.apply(&never(name, image)).expect_code(0);
    assert_eq!(instance.keel(&["exec", name, "--", "cat", "/mark"]).expect_code(0).stdout, "here", "{image}");
}

#[test]
fn an_index_goes_from_us_to_skopeo_podman_and_containerd_with_its_digest() {
    if missing(&["skopeo", "podman", "containerd"]) {
        return;
    }
    let registry = Registry::start();
    let (layout, index, own) = multi();
    let source = registry.push_layout(&layout, "multi", "app/multi:1");
    let instance = Instance::new();
    let pulled = instance.keel(&["image", "pull", "--all-platforms", &source]).expect_code(0);
    assert!(pulled.all().contains(&index), "{}", pulled.all());
    let target = format!("{}/moved/multi:2", registry.address);
    let pushed = instance.keel(&["image", "push", &source, &target]).expect_code(0);
    assert!(pushed.all().contains(&index), "{}", pushed.all());
    assert_eq!(digest_in_registry(&target), index);

    let dir = instance.path().join("all");
    run(Command::new("skopeo").args([
        "copy",
        "-q",
        "--all",
        "--preserve-digests",
        "--insecure-policy",
        "--src-tls-verify=false",
        &format!("docker://{target}"),
        &format!("dir:{}", dir.display()),
    ]));
    assert_eq!(digest_of(&fs::read(dir.join("manifest.json")).unwrap()), index);

    let podman = Podman { dir: work() };
    podman.ok(&["pull", "-q", "--tls-verify=false", &target]);
    let digests = podman.ok(&["image", "inspect", "--format", "{{.RepoDigests}}", &target]);
    assert!(digests.contains(&index) && digests.contains(&own), "{digests}");

    let dir = work();
    let containerd = Containerd::start(dir.path());
    containerd.ok(&["images", "pull", "--plain-http", "--all-platforms", &target]);
    let listed = containerd.ok(&["images", "ls", &format!("name=={target}")]);
    assert!(listed.contains(&index), "{listed}");
}

#[test]
fn an_index_comes_from_containerd_and_podman_to_us_with_its_digest() {
    if missing(&["skopeo", "podman", "containerd"]) {
        return;
    }
    let registry = Registry::start();
    let (layout, index, own) = multi();
    let source = registry.push_layout(&layout, "multi", "app/multi:1");
    let at = |name: &str| format!("{}/from/{name}:1", registry.address);
    let dir = work();
    let containerd = Containerd::start(dir.path());
    containerd.ok(&["images", "pull", "--plain-http", "--all-platforms", &source]);
    containerd.ok(&["images", "push", "--plain-http", &at("containerd"), &source]);
    let podman = Podman { dir: work() };
    podman.ok(&["manifest", "create", "list"]);
    podman.ok(&["manifest", "add", "--all", "--tls-verify=false", "list", &format!("docker://{source}")]);
    podman.ok(&[
        "manifest",
        "push",
        "--all",
        "--tls-verify=false",
        "list",
        &format!("docker://{}", at("podman")),
    ]);

    for name in ["containerd", "podman"] {
        let instance = Instance::new();
        instance.keel(&["image", "pull", "--all-platforms", &at(name)]).expect_code(0);
        let seen = instance.keel(&["image", "inspect", &at(name)]).expect_code(0).json();
        // podman writes an index of its own.
        let expected = if name == "podman" { digest_in_registry(&at(name)) } else { index.clone() };
        assert_eq!(seen["index"]["digest"], expected.as_str(), "{name}");
        assert_eq!(seen["digest"], own.as_str(), "{name}");
        assert_eq!(seen["platforms"].as_array().unwrap().len(), 2, "{name}");
        runs(&instance, "web", &at(name));
    }
}

#[test]
fn an_archive_of_an_index_keeps_all_platforms_both_ways() {
    if missing(&["skopeo", "podman", "containerd"]) {
        return;
    }
    let (layout, index, _) = multi();
    let at = |dir: &std::path::Path, name: &str| dir.join(name).display().to_string();
    let dir = work();
    // skopeo's name of an index in an archive is the one that it is given.
    let theirs = at(dir.path(), "skopeo.tar");
    run(Command::new("skopeo").args([
        "copy",
        "-q",
        "--all",
        "--insecure-policy",
        &format!("oci:{}:multi", layout.path().display()),
        &format!("oci-archive:{theirs}:example.com/app/multi:1"),
    ]));
    let instance = Instance::new();
    let image = "example.com/app/multi:1";
    let imported = instance.keel(&["image", "import", &theirs]).expect_code(0);
    assert!(imported.all().contains(&index), "{}", imported.all());
    let ours = at(instance.path(), "ours.tar");
    instance.keel(&["image", "save", image, "-o", &ours]).expect_code(0);

    let all = at(dir.path(), "all");
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "-q", "--all", "--preserve-digests", "--insecure-policy"]);
    run(skopeo.args([format!("oci-archive:{ours}:{image}"), format!("dir:{all}")]));
    assert_eq!(digest_of(&fs::read(format!("{all}/manifest.json")).unwrap()), index);
    let podman = Podman { dir: work() };
    podman.ok(&["load", "-q", "-i", &ours]);
    assert!(podman.ok(&["images", "--format", "{{.Repository}}:{{.Tag}}"]).contains(image));

    let containerd = Containerd::start(dir.path());
    containerd.ok(&["images", "import", "--all-platforms", &ours]);
    let listed = containerd.ok(&["images", "ls", &format!("name=={image}")]);
    assert!(listed.contains(&index), "{listed}");
    let exported = at(dir.path(), "containerd.tar");
    containerd.ok(&["images", "export", "--all-platforms", &exported, image]);
    // One platform of it, with the index that names both: that one is what there is.
    let one = at(dir.path(), "one.tar");
    containerd.ok(&["images", "export", &one, image]);

    for (file, whole) in [(&exported, true), (&ours, true), (&one, false)] {
        let other = Instance::new();
        other.keel(&["image", "import", file]).expect_code(0);
        let seen = other.keel(&["image", "inspect", image]).expect_code(0).json();
        assert_eq!(seen["index"]["digest"] == index.as_str(), whole, "{file}");
        runs(&other, "web", image);
    }
}

#[test]
fn what_an_index_lost_for_another_platform_is_brought_back_by_a_repair() {
    if missing(&["skopeo"]) {
        return;
    }
    let registry = Registry::start();
    let (layout, index, _) = multi();
    let image = registry.push_layout(&layout, "multi", "app/multi:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", "-a", &image]).expect_code(0);
    let seen = instance.keel(&["image", "inspect", &image]).expect_code(0).json();
    let own = seen["layers"][0]["blob_digest"].as_str().unwrap().to_owned();
    let members = seen["index"]["manifests"].as_array().unwrap();
    let blobs = members.iter().flat_map(|member| member["blobs"].as_array().unwrap());
    let foreign = blobs
        .filter(|blob| blob["mediaType"].as_str().unwrap().contains(".layer."))
        .map(|blob| blob["digest"].as_str().unwrap().to_owned())
        .find(|digest| seen["layers"].as_array().unwrap().iter().all(|l| l["blob_digest"] != digest.as_str()))
        .unwrap();
    let path = |digest: &str| instance.root().join("blobs").join(digest.replace(':', "/"));
    let good = fs::read(path(&foreign)).unwrap();
    fs::write(path(&foreign), vec![0; good.len()]).unwrap();
    fs::remove_file(path(&index)).unwrap();
    let found = instance.keel(&["image", "verify"]).expect_code(1);
    assert!(found.stdout.contains(&foreign), "{}", found.all());
    let repaired = instance.keel(&["image", "verify", "--repair"]).expect_code(0);
    assert!(repaired.stdout.contains(&format!("pulled again {image}")), "{}", repaired.all());
    assert_eq!(fs::read(path(&foreign)).unwrap(), good);
    assert!(path(&index).exists());
    assert!(path(&own).exists());
    let seen = instance.keel(&["image", "inspect", &image]).expect_code(0).json();
    assert_eq!(seen["index"]["digest"], index.as_str());
    assert_eq!(instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout, format!("{image}\n"));
    // Listed wide, it has two platforms, and they take space.
    let wide = instance.keel(&["image", "ls", "-o", "wide"]).expect_code(0).stdout;
    assert!(wide.lines().nth(1).unwrap().trim_end().ends_with('2'), "{wide}");
    let used = instance.keel(&["image", "du", "-o", "json"]).expect_code(0).json();
    assert!(used["images"][0]["otherPlatformsBytes"].as_u64() > Some(100), "{used}");
}

#[test]
fn what_we_save_docker_and_containerd_load() {
    if missing(&["containerd", "dockerd", "docker", "skopeo"]) {
        return;
    }
    let registry = Registry::start();
    let (layout, digest) = Layout::of("one", &content());
    let image = registry.push_layout(&layout, "one", "app/one:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    let dir = work();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for (format, file) in [("oci-archive", "oci.tar"), ("docker-archive", "docker.tar")] {
        instance.keel(&["image", "save", &image, "--format", format, "-o", &at(file)]).expect_code(0);
    }
    let containerd = Containerd::start(dir.path());
    containerd.ok(&["images", "import", &at("oci.tar")]);
    let listed = containerd.ok(&["images", "ls", &format!("name=={image}")]);
    assert!(listed.contains(&digest), "{listed}");
    containerd.ok(&["images", "export", &at("from-containerd.tar"), &image]);
    containerd.ok(&["images", "rm", "--sync", &image]);
    containerd.ok(&["images", "import", &at("docker.tar")]);
    assert!(containerd.ok(&["images", "ls", "-q"]).contains(&image));

    let docker = Docker::start(dir.path(), &containerd);
    docker.ok(&["load", "-q", "-i", &at("docker.tar")]);
    let config = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &image]);
    let ours = instance.keel(&["image", "inspect", &image]).expect_code(0).json();
    assert_eq!(ours["configDigest"], config.as_str());

    // And back again, as docker writes it.
    docker.ok(&["save", "-o", &at("from-docker.tar"), &image]);
    for file in ["from-docker.tar", "from-containerd.tar"] {
        let other = Instance::new();
        other.keel(&["image", "import", &at(file)]).expect_code(0);
        let seen = other.keel(&["image", "inspect", &image]).expect_code(0).json();
        assert_eq!(seen["configDigest"], config.as_str(), "{file}");
        runs(&other, "web", &image);
    }
}

#[test]
fn what_podman_saves_in_any_format_we_run() {
    if missing(&["podman", "skopeo"]) {
        return;
    }
    let registry = Registry::start();
    let (layout, _) = Layout::of("one", &content());
    let image = registry.push_layout(&layout, "one", "app/one:1");
    let podman = Podman { dir: work() };
    podman.ok(&["pull", "-q", "--tls-verify=false", &image]);
    let config = format!("sha256:{}", podman.ok(&["image", "inspect", "--format", "{{.Id}}", &image]));
    for format in ["oci-archive", "docker-archive", "oci-dir"] {
        let file = podman.dir.path().join(format).display().to_string();
        podman.ok(&["save", "-q", "--format", format, "-o", &file, &image]);
        let instance = Instance::new();
        let imported = instance.keel(&["image", "import", &file]).expect_code(0);
        let name = imported.all().split_whitespace().find(|word| word.contains('/')).unwrap().to_owned();
        let name = name.trim_end_matches(':');
        let seen = instance.keel(&["image", "inspect", name]).expect_code(0).json();
        assert_eq!(seen["configDigest"], config.as_str(), "{format}");
        runs(&instance, "web", name);
    }
}

#[test]
fn what_skopeo_pushes_in_every_format_we_run() {
    if missing(&["skopeo"]) {
        return;
    }
    let (gzip, _) = Layout::of("x", &content());
    let plain = content().map(|layer| layer.packed(Packing::Plain));
    let (plain, _) = Layout::of("x", &plain);
    let gzip = format!("oci:{}:x", gzip.path().display());
    let plain = format!("oci:{}:x", plain.path().display());
    let instance = Instance::new();
    for (name, source, options, layers) in [
        ("v2s2", &gzip, &["--format", "v2s2"][..], "docker.image.rootfs.diff.tar.gzip"),
        ("oci", &gzip, &["--format", "oci"], "tar+gzip"),
        ("zstd", &gzip, &["--format", "oci", "--dest-compress-format", "zstd"], "tar+"),
        ("chunked", &plain, &["--format", "oci", "--dest-compress-format", "zstd:chunked"], "tar+zstd"),
        ("zstd-of-plain", &plain, &["--format", "oci", "--dest-compress-format", "zstd"], "tar+zstd"),
        ("plain", &plain, &["--preserve-digests"], "layer.v1.tar"),
    ] {
        // skopeo takes a layer that the registry has in another packing for the same.
        let registry = Registry::start();
        let image = registry.copy(source, &format!("app/{name}:1"), options);
        instance.keel(&["image", "pull", &image]).expect_code(0);
        let seen = instance.keel(&["image", "inspect", &image]).expect_code(0).json();
        assert_eq!(seen["digest"], digest_in_registry(&image).as_str(), "{name}");
        let media_type = seen["layers"][0]["media_type"].as_str().unwrap();
        assert!(media_type.contains(layers), "{name}: {media_type}");
        runs(&instance, name, &image);
    }
}
