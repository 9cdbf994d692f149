//! The child between clone and exec: executes the operations.
//!
//! Nothing here allocates, takes a lock, logs or panics. A failure is one fixed-size record on the socket; the words
//! for it are found by the parent, which has the same list. All work on the container's file system is relative to a
//! descriptor of its root and never follows a path out of it.

use crate::op::{Failure, HookProgram, NsKind, Op, Step, StringArray, Target};
use keel_sys::file::{self, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS};
use keel_sys::mount::{self, Attr};
use keel_sys::{cred, errno, process, seccomp, socket, tty};
#[cfg(debug_assertions)]
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{CStr, c_char};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Descriptors that the parent opened for the child.
#[derive(Default)]
pub(crate) struct Fds {
    pub(crate) tasks: Vec<OwnedFd>,
    /// By slot of [`Op::Join`].
    pub(crate) namespaces: Vec<OwnedFd>,
    /// By slot of an idmapped mount.
    pub(crate) idmaps: Vec<OwnedFd>,
    /// The container's init, for an exec.
    pub(crate) process: Option<OwnedFd>,
    /// To the parent.
    pub(crate) sync: Option<OwnedFd>,
    /// Where a later `start` connects; without it the start comes over `sync`.
    pub(crate) start: Option<OwnedFd>,
    pub(crate) console: Option<OwnedFd>,
    /// The terminal is relayed to the caller's, which ends lines itself.
    pub(crate) relayed: bool,
    /// Takes the seccomp notification descriptor.
    pub(crate) notify: Option<OwnedFd>,
    /// The container belongs to an ordinary user, who cannot open its namespaces while its process forbids tracing.
    pub(crate) hand_out: bool,
}

/// What is said to a process that waits for its start: the word for its namespaces. Anything else is the start.
pub(crate) const ASK_NAMESPACES: &[u8] = b"join";
/// Ends its answer: without it one may be missing, and a process that joined the others would stay in the host's.
pub(crate) const ALL_TOLD: &[u8] = b"all";

/// What the child tells, and the parent hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Word {
    Failed = 1,
    WantIdMaps = 2,
    WantHooks = 3,
    Ready = 4,
    WantCgroup = 5,
    WantSource = 6,
}

/// Size of one message: word, operation, step, errno, detail.
pub(crate) const MESSAGE_BYTES: usize = 20;

pub(crate) fn encode(word: Word, op: u32, failure: Failure) -> [u8; MESSAGE_BYTES] {
    let mut out = [0u8; MESSAGE_BYTES];
    let numbers = [word as u32, op, failure.step as u32, failure.errno as u32, failure.detail];
    for (place, number) in out.chunks_exact_mut(4).zip(numbers) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    out
}

pub(crate) fn decode(bytes: &[u8]) -> Option<(Word, u32, Failure)> {
    if bytes.len() < MESSAGE_BYTES {
        return None;
    }
    let mut numbers = [0u32; 5];
    for (number, place) in numbers.iter_mut().zip(bytes.chunks_exact(4)) {
        *number = u32::from_ne_bytes([place[0], place[1], place[2], place[3]]);
    }
    let word = match numbers[0] {
        1 => Word::Failed,
        2 => Word::WantIdMaps,
        3 => Word::WantHooks,
        4 => Word::Ready,
        5 => Word::WantCgroup,
        6 => Word::WantSource,
        _ => return None,
    };
    let failure =
        Failure { step: Step::from_number(numbers[2]), errno: numbers[3] as i32, detail: numbers[4] };
    Some((word, numbers[1], failure))
}

/// The state document for hooks, without the pid: it goes between the two halves.
pub(crate) struct StateText {
    pub(crate) before_pid: Vec<u8>,
    pub(crate) after_pid: Vec<u8>,
    /// For the seccomp listener: the process's pid, as the runtime sees it, goes between the parts.
    pub(crate) notify: Vec<Vec<u8>>,
}

/// Room after the record: for the operation's description and what a hook said.
pub(crate) const TEXT_BYTES: usize = 1024;
/// As much as is kept of what a hook writes to its standard error; the last lines tell why it failed.
const SAID_BYTES: usize = 400;

/// The end of what a hook wrote.
pub(crate) struct Said {
    bytes: [u8; SAID_BYTES],
    len: usize,
}

impl Said {
    pub(crate) fn new() -> Said {
        Said { bytes: [0; SAID_BYTES], len: 0 }
    }

    pub(crate) fn text(&self) -> &[u8] {
        self.bytes[..self.len].trim_ascii()
    }

    fn add(&mut self, more: &[u8]) {
        let more = &more[more.len().saturating_sub(SAID_BYTES)..];
        let over = (self.len + more.len()).saturating_sub(SAID_BYTES);
        self.bytes.copy_within(over..self.len, 0);
        self.len -= over;
        self.bytes[self.len..self.len + more.len()].copy_from_slice(more);
        self.len += more.len();
    }
}

type Done = Result<(), Failure>;

trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|e| Failure { step, errno: errno(&e), detail: 0 })
    }
}

fn fail(step: Step, errno: i32) -> Failure {
    Failure { step, errno, detail: 0 }
}

/// More CPUs than any kernel is built for: what a cgroup does not allow is masked out by the kernel, and comes back when
/// the cgroup's set grows.
static ALL_CPUS: [u64; 1024] = [u64::MAX; 1024];

/// Longest path that the child puts together on its stack.
const PATH_BYTES: usize = 4096;

struct Machine<'a> {
    fds: &'a Fds,
    state: &'a StateText,
    /// The container's root, from the bind or open on.
    root: Option<OwnedFd>,
    procfs: Option<OwnedFd>,
    /// The read-only file system that hides directories, once there is one.
    mask: Option<OwnedFd>,
    /// The `start` command's connection.
    starter: Option<OwnedFd>,
    /// The working directory is the process's own.
    entered: bool,
    home: [u8; PATH_BYTES],
    listen_pid: [u8; 24],
    said: Said,
    /// This process in the runtime's own pid namespace.
    host_pid: i64,
    /// Of the operation at hand.
    index: usize,
    executable: [u8; PATH_BYTES],
}

/// Clones a process for `body`, which ends when it returns; it shall allocate nothing. What is `shared` both sides have:
/// the parent gets it back.
pub(crate) fn fork<T>(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    shared: T,
    body: impl FnOnce(T),
) -> io::Result<(i32, OwnedFd, T)> {
    // SAFETY: the runtime has one thread, so that no lock is held; the child runs the body on its copy of the memory.
    match unsafe { process::clone(flags, cgroup) }? {
        process::Cloned::Child => {
            body(shared);
            process::exit_now(1)
        }
        process::Cloned::Parent { pid, pidfd } => Ok((pid, pidfd, shared)),
    }
}

/// The allocator of debug builds: in the child it ends the process, so that every test of a container's start is also one
/// of the rule that nothing there allocates.
#[cfg(debug_assertions)]
pub struct ChildGuard;

/// Set in the child's copy of the memory alone.
#[cfg(debug_assertions)]
static GUARDED: AtomicBool = AtomicBool::new(false);

#[cfg(debug_assertions)]
impl ChildGuard {
    /// What the guarded process ends with.
    const EXIT_CODE: i32 = 134;

    fn check() {
        if GUARDED.load(Ordering::Relaxed) {
            let _ = file::write_once(file::standard(2), b"keel-runtime: the child uses the allocator\n");
            process::exit_now(Self::EXIT_CODE)
        }
    }
}

// SAFETY: all is passed on to the system's allocator as it comes.
#[cfg(debug_assertions)]
unsafe impl GlobalAlloc for ChildGuard {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::check();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        Self::check();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::check();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(place, layout, size) }
    }
}

/// Runs the whole list and ends in exec or exit. `texts` explains the operations after [`Op::Ready`], which a later
/// `start` command must print without having the list.
pub(crate) fn run(ops: &[Op], texts: &[Vec<u8>], fds: &Fds, state: &StateText) -> ! {
    let mut machine = Machine {
        fds,
        state,
        root: None,
        procfs: None,
        mask: None,
        starter: None,
        entered: false,
        home: [0; PATH_BYTES],
        listen_pid: [0; 24],
        said: Said::new(),
        host_pid: 0,
        index: 0,
        executable: [0; PATH_BYTES],
    };
    #[cfg(debug_assertions)]
    GUARDED.store(true, Ordering::Relaxed);
    process::reset_signals();
    // A hook that does not read its input must not kill the set-up.
    process::ignore_sigpipe(true);
    process::umask(0);
    // If the parent dies before the container stands, nobody would ever find this process.
    let _ = process::set_parent_death_signal(libc::SIGKILL);
    if fds.notify.is_some() {
        machine.host_pid = host_pid();
    }
    for (index, op) in ops.iter().enumerate() {
        machine.index = index;
        if let Err(failure) = machine.step(op) {
            machine.report(index, failure, texts.get(index));
            process::exit_now(1);
        }
    }
    process::exit_now(1)
}

