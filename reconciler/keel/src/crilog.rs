//! Reading container logs: CRI lines in `<attempt>.log`, older parts in `<attempt>.log.1`, `.2`, ... (newest first).

use std::fs::{self, File};
use std::io::{self, Seek as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use flate2::read::{GzDecoder, MultiGzDecoder};

/// `2026-01-02T15:04:05.123456789Z`
const TIME: usize = 30;
/// Offset of `F` or `P`: time, blank, stream name of six letters, blank.
const TAG: usize = TIME + 8;
/// Time to text: tag and blank follow.
const HEADER: usize = TAG + 2;
/// Of a line that has none.
pub(crate) const NO_TIME: &str = "-";
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
    /// Lines are text, whatever they look like.
    raw: bool,
    record: Vec<u8>,
    parts: [Begun; 2],
}

#[derive(Debug, Default)]
struct Begun {
    time: String,
    text: Vec<u8>,
    open: bool,
}

impl Joiner {
    pub(crate) fn new(raw: bool) -> Joiner {
        Joiner { raw, ..Joiner::default() }
    }

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
                Self::record(self.raw, &mut self.parts, head, &mut each)?;
            } else {
                self.record.extend_from_slice(head);
                Self::record(self.raw, &mut self.parts, &self.record, &mut each)?;
                self.record.clear();
            }
        }
        self.record.extend_from_slice(bytes);
        Ok(())
    }

    /// What has no end yet, at the end of the log.
    pub(crate) fn finish<E>(&mut self, mut each: impl FnMut(Line<'_>) -> Result<(), E>) -> Result<(), E> {
        if self.raw && !self.record.is_empty() {
            each(Line { time: NO_TIME, text: &self.record })?;
        }
        for part in self.parts.iter_mut().filter(|part| part.open) {
            part.flush(&mut each)?;
        }
        Ok(())
    }

    fn record<E>(
        raw: bool,
        parts: &mut [Begun; 2],
        record: &[u8],
        each: &mut impl FnMut(Line<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some((time, stream, full, text)) = split(record).filter(|_| !raw) else {
            // Nothing of ours. Shown as it is: a log viewer that hides lines is worse than one that shows odd ones.
            return each(Line { time: NO_TIME, text: record });
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

impl Begun {
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
    raw: bool,
    current: Option<Part>,
    offset: u64,
    /// Parts older than `current` is followed by, oldest last; only for the first pass.
    pending: Vec<Part>,
}

impl Reader {
    /// `tail`: only the last so many lines. The log need not be there yet. A `raw` one has text and nothing else.
    pub(crate) fn open(path: &Path, raw: bool, tail: Option<u64>) -> io::Result<Reader> {
        let mut newest_first = open_parts(path)?;
        let mut offset = 0;
        if let Some(lines) = tail {
            let mut left = lines;
            for index in 0..newest_first.len() {
                let (start, found) = tail_start(newest_first[index].text()?, raw, left, index == 0)?;
                left -= found;
                if left == 0 {
                    newest_first.truncate(index + 1);
                    offset = start;
                    break;
                }
            }
        }
        let current = newest_first.pop();
        Ok(Reader { path: path.to_owned(), raw, current, offset, pending: newest_first })
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.raw
    }

    /// The next bytes; none: the end of what is written so far.
    pub(crate) fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        buffer.resize(CHUNK, 0);
        loop {
            let Some(part) = &mut self.current else {
                match self.next_part()? {
                    true => continue,
                    false => return Ok(0),
                }
            };
            let count = part.text()?.read_at(buffer, self.offset)?;
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
        if let Some(part) = self.pending.pop() {
            self.current = Some(part);
            self.offset = 0;
            return Ok(true);
        }
        let Some(current) = &mut self.current else {
            self.current = open_parts(&self.path)?.pop();
            return Ok(self.current.is_some());
        };
        let newest_first = open_parts(&self.path)?;
        let position = newest_first.iter().position(|part| part.id == current.id);
        match position {
            Some(0) => Ok(false),
            // Rotated between our last read and now: what was written in between comes first.
            _ if current.text()?.metadata()?.len() > self.offset => Ok(true),
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

/// One file of a log.
#[derive(Debug)]
struct Part {
    file: File,
    /// Of the file that the container's output was written to, also if this is what compression made of it: inode number
    /// and nanoseconds of birth, because numbers are given again.
    id: (u64, u64),
    packed: bool,
}

impl Part {
    fn plain(file: File) -> io::Result<Part> {
        let found = file.metadata()?;
        let born = found.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let born = born.map_or(0, |at| u64::try_from(at.as_nanos()).unwrap_or(0));
        Ok(Part { id: (found.ino(), born), file, packed: false })
    }

    fn packed(file: File) -> io::Result<Part> {
        /// The monitor's field in the header, and the length of what is in it.
        const ORIGINAL: [u8; 4] = [b'K', b'L', 16, 0];
        let plain = Part::plain(file)?;
        let decoder = GzDecoder::new(&plain.file);
        let extra = decoder.header().and_then(|header| header.extra()).unwrap_or_default();
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let id = match extra.strip_prefix(&ORIGINAL) {
            Some(original @ [_, ..]) if original.len() == 16 => {
                (number(&original[..8]), number(&original[8..]))
            }
            // Somebody else's work.
            _ => plain.id,
        };
        drop(decoder);
        Ok(Part { id, packed: true, ..plain })
    }

    /// What the container wrote: unpacked when it is first asked for.
    fn text(&mut self) -> io::Result<&File> {
        if self.packed {
            self.file.rewind()?;
            let mut unpacked = File::from(keel_sys::memfd::create(c"keel-log")?);
            io::copy(&mut MultiGzDecoder::new(&self.file), &mut unpacked)?;
            self.file = unpacked;
            self.packed = false;
        }
        Ok(&self.file)
    }
}

/// Every part of a log, newest first. Open files stay what they are when a rotation renames them; one between two of
/// our looks is noticed and looked at again.
fn open_parts(path: &Path) -> io::Result<Vec<Part>> {
    loop {
        let mut parts: Vec<Part> = Vec::new();
        let mut twice = false;
        for number in 0_u32.. {
            match open_part(path, number)? {
                Some(part) => {
                    twice |= parts.iter().any(|known| known.id == part.id);
                    parts.push(part);
                }
                // A rotation that was cut short leaves one hole.
                None if open_part(path, number + 1)?.is_some() => {}
                None => break,
            }
        }
        if !twice {
            return Ok(parts);
        }
    }
}

/// A file goes only after the compressed one has its name, so it is looked for first.
fn open_part(path: &Path, number: u32) -> io::Result<Option<Part>> {
    let plain = if number == 0 { path.to_owned() } else { numbered(path, number) };
    let mut packed = plain.as_os_str().to_owned();
    packed.push(".gz");
    for (name, read) in
        [(plain, Part::plain as fn(File) -> io::Result<Part>), (packed.into(), Part::packed as _)]
    {
        match File::open(&name) {
            Ok(file) => return read(file).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Where the last `lines` lines start, and how many of them are in this file. Reads from the end. In the newest part the
/// last line may have no end yet, and counts.
fn tail_start(file: &File, raw: bool, lines: u64, newest: bool) -> io::Result<(u64, u64)> {
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
        let ends = raw || ends_line(file, start)?;
        if newest && end == length && !ends {
            found = 1;
        } else if ends {
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

/// Numbers of the runs that have a log, and whether that is a raw one, oldest first.
pub(crate) fn attempts(directory: &Path) -> io::Result<Vec<(u32, bool)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let Some((number, kind)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        if let (Ok(number), "log" | "raw") = (number.parse(), kind) {
            found.push((number, kind == "raw"));
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
            assert_eq!(read_all(&mut Reader::open(&path, false, tail).unwrap()), expected, "{tail:?}");
        }
    }

    #[test]
    fn a_tail_counts_lines_and_not_their_parts() {
        let temp = tempfile::tempdir().unwrap();
        let text = part(&["a"]) + &record("stdout", 'P', "b1") + &record("stdout", 'F', "b2") + &part(&["c"]);
        let path = log(temp.path(), &[text]);
        assert_eq!(read_all(&mut Reader::open(&path, false, Some(2)).unwrap()), "b1b2 c");
        let many: String = (0..5000).map(|n| record("stdout", 'F', &n.to_string())).collect();
        let path = log(temp.path(), &[many]);
        assert_eq!(read_all(&mut Reader::open(&path, false, Some(3)).unwrap()), "4997 4998 4999");
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
        let mut reader = Reader::open(&path, false, None).unwrap();
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

    /// As the monitor does it: the compressed file has the identity of the one that it replaces.
    fn compress(path: &Path) {
        let original = Part::plain(File::open(path).unwrap()).unwrap();
        let mut extra = b"KL\x10\0".to_vec();
        extra.extend(original.id.0.to_le_bytes());
        extra.extend(original.id.1.to_le_bytes());
        let packed = File::create(format!("{}.gz", path.display())).unwrap();
        let mut encoder = flate2::GzBuilder::new().extra(extra).write(packed, flate2::Compression::default());
        encoder.write_all(&fs::read(path).unwrap()).unwrap();
        encoder.finish().unwrap();
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn compressed_parts_are_read_as_the_others_are_also_while_they_are_made() {
        let temp = tempfile::tempdir().unwrap();
        let path = log(temp.path(), &[part(&["a", "b"]), part(&["c"]), part(&["d", "e"])]);
        compress(&numbered(&path, 2));
        for (tail, expected) in [(None, "a b c d e"), (Some(3), "c d e"), (Some(4), "b c d e")] {
            assert_eq!(read_all(&mut Reader::open(&path, false, tail).unwrap()), expected, "{tail:?}");
        }
        let mut reader = Reader::open(&path, false, Some(1)).unwrap();
        assert_eq!(read_all(&mut reader), "e");
        // What was open is read, and nothing of it or of what was before it again.
        fs::rename(numbered(&path, 1), numbered(&path, 3)).unwrap();
        fs::rename(&path, numbered(&path, 1)).unwrap();
        compress(&numbered(&path, 1));
        fs::write(&path, part(&["f"])).unwrap();
        assert_eq!(read_all(&mut reader), "f");
    }

    #[test]
    fn lines_of_a_raw_log_are_text_whatever_they_look_like() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("0.raw");
        let odd = record("stdout", 'P', "x");
        fs::write(&path, format!("a\nb\n{odd}no end")).unwrap();
        let read = |tail| {
            let mut reader = Reader::open(&path, true, tail).unwrap();
            let (mut lines, mut buffer, mut joiner) = (Vec::new(), Vec::new(), Joiner::new(true));
            let mut each = |line: Line<'_>| {
                lines.push(String::from_utf8_lossy(line.text).into_owned());
                Ok::<_, Infallible>(())
            };
            while reader.read(&mut buffer).unwrap() > 0 {
                joiner.feed(&buffer, &mut each).unwrap();
            }
            joiner.finish(&mut each).unwrap();
            lines
        };
        let odd = odd.trim_end();
        assert_eq!(read(None), ["a", "b", odd, "no end"]);
        assert_eq!(read(Some(3)), ["b", odd, "no end"]);
    }

    #[test]
    fn runs_are_found_in_order() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["10.log", "2.log", "2.log.1", "2.log.2.gz", "3.raw", "0.log.new", "x"] {
            fs::write(temp.path().join(name), "").unwrap();
        }
        assert_eq!(attempts(temp.path()).unwrap(), [(2, false), (3, true), (10, false)]);
    }
}
