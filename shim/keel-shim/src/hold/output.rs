//! Output: from the streams to the log and the attachments.

use keel_proto::{Phase, Stream};
use keel_sys::epoll::{EDGE, IN};

use crate::machine::Event;
use crate::pump::Read;

use super::{Hold, STDOUT, WRITER};

impl Hold {
    pub(super) fn pump(&mut self, index: usize) {
        let Some(output) = &mut self.outputs[index] else { return };
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        let (clients, epoll) = (&mut self.clients, &self.epoll);
        let seen = clients.attachments() > 0;
        let read = self.pump.read(output, seen, |bytes| clients.broadcast(stream, bytes, epoll));
        self.pump.watch_writer(&self.epoll, WRITER);
        match read {
            Read::Nothing => {}
            Read::Some => self.terminal_is_back(),
            Read::End if self.terminal_is_left() => {}
            Read::End => {
                if let Some(output) = self.outputs[index].take() {
                    let _ = self.epoll.remove(&output.file);
                    self.pump.end(output);
                }
                self.check_drained();
            }
        }
    }

    pub(super) fn writer_has_room(&mut self) {
        self.pump.writer_has_room();
        self.pump.watch_writer(&self.epoll, WRITER);
    }

    /// A terminal that nobody in the container has open can be opened again as long as the container lives. Until then it
    /// says that it is at its end, and it is to say so only once.
    fn terminal_is_left(&mut self) -> bool {
        let Some(terminal) = self.outputs[0].as_ref().filter(|_| self.memory.options.tty) else {
            return false;
        };
        if !self.terminal_left && self.ended.is_none() {
            self.terminal_left = self.epoll.modify(&terminal.file, IN | EDGE, STDOUT).is_ok();
        }
        self.terminal_left && self.ended.is_none()
    }

    fn terminal_is_back(&mut self) {
        if let Some(terminal) = self.outputs[0].as_ref().filter(|_| self.terminal_left) {
            self.terminal_left = self.epoll.modify(&terminal.file, IN, STDOUT).is_err();
        }
    }

    pub(super) fn check_drained(&mut self) {
        if self.phase == Phase::Draining && self.terminal_left {
            // It will not come back.
            self.terminal_left = false;
            self.pump(0);
        }
        if self.phase == Phase::Draining && self.outputs.iter().all(Option::is_none) {
            self.event(Event::Drained);
        }
    }

    pub(super) fn close_streams(&mut self) {
        for output in self.outputs.iter_mut().filter_map(Option::take) {
            let _ = self.epoll.remove(&output.file);
            self.pump.finish(output, |stream, bytes| {
                self.clients.broadcast(stream, bytes, &self.epoll);
            });
        }
        self.stdin = None;
        self.pump.settle();
    }
}
