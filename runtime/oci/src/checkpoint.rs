//! `checkpoint` and `restore`: CRIU does the work, by its command line, which is its stable interface.
//!
//! A restored container's processes are made by CRIU within the container's cgroup: this program starts itself once more
//! (`criu-helper`), waits until that process is in the cgroup, and lets it execute CRIU in a mount namespace in which the
//! root file system is a mount of its own.

use crate::container::{
    Runtime, destroy, open_namespace, poststart, resources, run_early_hooks, write_pid_file,
};
use crate::error::{RuntimeError, io_error, sys_error};
use crate::host;
use crate::lower::{self, Request, is_bind};
use crate::op::NsKind;
use crate::scope::{self, Scope};
use crate::spec::Spec;
use crate::state::{ContainerDir, State, Status, SystemdUnit, start_time};
use keel_cgroup::{Cgroup, Claim};
use keel_sys::file::{self, RESOLVE_IN_ROOT};
use keel_sys::{mount, process, socket};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;

/// The hidden command by which the helper is started.
pub const HELPER: &str = "criu-helper";
/// Where this program, called back by CRIU (see [`action`]), finds the `restore` that runs the hooks.
const ACTIONS: &str = "KEEL_CRIU_ACTIONS";
const ACTIONS_SOCKET: &str = "criu.sock";
/// As runc names it, with what it holds: the names of the three standard descriptors.
const DESCRIPTORS: &str = "descriptors.json";
/// Of CRIU's log, what is told when it fails.
const LOG_LINES: usize = 5;

/// What both directions take.
#[derive(Clone, Debug, Default)]
pub struct CriuOptions {
    /// Another program than `criu` of the search path.
    pub program: Option<PathBuf>,
    pub image_path: PathBuf,
    /// For CRIU's log; the image path when it is not given.
    pub work_path: Option<PathBuf>,
    pub tcp_established: bool,
    pub ext_unix_sk: bool,
    pub shell_job: bool,
    pub file_locks: bool,
    pub link_remap: bool,
    pub auto_dedup: bool,
    /// `soft`, `full`, `strict` or `ignore`.
    pub manage_cgroups: String,
    pub empty_network: bool,
}

#[derive(Clone, Debug, Default)]
pub struct CheckpointOptions {
    pub criu: CriuOptions,
    /// Relative to the image path: an earlier image, of which this one is the difference.
    pub parent_path: Option<PathBuf>,
    pub leave_running: bool,
    /// Memory only; the container runs on.
    pub pre_dump: bool,
    pub tcp_skip_in_flight: bool,
}

#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    pub id: String,
    pub bundle: PathBuf,
    pub criu: CriuOptions,
    pub pid_file: Option<PathBuf>,
    pub lsm_profile: Option<String>,
    pub lsm_mount_context: Option<String>,
}

/// A container that CRIU has brought back; its init is a child of this process.
pub struct Restored {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub warnings: Vec<String>,
    dir: ContainerDir,
    state: State,
    warn: Rc<dyn Fn(&str)>,
}

impl Restored {
    /// Removes everything of the container after its init has been waited for.
    pub fn finish(self) -> Result<(), RuntimeError> {
        destroy(&self.dir, &self.state, &*self.warn)
    }
}

