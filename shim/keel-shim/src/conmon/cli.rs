//! conmon's command line.
//!
//! Options are `--name value`, `--name=value`, `-n value`, `-nvalue`; words that are none are passed over, as callers write
//! `--api-version 1` where `--api-version` takes no value.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use keel_sys::file::{c_path, cwd, faccessat};

use crate::error::{Context, Error};
use crate::journal;

pub(crate) const HELP: &str = "\
conmon: monitors one container, or one command in it, for podman and CRI-O

  --api-version                 answers have one key, `data`
  -b, --bundle DIR              directory of the container's config.json
  -c, --cid ID                  name of the container for the runtime
  -u, --cuuid ID                name of the container in logs and socket paths
  -n, --name NAME               name of the container for its users
  -r, --runtime PATH            OCI runtime
  --runtime-arg ARG             for the runtime, before its command; may be repeated
  --runtime-opt ARG             for the runtime's create, restore or exec; may be repeated
  --no-pivot --no-new-keyring   for the runtime's create
  -s, --systemd-cgroup          the runtime shall let systemd make the cgroup
  --restore DIR                 restore from a checkpoint instead of create
  -p, --container-pidfile FILE  written by the runtime
  -P, --conmon-pidfile FILE     pid of the monitor
  -e, --exec                    run a command in the container
  --exec-process-spec FILE      the command, as an OCI process
  --exec-attach                 begin it when the caller has attached
  -t, --terminal                give it a terminal
  -i, --stdin                   give it an input, which ends with the first client's
  --leave-stdin-open            the input does not end with a client's
  --full-attach                 the attach socket is in the bundle directory
  --socket-dir-path DIR         otherwise it is reached through a link here
  -l, --log-path DRIVER[:FILE]  k8s-file, journald, none, off, null or passthrough; may be repeated
  --log-size-max BYTES          of a log file, which begins anew when it is full
  --log-rotate                  keep full log files as FILE.1, FILE.2, ..
  --log-max-files N             how many of those (default 1)
  --log-global-size-max BYTES   nothing is logged beyond this
  --log-allowlist-dir DIR       log files must be in one of these; may be repeated
  --log-tag TAG                 CONTAINER_TAG in the journal
  --log-label NAME=VALUE        further field in the journal; may be repeated
  --no-container-partial-message  do not mark parts of long lines in the journal
  --no-sync-log                 do not flush the log to disk at the end
  --log-level LEVEL             checked and no more: the monitor tells its errors and nothing else
  --syslog                      to the system's log too
  --exit-dir DIR                the exit code is written to DIR/ID
  -0, --persist-dir DIR         and to DIR/exit
  --exit-command PATH           run after the end; with --exit-command-arg ARG (repeatable)
  --exit-delay SECONDS          so long after it
  -T, --timeout SECONDS         kill the container after this
  --sdnotify-socket PATH        the host's socket for messages of the container's services
  --replace-listen-pid          LISTEN_PID is the runtime's pid whatever it was
  --sync                        do not fork into the background
  --version | --help
";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) help: bool,
    pub(crate) version: bool,
    pub(crate) api: bool,
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) cid: String,
    pub(crate) cuuid: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) runtime: PathBuf,
    pub(crate) runtime_args: Vec<OsString>,
    pub(crate) runtime_opts: Vec<OsString>,
    pub(crate) no_pivot: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) systemd_cgroup: bool,
    pub(crate) restore: Option<PathBuf>,
    pub(crate) container_pid_file: Option<PathBuf>,
    pub(crate) conmon_pid_file: Option<PathBuf>,
    pub(crate) exec: bool,
    pub(crate) process: Option<PathBuf>,
    pub(crate) attach: bool,
    pub(crate) terminal: bool,
    pub(crate) stdin: bool,
    pub(crate) leave_stdin_open: bool,
    pub(crate) full_attach: bool,
    pub(crate) socket_dir: Option<PathBuf>,
    pub(crate) log_paths: Vec<OsString>,
    pub(crate) log_size_max: i64,
    pub(crate) log_global_size_max: i64,
    pub(crate) log_rotate: bool,
    pub(crate) log_max_files: i32,
    pub(crate) log_allowed: Vec<PathBuf>,
    pub(crate) log_tag: Option<String>,
    pub(crate) log_labels: Vec<String>,
    pub(crate) no_partial: bool,
    pub(crate) no_sync_log: bool,
    pub(crate) log_level: Option<String>,
    pub(crate) syslog: bool,
    pub(crate) exit_dir: Option<PathBuf>,
    pub(crate) persist_dir: Option<PathBuf>,
    pub(crate) exit_command: Option<PathBuf>,
    pub(crate) exit_args: Vec<OsString>,
    pub(crate) exit_delay: i32,
    pub(crate) timeout: i32,
    pub(crate) notify_socket: Option<OsString>,
    pub(crate) replace_listen_pid: bool,
    pub(crate) sync: bool,
}

