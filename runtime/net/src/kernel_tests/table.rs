//! The packet-filter table as the kernel holds it.

use super::*;
use std::thread;
use std::time::{Duration, Instant};

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
        // The old socket is closed when the last child that another test forks meanwhile has started its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = next.apply(&wanted) {
            assert!(Instant::now() < deadline, "{error}");
            thread::sleep(Duration::from_millis(5));
        }
        run("nft flush ruleset");
        assert!(next.in_sync(&wanted).unwrap(), "the next process owns it");
        drop(next);
        second.apply(&[]).unwrap();
        assert!(second.in_sync(&[]).unwrap(), "an orphan can be made a shared table again");
        second.purge().unwrap();
    });
}
