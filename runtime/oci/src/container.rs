//! The life of a container: create, start, kill, delete and what lies between.

use crate::activation::{self, Notify};
use crate::child::{Fds, Said, StateText, Word, run_hook};
use crate::error::{RuntimeError, io_error, sys_error};
use crate::host;
use crate::launch::{self, Heard, Launch, Launched};
use crate::lower::{self, HostFacts, Idmap, Lowered, Request, lower_hook};
use crate::netdev;
use crate::op::{NsKind, Op};
use crate::rdt;
use crate::scope::{self, Scope};
use crate::spec::{Hook, IdMapping, Spec};
use crate::state::{ContainerDir, START_SOCKET, State, Status, Store, start_time};
use keel_cgroup::{Cgroup, CgroupError, Claim, Mode, Resources, Roots};
use keel_sys::{file, process, socket};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long `start` waits for a `create` that is not done: its caller has seen the container, and begins at once.
const CREATE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a killed container may take to disappear.
pub(crate) const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// A larger `config.json` is refused: it is read into memory before it is judged.
const CONFIG_MAX_BYTES: u64 = 16 << 20;

pub struct Runtime {
    pub store: Store,
    pub roots: Roots,
    /// Cgroups are systemd's scopes; for containers to come, those that are remember it.
    pub systemd: bool,
    /// Hears what is done, step by step.
    pub debug: Option<Listener>,
    /// Hears what does not stop a command, but should be known.
    pub warn: Rc<dyn Fn(&str)>,
}

pub(crate) type Listener = Box<dyn Fn(&str)>;

#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    pub id: String,
    pub bundle: PathBuf,
    /// The configuration's file, in the bundle when it is relative; `config.json` by default.
    pub config: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
    pub pidfd_socket: Option<PathBuf>,
    pub preserve_fds: u32,
    /// Descriptors of a socket activation, which are among the preserved ones.
    pub listen_fds: Option<u32>,
    /// Where the caller wants to be told of the container's readiness (sd_notify).
    pub notify_socket: Option<PathBuf>,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
}

/// A container whose process waits for the word to execute its program.
pub struct Created {
    dir: ContainerDir,
    pub state: State,
    spec: Spec,
    launched: Launched,
    lowered: Lowered,
    pub warnings: Vec<String>,
    warn: Rc<dyn Fn(&str)>,
    kept: bool,
}

impl Runtime {
    pub fn new(root: impl Into<PathBuf>) -> Runtime {
        let (store, roots) = (Store::new(root), Roots::default());
        Runtime { store, roots, systemd: false, debug: None, warn: Rc::new(|_| {}) }
    }

    /// `create`: the process stays, waiting for `start`.
    pub fn create(&self, options: &CreateOptions) -> Result<Vec<String>, RuntimeError> {
        let mut created = self.set_up(options, true, None)?;
        created.write_pid_file(options)?;
        created.kept = true;
        Ok(std::mem::take(&mut created.warnings))
    }

    /// The first half of `run`: everything but the word to go. `console` is an already connected console socket.
    pub fn prepare(
        &self,
        options: &CreateOptions,
        console: Option<OwnedFd>,
    ) -> Result<Created, RuntimeError> {
        let created = self.set_up(options, false, console)?;
        created.write_pid_file(options)?;
        Ok(created)
    }

    /// Whether the host has one cgroup hierarchy for all.
    pub fn unified(&self) -> Result<bool, RuntimeError> {
        Ok(host::observe(&self.roots)?.layout.mode == Mode::V2)
    }

    /// Whether the bundle's process wants a terminal.
    pub fn wants_terminal(&self, options: &CreateOptions) -> Result<bool, RuntimeError> {
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Process {
            terminal: bool,
        }
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Brief {
            process: Option<Process>,
        }
        let path = config_path(&options.bundle, options.config.as_deref());
        let brief: Brief = serde_json::from_slice(&read_config(&path)?)
            .map_err(|source| RuntimeError::Json { path, source })?;
        Ok(brief.process.unwrap_or_default().terminal)
    }

