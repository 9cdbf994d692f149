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

        // As a predecessor that died half-way, or a careless hand, may leave it.
        let link = &before.links["web"][0];
        run(&format!("ip link set {link} down nomaster"));
        in_netns(&web.ns, || run("ip link set eth0 down; ip addr flush dev eth0; ip link set lo down"))
            .unwrap();
        net.attach("web", &web.ns, web.ip).unwrap();
        let _server = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        assert_eq!(tcp(web.ip, 80).unwrap(), format!("web {}", net.config().gateway()));
        in_netns(&web.ns, || tcp(LOCALHOST, 80).unwrap()).unwrap();
        drop(_server);

        remove_namespaces(&dir.join("web")).unwrap();
        until("the link goes with its namespace", || net.observe().unwrap().links.is_empty());
        net.purge().unwrap();
        assert_eq!(net.observe().unwrap().bridge, None);
        net.purge().unwrap();
    });
}

/// What `nft` decodes from the kernel, in the words of our own rendering. Releases differ in how much they add to a
/// line (end of a range, flags, counts); only the common part counts.
fn decoded(table: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for line in run(&format!("nft --debug=netlink list table inet {table}")).lines() {
        if let Some(expression) = line.trim().strip_prefix("[ ") {
            let words: Vec<&str> = expression.trim_end_matches(" ]").split(' ').collect();
            let kept = match words[0] {
                "lookup" => words[..7].to_vec(),
                "nat" => vec!["nat", "dnat", "ip", "addr_min", "reg", "1", "proto_min", "reg", "9"],
                "counter" => vec!["counter"],
                _ => words,
            };
            lines.push(format!("[ {} ]", kept.join(" ")));
        } else if let Some(rest) = line.strip_prefix(&format!("inet {table} ")) {
            lines.push(format!("rule of {}", rest.split(' ').next().unwrap()));
        }
        if line.starts_with("table ") {
            break;
        }
    }
    lines
}

#[test]
fn the_kernel_holds_exactly_the_rules_that_were_rendered() {
    on_a_private_host(|dir| {
        for tag in ["", "-12ab9f"] {
            let net = Net::open(config(tag)).unwrap();
            let web = Pod { ns: dir.to_owned(), ip: nth(net.config(), 20) };
            let wanted = [
                publish(None, 8080, &web, Protocol::Tcp),
                publish(None, 8080, &web, Protocol::Sctp),
                publish(Some(LOCALHOST), 53, &web, Protocol::Udp),
            ];
            net.apply(&wanted).unwrap();
            let table = filter::lower::lower_table(net.config(), &wanted);
            let mut rendered = Vec::new();
            for chain in &table.chains {
                for rule in &chain.rules {
                    rendered.push(format!("rule of {}", chain.name));
                    rendered.extend(rule.expressions.iter().map(ToString::to_string));
                }
            }
            let found: Vec<String> = decoded(&table.name)
                .into_iter()
                .filter(|line| !line.starts_with("rule of @")) // the elements of the maps
                .collect();
            assert_eq!(found, rendered);
            // And people can read it.
            let listing = run(&format!("nft list table inet {}", table.name));
            for line in [
                "comment \"managed by evenkeel, ",
                "127.0.0.1 . udp . 53 : ",
                "tcp . 8080 : ",
                "sctp . 8080 : ",
                "ip daddr . meta l4proto . th dport map @publish-by-address",
                "comment \"pods are reached through published ports only\"",
            ] {
                assert!(listing.contains(line), "{line} is not in\n{listing}");
            }
        }
    });
}

