//! A pod's `/etc/resolv.conf` and `/etc/hosts` as text.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// What the resolvers of both C libraries read (MAXNS); kubelet keeps the first three as well.
const NAMESERVERS: usize = 3;
/// kubelet's limit; glibc reads more, musl fewer characters.
const SEARCHES: usize = 32;

/// A pod's wishes: `dnsPolicy` and `dnsConfig` in one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Start from the host's servers, searches and options (every policy but `None`).
    pub host_servers: bool,
    pub nameservers: Vec<String>,
    pub searches: Vec<String>,
    /// `name` or `name:value`; replaces the host's option of that name.
    pub options: Vec<String>,
}

/// A line of `/etc/hosts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostsEntry {
    pub ip: IpAddr,
    pub names: Vec<String>,
}

/// The host's resolver configuration as pods can use it: where `main` names only servers on the loopback
/// (systemd-resolved's stub), `upstream` with the servers behind them, if it names any. Empty where nothing can be read.
pub fn host_resolv_conf(main: &Path, upstream: &Path) -> String {
    let text = fs::read_to_string(main).unwrap_or_default();
    if Parsed::of(&text).reachable_servers().is_empty()
        && let Ok(better) = fs::read_to_string(upstream)
        && !Parsed::of(&better).reachable_servers().is_empty()
    {
        return better;
    }
    text
}

/// For a pod with a network of its own: `host` is the host's file. Servers of the host that a pod does not reach are left
/// out: those on the loopback, link-local ones, and IPv6 ones beside others.
pub fn render_resolv_conf(host: &str, dns: &Dns) -> String {
    let host = Parsed::of(host);
    render(&host, host.reachable_servers(), dns)
}

/// For a pod on the host's network, which reaches what the host reaches.
pub fn render_host_network_resolv_conf(host: &str, dns: &Dns) -> String {
    let host = Parsed::of(host);
    render(&host, host.servers.clone(), dns)
}

/// `own` is the pod's address (`None`: it has only the loopback).
pub fn render_hosts(
    own: Option<IpAddr>,
    hostname: &str,
    aliases: &[HostsEntry],
    peers: &[HostsEntry],
) -> String {
    let mut text = String::from(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\nfe00::0 ip6-localnet\n\
         ff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
    );
    let own =
        HostsEntry { ip: own.unwrap_or(IpAddr::from([127, 0, 0, 1])), names: vec![hostname.to_owned()] };
    push_entries(&mut text, &[own]);
    text.push_str(&render_hosts_entries(aliases, peers));
    text
}

/// Only the lines for `hostAliases` and for other pods.
pub fn render_hosts_entries(aliases: &[HostsEntry], peers: &[HostsEntry]) -> String {
    let mut text = String::new();
    for (title, entries) in [("host aliases", aliases), ("pods", peers)] {
        if !entries.is_empty() {
            text.push_str(&format!("# {title}\n"));
            push_entries(&mut text, entries);
        }
    }
    text
}

fn push_entries(text: &mut String, entries: &[HostsEntry]) {
    for entry in entries {
        let names: Vec<&str> = entry.names.iter().map(String::as_str).filter(|name| is_word(name)).collect();
        if !names.is_empty() {
            text.push_str(&format!("{} {}\n", entry.ip, names.join(" ")));
        }
    }
}

/// A name with a space, a line break or a comment sign would say something else than it seems to.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && c != '#')
}

#[derive(Debug, Default)]
struct Parsed<'a> {
    servers: Vec<&'a str>,
    searches: Vec<&'a str>,
    options: Vec<&'a str>,
}

impl<'a> Parsed<'a> {
    fn of(text: &'a str) -> Parsed<'a> {
        let mut parsed = Parsed::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => parsed.servers.extend(words.next()),
                // The last of these lines counts (resolv.conf(5)).
                Some("search" | "domain") => parsed.searches = words.collect(),
                Some("options") => parsed.options.extend(words),
                _ => {}
            }
        }
        parsed
    }

    fn reachable_servers(&self) -> Vec<&'a str> {
        let addresses = |wanted: fn(&IpAddr) -> bool| -> Vec<&'a str> {
            // A zone ("fe80::1%eth0") does not parse: such a server is on a link that the pod is not on.
            let fits = |text: &&str| text.parse().is_ok_and(|ip: IpAddr| !is_local(&ip) && wanted(&ip));
            self.servers.iter().copied().filter(fits).collect()
        };
        let first = addresses(IpAddr::is_ipv4);
        if first.is_empty() { addresses(IpAddr::is_ipv6) } else { first }
    }
}

fn is_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unspecified() || ip.is_unicast_link_local(),
    }
}