    fn set_up(
        &self,
        options: &CreateOptions,
        wait: bool,
        console: Option<OwnedFd>,
    ) -> Result<Created, RuntimeError> {
        self.store.check_id(&options.id)?;
        let (mut spec, text, bundle, rootfs) =
            self.read_bundle(&options.bundle, options.config.as_deref())?;
        let namespaces = spec.linux.as_ref().map_or(&[][..], |l| l.namespaces.as_slice());
        let notify = options.notify_socket.is_some() && namespaces.iter().any(|n| n.kind == "mount");
        if notify {
            activation::prepare(&mut spec, &self.store.path_of(&options.id)?);
        }
        let mut facts = host::observe(&self.roots)?;
        if spec.linux.as_ref().is_some_and(|l| l.intel_rdt.is_some()) {
            const MOUNTS: &str = "/proc/self/mountinfo";
            facts.resctrl = rdt::find_mount(&fs::read_to_string(MOUNTS).map_err(io_error("read", MOUNTS))?);
        }
        let mut scope = self.systemd.then(|| Scope::prepare(&spec, &options.id, &self.roots)).transpose()?;
        let cgroup_path = match &scope {
            Some(scope) => scope.path.clone(),
            None => cgroup_path(&spec, &options.id)?,
        };
        let mut cgroup = facts.layout.cgroup(&cgroup_path)?;
        let mut no_cgroup = None;
        let mut claim = None;
        if let Some(scope) = &scope {
            scope::reachable(&mut cgroup, &scope.record());
        } else if facts.euid != 0 {
            match cgroup.claim() {
                Ok(made) => claim = Some(made),
                Err(e @ CgroupError::Occupied { .. }) => return Err(e.into()),
                // An ordinary user may have been delegated nothing: the container runs in its caller's cgroup.
                Err(e) => {
                    cgroup.entries.clear();
                    no_cgroup = Some(format!("no cgroup, no limits: {}", RuntimeError::from(e).chain()));
                }
            }
        }
        let request = Request {
            id: options.id.clone(),
            rootfs: rootfs.to_string_lossy().into_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            no_pivot: options.no_pivot,
            no_new_keyring: options.no_new_keyring,
            preserve_fds: options.preserve_fds,
            listen_fds: options.listen_fds,
            cgroup: cgroup_path.clone(),
            borrowed_cgroup: no_cgroup.is_some(),
            wait_for_cgroup: scope.is_some(),
        };
        let mut lowered = lower::lower(&spec, &request, &facts)?;
        lowered.warnings.extend(no_cgroup);
        if options.notify_socket.is_some() && !notify {
            lowered.warnings.push("NOTIFY_SOCKET is not passed on: that needs a mount namespace".to_owned());
        }
        check_terminal(&spec, options, console.is_some(), wait)?;
        let dir = self.store.create(&options.id)?;
        // Limits, kill and removal act on the whole cgroup: it must not have other people's processes.
        match cgroup.pids() {
            // The process would stop when it joins, and this command would wait for it.
            Ok(pids) if pids.is_empty() && cgroup.is_frozen()? => {
                dir.remove()?;
                return Err(RuntimeError::Usage(format!(
                    "container's cgroup unexpectedly frozen: {cgroup_path:?}"
                )));
            }
            Ok(pids) if pids.is_empty() => {}
            other => {
                dir.remove()?;
                other?;
                return Err(RuntimeError::Usage(format!("container's cgroup is not empty: {cgroup_path:?}")));
            }
        }
        let mut state = State::new(&spec, &options.id, &bundle, &rootfs, &cgroup, &cgroup_path);
        state.own_pid_namespace = lowered.own_pid_namespace;
        state.no_new_keyring = options.no_new_keyring;
        state.systemd = scope.as_ref().map(Scope::record);
        let mut building = Building {
            dir: &dir,
            cgroup: &cgroup,
            claim,
            scope: scope.as_mut(),
            pid: None,
            rdt: rdt::Made::new(),
            warn: &*self.warn,
            done: false,
        };
        if notify {
            let other_root = lowered.id_maps.is_some() || lowered.user_join.is_some();
            activation::make_directory(&dir, other_root)?;
        }
        dir.save_config(&text)?;
        dir.save(&state)?;
        let launched =
            self.build(&mut building, &spec, &lowered, &facts, &mut state, options, wait, console)?;
        building.done = true;
        if let Some(claim) = building.claim.take() {
            claim.keep();
        }
        let mut warnings = lowered.warnings.clone();
        warnings.extend(other_score(&spec, launched.pid));
        drop(building);
        let warn = self.warn.clone();
        Ok(Created { dir, state, spec, launched, lowered, warnings, warn, kept: false })
    }

    pub(crate) fn tell(&self, line: impl FnOnce() -> String) {
        if let Some(debug) = &self.debug {
            debug(&line());
        }
    }

    /// What a new process is about to do.
    pub(crate) fn tell_steps(&self, ops: &[Op]) {
        for (number, op) in ops.iter().enumerate() {
            self.tell(|| format!("step {number}: {}", op.describe().trim_start_matches("error ")));
            if let Op::Seccomp { filter } = op {
                self.tell(|| format!("seccomp filter flags: {}", filter.flags));
            }
        }
    }

