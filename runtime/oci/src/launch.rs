//! The parent's side of the clone: namespaces that must be joined before it, and the conversation until the child is
//! ready. Used for a container's first process and for those of `exec`.

use crate::child::{self, Fds, MESSAGE_BYTES, StateText, TEXT_BYTES, Word};
use crate::error::{RuntimeError, io_error, sys_error};
use crate::op::{Failure, NsKind, Op, Step};
use keel_sys::{file, mount, process, socket};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

pub(crate) struct Launch<'a> {
    pub(crate) ops: &'a [Op],
    pub(crate) fds: Fds,
    pub(crate) clone_flags: u64,
    /// A user namespace that the clone happens in. Nobody comes back from there, so a process in between goes.
    pub(crate) user_join: Option<OwnedFd>,
    /// Namespaces that take effect only for children: joined around the clone.
    pub(crate) parent_joins: Vec<(NsKind, OwnedFd)>,
    pub(crate) time_offsets: Option<String>,
    /// The cgroup v2 directory to be cloned into.
    pub(crate) cgroup: Option<OwnedFd>,
    pub(crate) state: StateText,
}

pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) sync: OwnedFd,
    /// Of the user namespaces whose maps are lent to mounts.
    idmaps: Vec<OwnedFd>,
}

/// Clones the child, which begins with its operations at once.
pub(crate) fn launch(mut launch: Launch<'_>) -> Result<Launched, RuntimeError> {
    let (ours, theirs) = socket::pair().map_err(sys_error("make a socket pair"))?;
    launch.fds.sync = Some(theirs);
    let texts = texts_after_ready(launch.ops);
    if let Some(user) = &launch.user_join {
        let mut launched = launch_within(&launch, user, &texts, ours)?;
        launched.idmaps = std::mem::take(&mut launch.fds.idmaps);
        return Ok(launched);
    }
    let mut back = Vec::new();
    if launch.clone_flags & libc::CLONE_NEWUSER as u64 != 0 {
        back = join_early(&launch)?;
    }
    back.extend(enter(&launch, &[])?);
    let cloned = child::fork(launch.clone_flags, launch.cgroup.as_ref().map(|c| c.as_fd()), ours, |ours| {
        // It would keep the conversation open in the child.
        drop(ours);
        child::run(launch.ops, &texts, &launch.fds, &launch.state)
    });
    for fd in back {
        process::setns(&fd, 0).map_err(sys_error("return to the own namespace"))?;
    }
    let (pid, pidfd, sync) = cloned.map_err(sys_error("clone"))?;
    Ok(Launched { pid, pidfd, sync, idmaps: std::mem::take(&mut launch.fds.idmaps) })
}

/// The end of a process in between: a number (what it made, or an error's) and the step that it came to. Allocates nothing.
fn tell_and_exit(tell: &OwnedFd, number: i32, step: u32) -> ! {
    let mut told = [0u8; 8];
    told[..4].copy_from_slice(&number.to_ne_bytes());
    told[4..].copy_from_slice(&step.to_ne_bytes());
    let _ = file::write_once(tell, &told);
    process::exit_now(0)
}

/// What it told; `None` when it died before.
fn hear_end(answer: &OwnedFd, pid: i32) -> Result<Option<(i32, u32)>, RuntimeError> {
    let mut told = [0u8; 8];
    let read = file::read(answer, &mut told);
    let _ = process::wait_pid(pid);
    let whole = read.map_err(sys_error("read from the process in between"))? == told.len();
    let [a, b, c, d, e, f, g, h] = told;
    Ok(whole.then(|| (i32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))))
}

/// The steps of the process in between, as it tells them.
const STEPS: [&str; 4] =
    ["forbid tracing", "join the user namespace", "enter namespaces inside the user namespace", "clone"];

