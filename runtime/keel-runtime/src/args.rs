//! The command line: global options, a command, its options before or after the container id.

use lexopt::{Arg, Parser, ValueExt};
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Debug, Default)]
pub(crate) struct Globals {
    pub(crate) root: Option<PathBuf>,
    pub(crate) log: Option<PathBuf>,
    pub(crate) log_json: bool,
    pub(crate) debug: bool,
    pub(crate) systemd_cgroup: bool,
    pub(crate) criu: Option<PathBuf>,
}

#[derive(Debug)]
pub(crate) enum Command {
    Help,
    HelpOn(&'static Known),
    Version,
    Run { name: String, options: Options, positional: Vec<String> },
}

/// Options of all commands; each command takes those that it knows (see `KNOWN`).
#[derive(Debug, Default)]
pub(crate) struct Options {
    flags: Vec<&'static str>,
    values: Vec<(&'static str, String)>,
}

impl Known {
    /// What the command is for, and everything that it takes.
    pub(crate) fn help(&self) -> String {
        let name = self.command;
        let mut out = format!("NAME:\n   keel-runtime {name} - {}\n\nUSAGE:\n   ", self.about);
        out.push_str(format!("keel-runtime {name} [options] {}", self.arguments).trim_end());
        out.push_str("\n\nOPTIONS:\n");
        for flag in self.flags {
            out.push_str(&format!("   --{flag}\n"));
        }
        for value in self.values {
            out.push_str(&format!("   --{value} VALUE\n"));
        }
        out.push_str("   --help\n");
        out
    }
}

impl Options {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.flags.contains(&name)
    }

    /// The last value given.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.values.iter().rev().find(|(n, _)| *n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn all(&self, name: &str) -> Vec<String> {
        self.values.iter().filter(|(n, _)| *n == name).map(|(_, v)| v.clone()).collect()
    }

    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.get(name).map(PathBuf::from)
    }
}

#[derive(Debug)]
pub(crate) struct Known {
    command: &'static str,
    about: &'static str,
    /// As the help shows them.
    arguments: &'static str,
    flags: &'static [&'static str],
    values: &'static [&'static str],
    /// After so many positional arguments the rest belongs to the program in the container.
    positional: usize,
}

const CREATE_VALUES: &[&str] =
    &["bundle", "console-socket", "pid-file", "pidfd-socket", "preserve-fds", "config"];

