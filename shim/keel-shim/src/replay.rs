//! Earlier output for a new attachment, read back from the log: an idle shim keeps none of it in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use keel_proto::{Attach, MAX_DATA, Stream};
use keel_sys::monitor::Buffer;

use crate::clients::Client;
use crate::cri::HEADER;
use crate::rotation::numbered;

/// Of the log, to find so much output in: in front of a line of two bytes is twenty times as much.
const WIDEST: usize = 4 << 20;

/// Sends the end of the output, `most` bytes at most and whole records unless the last is larger, without the log's
/// headers. A `raw` log has none: all of it is sent as standard output. `packed` is where messages are put together.
pub(crate) fn send(
    client: &mut Client,
    log: &Path,
    raw: bool,
    what: Attach,
    most: usize,
    packed: &mut [u8],
) -> io::Result<()> {
    let mut window = most;
    loop {
        let mut text = Buffer::new(window)?;
        let start = tail_of_both(log, &mut text)?;
        let outputs = || outputs(&text[start..], start == 0, raw, what);
        let sum: usize = outputs().map(|(_, output)| output.len()).sum();
        if sum < most && start == 0 && window < WIDEST {
            window = (window * 4).min(WIDEST);
            continue;
        }
        let mut surplus = sum.saturating_sub(most);
        let mut pack = Pack { client, bytes: &mut packed[..MAX_DATA], len: 0, stream: Stream::Stdout };
        for (stream, output) in outputs() {
            let (older, rest) = output.split_at(surplus.min(output.len()));
            surplus -= older.len();
            if older.is_empty() || output.len() > most {
                pack.add(stream, rest);
            }
        }
        pack.flush();
        return Ok(());
    }
}

/// What of a part of the log somebody wants to see. A part that starts anywhere starts with its first whole record.
fn outputs(text: &[u8], cut: bool, raw: bool, what: Attach) -> impl Iterator<Item = (Stream, &[u8])> {
    let first = if cut { memchr::memchr(b'\n', text).map_or(text.len(), |at| at + 1) } else { 0 };
    let records = text[first..].split_inclusive(|b| *b == b'\n');
    let parsed = records.filter_map(move |r| if raw { Some((Stream::Stdout, r)) } else { parse(r) });
    parsed.filter(move |(stream, _)| if *stream == Stream::Stdout { what.stdout } else { what.stderr })
}

/// For each stream, stdout first, whether its last record in the log is the beginning of a line. `text` is room to work
/// in, larger than any record.
pub(crate) fn within_lines(log: &Path, text: &mut [u8]) -> [bool; 2] {
    let mut within = [false; 2];
    let Ok(start) = tail(log, text) else { return within };
    for record in text[start..].split_inclusive(|b| *b == b'\n') {
        if let Some((stream, output)) = parse(record) {
            within[usize::from(stream == Stream::Stderr)] = !output.ends_with(b"\n");
        }
    }
    within
}

/// As [`tail`]; the current file may just have been rotated.
fn tail_of_both(log: &Path, text: &mut [u8]) -> io::Result<usize> {
    let start = tail(log, text)?;
    Ok(if start > 0 { tail(&numbered(log, 1), &mut text[..start]).unwrap_or(start) } else { 0 })
}

/// Fills the end of `buffer` with the end of the file; returns where that starts.
fn tail(path: &Path, buffer: &mut [u8]) -> io::Result<usize> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let take = usize::try_from(size).unwrap_or(usize::MAX).min(buffer.len());
    let start = buffer.len() - take;
    file.read_exact_at(&mut buffer[start..], size - take as u64)?;
    Ok(start)
}

/// Stream and output of a record, with the newline if it ends a line.
pub(crate) fn parse(record: &[u8]) -> Option<(Stream, &[u8])> {
    let (header, text) = record.split_first_chunk::<HEADER>()?;
    let [.., tag, b' '] = header else { return None };
    let stream = match &header[HEADER - 9..HEADER - 3] {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    match tag {
        b'F' => Some((stream, text)),
        b'P' => Some((stream, text.strip_suffix(b"\n").unwrap_or(text))),
        _ => None,
    }
}

/// Small records of one stream go into one message: a socket holds a few hundred messages whatever their size.
struct Pack<'a> {
    client: &'a mut Client,
    bytes: &'a mut [u8],
    len: usize,
    stream: Stream,
}

impl Pack<'_> {
    fn add(&mut self, stream: Stream, output: &[u8]) {
        if stream != self.stream || self.len + output.len() > self.bytes.len() {
            self.flush();
            self.stream = stream;
        }
        if output.len() > self.bytes.len() {
            return self.client.output(stream, output);
        }
        self.bytes[self.len..self.len + output.len()].copy_from_slice(output);
        self.len += output.len();
    }

    fn flush(&mut self) {
        let len = std::mem::take(&mut self.len);
        self.client.output(self.stream, &self.bytes[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_give_back_what_was_written() {
        let check = |rest: &str, expected: Option<(Stream, &str)>| {
            let record = format!("2026-01-02T15:04:05.000000007Z {rest}");
            let parsed = parse(record.as_bytes());
            assert_eq!(parsed, expected.map(|(s, t)| (s, t.as_bytes())), "{rest}");
        };
        check("stdout F a\n", Some((Stream::Stdout, "a\n")));
        check("stderr P a\n", Some((Stream::Stderr, "a")));
        check("stdout F \n", Some((Stream::Stdout, "\n")));
        check("stdlog F a\n", None);
        check("stdout X a\n", None);
        check("stdout", None);
    }
}
