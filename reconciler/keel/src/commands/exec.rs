//! `exec`: one more process in a running container, started by the runtime's command line.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;

use serde_json::{Value, json};

use crate::cli::{Exec, Target};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::passwd::{self, User};
use crate::{object, world};

/// docker's codes: the engine failed, the command cannot be executed, the command was not found.
const NOT_TRIED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NO_COMMAND: u8 = 127;
/// A bundle's configuration is some 20 kB.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Ends with the command's own code.
pub(crate) fn exec(context: &Context, args: &Exec) -> Outcome<u8> {
    let running = find(context, &args.target)?;
    let tty = args.tty && terminal(context);
    let run = || {
        let process =
            lower_process(&configured(&running)?, args, tty, |user| passwd::find(running.pid, user))?;
        run(&running, &process, args.target.interactive, tty)
    };
    run().map_err(not_tried)
}

/// Of the pod that runs: the first container, unless one is named.
pub(super) fn find(context: &Context, target: &Target) -> Outcome<world::Running> {
    let status = world::status(context)?;
    let pods = object::pods(&status, &context.settings.namespace, &target.object)?;
    let pod =
        pods.iter().find(|pod| pod.container_statuses.iter().any(|c| c.pid.is_some())).unwrap_or(&pods[0]);
    let container = match &target.container {
        Some(name) => name,
        None => match pod.container_statuses.split_first() {
            Some((first, others)) => {
                if !others.is_empty() && io::stderr().is_terminal() {
                    context.term.note(&format!(
                        "container {} of pod {} (choose with -c)\n",
                        first.name, pod.key.name
                    ));
                }
                &first.name
            }
            None => return Err(Failure::failed(format!("pod {} has no containers yet", pod.key.name))),
        },
    };
    world::running(context, pod, container)
}

/// A failure without a code of its own is the engine's, not the command's.
fn not_tried(failure: Failure) -> Failure {
    let code = if failure.code == keel_api::exit::FAILED { NOT_TRIED } else { failure.code };
    Failure { code, ..failure }
}

/// kubectl's habit: say so and go on.
fn terminal(context: &Context) -> bool {
    let there = io::stdin().is_terminal();
    if !there {
        context.term.note("standard input is no terminal: going on without -t\n");
    }
    there
}

/// `process` of the bundle: what the container itself was started with.
pub(super) fn configured(running: &world::Running) -> Outcome<Value> {
    let path = running.bundle.join("config.json");
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_CONFIG_BYTES).read_to_end(&mut text))
        .map_err(|error| Failure::io("read", path.display(), &error))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| Failure::failed(format!("read {}: {error}", path.display())))?;
    Ok(config["process"].take())
}

/// The container's process with another command, and what the flags change.
fn lower_process(
    container: &Value,
    args: &Exec,
    tty: bool,
    find: impl FnOnce(&str) -> Outcome<User>,
) -> Outcome<Value> {
    let mut process = container.clone();
    let words = args.command.iter().map(text).collect::<Outcome<Vec<String>>>()?;
    process["args"] = json!(words);
    process["terminal"] = json!(tty);
    if let Some(fields) = process.as_object_mut() {
        fields.remove("consoleSize");
    }
    if let Some(size) = keel_sys::tty::size(io::stdin()).ok().filter(|_| tty) {
        process["consoleSize"] = json!({ "height": size.rows, "width": size.columns });
    }
    if let Some(dir) = &args.workdir {
        process["cwd"] = json!(dir);
    }
    if let Some(name) = &args.user {
        let user = find(name).map_err(|failure| failure.code(NOT_TRIED))?;
        set_user(&mut process, &user);
    }
    let mut env: Vec<String> = serde_json::from_value(process["env"].take()).unwrap_or_default();
    if tty && !env.iter().any(|entry| entry.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    for entry in &args.env {
        set_env(&mut env, entry, |name| std::env::var(name).ok());
    }
    process["env"] = json!(env);
    Ok(process)
}

fn text(word: &OsString) -> Outcome<String> {
    word.clone().into_string().map_err(|word| {
        Failure::invalid(format!("`{}` is no UTF-8, which an OCI process cannot carry", word.display()))
    })
}

/// Another user has no capabilities unless it is root, which has what the container may have.
fn set_user(process: &mut Value, user: &User) {
    process["user"] = json!({ "uid": user.uid, "gid": user.gid, "additionalGids": user.groups });
    let bounding = process["capabilities"]["bounding"].clone();
    if let Some(sets) = process["capabilities"].as_object_mut() {
        let has = if user.uid == 0 { bounding } else { json!([]) };
        for set in ["effective", "permitted"] {
            sets.insert(set.to_owned(), has.clone());
        }
        for set in ["inheritable", "ambient"] {
            sets.insert(set.to_owned(), json!([]));
        }
    }
}

/// `NAME=VALUE`, or `NAME` to pass ours on (nothing when we have none). The last one wins.
fn set_env(env: &mut Vec<String>, entry: &str, ours: impl Fn(&str) -> Option<String>) {
    let (name, value) = match entry.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (entry, ours(entry)),
    };
    env.retain(|known| known.split('=').next() != Some(name));
    env.extend(value.map(|value| format!("{name}={value}")));
}