#[test]
fn every_way_to_lose_a_rule_is_noticed_and_repaired() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let watch = FilterWatch::open().unwrap();
        let web = Pod { ns: dir.to_owned(), ip: nth(net.config(), 20) };
        let wanted =
            [publish(None, 8080, &web, Protocol::Tcp), publish(Some(LOCALHOST), 81, &web, Protocol::Tcp)];
        assert!(!net.in_sync(&wanted).unwrap(), "there is no table yet");
        net.apply(&wanted).unwrap();
        assert!(net.in_sync(&wanted).unwrap());
        assert!(!net.in_sync(&wanted[..1]).unwrap(), "other ports are another table");
        watch.changed().unwrap();
        assert!(!watch.changed().unwrap());
        for damage in [
            "nft flush ruleset",
            "nft delete table inet evenkeel",
            "nft flush table inet evenkeel",
            "nft flush chain inet evenkeel raw",
            "nft flush map inet evenkeel publish-any",
            "nft add rule inet evenkeel prerouting drop",
            "nft add chain inet evenkeel more",
            "nft add element inet evenkeel publish-any '{ tcp . 22 : 10.77.0.9 . 22 }'",
            "nft delete element inet evenkeel publish-by-address '{ 127.0.0.1 . tcp . 81 }'",
        ] {
            let before = net.observe().unwrap().generation;
            run(damage);
            assert!(watch.changed().unwrap(), "{damage}");
            assert!(!net.in_sync(&wanted).unwrap(), "{damage}");
            assert_ne!(before, net.observe().unwrap().generation, "{damage}");
            net.apply(&wanted).unwrap();
            assert!(net.in_sync(&wanted).unwrap(), "{damage}");
            watch.changed().unwrap();
        }
    });
}

#[test]
fn an_owned_table_survives_flushes_and_its_owner() {
    on_a_private_host(|dir| {
        let owned = NetConfig { ownership: TableOwnership::Owned, ..config("") };
        let web = Pod { ns: dir.to_owned(), ip: nth(&owned, 20) };
        let wanted = [publish(None, 8080, &web, Protocol::Tcp)];
        let first = Net::open(owned.clone()).unwrap();
        first.apply(&wanted).unwrap();
        if !run("nft list table inet evenkeel").contains("flags owner") {
            eprintln!("SKIPPED: this kernel has no persistent owned tables; the table is shared");
            return;
        }
        run("nft flush ruleset");
        assert!(first.in_sync(&wanted).unwrap(), "a flush passes by an owned table");
        let second = Net::open(config("")).unwrap();
        let refused = second.apply(&wanted).unwrap_err();
        assert!(matches!(refused, NetError::TableOwned { .. }), "{refused}");
        first.apply(&[]).unwrap();
        first.apply(&wanted).unwrap();

        drop(first);
        assert!(second.in_sync(&wanted).unwrap(), "the table outlives its owner");
        let next = Net::open(owned).unwrap();
        next.apply(&wanted).unwrap();
        run("nft flush ruleset");
        assert!(next.in_sync(&wanted).unwrap(), "the next process owns it");
        drop(next);
        second.apply(&[]).unwrap();
        assert!(second.in_sync(&[]).unwrap(), "an orphan can be made a shared table again");
        second.purge().unwrap();
    });
}

