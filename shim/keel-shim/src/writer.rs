//! Logs that the container never waits for: a second process writes them, and what it has not taken yet is in a pipe.
//!
//! ```text
//! FIFO ─> monitor: records ─> pipe, of the size that was asked for ─> writer: log, journal
//! ```
//! A disk that hangs stops the writer and nobody else. A full pipe means loss, which is counted and told in its place. The
//! pipe's memory is the kernel's, and what is in it survives the monitor. A monitor that is killed may take along the one
//! batch that it has just read: output that must not be lost has no place here.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keel_proto::file;
use keel_sys::epoll::{BATCH, Epoll, OUT, Ready};
use keel_sys::file::{pipe, set_nonblocking, set_pipe_size, wait_readable};
use keel_sys::monitor::{Buffer, Reaped, SharedCells, reap, shed_memory};
use keel_sys::process::{pidfd_open, reset_signals, set_name};

use crate::args::WriterOptions;
use crate::error::{Context, Error};
use crate::journal::{Fields, Journal};
use crate::log::{Limits, Log, Lost, measure, record};
use crate::pump::OUTPUT;
use crate::replay::parse;
use crate::rotation;
use crate::setup::SELF;

/// How this program is called for it.
pub(crate) const VERB: &str = "write-log";
/// A line in the pipe that is no record.
const REOPEN: &[u8] = b"reopen\n";
/// Between two starts of a writer that does not stay.
const RESTART: Duration = Duration::from_secs(1);
/// For the writer to write what is in the pipe when the container has ended.
const LAST: Duration = Duration::from_secs(2);

/// How long the writer keeps its buffer after a burst.
const WARM_MS: i32 = 200;

/// Where in the cells of a container's directory the writer counts: the first three are the monitor's.
const DONE_LINES: usize = 3;
const DONE_BYTES: usize = 4;
const LOST_LINES: usize = 5;
const LOST_BYTES: usize = 6;

/// The monitor's end.
pub(crate) struct Writer {
    options: WriterOptions,
    buffer: usize,
    child: Option<Child>,
    restart_at: Option<Instant>,
    cells: SharedCells,
    /// The end of a record of which the pipe has the beginning.
    rest: Vec<u8>,
    /// Put into the pipes so far.
    given: Lost,
    /// Never put there, or gone with a writer.
    lost: Lost,
    untold: Lost,
}

struct Child {
    pid: i32,
    pipe: File,
    /// Room in the pipe is waited for.
    watched: bool,
}

impl Writer {
    pub(crate) fn start(options: WriterOptions) -> Result<Writer, Error> {
        let path = options.dir.join(file::PROGRESS);
        let mut open = File::options();
        let file = open.read(true).write(true).create(true).truncate(false).open(&path).at("open", &path)?;
        let cells = SharedCells::map(&file).at("map", &path)?;
        let buffer = options.log.buffer.unwrap_or(OUTPUT);
        let mut writer = Writer {
            options,
            buffer,
            child: None,
            restart_at: None,
            cells,
            rest: Vec::new(),
            given: Lost::default(),
            lost: Lost::default(),
            untold: Lost::default(),
        };
        writer.spawn().doing("start the writer of the log")?;
        Ok(writer)
    }

    fn spawn(&mut self) -> io::Result<()> {
        let (theirs, ours) = pipe()?;
        // Less than asked for, where the host has no more.
        let _ = set_pipe_size(&ours, self.buffer);
        set_nonblocking(&ours, true)?;
        let mut command = Command::new(SELF);
        command.arg(VERB).args(self.options.to_words()).env_clear();
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn()?;
        self.given = Lost::default();
        let pid = i32::try_from(child.id()).unwrap_or(0);
        self.child = Some(Child { pid, pipe: ours.into(), watched: false });
        Ok(())
    }

    /// Whole records. Never waits.
    pub(crate) fn append(&mut self, records: &[u8]) {
        if self.put(records).is_err() {
            // There is no writer: as much is missing as it has not written.
            self.child_gone();
        }
    }

    /// Waits for room in the pipe as long as something is to go there, be there more output or not.
    pub(crate) fn watch(&mut self, epoll: &Epoll, token: u64) {
        let waiting = !self.rest.is_empty() || self.untold != Lost::default();
        let Some(child) = self.child.as_mut().filter(|child| child.watched != waiting) else { return };
        let done = if waiting { epoll.add(&child.pipe, OUT, token) } else { epoll.remove(&child.pipe) };
        child.watched = waiting && done.is_ok();
    }

    /// The pipe has room.
    pub(crate) fn catch_up(&mut self) {
        if self.flush().is_err() {
            self.child_gone();
        }
    }

    /// True: nothing is to go into the pipe any more.
    fn flush(&mut self) -> io::Result<bool> {
        Ok(self.flush_rest()? && self.tell_loss()?)
    }

