//! The operations that make a container, as data: printable, comparable, executed by `child`.

use crate::seccomp::Filter;
use keel_sys::cred::Capabilities;
use keel_sys::mount::Attr;
use keel_sys::process::SchedAttr;
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char};
use std::fmt;

/// A path below the container's root: no leading slash, no `.` or `..`; empty is the root itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Rel(CString);

impl Rel {
    /// Cleans an absolute container path as if the root were `/`. `None` when it holds a NUL.
    pub fn new(path: &str) -> Option<Rel> {
        let mut parts: Vec<&str> = Vec::new();
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                name => parts.push(name),
            }
        }
        CString::new(parts.join("/")).ok().map(Rel)
    }

    pub fn as_c_str(&self) -> &CStr {
        &self.0
    }

    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or("?")
    }
}

impl fmt::Debug for Rel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.as_str())
    }
}

/// A null-terminated array of C strings, made before the clone so that exec needs no allocation.
pub struct StringArray {
    strings: Vec<CString>,
    pointers: Vec<Cell<*const c_char>>,
    /// Slots that the child may still fill.
    spare: Cell<usize>,
}

impl StringArray {
    /// With two slots that the child may fill. `None` when a string holds a NUL.
    pub fn new(strings: &[String]) -> Option<StringArray> {
        let strings: Vec<CString> =
            strings.iter().map(|s| CString::new(s.as_str()).ok()).collect::<Option<_>>()?;
        let mut pointers: Vec<Cell<*const c_char>> = strings.iter().map(|s| Cell::new(s.as_ptr())).collect();
        let spare = pointers.len();
        pointers.extend([const { Cell::new(std::ptr::null()) }; 3]);
        Some(StringArray { strings, pointers, spare: Cell::new(spare) })
    }

    pub fn strings(&self) -> &[CString] {
        &self.strings
    }

    pub(crate) fn pointers(&self) -> &[Cell<*const c_char>] {
        &self.pointers
    }

    /// Fills the next spare slot; nothing happens when there is none.
    pub(crate) fn fill_spare(&self, value: *const c_char) {
        let at = self.spare.get();
        // The last one stays null and ends the array.
        if at + 1 < self.pointers.len() {
            self.pointers[at].set(value);
            self.spare.set(at + 1);
        }
    }
}

impl fmt::Debug for StringArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.strings).finish()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NsKind {
    User,
    Cgroup,
    Ipc,
    Uts,
    Net,
    Pid,
    Mount,
    Time,
}

impl NsKind {
    pub const ALL: [NsKind; 8] = [
        NsKind::User,
        NsKind::Cgroup,
        NsKind::Ipc,
        NsKind::Uts,
        NsKind::Net,
        NsKind::Pid,
        NsKind::Mount,
        NsKind::Time,
    ];

    /// The name in `linux.namespaces[].type`.
    pub fn parse(name: &str) -> Option<NsKind> {
        NsKind::ALL.into_iter().find(|k| k.spec_name() == name)
    }

    pub fn spec_name(self) -> &'static str {
        match self {
            NsKind::User => "user",
            NsKind::Cgroup => "cgroup",
            NsKind::Ipc => "ipc",
            NsKind::Uts => "uts",
            NsKind::Net => "network",
            NsKind::Pid => "pid",
            NsKind::Mount => "mount",
            NsKind::Time => "time",
        }
    }

    /// The name below `/proc/PID/ns`.
    pub fn proc_name(self) -> &'static str {
        match self {
            NsKind::Net => "net",
            NsKind::Mount => "mnt",
            other => other.spec_name(),
        }
    }

    /// A process's own, below a procfs.
    pub(crate) fn own_file(self) -> &'static std::ffi::CStr {
        match self {
            NsKind::User => c"self/ns/user",
            NsKind::Cgroup => c"self/ns/cgroup",
            NsKind::Ipc => c"self/ns/ipc",
            NsKind::Uts => c"self/ns/uts",
            NsKind::Net => c"self/ns/net",
            NsKind::Pid => c"self/ns/pid",
            NsKind::Mount => c"self/ns/mnt",
            NsKind::Time => c"self/ns/time",
        }
    }

    pub fn flag(self) -> i32 {
        match self {
            NsKind::User => libc::CLONE_NEWUSER,
            NsKind::Cgroup => libc::CLONE_NEWCGROUP,
            NsKind::Ipc => libc::CLONE_NEWIPC,
            NsKind::Uts => libc::CLONE_NEWUTS,
            NsKind::Net => libc::CLONE_NEWNET,
            NsKind::Pid => libc::CLONE_NEWPID,
            NsKind::Mount => libc::CLONE_NEWNS,
            NsKind::Time => keel_sys::process::CLONE_NEWTIME,
        }
    }
}

