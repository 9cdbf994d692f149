//! `attach`: the output of a running container as it comes, and its input, by its monitor's socket. Needs no daemon.

use std::io::{self, IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use keel_proto::{Attachment, Client, ClientError, Event, Stream};
use keel_sys::epoll::{BATCH, Epoll, IN, OUT, Ready};

use super::exec::{configured, find};
use crate::cli::{Attach, DetachKeys};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::world;

const OUTPUT: u64 = 0;
const INPUT: u64 = 1;
const SIGNAL: u64 = 2;
const WINDOW_CHANGED: i32 = 28;
const HANGUP: i32 = 1;
const TERMINATE: i32 = 15;
/// What is ready is taken at once; a message that is not there is no reason to wait.
const AT_ONCE: Duration = Duration::ZERO;

/// Ends with the container's code, or with 0 when it is left.
pub(crate) fn attach(context: &Context, args: &Attach) -> Outcome<u8> {
    let running = find(context, &args.target)?;
    let has_terminal = configured(&running)?["terminal"] == true;
    let wants_terminal = args.target.interactive && args.tty;
    if wants_terminal && !has_terminal {
        context.term.note("the container has no terminal (tty: true in its manifest): going on without -t\n");
    }
    let raw = wants_terminal && has_terminal && io::stdin().is_terminal();
    let what = keel_proto::Attach {
        stdin: args.target.interactive,
        stdout: true,
        stderr: true,
        replay_kib: args.replay,
    };
    let client = Client::connect(&running.bundle).map_err(|error| Failure::of(&error))?;
    let attachment = client.attach(what).map_err(|error| match &error {
        ClientError::Refused { .. } if args.target.interactive => {
            Failure::of(&error).hint("-i needs a container with `stdin: true` in its manifest")
        }
        _ => Failure::of(&error),
    })?;
    let mut session = Session::new(context, attachment, &running, args, raw)?;
    session.run()
}

struct Session<'a> {
    context: &'a Context,
    attachment: Attachment,
    running: &'a world::Running,
    epoll: Epoll,
    /// Present in raw mode, which must be left before anything ends us.
    signals: Option<OwnedFd>,
    saved: Option<keel_sys::tty::Saved>,
    keys: Option<Keys>,
    input: Input,
    /// Input is among what is waited for.
    listens: bool,
    /// Read, not yet taken by the monitor: nothing is read as long as there is some.
    pending: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    /// Not wanted, or at its end.
    None,
    /// Says when there is some.
    Told,
    /// A file: always there.
    Always,
}

