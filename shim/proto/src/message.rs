//! Messages of the control socket: one message, one datagram of the sequenced-packet socket.
//!
//! ```text
//! byte 0      version, 1
//! byte 1      kind
//! byte 2..4   zero, reserved
//! byte 4..    body, little endian; a longer body than expected is a newer peer's and its tail is ignored
//! ```

use std::fmt;

pub const VERSION: u8 = 1;
const HEADER: usize = 4;
/// Payload of one data message: small enough that a socket's default buffer takes a dozen.
pub const MAX_DATA: usize = 16 * 1024;
/// No message is longer.
pub const MAX_MESSAGE: usize = HEADER + 5 + MAX_DATA;
/// Fixed part of the longest message.
const MAX_HEAD: usize = 64;

/// What a client asks. Every request but `Stdin` and `StdinEof` gets an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    State,
    /// To the container's first process.
    Signal {
        signal: u8,
    },
    /// `signal` now, SIGKILL to the whole cgroup `grace_ms` later unless it has ended. The shim sees it through alone.
    Stop {
        signal: u8,
        grace_ms: u32,
    },
    Resize {
        rows: u16,
        columns: u16,
    },
    /// Turns the connection into an attachment: `Data`, `Gap` and at last `Exited` follow the answer.
    Attach(Attach),
    /// Input for the container, on an attachment with `stdin`.
    Stdin(&'a [u8]),
    /// No more input from this attachment.
    StdinEof,
    /// Opens the log file anew by name, after somebody moved it. Nothing is truncated.
    Reopen,
    /// Answered with `Exited` when the exit record is durable.
    Wait,
    /// Descriptors worth keeping in case the shim dies: see [`Reply::Spares`].
    Spares,
    /// The shim re-executes the binary at its own path, keeping the container.
    Upgrade,
    /// Somebody else sees to what comes after this run: once it is over, the shim goes too.
    Dismiss,
    /// The sockets that are held for the container: see [`Reply::Sockets`].
    Sockets,
    /// Runs a command in the container and turns the connection into its session: `Ok` when it runs, then `Data` and at
    /// last `Exited`; `Stdin`, `StdinEof`, `Resize` and `Signal` are the command's and get no answer.
    Exec(Exec<'a>),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exec<'a> {
    pub tty: bool,
    pub stdin: bool,
    /// Of the terminal; 0 leaves it alone.
    pub rows: u16,
    pub columns: u16,
    /// `process` of the OCI runtime specification, JSON; its `terminal` must agree with `tty`.
    pub process: &'a [u8],
}

/// What an attachment wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    /// KiB of earlier output to send first, read back from the log; as much as the socket holds, about 128, at most.
    pub replay_kib: u16,
}

/// What the shim says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    Ok,
    Error {
        code: ErrorCode,
        message: &'a str,
    },
    State(State),
    Data {
        stream: Stream,
        bytes: &'a [u8],
    },
    /// This attachment was too slow and missed so many bytes here.
    Gap {
        bytes: u64,
    },
    /// The exit record as it is on disk.
    Exited {
        record: &'a str,
    },
    /// Descriptors come with the message, in the order of the flags: pidfd of the container's first process, read
    /// ends of stdout and stderr, terminal master.
    Spares {
        pidfd: bool,
        stdout: bool,
        stderr: bool,
        terminal: bool,
    },
    /// Descriptors come with the message, in the order of the lines, each of which says what its socket is.
    Sockets {
        names: &'a str,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Where the container is in its life. See the table in the shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Running,
    /// The stop signal was sent, the grace period runs.
    Stopping,
    /// SIGKILL was sent to the whole cgroup.
    Killing,
    /// The first process has ended, the last output is being read.
    Draining,
    /// The exit record is being written, again and again if the disk refuses it.
    Recording,
    /// The runtime's `delete` runs.
    Deleting,
    /// All is done, and the shim stays to have the container restarted should nobody else do it.
    Resting,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub phase: Phase,
    pub tty: bool,
    /// This shim took the container over from one that died.
    pub adopted: bool,
    pub pid: u32,
    pub started_at_ms: u64,
    /// Log output that could not be written.
    pub log_lost_lines: u64,
    pub log_lost_bytes: u64,
    pub attachments: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The message could not be understood.
    Malformed,
    /// The message has a version this peer does not speak.
    Version,
    /// Not in this phase, or not for this container (no terminal, no stdin).
    Unsupported,
    /// The kernel refused.
    Failed,
    /// Too many clients.
    Busy,
    /// A code of a newer peer.
    Other(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    Empty,
    Version(u8),
    Kind(u8),
    Short { kind: u8, len: usize },
    Long { len: usize },
    Text,
    Value { kind: u8 },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Empty => f.write_str("message without header"),
            DecodeError::Version(v) => write!(f, "message version {v}, this peer speaks {VERSION}"),
            DecodeError::Kind(k) => write!(f, "unknown message kind {k}"),
            DecodeError::Short { kind, len } => {
                write!(f, "message kind {kind} with {len} bytes is too short")
            }
            DecodeError::Long { len } => {
                write!(f, "message of {len} bytes exceeds {MAX_MESSAGE}")
            }
            DecodeError::Text => f.write_str("message text is not UTF-8"),
            DecodeError::Value { kind } => {
                write!(f, "message kind {kind} with a value out of range")
            }
        }
    }
}

