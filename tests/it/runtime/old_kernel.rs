//! Kernels and sandboxes that lack system calls: a filter answers for them.

use super::*;
use nix::libc;

/// The command under a filter that answers these calls with `errno`.
fn without(case: &Case, calls: &[i64], errno: i32, args: &[&str]) -> Output {
    // Loads the number of the call, compares it with each, returns the errno or lets it pass.
    let insn =
        |code: u32, jt: usize, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: jt as u8, jf, k };
    let mut filter = vec![insn(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (i, call) in calls.iter().enumerate() {
        filter.push(insn(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, calls.len() - i, 0, *call as u32));
    }
    filter.push(insn(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    filter.push(insn(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32));
    let mut command = case.command(args);
    // SAFETY: between fork and exec only prctl is called, on memory that was made before.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
            match libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    command.output().unwrap()
}

fn run_without(case: &Case, calls: &[i64], errno: i32) -> Output {
    let bundle = case.bundle();
    without(case, calls, errno, &["run", "--bundle", &bundle, &case.id])
}

#[test]
fn without_openat2_containers_are_the_same() {
    require!(ours);
    for errno in [libc::ENOSYS, libc::EPERM] {
        let mut case = in_cgroup(Case::new(
            "cat /proc/sys/net/ipv4/ip_forward; cat /link/there/f; cat /etc/passwd | wc -l; ls -A /data; \
             cat /proc/self/oom_score_adj; echo x 2>/dev/null > /etc/new || echo read-only",
        ));
        let src = case.path("src");
        fs::create_dir(&src).unwrap();
        fs::write(src.join("f"), "bound\n").unwrap();
        fs::write(case.rootfs().join("data/secret"), "").unwrap();
        symlink("/tmp/../tmp", case.rootfs().join("link")).unwrap();
        case.set(
            "/mounts/-",
            json!({"destination": "/link/there", "type": "bind", "source": src, "options": ["bind"]}),
        );
        case.set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
        case.set("/linux/maskedPaths", json!(["/etc/passwd", "/data"]));
        case.set("/linux/readonlyPaths", json!(["/etc"]));
        case.set("/process/oomScoreAdj", json!(600));
        let output = run_without(&case, &[libc::SYS_openat2], errno);
        assert_eq!(text(&output.stdout), "1\nbound\n0\n600\nread-only\n", "{}", text(&output.stderr));
        case.assert_gone();
    }
}

#[test]
fn without_openat2_links_lead_nowhere_either() {
    require!(ours);
    let case = Case::new("true");
    fs::remove_dir(case.rootfs().join("proc")).unwrap();
    symlink("tmp", case.rootfs().join("proc")).unwrap();
    let output = run_without(&case, &[libc::SYS_openat2], libc::ENOSYS);
    assert!(!output.status.success(), "/proc was a link");
    let mut case = Case::new("true");
    let victim = case.path("victim");
    fs::create_dir(&victim).unwrap();
    symlink(format!("/../../../../..{}", victim.display()), case.rootfs().join("out")).unwrap();
    symlink("../../../../../../../../../../tmp", case.rootfs().join("up")).unwrap();
    case.set("/mounts/-", json!({"destination": "/up/there", "type": "tmpfs", "source": "tmpfs"}));
    let output = run_without(&case, &[libc::SYS_openat2], libc::ENOSYS);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(case.rootfs().join("tmp/there").is_dir() && !Path::new("/tmp/there").exists());
    case.set("/mounts/-", json!({"destination": "/out/there", "type": "tmpfs", "source": "tmpfs"}));
    let _ = run_without(&case, &[libc::SYS_openat2], libc::ENOSYS);
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "something was made on the host");
}

#[test]
fn a_kernel_without_the_mount_calls_is_named_and_nothing_is_left() {
    require!(ours);
    for (name, call) in [
        ("open_tree", libc::SYS_open_tree),
        ("move_mount", libc::SYS_move_mount),
        ("fsopen", libc::SYS_fsopen),
        ("mount_setattr", libc::SYS_mount_setattr),
        ("clone3", libc::SYS_clone3),
        ("close_range", libc::SYS_close_range),
    ] {
        let case = in_cgroup(Case::new("echo ran"));
        let output = run_without(&case, &[call], libc::ENOSYS);
        let error = text(&output.stderr);
        assert!(!output.status.success(), "{name}: {}", text(&output.stdout));
        assert_eq!(text(&output.stdout), "", "{name}");
        assert!(error.contains("needs Linux 5.12"), "{name}: {error}");
        case.assert_gone();
    }
}
