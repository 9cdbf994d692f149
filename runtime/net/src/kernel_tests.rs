//! Against the real kernel, in network and mount namespaces of their own: nothing of the host is touched.

use std::collections::BTreeSet;
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

mod life;
mod links;
mod table;
mod traffic;

/// A dropped packet is known by silence: long enough for a busy machine, short enough for a test.
const SILENCE: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(10);

const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// A host of its own: a network namespace with `lo`, and a mount namespace so that pins vanish with it. Its directory is
/// a tmpfs, as `/run` is.
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
            mount(Some("run"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
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

/// What a pod's containers share.
const SHARED: [NamespaceKind; 3] = [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts];

fn add_pod(net: &Net, dir: &Path, id: &str, n: u32) -> Pod {
    let ns = dir.join(id);
    create_namespaces(&ns, &SHARED, id).unwrap();
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

/// What the server says. For what must work: waits as long as a busy machine may take.
fn tcp(ip: Ipv4Addr, port: u16) -> io::Result<String> {
    tcp_within(PATIENCE, ip, port)
}

/// For what must not work.
fn try_tcp(ip: Ipv4Addr, port: u16) -> io::Result<String> {
    tcp_within(SILENCE, ip, port)
}

fn tcp_within(limit: Duration, ip: Ipv4Addr, port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(IpAddr::V4(ip), port), limit)?;
    stream.set_read_timeout(Some(limit))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn udp(ip: Ipv4Addr, port: u16) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((ip, port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
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
