//! Pods on the network: published ports, names, addresses, and what heals when somebody breaks it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use keel_tests::image::run;
use keel_tests::manifest::{SLEEP, pod, server, sleeper};
use keel_tests::{Instance, eventually, eventually_or, free_port, http_get, is_ready};

fn published(name: &str, text: &str, port: u16, more: &str) -> String {
    server(name, text, &format!("    ports: [{{containerPort: 80, hostPort: {port}{more}}}]\n"))
}

fn answer(address: &str) -> Option<String> {
    http_get(address, "/").filter(|(status, _)| *status == 200).map(|(_, body)| body.trim().to_string())
}

#[track_caller]
fn await_answer(instance: &Instance, address: &str, text: &str) {
    eventually_or(
        || format!("{address} answers {text}\n{}", instance.keel(&["get", "pods", "-A"]).all()),
        || answer(address).filter(|got| got == text),
    );
}

/// The address that this host uses towards others.
fn own_address() -> Ipv4Addr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Sends nothing: only the route is looked up.
    socket.connect("192.0.2.1:9").unwrap();
    match socket.local_addr().unwrap().ip() {
        IpAddr::V4(ip) => ip,
        other => panic!("{other} is not IPv4"),
    }
}

fn ip_of(instance: &Instance, pod: &str) -> String {
    instance.pod(pod)["status"]["podIP"].as_str().unwrap_or_default().to_string()
}

/// Six digits that tell this instance's bridge and table from those of others.
fn tag(instance: &Instance) -> String {
    let aside = instance.path().join("path.txt");
    fs::write(&aside, instance.root().canonicalize().unwrap().to_str().unwrap()).unwrap();
    keel_tests::image::sha256(&aside)[..6].to_string()
}

fn table(instance: &Instance) -> String {
    format!("evenkeel-{}", tag(instance))
}

fn has_table(name: &str) -> bool {
    Command::new("nft").args(["list", "table", "inet", name]).output().unwrap().status.success()
}

/// Runs `work` on a thread inside a network namespace.
fn inside<T: Send + 'static>(
    netns: PathBuf,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let file = fs::File::open(&netns).unwrap();
    let (ready, started) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        ready.send(()).unwrap();
        work()
    });
    started.recv().unwrap();
    thread
}

fn netns_of(instance: &Instance, pod: &str) -> PathBuf {
    let pids = instance.pids();
    let prefix = format!("{pod}-");
    let (_, pid) = pids.iter().find(|(id, _)| id.starts_with(&prefix)).expect("the pod runs");
    format!("/proc/{pid}/ns/net").into()
}

#[test]
fn a_published_port_answers_on_loopback_and_on_the_hosts_own_address() {
    let instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.apply(&published("web", "hello", port, "")).expect_code(0);
    await_answer(&instance, &format!("127.0.0.1:{port}"), "hello");
    await_answer(&instance, &format!("{}:{port}", own_address()), "hello");
    await_answer(&instance, &format!("{}:80", ip_of(&instance, "web")), "hello");
}

#[test]
fn a_udp_port_is_published() {
    let instance = Instance::new();
    instance.import_busybox();
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let ports = format!("    ports: [{{containerPort: 5353, hostPort: {port}, protocol: UDP}}]\n");
    instance.apply(&pod("dns", &format!("{SLEEP}{ports}"))).expect_code(0);
    let bound = inside(netns_of(&instance, "dns"), || UdpSocket::bind("0.0.0.0:5353").unwrap());
    let socket = bound.join().unwrap();
    let echo = std::thread::spawn(move || {
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut buffer = [0; 64];
        for _ in 0..2 {
            let (n, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..n], from).unwrap();
        }
    });
    for ip in [Ipv4Addr::LOCALHOST, own_address()] {
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.connect((ip, port)).unwrap();
        let mut buffer = [0; 64];
        client.send(b"ping").unwrap();
        let n = client.recv(&mut buffer).unwrap_or_else(|e| panic!("no echo from {ip}: {e}"));
        assert_eq!(&buffer[..n], b"ping");
    }
    echo.join().unwrap();
}

#[test]
fn a_host_ip_limits_a_port_to_that_address() {
    let instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.apply(&published("web", "two", port, ", hostIP: 127.0.0.2")).expect_code(0);
    await_answer(&instance, &format!("127.0.0.2:{port}"), "two");
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "127.0.0.1 is not published");
    assert!(TcpStream::connect((own_address(), port)).is_err(), "the host's address is not published");
    let foreign = published("far", "x", free_port(), ", hostIP: 203.0.113.7");
    let refused = instance.keel_with_input(&["apply", "-f", "-"], &foreign).expect_code(1);
    assert!(refused.all().contains("203.0.113.7") && refused.stderr.contains("hint:"), "{}", refused.all());
}

