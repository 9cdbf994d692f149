//! From a command line to a running container and a monitor in the hold phase.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use keel_proto::file;
use keel_sys::epoll::{Epoll, IN};
use keel_sys::file::{c_path, cwd, fchmod, mknodat, set_cloexec, set_nonblocking};
use keel_sys::monitor::{null_standard_streams, take_inherited};
use keel_sys::process::{close_range_cloexec, pidfd_open, set_name, set_subreaper, setsid};
use keel_sys::seqpacket;

use crate::args::{Inherited, Options};
use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::hold::{self, now_ms};
use crate::log::{Limits, Log};
use crate::memory::Memory;
use crate::notify;
use crate::process::{Identity, replace};
use crate::runtime::{CREATE_TIMEOUT, Runtime, read_pid};
use crate::sockets::{self, Held};

/// This very program, even if its name is another one's by now.
pub(crate) const SELF: &str = "/proc/self/exe";
const NONBLOCK: i32 = 0o4000;
const FIFO: u32 = 0o010_000;
/// Programs open `/dev/stdout` anew, as the container's user, and need write permission for that. Nobody else gets so
/// far: the directory is closed.
const OUTPUT_MODE: u32 = 0o622;
const INPUT_MODE: u32 = 0o644;
/// Clients that connect while the shim is busy for a moment.
pub(crate) const BACKLOG: i32 = 16;
const CONSOLE: &str = "console.sock";

/// Runs this program again in a process that outlives this one, and passes on its one-line report.
pub(crate) fn launch(words: &[OsString], dir: &Path) -> Result<ExitCode, Error> {
    let verb = if words[0] == *"run" { "setup" } else { "setup-adopt" };
    let mut child = Command::new(SELF)
        .arg(verb)
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .doing("start the monitor")?;
    let mut report = String::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_string(&mut report).doing("read the monitor's report")?;
    }
    let Some(line) = report.lines().next() else {
        return Err(Error::new(format!("the monitor for {} died during set-up", dir.display())));
    };
    let _ = writeln!(io::stdout(), "{line}");
    Ok(if line.starts_with("ok ") { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The second process: reports on stdout, then becomes the hold phase.
pub(crate) fn run(options: Options) -> ExitCode {
    match start(options) {
        Ok((memory, fds)) => become_hold(&memory, &fds),
        Err(e) => {
            println!("error {}", e.one_line());
            ExitCode::FAILURE
        }
    }
}

/// What the hold phase works with.
pub(crate) struct Descriptors {
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) listener: OwnedFd,
    pub(crate) stdin: Option<OwnedFd>,
    /// Read ends of the FIFOs; with a terminal, stdout is its master.
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) notify: Option<OwnedFd>,
    pub(crate) sockets: Vec<OwnedFd>,
}

