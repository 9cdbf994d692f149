//! The commands.

use crate::args::{Globals, Options};
use crate::log::Log;
use crate::{checkpoint, root, update};
use keel_oci::foreground::{self, OwnConsole, Signals};
use keel_oci::lower::affinity_mask;
use keel_oci::{CreateOptions, ExecOptions, Runtime, RuntimeError, names, parse_user};
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

pub(crate) const SPEC_VERSION: &str = "1.3.0";

/// How late `events` may tell of a kill for memory, whatever the interval of the statistics is.
const OOM_LATENCY: Duration = Duration::from_millis(200);

type Outcome = Result<u8, RuntimeError>;

/// Those that run code inside a container.
pub(crate) fn needs_sealed_binary(command: &str) -> bool {
    matches!(command, "create" | "run" | "exec")
}

pub(crate) fn run(
    globals: &Globals,
    command: &str,
    options: &Options,
    positional: &[String],
    log: &Rc<Log>,
) -> Outcome {
    let mut runtime = Runtime::new(root(globals));
    runtime.systemd = globals.systemd_cgroup;
    let warnings = log.clone();
    runtime.warn = Rc::new(move |line| warnings.warning(line));
    if globals.debug {
        let log = log.clone();
        runtime.debug = Some(Box::new(move |line| log.debug(line)));
    }
    log.debug(&format!("{command} {positional:?}"));
    match command {
        "create" => create(&runtime, options, positional, log),
        "run" => run_container(&runtime, options, positional, log),
        "start" => done(runtime.start(id(positional)?, notify_socket().as_deref())),
        "state" => state(&runtime, positional),
        "list" => list(&runtime, globals, options, log),
        "kill" => kill(&runtime, options, positional),
        "delete" => done(runtime.delete(id(positional)?, options.has("force"))),
        "exec" => exec(&runtime, options, positional, log),
        "ps" => ps(&runtime, options, positional),
        "pause" => done(runtime.pause(id(positional)?, true)),
        "resume" => done(runtime.pause(id(positional)?, false)),
        "update" => update::update(&runtime, options, id(positional)?),
        "events" => events(&runtime, options, positional),
        "checkpoint" => checkpoint::checkpoint(&runtime, globals, options, id(positional)?),
        "restore" => checkpoint::restore(&runtime, globals, options, id(positional)?, log),
        "spec" => spec(&runtime, options),
        "features" => features(),
        other => Err(usage(format!("no command {other:?}"))),
    }
}

pub(crate) fn usage(text: impl Into<String>) -> RuntimeError {
    RuntimeError::Usage(text.into())
}

fn done(result: Result<(), RuntimeError>) -> Outcome {
    result.map(|()| 0)
}

fn id(positional: &[String]) -> Result<&str, RuntimeError> {
    match positional {
        [id] => Ok(id),
        [] => Err(usage("a container id is required")),
        _ => Err(usage(format!("one container id is expected, not {positional:?}"))),
    }
}

/// One JSON document or a table on standard output; a reader that has gone away is no error.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn print_json(value: &impl serde::Serialize) {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    print(&format!("{text}\n"));
}

fn number<T: std::str::FromStr>(options: &Options, name: &str) -> Result<Option<T>, RuntimeError> {
    options
        .get(name)
        .map(|text| text.parse().map_err(|_| usage(format!("--{name} {text:?} is not a number"))))
        .transpose()
}

/// Where the caller waits for readiness (sd_notify).
fn notify_socket() -> Option<PathBuf> {
    std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Descriptors that a socket activation handed over (sd_listen_fds), unless they were meant for another process.
fn listen_fds() -> Option<u32> {
    if std::env::var("LISTEN_PID").is_ok_and(|pid| pid != std::process::id().to_string()) {
        return None;
    }
    std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse::<u32>().ok()).filter(|n| *n > 0)
}

/// Those asked for, and those of a socket activation. A number without a descriptor of the caller's is an error.
fn preserve_fds(options: &Options, listen: Option<u32>) -> Result<u32, RuntimeError> {
    let count = number::<u32>(options, "preserve-fds")?.unwrap_or(0).saturating_add(listen.unwrap_or(0));
    match (3..).take(count as usize).find(|fd| !keel_sys::file::is_inherited(*fd)) {
        Some(fd) => Err(usage(format!("descriptor {fd} is to be preserved (of {count}), but is not open"))),
        None => Ok(count),
    }
}