impl std::error::Error for DecodeError {}

/// A message ready to be sent in two parts, so that payload is not copied.
#[derive(Clone, Copy)]
pub struct Encoded<'a> {
    head: [u8; MAX_HEAD],
    len: usize,
    pub body: &'a [u8],
}

impl<'a> Encoded<'a> {
    fn new(kind: u8) -> Encoded<'a> {
        let mut head = [0; MAX_HEAD];
        head[0] = VERSION;
        head[1] = kind;
        Encoded { head, len: HEADER, body: &[] }
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.head[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    /// Payload beyond [`MAX_DATA`] is the caller's mistake and is cut.
    fn body(mut self, body: &'a [u8]) -> Self {
        self.body = &body[..body.len().min(MAX_DATA)];
        self
    }

    pub fn head(&self) -> &[u8] {
        &self.head[..self.len]
    }

    pub fn to_vec(&self) -> Vec<u8> {
        [self.head(), self.body].concat()
    }
}

const STATE: u8 = 1;
const SIGNAL: u8 = 2;
const STOP: u8 = 3;
const RESIZE: u8 = 4;
const ATTACH: u8 = 5;
const STDIN: u8 = 6;
const STDIN_EOF: u8 = 7;
const REOPEN: u8 = 8;
const WAIT: u8 = 9;
const SPARES: u8 = 10;
const UPGRADE: u8 = 11;
const EXEC: u8 = 12;
const DISMISS: u8 = 13;
const SOCKETS: u8 = 14;
const OK: u8 = 128;
const ERROR: u8 = 129;
const STATE_IS: u8 = 130;
const DATA: u8 = 131;
const GAP: u8 = 132;
const EXITED: u8 = 133;
const SPARES_ARE: u8 = 134;
const SOCKETS_ARE: u8 = 135;

impl<'a> Request<'a> {
    pub fn encode(&self) -> Encoded<'a> {
        match *self {
            Request::State => Encoded::new(STATE),
            Request::Signal { signal } => Encoded::new(SIGNAL).put(&[signal]),
            Request::Stop { signal, grace_ms } => {
                Encoded::new(STOP).put(&[signal]).put(&grace_ms.to_le_bytes())
            }
            Request::Resize { rows, columns } => {
                Encoded::new(RESIZE).put(&rows.to_le_bytes()).put(&columns.to_le_bytes())
            }
            Request::Attach(attach) => {
                let flags = [attach.stdin, attach.stdout, attach.stderr];
                Encoded::new(ATTACH).put(&[pack(&flags)]).put(&attach.replay_kib.to_le_bytes())
            }
            Request::Stdin(bytes) => Encoded::new(STDIN).body(bytes),
            Request::StdinEof => Encoded::new(STDIN_EOF),
            Request::Reopen => Encoded::new(REOPEN),
            Request::Wait => Encoded::new(WAIT),
            Request::Spares => Encoded::new(SPARES),
            Request::Upgrade => Encoded::new(UPGRADE),
            Request::Dismiss => Encoded::new(DISMISS),
            Request::Sockets => Encoded::new(SOCKETS),
            Request::Exec(exec) => Encoded::new(EXEC)
                .put(&[pack(&[exec.tty, exec.stdin])])
                .put(&exec.rows.to_le_bytes())
                .put(&exec.columns.to_le_bytes())
                .body(exec.process),
        }
    }

