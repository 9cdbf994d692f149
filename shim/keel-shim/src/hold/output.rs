//! Output: from the streams to the log and the attachments.

use keel_proto::{Phase, Stream};

use crate::machine::Event;
use crate::pump::Read;

use super::Hold;

impl Hold {
    pub(super) fn pump(&mut self, index: usize) {
        let Some(output) = &mut self.outputs[index] else { return };
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        let (clients, epoll) = (&mut self.clients, &self.epoll);
        let seen = clients.attachments() > 0;
        let read = self.pump.read(output, seen, |bytes| clients.broadcast(stream, bytes, epoll));
        match read {
            Read::Some | Read::Nothing => {}
            Read::End => {
                if let Some(output) = self.outputs[index].take() {
                    let _ = self.epoll.remove(&output.file);
                    self.pump.end(output);
                }
                self.check_drained();
            }
        }
    }

    pub(super) fn check_drained(&mut self) {
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