fn create_options(options: &Options, positional: &[String]) -> Result<CreateOptions, RuntimeError> {
    Ok(CreateOptions {
        id: id(positional)?.to_owned(),
        bundle: options.path("bundle").unwrap_or_else(|| PathBuf::from(".")),
        config: options.path("config"),
        pid_file: options.path("pid-file"),
        console_socket: options.path("console-socket"),
        pidfd_socket: options.path("pidfd-socket"),
        preserve_fds: preserve_fds(options, listen_fds())?,
        listen_fds: listen_fds(),
        notify_socket: notify_socket(),
        no_pivot: options.has("no-pivot"),
        no_new_keyring: options.has("no-new-keyring"),
    })
}

fn create(runtime: &Runtime, options: &Options, positional: &[String], log: &Log) -> Outcome {
    let warnings = runtime.create(&create_options(options, positional)?)?;
    warnings.iter().for_each(|w| log.warning(w));
    Ok(0)
}

fn run_container(runtime: &Runtime, options: &Options, positional: &[String], log: &Log) -> Outcome {
    let create = create_options(options, positional)?;
    let detach = options.has("detach");
    let terminal = runtime.wants_terminal(&create)?;
    if detach && terminal && create.console_socket.is_none() {
        return Err(usage("cannot allocate tty if the container will be detached: give --console-socket"));
    }
    let (own, console) = if terminal && create.console_socket.is_none() {
        let (own, child) = OwnConsole::new()?;
        (Some(own), Some(child))
    } else {
        (None, None)
    };
    let signals = if detach { None } else { Some(Signals::block()?) };
    if signals.is_some() && !options.has("no-subreaper") {
        // What the container's processes leave behind belongs to this one while it waits.
        let _ = keel_sys::process::set_subreaper(true);
    }
    let mut created = runtime.prepare(&create, console)?;
    created.warnings.iter().for_each(|w| log.warning(w));
    let master = own.map(OwnConsole::receive).transpose()?;
    let notify = created.notify(create.notify_socket.as_deref())?;
    created.go()?;
    let Some(signals) = signals else {
        if let Some(notify) = &notify {
            created.wait_ready(notify)?;
        }
        created.detach();
        return Ok(0);
    };
    let exit = foreground::wait(created.pid(), created.pidfd(), &signals, master.as_ref(), notify.as_ref())?;
    if options.has("keep") {
        created.detach();
    } else {
        created.finish()?;
    }
    Ok(exit.code() as u8)
}

fn exec(runtime: &Runtime, options: &Options, positional: &[String], log: &Log) -> Outcome {
    let (id, args) = positional.split_first().ok_or_else(|| usage("a container id is required"))?;
    let user = match options.get("user") {
        None => None,
        Some(text) => {
            Some(parse_user(text).ok_or_else(|| usage(format!("--user {text:?} is not UID or UID:GID")))?)
        }
    };
    let mut additional_gids = Vec::new();
    for text in options.all("additional-gids") {
        for gid in text.split(',') {
            additional_gids
                .push(gid.parse().map_err(|_| usage(format!("--additional-gids {text:?} is not a number")))?);
        }
    }
    let exec = ExecOptions {
        id: id.clone(),
        process: options.path("process"),
        args: args.to_vec(),
        tty: options.has("tty"),
        env: options.all("env"),
        cwd: options.get("cwd").map(str::to_owned),
        user,
        additional_gids,
        caps: options.all("cap"),
        no_new_privs: options.has("no-new-privs"),
        apparmor: options.get("apparmor").map(str::to_owned),
        process_label: options.get("process-label").map(str::to_owned),
        sub_cgroups: options.all("cgroup"),
        ignore_paused: options.has("ignore-paused"),
        pid_file: options.path("pid-file"),
        console_socket: options.path("console-socket"),
        pidfd_socket: options.path("pidfd-socket"),
        preserve_fds: preserve_fds(options, None)?,
        detach: options.has("detach"),
    };
    let mut process = runtime.exec_process(&exec)?;
    if exec.tty {
        process.terminal = true;
    }
    let (own, console) = match (process.terminal, &exec.console_socket) {
        (true, None) if exec.detach => {
            return Err(usage("cannot allocate tty if the process will be detached: give --console-socket"));
        }
        (true, None) => {
            let (own, child) = OwnConsole::new()?;
            (Some(own), Some(child))
        }
        (false, Some(_)) => return Err(usage("cannot use console socket without a tty")),
        _ => (None, None),
    };
    let initial = process.exec_cpu_affinity.as_ref().and_then(|a| affinity_mask(a.initial.as_deref()?));
    if let Some(mask) = initial {
        log.debug(&format!("initial CPU affinity: {mask}"));
    }
    let signals = if exec.detach { None } else { Some(Signals::block()?) };
    let executed = runtime.exec(&exec, &process, console)?;
    executed.warnings.iter().for_each(|w| log.warning(w));
    let Some(signals) = signals else { return Ok(0) };
    let master = own.map(OwnConsole::receive).transpose()?;
    let exit = foreground::wait(executed.pid, &executed.pidfd, &signals, master.as_ref(), None)?;
    Ok(exit.code() as u8)
}

