//! From conmon's command line to a container (or a command in one) and a monitor in the hold phase.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use keel_sys::epoll::Epoll;
use keel_sys::file::{fchmod, pipe, set_nonblocking};
use keel_sys::monitor::{die_with_parent, null_standard_streams};
use keel_sys::process::{set_name, set_subreaper, setsid, umask};
use keel_sys::{seqpacket, tty};

use super::cli::{Drivers, Options};
use super::hold::{Handed, highest_descriptor};
use super::{HOLD, LISTEN, SETUP, parent, say};
use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::log;
use crate::notify;
use crate::runtime::{await_end, read_now, read_pid};
use crate::setup::{Access, BACKLOG, Console, SELF, make_fifo, open};

pub(super) const ATTACH: &str = "attach";
const CONTROL: &str = "ctl";
const WINDOW: &str = "winsz";
/// The caller is bound by its own patience; this only keeps a runtime that hangs from being waited for for ever.
const CREATE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
const SOCKET_MODE: u32 = 0o700;
const FIFO_MODE: u32 = 0o660;
/// Programs open `/dev/stdout` anew, as the container's user.
const STREAM_MODE: u32 = 0o777;
const UMASK: u32 = 0o022;
const LISTEN_PID: &str = "LISTEN_PID";
/// With a link of this length in its way, an attach socket's path would just not fit in a socket address.
const FULL_ADDRESS: usize = 107;

/// The first process.
pub(super) fn launch(options: &Options, words: &[OsString]) -> ExitCode {
    let begun = prepare(options).and_then(|start| match options.sync {
        true => Ok(monitor(options, words, start)),
        false => background(options, words, start),
    });
    begun.unwrap_or_else(|e| {
        say(options, &e);
        ExitCode::FAILURE
    })
}

/// The second process.
pub(super) fn run(options: &Options, words: &[OsString]) -> ExitCode {
    match if options.attach { parent::take(parent::START) } else { Ok(None) } {
        Ok(start) => monitor(options, words, start),
        Err(e) => {
            say(options, &e);
            ExitCode::FAILURE
        }
    }
}

/// Everything that the caller can still be told by exit code and stderr. Returns the start pipe if it has one more use.
fn prepare(options: &Options) -> Result<Option<OwnedFd>, Error> {
    let drivers = options.check()?;
    umask(UMASK);
    if let Some(file) = &drivers.file {
        let mut how = File::options();
        how.append(true).create(true).mode(log::MODE).open(file).at("Failed to open log file", file)?;
    }
    if options.no_partial && !drivers.journal {
        eprintln!("conmon: --no-container-partial-message has no effect without journald log driver");
    }
    let start = parent::take(parent::START)?;
    if let Some(start) = &start {
        parent::wait_for_start(start)?;
    }
    Ok(start.filter(|_| options.attach))
}

