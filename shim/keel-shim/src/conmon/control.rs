//! The `ctl` and `winsz` FIFOs: lines of numbers.

use std::fs::File;
use std::io::Read as _;

/// More rows or columns than this are refused: programs allocate by them.
const LARGEST_WINDOW: i64 = 1000;
/// Longer lines are no messages.
const LONGEST_LINE: usize = 200;
const RESIZE: i64 = 1;
const REOPEN: i64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Resize { rows: u16, columns: u16 },
    ReopenLogs,
}

impl Message {
    /// A line of `ctl`: kind, rows, columns; what follows is passed over.
    pub(crate) fn of_control(line: &[u8]) -> Option<Message> {
        let [kind, rows, columns] = numbers(line)?;
        let (rows, columns) = (size(rows)?, size(columns)?);
        match kind {
            RESIZE => Some(Message::Resize { rows, columns }),
            REOPEN => Some(Message::ReopenLogs),
            _ => None,
        }
    }

    /// A line of `winsz`: rows, columns.
    pub(crate) fn of_window(line: &[u8]) -> Option<Message> {
        let [rows, columns] = numbers(line)?;
        Some(Message::Resize { rows: size(rows)?, columns: size(columns)? })
    }
}

fn size(number: i64) -> Option<u16> {
    (0..=LARGEST_WINDOW).contains(&number).then_some(number as u16)
}

/// Decimal numbers with white space before each; each must be followed by white space or the next part of the line.
fn numbers<const N: usize>(line: &[u8]) -> Option<[i64; N]> {
    let mut found = [0; N];
    let mut rest = line;
    for number in &mut found {
        rest = rest.trim_ascii_start();
        let sign = usize::from(matches!(rest.first(), Some(b'-' | b'+')));
        let digits = rest[sign..].iter().take_while(|b| b.is_ascii_digit()).count();
        let (text, after) = rest.split_at(sign + digits);
        *number = std::str::from_utf8(text).ok()?.parse().ok()?;
        rest = after;
    }
    Some(found)
}

/// Puts the lines of a FIFO together.
pub(crate) struct Lines {
    pub(crate) file: File,
    begun: Vec<u8>,
    /// The rest of a line that is too long already.
    skipping: bool,
}

impl Lines {
    pub(crate) fn new(file: File) -> Lines {
        Lines { file, begun: Vec::new(), skipping: false }
    }

    /// Everything that can be read now.
    pub(crate) fn read(&mut self, mut each: impl FnMut(&[u8])) {
        let mut buffer = [0; 512];
        while let Ok(got) = self.file.read(&mut buffer) {
            if got == 0 {
                break;
            }
            self.take(&buffer[..got], &mut each);
        }
    }

    fn take(&mut self, bytes: &[u8], each: &mut impl FnMut(&[u8])) {
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            self.begun.extend_from_slice(part);
            let ends = part.ends_with(b"\n");
            self.skipping |= self.begun.len() > LONGEST_LINE;
            if ends && !self.skipping {
                each(&self.begun);
            }
            if ends || self.skipping {
                self.begun = Vec::new();
            }
            self.skipping &= !ends;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_lines_are_three_numbers_within_bounds() {
        let check = |line: &str, expected: Option<(u16, u16)>| {
            let resize = expected.map(|(rows, columns)| Message::Resize { rows, columns });
            assert_eq!(Message::of_control(line.as_bytes()), resize, "{line}");
        };
        check("1 2 3\n", Some((2, 3)));
        check("1 2 2 3\n", Some((2, 2)));
        check("1 0010 0020\n", Some((10, 20)));
        check(" 1\t1000 1000\n", Some((1000, 1000)));
        for bad in ["1 -1 -1", "1 2", "1", "", "foo", "999 2 2", "1 10.5 20.3", "1 0x10 0x20", "1 1001 5"] {
            check(&format!("{bad}\n"), None);
        }
        check("1 99999999999999999999 1\n", None);
        assert_eq!(Message::of_control(b"2 0 0\n"), Some(Message::ReopenLogs));
        assert_eq!(Message::of_window(b"24 80\n"), Some(Message::Resize { rows: 24, columns: 80 }));
    }

    #[test]
    fn lines_are_put_together_and_endless_ones_passed_over() {
        let mut lines = Lines::new(File::open("/dev/null").unwrap());
        let mut seen = Vec::new();
        let long = [b'#'; 5000];
        let parts: [&[u8]; 6] = [b"1 2", b" 3\n4 5 6\n7", b" 8 9\n", &long, b"tail\n", b"1 1 1\n"];
        for part in parts {
            lines.take(part, &mut |line| seen.push(String::from_utf8(line.to_vec()).unwrap()));
        }
        assert_eq!(seen, ["1 2 3\n", "4 5 6\n", "7 8 9\n", "1 1 1\n"]);
        assert!(lines.begun.is_empty());
    }
}