    /// The configuration, its text, and the whole paths of the bundle and its root file system.
    pub(crate) fn read_bundle(
        &self,
        bundle: &Path,
        config: Option<&Path>,
    ) -> Result<(Spec, Vec<u8>, PathBuf, PathBuf), RuntimeError> {
        let bundle = fs::canonicalize(bundle).map_err(io_error("open the bundle", bundle))?;
        let path = config_path(&bundle, config);
        let text = read_config(&path)?;
        let spec: Spec =
            serde_json::from_slice(&text).map_err(|source| RuntimeError::Json { path, source })?;
        let rootfs = rootfs_path(&bundle, &spec)?;
        Ok((spec, text, bundle, rootfs))
    }

    #[expect(clippy::too_many_arguments, reason = "the one place where all parts of a container meet")]
    fn build(
        &self,
        building: &mut Building<'_>,
        spec: &Spec,
        lowered: &Lowered,
        facts: &HostFacts,
        state: &mut State,
        options: &CreateOptions,
        wait: bool,
        console: Option<OwnedFd>,
    ) -> Result<Launched, RuntimeError> {
        let dir = building.dir;
        let relayed = console.is_some();
        let mut fds = Fds { console, relayed, ..Fds::default() };
        let mut cgroup = None;
        if building.scope.is_none() {
            if building.claim.is_none() {
                building.claim = Some(building.cgroup.claim()?);
            }
            if !building.cgroup.entries.is_empty() {
                building.cgroup.apply(&resources(spec, lowered))?;
            }
            fds.tasks = building.cgroup.open_tasks()?;
            cgroup = building.cgroup.open_v2()?;
        }
        for (kind, path) in &lowered.child_joins {
            let namespace = open_namespace(*kind, path)?;
            if lowered.sysctl_namespaces.contains(kind) && is_own(*kind, &namespace)? {
                return Err(RuntimeError::Usage(format!(
                    "linux.sysctl: {path} is the host's {} namespace, whose parameters stay as they are",
                    kind.spec_name()
                )));
            }
            fds.namespaces.push(namespace);
        }
        let user_join = match &lowered.user_join {
            Some(path) => Some(open_namespace(NsKind::User, path)?),
            None => None,
        };
        for idmap in &lowered.idmaps {
            fds.idmaps.push(match idmap {
                Idmap::Own(uids, gids) => make_user_namespace(uids, gids)?,
                Idmap::Joined(path) => open_namespace(NsKind::User, path)?,
            });
        }
        if wait {
            let listener = socket::listen_at(&dir.open_fd()?, c"start.sock", libc::SOCK_SEQPACKET);
            fds.start = Some(listener.map_err(io_error("listen on", dir.file(START_SOCKET)))?);
            fds.hand_out = facts.euid != 0;
        }
        if let Some(path) = &options.console_socket {
            let socket = socket::connect(path, libc::SOCK_STREAM);
            fds.console = Some(socket.map_err(io_error("connect to the console socket", path))?);
        }
        if let Some(path) = notify_path(spec) {
            let socket = socket::connect(Path::new(path), libc::SOCK_STREAM);
            fds.notify = Some(socket.map_err(io_error("failed to connect with seccomp agent", path))?);
        }
        let mut parent_joins = Vec::new();
        for (kind, path) in &lowered.parent_joins {
            parent_joins.push((*kind, open_namespace(*kind, path)?));
        }
        self.tell(|| format!("cgroup {}", state.cgroup_path));
        self.tell_steps(&lowered.ops);
        let launched = launch::launch(Launch {
            ops: &lowered.ops,
            fds,
            clone_flags: lowered.clone_flags,
            user_join,
            parent_joins,
            time_offsets: lowered.time_offsets.clone(),
            cgroup,
            state: StateText { notify: notify_text(spec, state, None), ..state_text(state, "creating") },
        })?;
        building.pid = Some(launched.pid);
        self.tell(|| format!("the container's process is {}", launched.pid));
        state.pid = launched.pid;
        state.start_time = start_time(launched.pid).unwrap_or(0);
        if let (Some(plan), Some(mount)) = (&lowered.rdt, &facts.resctrl) {
            let done = rdt::apply(plan, mount, launched.pid, &mut building.rdt);
            state.rdt.clone_from(&building.rdt);
            done?;
        }
        dir.save(state)?;
        if !lowered.net_devices.is_empty() {
            let joined = lowered.child_joins.iter().find(|(kind, _)| *kind == NsKind::Net);
            let path =
                joined.map_or_else(|| format!("/proc/{}/ns/net", launched.pid), |(_, path)| path.clone());
            netdev::move_all(&lowered.net_devices, &open_namespace(NsKind::Net, &path)?)?;
        }
        if let Some(path) = &options.pidfd_socket {
            let socket = socket::connect(path, libc::SOCK_STREAM);
            let socket = socket.map_err(io_error("connect to the pidfd socket", path))?;
            socket::send_fd(&socket, b"pidfd", &launched.pidfd).map_err(sys_error("send the pidfd"))?;
        }
        self.until_ready(&launched, spec, lowered, state, building)?;
        state.ready = true;
        dir.save(state)?;
        Ok(launched)
    }

