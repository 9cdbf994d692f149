//! The command line, parsed by hand: an argument library costs more memory than the monitor.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::Error;
use crate::sockets;

pub(crate) const HELP: &str = "\
keel-shim: monitors one container

keel-shim run --id ID --dir DIR --bundle DIR --runtime PATH --exit-file FILE
          [--runtime-root DIR] [--runtime-arg ARG]... [--log FILE]
          [--log-max-bytes N] [--log-max-files N] [--log-max-age SECONDS] [--tty] [--stdin] [--stdin-once]
          [--restart always|on-failure --restart-lock FILE --restart-command WORD...]
          [--listen NAME=tcp|udp:ADDRESS:PORT]... [--netns FILE] [--listen-from DIR] [--preserve-fds N]
          [--notify] [--notify-to SOCKET]
    Creates and starts the container, prints `ok <pid>` or `error <reason>`, and keeps a
    monitor behind that ends after the container.
      --dir            directory for sockets, FIFOs and pid files of this container
      --exit-file      how the container ended is written here, durably
      --runtime-arg    passed to the runtime before its command; may be repeated
      --log            CRI-format log; without it output goes to attachments only
      --log-max-bytes  a log file larger than this is rotated (default 10485760)
      --log-max-age    so is one that is older, when the next output comes
      --log-max-files  log files kept, the current one counted (default 5)
      --tty            the container has a terminal
      --stdin          the container has an input; otherwise it reads end of file
      --stdin-once     the input ends when the first attachment closes it
      --restart        after which ends the monitor stays until somebody has seen to a restart; an end
                       that was asked for is not among them
      --restart-lock   whoever locks this file (flock), and has written its pid into it, sees to
                       restarts; nothing is done before that process has gone
      --restart-command
                       program or argument of the command that does it otherwise; repeated. It answers with
                       a line `done`, or `wait <milliseconds>` to be called again
      --listen         a socket that the container is given (LISTEN_FDS) and the monitor holds, for the
                       next run too; at most 8
      --netns          the network namespace that they are opened in
      --listen-from    the directory of the run before, whose monitor is asked for its sockets first
      --preserve-fds   so many descriptors from 3 on go to the container, after the sockets
      --notify         DIR/notify/notify.sock takes sd_notify messages; after READY=1 there is DIR/ready
      --notify-to      those that a container may send are passed on to this socket

keel-shim adopt --dir DIR [--runtime PATH] [--pidfd N] [--terminal N]
    Takes over a container whose monitor was killed. Inherited descriptors that somebody
    kept can be given by number. Other options of `run` are ignored: the container keeps
    what it was started with.

keel-shim pause
    Reaps and waits: the first process of a pid namespace that containers share.

keel-shim --version | --help
";

/// Ten files of this size read comfortably, and five of them bound a container at 50 MiB.
const LOG_MAX_BYTES: u64 = 10 << 20;
const LOG_MAX_FILES: u32 = 5;

pub(crate) enum Command {
    Help,
    Version,
    Run(Box<Options>),
    Adopt(AdoptOptions),
    /// `run` and `adopt` in their own session, with the report going to a pipe.
    Setup(Box<Options>),
    SetupAdopt(AdoptOptions),
    Hold(Inherited),
    Call(Call),
    Pause,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    pub(crate) bundle: PathBuf,
    pub(crate) runtime: PathBuf,
    pub(crate) runtime_root: Option<PathBuf>,
    pub(crate) runtime_args: Vec<OsString>,
    pub(crate) exit_file: PathBuf,
    pub(crate) log: Option<PathBuf>,
    pub(crate) log_max_bytes: u64,
    pub(crate) log_max_files: u32,
    /// Seconds.
    pub(crate) log_max_age: Option<u64>,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    pub(crate) stdin_once: bool,
    pub(crate) restart: Option<Restart>,
    pub(crate) restart_lock: Option<PathBuf>,
    pub(crate) restart_command: Vec<OsString>,
    pub(crate) listen: Vec<String>,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) listen_from: Option<PathBuf>,
    pub(crate) preserve_fds: u32,
    pub(crate) notify: bool,
    pub(crate) notify_to: Option<OsString>,
}

/// After which ends a container is to run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restart {
    Always,
    OnFailure,
}

