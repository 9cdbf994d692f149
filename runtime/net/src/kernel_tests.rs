//! Against the real kernel, in network and mount namespaces of their own: nothing of the host is touched.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::*;

/// A dropped packet is known by silence: long enough for a busy machine, short enough for a test.
const SILENCE: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(10);

const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// A host of its own: a network namespace with `lo`, and a mount namespace so that pins vanish with it.
fn on_a_private_host(test: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root to create network namespaces");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        let host = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            run("ip link set lo up");
            test(dir.path());
        });
        if let Err(panic) = host.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn config(tag: &str) -> NetConfig {
    NetConfig::new(tag, choose_subnet(tag, &observe_used_subnets("-").unwrap()).unwrap())
}

fn nth(config: &NetConfig, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(config.subnet.network()) + n)
}

struct Pod {
    ns: PathBuf,
    ip: Ipv4Addr,
}

fn add_pod(net: &Net, dir: &Path, id: &str, n: u32) -> Pod {
    let ns = dir.join(id);
    create_namespaces(&ns, &NamespaceKind::ALL, id).unwrap();
    let ip = nth(net.config(), n);
    net.attach(id, &ns.join("net"), ip).unwrap();
    Pod { ns: ns.join("net"), ip }
}

/// A machine on the host's wire, with a route to the pods' subnet as an attacker would set it.
fn add_outsider(dir: &Path, subnet: Ipv4Net) -> PathBuf {
    create_namespaces(&dir.join("outsider"), &[NamespaceKind::Net], "").unwrap();
    let ns = dir.join("outsider/net");
    run(&format!("ip link add up0 type veth peer name eth0 netns {}", ns.display()));
    run(&format!("ip addr add {HOST}/24 dev up0; ip link set up0 up; ip route add default via {OUTSIDER}"));
    in_netns(&ns, || {
        run(&format!(
            "ip addr add {OUTSIDER}/24 dev eth0; ip link set eth0 up; ip route add {subnet} via {HOST}; \
             sysctl -qw net.ipv4.conf.eth0.route_localnet=1; ip route add 127.9.9.0/24 via {HOST} || true"
        ));
    })
    .unwrap();
    ns
}

/// Answers "<label> <address of the client>" on TCP and UDP until it is dropped.
struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    fn new(ns: &Path, ip: Ipv4Addr, port: u16, label: &'static str) -> Server {
        let at = SocketAddrV4::new(ip, port);
        let (tcp, udp) =
            in_netns(ns, || (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())).unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_tcp, stop_udp) = (stop.clone(), stop.clone());
        let answer_tcp = move || {
            while !stop_tcp.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((mut peer, from)) => {
                        let _ = peer.write_all(format!("{label} {}", from.ip()).as_bytes());
                    }
                    Err(_) => {
                        let mut poll = [nix::poll::PollFd::new(
                            std::os::fd::AsFd::as_fd(&tcp),
                            nix::poll::PollFlags::POLLIN,
                        )];
                        let _ = nix::poll::poll(&mut poll, 20u16);
                    }
                }
            }
        };
        let answer_udp = move || {
            let mut buffer = [0; 64];
            while !stop_udp.load(Ordering::Relaxed) {
                if let Ok((_, from)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(format!("{label} {}", from.ip()).as_bytes(), from);
                }
            }
        };
        Server { stop, threads: vec![thread::spawn(answer_tcp), thread::spawn(answer_udp)] }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn tcp(ip: Ipv4Addr, port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(IpAddr::V4(ip), port), SILENCE)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn udp(ip: Ipv4Addr, port: u16) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((ip, port))?;
    socket.set_read_timeout(Some(SILENCE))?;
    socket.send(b"?")?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn publish(host_ip: Option<Ipv4Addr>, host_port: u16, pod: &Pod, protocol: Protocol) -> Publish {
    Publish { host_ip, host_port, ip: pod.ip, container_port: 80, protocol }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::yield_now();
    }
}

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// The whole of publishing, once with bridged packets seen by the packet filter and once without.
fn traffic_goes_where_it_should(bridge_nf: &str) {
    on_a_private_host(|dir| {
        run(&format!("sysctl -qw net.bridge.bridge-nf-call-iptables={bridge_nf} || true"));
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let (web, other) = (add_pod(&net, dir, "web", 20), add_pod(&net, dir, "other", 21));
        let gateway = net.config().gateway();
        let _web = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        let _other = Server::new(&other.ns, Ipv4Addr::UNSPECIFIED, 80, "other");
        let _world = Server::new(&outsider, OUTSIDER, 7000, "world");
        net.apply(&[
            publish(None, 8080, &web, Protocol::Tcp),
            publish(None, 8080, &web, Protocol::Udp),
            publish(Some(LOCALHOST), 8081, &web, Protocol::Tcp),
            publish(Some(LOCALHOST), 8080, &other, Protocol::Tcp),
        ])
        .unwrap();

        // From the host: its own address, 127.0.0.1, and the address-specific entry before the general one.
        assert_eq!(tcp(HOST, 8080).unwrap(), format!("web {HOST}"));
        assert_eq!(udp(HOST, 8080).unwrap(), format!("web {HOST}"));
        assert_eq!(tcp(LOCALHOST, 8081).unwrap(), format!("web {gateway}"));
        assert_eq!(udp(LOCALHOST, 8080).unwrap(), format!("web {gateway}"));
        assert_eq!(tcp(LOCALHOST, 8080).unwrap(), format!("other {gateway}"));
        tcp(HOST, 8081).unwrap_err();

        // From outside: the true source arrives; nothing but what is published for that address.
        in_netns(&outsider, || {
            assert_eq!(tcp(HOST, 8080).unwrap(), format!("web {OUTSIDER}"));
            assert_eq!(udp(HOST, 8080).unwrap(), format!("web {OUTSIDER}"));
            tcp(HOST, 8081).unwrap_err();
            tcp(web.ip, 80).expect_err("pods are reached through published ports only");
            tcp(gateway, 8080).expect_err("the bridge's address is not for outsiders");
        })
        .unwrap();

        // From pods: each other, a published port of each other, their own published port, the world.
        in_netns(&other.ns, || {
            assert_eq!(tcp(web.ip, 80).unwrap(), format!("web {}", other.ip));
            assert_eq!(tcp(HOST, 8080).unwrap(), format!("web {gateway}"));
            assert_eq!(udp(HOST, 8080).unwrap(), format!("web {gateway}"));
            assert_eq!(tcp(OUTSIDER, 7000).unwrap(), format!("world {HOST}"));
            assert_eq!(udp(OUTSIDER, 7000).unwrap(), format!("world {HOST}"));
            tcp(LOCALHOST, 8081).expect_err("127.0.0.1 in a pod is the pod");
        })
        .unwrap();
        in_netns(&web.ns, || {
            assert_eq!(tcp(HOST, 8080).unwrap(), format!("web {gateway}"));
            assert_eq!(tcp(LOCALHOST, 80).unwrap(), "web 127.0.0.1");
        })
        .unwrap();
    });
}