    fn until_ready(
        &self,
        launched: &Launched,
        spec: &Spec,
        lowered: &Lowered,
        state: &State,
        building: &mut Building<'_>,
    ) -> Result<(), RuntimeError> {
        loop {
            match launch::hear(&launched.sync, &lowered.ops)? {
                Heard::Word(Word::Ready) => return Ok(()),
                Heard::Word(Word::WantCgroup) => {
                    if let Some(scope) = &mut building.scope {
                        let resources = resources(spec, lowered);
                        scope.start(building.cgroup, launched.pid, resources, &self.roots)?;
                    }
                    launch::answer(&launched.sync)?;
                }
                Heard::Word(Word::WantIdMaps) => {
                    if let Some((uids, gids)) = &lowered.id_maps {
                        write_id_maps(launched.pid, uids, gids)?;
                    }
                    launch::answer(&launched.sync)?;
                }
                Heard::Word(Word::WantHooks) => {
                    run_early_hooks(spec, state)?;
                    launch::answer(&launched.sync)?;
                }
                Heard::Source(op) => match lowered.ops.get(op) {
                    Some(op) => launch::send_source(launched, op)?,
                    None => return Err(RuntimeError::ChildDied("unreadable message".to_owned())),
                },
                Heard::Word(Word::Failed | Word::WantSource) | Heard::Closed => {
                    return Err(RuntimeError::ChildDied(launch::obituary(launched.pid)));
                }
            }
        }
    }