    pub fn decode(message: &'a [u8]) -> Result<Request<'a>, DecodeError> {
        let (kind, mut body) = open(message)?;
        let request = match kind {
            STATE => Request::State,
            SIGNAL => Request::Signal { signal: signal(body.u8()?, kind)? },
            STOP => Request::Stop { signal: signal(body.u8()?, kind)?, grace_ms: body.u32()? },
            RESIZE => Request::Resize { rows: body.u16()?, columns: body.u16()? },
            ATTACH => {
                let flags = body.u8()?;
                Request::Attach(Attach {
                    stdin: flags & 1 != 0,
                    stdout: flags & 2 != 0,
                    stderr: flags & 4 != 0,
                    replay_kib: body.u16()?,
                })
            }
            STDIN => Request::Stdin(body.rest()),
            STDIN_EOF => Request::StdinEof,
            REOPEN => Request::Reopen,
            WAIT => Request::Wait,
            SPARES => Request::Spares,
            UPGRADE => Request::Upgrade,
            DISMISS => Request::Dismiss,
            SOCKETS => Request::Sockets,
            EXEC => {
                let flags = body.u8()?;
                Request::Exec(Exec {
                    tty: flags & 1 != 0,
                    stdin: flags & 2 != 0,
                    rows: body.u16()?,
                    columns: body.u16()?,
                    process: body.rest(),
                })
            }
            other => return Err(DecodeError::Kind(other)),
        };
        Ok(request)
    }
}

impl<'a> Reply<'a> {
    pub fn encode(&self) -> Encoded<'a> {
        match *self {
            Reply::Ok => Encoded::new(OK),
            Reply::Error { code, message } => {
                Encoded::new(ERROR).put(&[code.number()]).body(message.as_bytes())
            }
            Reply::State(ref state) => state.encode(),
            Reply::Data { stream, bytes } => Encoded::new(DATA).put(&[stream.number()]).body(bytes),
            Reply::Gap { bytes } => Encoded::new(GAP).put(&bytes.to_le_bytes()),
            Reply::Exited { record } => Encoded::new(EXITED).body(record.as_bytes()),
            Reply::Spares { pidfd, stdout, stderr, terminal } => {
                Encoded::new(SPARES_ARE).put(&[pack(&[pidfd, stdout, stderr, terminal])])
            }
            Reply::Sockets { names } => Encoded::new(SOCKETS_ARE).body(names.as_bytes()),
        }
    }

    pub fn decode(message: &'a [u8]) -> Result<Reply<'a>, DecodeError> {
        let (kind, mut body) = open(message)?;
        let reply = match kind {
            OK => Reply::Ok,
            ERROR => Reply::Error { code: ErrorCode::from_number(body.u8()?), message: text(body.rest())? },
            STATE_IS => Reply::State(State::decode(&mut body)?),
            DATA => Reply::Data {
                stream: Stream::from_number(body.u8()?).ok_or(DecodeError::Value { kind })?,
                bytes: body.rest(),
            },
            GAP => Reply::Gap { bytes: body.u64()? },
            EXITED => Reply::Exited { record: text(body.rest())? },
            SPARES_ARE => {
                let flags = body.u8()?;
                Reply::Spares {
                    pidfd: flags & 1 != 0,
                    stdout: flags & 2 != 0,
                    stderr: flags & 4 != 0,
                    terminal: flags & 8 != 0,
                }
            }
            SOCKETS_ARE => Reply::Sockets { names: text(body.rest())? },
            other => return Err(DecodeError::Kind(other)),
        };
        Ok(reply)
    }
}

impl State {
    fn encode<'a>(&self) -> Encoded<'a> {
        Encoded::new(STATE_IS)
            .put(&[self.phase.number(), pack(&[self.tty, self.adopted])])
            .put(&self.attachments.to_le_bytes())
            .put(&self.pid.to_le_bytes())
            .put(&self.started_at_ms.to_le_bytes())
            .put(&self.log_lost_lines.to_le_bytes())
            .put(&self.log_lost_bytes.to_le_bytes())
    }

