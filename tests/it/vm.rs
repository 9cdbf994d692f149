//! A kernel whose only cgroup hierarchy is v2, in an emulator: what this host may not have, or may have given up.
//!
//! One boot runs all cases of `tests/vm/cases`, and those of `tests/vm/systemd` with systemd as process 1; each test here looks for the result of one of them. `tests/vm/fetch` gets
//! the emulator and the kernel. `KEEL_VM_KERNEL` names another directory with `boot/vmlinuz-*` and `lib/modules/`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use keel_tests::bin;
use keel_tests::image::{busybox_archive_in, busybox_rootfs, run};
use serde_json::Value;

/// An emulated boot with all cases takes a minute or so on a quiet machine, several times that beside others.
const DEADLINE: Duration = Duration::from_secs(600);
/// Of the root disk; a sparse file.
const DISK: &str = "384M";
/// What containers, overlays and a bridge with a packet filter load.
const MODULES: &[&str] =
    &["net", "lib", "crypto", "fs/overlayfs", "drivers/net/veth.ko", "drivers/net/tun.ko"];
/// Built as modules too, but needed before there is a disk.
const DISK_MODULES: &[&str] = &[
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
];

/// Of this host, in the machine for the cases that need them.
const PROGRAMS: &[&str] = &[
    "/lib/systemd/systemd",
    "/bin/systemctl",
    "/usr/bin/dbus-daemon",
    "/usr/sbin/criu",
    // The other side of comparisons.
    "/usr/sbin/runc",
    // CRIU runs these, and busybox' versions know too little.
    "/bin/ip",
    "/bin/tar",
    "/usr/sbin/iptables-restore",
    "/usr/sbin/ip6tables-restore",
    // By which CRIU tells its own packets from those that it holds back.
    "/usr/lib/x86_64-linux-gnu/xtables/libxt_mark.so",
    "/usr/lib/x86_64-linux-gnu/xtables/libxt_standard.so",
];

/// Result of each case: `Err` with what it printed.
type Results = BTreeMap<String, Result<(), String>>;

macro_rules! cases {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*

        #[test]
        fn every_case_has_a_test() {
            if let Some((results, console)) = results() {
                let names: Vec<&String> = results.keys().collect();
                let mut known = vec![$(stringify!($name)),*];
                known.sort_unstable();
                assert_eq!(names, known, "{console}");
            }
        }
    };
}

cases! {
    limits_are_in_the_files
    limits_of_input_and_output_are_in_the_files
    an_idle_container_has_the_least_of_the_cpu
    fields_without_a_control_on_v2_are_refused_by_name
    update_changes_the_files
    exec_starts_in_the_containers_cgroup
    exec_follows_a_container_that_made_cgroups_of_its_own
    pause_freezes_and_resume_thaws
    a_frozen_cgroup_is_refused
    a_paused_container_can_be_deleted_by_force
    kill_all_reaches_what_left_the_session
    kill_all_outruns_forks
    a_signal_reaches_the_first_process
    a_device_can_be_made_but_not_opened
    device_rules_decide_about_open
    a_later_device_rule_wins
    device_rules_hold_for_exec_too
    without_device_rules_only_the_common_devices_open
    device_rules_have_wildcards
    the_cgroup_mount_is_writable_only_as_declared
    capabilities_are_as_declared
    ambient_capabilities_reach_an_ordinary_user
    rlimits_can_be_raised
    oom_score_and_priority_can_be_lowered
    realtime_scheduling_is_as_declared
    memory_beyond_the_limit_kills
    the_exit_record_says_that_memory_ran_out
    in_conmons_place_the_oom_file_is_there_when_memory_ran_out
    forks_beyond_the_limit_fail
    stats_come_from_the_files
    documents_are_collected_beside_runcs
    a_missing_controller_file_is_named
    a_populated_cgroup_is_refused
    a_restored_container_goes_on_where_it_was
    a_checkpoint_can_leave_the_container_running
    a_pre_dump_is_the_parent_of_a_checkpoint
    output_into_a_pipe_goes_into_the_new_one_after_a_restore
    a_restore_that_fails_leaves_nothing
    hooks_of_the_host_run_at_a_restore
    a_failing_hook_ends_a_restore
    an_ordinary_user_has_limits_in_a_delegated_cgroup
    nothing_of_the_runtime_is_left
    a_container_is_a_scope_in_its_slice
    limits_outlive_a_reload_of_systemd
    device_rules_outlive_a_reload_of_systemd
    a_scope_freezes_and_thaws
    delete_leaves_no_unit
    a_failed_start_leaves_no_unit_and_frees_the_name
    annotations_become_properties
    properties_are_those_of_runc
    updated_properties_are_those_of_runc
    properties_of_unified_values_are_those_of_runc
    the_managers_own_socket_will_do
    without_systemd_the_error_says_where_it_was_looked_for
    an_ordinary_user_has_scopes_of_its_own
    nothing_of_the_scopes_is_left
    pod_comes_up_with_its_limits
    pod_can_be_looked_into
    pod_killed_for_memory_says_so
    pods_go_without_a_trace
}