    fn put(&mut self, mut records: &[u8]) -> io::Result<()> {
        self.restart();
        while !records.is_empty() {
            if !self.flush()? {
                self.drop(records);
                return Ok(());
            }
            let taken = self.write(records)?;
            if taken == 0 {
                self.drop(records);
                return Ok(());
            }
            // A record of which the pipe has a part is finished before anything else.
            let end = match memchr::memchr(b'\n', &records[taken - 1..]) {
                Some(at) => taken + at,
                None => records.len(),
            };
            self.given.add(measure(&records[..end]));
            self.rest.extend_from_slice(&records[taken..end]);
            records = &records[end..];
        }
        Ok(())
    }

    fn drop(&mut self, records: &[u8]) {
        let lost = measure(records);
        self.lost.add(lost);
        self.untold.add(lost);
    }

    fn tell_loss(&mut self) -> io::Result<bool> {
        if self.untold == Lost::default() {
            return Ok(true);
        }
        let marker = record(&self.untold.tell(": the log was too slow"));
        let taken = self.write(&marker)?;
        if taken == 0 {
            return Ok(false);
        }
        self.untold = Lost::default();
        self.rest.extend_from_slice(&marker[taken..]);
        self.flush_rest()
    }

    fn flush_rest(&mut self) -> io::Result<bool> {
        let rest = std::mem::take(&mut self.rest);
        let taken = if rest.is_empty() { 0 } else { self.write(&rest)? };
        self.rest = if taken == rest.len() { Vec::new() } else { rest[taken..].to_vec() };
        Ok(self.rest.is_empty())
    }

    /// How much the pipe took.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(child) = &mut self.child else { return Ok(0) };
        loop {
            match child.pipe.write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                other => return other,
            }
        }
    }

    fn restart(&mut self) {
        let due = self.restart_at.is_none_or(|at| Instant::now() >= at);
        if self.child.is_none() && due && self.spawn().is_err() {
            self.restart_at = Some(Instant::now() + RESTART);
        }
    }

    fn child_gone(&mut self) {
        let missing = self.unwritten();
        self.untold.add(missing);
        self.lost.add(missing);
        self.lost.add(self.cells(LOST_LINES, LOST_BYTES));
        clear(&self.cells);
        self.given = Lost::default();
        self.rest = Vec::new();
        self.child = None;
        self.restart_at = Some(Instant::now() + RESTART);
    }

    /// What is in the pipe, or was in one that is gone.
    fn unwritten(&self) -> Lost {
        let done = self.cells(DONE_LINES, DONE_BYTES);
        Lost {
            lines: self.given.lines.saturating_sub(done.lines),
            bytes: self.given.bytes.saturating_sub(done.bytes),
        }
    }

    fn cells(&self, lines: usize, bytes: usize) -> Lost {
        let cell = |n: usize| self.cells[n].load(Ordering::Acquire);
        Lost { lines: cell(lines), bytes: cell(bytes) }
    }

    pub(crate) fn lost(&self) -> Lost {
        let mut lost = self.lost;
        lost.add(self.cells(LOST_LINES, LOST_BYTES));
        lost
    }

    /// In its place among the output.
    pub(crate) fn reopen(&mut self) -> Result<(), Error> {
        let asked = self.flush_rest().and_then(|flushed| Ok(flushed && self.write(REOPEN)? == REOPEN.len()));
        match asked.doing("ask the writer of the log to reopen it")? {
            true => Ok(()),
            false => Err(Error::new("the log is too far behind to be reopened")),
        }
    }

    pub(crate) fn reaped(&mut self, reaped: &Reaped) -> bool {
        let ours = self.child.as_ref().is_some_and(|child| child.pid == reaped.pid);
        if ours {
            self.child_gone();
        }
        ours
    }

    /// The container has ended: the writer has a little time for what is in the pipe. What it does not write by then counts
    /// as lost, although it may still come.
    pub(crate) fn finish(&mut self) {
        let deadline = Instant::now() + LAST;
        self.flush_until(deadline);
        let Some(child) = self.child.take() else { return };
        let pidfd = pidfd_open(child.pid);
        drop(child);
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        if let Ok(pidfd) = pidfd {
            let _ = wait_readable(&pidfd, Some(i32::try_from(left).unwrap_or(0)));
        }
        let missing = self.unwritten();
        self.lost.add(missing);
        self.lost.add(self.cells(LOST_LINES, LOST_BYTES));
        self.given = Lost::default();
        clear(&self.cells);
    }

    fn flush_until(&mut self, deadline: Instant) {
        let Ok(epoll) = Epoll::new() else { return };
        let Some(child) = &self.child else { return };
        let _ = epoll.add(&child.pipe, OUT, 0);
        let mut ready = [Ready::default(); BATCH];
        while let Ok(false) = self.flush() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || epoll.wait(&mut ready, Some(left)).is_err() {
                return;
            }
        }
    }
}