impl Machine<'_> {
    fn report(&self, index: usize, failure: Failure, text: Option<&Vec<u8>>) {
        let record = encode(Word::Failed, index as u32, failure);
        // Record, text, NUL and what a hook said in one message, on the stack.
        let mut message = [0u8; MESSAGE_BYTES + TEXT_BYTES];
        let mut len = 0;
        let mut add = |part: &[u8]| {
            let fits = part.len().min(message.len() - len);
            message[len..len + fits].copy_from_slice(&part[..fits]);
            len += fits;
        };
        add(&record);
        let receiver = match &self.starter {
            Some(starter) => {
                let text = text.map_or(&[][..], |t| t.as_slice());
                add(&text[..text.len().min(TEXT_BYTES - SAID_BYTES - 1)]);
                starter
            }
            None => match &self.fds.sync {
                Some(sync) => sync,
                None => return,
            },
        };
        if failure.step == Step::ExitCode {
            add(b"\0");
            add(self.said.text());
        }
        let _ = socket::send(receiver, &message[..len]);
    }

    /// Tells the parent a word and waits for its answer.
    fn ask(&self, word: Word) -> Done {
        let sync = self.fds.sync.as_ref().ok_or(fail(Step::Whole, libc::EBADF))?;
        socket::send(sync, &encode(word, 0, fail(Step::Whole, 0))).at(Step::Send)?;
        let mut answer = [0u8; 4];
        match socket::recv(sync, &mut answer).at(Step::Whole)? {
            // The parent has gone or refuses; it knows why.
            0 => process::exit_now(1),
            _ => Ok(()),
        }
    }

    /// Lets the parent clone the mount that the present operation begins with.
    fn ask_for_source(&self) -> Result<OwnedFd, Failure> {
        let sync = self.fds.sync.as_ref().ok_or(fail(Step::Whole, libc::EBADF))?;
        socket::send(sync, &encode(Word::WantSource, self.index as u32, fail(Step::Whole, 0)))
            .at(Step::Send)?;
        match socket::recv_fd(sync, &mut [0u8; 4]).at(Step::OpenSource)? {
            (_, Some(tree)) => Ok(tree),
            // The parent has gone or refuses; it knows why.
            _ => process::exit_now(1),
        }
    }

    fn step(&mut self, op: &Op) -> Done {
        match op {
            Op::WaitCgroup => self.ask(Word::WantCgroup),
            Op::JoinCgroup => {
                for tasks in &self.fds.tasks {
                    file::write_once(tasks, b"0").at(Step::Write)?;
                }
                Ok(())
            }
            Op::Join { kind, slot } => {
                let fd = self.fds.namespaces.get(*slot).ok_or(fail(Step::Open, libc::EBADF))?;
                match process::setns(fd, kind.flag()) {
                    // Joined before the user namespace, which does not own it.
                    Err(e) if errno(&e) == libc::EPERM && is_joined(fd, *kind) => Ok(()),
                    other => other.at(Step::Whole),
                }
            }
            Op::EnterProcess { flags } => {
                let fd = self.fds.process.as_ref().ok_or(fail(Step::Open, libc::EBADF))?;
                process::setns(fd, *flags).at(Step::Whole)
            }
            Op::WaitIdMaps => self.ask(Word::WantIdMaps),
            Op::BecomeRoot { keep_groups } => {
                // Groups first: without the right to set them the old ones stay, which unprivileged maps demand.
                if !keep_groups {
                    let _ = cred::setgroups(&[]);
                }
                cred::setresgid(0).at(Step::Whole)?;
                cred::setresuid(0).at(Step::Whole)
            }
            Op::LoopbackUp => socket::loopback_up().at(Step::Whole),
            Op::NotDumpable => process::set_dumpable(false).at(Step::Whole),
            Op::Unshare { kind } => process::unshare(kind.flag()).at(Step::Whole),
            Op::SessionKeyring { name } => match process::join_session_keyring(name) {
                // A kernel without keys has none that could leak. With any other the caller's would come along.
                Err(e) if errno(&e) == libc::ENOSYS => Ok(()),
                other => other.at(Step::Whole),
            },
            Op::NewSession => match process::setsid() {
                Err(e) if errno(&e) == libc::EPERM => Ok(()),
                other => other.at(Step::Whole),
            },
            Op::PrivateProcfs => self.private_procfs(),
            Op::OomScoreAdj { value } => oom_score_adj(*value),
            Op::Propagation { flag } => {
                let attr = Attr { propagation: flag & !libc::MS_REC, ..Attr::default() };
                mount::set_attr_at(file::cwd(), c"/", &attr, true).at(Step::SetPropagation)
            }
            Op::BindRoot { path, private_parent } => self.bind_root(path, *private_parent),
            Op::OpenRoot { path } => {
                let flags = libc::O_PATH | libc::O_DIRECTORY;
                self.root = Some(file::openat(file::cwd(), path, flags, 0).at(Step::Open)?);
                Ok(())
            }
            Op::Bind { .. } => self.bind(op),
            Op::FileSystem { .. } => self.file_system(op),
            Op::Remount { target, attr, recursive } => {
                let target = self.existing(target)?;
                mount::set_attr(&target, attr, *recursive).at(Step::SetAttr)
            }
            Op::Symlink { to, link } => self.symlink(to, link.as_c_str()),
            Op::Directory { path, mode } => {
                match make_dirs(self.root()?, path.as_c_str(), *mode) {
                    // A read-only or odd image: the change of directory will tell.
                    Ok(_) | Err(_) => Ok(()),
                }
            }
            Op::DeviceNode { path, outside: true, .. } => {
                self.attach_device(self.ask_for_source()?, path.as_c_str())
            }
            Op::DeviceNode { path, mode, major, minor, uid, gid, .. } => {
                self.device_node(path.as_c_str(), *mode, (*major, *minor), (*uid, *gid))
            }
            Op::DeviceBind { source, path } => {
                let tree = mount::clone_tree(file::cwd(), source, false, true).at(Step::OpenSource)?;
                self.attach_device(tree, path.as_c_str())
            }
            Op::Console { bind, rows, columns, uid } => {
                self.console(*bind, tty::Size { rows: *rows, columns: *columns }, *uid)
            }
            Op::RuntimeHooks => self.ask(Word::WantHooks),
            Op::AtRoot => file::fchdir(self.root()?).at(Step::Open),
            Op::Hook { program, .. } => {
                if let Some(uid) = program.home_of {
                    home(uid, &mut self.home);
                    program.env.fill_spare(self.home.as_ptr().cast());
                }
                run_hook(program, self.state, process::getpid(), &mut self.said)
            }
            Op::Mask { path, label } => self.mask(path.as_c_str(), label.as_deref()),
            Op::ReadOnly { path } => self.read_only(path.as_c_str()),
            Op::ReadOnlyRoot => {
                let attr = Attr { set: mount::ATTR_RDONLY, ..Attr::default() };
                mount::set_attr(self.root()?, &attr, false).at(Step::SetAttr)
            }
            Op::PivotRoot => self.pivot_root(),
            Op::MoveRoot { path } => self.move_root(path),
            Op::ChangeRoot => {
                file::fchdir(self.root()?).at(Step::Open)?;
                mount::chroot(c".").at(Step::Whole)?;
                file::chdir(c"/").at(Step::Whole)
            }
            Op::RootPropagation { flag } => {
                let attr = Attr { propagation: flag & !libc::MS_REC, ..Attr::default() };
                mount::set_attr_at(file::cwd(), c"/", &attr, flag & libc::MS_REC != 0)
                    .at(Step::SetPropagation)
            }
            Op::Hostname { name } => process::sethostname(name.as_bytes()).at(Step::Whole),
            Op::Domainname { name } => process::setdomainname(name.as_bytes()).at(Step::Whole),
            Op::Sysctl { path, value } => self.write_proc(path, value.as_bytes()),
            Op::Rlimit { resource, soft, hard, .. } => {
                cred::setrlimit(*resource, *soft, *hard).at(Step::Whole)
            }
            Op::IoPriority { class, level } => process::ioprio_set(*class, *level).at(Step::Whole),
            Op::Scheduler { attr, .. } => process::sched_setattr(attr).at(Step::Whole),
            Op::MemoryPolicy { mode, nodes } => process::set_mempolicy(*mode, nodes).at(Step::Whole),
            Op::Affinity { mask } => process::set_affinity(mask).at(Step::Whole),
            Op::ResetAffinity => {
                // A sandbox that forbids it leaves the runtime's CPUs, which is what there was without this.
                let _ = process::set_affinity(&ALL_CPUS);
                Ok(())
            }
            Op::Personality { value } => process::personality(*value).at(Step::Whole),
            Op::ExecLabel { file, label } => self.write_self(file, label.as_bytes()),
            Op::OwnStdio { uid } => {
                own_stdio(*uid);
                Ok(())
            }
            Op::FindExecutable { name, path } => self.find_executable(name, path.as_deref()),
            Op::CloseUnneeded { first } => self.close_unneeded(*first),
            Op::Ready => self.ready(),
            Op::NoNewPrivileges => process::set_no_new_privs().at(Step::Whole),
            Op::Seccomp { filter } => {
                let listener = seccomp::install(filter.flags, &filter.program).at(Step::Whole)?;
                match (listener, &self.fds.notify) {
                    (Some(listener), Some(notify)) => self.send_listener(notify, &listener),
                    (Some(_), None) => Err(fail(Step::Send, libc::ENOTCONN)),
                    (None, _) => Ok(()),
                }
            }
            Op::BoundingSet { keep, last } => {
                for cap in 0..=*last {
                    if keep & (1 << cap) == 0 {
                        cred::bounding_drop(cap).at(Step::Whole)?;
                    }
                }
                Ok(())
            }
            Op::KeepCapabilities => cred::set_keep_caps(true).at(Step::Whole),
            Op::Groups { gids } => match cred::setgroups(gids) {
                // A user namespace made by an ordinary user has setgroups denied, and nothing to drop.
                Err(e) if errno(&e) == libc::EPERM && gids.is_empty() => Ok(()),
                other => other.at(Step::Whole),
            },
            Op::Gid { gid } => cred::setresgid(*gid).at(Step::Whole),
            Op::Uid { uid } => cred::setresuid(*uid).at(Step::Whole),
            Op::Capabilities { caps } => {
                cred::set_keep_caps(false).at(Step::Whole)?;
                cred::capset(caps).at(Step::Whole)
            }
            Op::Ambient { caps } => {
                for cap in 0..64 {
                    if caps & (1 << cap) != 0 {
                        cred::ambient_raise(cap).at(Step::Whole)?;
                    }
                }
                Ok(())
            }
            Op::WorkingDirectory { path, early } => match working_directory(path) {
                Err(e) if e.errno == libc::EACCES && (*early || self.entered) => Ok(()),
                Err(e) => Err(e),
                Ok(()) => {
                    self.entered = true;
                    Ok(())
                }
            },
            Op::Umask { mask } => {
                process::umask(*mask);
                Ok(())
            }
            Op::Exec { args, env, path, home_of, listen_pid } => {
                if *listen_pid {
                    self.listen_pid[..11].copy_from_slice(b"LISTEN_PID=");
                    let mut digits = [0u8; 12];
                    let digits = decimal(i64::from(process::getpid()), &mut digits);
                    self.listen_pid[11..11 + digits.len()].copy_from_slice(digits);
                    env.fill_spare(self.listen_pid.as_ptr().cast());
                }
                self.exec(args, env, path.as_deref(), *home_of)
            }
        }
    }

    fn root(&self) -> Result<BorrowedFd<'_>, Failure> {
        self.root.as_ref().map(|r| r.as_fd()).ok_or(fail(Step::Open, libc::EBADF))
    }

    // --- procfs -------------------------------------------------------------------------------------------------

    fn private_procfs(&mut self) -> Done {
        let made = mount::fsopen(c"proc").and_then(|fs| mount::fsmount(&fs, 0));
        let fd = match made {
            Ok(fd) => fd,
            // A user namespace in which the host's procfs is covered: the host's own is what there is before the pivot.
            Err(e) if errno(&e) == libc::EPERM => {
                file::openat(file::cwd(), c"/proc", libc::O_PATH | libc::O_DIRECTORY, 0).at(Step::Open)?
            }
            Err(e) => return Err(fail(Step::Create, errno(&e))),
        };
        if file::fs_type(&fd).at(Step::Verify)? != file::PROC_SUPER_MAGIC {
            return Err(fail(Step::Verify, libc::EXDEV));
        }
        self.procfs = Some(fd);
        Ok(())
    }

    /// `path` is below the private procfs; nothing mounted or linked can redirect the write.
    fn write_proc(&self, path: &CStr, value: &[u8]) -> Done {
        let procfs = self.procfs.as_ref().ok_or(fail(Step::Open, libc::EBADF))?;
        let resolve =
            file::RESOLVE_BENEATH | file::RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
        let fd = file::openat2(procfs, path, libc::O_WRONLY, 0, resolve).at(Step::Open)?;
        file::write_once(&fd, value).at(Step::Write)
    }

    /// As `write_proc`, below `/proc/self`, which is a plain link within the procfs.
    fn write_self(&self, path: &CStr, value: &[u8]) -> Done {
        let procfs = self.procfs.as_ref().ok_or(fail(Step::Open, libc::EBADF))?;
        let own = file::openat(procfs, c"self", libc::O_PATH | libc::O_DIRECTORY, 0).at(Step::Open)?;
        let resolve =
            file::RESOLVE_BENEATH | file::RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
        let fd = file::openat2(&own, path, libc::O_WRONLY, 0, resolve).at(Step::Open)?;
        file::write_once(&fd, value).at(Step::Write)
    }

    // --- mounts -------------------------------------------------------------------------------------------------

    fn bind_root(&mut self, path: &CStr, private_parent: bool) -> Done {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let place = match file::openat(file::cwd(), path, flags, 0) {
            // In a directory that the root of a user namespace may not search.
            Err(e) if errno(&e) == libc::EACCES => self.ask_for_source()?,
            other => other.at(Step::OpenSource)?,
        };
        if private_parent {
            // The mount below must not pass the new one on to its peers.
            let mut here = file::dup_above(&place, 3).at(Step::OpenSource)?;
            while !file::is_mount_root(&here).at(Step::OpenSource)? {
                here = file::openat(&here, c"..", flags, 0).at(Step::OpenSource)?;
            }
            let attr = Attr { propagation: libc::MS_PRIVATE, ..Attr::default() };
            mount::set_attr(&here, &attr, false).at(Step::SetPropagation)?;
        }
        let tree = mount::clone_tree(&place, c"", true, true).at(Step::Create)?;
        mount::attach(&tree, &place).at(Step::Attach)?;
        self.root = Some(tree);
        Ok(())
    }

    /// The place of a mount, which must exist.
    fn existing(&self, target: &Target) -> Result<OwnedFd, Failure> {
        match target.link {
            true => open_link_in(self.root()?, target.path.as_c_str()),
            false => open_in(self.root()?, target.path.as_c_str(), target.real),
        }
    }

    /// The place of a mount, made when it does not exist.
    fn place(&self, target: &Target, directory: bool) -> Result<OwnedFd, Failure> {
        let path = target.path.as_c_str();
        match self.existing(target) {
            Err(f) if f.errno == libc::ENOENT => {}
            Err(f) if target.real && f.errno == libc::ELOOP => return Err(fail(Step::NotReal, f.errno)),
            other => return other,
        }
        if directory {
            make_dirs(self.root()?, path, 0o755)?;
        } else {
            make_file(self.root()?, path.to_bytes(), LINKS)?;
        }
        self.existing(target)
    }

    fn bind(&self, op: &Op) -> Done {
        let Op::Bind {
            source,
            target,
            recursive,
            follow,
            attr,
            loses,
            tree_attr,
            propagation,
            propagate_tree,
            only_procfs,
            idmap,
            outside,
        } = op
        else {
            return Ok(());
        };
        let cloned = match outside {
            true => Err(io::Error::from_raw_os_error(libc::EACCES)),
            false => mount::clone_tree(file::cwd(), source, *recursive, *follow),
        };
        let (tree, mapped) = match cloned {
            // What the root of a user namespace may not reach, whoever made the container may.
            Err(e) if errno(&e) == libc::EACCES => (self.ask_for_source()?, true),
            other => (other.at(Step::OpenSource)?, false),
        };
        if *only_procfs && file::fs_type(&tree).at(Step::Verify)? != file::PROC_SUPER_MAGIC {
            return Err(fail(Step::Verify, libc::EINVAL));
        }
        if let Some((slot, recursive)) = idmap.filter(|_| !mapped) {
            let userns = self.fds.idmaps.get(slot).ok_or(fail(Step::SetAttr, libc::EBADF))?;
            mount::set_attr(&tree, &Attr::idmap(userns), recursive).at(Step::SetAttr)?;
        }
        let whole = Attr { clear: attr.clear | loses, ..*attr };
        match set_attributes(&tree, &whole, false) {
            // In a user namespace what the host set may be locked. It stays, where nobody asked to lose it by name.
            Err(e) if e.errno == libc::EPERM && *loses != 0 => {
                let clear = attr.clear | loses & mount::ATTR_NOSYMFOLLOW;
                set_attributes(&tree, &Attr { clear, ..*attr }, false)?;
            }
            other => other?,
        }
        set_attributes(&tree, tree_attr, true)?;
        let directory = file::fstat(&tree).at(Step::OpenSource)?.is_dir();
        let place = self.place(target, directory)?;
        mount::attach(&tree, &place).at(Step::Attach)?;
        set_propagation(&tree, *propagation, *propagate_tree)
    }

    fn file_system(&self, op: &Op) -> Done {
        let Op::FileSystem { kind, target, options, attr, propagation, copy_up, read_only_after } = op else {
            return Ok(());
        };
        let fs = mount::fsopen(kind).at(Step::Create)?;
        for (i, option) in options.iter().enumerate() {
            mount::fsconfig(&fs, &option.key, option.value.as_deref()).map_err(|e| Failure {
                step: Step::Option,
                errno: errno(&e),
                detail: i as u32,
            })?;
        }
        // As mount(8) has it not: a tmpfs without a mode of its own looks like the directory that it covers.
        if kind.as_c_str() == c"tmpfs"
            && !options.iter().any(|o| o.key.as_c_str() == c"mode")
            && let Ok(covered) = self.existing(target)
        {
            let mode = file::fstat(&covered).at(Step::OpenTarget)?.mode & 0o7777;
            let mut digits = [0u8; 5];
            for (place, digit) in digits.iter_mut().zip((0..4).rev()) {
                *place = b'0' + (mode >> (3 * digit) & 7) as u8;
            }
            with_c_str(&digits[..4], |mode| mount::fsconfig(&fs, c"mode", Some(mode)).at(Step::Create))?;
        }
        let mounted = mount::fsmount(&fs, *attr).at(Step::Create)?;
        let place = self.place(target, true)?;
        if *copy_up {
            copy_up_into(&place, &mounted)?;
        }
        if *read_only_after {
            let attr = Attr { set: mount::ATTR_RDONLY, ..Attr::default() };
            mount::set_attr(&mounted, &attr, false).at(Step::SetAttr)?;
        }
        mount::attach(&mounted, &place).at(Step::Attach)?;
        set_propagation(&mounted, *propagation, false)
    }

    fn symlink(&self, to: &CStr, link: &CStr) -> Done {
        let (parent, name) = split(link);
        let parent = open_bytes_in(self.root()?, parent, true)?;
        with_c_str(name, |name| match file::symlinkat(to, &parent, name) {
            Err(e) if errno(&e) == libc::EEXIST => Ok(()),
            other => other.at(Step::Create),
        })
    }

    fn device_node(&self, path: &CStr, mode: u32, number: (u32, u32), owner: (u32, u32)) -> Done {
        let (parent, name) = split(path);
        let parent = make_dirs_bytes(self.root()?, parent, 0o755)?;
        with_c_str(name, |name| match file::mknodat(&parent, name, mode, number.0, number.1) {
            Ok(()) => {
                // Ids that are not mapped cannot be set; the node then belongs to root.
                if owner != (0, 0) {
                    file::fchownat(&parent, name, owner.0, owner.1, libc::AT_SYMLINK_NOFOLLOW)
                        .at(Step::SetAttr)?;
                }
                Ok(())
            }
            Err(e) if errno(&e) == libc::EEXIST => {
                // What the image brought is used only when it is that very device.
                let st = file::fstatat(&parent, name, libc::AT_SYMLINK_NOFOLLOW).at(Step::Verify)?;
                let same = st.kind() == mode & libc::S_IFMT && st.rdev == libc::makedev(number.0, number.1);
                if same { Ok(()) } else { Err(fail(Step::Verify, libc::EEXIST)) }
            }
            Err(e) => Err(fail(Step::Create, errno(&e))),
        })
    }

    fn attach_device(&self, tree: OwnedFd, path: &CStr) -> Done {
        let kind = file::fstat(&tree).at(Step::Verify)?.kind();
        if !matches!(kind, libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO) {
            return Err(fail(Step::Verify, libc::ENODEV));
        }
        let (parent, name) = split(path);
        let parent = make_dirs_bytes(self.root()?, parent, 0o755)?;
        let attr = Attr { set: mount::ATTR_NOSUID | mount::ATTR_NOEXEC, ..Attr::default() };
        mount::set_attr(&tree, &attr, false).at(Step::SetAttr)?;
        let place = with_c_str(name, |name| {
            let flags = libc::O_CREAT | libc::O_NOFOLLOW | libc::O_RDONLY | libc::O_NONBLOCK;
            file::openat(&parent, name, flags, 0o666).at(Step::OpenTarget)
        })?;
        mount::attach(&tree, &place).at(Step::Attach)
    }

    fn mask(&mut self, path: &CStr, label: Option<&CStr>) -> Done {
        let place = match open_in(self.root()?, path, false) {
            Err(f) if matches!(f.errno, libc::ENOENT | libc::ENOTDIR) => return Ok(()),
            other => other?,
        };
        if file::fstat(&place).at(Step::OpenTarget)?.is_dir() {
            let tree = match &self.mask {
                Some(mask) => mount::clone_tree(mask, c"", false, true).at(Step::Create)?,
                None => {
                    let fs = mount::fsopen(c"tmpfs").at(Step::Create)?;
                    let size = mount::fsconfig(&fs, c"size", Some(c"0"));
                    size.and_then(|()| mount::fsconfig(&fs, c"nr_blocks", Some(c"1"))).at(Step::Option)?;
                    if let Some(label) = label {
                        mount::fsconfig(&fs, c"context", Some(label)).at(Step::Option)?;
                    }
                    let attr =
                        mount::ATTR_RDONLY | mount::ATTR_NOSUID | mount::ATTR_NODEV | mount::ATTR_NOEXEC;
                    mount::fsmount(&fs, attr).at(Step::Create)?
                }
            };
            mount::attach(&tree, &place).at(Step::Attach)?;
            if self.mask.is_none() {
                self.mask = Some(tree);
            }
            return Ok(());
        }
        // The host's null device, taken before the root is changed and checked, never the container's.
        let null = file::openat(file::cwd(), c"/dev/null", libc::O_PATH, 0).at(Step::OpenSource)?;
        if !file::fstat(&null).at(Step::Verify)?.is_char_device(1, 3) {
            return Err(fail(Step::Verify, libc::ENODEV));
        }
        let tree = mount::clone_tree(&null, c"", false, true).at(Step::Create)?;
        mount::attach(&tree, &place).at(Step::Attach)
    }

    fn read_only(&self, path: &CStr) -> Done {
        let place = match open_in(self.root()?, path, false) {
            Err(f) if matches!(f.errno, libc::ENOENT | libc::ENOTDIR) => return Ok(()),
            other => other?,
        };
        let tree = mount::clone_tree(&place, c"", true, true).at(Step::Create)?;
        let attr = Attr { set: mount::ATTR_RDONLY, ..Attr::default() };
        mount::set_attr(&tree, &attr, false).at(Step::SetAttr)?;
        mount::attach(&tree, &place).at(Step::Attach)
    }

    fn pivot_root(&self) -> Done {
        let old =
            file::openat(file::cwd(), c"/", libc::O_PATH | libc::O_DIRECTORY, 0).at(Step::OpenSource)?;
        file::fchdir(self.root()?).at(Step::Open)?;
        mount::pivot_root(c".", c".").at(Step::Whole)?;
        // The old root lies over the new one. Its unmount must not reach the host.
        file::fchdir(&old).at(Step::Open)?;
        let attr = Attr { propagation: libc::MS_SLAVE, ..Attr::default() };
        mount::set_attr_at(file::cwd(), c".", &attr, true).at(Step::SetPropagation)?;
        mount::umount(c".", libc::MNT_DETACH).at(Step::Whole)?;
        file::chdir(c"/").at(Step::Whole)
    }

    fn move_root(&self, root: &CStr) -> Done {
        // The mount that a detachment happens on must not pass it on to its peers outside.
        self.each_other_mount(root, |place, _| {
            let attr = Attr { propagation: libc::MS_SLAVE, ..Attr::default() };
            match mount::set_attr_at(file::cwd(), place, &attr, false) {
                // Below one that is covered by another.
                Err(e) if matches!(errno(&e), libc::EINVAL | libc::ENOENT | libc::ENOTDIR) => Ok(()),
                other => other.at(Step::SetPropagation),
            }
        })?;
        self.each_other_mount(root, |place, kind| {
            if is_above(place.to_bytes(), root.to_bytes()) {
                return Ok(());
            }
            match mount::umount(place, libc::MNT_DETACH) {
                // Gone with one above it, or covered by it.
                Ok(()) => Ok(()),
                Err(e) if matches!(errno(&e), libc::ENOENT | libc::ENOTDIR) => Ok(()),
                // In a user namespace what the host mounted stays; what shows the host is covered.
                Err(_) if matches!(kind, b"proc" | b"sysfs") => {
                    let cover =
                        mount::fsopen(c"tmpfs").and_then(|fs| mount::fsmount(&fs, mount::ATTR_RDONLY));
                    let over = file::openat(file::cwd(), place, libc::O_PATH | libc::O_DIRECTORY, 0);
                    mount::attach(&cover.at(Step::Create)?, &over.at(Step::OpenTarget)?).at(Step::Attach)
                }
                Err(_) => Ok(()),
            }
        })?;
        file::fchdir(self.root()?).at(Step::Open)?;
        mount::mount(c".", c"/", c"", libc::MS_MOVE, None).at(Step::Attach)?;
        mount::chroot(c".").at(Step::Whole)?;
        file::chdir(c"/").at(Step::Whole)
    }

    /// Calls with place and type of every mount that is not within the container's root.
    fn each_other_mount(&self, root: &CStr, mut call: impl FnMut(&CStr, &[u8]) -> Done) -> Done {
        let procfs = self.procfs.as_ref().ok_or(fail(Step::Open, libc::EBADF))?;
        let list = file::openat(procfs, c"self/mountinfo", libc::O_RDONLY, 0).at(Step::Open)?;
        let mut text = [0u8; 4 * PATH_BYTES];
        let mut have = 0;
        loop {
            let n = file::read(&list, &mut text[have..]).at(Step::Open)?;
            have += n;
            let mut start = 0;
            while let Some(end) = text[start..have].iter().position(|b| *b == b'\n') {
                let mut place = [0u8; PATH_BYTES];
                let (place, kind) = mount_line(&text[start..start + end], &mut place)
                    .ok_or(fail(Step::Verify, libc::EINVAL))?;
                if !is_above(root.to_bytes(), place.to_bytes()) {
                    call(place, kind)?;
                }
                start += end + 1;
            }
            if n == 0 {
                return Ok(());
            }
            text.copy_within(start..have, 0);
            have -= start;
            if have == text.len() {
                return Err(fail(Step::Verify, libc::ENAMETOOLONG));
            }
        }
    }

    // --- terminal -----------------------------------------------------------------------------------------------

    fn console(&mut self, bind: bool, size: tty::Size, uid: u32) -> Done {
        let flags = libc::O_RDWR | libc::O_NOCTTY;
        // Before the pivot below the root's descriptor, in an exec below `/`.
        let slash = file::openat(file::cwd(), c"/", libc::O_PATH | libc::O_DIRECTORY, 0).at(Step::Open)?;
        let root = self.root.as_ref().map_or(slash.as_fd(), |r| r.as_fd());
        let resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS;
        let master = match file::openat2(root, c"dev/pts/ptmx", flags, 0, resolve) {
            // A container without a devpts of its own uses the host's.
            Err(e) if errno(&e) == libc::ENOENT => file::openat(file::cwd(), c"/dev/ptmx", flags, 0),
            other => other,
        }
        .at(Step::Open)?;
        let st = file::fstat(&master).at(Step::Verify)?;
        if !st.is_char_device(5, 2) {
            return Err(fail(Step::Verify, libc::ENOTTY));
        }
        let peer = tty::open_peer(&master).at(Step::Create)?;
        if size.rows != 0 && size.columns != 0 {
            tty::set_size(&master, size).at(Step::SetAttr)?;
        }
        if self.fds.relayed {
            tty::clear_onlcr(&peer).at(Step::SetAttr)?;
        }
        let console = self.fds.console.as_ref().ok_or(fail(Step::Send, libc::ENOTCONN))?;
        socket::send_fd(console, b"/dev/ptmx", &master).at(Step::Send)?;
        // The group stays what the devpts gives its terminals: it is for programs that write to other users' ones.
        let _ = file::fchownat(&peer, c"", uid, u32::MAX, libc::AT_EMPTY_PATH);
        if bind {
            let tree = mount::clone_tree(&peer, c"", false, true).at(Step::Create)?;
            let place = open_bytes_in(root, b"dev", true)?;
            let flags = libc::O_CREAT | libc::O_NOFOLLOW | libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
            let place = match file::openat(&place, c"console", flags | libc::O_EXCL, 0o666) {
                Err(e) if errno(&e) == libc::EEXIST => {
                    file::openat(&place, c"console", libc::O_PATH | libc::O_NOFOLLOW, 0)
                }
                other => other,
            }
            .at(Step::OpenTarget)?;
            mount::attach(&tree, &place).at(Step::Attach)?;
        }
        tty::set_controlling(&peer).at(Step::Whole)?;
        for standard in 0..3 {
            file::dup2(&peer, standard).at(Step::Whole)?;
        }
        Ok(())
    }

    // --- start --------------------------------------------------------------------------------------------------

    fn close_unneeded(&self, first: u32) -> Done {
        let raw = |fd: &Option<OwnedFd>| fd.as_ref().map_or(0, |fd| fd.as_raw_fd() as u32);
        let procfs = if self.fds.hand_out { raw(&self.procfs) } else { 0 };
        let mut needed = [raw(&self.fds.sync), raw(&self.fds.start), raw(&self.fds.notify), procfs];
        needed.sort_unstable();
        let mut from = first;
        for fd in needed.into_iter().filter(|fd| *fd >= first) {
            if fd > from {
                // SAFETY: no operation after this one uses another descriptor, and the process ends in exec or exit.
                unsafe { process::close_range(from, fd - 1) }.at(Step::Whole)?;
            }
            from = fd + 1;
        }
        // SAFETY: as above.
        unsafe { process::close_range(from, u32::MAX) }.at(Step::Whole)?;
        // A filter that comes before the exec may forbid this one later.
        process::close_range_cloexec(first).at(Step::Whole)
    }

    fn ready(&mut self) -> Done {
        // From here on the process may outlive the command that made it.
        process::set_parent_death_signal(0).at(Step::Whole)?;
        let Some(listener) = &self.fds.start else {
            return self.ask(Word::Ready);
        };
        let sync = self.fds.sync.as_ref().ok_or(fail(Step::Whole, libc::EBADF))?;
        socket::send(sync, &encode(Word::Ready, 0, fail(Step::Whole, 0))).at(Step::Send)?;
        process::end_on_signals();
        loop {
            let starter = socket::accept(listener).at(Step::Whole)?;
            let mut word = [0u8; 4];
            match socket::recv(&starter, &mut word).unwrap_or(0) {
                // A connection that says nothing was only a look whether somebody is here.
                0 => {}
                n if &word[..n] == ASK_NAMESPACES => self.hand_out_namespaces(&starter),
                _ => {
                    self.starter = Some(starter);
                    return Ok(());
                }
            }
        }
    }

    /// Whoever reaches the socket may start the container, and owns its user namespace, so this gives no new right. To be
    /// traceable instead would also let in what others have started in the container.
    fn hand_out_namespaces(&self, asker: &OwnedFd) {
        let Some(procfs) = self.procfs.as_ref().filter(|_| self.fds.hand_out) else { return };
        for kind in NsKind::ALL {
            let sent = match file::openat(procfs, kind.own_file(), libc::O_RDONLY, 0) {
                Ok(fd) => socket::send_fd(asker, b"ns", &fd),
                // A kernel without this kind.
                Err(e) if errno(&e) == libc::ENOENT => Ok(()),
                Err(e) => Err(e),
            };
            if sent.is_err() {
                return;
            }
        }
        let _ = socket::send(asker, ALL_TOLD);
    }

    fn send_listener(&self, notify: &OwnedFd, listener: &OwnedFd) -> Done {
        let mut digits = [0u8; 12];
        let pid = decimal(self.host_pid, &mut digits);
        // In one piece: receivers exist that read once. The pid goes between the parts of the document.
        let part = |n: usize| self.state.notify.get(n).map_or(&[][..], |p| p.as_slice());
        let between = |n: usize| if part(n).is_empty() { &[][..] } else { pid };
        let parts = [part(0), between(1), part(1), between(2), part(2)].map(IoSlice::new);
        socket::send_parts_with_fd(notify, &parts, listener).at(Step::Send)?;
        // The receiver reads to the end. Should the filter, which is in force now, forbid this, the exec closes.
        let _ = socket::shut_down_writing(notify);
        Ok(())
    }

    fn find_executable(&mut self, name: &CStr, path: Option<&CStr>) -> Done {
        let bytes = name.to_bytes();
        if bytes.contains(&b'/') {
            // Relative to a directory that is entered later, so only an absolute name can be judged now.
            if bytes.first() == Some(&b'/') {
                match file::fstatat(file::cwd(), name, 0) {
                    Err(e) if errno(&e) == libc::EACCES => {}
                    other => return other.map(drop).at(Step::Whole),
                }
            }
            return Ok(());
        }
        if bytes.is_empty() {
            return Err(fail(Step::NotFound, libc::ENOENT));
        }
        for dir in path.map_or(&[][..], |p| p.to_bytes()).split(|b| *b == b':') {
            if join(dir, bytes, &mut self.executable).is_some_and(is_executable) {
                return Ok(());
            }
        }
        Err(fail(Step::NotFound, libc::ENOENT))
    }

    fn exec(
        &mut self,
        args: &StringArray,
        env: &StringArray,
        path: Option<&CStr>,
        home_of: Option<u32>,
    ) -> Done {
        if let Some(uid) = home_of {
            home(uid, &mut self.home);
            env.fill_spare(self.home.as_ptr().cast());
        }
        let name = args.strings().first().ok_or(fail(Step::NotFound, libc::ENOENT))?;
        process::ignore_sigpipe(false);
        // SAFETY: both arrays were made from C strings that outlive the call; the spare slots of the environment hold
        // null or the NUL-terminated buffers of this machine.
        let execute = |target: &CStr| unsafe { process::execve(target, pointers(args), pointers(env)) };
        if name.to_bytes().contains(&b'/') {
            return Err(fail(Step::Whole, errno(&execute(name))));
        }
        // Searched again, with the rights and in the directory of the user, and by trying: the filter that is in force
        // now may know no other way to ask.
        let mut worst = fail(Step::NotFound, libc::ENOENT);
        for dir in path.map_or(&[][..], |p| p.to_bytes()).split(|b| *b == b':') {
            let Some(target) = join(dir, name.to_bytes(), &mut self.executable) else { continue };
            match errno(&execute(target)) {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => worst = fail(Step::Whole, libc::EACCES),
                other => return Err(fail(Step::Whole, other)),
            }
        }
        Err(worst)
    }
}

