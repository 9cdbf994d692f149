//! Probes, from the host's side of the pod's network.

use std::fs;
use std::process::Command;

use keel_tests::image::{BUSYBOX, docker_archive, run};
use keel_tests::{Instance, eventually_or, is_ready};
use serde_json::json;

use super::{fresh, main_status, pod, sh, up};

/// Serves whatever is in `/tmp/www` on port 8080.
const SERVE: &str =
    "command: [sh, -c, 'mkdir -p /tmp/www; echo hi > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www']
ports: [{name: web, containerPort: 8080}]";

fn daemon(manifest: &str) -> Instance {
    let mut instance = fresh();
    instance.write("web.yaml", manifest);
    instance.start_daemon();
    instance
}

fn await_ready(instance: &Instance, ready: bool) {
    eventually_or(
        || format!("ready is {ready}: {:#}", instance.pod("web")["status"]),
        || {
            let found = instance.pod("web");
            (found["status"]["phase"] == "Running" && is_ready(&found) == ready).then_some(())
        },
    );
}

#[test]
fn readiness_follows_a_named_port_over_http() {
    let probe = "readinessProbe: {httpGet: {port: web, path: /ready}, periodSeconds: 1, failureThreshold: 1}";
    let instance = daemon(&pod("web", "", &format!("{SERVE}\n{probe}")));
    await_ready(&instance, false);
    sh(&instance, "web", "echo ok > /tmp/www/ready");
    await_ready(&instance, true);
    sh(&instance, "web", "rm /tmp/www/ready");
    await_ready(&instance, false);
    assert_eq!(main_status(&instance, "web")["restartCount"], 0, "readiness restarts nothing");
}

