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