/// Clones a sibling of the child-to-be that joins the user namespace and clones the child as ours.
fn launch_within(
    launch: &Launch<'_>,
    user: &OwnedFd,
    texts: &[Vec<u8>],
    ours: OwnedFd,
) -> Result<Launched, RuntimeError> {
    let (answer, tell) = file::pipe().map_err(sys_error("make a pipe"))?;
    let cloned = child::fork(0, None, (answer, tell, ours), |(answer, tell, ours)| {
        drop((answer, ours));
        let mut step = 0u32;
        let mut go = || {
            // Processes of that namespace may trace whoever has joined it.
            process::set_dumpable(false)?;
            step = 1;
            join_early(launch).map_err(source_of)?;
            let early =
                |(kind, fd): &(NsKind, OwnedFd)| process::setns(fd, kind.flag()).is_ok().then_some(*kind);
            let early: Vec<NsKind> = launch.parent_joins.iter().filter_map(early).collect();
            process::setns(user, NsKind::User.flag())?;
            step = 2;
            enter(launch, &early).map_err(source_of)?;
            step = 3;
            let flags = launch.clone_flags | libc::CLONE_PARENT as u64;
            let cgroup = launch.cgroup.as_ref().map(|c| c.as_fd());
            child::fork(flags, cgroup, (), |()| child::run(launch.ops, texts, &launch.fds, &launch.state))
        };
        let number = go().map_or_else(|e| -keel_sys::errno(&e), |(pid, ..)| pid);
        tell_and_exit(&tell, number, step)
    });
    let (between, _, (answer, tell, sync)) = cloned.map_err(sys_error("clone"))?;
    drop(tell);
    let (number, step) = hear_end(&answer, between)?.unwrap_or_default();
    if number <= 0 {
        let what = STEPS.get(step as usize).copied().unwrap_or("clone");
        return Err(sys_error(what)(std::io::Error::from_raw_os_error(-number)));
    }
    // It is our child and not waited for, so the number is still its own.
    let pidfd = process::pidfd_open(number).map_err(sys_error("open the container's process"))?;
    Ok(Launched { pid: number, pidfd, sync, idmaps: Vec::new() })
}

fn source_of(error: RuntimeError) -> std::io::Error {
    match error {
        RuntimeError::Sys { source, .. } => source,
        _ => std::io::ErrorKind::Other.into(),
    }
}

fn own(kind: NsKind) -> Result<OwnedFd, RuntimeError> {
    let open = || {
        let path = file::c_path(format!("/proc/self/ns/{}", kind.proc_name()))?;
        file::openat(file::cwd(), &path, libc::O_RDONLY, 0)
    };
    open().map_err(sys_error("open the own namespace"))
}

/// Joins namespaces that a user namespace to come need not own, while the right to it is still there. Those that only it
/// owns are left for later. The result is the way back.
fn join_early(launch: &Launch<'_>) -> Result<Vec<OwnedFd>, RuntimeError> {
    let mut back = Vec::new();
    for fd in &launch.fds.namespaces {
        let kind = process::namespace_type(fd).map_err(sys_error("ask for the kind of a namespace"))?;
        let kind = NsKind::ALL.into_iter().find(|k| k.flag() == kind);
        // The mount namespace changes paths, and comes last.
        let Some(kind) = kind.filter(|k| *k != NsKind::Mount) else { continue };
        let own = own(kind)?;
        if process::setns(fd, kind.flag()).is_ok() {
            back.push(own);
        }
    }
    Ok(back)
}

/// Joins the namespaces for children; the result is the way back.
fn enter(launch: &Launch<'_>, done: &[NsKind]) -> Result<Vec<OwnedFd>, RuntimeError> {
    let mut back = Vec::new();
    for (kind, fd) in launch.parent_joins.iter().filter(|(kind, _)| !done.contains(kind)) {
        back.push(own(*kind)?);
        process::setns(fd, kind.flag()).map_err(|source| RuntimeError::Sys {
            what: if *kind == NsKind::Pid { "join the pid namespace" } else { "join the time namespace" },
            source,
        })?;
    }
    if let Some(offsets) = &launch.time_offsets {
        back.push(own(NsKind::Time)?);
        process::unshare(NsKind::Time.flag()).map_err(sys_error("make a time namespace"))?;
        if !offsets.is_empty() {
            fs::write("/proc/self/timens_offsets", offsets).map_err(sys_error("write the time offsets"))?;
        }
    }
    Ok(back)
}