#[test]
fn two_instances_side_by_side() {
    on_a_private_host(|dir| {
        let (a, b) = (Net::open(config("")).unwrap(), Net::open(config("-0000b0")).unwrap());
        let outsider = add_outsider(dir, a.config().subnet);
        a.ensure_bridge().unwrap();
        b.ensure_bridge().unwrap();
        let (web_a, web_b) = (add_pod(&a, dir, "web", 20), add_pod(&b, &dir.join("b"), "web", 20));
        let _a = Server::new(&web_a.ns, Ipv4Addr::UNSPECIFIED, 80, "a");
        let _b = Server::new(&web_b.ns, Ipv4Addr::UNSPECIFIED, 80, "b");
        a.apply(&[publish(None, 8080, &web_a, Protocol::Tcp)]).unwrap();
        b.apply(&[publish(None, 8081, &web_b, Protocol::Tcp)]).unwrap();

        in_netns(&outsider, || {
            assert_eq!(tcp(HOST, 8080).unwrap(), format!("a {OUTSIDER}"));
            assert_eq!(tcp(HOST, 8081).unwrap(), format!("b {OUTSIDER}"));
        })
        .unwrap();
        in_netns(&web_a.ns, || {
            assert_eq!(tcp(HOST, 8081).unwrap(), format!("b {}", b.config().gateway()));
            tcp(web_b.ip, 80).expect_err("instances are apart");
        })
        .unwrap();
        in_netns(&web_b.ns, || tcp(web_a.ip, 80).expect_err("instances are apart")).unwrap();

        // A port of the other instance, a port of the host, an address that the host does not have.
        let clash = |host_ip, port| b.check_port(&publish(host_ip, port, &web_b, Protocol::Tcp));
        let error = clash(None, 8080).unwrap_err();
        assert!(
            matches!(&error, NetPortError::Port(PortError::Published { table, .. }) if table == "evenkeel")
        );
        clash(Some(LOCALHOST), 8080).unwrap_err();
        clash(None, 8081).unwrap();
        b.check_port(&publish(None, 8080, &web_b, Protocol::Udp)).unwrap();
        let _holder = TcpListener::bind("127.0.0.1:8090").unwrap();
        let error = clash(None, 8090).unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        clash(Some(Ipv4Addr::new(192, 0, 2, 1)), 8090).unwrap_err();

        a.purge().unwrap();
        let left = a.observe().unwrap();
        assert!(left.bridge.is_none() && left.links.is_empty() && left.table.is_none(), "{left:?}");
        let other = in_netns(&outsider, || tcp(HOST, 8081)).unwrap();
        assert_eq!(other.unwrap(), format!("b {OUTSIDER}"));
    });
}

#[test]
fn a_pod_created_anew_answers_at_once_under_its_old_address() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        net.ensure_bridge().unwrap();
        let old = add_pod(&net, dir, "web", 20);
        let other = add_pod(&net, dir, "other", 21);
        let server = Server::new(&old.ns, Ipv4Addr::UNSPECIFIED, 80, "old");
        assert_eq!(tcp(old.ip, 80).unwrap(), format!("old {}", net.config().gateway()));
        // The server's sockets keep the old namespace alive, the worst case.
        remove_namespaces(&dir.join("web")).unwrap();
        let started = Instant::now();
        let new = add_pod(&net, dir, "web", 20);
        eprintln!("created anew beside its predecessor in {:?}", started.elapsed());
        assert_eq!(net.observe().unwrap().links["web"].len(), 2);
        let _new = Server::new(&new.ns, Ipv4Addr::UNSPECIFIED, 80, "new");
        assert_eq!(tcp(new.ip, 80).unwrap(), format!("new {}", net.config().gateway()));
        let from_other = in_netns(&other.ns, || tcp(new.ip, 80)).unwrap();
        assert_eq!(from_other.unwrap(), format!("new {}", other.ip));

        drop(server);
        until("the old link goes with its namespace", || net.observe().unwrap().links["web"].len() == 1);
        assert_eq!(net.sweep(&BTreeSet::from(["web".to_owned()])).unwrap(), 1);
        assert_eq!(net.observe().unwrap().links.keys().collect::<Vec<_>>(), ["web"]);
        assert_eq!(net.detach("web").unwrap(), 1);
        assert_eq!(net.detach("web").unwrap(), 0);
        assert!(net.observe().unwrap().links.is_empty());
    });
}

#[test]
fn a_udp_client_follows_its_port_to_another_pod() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let (a, b) = (add_pod(&net, dir, "a", 20), add_pod(&net, dir, "b", 21));
        let _a = Server::new(&a.ns, Ipv4Addr::UNSPECIFIED, 80, "a");
        let _b = Server::new(&b.ns, Ipv4Addr::UNSPECIFIED, 80, "b");
        net.apply(&[]).unwrap();
        let client = in_netns(&outsider, || UdpSocket::bind((OUTSIDER, 5000)).unwrap()).unwrap();
        client.set_read_timeout(Some(SILENCE)).unwrap();
        let ask = || {
            client.send_to(b"?", (HOST, 5353)).unwrap();
            let mut buffer = [0; 64];
            client.recv(&mut buffer).map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        ask().expect_err("nobody is there, but the flow is tracked from now on");
        net.apply(&[publish(None, 5353, &a, Protocol::Udp)]).unwrap();
        assert_eq!(ask().unwrap(), format!("a {OUTSIDER}"));
        net.apply(&[publish(None, 5353, &b, Protocol::Udp)]).unwrap();
        assert_eq!(ask().unwrap(), format!("b {OUTSIDER}"));
    });
}