#[test]
fn pods_reach_each_other_by_every_name() {
    let instance = Instance::new();
    instance.import_busybox();
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: api}\nspec:\n  selector: {matchLabels: {a: b}}\n  strategy: {type: Recreate}\n  template:\n    metadata: {labels: {a: b}}\n    spec:\n      terminationGracePeriodSeconds: 1\n      containers:\n      - name: main\n        image: docker.io/library/busybox:it\n        command: [sh, -c, 'mkdir /tmp/w; echo api > /tmp/w/index.html; exec httpd -f -p 80 -h /tmp/w']\n";
    let far = server("far", "far", "").replace("{name: far}", "{name: far, namespace: other}");
    let all = [server("web", "web", ""), sleeper("client"), deployment.to_string(), far].join("---\n");
    instance.apply(&all).expect_code(0);
    for (name, text) in
        [("web", "web"), ("web.default", "web"), ("api", "api"), ("api.default", "api"), ("far.other", "far")]
    {
        eventually_or(
            || {
                let hosts = instance.keel(&["exec", "client", "--", "cat", "/etc/hosts"]).all();
                format!("{name} answers {text}\n{hosts}")
            },
            || {
                let url = format!("http://{name}/");
                let ran = instance.keel(&["exec", "client", "--", "wget", "-q", "-O", "-", &url]);
                (ran.code() == 0 && ran.stdout.trim() == text).then_some(())
            },
        );
    }
    let short = instance.keel(&["exec", "client", "--", "grep", "-w", "far$", "/etc/hosts"]);
    assert_eq!(short.code(), 1, "a short name does not lead into another namespace: {}", short.all());
}

#[test]
fn hosts_files_follow_pods_in_place() {
    let mut instance = Instance::new();
    instance.import_busybox();
    instance.write("client.yaml", &sleeper("client"));
    instance.start_daemon();
    instance.await_ready("client");
    let pids = instance.pids();
    let hosts = || instance.keel(&["exec", "client", "--", "cat", "/etc/hosts"]).expect_code(0).stdout;
    let inode = || instance.keel(&["exec", "client", "--", "stat", "-c", "%i", "/etc/hosts"]).stdout;
    let before = inode();
    assert!(hosts().contains("127.0.0.1") && hosts().contains("client"), "{}", hosts());
    instance.write("peer.yaml", &sleeper("peer"));
    instance.await_ready("peer");
    let ip = ip_of(&instance, "peer");
    let named =
        |text: &str| text.lines().any(|l| l.starts_with(&ip) && l.split_whitespace().any(|w| w == "peer"));
    eventually_or(|| format!("the new pod is in hosts: {}", hosts()), || named(&hosts()).then_some(()));
    fs::remove_file(instance.manifests().join("peer.yaml")).unwrap();
    eventually_or(
        || format!("the old pod is out of hosts: {}", hosts()),
        || (!named(&hosts())).then_some(()),
    );
    assert_eq!(inode(), before, "the file is written in place");
    assert_eq!(instance.pids(), pids, "nobody is restarted");
}

#[test]
fn resolv_conf_is_the_hosts_or_what_dns_config_says() {
    let instance = Instance::new();
    instance.import_busybox();
    let own = format!(
        "{}  dnsPolicy: None\n  dnsConfig: {{nameservers: [192.0.2.53], searches: [corp.example], options: [{{name: ndots, value: '3'}}]}}\n",
        sleeper("own")
    );
    instance.apply(&format!("{}---\n{own}", sleeper("plain"))).expect_code(0);
    let read =
        |pod: &str| instance.keel(&["exec", pod, "--", "cat", "/etc/resolv.conf"]).expect_code(0).stdout;
    let text = read("own");
    for part in ["nameserver 192.0.2.53", "search corp.example", "options ndots:3"] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("nameserver "));
        lines.map(|server| server.trim().to_string()).filter(|server| !server.starts_with("127.")).collect()
    };
    assert!(!servers(&read("plain")).is_empty(), "{}", read("plain"));
    if !servers(&host).is_empty() {
        assert_eq!(servers(&read("plain")), servers(&host)[..servers(&host).len().min(3)]);
    }
}

