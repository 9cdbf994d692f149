//! The journal: one datagram for each line, in journald's own protocol.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use keel_proto::Stream;

use crate::args::LogOptions;
use crate::error::Error;
use crate::log::Lost;

/// Letters of the container's id in `CONTAINER_ID`.
pub(crate) const SHORT_ID: usize = 12;
/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// A longer line goes in parts. Well below what a datagram may hold.
const LINE: usize = 16 << 10;
/// How long a journal that does not take messages holds up the container.
const PATIENCE: Duration = Duration::from_millis(500);
/// After that, and while there is no journal, messages are counted as lost for so long before the next try.
const PAUSE: Duration = Duration::from_secs(1);
/// Syslog priorities.
const INFO: u8 = 6;
const ERR: u8 = 3;

/// What every message of a container carries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) tag: Option<String>,
    /// `NAME=value`.
    pub(crate) labels: Vec<String>,
    /// Whether parts of long lines are marked as such.
    pub(crate) mark_partial: bool,
}

pub(crate) struct Journal {
    path: PathBuf,
    socket: Option<UnixDatagram>,
    retry_at: Option<Instant>,
    /// Encoded, the same in every message.
    fields: Vec<u8>,
    mark_partial: bool,
    /// Beginnings of lines: stdout, stderr.
    begun: [Vec<u8>; 2],
    /// Within a line of which parts are in the journal already.
    partial: [bool; 2],
    pub(crate) lost: Lost,
    /// Not yet told in the journal.
    untold: Lost,
}

impl Fields {
    pub(crate) fn of(id: &str, options: &LogOptions) -> Fields {
        Fields {
            id: id.to_owned(),
            name: options.name.clone(),
            tag: options.tag.clone(),
            labels: options.labels.clone(),
            mark_partial: true,
        }
    }
}

impl Journal {
    pub(crate) fn new(fields: &Fields) -> Journal {
        Journal::at(SOCKET.into(), fields)
    }

    fn at(path: PathBuf, fields: &Fields) -> Journal {
        Journal {
            path,
            socket: None,
            retry_at: None,
            fields: encode(fields),
            mark_partial: fields.mark_partial,
            begun: [Vec::new(), Vec::new()],
            partial: [false; 2],
            lost: Lost::default(),
            untold: Lost::default(),
        }
    }

