//! Users, capabilities, system calls.

use std::fs;

use keel_tests::Instance;
use keel_tests::image::BUSYBOX;
use serde_json::json;

use super::{WAIT, fresh, import, job, logs, pid_of, pod, proc_status, refused, sh, up};

/// The nine that a container has unless the manifest says otherwise, as `/proc/<pid>/status` prints them.
const NINE: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const CHOWN: u64 = 1;

fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&proc_status(pid, set), 16).expect("a mask")
}

fn own_bounding_set() -> u64 {
    capabilities(std::process::id(), "CapBnd")
}

fn started(fields: &str, container: &str) -> (Instance, u32) {
    let instance = up(&pod("web", fields, &format!("{WAIT}\n{container}")));
    let pid = pid_of(&instance, "main");
    (instance, pid)
}

#[test]
fn the_default_is_nine_capabilities_no_new_privileges_and_a_filter() {
    let (_instance, pid) = started("", "");
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(capabilities(pid, set), NINE & own_bounding_set(), "{set}");
    }
    assert_eq!(capabilities(pid, "CapInh"), 0);
    assert_eq!(capabilities(pid, "CapAmb"), 0);
    assert_eq!(proc_status(pid, "NoNewPrivs"), "1");
    assert_eq!(proc_status(pid, "Seccomp"), "2");
}

#[test]
fn capabilities_are_added_and_dropped_by_kubernetes_order() {
    for (change, expected) in [
        ("{drop: [ALL]}", 0),
        ("{drop: [ALL], add: [NET_BIND_SERVICE]}", NET_BIND_SERVICE),
        ("{add: [NET_ADMIN], drop: [CHOWN]}", (NINE | NET_ADMIN) & !CHOWN),
        ("{add: [ALL]}", own_bounding_set()),
    ] {
        let (_instance, pid) = started("", &format!("securityContext: {{capabilities: {change}}}"));
        assert_eq!(capabilities(pid, "CapEff"), expected & own_bounding_set(), "{change}");
        assert_eq!(capabilities(pid, "CapBnd"), expected & own_bounding_set(), "{change}");
    }
}

#[test]
fn a_capability_that_is_unknown_or_not_to_be_had_is_named() {
    let instance = fresh();
    let said = refused(
        &instance,
        &pod("web", "", &format!("{WAIT}\nsecurityContext: {{capabilities: {{add: [NET_ADMNI]}}}}")),
    );
    assert!(said.contains("NET_ADMNI"), "{said}");
    if own_bounding_set() & (1 << 24) == 0 {
        let asks =
            pod("web", "", &format!("{WAIT}\nsecurityContext: {{capabilities: {{add: [SYS_RESOURCE]}}}}"));
        let said = refused(&instance, &asks);
        assert!(said.contains("CAP_SYS_RESOURCE is not available on this host"), "{said}");
    }
    assert!(instance.pids().is_empty());
}

#[test]
fn a_privileged_container_has_the_hosts_capabilities_and_devices() {
    let (instance, pid) = started("", "securityContext: {privileged: true}");
    assert_eq!(capabilities(pid, "CapEff"), own_bounding_set());
    assert_eq!(proc_status(pid, "Seccomp"), "0");
    assert_eq!(proc_status(pid, "NoNewPrivs"), "0");
    let look = "mkdir /m && mount -t tmpfs tmpfs /m && echo mounted; dd if=/dev/zero of=/proc/sys/vm/page-cluster count=0 2>&1 | grep -c read-only; mknod /tmp/null c 1 3 && echo x > /tmp/null && echo device";
    assert_eq!(sh(&instance, "web", look), "mounted\n0\ndevice");
    // A character device that a container without privileges never has.
    let extra = fs::read_dir("/dev").unwrap().flatten().find(|entry| {
        use std::os::unix::fs::FileTypeExt;
        let name = entry.file_name();
        let usual = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"];
        entry.file_type().is_ok_and(|kind| kind.is_char_device()) && !usual.iter().any(|known| name == *known)
    });
    match extra {
        Some(device) => {
            let name = device.path().display().to_string();
            assert_eq!(sh(&instance, "web", &format!("test -c {name} && echo there")), "there", "{name}");
        }
        None => eprintln!("not checked: this host has no device beyond the usual ones"),
    }
}