impl Restart {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Restart::Always => "always",
            Restart::OnFailure => "on-failure",
        }
    }

    pub(crate) fn parse(name: &[u8]) -> Option<Restart> {
        [Restart::Always, Restart::OnFailure].into_iter().find(|r| r.name().as_bytes() == name)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AdoptOptions {
    pub(crate) dir: PathBuf,
    /// The program may have moved since.
    pub(crate) runtime: Option<PathBuf>,
    pub(crate) pidfd: Option<RawFd>,
    pub(crate) terminal: Option<RawFd>,
}

/// What the hold phase gets through `execve`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inherited {
    pub(crate) dir: PathBuf,
    pub(crate) pidfd: Option<RawFd>,
    pub(crate) listener: Option<RawFd>,
    pub(crate) stdin: Option<RawFd>,
    pub(crate) stdout: Option<RawFd>,
    pub(crate) stderr: Option<RawFd>,
    pub(crate) notify: Option<RawFd>,
    pub(crate) sockets: Vec<RawFd>,
}

/// A program that gets descriptors from 3 on, the first of them sockets as of a service manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) fds: Vec<RawFd>,
    pub(crate) listen: usize,
    pub(crate) words: Vec<OsString>,
}

impl Command {
    pub(crate) fn parse(words: &[OsString]) -> Result<Command, Error> {
        let (verb, rest) = words.split_first().ok_or_else(|| Error::new("no command given"))?;
        match verb.as_bytes() {
            b"--help" | b"-h" | b"help" => Ok(Command::Help),
            b"--version" | b"-V" => Ok(Command::Version),
            b"run" => Options::parse(rest).map(|o| Command::Run(Box::new(o))),
            b"setup" => Options::parse(rest).map(|o| Command::Setup(Box::new(o))),
            b"adopt" => AdoptOptions::parse(rest).map(Command::Adopt),
            b"setup-adopt" => AdoptOptions::parse(rest).map(Command::SetupAdopt),
            b"pause" if rest.is_empty() => Ok(Command::Pause),
            b"call" => Call::parse(rest).map(Command::Call),
            b"hold" => Inherited::parse(rest).map(Command::Hold),
            _ => Err(Error::new(format!("unknown command {verb:?}"))),
        }
    }
}

