//! The way of output: read from a stream, kept in the log, and handed on. Both faces of the monitor use it.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::SystemTime;

use keel_proto::Stream;
use keel_sys::epoll::Epoll;
use keel_sys::file::set_pipe_size;
use keel_sys::monitor::{Buffer, Reaped, shed_memory};

use crate::args::{Options, WriterOptions};
use crate::cri::Formatter;
use crate::error::{Context, Error};
use crate::journal::{Fields, Journal};
use crate::log::{Limits, Log, Lost};
use crate::progress::Progress;
use crate::writer::Writer;

/// What the container's pipes hold: four times the kernel's default, so that container and monitor wake each other less
/// often, which costs more than anything else of a look.
pub(crate) const PIPE: usize = 256 << 10;
/// What is worked on at once. This and what comes of it stay in the processor's second cache.
pub(crate) const INPUT: usize = 64 << 10;
/// Lines of 85 bytes and more take one write.
pub(crate) const OUTPUT: usize = 96 << 10;
/// Output is read so often after the end, should it come faster than it can be read.
const LAST_READS: u32 = 256;

pub(crate) struct Pump {
    pub(crate) log: Option<Log>,
    pub(crate) journal: Option<Box<Journal>>,
    /// In place of the two where the container does not wait for its log.
    writer: Option<Box<Writer>>,
    /// By earlier hold phases.
    lost: Lost,
    /// Absent where nothing is to be kept safe: no log, or a terminal, which cannot be looked into.
    pub(crate) progress: Option<Progress>,
    pub(crate) input: Buffer,
    pub(crate) output: Buffer,
    /// The buffers have pages to give back.
    pub(crate) warm: bool,
}

/// One stream of the container.
pub(crate) struct Output {
    pub(crate) file: File,
    stream: Stream,
    formatter: Formatter,
}