/// What only one side says.
const ONLY: &[&str] = &[
    // runc leaves out what is zero.
    "[].minor",
    "[].value",
    ".throttling.",
    // The peak, which runc says from 1.2 on.
    "memory.usage.max",
    // Of newer versions of the specification.
    "features.",
];

/// What `documents_are_collected_beside_runcs` printed.
#[test]
fn documents_have_the_keys_and_types_of_runcs() {
    let Some((_, console)) = results() else { return };
    let document = |runtime: &str, command: &str| -> Value {
        let start = format!("data {runtime} {command} ");
        let line = console
            .lines()
            .find_map(|line| line.strip_prefix(&start))
            .unwrap_or_else(|| panic!("no {start}\n{console}"));
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{start}: {e}: {line}"))
    };
    let mut differences = Vec::new();
    for command in ["events", "state", "ps", "list", "features"] {
        compare(command, &document("runc", command), &document("keel-runtime", command), &mut differences);
    }
    differences.retain(|line| !ONLY.iter().any(|known| line.contains(known)));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    // Values that the case decides about.
    for runtime in ["runc", "keel-runtime"] {
        let stats = document(runtime, "events");
        let at = |path: &str| {
            stats.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{runtime} {path}: {stats}"))
        };
        assert_eq!(at("/data/pids/current"), 1);
        assert_eq!(at("/data/pids/limit"), 50);
        assert_eq!(at("/data/memory/usage/limit"), 64 << 20);
        assert!((4096..64 << 20).contains(&at("/data/memory/usage/usage")));
        assert!(at("/data/cpu/usage/total") > 1_000_000);
        assert!(at("/data/cpu/usage/total") >= at("/data/cpu/usage/user"));
    }
}

fn compare(path: &str, theirs: &Value, ours: &Value, out: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for key in theirs.keys().chain(ours.keys().filter(|key| !theirs.contains_key(*key))) {
                let path = format!("{path}.{key}");
                match (theirs.get(key), ours.get(key)) {
                    (Some(theirs), Some(ours)) => compare(&path, theirs, ours, out),
                    (Some(theirs), None) => out.push(format!("{path}: runc only: {theirs}")),
                    (None, ours) => out.push(format!("{path}: ours only: {ours:?}")),
                }
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => match (theirs.first(), ours.first()) {
            (Some(theirs), Some(ours)) => compare(&format!("{path}[]"), theirs, ours, out),
            (None, None) => {}
            _ => out.push(format!("{path}: one is empty: {theirs:?} {ours:?}")),
        },
        _ if std::mem::discriminant(theirs) == std::mem::discriminant(ours) => {}
        _ => out.push(format!("{path}: other types: {theirs} {ours}")),
    }
}

fn check(name: &str) {
    let Some((results, console)) = results() else { return };
    match results.get(name) {
        Some(Ok(())) => {}
        Some(Err(output)) => panic!("{name} failed in the virtual machine:\n{output}"),
        None => panic!("{name} has no result; the console said:\n{console}"),
    }
}