impl Runtime {
    pub fn checkpoint(&self, id: &str, options: &CheckpointOptions) -> Result<(), RuntimeError> {
        let dir = self.store.open(id)?;
        let state = dir.load()?;
        let status = dir.status(&state)?;
        if !matches!(status, Status::Running | Status::Paused) {
            let action = "checkpoint a container that is not running";
            return Err(RuntimeError::WrongState { id: id.to_owned(), status: status.as_str(), action });
        }
        let images = &options.criu.image_path;
        fs::create_dir_all(images).map_err(io_error("create", images))?;
        let images = &fs::canonicalize(images).map_err(io_error("open", images))?;
        if let Some(parent) = &options.parent_path {
            if parent.is_absolute() {
                return Err(usage(format!(
                    "--parent-path {} must be relative to the image path",
                    parent.display()
                )));
            }
            let path = images.join(parent);
            fs::metadata(&path).map_err(io_error("open the image of --parent-path", &path))?;
        }
        let spec = dir.load_spec()?;
        refuse_terminal(&spec)?;
        let (mut criu, log) =
            criu(&options.criu, if options.pre_dump { "pre-dump" } else { "dump" }, images, "dump.log")?;
        criu.arg("--tree").arg(state.pid.to_string()).arg("--root").arg(&state.rootfs);
        if let Some((freezer, _)) = state.cgroup().freezer_dir() {
            criu.arg("--freeze-cgroup").arg(freezer);
        }
        for (flag, on) in [
            ("--leave-running", options.leave_running && !options.pre_dump),
            ("--tcp-skip-in-flight", options.tcp_skip_in_flight),
            ("--track-mem", options.pre_dump || options.parent_path.is_some()),
        ] {
            criu.args(on.then_some(flag));
        }
        if let Some(parent) = &options.parent_path {
            criu.arg("--prev-images-dir").arg(parent);
        }
        for (name, _) in external_mounts(&spec, &state) {
            criu.arg("--external").arg(format!("mnt[{name}]:{name}"));
        }
        for (kind, path) in joined(&spec) {
            let ns = open_namespace(kind, path)?;
            let inode =
                fs::metadata(format!("/proc/self/fd/{}", ns.as_raw_fd())).map_err(io_error("read", path))?;
            let inode = std::os::unix::fs::MetadataExt::ino(&inode);
            criu.arg("--external").arg(format!("{}[{inode}]:{}", kind.proc_name(), external_name(kind)));
        }
        let names = descriptors(state.pid)?;
        for name in names.iter().filter(|name| name.starts_with("file[")) {
            criu.arg("--external").arg(name);
        }
        run(criu, &log, "checkpoint")?;
        if options.pre_dump {
            return Ok(());
        }
        let path = images.join(DESCRIPTORS);
        let text =
            serde_json::to_vec(&names).map_err(|source| RuntimeError::Json { path: path.clone(), source })?;
        fs::write(&path, text).map_err(io_error("write", &path))?;
        if options.leave_running { Ok(()) } else { destroy(&dir, &state, &*self.warn) }
    }

