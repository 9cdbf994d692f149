//! Input: from attachments to the container.

use std::fs::File;
use std::io::{self, Write as _};

use keel_proto::ErrorCode;
use keel_sys::epoll::OUT;

use super::{STDIN, Stdin};

use super::Hold;

/// Of input that the container has not taken: what comes in one message, and what a client leaves in its socket.
const MOST_PENDING: usize = 256 << 10;

impl Hold {
    pub(super) fn take_stdin(&mut self, index: usize, bytes: &[u8]) {
        if !self.clients.get(index).is_some_and(|c| c.has_stdin()) {
            return self.refuse(index, ErrorCode::Unsupported, "not attached to the input");
        }
        // Of one that fills its socket and goes, again and again, the end is not kept.
        if self.stdin.as_ref().is_some_and(|s| s.pending.len() > MOST_PENDING) {
            return;
        }
        let written = self.write_stdin(bytes);
        if written < bytes.len() {
            self.keep_stdin(&bytes[written..]);
        }
    }

    pub(super) fn write_stdin(&mut self, bytes: &[u8]) -> usize {
        let mut file: &File = match (&self.stdin, &self.outputs[0]) {
            (Some(stdin), _) if stdin.pending.is_empty() => &stdin.file,
            (Some(_), _) => return 0,
            (None, Some(terminal)) if self.memory.options.tty => &terminal.file,
            _ => return bytes.len(),
        };
        match file.write(bytes) {
            Ok(written) => written,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            // Nobody reads any more: input for nobody is dropped as a closed pipe would.
            Err(_) => bytes.len(),
        }
    }

    /// Keeps what the container did not take, and listens to no more input until it has.
    pub(super) fn keep_stdin(&mut self, rest: &[u8]) {
        if self.stdin.is_none()
            && let Some(terminal) = &self.outputs[0]
            && let Ok(file) = terminal.file.try_clone()
        {
            self.stdin = Some(Stdin { file, pending: Vec::new() });
        }
        let Some(stdin) = &mut self.stdin else { return };
        let first = stdin.pending.is_empty();
        stdin.pending.extend_from_slice(rest);
        if first && self.epoll.add(&stdin.file, OUT, STDIN).is_ok() {
            self.clients.block_stdin(true, &self.epoll);
        }
    }

    pub(super) fn feed_stdin(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        match (&stdin.file).write(&stdin.pending) {
            Ok(written) => {
                stdin.pending.drain(..written);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => stdin.pending.clear(),
        }
        if stdin.pending.is_empty() {
            let _ = self.epoll.remove(&stdin.file);
            stdin.pending = Vec::new();
            if self.memory.options.tty {
                self.stdin = None;
            }
            self.clients.block_stdin(false, &self.epoll);
        }
    }

    /// The client that fed the input is done: with `--stdin-once` so is the container's input.
    pub(super) fn end_stdin(&mut self) {
        if self.memory.options.stdin_once && !self.memory.options.tty {
            self.stdin = None;
        }
    }
}