const KNOWN: &[Known] = &[
    Known {
        command: "create",
        about: "create a container",
        arguments: "CONTAINER-ID",
        flags: &["no-pivot", "no-new-keyring"],
        values: CREATE_VALUES,
        positional: usize::MAX,
    },
    Known {
        command: "run",
        about: "create and start a container",
        arguments: "CONTAINER-ID",
        flags: &["no-pivot", "no-new-keyring", "detach", "keep", "no-subreaper"],
        values: CREATE_VALUES,
        positional: usize::MAX,
    },
    Known {
        command: "start",
        about: "start a created container",
        arguments: "CONTAINER-ID",
        flags: &[],
        values: &[],
        positional: usize::MAX,
    },
    Known {
        command: "state",
        about: "print the state of a container",
        arguments: "CONTAINER-ID",
        flags: &["all"],
        values: &[],
        positional: usize::MAX,
    },
    Known {
        command: "list",
        about: "list the containers of a root",
        arguments: "",
        flags: &["quiet"],
        values: &["format"],
        positional: usize::MAX,
    },
    Known {
        command: "kill",
        about: "send a signal to a container's process (default: TERM)",
        arguments: "CONTAINER-ID [SIGNAL]",
        flags: &["all"],
        values: &["signal"],
        positional: usize::MAX,
    },
    Known {
        command: "delete",
        about: "remove what belongs to a container that has stopped",
        arguments: "CONTAINER-ID",
        flags: &["force"],
        values: &[],
        positional: usize::MAX,
    },
    Known {
        command: "exec",
        about: "run a further process in a container",
        arguments: "CONTAINER-ID COMMAND [ARGUMENT...]",
        flags: &["tty", "detach", "no-new-privs", "ignore-paused"],
        values: &[
            "process",
            "console-socket",
            "pid-file",
            "pidfd-socket",
            "preserve-fds",
            "cwd",
            "env",
            "user",
            "additional-gids",
            "cap",
            "cgroup",
            "apparmor",
            "process-label",
        ],
        positional: 1,
    },
    Known {
        command: "ps",
        about: "list the processes of a container",
        arguments: "CONTAINER-ID [PS-OPTION...]",
        flags: &[],
        values: &["format"],
        positional: 1,
    },
    Known {
        command: "pause",
        about: "stop all processes of a container",
        arguments: "CONTAINER-ID",
        flags: &[],
        values: &[],
        positional: usize::MAX,
    },
    Known {
        command: "resume",
        about: "continue a paused container",
        arguments: "CONTAINER-ID",
        flags: &[],
        values: &[],
        positional: usize::MAX,
    },
    Known {
        command: "events",
        about: "print statistics and kills for memory",
        arguments: "CONTAINER-ID",
        flags: &["stats"],
        values: &["interval"],
        positional: usize::MAX,
    },
    Known {
        command: "update",
        about: "change the limits of a container",
        arguments: "CONTAINER-ID",
        flags: &[],
        values: &[
            "resources",
            "blkio-weight",
            "cpu-period",
            "cpu-quota",
            "cpu-burst",
            "cpu-share",
            "cpu-shares",
            "cpu-rt-period",
            "cpu-rt-runtime",
            "cpu-idle",
            "cpuset-cpus",
            "cpuset-mems",
            "kernel-memory",
            "kernel-memory-tcp",
            "memory",
            "memory-reservation",
            "memory-swap",
            "pids-limit",
            "l3-cache-schema",
            "mem-bw-schema",
        ],
        positional: usize::MAX,
    },
    Known {
        command: "checkpoint",
        about: "write a running container to disk, by criu",
        arguments: "CONTAINER-ID",
        flags: &[
            "leave-running",
            "tcp-established",
            "tcp-skip-in-flight",
            "link-remap",
            "ext-unix-sk",
            "shell-job",
            "lazy-pages",
            "file-locks",
            "pre-dump",
            "auto-dedup",
        ],
        values: &[
            "image-path",
            "work-path",
            "parent-path",
            "status-fd",
            "page-server",
            "manage-cgroups-mode",
            "empty-ns",
        ],
        positional: usize::MAX,
    },
    Known {
        command: "restore",
        about: "continue a container that was written to disk, by criu",
        arguments: "CONTAINER-ID",
        flags: &[
            "detach",
            "no-subreaper",
            "no-pivot",
            "tcp-established",
            "link-remap",
            "ext-unix-sk",
            "shell-job",
            "lazy-pages",
            "file-locks",
            "auto-dedup",
        ],
        values: &[
            "bundle",
            "image-path",
            "work-path",
            "pid-file",
            "console-socket",
            "manage-cgroups-mode",
            "empty-ns",
            "lsm-profile",
            "lsm-mount-context",
        ],
        positional: usize::MAX,
    },
    Known {
        command: "spec",
        about: "write a config.json to begin with",
        arguments: "",
        flags: &["rootless"],
        values: &["bundle"],
        positional: usize::MAX,
    },
    Known {
        command: "features",
        about: "print what this runtime can do, as JSON",
        arguments: "",
        flags: &[],
        values: &[],
        positional: usize::MAX,
    },
];

pub(crate) fn command_names() -> impl Iterator<Item = &'static str> {
    KNOWN.iter().map(|k| k.command)
}

/// Short letters, where commands agree about them; `f` and `p` depend on the command.
fn short(command: &str, letter: char) -> Option<&'static str> {
    Some(match (command, letter) {
        ("list" | "ps", 'f') => "format",
        ("delete", 'f') => "force",
        ("create" | "run" | "restore" | "spec", 'b') => "bundle",
        ("create" | "run", 'f') => "config",
        ("run" | "exec" | "restore", 'd') => "detach",
        ("list", 'q') => "quiet",
        ("kill", 'a') => "all",
        ("kill", 's') => "signal",
        ("exec", 't') => "tty",
        ("exec", 'e') => "env",
        ("exec", 'u') => "user",
        ("exec", 'g') => "additional-gids",
        ("exec", 'p') => "process",
        ("exec", 'c') => "cap",
        ("update", 'r') => "resources",
        _ => return None,
    })
}