    /// Brings a container back from an image; its processes run when this returns. `me` is the program that knows the
    /// command [`HELPER`].
    pub fn restore(&self, options: &RestoreOptions, me: &Path) -> Result<Restored, RuntimeError> {
        let images = &options.criu.image_path;
        let images = &fs::canonicalize(images).map_err(io_error("open the image", images))?;
        let (spec, text, bundle, rootfs) = self.read_bundle(&options.bundle, None)?;
        refuse_terminal(&spec)?;
        let facts = host::observe(&self.roots)?;
        let mut scope = self.systemd.then(|| Scope::prepare(&spec, &options.id, &self.roots)).transpose()?;
        let cgroup_path = match &scope {
            Some(scope) => scope.path.clone(),
            None => crate::container::cgroup_path(&spec, &options.id)?,
        };
        let request = Request {
            id: options.id.clone(),
            rootfs: rootfs.to_string_lossy().into_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            cgroup: cgroup_path.clone(),
            ..Request::default()
        };
        // Nothing of it is executed, but what could not be made is not restored either.
        let lowered = lower::lower(&spec, &request, &facts)?;
        let mut cgroup = facts.layout.cgroup(&cgroup_path)?;
        if let Some(scope) = &scope {
            scope::reachable(&mut cgroup, &scope.record());
        }
        let dir = self.store.create(&options.id)?;
        let mut state = State::new(&spec, &options.id, &bundle, &rootfs, &cgroup, &cgroup_path);
        state.own_pid_namespace = lowered.own_pid_namespace;
        state.systemd = scope.as_ref().map(Scope::record);
        let mut undo =
            Undo { dir: &dir, scope: None, claim: None, warn: &*self.warn, armed: true, child: None };
        dir.save_config(&text)?;
        dir.save(&state)?;
        prepare_targets(&rootfs, &spec)?;
        let root = dir.file("criu-root");
        fs::create_dir(&root).map_err(io_error("create", &root))?;

        let (mut criu, log) = criu(&options.criu, "restore", images, "restore.log")?;
        let pid_path = dir.file("criu.pid");
        criu.args(["--restore-detached", "--restore-sibling"]);
        criu.arg("--root").arg(&root).arg("--pidfile").arg(&pid_path);
        for entry in &cgroup.entries {
            let below = entry.dir.strip_prefix(&entry.mount).unwrap_or(&entry.dir).display();
            let controllers = entry.controllers.join(",");
            let separator = if controllers.is_empty() { "" } else { ":" };
            criu.arg("--cgroup-root").arg(format!("{controllers}{separator}/{below}"));
        }
        for (name, source) in external_mounts(&spec, &state) {
            criu.arg("--external").arg(format!("mnt[{name}]:{}", source.display()));
        }
        for (flag, value) in
            [("--lsm-profile", &options.lsm_profile), ("--lsm-mount-context", &options.lsm_mount_context)]
        {
            if let Some(value) = value {
                criu.arg(flag).arg(value);
            }
        }
        let mut kept = Vec::new();
        for (kind, path) in joined(&spec) {
            let ns = open_namespace(kind, path)?;
            criu.arg("--inherit-fd").arg(format!("fd[{}]:{}", ns.as_raw_fd(), external_name(kind)));
            kept.push(ns);
        }
        let names: [String; 3] = read_descriptors(images)?;
        for (number, name) in names.iter().enumerate().filter(|(_, name)| inherited(name)) {
            // CRIU moves what it inherits out of the way of its own; a copy is not in the way.
            let copy =
                file::dup_above(file::standard(number as i32), 3).map_err(sys_error("copy a descriptor"))?;
            criu.arg("--inherit-fd").arg(format!("fd[{}]:{name}", copy.as_raw_fd()));
            kept.push(copy);
        }
        let (theirs, ours) = file::pipe().map_err(sys_error("make a pipe"))?;
        let hooks =
            spec.hooks.as_ref().is_some_and(|h| !h.prestart.is_empty() || !h.create_runtime.is_empty());
        let mut actions = None;
        let mut helper = Command::new(me);
        if hooks {
            let listener = socket::listen_at(&dir.open_fd()?, c"criu.sock", libc::SOCK_SEQPACKET);
            let path = dir.file(ACTIONS_SOCKET);
            actions = Some(listener.map_err(io_error("listen on", &path))?);
            // CRIU runs a program without arguments, and by then `/proc/self` is another.
            criu.arg("--action-script").arg(format!("/proc/{}/exe", std::process::id()));
            helper.env(ACTIONS, path);
        }
        helper.arg(HELPER).arg(theirs.as_raw_fd().to_string()).arg(&rootfs).arg(&root);
        helper.arg(criu.get_program()).args(criu.get_args()).stdin(Stdio::inherit());
        kept.push(theirs);
        for fd in &kept {
            file::set_cloexec(fd, false).map_err(sys_error("hand a descriptor on"))?;
        }
        let mut child = helper.spawn().map_err(io_error("run", me))?;
        drop(kept);
        let pid = child.id() as i32;
        undo.child = Some(pid);
        match &mut scope {
            Some(scope) => {
                let started = scope.start(&cgroup, pid, resources(&spec, &lowered), &self.roots);
                undo.scope = scope.started.then(|| (scope.record(), &cgroup));
                started?;
            }
            None => {
                undo.claim = Some(cgroup.claim()?);
                cgroup.apply(&resources(&spec, &lowered))?;
                cgroup.add(pid)?;
            }
        }
        file::write_once(&ours, b"go").map_err(sys_error("let CRIU go"))?;
        drop(ours);
        let hooked = match &actions {
            Some(listener) => hooks_until_end(listener, pid, &dir, &spec, &mut state.clone()),
            None => Ok(()),
        };
        let status = child.wait().map_err(io_error("wait for", "criu"))?;
        undo.child = None;
        hooked?;
        if !status.success() {
            return Err(failed("restore", status.to_string(), &log));
        }
        let text = fs::read_to_string(&pid_path).map_err(io_error("read", &pid_path))?;
        let pid = text.trim().parse().map_err(|_| usage(format!("CRIU wrote {text:?} as the pid")))?;
        let pidfd = process::pidfd_open(pid).map_err(sys_error("open the restored process"))?;
        // A sibling of CRIU's, and so a child of this process.
        undo.child = Some(pid);
        state.pid = pid;
        state.start_time = start_time(pid).unwrap_or(0);
        state.ready = true;
        dir.save(&state)?;
        if let Some(path) = &options.pid_file {
            write_pid_file(path, pid)?;
        }
        undo.disarm();
        let _ = fs::remove_dir(&root);
        poststart(&spec, &state).inspect_err(|_| {
            // It has killed the container; the failure of the hook is what the caller is told.
            let _ = process::wait_pid(pid);
            let _ = destroy(&dir, &state, &*self.warn);
        })?;
        Ok(Restored { pid, pidfd, warnings: lowered.warnings, dir, state, warn: self.warn.clone() })
    }
}