/// For operations after the readiness: their failures are told to a `start` command that does not have the list.
fn texts_after_ready(ops: &[Op]) -> Vec<Vec<u8>> {
    let ready = ops.iter().position(|op| matches!(op, Op::Ready)).unwrap_or(ops.len());
    ops.iter()
        .enumerate()
        .map(|(i, op)| if i <= ready { Vec::new() } else { op.describe().into_bytes() })
        .collect()
}

/// One message of the child.
pub(crate) enum Heard {
    Word(Word),
    /// The source of this operation is wanted.
    Source(usize),
    /// The socket was closed: by the exec or by the process's death.
    Closed,
}

pub(crate) fn hear(sync: &OwnedFd, ops: &[Op]) -> Result<Heard, RuntimeError> {
    let mut buffer = [0u8; MESSAGE_BYTES + TEXT_BYTES];
    let n = match socket::recv(sync, &mut buffer) {
        Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => 0,
        other => other.map_err(sys_error("read from the container's process"))?,
    };
    if n == 0 {
        return Ok(Heard::Closed);
    }
    match child::decode(&buffer[..n]) {
        Some((Word::Failed, op, failure)) => {
            let text = ops.get(op as usize).map(|op| op.explain(failure));
            let text = text.unwrap_or_else(|| keel_sys::errno_text(failure.errno));
            Err(RuntimeError::Child(text + &hook_said(&buffer[MESSAGE_BYTES..n]).1))
        }
        Some((Word::WantSource, op, _)) => Ok(Heard::Source(op as usize)),
        Some((word, _, _)) => Ok(Heard::Word(word)),
        None => Err(RuntimeError::Child("unreadable message from the container's process".to_owned())),
    }
}

/// A device node for the root of a user namespace, in a file system of its own that nothing else shows.
fn make_device(op: &Op, owner: (u32, u32), step: &mut Step) -> std::io::Result<OwnedFd> {
    let Op::DeviceNode { mode, major, minor, .. } = op else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    *step = Step::Create;
    process::unshare(NsKind::Mount.flag())?;
    let private = mount::Attr { propagation: libc::MS_PRIVATE, ..mount::Attr::default() };
    mount::set_attr_at(file::cwd(), c"/", &private, true)?;
    let made = mount::fsmount(&mount::fsopen(c"tmpfs")?, 0)?;
    let place = file::openat(file::cwd(), c"/dev", libc::O_PATH | libc::O_DIRECTORY, 0)?;
    mount::attach(&made, &place)?;
    file::mknodat(&made, c"node", *mode, *major, *minor)?;
    file::fchownat(&made, c"node", owner.0, owner.1, libc::AT_SYMLINK_NOFOLLOW)?;
    file::fchmodat(&made, c"node", mode & 0o7777)?;
    mount::clone_tree(&made, c"node", false, false)
}

/// What an id of the child's user namespace is here, by the text of its map.
fn mapped(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (inside, outside, count) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        id.checked_sub(inside).filter(|n| *n < count).and_then(|n| outside.checked_add(n))
    })
}

fn owner(launched: &Launched, op: &Op) -> Result<(u32, u32), RuntimeError> {
    let Op::DeviceNode { uid, gid, .. } = op else { return Ok((0, 0)) };
    let read = |name: &str, id: u32| {
        let path = format!("/proc/{}/{name}", launched.pid);
        let map = fs::read_to_string(&path).map_err(io_error("read", path))?;
        mapped(&map, id)
            .ok_or_else(|| RuntimeError::Usage(format!("{}: {id} has no place in its {name}", op.describe())))
    };
    Ok((read("uid_map", *uid)?, read("gid_map", *gid)?))
}

fn clone_source(
    launched: &Launched,
    op: &Op,
    namespace: &OwnedFd,
    step: &mut Step,
) -> std::io::Result<OwnedFd> {
    process::setns(namespace, NsKind::Mount.flag())?;
    if let Op::BindRoot { path, .. } = op {
        return file::openat(file::cwd(), path, libc::O_PATH | libc::O_DIRECTORY, 0);
    }
    let Op::Bind { source, recursive, follow, idmap, .. } = op else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let tree = mount::clone_tree(file::cwd(), source, *recursive, *follow)?;
    if let Some((slot, recursive)) = idmap {
        *step = Step::SetAttr;
        let maps = launched.idmaps.get(*slot).ok_or(std::io::ErrorKind::NotFound)?;
        mount::set_attr(&tree, &mount::Attr::idmap(maps), *recursive)?;
    }
    Ok(tree)
}

