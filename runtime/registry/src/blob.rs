//! A blob as a stream: resumed where it broke, never longer than announced, handed to a thread that may block.

use std::collections::BTreeSet;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::PullError;
use crate::manifest::Descriptor;
use crate::source::{Need, Source, Turns};
use crate::transport::Incoming;

/// Pieces in flight between network and store, per layer. The store has a longer queue of its own before the
/// unpacker; this one only keeps the network busy while a piece is hashed and written.
const PIECES: usize = 4;
const PIECE_BYTES: usize = 64 << 10;
/// Progress that makes the next failure count as a first one.
const RESET_BYTES: u64 = 1 << 20;

/// Reads a blob from the registry over as many connections as it takes.
pub(crate) struct Fetch<'a> {
    turns: Turns<'a>,
    descriptor: &'a Descriptor,
    what: &'a str,
    incoming: Option<Incoming>,
    /// Bytes handed out, or there from an earlier pull.
    done: u64,
    /// Bytes of the current response that are there already (the registry ignored the range).
    skip: u64,
    since_failure: u64,
    /// The places that bytes came from.
    served: BTreeSet<usize>,
}

impl<'a> Fetch<'a> {
    /// `from`: bytes that are there from an earlier pull.
    pub(crate) fn new(source: &'a Source<'a>, descriptor: &'a Descriptor, what: &'a str, from: u64) -> Self {
        Self {
            turns: source.turns(Need::Pull),
            descriptor,
            what,
            incoming: None,
            done: from,
            skip: 0,
            since_failure: 0,
            served: BTreeSet::new(),
        }
    }

    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    pub(crate) fn served(self) -> BTreeSet<usize> {
        self.served
    }

    /// The next bytes, `None` once exactly the announced number was handed out.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        loop {
            match self.next_once().await {
                Ok(Some(piece)) => {
                    self.since_failure += piece.len() as u64;
                    if self.since_failure >= RESET_BYTES {
                        self.turns.reset();
                    }
                    return Ok(Some(piece));
                }
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.incoming = None;
                    self.since_failure = 0;
                    self.turns.failed(error).await?;
                }
            }
        }
    }

    async fn next_once(&mut self) -> Result<Option<Bytes>, PullError> {
        let size = self.descriptor.size;
        loop {
            // Nothing is read beyond the announced size, whatever else is on its way.
            if self.done == size {
                if self.incoming.take().is_some() {
                    self.turns.succeeded();
                }
                return Ok(None);
            }
            if self.incoming.is_none() {
                let response = self.turns.session().blob(self.descriptor, self.what, self.done).await?;
                self.skip = self.place(&response)?;
                self.incoming = Some(response);
            }
            let incoming = self.incoming.as_mut().expect("it was just opened");
            let Some(mut piece) = incoming.chunk().await? else {
                return Err(PullError::Connection {
                    registry: incoming.host().to_owned(),
                    detail: format!("{} ends after {} of {size} bytes", self.what, self.done),
                });
            };
            let skipped = self.skip.min(piece.len() as u64);
            self.skip -= skipped;
            let piece = piece.split_off(skipped as usize);
            if piece.is_empty() {
                continue;
            }
            if self.done + piece.len() as u64 > size {
                let host = incoming.host().to_owned();
                return Err(self.wrong_length(&host, "more bytes".to_owned()));
            }
            self.done += piece.len() as u64;
            self.served.insert(self.turns.place());
            return Ok(Some(piece));
        }
    }

    /// How much of a fresh response to skip; an error where its length already contradicts the manifest.
    fn place(&self, response: &Incoming) -> Result<u64, PullError> {
        let size = self.descriptor.size;
        let host = response.host();
        if response.status().as_u16() == 206 {
            let range = response.header("content-range").and_then(parse_content_range);
            return match range {
                Some((first, total)) if first == self.done && total.is_none_or(|t| t == size) => Ok(0),
                _ => Err(PullError::Malformed {
                    what: self.what.to_owned(),
                    registry: host.to_owned(),
                    detail: "the answer is not the range that was asked for".to_owned(),
                }),
            };
        }
        match response.content_length() {
            Some(length) if length != size => Err(self.wrong_length(host, format!("{length} bytes"))),
            _ => Ok(self.done),
        }
    }

    fn wrong_length(&self, host: &str, actual: String) -> PullError {
        PullError::WrongLength {
            what: self.what.to_owned(),
            registry: host.to_owned(),
            expected: self.descriptor.size,
            actual,
        }
    }
}

/// `bytes 5-9/10` is (5, Some(10)), `bytes 5-9/*` is (5, None).
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let last: u64 = last.parse().ok()?;
    let total = match total {
        "*" => None,
        number => Some(number.parse().ok()?),
    };
    (first <= last && total.is_none_or(|t| last < t)).then_some((first, total))
}

/// The end of a bounded channel that asynchronous code fills.
pub(crate) struct Feeder(mpsc::Sender<Piece>);

/// The other end, for a thread that may block.
pub(crate) struct Pieces {
    channel: mpsc::Receiver<Piece>,
    complete: bool,
}

pub(crate) enum Piece {
    Data(Bytes),
    /// Only this is the end of the blob: a feeder that vanishes has given up.
    End,
}

/// The other end is gone; it knows why.
pub(crate) struct Gone;

pub(crate) fn pipe() -> (Feeder, Pieces) {
    let (sender, channel) = mpsc::channel(PIECES);
    (Feeder(sender), Pieces { channel, complete: false })
}

impl Feeder {
    pub(crate) async fn feed(&self, mut bytes: Bytes) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            self.0.send(Piece::Data(piece)).await.map_err(|_| Gone)?;
        }
        Ok(())
    }

    pub(crate) async fn end(self) -> Result<(), Gone> {
        self.0.send(Piece::End).await.map_err(|_| Gone)
    }
}

impl Pieces {
    /// The next bytes. `None`: the blob is complete, or the feeder has given up; `is_complete` tells which.
    pub(crate) fn next(&mut self) -> Option<Bytes> {
        match self.channel.blocking_recv() {
            Some(Piece::Data(bytes)) => Some(bytes),
            Some(Piece::End) => {
                self.complete = true;
                None
            }
            None => None,
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes */10", "bytes 9-5/10", "bytes 5-10/10", "items 5-9/10", "bytes 5-/10"] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_vanished_feeder_is_not_the_end_of_the_blob() {
        for end in [true, false] {
            let (feeder, mut pieces) = pipe();
            let read = tokio::task::spawn_blocking(move || {
                let mut len = 0;
                while let Some(bytes) = pieces.next() {
                    len += bytes.len();
                }
                (len, pieces.is_complete())
            });
            assert!(feeder.feed(Bytes::from(vec![7u8; 1 << 20])).await.is_ok());
            if end {
                assert!(feeder.end().await.is_ok());
            } else {
                drop(feeder);
            }
            assert_eq!(read.await.unwrap(), (1 << 20, end));
        }
    }

    #[tokio::test]
    async fn a_reader_that_stops_stops_the_feeder() {
        let (feeder, pieces) = pipe();
        drop(pieces);
        assert!(feeder.feed(Bytes::from_static(b"x")).await.is_err());
    }
}
