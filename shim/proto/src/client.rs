//! A blocking client of one shim. Nothing here waits without a deadline unless the caller asks for it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use keel_sys::seqpacket;

use crate::message::{
    Attach, DecodeError, ErrorCode, Exec, MAX_DATA, MAX_MESSAGE, Reply, Request, State, Stream,
};
use crate::{ExitRecord, ParseExitError, file};

/// A healthy shim answers in well under a millisecond; a loaded host may need seconds.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// The runtime enters the container before the shim answers.
const EXEC_TIMEOUT: Duration = Duration::from_secs(60);
/// `O_NONBLOCK`, for opening a FIFO without waiting for its writer.
const NONBLOCK: i32 = 0o4000;

pub struct Client {
    socket: OwnedFd,
    timeout: Duration,
    dir: PathBuf,
    buffer: Vec<u8>,
}

#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens: the shim is gone or was never there.
    Absent {
        dir: PathBuf,
        source: io::Error,
    },
    Io {
        operation: &'static str,
        dir: PathBuf,
        source: io::Error,
    },
    /// The deadline passed.
    Timeout {
        operation: &'static str,
        dir: PathBuf,
    },
    /// The shim closed the connection.
    Closed {
        dir: PathBuf,
    },
    Decode(DecodeError),
    /// An answer that does not belong to the request.
    Unexpected,
    Record(ParseExitError),
    /// The shim refused.
    Refused {
        code: ErrorCode,
        message: String,
    },
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Absent { dir, .. } => write!(f, "no shim listens in {}", dir.display()),
            ClientError::Io { operation, dir, .. } => {
                write!(f, "{operation} shim in {}", dir.display())
            }
            ClientError::Timeout { operation, dir } => {
                write!(f, "{operation} shim in {}: deadline passed", dir.display())
            }
            ClientError::Closed { dir } => {
                write!(f, "shim in {} closed the connection", dir.display())
            }
            ClientError::Decode(e) => write!(f, "answer of the shim: {e}"),
            ClientError::Unexpected => f.write_str("answer of the shim does not fit the request"),
            ClientError::Record(e) => write!(f, "answer of the shim: {e}"),
            ClientError::Refused { message, .. } => write!(f, "shim refuses: {message}"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ClientError::Absent { source, .. } | ClientError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Client {
    /// Connects to the shim of `dir`, which may have a path of any length.
    pub fn connect(dir: &Path) -> Result<Client, ClientError> {
        Client::connect_within(dir, DEFAULT_TIMEOUT)
    }

    /// As `connect`; `timeout` bounds every exchange.
    pub fn connect_within(dir: &Path, timeout: Duration) -> Result<Client, ClientError> {
        match seqpacket::connect(dir, file::CONTROL, Some(timeout)) {
            Ok(socket) => Ok(Client { socket, timeout, dir: dir.to_owned(), buffer: vec![0; MAX_MESSAGE] }),
            Err(source) => {
                let dir = dir.to_owned();
                Err(match source.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        ClientError::Absent { dir, source }
                    }
                    _ => ClientError::Io { operation: "connect to", dir, source },
                })
            }
        }
    }

    pub fn state(&mut self) -> Result<State, ClientError> {
        match self.ask(Request::State)? {
            Reply::State(state) => Ok(state),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Sends `signal` to the container's first process.
    pub fn signal(&mut self, signal: u8) -> Result<(), ClientError> {
        self.command(Request::Signal { signal })
    }

    /// Starts a stop and returns; the shim carries it through. `wait` tells when it is over.
    pub fn stop(&mut self, signal: u8, grace: Duration) -> Result<(), ClientError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.command(Request::Stop { signal, grace_ms })
    }

    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<(), ClientError> {
        self.command(Request::Resize { rows, columns })
    }

    pub fn reopen(&mut self) -> Result<(), ClientError> {
        self.command(Request::Reopen)
    }

    /// Once the run is over the shim is not to stay and see to a restart.
    pub fn dismiss(&mut self) -> Result<(), ClientError> {
        self.command(Request::Dismiss)
    }

    pub fn upgrade(&mut self) -> Result<(), ClientError> {
        self.command(Request::Upgrade)
    }

    /// Waits for the durable exit record; `None` waits as long as it takes.
    pub fn wait(&mut self, limit: Option<Duration>) -> Result<ExitRecord, ClientError> {
        self.send(Request::Wait)?;
        match self.receive(limit.map(|l| Instant::now() + l))?.0 {
            Reply::Exited { record } => ExitRecord::parse(record).map_err(ClientError::Record),
            other => Err(refusal(&other)),
        }
    }

    /// Descriptors to keep so that nothing is lost should the shim be killed.
    pub fn spares(&mut self) -> Result<Spares, ClientError> {
        self.send(Request::Spares)?;
        let (reply, fds) = self.receive(Some(Instant::now() + self.timeout))?;
        let Reply::Spares { pidfd, stdout, stderr, terminal } = reply else {
            return Err(refusal(&reply));
        };
        let mut fds = fds.into_iter();
        let mut next = |present: bool| if present { fds.next() } else { None };
        Ok(Spares {
            pidfd: next(pidfd),
            stdout: next(stdout),
            stderr: next(stderr),
            terminal: next(terminal),
        })
    }

    /// The sockets that the shim holds for its container, each with what it is.
    pub fn sockets(&mut self) -> Result<Vec<(String, OwnedFd)>, ClientError> {
        self.send(Request::Sockets)?;
        let (reply, fds) = self.receive(Some(Instant::now() + self.timeout))?;
        let Reply::Sockets { names } = reply else { return Err(refusal(&reply)) };
        Ok(names.lines().map(str::to_owned).zip(fds).collect())
    }

    /// Turns the connection into an attachment.
    pub fn attach(mut self, what: Attach) -> Result<Attachment, ClientError> {
        self.command(Request::Attach(what))?;
        Ok(Attachment { client: self })
    }

    /// Runs a command in the container; returns when it runs. A process description longer than a message is refused.
    pub fn exec(mut self, exec: Exec<'_>) -> Result<Session, ClientError> {
        if exec.process.len() > MAX_DATA {
            return Err(ClientError::Refused {
                code: ErrorCode::Malformed,
                message: format!("process description exceeds {MAX_DATA} bytes"),
            });
        }
        self.send(Request::Exec(exec))?;
        match self.receive(Some(Instant::now() + self.timeout.max(EXEC_TIMEOUT)))?.0 {
            Reply::Ok => Ok(Session { attachment: Attachment { client: self } }),
            other => Err(refusal(&other)),
        }
    }

    fn command(&mut self, request: Request<'_>) -> Result<(), ClientError> {
        match self.ask(request)? {
            Reply::Ok => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    fn ask(&mut self, request: Request<'_>) -> Result<Reply<'_>, ClientError> {
        self.send(request)?;
        let deadline = Instant::now() + self.timeout;
        match self.receive(Some(deadline))?.0 {
            refused @ Reply::Error { .. } => Err(refusal(&refused)),
            reply => Ok(reply),
        }
    }

    fn send(&mut self, request: Request<'_>) -> Result<(), ClientError> {
        let message = request.encode();
        seqpacket::send(self.socket.as_fd(), message.head(), message.body)
            .map_err(|source| self.failed("write to", source))
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<(Reply<'_>, Vec<OwnedFd>), ClientError> {
        let received = loop {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            seqpacket::set_receive_timeout(&self.socket, left)
                .map_err(|source| self.failed("read from", source))?;
            match seqpacket::receive(self.socket.as_fd(), &mut self.buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed("read from", source)),
                Ok(received) => break received,
            }
        };
        if received.len == 0 {
            return Err(ClientError::Closed { dir: self.dir.clone() });
        }
        let reply = Reply::decode(&self.buffer[..received.len]).map_err(ClientError::Decode)?;
        Ok((reply, received.fds))
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> ClientError {
        let dir = self.dir.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock => ClientError::Timeout { operation, dir },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed { dir },
            _ => ClientError::Io { operation, dir, source },
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn refusal(reply: &Reply<'_>) -> ClientError {
    match reply {
        Reply::Error { code, message } => {
            ClientError::Refused { code: *code, message: (*message).to_owned() }
        }
        _ => ClientError::Unexpected,
    }
}

/// A connection on which the container's output arrives.
pub struct Attachment {
    client: Client,
}

/// What an attachment sees.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Data {
        stream: Stream,
        bytes: &'a [u8],
    },
    /// We were too slow; so many bytes are missing here.
    Gap {
        bytes: u64,
    },
    /// The container has ended; the last event.
    Exited(Box<ExitRecord>),
}

impl Attachment {
    /// The next event; `None` waits as long as it takes. A `Timeout` error leaves the attachment usable.
    pub fn next(&mut self, limit: Option<Duration>) -> Result<Event<'_>, ClientError> {
        match self.client.receive(limit.map(|l| Instant::now() + l))?.0 {
            Reply::Data { stream, bytes } => Ok(Event::Data { stream, bytes }),
            Reply::Gap { bytes } => Ok(Event::Gap { bytes }),
            Reply::Exited { record } => ExitRecord::parse(record)
                .map(|record| Event::Exited(Box::new(record)))
                .map_err(ClientError::Record),
            other => Err(refusal(&other)),
        }
    }

    /// Sends input. It waits, up to the connection's deadline per message, for a container that does not read.
    pub fn write_stdin(&mut self, input: &[u8]) -> Result<(), ClientError> {
        input.chunks(MAX_DATA).try_for_each(|chunk| self.client.send(Request::Stdin(chunk)))
    }

    /// No more input comes from here.
    pub fn close_stdin(&mut self) -> Result<(), ClientError> {
        self.client.send(Request::StdinEof)
    }
}

impl AsFd for Attachment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

/// A command that runs in the container. Dropped, it runs on without input, and its output is thrown away.
pub struct Session {
    attachment: Attachment,
}

impl Session {
    /// The next output, or the command's end; see [`Attachment::next`].
    pub fn next(&mut self, limit: Option<Duration>) -> Result<Event<'_>, ClientError> {
        self.attachment.next(limit)
    }

    pub fn write_stdin(&mut self, input: &[u8]) -> Result<(), ClientError> {
        self.attachment.write_stdin(input)
    }

    pub fn close_stdin(&mut self) -> Result<(), ClientError> {
        self.attachment.close_stdin()
    }

    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<(), ClientError> {
        self.attachment.client.send(Request::Resize { rows, columns })
    }

    /// To the command, if it still runs.
    pub fn signal(&mut self, signal: u8) -> Result<(), ClientError> {
        self.attachment.client.send(Request::Signal { signal })
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.attachment.as_fd()
    }
}

/// Descriptors of a running container, for [`Client::spares`].
#[derive(Debug)]
pub struct Spares {
    pub pidfd: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// The terminal's master: when its last holder goes, the container's session is hung up.
    pub terminal: Option<OwnedFd>,
}

/// Spare read ends of a container's FIFOs, opened by name.
///
/// As long as somebody holds them, output that was written and not yet read outlives both the shim and the container.
/// Never read from them.
#[derive(Debug)]
pub struct SpareReaders {
    pub stdout: File,
    pub stderr: File,
}

impl SpareReaders {
    /// `NotFound` for a container with a terminal, which has no FIFOs.
    pub fn open(dir: &Path) -> io::Result<SpareReaders> {
        let open = |name| File::options().read(true).custom_flags(NONBLOCK).open(dir.join(name));
        Ok(SpareReaders { stdout: open(file::STDOUT)?, stderr: open(file::STDERR)? })
    }
}