#[test]
fn containers_of_one_pod_share_localhost_and_no_other_pod_does() {
    let instance = Instance::new();
    instance.import_busybox();
    let two = format!(
        "{}  - name: side\n    image: docker.io/library/busybox:it\n{SLEEP}",
        server("web", "shared", "")
    );
    instance.apply(&format!("{two}---\n{}", sleeper("other"))).expect_code(0);
    let get = |arguments: &[&str]| {
        let mut all = vec!["exec"];
        all.extend(arguments);
        all.extend(["--", "wget", "-q", "-O", "-", "http://127.0.0.1/"]);
        instance.keel(&all)
    };
    eventually("the other container answers on localhost", || {
        (get(&["web", "-c", "side"]).stdout.trim() == "shared").then_some(())
    });
    assert_ne!(get(&["other"]).code(), 0);
}

/// A machine beyond the host: a namespace with one link, and no route to any pod.
struct External {
    name: String,
    address: String,
}

impl External {
    fn new() -> External {
        let name = format!("evenkeel-ext-{}", std::process::id());
        let link = format!("ktx{}", std::process::id() % 100_000);
        let ip = |arguments: &[&str]| run(Command::new("ip").args(arguments));
        ip(&["netns", "add", &name]);
        let external = External { name: name.clone(), address: "198.18.77.2".into() };
        ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &name]);
        ip(&["addr", "add", "198.18.77.1/30", "dev", &link]);
        ip(&["link", "set", &link, "up"]);
        ip(&["-n", &name, "addr", "add", "198.18.77.2/30", "dev", "eth0"]);
        ip(&["-n", &name, "link", "set", "eth0", "up"]);
        external
    }

    fn netns(&self) -> PathBuf {
        format!("/run/netns/{}", self.name).into()
    }
}

impl Drop for External {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[test]
fn pods_go_out_under_the_hosts_address_and_are_reached_from_outside_through_it() {
    let external = External::new();
    let instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.apply(&published("web", "inside", port, "")).expect_code(0);
    let bound = inside(external.netns(), || TcpListener::bind("0.0.0.0:8099").unwrap());
    let listener = bound.join().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut buffer = [0; 512];
        let _ = stream.read(&mut buffer);
        stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfar\n").unwrap();
        peer.ip()
    });
    let url = format!("http://{}:8099/", external.address);
    let ran = instance.keel(&["exec", "web", "--", "wget", "-q", "-O", "-", &url]);
    assert_eq!(ran.stdout, "far\n", "{}", ran.all());
    assert_eq!(server.join().unwrap().to_string(), "198.18.77.1", "masqueraded as the host");
    let seen = inside(external.netns(), move || {
        eventually("the published port answers from outside", || answer(&format!("198.18.77.1:{port}")))
    });
    assert_eq!(seen.join().unwrap(), "inside");
}

#[test]
fn a_second_pod_on_a_port_waits_and_takes_over_when_the_first_goes() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.write("a.yaml", &published("first", "first", port, ""));
    instance.start_daemon();
    instance.await_ready("first");
    instance.write("b.yaml", &published("second", "second", port, ""));
    let pod = eventually_or(
        || format!("{}\n{}", instance.keel(&["get", "pods"]).all(), instance.daemon_log()),
        || Some(instance.pod("second")).filter(|pod| pod.to_string().contains("PortTaken")),
    );
    assert!(pod.to_string().contains("default/first"), "the holder is named: {:#}", pod["status"]);
    assert_eq!(answer(&format!("127.0.0.1:{port}")).as_deref(), Some("first"));
    fs::remove_file(instance.manifests().join("a.yaml")).unwrap();
    await_answer(&instance, &format!("127.0.0.1:{port}"), "second");
}

#[test]
fn a_port_that_a_process_of_the_host_has_is_not_taken_from_it() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let manifest = format!("{}---\n{}", published("web", "x", port, ""), sleeper("good"));
    let ran = instance.keel_with_input(&["apply", "-f", "-"], &manifest).expect_code(6);
    assert!(ran.all().contains("PortInUse") && ran.all().contains(&port.to_string()), "{}", ran.all());
    assert!(ran.all().contains(&format!("pid {}", std::process::id())), "the holder is named: {}", ran.all());
    assert!(ran.stderr.contains("hint:"), "{}", ran.all());
    assert!(is_ready(&instance.pod("good")), "the rest goes on");
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    listener.accept().expect("the process keeps its clients");
    instance.write("other.yaml", &sleeper("other"));
    instance.start_daemon();
    instance.await_ready("other");
    drop(listener);
    await_answer(&instance, &format!("127.0.0.1:{port}"), "x");
}

