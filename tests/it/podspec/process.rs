//! What is run: command, arguments, directory, environment.

use keel_tests::image::BUSYBOX;
use serde_json::json;

use super::{WAIT, fresh, import, job, logs, pod, refused, sh, up};

#[test]
fn command_and_args_replace_entrypoint_and_cmd_as_in_kubernetes() {
    let instance = fresh();
    let image = "docker.io/library/entry:1";
    import(
        &instance,
        image,
        &json!({"Entrypoint": ["echo", "entry"], "Cmd": ["cmd"], "Env": ["PATH=/bin"]}),
        |_| {},
    );
    let cases = [
        ("neither", "", "entry cmd"),
        ("args", "args: [x, z]", "entry x z"),
        ("command", "command: [echo, alone]", "alone"),
        ("both", "command: [echo, a]\nargs: [b]", "a b"),
    ];
    let all: Vec<String> =
        cases.iter().map(|(name, fields, _)| job(name, "", fields).replace(BUSYBOX, image)).collect();
    instance.apply(&all.join("---\n")).expect_code(0);
    for (name, _, expected) in cases {
        assert_eq!(logs(&instance, name), expected, "{name}");
    }
}

#[test]
fn a_container_without_anything_to_run_says_so() {
    let instance = fresh();
    let image = "docker.io/library/nothing:1";
    import(&instance, image, &json!({"Env": ["PATH=/bin"]}), |_| {});
    let said = refused(&instance, &pod("web", "", "args: []").replace(BUSYBOX, image));
    assert!(said.contains("no command, no entrypoint"), "{said}");
}

#[test]
fn the_working_directory_is_the_manifests_else_the_images_and_is_made() {
    let instance = fresh();
    let image = "docker.io/library/wd:1";
    import(
        &instance,
        image,
        &json!({"WorkingDir": "/from/image", "Env": ["PATH=/bin"], "Cmd": ["pwd"]}),
        |_| {},
    );
    let all = [
        job("image", "", "").replace(BUSYBOX, image),
        job("own", "", "workingDir: /made/for/me").replace(BUSYBOX, image),
        job("root", "", "command: [pwd]"),
    ];
    instance.apply(&all.join("---\n")).expect_code(0);
    assert_eq!(logs(&instance, "image"), "/from/image");
    assert_eq!(logs(&instance, "own"), "/made/for/me");
    assert_eq!(logs(&instance, "root"), "/");
}

const SOURCES: &str = "apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {mode: 'fast $(A)', A: from-map}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
data: {token: czNjcmV0}
stringData: {B: from-secret}
---
";