/// Where a mount goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub path: Rel,
    /// No component may be a symbolic link (`/proc`, `/sys`, `/dev`).
    pub real: bool,
    /// A link at the end of the path is itself the target.
    pub link: bool,
}

/// One option of a file system: `key` alone is a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsOption {
    pub key: CString,
    pub value: Option<CString>,
}

/// A program run at a point of the container's life, with the state on its standard input.
#[derive(Debug)]
pub struct HookProgram {
    pub path: CString,
    pub args: StringArray,
    pub env: StringArray,
    /// The environment gets the `HOME` of this user, whom only the container's root knows.
    pub home_of: Option<u32>,
    pub timeout_ms: Option<i32>,
}

#[derive(Debug)]
pub enum Op {
    /// Waits until somebody else has moved the process into its cgroup.
    WaitCgroup,
    /// Writes `0` to every v1 `tasks` file.
    JoinCgroup,
    /// Joins the namespace that the parent opened.
    Join {
        kind: NsKind,
        slot: usize,
    },
    /// Joins all these namespaces of the process whose pidfd the parent opened.
    EnterProcess {
        flags: i32,
    },
    /// Asks the parent to write the id maps, and waits.
    WaitIdMaps,
    /// Becomes user and group 0 of the user namespace.
    BecomeRoot {
        keep_groups: bool,
    },
    /// A new network namespace has a loopback interface, which is down.
    LoopbackUp,
    NotDumpable,
    Unshare {
        kind: NsKind,
    },
    /// A new session keyring, so that the caller's keys stay outside.
    SessionKeyring {
        name: CString,
    },
    NewSession,
    /// A procfs that no path leads to, for every write under `/proc`.
    PrivateProcfs,
    OomScoreAdj {
        value: i32,
    },

    /// Propagation of the whole mount table that was inherited.
    Propagation {
        flag: u64,
    },
    /// The bundle's root on itself: a mount of its own, which becomes `/`.
    BindRoot {
        path: CString,
        private_parent: bool,
    },
    /// The root of a container without a mount namespace.
    OpenRoot {
        path: CString,
    },
    Bind {
        source: CString,
        target: Target,
        recursive: bool,
        follow: bool,
        /// For the mount itself, for the whole tree, in this order.
        attr: Attr,
        /// Cleared too, as far as the host has not locked them.
        loses: u64,
        tree_attr: Attr,
        propagation: u64,
        propagate_tree: bool,
        /// Only a procfs may be the source: the target is `/proc`.
        only_procfs: bool,
        /// Descriptor of a user namespace that the parent opened, for an idmapped mount.
        idmap: Option<(usize, bool)>,
        /// Made by the parent: the root of a user namespace may not map what belongs to the host.
        outside: bool,
    },
    FileSystem {
        kind: CString,
        target: Target,
        options: Vec<FsOption>,
        attr: u64,
        propagation: u64,
        /// Content of the directory below is copied into the new file system.
        copy_up: bool,
        /// `ro`, which must wait until the copy is done.
        read_only_after: bool,
    },
    /// Changes the mount that is at the target.
    Remount {
        target: Target,
        attr: Attr,
        recursive: bool,
    },
    Symlink {
        to: CString,
        link: Rel,
    },
    Directory {
        path: Rel,
        mode: u32,
    },
    DeviceNode {
        path: Rel,
        mode: u32,
        major: u32,
        minor: u32,
        uid: u32,
        gid: u32,
        /// Made by the parent: the root of a user namespace may not.
        outside: bool,
    },
    /// A device of the host, where mknod is not allowed.
    DeviceBind {
        source: CString,
        path: Rel,
    },
    /// The terminal: allocated in the container's devpts, its master sent to the console socket.
    Console {
        bind: bool,
        rows: u16,
        columns: u16,
        uid: u32,
    },
    /// Lets the parent run the hooks of the runtime namespace, and waits.
    RuntimeHooks,
    /// The directory in which hooks before the pivot run.
    AtRoot,
    Hook {
        program: HookProgram,
        kind: &'static str,
        /// Its place among those of its kind.
        number: usize,
    },
    Mask {
        path: Rel,
        /// SELinux context of what hides a directory.
        label: Option<CString>,
    },
    ReadOnly {
        path: Rel,
    },
    ReadOnlyRoot,
    PivotRoot,
    /// The root moved over `/` and changed to, where pivot_root is not possible. What is mounted elsewhere goes first: it
    /// would stay reachable below.
    MoveRoot {
        path: CString,
    },
    ChangeRoot,
    RootPropagation {
        flag: u64,
    },

