//! The same pods through another runtime: a representative part of everything above.

use keel_tests::Instance;

use super::{WAIT, logs, main_status, pid_of, pod, proc_status, sh, sh_in};

fn with_runc() -> Option<Instance> {
    let Some(runc) =
        ["/usr/sbin/runc", "/usr/bin/runc"].iter().find(|path| std::fs::exists(path).unwrap_or(false))
    else {
        eprintln!("skipped: runc is not installed");
        return None;
    };
    let instance = Instance::new().with(&["--runtime", runc]);
    instance.import_busybox();
    Some(instance)
}

#[test]
fn runc_gives_the_same_container() {
    let Some(instance) = with_runc() else { return };
    let objects = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {a: '1'}\n---\n";
    let fields = "securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 4242}
volumes: [{name: e, emptyDir: {}}, {name: c, configMap: {name: settings}}]";
    let container = format!(
        "{WAIT}
workingDir: /made/here
env: [{{name: A, value: x}}]
resources: {{limits: {{cpu: 500m, memory: 64Mi}}}}
securityContext: {{readOnlyRootFilesystem: true, capabilities: {{drop: [ALL]}}}}
volumeMounts: [{{name: e, mountPath: /e}}, {{name: c, mountPath: /c}}, {{name: c, mountPath: /etc/a, subPath: a}}]
readinessProbe: {{exec: {{command: [test, -f, /c/a]}}, periodSeconds: 1}}"
    );
    instance.apply(&format!("{objects}{}", pod("web", fields, &container))).expect_code(0);
    let look = "pwd; id -u; echo $A; cat /c/a /etc/a; echo; touch /e/x && stat -c %g /e/x; touch /x 2>/dev/null || echo refused";
    assert_eq!(sh(&instance, "web", look), "/made/here\n1000\nx\n11\n4242\nrefused");
    let pid = pid_of(&instance, "main");
    assert_eq!(proc_status(pid, "CapEff"), "0000000000000000");
    assert_eq!(proc_status(pid, "NoNewPrivs"), "1");
    assert_eq!(proc_status(pid, "Seccomp"), "2");
}

#[test]
fn runc_shares_process_namespaces_and_reports_ends() {
    let Some(instance) = with_runc() else { return };
    let shared = format!(
        "{}  - name: other\n    image: {}\n    {WAIT}\n",
        pod("web", "shareProcessNamespace: true", WAIT),
        keel_tests::image::BUSYBOX
    );
    let once = super::job("once", "", "command: [sh, -c, 'echo said; exit 0']");
    instance.apply(&format!("{shared}---\n{once}")).expect_code(0);
    assert!(sh_in(&instance, "web", "other", "tr '\\0' ' ' < /proc/1/cmdline").contains("pause"));
    assert_eq!(logs(&instance, "once"), "said");
    assert_eq!(main_status(&instance, "once")["state"]["terminated"]["exitCode"], 0);
    instance.keel(&["delete", "pod/web"]).expect_code(0);
    assert!(instance.pids().is_empty());
}

#[test]
fn runc_honours_privileges_both_ways() {
    let Some(instance) = with_runc() else { return };
    let all =
        [pod("high", "", &format!("{WAIT}\nsecurityContext: {{privileged: true}}")), pod("low", "", WAIT)];
    instance.apply(&all.join("---\n")).expect_code(0);
    assert_eq!(sh(&instance, "high", "mkdir /m && mount -t tmpfs t /m && echo mounted"), "mounted");
    assert_eq!(
        sh(&instance, "low", "mkdir /m && mount -t tmpfs t /m 2>/dev/null || echo refused"),
        "refused"
    );
}
