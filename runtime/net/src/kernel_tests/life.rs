//! Many pods, many lives, sudden deaths.

use super::*;

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
                    .args(["--exact", "kernel_tests::life::crash_child"])
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
            timed(&mut namespaces, &mut || create_namespaces(&ns, &SHARED, &id).unwrap());
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