fn pointers(array: &StringArray) -> &[*const c_char] {
    let cells = array.pointers();
    // SAFETY: `Cell<T>` has the layout of `T`, and nothing writes to the cells while the slice lives.
    unsafe { std::slice::from_raw_parts(cells.as_ptr().cast::<*const c_char>(), cells.len()) }
}

// --- paths below a root -------------------------------------------------------------------------------------------

fn open_in(root: BorrowedFd<'_>, path: &CStr, real: bool) -> Result<OwnedFd, Failure> {
    if path.is_empty() {
        return file::openat(root, c".", libc::O_PATH | libc::O_DIRECTORY, 0).at(Step::OpenTarget);
    }
    let resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | if real { RESOLVE_NO_SYMLINKS } else { 0 };
    file::openat2(root, path, libc::O_PATH, 0, resolve).at(Step::OpenTarget)
}

/// As [`open_in`]; a link at the end is opened itself.
fn open_link_in(root: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Failure> {
    let resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
    file::openat2(root, path, libc::O_PATH | libc::O_NOFOLLOW, 0, resolve).at(Step::OpenTarget)
}

fn open_bytes_in(root: BorrowedFd<'_>, path: &[u8], real: bool) -> Result<OwnedFd, Failure> {
    with_c_str(path, |path| open_in(root, path, real))
}

fn make_dirs(root: BorrowedFd<'_>, path: &CStr, mode: u32) -> Result<OwnedFd, Failure> {
    make_dirs_bytes(root, path.to_bytes(), mode)
}

/// As many links as the kernel follows.
const LINKS: u32 = 40;

/// Makes an empty file below the root, and the directories on the way. A link that leads nowhere is followed: what it
/// names is made.
fn make_file(root: BorrowedFd<'_>, path: &[u8], links: u32) -> Done {
    let (dir, name) = split_bytes(path);
    let parent = make_dirs_within(root, dir, 0o755, links)?;
    let made = with_c_str(name, |name| {
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY;
        Ok(file::openat(&parent, name, flags, 0o755).map(drop))
    })?;
    match made {
        Err(e) if errno(&e) == libc::EEXIST => {
            let mut buffer = [0u8; PATH_BYTES];
            match followed(&parent, dir, name, &mut buffer)? {
                Some(path) if links > 0 => make_file(root, path, links - 1),
                Some(_) => Err(fail(Step::OpenTarget, libc::ELOOP)),
                None => Ok(()),
            }
        }
        other => other.at(Step::OpenTarget),
    }
}

/// Where the link `dir/name` leads, as a path below the root; `None` when it is no link.
fn followed<'b>(
    parent: &OwnedFd,
    dir: &[u8],
    name: &[u8],
    buffer: &'b mut [u8; PATH_BYTES],
) -> Result<Option<&'b [u8]>, Failure> {
    let mut link = [0u8; PATH_BYTES];
    let read = with_c_str(name, |name| Ok(file::readlinkat(parent, name, &mut link).map(|l| l.len())))?;
    let len = match read {
        Err(e) if errno(&e) == libc::EINVAL => return Ok(None),
        other => other.at(Step::OpenTarget)?,
    };
    let link = &link[..len];
    let from = if link.first() == Some(&b'/') { &[][..] } else { dir };
    let path = join(from, link, buffer).ok_or(fail(Step::OpenTarget, libc::ENAMETOOLONG))?;
    Ok(Some(path.to_bytes()))
}

