//! Reading container logs: CRI lines in `<attempt>.log`, older parts in `<attempt>.log.1`, `.2`, ... (newest first).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// `2026-01-02T15:04:05.123456789Z`
const TIME: usize = 30;
/// Offset of `F` or `P`: time, blank, stream name of six letters, blank.
const TAG: usize = TIME + 8;
/// Time to text: tag and blank follow.
const HEADER: usize = TAG + 2;
/// Bytes read at once.
const CHUNK: usize = 64 << 10;
/// A line that is longer is printed in pieces.
const MAX_LINE_BYTES: usize = 1 << 20;

/// One line as the container wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    /// Of its first part.
    pub(crate) time: &'a str,
    pub(crate) text: &'a [u8],
}

/// Joins the parts of lines. Streams are joined apart, because their parts may alternate in the file.
#[derive(Debug, Default)]
pub(crate) struct Joiner {
    record: Vec<u8>,
    parts: [Part; 2],
}

#[derive(Debug, Default)]
struct Part {
    time: String,
    text: Vec<u8>,
    open: bool,
}

impl Joiner {
    /// Takes bytes of the file, calls `each` for every line that is complete.
    pub(crate) fn feed<E>(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(Line<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (head, rest) = bytes.split_at(end);
            bytes = &rest[1..];
            if self.record.is_empty() {
                Self::record(&mut self.parts, head, &mut each)?;
            } else {
                self.record.extend_from_slice(head);
                Self::record(&mut self.parts, &self.record, &mut each)?;
                self.record.clear();
            }
        }
        self.record.extend_from_slice(bytes);
        Ok(())
    }