/// Makes a mount that the child may not make: a clone in its mount namespace or a device, with the rights of this process.
pub(crate) fn send_source(launched: &Launched, op: &Op) -> Result<(), RuntimeError> {
    let owner = owner(launched, op)?;
    let path = format!("/proc/{}/ns/mnt", launched.pid);
    let failed = |step: Step, errno: i32| RuntimeError::Child(op.explain(Failure { step, errno, detail: 0 }));
    let open = || file::openat(file::cwd(), &file::c_path(&path)?, libc::O_RDONLY, 0);
    // Without the right to it this process cannot do more than the child, which was refused.
    let namespace = open().map_err(|_| failed(Step::OpenSource, libc::EACCES))?;
    let (answer, tell) = file::pipe().map_err(sys_error("make a pipe"))?;
    let cloned = child::fork(0, None, tell, |tell| {
        let mut step = Step::OpenSource;
        let mut go = || {
            let tree = match op {
                Op::DeviceNode { .. } => make_device(op, owner, &mut step)?,
                _ => clone_source(launched, op, &namespace, &mut step)?,
            };
            step = Step::Send;
            socket::send_fd(&launched.sync, b"go", &tree)
        };
        let errno = go().map_or_else(|e| keel_sys::errno(&e), |()| 0);
        tell_and_exit(&tell, errno, step as u32)
    });
    let (pid, _, tell) = cloned.map_err(sys_error("clone"))?;
    drop(tell);
    match hear_end(&answer, pid)? {
        Some((0, _)) => Ok(()),
        Some((errno, step)) => Err(failed(Step::from_number(step), errno)),
        None => Err(failed(Step::OpenSource, libc::EIO)),
    }
}

/// The answer of a child to a `start` command: `None` when the program runs.
pub(crate) fn hear_start(socket: &OwnedFd) -> Result<Option<String>, RuntimeError> {
    let mut buffer = [0u8; MESSAGE_BYTES + TEXT_BYTES];
    // A reset instead of an end: the process never took the word, another `start` was first.
    let n = socket::recv(socket, &mut buffer).map_err(sys_error("read from the container's process"))?;
    let Some((Word::Failed, _, failure)) = child::decode(&buffer[..n]) else { return Ok(None) };
    let (what, said) = hook_said(&buffer[MESSAGE_BYTES..n]);
    Ok(Some(match failure.step {
        crate::op::Step::ExitCode => format!("{what}: exit status {}{said}", failure.detail),
        crate::op::Step::Killed => format!("{what}: killed by signal {}", failure.detail),
        crate::op::Step::Timeout => format!("{what}: timed out"),
        crate::op::Step::NotFound => format!("{what}: executable file not found in $PATH"),
        _ => format!("{what}: {}", keel_sys::errno_text(failure.errno)),
    }))
}

/// A description, and what a hook said as the end of a message.
fn hook_said(text: &[u8]) -> (String, String) {
    let mut parts = text.splitn(2, |b| *b == 0).map(String::from_utf8_lossy);
    let what = parts.next().unwrap_or_default().into_owned();
    let said = parts.next().filter(|s| !s.is_empty()).map(|s| format!(": {s}"));
    (what, said.unwrap_or_default())
}

pub(crate) fn answer(sync: &OwnedFd) -> Result<(), RuntimeError> {
    socket::send(sync, b"go").map_err(sys_error("answer the container's process"))
}

/// How a child that closed its socket ended; it is waited for.
pub(crate) fn obituary(pid: i32) -> String {
    match process::wait_pid(pid) {
        Ok(process::Exit::Code(code)) => format!("exit status {code}"),
        Ok(process::Exit::Signal(signal)) => format!("killed by signal {signal}"),
        Err(_) => "it is gone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::mapped;

    #[test]
    fn ids_are_found_in_maps() {
        let map = "         0     100000      10\n        10          5          1\n";
        assert_eq!([0, 9, 10, 11].map(|id| mapped(map, id)), [Some(100_000), Some(100_009), Some(5), None]);
        assert_eq!(mapped("", 0), None);
    }
}