/// Starts the runtime and stays until it ends. On a terminal it is the runtime that sets raw mode and passes the
/// window's size on, as runc does in the foreground.
fn run(running: &world::Running, process: &Value, stdin: bool, tty: bool) -> Outcome<u8> {
    let fail = |error| Failure::io("prepare", "the command", &error);
    let text = serde_json::to_vec(process).map_err(|error| Failure::of(&error))?;
    // In memory: environments hold secrets, and nothing is left behind when we are killed.
    let spec = inherited(c"process.json", &text).map_err(fail)?;
    let log = inherited(c"exec.log", b"").map_err(fail)?;
    let mut command = Command::new(&running.runtime);
    command.arg("--root").arg(&running.runtime_root).arg("--log").arg(path_of(&log));
    // What went wrong is told by us, once. A runtime that does not know this says it as well.
    command.args(["--log-format", "json", "exec"]).env("KEEL_RUNTIME_LOG_IS_READ", "1");
    if tty {
        command.arg("--tty");
    }
    command.arg("--process").arg(path_of(&spec)).arg(&running.id.0);
    if !stdin && !tty {
        command.stdin(Stdio::null());
    }
    let before = keel_sys::tty::size(io::stdin()).is_ok().then(TerminalGuard::save).flatten();
    let signals = keel_sys::process::block_signals().map_err(fail)?;
    let mut child = command.spawn().map_err(|error| {
        Failure::io("start runtime", running.runtime.display(), &error).hint("choose one with --runtime")
    })?;
    forward_signals(signals, child.id());
    let ended = child.wait().map_err(|error| Failure::io("wait for", "the runtime", &error))?;
    drop(before);
    let code = ended.code().or(ended.signal().map(|signal| 128 + signal)).unwrap_or(1);
    match runtime_error(log) {
        Some(message) if code != 0 => Err(Failure::new(reason_code(&message), message)),
        _ => Ok(u8::try_from(code).unwrap_or(1)),
    }
}

/// Puts the terminal back the way it was, whatever the runtime leaves.
struct TerminalGuard(keel_sys::tty::Saved);

impl TerminalGuard {
    fn save() -> Option<TerminalGuard> {
        let saved = keel_sys::tty::make_raw(io::stdin()).ok()?;
        let guard = TerminalGuard(saved);
        guard.restore();
        Some(guard)
    }

    fn restore(&self) {
        // A terminal that has gone away needs nothing.
        let _ = keel_sys::tty::restore(io::stdin(), &self.0);
    }
}

impl Drop for TerminalGuard {
    fn drop(&mut self) {
        self.restore();
    }
}

/// A memory file that the runtime inherits.
fn inherited(name: &std::ffi::CStr, contents: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(keel_sys::memfd::create(name)?);
    file.write_all(contents)?;
    file.seek(SeekFrom::Start(0))?;
    keel_sys::file::set_cloexec(&file, false)?;
    Ok(file.into())
}

fn path_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// What is sent to us alone goes on to the runtime, which passes it to the command. What the terminal sends reaches the
/// runtime without us.
fn forward_signals(signals: OwnedFd, child: u32) {
    const HANGUP: i32 = 1;
    const INTERRUPT: i32 = 2;
    const QUIT: i32 = 3;
    const USER1: i32 = 10;
    const USER2: i32 = 12;
    const TERMINATE: i32 = 15;
    let from_terminal = io::stdin().is_terminal();
    let Ok(child) = i32::try_from(child) else { return };
    thread::spawn(move || {
        while let Ok(signal) = keel_sys::process::read_signal(&signals) {
            let pass = match signal {
                HANGUP | TERMINATE | USER1 | USER2 => true,
                INTERRUPT | QUIT => !from_terminal,
                _ => false,
            };
            if pass {
                // It may have ended in between; its parent is waiting for it already.
                let _ = keel_sys::process::kill(child, signal);
            }
        }
    });
}