#[test]
fn published_ports_with_bridge_filtering() {
    traffic_goes_where_it_should("1");
}

#[test]
fn published_ports_without_bridge_filtering() {
    traffic_goes_where_it_should("0");
}

#[test]
fn without_the_table_outsiders_reach_pods_directly() {
    // What the drops of the table are for; proves that the tests above fail without them.
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let web = add_pod(&net, dir, "web", 20);
        let _web = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        let direct = in_netns(&outsider, || tcp(web.ip, 80)).unwrap();
        assert_eq!(direct.unwrap(), format!("web {OUTSIDER}"));
        net.apply(&[]).unwrap();
        in_netns(&outsider, || tcp(web.ip, 80)).unwrap().unwrap_err();
    });
}

#[test]
fn creation_repairs_what_is_half_made_and_removal_tolerates_absence() {
    on_a_private_host(|dir| {
        let ns = dir.join("ns");
        std::fs::create_dir(&ns).unwrap();
        std::fs::write(ns.join("net"), "").unwrap();
        create_namespaces(&ns, &[NamespaceKind::Uts], "half").unwrap();
        assert_eq!(observe_namespaces(&ns), [NamespaceKind::Uts]);
        create_namespaces(&ns, &NamespaceKind::ALL, "whole").unwrap();
        assert_eq!(observe_namespaces(&ns), NamespaceKind::ALL);
        let name = run(&format!("nsenter --uts={} hostname", ns.join("uts").display()));
        assert_eq!(name.trim(), "whole");
        let inode =
            |kind: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(ns.join(kind)).unwrap());
        let before = (inode("net"), inode("ipc"), inode("uts"));
        create_namespaces(&ns, &NamespaceKind::ALL, "whole").unwrap();
        assert_eq!(before, (inode("net"), inode("ipc"), inode("uts")), "what exists is kept");
        let settings = in_netns(&ns.join("net"), || {
            run("sysctl -n net.ipv4.ip_unprivileged_port_start net.ipv4.ping_group_range; ip -br link")
        })
        .unwrap();
        let lines: Vec<&str> = settings.lines().collect();
        assert_eq!(lines[0], "0");
        assert_eq!(lines[1], "0\t2147483647");
        assert!(lines[2].starts_with("lo ") && lines[2].contains("UP"), "{settings}");
        remove_namespaces(&ns).unwrap();
        assert!(!ns.exists());
        remove_namespaces(&ns).unwrap();
    });
}

#[test]
fn attach_is_idempotent_and_links_go_with_their_namespace() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        assert!(net.ensure_bridge().unwrap().created);
        let again = net.ensure_bridge().unwrap();
        assert!(!again.created && !again.forwarding_enabled);
        let web = add_pod(&net, dir, "web", 20);
        let before = net.observe().unwrap();
        assert_eq!(before.links["web"].len(), 1);
        assert_eq!(before.bridge.unwrap().addr(), net.config().gateway());

        // A second time, and with another address: the old one does not stay.
        net.attach("web", &web.ns, web.ip).unwrap();
        let moved = nth(net.config(), 30);
        net.attach("web", &web.ns, moved).unwrap();
        let addresses = in_netns(&web.ns, || run("ip -br -4 addr show eth0; ip route")).unwrap();
        assert!(addresses.contains(&moved.to_string()), "{addresses}");
        assert!(!addresses.contains(&web.ip.to_string()), "{addresses}");
        assert!(addresses.contains(&format!("default via {}", net.config().gateway())), "{addresses}");
        assert_eq!(net.observe().unwrap().links, before.links);

        remove_namespaces(&dir.join("web")).unwrap();
        until("the link goes with its namespace", || net.observe().unwrap().links.is_empty());
        net.purge().unwrap();
        assert_eq!(net.observe().unwrap().bridge, None);
        net.purge().unwrap();
    });
}