#[test]
fn refusals_say_what_and_why() {
    on_a_private_host(|dir| {
        let mut taken = config("");
        run("ip link add ek0 type veth peer name other");
        let net = Net::open(taken.clone()).unwrap();
        assert!(matches!(net.ensure_bridge(), Err(NetError::BridgeTaken { name }) if name == "ek0"));
        let error = net.attach("web", &dir.join("missing"), nth(&taken, 2)).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
        net.purge().unwrap();
        run("ip link show ek0");

        taken.bridge = "a-name-that-is-too-long".to_owned();
        let error = Net::open(taken).unwrap().ensure_bridge().unwrap_err().to_string();
        assert!(error.contains("a-name-that-is-too-long") && error.contains("kernel says"), "{error}");

        let net = Net::open(NetConfig { bridge: "ekx".to_owned(), ..config("") }).unwrap();
        create_namespaces(&dir.join("ns"), &[NamespaceKind::Net], "").unwrap();
        let error = net.attach("web", &dir.join("ns/net"), nth(net.config(), 2)).unwrap_err();
        assert!(matches!(error, NetError::NoBridge { .. }), "{error}");
    });
}

#[test]
fn a_firewall_that_drops_forwarded_packets_is_named_with_its_remedy() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let web = add_pod(&net, dir, "web", 20);
        let _web = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        let _world = Server::new(&outsider, OUTSIDER, 7000, "world");
        net.apply(&[publish(None, 8080, &web, Protocol::Tcp)]).unwrap();
        let inwards = || in_netns(&outsider, || tcp(HOST, 8080)).unwrap();
        let outwards = || in_netns(&web.ns, || tcp(OUTSIDER, 7000)).unwrap();
        assert!(net.forward_drops().unwrap().is_empty());

        run("nft 'add table ip filter; \
             add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }; \
             add chain ip filter INPUT { type filter hook input priority 0; policy drop; }; \
             add rule ip filter INPUT ct state established accept'");
        inwards().unwrap_err();
        outwards().unwrap_err();
        let found = net.forward_drops().unwrap();
        assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ip filter FORWARD"]);
        run(&found[0].remedy(&net.config().bridge));
        assert_eq!(inwards().unwrap(), format!("web {OUTSIDER}"));
        assert_eq!(outwards().unwrap(), format!("world {HOST}"));
    });
}

#[test]
fn mtu_follows_the_default_route_unless_it_is_given() {
    on_a_private_host(|dir| {
        let given = config("");
        add_outsider(dir, given.subnet);
        run("ip link set up0 mtu 1400");
        let net = Net::open(given.clone()).unwrap();
        assert_eq!(net.ensure_bridge().unwrap().mtu, 1400);
        let web = add_pod(&net, dir, "web", 20);
        let link = in_netns(&web.ns, || run("ip -o link show eth0")).unwrap();
        assert!(link.contains("mtu 1400"), "{link}");
        let net = Net::open(NetConfig { mtu: Some(1300), ..given }).unwrap();
        net.ensure_bridge().unwrap();
        let web = add_pod(&net, dir, "web2", 21);
        let link = in_netns(&web.ns, || run("ip -o link show eth0")).unwrap();
        assert!(link.contains("mtu 1300"), "{link}");
        let used = observe_used_subnets("ek0").unwrap();
        assert!(used.contains(&"198.51.100.0/24".parse().unwrap()), "{used:?}");
        assert!(!used.iter().any(|net| net.addr().octets()[..2] == [10, 77]), "{used:?}");
        assert_eq!(
            choose_subnet("", &observe_used_subnets("-").unwrap()).unwrap().to_string(),
            "10.78.0.0/16"
        );
    });
}

