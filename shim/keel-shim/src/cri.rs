//! The CRI log format: `2026-01-02T15:04:05.123456789Z stdout F text`.
//!
//! The fraction always has nine digits, because readers parse the time by width. `P` marks a part of a line whose rest
//! follows, `F` its end; a stream that ends within a line gets an empty `F`, so that a reader never waits for more.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keel_proto::Stream;
use keel_sys::scan::{BLOCK, newlines};

/// `<30 bytes of time> stdout F `: both stream names are six letters long.
pub(crate) const HEADER: usize = TIME + 10;
const TIME: usize = 30;
const TAG: usize = TIME + 8;

/// Formats one stream. Remembers whether it is within a line.
#[derive(Clone, Copy)]
pub(crate) struct Formatter {
    header: [u8; HEADER],
    in_line: bool,
}

impl Formatter {
    pub(crate) fn new(stream: Stream, in_line: bool) -> Formatter {
        let mut header = *b"0000-00-00T00:00:00.000000000Z stdout F ";
        header[TIME + 1..TIME + 7].copy_from_slice(stream.name().as_bytes());
        Formatter { header, in_line }
    }

    pub(crate) fn set_time(&mut self, now: SystemTime) {
        write_time(&mut self.header, now.duration_since(UNIX_EPOCH).unwrap_or_default());
    }

    /// Hands on `input` in records, as many at once as `out` has room for.
    pub(crate) fn records(&mut self, mut input: &[u8], out: &mut [u8], mut each: impl FnMut(&[u8])) {
        while !input.is_empty() {
            let (taken, written) = self.format(input, out);
            each(&out[..written]);
            input = &input[taken..];
        }
    }

    /// Writes records for the start of `input` into `out`; returns how much was taken and how much written.
    /// Takes everything when `out` has room, and something whenever `out` has room for one record of all of it.
    pub(crate) fn format(&mut self, input: &[u8], out: &mut [u8]) -> (usize, usize) {
        let mut batch = Batch { input, taken: 0, out, written: 0 };
        self.header[TAG] = b'F';
        let whole = batch.lines(&self.header);
        self.in_line &= batch.taken == 0;
        let rest = input.len() - batch.taken;
        // One more byte for the newline.
        if whole && rest > 0 && batch.out.len() - batch.written > HEADER + rest {
            self.header[TAG] = b'P';
            batch.append(&self.header, input.len());
            batch.out[batch.written] = b'\n';
            batch.written += 1;
            self.in_line = true;
        }
        (batch.taken, batch.written)
    }

    /// The record that closes an unfinished line; empty when there is none.
    pub(crate) fn close<'a>(&mut self, out: &'a mut [u8]) -> &'a [u8] {
        if !self.in_line {
            return &[];
        }
        self.format(b"\n", out);
        &out[..HEADER + 1]
    }
}

/// Text on its way into records.
struct Batch<'a> {
    input: &'a [u8],
    taken: usize,
    out: &'a mut [u8],
    written: usize,
}

impl Batch<'_> {
    /// All lines that have an end; false when there was no room for one of them.
    #[inline(always)]
    fn lines(&mut self, header: &[u8; HEADER]) -> bool {
        let input = self.input;
        let mut at = 0;
        // Ends of long lines come faster one by one; lines are often as long as the one before.
        let mut long = false;
        loop {
            let Some(block) = input[at..].first_chunk::<BLOCK>().filter(|_| !long) else {
                let Some(newline) = memchr::memchr(b'\n', &input[at..]) else { return true };
                at += newline + 1;
                long = at - self.taken > SHORT;
                if !self.append(header, at) {
                    return false;
                }
                continue;
            };
            let mut ends = newlines(block);
            while ends != 0 {
                if !self.append(header, at + ends.trailing_zeros() as usize + 1) {
                    return false;
                }
                ends &= ends - 1;
            }
            at += BLOCK;
            long = at - self.taken > SHORT;
        }
    }

    /// A record of the text up to `end`, if there is room for it.
    #[inline(always)]
    fn append(&mut self, header: &[u8; HEADER], end: usize) -> bool {
        let text = &self.input[self.taken..];
        let len = end - self.taken;
        let Some((head, room)) = self.out[self.written..].split_first_chunk_mut::<HEADER>() else {
            return false;
        };
        if let (0..=SHORT, Some(text), Some(room)) =
            (len, text.first_chunk::<SHORT>(), room.first_chunk_mut::<SHORT>())
        {
            copy_ahead(text, room, len);
        } else {
            let (Some(room), Some(text)) = (room.get_mut(..len), text.get(..len)) else { return false };
            room.copy_from_slice(text);
        }
        *head = *header;
        self.taken = end;
        self.written += HEADER + len;
        true
    }
}

