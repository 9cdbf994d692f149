//! `exec`: a further process in a running container.

use crate::child::{ALL_TOLD, ASK_NAMESPACES, Fds, StateText, Word};
use crate::container::{Runtime, notify_path, notify_text, read_config, state_text, write_pid_file};
use crate::error::{RuntimeError, io_error, sys_error};
use crate::host;
use crate::launch::{self, Heard, Launch, Launched};
use crate::lower::{ProcessContext, lower_affinity, lower_process, session_keyring};
use crate::op::{NsKind, Op};
use crate::scope;
use crate::spec::{Capabilities, Process, Spec};
use crate::state::{ContainerDir, START_SOCKET, State, Status, SystemdUnit};
use keel_cgroup::{Cgroup, Roots};
use keel_sys::cred::NO_ID;
use keel_sys::{file, process, socket};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    pub id: String,
    /// A file with the whole process; the other options about the process are then not used.
    pub process: Option<PathBuf>,
    pub args: Vec<String>,
    pub tty: bool,
    pub env: Vec<String>,
    pub cwd: Option<String>,
    pub user: Option<(u32, Option<u32>)>,
    pub additional_gids: Vec<u32>,
    pub caps: Vec<String>,
    pub no_new_privs: bool,
    pub apparmor: Option<String>,
    pub process_label: Option<String>,
    /// `PATH`, or any number of `CONTROLLER[,CONTROLLER]:PATH`, below the container's cgroup.
    pub sub_cgroups: Vec<String>,
    pub ignore_paused: bool,
    pub pid_file: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
    pub pidfd_socket: Option<PathBuf>,
    pub preserve_fds: u32,
    pub detach: bool,
}

/// A process in a container, running its program.
pub struct Executed {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub warnings: Vec<String>,
}

impl Runtime {
    /// What `exec` would run, and whether it wants a terminal.
    pub fn exec_process(&self, options: &ExecOptions) -> Result<Process, RuntimeError> {
        let spec = self.store.open(&options.id)?.load_spec()?;
        exec_process(&spec, options)
    }

    /// Starts the process; returns when its program runs. `console` is a connected console socket.
    pub fn exec(
        &self,
        options: &ExecOptions,
        process: &Process,
        console: Option<OwnedFd>,
    ) -> Result<Executed, RuntimeError> {
        let dir = self.store.open(&options.id)?;
        let state = dir.load()?;
        let status = dir.status(&state)?;
        let wrong =
            |action| RuntimeError::WrongState { id: options.id.clone(), status: status.as_str(), action };
        match status {
            Status::Running | Status::Created => {}
            Status::Paused if options.ignore_paused => {}
            Status::Paused => return Err(wrong("exec in a paused container")),
            _ => return Err(wrong("exec in a container that is not running")),
        }
        let init = state.init_pidfd().ok_or_else(|| wrong("exec in a container that is not running"))?;
        let spec = dir.load_spec()?;
        let facts = host::observe(&self.roots)?;
        // Of a container that is not started an ordinary user can open nothing: its process is asked.
        let mut told = match status {
            Status::Created if facts.euid != 0 => Some(ask_namespaces(&dir)?),
            _ => None,
        };
        let mut flags = match &told {
            Some(told) => told.iter().fold(0, |flags, (kind, _)| flags | kind.flag()),
            None => foreign_namespaces(state.pid)?,
        };
        let user_namespace = flags & libc::CLONE_NEWUSER != 0;
        let mut namespace = |kind: NsKind| {
            let found = told
                .as_mut()
                .and_then(|told| told.iter().position(|(k, _)| *k == kind).map(|i| told.remove(i)));
            found.map_or_else(
                || file::dup_above(&init, 3).map_err(sys_error("copy a descriptor")),
                |(_, fd)| Ok(fd),
            )
        };
        let context = ProcessContext {
            linux: spec.linux.as_ref(),
            facts: &facts,
            user_namespace,
            preserve_fds: options.preserve_fds,
            listen_fds: None,
            hooks: &[],
            exec: true,
            keep_groups: spec.keeps_groups(),
        };
        let mut warnings = Vec::new();
        let rest = lower_process(process, &context, &mut warnings)?;
        // Only in the container's user namespace does an ordinary user have the right to join the others.
        let user_join = (user_namespace && facts.euid != 0).then(|| namespace(NsKind::User)).transpose()?;
        if user_join.is_some() {
            flags &= !libc::CLONE_NEWUSER;
        }
        // From a session of its own a user can only ask systemd to let a process into the scope.
        let attached = state.systemd.as_ref().filter(|unit| unit.user);
        let mut parent_joins = Vec::new();
        if flags & libc::CLONE_NEWPID != 0 {
            // It takes effect only for children, and is joined before the clone.
            parent_joins.push((NsKind::Pid, namespace(NsKind::Pid)?));
            flags &= !libc::CLONE_NEWPID;
        }
        let (enter, namespaces): (Vec<Op>, Vec<OwnedFd>) = match told {
            None => (vec![Op::EnterProcess { flags }], Vec::new()),
            Some(mut told) => {
                // Last, for it changes what paths mean.
                told.sort_by_key(|(kind, _)| *kind == NsKind::Mount);
                let join = |(slot, (kind, fd))| (Op::Join { kind, slot }, fd);
                told.into_iter().enumerate().map(join).unzip()
            }
        };
        let mut ops = exec_ops(process, &state, enter, user_namespace, context.keep_groups, rest)?;
        if attached.is_some() {
            ops.insert(0, Op::WaitCgroup);
        }
        let (tasks, cgroup) = match attached {
            Some(_) => Default::default(),
            None => open_cgroup(&state, options, &self.roots)?,
        };
        let relayed = console.is_some();
        let mut fds = Fds { tasks, namespaces, console, relayed, ..Fds::default() };
        if let Some(path) = &options.console_socket {
            let socket = socket::connect(path, libc::SOCK_STREAM);
            fds.console = Some(socket.map_err(io_error("connect to the console socket", path))?);
        }
        if let Some(path) = notify_path(&spec) {
            let socket = socket::connect(Path::new(path), libc::SOCK_STREAM);
            fds.notify = Some(socket.map_err(io_error("failed to connect with seccomp agent", path))?);
        }
        fds.process = Some(init);
        self.tell_steps(&ops);
        let launched = launch::launch(Launch {
            ops: &ops,
            fds,
            clone_flags: 0,
            user_join,
            parent_joins,
            time_offsets: None,
            cgroup,
            state: StateText {
                notify: notify_text(&spec, &state, Some(state.pid)),
                ..state_text(&state, "running")
            },
        })?;
        self.tell(|| format!("the new process is {}", launched.pid));
        match finish(&launched, &ops, options, attached) {
            Ok(()) => Ok(Executed { pid: launched.pid, pidfd: launched.pidfd, warnings }),
            Err(e) => {
                let _ = process::pidfd_send_signal(&launched.pidfd, libc::SIGKILL);
                let _ = process::wait_pid(launched.pid);
                Err(e)
            }
        }
    }
}