/// What the runtime itself complained about, so that its failures are not taken for the command's.
fn runtime_error(log: OwnedFd) -> Option<String> {
    let mut file = File::from(log);
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.take(MAX_CONFIG_BYTES).read_to_string(&mut text).ok()?;
    last_error(&text)
}

fn last_error(log: &str) -> Option<String> {
    log.lines().rev().find_map(|line| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let level = entry["level"].as_str()?;
        matches!(level, "error" | "fatal")
            .then(|| entry["msg"].as_str().unwrap_or("unknown error").to_owned())
    })
}

/// The words are runc's, which every OCI runtime repeats because callers match on them.
fn reason_code(message: &str) -> u8 {
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    // The runtime's own files can be missing or closed too: that is not the command's.
    if !has(&["exec: ", "exec /", "exec \"", "executable file"]) {
        NOT_TRIED
    } else if has(&["executable file not found", "no such file or directory"]) {
        NO_COMMAND
    } else if has(&["permission denied", "exec format error", "is a directory"]) {
        NOT_EXECUTABLE
    } else {
        NOT_TRIED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(extra: &[&str]) -> Exec {
        use clap::Parser;
        let words = ["keel", "exec", "web"].iter().chain(extra).chain(&["--", "sh", "-c", "true"]);
        match crate::cli::Cli::parse_from(words).command {
            crate::cli::Command::Exec(exec) => exec,
            other => panic!("{other:?}"),
        }
    }

    fn lowered(extra: &[&str]) -> Value {
        let container = json!({
            "terminal": false,
            "user": { "uid": 1000, "gid": 1000 },
            "args": ["/server"],
            "env": ["PATH=/bin", "A=1"],
            "cwd": "/srv",
            "capabilities": { "bounding": ["CAP_CHOWN"], "effective": [], "permitted": [], "inheritable": [], "ambient": [] },
            "noNewPrivileges": true
        });
        let find = |name: &str| match name {
            "root" => Ok(User { uid: 0, gid: 0, groups: vec![] }),
            _ => Ok(User { uid: 7, gid: 8, groups: vec![9] }),
        };
        lower_process(&container, &args(extra), false, find).unwrap()
    }

    #[test]
    fn the_containers_process_is_kept_but_for_the_command() {
        let process = lowered(&[]);
        assert_eq!(process["args"], json!(["sh", "-c", "true"]));
        assert_eq!(process["cwd"], "/srv");
        assert_eq!(process["user"]["uid"], 1000);
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(process["env"], json!(["PATH=/bin", "A=1"]));
    }

    #[test]
    fn flags_change_directory_environment_and_user() {
        let process = lowered(&["-w", "/tmp", "-e", "A=2", "-e", "B=x=y", "-u", "root"]);
        assert_eq!(process["cwd"], "/tmp");
        assert_eq!(process["env"], json!(["PATH=/bin", "A=2", "B=x=y"]));
        assert_eq!(process["capabilities"]["effective"], json!(["CAP_CHOWN"]));
        let process = lowered(&["-u", "daemon"]);
        assert_eq!(process["user"], json!({ "uid": 7, "gid": 8, "additionalGids": [9] }));
        assert_eq!(process["capabilities"]["permitted"], json!([]));
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
    }

    #[test]
    fn failures_of_the_runtime_have_dockers_codes() {
        let log = "{\"level\":\"warning\",\"msg\":\"w\"}\n{\"level\":\"error\",\"msg\":\"exec: \\\"x\\\": executable file not found in $PATH\"}\n";
        let message = last_error(log).unwrap();
        assert_eq!(reason_code(&message), NO_COMMAND);
        assert_eq!(reason_code("exec /etc: permission denied"), NOT_EXECUTABLE);
        assert_eq!(reason_code("container is paused"), NOT_TRIED);
        assert_eq!(reason_code("open /run/x/state.json: no such file or directory"), NOT_TRIED);
        assert_eq!(reason_code("exec: \"/x\": stat /x: no such file or directory"), NO_COMMAND);
        assert_eq!(reason_code("exec /x: no such file or directory"), NO_COMMAND);
        assert_eq!(last_error("{\"level\":\"info\",\"msg\":\"x\"}\n"), None);
    }
}
