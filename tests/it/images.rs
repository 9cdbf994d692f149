//! Images from real registries and archives, as a user meets them.

use std::fs;
use std::process::Command;

use keel_tests::image::{self, BUSYBOX, architecture, run};
use keel_tests::layout::{Layer, Layout, Packing};
use keel_tests::manifest::sleeper;
use keel_tests::registry::{Access, Registry};
use keel_tests::{Instance, eventually_or};

/// Busybox and a file, each packed its own way.
fn mixed() -> (Layout, String) {
    Layout::of(
        "mixed",
        &[
            Layer::busybox(Packing::Gzip),
            Layer::files(
                Packing::Zstd,
                &[("zstd.txt", "from zstd"), ("dir/gone.txt", "x"), ("old/inside", "x")],
            ),
            Layer::files(
                Packing::Plain,
                &[("plain.txt", "from plain"), ("dir/.wh.gone.txt", ""), (".wh.old", "")],
            ),
        ],
    )
}

fn of(name: &str, image: &str) -> String {
    sleeper(name).replace(BUSYBOX, image)
}

fn with_policy(name: &str, image: &str, policy: &str) -> String {
    of(name, image).replace("    command", &format!("    imagePullPolicy: {policy}\n    command"))
}

fn config(instance: &Instance, text: &str) -> Vec<String> {
    let path = instance.path().join("config.yaml");
    fs::write(&path, text).unwrap();
    vec!["--config".into(), path.to_str().unwrap().into()]
}

#[test]
fn gzip_zstd_and_plain_layers_are_one_root_and_whiteouts_are_absence() {
    let registry = Registry::start();
    let (layout, _) = mixed();
    let image = registry.push_layout(&layout, "mixed", "app/mixed:1");
    let instance = Instance::new();
    instance.apply(&of("web", &image)).expect_code(0);
    let ran = instance.keel(&["exec", "web", "--", "cat", "/zstd.txt", "/plain.txt"]).expect_code(0);
    assert_eq!(ran.stdout, "from zstdfrom plain");
    let gone = instance.keel(&["exec", "web", "--", "ls", "/dir/gone.txt"]);
    assert_eq!(gone.code(), 1, "{}", gone.all());
    let listed = instance.keel(&["exec", "web", "--", "ls", "-a", "/dir", "/"]).expect_code(0).stdout;
    assert!(!listed.contains("old") && !listed.contains(".wh."), "{listed}");
}

#[test]
fn a_digest_in_the_manifest_is_what_runs() {
    let registry = Registry::start();
    let (layout, digest) = mixed();
    registry.push_layout(&layout, "mixed", "app/mixed:1");
    let instance = Instance::new();
    let by_digest = format!("{}/app/mixed@{digest}", registry.address);
    instance.apply(&of("web", &by_digest)).expect_code(0);
    let pod = instance.pod("web");
    let id = pod["status"]["containerStatuses"][0]["imageID"].as_str().unwrap_or_default().to_string();
    assert!(id.ends_with(&digest), "{id}");
    let absent = format!("{}/app/mixed@sha256:{}", registry.address, "0".repeat(64));
    let ran = instance.keel(&["image", "pull", &absent]).expect_code(4);
    assert!(ran.stderr.contains("hint:"), "{}", ran.all());
}

#[test]
fn an_index_gives_the_image_of_this_machine() {
    let registry = Registry::start();
    let mut layout = Layout::new();
    let other = if architecture() == "amd64" { "arm64" } else { "amd64" };
    let foreign = layout.image(None, other, &[Layer::files(Packing::Gzip, &[("arch", "foreign")])]);
    let own = layout.image(
        None,
        architecture(),
        &[Layer::busybox(Packing::Gzip), Layer::files(Packing::Gzip, &[("arch", "own")])],
    );
    layout.index("multi", &[(other, &foreign), (architecture(), &own)]);
    layout.index("foreign", &[(other, &foreign)]);
    let multi = registry.push_layout(&layout, "multi", "app/multi:1");
    let only_foreign = registry.push_layout(&layout, "foreign", "app/foreign:1");
    let instance = Instance::new();
    instance.apply(&of("web", &multi)).expect_code(0);
    assert_eq!(instance.keel(&["exec", "web", "--", "cat", "/arch"]).stdout, "own");
    let refused = instance.apply(&of("bad", &only_foreign)).expect_code(1);
    assert!(refused.all().contains(other) && refused.all().contains("hint:"), "{}", refused.all());
}

