//! Packets: who reaches whom, under which source address.

use super::*;

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
        try_tcp(HOST, 8081).unwrap_err();

        // From outside: the true source arrives; nothing but what is published for that address.
        in_netns(&outsider, || {
            assert_eq!(tcp(HOST, 8080).unwrap(), format!("web {OUTSIDER}"));
            assert_eq!(udp(HOST, 8080).unwrap(), format!("web {OUTSIDER}"));
            try_tcp(HOST, 8081).unwrap_err();
            try_tcp(web.ip, 80).expect_err("pods are reached through published ports only");
            try_tcp(gateway, 8080).expect_err("the bridge's address is not for outsiders");
        })
        .unwrap();

        // From pods: each other, a published port of each other, their own published port, the world.
        in_netns(&other.ns, || {
            assert_eq!(tcp(web.ip, 80).unwrap(), format!("web {}", other.ip));
            assert_eq!(tcp(HOST, 8080).unwrap(), format!("web {gateway}"));
            assert_eq!(udp(HOST, 8080).unwrap(), format!("web {gateway}"));
            assert_eq!(tcp(OUTSIDER, 7000).unwrap(), format!("world {HOST}"));
            assert_eq!(udp(OUTSIDER, 7000).unwrap(), format!("world {HOST}"));
            try_tcp(LOCALHOST, 8081).expect_err("127.0.0.1 in a pod is the pod");
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
fn a_bridge_is_guarded_before_the_first_port_is_published() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let web = add_pod(&net, dir, "web", 20);
        let _web = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        let direct = || in_netns(&outsider, || try_tcp(web.ip, 80)).unwrap();
        direct().unwrap_err();
        let _world = Server::new(&outsider, OUTSIDER, 7000, "world");
        let outwards = || in_netns(&web.ns, || try_tcp(OUTSIDER, 7000)).unwrap();
        assert_eq!(outwards().unwrap(), format!("world {HOST}"));

        // Proves that it is the table that does it.
        run("nft delete table inet evenkeel");
        assert_eq!(direct().unwrap(), format!("web {OUTSIDER}"));
        net.ensure_bridge().unwrap();
        direct().unwrap_err();
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
            try_tcp(web_b.ip, 80).expect_err("instances are apart");
        })
        .unwrap();
        in_netns(&web_b.ns, || try_tcp(web_a.ip, 80).expect_err("instances are apart")).unwrap();

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
fn a_firewall_that_drops_forwarded_packets_is_named_with_its_remedy() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        let outsider = add_outsider(dir, net.config().subnet);
        net.ensure_bridge().unwrap();
        let web = add_pod(&net, dir, "web", 20);
        let _web = Server::new(&web.ns, Ipv4Addr::UNSPECIFIED, 80, "web");
        let _world = Server::new(&outsider, OUTSIDER, 7000, "world");
        net.apply(&[publish(None, 8080, &web, Protocol::Tcp)]).unwrap();
        let inwards = || in_netns(&outsider, || try_tcp(HOST, 8080)).unwrap();
        let outwards = || in_netns(&web.ns, || try_tcp(OUTSIDER, 7000)).unwrap();
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
        let from_outside = || in_netns(&outsider, || try_tcp(LOCALHOST, 8081)).unwrap();
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

#[test]
fn counters_are_those_of_the_pod() {
    on_a_private_host(|dir| {
        let net = Net::open(config("")).unwrap();
        net.ensure_bridge().unwrap();
        let web = add_pod(&net, dir, "web", 20);
        let sink = in_netns(&web.ns, || UdpSocket::bind((web.ip, 9)).unwrap()).unwrap();
        sink.set_read_timeout(Some(PATIENCE)).unwrap();
        let before = net.traffic().unwrap()["web"];
        let source = UdpSocket::bind((net.config().gateway(), 0)).unwrap();
        for _ in 0..100 {
            source.send_to(&[0; 1000], (web.ip, 9)).unwrap();
            sink.recv(&mut [0; 1000]).unwrap();
        }
        let after = net.traffic().unwrap()["web"];
        assert!(after.in_bytes - before.in_bytes >= 100_000, "{before:?} {after:?}");
        assert!(after.in_packets - before.in_packets >= 100, "{before:?} {after:?}");
        assert!(after.out_bytes - before.out_bytes < 10_000, "{before:?} {after:?}");
    });
}
