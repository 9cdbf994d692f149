//! Volumes and where they appear.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use keel_tests::{eventually, eventually_or};

use super::{WAIT, fresh, job, logs, main_status, pid_of, pod, refused, sh, sh_in, up};

/// The main container waits with `volume` mounted at `/v`.
fn with_volume(name: &str, volume: &str, mount: &str) -> String {
    pod(
        name,
        &format!("volumes: [{{name: v, {volume}}}]"),
        &format!("{WAIT}\nvolumeMounts: [{{name: v, mountPath: /v{mount}}}]"),
    )
}

fn host_path(path: &Path, kind: &str) -> String {
    format!("hostPath: {{path: '{}', type: '{kind}'}}", path.display())
}

#[test]
fn every_type_of_host_path_is_mounted_when_it_fits() {
    let instance = fresh();
    let dir = instance.path().join("host");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "from the host").unwrap();
    let _socket = UnixListener::bind(dir.join("socket")).unwrap();
    let cases = [
        ("unset", dir.clone(), "", "cat /v/file"),
        ("unset-new", dir.join("made-as-a-directory"), "", "stat -c %F /v"),
        ("directory", dir.clone(), "Directory", "cat /v/file"),
        ("directory-new", dir.join("new/dir"), "DirectoryOrCreate", "stat -c '%F %a' /v"),
        ("file", dir.join("file"), "File", "cat /v"),
        ("file-new", dir.join("new-file"), "FileOrCreate", "stat -c '%F %a' /v"),
        ("socket", dir.join("socket"), "Socket", "stat -c %F /v"),
        ("device", "/dev/null".into(), "CharDevice", "stat -c %F /v"),
    ];
    let all: Vec<String> =
        cases.iter().map(|(name, path, kind, _)| with_volume(name, &host_path(path, kind), "")).collect();
    instance.apply(&all.join("---\n")).expect_code(0);
    let seen: Vec<String> = cases.iter().map(|(name, _, _, look)| sh(&instance, name, look)).collect();
    assert_eq!(
        seen,
        [
            "from the host",
            "directory",
            "from the host",
            "directory 755",
            "from the host",
            "regular empty file 644",
            "socket",
            "character special file",
        ]
    );
    sh(&instance, "directory", "echo back > /v/answer");
    assert_eq!(fs::read_to_string(dir.join("answer")).unwrap(), "back\n", "both sides see one directory");
}

#[test]
fn a_host_path_of_the_wrong_type_is_named_and_nothing_starts() {
    let instance = fresh();
    let dir = instance.path().join("host");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "").unwrap();
    for (path, kind, says) in [
        (dir.join("file"), "Directory", "is not a directory"),
        (dir.join("file"), "DirectoryOrCreate", "is not a directory"),
        (dir.clone(), "File", "is not a file"),
        (dir.clone(), "FileOrCreate", "is not a file"),
        (dir.join("file"), "Socket", "is not a socket"),
        (dir.join("file"), "CharDevice", "is not a character device"),
        ("/dev/null".into(), "BlockDevice", "is not a block device"),
        (dir.join("none"), "Directory", "does not exist"),
        (dir.join("none"), "File", "does not exist"),
    ] {
        let manifest = with_volume("web", &host_path(&path, kind), "");
        let ran = instance.keel_with_input(&["apply", "-f", "-"], &manifest);
        assert_ne!(ran.code(), 0, "{kind}: {}", ran.all());
        assert!(ran.all().contains(says) && ran.all().contains("volume v"), "{kind}: {}", ran.all());
    }
    assert!(instance.pids().is_empty());
    assert!(!fs::exists(dir.join("none")).unwrap());
}

#[test]
fn an_empty_dir_is_shared_by_the_containers_and_ends_with_the_pod() {
    let manifest = format!(
        "{}  - name: other\n    image: {}\n    {WAIT}\n    volumeMounts: [{{name: v, mountPath: /there}}]\n",
        with_volume("web", "emptyDir: {}", ""),
        keel_tests::image::BUSYBOX
    );
    let instance = up(&manifest);
    sh(&instance, "web", "echo shared > /v/file");
    assert_eq!(sh_in(&instance, "web", "other", "cat /there/file; stat -c %a /there"), "shared\n777");
    // A container's restart keeps it, the pod's end does not.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid_of(&instance, "main")).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    eventually("the container has ended", || (instance.pids().len() == 1).then_some(()));
    instance.apply(&manifest).expect_code(0);
    assert_eq!(sh(&instance, "web", "cat /v/file"), "shared");
    instance.keel(&["delete", "pod/web"]).expect_code(0);
    instance.apply(&manifest).expect_code(0);
    assert_eq!(sh(&instance, "web", "ls /v"), "");
}