/// Opens a directory below the root, making what is missing. Each existing part is resolved within the root, each new
/// one is made in the directory just opened, so a link exchanged meanwhile can never lead outside.
fn make_dirs_bytes(root: BorrowedFd<'_>, path: &[u8], mode: u32) -> Result<OwnedFd, Failure> {
    make_dirs_within(root, path, mode, LINKS)
}

fn make_dirs_within(root: BorrowedFd<'_>, path: &[u8], mode: u32, links: u32) -> Result<OwnedFd, Failure> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    match open_bytes_in(root, path, false) {
        Err(f) if f.errno == libc::ENOENT => {}
        other => return other,
    }
    let (dir, name) = split_bytes(path);
    let parent = make_dirs_within(root, dir, mode, links)?;
    if matches!(name, b"" | b"." | b"..") {
        return open_bytes_in(root, path, false);
    }
    let made = with_c_str(name, |name| Ok(file::mkdirat(&parent, name, mode)))?;
    match made {
        Err(e) if errno(&e) == libc::EEXIST => {
            let mut buffer = [0u8; PATH_BYTES];
            match followed(&parent, dir, name, &mut buffer)? {
                Some(path) if links > 0 => return make_dirs_within(root, path, mode, links - 1),
                Some(_) => return Err(fail(Step::OpenTarget, libc::ELOOP)),
                None => {}
            }
        }
        other => other.at(Step::OpenTarget)?,
    }
    with_c_str(name, |name| {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        file::openat(&parent, name, flags, 0).at(Step::OpenTarget)
    })
}

