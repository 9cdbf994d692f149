//! Namespaces, links, addresses.

use super::*;

#[test]
fn creation_repairs_what_is_half_made_and_removal_tolerates_absence() {
    on_a_private_host(|dir| {
        let ns = dir.join("ns");
        std::fs::create_dir(&ns).unwrap();
        std::fs::write(ns.join("net"), "").unwrap();
        create_namespaces(&ns, &[NamespaceKind::Uts], "half").unwrap();
        assert_eq!(observe_namespaces(&ns), [NamespaceKind::Uts]);
        create_namespaces(&ns, &SHARED, "whole").unwrap();
        assert_eq!(observe_namespaces(&ns), SHARED);
        let name = run(&format!("nsenter --uts={} hostname", ns.join("uts").display()));
        assert_eq!(name.trim(), "whole");
        let inode =
            |kind: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(ns.join(kind)).unwrap());
        let before = (inode("net"), inode("ipc"), inode("uts"));
        create_namespaces(&ns, &SHARED, "whole").unwrap();
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

/// A lost first packet is sent again after a second: an answer before that came to the first one.
const FIRST_TRY: Duration = Duration::from_millis(900);

#[test]
fn a_pod_created_anew_answers_at_once_under_its_old_address() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        net.ensure_bridge().unwrap();
        let old = add_pod(&net, dir, "web", 20);
        let other = add_pod(&net, dir, "other", 21);
        let server = Server::new(&old.ns, Ipv4Addr::UNSPECIFIED, 80, "old");
        assert_eq!(tcp_within(FIRST_TRY, old.ip, 80).unwrap(), format!("old {}", net.config().gateway()));
        // The server's sockets keep the old namespace alive, the worst case.
        remove_namespaces(&dir.join("web")).unwrap();
        let started = Instant::now();
        let new = add_pod(&net, dir, "web", 20);
        eprintln!("created anew beside its predecessor in {:?}", started.elapsed());
        assert_eq!(net.observe().unwrap().links["web"].len(), 2);
        let _new = Server::new(&new.ns, Ipv4Addr::UNSPECIFIED, 80, "new");
        assert_eq!(tcp_within(FIRST_TRY, new.ip, 80).unwrap(), format!("new {}", net.config().gateway()));
        let from_other = in_netns(&other.ns, || tcp_within(FIRST_TRY, new.ip, 80)).unwrap();
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

/// A process that sits there until it is dropped.
struct Sitter(std::process::Child);

impl Sitter {
    fn new(command: &str) -> Sitter {
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
        Sitter(child)
    }
}

impl Drop for Sitter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn copies_of_a_pin_in_other_mount_namespaces_keep_nothing_alive() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        net.ensure_bridge().unwrap();
        add_pod(&net, dir, "web", 20);
        let _sitter = Sitter::new("exec unshare -m sh -c 'echo ready; exec sleep 60'");
        remove_namespaces(&dir.join("web")).unwrap();
        until("the link goes with its namespace", || net.observe().unwrap().links.is_empty());
    });
}

#[test]
fn a_namespace_that_a_process_keeps_alive_loses_its_link_to_the_sweep() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        net.ensure_bridge().unwrap();
        let (old, live) = (add_pod(&net, dir, "old", 20), add_pod(&net, dir, "live", 21));
        let inside = format!("exec nsenter --net={} sh -c 'echo ready; exec sleep 60'", old.ns.display());
        let _sitter = Sitter::new(&inside);
        remove_namespaces(&dir.join("old")).unwrap();
        assert_eq!(net.observe().unwrap().links.len(), 2);
        let wanted = BTreeSet::from(["live".to_owned()]);
        assert_eq!(net.sweep(&wanted).unwrap(), 1);
        assert_eq!(net.observe().unwrap().links.keys().collect::<Vec<_>>(), ["live"]);
        assert_eq!(net.sweep(&wanted).unwrap(), 0);
        let _server = Server::new(&live.ns, Ipv4Addr::UNSPECIFIED, 80, "live");
        assert_eq!(tcp(live.ip, 80).unwrap(), format!("live {}", net.config().gateway()));
    });
}