    /// `start`. With a socket to notify it returns when the container has said that it is ready.
    pub fn start(&self, id: &str, notify: Option<&Path>) -> Result<(), RuntimeError> {
        let dir = self.store.open(id)?;
        let mut state = dir.load()?;
        let mut status = dir.status(&state)?;
        let deadline = Instant::now() + CREATE_DEADLINE;
        while status == Status::Creating && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
            state = dir.load()?;
            status = dir.status(&state)?;
        }
        let wrong = |status: Status| RuntimeError::WrongState {
            id: id.to_owned(),
            status: status.as_str(),
            action: match status {
                Status::Stopped => "start a container that has stopped",
                Status::Creating => "start it before its create is done",
                _ => "start an already running container",
            },
        };
        if status != Status::Created {
            return Err(wrong(status));
        }
        let connected = socket::connect_at(&dir.open_fd()?, c"start.sock", libc::SOCK_SEQPACKET);
        let socket = connected.map_err(|e| match e.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::ENOENT) => wrong(dir.status(&state).unwrap_or(Status::Stopped)),
            _ => io_error("connect to", dir.file(START_SOCKET))(e),
        })?;
        let notify = match notify {
            Some(host) => Notify::bind(&dir, host, state.pid)?,
            None => None,
        };
        socket::send(&socket, b"start").map_err(sys_error("tell the container's process to start"))?;
        let failure = launch::hear_start(&socket)?;
        let path = dir.file(START_SOCKET);
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        if let Some(text) = failure {
            // It is on its way out; a `delete` that comes next must find it stopped.
            let _ = self.kill_and_wait(&state);
            return Err(RuntimeError::Child(text));
        }
        let spec = dir.load_spec()?;
        poststart(&spec, &state).inspect_err(|_| {
            // The specification goes on with the destruction, and the hook's failure is what the caller is told.
            let _ = self.kill_and_wait(&state).and_then(|()| destroy(&dir, &state, &*self.warn));
        })?;
        match (notify, state.init_pidfd()) {
            (Some(notify), Some(init)) => notify.wait_ready(init),
            _ => Ok(()),
        }
    }

    /// `kill`.
    pub fn kill(&self, id: &str, signal: i32, all: bool) -> Result<(), RuntimeError> {
        let dir = self.store.open(id)?;
        let state = dir.load()?;
        let cgroup = state.cgroup();
        let init = state.init_pidfd();
        if all {
            return Ok(cgroup.signal_all(signal)?);
        }
        // Without a pid namespace of its own, processes outlive the init.
        if signal == libc::SIGKILL && !state.own_pid_namespace && !cgroup.pids()?.is_empty() {
            return Ok(cgroup.signal_all(signal)?);
        }
        let Some(init) = init else { return Err(RuntimeError::NotRunning) };
        match process::pidfd_send_signal(&init, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(RuntimeError::NotRunning),
            other => other.map_err(sys_error("signal the container's process"))?,
        }
        // What is frozen would die only when it is resumed.
        if signal == libc::SIGKILL && cgroup.is_frozen()? {
            cgroup.freeze(false)?;
        }
        Ok(())
    }

    /// `delete`. With `force` a container that runs is killed, and one that does not exist is no error.
    pub fn delete(&self, id: &str, force: bool) -> Result<(), RuntimeError> {
        let dir = match self.store.open(id) {
            Err(RuntimeError::NotFound(_)) if force => return Ok(()),
            other => other?,
        };
        let state = match dir.load() {
            // Claimed, but its maker died before it wrote anything: there is nothing but the directory.
            Err(RuntimeError::NotFound(_)) if force => return dir.remove(),
            Err(e @ RuntimeError::Json { .. }) if force => return self.delete_unknown(&dir, &e),
            other => other?,
        };
        let status = dir.status(&state)?;
        match status {
            Status::Stopped => {}
            Status::Created => self.kill_and_wait(&state)?,
            _ if force => self.kill_and_wait(&state)?,
            status => return Err(RuntimeError::NotStopped { id: id.to_owned(), status: status.as_str() }),
        }
        destroy(&dir, &state, &*self.warn)
    }

    /// Of a container whose state nobody can read: what its configuration, or else its id, says where it is.
    fn delete_unknown(&self, dir: &ContainerDir, why: &RuntimeError) -> Result<(), RuntimeError> {
        let spec = dir.load_spec().ok();
        // Of a path that is none there was never a cgroup.
        let path = spec.and_then(|spec| cgroup_path(&spec, &dir.id).ok()).unwrap_or_else(|| dir.id.clone());
        let found = match host::observe(&self.roots)?.layout.cgroup(&path) {
            Ok(cgroup) if cgroup.exists() => {
                kill_and_empty(&cgroup)?;
                cgroup.remove()?;
                "is removed"
            }
            _ => "is not there",
        };
        (self.warn)(&format!(
            "{}; its cgroup {path:?} {found}; not known, and left as they are: processes and cgroups elsewhere, \
             systemd units, resctrl classes; no poststop hook is run",
            why.chain()
        ));
        dir.remove()
    }

    fn kill_and_wait(&self, state: &State) -> Result<(), RuntimeError> {
        let init = state.init_pidfd();
        if let Some(init) = &init {
            match process::pidfd_send_signal(init, libc::SIGKILL) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                other => other.map_err(sys_error("kill the container's process"))?,
            }
        }
        let cgroup = state.cgroup();
        if init.is_none() || !state.own_pid_namespace || cgroup.is_frozen()? {
            cgroup.kill_all()?;
        }
        if let Some(init) = init {
            let gone = file::wait_readable(&init, Some(KILL_DEADLINE.as_millis() as i32));
            if !gone.map_err(sys_error("wait for the container's process"))? {
                return Err(RuntimeError::WontDie(state.id.clone()));
            }
        }
        Ok(())
    }

    pub fn pause(&self, id: &str, on: bool) -> Result<(), RuntimeError> {
        let dir = self.store.open(id)?;
        let state = dir.load()?;
        let status = dir.status(&state)?;
        let action = match (on, status) {
            (true, Status::Running | Status::Created) => return Ok(state.cgroup().freeze(true)?),
            (false, Status::Paused) => return Ok(state.cgroup().freeze(false)?),
            (true, _) => "pause a container that is not running",
            (false, _) => "resume a container that is not paused",
        };
        Err(RuntimeError::WrongState { id: id.to_owned(), status: status.as_str(), action })
    }

    /// New lines for the container's class of resource director technology.
    pub fn update_schemata(&self, id: &str, lines: &[&str]) -> Result<(), RuntimeError> {
        let state = self.store.open(id)?.load()?;
        let class = state.rdt.first().ok_or_else(|| {
            RuntimeError::Usage(format!(
                "container {id:?} has no class of its own (linux.intelRdt): no schema to change"
            ))
        })?;
        let path = class.join("schemata");
        fs::write(&path, format!("{}\n", lines.join("\n"))).map_err(io_error("write", &path))
    }

    pub fn update(&self, id: &str, resources: &Resources) -> Result<(), RuntimeError> {
        let dir = self.store.open(id)?;
        let state = dir.load()?;
        let cgroup = state.cgroup();
        if let Some((field, why)) = keel_cgroup::cannot_be_set(resources, cgroup.mode) {
            return Err(RuntimeError::Usage(format!("{field} is not supported: {why}")));
        }
        cgroup.check_memory(resources)?;
        let mut resources = resources.clone();
        if let Some(unit) = &state.systemd {
            scope::update(unit, cgroup.mode, &mut resources, &self.roots)?;
        }
        Ok(cgroup.apply_limits(&resources)?)
    }
}

impl Created {
    /// Says the word; returns when the program runs.
    pub fn go(&mut self) -> Result<(), RuntimeError> {
        launch::answer(&self.launched.sync)?;
        match launch::hear(&self.launched.sync, &self.lowered.ops)? {
            Heard::Closed => {}
            _ => return Err(RuntimeError::Child("unexpected message at the start".to_owned())),
        }
        poststart(&self.spec, &self.state)
    }