#[test]
fn environment_comes_from_values_maps_secrets_and_fields() {
    let fields = format!(
        "{WAIT}
resources: {{limits: {{cpu: 1500m, memory: 64Mi}}, requests: {{cpu: 250m}}}}
envFrom:
- {{prefix: M_, configMapRef: {{name: settings}}}}
- {{secretRef: {{name: keys}}}}
- {{configMapRef: {{name: not-there, optional: true}}}}
env:
- {{name: PLAIN, value: text}}
- {{name: MODE, valueFrom: {{configMapKeyRef: {{name: settings, key: mode}}}}}}
- {{name: TOKEN, valueFrom: {{secretKeyRef: {{name: keys, key: token}}}}}}
- {{name: ABSENT, valueFrom: {{secretKeyRef: {{name: keys, key: nope, optional: true}}}}}}
- {{name: NAME, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
- {{name: NAMESPACE, valueFrom: {{fieldRef: {{fieldPath: metadata.namespace}}}}}}
- {{name: LABEL, valueFrom: {{fieldRef: {{fieldPath: \"metadata.labels['app']\"}}}}}}
- {{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}
- {{name: IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
- {{name: HOST, valueFrom: {{fieldRef: {{fieldPath: status.hostIP}}}}}}
- {{name: CPUS, valueFrom: {{resourceFieldRef: {{resource: limits.cpu}}}}}}
- {{name: MILLIS, valueFrom: {{resourceFieldRef: {{resource: requests.cpu, divisor: 1m}}}}}}
- {{name: MEMORY, valueFrom: {{resourceFieldRef: {{resource: limits.memory, divisor: 1Mi}}}}}}
- {{name: REQUEST, valueFrom: {{resourceFieldRef: {{resource: requests.memory}}}}}}
"
    );
    let instance = up(&format!("{SOURCES}{}", pod("web", "", &fields)));
    let env = sh(&instance, "web", "tr '\\0' '\\n' < /proc/1/environ");
    let get = |name: &str| {
        env.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(String::from)
    };
    let status = &instance.pod("web")["status"];
    let node = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for (name, value) in [
        ("FROM_IMAGE", "yes"),
        ("HOSTNAME", "web"),
        ("HOME", "/root"),
        ("M_mode", "fast $(A)"),
        ("M_A", "from-map"),
        ("token", "s3cret"),
        ("B", "from-secret"),
        ("PLAIN", "text"),
        ("MODE", "fast $(A)"),
        ("TOKEN", "s3cret"),
        ("NAME", "web"),
        ("NAMESPACE", "default"),
        ("LABEL", "web-app"),
        ("NODE", node.trim()),
        ("IP", status["podIP"].as_str().unwrap()),
        ("CPUS", "2"),
        ("MILLIS", "250"),
        ("MEMORY", "64"),
        ("REQUEST", "67108864"),
    ] {
        assert_eq!(get(name).as_deref(), Some(value), "{name} in\n{env}");
    }
    assert_eq!(get("ABSENT"), None, "{env}");
    let host = get("HOST").expect("a host address");
    assert!(host.parse::<std::net::Ipv4Addr>().is_ok(), "{env}");
    assert_ne!(get("HOST"), get("IP"), "the host is not the pod\n{env}");
    let addresses = std::process::Command::new("ip").args(["-o", "-4", "address"]).output().unwrap();
    let addresses = String::from_utf8_lossy(&addresses.stdout).into_owned();
    assert!(
        addresses.contains(&format!("inet {host}/")),
        "{host} is not an address of this host\n{addresses}"
    );
}

#[test]
fn on_the_hosts_network_the_pods_address_is_the_hosts() {
    let fields = "command: [sh, -c, 'echo $IP $HOST']
env:
- {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
";
    let instance = up(&job("once", "hostNetwork: true", fields));
    let said = logs(&instance, "once");
    let (ip, host) = said.split_once(' ').unwrap_or_else(|| panic!("{said:?}"));
    assert!(ip.parse::<std::net::Ipv4Addr>().is_ok(), "{said}");
    assert_eq!(ip, host);
}

#[test]
fn resources_that_are_not_limited_are_the_hosts() {
    let fields = "command: [env]
env:
- {name: CPUS, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
- {name: KIB, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Ki}}}
- {name: ASKED, valueFrom: {resourceFieldRef: {resource: requests.cpu}}}
";
    let instance = up(&job("once", "", fields));
    let said = logs(&instance, "once");
    let has = |line: String| assert!(said.lines().any(|found| found == line), "{line} in\n{said}");
    let cores = std::thread::available_parallelism().unwrap().get();
    has(format!("CPUS={cores}"));
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    has(format!("KIB={}", total.split_whitespace().next().unwrap()));
    has("ASKED=0".into());
}

#[test]
fn references_see_earlier_variables_only_and_never_the_images() {
    let fields = "command: [echo, '$(LATE)', '$(FROM_IMAGE)', '$$(A)', '$(NOPE)']
args: ['$(A)-$(B)']
env:
- {name: EARLY, value: '<$(A)>'}
- {name: A, value: '1'}
- {name: B, value: '$(A)2'}
- {name: LATE, value: '$(EARLY)$(B)'}
";
    let instance = up(&job("once", "", fields));
    assert_eq!(logs(&instance, "once"), "<$(A)>12 $(FROM_IMAGE) $(A) $(NOPE) 1-12");
}

#[test]
fn a_missing_key_keeps_the_pod_waiting_and_is_named() {
    let instance = fresh();
    let fields = format!(
        "{WAIT}\nenv: [{{name: X, valueFrom: {{configMapKeyRef: {{name: settings, key: missing}}}}}}]\n"
    );
    let said = refused(&instance, &format!("{SOURCES}{}", pod("web", "", &fields)));
    assert!(said.contains("settings") && said.contains("missing"), "{said}");
    assert!(instance.pids().is_empty());
}