fn background(options: &Options, words: &[OsString], start: Option<OwnedFd>) -> Result<ExitCode, Error> {
    start.map(parent::leave_open).transpose()?;
    let mut command = Command::new(SELF);
    command.arg0("conmon").arg(SETUP).args(words);
    let child = command.spawn().doing("start the monitor")?;
    if let Some(file) = &options.conmon_pid_file {
        crate::process::replace(file, child.id().to_string().as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Sets everything up and becomes the hold phase.
fn monitor(options: &Options, words: &[OsString], start: Option<OwnedFd>) -> ExitCode {
    if options.sync
        && let Some(file) = &options.conmon_pid_file
    {
        // Who does not fork has nobody else to write it.
        let _ = crate::process::replace(file, std::process::id().to_string().as_bytes());
    }
    let mut sync = None;
    let handed = begin(options, start, &mut sync);
    let handed = handed.and_then(|handed| Handed { sync: sync.take(), ..handed }.encode());
    match handed {
        Ok(handed) => {
            let mut command = Command::new(SELF);
            command.arg0("conmon").arg(HOLD).args(&handed).args(words);
            say(options, &Error::new(format!("become the monitor: {}", command.exec())));
            ExitCode::FAILURE
        }
        Err(Failure { error, message, began }) => {
            say(options, &error);
            if let Some(sync) = &sync {
                parent::tell(options, sync, -1, Some(&message));
            }
            if began {
                run_exit_command(options);
            }
            ExitCode::FAILURE
        }
    }
}

/// Why there is no container.
pub(super) struct Failure {
    error: Error,
    /// For the caller: the runtime's own words if it had any.
    message: String,
    /// The runtime was called, so there may be something to clean up.
    began: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { message: error.to_string(), error, began: false }
    }
}

fn begin(options: &Options, start: Option<OwnedFd>, sync: &mut Option<OwnedFd>) -> Result<Handed, Failure> {
    umask(UMASK);
    let drivers = options.drivers()?;
    let bundle = options.bundle();
    let notify = match (&options.notify_socket, &bundle) {
        (Some(_), Some(bundle)) => Some(notify::listen(bundle)?.into()),
        _ => None,
    };
    *sync = parent::take(parent::SYNC)?;
    let attach_pipe = if options.attach { parent::take(parent::ATTACH)? } else { None };
    if options.attach && attach_pipe.is_none() {
        return Err(Error::new("--attach specified but _OCI_ATTACHPIPE was not").into());
    }
    if !drivers.passthrough {
        // The caller waits for the end of our output.
        null_standard_streams().doing("leave the caller's streams")?;
    }
    // Fails for a session leader, which is one already.
    let _ = setsid();
    set_subreaper(true).doing("become the container's reaper")?;
    let _ = set_name(c"conmon");
    let mut handed = Handed { notify, ..Handed::default() };
    if let Some(bundle) = bundle.as_ref().filter(|_| !drivers.passthrough) {
        handed.attach = Some(listen_for_clients(options, bundle)?);
        for (name, slot) in [(CONTROL, &mut handed.control), (WINDOW, &mut handed.window)] {
            make_fifo(bundle, name, FIFO_MODE)?;
            // Its own writer, so that it never ends.
            let file = open(bundle, name, Access::Both)?;
            set_nonblocking(&file, true).doing("make a FIFO non-blocking")?;
            *slot = Some(file.into());
        }
    }
    if let Some(pipe) = attach_pipe {
        parent::tell(options, &pipe, 0, None);
    }
    if let Some(start) = start {
        // Output that comes before the caller has attached would be lost to it.
        parent::wait_for_start(&start)?;
    }
    let mut streams = Streams::default();
    let created = create(options, &drivers, bundle.as_deref(), &mut streams);
    let pid = created.map_err(|failure| Failure { began: true, ..failure })?;
    if drivers.passthrough {
        null_standard_streams().doing("leave the container's streams")?;
    }
    if (options.api || !options.exec)
        && let Some(sync) = sync
    {
        parent::tell(options, sync, i64::from(pid), None);
    }
    handed.pid = pid;
    handed.cgroup = Cgroup::of(pid).unwrap_or_default();
    handed.highest = highest_descriptor();
    Ok(Handed { stdin: streams.stdin, stdout: streams.stdout, stderr: streams.stderr, ..handed })
}

/// Our ends.
#[derive(Default)]
struct Streams {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

fn create(
    options: &Options,
    drivers: &Drivers,
    bundle: Option<&Path>,
    streams: &mut Streams,
) -> Result<i32, Failure> {
    let pid_file = options.pid_file();
    if fs::symlink_metadata(&pid_file).is_ok_and(|meta| meta.is_file()) {
        // An old one would be taken for the new process's.
        let _ = fs::remove_file(&pid_file);
    }
    let mut command = runtime_command(options, bundle, &pid_file);
    die_with_parent(&mut command);
    if !drivers.passthrough {
        connect(&mut command, options, streams)?;
    }
    let deadline = Instant::now() + CREATE_TIMEOUT;
    let status = if options.terminal {
        with_console(command, options, bundle, deadline, streams)?
    } else {
        let child = spawn(command, options)?;
        await_end(child, deadline, None, |_| Ok(()))?
    };
    // A command may have ended before the runtime, which then passes its status on.
    if !options.exec && !status.is_some_and(|status| status.success()) {
        let how = status.map_or("was killed".to_owned(), |status| status.to_string());
        let error = Error::new(format!("Failed to create container: {how}"));
        return Err(explained(error, streams));
    }
    let pid = read_pid(&pid_file).map_err(|error| explained(error, streams))?;
    if options.terminal && streams.stdout.is_none() {
        return Err(Error::new("Runtime did not set up terminal").into());
    }
    Ok(pid)
}

/// With what the runtime said on the stream that is now the container's.
fn explained(error: Error, streams: &mut Streams) -> Failure {
    let said = streams.stderr.take().and_then(|stderr| read_now(&mut File::from(stderr)));
    let message = said.unwrap_or_else(|| error.to_string());
    Failure { error: Error::new(format!("{error}: {message}")), message, began: true }
}

fn spawn(mut command: Command, options: &Options) -> Result<Child, Error> {
    // Dropping the command closes the container's ends, or end of file would never come.
    command.spawn().doing(&format!("run {}", options.runtime.display()))
}

/// Pipes between the container and us.
fn connect(command: &mut Command, options: &Options, streams: &mut Streams) -> Result<(), Error> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let pair = || {
        let (reader, writer) = pipe().doing("create a pipe")?;
        fchmod(&writer, STREAM_MODE).doing("open a pipe to the container's users")?;
        Ok::<_, Error>((reader, writer))
    };
    let ours = |end: OwnedFd| {
        set_nonblocking(&end, true).doing("make a pipe non-blocking")?;
        Ok::<_, Error>(Some(end))
    };
    if options.stdin && !options.terminal {
        let (theirs, end) = pair()?;
        command.stdin(theirs);
        streams.stdin = ours(end)?;
    }
    if !options.terminal {
        let (end, theirs) = pair()?;
        command.stdout(theirs);
        streams.stdout = ours(end)?;
    }
    // With a terminal too: the runtime may have something to say.
    let (end, theirs) = pair()?;
    command.stderr(theirs);
    streams.stderr = ours(end)?;
    Ok(())
}

fn with_console(
    mut command: Command,
    options: &Options,
    bundle: Option<&Path>,
    deadline: Instant,
    streams: &mut Streams,
) -> Result<Option<ExitStatus>, Error> {
    let dir = bundle.map_or_else(std::env::temp_dir, Path::to_path_buf);
    let name = format!("console-{}.sock", std::process::id());
    let listener = seqpacket::listen_stream(&dir, &name, 1).at("listen on", &dir.join(&name))?;
    let opened = File::open(&dir).at("open", &dir)?;
    // Socket paths end at 107 bytes, the directory's may be longer.
    let short = format!("/proc/{}/fd/{}/{name}", std::process::id(), opened.as_raw_fd());
    command.arg("--console-socket").arg(short).arg(&options.cid);
    let mut console = Console::new(&listener);
    let done = spawn(command, options)
        .and_then(|child| await_end(child, deadline, Some(&listener), |epoll| console.progress(epoll)));
    // The runtime may have ended before we looked.
    for _ in 0..2 {
        let _ = console.progress(&Epoll::new().doing("create epoll")?);
    }
    let _ = fs::remove_file(dir.join(&name));
    if let Some(master) = console.master {
        set_nonblocking(&master, true).doing("make the terminal non-blocking")?;
        // Fails for a terminal that is gone already.
        let _ = tty::set_onlcr(&master);
        streams.stdout = Some(master);
    }
    done
}

/// Everything but the id, which comes last, and after the console socket if there is one.
fn runtime_command(options: &Options, bundle: Option<&Path>, pid_file: &Path) -> Command {
    let ours = std::env::var(LISTEN_PID).ok();
    let replaced =
        ours.as_ref().is_some_and(|pid| options.replace_listen_pid || *pid == std::process::id().to_string());
    let mut command = if replaced {
        let mut command = Command::new(SELF);
        command.arg(LISTEN).arg(&options.runtime);
        command
    } else {
        Command::new(&options.runtime)
    };
    if options.systemd_cgroup && !options.exec {
        command.arg("--systemd-cgroup");
    }
    command.args(&options.runtime_args);
    let bundle = bundle.unwrap_or(Path::new("."));
    if options.exec {
        command.arg("exec").arg("--pid-file").arg(pid_file);
        command.args(options.process.iter().flat_map(|file| [OsStr::new("--process"), file.as_os_str()]));
        command.arg("--detach");
    } else {
        command.arg(if options.restore.is_some() { "restore" } else { "create" });
        command.arg("--bundle").arg(bundle).arg("--pid-file").arg(pid_file);
        let flags = [(options.no_pivot, "--no-pivot"), (options.no_new_keyring, "--no-new-keyring")];
        command.args(flags.into_iter().filter_map(|(on, flag)| on.then_some(flag)));
        if let Some(image) = &options.restore {
            command.arg("--detach").arg("--image-path").arg(image).arg("--work-path").arg(bundle);
        }
    }
    command.args(&options.runtime_opts);
    if !options.terminal {
        command.arg(&options.cid);
    }
    command
}

/// The runtime's process, not yet the runtime: only it knows the pid that inherited sockets are meant for.
pub(super) fn become_runtime(words: &[OsString]) -> ExitCode {
    let Some((runtime, arguments)) = words.split_first() else { return ExitCode::FAILURE };
    let pid = std::process::id().to_string();
    let error = Command::new(runtime).args(arguments).env(LISTEN_PID, pid).exec();
    eprintln!("conmon: run {}: {error}", Path::new(runtime).display());
    ExitCode::FAILURE
}

fn listen_for_clients(options: &Options, bundle: &Path) -> Result<OwnedFd, Error> {
    if let Some(link) = socket_link(options) {
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(bundle, &link).at("create link", &link)?;
    }
    let path = bundle.join(ATTACH);
    let listener = seqpacket::listen(bundle, ATTACH, BACKLOG).at("listen on", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(SOCKET_MODE)).at("set the mode of", &path)?;
    Ok(listener)
}

/// A short way to the attach socket, for callers that do not ask for the long one.
pub(super) fn socket_link(options: &Options) -> Option<PathBuf> {
    if options.full_attach {
        return None;
    }
    let link = options.socket_dir().join(options.uuid()).into_os_string();
    Some(if link.len() == FULL_ADDRESS {
        OsStr::from_bytes(&link.as_bytes()[..FULL_ADDRESS - 1]).into()
    } else {
        link.into()
    })
}

/// What the hold phase does when there was something to hold.
fn run_exit_command(options: &Options) {
    std::thread::sleep(Duration::from_secs(u64::try_from(options.exit_delay).unwrap_or(0)));
    // What it starts in the background is not ours to wait for.
    let _ = set_subreaper(false);
    if let Some(mut command) = exit_command(options) {
        let _ = command.status();
    }
}

pub(super) fn exit_command(options: &Options) -> Option<Command> {
    let mut command = Command::new(options.exit_command.as_ref()?);
    command.args(&options.exit_args);
    Some(command)
}

pub(super) fn spawn_exit_command(options: &Options) -> Result<i32, Error> {
    let mut command = exit_command(options).ok_or_else(|| Error::new("there is no exit command"))?;
    // The monitor uses these numbers itself.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().at("run", Path::new(command.get_program()))?;
    i32::try_from(child.id()).map_err(|_| Error::new("a process has a number beyond all bounds"))
}
