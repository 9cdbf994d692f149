//! The command line, parsed by hand: an argument library costs more memory than the monitor.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::Error;
use crate::journal::check_label;
use crate::{compress, sockets, writer};

pub(crate) const HELP: &str = "\
keel-shim: monitors one container

keel-shim run --id ID --dir DIR --bundle DIR --runtime PATH --exit-file FILE
          [--runtime-root DIR] [--runtime-arg ARG]... [--tty] [--stdin] [--stdin-once]
          [--log FILE | --log-raw FILE] [--log-journal] [--log-...]
          [--restart always|on-failure --restart-lock FILE --restart-command WORD...]
          [--listen NAME=tcp|udp:ADDRESS:PORT]... [--netns FILE] [--listen-from DIR] [--preserve-fds N]
          [--notify] [--notify-to SOCKET]
    Creates and starts the container, prints `ok <pid>` or `error <reason>`, and keeps a
    monitor behind that ends after the container.
      --dir            directory for sockets, FIFOs and pid files of this container
      --exit-file      how the container ended is written here, durably
      --runtime-arg    passed to the runtime before its command; may be repeated
      --log            CRI-format log; without any log output goes to attachments only
      --log-raw        the output as it is, both streams in one file
      --log-max-bytes  a log file larger than this is rotated (default 10485760)
      --log-max-age    so is one older than so many seconds, when the next output comes
      --log-max-files  log files kept, the current one counted (default 5)
      --log-max-total  bytes of all of them together, the oldest of which go for it
      --log-compress   rotated files become FILE.1.gz and so on
      --log-journal    a message of the journal for each line
      --log-name, --log-tag, --log-label NAME=VALUE
                       the messages' CONTAINER_NAME, CONTAINER_TAG, and further fields
      --log-buffer     never wait for a log: output beyond so many bytes that a log has not
                       taken yet is dropped, counted, and told in the log (a second process)
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

keel-shim upgrade --dir DIR
    Has the monitor of DIR become the program that now has its name. The container does
    not notice; attachments end. Refused while it runs commands or stops the container.

keel-shim pause
    Reaps and waits: the first process of a pid namespace that containers share.

keel-shim --version | --help
";

/// Ten files of this size read comfortably, and five of them bound a container at 50 MiB.
const LOG_MAX_BYTES: u64 = 10 << 20;
const LOG_MAX_FILES: u32 = 5;
/// The buffer is a pipe: the kernel's default, and what it gives without asking the administrator.
const MIN_BUFFER: usize = 64 << 10;
const MAX_BUFFER: usize = 1 << 20;

pub(crate) enum Command {
    Help,
    Version,
    Run(Box<Options>),
    Adopt(AdoptOptions),
    /// Of the monitor of this directory.
    Upgrade(PathBuf),
    /// `run` and `adopt` in their own session, with the report going to a pipe.
    Setup(Box<Options>),
    SetupAdopt(AdoptOptions),
    Hold(Inherited),
    Call(Call),
    Pause,
    /// Standard input to standard output.
    Compress,
    WriteLog(WriterOptions),
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
    pub(crate) log: LogOptions,
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

/// Where output is kept, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogOptions {
    pub(crate) file: Option<PathBuf>,
    /// The file holds the output as it comes.
    pub(crate) raw: bool,
    pub(crate) max_bytes: u64,
    pub(crate) max_files: u32,
    /// Seconds.
    pub(crate) max_age: Option<u64>,
    pub(crate) max_total: Option<u64>,
    pub(crate) compress: bool,
    pub(crate) journal: bool,
    pub(crate) name: Option<String>,
    pub(crate) tag: Option<String>,
    pub(crate) labels: Vec<String>,
    /// Bytes between the monitor and its logs, if it shall not wait for them.
    pub(crate) buffer: Option<usize>,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions {
            file: None,
            raw: false,
            max_bytes: LOG_MAX_BYTES,
            max_files: LOG_MAX_FILES,
            max_age: None,
            max_total: None,
            compress: false,
            journal: false,
            name: None,
            tag: None,
            labels: Vec::new(),
            buffer: None,
        }
    }
}

impl LogOptions {
    pub(crate) fn any(&self) -> bool {
        self.file.is_some() || self.journal
    }