fn split(path: &CStr) -> (&[u8], &[u8]) {
    split_bytes(path.to_bytes())
}

fn split_bytes(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// Calls with the bytes as a C string on the stack.
fn with_c_str<T>(bytes: &[u8], call: impl FnOnce(&CStr) -> Result<T, Failure>) -> Result<T, Failure> {
    let mut buffer = [0u8; PATH_BYTES];
    if bytes.len() >= PATH_BYTES {
        return Err(fail(Step::OpenTarget, libc::ENAMETOOLONG));
    }
    buffer[..bytes.len()].copy_from_slice(bytes);
    match CStr::from_bytes_until_nul(&buffer) {
        Ok(text) => call(text),
        Err(_) => Err(fail(Step::OpenTarget, libc::EINVAL)),
    }
}

/// `dir/name` as a C string in the buffer.
fn join<'b>(dir: &[u8], name: &[u8], buffer: &'b mut [u8; PATH_BYTES]) -> Option<&'b CStr> {
    let dir = if dir.is_empty() { b"." } else { dir };
    let len = dir.len() + 1 + name.len();
    if len >= PATH_BYTES {
        return None;
    }
    buffer[..dir.len()].copy_from_slice(dir);
    buffer[dir.len()] = b'/';
    buffer[dir.len() + 1..len].copy_from_slice(name);
    buffer[len] = 0;
    CStr::from_bytes_until_nul(buffer).ok()
}

