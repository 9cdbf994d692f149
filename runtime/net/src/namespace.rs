//! A pod's net, ipc and uts namespaces, and the user namespace that they belong to where it has one of its own, kept alive by bind mounts and not by a process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use keel_sys::netlink::{Netlink, NetlinkError, NetlinkProtocol};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

use crate::link;
use crate::sysctl::{self, SysctlError};

/// What the network namespace of a pod differs in from a fresh one. A kernel without one of them is fine.
/// - Ports below 1024 and ping need no capability: the namespace has nobody else to protect.
/// - Redirects and router advertisements come from other pods on the bridge, never from a router.
const POD_SYSCTLS: [(&str, &str); 6] = [
    ("ipv4/ip_unprivileged_port_start", "0"),
    ("ipv4/ping_group_range", "0 2147483647"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
];

/// A pin that is mounted over more often than this is not the work of retried creations.
const STACKED_MOUNTS: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NamespaceKind {
    Net,
    Ipc,
    Uts,
    /// Only by [`create_owned_namespaces`].
    User,
}

impl NamespaceKind {
    pub const ALL: [NamespaceKind; 4] =
        [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts, NamespaceKind::User];

    /// File name, here and under `/proc/<pid>/ns`.
    pub fn name(self) -> &'static str {
        match self {
            NamespaceKind::Net => "net",
            NamespaceKind::Ipc => "ipc",
            NamespaceKind::Uts => "uts",
            NamespaceKind::User => "user",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            NamespaceKind::Net => CloneFlags::CLONE_NEWNET,
            NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
            NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
            NamespaceKind::User => CloneFlags::CLONE_NEWUSER,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("create the directory {}", path.display())]
    CreateDir { path: PathBuf, source: io::Error },
    #[error("create a thread for new namespaces")]
    Thread { source: io::Error },
    #[error("create the {kinds} namespace")]
    Unshare { kinds: String, source: io::Error },
    #[error("map the ids of the user namespace by {}", path.display())]
    Map { path: PathBuf, source: io::Error },
    #[error("enter the namespace {}", path.display())]
    Enter { path: PathBuf, source: io::Error },
    #[error("set the host name {name:?}")]
    Hostname { name: String, source: io::Error },
    #[error("set up the network namespace")]
    Sysctl(#[from] SysctlError),
    #[error("set up the network namespace")]
    Loopback(#[from] NetlinkError),
    #[error("keep the namespace at {}", path.display())]
    Pin { path: PathBuf, source: io::Error },
    #[error("remove the namespace file {}", path.display())]
    Remove { path: PathBuf, source: io::Error },
}

/// Creates the namespaces of `kinds` as files `dir/net`, `dir/ipc`, `dir/uts`. What exists is kept and set up
/// again, so a creation that died half-way is completed. The host name goes into the uts namespace.
pub fn create_namespaces(dir: &Path, kinds: &[NamespaceKind], hostname: &str) -> Result<(), NamespaceError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| NamespaceError::CreateDir { path: dir.to_owned(), source })?;
    // The thread takes its namespaces with it when it ends; only the pins stay.
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("namespaces".to_owned())
            .spawn_scoped(scope, || build(dir, kinds, hostname))
            .map_err(|source| NamespaceError::Thread { source })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Creates a user namespace whose ids from 0 on are the host's from `first_id` on, and namespaces of `kinds` that
/// belong to it. [`create_namespaces`] sets them up. Nobody is inside yet: what a creation that died half-way has left
/// is replaced.
pub fn create_owned_namespaces(
    dir: &Path,
    kinds: &[NamespaceKind],
    first_id: u32,
    ids: u32,
) -> Result<(), NamespaceError> {
    let all = || kinds.iter().copied().chain([NamespaceKind::User]);
    if all().all(|kind| is_pinned(&dir.join(kind.name()))) {
        return Ok(());
    }
    remove_namespaces(dir)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| NamespaceError::CreateDir { path: dir.to_owned(), source })?;
    let flags = all().fold(CloneFlags::empty(), |flags, kind| flags | kind.flag());
    let made = keel_sys::process::in_new_namespaces(flags.bits(), |pid| {
        for map in ["uid_map", "gid_map"] {
            let path = PathBuf::from(format!("/proc/{pid}/{map}"));
            fs::write(&path, format!("0 {first_id} {ids}\n"))
                .map_err(|source| NamespaceError::Map { path, source })?;
        }
        // The user namespace last: with it the others are there.
        all().try_for_each(|kind| pin(&dir.join(kind.name()), &format!("/proc/{pid}/ns/{}", kind.name())))
    });
    made.map_err(|source| NamespaceError::Unshare {
        kinds: all().map(|kind| kind.name()).collect::<Vec<_>>().join(", "),
        source,
    })?
}

/// Pins those namespaces of a living process that `dir` lacks: somebody has unmounted them, and whoever is inside goes on
/// in them. `process` is the directory `/proc/<pid>`, held open so that it cannot become another process.
pub fn pin_namespaces_of(
    dir: &Path,
    kinds: &[NamespaceKind],
    process: BorrowedFd<'_>,
) -> Result<(), NamespaceError> {
    for kind in kinds.iter().filter(|kind| !is_pinned(&dir.join(kind.name()))) {
        let source = format!("/proc/self/fd/{}/ns/{}", process.as_raw_fd(), kind.name());
        pin(&dir.join(kind.name()), &source)?;
    }
    Ok(())
}

/// Lets go of the namespaces. The kernel removes them, and the links in them, when their last process is gone. Copies of
/// the mounts in other mount namespaces do not keep them: the kernel drops those with the file. Absence is fine.
pub fn remove_namespaces(dir: &Path) -> Result<(), NamespaceError> {
    for kind in NamespaceKind::ALL {
        let path = dir.join(kind.name());
        let failed = |source| NamespaceError::Remove { path: path.clone(), source };
        for _ in 0..STACKED_MOUNTS {
            match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => break,
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        absent_is_fine(fs::remove_file(&path)).map_err(failed)?;
    }
    absent_is_fine(fs::remove_dir(dir))
        .map_err(|source| NamespaceError::Remove { path: dir.to_owned(), source })
}

/// The kinds that exist under `dir` as namespaces (not merely as files).
pub fn observe_namespaces(dir: &Path) -> Vec<NamespaceKind> {
    NamespaceKind::ALL.into_iter().filter(|kind| is_pinned(&dir.join(kind.name()))).collect()
}

/// Runs `f` on a thread of its own inside the network namespace at `path`. Sockets that `f` opens stay
/// in that namespace wherever they are used.
pub fn in_netns<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    let file = File::open(path).map_err(|error| named(error, "open the network namespace", path))?;
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            setns(&file, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| named(errno.into(), "enter the network namespace", path))?;
            Ok(f())
        })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn named(error: io::Error, doing: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{doing} {}: {error}", path.display()))
}