    /// The container's socket for readiness; to be made before [`Created::go`].
    pub fn notify(&self, host: Option<&Path>) -> Result<Option<Notify>, RuntimeError> {
        host.map_or(Ok(None), |host| Notify::bind(&self.dir, host, self.launched.pid))
    }

    /// Waits until the container is ready or has ended.
    pub fn wait_ready(&self, notify: &Notify) -> Result<(), RuntimeError> {
        notify.wait_ready(&self.launched.pidfd)
    }

    pub fn pid(&self) -> i32 {
        self.launched.pid
    }

    pub fn pidfd(&self) -> &OwnedFd {
        &self.launched.pidfd
    }

    /// Leaves the container to itself.
    pub fn detach(mut self) {
        self.kept = true;
    }

    /// Removes everything of the container after its init has been waited for.
    pub fn finish(mut self) -> Result<(), RuntimeError> {
        self.kept = true;
        destroy(&self.dir, &self.state, &*self.warn)
    }

    fn write_pid_file(&self, options: &CreateOptions) -> Result<(), RuntimeError> {
        match &options.pid_file {
            Some(path) => write_pid_file(path, self.launched.pid),
            None => Ok(()),
        }
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if !self.kept {
            let _ = process::pidfd_send_signal(&self.launched.pidfd, libc::SIGKILL);
            let _ = process::wait_pid(self.launched.pid);
            let _ = destroy(&self.dir, &self.state, &*self.warn);
        }
    }
}

/// Takes back what was made when the container does not come to stand.
struct Building<'a> {
    dir: &'a ContainerDir,
    cgroup: &'a Cgroup,
    claim: Option<Claim>,
    /// To be started when the process is there.
    scope: Option<&'a mut Scope>,
    pid: Option<i32>,
    rdt: rdt::Made,
    warn: &'a dyn Fn(&str),
    done: bool,
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(pid) = self.pid {
            let _ = process::kill(pid, libc::SIGKILL);
            let _ = process::wait_pid(pid);
        }
        // A unit that another container has is not ours to stop.
        if let Some(scope) = self.scope.as_ref().filter(|s| s.started) {
            let _ = self.cgroup.kill_all();
            scope::stop(Some(&scope.record()), self.warn);
            let _ = self.cgroup.remove();
        }
        drop(self.claim.take());
        let _ = rdt::remove(&self.rdt);
        let _ = self.dir.remove();
    }
}

/// Below its own score the runtime may not go without a right of its own (CAP_SYS_RESOURCE), and the container runs.
fn other_score(spec: &Spec, pid: i32) -> Option<String> {
    let wanted = spec.process.as_ref()?.oom_score_adj?;
    let score: i32 = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?.trim().parse().ok()?;
    (score != wanted).then(|| {
        format!("process.oomScoreAdj: it stays {score}, since CAP_SYS_RESOURCE is missing for {wanted}")
    })
}

pub(crate) fn write_pid_file(path: &Path, pid: i32) -> Result<(), RuntimeError> {
    // A reader that waits for the file must never see it empty.
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temp = path.with_file_name(format!(".{name}.tmp"));
    fs::write(&temp, pid.to_string()).map_err(io_error("write", &temp))?;
    fs::rename(&temp, path).map_err(io_error("rename", path))
}

fn config_path(bundle: &Path, config: Option<&Path>) -> PathBuf {
    bundle.join(config.unwrap_or(Path::new("config.json")))
}

/// A configuration, or the process of an exec: any file, also one that does not tell its size.
pub(crate) fn read_config(path: &Path) -> Result<Vec<u8>, RuntimeError> {
    let file = fs::File::open(path).map_err(io_error("open", path))?;
    let mut text = Vec::new();
    file.take(CONFIG_MAX_BYTES + 1).read_to_end(&mut text).map_err(io_error("read", path))?;
    if text.len() as u64 > CONFIG_MAX_BYTES {
        let path = path.display();
        return Err(RuntimeError::Usage(format!("{path} is larger than {CONFIG_MAX_BYTES} bytes")));
    }
    Ok(text)
}

fn rootfs_path(bundle: &Path, spec: &Spec) -> Result<PathBuf, RuntimeError> {
    let path = spec.root.as_ref().map(|r| r.path.as_str()).filter(|p| !p.is_empty());
    let path = path.ok_or_else(|| {
        RuntimeError::Spec(lower::SpecError::Invalid {
            field: "root.path".into(),
            problem: "is missing".into(),
        })
    })?;
    let path = bundle.join(path);
    fs::canonicalize(&path).map_err(io_error("open rootfs", &path))
}