    fn decode(body: &mut Body<'_>) -> Result<State, DecodeError> {
        let kind = STATE_IS;
        let phase = Phase::from_number(body.u8()?).ok_or(DecodeError::Value { kind })?;
        let flags = body.u8()?;
        Ok(State {
            phase,
            tty: flags & 1 != 0,
            adopted: flags & 2 != 0,
            attachments: body.u16()?,
            pid: body.u32()?,
            started_at_ms: body.u64()?,
            log_lost_lines: body.u64()?,
            log_lost_bytes: body.u64()?,
        })
    }
}

impl Stream {
    fn number(self) -> u8 {
        match self {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }

    fn from_number(number: u8) -> Option<Stream> {
        [Stream::Stdout, Stream::Stderr].into_iter().find(|s| s.number() == number)
    }

    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

impl Phase {
    pub const ALL: [Phase; 8] = [
        Phase::Running,
        Phase::Stopping,
        Phase::Killing,
        Phase::Draining,
        Phase::Recording,
        Phase::Deleting,
        Phase::Resting,
        Phase::Gone,
    ];

    fn number(self) -> u8 {
        self as u8
    }

    fn from_number(number: u8) -> Option<Phase> {
        Phase::ALL.into_iter().find(|p| p.number() == number)
    }
}

impl ErrorCode {
    fn number(self) -> u8 {
        match self {
            ErrorCode::Malformed => 1,
            ErrorCode::Version => 2,
            ErrorCode::Unsupported => 3,
            ErrorCode::Failed => 4,
            ErrorCode::Busy => 5,
            ErrorCode::Other(n) => n,
        }
    }

    fn from_number(number: u8) -> ErrorCode {
        use ErrorCode::{Busy, Failed, Malformed, Unsupported, Version};
        [Malformed, Version, Unsupported, Failed, Busy]
            .into_iter()
            .find(|c| c.number() == number)
            .unwrap_or(ErrorCode::Other(number))
    }
}

fn pack(flags: &[bool]) -> u8 {
    flags.iter().enumerate().fold(0, |sum, (i, flag)| sum | (u8::from(*flag) << i))
}

/// Linux has signals 1 to 64; 0 would be a probe that looks like a success.
fn signal(number: u8, kind: u8) -> Result<u8, DecodeError> {
    match number {
        1..=64 => Ok(number),
        _ => Err(DecodeError::Value { kind }),
    }
}

fn text(bytes: &[u8]) -> Result<&str, DecodeError> {
    std::str::from_utf8(bytes).map_err(|_| DecodeError::Text)
}

fn open(message: &[u8]) -> Result<(u8, Body<'_>), DecodeError> {
    let Some((header, rest)) = message.split_at_checked(HEADER) else {
        return Err(DecodeError::Empty);
    };
    if header[0] != VERSION {
        return Err(DecodeError::Version(header[0]));
    }
    if message.len() > MAX_MESSAGE {
        return Err(DecodeError::Long { len: message.len() });
    }
    let kind = header[1];
    Ok((kind, Body { kind, rest }))
}

struct Body<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let short = DecodeError::Short { kind: self.kind, len: self.rest.len() };
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(short)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.take().map(u64::from_le_bytes)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests() -> Vec<Request<'static>> {
        let attach = |bits: u8| {
            Request::Attach(Attach {
                stdin: bits & 1 != 0,
                stdout: bits & 2 != 0,
                stderr: bits & 4 != 0,
                replay_kib: 300,
            })
        };
        let mut all: Vec<_> = (0..8).map(attach).collect();
        all.extend([
            Request::State,
            Request::Signal { signal: 64 },
            Request::Stop { signal: 15, grace_ms: u32::MAX },
            Request::Resize { rows: 24, columns: 513 },
            Request::Stdin(b""),
            Request::Stdin(b"hello"),
            Request::StdinEof,
            Request::Reopen,
            Request::Wait,
            Request::Spares,
            Request::Upgrade,
            Request::Dismiss,
            Request::Sockets,
            Request::Exec(Exec { tty: false, stdin: true, rows: 3, columns: 400, process: b"{}" }),
        ]);
        all
    }