    Hostname {
        name: String,
    },
    Domainname {
        name: String,
    },
    Sysctl {
        path: CString,
        value: String,
    },
    Rlimit {
        name: &'static str,
        resource: u32,
        soft: u64,
        hard: u64,
    },
    IoPriority {
        class: u32,
        level: u32,
    },
    Scheduler {
        attr: SchedAttr,
        /// The container is confined to some CPUs, which the kernel does not let go with a deadline.
        confined: bool,
    },
    MemoryPolicy {
        mode: u32,
        nodes: Vec<u64>,
    },
    Affinity {
        mask: Vec<u64>,
    },
    /// Every CPU that the cgroup allows, now and later, instead of those that the runtime happens to run on.
    ResetAffinity,
    Personality {
        value: u64,
    },
    /// A label for the exec to come: a file below `/proc/self` and its content.
    ExecLabel {
        file: CString,
        label: String,
    },

    /// Standard streams belong to the user, who may have to open them again through `/proc/self/fd`.
    OwnStdio {
        uid: u32,
    },
    FindExecutable {
        name: CString,
        path: Option<CString>,
    },
    /// Closes descriptors from this one on that nothing to come needs, and leaves the others to the exec. A container may wait for its start for days, and
    /// would hold the caller's pipes, and directories of the host, for as long.
    CloseUnneeded {
        first: u32,
    },
    /// Tells the parent that the set-up is done, and waits for the start.
    Ready,

    NoNewPrivileges,
    Seccomp {
        filter: Box<Filter>,
    },
    BoundingSet {
        keep: u64,
        last: u32,
    },
    KeepCapabilities,
    Groups {
        gids: Vec<u32>,
    },
    Gid {
        gid: u32,
    },
    Uid {
        uid: u32,
    },
    Capabilities {
        caps: Capabilities,
    },
    Ambient {
        caps: u64,
    },
    /// `early` is with root's rights, for a directory that the user may not enter; then the user keeps it all the same.
    WorkingDirectory {
        path: CString,
        early: bool,
    },
    Umask {
        mask: u32,
    },
    Exec {
        args: StringArray,
        env: StringArray,
        path: Option<CString>,
        home_of: Option<u32>,
        /// The environment gets `LISTEN_PID`, which only the process itself knows.
        listen_pid: bool,
    },
}

/// Where inside an operation it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    Whole,
    OpenSource,
    OpenTarget,
    /// The detail is the number of the option.
    Option,
    Create,
    Attach,
    SetAttr,
    SetPropagation,
    Copy,
    NotReal,
    Verify,
    Open,
    Write,
    Spawn,
    /// The detail is the exit code.
    ExitCode,
    /// The detail is the signal.
    Killed,
    Timeout,
    Send,
    NotFound,
}

impl Step {
    pub fn from_number(n: u32) -> Step {
        const ALL: [Step; 19] = [
            Step::Whole,
            Step::OpenSource,
            Step::OpenTarget,
            Step::Option,
            Step::Create,
            Step::Attach,
            Step::SetAttr,
            Step::SetPropagation,
            Step::Copy,
            Step::NotReal,
            Step::Verify,
            Step::Open,
            Step::Write,
            Step::Spawn,
            Step::ExitCode,
            Step::Killed,
            Step::Timeout,
            Step::Send,
            Step::NotFound,
        ];
        ALL.get(n as usize).copied().unwrap_or(Step::Whole)
    }
}

