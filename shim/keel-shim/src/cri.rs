//! The CRI log format: `2026-01-02T15:04:05.123456789Z stdout F text`.
//!
//! The fraction always has nine digits, because readers parse the time by width. `P` marks a part of a line whose rest
//! follows, `F` its end; a stream that ends within a line gets an empty `F`, so that a reader never waits for more.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keel_proto::Stream;

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
        let mut taken = 0;
        let mut written = 0;
        self.header[TAG] = b'F';
        for end in memchr::memchr_iter(b'\n', input) {
            let line = &input[taken..=end];
            if !append(&self.header, line, out, &mut written) {
                return (taken, written);
            }
            taken = end + 1;
            self.in_line = false;
        }
        let rest = &input[taken..];
        if !rest.is_empty() {
            self.header[TAG] = b'P';
            // One more byte for the newline, which the header check below counts.
            if out.len() - written > HEADER + rest.len() && append(&self.header, rest, out, &mut written) {
                out[written] = b'\n';
                written += 1;
                taken = input.len();
                self.in_line = true;
            }
        }
        (taken, written)
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

#[inline(always)]
fn append(header: &[u8; HEADER], text: &[u8], out: &mut [u8], written: &mut usize) -> bool {
    let Some((head, room)) = out[*written..].split_first_chunk_mut::<HEADER>() else {
        return false;
    };
    let Some(room) = room.get_mut(..text.len()) else {
        return false;
    };
    *head = *header;
    room.copy_from_slice(text);
    *written += HEADER + text.len();
    true
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