/// Fills in the global options as it meets them: an error shall reach the log that was named before it.
pub(crate) fn parse(
    args: impl IntoIterator<Item = OsString>,
    globals: &mut Globals,
) -> Result<Command, lexopt::Error> {
    let mut parser = Parser::from_args(args);
    let name = loop {
        match parser.next()? {
            None | Some(Arg::Short('h')) => return Ok(Command::Help),
            Some(Arg::Long("help")) => return Ok(Command::Help),
            Some(Arg::Short('v') | Arg::Long("version")) => return Ok(Command::Version),
            Some(Arg::Value(value)) => break value.string()?,
            Some(Arg::Long(name)) => {
                let name = name.to_owned();
                if !global(&name, &mut parser, globals)? {
                    return Err(format!("unknown option --{name}").into());
                }
            }
            Some(other) => return Err(other.unexpected()),
        }
    };
    let find = |name: &str| {
        let known = KNOWN.iter().find(|k| k.command == name);
        known.ok_or_else(|| {
            lexopt::Error::from(format!("No help topic for '{name}': no such command, see --help"))
        })
    };
    if name == "help" {
        return Ok(match parser.next()? {
            Some(Arg::Value(name)) => Command::HelpOn(find(&name.string()?)?),
            _ => Command::Help,
        });
    }
    let known = find(&name)?;
    let mut options = Options::default();
    let mut positional = Vec::new();
    loop {
        if positional.len() >= known.positional {
            // A program's own options are not ours, whatever they look like.
            for rest in parser.raw_args()? {
                positional.push(rest.string()?);
            }
            if positional.get(known.positional).is_some_and(|word| word == "--") {
                positional.remove(known.positional);
            }
            break;
        }
        let (shown, long) = match parser.next()? {
            None => break,
            Some(Arg::Value(value)) => {
                positional.push(value.string()?);
                continue;
            }
            Some(Arg::Short('h') | Arg::Long("help")) => return Ok(Command::HelpOn(known)),
            Some(Arg::Short(letter)) => {
                (format!("-{letter}"), short(known.command, letter).map(str::to_owned))
            }
            Some(Arg::Long(name)) => (format!("--{name}"), Some(name.to_owned())),
        };
        let long = long.ok_or_else(|| lexopt::Error::from(format!("unknown option {shown}")))?;
        if let Some(flag) = known.flags.iter().find(|f| **f == long) {
            if switch(&shown, &mut parser)? {
                options.flags.push(flag);
            }
        } else if let Some(name) = known.values.iter().find(|v| **v == long) {
            options.values.push((name, parser.value()?.string()?));
        } else if !global(&long, &mut parser, globals)? {
            return Err(format!("unknown option {shown} of {name}").into());
        }
    }
    if known.arguments.is_empty() && !positional.is_empty() {
        return Err(format!("{name} takes no arguments, not {positional:?}").into());
    }
    Ok(Command::Run { name, options, positional })
}

/// What stands alone, or with a word for yes or no.
fn switch(shown: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
    match parser.optional_value() {
        None => Ok(true),
        Some(value) if value == "true" => Ok(true),
        Some(value) if value == "false" => Ok(false),
        Some(_) => Err(format!("option {shown} takes no value").into()),
    }
}

fn global(name: &str, parser: &mut Parser, globals: &mut Globals) -> Result<bool, lexopt::Error> {
    match name {
        "root" => globals.root = Some(parser.value()?.into()),
        "log" => globals.log = Some(parser.value()?.into()),
        "log-format" => match parser.value()?.string()?.as_str() {
            "json" => globals.log_json = true,
            "text" => globals.log_json = false,
            other => return Err(format!("invalid log-format {other:?}: it is text or json").into()),
        },
        "debug" => globals.debug = switch("--debug", parser)?,
        "systemd-cgroup" => globals.systemd_cgroup = switch("--systemd-cgroup", parser)?,
        "cgroup-manager" => globals.systemd_cgroup = parser.value()? == "systemd",
        // Whether cgroup errors are forgiven is decided by the rights that are there.
        "criu" => globals.criu = Some(parser.value()?.into()),
        "rootless" | "log-level" => {
            parser.value()?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn options_before_and_after_the_id() {
        for line in
            ["create --bundle /b -- id", "create id --bundle /b", "create id -b /b", "create --bundle=/b id"]
        {
            let command = parse(words(line), &mut Globals::default()).unwrap();
            let Command::Run { options, positional, .. } = command else { panic!("{line}") };
            assert_eq!(
                (options.get("bundle"), &positional[..]),
                (Some("/b"), &["id".to_owned()][..]),
                "{line}"
            );
        }
    }

    #[test]
    fn the_programs_options_are_its_own() {
        for line in ["exec -t id ls -t --all", "exec -t id -- ls -t --all"] {
            let command = parse(words(line), &mut Globals::default()).unwrap();
            let Command::Run { options, positional, .. } = command else { panic!() };
            assert!(options.has("tty"));
            assert_eq!(positional, ["id", "ls", "-t", "--all"], "{line}");
        }
    }

    #[test]
    fn wrong_lines_are_errors() {
        for line in [
            "nope",
            "--nope",
            "create --nope id",
            "--log-format xml list",
            "delete --force=maybe x",
            "--debug=maybe list",
            "features x",
            "list x",
        ] {
            assert!(parse(words(line), &mut Globals::default()).is_err(), "{line}");
        }
    }

    #[test]
    fn an_error_leaves_what_was_said_before_it() {
        let mut globals = Globals::default();
        let line = "--debug=false --systemd-cgroup=true --log /l --log-format json create --nope id";
        assert!(parse(words(line), &mut globals).is_err());
        assert_eq!((globals.log, globals.log_json), (Some("/l".into()), true));
        assert_eq!((globals.debug, globals.systemd_cgroup), (false, true));
    }
}