#[test]
fn oci_and_docker_schema_2_both_run() {
    let registry = Registry::start();
    let instance = Instance::new();
    let archive = image::busybox_archive_in(instance.path());
    let source = format!("docker-archive:{}", archive.display());
    let docker = registry.copy(&source, "app/docker:1", &["--format", "v2s2"]);
    let oci = registry.copy(&source, "app/oci:1", &["--format", "oci"]);
    instance.apply(&format!("{}---\n{}", of("a", &docker), of("b", &oci))).expect_code(0);
    assert_eq!(instance.pids().len(), 2);
    for (reference, kind) in
        [(&docker, "vnd.docker.distribution.manifest.v2"), (&oci, "vnd.oci.image.manifest.v1")]
    {
        let images = instance.keel(&["image", "inspect", reference, "-o", "json"]).expect_code(0);
        let digest = images.json()["digest"].as_str().unwrap().replace("sha256:", "");
        let manifest = fs::read_to_string(instance.root().join("blobs/sha256").join(digest)).unwrap();
        assert!(manifest.contains(kind), "{manifest}");
    }
}

#[test]
fn a_registry_with_an_authority_of_its_own_is_trusted_once_configured() {
    let registry = Registry::start_with(Access { tls: true, ..Access::default() });
    let (layout, _) = mixed();
    let image = registry.push_layout(&layout, "mixed", "app/mixed:1");
    let instance = Instance::new();
    let config =
        config(&instance, &format!("registries: {{certs_dir: {}}}\n", registry.certs_dir().display()));
    let options: Vec<&str> = config.iter().map(String::as_str).collect();
    let refused = instance.keel(&["image", "pull", &image]);
    assert_eq!(refused.code(), 1, "without the authority: {}", refused.all());
    assert!(refused.stderr.contains("hint:") && refused.stderr.contains("ca.crt"), "{}", refused.all());
    let instance = instance.with(&options);
    instance.keel(&["image", "pull", &image]).expect_code(0);
    instance.apply(&of("web", &image)).expect_code(0);
}

#[test]
fn a_login_is_taken_from_dockers_config() {
    let registry = Registry::start_with(Access { login: Some(("ann", "secret")), ..Access::default() });
    let (layout, _) = mixed();
    let image = registry.push_layout(&layout, "mixed", "app/mixed:1");
    let instance = Instance::new();
    let anonymous = instance.keel(&["image", "pull", &image]).expect_code(1);
    assert!(anonymous.stderr.contains("hint:") && anonymous.stderr.contains("login"), "{}", anonymous.all());
    let wrong = registry.auth_file("ann", "wrong");
    let refused = config(&instance, &format!("registries: {{auth_file: {}}}\n", wrong.display()));
    let options: Vec<&str> = refused.iter().map(String::as_str).collect();
    let instance = instance.with(&options);
    let denied = instance.keel(&["image", "pull", &image]).expect_code(1);
    assert!(denied.stderr.contains("renew the login"), "{}", denied.all());
    assert!(!denied.all().contains("wrong\""), "no password in a message: {}", denied.all());
    let right = registry.auth_file("ann", "secret");
    config(&instance, &format!("registries: {{auth_file: {}}}\n", right.display()));
    instance.apply(&of("web", &image)).expect_code(0);
}

#[test]
fn progress_without_a_terminal_is_plain_lines_that_count_up() {
    let registry = Registry::start();
    let (layout, _) =
        Layout::of("big", &[Layer::busybox(Packing::Gzip), Layer::noise(Packing::Plain, "noise", 24 << 20)]);
    let image = registry.push_layout(&layout, "big", "app/big:1");
    let instance = Instance::new();
    let ran = instance.keel(&["image", "pull", &image]).expect_code(0);
    let lines: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("pulling ")).collect();
    assert!(!lines.is_empty() && lines.len() <= 4, "{}", ran.all());
    assert!(lines.last().unwrap().contains("100%"), "{}", ran.all());
    assert!(!ran.all().contains('\u{1b}') && !ran.all().contains('\r'), "{:?}", ran.all());
    let quiet = instance.keel(&["image", "pull", "-q", &image]).expect_code(0);
    assert_eq!(quiet.all(), "");
}