impl Options {
    fn parse(words: &[OsString]) -> Result<Options, Error> {
        let mut options =
            Options { log_max_bytes: LOG_MAX_BYTES, log_max_files: LOG_MAX_FILES, ..Options::default() };
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            let mut value = || words.value(name, inline);
            match name {
                b"--id" => options.id = text(name, value()?)?,
                b"--dir" => options.dir = value()?.into(),
                b"--bundle" => options.bundle = value()?.into(),
                b"--runtime" => options.runtime = value()?.into(),
                b"--runtime-root" => options.runtime_root = Some(value()?.into()),
                b"--runtime-arg" => options.runtime_args.push(value()?.to_owned()),
                b"--exit-file" => options.exit_file = value()?.into(),
                b"--log" => options.log = Some(value()?.into()),
                b"--log-max-bytes" => options.log_max_bytes = number(name, value()?)?,
                b"--log-max-age" => options.log_max_age = Some(number(name, value()?)?),
                b"--log-max-files" => options.log_max_files = number(name, value()?)?,
                b"--restart" => {
                    let value = value()?;
                    let unknown =
                        || Error::new(format!("--restart {value:?} is neither always nor on-failure"));
                    options.restart = Some(Restart::parse(value.as_bytes()).ok_or_else(unknown)?);
                }
                b"--restart-lock" => options.restart_lock = Some(value()?.into()),
                b"--restart-command" => options.restart_command.push(value()?.to_owned()),
                b"--listen" => options.listen.push(text(name, value()?)?),
                b"--netns" => options.netns = Some(value()?.into()),
                b"--listen-from" => options.listen_from = Some(value()?.into()),
                b"--preserve-fds" => options.preserve_fds = number(name, value()?)?,
                b"--notify" => options.notify = true,
                b"--notify-to" => {
                    options.notify = true;
                    options.notify_to = Some(value()?.to_owned());
                }
                b"--tty" => options.tty = true,
                b"--stdin" => options.stdin = true,
                b"--stdin-once" => {
                    options.stdin = true;
                    options.stdin_once = true;
                }
                _ => return Err(unknown(name)),
            }
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<(), Error> {
        let needed: [(&str, &OsStr); 5] = [
            ("--id", self.id.as_ref()),
            ("--dir", self.dir.as_ref()),
            ("--bundle", self.bundle.as_ref()),
            ("--runtime", self.runtime.as_ref()),
            ("--exit-file", self.exit_file.as_ref()),
        ];
        if let Some((name, _)) = needed.iter().find(|(_, value)| value.is_empty()) {
            return Err(Error::new(format!("{name} is missing")));
        }
        self.listen.iter().try_for_each(|text| sockets::check(text))?;
        if self.listen.len() > sockets::MOST {
            return Err(Error::new(format!("--listen can be given {} times", sockets::MOST)));
        }
        let whole = self.restart_lock.is_some() && !self.restart_command.is_empty();
        if self.restart.is_some() && !whole {
            return Err(Error::new("--restart needs --restart-lock and --restart-command"));
        }
        if self.log_max_bytes == 0 || self.log_max_files == 0 {
            return Err(Error::new("--log-max-bytes and --log-max-files must be at least 1"));
        }
        Ok(())
    }
}

impl AdoptOptions {
    fn parse(words: &[OsString]) -> Result<AdoptOptions, Error> {
        let mut options = AdoptOptions::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            let value = words.value(name, inline)?;
            match name {
                b"--dir" => options.dir = value.into(),
                b"--pidfd" => options.pidfd = Some(number(name, value)?),
                b"--terminal" => options.terminal = Some(number(name, value)?),
                // Given by callers that repeat the options of `run`; what counts is what `run` remembered.
                b"--runtime" => options.runtime = Some(value.into()),
                b"--id" | b"--exit-file" | b"--runtime-root" | b"--bundle" | b"--log" | b"--log-max-age"
                | b"--log-max-bytes" | b"--log-max-files" | b"--runtime-arg" | b"--restart"
                | b"--restart-lock" | b"--restart-command" | b"--listen" | b"--netns" | b"--listen-from"
                | b"--notify-to" => {}
                _ => return Err(unknown(name)),
            }
        }
        if options.dir.as_os_str().is_empty() {
            return Err(Error::new("--dir is missing"));
        }
        Ok(options)
    }
}

impl Inherited {
    fn parse(words: &[OsString]) -> Result<Inherited, Error> {
        let mut inherited = Inherited::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            let value = words.value(name, inline)?;
            let slot = match name {
                b"--dir" => {
                    inherited.dir = value.into();
                    continue;
                }
                b"--pidfd" => &mut inherited.pidfd,
                b"--listener" => &mut inherited.listener,
                b"--stdin" => &mut inherited.stdin,
                b"--stdout" => &mut inherited.stdout,
                b"--stderr" => &mut inherited.stderr,
                b"--notify" => &mut inherited.notify,
                b"--socket" => {
                    inherited.sockets.push(number(name, value)?);
                    continue;
                }
                _ => return Err(unknown(name)),
            };
            *slot = Some(number(name, value)?);
        }
        Ok(inherited)
    }

    pub(crate) fn to_words(&self) -> Vec<OsString> {
        let mut words = vec!["hold".into(), "--dir".into(), self.dir.clone().into_os_string()];
        let numbers = [
            ("--pidfd", self.pidfd),
            ("--listener", self.listener),
            ("--stdin", self.stdin),
            ("--stdout", self.stdout),
            ("--stderr", self.stderr),
            ("--notify", self.notify),
        ];
        for (name, number) in numbers {
            if let Some(number) = number {
                words.extend([name.into(), number.to_string().into()]);
            }
        }
        words.extend(self.sockets.iter().flat_map(|fd| ["--socket".into(), fd.to_string().into()]));
        words
    }
}

impl Call {
    fn parse(words: &[OsString]) -> Result<Call, Error> {
        let mut call = Call::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            match name {
                b"--fd" => call.fds.push(number(name, words.value(name, inline)?)?),
                b"--listen" => call.listen = number(name, words.value(name, inline)?)?,
                b"--" => {
                    call.words = words.0.to_vec();
                    return Ok(call);
                }
                _ => return Err(unknown(name)),
            }
        }
        Ok(call)
    }
}

