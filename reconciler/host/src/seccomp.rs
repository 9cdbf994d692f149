//! The default system call filter, `seccompProfile: RuntimeDefault`.
//!
//! Three answers: allowed; EPERM for calls that exist and are refused, so that programs report them; ENOSYS for
//! everything newer than this list, so that libraries fall back. Only the native architecture is allowed, which closes
//! the way round argument filters through i386 `socketcall`. Calls that need a capability are allowed with it.

use serde_json::{Value, json};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;
/// CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET (clone(2)).
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Needs no privilege beyond what the kernel checks itself.
const ALLOWED: &str = "\
accept accept4 access alarm bind brk cachestat capget capset chdir chmod chown clock_getres clock_gettime \
clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl \
epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group \
faccessat faccessat2 fadvise64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl \
fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue \
futex_wait futex_waitv futex_wake futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents \
getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority \
getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr \
getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents \
io_setup io_submit ioctl ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self \
lchown lgetxattr link linkat listen listmount listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lstat \
madvise map_shadow_stack mbind membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 \
mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl \
msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause \
pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv \
preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 ptrace pwrite64 pwritev pwritev2 read \
readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr removexattrat rename \
renameat renameat2 restart_syscall riscv_flush_icache rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask \
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max \
sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop \
semtimedop sendfile sendmmsg sendmsg sendto set_mempolicy set_robust_list set_thread_area set_tid_address setfsgid \
setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid \
setsockopt setuid setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 socketpair \
splice stat statfs statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create \
timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill \
truncate umask uname unlink unlinkat uretprobe utime utimensat utimes vfork vmsplice wait4 waitid write writev";

#[cfg(target_arch = "x86_64")]
const ALLOWED_NATIVE: &str = "arch_prctl modify_ldt";
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_NATIVE: &str = "";

/// Allowed to holders of a capability, EPERM to others.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount open_tree \
         perf_event_open pivot_root quotactl quotactl_fd setdomainname sethostname setns swapoff swapon syslog umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot kexec_load kexec_file_load"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    ("CAP_SYS_NICE", "migrate_pages move_pages set_mempolicy_home_node"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp process_madvise userfaultfd"),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    ("CAP_SYS_TIME", "adjtimex clock_adjtime clock_settime settimeofday"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// Refused to everyone: kernel keyrings are not namespaced, io_uring escapes this filter, the rest is history.
const REFUSED: &str = "add_key keyctl request_key io_uring_enter io_uring_register io_uring_setup nfsservctl sysfs uselib \
ustat _sysctl create_module get_kernel_syms query_module";

/// The profile as `linux.seccomp` of an OCI spec for a process that holds `capabilities`.
pub(crate) fn default_profile(capabilities: &[String]) -> Value {
    let held = |capability: &str| capabilities.iter().any(|c| c == capability);
    let mut allowed: Vec<&str> =
        ALLOWED.split_whitespace().chain(ALLOWED_NATIVE.split_whitespace()).collect();
    let mut refused: Vec<&str> = REFUSED.split_whitespace().collect();
    for (capability, calls) in BY_CAPABILITY {
        if held(capability) {
            allowed.extend(calls.split_whitespace());
        }
    }
    for (_, calls) in BY_CAPABILITY {
        // clone3 passes its flags by pointer, out of a filter's sight: ENOSYS makes libc fall back to clone.
        refused.extend(calls.split_whitespace().filter(|call| *call != "clone3" && !allowed.contains(call)));
    }
    allowed.sort_unstable();
    allowed.dedup();
    refused.sort_unstable();
    refused.dedup();
    let mut rules = vec![
        json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}),
        json!({"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM}),
    ];
    for persona in [0x0u64, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        rules.push(json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": persona, "op": "SCMP_CMP_EQ"}]}));
    }
    for (operator, family) in
        [("SCMP_CMP_LT", AF_ALG), ("SCMP_CMP_EQ", AF_ALG + 1), ("SCMP_CMP_GT", AF_VSOCK)]
    {
        rules.push(json!({"names": ["socket"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": family, "op": operator}]}));
    }
    if held("CAP_SYS_ADMIN") {
        rules.push(json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW"}));
    } else {
        rules.push(json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": [native_architecture()],
        "syscalls": rules,
    })
}

fn native_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "SCMP_ARCH_AARCH64",
        "riscv64" => "SCMP_ARCH_RISCV64",
        _ => "SCMP_ARCH_X86_64",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(profile: &Value, call: &str) -> Option<String> {
        profile["syscalls"].as_array().unwrap().iter().find_map(|rule| {
            let named = rule["names"].as_array().unwrap().iter().any(|n| n == call);
            named.then(|| rule["action"].as_str().unwrap().to_string())
        })
    }

    #[test]
    fn a_capability_opens_its_calls_and_no_others() {
        let none = default_profile(&[]);
        assert_eq!(verdict(&none, "mount").as_deref(), Some("SCMP_ACT_ERRNO"));
        assert_eq!(verdict(&none, "clone3"), None, "falls to ENOSYS");
        let admin = default_profile(&["CAP_SYS_ADMIN".into()]);
        assert_eq!(verdict(&admin, "mount").as_deref(), Some("SCMP_ACT_ALLOW"));
        assert_eq!(verdict(&admin, "init_module").as_deref(), Some("SCMP_ACT_ERRNO"));
    }

    #[test]
    fn no_call_is_both_allowed_and_refused() {
        let profile = default_profile(&["CAP_BPF".into()]);
        let rules = profile["syscalls"].as_array().unwrap();
        let allowed = rules[0]["names"].as_array().unwrap();
        let refused = rules[1]["names"].as_array().unwrap();
        assert!(refused.iter().all(|name| !allowed.contains(name)));
        assert!(allowed.iter().any(|name| name == "bpf"));
    }
}
