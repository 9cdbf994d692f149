//! A fault at every operation on a file: an import that is killed there, or that gets an error there from the kernel.
//!
//! The import runs in a process of its own under `ptrace`; its file operations are counted over all threads, and the
//! n-th meets the fault. Nothing in the store knows of it. `KEEL_FAULT_POINTS` asks for more points than fit in a
//! quick run; 0 is all of them.

use super::crash::check_store;
use super::{Bench, Tar, listing};
use crate::{Depth, Digest, ImportOptions, Partial, Roots, SaveFormat, Store};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Points of one quick run; they are spread evenly and differ between the faults.
const POINTS: usize = 24;
const IMPORTED: i32 = 40;
const FAILED: i32 = 41;

/// Not a test: imports an archive, tags its image, removes the tag, collects what is left of that, and says how that went
/// by its exit code.
#[test]
#[ignore = "the process that other tests trace"]
fn importer() {
    let Some(root) = std::env::var_os("KEEL_STORE_IMPORTER") else { return };
    // The tracer takes hold of every thread before this returns.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let archive = std::env::var_os("KEEL_STORE_ARCHIVE").unwrap();
    let imported = Store::open(Path::new(&root)).map_err(|error| error.to_string()).and_then(|store| {
        let failed = |error: &dyn std::error::Error| error.to_string();
        let options = ImportOptions::default();
        store.import(Path::new(&archive), &options, &|_| {}).map_err(|error| failed(&error))?;
        store.tag_image("keel.test/faulty:1", "keel.test/other:1").map_err(|error| failed(&error))?;
        store.remove_image("keel.test/other:1").map_err(|error| failed(&error))?;
        store.collect_garbage(&Roots::default()).map_err(|error| failed(&error))
    });
    std::process::exit(if imported.is_ok() { IMPORTED } else { FAILED });
}

fn archive(bench: &Bench) -> PathBuf {
    let base =
        Tar::default().dir("./", 0o755).dir("etc", 0o750).file("etc/a", "a").symlink("l", "etc/a").end();
    // A directory that only the base describes and a link into it: the image needs a layer of its own on top.
    let top =
        Tar::default().dir("./", 0o755).file("etc/b", "b").hard_link("h", "etc/a").file(".wh.l", "").end();
    bench.image("keel.test/faulty:1", &[base, top]);
    let path = bench.path("archive.tar");
    let mut file = std::fs::File::create(&path).unwrap();
    bench.store.save(&["keel.test/faulty:1"], SaveFormat::OciArchive, &mut file, &|_| {}).unwrap();
    path
}

const WHOLE: &str = "etc: dir 750\netc/a: file 644 \"a\"\netc/b: file 644 \"b\"\nh: file 644 \"a\"";

fn check_content(store: &Store, dir: &Path) {
    let image = store.image("keel.test/faulty:1").unwrap().expect("the image is there");
    let target = dir.join("mnt");
    std::fs::create_dir_all(&target).unwrap();
    store.mount_rootfs(&image, None, &target).unwrap();
    let shown = listing(&target);
    store.unmount_rootfs(&target).unwrap();
    assert_eq!(shown, WHOLE);
}