/// Whether a path is the other or leads to it.
fn is_above(path: &[u8], other: &[u8]) -> bool {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    other.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// Place and type of a line of mountinfo; the kernel writes blanks within the place as octal numbers.
fn mount_line<'a>(line: &'a [u8], place: &'a mut [u8; PATH_BYTES]) -> Option<(&'a CStr, &'a [u8])> {
    let mut fields = line.split(|b| *b == b' ');
    let mut written = fields.nth(4)?;
    let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
    let mut len = 0;
    while let Some((&first, rest)) = written.split_first() {
        let octal = |b: u8| (b'0'..=b'7').contains(&b).then(|| b - b'0');
        let (byte, rest) = match (first, rest) {
            (b'\\', [a, b, c, rest @ ..]) => {
                (octal(*a)?.checked_mul(64)? + octal(*b)? * 8 + octal(*c)?, rest)
            }
            _ => (first, rest),
        };
        *place.get_mut(len)? = byte;
        written = rest;
        len += 1;
    }
    *place.get_mut(len)? = 0;
    Some((CStr::from_bytes_until_nul(&place[..]).ok()?, kind))
}

fn is_executable(path: &CStr) -> bool {
    let regular = file::fstatat(file::cwd(), path, 0).is_ok_and(|st| st.kind() == libc::S_IFREG);
    regular && file::faccessat(file::cwd(), path, libc::X_OK, libc::AT_EACCESS).is_ok()
}