#[test]
fn images_are_listed_inspected_removed_and_pruned_with_and_without_a_daemon() {
    let registry = Registry::start();
    let (layout, digest) = mixed();
    let image = registry.push_layout(&layout, "mixed", "app/mixed:1");
    let used = registry.push_layout(&layout, "mixed", "app/used:1");
    let mut instance = Instance::new();
    for with_daemon in [false, true] {
        if with_daemon {
            instance.write("web.yaml", &of("web", &used));
            instance.start_daemon();
            instance.await_ready("web");
        }
        instance.keel(&["image", "pull", &image]).expect_code(0);
        let listed = instance.keel(&["image", "ls"]).expect_code(0).stdout;
        assert!(listed.contains(&image) && listed.contains(&digest[..19]), "{listed}");
        let names = instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout;
        assert!(names.lines().any(|name| name == image), "{names}");
        let seen = instance.keel(&["image", "inspect", &image, "-o", "json"]).expect_code(0).json();
        assert_eq!(seen["digest"], digest.as_str());
        assert_eq!(seen["layers"].as_array().unwrap().len(), 3);
        instance.keel(&["image", "rm", &image]).expect_code(0);
        let gone = instance.keel(&["image", "rm", &image]).expect_code(4);
        assert!(gone.stderr.contains("hint:"), "{}", gone.all());
        instance.keel(&["image", "rm", "--ignore-not-found", &image]).expect_code(0);
        let pruned = instance.keel(&["image", "prune"]).expect_code(0).all();
        let layers = fs::read_dir(instance.root().join("layers")).unwrap().count();
        assert_eq!(layers, if with_daemon { 3 } else { 0 }, "{pruned}");
    }
    let alive = instance.keel(&["exec", "web", "--", "cat", "/plain.txt"]).expect_code(0);
    assert_eq!(alive.stdout, "from plain", "a prune never takes what runs");
}