#[test]
fn an_empty_dir_in_memory_is_a_tmpfs_of_the_limits_size() {
    let instance = up(&format!(
        "{}---\n{}",
        with_volume("web", "emptyDir: {medium: Memory, sizeLimit: 4Mi}", ""),
        with_volume("free", "emptyDir: {medium: Memory}", ""),
    ));
    assert_eq!(
        sh(&instance, "web", "stat -f -c %T /v; df -k /v | tail -n1 | tr -s ' ' | cut -d' ' -f2"),
        "tmpfs\n4096"
    );
    let full = sh(&instance, "web", "dd if=/dev/zero of=/v/x bs=1M count=8 2>&1; stat -c %s /v/x");
    assert!(full.contains("No space left"), "{full}");
    assert!(full.ends_with("4194304"), "{full}");
    let kib: u64 = sh(&instance, "free", "df -k /v | tail -n1 | tr -s ' ' | cut -d' ' -f2").parse().unwrap();
    assert!(kib > 64 << 10, "without a limit it is bounded by memory, not by a small default: {kib} KiB");
}

#[test]
fn an_empty_dir_on_disk_that_outgrows_its_limit_evicts_the_pod() {
    let mut instance = fresh();
    let host = instance.path().join("host");
    fs::create_dir(&host).unwrap();
    // Only its first run is greedy.
    let script = "test -e /host/seen || { touch /host/seen; dd if=/dev/zero of=/v/x bs=1M count=4; }; trap \"exit 0\" TERM; sleep 100000 & wait";
    let manifest = pod(
        "greedy",
        &format!(
            "volumes: [{{name: v, emptyDir: {{sizeLimit: 1Mi}}}}, {{name: w, emptyDir: {{sizeLimit: 1Gi}}}}, {{name: h, {}}}]",
            host_path(&host, "")
        ),
        &format!(
            "command: [sh, -c, '{script}']\nvolumeMounts: [{{name: v, mountPath: /v}}, {{name: w, mountPath: /w}}, {{name: h, mountPath: /host}}]"
        ),
    );
    instance.write("greedy.yaml", &manifest);
    instance.write("modest.yaml", &with_volume("modest", "emptyDir: {sizeLimit: 1Mi}", ""));
    instance.start_daemon();
    instance.await_ready("modest");
    let modest = instance.pids().into_iter().find(|(id, _)| id.starts_with("modest-"));
    let events = eventually_or(
        || format!("an eviction is told\n{}", instance.daemon_log()),
        || Some(instance.keel(&["events"]).stdout).filter(|text| text.contains("Evicted")),
    );
    let evictions: Vec<&str> = events.lines().filter(|line| line.contains("Evicted")).collect();
    let told = |line: &str| line.contains("greedy") && line.contains("volume v") && line.contains("1Mi");
    assert!(evictions.len() == 1 && told(evictions[0]), "{events}");
    // It comes back with an empty volume, and with the restart counted.
    eventually_or(
        || format!("it runs again: {:#}", instance.pod("greedy")["status"]),
        || (main_status(&instance, "greedy")["restartCount"] == 1).then_some(()),
    );
    instance.await_ready("greedy");
    assert_eq!(sh(&instance, "greedy", "ls /v"), "");
    let ended = &main_status(&instance, "greedy")["lastState"]["terminated"];
    assert_eq!(ended["exitCode"], 137, "{ended:#}");
    assert_eq!(instance.pids().into_iter().find(|(id, _)| id.starts_with("modest-")), modest);
}

const OBJECTS: &str = "apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {a.conf: 'a=1', b.conf: 'b=2'}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {token: s3cret}
---
";

#[test]
fn config_map_volumes_have_items_and_modes_and_are_read_only() {
    let script = "cd /v; ls; stat -L -c %a conf.d/a b.conf; cat conf.d/a; echo x 2>/dev/null > /v/new || echo refused; ls /all";
    let instance = up(&format!(
        "{OBJECTS}{}",
        job(
            "once",
            "volumes:
- name: v
  configMap:
    name: settings
    defaultMode: 0400
    items:
    - {key: a.conf, path: conf.d/a, mode: 0755}
    - {key: b.conf, path: b.conf}
- {name: all, configMap: {name: settings}}
- {name: none, configMap: {name: not-there, optional: true}}
",
            &format!(
                "command: [sh, -c, '{script}']\nvolumeMounts: [{{name: v, mountPath: /v}}, {{name: all, mountPath: /all}}, {{name: none, mountPath: /none}}]"
            )
        )
    ));
    assert_eq!(logs(&instance, "once"), "b.conf\nconf.d\n755\n400\na=1refused\na.conf\nb.conf");
}