fn finish(
    launched: &Launched,
    ops: &[Op],
    options: &ExecOptions,
    attached: Option<&SystemdUnit>,
) -> Result<(), RuntimeError> {
    let mut heard = launch::hear(&launched.sync, ops)?;
    if let (Heard::Word(Word::WantCgroup), Some(unit)) = (&heard, attached) {
        let below = parse_sub_cgroups(&options.sub_cgroups)?.pop().map(|(_, path)| path).unwrap_or_default();
        scope::attach(unit, &format!("/{below}"), launched.pid)?;
        launch::answer(&launched.sync)?;
        heard = launch::hear(&launched.sync, ops)?;
    }
    match heard {
        Heard::Word(Word::Ready) => {}
        _ => return Err(RuntimeError::ChildDied(launch::obituary(launched.pid))),
    }
    if let Some(path) = &options.pidfd_socket {
        let socket = socket::connect(path, libc::SOCK_STREAM);
        let socket = socket.map_err(io_error("connect to the pidfd socket", path))?;
        socket::send_fd(&socket, b"pidfd", &launched.pidfd).map_err(sys_error("send the pidfd"))?;
    }
    if let Some(path) = &options.pid_file {
        write_pid_file(path, launched.pid)?;
    }
    launch::answer(&launched.sync)?;
    match launch::hear(&launched.sync, ops)? {
        Heard::Closed => Ok(()),
        _ => Err(RuntimeError::Child("unexpected message at the start".to_owned())),
    }
}

fn exec_ops(
    process: &Process,
    state: &State,
    enter: Vec<Op>,
    user_namespace: bool,
    keep_groups: bool,
    rest: Vec<Op>,
) -> Result<Vec<Op>, RuntimeError> {
    let mut ops = Vec::new();
    if let Some(value) = process.oom_score_adj {
        ops.push(Op::OomScoreAdj { value });
    }
    if let Some(affinity) = &process.exec_cpu_affinity {
        ops.extend(lower_affinity("process.execCPUAffinity.initial", affinity.initial.as_deref())?);
    }
    ops.push(Op::JoinCgroup);
    if process.exec_cpu_affinity.as_ref().is_none_or(|a| a.initial.is_none() && a.last.is_none()) {
        ops.push(Op::ResetAffinity);
    }
    ops.extend(enter);
    if user_namespace {
        ops.push(Op::BecomeRoot { keep_groups });
    }
    ops.extend([Op::NotDumpable, Op::NewSession]);
    if !state.no_new_keyring {
        ops.push(session_keyring(&state.id)?);
    }
    ops.push(Op::PrivateProcfs);
    if process.terminal {
        let size = process.console_size.unwrap_or_default();
        let user = &process.user;
        ops.push(Op::Console { bind: false, rows: size.height, columns: size.width, uid: user.uid });
    }
    ops.extend(rest);
    Ok(ops)
}