// --- mount helpers ------------------------------------------------------------------------------------------------

fn set_attributes(tree: &OwnedFd, attr: &Attr, recursive: bool) -> Done {
    if attr.set == 0 && attr.clear == 0 {
        return Ok(());
    }
    mount::set_attr(tree, attr, recursive).at(Step::SetAttr)
}

fn set_propagation(tree: &OwnedFd, flag: u64, recursive: bool) -> Done {
    if flag == 0 {
        return Ok(());
    }
    let attr = Attr { propagation: flag, ..Attr::default() };
    mount::set_attr(tree, &attr, recursive).at(Step::SetPropagation)
}

/// Directories nested deeper than this are not copied: the stack is finite and an image decides the depth.
const COPY_DEPTH: u32 = 64;

/// Copies a directory's content: what an image keeps below the mount point of a tmpfs.
fn copy_up_into(from: &OwnedFd, to: &OwnedFd) -> Done {
    let st = file::fstat(from).at(Step::Copy)?;
    file::fchownat(to, c"", st.uid, st.gid, libc::AT_EMPTY_PATH).at(Step::Copy)?;
    copy_tree(from, to, COPY_DEPTH)
}

fn copy_tree(from: &OwnedFd, to: &OwnedFd, depth: u32) -> Done {
    if depth == 0 {
        return Err(fail(Step::Copy, libc::ELOOP));
    }
    let dir = file::openat(from, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0).at(Step::Copy)?;
    let mut entries = file::DirBuffer::new();
    while entries.fill(&dir).at(Step::Copy)? {
        while let Some(name) = entries.next_name() {
            if name != c"." && name != c".." {
                copy_entry(&dir, to, name, depth)?;
            }
        }
    }
    Ok(())
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: u32) -> Done {
    let st = file::fstatat(from, name, libc::AT_SYMLINK_NOFOLLOW).at(Step::Copy)?;
    match st.kind() {
        libc::S_IFDIR => {
            file::mkdirat(to, name, st.mode & 0o7777).at(Step::Copy)?;
            let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
            let below = file::openat(from, name, flags, 0).at(Step::Copy)?;
            let new = file::openat(to, name, flags, 0).at(Step::Copy)?;
            copy_tree(&below, &new, depth - 1)?;
        }
        libc::S_IFREG => {
            let source = file::openat(from, name, libc::O_RDONLY | libc::O_NOFOLLOW, 0).at(Step::Copy)?;
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            let target = file::openat(to, name, flags, st.mode & 0o777).at(Step::Copy)?;
            let mut chunk = [0u8; 8192];
            loop {
                let n = file::read(&source, &mut chunk).at(Step::Copy)?;
                if n == 0 {
                    break;
                }
                file::write_once(&target, &chunk[..n]).at(Step::Copy)?;
            }
        }
        libc::S_IFLNK => {
            let mut buffer = [0u8; PATH_BYTES];
            let len = file::readlinkat(from, name, &mut buffer).at(Step::Copy)?.len();
            with_c_str(&buffer[..len], |link| file::symlinkat(link, to, name).at(Step::Copy))?;
        }
        kind => {
            let (major, minor) = (libc::major(st.rdev), libc::minor(st.rdev));
            file::mknodat(to, name, kind | (st.mode & 0o7777), major, minor).at(Step::Copy)?;
        }
    }
    file::fchownat(to, name, st.uid, st.gid, libc::AT_SYMLINK_NOFOLLOW).at(Step::Copy)?;
    if !st.is_symlink() {
        // A change of owner clears the set-id bits.
        file::fchmodat(to, name, st.mode & 0o7777).at(Step::Copy)?;
    }
    Ok(())
}

/// Whether this process is in the namespace.
fn is_joined(namespace: &OwnedFd, kind: NsKind) -> bool {
    let own = match kind {
        NsKind::Cgroup => c"/proc/self/ns/cgroup",
        NsKind::Ipc => c"/proc/self/ns/ipc",
        NsKind::Uts => c"/proc/self/ns/uts",
        NsKind::Net => c"/proc/self/ns/net",
        NsKind::Mount => c"/proc/self/ns/mnt",
        NsKind::User | NsKind::Pid | NsKind::Time => return false,
    };
    let identity = |st: io::Result<file::Stat>| st.map(|st| (st.dev, st.ino)).ok();
    let own = identity(file::fstatat(file::cwd(), own, 0));
    own.is_some() && own == identity(file::fstat(namespace))
}

/// The number of this process where the runtime is: what the host's procfs, still mounted at its place, calls it.
fn host_pid() -> i64 {
    let mut buffer = [0u8; 16];
    let link = file::readlinkat(file::cwd(), c"/proc/self", &mut buffer).ok();
    let text = link.and_then(|l| std::str::from_utf8(l).ok());
    text.and_then(|t| t.parse().ok()).unwrap_or_else(|| i64::from(process::getpid()))
}

/// In the host's procfs, before any namespace is joined: afterwards the process cannot be traced and its files belong
/// to somebody else.
fn oom_score_adj(value: i32) -> Done {
    let mut digits = [0u8; 12];
    let text = decimal(i64::from(value), &mut digits);
    let fd = file::openat(file::cwd(), c"/proc/self/oom_score_adj", libc::O_WRONLY, 0).at(Step::Open)?;
    if file::fs_type(&fd).at(Step::Verify)? != file::PROC_SUPER_MAGIC {
        return Err(fail(Step::Verify, libc::EXDEV));
    }
    match file::write_once(&fd, text) {
        // Below the present value only CAP_SYS_RESOURCE may go. The score only orders victims, so a container that
        // is asked to be safer than the runtime may be runs with the runtime's score.
        Err(e) if errno(&e) == libc::EACCES => Ok(()),
        other => other.at(Step::Write),
    }
}

// --- process helpers ----------------------------------------------------------------------------------------------

/// Best effort: a stream that cannot be given away (a file of another owner in a user namespace) stays as it is, and
/// the shared null device must.
fn own_stdio(uid: u32) {
    for number in 0..3 {
        // SAFETY: a standard stream, open or not; the call copes with both.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(st) = file::fstat(fd) else { continue };
        if st.is_char_device(1, 3) || st.uid == uid {
            continue;
        }
        let _ = file::fchownat(fd, c"", uid, st.gid, libc::AT_EMPTY_PATH);
    }
}

fn working_directory(path: &CStr) -> Done {
    file::chdir(path).at(Step::Whole)?;
    // A directory outside the root (through a leaked descriptor) has no path here.
    let mut buffer = [0u8; PATH_BYTES];
    match file::getcwd(&mut buffer) {
        Ok(_) => Ok(()),
        Err(_) => Err(fail(Step::Verify, libc::ENOENT)),
    }
}