fn state(runtime: &Runtime, positional: &[String]) -> Outcome {
    let dir = runtime.store.open(id(positional)?)?;
    let state = dir.load()?;
    print_json(&state.document(dir.status(&state)?));
    Ok(0)
}

fn kill(runtime: &Runtime, options: &Options, positional: &[String]) -> Outcome {
    let (id, word) = match (positional, options.get("signal")) {
        ([id], signal) => (id, signal.unwrap_or("TERM")),
        ([id, word], None) => (id, word.as_str()),
        _ => return Err(usage("kill takes a container id and a signal")),
    };
    let signal = names::signal(word).ok_or_else(|| usage(format!("unknown signal {word:?}")))?;
    done(runtime.kill(id, signal, options.has("all")))
}

fn list(runtime: &Runtime, globals: &Globals, options: &Options, log: &Log) -> Outcome {
    if let Some(root) = &globals.root {
        // Only the default root may not have been made yet; a wrong one would look like a host without containers.
        fs::metadata(root).map_err(|source| RuntimeError::Io { what: "open", path: root.clone(), source })?;
    }
    let format = options.get("format").unwrap_or("table");
    let dirs = runtime.store.list()?;
    if options.has("quiet") {
        print(&dirs.iter().map(|d| format!("{}\n", d.id)).collect::<String>());
        return Ok(0);
    }
    let mut rows = Vec::new();
    for dir in &dirs {
        match dir.load().and_then(|state| Ok((dir.status(&state)?, state))) {
            Ok((status, state)) => rows.push((state, status)),
            // A container may vanish while the list is made.
            Err(RuntimeError::NotFound(_)) => {}
            Err(e) => log.warning(&format!("container {:?} is not listed: {}", dir.id, e.chain())),
        }
    }
    match format {
        "json" => {
            let documents: Vec<_> = rows.iter().map(|(state, status)| state.document(*status)).collect();
            print(&format!("{}\n", serde_json::to_string(&documents).unwrap_or_default()));
        }
        "table" => {
            let mut table = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
            for (state, status) in &rows {
                let document = state.document(*status);
                table.push([
                    state.id.clone(),
                    document.pid.to_string(),
                    document.status.to_owned(),
                    state.bundle.display().to_string(),
                    state.created.clone(),
                    document.owner,
                ]);
            }
            print(&render_table(&table));
        }
        other => return Err(usage(format!("invalid format {other:?}: it is table or json"))),
    }
    Ok(0)
}

fn render_table(rows: &[[String; 6]]) -> String {
    let mut widths = [0; 6];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        out.push_str(cells.join("   ").trim_end());
        out.push('\n');
    }
    out
}