#[test]
fn privilege_escalation_is_off_unless_asked_for() {
    for (setting, flag) in
        [("", "1"), ("allowPrivilegeEscalation: false", "1"), ("allowPrivilegeEscalation: true", "0")]
    {
        let (_instance, pid) = started("", &format!("securityContext: {{{setting}}}"));
        assert_eq!(proc_status(pid, "NoNewPrivs"), flag, "{setting}");
    }
}

#[test]
fn users_and_groups_come_from_the_pod_the_container_and_the_image() {
    let look = "command: [sh, -c, 'id -u; id -g; echo $HOME']";
    let all = [
        job("plain", "", look),
        job("pod-wide", "securityContext: {runAsUser: 1000, runAsGroup: 3000}", look),
        job(
            "own",
            "securityContext: {runAsUser: 1000}",
            &format!("{look}\nsecurityContext: {{runAsUser: 4000, runAsGroup: 5000}}"),
        ),
        job("known", "securityContext: {runAsUser: 1000}", look),
    ];
    let instance = up(&all.join("---\n"));
    assert_eq!(logs(&instance, "plain"), "0\n0\n/root");
    assert_eq!(logs(&instance, "pod-wide"), "1000\n3000\n/home/app");
    assert_eq!(logs(&instance, "own"), "4000\n5000\n/");
    assert_eq!(logs(&instance, "known"), "1000\n1000\n/home/app", "the group is that of the image's passwd");
}

#[test]
fn the_images_user_is_looked_up_inside_the_image() {
    let instance = fresh();
    let image = "docker.io/library/as-app:1";
    import(&instance, image, &json!({"User": "app", "Env": ["PATH=/bin"]}), |_| {});
    let look = "command: [sh, -c, 'id -u; id -g; id -G']";
    let non_root = job("checked", "securityContext: {runAsNonRoot: true}", look);
    instance
        .apply(&format!("{}---\n{non_root}", job("named", "", look)).replace(BUSYBOX, image))
        .expect_code(0);
    assert_eq!(logs(&instance, "named"), "1000\n1000\n1000 2000");
    assert_eq!(logs(&instance, "checked"), "1000\n1000\n1000 2000");
}

#[test]
fn a_user_that_the_image_does_not_know_is_named() {
    let instance = fresh();
    let image = "docker.io/library/as-nobody:1";
    import(&instance, image, &json!({"User": "ghost", "Env": ["PATH=/bin"]}), |_| {});
    let said = refused(&instance, &pod("web", "", WAIT).replace(BUSYBOX, image));
    assert!(said.contains("ghost"), "{said}");
}

#[test]
fn run_as_non_root_refuses_an_image_that_runs_as_root() {
    let instance = fresh();
    let said = refused(&instance, &pod("web", "securityContext: {runAsNonRoot: true}", WAIT));
    assert!(said.contains("runAsNonRoot") && said.contains("runAsUser"), "{said}");
    assert!(instance.pids().is_empty());
    instance
        .apply(&pod("web", "securityContext: {runAsNonRoot: true, runAsUser: 1000}", WAIT))
        .expect_code(0);
}

#[test]
fn fs_group_owns_the_volumes_and_every_process_is_in_the_groups() {
    let fields = "securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 4242, supplementalGroups: [5001, 5002]}
volumes: [{name: v, emptyDir: {}}, {name: m, emptyDir: {medium: Memory}}, {name: s, secret: {secretName: keys, defaultMode: 0400}}]";
    let container = format!(
        "{WAIT}\nvolumeMounts: [{{name: v, mountPath: /v}}, {{name: m, mountPath: /m}}, {{name: s, mountPath: /s}}]"
    );
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: keys}\nstringData: {token: abc}\n---\n";
    let instance = up(&format!("{secret}{}", pod("web", fields, &container)));
    let groups = sh(&instance, "web", "id -G");
    let groups: std::collections::BTreeSet<&str> = groups.split(' ').collect();
    for wanted in ["1000", "4242", "5001", "5002"] {
        assert!(groups.contains(wanted), "{wanted} in {groups:?}");
    }
    let look = "touch /v/new /m/new && stat -c '%g' /v /m /v/new /m/new; cat /s/token; echo; stat -L -c '%a %g' /s/token";
    assert_eq!(sh(&instance, "web", look), "4242\n4242\n4242\n4242\nabc\n440 4242");
}