pub(crate) fn cgroup_path(spec: &Spec, id: &str) -> Result<String, RuntimeError> {
    let given = spec.linux.as_ref().and_then(|l| l.cgroups_path.as_deref()).filter(|p| !p.is_empty());
    match given {
        Some(path) if path.split('/').any(|part| part == "..") => {
            Err(RuntimeError::Usage(format!("linux.cgroupsPath {path:?} must not contain \"..\"")))
        }
        Some(path) => Ok(path.to_owned()),
        None => Ok(id.to_owned()),
    }
}

fn check_terminal(
    spec: &Spec,
    options: &CreateOptions,
    own: bool,
    detached: bool,
) -> Result<(), RuntimeError> {
    let terminal = spec.process.as_ref().is_some_and(|p| p.terminal);
    let usage = |text: &str| Err(RuntimeError::Usage(text.to_owned()));
    match (terminal, options.console_socket.is_some()) {
        (true, false) if !own && detached => {
            usage("cannot allocate tty if the container will be detached: give --console-socket")
        }
        (false, true) => usage("cannot use console socket if the container will not allocate a tty"),
        _ => Ok(()),
    }
}

pub(crate) fn resources(spec: &Spec, lowered: &Lowered) -> Resources {
    let given = spec.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    Resources { devices: lowered.device_rules.clone(), ..given }
}

pub(crate) fn open_namespace(kind: NsKind, path: &str) -> Result<OwnedFd, RuntimeError> {
    let open = || file::openat(file::cwd(), &file::c_path(path)?, libc::O_RDONLY, 0);
    let fd = open().map_err(io_error("open namespace", path))?;
    let found = process::namespace_type(&fd).map_err(io_error("not a namespace:", path))?;
    if found != kind.flag() {
        return Err(RuntimeError::Usage(format!("{path} is no {} namespace", kind.spec_name())));
    }
    Ok(fd)
}

fn is_own(kind: NsKind, namespace: &OwnedFd) -> Result<bool, RuntimeError> {
    let path = format!("/proc/self/ns/{}", kind.proc_name());
    let own = fs::metadata(&path).map_err(io_error("read", &path))?;
    let other = file::fstat(namespace).map_err(sys_error("look at a namespace"))?;
    Ok((own.dev(), own.ino()) == (other.dev, other.ino))
}

pub(crate) fn notify_path(spec: &Spec) -> Option<&str> {
    spec.linux.as_ref()?.seccomp.as_ref()?.listener()
}

/// The document for the seccomp listener, cut where the process's pid goes. `init` is the container's own process when
/// it is not the one that is meant.
pub(crate) fn notify_text(spec: &Spec, state: &State, init: Option<i32>) -> Vec<Vec<u8>> {
    if notify_path(spec).is_none() {
        return Vec::new();
    }
    let seccomp = spec.linux.as_ref().and_then(|l| l.seccomp.as_ref());
    let text = |value: &str| serde_json::to_string(value).unwrap_or_default();
    let metadata = seccomp.and_then(|s| s.listener_metadata.as_deref()).filter(|m| !m.is_empty());
    let metadata = metadata.map(|m| format!(",\"metadata\":{}", text(m))).unwrap_or_default();
    let inner = state_text(state, if init.is_some() { "running" } else { "creating" });
    let start = format!("{{\"ociVersion\":{},\"fds\":[\"seccompFd\"],\"pid\":", text(&state.oci_version));
    let middle = [format!("{metadata},\"state\":").as_bytes(), &inner.before_pid].concat();
    let end = [&inner.after_pid[..], b"}"].concat();
    match init {
        None => vec![start.into_bytes(), middle, end],
        Some(pid) => vec![start.into_bytes(), [&middle[..], pid.to_string().as_bytes(), &end].concat()],
    }
}

fn map_text(maps: &[IdMapping]) -> String {
    maps.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect()
}

fn write_id_maps(pid: i32, uids: &[IdMapping], gids: &[IdMapping]) -> Result<(), RuntimeError> {
    let write = |name: &str, text: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::write(&path, text).map_err(io_error("write", path))
    };
    let (uid, gid) = (process::geteuid(), process::getegid());
    let own = |maps: &[IdMapping], id: u32| matches!(maps, [m] if m.host_id == id && m.size == 1);
    if uid == 0 || own(uids, uid) {
        write("uid_map", &map_text(uids))?;
    } else {
        map_by_helper("newuidmap", pid, uids)?;
    }
    if uid == 0 {
        write("gid_map", &map_text(gids))
    } else if own(gids, gid) {
        // Without this an ordinary user may not map groups; with it the groups cannot be dropped either.
        write("setgroups", "deny")?;
        write("gid_map", &map_text(gids))
    } else {
        map_by_helper("newgidmap", pid, gids)
    }
}