    /// What has no end yet, at the end of the log.
    pub(crate) fn finish<E>(&mut self, mut each: impl FnMut(Line<'_>) -> Result<(), E>) -> Result<(), E> {
        for part in self.parts.iter_mut().filter(|part| part.open) {
            part.flush(&mut each)?;
        }
        Ok(())
    }

    fn record<E>(
        parts: &mut [Part; 2],
        record: &[u8],
        each: &mut impl FnMut(Line<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some((time, stream, full, text)) = split(record) else {
            // Nothing of ours. Shown as it is: a log viewer that hides lines is worse than one that shows odd ones.
            return each(Line { time: "-", text: record });
        };
        let part = &mut parts[stream];
        if full && !part.open {
            return each(Line { time, text });
        }
        if !part.open {
            part.open = true;
            part.time = time.to_owned();
        }
        part.text.extend_from_slice(text);
        if full || part.text.len() >= MAX_LINE_BYTES { part.flush(each) } else { Ok(()) }
    }
}

impl Part {
    fn flush<E>(&mut self, each: &mut impl FnMut(Line<'_>) -> Result<(), E>) -> Result<(), E> {
        let result = each(Line { time: &self.time, text: &self.text });
        self.text.clear();
        self.open = false;
        result
    }
}

/// Time, stream (0 or 1), whether the line ends here, text.
fn split(record: &[u8]) -> Option<(&str, usize, bool, &[u8])> {
    let time = std::str::from_utf8(record.get(..TIME)?).ok()?;
    let stream = match record.get(TIME..TAG)? {
        b" stdout " => 0,
        b" stderr " => 1,
        _ => return None,
    };
    let full = match record.get(TAG)? {
        b'F' => true,
        b'P' => false,
        _ => return None,
    };
    // The blank before an empty text may be missing.
    Some((time, stream, full, record.get(HEADER..).unwrap_or_default()))
}

/// Reads one run's log from a place on, over rotations.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    current: Option<File>,
    offset: u64,
    /// Parts older than `current` is followed by, oldest last; only for the first pass.
    pending: Vec<File>,
}

impl Reader {
    /// `tail`: only the last so many lines. The log need not be there yet.
    pub(crate) fn open(path: &Path, tail: Option<u64>) -> io::Result<Reader> {
        let mut newest_first = open_parts(path)?;
        let mut offset = 0;
        if let Some(lines) = tail {
            let mut left = lines;
            for index in 0..newest_first.len() {
                let (start, found) = tail_start(&newest_first[index], left, index == 0)?;
                left -= found;
                if left == 0 {
                    newest_first.truncate(index + 1);
                    offset = start;
                    break;
                }
            }
        }
        let current = newest_first.pop();
        Ok(Reader { path: path.to_owned(), current, offset, pending: newest_first })
    }

    /// The next bytes; none: the end of what is written so far.
    pub(crate) fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        buffer.resize(CHUNK, 0);
        loop {
            let Some(file) = &self.current else {
                match self.next_part()? {
                    true => continue,
                    false => return Ok(0),
                }
            };
            let count = file.read_at(buffer, self.offset)?;
            if count > 0 {
                self.offset += count as u64;
                buffer.truncate(count);
                return Ok(count);
            }
            if !self.next_part()? {
                buffer.clear();
                return Ok(0);
            }
        }
    }

    /// Goes on to the part after the current one. False: the current one is the newest.
    fn next_part(&mut self) -> io::Result<bool> {
        if let Some(file) = self.pending.pop() {
            self.current = Some(file);
            self.offset = 0;
            return Ok(true);
        }
        let Some(current) = &self.current else {
            self.current = open_parts(&self.path)?.pop();
            return Ok(self.current.is_some());
        };
        let here = identity(current)?;
        let newest_first = open_parts(&self.path)?;
        let position = newest_first.iter().position(|file| identity(file).is_ok_and(|id| id == here));
        match position {
            Some(0) => Ok(false),
            // Rotated between our last read and now: what was written in between comes first.
            _ if current.metadata()?.len() > self.offset => Ok(true),
            Some(n) => {
                self.pending = newest_first;
                self.pending.truncate(n);
                self.next_part()
            }
            // Ours is gone already: everything that is left is newer.
            None if newest_first.is_empty() => Ok(false),
            None => {
                self.pending = newest_first;
                self.next_part()
            }
        }
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|found| (found.dev(), found.ino()))
}

/// Every part of a log, newest first. Open files stay what they are when a rotation renames them; one between two of
/// our looks is noticed and looked at again.
fn open_parts(path: &Path) -> io::Result<Vec<File>> {
    loop {
        let mut parts: Vec<File> = Vec::new();
        let mut twice = false;
        let mut number = 0_u32;
        loop {
            let name = if number == 0 { path.to_owned() } else { numbered(path, number) };
            match File::open(&name) {
                Ok(file) => {
                    let id = identity(&file)?;
                    twice |= parts.iter().any(|known| identity(known).is_ok_and(|known| known == id));
                    parts.push(file);
                }
                // A rotation that was cut short leaves one hole.
                Err(e) if e.kind() == io::ErrorKind::NotFound && numbered(path, number + 1).exists() => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) => return Err(e),
            }
            number += 1;
        }
        if !twice {
            return Ok(parts);
        }
    }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Where the last `lines` lines start, and how many of them are in this file. Reads from the end. In the newest part the
/// last line may have no end yet, and counts.
fn tail_start(file: &File, lines: u64, newest: bool) -> io::Result<(u64, u64)> {
    let length = file.metadata()?.len();
    if lines == 0 {
        return Ok((length, 0));
    }
    let mut newlines = Backward { file, buffer: Vec::new(), from: length, at: 0 };
    let mut found = 0;
    let mut end = length;
    while end > 0 {
        // The newline at the very end closes the last record and starts none.
        let start = match newlines.next()? {
            Some(newline) if newline + 1 == length => continue,
            Some(newline) => newline + 1,
            None => 0,
        };
        let open = newest && end == length && !ends_line(file, start)?;
        if open {
            found = 1;
        } else if ends_line(file, start)? {
            if found == lines {
                return Ok((end, found));
            }
            found += 1;
        }
        end = start;
    }
    Ok((0, found))
}

/// Offsets of newlines, last first.
struct Backward<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Offset of the buffer in the file.
    from: u64,
    /// What of the buffer has not been looked at.
    at: usize,
}

impl Backward<'_> {
    fn next(&mut self) -> io::Result<Option<u64>> {
        loop {
            if let Some(found) = memchr::memrchr(b'\n', &self.buffer[..self.at]) {
                self.at = found;
                return Ok(Some(self.from + found as u64));
            }
            if self.from == 0 {
                return Ok(None);
            }
            let size = usize::try_from(self.from).unwrap_or(CHUNK).min(CHUNK);
            self.from -= size as u64;
            self.buffer.resize(size, 0);
            self.file.read_exact_at(&mut self.buffer, self.from)?;
            self.at = size;
        }
    }
}

/// Whether the record at `start` ends a line.
fn ends_line(file: &File, start: u64) -> io::Result<bool> {
    let mut tag = [0];
    Ok(file.read_at(&mut tag, start + TAG as u64)? == 1 && tag[0] == b'F')
}