    pub(crate) fn append(&mut self, stream: Stream, bytes: &[u8]) {
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            match line.strip_suffix(b"\n") {
                Some(end) => self.line(stream, end, true),
                None => self.line(stream, line, false),
            }
        }
    }

    /// What was begun and will not be ended.
    pub(crate) fn close(&mut self, stream: Stream) {
        if !self.begun[index(stream)].is_empty() {
            self.line(stream, b"", true);
        }
    }

    fn line(&mut self, stream: Stream, mut text: &[u8], ends: bool) {
        let index = index(stream);
        loop {
            let mut begun = std::mem::take(&mut self.begun[index]);
            let room = LINE - begun.len();
            let (now, later) = text.split_at(text.len().min(room));
            text = later;
            if text.is_empty() && !ends && begun.len() + now.len() < LINE {
                begun.extend_from_slice(now);
                self.begun[index] = begun;
                return;
            }
            let whole = ends && text.is_empty();
            self.send(stream, &begun, now, !whole);
            self.partial[index] = !whole;
            if text.is_empty() {
                return;
            }
        }
    }

    fn send(&mut self, stream: Stream, begun: &[u8], rest: &[u8], partial: bool) {
        let mut text = [begun, rest].concat();
        let mut priority = if stream == Stream::Stderr { ERR } else { INFO };
        // A service says how grave a line is as it does to systemd.
        if !self.partial[index(stream)]
            && let [b'<', digit @ b'0'..=b'7', b'>', ..] = text[..]
        {
            priority = digit - b'0';
            text.drain(..3);
        }
        let mut message = self.message(&text, priority);
        if partial && self.mark_partial {
            field(&mut message, "CONTAINER_PARTIAL_MESSAGE", b"true");
        }
        if self.tell_loss().and_then(|()| self.deliver(&message)).is_err() {
            let end = u64::from(!partial);
            let lost = Lost { lines: end, bytes: text.len() as u64 + end };
            self.lost.add(lost);
            self.untold.add(lost);
        }
    }

    fn message(&self, text: &[u8], priority: u8) -> Vec<u8> {
        let mut message = Vec::with_capacity(text.len() + self.fields.len() + 64);
        field(&mut message, "MESSAGE", text);
        field(&mut message, "PRIORITY", &[b'0' + priority]);
        message.extend_from_slice(&self.fields);
        message
    }

    fn tell_loss(&mut self) -> io::Result<()> {
        if self.untold == Lost::default() {
            return Ok(());
        }
        let line = self.untold.tell("");
        let message = self.message(line.trim_end().as_bytes(), ERR);
        self.deliver(&message)?;
        self.untold = Lost::default();
        Ok(())
    }

    fn deliver(&mut self, message: &[u8]) -> io::Result<()> {
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.retry_at = None;
        let result = match &self.socket {
            Some(socket) => socket.send(message),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        let result = result.or_else(|e| {
            if e.kind() == io::ErrorKind::WouldBlock || e.raw_os_error() == Some(EMSGSIZE) {
                return Err(e);
            }
            // A journal that was restarted has a new socket of the old name.
            let socket = UnixDatagram::unbound()?;
            socket.connect(&self.path)?;
            socket.set_write_timeout(Some(PATIENCE))?;
            self.socket.insert(socket).send(message)
        });
        if let Err(e) = &result
            && e.raw_os_error() != Some(EMSGSIZE)
        {
            self.socket = None;
            self.retry_at = Some(Instant::now() + PAUSE);
        }
        result.map(drop)
    }
}

const EMSGSIZE: i32 = 90;

fn index(stream: Stream) -> usize {
    usize::from(stream == Stream::Stderr)
}

fn encode(fields: &Fields) -> Vec<u8> {
    let mut out = Vec::new();
    let id = fields.id.as_str();
    let short = id.get(..SHORT_ID).unwrap_or(id);
    let name = fields.name.as_deref();
    field(&mut out, "CONTAINER_ID_FULL", id.as_bytes());
    field(&mut out, "CONTAINER_ID", short.as_bytes());
    for (key, value) in [("CONTAINER_TAG", fields.tag.as_deref()), ("CONTAINER_NAME", name)] {
        if let Some(value) = value {
            field(&mut out, key, value.as_bytes());
        }
    }
    let identifier = fields.tag.as_deref().or(name).unwrap_or(short);
    field(&mut out, "SYSLOG_IDENTIFIER", identifier.as_bytes());
    for label in &fields.labels {
        if let Some((key, value)) = label.split_once('=') {
            field(&mut out, key, value.as_bytes());
        }
    }
    out
}

/// What journald takes as the name of a field.
pub(crate) fn check_label(label: &str) -> Result<(), Error> {
    let refuse = |reason: &str| Err(Error::new(format!("{reason} (in '{label}')")));
    match label.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.contains('=') => {
            let plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
            if name.bytes().all(plain) {
                return Ok(());
            }
            refuse("Container label names must contain only uppercase letters, numbers and underscore")
        }
        _ => refuse("Container labels must be in format LABEL=VALUE, with one '='"),
    }
}

