//! Output: from the streams to the log and the attachments.

use std::io::{self, Read as _};
use std::time::SystemTime;

use keel_proto::{Phase, Stream};

use crate::machine::Event;

use super::Hold;

/// Output is read so often after the end, should it come faster than it can be read.
const DRAIN_READS: u32 = 256;

impl Hold {
    pub(super) fn pump(&mut self, index: usize) {
        if matches!(self.read_once(index), Read::End) {
            self.close_output(index);
            self.check_drained();
        }
    }

    pub(super) fn read_once(&mut self, index: usize) -> Read {
        let Some(output) = &mut self.outputs[index] else { return Read::Nothing };
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
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        if let Some(log) = &mut self.log {
            if let Some(progress) = &self.progress {
                progress.begin(stream, log.position());
            }
            output.formatter.set_time(SystemTime::now());
            let mut rest = bytes;
            while !rest.is_empty() {
                let (taken, written) = output.formatter.format(rest, &mut self.output);
                log.append(&self.output[..written]);
                rest = &rest[taken..];
            }
        }
        if let Some(progress) = &self.progress {
            progress.take(&output.file, bytes.len());
        }
        let blocked = self.stdin.as_ref().is_some_and(|s| !s.pending.is_empty());
        self.clients.broadcast(stream, bytes, &self.epoll, blocked);
        Read::Some
    }

    pub(super) fn close_output(&mut self, index: usize) {
        let Some(mut output) = self.outputs[index].take() else { return };
        let _ = self.epoll.remove(&output.file);
        if let Some(log) = &mut self.log {
            let mut closing = [0; 64];
            output.formatter.set_time(SystemTime::now());
            log.append(output.formatter.close(&mut closing));
        }
    }

    pub(super) fn check_drained(&mut self) {
        if self.phase == Phase::Draining && self.outputs.iter().all(Option::is_none) {
            self.event(Event::Drained);
        }
    }

    pub(super) fn close_streams(&mut self) {
        for index in 0..self.outputs.len() {
            for _ in 0..DRAIN_READS {
                if !matches!(self.read_once(index), Read::Some) {
                    break;
                }
            }
            self.close_output(index);
        }
        self.stdin = None;
        if let Some(log) = &self.log {
            log.sync();
        }
    }
}

pub(super) enum Read {
    Some,
    Nothing,
    End,
}