/// What failed, in one fixed-size record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub step: Step,
    pub errno: i32,
    pub detail: u32,
}

fn c(text: &CStr) -> std::borrow::Cow<'_, str> {
    text.to_string_lossy()
}

impl Op {
    /// The message for a failure of this operation, with the path and the value concerned.
    pub fn explain(&self, failure: Failure) -> String {
        let errno = keel_sys::errno_text(failure.errno);
        match (self, failure.step) {
            (Op::FindExecutable { name, .. }, Step::NotFound) => {
                format!("exec: {:?}: executable file not found in $PATH", c(name))
            }
            (Op::FindExecutable { name, .. }, _) => format!("exec: {:?}: stat: {errno}", c(name)),
            (Op::Exec { args, .. }, Step::NotFound) => {
                let name = args.strings().first().map(|s| c(s).into_owned()).unwrap_or_default();
                format!("exec: {name:?}: executable file not found in $PATH")
            }
            (Op::Hook { program, .. }, step) => {
                let what = self.describe();
                match step {
                    Step::ExitCode => format!("{what}: exit status {}", failure.detail),
                    Step::Killed => {
                        let name = keel_sys::signal_text(failure.detail as i32);
                        format!("{what}: killed by signal {} ({name})", failure.detail)
                    }
                    Step::Timeout => {
                        format!("{what}: did not end within {} s", program.timeout_ms.unwrap_or(0) / 1000)
                    }
                    _ => format!("{what}: {errno}"),
                }
            }
            (Op::Scheduler { confined, .. }, _) if failure.errno == libc::EPERM => {
                let why = match confined {
                    true => {
                        "process scheduler can't be used together with AllowedCPUs (linux.resources.cpu.cpus)"
                    }
                    false => {
                        "a policy above the ordinary one needs CAP_SYS_NICE, and on cgroup v1 a share of real time \
                         (linux.resources.cpu.realtimeRuntime)"
                    }
                };
                format!("{}: {errno}: {why}", self.describe())
            }
            (Op::FileSystem { options, .. }, Step::Option) => {
                let option = options.get(failure.detail as usize);
                let text = option.map(|o| match &o.value {
                    Some(v) => format!("{}={}", c(&o.key), c(v)),
                    None => c(&o.key).into_owned(),
                });
                format!("{}: option {:?}: {errno}", self.describe(), text.unwrap_or_default())
            }
            (_, step) => {
                let step = match step {
                    Step::OpenSource => "open source: ",
                    Step::OpenTarget => "open or create target: ",
                    Step::Create => "create: ",
                    Step::Attach => "attach: ",
                    Step::SetAttr => "set attributes: ",
                    Step::SetPropagation => "set propagation: ",
                    Step::Copy => "copy content: ",
                    Step::NotReal => "must be mounted on ordinary directory, not through a symbolic link: ",
                    Step::Verify => "verify: ",
                    Step::Open => "open: ",
                    Step::Write => "write: ",
                    Step::Send => "send: ",
                    _ => "",
                };
                format!("{}: {step}{errno}", self.describe())
            }
        }
    }