#[test]
fn loopback_addresses_are_reached_from_the_host_alone() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let (web, evil) = (add_pod(&net, dir, "web", 20), add_pod(&net, dir, "evil", 21));
        let _web = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        let host = TcpListener::bind((LOCALHOST, 9000)).unwrap();
        let published = [publish(Some(LOCALHOST), 8081, &web, Protocol::Tcp)];
        net.apply(&published).unwrap();
        // Packets to 127.0.0.1 leave for the host instead of staying.
        let divert = |ns: &Path, via: Ipv4Addr, own: Ipv4Addr| {
            in_netns(ns, || {
                run(&format!(
                    "sysctl -qw net.ipv4.conf.eth0.route_localnet=1 net.ipv4.conf.all.rp_filter=0; \
                     ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via {via} dev eth0 src {own}"
                ))
            })
            .unwrap();
        };
        divert(&outsider, HOST, OUTSIDER);
        divert(&evil.ns, net.config().gateway(), evil.ip);
        let from_outside = || in_netns(&outsider, || tcp(LOCALHOST, 8081)).unwrap();
        let from_pod = || {
            let address = SocketAddr::from((LOCALHOST, 9000));
            in_netns(&evil.ns, || TcpStream::connect_timeout(&address, SILENCE)).unwrap()
        };
        from_outside().expect_err("a port published for 127.0.0.1 is not for the neighbours of the host");
        from_pod().expect_err("the host's own loopback is not for pods");

        // The same attacks succeed without the rules: it is the rules that stop them.
        run("nft flush chain inet evenkeel raw");
        assert_eq!(from_outside().unwrap(), format!("web {OUTSIDER}"));
        from_pod().unwrap();
        drop(host);
    });
}

/// Whether something is left that `before` did not show.
fn census() -> (usize, usize) {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    (mounts.lines().count(), run("ip -o link").lines().count())
}

#[test]
fn many_lives_leave_nothing() {
    on_a_private_host(|dir| {
        let before = census();
        let net = Net::open(config("")).unwrap();
        net.ensure_bridge().unwrap();
        for n in 0..100u32 {
            let id = format!("p{}", n % 7);
            add_pod(&net, dir, &id, n % 7 + 2);
            net.apply(&[]).unwrap();
            remove_namespaces(&dir.join(&id)).unwrap();
        }
        until("every link is gone", || net.observe().unwrap().links.is_empty());
        net.purge().unwrap();
        assert_eq!(census(), before);
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
    });
}

const CRASH_DIR: &str = "KEEL_NET_CRASH_DIR";

/// Everything for one pod, from nothing or from whatever is there.
fn set_up_one(dir: &Path) -> (Net, Pod) {
    let net = Net::open(NetConfig::new("", "10.77.0.0/16".parse().unwrap())).unwrap();
    net.ensure_bridge().unwrap();
    let web = add_pod(&net, dir, "web", 20);
    net.apply(&[publish(None, 8080, &web, Protocol::Tcp)]).unwrap();
    (net, web)
}

/// Not a test by itself: the body of the process that the next test kills.
#[test]
fn crash_child() {
    if let Some(dir) = std::env::var_os(CRASH_DIR) {
        set_up_one(Path::new(&dir));
    }
}