    fn replies() -> Vec<Reply<'static>> {
        let mut all: Vec<Reply<'static>> = Phase::ALL
            .into_iter()
            .map(|phase| {
                Reply::State(State {
                    phase,
                    tty: true,
                    adopted: false,
                    pid: 70_000,
                    started_at_ms: 1 << 40,
                    log_lost_lines: 3,
                    log_lost_bytes: 1 << 33,
                    attachments: 2,
                })
            })
            .collect();
        let codes =
            [1, 2, 3, 4, 5, 77].map(|n| Reply::Error { code: ErrorCode::from_number(n), message: "why" });
        all.extend(codes);
        all.extend([
            Reply::Ok,
            Reply::Data { stream: Stream::Stdout, bytes: b"out" },
            Reply::Data { stream: Stream::Stderr, bytes: b"" },
            Reply::Gap { bytes: 1 << 50 },
            Reply::Exited { record: "{}" },
            Reply::Spares { pidfd: true, stdout: false, stderr: true, terminal: false },
        ]);
        all
    }

    #[test]
    fn every_message_survives_the_wire_and_a_newer_peers_longer_body() {
        for request in requests() {
            let mut bytes = request.encode().to_vec();
            assert_eq!(Request::decode(&bytes), Ok(request));
            if !matches!(request, Request::Stdin(_) | Request::Exec(_)) {
                bytes.extend([9; 5]);
                assert_eq!(Request::decode(&bytes), Ok(request));
            }
        }
        for reply in replies() {
            let bytes = reply.encode().to_vec();
            assert_eq!(Reply::decode(&bytes).as_ref(), Ok(&reply));
        }
    }

    #[test]
    fn every_cut_and_every_flipped_byte_decodes_or_errs_but_never_panics() {
        let all = requests().into_iter().map(|r| r.encode().to_vec());
        let all = all.chain(replies().into_iter().map(|r| r.encode().to_vec()));
        for bytes in all {
            for cut in 0..bytes.len() {
                let _ = Request::decode(&bytes[..cut]);
                let _ = Reply::decode(&bytes[..cut]);
            }
            for i in 0..bytes.len() {
                for value in 0..=255 {
                    let mut other = bytes.clone();
                    other[i] = value;
                    let _ = Request::decode(&other);
                    let _ = Reply::decode(&other);
                }
            }
        }
    }

    #[test]
    fn malformed_messages_say_why() {
        let check = |bytes: &[u8], error| assert_eq!(Request::decode(bytes), Err(error));
        check(b"", DecodeError::Empty);
        check(&[1, 1, 0], DecodeError::Empty);
        check(&[2, 1, 0, 0], DecodeError::Version(2));
        check(&[1, 99, 0, 0], DecodeError::Kind(99));
        check(&[1, STOP, 0, 0, 15], DecodeError::Short { kind: STOP, len: 0 });
        check(&[1, SIGNAL, 0, 0, 0], DecodeError::Value { kind: SIGNAL });
        check(&[1, SIGNAL, 0, 0, 65], DecodeError::Value { kind: SIGNAL });
        let long = [&[1, STDIN, 0, 0][..], &[0; MAX_MESSAGE]].concat();
        check(&long, DecodeError::Long { len: long.len() });
    }

    #[test]
    fn oversized_payload_is_cut_to_the_bound() {
        let big = vec![7; MAX_DATA * 2];
        let message = Request::Stdin(&big).encode().to_vec();
        assert!(message.len() <= MAX_MESSAGE);
        assert!(Request::decode(&message).is_ok());
    }
}