/// `--name value` and `--name=value`.
struct Words<'a>(&'a [OsString]);

type Split<'a> = (&'a [u8], Option<&'a OsStr>);

impl<'a> Words<'a> {
    fn option(&mut self) -> Result<Option<Split<'a>>, Error> {
        let Some((word, rest)) = self.0.split_first() else {
            return Ok(None);
        };
        self.0 = rest;
        let bytes = word.as_bytes();
        if !bytes.starts_with(b"--") {
            return Err(Error::new(format!("unexpected argument {word:?}")));
        }
        Ok(Some(match bytes.iter().position(|b| *b == b'=') {
            Some(at) => (&bytes[..at], Some(OsStr::from_bytes(&bytes[at + 1..]))),
            None => (bytes, None),
        }))
    }

    fn value(&mut self, name: &[u8], inline: Option<&'a OsStr>) -> Result<&'a OsStr, Error> {
        if let Some(value) = inline {
            return Ok(value);
        }
        let missing = || Error::new(format!("{} needs a value", String::from_utf8_lossy(name)));
        let (value, rest) = self.0.split_first().ok_or_else(missing)?;
        self.0 = rest;
        Ok(value)
    }
}

fn unknown(name: &[u8]) -> Error {
    Error::new(format!("unknown option {}", String::from_utf8_lossy(name)))
}

fn text(name: &[u8], value: &OsStr) -> Result<String, Error> {
    let invalid = || Error::new(format!("{} is not UTF-8", String::from_utf8_lossy(name)));
    value.to_str().map(str::to_owned).ok_or_else(invalid)
}

fn number<T: std::str::FromStr>(name: &[u8], value: &OsStr) -> Result<T, Error> {
    let invalid = || Error::new(format!("{} {value:?} is not a number", String::from_utf8_lossy(name)));
    value.to_str().and_then(|v| v.parse().ok()).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    const LEAST: &str = "run --id a --dir=/d --bundle /b --runtime /r --exit-file /e";

    #[test]
    fn run_has_its_defaults_and_takes_both_spellings() {
        let Ok(Command::Run(options)) = Command::parse(&words(LEAST)) else { panic!() };
        assert_eq!((options.log_max_bytes, options.log_max_files), (10 << 20, 5));
        assert_eq!(options.dir, PathBuf::from("/d"));
        let more = format!("{LEAST} --runtime-arg --debug --runtime-arg=x --stdin-once --log-max-bytes=7");
        let Ok(Command::Run(options)) = Command::parse(&words(&more)) else { panic!() };
        assert_eq!(options.runtime_args, ["--debug", "x"]);
        assert!(options.stdin && options.stdin_once && !options.tty);
        assert_eq!(options.log_max_bytes, 7);
    }

    #[test]
    fn mistakes_are_named() {
        let check = |line: &str, message: &str| match Command::parse(&words(line)) {
            Err(e) => assert_eq!(e.to_string(), message),
            Ok(_) => panic!("{line} is accepted"),
        };
        check("run --id a", "--dir is missing");
        check("run --id", "--id needs a value");
        check("run --what", "unknown option --what");
        check("run x", "unexpected argument \"x\"");
        check("fly", "unknown command \"fly\"");
        check(&format!("{LEAST} --restart=never"), "--restart \"never\" is neither always nor on-failure");
        let part = "--restart needs --restart-lock and --restart-command";
        check(&format!("{LEAST} --restart=always --restart-lock /l"), part);
        check(&format!("{LEAST} --log-max-files x"), "--log-max-files \"x\" is not a number");
        check(
            &format!("{LEAST} --log-max-files 0"),
            "--log-max-bytes and --log-max-files must be at least 1",
        );
    }

    #[test]
    fn inherited_descriptors_survive_the_command_line() {
        let inherited = Inherited {
            dir: "/some dir".into(),
            pidfd: Some(3),
            listener: Some(4),
            stdin: None,
            stdout: Some(6),
            stderr: None,
            notify: Some(7),
            sockets: vec![8, 9],
        };
        let Ok(Command::Hold(parsed)) = Command::parse(&inherited.to_words()) else { panic!() };
        assert_eq!(parsed, inherited);
    }
}