#[test]
fn killed_at_any_step_the_next_try_completes() {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("SKIPPED: needs strace to kill a process at its n-th system call");
        return;
    }
    on_a_private_host(|dir| {
        // Counted per thread, so each kind of call is walked through by itself.
        let mut kills = 0;
        for call in ["sendto", "unshare", "sethostname", "write", "mount", "setns", "exit"] {
            for nth in 1.. {
                let status = Command::new("strace")
                    .args(["-f", "-qq", "-o", "/dev/null", "-e"])
                    .arg(format!("inject={call}:signal=KILL:when={nth}"))
                    .arg(std::env::current_exe().unwrap())
                    .args(["--exact", "kernel_tests::crash_child"])
                    .env(CRASH_DIR, dir)
                    .output()
                    .unwrap()
                    .status;
                let at = format!("killed at {call} {nth}");
                let (net, web) = set_up_one(dir);
                assert!(net.in_sync(&[publish(None, 8080, &web, Protocol::Tcp)]).unwrap(), "{at}");
                assert_eq!(net.observe().unwrap().links["web"].len(), 1, "{at}");
                let server = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
                let gateway = net.config().gateway();
                assert_eq!(tcp(LOCALHOST, 8080).unwrap(), format!("web {gateway}"), "{at}");
                drop(server);
                remove_namespaces(&dir.join("web")).unwrap();
                net.purge().unwrap();
                if status.success() {
                    break;
                }
                kills += 1;
            }
        }
        eprintln!("killed at {kills} steps");
        assert!(kills > 20, "only {kills}: the injection does not work");
    });
}

/// Prints figures; asserts only that everything is there and goes away.
#[test]
fn many_pods_and_many_ports() {
    const PODS: u32 = 50;
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let started = Instant::now();
        net.ensure_bridge().unwrap();
        eprintln!("bridge created in {:?}", started.elapsed());
        let (mut namespaces, mut attach, mut again, mut bridge) = (vec![], vec![], vec![], vec![]);
        let timed = |into: &mut Vec<Duration>, f: &mut dyn FnMut()| {
            let started = Instant::now();
            f();
            into.push(started.elapsed());
        };
        for n in 0..PODS {
            let (ns, ip) = (dir.join(format!("p{n}")), nth(net.config(), n + 2));
            let id = format!("p{n}");
            timed(&mut namespaces, &mut || create_namespaces(&ns, &NamespaceKind::ALL, &id).unwrap());
            timed(&mut attach, &mut || drop(net.attach(&id, &ns.join("net"), ip).unwrap()));
            timed(&mut again, &mut || drop(net.attach(&id, &ns.join("net"), ip).unwrap()));
            timed(&mut bridge, &mut || assert!(!net.ensure_bridge().unwrap().created));
        }
        for (what, times) in [
            ("namespaces", namespaces),
            ("attach", attach),
            ("attach again", again),
            ("bridge again", bridge),
        ] {
            print_times(what, times);
        }
        assert_eq!(net.observe().unwrap().links.len(), PODS as usize);

        for ports in [1u16, 500, 5000] {
            let web = Pod { ns: dir.to_owned(), ip: nth(net.config(), 2) };
            let wanted: Vec<Publish> =
                (0..ports).map(|n| publish(None, 10_000 + n, &web, Protocol::Tcp)).collect();
            let (mut replace, mut check) = (vec![], vec![]);
            for _ in 0..20 {
                timed(&mut replace, &mut || net.apply(&wanted).unwrap());
                timed(&mut check, &mut || assert!(net.in_sync(&wanted).unwrap()));
            }
            print_times(&format!("replace a table of {ports} ports"), replace);
            print_times(&format!("check a table of {ports} ports"), check);
        }

        let started = Instant::now();
        for n in 0..PODS / 2 {
            remove_namespaces(&dir.join(format!("p{n}"))).unwrap();
        }
        eprintln!("{} pods' namespaces let go of in {:?}", PODS / 2, started.elapsed());
        until("the links of removed namespaces are gone", || {
            net.observe().unwrap().links.len() == (PODS - PODS / 2) as usize
        });
        eprintln!("their links gone after {:?}", started.elapsed());

        // A crash leaves everything; a fresh process clears it.
        drop(net);
        let started = Instant::now();
        let net = Net::open(NetConfig::new("", "10.77.0.0/16".parse().unwrap())).unwrap();
        net.purge().unwrap();
        eprintln!("{} pods purged in {:?}", PODS - PODS / 2, started.elapsed());
        let left = net.observe().unwrap();
        assert!(left.bridge.is_none() && left.links.is_empty() && left.table.is_none(), "{left:?}");
        assert!(!run("ip -br link").contains("ek"));
    });
}

fn print_times(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    eprintln!("{what}: median {median:?}, worst {worst:?} of {}", times.len());
}