/// Where output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drivers {
    pub(crate) file: Option<PathBuf>,
    pub(crate) journal: bool,
    /// The container gets the monitor's own streams.
    pub(crate) passthrough: bool,
}

/// Where CRI-O has its links to attach sockets.
const SOCKET_DIR: &str = "/var/run/crio";
const LEVELS: [&str; 8] = ["error", "fatal", "panic", "warn", "warning", "info", "debug", "trace"];
const EXECUTE: i32 = 1;

impl Options {
    pub(crate) fn parse(words: &[OsString]) -> Result<Options, Error> {
        let mut options = Options { log_max_files: 1, ..Options::default() };
        let mut words = Words { rest: words.iter(), inline: None, letters: &[] };
        while let Some(name) = words.option()? {
            options.set(name, &mut words)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &[u8], words: &mut Words<'_>) -> Result<(), Error> {
        let mut value = || words.value(name);
        match name {
            b"--help" => self.help = true,
            b"--version" => self.version = true,
            b"--api-version" => self.api = true,
            b"--bundle" => self.bundle = Some(value()?.into()),
            b"--cid" => self.cid = text(name, value()?)?,
            b"--cuuid" => self.cuuid = Some(text(name, value()?)?),
            b"--name" => self.name = Some(text(name, value()?)?),
            b"--runtime" => self.runtime = value()?.into(),
            b"--runtime-arg" => self.runtime_args.push(value()?),
            b"--runtime-opt" | b"--restore-arg" => self.runtime_opts.push(value()?),
            b"--no-pivot" => self.no_pivot = true,
            b"--no-new-keyring" => self.no_new_keyring = true,
            b"--systemd-cgroup" => self.systemd_cgroup = true,
            b"--restore" => self.restore = Some(value()?.into()),
            b"--container-pidfile" | b"--pidfile" => self.container_pid_file = Some(value()?.into()),
            b"--conmon-pidfile" => self.conmon_pid_file = Some(value()?.into()),
            b"--exec" => self.exec = true,
            b"--exec-process-spec" => self.process = Some(value()?.into()),
            b"--exec-attach" | b"--attach" => self.attach = true,
            b"--terminal" => self.terminal = true,
            b"--stdin" => self.stdin = true,
            b"--leave-stdin-open" => self.leave_stdin_open = true,
            b"--full-attach" => self.full_attach = true,
            b"--socket-dir-path" => self.socket_dir = Some(value()?.into()),
            b"--log-path" => self.log_paths.push(value()?),
            b"--log-size-max" => self.log_size_max = number(name, value()?)?,
            b"--log-global-size-max" => self.log_global_size_max = number(name, value()?)?,
            b"--log-rotate" => self.log_rotate = true,
            b"--log-max-files" => self.log_max_files = number(name, value()?)?,
            b"--log-allowlist-dir" => self.log_allowed.push(value()?.into()),
            b"--log-tag" => self.log_tag = Some(text(name, value()?)?),
            b"--log-label" => self.log_labels.push(text(name, value()?)?),
            b"--no-container-partial-message" => self.no_partial = true,
            b"--no-sync-log" => self.no_sync_log = true,
            b"--log-level" => self.log_level = Some(text(name, value()?)?),
            b"--syslog" => self.syslog = true,
            b"--exit-dir" => self.exit_dir = Some(value()?.into()),
            b"--persist-dir" => self.persist_dir = Some(value()?.into()),
            b"--exit-command" => self.exit_command = Some(value()?.into()),
            b"--exit-command-arg" => self.exit_args.push(value()?),
            b"--exit-delay" => self.exit_delay = number(name, value()?)?,
            b"--timeout" => self.timeout = number(name, value()?)?,
            b"--sdnotify-socket" => self.notify_socket = Some(value()?),
            b"--replace-listen-pid" => self.replace_listen_pid = true,
            b"--sync" => self.sync = true,
            b"--seccomp-notify-socket" | b"--seccomp-notify-plugins" => {
                return Err(Error::new("seccomp notifications are not supported"));
            }
            _ => return Err(Error::new(format!("Unknown option {}", String::from_utf8_lossy(name)))),
        }
        Ok(())
    }

    /// What is missing or contradicts itself, in the words that callers know.
    pub(crate) fn check(&self) -> Result<Drivers, Error> {
        let refuse = |text: &str| Err(Error::new(text));
        if self.log_max_files < 0 {
            return Err(Error::new(format!(
                "log-max-files must be non-negative, got {}",
                self.log_max_files
            )));
        }
        if self.log_rotate && self.log_max_files == 0 {
            return refuse("log-max-files must be at least 1 when log-rotate is enabled, got 0");
        }
        if self.cid.is_empty() {
            return refuse("Container ID not provided. Use --cid");
        }
        if let Some(level) = &self.log_level
            && !LEVELS.contains(&level.to_ascii_lowercase().as_str())
        {
            return Err(Error::new(format!("No such log level {level}")));
        }
        if self.restore.is_some() && self.exec {
            return refuse("Cannot use 'exec' and 'restore' at the same time");
        }
        if self.attach && !self.exec {
            return refuse("Attach can only be specified with exec");
        }
        if self.attach && !self.api {
            return refuse("Attach can only be specified for a non-legacy exec session");
        }
        if self.cuuid.is_none() && (!self.exec || self.api) {
            return refuse("Container UUID not provided. Use --cuuid");
        }
        if self.runtime.as_os_str().is_empty() {
            return refuse("Runtime path not provided. Use --runtime");
        }
        c_path(&self.runtime)
            .and_then(|path| faccessat(cwd(), &path, EXECUTE, 0))
            .doing(&format!("Runtime path {} is not valid", self.runtime.display()))?;
        if self.exec && self.process.is_none() {
            return refuse("Exec process spec path not provided. Use --exec-process-spec");
        }
        if self.exit_delay < 0 {
            return refuse("Delay before invoking exit command must be greater than or equal to 0");
        }
        self.drivers()
    }

    /// Both `driver:path` and a bare path are known; the last of several files counts.
    pub(crate) fn drivers(&self) -> Result<Drivers, Error> {
        if self.log_paths.is_empty() {
            return Err(Error::new("Log driver not provided. Use --log-path"));
        }
        let mut drivers = Drivers::default();
        for log_path in &self.log_paths {
            drivers.add(log_path.as_bytes())?;
        }
        if drivers.file.is_some() && !drivers.journal {
            if self.log_tag.is_some() {
                return Err(Error::new("k8s-file doesn't support --log-tag"));
            }
            if !self.log_labels.is_empty() {
                return Err(Error::new("k8s-file doesn't support --log-label"));
            }
        }
        if drivers.journal {
            if self.cuuid.as_deref().unwrap_or_default().len() <= journal::SHORT_ID {
                return Err(Error::new("Container ID must be longer than 12 characters"));
            }
            self.log_labels.iter().try_for_each(|label| journal::check_label(label))?;
        }
        if let Some(file) = &drivers.file {
            self.check_place(file)?;
        }
        Ok(drivers)
    }

    fn check_place(&self, file: &Path) -> Result<(), Error> {
        if self.log_allowed.is_empty() {
            return Ok(());
        }
        let parent = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = parent.canonicalize().at("resolve", parent)?;
        let allowed = |dir: &PathBuf| dir.canonicalize().is_ok_and(|dir| parent.starts_with(dir));
        if self.log_allowed.iter().any(allowed) {
            return Ok(());
        }
        Err(Error::new(format!("{} is in none of the allowed log directories", file.display())))
    }

    /// Where the attach socket and the control FIFOs are. A command of the old kind has none.
    pub(crate) fn bundle(&self) -> Option<PathBuf> {
        match &self.bundle {
            None if !self.exec => std::env::current_dir().ok(),
            given => given.clone(),
        }
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        let default = || format!("pidfile-{}", self.cid).into();
        self.container_pid_file.clone().unwrap_or_else(default)
    }

    pub(crate) fn socket_dir(&self) -> &Path {
        self.socket_dir.as_deref().unwrap_or(Path::new(SOCKET_DIR))
    }

    /// The id that logs and sockets have.
    pub(crate) fn uuid(&self) -> &str {
        self.cuuid.as_deref().unwrap_or(&self.cid)
    }
}

impl Drivers {
    fn add(&mut self, log_path: &[u8]) -> Result<(), Error> {
        let mut parts = log_path.split(|b| *b == b':').filter(|part| !part.is_empty());
        let Some(first) = parts.next() else {
            return Err(Error::new("log-path must not be empty"));
        };
        let path = |bytes: &[u8]| Some(PathBuf::from(OsStr::from_bytes(bytes)));
        let second = parts.next();
        if log_path[0] == b':' && second.is_none() {
            self.file = path(first);
            return Ok(());
        }
        match (first, second) {
            (b"off" | b"null" | b"none", _) => {}
            (b"passthrough", _) => self.passthrough = true,
            (b"journald", _) => self.journal = true,
            (b"k8s-file", Some(file)) => self.file = path(file),
            (b"k8s-file", None) => return Err(Error::new("k8s-file requires a filename")),
            (file, None) if !log_path.contains(&b':') => self.file = path(file),
            (driver, _) => {
                let driver = String::from_utf8_lossy(driver);
                return Err(Error::new(format!("No such log driver {driver}")));
            }
        }
        Ok(())
    }
}

struct Words<'a> {
    rest: std::slice::Iter<'a, OsString>,
    /// Of `--name=value`, not yet asked for.
    inline: Option<&'a [u8]>,
    /// Of `-abc`, not yet looked at: more options, or a value.
    letters: &'a [u8],
}

