//! Pods whose users are not the host's: `hostUsers: false`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::{WAIT, fresh, pid_of, pod, proc_status, refused, sh, up};
use keel_tests::eventually;

/// Below it are the users that others give away.
const LOWEST: u32 = 0x7000_0000;

fn uid_of(pid: u32) -> u32 {
    proc_status(pid, "Uid").split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn root_in_a_pod_with_users_of_its_own_is_nobody_on_the_host_and_owns_what_the_image_says() {
    let instance = up(&pod("web", "hostUsers: false", WAIT));
    let pid = pid_of(&instance, "main");
    let first = uid_of(pid);
    assert!(first >= LOWEST && first.is_multiple_of(65536), "{first:#x}");
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", &first.to_string(), "65536"]);
    assert_eq!(sh(&instance, "web", "id -u; stat -c %u:%g / /bin/busybox"), "0\n0:0\n0:0");
    assert_eq!(sh(&instance, "web", "touch /new && chown 7:8 /new && stat -c %u:%g /new"), "7:8");
    // The network is the pod's own, and its root may do with it what it likes.
    let net = |of: String| fs::read_link(format!("/proc/{of}/ns/net")).unwrap();
    assert_ne!(net(pid.to_string()), net("self".into()));
    assert!(sh(&instance, "web", "hostname; ls /sys/class/net; ls /dev/mqueue").contains("eth0"));
    let outside = sh(
        &instance,
        "web",
        "mount -o remount,rw /proc/sys 2>&1; echo 1 > /proc/sys/kernel/sysrq 2>&1; true",
    );
    assert!(!outside.is_empty(), "{outside}");
}

#[test]
fn volumes_of_a_pod_with_users_of_its_own_belong_to_its_users() {
    let instance = fresh();
    let host = instance.path().join("shared");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("secret"), "s").unwrap();
    fs::set_permissions(host.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    let volumes = format!(
        "hostUsers: false\nvolumes:\n- {{name: d, emptyDir: {{}}}}\n- {{name: m, emptyDir: {{medium: Memory}}}}\n\
         - {{name: c, configMap: {{name: cm, defaultMode: 0400}}}}\n- {{name: h, hostPath: {{path: {}}}}}",
        host.display()
    );
    let mounts = "volumeMounts:\n- {name: d, mountPath: /d}\n- {name: m, mountPath: /m}\n- {name: c, mountPath: /c}\n\
                  - {name: h, mountPath: /h}\n- {name: d, mountPath: /sub, subPath: s}";
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: cm}\ndata: {key: value}\n---\n";
    instance.apply(&format!("{map}{}", pod("web", &volumes, &format!("{WAIT}\n{mounts}")))).expect_code(0);
    let script =
        "for d in /d /m /h /sub /dev/shm; do echo x > $d/f && stat -c %u $d/f; done; cat /c/key /h/secret";
    assert_eq!(sh(&instance, "web", script), "0\n0\n0\n0\n0\nvalues");
    // On the disk it is as if the host's users of those numbers had written it, whatever range the pod has.
    assert_eq!(fs::metadata(host.join("f")).unwrap().uid(), 0);
    assert_eq!(sh(&instance, "web", "chown 5:6 /h/f; stat -c %u:%g /h/f"), "5:6");
    let changed = fs::metadata(host.join("f")).unwrap();
    assert_eq!((changed.uid(), changed.gid()), (5, 6));
}

#[test]
fn each_pod_has_ids_of_its_own_as_long_as_it_is_there() {
    let mut instance = fresh();
    for name in ["one", "two"] {
        instance.write(
            &format!("{name}.yaml"),
            &pod(name, "hostUsers: false\nshareProcessNamespace: true", WAIT),
        );
    }
    instance.start_daemon();
    let ids = |instance: &keel_tests::Instance| {
        let pids = instance.pids();
        let of = |name: &str| {
            *pids.iter().find(|(id, _)| id.starts_with(name) && id.contains(".main.")).unwrap().1
        };
        ["one", "two"].map(|name| uid_of(of(name)))
    };
    instance.await_ready("one");
    instance.await_ready("two");
    let before = ids(&instance);
    assert!(before[0].abs_diff(before[1]) >= 65536, "{before:?}");
    instance.kill_daemon();
    instance.start_daemon();
    let old = pid_of(&instance, "main");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    eventually("the container is made anew", || {
        (instance.pids().len() >= 2 && pid_of(&instance, "main") != old).then_some(())
    });
    instance.await_ready("one");
    instance.await_ready("two");
    assert_eq!(ids(&instance), before);
    fs::remove_file(instance.manifests().join("one.yaml")).unwrap();
    let namespaces = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .matches(&format!("{}/pods/one", instance.run_dir().display()))
            .count()
    };
    eventually("the first pod is gone with its namespaces", || {
        instance.keel(&["reconcile", "--accept-removals"]);
        (instance.pod("one").is_null() && namespaces() == 0).then_some(())
    });
}

#[test]
fn users_of_its_own_and_namespaces_of_the_host_exclude_each_other() {
    let said = refused(&fresh(), &pod("web", "hostUsers: false\nhostNetwork: true", WAIT));
    assert!(said.contains("hostNetwork") && said.contains("hostUsers is false"), "{said}");
}