/// Boots at the first call; `None`, with the reason said, where the emulator or the kernel is missing.
fn results() -> Option<&'static (Results, String)> {
    static RESULTS: OnceLock<Result<(Results, String), String>> = OnceLock::new();
    let boot = || {
        let console = boot(&kernel()?);
        if let Some(path) = std::env::var_os("KEEL_VM_CONSOLE") {
            fs::write(path, &console).expect("write the console's text");
        }
        Ok((parse(&console), console))
    };
    match RESULTS.get_or_init(boot) {
        Ok(results) => Some(results),
        Err(reason) => {
            eprintln!("skipped: {reason}; tests/vm/fetch gets it");
            None
        }
    }
}

struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

fn kernel() -> Result<Kernel, String> {
    if let Some(missing) = PROGRAMS.iter().find(|program| !Path::new(program).exists()) {
        return Err(format!("{missing} is missing"));
    }
    for tool in ["qemu-system-x86_64", "cpio", "mke2fs"] {
        Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(|e| format!("{tool} does not start ({e})"))?;
    }
    let dir = std::env::var_os("KEEL_VM_KERNEL")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm/kernel"), PathBuf::from);
    let entry = |sub: &str, prefix: &str| {
        let entries = fs::read_dir(dir.join(sub)).into_iter().flatten().flatten();
        let mut found = entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix));
        found.next().map(|e| e.path()).ok_or(format!("no {sub}/{prefix}* in {}", dir.display()))
    };
    Ok(Kernel { image: entry("boot", "vmlinuz-")?, modules: entry("lib/modules", "")? })
}