impl<'a> Words<'a> {
    fn option(&mut self) -> Result<Option<&'a [u8]>, Error> {
        if let Some(value) = self.inline {
            let value = String::from_utf8_lossy(value);
            return Err(Error::new(format!("a value, {value:?}, is given to an option that takes none")));
        }
        loop {
            if let Some((letter, letters)) = self.letters.split_first() {
                self.letters = letters;
                return long_name(*letter).map(Some);
            }
            let Some(word) = self.rest.next() else { return Ok(None) };
            match word.as_bytes() {
                b"--" => return Ok(None),
                long if long.starts_with(b"--") => {
                    let at = long.iter().position(|b| *b == b'=');
                    self.inline = at.map(|at| &long[at + 1..]);
                    return Ok(Some(&long[..at.unwrap_or(long.len())]));
                }
                [b'-', letters @ ..] => self.letters = letters,
                _ => {}
            }
        }
    }

    fn value(&mut self, name: &[u8]) -> Result<OsString, Error> {
        let letters = std::mem::take(&mut self.letters);
        let attached = self.inline.take().or(Some(letters).filter(|l| !l.is_empty()));
        if let Some(value) = attached {
            return Ok(OsStr::from_bytes(value).to_owned());
        }
        let missing = || Error::new(format!("Missing argument for {}", String::from_utf8_lossy(name)));
        self.rest.next().cloned().ok_or_else(missing)
    }
}