    /// The one list of names: the command line, the memory of a shim and the call of a writer are made of it.
    pub(crate) fn fields(&self) -> Vec<(&'static str, Option<OsString>)> {
        let number = |n: u64| Some(OsString::from(n.to_string()));
        let mut fields = Vec::new();
        if let Some(file) = &self.file {
            fields.push((if self.raw { "log-raw" } else { "log" }, Some(file.clone().into())));
        }
        fields.push(("log-max-bytes", number(self.max_bytes)));
        fields.push(("log-max-files", number(self.max_files.into())));
        fields.extend(self.max_age.map(|age| ("log-max-age", number(age))));
        fields.extend(self.max_total.map(|total| ("log-max-total", number(total))));
        fields.extend(self.compress.then_some(("log-compress", None)));
        fields.extend(self.journal.then_some(("log-journal", None)));
        fields.extend(self.name.iter().map(|name| ("log-name", Some(name.into()))));
        fields.extend(self.tag.iter().map(|tag| ("log-tag", Some(tag.into()))));
        fields.extend(self.labels.iter().map(|label| ("log-label", Some(label.into()))));
        fields.extend(self.buffer.map(|bytes| ("log-buffer", number(bytes as u64))));
        fields
    }

    /// `false`: no name of ours.
    pub(crate) fn set<'a>(
        &mut self,
        name: &[u8],
        value: impl FnOnce() -> Result<&'a OsStr, Error>,
    ) -> Result<bool, Error> {
        match name {
            b"log" | b"log-raw" => {
                let raw = name == b"log-raw";
                if self.file.is_some() && self.raw != raw {
                    return Err(Error::new("only one of --log and --log-raw can be given"));
                }
                self.raw = raw;
                self.file = Some(value()?.into());
            }
            b"log-max-bytes" => self.max_bytes = number(name, value()?)?,
            b"log-max-files" => self.max_files = number(name, value()?)?,
            b"log-max-age" => self.max_age = Some(number(name, value()?)?),
            b"log-max-total" => self.max_total = Some(number(name, value()?)?),
            b"log-compress" => self.compress = true,
            b"log-journal" => self.journal = true,
            b"log-name" => self.name = Some(text(name, value()?)?),
            b"log-tag" => self.tag = Some(text(name, value()?)?),
            b"log-label" => self.labels.push(text(name, value()?)?),
            b"log-buffer" => self.buffer = Some(number(name, value()?)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(crate) fn to_words(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        for (name, value) in self.fields() {
            words.push(format!("--{name}").into());
            words.extend(value);
        }
        words
    }

    fn check(&self) -> Result<(), Error> {
        if self.max_bytes == 0 || self.max_files == 0 {
            return Err(Error::new("--log-max-bytes and --log-max-files must be at least 1"));
        }
        if self.max_total.is_some_and(|total| total < self.max_bytes) {
            return Err(Error::new("--log-max-total must be at least --log-max-bytes"));
        }
        if let Some(buffer) = self.buffer.filter(|bytes| !(MIN_BUFFER..=MAX_BUFFER).contains(bytes)) {
            return Err(Error::new(format!(
                "--log-buffer must be between {MIN_BUFFER} and {MAX_BUFFER}, not {buffer}"
            )));
        }
        self.labels.iter().try_for_each(|label| check_label(label))
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

/// What a writer of logs gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WriterOptions {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    pub(crate) log: LogOptions,
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
    /// There is one, and it is asked through standard error.
    pub(crate) helper: bool,
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
            b"upgrade" => AdoptOptions::parse(rest).map(|o| Command::Upgrade(o.dir)),
            b"setup-adopt" => AdoptOptions::parse(rest).map(Command::SetupAdopt),
            b"pause" if rest.is_empty() => Ok(Command::Pause),
            b"call" => Call::parse(rest).map(Command::Call),
            verb if verb == compress::VERB.as_bytes() => Ok(Command::Compress),
            verb if verb == writer::VERB.as_bytes() => WriterOptions::parse(rest).map(Command::WriteLog),
            b"hold" => Inherited::parse(rest).map(Command::Hold),
            _ => Err(Error::new(format!("unknown command {verb:?}"))),
        }
    }
}

impl Options {
    fn parse(words: &[OsString]) -> Result<Options, Error> {
        let mut options = Options::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            let mut value = || words.value(name, inline);
            if options.log.set(&name[2..], &mut value)? {
                continue;
            }
            match name {
                b"--id" => options.id = text(name, value()?)?,
                b"--dir" => options.dir = value()?.into(),
                b"--bundle" => options.bundle = value()?.into(),
                b"--runtime" => options.runtime = value()?.into(),
                b"--runtime-root" => options.runtime_root = Some(value()?.into()),
                b"--runtime-arg" => options.runtime_args.push(value()?.to_owned()),
                b"--exit-file" => options.exit_file = value()?.into(),
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
        self.log.check()
    }
}

impl AdoptOptions {
    fn parse(words: &[OsString]) -> Result<AdoptOptions, Error> {
        let mut options = AdoptOptions::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            // Given by callers that repeat the options of `run`; what counts is what `run` remembered.
            if LogOptions::default().set(&name[2..], || words.value(name, inline))? {
                continue;
            }
            let value = words.value(name, inline)?;
            match name {
                b"--dir" => options.dir = value.into(),
                b"--pidfd" => options.pidfd = Some(number(name, value)?),
                b"--terminal" => options.terminal = Some(number(name, value)?),
                b"--runtime" => options.runtime = Some(value.into()),
                b"--id" | b"--exit-file" | b"--runtime-root" | b"--bundle" | b"--runtime-arg"
                | b"--restart" | b"--restart-lock" | b"--restart-command" | b"--listen" | b"--netns"
                | b"--listen-from" | b"--notify-to" => {}
                _ => return Err(unknown(name)),
            }
        }
        if options.dir.as_os_str().is_empty() {
            return Err(Error::new("--dir is missing"));
        }
        Ok(options)
    }
}

impl WriterOptions {
    fn parse(words: &[OsString]) -> Result<WriterOptions, Error> {
        let mut options = WriterOptions::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            let mut value = || words.value(name, inline);
            match name {
                b"--id" => options.id = text(name, value()?)?,
                b"--dir" => options.dir = value()?.into(),
                _ if options.log.set(&name[2..], &mut value)? => {}
                _ => return Err(unknown(name)),
            }
        }
        Ok(options)
    }

    pub(crate) fn to_words(&self) -> Vec<OsString> {
        let mut words = vec!["--id".into(), self.id.clone().into(), "--dir".into(), self.dir.clone().into()];
        words.extend(self.log.to_words());
        words
    }
}