/// Everything the machine printed until it switched itself off.
fn boot(kernel: &Kernel) -> String {
    let work = tempfile::Builder::new().prefix("keel-vm-").tempdir().expect("a temporary directory");
    let initrd = make_initrd(work.path(), kernel);
    let disk = make_disk(work.path(), kernel);
    let mut child = Command::new("timeout")
        .arg(DEADLINE.as_secs().to_string())
        .args(["qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-cpu", "qemu64", "-smp", "1", "-m", "1G"])
        .args(["-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"])
        // systemd's progress of a slow boot would redraw the lines of the results.
        .args(["-append", "console=ttyS0 loglevel=1 panic=-1 mitigations=off systemd.show_status=error"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&initrd)
        .arg("-drive")
        .arg(format!("id=disk,file={},format=raw,if=none,cache=unsafe", disk.display()))
        .args(["-device", "virtio-blk-pci,drive=disk"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the emulator starts");
    let (mut out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let mut text = Vec::new();
    out.read_to_end(&mut text).expect("read the console");
    let mut errors = String::new();
    err.read_to_string(&mut errors).expect("read the emulator's messages");
    child.wait().expect("the emulator ends");
    String::from_utf8_lossy(&text).replace('\r', "") + &errors
}

fn make_initrd(work: &Path, kernel: &Kernel) -> PathBuf {
    let dir = work.join("initrd");
    for sub in ["bin", "dev", "proc", "mnt", "modules"] {
        fs::create_dir_all(dir.join(sub)).expect("a directory of the first disk");
    }
    install(Path::new("/bin/busybox"), &dir.join("bin/busybox"));
    for applet in ["sh", "mount", "insmod", "usleep", "poweroff", "switch_root"] {
        symlink("busybox", dir.join("bin").join(applet)).expect("a link");
    }
    install(&sources().join("initrd-init"), &dir.join("init"));
    for module in DISK_MODULES {
        let from = kernel.modules.join("kernel/drivers").join(module).with_extension("ko");
        install(&from, &dir.join("modules").join(from.file_name().expect("a name")));
    }
    let path = work.join("initrd.img");
    run(Command::new("sh")
        .current_dir(&dir)
        .args(["-c", "find . | cpio -o -H newc --quiet > ../initrd.img"]));
    path
}

fn make_disk(work: &Path, kernel: &Kernel) -> PathBuf {
    let root = work.join("root");
    for sub in ["bin", "dev", "proc", "sys", "run", "tmp", "etc", "root", "var", "b", "cases"] {
        fs::create_dir_all(root.join(sub)).expect("a directory of the disk");
    }
    install(Path::new("/bin/busybox"), &root.join("bin/busybox"));
    for name in ["keel", "keel-shim", "keel-runtime"] {
        let to = root.join("bin").join(name);
        // Symbols are most of a debug build.
        run(Command::new("strip").arg("-o").arg(&to).arg(bin(name)));
    }
    install(&sources().join("init"), &root.join("init"));
    for name in ["lib", "cases", "systemd"] {
        install(&sources().join(name), &root.join("cases").join(name));
    }
    copy_programs(&root);
    copy_units(&root);
    copy_modules(kernel, &root);
    busybox_rootfs(&root.join("rootfs"));
    for sub in ["proc", "sys", "dev"] {
        fs::create_dir_all(root.join("rootfs").join(sub)).expect("a directory of the container");
    }
    busybox_archive_in(&root);
    let disk = work.join("disk.ext4");
    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
        .arg(&root)
        .arg(&disk)
        .arg(DISK));
    disk
}

/// Programs of this host, with the libraries that they name.
fn copy_programs(root: &Path) {
    for program in PROGRAMS {
        let output = Command::new("ldd").arg(program).output().expect("ldd runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.chain([*program]) {
            let to = root.join(&file[1..]);
            if !to.exists() {
                fs::create_dir_all(to.parent().expect("below the root")).expect("a directory of the disk");
                install(Path::new(file), &to);
            }
        }
    }
}

/// The least that systemd and the bus need: units, their configuration, and names for users.
fn copy_units(root: &Path) {
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("a directory of the disk");
        fs::write(path, text).expect("a file of the disk");
    };
    write("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    write(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\nmessagebus:x:100:100::/:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n",
    );
    write("etc/group", "root:x:0:\nmessagebus:x:100:\nuser:x:1000:\n");
    write("etc/systemd/user/default.target", "[Unit]\nDefaultDependencies=no\n");
    for file in ["system.conf", "system.d/org.freedesktop.systemd1.conf"] {
        let text =
            fs::read_to_string(Path::new("/usr/share/dbus-1").join(file)).expect("the bus's configuration");
        write(&format!("usr/share/dbus-1/{file}"), &text);
    }
    for entry in fs::read_dir(sources().join("units")).expect("units").flatten() {
        let text = fs::read_to_string(entry.path()).expect("a unit");
        write(&format!("etc/systemd/system/{}", entry.file_name().to_string_lossy()), &text);
    }
}

fn copy_modules(kernel: &Kernel, root: &Path) {
    let release = kernel.modules.file_name().expect("the release is a name");
    let to = root.join("lib/modules").join(release);
    for name in MODULES {
        let parent = to.join("kernel").join(name).parent().expect("below the root").to_path_buf();
        fs::create_dir_all(&parent).expect("a directory of modules");
        run(Command::new("cp").arg("-r").arg(kernel.modules.join("kernel").join(name)).arg(parent));
    }
    for name in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        let _: io::Result<u64> = fs::copy(kernel.modules.join(name), to.join(name));
    }
    run(Command::new("/bin/busybox").args(["depmod", "-b"]).arg(root).arg(release));
}

fn install(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap_or_else(|e| panic!("copy {}: {e}", from.display()));
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("mode of a file");
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vm")
}

/// `ok NAME`, `failed NAME` after the lines of its output, which begin with `  | `.
fn parse(console: &str) -> Results {
    let mut results = Results::new();
    let mut output = String::new();
    for line in console.lines() {
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("ok"), Some(name)) => {
                results.insert(name.to_string(), Ok(()));
            }
            (Some("failed"), Some(name)) => {
                results.insert(name.to_string(), Err(std::mem::take(&mut output)));
            }
            _ => {
                if let Some(text) = line.strip_prefix("  | ") {
                    output.push_str(text);
                    output.push('\n');
                }
            }
        }
    }
    results
}