fn long_name(letter: u8) -> Result<&'static [u8], Error> {
    Ok(match letter {
        b'h' => b"--help",
        b'b' => b"--bundle",
        b'c' => b"--cid",
        b'P' => b"--conmon-pidfile",
        b'p' => b"--container-pidfile",
        b'u' => b"--cuuid",
        b'e' => b"--exec",
        b'l' => b"--log-path",
        b'n' => b"--name",
        b'0' => b"--persist-dir",
        b'r' => b"--runtime",
        b'i' => b"--stdin",
        b's' => b"--systemd-cgroup",
        b't' => b"--terminal",
        b'T' => b"--timeout",
        _ => return Err(Error::new(format!("Unknown option -{}", letter as char))),
    })
}

fn text(name: &[u8], value: OsString) -> Result<String, Error> {
    let invalid = |_| Error::new(format!("{} is not UTF-8", String::from_utf8_lossy(name)));
    value.into_string().map_err(invalid)
}

/// As strtol(3) reads it with a base of 0: decimal, hexadecimal after `0x`, octal after `0`.
fn number<T: TryFrom<i64>>(name: &[u8], value: OsString) -> Result<T, Error> {
    let name = String::from_utf8_lossy(name);
    let text = value.to_str().unwrap_or_default();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let (base, digits) = match (digits.strip_prefix("0x").or(digits.strip_prefix("0X")), digits) {
        (Some(hexadecimal), _) => (16, hexadecimal),
        (None, octal) if octal.len() > 1 && octal.starts_with('0') => (8, octal),
        (None, decimal) => (10, decimal),
    };
    let wrong = || Error::new(format!("Cannot parse integer value {text:?} for {name}"));
    // A second sign is none of a number.
    let starts_well = digits.starts_with(|c: char| c.is_ascii_alphanumeric());
    let value = i64::from_str_radix(&format!("{sign}{digits}"), base).ok().filter(|_| starts_well);
    let value = value.ok_or_else(wrong)?;
    T::try_from(value).map_err(|_| Error::new(format!("Integer value {text:?} for {name} out of range")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, Error> {
        Options::parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn every_spelling_of_an_option_is_taken() {
        let line = "--api-version 1 -c id -uuuid --runtime=/r -tis -l none -eb /b -P/p -0 /persist \
                    --exit-command-arg --rm --exit-command-arg x --log-size-max -1 --full-attach";
        let options = parse(line).unwrap();
        let expected = Options {
            api: true,
            cid: "id".into(),
            cuuid: Some("uuid".into()),
            runtime: "/r".into(),
            terminal: true,
            stdin: true,
            systemd_cgroup: true,
            log_paths: vec!["none".into()],
            exec: true,
            bundle: Some("/b".into()),
            conmon_pid_file: Some("/p".into()),
            persist_dir: Some("/persist".into()),
            exit_args: vec!["--rm".into(), "x".into()],
            log_size_max: -1,
            full_attach: true,
            log_max_files: 1,
            ..Options::default()
        };
        assert_eq!(options, expected);
        assert!(
            parse("--cid").is_err() && parse("-x").is_err() && parse("--log-max-files 2147483648").is_err()
        );
    }

    /// Of conmon 2.1 and 2.2, the deprecated ones too, and whether they take a value.
    const ALL: &[(&str, bool)] = &[
        ("--api-version", false),
        ("--bundle", true),
        ("--cid", true),
        ("--conmon-pidfile", true),
        ("--container-pidfile", true),
        ("--cuuid", true),
        ("--exec", false),
        ("--exec-attach", false),
        ("--exec-process-spec", true),
        ("--exit-command", true),
        ("--exit-command-arg", true),
        ("--exit-delay", true),
        ("--exit-dir", true),
        ("--full-attach", false),
        ("--help", false),
        ("--leave-stdin-open", false),
        ("--log-allowlist-dir", true),
        ("--log-global-size-max", true),
        ("--log-label", true),
        ("--log-level", true),
        ("--log-max-files", true),
        ("--log-path", true),
        ("--log-rotate", false),
        ("--log-size-max", true),
        ("--log-tag", true),
        ("--name", true),
        ("--no-container-partial-message", false),
        ("--no-new-keyring", false),
        ("--no-pivot", false),
        ("--no-sync-log", false),
        ("--persist-dir", true),
        ("--pidfile", true),
        ("--replace-listen-pid", false),
        ("--restore", true),
        ("--restore-arg", true),
        ("--runtime", true),
        ("--runtime-arg", true),
        ("--runtime-opt", true),
        ("--sdnotify-socket", true),
        ("--socket-dir-path", true),
        ("--stdin", false),
        ("--sync", false),
        ("--syslog", false),
        ("--systemd-cgroup", false),
        ("--terminal", false),
        ("--timeout", true),
        ("--version", false),
    ];

    #[test]
    fn every_option_of_conmon_is_kept_for_use_and_takes_a_value_if_conmons_does() {
        let none = parse("").unwrap();
        for (name, takes) in ALL {
            if !takes {
                assert_ne!(parse(name).unwrap(), none, "{name} has no effect");
                let text = parse(&format!("{name}=7")).unwrap_err().to_string();
                assert!(text.contains("takes none"), "{name}: {text}");
                assert!(parse(&format!("{name}=7 -c id")).is_err(), "{name} leaves its value to the next");
                continue;
            }
            let (inline, separate) = (format!("{name}=7"), format!("{name} 7"));
            assert_ne!(parse(&inline).unwrap(), none, "{name} has no effect");
            assert_eq!(parse(&inline).unwrap(), parse(&separate).unwrap(), "{name}");
            let text = parse(name).unwrap_err().to_string();
            assert_eq!(text, format!("Missing argument for {name}"));
        }
        for refused in ["--seccomp-notify-socket", "--seccomp-notify-plugins"] {
            let text = parse(&format!("{refused}=7")).unwrap_err().to_string();
            assert!(text.contains("not supported"), "{refused}: {text}");
        }
        let deprecated = ["--pidfile", "--restore-arg"];
        for (name, _) in ALL.iter().filter(|(name, _)| !deprecated.contains(name)) {
            let listed = |line: &str| line.split([' ', ',']).any(|word| word == *name);
            assert!(HELP.lines().any(listed), "{name} is not in the help text");
        }
    }

    #[test]
    fn short_options_are_the_long_ones() {
        let pairs = [
            ("-b", "--bundle"),
            ("-c", "--cid"),
            ("-P", "--conmon-pidfile"),
            ("-p", "--container-pidfile"),
            ("-u", "--cuuid"),
            ("-l", "--log-path"),
            ("-n", "--name"),
            ("-0", "--persist-dir"),
            ("-r", "--runtime"),
            ("-T", "--timeout"),
        ];
        for (short, long) in pairs {
            assert_eq!(
                parse(&format!("{short} 7")).unwrap(),
                parse(&format!("{long} 7")).unwrap(),
                "{short}"
            );
        }
        for (short, long) in [
            ("-e", "--exec"),
            ("-i", "--stdin"),
            ("-s", "--systemd-cgroup"),
            ("-t", "--terminal"),
            ("-h", "--help"),
        ] {
            assert_eq!(parse(short).unwrap(), parse(long).unwrap(), "{short}");
        }
    }

    #[test]
    fn numbers_are_read_as_c_does() {
        let read = |text: &str| number::<i32>(b"--n", text.into()).ok();
        for (text, value) in
            [("10", 10), ("-1", -1), ("+3", 3), ("0", 0), ("0x1f", 31), ("010", 8), ("-0x10", -16)]
        {
            assert_eq!(read(text), Some(value), "{text}");
        }
        for bad in ["", "x", "1x", "0x", "09", "--1", "+-1", "-", "2147483648", "0x-1"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn log_paths_name_drivers_and_files() {
        let check = |paths: &str, expected: Result<(Option<&str>, bool, bool), &str>| {
            let mut drivers = Drivers::default();
            let added = paths.split(' ').try_for_each(|path| drivers.add(path.as_bytes()));
            let found = added.map(|()| (drivers.file, drivers.journal, drivers.passthrough));
            let expected = expected.map(|(file, journal, pass)| (file.map(PathBuf::from), journal, pass));
            assert_eq!(found.map_err(|e| e.to_string()), expected.map_err(str::to_owned), "{paths}");
        };
        check("/a/log", Ok((Some("/a/log"), false, false)));
        check("k8s-file:/a", Ok((Some("/a"), false, false)));
        check(":/a", Ok((Some("/a"), false, false)));
        check(":journald", Ok((Some("journald"), false, false)));
        check("journald: k8s-file:/a", Ok((Some("/a"), true, false)));
        check("journald", Ok((None, true, false)));
        check("none: off null:x", Ok((None, false, false)));
        check("passthrough", Ok((None, false, true)));
        check(":", Err("log-path must not be empty"));
        check("k8s-file:", Err("k8s-file requires a filename"));
        check("what:", Err("No such log driver what"));
    }
}