impl Output {
    pub(crate) fn new(file: File, stream: Stream, in_line: bool) -> Output {
        // A terminal is no pipe, and a host may have no room for it: then it stays as it is.
        let _ = set_pipe_size(&file, PIPE);
        Output { file, stream, formatter: Formatter::new(stream, in_line) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// In the logs, and told.
    Some,
    Nothing,
    End,
}

impl Pump {
    pub(crate) fn new(log: Option<Log>, progress: Option<Progress>) -> Result<Pump, Error> {
        Ok(Pump {
            log,
            journal: None,
            writer: None,
            lost: Lost::default(),
            progress,
            input: Buffer::new(INPUT).doing("map buffer")?,
            output: Buffer::new(OUTPUT).doing("map buffer")?,
            // Start-up counts as a burst.
            warm: true,
        })
    }

    /// With the logs that `options` ask for.
    pub(crate) fn of(options: &Options, lost: Lost) -> Result<Pump, Error> {
        let o = &options.log;
        if o.any() && o.buffer.is_some() {
            let (id, dir) = (options.id.clone(), options.dir.clone());
            let writer = Writer::start(WriterOptions { id, dir, log: o.clone() })?;
            return Ok(Pump { writer: Some(Box::new(writer)), lost, ..Pump::new(None, None)? });
        }
        let log = o.file.as_ref().map(|path| Log::open(path, o.raw, Limits::of(o)));
        let progress = match log {
            Some(_) if !options.tty => Progress::open(&options.dir).ok(),
            _ => None,
        };
        let journal = o.journal.then(|| Box::new(Journal::new(&Fields::of(&options.id, o))));
        Ok(Pump { journal, lost, ..Pump::new(log, progress)? })
    }

    /// What waits in a stream goes to the logs, and to `each` if `seen`: somebody beside the logs wants the bytes.
    pub(crate) fn read(&mut self, output: &mut Output, seen: bool, mut each: impl FnMut(&[u8])) -> Read {
        if !seen && let Some(done) = self.move_unseen(output) {
            return done;
        }
        let waiting = match &self.progress {
            Some(progress) => progress.look(&output.file),
            None => output.file.read(&mut self.input),
        };
        let waiting = match waiting {
            Ok(0) => return Read::End,
            Ok(waiting) => waiting,
            Err(e) => {
                return match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Read::Nothing,
                    // A terminal says EIO when its last user is gone.
                    _ => Read::End,
                };
            }
        };
        self.warm = true;
        if let (Some(progress), Some(log)) = (&self.progress, self.log.as_ref().filter(|log| !log.raw)) {
            progress.begin(output.stream, log.position());
        }
        output.formatter.set_time(SystemTime::now());
        let mut done = 0;
        while done < waiting {
            let part = match &self.progress {
                Some(progress) => progress.next(&mut self.input, waiting - done),
                None => waiting,
            };
            if part == 0 {
                break;
            }
            self.keep(output, part);
            if seen {
                each(&self.input[..part]);
            }
            done += part;
        }
        if let Some(progress) = self.progress.as_ref().filter(|_| !self.moves()) {
            progress.take(&output.file, done);
        }
        if let Some(log) = &mut self.log {
            log.compress_some();
        }
        Read::Some
    }

    /// Bytes leave the pipe for the log's file, and not for nothing.
    fn moves(&self) -> bool {
        self.progress.is_some() && self.log.as_ref().is_some_and(|log| log.raw)
    }

    fn move_unseen(&mut self, output: &Output) -> Option<Read> {
        if !self.moves() || self.journal.is_some() {
            return None;
        }
        match self.log.as_mut()?.take_unseen(&output.file, PIPE)? {
            Ok(0) => Some(Read::End),
            Ok(_) => {
                self.warm = true;
                Some(Read::Some)
            }
            Err(_) => Some(Read::Nothing),
        }
    }

    /// In the logs.
    fn keep(&mut self, output: &mut Output, part: usize) {
        let bytes = &self.input[..part];
        if let Some(journal) = &mut self.journal {
            journal.append(output.stream, bytes);
        }
        match (&mut self.log, &self.progress) {
            (Some(log), Some(progress)) if log.raw => {
                let refused = log.take(&output.file, bytes);
                progress.take(&output.file, refused);
            }
            (Some(log), None) if log.raw => log.append(bytes),
            (Some(log), _) => {
                output.formatter.records(bytes, &mut self.output, |records| log.append(records));
            }
            (None, _) => {}
        }
        if let Some(writer) = &mut self.writer {
            output.formatter.records(bytes, &mut self.output, |records| writer.append(records));
        }
    }

    pub(crate) fn reopen(&mut self) -> Result<(), Error> {
        match (&mut self.log, &mut self.writer) {
            (Some(log), _) => log.reopen(),
            (None, Some(writer)) => writer.reopen(),
            (None, None) => Ok(()),
        }
    }

    /// Of all logs together.
    pub(crate) fn lost(&self) -> Lost {
        let mut lost = self.lost;
        let log = self.log.as_ref().map(|log| log.lost);
        let journal = self.journal.as_ref().map(|journal| journal.lost);
        let writer = self.writer.as_ref().map(|writer| writer.lost());
        [log, journal, writer].into_iter().flatten().for_each(|more| lost.add(more));
        lost
    }

    /// Whether it was a child of a log's that ended.
    pub(crate) fn reaped(&mut self, reaped: &Reaped) -> bool {
        let ours = self.log.as_mut().is_some_and(|log| log.reaped(reaped))
            || self.writer.as_mut().is_some_and(|writer| writer.reaped(reaped));
        self.warm |= ours;
        ours
    }

    /// Waits for the writer where it is behind.
    pub(crate) fn watch_writer(&mut self, epoll: &Epoll, token: u64) {
        if let Some(writer) = &mut self.writer {
            writer.watch(epoll, token);
        }
    }

    pub(crate) fn writer_has_room(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.catch_up();
        }
    }

    /// Everything is read.
    pub(crate) fn settle(&mut self) {
        if let Some(log) = &mut self.log {
            log.settle();
        }
        if let Some(writer) = &mut self.writer {
            writer.finish();
        }
    }

    /// What is left of a stream whose writers are gone, or are to be heard no longer; then its end in the log.
    pub(crate) fn finish(&mut self, mut output: Output, mut each: impl FnMut(Stream, &[u8])) {
        let stream = output.stream;
        for _ in 0..LAST_READS {
            if self.read(&mut output, true, |bytes| each(stream, bytes)) != Read::Some {
                break;
            }
        }
        self.end(output);
    }

    /// A line that was begun is ended in the log.
    pub(crate) fn end(&mut self, mut output: Output) {
        let mut closing = [0; 64];
        output.formatter.set_time(SystemTime::now());
        let closing = output.formatter.close(&mut closing);
        if let Some(log) = self.log.as_mut().filter(|log| !log.raw) {
            log.append(closing);
        }
        if let Some(writer) = &mut self.writer {
            writer.append(closing);
        }
        if let Some(journal) = &mut self.journal {
            journal.close(output.stream);
        }
    }

    /// Gives back the memory of a burst.
    pub(crate) fn cool(&mut self) {
        self.input.discard();
        self.output.discard();
        shed_memory();
        self.warm = false;
    }
}