#[test]
fn a_deleted_table_is_noticed_and_made_again() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.write("web.yaml", &published("web", "hello", port, ""));
    instance.start_daemon();
    let address = format!("127.0.0.1:{port}");
    await_answer(&instance, &address, "hello");
    let pids = instance.pids();
    let table = table(&instance);
    assert!(has_table(&table));
    run(Command::new("nft").args(["delete", "table", "inet", &table]));
    // Without a word to the daemon, and long before it would look by itself.
    let start = std::time::Instant::now();
    eventually("the table is there again", || has_table(&table).then_some(()));
    assert!(start.elapsed() < Duration::from_secs(15), "noticed at once, not by the periodic look");
    await_answer(&instance, &address, "hello");
    assert_eq!(instance.pids(), pids);
}

#[test]
fn a_deleted_bridge_is_made_again_and_every_pod_is_back_on_it() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.write("web.yaml", &published("web", "hello", port, ""));
    instance.write("client.yaml", &sleeper("client"));
    instance.start_daemon();
    let address = format!("127.0.0.1:{port}");
    await_answer(&instance, &address, "hello");
    instance.await_ready("client");
    let pids = instance.pids();
    run(Command::new("ip").args(["link", "del", &format!("ek{}", tag(&instance))]));
    instance.keel(&["reconcile"]).expect_code(0);
    await_answer(&instance, &address, "hello");
    let ran = instance.keel(&["exec", "client", "--", "wget", "-q", "-O", "-", "http://web/"]);
    assert_eq!(ran.stdout.trim(), "hello", "{}", ran.all());
    assert_eq!(instance.pids(), pids, "no container is restarted for it");
}

#[test]
fn a_pod_whose_namespace_is_unpinned_is_made_again() {
    let mut instance = Instance::new();
    instance.import_busybox();
    let port = free_port();
    instance.write("web.yaml", &published("web", "hello", port, ""));
    instance.start_daemon();
    let address = format!("127.0.0.1:{port}");
    await_answer(&instance, &address, "hello");
    let pods: Vec<_> = fs::read_dir(instance.run_dir().join("pods")).unwrap().flatten().collect();
    let pinned = pods[0].path().join("ns/net");
    nix::mount::umount2(&pinned, nix::mount::MntFlags::MNT_DETACH).unwrap();
    instance.keel(&["reconcile"]).expect_code(0);
    eventually_or(
        || format!("it is pinned again\n{}", instance.daemon_log()),
        || {
            let pid = *instance.pids().values().next()?;
            let theirs = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino();
            (fs::metadata(&pinned).ok()?.ino() == theirs).then_some(())
        },
    );
    await_answer(&instance, &address, "hello");
}

#[test]
fn addresses_stay_over_a_restart_of_the_daemon_and_twenty_pods_have_twenty() {
    let mut instance = Instance::new();
    instance.import_busybox();
    for n in 0..20 {
        instance.write(&format!("p{n}.yaml"), &sleeper(&format!("p{n}")));
    }
    instance.start_daemon();
    let all = |instance: &Instance| {
        let pods = instance.pods();
        let ready = pods.len() == 20 && pods.values().all(is_ready);
        let ips = pods.iter().map(|(name, pod)| (name.clone(), pod["status"]["podIP"].to_string()));
        ready.then(|| ips.collect::<Vec<_>>())
    };
    let before = eventually_or(|| instance.daemon_log(), || all(&instance));
    let distinct: BTreeSet<&String> = before.iter().map(|(_, ip)| ip).collect();
    assert_eq!(distinct.len(), 20, "{before:?}");
    instance.kill_daemon();
    instance.start_daemon();
    instance.keel(&["reconcile"]).expect_code(0);
    assert_eq!(eventually("all are ready", || all(&instance)), before);
}

#[test]
fn two_instances_have_networks_of_their_own() {
    let (a, b) = (Instance::new(), Instance::new());
    let (port_a, port_b) = (free_port(), free_port());
    for (instance, port, text) in [(&a, port_a, "a"), (&b, port_b, "b")] {
        instance.import_busybox();
        instance.apply(&published("web", text, port, "")).expect_code(0);
    }
    await_answer(&a, &format!("127.0.0.1:{port_a}"), "a");
    await_answer(&b, &format!("127.0.0.1:{port_b}"), "b");
    assert_ne!(ip_of(&a, "web"), ip_of(&b, "web"));
    let taken = b.keel_with_input(&["apply", "-f", "-"], &published("also", "x", port_a, "")).expect_code(1);
    assert!(taken.all().contains(&table(&a)), "the other instance is named: {}", taken.all());
    a.keel(&["system", "reset", "--force"]).expect_code(0);
    await_answer(&b, &format!("127.0.0.1:{port_b}"), "b");
}