/// `KEY=value`, or with an explicit length where the value has a newline in it.
fn field(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    out.extend_from_slice(key.as_bytes());
    if value.contains(&b'\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        dir: PathBuf,
        journald: Option<UnixDatagram>,
        journal: Journal,
    }

    impl Rig {
        fn new(name: &str) -> Rig {
            let dir = std::env::temp_dir().join(format!("keel-journal-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir(&dir).unwrap();
            let fields = Fields {
                id: "0123456789abcdef".into(),
                name: Some("web".into()),
                labels: vec!["A=b".into()],
                mark_partial: true,
                ..Fields::default()
            };
            let journal = Journal::at(dir.join("socket"), &fields);
            let mut rig = Rig { dir, journald: None, journal };
            rig.listen();
            rig
        }

        fn listen(&mut self) {
            let path = self.dir.join("socket");
            let _ = std::fs::remove_file(&path);
            let socket = UnixDatagram::bind(path).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            self.journald = Some(socket);
        }

        fn next(&self) -> String {
            let mut buffer = vec![0; 64 << 10];
            let len = self.journald.as_ref().unwrap().recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..len].to_vec()).unwrap()
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    #[test]
    fn a_line_is_one_message_with_the_containers_fields() {
        let mut rig = Rig::new("line");
        rig.journal.append(Stream::Stdout, b"hel");
        rig.journal.append(Stream::Stdout, b"lo\n<4>grave\n");
        assert_eq!(
            rig.next(),
            "MESSAGE=hello\nPRIORITY=6\nCONTAINER_ID_FULL=0123456789abcdef\nCONTAINER_ID=0123456789ab\n\
             CONTAINER_NAME=web\nSYSLOG_IDENTIFIER=web\nA=b\n"
        );
        assert!(rig.next().starts_with("MESSAGE=grave\nPRIORITY=4\n"));
        rig.journal.append(Stream::Stderr, b"end");
        rig.journal.close(Stream::Stderr);
        let last = rig.next();
        assert!(last.starts_with("MESSAGE=end\nPRIORITY=3\n"), "{last}");
        assert!(!last.contains("PARTIAL"), "{last}");
    }

    #[test]
    fn a_long_line_comes_in_marked_parts() {
        let mut rig = Rig::new("long");
        let line = "x".repeat(2 * LINE + 5) + "\n<1>next\n";
        for piece in line.as_bytes().chunks(7000) {
            rig.journal.append(Stream::Stdout, piece);
        }
        let parts: Vec<_> = (0..4).map(|_| rig.next()).collect();
        let marked: Vec<_> = parts.iter().map(|p| p.contains("CONTAINER_PARTIAL_MESSAGE=true")).collect();
        assert_eq!(marked, [true, true, false, false]);
        assert!(parts[2].starts_with("MESSAGE=xxxxx\nPRIORITY=6\n"));
        assert!(parts[3].starts_with("MESSAGE=next\nPRIORITY=1\n"));
        assert_eq!(rig.journal.lost, Lost::default());
    }

    #[test]
    fn without_a_journal_messages_are_counted_and_told_to_the_next_one() {
        let mut rig = Rig::new("restart");
        rig.journal.append(Stream::Stdout, b"a\n");
        rig.next();
        rig.journald = None;
        rig.journal.append(Stream::Stdout, b"b\nc\n");
        assert_eq!(rig.journal.lost, Lost { lines: 2, bytes: 4 });
        rig.listen();
        rig.journal.retry_at = Some(Instant::now());
        rig.journal.append(Stream::Stdout, b"d\ne\n");
        let told = "MESSAGE=keel-shim: 2 lines (4 bytes) of output are missing here\nPRIORITY=3\n";
        assert!(rig.next().starts_with(told));
        assert!(rig.next().starts_with("MESSAGE=d\n"));
        assert!(rig.next().starts_with("MESSAGE=e\n"));
        assert_eq!(rig.journal.lost.lines, 2);
    }

    #[test]
    fn labels_are_fields_of_the_journal() {
        for good in ["A=b", "A_1=", "_X=a b"] {
            assert!(check_label(good).is_ok(), "{good}");
        }
        for bad in ["A", "=b", "A=b=c", "a=b", "A%=b"] {
            assert!(check_label(bad).is_err(), "{bad}");
        }
    }
}