/// Reports success and executes the hold phase in this process.
pub(crate) fn become_hold(memory: &Memory, fds: &Descriptors) -> ExitCode {
    println!("ok {}", memory.container.pid);
    let _ = io::stdout().flush();
    // From here on there is nobody to tell; what can still fail leaves the container running and adoptable.
    let _ = null_standard_streams();
    let inherited = pass_on(&memory.options.dir, fds);
    execute_hold(Path::new(SELF), &inherited);
    // Only when this very program cannot be executed any more: hold in the memory of set-up rather than not at all.
    match hold::run(&inherited) {
        Ok(code) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Marks the descriptors to survive `execve` and names them by number.
fn pass_on(dir: &Path, fds: &Descriptors) -> Inherited {
    let number = |fd: &Option<OwnedFd>| {
        let fd = fd.as_ref()?;
        set_cloexec(fd, false).ok()?;
        Some(fd.as_raw_fd())
    };
    let _ = set_cloexec(&fds.listener, false);
    Inherited {
        dir: dir.to_owned(),
        pidfd: number(&fds.pidfd),
        listener: Some(fds.listener.as_raw_fd()),
        stdin: number(&fds.stdin),
        stdout: number(&fds.stdout),
        stderr: number(&fds.stderr),
        notify: number(&fds.notify),
        helper: false,
        sockets: fds
            .sockets
            .iter()
            .filter_map(|fd| set_cloexec(fd, false).ok().map(|()| fd.as_raw_fd()))
            .collect(),
    }
}

/// Returns only if it fails.
pub(crate) fn execute_hold(program: &Path, inherited: &Inherited) -> io::Error {
    // The environment is of no use to a monitor and may hold secrets of whoever started it.
    Command::new(program).arg0("keel-shim").args(inherited.to_words()).env_clear().exec()
}

/// Session, subreaper, working directory: what every monitor is.
pub(crate) fn detach() -> Result<(), Error> {
    setsid().doing("create a session")?;
    set_subreaper(true).doing("become the container's reaper")?;
    close_range_cloexec(3).doing("mark inherited descriptors")?;
    std::env::set_current_dir("/").doing("change to /")?;
    let _ = set_name(c"keel-shim");
    Ok(())
}

fn start(mut options: Options) -> Result<(Memory, Descriptors), Error> {
    make_absolute(&mut options)?;
    let given = (3..3 + i32::try_from(options.preserve_fds).unwrap_or(0)).map(take_inherited);
    let given: Vec<OwnedFd> = given.collect::<Result<_, _>>().doing("take the descriptors to preserve")?;
    detach()?;
    let dir = options.dir.clone();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).at("create", &dir)?;
    replace(&dir.join(file::SHIM_PID), Identity::current()?.to_line().as_bytes())?;
    for parent in
        [options.log.file.as_ref(), Some(&options.exit_file)].into_iter().flatten().filter_map(|p| p.parent())
    {
        fs::create_dir_all(parent).at("create", parent)?;
    }
    if let Some(log) = &options.log.file {
        // A log that cannot be written is found out before there is a container.
        Log::open(log, options.log.raw, Limits::of(&options.log)).reopen()?;
    }
    let listener =
        seqpacket::listen(&dir, file::CONTROL, BACKLOG).at("listen on", &dir.join(file::CONTROL))?;
    let started = create_and_start(&options, listener, given);
    if started.is_err() {
        Runtime::new(&options).delete_forced();
        remove_files(&options);
        for name in [file::STDIN, file::STDOUT, file::STDERR, file::PID, file::SHIM_PID, CONSOLE] {
            let _ = fs::remove_file(dir.join(name));
        }
        let _ = fs::remove_dir_all(dir.join(file::NOTIFY));
    }
    started
}

/// What is of no use without a shim. The pid files and the FIFOs stay: somebody may look at them just now.
pub(crate) fn remove_files(options: &Options) {
    Runtime::new(options).forget_output();
    for name in [file::CONTROL, file::MEMORY, file::PROGRESS] {
        let _ = fs::remove_file(options.dir.join(name));
    }
}

fn create_and_start(
    options: &Options,
    listener: OwnedFd,
    given: Vec<OwnedFd>,
) -> Result<(Memory, Descriptors), Error> {
    let dir = &options.dir;
    let runtime = Runtime::new(options);
    let notify = if options.notify { Some(listen_for_readiness(dir)?) } else { None };
    let held = sockets::obtain(options)?;
    let command = create_command(&runtime, options, &held, &given);
    sockets::inheritable(&held, &given, true)?;
    let created = match options.tty {
        true => create_with_terminal(&runtime, options, command),
        false => create(&runtime, options, command),
    };
    sockets::inheritable(&held, &given, false)?;
    drop(given);
    let (pid, stdio) = created?;
    let pidfd = pidfd_open(pid).doing("open pidfd of the container")?;
    let container = Identity::of(pid).doing("read identity of the container in /proc")?;
    replace(&dir.join(file::PID), container.to_line().as_bytes())?;
    let mut memory = Memory {
        options: options.clone(),
        container,
        cgroup: Cgroup::of(pid)?,
        held: held.names,
        ..Memory::default()
    };
    memory.save()?;
    runtime.start()?;
    memory.started_at_ms = now_ms();
    memory.save()?;
    runtime.forget_output();
    let fds = Descriptors {
        pidfd: Some(pidfd),
        listener,
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        notify,
        sockets: held.fds,
    };
    Ok((memory, fds))
}

fn listen_for_readiness(dir: &Path) -> Result<OwnedFd, Error> {
    let notify = dir.join(file::NOTIFY);
    // For everybody in the container; nobody else gets to it.
    fs::DirBuilder::new().recursive(true).mode(0o755).create(&notify).at("create", &notify)?;
    let _ = fs::remove_file(dir.join(file::READY));
    notify::listen(dir).map(Into::into)
}

/// Our ends of the container's streams.
#[derive(Default)]
pub(crate) struct Stdio3 {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

fn create(runtime: &Runtime<'_>, options: &Options, mut command: Command) -> Result<(i32, Stdio3), Error> {
    let dir = &options.dir;
    for (name, mode) in [(file::STDOUT, OUTPUT_MODE), (file::STDERR, OUTPUT_MODE)] {
        make_fifo(dir, name, mode)?;
    }
    // The container holds its FIFOs for reading too: they have a reader, and their contents a home, with no shim alive.
    command.stdout(open(dir, file::STDOUT, Access::Both)?);
    command.stderr(open(dir, file::STDERR, Access::Both)?);
    let stdin = if options.stdin { Some(make_stdin(options, &mut command)?) } else { None };
    let mut stderr = open(dir, file::STDERR, Access::Read)?;
    let stdout = open(dir, file::STDOUT, Access::Read)?;
    let child = runtime.spawn("create", &mut command)?;
    // The write ends must be the container's alone, or end of file never comes.
    drop(command);
    let done = runtime.wait_also("create", child, Instant::now() + CREATE_TIMEOUT, None, |_| Ok(()));
    done.map_err(|e| runtime.explain(e, Some(&mut stderr)))?;
    let pid = read_pid(&pid_file(options))?;
    let _ = fs::remove_file(pid_file(options));
    Ok((pid, Stdio3 { stdin, stdout: Some(stdout.into()), stderr: Some(stderr.into()) }))
}

/// An input that may end must have no other writer than the shim; one that never ends survives the shim like the
/// outputs do.
fn make_stdin(options: &Options, command: &mut Command) -> Result<OwnedFd, Error> {
    let dir = &options.dir;
    make_fifo(dir, file::STDIN, INPUT_MODE)?;
    let theirs = if options.stdin_once {
        let theirs = open(dir, file::STDIN, Access::Read)?;
        set_nonblocking(&theirs, false).doing("make the container's stdin blocking")?;
        theirs
    } else {
        open(dir, file::STDIN, Access::Both)?
    };
    let ours = open(dir, file::STDIN, Access::Write)?;
    command.stdin(theirs);
    Ok(ours.into())
}

fn create_with_terminal(
    runtime: &Runtime<'_>,
    options: &Options,
    mut command: Command,
) -> Result<(i32, Stdio3), Error> {
    let dir = &options.dir;
    let socket = dir.join(CONSOLE);
    let listener = seqpacket::listen_stream(dir, CONSOLE, 1).at("listen on", &socket)?;
    let opened = File::options().read(true).open(dir).at("open", dir)?;
    // Socket paths end at 107 bytes, the directory's may be longer.
    let short = format!("/proc/{}/fd/{}/{CONSOLE}", std::process::id(), opened.as_raw_fd());
    let id = options.id.as_str();
    command.stderr(runtime.error_output()?);
    let mut command = insert_console(command, &short, id);
    let child = runtime.spawn("create", &mut command)?;
    let mut console = Console::new(&listener);
    let deadline = Instant::now() + CREATE_TIMEOUT;
    let done = runtime.wait_also("create", child, deadline, Some(&listener), |epoll| console.progress(epoll));
    done.map_err(|e| runtime.explain(e, None))?;
    // The runtime may have ended before we looked.
    let _ = console.progress(&Epoll::new().doing("create epoll")?);
    let _ = fs::remove_file(&socket);
    let master = console.master.ok_or_else(|| Error::new("runtime sent no terminal"))?;
    set_nonblocking(&master, true).doing("make the terminal non-blocking")?;
    let pid = read_pid(&pid_file(options))?;
    let _ = fs::remove_file(pid_file(options));
    Ok((pid, Stdio3 { stdin: None, stdout: Some(master), stderr: None }))
}

fn create_command(runtime: &Runtime<'_>, options: &Options, held: &Held, given: &[OwnedFd]) -> Command {
    let mut command = match held.fds.is_empty() && given.is_empty() {
        true => runtime.command("create"),
        false => runtime.command_through(SELF, &sockets::call(held, given), "create"),
    };
    if !given.is_empty() {
        command.arg("--preserve-fds").arg(given.len().to_string());
    }
    command.arg("--bundle").arg(&options.bundle).arg("--pid-file").arg(pid_file(options));
    if !options.tty {
        command.arg(&options.id);
    }
    command
}

fn insert_console(mut command: Command, socket: &str, id: &str) -> Command {
    command.arg("--console-socket").arg(socket).arg(id);
    command
}

fn pid_file(options: &Options) -> PathBuf {
    options.dir.join("runtime.pid")
}

/// Receives the terminal that a runtime sends over its console socket.
pub(crate) struct Console<'a> {
    listener: &'a OwnedFd,
    connection: Option<OwnedFd>,
    pub(crate) master: Option<OwnedFd>,
}

impl Console<'_> {
    pub(crate) fn new(listener: &OwnedFd) -> Console<'_> {
        Console { listener, connection: None, master: None }
    }

    pub(crate) fn progress(&mut self, epoll: &Epoll) -> Result<(), Error> {
        if self.connection.is_none() {
            match seqpacket::accept(self.listener.as_fd()) {
                Ok(connection) => {
                    epoll.add(&connection, IN, 2).doing("watch the console connection")?;
                    self.connection = Some(connection);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).doing("accept the console connection"),
            }
        }
        let Some(connection) = &self.connection else { return Ok(()) };
        // The text beside the descriptor is the runtime's name for it.
        let mut text = [0; 4096];
        match seqpacket::receive(connection.as_fd(), &mut text) {
            Ok(received) => {
                if let Some(master) = received.fds.into_iter().next() {
                    self.master = Some(master);
                }
                if received.len == 0 || self.master.is_some() {
                    let _ = epoll.remove(connection);
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(e).doing("receive the terminal"),
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Access {
    Read,
    Write,
    Both,
}

/// Opens a FIFO of the directory. Our own ends never block; what the container gets is an ordinary blocking one.
pub(crate) fn open(dir: &Path, name: &str, access: Access) -> Result<File, Error> {
    let path = dir.join(name);
    let mut options = File::options();
    match access {
        Access::Read => options.read(true).custom_flags(NONBLOCK),
        Access::Write => options.write(true).custom_flags(NONBLOCK),
        Access::Both => options.read(true).write(true),
    };
    options.open(&path).at("open", &path)
}

pub(crate) fn make_fifo(dir: &Path, name: &str, mode: u32) -> Result<(), Error> {
    let path = dir.join(name);
    let _ = fs::remove_file(&path);
    let c_name = c_path(&path).at("name", &path)?;
    mknodat(cwd(), &c_name, FIFO | 0o600, 0, 0).at("create FIFO", &path)?;
    // Through a descriptor because the creation mode is subject to the umask.
    let fifo = open(dir, name, Access::Both)?;
    fchmod(&fifo, mode).at("set the mode of", &path)
}

fn make_absolute(options: &mut Options) -> Result<(), Error> {
    let mut paths = vec![&mut options.dir, &mut options.bundle, &mut options.exit_file];
    paths.extend(options.runtime_root.as_mut());
    paths.extend(options.log.file.as_mut());
    paths.extend(
        [&mut options.restart_lock, &mut options.netns, &mut options.listen_from].into_iter().flatten(),
    );
    // A bare name is looked up in PATH by exec.
    if options.runtime.as_os_str() != options.runtime.file_name().unwrap_or(OsStr::new("")) {
        paths.push(&mut options.runtime);
    }
    for path in paths {
        *path = std::path::absolute(&*path).at("resolve", path)?;
    }
    Ok(())
}