/// An ordinary user maps ids of others only through these programs, which read /etc/subuid and /etc/subgid.
fn map_by_helper(helper: &'static str, pid: i32, maps: &[IdMapping]) -> Result<(), RuntimeError> {
    let numbers = maps.iter().flat_map(|m| [m.container_id, m.host_id, m.size]).map(|n| n.to_string());
    let output = std::process::Command::new(helper).arg(pid.to_string()).args(numbers).output();
    let output = output.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => RuntimeError::Usage(format!(
            "{helper} is not installed: install uidmap, or map no more than the own user and group"
        )),
        _ => io_error("run", helper)(e),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(RuntimeError::Usage(format!("{}; see /etc/subuid and /etc/subgid", said.trim())))
}

/// A user namespace that only lends its maps to an idmapped mount.
fn make_user_namespace(uids: &[IdMapping], gids: &[IdMapping]) -> Result<OwnedFd, RuntimeError> {
    let made = process::in_new_namespaces(libc::CLONE_NEWUSER, |pid| {
        write_id_maps(pid, uids, gids)?;
        open_namespace(NsKind::User, &format!("/proc/{pid}/ns/user"))
    });
    made.map_err(sys_error("make a user namespace"))?
}

/// The state document around the pid.
pub(crate) fn state_text(state: &State, status: &str) -> StateText {
    const MARK: &str = "\"pid\":0";
    let mut document = state.document(Status::Stopped);
    document.status = status;
    document.pid = 0;
    let text = serde_json::to_string(&document).unwrap_or_default();
    let at = text.find(MARK).map_or(text.len(), |at| at + MARK.len() - 1);
    StateText {
        before_pid: text.as_bytes()[..at].to_vec(),
        after_pid: text.as_bytes().get(at + 1..).unwrap_or_default().to_vec(),
        notify: Vec::new(),
    }
}

fn run_hooks(kind: &'static str, hooks: &[Hook], state: &State, status: &str) -> Result<(), RuntimeError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let text = state_text(state, status);
    let own: Vec<String> = std::env::vars_os()
        .filter_map(|(k, v)| Some(format!("{}={}", k.into_string().ok()?, v.into_string().ok()?)))
        .collect();
    for (i, hook) in hooks.iter().enumerate() {
        let program = lower_hook(&format!("hooks.{kind}[{i}]"), hook, &own)?;
        let mut said = Said::new();
        if let Err(failure) = run_hook(&program, &text, state.pid, &mut said) {
            let op = crate::op::Op::Hook { program, kind, number: i };
            let said = String::from_utf8_lossy(said.text());
            let said = if said.is_empty() { String::new() } else { format!(": {said}") };
            return Err(RuntimeError::Hook(op.explain(failure) + &said));
        }
    }
    Ok(())
}

/// Those of the runtime's namespaces that run once the container's stand.
pub(crate) fn run_early_hooks(spec: &Spec, state: &State) -> Result<(), RuntimeError> {
    let Some(hooks) = &spec.hooks else { return Ok(()) };
    // Programs for the older kind of hook know no "creating".
    run_hooks("prestart", &hooks.prestart, state, "created")?;
    run_hooks("createRuntime", &hooks.create_runtime, state, "creating")
}

/// A failing poststart hook stops the container (specification 1.3, "Lifecycle").
pub(crate) fn poststart(spec: &Spec, state: &State) -> Result<(), RuntimeError> {
    let Some(hooks) = &spec.hooks else { return Ok(()) };
    let result = run_hooks("poststart", &hooks.poststart, state, "running");
    if result.is_err()
        && let Some(init) = state.init_pidfd()
    {
        let _ = process::pidfd_send_signal(&init, libc::SIGKILL);
    }
    result
}

/// Removes cgroup and state of a container without processes. Then come the poststop hooks, of which a failing one is only
/// told.
pub(crate) fn destroy(dir: &ContainerDir, state: &State, warn: &dyn Fn(&str)) -> Result<(), RuntimeError> {
    let cgroup = state.cgroup();
    // Without a pid namespace of its own, processes may have outlived the init.
    if !state.own_pid_namespace {
        kill_and_empty(&cgroup)?;
    }
    scope::stop(state.systemd.as_ref(), warn);
    cgroup.remove()?;
    rdt::remove(&state.rdt)?;
    let hooks = dir.load_spec().ok().and_then(|s| s.hooks).unwrap_or_default();
    dir.remove()?;
    for hook in &hooks.poststop {
        if let Err(e) = run_hooks("poststop", std::slice::from_ref(hook), state, "stopped") {
            warn(&e.chain());
        }
    }
    Ok(())
}

fn kill_and_empty(cgroup: &Cgroup) -> Result<(), RuntimeError> {
    cgroup.kill_all()?;
    let deadline = Instant::now() + KILL_DEADLINE;
    while !cgroup.pids()?.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
