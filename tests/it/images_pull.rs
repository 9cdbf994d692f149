//! Where pods' images come from: logins that pods bring, mirrors, and what becomes of a pull that cannot succeed.

use std::fs;

use keel_tests::image::BUSYBOX;
use keel_tests::layout::{Layer, Layout, Packing};
use keel_tests::manifest::sleeper;
use keel_tests::registry::{Access, Registry};
use keel_tests::{Instance, eventually_or, is_ready};

fn busybox() -> Layout {
    Layout::of("b", &[Layer::busybox(Packing::Gzip)]).0
}

fn of(name: &str, image: &str) -> String {
    sleeper(name).replace(BUSYBOX, image)
}

fn with_secret(name: &str, image: &str, secret: &str) -> String {
    of(name, image).replace("spec:\n", &format!("spec:\n  imagePullSecrets: [{{name: {secret}}}]\n"))
}

fn secret(name: &str, kind: &str, key: &str, value: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}}}\ntype: kubernetes.io/{kind}\n\
         stringData:\n  {key}: '{value}'\n---\n"
    )
}

#[test]
fn a_pods_pull_secret_of_either_type_is_the_login_for_its_registry() {
    let registry = Registry::start_with(Access { login: Some(("ann", "secret")), ..Access::default() });
    let image = registry.push_layout(&busybox(), "b", "app/b:1");
    let config = fs::read_to_string(registry.auth_file("ann", "secret")).unwrap();
    let inner = serde_json::from_str::<serde_json::Value>(&config).unwrap()["auths"].to_string();
    let new = secret("login", "dockerconfigjson", ".dockerconfigjson", &config);
    let old = secret("login", "dockercfg", ".dockercfg", &inner);
    for secret in [new, old] {
        let instance = Instance::new();
        let missing = instance
            .keel_with_input(&["apply", "-f", "-"], &with_secret("web", &image, "login"))
            .expect_code(1);
        assert!(missing.all().contains("Secret default/login does not exist"), "{}", missing.all());
        instance.apply(&format!("{secret}{}", with_secret("web", &image, "login"))).expect_code(0);
        let all = instance.keel(&["events"]).all() + &instance.keel(&["describe", "pod/web"]).all();
        assert!(!all.contains("secret\"") && !all.contains("YW5u"), "no password in what is shown: {all}");
    }
}

#[test]
fn a_mirror_of_hosts_toml_serves_pods_of_a_registry_that_is_gone() {
    let mirror = Registry::start();
    mirror.push_layout(&busybox(), "b", "app/b:1");
    let instance = Instance::new();
    let dir = instance.path().join("certs.d/gone.example:5000");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("hosts.toml"), format!("[host.\"http://{}\"]\n", mirror.address)).unwrap();
    let config = instance.path().join("config.yaml");
    fs::write(&config, format!("registries: {{certs_dir: {}/certs.d}}\n", instance.path().display()))
        .unwrap();
    let instance = instance.with(&["--config", config.to_str().unwrap()]);
    instance.apply(&of("web", "gone.example:5000/app/b:1")).expect_code(0);
    let listed = instance.keel(&["image", "ls", "-o", "name"]).expect_code(0).stdout;
    assert_eq!(listed, "gone.example:5000/app/b:1\n", "it is known by its own name");
}

#[test]
fn an_image_that_was_not_pushed_yet_is_asked_for_again_soon() {
    let registry = Registry::start();
    let mut instance = Instance::new();
    instance.write("web.yaml", &of("web", &format!("{}/app/b:1", registry.address)));
    instance.start_daemon();
    eventually_or(
        || format!("{:#}", instance.pod("web")["status"]),
        || instance.pod("web")["status"].to_string().contains("ImagePullBackOff").then_some(()),
    );
    registry.push_layout(&busybox(), "b", "app/b:1");
    eventually_or(
        || format!("{:#}", instance.pod("web")["status"]),
        || Some(instance.pod("web")).filter(is_ready),
    );
}

#[test]
fn a_pull_is_broken_off_when_its_manifest_goes() {
    use std::io::Read;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("keep.yaml", &sleeper("keep"));
    instance.write("web.yaml", &of("web", &format!("{address}/app/b:1")));
    instance.start_daemon();
    let (mut connection, _) = silent.accept().unwrap();
    instance.await_ready("keep");
    fs::remove_file(instance.manifests().join("web.yaml")).unwrap();
    connection.set_read_timeout(Some(std::time::Duration::from_secs(8))).unwrap();
    // Ends when the other side closes.
    let mut rest = Vec::new();
    connection.read_to_end(&mut rest).expect("the client goes away");
    eventually_or(|| instance.keel(&["get"]).all(), || (!instance.pods().contains_key("web")).then_some(()));
    let events = instance.keel(&["events"]).all();
    assert!(!events.contains("ErrImagePull"), "{events}");
}