/// Numbers of the runs that have a log, oldest first.
pub(crate) fn attempts(directory: &Path) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if let Some(number) =
            name.to_str().and_then(|name| name.strip_suffix(".log")).and_then(|n| n.parse().ok())
        {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;

    fn record(stream: &str, tag: char, text: &str) -> String {
        format!("2026-01-02T15:04:05.000000000Z {stream} {tag} {text}\n")
    }

    fn joined(input: &str, step: usize) -> Vec<String> {
        let mut joiner = Joiner::default();
        let mut lines = Vec::new();
        let mut each = |line: Line<'_>| {
            lines.push(String::from_utf8_lossy(line.text).into_owned());
            Ok::<_, Infallible>(())
        };
        for bytes in input.as_bytes().chunks(step) {
            joiner.feed(bytes, &mut each).unwrap();
        }
        joiner.finish(&mut each).unwrap();
        lines
    }

    #[test]
    fn parts_of_a_line_are_joined_stream_by_stream_whatever_the_read_size() {
        let input = record("stdout", 'P', "a")
            + &record("stderr", 'F', "err")
            + &record("stdout", 'P', "b")
            + &record("stdout", 'F', "")
            + "odd line\n"
            + &record("stdout", 'P', "no end");
        for step in [1, 7, 39, 4096] {
            assert_eq!(joined(&input, step), ["err", "ab", "odd line", "no end"]);
        }
    }

    #[test]
    fn an_endless_line_is_printed_in_pieces() {
        let input = record("stdout", 'P', &"x".repeat(1000)).repeat(2 * MAX_LINE_BYTES / 1000);
        assert!(joined(&input, 4096).len() >= 2);
    }

    /// A log in parts, as a rotation leaves them: the last given is the newest.
    fn log(dir: &Path, parts: &[String]) -> PathBuf {
        let path = dir.join("0.log");
        for (age, part) in parts.iter().rev().enumerate() {
            let name = if age == 0 { path.clone() } else { numbered(&path, u32::try_from(age).unwrap()) };
            fs::write(name, part).unwrap();
        }
        path
    }

    fn read_all(reader: &mut Reader) -> String {
        let (mut text, mut buffer) = (Vec::new(), Vec::new());
        while reader.read(&mut buffer).unwrap() > 0 {
            text.extend_from_slice(&buffer);
        }
        joined(std::str::from_utf8(&text).unwrap(), 4096).join(" ")
    }

    fn part(words: &[&str]) -> String {
        words.iter().map(|word| record("stdout", 'F', word)).collect()
    }

    #[test]
    fn tails_reach_over_rotated_parts() {
        let temp = tempfile::tempdir().unwrap();
        let path = log(temp.path(), &[part(&["a", "b"]), part(&["c"]), part(&["d", "e"])]);
        for (tail, expected) in [
            (None, "a b c d e"),
            (Some(0), ""),
            (Some(1), "e"),
            (Some(2), "d e"),
            (Some(3), "c d e"),
            (Some(4), "b c d e"),
            (Some(99), "a b c d e"),
        ] {
            assert_eq!(read_all(&mut Reader::open(&path, tail).unwrap()), expected, "{tail:?}");
        }
    }

    #[test]
    fn a_tail_counts_lines_and_not_their_parts() {
        let temp = tempfile::tempdir().unwrap();
        let text = part(&["a"]) + &record("stdout", 'P', "b1") + &record("stdout", 'F', "b2") + &part(&["c"]);
        let path = log(temp.path(), &[text]);
        assert_eq!(read_all(&mut Reader::open(&path, Some(2)).unwrap()), "b1b2 c");
        let many: String = (0..5000).map(|n| record("stdout", 'F', &n.to_string())).collect();
        let path = log(temp.path(), &[many]);
        assert_eq!(read_all(&mut Reader::open(&path, Some(3)).unwrap()), "4997 4998 4999");
    }

    #[test]
    fn nothing_is_lost_or_repeated_when_the_log_rotates_while_it_is_followed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("0.log");
        let append = |word: &str| {
            let mut file = OpenOptions::new().append(true).create(true).open(&path).unwrap();
            file.write_all(record("stdout", 'F', word).as_bytes()).unwrap();
        };
        let rotate = || {
            for number in (1..4).rev() {
                let _ = fs::rename(numbered(&path, number), numbered(&path, number + 1));
            }
            fs::rename(&path, numbered(&path, 1)).unwrap();
        };
        let mut reader = Reader::open(&path, None).unwrap();
        assert_eq!(read_all(&mut reader), "", "the log may come later");
        append("a");
        assert_eq!(read_all(&mut reader), "a");
        append("b");
        rotate();
        append("c");
        assert_eq!(read_all(&mut reader), "b c");
        for word in ["d", "e", "f"] {
            rotate();
            append(word);
        }
        assert_eq!(read_all(&mut reader), "d e f");
        rotate();
        assert_eq!(read_all(&mut reader), "", "between the two renames there is no newest part");
        append("g");
        assert_eq!(read_all(&mut reader), "g");
    }

    #[test]
    fn runs_are_found_in_order() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["10.log", "2.log", "2.log.1", "0.log.new", "x"] {
            fs::write(temp.path().join(name), "").unwrap();
        }
        assert_eq!(attempts(temp.path()).unwrap(), [2, 10]);
    }
}