fn ps(runtime: &Runtime, options: &Options, positional: &[String]) -> Outcome {
    let (id, args) = positional.split_first().ok_or_else(|| usage("a container id is required"))?;
    let pids = runtime.store.open(id)?.load()?.cgroup().pids()?;
    match options.get("format").unwrap_or("table") {
        "json" => {
            print(&format!("{}\n", serde_json::to_string(&pids).unwrap_or_default()));
            Ok(0)
        }
        "table" => {
            let args: Vec<&str> =
                if args.is_empty() { vec!["-ef"] } else { args.iter().map(String::as_str).collect() };
            let output = std::process::Command::new("ps")
                .args(&args)
                .output()
                .map_err(|source| RuntimeError::Io { what: "run", path: "ps".into(), source })?;
            if !output.status.success() {
                return Err(usage(format!(
                    "ps {args:?}: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                )));
            }
            print(&filter_ps(&String::from_utf8_lossy(&output.stdout), &pids)?);
            Ok(0)
        }
        other => Err(usage(format!("invalid format {other:?}: it is table or json"))),
    }
}

/// The header and the lines of these processes.
fn filter_ps(text: &str, pids: &[i32]) -> Result<String, RuntimeError> {
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.split_whitespace().position(|w| w == "PID");
    let column = column.ok_or_else(|| usage("couldn't find PID field in ps output"))?;
    let mut out = format!("{header}\n");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|w| w.parse::<i32>().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            out.push_str(line);
            out.push('\n');
        }
    }
    Ok(out)
}

#[derive(serde::Serialize)]
struct Event<'a, T> {
    #[serde(rename = "type")]
    kind: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<T>,
}

fn events(runtime: &Runtime, options: &Options, positional: &[String]) -> Outcome {
    use keel_oci::state::Status;
    let id = id(positional)?;
    let dir = runtime.store.open(id)?;
    let state = dir.load()?;
    let cgroup = state.cgroup();
    let running = |status| matches!(status, Status::Running | Status::Paused | Status::Created);
    if !running(dir.status(&state)?) {
        return Err(usage(format!("container with id {id} is not running")));
    }
    let show = |kind: &str, data: Option<keel_cgroup::Stats>| {
        let event = Event { kind, id, data };
        print(&format!("{}\n", serde_json::to_string(&event).unwrap_or_default()));
    };
    if options.has("stats") {
        show("stats", Some(cgroup.stats()));
        return Ok(0);
    }
    let interval = interval(options.get("interval").unwrap_or("5s"))?;
    let init = state.init_pidfd().ok_or(RuntimeError::NotRunning)?;
    let mut kills = cgroup.oom_kills();
    let mut next = Instant::now() + interval;
    loop {
        let wait = next.saturating_duration_since(Instant::now()).min(OOM_LATENCY);
        let ended = keel_sys::file::wait_readable(&init, Some(wait.as_millis() as i32))
            .map_err(|source| RuntimeError::Sys { what: "wait for the container", source })?;
        let now = cgroup.oom_kills();
        if now > kills {
            show("oom", None);
            kills = now;
        }
        if ended {
            return Ok(0);
        }
        if Instant::now() >= next {
            show("stats", Some(cgroup.stats()));
            next += interval;
        }
    }
}

/// `5s`, `500ms`, `1m`; never zero.
fn interval(text: &str) -> Result<Duration, RuntimeError> {
    let wrong = || usage(format!("--interval {text:?} is not a duration greater than zero, like 5s"));
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let count: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let millis = match &text[digits..] {
        "ms" => count,
        "s" | "" => count.saturating_mul(1000),
        "m" => count.saturating_mul(60_000),
        _ => return Err(wrong()),
    };
    if millis == 0 { Err(wrong()) } else { Ok(Duration::from_millis(millis)) }
}

fn spec(runtime: &Runtime, options: &Options) -> Outcome {
    let bundle = options.path("bundle").unwrap_or_else(|| PathBuf::from("."));
    let path = bundle.join("config.json");
    let text = keel_oci::template::config(options.has("rootless"), runtime.unified()?);
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
        file.write_all(text.as_bytes())
    };
    match write() {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            Err(usage(format!("file {} exists. Remove it first", path.display())))
        }
        other => done(other.map_err(|source| RuntimeError::Io { what: "write", path: path.clone(), source })),
    }
}

fn features() -> Outcome {
    print(&format!("{}\n", keel_oci::template::features()));
    Ok(0)
}