/// Runs the hooks that come before a container's own program when CRIU says that the namespaces stand and nothing runs in
/// them; a failure ends the restore.
fn hooks_until_end(
    listener: &OwnedFd,
    criu: i32,
    dir: &ContainerDir,
    spec: &Spec,
    state: &mut State,
) -> Result<(), RuntimeError> {
    let criu = process::pidfd_open(criu).map_err(sys_error("open CRIU's process"))?;
    loop {
        let sources = [Some(listener.as_fd()), Some(criu.as_fd())];
        let [called, ended] = file::poll_readable(&sources).map_err(sys_error("wait for CRIU"))?;
        if called {
            let caller = socket::accept(listener).map_err(sys_error("accept CRIU's call"))?;
            let mut text = [0u8; 16];
            let n = socket::recv(&caller, &mut text).map_err(sys_error("read CRIU's call"))?;
            let pid = std::str::from_utf8(&text[..n]).ok().and_then(|t| t.parse().ok());
            state.pid = pid.ok_or_else(|| usage("CRIU does not say which process it restores".to_owned()))?;
            state.start_time = start_time(state.pid).unwrap_or(0);
            dir.save(state)?;
            run_early_hooks(spec, state)?;
            socket::send(&caller, b"go").map_err(sys_error("answer CRIU's call"))?;
        } else if ended {
            return Ok(());
        }
    }
}

/// The part of the program that CRIU calls at each stage of a restore: passes the one that hooks wait for on. `None` when
/// it was not CRIU that called; else whether CRIU may go on.
pub fn action() -> Option<bool> {
    let (stage, socket) = (std::env::var_os("CRTOOLS_SCRIPT_ACTION")?, std::env::var_os(ACTIONS)?);
    if stage != "setup-namespaces" {
        return Some(true);
    }
    let pass_on = || -> io::Result<bool> {
        let pid = std::env::var_os("CRTOOLS_INIT_PID").unwrap_or_default();
        let socket = socket::connect(Path::new(&socket), libc::SOCK_SEQPACKET)?;
        socket::send(&socket, pid.as_encoded_bytes())?;
        Ok(socket::recv(&socket, &mut [0u8; 4])? > 0)
    };
    Some(pass_on().unwrap_or(false))
}

/// Takes back what was made when the container does not come back.
struct Undo<'a> {
    dir: &'a ContainerDir,
    /// The unit that was started, and its cgroup.
    scope: Option<(SystemdUnit, &'a Cgroup)>,
    claim: Option<Claim>,
    warn: &'a dyn Fn(&str),
    armed: bool,
    child: Option<i32>,
}

impl Undo<'_> {
    fn disarm(mut self) {
        self.armed = false;
        if let Some(claim) = self.claim.take() {
            claim.keep();
        }
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(pid) = self.child {
            let _ = process::kill(pid, libc::SIGKILL);
            let _ = process::wait_pid(pid);
        }
        if let Some((unit, cgroup)) = &self.scope {
            let _ = cgroup.kill_all();
            scope::stop(Some(unit), self.warn);
            let _ = cgroup.remove();
        }
        drop(self.claim.take());
        let _ = self.dir.remove();
    }
}

/// The helper's part: waits for the word, gives CRIU a root of its own, becomes CRIU. Returns only when it fails.
pub fn helper(args: &[String]) -> RuntimeError {
    let [fd, rootfs, root, program, rest @ ..] = args else {
        return usage(format!("{HELPER} is for {} itself", env!("CARGO_PKG_NAME")));
    };
    let become_criu = || -> Result<io::Error, RuntimeError> {
        let path = format!("/proc/self/fd/{fd}");
        let mut word = [0u8; 2];
        let read = fs::File::open(&path).and_then(|mut pipe| pipe.read(&mut word));
        if read.map_err(io_error("read", path))? == 0 {
            return Err(usage("the command that wanted CRIU has gone".to_owned()));
        }
        process::unshare(libc::CLONE_NEWNS).map_err(sys_error("make a mount namespace"))?;
        let mounted = |source: &Path, target: &Path, flags| {
            let call = || mount::mount(&file::c_path(source)?, &file::c_path(target)?, c"", flags, None);
            call().map_err(io_error("mount", target))
        };
        mounted(Path::new("none"), Path::new("/"), libc::MS_REC | libc::MS_PRIVATE)?;
        mounted(Path::new(rootfs), Path::new(root), libc::MS_BIND | libc::MS_REC)?;
        Ok(Command::new(program).args(rest).exec())
    };
    match become_criu() {
        Ok(source) => io_error("run", program)(source),
        Err(e) => e,
    }
}