impl Inherited {
    fn parse(words: &[OsString]) -> Result<Inherited, Error> {
        let mut inherited = Inherited::default();
        let mut words = Words(words);
        while let Some((name, inline)) = words.option()? {
            if name == b"--helper" {
                inherited.helper = true;
                continue;
            }
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
        words.extend(self.helper.then(|| "--helper".into()));
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
        assert_eq!(options.log, LogOptions::default());
        assert_eq!(options.dir, PathBuf::from("/d"));
        let more = format!("{LEAST} --runtime-arg --debug --runtime-arg=x --stdin-once --log-max-bytes=7");
        let Ok(Command::Run(options)) = Command::parse(&words(&more)) else { panic!() };
        assert_eq!(options.runtime_args, ["--debug", "x"]);
        assert!(options.stdin && options.stdin_once && !options.tty);
        assert_eq!(options.log.max_bytes, 7);
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
        check(&format!("{LEAST} --log-max-files x"), "log-max-files \"x\" is not a number");
        check(&format!("{LEAST} --log-max-total 5"), "--log-max-total must be at least --log-max-bytes");
        check(&format!("{LEAST} --log a --log-raw b"), "only one of --log and --log-raw can be given");
        check(&format!("{LEAST} --log-buffer 5"), "--log-buffer must be between 65536 and 1048576, not 5");
        check(
            &format!("{LEAST} --log-label a=b"),
            "Container label names must contain only uppercase letters, numbers and underscore (in 'a=b')",
        );
        check(
            &format!("{LEAST} --log-max-files 0"),
            "--log-max-bytes and --log-max-files must be at least 1",
        );
    }

    #[test]
    fn log_options_survive_as_words() {
        let log = LogOptions {
            file: Some("/l".into()),
            raw: true,
            max_bytes: 7,
            max_files: 3,
            max_age: Some(60),
            max_total: Some(99),
            compress: true,
            journal: true,
            name: Some("n m".into()),
            tag: Some("t".into()),
            labels: vec!["A=b".into(), "C=d=".into()],
            buffer: Some(70_000),
        };
        let mut read = LogOptions::default();
        let words = log.to_words();
        let mut words = Words(&words);
        while let Some((name, inline)) = words.option().unwrap() {
            assert!(read.set(&name[2..], || words.value(name, inline)).unwrap(), "{name:?}");
        }
        assert_eq!(read, log);
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
            helper: true,
            sockets: vec![8, 9],
        };
        let Ok(Command::Hold(parsed)) = Command::parse(&inherited.to_words()) else { panic!() };
        assert_eq!(parsed, inherited);
    }
}
