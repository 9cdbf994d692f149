//! What a pod declares beyond Kubernetes: ports whose sockets outlive its containers, and readiness that is told.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use keel_tests::manifest::{SLEEP, pod};
use keel_tests::{Instance, eventually, eventually_or, free_port, http_get, is_ready};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn server(port: u16, greeting: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, annotations: {{evenkeel.dev/held-ports: http, evenkeel.dev/notify: main}}}}\n\
         spec:\n  terminationGracePeriodSeconds: 2\n  containers:\n  - name: main\n    image: evenkeel.dev/hello:latest\n    \
         imagePullPolicy: IfNotPresent\n    env: [{{name: GREETING, value: {greeting}}}]\n    \
         ports: [{{name: http, containerPort: 8080, hostPort: {port}}}]\n"
    )
}

/// Connects again and again, as long as `work` takes; how often, and how often it was refused.
fn connecting(port: u16, work: impl FnOnce()) -> (u32, u32) {
    let (over, tries, refused) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                tries.fetch_add(1, Ordering::Relaxed);
                if TcpStream::connect_timeout(&address, Duration::from_secs(5)).is_err() {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    });
    (tries.into_inner(), refused.into_inner())
}

#[test]
fn nobody_is_refused_while_a_container_with_held_ports_is_exchanged() {
    let mut instance = Instance::new();
    let port = free_port();
    instance.write("web.yaml", &server(port, "one"));
    instance.start_daemon();
    instance.await_ready("web");
    let answers = |what: &str, greeting: &str| {
        eventually_or(
            || format!("{what}: {:#}\n{}", instance.pod("web")["status"], instance.daemon_log()),
            || http_get(&format!("127.0.0.1:{port}"), "/").filter(|(_, body)| body.starts_with(greeting)),
        );
    };
    answers("it serves", "one");
    let kill_main = |instance: &Instance| {
        let before = instance.pids();
        let pid = *before.values().next().unwrap();
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        eventually("another run", || instance.pids().into_keys().find(|id| !before.contains_key(id)));
    };
    let (tries, refused) = connecting(port, || {
        kill_main(&instance);
        answers("it was killed", "one");
        instance.write("web.yaml", &server(port, "two"));
        answers("it was changed", "two");
    });
    assert_eq!(refused, 0, "of {tries}");
    instance.kill_daemon();
    let (tries, refused) = connecting(port, || {
        kill_main(&instance);
        eventually("it serves without a daemon", || http_get(&format!("127.0.0.1:{port}"), "/"));
    });
    assert_eq!(refused, 0, "of {tries}");
    instance.keel(&["system", "reset", "--force"]).expect_code(0);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn a_container_that_notifies_is_ready_when_it_says_so() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let text =
        pod("web", SLEEP).replace("{name: web}", "{name: web, annotations: {evenkeel.dev/notify: main}}");
    instance.write("web.yaml", &text);
    instance.start_daemon();
    eventually_or(
        || format!("it is said why it is not ready: {}", instance.daemon_log()),
        || instance.daemon_log().contains("it has not said READY=1 yet").then_some(()),
    );
    assert!(!is_ready(&instance.pod("web")));
    let id = instance.pids().into_keys().next().unwrap();
    let socket = instance.run_dir().join("containers").join(id).join("notify/notify.sock");
    UnixDatagram::unbound().unwrap().send_to(b"READY=1", socket).unwrap();
    instance.await_ready("web");
}