impl<'a> Session<'a> {
    fn new(
        context: &'a Context,
        attachment: Attachment,
        running: &'a world::Running,
        args: &Attach,
        raw: bool,
    ) -> Outcome<Session<'a>> {
        let fail = |error| Failure::io("prepare", "the terminal", &error);
        let epoll = Epoll::new().map_err(fail)?;
        epoll.add(&attachment, IN, OUTPUT).map_err(fail)?;
        let mut session = Session {
            context,
            attachment,
            running,
            epoll,
            signals: None,
            saved: None,
            keys: raw.then(|| Keys::new(&args.detach_keys)),
            input: Input::None,
            listens: false,
            pending: Vec::new(),
        };
        if raw {
            let signals = keel_sys::process::block_signals().map_err(fail)?;
            session.epoll.add(&signals, IN, SIGNAL).map_err(fail)?;
            session.signals = Some(signals);
            session.saved = Some(keel_sys::tty::make_raw(io::stdin()).map_err(fail)?);
            session.resize();
        }
        if args.target.interactive {
            session.input = Input::Told;
            match session.listen() {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    session.input = Input::Always;
                    session.read_input()?;
                }
                other => other.map_err(fail)?,
            }
        }
        Ok(session)
    }

    fn run(&mut self) -> Outcome<u8> {
        let mut ready = [Ready::default(); BATCH];
        loop {
            let output = if self.pending.is_empty() { IN } else { IN | OUT };
            let fail = |error| Failure::io("wait for", "output", &error);
            self.epoll.modify(&self.attachment, output, OUTPUT).map_err(fail)?;
            let count = self.epoll.wait(&mut ready, None).map_err(fail)?;
            for Ready { token, events } in ready.into_iter().take(count) {
                let done = match token {
                    OUTPUT => {
                        if events & OUT != 0 {
                            self.send()?;
                        }
                        if events & !OUT != 0 { self.receive()? } else { None }
                    }
                    INPUT => match self.read_keys()? {
                        Left::Here => None,
                        Left::Detached => {
                            self.restore();
                            self.context.term.note("detached: the container goes on\n");
                            Some(0)
                        }
                    },
                    SIGNAL => self.signal(),
                    _ => None,
                };
                if let Some(code) = done {
                    return Ok(code);
                }
            }
        }
    }

    /// What has come; the code once the container has ended.
    fn receive(&mut self) -> Outcome<Option<u8>> {
        match self.attachment.next(Some(AT_ONCE)) {
            Ok(Event::Data { stream: Stream::Stdout, bytes }) => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()?;
            }
            Ok(Event::Data { stream: Stream::Stderr, bytes }) => io::stderr().lock().write_all(bytes)?,
            Ok(Event::Gap { bytes }) => {
                self.context
                    .term
                    .say(&format!("[{bytes} bytes are missing here: this terminal was too slow]\n"));
            }
            Ok(Event::Exited(record)) => {
                return match u8::try_from(record.code) {
                    Ok(code) if !record.lost => Ok(Some(code)),
                    _ => Err(Failure::failed("how the container ended is unknown: its monitor was lost")),
                };
            }
            Err(ClientError::Timeout { .. }) => {}
            Err(error) => {
                return Err(Failure::of(&error).hint("the container may go on: keel get, keel logs"));
            }
        }
        Ok(None)
    }

    fn read_keys(&mut self) -> Outcome<Left> {
        self.read_input()?;
        let Some(keys) = &mut self.keys else { return Ok(Left::Here) };
        let typed = std::mem::take(&mut self.pending);
        let left = if keys.pass(&typed, &mut self.pending) { Left::Detached } else { Left::Here };
        self.listen()?;
        Ok(left)
    }

    /// One message's worth; the end of input is passed on.
    fn read_input(&mut self) -> Outcome<()> {
        let mut buffer = [0; 8 << 10];
        let got = keel_sys::file::read(io::stdin(), &mut buffer)?;
        self.pending.extend_from_slice(&buffer[..got]);
        if self.listens {
            self.epoll.remove(io::stdin())?;
            self.listens = false;
        }
        if got == 0 {
            self.input = Input::None;
            self.attachment.close_stdin().map_err(|error| Failure::of(&error))?;
        }
        Ok(())
    }

    /// For more input, once the monitor has what was read.
    fn listen(&mut self) -> io::Result<()> {
        if self.input == Input::Told && self.pending.is_empty() && !self.listens {
            self.epoll.add(io::stdin(), IN, INPUT)?;
            self.listens = true;
        }
        Ok(())
    }

    fn send(&mut self) -> Outcome<()> {
        match self.attachment.write_stdin(&self.pending) {
            Ok(()) => self.pending.clear(),
            // Taken later: a message goes whole or not at all.
            Err(ClientError::Timeout { .. }) => return Ok(()),
            Err(error) => return Err(Failure::of(&error)),
        }
        if self.input == Input::Always { self.read_input() } else { Ok(self.listen()?) }
    }

    fn signal(&mut self) -> Option<u8> {
        let signal = keel_sys::process::read_signal(self.signals.as_ref()?).ok()?;
        match signal {
            WINDOW_CHANGED => self.resize(),
            HANGUP | TERMINATE => return Some(128 + signal as u8),
            _ => {}
        }
        None
    }

    /// The container's terminal gets the size of ours. One that cannot have it is no reason to end.
    fn resize(&self) {
        if let Ok(size) = keel_sys::tty::size(io::stdin())
            && let Ok(mut client) = Client::connect(&self.running.bundle)
        {
            let _ = client.resize(size.rows, size.columns);
        }
    }

    fn restore(&mut self) {
        if let Some(saved) = self.saved.take() {
            // A terminal that has gone away needs nothing.
            let _ = keel_sys::tty::restore(io::stdin(), &saved);
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.restore();
    }
}

enum Left {
    Here,
    Detached,
}

/// Looks for the detach keys in what is typed. What may be their beginning is held back until the next key.
struct Keys {
    sequence: Vec<u8>,
    matched: usize,
}

impl Keys {
    fn new(keys: &DetachKeys) -> Keys {
        Keys { sequence: keys.0.clone(), matched: 0 }
    }

    /// Appends to `out` what is for the container; true when the keys are complete.
    fn pass(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        if self.sequence.is_empty() {
            out.extend_from_slice(typed);
            return false;
        }
        for byte in typed {
            if *byte != self.sequence[self.matched] {
                out.extend_from_slice(&self.sequence[..self.matched]);
                self.matched = 0;
            }
            if *byte == self.sequence[self.matched] {
                self.matched += 1;
            } else {
                out.push(*byte);
            }
            if self.matched == self.sequence.len() {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &str, typed: &[&[u8]], passed: &[u8], detached: bool) {
        let mut keys = Keys::new(&keys.parse().unwrap());
        let mut out = Vec::new();
        let ended = typed.iter().any(|typed| keys.pass(typed, &mut out));
        assert_eq!((out.as_slice(), ended), (passed, detached), "{typed:?}");
    }

    #[test]
    fn detach_keys_leave_and_everything_else_passes() {
        const DOCKERS: &str = "ctrl-p,ctrl-q";
        check(DOCKERS, &[b"ab\x10\x11"], b"ab", true);
        check(DOCKERS, &[b"a\x10", b"\x11"], b"a", true);
        check(DOCKERS, &[b"\x10", b"x"], b"\x10x", false);
        check(DOCKERS, &[b"\x10\x10\x11"], b"\x10", true);
        check(DOCKERS, &[b"\x11\x10"], b"\x11", false);
        check("a,a,b", &[b"aaac"], b"aaac", false);
        check("x", &[b"yx"], b"y", true);
        check("", &[b"\x10\x11"], b"\x10\x11", false);
    }
}