#[cfg(target_arch = "x86_64")]
mod traced {
    use super::*;
    use nix::libc;
    use nix::sys::ptrace::{self, Options};
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;
    use std::collections::BTreeMap;
    use std::io::Write;
    use std::process::{Child, Stdio};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) enum Fault {
        Kill,
        Errno(i32),
    }

    pub(super) struct Ended {
        /// Operations that were seen.
        pub(super) operations: usize,
        /// The call that met the fault.
        pub(super) met: Option<i64>,
        /// `None`: killed.
        pub(super) code: Option<i32>,
    }

    /// Changes a file or a name.
    const CHANGES: &[i64] = &[
        libc::SYS_write,
        libc::SYS_pwrite64,
        libc::SYS_writev,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_open,
        libc::SYS_mkdir,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_rename,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
        libc::SYS_rmdir,
        libc::SYS_ftruncate,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        libc::SYS_fsetxattr,
        libc::SYS_lsetxattr,
        libc::SYS_setxattr,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_syncfs,
        libc::SYS_copy_file_range,
        libc::SYS_chmod,
    ];
    /// Only looks. A dying disk fails here too.
    const LOOKS: &[i64] = &[
        libc::SYS_read,
        libc::SYS_pread64,
        libc::SYS_getdents64,
        libc::SYS_statx,
        libc::SYS_newfstatat,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_lseek,
    ];
    pub(super) const SYNCS: &[i64] = &[libc::SYS_fsync, libc::SYS_syncfs];

    fn counts(fault: Fault, call: i64, first: u64) -> bool {
        let by_descriptor = [libc::SYS_write, libc::SYS_writev, libc::SYS_read];
        // Standard streams are the harness's.
        if by_descriptor.contains(&call) && first <= 2 {
            return false;
        }
        CHANGES.contains(&call) || (fault == Fault::Errno(libc::EIO) && LOOKS.contains(&call))
    }

    /// Ends the traced process with the test.
    struct Traced(Child);

    impl Drop for Traced {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Runs the import; its `n`-th operation meets the fault.
    pub(super) fn import(root: &Path, archive: &Path, n: usize, fault: Fault) -> Ended {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "tests::fault::importer",
                "--include-ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("KEEL_STORE_IMPORTER", root)
            .env("KEEL_STORE_ARCHIVE", archive)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Traced(child);
        let pid = child.0.id();
        let leader = Pid::from_raw(pid as i32);
        // One of its threads waits for a line, the others for that one.
        let tasks = || {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            tasks.map(|task| task.unwrap().path()).collect::<Vec<_>>()
        };
        let reads = |task: &PathBuf| {
            std::fs::read_to_string(task.join("syscall")).is_ok_and(|call| call.starts_with("0 0x0 "))
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !tasks().iter().any(reads) {
            assert!(std::time::Instant::now() < deadline, "the importer does not wait for its line");
            std::thread::yield_now();
        }
        let options =
            Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
        for task in tasks() {
            let task = task.file_name().and_then(|name| name.to_str()?.parse().ok()).unwrap();
            ptrace::seize(Pid::from_raw(task), options).unwrap();
            ptrace::interrupt(Pid::from_raw(task)).unwrap();
        }
        child.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut ended = Ended { operations: 0, met: None, code: None };
        // Inside of a call or not, by thread; and with what its call is going to end.
        let mut inside: BTreeMap<Pid, bool> = BTreeMap::new();
        let mut failing: BTreeMap<Pid, i32> = BTreeMap::new();
        loop {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            let status = waitpid(Pid::from_raw(-1), Some(flags)).unwrap();
            let (task, deliver): (Pid, Option<Signal>) = match status {
                WaitStatus::PtraceSyscall(task) => {
                    let entering = !inside.get(&task).copied().unwrap_or(false);
                    inside.insert(task, entering);
                    if let Ok(mut registers) = ptrace::getregs(task) {
                        if entering {
                            let call = registers.orig_rax as i64;
                            if counts(fault, call, registers.rdi) {
                                ended.operations += 1;
                                if ended.operations == n {
                                    ended.met = Some(call);
                                    match fault {
                                        Fault::Kill => {
                                            nix::sys::signal::kill(leader, Signal::SIGKILL).unwrap()
                                        }
                                        Fault::Errno(errno) => {
                                            registers.orig_rax = u64::MAX;
                                            ptrace::setregs(task, registers).unwrap();
                                            failing.insert(task, errno);
                                        }
                                    }
                                }
                            }
                        } else if let Some(errno) = failing.remove(&task) {
                            registers.rax = (-i64::from(errno)) as u64;
                            ptrace::setregs(task, registers).unwrap();
                        }
                    }
                    (task, None)
                }
                WaitStatus::Stopped(task, signal) => (task, Some(signal)),
                WaitStatus::PtraceEvent(task, ..) => (task, None),
                WaitStatus::Exited(task, code) if task == leader => {
                    ended.code = Some(code);
                    return ended;
                }
                WaitStatus::Signaled(task, signal, _) if task == leader => {
                    assert!(fault == Fault::Kill && signal == Signal::SIGKILL, "{fault:?} {n}: {signal}");
                    return ended;
                }
                _ => continue,
            };
            // A thread that has just been killed cannot go on.
            let _ = ptrace::syscall(task, deliver);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn at_every_operation(fault: traced::Fault) {
    let bench = Bench::new();
    let archive = archive(&bench);
    // In memory: what counts here is the order of the operations, and a disk's syncs would take the time.
    let memory = super::crash::tmpfs(bench.dir.path(), "size=64m");
    let root = |n: usize| memory.0.join(n.to_string());
    let whole = traced::import(&root(0), &archive, 0, fault);
    assert_eq!(whole.code, Some(IMPORTED));
    check_content(&check_store(&root(0)), bench.dir.path());
    assert!(whole.operations > 80, "{}", whole.operations);
    let asked = std::env::var("KEEL_FAULT_POINTS").ok().and_then(|n| n.parse().ok()).unwrap_or(POINTS);
    let points = if asked == 0 { whole.operations } else { asked.min(whole.operations) };
    for point in 0..points {
        let n = 1 + point * whole.operations / points;
        let ended = traced::import(&root(n), &archive, n, fault);
        let at = format!("{fault:?} at operation {n} of {} (call {:?})", whole.operations, ended.met);
        assert!(matches!(ended.code, None | Some(IMPORTED | FAILED)), "{at}: ended with {:?}", ended.code);
        if ended.met.is_some_and(|call| traced::SYNCS.contains(&call)) {
            assert_ne!(ended.code, Some(IMPORTED), "{at}: what was not synced is not there");
        }
        let before = Store::open(&root(n)).unwrap();
        let there = before.image("keel.test/faulty:1").unwrap().is_some();
        assert!(there || ended.code != Some(IMPORTED), "{at}: said to be there");
        drop(before);
        let store = check_store(&root(n));
        store.import(&archive, &ImportOptions::default(), &|_| {}).unwrap_or_else(|e| panic!("{at}: {e:?}"));
        check_content(&check_store(&root(n)), bench.dir.path());
        std::fs::remove_dir_all(root(n)).unwrap();
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn killed_at_any_operation_the_image_is_whole_or_known_not_to_be() {
    at_every_operation(traced::Fault::Kill);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn an_io_error_at_any_operation_is_said_and_the_next_run_repairs() {
    at_every_operation(traced::Fault::Errno(libc::EIO));
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_full_disk_at_any_operation_is_said_and_the_next_run_repairs() {
    at_every_operation(traced::Fault::Errno(libc::ENOSPC));
}

#[cfg(not(target_arch = "x86_64"))]
#[test]
fn a_fault_at_any_operation() {
    eprintln!("SKIPPED: the tracer knows the registers of x86_64 only");
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    Delete,
    Truncate,
    Garbage,
    Zeros,
}

fn harm(path: &Path, how: Harm) {
    let is_file = std::fs::symlink_metadata(path).unwrap().is_file();
    match how {
        Harm::Delete if path.is_dir() && !path.is_symlink() => std::fs::remove_dir_all(path).unwrap(),
        Harm::Delete => std::fs::remove_file(path).unwrap(),
        Harm::Truncate if is_file => std::fs::write(path, "").unwrap(),
        Harm::Garbage if is_file => std::fs::write(path, [0x7b, 0xff, 0, b'"', 0x80].repeat(40)).unwrap(),
        Harm::Zeros if is_file => {
            std::fs::write(path, vec![0; std::fs::metadata(path).unwrap().len() as usize]).unwrap()
        }
        _ => {}
    }
}

/// Everything below a directory, with itself left out.
fn walk(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            walk(&path, all);
        }
        all.push(path);
    }
}

#[test]
fn losing_or_corrupting_any_one_file_is_repaired_or_reported_and_never_a_crash() {
    let bench = Bench::new();
    let archive = archive(&bench);
    let memory = super::crash::tmpfs(bench.dir.path(), "size=128m");
    let pristine = memory.0.join("pristine");
    {
        let store = Store::open(&pristine).unwrap();
        store.import(&archive, &ImportOptions::default(), &|_| {}).unwrap();
        let tar = Tar::default().file("partial", &"x".repeat(5000)).end();
        let id = Digest::of(&tar);
        let mut writer = store.begin_blob(&id, tar.len() as u64).unwrap();
        writer.write(&tar[..2000]).unwrap();
        writer.abort(Partial::Keep).unwrap();
        store.verify(Depth::Quick, true).unwrap();
    }
    let mut paths = Vec::new();
    walk(&pristine, &mut paths);
    assert!(paths.len() > 25, "{paths:?}");
    for path in &paths {
        for how in [Harm::Delete, Harm::Truncate, Harm::Garbage, Harm::Zeros] {
            let at = format!("{how:?} {}", path.strip_prefix(&pristine).unwrap().display());
            let root = memory.0.join("root");
            let copied = Command::new("cp").arg("-a").arg(&pristine).arg(&root).status().unwrap();
            assert!(copied.success());
            harm(&root.join(path.strip_prefix(&pristine).unwrap()), how);
            // Most harm is done while the power is gone.
            let _ = std::fs::remove_file(root.join("verified"));
            let store = Store::open(&root).unwrap_or_else(|e| panic!("{at}: {e:?}"));
            if let Some(image) = store.image("keel.test/faulty:1").unwrap() {
                let target = bench.path("mnt");
                std::fs::create_dir_all(&target).unwrap();
                // Healed, or refused; contents that changed and kept their length take a full look.
                if store.mount_rootfs(&image, None, &target).is_ok() {
                    let shown = listing(&target);
                    store.unmount_rootfs(&target).unwrap();
                    assert!(shown == WHOLE || matches!(how, Harm::Zeros), "{at}: {shown}");
                }
            }
            store.verify(Depth::Full, true).unwrap_or_else(|e| panic!("{at}: {e:?}"));
            drop(store);
            let store = check_store_but_lost(&root);
            store
                .import(&archive, &ImportOptions::default(), &|_| {})
                .unwrap_or_else(|e| panic!("{at}: {e:?}"));
            check_content(&check_store(&root), bench.dir.path());
            store.remove_image("keel.test/faulty:1").unwrap();
            store.drop_partials().unwrap();
            store.collect_garbage(&Roots::default()).unwrap();
            assert_eq!(
                listing(&root.join("layers")).lines().filter(|l| !l.starts_with("empty")).count(),
                0,
                "{at}"
            );
            std::fs::remove_dir_all(&root).unwrap();
        }
    }
}

/// After a repair nothing is damaged; what was lost is said to be.
fn check_store_but_lost(root: &Path) -> Store {
    let store = Store::open(root).unwrap();
    let report = store.verify(Depth::Full, false).unwrap();
    assert_eq!(report.damage, []);
    store
}