fn build(dir: &Path, kinds: &[NamespaceKind], hostname: &str) -> Result<(), NamespaceError> {
    let (kept, missing): (Vec<_>, Vec<_>) =
        kinds.iter().copied().partition(|kind| is_pinned(&dir.join(kind.name())));
    for kind in kept {
        enter(&dir.join(kind.name()), kind)?;
    }
    let flags = missing.iter().fold(CloneFlags::empty(), |flags, kind| flags | kind.flag());
    unshare(flags).map_err(|errno| NamespaceError::Unshare {
        kinds: missing.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", "),
        source: errno.into(),
    })?;
    // Set up before it is pinned: a pin that others can see is complete.
    if kinds.contains(&NamespaceKind::Uts) {
        nix::unistd::sethostname(hostname)
            .map_err(|errno| NamespaceError::Hostname { name: hostname.to_owned(), source: errno.into() })?;
    }
    if kinds.contains(&NamespaceKind::Net) {
        for (name, value) in POD_SYSCTLS {
            sysctl::ensure(name, value)?;
        }
        link::apply_ops(&mut Netlink::open(NetlinkProtocol::Route)?, &[link::lower_loopback()])?;
    }
    missing
        .into_iter()
        .try_for_each(|kind| pin(&dir.join(kind.name()), &format!("/proc/thread-self/ns/{}", kind.name())))
}

fn enter(path: &Path, kind: NamespaceKind) -> Result<(), NamespaceError> {
    let failed = |source| NamespaceError::Enter { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    setns(&file, kind.flag()).map_err(|errno| failed(errno.into()))
}

fn pin(path: &Path, source: &str) -> Result<(), NamespaceError> {
    let failed = |source| NamespaceError::Pin { path: path.to_owned(), source };
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed)?;
    mount(Some(source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| failed(errno.into()))
}

fn is_pinned(path: &Path) -> bool {
    // `statfs` follows links; nobody but root can place one in the directory.
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
