//! Request and answer over one netlink socket, with the kernel's own words in every error.

use std::error::Error;
use std::{fmt, io};

use super::socket::{NetlinkProtocol, NetlinkSocket};
use super::wire::{self, Message, Writer, flag};

const MSG_ERROR: u16 = 2;
const MSG_DONE: u16 = 3;
const ATTR_ERROR_TEXT: u16 = 1;
/// Listings come in pieces of at most 32 KiB; one answer to a request is smaller.
const BUFFER_BYTES: usize = 64 << 10;
/// A listing that changed while it was read is read again; a host that changes faster than that is
/// answered with an error instead of a loop.
const LISTING_TRIES: u32 = 10;

/// What we were doing and why the kernel refused.
#[derive(Debug)]
pub struct NetlinkError {
    pub doing: String,
    /// The kernel's extended acknowledgement, where it gives one.
    pub detail: Option<String>,
    pub source: io::Error,
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)?;
        match &self.detail {
            Some(text) => write!(f, ": kernel says \"{text}\""),
            None => Ok(()),
        }
    }
}

impl Error for NetlinkError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.source)
    }
}

impl NetlinkError {
    pub fn new(doing: impl Into<String>, source: io::Error) -> NetlinkError {
        NetlinkError { doing: doing.into(), detail: None, source }
    }

    pub fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

#[derive(Debug)]
pub struct Netlink {
    socket: NetlinkSocket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    pub fn open(protocol: NetlinkProtocol) -> Result<Netlink, NetlinkError> {
        let socket = NetlinkSocket::open(protocol)
            .map_err(|error| NetlinkError::new(format!("open a netlink socket ({protocol:?})"), error))?;
        Ok(Netlink { socket, sequence: 0, buffer: vec![0; BUFFER_BYTES] })
    }

    /// One request that answers only yes or no.
    pub fn request(
        &mut self,
        doing: &str,
        kind: u16,
        body: impl FnOnce(&mut Writer),
    ) -> Result<(), NetlinkError> {
        let sequence = self.next_sequence();
        let mut writer = Writer::default();
        writer.message(kind, flag::REQUEST | flag::ACK, sequence, body);
        self.transact(&writer.into_bytes(), &[(sequence, doing)])
    }

    /// Sends `datagram` and collects the verdict on each numbered message in it; the first error wins.
    pub fn transact(&mut self, datagram: &[u8], sent: &[(u32, &str)]) -> Result<(), NetlinkError> {
        let whole = sent.last().map_or("send", |(_, doing)| doing);
        self.socket.send(datagram).map_err(|error| NetlinkError::new(whole, error))?;
        let mut first: Option<NetlinkError> = None;
        let mut answered = false;
        while let Some(answer) =
            self.socket.receive(&mut self.buffer).map_err(|error| NetlinkError::new(whole, error))?
        {
            for message in wire::messages(answer).filter(|message| message.kind == MSG_ERROR) {
                // An answer to an earlier, abandoned request is nobody's business any more.
                let Some((_, doing)) = sent.iter().find(|(sequence, _)| *sequence == message.sequence) else {
                    continue;
                };
                answered = true;
                if let (None, Some(error)) = (&first, verdict(doing, &message)) {
                    first = Some(error);
                }
            }
        }
        match (first, answered) {
            (Some(error), _) => Err(error),
            (None, true) => Ok(()),
            (None, false) => Err(NetlinkError::new(
                whole,
                io::Error::new(io::ErrorKind::UnexpectedEof, "the kernel did not answer"),
            )),
        }
    }

    /// Lists objects; `each` gets the body of every answer.
    pub fn list<T>(
        &mut self,
        doing: &str,
        kind: u16,
        body: impl Fn(&mut Writer),
        each: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..LISTING_TRIES {
            if let Some(all) = self.list_once(doing, kind, flag::DUMP, &body, &each)? {
                return Ok(all);
            }
        }
        Err(NetlinkError::new(
            doing,
            io::Error::new(io::ErrorKind::Interrupted, "it changes faster than it can be read"),
        ))
    }

    /// One object; `None` where the kernel says that it does not exist.
    pub fn get<T>(
        &mut self,
        doing: &str,
        kind: u16,
        body: impl Fn(&mut Writer),
        each: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<T>, NetlinkError> {
        match self.list_once(doing, kind, flag::ACK, &body, &each) {
            Ok(found) => Ok(found.and_then(|all| all.into_iter().next())),
            Err(error) if error.is(libc::ENODEV) || error.is(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `None`: interrupted by a change.
    fn list_once<T>(
        &mut self,
        doing: &str,
        kind: u16,
        flags: u16,
        body: &impl Fn(&mut Writer),
        each: &impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, NetlinkError> {
        let sequence = self.next_sequence();
        let mut writer = Writer::default();
        writer.message(kind, flags | flag::REQUEST, sequence, body);
        let failed = |error| NetlinkError::new(doing, error);
        self.socket.send(&writer.into_bytes()).map_err(failed)?;
        let (mut all, mut interrupted) = (Vec::new(), false);
        while let Some(answer) = self.socket.receive(&mut self.buffer).map_err(failed)? {
            for message in wire::messages(answer).filter(|message| message.sequence == sequence) {
                interrupted |= message.flags & flag::DUMP_INTERRUPTED != 0;
                match message.kind {
                    MSG_ERROR => {
                        if let Some(error) = verdict(doing, &message) {
                            return Err(error);
                        }
                    }
                    MSG_DONE => {}
                    _ => all.extend(each(message.body)),
                }
            }
        }
        Ok((!interrupted).then_some(all))
    }

    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }
}

/// `None`: an acknowledgement.
fn verdict(doing: &str, message: &Message<'_>) -> Option<NetlinkError> {
    let code = i32::from_ne_bytes(message.body.get(..4)?.try_into().ok()?);
    if code == 0 {
        return None;
    }
    let detail = extended(message).and_then(|list| wire::find(list, ATTR_ERROR_TEXT)).map(wire::text);
    Some(NetlinkError { doing: doing.to_owned(), detail, source: io::Error::from_raw_os_error(-code) })
}

/// The attribute list behind an error, if there is one.
fn extended<'a>(message: &Message<'a>) -> Option<&'a [u8]> {
    if message.flags & flag::ACK_TLVS == 0 {
        return None;
    }
    let echoed = if message.flags & flag::CAPPED != 0 {
        wire::HEADER_BYTES
    } else {
        (wire::read_u32(message.body, 4)? as usize).next_multiple_of(4)
    };
    message.body.get(4 + echoed..)
}