/// Up to this length a line is short: found together with its neighbours, and copied without a call.
const SHORT: usize = 128;
/// Copies `len` bytes and what is next to them, up to a length that is known: this takes a few instructions and no call.
/// What is too much of it is overwritten by the next record.
#[inline(always)]
fn copy_ahead(text: &[u8; SHORT], room: &mut [u8; SHORT], len: usize) {
    room[..16].copy_from_slice(&text[..16]);
    if len > 16 {
        room[16..32].copy_from_slice(&text[16..32]);
    }
    if len > 32 {
        room[32..64].copy_from_slice(&text[32..64]);
    }
    if len > 64 {
        room[64..].copy_from_slice(&text[64..]);
    }
}

/// Civil time in UTC without tables or time zone files.
fn write_time(out: &mut [u8; HEADER], since_epoch: Duration) {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let of_day = seconds % 86_400;
    digits(&mut out[0..4], year);
    digits(&mut out[5..7], month);
    digits(&mut out[8..10], day);
    digits(&mut out[11..13], of_day / 3600);
    digits(&mut out[14..16], of_day / 60 % 60);
    digits(&mut out[17..19], of_day % 60);
    digits(&mut out[20..29], u64::from(since_epoch.subsec_nanos()));
}

/// Proleptic Gregorian date of a day number. Years are counted from March, so that the leap day is a year's last, in
/// eras of 400 years, which all have the same length.
fn civil(days_since_epoch: u64) -> (u64, u64, u64) {
    const DAYS_PER_ERA: u64 = 146_097;
    const MARCH_OF_YEAR_0_TO_EPOCH: u64 = 719_468;
    let days = days_since_epoch + MARCH_OF_YEAR_0_TO_EPOCH;
    let (era, of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

fn digits(out: &mut [u8], mut value: u64) {
    for digit in out.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, nanos: u32) -> SystemTime {
        UNIX_EPOCH + Duration::new(seconds, nanos)
    }

    fn formatter(stream: Stream) -> Formatter {
        let mut formatter = Formatter::new(stream, false);
        formatter.set_time(at(1_767_366_245, 7));
        formatter
    }

    /// Reads come as `reads`; the log must be `expected`, with `T` for the time stamp, at every size of buffer.
    fn check(reads: &[&str], expected: &str) {
        for room in [HEADER + 8, HEADER * 2 + 9, 4096] {
            let mut formatter = formatter(Stream::Stdout);
            let mut out = vec![0; room];
            let mut log = String::new();
            let mut push = |bytes: &[u8]| log.push_str(std::str::from_utf8(bytes).unwrap());
            for read in reads {
                let mut rest = read.as_bytes();
                while !rest.is_empty() {
                    let (taken, written) = formatter.format(rest, &mut out);
                    assert!(taken > 0, "no progress with {room} bytes of room");
                    push(&out[..written]);
                    rest = &rest[taken..];
                }
            }
            push(formatter.close(&mut out));
            assert_eq!(log.replace("2026-01-02T15:04:05.000000007Z stdout", "T"), expected, "{room}");
        }
    }

    #[test]
    fn whole_lines() {
        check(&["a\nbb\n", "c\n"], "T F a\nT F bb\nT F c\n");
        check(&["\n\n"], "T F \nT F \n");
        check(&[], "");
    }

    #[test]
    fn a_line_in_parts_is_p_until_its_end() {
        check(&["ab", "cd", "e\nf\n"], "T P ab\nT P cd\nT F e\nT F f\n");
        check(&["ab", "\n"], "T P ab\nT F \n");
    }

    #[test]
    fn an_unfinished_line_is_closed_at_end_of_file() {
        check(&["a\nb"], "T F a\nT P b\nT F \n");
        check(&["a\n"], "T F a\n");
    }

    /// Word by word as the format is told, one line after the other.
    fn naively(mut input: &[u8], room: usize, header: &str, in_line: &mut bool) -> Vec<Vec<u8>> {
        let mut batches = vec![Vec::new()];
        while !input.is_empty() {
            let newline = input.iter().position(|b| *b == b'\n');
            let (text, rest) = input.split_at(newline.map_or(input.len(), |at| at + 1));
            let tag = if newline.is_some() { " F " } else { " P " };
            let end: &[u8] = if newline.is_some() { b"" } else { b"\n" };
            let record = [header.as_bytes(), tag.as_bytes(), text, end].concat();
            if batches.last().unwrap().len() + record.len() > room {
                batches.push(Vec::new());
            }
            batches.last_mut().unwrap().extend(record);
            *in_line = newline.is_none();
            input = rest;
        }
        batches
    }

    /// Every run is the same, and a failing seed is its own replay.
    fn random(seed: u64) -> impl FnMut(usize) -> usize {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move |below| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 16) as usize % below
        }
    }

    /// Lines of up to `longest` bytes, of any bytes; the last one may have no end.
    fn text(longest: usize, len: usize, random: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < len {
            let line = random(longest);
            text.extend((0..line).map(|_| random(256) as u8).map(|b| if b == b'\n' { b'x' } else { b }));
            text.push(b'\n');
        }
        text.truncate(len);
        text
    }

    fn check_as_naive(input: &[u8], room: usize, seed: u64) {
        let mut formatter = formatter(Stream::Stdout);
        let mut in_line = false;
        let expected = naively(input, room, "2026-01-02T15:04:05.000000007Z stdout", &mut in_line);
        let mut out = vec![0; room];
        let mut batches = Vec::new();
        formatter.records(input, &mut out, |batch| batches.push(batch.to_vec()));
        assert!(batches == expected, "seed {seed}, {} bytes, {room} of room", input.len());
        assert_eq!(formatter.in_line, in_line, "seed {seed}");
    }

    #[test]
    fn any_output_is_formatted_as_if_line_by_line() {
        for seed in 1..=400 {
            let mut random = random(seed);
            let longest = [1, 2, 3, 20, 70, 130, 300, 1000][random(8)];
            let len = 1 + random(3000);
            let input = text(longest, len, &mut random);
            // The longest record, or its part without an end and its newline, always has room.
            let least =
                HEADER + 1 + input.split_inclusive(|b| *b == b'\n').map(<[u8]>::len).max().unwrap_or(0);
            for room in [least, least + 1, least + random(300), least + random(3000), 64 << 10] {
                check_as_naive(&input, room, seed);
            }
        }
    }

    #[test]
    fn every_size_of_buffer_and_every_place_of_a_newline_will_do() {
        let mut random = random(7);
        let input = text(90, 700, &mut random);
        for room in HEADER + 92..2500 {
            check_as_naive(&input, room, 7);
        }
        for len in 1..300 {
            for at in 0..len {
                let mut input = vec![b'x'; len];
                input[at] = b'\n';
                check_as_naive(&input, HEADER + 1 + len, 0);
                check_as_naive(&input, 4096, 0);
            }
        }
    }

    #[test]
    fn nothing_is_taken_when_there_is_no_room_for_it() {
        for len in 1..300 {
            let mut line = vec![b'x'; len];
            for whole in [false, true] {
                line[len - 1] = if whole { b'\n' } else { b'x' };
                let needed = HEADER + len + usize::from(!whole);
                for room in 0..needed {
                    let done = formatter(Stream::Stdout).format(&line, &mut vec![0; room]);
                    assert_eq!(done, (0, 0), "{len} bytes, {room} of room");
                }
                let done = formatter(Stream::Stdout).format(&line, &mut vec![0; needed]);
                assert_eq!(done, (len, needed));
            }
        }
    }

    #[test]
    fn the_fraction_has_nine_digits() {
        let check = |time: SystemTime, expected: &str| {
            let mut formatter = Formatter::new(Stream::Stderr, false);
            formatter.set_time(time);
            let mut out = [0; 64];
            formatter.format(b"\n", &mut out);
            assert_eq!(std::str::from_utf8(&out[..HEADER + 1]).unwrap(), format!("{expected} stderr F \n"));
        };
        check(at(0, 0), "1970-01-01T00:00:00.000000000Z");
        check(at(951_827_696, 999_999_999), "2000-02-29T12:34:56.999999999Z");
        check(at(4_107_542_400, 100_000_000), "2100-03-01T00:00:00.100000000Z");
        check(at(1_798_761_599, 1), "2026-12-31T23:59:59.000000001Z");
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let mut previous = civil(0);
        assert_eq!(previous, (1970, 1, 1));
        for day in 1..146_097 {
            let (y, m, d) = civil(day);
            let (py, pm, pd) = previous;
            let next_day = (y, m, d) == (py, pm, pd + 1);
            let next_month = (y, m, d) == (py, pm + 1, 1) && pd >= 28;
            let next_year = (y, m, d) == (py + 1, 1, 1) && (pm, pd) == (12, 31);
            assert!(next_day || next_month || next_year, "{previous:?} -> {y}-{m}-{d}");
            previous = (y, m, d);
        }
        assert_eq!(civil(146_097), (2370, 1, 1));
    }
}