/// The namespaces of a container that waits for its start, but for those that are also this process's.
fn ask_namespaces(dir: &ContainerDir) -> Result<Vec<(NsKind, OwnedFd)>, RuntimeError> {
    let place = dir.open_fd()?;
    let told = || -> io::Result<Vec<(NsKind, OwnedFd)>> {
        let socket = socket::connect_at(&place, c"start.sock", libc::SOCK_SEQPACKET)?;
        socket::send(&socket, ASK_NAMESPACES)?;
        let mut found = Vec::new();
        let mut word = [0u8; 4];
        loop {
            let fd = match socket::recv_fd(&socket, &mut word)? {
                (_, Some(fd)) => fd,
                (n, None) if &word[..n] == ALL_TOLD => return Ok(found),
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            };
            let flag = process::namespace_type(&fd)?;
            let kind = NsKind::ALL.into_iter().find(|kind| kind.flag() == flag);
            let kind = kind.ok_or(io::ErrorKind::InvalidData)?;
            let theirs = file::fstat(&fd)?;
            let ours = fs::metadata(format!("/proc/self/ns/{}", kind.proc_name()))?;
            if (theirs.dev, theirs.ino) != (ours.dev(), ours.ino()) {
                found.push((kind, fd));
            }
        }
    };
    told().map_err(io_error("ask the container's process for its namespaces by", dir.file(START_SOCKET)))
}

/// Flags of the namespaces in which a process differs from this one.
fn foreign_namespaces(pid: i32) -> Result<i32, RuntimeError> {
    let mut flags = 0;
    for kind in NsKind::ALL {
        let identity = |who: &str| {
            let path = format!("/proc/{who}/ns/{}", kind.proc_name());
            match fs::metadata(&path) {
                Ok(meta) => Ok(Some((meta.dev(), meta.ino()))),
                // A kernel without this kind of namespace.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(io_error("read", path)(e)),
            }
        };
        if identity(&pid.to_string())? != identity("self")? {
            flags |= kind.flag();
        }
    }
    Ok(flags)
}

fn open_cgroup(
    state: &State,
    options: &ExecOptions,
    roots: &Roots,
) -> Result<(Vec<OwnedFd>, Option<OwnedFd>), RuntimeError> {
    let mut cgroup = state.cgroup();
    move_below(&mut cgroup, &parse_sub_cgroups(&options.sub_cgroups)?)?;
    let v2 = match options.sub_cgroups.is_empty() {
        false => cgroup.open_v2()?,
        true => cgroup.open_v2_beside(state.pid, roots)?,
    };
    Ok((cgroup.open_tasks()?, v2))
}

/// Controllers and the path for them, relative and clean; without controllers the path is for all of them.
pub(crate) fn parse_sub_cgroups(words: &[String]) -> Result<Vec<(Vec<&str>, String)>, RuntimeError> {
    let mut seen = Vec::new();
    let mut out = Vec::new();
    for word in words {
        let wrong = |why: &str| RuntimeError::Usage(format!("invalid --cgroup argument {word:?}: {why}"));
        let (controllers, path) = match word.split_once(':') {
            Some((controllers, path)) => (controllers.split(',').collect(), path),
            None if words.len() > 1 => return Err(wrong("one of several needs CONTROLLER: before the path")),
            None => (Vec::new(), word.as_str()),
        };
        for controller in &controllers {
            match controller.is_empty() || seen.contains(controller) {
                true => return Err(wrong("each controller is named once")),
                false => seen.push(controller),
            }
        }
        if path.contains('\0') || path.split('/').any(|part| part == "..") {
            return Err(RuntimeError::Usage(format!(
                "bad sub cgroup path {path:?}: it leads out of the container's"
            )));
        }
        let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        out.push((controllers, parts.join("/")));
    }
    Ok(out)
}