/// Writes `HOME=...` as a C string: the directory in the container's passwd file, else `/`.
fn home(uid: u32, buffer: &mut [u8; PATH_BYTES]) {
    let write = |buffer: &mut [u8; PATH_BYTES], dir: &[u8]| {
        let len = dir.len().min(PATH_BYTES - 6);
        buffer[..5].copy_from_slice(b"HOME=");
        buffer[5..5 + len].copy_from_slice(&dir[..len]);
        buffer[5 + len] = 0;
    };
    write(buffer, b"/");
    let Ok(fd) = file::openat(file::cwd(), c"/etc/passwd", libc::O_RDONLY | libc::O_NONBLOCK, 0) else {
        return;
    };
    // Lines that do not fit the buffer are skipped: an entry for a user never has that size.
    let mut text = [0u8; PATH_BYTES];
    let mut have = 0;
    while let Ok(n) = file::read(&fd, &mut text[have..]) {
        have += n;
        let mut start = 0;
        while let Some(end) = text[start..have].iter().position(|b| *b == b'\n') {
            if let Some(dir) = passwd_home(&text[start..start + end], uid) {
                return write(buffer, dir);
            }
            start += end + 1;
        }
        if n == 0 {
            if let Some(dir) = passwd_home(&text[start..have], uid) {
                write(buffer, dir);
            }
            return;
        }
        text.copy_within(start..have, 0);
        have -= start;
        if have == text.len() {
            have = 0;
        }
    }
}

/// The sixth field of a passwd line whose third is `uid`.
fn passwd_home(line: &[u8], uid: u32) -> Option<&[u8]> {
    let mut fields = line.split(|b| *b == b':');
    let number = std::str::from_utf8(fields.nth(2)?).ok()?.parse::<u32>().ok()?;
    let dir = fields.nth(2)?;
    (number == uid && !dir.is_empty()).then_some(dir)
}

/// A number as decimal digits, in the buffer.
fn decimal(value: i64, buffer: &mut [u8; 12]) -> &[u8] {
    let mut rest = value.unsigned_abs();
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 || at == 1 {
            break;
        }
    }
    if value < 0 {
        at -= 1;
        buffer[at] = b'-';
    }
    &buffer[at..]
}

/// Runs one hook with the state on its standard input, and waits for it. What it writes to its standard error is kept for
/// the message of its failure.
pub(crate) fn run_hook(program: &HookProgram, state: &StateText, pid: i32, said: &mut Said) -> Done {
    let (read, write) = file::pipe().at(Step::Spawn)?;
    let (heard, says) = file::pipe().at(Step::Spawn)?;
    said.len = 0;
    // SAFETY: one thread; the child makes only the calls below before it executes or exits.
    let child = match unsafe { process::clone(0, None) }.at(Step::Spawn)? {
        process::Cloned::Child => {
            drop((write, heard));
            let _ = process::set_dumpable(true);
            process::reset_signals();
            process::umask(0o022);
            let ready = file::dup2(&read, 0).is_ok()
                && file::dup2(&says, 2).is_ok()
                && process::close_range_cloexec(3).is_ok();
            if ready {
                // SAFETY: both arrays were made from C strings that outlive this call.
                unsafe { process::execve(&program.path, pointers(&program.args), pointers(&program.env)) };
            }
            process::exit_now(127)
        }
        process::Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop((read, says));
    let mut digits = [0u8; 12];
    let pid_text = decimal(i64::from(pid), &mut digits);
    for part in [&state.before_pid[..], pid_text, &state.after_pid[..]] {
        // A hook need not read; then the pipe breaks, and SIGPIPE is ignored by whoever calls this from the parent.
        if file::write_once(&write, part).is_err() {
            break;
        }
    }
    drop(write);
    if !listen_until_end(&child.1, &heard, program.timeout_ms, said)? {
        let _ = process::pidfd_send_signal(&child.1, libc::SIGKILL);
        let _ = process::wait_pid(child.0);
        return Err(fail(Step::Timeout, libc::ETIMEDOUT));
    }
    match process::wait_pid(child.0).at(Step::Whole)? {
        process::Exit::Code(0) => Ok(()),
        process::Exit::Code(code) => Err(Failure { step: Step::ExitCode, errno: 0, detail: code as u32 }),
        process::Exit::Signal(signal) => Err(Failure { step: Step::Killed, errno: 0, detail: signal as u32 }),
    }
}

/// Reads until the process has ended; a process that it left behind may hold the pipe for ever. `false` when the time is
/// over.
fn listen_until_end(
    pidfd: &OwnedFd,
    heard: &OwnedFd,
    timeout_ms: Option<i32>,
    said: &mut Said,
) -> Result<bool, Failure> {
    let end = timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms.max(0) as u64));
    let mut open = true;
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()).as_millis() as i32);
        let sources = [Some(pidfd.as_fd()), open.then_some(heard.as_fd())];
        let [ended, readable] = file::poll_readable_within(&sources, left).at(Step::Whole)?;
        if readable {
            let mut chunk = [0u8; 1024];
            let n = file::read(heard, &mut chunk).at(Step::Whole)?;
            said.add(&chunk[..n]);
            open = n > 0;
        } else if ended {
            return Ok(true);
        } else if left == Some(0) {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(debug_assertions)]
    fn a_child_that_uses_the_allocator_ends() {
        let end = |use_it: fn(Vec<u8>)| {
            let held = vec![1u8];
            let forked = fork(0, None, held, |held| {
                GUARDED.store(true, Ordering::Relaxed);
                use_it(held);
                process::exit_now(0)
            });
            process::wait_pid(forked.unwrap().0).unwrap()
        };
        assert_eq!(end(std::mem::forget), process::Exit::Code(0));
        for use_it in [
            |held: Vec<u8>| drop(held),
            |mut held: Vec<u8>| held.reserve(1000),
            |held: Vec<u8>| std::mem::forget((held, std::hint::black_box(Box::new(1)))),
        ] {
            assert_eq!(end(use_it), process::Exit::Code(ChildGuard::EXIT_CODE));
        }
    }

    #[test]
    fn messages_round_trip() {
        let failure = Failure { step: Step::Option, errno: 22, detail: 3 };
        assert_eq!(decode(&encode(Word::Failed, 7, failure)), Some((Word::Failed, 7, failure)));
        assert_eq!(decode(&[0; 20]), None);
        assert_eq!(decode(&[1, 0, 0]), None);
    }

    #[test]
    fn decimals() {
        for n in [0, 7, 10, 4_194_304, -1, -1000, i64::from(i32::MAX)] {
            assert_eq!(decimal(n, &mut [0; 12]), n.to_string().as_bytes());
        }
    }

    #[test]
    fn the_end_of_what_was_said_is_kept() {
        let mut said = Said::new();
        said.add(b"first ");
        said.add(b"second\n");
        assert_eq!(said.text(), b"first second");
        said.add(&[b'x'; SAID_BYTES - 3]);
        assert_eq!((said.text().len(), &said.text()[..3]), (SAID_BYTES, &b"nd\n"[..]));
        said.add(&[b'y'; 2 * SAID_BYTES]);
        assert_eq!(said.text(), [b'y'; SAID_BYTES]);
    }

    #[test]
    fn mountinfo_lines() {
        let mut place = [0; PATH_BYTES];
        let line =
            b"36 35 98:0 /mnt1 /a\\040b/\\134c rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount_line(line, &mut place), Some((c"/a b/\\c", &b"ext3"[..])));
        assert_eq!(mount_line(b"1 2 0:3 / / rw - proc proc rw", &mut place), Some((c"/", &b"proc"[..])));
        assert_eq!(mount_line(b"1 2 0:3 / /", &mut place), None);
    }

    #[test]
    fn a_path_is_above_what_it_leads_to() {
        assert!(is_above(b"/", b"/a") && is_above(b"/a", b"/a") && is_above(b"/a", b"/a/b"));
        assert!(!is_above(b"/a", b"/ab") && !is_above(b"/a/b", b"/a"));
    }

    #[test]
    fn passwd_lines() {
        assert_eq!(passwd_home(b"root:x:0:0:root:/root:/bin/sh", 0), Some(&b"/root"[..]));
        assert_eq!(passwd_home(b"root:x:0:0:root:/root:/bin/sh", 1), None);
        assert_eq!(passwd_home(b"broken:x", 0), None);
        assert_eq!(passwd_home(b"a:x:5:5::", 5), None);
    }

    #[test]
    fn paths_are_split_at_the_last_slash() {
        assert_eq!(split_bytes(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
        assert_eq!(split_bytes(b"c"), (&b""[..], &b"c"[..]));
    }
}