fn clear(cells: &SharedCells) {
    for cell in [DONE_LINES, DONE_BYTES, LOST_LINES, LOST_BYTES] {
        cells[cell].store(0, Ordering::Release);
    }
}

/// The second process: standard input to the logs, until nobody has the other end any more.
pub(crate) fn run(options: &WriterOptions) -> Result<ExitCode, Error> {
    reset_signals();
    let _ = set_name(c"keel-log");
    let path = options.dir.join(file::PROGRESS);
    let file = File::options().read(true).write(true).open(&path).at("open", &path)?;
    // The writer of a monitor that was killed may have something left.
    file.lock().at("lock", &path)?;
    let cells = SharedCells::map(&file).at("map", &path)?;
    clear(&cells);
    let mut logs = Logs::open(options);
    let mut input = io::stdin().as_fd().try_clone_to_owned().map(File::from).doing("take the pipe")?;
    let mut buffer = Buffer::new(OUTPUT).doing("map buffer")?;
    let mut kept = 0;
    let mut warm = true;
    loop {
        if warm && kept == 0 && !wait_readable(&input, Some(WARM_MS)).doing("wait for output")? {
            buffer.discard();
            shed_memory();
            warm = false;
        }
        let got = match input.read(&mut buffer[kept..]) {
            Ok(0) => break,
            Ok(got) => kept + got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e).doing("read the pipe"),
        };
        warm = true;
        let whole = memchr::memrchr(b'\n', &buffer[..got]).map_or(0, |at| at + 1);
        logs.append(&buffer[..whole], &cells);
        buffer.copy_within(whole..got, 0);
        // A record is never larger than the buffer.
        kept = if got - whole < buffer.len() { got - whole } else { 0 };
    }
    if let Some(log) = &mut logs.log {
        log.settle();
    }
    Ok(ExitCode::SUCCESS)
}

/// What the second process writes to.
struct Logs {
    log: Option<Log>,
    journal: Option<Journal>,
    /// Of a raw log: output without headers.
    text: Vec<u8>,
}

impl Logs {
    fn open(options: &WriterOptions) -> Logs {
        let o = &options.log;
        Logs {
            log: o.file.as_ref().map(|path| {
                rotation::finish(path, o.max_files);
                Log::open(path, o.raw, Limits::of(o))
            }),
            journal: o.journal.then(|| Journal::new(&Fields::of(&options.id, o))),
            text: Vec::new(),
        }
    }

    fn append(&mut self, lines: &[u8], cells: &SharedCells) {
        let mut rest = lines;
        // Asked for rarely, looked for cheaply: no record starts like this.
        while let Some(at) = find_line(rest, REOPEN) {
            self.records(&rest[..at]);
            if let Some(log) = &mut self.log {
                // Tried again with the next record.
                let _ = log.reopen();
            }
            rest = &rest[at + REOPEN.len()..];
        }
        self.records(rest);
        let done = measure(lines);
        let mut lost = Lost::default();
        lost.add(self.log.as_ref().map_or(lost, |log| log.lost));
        lost.add(self.journal.as_ref().map_or(Lost::default(), |journal| journal.lost));
        cells[LOST_LINES].store(lost.lines, Ordering::Release);
        cells[LOST_BYTES].store(lost.bytes, Ordering::Release);
        cells[DONE_LINES].fetch_add(done.lines, Ordering::Release);
        cells[DONE_BYTES].fetch_add(done.bytes, Ordering::Release);
        if let Some(log) = &mut self.log {
            while let Ok(Some(reaped)) = reap(-1) {
                log.reaped(&reaped);
            }
            log.compress_some();
        }
    }

    fn records(&mut self, records: &[u8]) {
        let raw = self.log.as_ref().is_some_and(|log| log.raw);
        if let Some(log) = self.log.as_mut().filter(|_| !raw) {
            log.append(records);
        }
        if !raw && self.journal.is_none() {
            return;
        }
        self.text.clear();
        for (stream, text) in records.split_inclusive(|b| *b == b'\n').filter_map(parse) {
            if raw {
                self.text.extend_from_slice(text);
            }
            if let Some(journal) = &mut self.journal {
                journal.append(stream, text);
            }
        }
        if let Some(log) = self.log.as_mut().filter(|_| raw) {
            log.append(&self.text);
        }
    }
}

/// Where in `text` a line is that is just `line`.
fn find_line(text: &[u8], line: &[u8]) -> Option<usize> {
    if text.starts_with(line) {
        return Some(0);
    }
    let after = [b"\n", line].concat();
    memchr::memmem::find(text, &after).map(|at| at + 1)
}