fn usage(text: String) -> RuntimeError {
    RuntimeError::Usage(text)
}

/// CRIU hands a terminal over only to a caller that speaks its protocol.
fn refuse_terminal(spec: &Spec) -> Result<(), RuntimeError> {
    if spec.process.as_ref().is_some_and(|p| p.terminal) {
        return Err(usage(
            "checkpoint and restore of a container with a terminal is not supported".to_owned(),
        ));
    }
    Ok(())
}

/// The command with what both directions have, and the place of its log.
fn criu(
    options: &CriuOptions,
    action: &str,
    images: &Path,
    log: &str,
) -> Result<(Command, PathBuf), RuntimeError> {
    let program = find(options.program.as_deref())?;
    let work = options.work_path.as_deref().unwrap_or(images);
    fs::create_dir_all(work).map_err(io_error("create", work))?;
    let work = fs::canonicalize(work).map_err(io_error("open", work))?;
    let mut criu = Command::new(program);
    criu.arg(action).arg("--images-dir").arg(images).arg("--work-dir").arg(&work);
    criu.args(["-v4", "--log-file", log]);
    let mode = options.manage_cgroups.as_str();
    criu.arg(format!("--manage-cgroups={}", if mode.is_empty() { "soft" } else { mode }));
    for (flag, on) in [
        ("--tcp-established", options.tcp_established),
        ("--ext-unix-sk", options.ext_unix_sk),
        ("--shell-job", options.shell_job),
        ("--file-locks", options.file_locks),
        ("--link-remap", options.link_remap),
        ("--auto-dedup", options.auto_dedup),
    ] {
        criu.args(on.then_some(flag));
    }
    if options.empty_network {
        criu.args(["--empty-ns", "net"]);
    }
    Ok((criu, work.join(log)))
}

fn find(given: Option<&Path>) -> Result<PathBuf, RuntimeError> {
    let name = given.unwrap_or(Path::new("criu"));
    let found = match name.components().count() {
        1 => {
            // Callers run with a short path now and then.
            let path = std::env::var_os("PATH").unwrap_or_default();
            let extra = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
            std::env::split_paths(&path).chain(extra).map(|dir| dir.join(name)).find(|p| p.is_file())
        }
        _ => name.is_file().then(|| name.to_owned()),
    };
    found.ok_or_else(|| {
        usage(format!("{}: not found; checkpoint and restore need CRIU (package \"criu\")", name.display()))
    })
}

fn run(mut criu: Command, log: &Path, what: &str) -> Result<(), RuntimeError> {
    let program = criu.get_program().to_owned();
    let output = criu.stdin(Stdio::null()).output().map_err(io_error("run", program))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(what, format!("{}{}", output.status, told(&output.stderr)), log))
}

/// What a program said on its standard error, as an appendix.
fn told(stderr: &[u8]) -> String {
    match String::from_utf8_lossy(stderr).trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

/// CRIU says why only in its log.
fn failed(what: &str, status: String, log: &Path) -> RuntimeError {
    let text = fs::read(log).map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default();
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
    let last = &errors[errors.len().saturating_sub(LOG_LINES)..];
    usage(format!("criu {what}: {status}: {} (more in {})", last.join("; "), log.display()))
}

/// Mounts whose content is the host's: they are not in the image, and come from the bundle at the restore.
fn external_mounts(spec: &Spec, state: &State) -> Vec<(String, PathBuf)> {
    let mut out = Vec::new();
    for m in &spec.mounts {
        if is_bind(m) {
            let source = Path::new(&state.bundle).join(m.source.as_deref().unwrap_or_default());
            out.push((m.destination.clone(), source));
        } else if m.kind.as_deref() == Some("cgroup") {
            // On v1 the mount is a directory of binds, one for each hierarchy; v2 is a file system of the container.
            for entry in state.cgroup().entries.iter().filter(|e| !e.controllers.is_empty()) {
                let name = entry.mount.file_name().unwrap_or_default().to_string_lossy();
                out.push((format!("{}/{name}", m.destination.trim_end_matches('/')), entry.dir.clone()));
            }
        }
    }
    for path in spec.linux.iter().flat_map(|l| &l.masked_paths) {
        // A masked directory is an empty file system of the container.
        let inside = format!("/proc/{}/root{path}", state.pid);
        let inside = if state.pid > 0 { inside } else { format!("/{path}") };
        if fs::metadata(inside).is_ok_and(|meta| !meta.is_dir()) {
            out.push((path.clone(), "/dev/null".into()));
        }
    }
    out
}

/// Namespaces that are others' and stay: CRIU is told to leave them out.
fn joined(spec: &Spec) -> impl Iterator<Item = (NsKind, &str)> {
    let all = spec.linux.iter().flat_map(|l| &l.namespaces);
    all.filter_map(|ns| {
        let kind = NsKind::parse(&ns.kind).filter(|k| matches!(k, NsKind::Net | NsKind::Pid))?;
        Some((kind, ns.path.as_deref().filter(|p| !p.is_empty())?))
    })
}

fn external_name(kind: NsKind) -> &'static str {
    if kind == NsKind::Pid { "extRootPidNS" } else { "extRootNetNS" }
}