#[test]
fn archives_and_layouts_made_by_skopeo_are_imported() {
    let (layout, _) = mixed();
    let instance = Instance::new();
    let source = format!("oci:{}:mixed", layout.path().display());
    let at = |name: &str| instance.path().join(name).display().to_string();
    let copy = |source: &str, target: String| {
        run(Command::new("skopeo").args(["copy", "--quiet", "--insecure-policy", source, &target]));
    };
    copy(&source, format!("oci-archive:{}:example.com/app/archive:1", at("oci.tar")));
    copy(&source, format!("oci:{}:example.com/app/dir:1", at("ocidir")));
    // skopeo makes no docker-archive of layers in zstd.
    let (gzip, _) = Layout::of(
        "gzip",
        &[
            Layer::busybox(Packing::Gzip),
            Layer::files(Packing::Gzip, &[("zstd.txt", "from zstd"), ("plain.txt", "from plain")]),
        ],
    );
    let source = format!("oci:{}:gzip", gzip.path().display());
    copy(&source, format!("docker-archive:{}:example.com/app/docker:1", at("docker.tar")));
    for (file, name) in [("oci.tar", "archive"), ("ocidir", "dir"), ("docker.tar", "docker")] {
        let ran = instance.keel(&["image", "import", &at(file)]).expect_code(0);
        let reference = format!("example.com/app/{name}:1");
        assert!(ran.all().contains(&reference), "{}", ran.all());
        instance.apply(&with_policy(name, &reference, "Never")).expect_code(0);
        let read = instance.keel(&["exec", name, "--", "cat", "/zstd.txt", "/plain.txt"]).expect_code(0);
        assert_eq!(read.stdout, "from zstdfrom plain", "{name}");
    }
    let kept =
        instance.keel(&["image", "inspect", "example.com/app/dir:1", "-o", "json"]).expect_code(0).json();
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(instance.path().join("ocidir/index.json")).unwrap()).unwrap();
    assert_eq!(kept["digest"], index["manifests"][0]["digest"], "a layout is taken as it is");
    let bytes = fs::read(at("docker.tar")).unwrap();
    let mut child = instance
        .command(&["image", "import", "-"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::write(at("junk.tar"), "no archive at all").unwrap();
    let junk = instance.keel(&["image", "import", &at("junk.tar")]).expect_code(2);
    assert!(junk.stderr.contains("junk.tar") && junk.stderr.contains("hint:"), "{}", junk.all());
}

#[test]
fn containers_of_images_with_common_layers_share_their_lowers() {
    let mut layout = Layout::new();
    let base = Layer::busybox(Packing::Gzip);
    layout.image(Some("a"), architecture(), &[base.clone(), Layer::files(Packing::Gzip, &[("a", "a")])]);
    layout.image(Some("b"), architecture(), &[base, Layer::files(Packing::Zstd, &[("b", "b")])]);
    let registry = Registry::start();
    let a = registry.push_layout(&layout, "a", "app/a:1");
    let b = registry.push_layout(&layout, "b", "app/b:1");
    let instance = Instance::new();
    instance.apply(&format!("{}---\n{}---\n{}", of("a", &a), of("a2", &a), of("b", &b))).expect_code(0);
    assert_eq!(fs::read_dir(instance.root().join("layers")).unwrap().count(), 3, "the base is unpacked once");
    let mut lowers = Vec::new();
    for pid in instance.pids().values() {
        let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let root = text.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        assert!(root.contains(" - overlay "), "{root}");
        let found: Vec<String> = root
            .split([' ', ','])
            .filter_map(|word| word.strip_prefix("lowerdir+=").or_else(|| word.strip_prefix("lowerdir=")))
            .flat_map(|all| all.split(':'))
            .map(str::to_string)
            .collect();
        lowers.push(found);
    }
    assert!(lowers.iter().all(|all| all.len() == 2), "{lowers:?}");
    let base = lowers[0].last().unwrap();
    assert!(lowers.iter().all(|all| all.last() == Some(base)), "one base for all: {lowers:?}");
    let ran = instance.keel(&["exec", "a", "--", "touch", "/bin/mine"]).expect_code(0);
    assert_eq!(ran.code(), 0);
    let other = instance.keel(&["exec", "a2", "--", "ls", "/bin/mine"]);
    assert_eq!(other.code(), 1, "what one writes no other sees");
}

#[test]
fn a_moved_tag_is_followed_by_always_and_not_by_if_not_present() {
    let registry = Registry::start();
    let version = |text: &str| {
        Layout::of("v", &[Layer::busybox(Packing::Gzip), Layer::files(Packing::Gzip, &[("version", text)])]).0
    };
    let image = registry.push_layout(&version("one"), "v", "app/v:1");
    let instance = Instance::new();
    instance.apply(&with_policy("first", &image, "IfNotPresent")).expect_code(0);
    registry.push_layout(&version("two"), "v", "app/v:1");
    instance.apply(&with_policy("kept", &image, "IfNotPresent")).expect_code(0);
    let read = |pod: &str| instance.keel(&["exec", pod, "--", "cat", "/version"]).expect_code(0).stdout;
    assert_eq!(read("kept"), "one");
    instance.apply(&with_policy("fresh", &image, "Always")).expect_code(0);
    assert_eq!(read("fresh"), "two");
    assert_eq!(read("first"), "one", "nobody is restarted by a pull of another");
}

#[test]
fn what_is_present_runs_while_the_registry_is_down_and_always_says_what_it_waits_for() {
    let mut registry = Registry::start();
    let (layout, _) = mixed();
    let image = registry.push_layout(&layout, "mixed", "app/mixed:1");
    let mut instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    let absent = registry.push_layout(&layout, "mixed", "app/absent:1");
    registry.stop();
    instance.apply(&with_policy("never", &image, "Never")).expect_code(0);
    instance.apply(&with_policy("present", &image, "IfNotPresent")).expect_code(0);
    let ran = instance.keel_with_input(&["apply", "-f", "-"], &with_policy("always", &image, "Always"));
    assert_eq!(ran.code(), 0, "what is present is used: {}", ran.all());
    assert!(ran.all().contains(&registry.address) && ran.all().contains("refuses"), "{}", ran.all());
    let events = instance.keel(&["events"]).all();
    assert!(events.contains("hint:") && events.contains("copy in the store"), "{events}");
    let ran = instance.keel_with_input(&["apply", "-f", "-"], &of("absent", &absent)).expect_code(1);
    assert!(ran.stderr.contains("hint: check that the registry runs"), "{}", ran.all());
    instance.write("keep.yaml", &of("keep", &image));
    instance.start_daemon();
    instance.await_ready("keep");
    registry.resume();
    eventually_or(
        || format!("it is tried again: {:#}", instance.pod("absent")["status"]),
        || Some(instance.pod("absent")).filter(keel_tests::is_ready),
    );
}

#[test]
fn ten_pods_of_one_image_pull_it_once() {
    let registry = Registry::start();
    let (layout, digest) = mixed();
    let image = registry.push_layout(&layout, "mixed", "app/mixed:1");
    let pods: Vec<String> = (0..10).map(|n| of(&format!("p{n}"), &image)).collect();
    let instance = Instance::new();
    instance.apply(&pods.join("---\n")).expect_code(0);
    assert_eq!(instance.pids().len(), 10);
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(registry.blob(&digest)).unwrap()).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        let path = format!("/blobs/{}", layer["digest"].as_str().unwrap());
        assert_eq!(registry.requests(&["GET", &path]), 1, "{path}");
    }
}