/// Answers 200 only to a request with the header `X-Token: open`.
const PICKY: &str = "command:
- sh
- -c
- |
  mkdir -p /tmp/www/cgi-bin
  cat > /tmp/www/cgi-bin/t <<'END'
  #!/bin/sh
  [ \"$HTTP_X_TOKEN\" = open ] && echo 'Status: 200 OK' || echo 'Status: 403 No'
  echo
  END
  chmod +x /tmp/www/cgi-bin/t
  exec httpd -f -p 8080 -h /tmp/www";

#[test]
fn http_probes_send_their_headers() {
    let probe = |value: &str| {
        format!(
            "readinessProbe: {{httpGet: {{port: 8080, path: /cgi-bin/t, httpHeaders: [{{name: X-Token, value: {value}}}]}}, periodSeconds: 1, failureThreshold: 1}}"
        )
    };
    let instance = daemon(&pod("web", "", &format!("{PICKY}\n{}", probe("open"))));
    await_ready(&instance, true);
    // A changed probe restarts nothing and takes effect.
    let pids = instance.pids();
    instance.write("web.yaml", &pod("web", "", &format!("{PICKY}\n{}", probe("wrong"))));
    await_ready(&instance, false);
    assert_eq!(instance.pids(), pids);
}

#[test]
fn a_failing_liveness_probe_restarts_the_container() {
    let probe = "livenessProbe: {exec: {command: [test, -f, /tmp/alive]}, periodSeconds: 1, failureThreshold: 2, initialDelaySeconds: 1}";
    let wait = "command: [sh, -c, 'touch /tmp/alive; trap \"exit 0\" TERM; sleep 100000 & wait']";
    let instance = daemon(&pod("web", "", &format!("{wait}\n{probe}")));
    await_ready(&instance, true);
    let before = instance.pids();
    sh(&instance, "web", "rm /tmp/alive");
    eventually_or(
        || format!("it is restarted: {:#}", instance.pod("web")["status"]),
        || (main_status(&instance, "web")["restartCount"] == 1).then_some(()),
    );
    await_ready(&instance, true);
    assert_ne!(instance.pids(), before);
    let events = instance.keel(&["events"]).stdout;
    assert!(events.to_lowercase().contains("liveness"), "{events}");
}

#[test]
fn a_startup_probe_holds_the_others_back() {
    let probes =
        "startupProbe: {exec: {command: [test, -f, /tmp/started]}, periodSeconds: 1, failureThreshold: 60}
livenessProbe: {exec: {command: ['true']}, periodSeconds: 1, failureThreshold: 1}
readinessProbe: {exec: {command: ['true']}, periodSeconds: 1}";
    let instance = daemon(&pod("web", "", &format!("{}\n{probes}", super::WAIT)));
    eventually_or(
        || format!("it runs: {:#}", instance.pod("web")["status"]),
        || (instance.pod("web")["status"]["phase"] == "Running").then_some(()),
    );
    assert!(!is_ready(&instance.pod("web")));
    assert_eq!(main_status(&instance, "web")["started"], false);
    sh(&instance, "web", "touch /tmp/started");
    await_ready(&instance, true);
    assert_eq!(main_status(&instance, "web")["started"], true);
}

#[test]
fn a_startup_probe_that_never_succeeds_restarts_the_container() {
    let probe = "startupProbe: {tcpSocket: {port: 9}, periodSeconds: 1, failureThreshold: 1}";
    let instance = daemon(&pod("web", "", &format!("{}\n{probe}", super::WAIT)));
    eventually_or(
        || format!("it is restarted: {:#}", instance.pod("web")["status"]),
        || main_status(&instance, "web")["restartCount"].as_u64().filter(|count| *count >= 1),
    );
}

/// One program and nothing else: no shell, no tool.
#[test]
fn probes_need_nothing_in_the_image() {
    let instance = fresh();
    let image = "docker.io/library/bare:1";
    let rootfs = instance.path().join("bare-rootfs");
    fs::create_dir_all(rootfs.join("www")).unwrap();
    fs::write(rootfs.join("www/index.html"), "hi").unwrap();
    fs::copy(
        ["/bin/busybox", "/usr/bin/busybox"].iter().find(|p| fs::exists(p).unwrap()).unwrap(),
        rootfs.join("httpd"),
    )
    .unwrap();
    let archive = instance.path().join("bare.tar");
    docker_archive(
        &archive,
        &rootfs,
        image,
        &json!({"Entrypoint": ["/httpd", "-f", "-p", "8080", "-h", "/www"]}),
    );
    instance.keel(&["image", "import", archive.to_str().unwrap()]).expect_code(0);
    let probes = "ports: [{name: web, containerPort: 8080}]
startupProbe: {tcpSocket: {port: web}, periodSeconds: 1}
livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
readinessProbe: {httpGet: {port: web}, periodSeconds: 1}";
    instance.apply(&pod("web", "", probes).replace(BUSYBOX, image)).expect_code(0);
    let found = instance.pod("web");
    assert!(is_ready(&found), "{:#}", found["status"]);
}

#[test]
fn a_probe_of_a_closed_port_fails_and_names_the_address() {
    let probe = "readinessProbe: {tcpSocket: {port: 81}, periodSeconds: 1, failureThreshold: 1}";
    let instance = daemon(&pod("web", "", &format!("{}\n{probe}", super::WAIT)));
    let events = eventually_or(
        || format!("the failure is told: {}", instance.keel(&["events"]).stdout),
        || Some(instance.keel(&["events"]).stdout).filter(|text| text.contains(":81")),
    );
    assert!(events.to_lowercase().contains("readiness"), "{events}");
    await_ready(&instance, false);
}

#[test]
fn https_probes_accept_any_certificate() {
    let Some(openssl) = ["/usr/bin/openssl", "/bin/openssl"].iter().find(|p| fs::exists(p).unwrap_or(false))
    else {
        eprintln!("skipped: openssl is not installed");
        return;
    };
    let instance = fresh();
    let dir = instance.path().join("tls");
    fs::create_dir(&dir).unwrap();
    run(Command::new(openssl)
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=nobody"])
        .arg("-keyout")
        .arg(dir.join("key.pem"))
        .arg("-out")
        .arg(dir.join("cert.pem")));
    // The host's openssl serves on the loopback; a pod on the host's network is probed there.
    let port = keel_tests::free_port();
    let mut server = Command::new(openssl)
        .args(["s_server", "-quiet", "-www", "-accept", &format!("127.0.0.1:{port}")])
        .arg("-key")
        .arg(dir.join("key.pem"))
        .arg("-cert")
        .arg(dir.join("cert.pem"))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("openssl runs");
    let probe = format!(
        "readinessProbe: {{httpGet: {{port: {port}, host: 127.0.0.1, scheme: HTTPS}}, periodSeconds: 1, timeoutSeconds: 5}}"
    );
    let ran = instance.apply(&pod("web", "hostNetwork: true", &format!("{}\n{probe}", super::WAIT)));
    let _ = server.kill();
    let _ = server.wait();
    ran.expect_code(0);
}

#[test]
fn exec_probes_that_hang_fail_after_their_timeout() {
    let probe = "readinessProbe: {exec: {command: [sleep, '1000']}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1}";
    let instance = daemon(&pod("web", "", &format!("{}\n{probe}", super::WAIT)));
    eventually_or(
        || format!("the time-out is told: {}", instance.keel(&["events"]).stdout),
        || instance.keel(&["events"]).stdout.contains("no answer within").then_some(()),
    );
    await_ready(&instance, false);
}

#[test]
fn probes_run_with_the_containers_user_and_environment() {
    let probe = "readinessProbe: {exec: {command: [sh, -c, 'test $MARK = yes && test $(id -u) = 1000']}, periodSeconds: 1, failureThreshold: 1}";
    let instance = up(&pod(
        "web",
        "securityContext: {runAsUser: 1000}",
        &format!("{}\nenv: [{{name: MARK, value: 'yes'}}]\n{probe}", super::WAIT),
    ));
    assert!(is_ready(&instance.pod("web")));
}