fn render(host: &Parsed<'_>, host_servers: Vec<&str>, dns: &Dns) -> String {
    let own = |list: &[&str]| -> Vec<String> {
        let list = if dns.host_servers { list } else { &[] };
        list.iter().map(|text| (*text).to_owned()).collect()
    };
    let servers = merged(own(&host_servers), &dns.nameservers);
    let searches = merged(own(&host.searches), &dns.searches);
    let name_of = |option: &str| option.split(':').next().unwrap_or(option).to_owned();
    let mut options = own(&host.options);
    options.retain(|old| !dns.options.iter().any(|new| name_of(new) == name_of(old)));
    let options = merged(options, &dns.options);

    let mut text = String::new();
    if servers.is_empty() {
        text.push_str("# no name server of the host can be reached from a pod\n");
    }
    for server in servers.iter().take(NAMESERVERS) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    let searches = &searches[..searches.len().min(SEARCHES)];
    for (word, list) in [("search", searches), ("options", &options)] {
        if !list.is_empty() {
            text.push_str(&format!("{word} {}\n", list.join(" ")));
        }
    }
    text
}

/// Both lists in order, each word once.
fn merged(mut list: Vec<String>, more: &[String]) -> Vec<String> {
    for word in more {
        if !list.contains(word) {
            list.push(word.clone());
        }
    }
    list.retain(|word| is_word(word));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[track_caller]
    fn check(host: &str, dns: (bool, &str, &str, &str), expected: &str) {
        let (host_servers, nameservers, searches, options) = dns;
        let dns = Dns {
            host_servers,
            nameservers: words(nameservers),
            searches: words(searches),
            options: words(options),
        };
        assert_eq!(render_resolv_conf(host, &dns), expected);
    }

    #[test]
    fn resolv_conf_of_pods() {
        let host = "# x\nnameserver 192.0.2.53\nnameserver 127.0.0.53\nsearch lan\ndomain home.arpa\n\
                    options edns0 ndots:2\n";
        check(host, (true, "", "", ""), "nameserver 192.0.2.53\nsearch home.arpa\noptions edns0 ndots:2\n");
        check(
            host,
            (true, "9.9.9.9 192.0.2.53", "svc.local", "ndots:5 rotate"),
            "nameserver 192.0.2.53\nnameserver 9.9.9.9\nsearch home.arpa svc.local\noptions edns0 ndots:5 rotate\n",
        );
        check(host, (false, "1.1.1.1", "", ""), "nameserver 1.1.1.1\n");
        // Explicit servers are taken as they are, also on the loopback: a resolver may run in the pod.
        check(host, (false, "127.0.0.1", "", ""), "nameserver 127.0.0.1\n");
        check(
            "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4\n",
            (true, "", "", ""),
            "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\n",
        );
        check(
            "nameserver fe80::1%eth0\nnameserver 2001:db8::53\n",
            (true, "", "", ""),
            "nameserver 2001:db8::53\n",
        );
        check(
            "nameserver 2001:db8::53\nnameserver 192.0.2.53\n",
            (true, "", "", ""),
            "nameserver 192.0.2.53\n",
        );
        check("", (true, "", "", ""), "# no name server of the host can be reached from a pod\n");
    }

    #[test]
    fn pods_on_the_host_network_keep_the_hosts_stub() {
        let dns = Dns { host_servers: true, ..Dns::default() };
        let text = render_host_network_resolv_conf("nameserver 127.0.0.53\noptions trust-ad\n", &dns);
        assert_eq!(text, "nameserver 127.0.0.53\noptions trust-ad\n");
    }

    #[test]
    fn the_stub_of_systemd_resolved_is_looked_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (main, upstream) = (dir.path().join("main"), dir.path().join("upstream"));
        assert_eq!(host_resolv_conf(&main, &upstream), "");
        fs::write(&main, "nameserver 127.0.0.53\n").unwrap();
        assert_eq!(host_resolv_conf(&main, &upstream), "nameserver 127.0.0.53\n");
        fs::write(&upstream, "nameserver 192.0.2.53\n").unwrap();
        assert_eq!(host_resolv_conf(&main, &upstream), "nameserver 192.0.2.53\n");
        fs::write(&main, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(host_resolv_conf(&main, &upstream), "nameserver 192.0.2.1\n");
    }

    #[test]
    fn hosts_name_the_pod_its_aliases_and_its_peers_and_nothing_smuggled_in() {
        let entry = |ip: &str, names: &str| HostsEntry { ip: ip.parse().unwrap(), names: words(names) };
        let evil = HostsEntry {
            ip: "10.77.0.9".parse().unwrap(),
            names: vec!["ok".to_owned(), "bad\n6.6.6.6 bank.example".to_owned(), "#x".to_owned()],
        };
        let text = render_hosts(
            Some("10.77.0.5".parse().unwrap()),
            "web",
            &[entry("192.0.2.9", "db db.lan")],
            &[entry("10.77.0.6", "cache cache.default"), evil],
        );
        let tail = text.split("ip6-allrouters\n").nth(1).unwrap();
        assert_eq!(
            tail,
            "10.77.0.5 web\n# host aliases\n192.0.2.9 db db.lan\n# pods\n10.77.0.6 cache cache.default\n10.77.0.9 ok\n"
        );
        assert!(render_hosts(None, "web", &[], &[]).ends_with("127.0.0.1 web\n"));
        assert_eq!(render_hosts_entries(&[], &[]), "");
    }
}