fn two_layers() -> (Layout, String) {
    Layout::of("two", &[Layer::busybox(Packing::Gzip), Layer::files(Packing::Gzip, &[("etc/two", "two")])])
}

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().expect("it is installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_pushed_image_has_its_digest_everywhere_and_is_not_sent_twice() {
    let registry = Registry::start();
    let (layout, digest) = two_layers();
    let image = registry.push_layout(&layout, "two", "app/two:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    let target = format!("{}/other/two:2", registry.address);
    let pushed = instance.keel(&["image", "push", &image, &target]).expect_code(0);
    assert!(pushed.all().contains(&digest), "{}", pushed.all());
    assert_eq!(
        registry.requests(&["PATCH", "/other/two/"]),
        0,
        "blobs are mounted from the repository they came from"
    );
    let seen = tool("skopeo", &["inspect", "--tls-verify=false", &format!("docker://{target}")]);
    assert!(seen.contains(&digest), "{seen}");
    instance.keel(&["image", "tag", &image, &format!("{}/tagged/two:3", registry.address)]).expect_code(0);
    let events = instance
        .keel(&["image", "push", &format!("{}/tagged/two:3", registry.address), "-o", "json"])
        .expect_code(0)
        .stdout;
    let last: serde_json::Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["exitCode"]), (&"result".into(), &0.into()), "{events}");
    let absent = instance.keel(&["image", "push", "example.com/absent:1"]).expect_code(4);
    assert!(absent.stderr.contains("hint:"), "{}", absent.all());
}

#[test]
fn what_is_saved_in_any_format_others_load_and_we_import_again() {
    let registry = Registry::start();
    let (layout, digest) = two_layers();
    let image = registry.push_layout(&layout, "two", "app/two:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    let at = |name: &str| instance.path().join(name).display().to_string();
    let podman_root = at("podman");
    let podman = |arguments: &[&str]| {
        let run = at("podman-run");
        let mut all = vec!["--root", &podman_root, "--runroot", &run, "--storage-driver", "vfs"];
        all.extend(arguments);
        tool("podman", &all)
    };
    for (format, file, transport) in [
        ("oci-archive", "two.tar", "oci-archive"),
        ("oci-dir", "twodir", "oci"),
        ("docker-archive", "two-docker.tar", "docker-archive"),
    ] {
        instance.keel(&["image", "save", &image, "--format", format, "-o", &at(file)]).expect_code(0);
        let seen = tool("skopeo", &["inspect", &format!("{transport}:{}", at(file))]);
        assert_eq!(seen.contains(&digest), format != "docker-archive", "digests stay: {seen}");
        if format != "oci-dir" {
            let loaded = podman(&["load", "-q", "-i", &at(file)]);
            assert!(loaded.contains("app/two"), "{format}: {loaded}");
            podman(&["rmi", "-af"]);
        }
        let other = Instance::new();
        other.keel(&["image", "import", &at(file)]).expect_code(0);
        let imported = other.keel(&["image", "inspect", &image]).expect_code(0).json();
        assert_eq!(imported["digest"] == digest.as_str(), format != "docker-archive", "{imported}");
        assert_eq!(imported["config"]["rootfs"]["diff_ids"].as_array().unwrap().len(), 2);
    }
    let streamed = instance.command(&["image", "save", &image, "-o", "-"]).output().unwrap();
    assert_eq!(streamed.stdout, fs::read(at("two.tar")).unwrap());
    let refused = instance.keel(&["image", "save", &image, "-o", &at("no/such/dir/x.tar")]).expect_code(1);
    assert!(refused.stderr.contains("no/such/dir"), "{}", refused.all());
}

#[test]
fn history_and_space_are_told_as_text_and_as_data() {
    let registry = Registry::start();
    let (layout, _) = two_layers();
    let image = registry.push_layout(&layout, "two", "app/two:1");
    let instance = Instance::new();
    instance.keel(&["image", "pull", &image]).expect_code(0);
    instance.keel(&["image", "tag", &image, "example.com/again:1"]).expect_code(0);
    let steps = instance.keel(&["image", "history", &image, "-o", "json"]).expect_code(0).json();
    assert_eq!(steps.as_array().unwrap().len(), 2, "{steps}");
    assert!(instance.keel(&["image", "history", &image]).expect_code(0).stdout.starts_with("CREATED"));
    let used = instance.keel(&["image", "du", "-o", "json"]).expect_code(0).json();
    let images = used["images"].as_array().unwrap();
    assert_eq!(images.len(), 2);
    assert!(
        images.iter().all(|i| i["uniqueBytes"] == 0 && i["sharedBytes"].as_u64() > Some(500_000)),
        "{used}"
    );
    assert!(used["blobsBytes"].as_u64().unwrap() < used["layersBytes"].as_u64().unwrap(), "{used}");
    let text = instance.keel(&["image", "du"]).expect_code(0).stdout;
    assert!(text.contains("example.com/again:1") && text.contains("unpacked layers"), "{text}");
}