#[test]
fn secret_volumes_are_in_memory_with_their_mode() {
    let instance =
        up(&format!("{OBJECTS}{}", with_volume("web", "secret: {secretName: keys, defaultMode: 0400}", "")));
    assert_eq!(
        sh(&instance, "web", "cat /v/token; echo; stat -L -c '%a %u' /v/token; stat -f -c %T /v"),
        "s3cret\n400 0\ntmpfs"
    );
    let leaked =
        std::process::Command::new("grep").args(["-rl", "s3cret"]).arg(instance.root()).output().unwrap();
    let leaked = String::from_utf8_lossy(&leaked.stdout).into_owned();
    assert!(!leaked.contains("/pods/"), "a secret's text is on the disk: {leaked}");
}

#[test]
fn changed_contents_reach_the_volume_without_a_restart_and_the_environment_with_one() {
    let uses = |name: &str, env: &str| {
        pod(
            name,
            "volumes: [{name: v, configMap: {name: settings}}]",
            &format!("{WAIT}\nvolumeMounts: [{{name: v, mountPath: /v}}]\n{env}"),
        )
    };
    let both = format!(
        "{}---\n{}",
        uses("files", ""),
        uses("vars", "env: [{name: A, valueFrom: {configMapKeyRef: {name: settings, key: a.conf}}}]")
    );
    let instance = up(&format!("{OBJECTS}{both}"));
    let before = instance.pids();
    let changed = OBJECTS.replace("a: 1", "a: 2").replace("a.conf: 'a=1'", "a.conf: 'a=3'");
    let ran = instance.apply(&format!("{changed}{both}")).expect_code(0);
    assert_eq!(sh(&instance, "files", "cat /v/a.conf"), "a=3", "{}", ran.all());
    assert_eq!(sh(&instance, "vars", "echo $A"), "a=3");
    let after = instance.pids();
    let pid = |pids: &std::collections::BTreeMap<String, u32>, pod: &str| {
        pids.iter().find(|(id, _)| id.starts_with(&format!("{pod}-"))).map(|(_, pid)| *pid)
    };
    assert_eq!(pid(&before, "files"), pid(&after, "files"), "a volume's contents change under the process");
    assert_ne!(pid(&before, "vars"), pid(&after, "vars"));
}

#[test]
fn changed_modes_and_grown_secrets_reach_the_volume() {
    let manifest = |mode: &str, bytes: usize| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: keys}}\nstringData: {{token: {}}}\n---\n{}",
            "x".repeat(bytes),
            with_volume("web", &format!("secret: {{secretName: keys, defaultMode: {mode}}}"), "")
        )
    };
    let instance = up(&manifest("0400", 10));
    let pid = pid_of(&instance, "main");
    instance.apply(&manifest("0440", 10)).expect_code(0);
    assert_eq!(sh(&instance, "web", "stat -L -c '%a %s' /v/token"), "440 10");
    // Far beyond what the first contents needed.
    instance.apply(&manifest("0440", 900_000)).expect_code(0);
    instance.apply(&manifest("0400", 900_001)).expect_code(0);
    assert_eq!(sh(&instance, "web", "stat -L -c '%a %s' /v/token"), "400 900001");
    assert_eq!(pid_of(&instance, "main"), pid);
}

#[test]
fn a_sub_path_is_one_file_or_directory_of_the_volume() {
    let instance = fresh();
    let dir = instance.path().join("host");
    fs::create_dir_all(dir.join("sub/deep")).unwrap();
    fs::write(dir.join("sub/deep/file"), "deep").unwrap();
    fs::write(dir.join("hidden"), "").unwrap();
    let manifest = format!(
        "{OBJECTS}{}",
        pod(
            "web",
            &format!(
                "volumes: [{{name: v, {}}}, {{name: c, configMap: {{name: settings}}}}]",
                host_path(&dir, "")
            ),
            &format!(
                "{WAIT}
volumeMounts:
- {{name: v, mountPath: /dir, subPath: sub}}
- {{name: v, mountPath: /etc/file, subPath: sub/deep/file}}
- {{name: v, mountPath: /made, subPath: made/here}}
- {{name: c, mountPath: /etc/app/a.conf, subPath: a.conf}}
"
            )
        )
    );
    instance.apply(&manifest).expect_code(0);
    let look = "ls /dir; cat /etc/file; echo; ls /made; cat /etc/app/a.conf; echo; ls /etc/app";
    assert_eq!(sh(&instance, "web", look), "deep\ndeep\na=1\na.conf");
    sh(&instance, "web", "touch /made/x");
    assert!(dir.join("made/here/x").exists());
}