#[test]
fn a_read_only_root_takes_no_writes_but_its_volumes_do() {
    let (instance, _) = started(
        "volumes: [{name: v, emptyDir: {}}]",
        "securityContext: {readOnlyRootFilesystem: true}\nvolumeMounts: [{name: v, mountPath: /not/in/image}]",
    );
    let look = "for d in / /tmp /etc /not/in/image /dev/shm; do touch $d/x 2>/dev/null && echo $d written || echo $d refused; done";
    assert_eq!(
        sh(&instance, "web", look),
        "/ refused\n/tmp refused\n/etc refused\n/not/in/image written\n/dev/shm written"
    );
}

/// `unshare` and `mount` of busybox with every capability they need: only the filter can refuse.
const TRIES: &str = "busybox unshare -m true 2>/dev/null && echo unshared || echo refused";

#[test]
fn the_seccomp_profile_is_the_default_none_or_the_hosts_file() {
    let instance = fresh();
    let own = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    });
    let profiles = instance.root().join("seccomp");
    fs::create_dir_all(&profiles).unwrap();
    fs::write(profiles.join("own.json"), own.to_string()).unwrap();
    let with = |name: &str, fields: &str, profile: &str| {
        pod(
            name,
            fields,
            &format!("{WAIT}\nsecurityContext: {{capabilities: {{add: [SYS_ADMIN]}}, {profile}}}"),
        )
    };
    let all = [
        pod("default", "", WAIT),
        with("none", "", "seccompProfile: {type: Unconfined}"),
        with("podwide", "securityContext: {seccompProfile: {type: Unconfined}}", ""),
        pod("explicit", "securityContext: {seccompProfile: {type: RuntimeDefault}}", WAIT),
        with("own", "", "seccompProfile: {type: Localhost, localhostProfile: own.json}"),
    ];
    instance.apply(&all.join("---\n")).expect_code(0);
    let mode = |name: &str| sh(&instance, name, "grep ^Seccomp: /proc/self/status | tr -d '\\t '");
    for (name, expected) in [
        ("default", "Seccomp:2"),
        ("none", "Seccomp:0"),
        ("podwide", "Seccomp:0"),
        ("explicit", "Seccomp:2"),
        ("own", "Seccomp:2"),
    ] {
        assert_eq!(mode(name), expected, "{name}");
    }
    assert_eq!(sh(&instance, "default", TRIES), "refused");
    assert_eq!(sh(&instance, "explicit", TRIES), "refused");
    assert_eq!(sh(&instance, "none", TRIES), "unshared");
    assert_eq!(sh(&instance, "own", TRIES), "unshared");
    let said = sh(&instance, "own", "mkdir /tmp/x 2>&1 || true");
    assert!(said.contains("Operation not supported") || said.contains("Not supported"), "{said}");
    assert_eq!(sh(&instance, "default", "mkdir /tmp/x && echo made"), "made");
}

#[test]
fn a_seccomp_file_that_is_missing_outside_or_broken_is_named() {
    let instance = fresh();
    let profiles = instance.root().join("seccomp");
    fs::create_dir_all(&profiles).unwrap();
    fs::write(profiles.join("broken.json"), "{").unwrap();
    for (profile, says) in
        [("nope.json", "nope.json"), ("../../etc/passwd", "etc/passwd"), ("broken.json", "broken.json")]
    {
        let said = refused(
            &instance,
            &pod(
                "web",
                "",
                &format!(
                    "{WAIT}\nsecurityContext: {{seccompProfile: {{type: Localhost, localhostProfile: {profile}}}}}"
                ),
            ),
        );
        assert!(said.contains(says), "{said}");
    }
    assert!(instance.pids().is_empty());
}

/// The numbers of the machine's own calls: `keyctl`, `mount`, `unshare`, `bpf`.
#[test]
fn the_default_filter_refuses_with_eperm_what_the_capabilities_would_allow() {
    let (instance, pid) = started("", "securityContext: {allowPrivilegeEscalation: true}");
    assert_eq!(proc_status(pid, "Seccomp"), "2");
    let said = sh(&instance, "web", "busybox unshare -U true 2>&1 || true");
    assert!(said.contains("Operation not permitted"), "a user namespace needs no capability: {said}");
    let said = sh(&instance, "web", "mkdir -p /tmp/m; mount -t tmpfs tmpfs /tmp/m 2>&1 || true");
    assert!(said.to_lowercase().contains("permi") || said.contains("not permitted"), "{said}");
}