/// By which names CRIU knows the standard descriptors: those of pipes and sockets say themselves which they are, a file of
/// the host is named by its mount and inode.
fn descriptors(pid: i32) -> Result<[String; 3], RuntimeError> {
    let one = |number: usize| -> Result<String, RuntimeError> {
        let path = format!("/proc/{pid}/fd/{number}");
        let Ok(target) = fs::read_link(&path) else { return Ok(String::new()) };
        let target = target.to_string_lossy().into_owned();
        if !target.starts_with('/') {
            return Ok(target);
        }
        let info = format!("/proc/{pid}/fdinfo/{number}");
        let text = fs::read_to_string(&info).map_err(io_error("read", &info))?;
        let number = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
        let mounts = format!("/proc/{pid}/mountinfo");
        let known = fs::read_to_string(&mounts).map_err(io_error("read", &mounts))?;
        let Some(id) = number("mnt_id:") else { return Ok(target) };
        let inside = known.lines().any(|l| l.split(' ').next() == Some(&id.to_string()));
        let meta = fs::metadata(&path).map_err(io_error("read", &path))?;
        let inode = std::os::unix::fs::MetadataExt::ino(&meta);
        Ok(if inside { target } else { format!("file[{id:x}:{inode:x}]") })
    };
    Ok([one(0)?, one(1)?, one(2)?])
}

fn inherited(name: &str) -> bool {
    name.starts_with("pipe:") || name.starts_with("file[")
}

/// An image of another runtime may have none.
fn read_descriptors(images: &Path) -> Result<[String; 3], RuntimeError> {
    let path = images.join(DESCRIPTORS);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|source| RuntimeError::Json { path, source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Default::default()),
        Err(e) => Err(io_error("read", &path)(e)),
    }
}

/// CRIU mounts, but makes no places to mount on; a fresh root file system has none. What is on another mount comes with
/// that one.
fn prepare_targets(rootfs: &Path, spec: &Spec) -> Result<(), RuntimeError> {
    let open = || file::openat(file::cwd(), &file::c_path(rootfs)?, libc::O_PATH | libc::O_DIRECTORY, 0);
    let root = open().map_err(io_error("open", rootfs))?;
    for (i, m) in spec.mounts.iter().enumerate() {
        let target = Path::new(&m.destination);
        if spec.mounts[..i]
            .iter()
            .any(|other| target.starts_with(&other.destination) && other.destination != "/")
        {
            continue;
        }
        let as_file = is_bind(m) && m.source.as_deref().is_some_and(|s| Path::new(s).is_file());
        make_target(&root, target, as_file).map_err(io_error("make the mount point", target))?;
    }
    Ok(())
}

fn make_target(root: &OwnedFd, target: &Path, as_file: bool) -> io::Result<()> {
    let parts: Vec<_> =
        target.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
    let open = |dir: &OwnedFd, path: &Path| {
        file::openat2(dir, &file::c_path(path)?, libc::O_PATH, 0, RESOLVE_IN_ROOT)
    };
    let mut dir = open(root, Path::new("."))?;
    let mut path = PathBuf::new();
    for (i, part) in parts.iter().enumerate() {
        path.push(part);
        match open(root, &path) {
            Ok(found) => dir = found,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                let name = file::c_path(part.as_os_str())?;
                if as_file && i + 1 == parts.len() {
                    return file::mknodat(&dir, &name, libc::S_IFREG | 0o644, 0, 0);
                }
                file::mkdirat(&dir, &name, 0o755)?;
                dir = open(root, &path)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
