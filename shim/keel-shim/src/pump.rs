//! The way of output: read from a stream, kept in the log, and handed on. Both faces of the monitor use it.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::SystemTime;

use keel_proto::Stream;
use keel_sys::file::set_pipe_size;
use keel_sys::monitor::{Buffer, shed_memory};

use crate::cri::Formatter;
use crate::error::{Context, Error};
use crate::journal::Journal;
use crate::log::Log;
use crate::progress::Progress;

/// What the container's pipes hold, and one read: twice the kernel's default. Half as many switches between the container
/// and its monitor, and both buffers still fit the processor's second cache; a quarter of a megabyte does not, and is slower.
pub(crate) const INPUT: usize = 128 << 10;
/// Lines of 80 bytes and more take one write for each read.
const OUTPUT: usize = 192 << 10;
/// Output is read so often after the end, should it come faster than it can be read.
const LAST_READS: u32 = 256;

pub(crate) struct Pump {
    pub(crate) log: Option<Log>,
    pub(crate) journal: Option<Box<Journal>>,
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
        let _ = set_pipe_size(&file, INPUT);
        Output { file, stream, formatter: Formatter::new(stream, in_line) }
    }
}

pub(crate) enum Read<'a> {
    /// Logged already.
    Some(&'a [u8]),
    Nothing,
    End,
}

impl Pump {
    pub(crate) fn new(log: Option<Log>, progress: Option<Progress>) -> Result<Pump, Error> {
        Ok(Pump {
            log,
            journal: None,
            progress,
            input: Buffer::new(INPUT).doing("map buffer")?,
            output: Buffer::new(OUTPUT).doing("map buffer")?,
            // Start-up counts as a burst.
            warm: true,
        })
    }

    pub(crate) fn read(&mut self, output: &mut Output) -> Read<'_> {
        let got = match &self.progress {
            Some(progress) => progress.look(&output.file, &mut self.input),
            None => output.file.read(&mut self.input),
        };
        let bytes = match got {
            Ok(0) => return Read::End,
            Ok(got) => &self.input[..got],
            Err(e) => {
                return match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Read::Nothing,
                    // A terminal says EIO when its last user is gone.
                    _ => Read::End,
                };
            }
        };
        self.warm = true;
        if let Some(log) = &mut self.log {
            if let Some(progress) = &self.progress {
                progress.begin(output.stream, log.position());
            }
            output.formatter.set_time(SystemTime::now());
            let mut rest = bytes;
            while !rest.is_empty() {
                let (taken, written) = output.formatter.format(rest, &mut self.output);
                log.append(&self.output[..written]);
                rest = &rest[taken..];
            }
        }
        if let Some(journal) = &mut self.journal {
            journal.append(output.stream, bytes);
        }
        if let Some(progress) = &self.progress {
            progress.take(&output.file, bytes.len());
        }
        Read::Some(bytes)
    }

    /// What is left of a stream whose writers are gone, or are to be heard no longer; then its end in the log.
    pub(crate) fn finish(&mut self, mut output: Output, mut each: impl FnMut(Stream, &[u8])) {
        for _ in 0..LAST_READS {
            match self.read(&mut output) {
                Read::Some(bytes) => each(output.stream, bytes),
                Read::Nothing | Read::End => break,
            }
        }
        self.end(output);
    }

    /// A line that was begun is ended in the log.
    pub(crate) fn end(&mut self, mut output: Output) {
        if let Some(log) = &mut self.log {
            let mut closing = [0; 64];
            output.formatter.set_time(SystemTime::now());
            log.append(output.formatter.close(&mut closing));
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