#[test]
fn a_sub_path_that_leads_out_of_its_volume_is_refused() {
    let instance = fresh();
    let dir = instance.path().join("host");
    fs::create_dir(&dir).unwrap();
    symlink("/etc", dir.join("out")).unwrap();
    symlink("../../../../etc", dir.join("up")).unwrap();
    for sub in ["out", "out/passwd", "up/passwd"] {
        let said =
            refused(&instance, &with_volume("web", &host_path(&dir, ""), &format!(", subPath: {sub}")));
        assert!(said.contains("out of the volume") && said.contains(sub), "{sub}: {said}");
    }
    let ran = instance
        .keel_with_input(&["apply", "-f", "-"], &with_volume("web", &host_path(&dir, ""), ", subPath: ../x"));
    assert_eq!(ran.code(), 2, "{}", ran.all());
    assert!(instance.pids().is_empty());
}

#[test]
fn read_only_mounts_refuse_to_be_written() {
    let instance = fresh();
    let dir = instance.path().join("host");
    fs::create_dir(&dir).unwrap();
    let manifest = pod(
        "web",
        &format!("volumes: [{{name: v, {}}}, {{name: e, emptyDir: {{}}}}]", host_path(&dir, "")),
        &format!(
            "{WAIT}
volumeMounts:
- {{name: v, mountPath: /ro, readOnly: true}}
- {{name: v, mountPath: /rw}}
- {{name: e, mountPath: /ro-empty, readOnly: true}}
"
        ),
    );
    instance.apply(&manifest).expect_code(0);
    let look =
        "for d in /ro /rw /ro-empty; do touch $d/x 2>/dev/null && echo $d written || echo $d refused; done";
    assert_eq!(sh(&instance, "web", look), "/ro refused\n/rw written\n/ro-empty refused");
}

#[test]
fn a_volume_over_an_images_directory_and_inside_another_volume() {
    let instance = up(&pod(
        "web",
        "volumes: [{name: a, emptyDir: {}}, {name: b, emptyDir: {medium: Memory}}, {name: shm, emptyDir: {medium: Memory, sizeLimit: 128Mi}}]",
        &format!(
            "{WAIT}
volumeMounts:
- {{name: b, mountPath: /home/app/inner}}
- {{name: a, mountPath: /home/app}}
- {{name: shm, mountPath: /dev/shm}}
"
        ),
    ));
    let look =
        "ls /home/app; stat -f -c %T /home/app/inner; df -k /dev/shm | tail -n1 | tr -s ' ' | cut -d' ' -f2";
    assert_eq!(sh(&instance, "web", look), "inner\ntmpfs\n131072");
}

#[test]
fn a_block_device_can_be_named_when_the_host_has_one() {
    let found = fs::read_dir("/dev").unwrap().flatten().find(|entry| {
        fs::metadata(entry.path()).is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() != 0)
    });
    let Some(device) = found else {
        eprintln!("skipped: this host has no block device in /dev");
        return;
    };
    let instance = up(&with_volume("web", &host_path(&device.path(), "BlockDevice"), ""));
    assert_eq!(sh(&instance, "web", "stat -c %F /v"), "block special file");
}

#[test]
fn an_empty_dir_in_memory_without_a_limit_has_what_the_containers_have() {
    let instance = up(&pod(
        "web",
        "volumes: [{name: v, emptyDir: {medium: Memory}}]",
        &format!(
            "{WAIT}\nvolumeMounts: [{{name: v, mountPath: /v}}]\nresources: {{limits: {{memory: 32Mi}}}}"
        ),
    ));
    assert_eq!(sh(&instance, "web", "df -k /v | tail -n1 | tr -s ' ' | cut -d' ' -f2"), "32768");
}

#[test]
fn a_file_mounted_by_sub_path_is_renewed_by_a_restart() {
    let manifest = |value: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: settings}}\ndata: {{a.conf: '{value}', b.conf: x}}\n---\n{}",
            with_volume("web", "configMap: {name: settings}", "/a.conf, subPath: a.conf")
        )
    };
    let instance = up(&manifest("1"));
    let before = pid_of(&instance, "main");
    assert_eq!(sh(&instance, "web", "cat /v/a.conf"), "1");
    instance.apply(&manifest("2")).expect_code(0);
    assert_eq!(sh(&instance, "web", "cat /v/a.conf"), "2");
    assert_ne!(pid_of(&instance, "main"), before);
    let before = pid_of(&instance, "main");
    instance.apply(&manifest("2").replace("b.conf: x", "b.conf: z")).expect_code(0);
    assert_eq!(pid_of(&instance, "main"), before, "another key restarts nothing");
}