    /// What the operation does.
    pub fn describe(&self) -> String {
        match self {
            Op::WaitCgroup => "wait to be moved into the cgroup".into(),
            Op::JoinCgroup => "join the cgroup".into(),
            Op::Join { kind, .. } => format!("join {} namespace", kind.spec_name()),
            Op::EnterProcess { .. } => "join the container's namespaces".into(),
            Op::WaitIdMaps => "wait for the id maps".into(),
            Op::BecomeRoot { .. } => "become root of the user namespace".into(),
            Op::LoopbackUp => "set up the loopback interface".into(),
            Op::NotDumpable => "forbid tracing".into(),
            Op::Unshare { kind } => format!("unshare {} namespace", kind.spec_name()),
            Op::SessionKeyring { .. } => {
                "join a new session keyring (--no-new-keyring leaves the container the caller's)".into()
            }
            Op::NewSession => "start a session".into(),
            Op::PrivateProcfs => "mount a private procfs".into(),
            Op::OomScoreAdj { value } => format!("set oom_score_adj to {value}"),
            Op::Propagation { .. } => "set the propagation of /".into(),
            Op::BindRoot { path, .. } => format!("bind rootfs {}", c(path)),
            Op::OpenRoot { path } => format!("open rootfs {}", c(path)),
            Op::Bind { source, target, .. } => {
                format!("error mounting {:?} to rootfs at \"{:?}\"", c(source), target.path)
            }
            Op::FileSystem { kind, target, .. } => {
                format!("error mounting {:?} to rootfs at \"{:?}\"", c(kind), target.path)
            }
            Op::Remount { target, .. } => format!("remount {:?}", target.path),
            Op::Symlink { to, link } => format!("create link {link:?} to {}", c(to)),
            Op::Directory { path, .. } => format!("create directory {path:?}"),
            Op::DeviceNode { path, major, minor, .. } => {
                format!("create device node {path:?} ({major}:{minor})")
            }
            Op::DeviceBind { source, path } => format!("bind device {} to {path:?}", c(source)),
            Op::Console { .. } => "set up the terminal".into(),
            Op::AtRoot => "change to the root".into(),
            Op::RuntimeHooks => "run the hooks of the runtime".into(),
            Op::Hook { program, kind, number } => {
                format!("error running {kind} hook #{number}: {}", c(&program.path))
            }
            Op::Mask { path, .. } => format!("mask {path:?}"),
            Op::ReadOnly { path } => format!("make {path:?} read-only"),
            Op::ReadOnlyRoot => "make the root read-only".into(),
            Op::PivotRoot => "pivot_root".into(),
            Op::MoveRoot { .. } => "move the root".into(),
            Op::ChangeRoot => "chroot".into(),
            Op::RootPropagation { .. } => "set rootfsPropagation".into(),
            Op::Hostname { name } => format!("set hostname {name:?}"),
            Op::Domainname { name } => format!("set domainname {name:?}"),
            Op::Sysctl { path, value } => format!("write sysctl {} = {value:?}", c(path)),
            Op::Rlimit { name, soft, hard, .. } => format!("set {name} to {soft}:{hard}"),
            Op::IoPriority { .. } => "set the I/O priority".into(),
            Op::Scheduler { .. } => "set the scheduler".into(),
            Op::MemoryPolicy { .. } => "set the memory policy".into(),
            Op::Affinity { .. } => "set the CPU affinity".into(),
            Op::ResetAffinity => "reset the CPU affinity".into(),
            Op::Personality { .. } => "set the personality".into(),
            Op::ExecLabel { file, label } => format!("write label {label:?} to {}", c(file)),
            Op::OwnStdio { .. } => "give the standard streams to the user".into(),
            Op::FindExecutable { name, .. } => format!("find {:?}", c(name)),
            Op::CloseUnneeded { .. } => "close descriptors that are done with".into(),
            Op::Ready => "report readiness".into(),
            Op::NoNewPrivileges => "set no_new_privs".into(),
            Op::Seccomp { .. } => "load the seccomp filter".into(),
            Op::BoundingSet { .. } => "limit the bounding set".into(),
            Op::KeepCapabilities => "keep capabilities".into(),
            Op::Groups { gids } => format!("set the additional groups {gids:?}"),
            Op::Gid { gid } => format!("set group {gid}"),
            Op::Uid { uid } => format!("set user {uid}"),
            Op::Capabilities { .. } => "set the capabilities".into(),
            Op::Ambient { .. } => "set the ambient capabilities".into(),
            Op::WorkingDirectory { path, .. } => format!("chdir to cwd {:?}", c(path)),
            Op::Umask { .. } => "set the umask".into(),
            Op::Exec { args, .. } => {
                format!("exec {}", args.strings().first().map(|s| c(s).into_owned()).unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_never_leave_the_root() {
        let clean = |p: &str| Rel::new(p).unwrap().as_str().to_owned();
        assert_eq!(clean("/a//b/./c/"), "a/b/c");
        assert_eq!(clean("/../../etc"), "etc");
        assert_eq!(clean("a/../../b"), "b");
        assert_eq!(clean("/"), "");
        assert!(Rel::new("a\0b").is_none());
    }

    #[test]
    fn step_numbers_round_trip() {
        for n in 0..19 {
            assert_eq!(Step::from_number(n) as u32, n);
        }
    }
}