/// A hierarchy that is not named, or has no such cgroup while another has it, keeps the container's own.
fn move_below(cgroup: &mut Cgroup, subs: &[(Vec<&str>, String)]) -> Result<(), RuntimeError> {
    for (controllers, path) in subs {
        let known = |c: &&str| cgroup.entries.iter().any(|e| e.controllers.iter().any(|have| have == c));
        if let Some(unknown) = controllers.iter().find(|c| !known(c)) {
            return Err(RuntimeError::Usage(format!("unknown controller {unknown:?} in --cgroup")));
        }
        let mut found = path.is_empty();
        for entry in &mut cgroup.entries {
            let meant =
                controllers.is_empty() || entry.controllers.iter().any(|c| controllers.contains(&c.as_str()));
            let below = entry.dir.join(path);
            if meant && !path.is_empty() && below.is_dir() {
                entry.dir = below;
                found = true;
            }
        }
        if !found {
            let what = "error adding pid to the sub cgroup";
            let source = std::io::Error::from_raw_os_error(libc::ENOENT);
            return Err(RuntimeError::Io { what, path: path.into(), source });
        }
    }
    Ok(())
}

fn exec_process(spec: &Spec, options: &ExecOptions) -> Result<Process, RuntimeError> {
    if let Some(path) = &options.process {
        let text = read_config(path)?;
        let mut process: Process = serde_json::from_slice(&text)
            .map_err(|source| RuntimeError::Json { path: path.clone(), source })?;
        if process.exec_cpu_affinity.is_none() {
            process.exec_cpu_affinity = spec.process.as_ref().and_then(|p| p.exec_cpu_affinity.clone());
        }
        return Ok(process);
    }
    let mut process = spec.process.clone().unwrap_or_default();
    if options.args.is_empty() {
        return Err(RuntimeError::Usage("process args cannot be empty".to_owned()));
    }
    process.args = options.args.clone();
    process.terminal = options.tty;
    process.env.extend(options.env.iter().cloned());
    if let Some(cwd) = &options.cwd {
        process.cwd.clone_from(cwd);
    }
    if let Some((uid, gid)) = options.user {
        process.user.uid = uid;
        process.user.gid = gid.unwrap_or(process.user.gid);
    }
    process.user.additional_gids.extend(&options.additional_gids);
    if options.no_new_privs {
        process.no_new_privileges = true;
    }
    if let Some(label) = &options.apparmor {
        process.apparmor_profile = Some(label.clone());
    }
    if let Some(label) = &options.process_label {
        process.selinux_label = Some(label.clone());
    }
    add_capabilities(&mut process, &options.caps);
    Ok(process)
}

/// Added to all sets but the inheritable one, which a further process must never widen.
fn add_capabilities(process: &mut Process, caps: &[String]) {
    if caps.is_empty() {
        return;
    }
    let sets = process.capabilities.get_or_insert_with(Capabilities::default);
    for cap in caps {
        for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
            if !set.contains(cap) {
                set.push(cap.clone());
            }
        }
        if sets.inheritable.contains(cap) && !sets.ambient.contains(cap) {
            sets.ambient.push(cap.clone());
        }
    }
}

/// `UID` or `UID:GID`, decimal. Anything else is an error: a name must never become user 0.
pub fn parse_user(text: &str) -> Option<(u32, Option<u32>)> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
        text.parse::<u32>().ok().filter(|id| digits && *id != NO_ID)
    };
    match text.split_once(':') {
        None => Some((number(text)?, None)),
        Some((uid, gid)) => Some((number(uid)?, Some(number(gid)?))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_cgroups_stay_below_the_container() {
        let parse = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
            let parsed = parse_sub_cgroups(&words).ok()?;
            Some(
                parsed.into_iter().map(|(c, p)| format!("{}={p}", c.join("+"))).collect::<Vec<_>>().join(" "),
            )
        };
        for (words, want) in [
            (&["/"][..], Some("=")),
            (&["./a//b/"], Some("=a/b")),
            (&["memory:x", "cpu,cpuacct:/y"], Some("memory=x cpu+cpuacct=y")),
            (&[".."], None),
            (&["a/../../b"], None),
            (&["memory:../x"], None),
            (&[":x"], None),
            (&["a", "b"], None),
            (&["cpu:a", "cpu:b"], None),
        ] {
            assert_eq!(parse(words).as_deref(), want, "{words:?}");
        }
    }

    #[test]
    fn users_are_numbers_or_errors() {
        for (text, want) in [
            ("1", Some((1, None))),
            ("0:5", Some((0, Some(5)))),
            ("1000:1000", Some((1000, Some(1000)))),
            ("", None),
            (":", None),
            ("1:", None),
            (":1", None),
            ("root", None),
            ("-1", None),
            ("+1", None),
            ("1:2:3", None),
            ("4294967294", Some((4_294_967_294, None))),
            ("4294967295", None),
            ("0:4294967295", None),
            ("4294967296", None),
            (" 1", None),
        ] {
            assert_eq!(parse_user(text), want, "{text:?}");
        }
    }
}
