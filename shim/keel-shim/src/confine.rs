//! What the hold phase gives up once it holds: it reads what containers write and what clients say, and a mistake in that
//! must not be a way to the host.
//!
//! The filter refuses (EPERM) rather than kills: an upgraded monitor that needs a call which the one before it did not
//! know of must not take the container's supervision with it. It allows new processes of this very program, which are
//! confined like it; what needs more is the helper's.

use std::fs;
use std::io;

use keel_sys::cred::{Capabilities, ambient_clear, capget, capset};
use keel_sys::process::set_no_new_privs;
use keel_sys::seccomp::{Insn, install};

/// Files of other owners below an administrator's directories; signals to containers of other users.
const KEPT: u64 = 1 << CAP_DAC_OVERRIDE | 1 << CAP_KILL;
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_KILL: u32 = 5;

/// As much as the host lets us; a monitor that is less confined still monitors.
pub(crate) fn confine(filter: &[Insn], oom_score: &str) {
    // Lowering it is a privilege that many hosts withhold.
    let _ = fs::write("/proc/self/oom_score_adj", oom_score);
    let _ = drop_capabilities();
    let _ = set_no_new_privs();
    let _ = install(0, filter);
}

fn drop_capabilities() -> io::Result<()> {
    ambient_clear()?;
    let now = capget()?;
    let (effective, permitted) = (now.effective & KEPT, now.permitted & KEPT);
    capset(&Capabilities { effective, permitted, inheritable: 0 })
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// What the monitor, its log writer and its compressor do, and what starting such a program takes.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_ioctl,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_uname,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_linkat,
    libc::SYS_readlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_utimensat,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_signalfd4,
    libc::SYS_eventfd2,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_memfd_create,
    libc::SYS_getrandom,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sched_setattr,
    libc::SYS_ioprio_set,
    libc::SYS_restart_syscall,
];

/// Older names of the same.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_pipe,
    libc::SYS_dup2,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_rename,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_link,
    libc::SYS_readlink,
    libc::SYS_chmod,
    libc::SYS_getrlimit,
    libc::SYS_arch_prctl,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[libc::c_long] = &[];

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const REFUSE: u32 = 0x0005_0000 | libc::EPERM as u32;
/// Of `struct seccomp_data`: number, architecture, low words of the arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

pub(crate) fn filter() -> Vec<Insn> {
    let insn = |code, k, jt, jf| Insn { code, jt, jf, k };
    let mut out = vec![
        insn(LOAD, ARCHITECTURE, 0, 0),
        insn(JUMP_EQUAL, AUDIT_ARCH, 1, 0),
        insn(RETURN, REFUSE, 0, 0),
        insn(LOAD, NUMBER, 0, 0),
    ];
    let number = |call: libc::c_long| u32::try_from(call).unwrap_or(u32::MAX);
    // No memory becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        out.extend([
            insn(JUMP_EQUAL, number(call), 0, 4),
            insn(LOAD, argument(2), 0, 0),
            insn(JUMP_SET, libc::PROT_EXEC as u32, 0, 1),
            insn(RETURN, REFUSE, 0, 0),
            insn(RETURN, ALLOW, 0, 0),
        ]);
    }
    // No network.
    out.extend([
        insn(JUMP_EQUAL, number(libc::SYS_socket), 0, 4),
        insn(LOAD, argument(0), 0, 0),
        insn(JUMP_EQUAL, libc::AF_UNIX as u32, 1, 0),
        insn(RETURN, REFUSE, 0, 0),
        insn(RETURN, ALLOW, 0, 0),
    ]);
    for call in ALLOWED.iter().chain(ALLOWED_HERE) {
        out.extend([insn(JUMP_EQUAL, number(*call), 0, 1), insn(RETURN, ALLOW, 0, 0)]);
    }
    out.push(insn(RETURN, REFUSE, 0, 0));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::unix::net::UnixDatagram;

    /// Confinement is the thread's.
    #[test]
    fn a_confined_thread_has_no_network_no_new_code_and_no_way_to_other_processes() {
        let confined = || {
            let caps_before = capget().unwrap();
            confine(&filter(), "0");
            let caps = capget();
            let denied =
                |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EPERM));
            denied(UdpSocket::bind("127.0.0.1:0").map(drop));
            denied(keel_sys::process::unshare(0));
            denied(keel_sys::process::setns(io::stdin(), 0));
            denied(
                keel_sys::process::pidfd_open(1)
                    .and_then(|init| keel_sys::process::pidfd_getfd(init, 0))
                    .map(drop),
            );
            // Already refused, and so are more rights.
            denied(caps.map(drop));
            denied(capset(&caps_before));
            UnixDatagram::unbound().unwrap();
            fs::read("/proc/self/status").unwrap();
        };
        std::thread::spawn(confined).join().unwrap();
    }
}
