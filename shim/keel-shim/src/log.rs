//! The log file: bounded by rotation, never truncated, and honest about what it could not take.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use keel_proto::Stream;

use crate::args::Options;
use crate::cri::{Formatter, HEADER};
use crate::error::{Context, Error};
use crate::replay::parse;

/// Logs may hold secrets: the owner writes, the group reads.
pub(crate) const MODE: u32 = 0o640;

/// How a record begins that the monitor itself wrote, on the stderr stream.
pub(crate) const MARK: &str = "keel-shim: ";

pub(crate) struct Log {
    path: PathBuf,
    /// Absent while the file cannot be opened.
    file: Option<File>,
    inode: u64,
    size: u64,
    /// When the current file was begun.
    born: SystemTime,
    limits: Limits,
    /// Bytes that may yet be written, over all files; what comes after that is only counted.
    pub(crate) budget: u64,
    /// Over the life of the container.
    pub(crate) lost: Lost,
    /// Not yet told in the log.
    untold: Lost,
    reason: Option<io::Error>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Of one file.
    pub(crate) bytes: u64,
    /// The current one counted.
    pub(crate) files: u32,
    /// Looked at when output comes: an idle log wakes nobody to be rotated.
    pub(crate) age: Option<Duration>,
}

impl Limits {
    pub(crate) fn of(options: &Options) -> Limits {
        Limits {
            bytes: options.log_max_bytes,
            files: options.log_max_files,
            age: options.log_max_age.map(Duration::from_secs),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Ends of lines.
    pub(crate) lines: u64,
    pub(crate) bytes: u64,
}

impl Log {
    /// Never fails: a file that cannot be opened now is tried again with the next record, and what is lost is counted.
    pub(crate) fn open(path: &Path, limits: Limits, lost: Lost) -> Log {
        let mut log = Log {
            path: path.to_owned(),
            file: None,
            inode: 0,
            size: 0,
            born: SystemTime::now(),
            limits,
            budget: u64::MAX,
            lost,
            untold: Lost::default(),
            reason: None,
        };
        let _ = log.open_end();
        log
    }

    /// Where the next record goes: the file's inode number, and the offset in it.
    pub(crate) fn position(&self) -> (u64, u64) {
        (self.inode, self.size)
    }

    /// Writes whole records. What the disk refuses is counted, and told in the log as soon as it takes writes again.
    pub(crate) fn append(&mut self, records: &[u8]) {
        let (records, beyond) = records.split_at(self.within_budget(records));
        self.lost.add(measure(beyond));
        if records.is_empty() {
            return;
        }
        if let Err((unwritten, e)) = self.tell_loss().and_then(|()| self.write(records)) {
            let rest = if unwritten == usize::MAX { records } else { &records[unwritten..] };
            self.count(rest);
            self.reason = Some(e);
        }
    }

    /// Opens the file by name again, after somebody moved it away.
    pub(crate) fn reopen(&mut self) -> Result<(), Error> {
        self.open_end().at("open log", &self.path)
    }

    /// Begins a new file whatever the size of the current one.
    pub(crate) fn rotate_now(&mut self) -> Result<(), Error> {
        self.rotate().at("rotate log", &self.path)
    }

    fn open_end(&mut self) -> io::Result<()> {
        let mut options = File::options();
        let file = options.append(true).create(true).mode(MODE).open(&self.path)?;
        let meta = file.metadata()?;
        (self.inode, self.size) = (meta.ino(), meta.len());
        // Not every file system knows when a file was made.
        self.born = meta.created().unwrap_or_else(|_| SystemTime::now());
        self.file = Some(file);
        Ok(())
    }

    pub(crate) fn sync(&self) {
        if let Some(file) = &self.file {
            // Whether the disk took it is not something that an ending container can act on.
            let _ = file.sync_data();
        }
    }

    /// The length of the whole records that may still be written.
    fn within_budget(&self, records: &[u8]) -> usize {
        match usize::try_from(self.budget).ok().and_then(|budget| records.get(..budget)) {
            None => records.len(),
            Some(head) => memchr::memrchr(b'\n', head).map_or(0, |at| at + 1),
        }
    }

    fn count(&mut self, records: &[u8]) {
        let lost = measure(records);
        self.lost.add(lost);
        self.untold.add(lost);
    }

    fn tell_loss(&mut self) -> Result<(), (usize, io::Error)> {
        if self.untold == Lost::default() {
            return Ok(());
        }
        let Lost { lines, bytes } = self.untold;
        let reason = self.reason.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
        let text = format!("{MARK}{lines} lines ({bytes} bytes) of output are missing here{reason}\n");
        let mut out = vec![0; HEADER + text.len()];
        let mut formatter = Formatter::new(Stream::Stderr, false);
        formatter.set_time(SystemTime::now());
        formatter.format(text.as_bytes(), &mut out);
        self.write(&out).map_err(|(_, e)| (usize::MAX, e))?;
        self.untold = Lost::default();
        self.reason = None;
        Ok(())
    }

    /// On error, how many bytes are in the log: a whole number of records.
    fn write(&mut self, records: &[u8]) -> Result<(), (usize, io::Error)> {
        let old = |age| self.born.elapsed().is_ok_and(|now| now >= age);
        if self.size > 0 && self.limits.age.is_some_and(old) {
            self.rotate().map_err(|e| (0, e))?;
        }
        let mut done = 0;
        while done < records.len() {
            let rest = &records[done..];
            let room = usize::try_from(self.limits.bytes.saturating_sub(self.size)).unwrap_or(usize::MAX);
            let fits = match rest.get(..room) {
                None => rest.len(),
                Some(head) => memchr::memrchr(b'\n', head).map_or(0, |at| at + 1),
            };
            if fits == 0 && self.size > 0 {
                self.rotate().map_err(|e| (done, e))?;
                continue;
            }
            // A record that is larger than a whole file gets a file of its own.
            let first = || memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
            let part = &rest[..if fits == 0 { first() } else { fits }];
            self.write_part(part).map_err(|(n, e)| (done + n, e))?;
            done += part.len();
        }
        Ok(())
    }

    fn write_part(&mut self, part: &[u8]) -> Result<(), (usize, io::Error)> {
        if self.file.is_none() {
            self.open_end().map_err(|e| (0, e))?;
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut done = 0;
        while done < part.len() {
            let result = match file.write(&part[done..]) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                other => other,
            };
            match result {
                Ok(n) => {
                    done += n;
                    self.budget = self.budget.saturating_sub(n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // Half a record would run into the next one. Only our own unfinished tail is taken back.
                    let whole = memchr::memrchr(b'\n', &part[..done]).map_or(0, |at| at + 1);
                    if whole < done {
                        let _ = file.set_len(self.size + whole as u64);
                    }
                    self.size += whole as u64;
                    return Err((whole, e));
                }
            }
        }
        self.size += done as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut options = File::options();
        let next = numbered(&self.path, NEXT);
        let file = options.append(true).create(true).mode(MODE).open(&next)?;
        shift(&self.path, self.limits.files)?;
        self.inode = file.metadata()?.ino();
        self.born = SystemTime::now();
        self.file = Some(file);
        self.size = 0;
        Ok(())
    }
}

impl Lost {
    fn add(&mut self, more: Lost) {
        self.lines += more.lines;
        self.bytes += more.bytes;
    }
}

/// The output in records.
fn measure(records: &[u8]) -> Lost {
    let mut lost = Lost::default();
    for record in records.split_inclusive(|b| *b == b'\n') {
        if let Some((_, text)) = parse(record) {
            lost.lines += u64::from(text.ends_with(b"\n"));
            lost.bytes += text.len() as u64;
        }
    }
    lost
}

/// The next file while it waits for the current one to make room. It is there before anything moves, so a full disk
/// leaves everything as it was; and as long as it is there, a rotation is not finished.
const NEXT: &str = "new";

/// `log` becomes `log.1`, `log.1` becomes `log.2`, and so on; the oldest is replaced; `log.new` becomes `log`.
fn shift(path: &Path, files: u32) -> io::Result<()> {
    let backups = files - 1;
    let backup = |n: u32| numbered(path, &n.to_string());
    if backups > 0 && path.exists() {
        // Killed half-way, the numbers have a hole, up to which files have moved already.
        let hole = (1..backups).find(|n| !backup(*n).exists()).unwrap_or(backups);
        for n in (1..hole).rev() {
            rename_if_there(&backup(n), &backup(n + 1))?;
        }
        rename_if_there(path, &backup(1))?;
    }
    fs::rename(numbered(path, NEXT), path)
}

/// Finishes a rotation that was killed half-way, so that the numbers have no hole.
pub(crate) fn finish_rotation(path: &Path, files: u32) {
    if numbered(path, NEXT).exists() {
        // If it does not work now, the next rotation finds the same.
        let _ = shift(path, files);
    }
}

/// `log` with `.suffix` added.
pub(crate) fn numbered(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Takes back a record that was killed half-way: the kernel ends a large write early for a fatal signal. Its output is
/// still in the FIFO.
pub(crate) fn cut_torn_record(path: &Path) -> io::Result<()> {
    /// Longer than any record.
    const WINDOW: u64 = 256 << 10;
    let file = match File::options().read(true).write(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let size = file.metadata()?.len();
    let start = size.saturating_sub(WINDOW);
    let mut tail = vec![0; usize::try_from(size - start).unwrap_or(0)];
    file.read_exact_at(&mut tail, start)?;
    let whole = memchr::memrchr(b'\n', &tail).map_or(0, |at| at + 1);
    // A tail of another make, without any newline, is not ours to cut.
    let ours = whole > 0 || start == 0;
    if ours && whole < tail.len() { file.set_len(start + whole as u64) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let dir = std::env::temp_dir().join(format!("keel-log-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            Dir(dir)
        }

        fn log(&self) -> PathBuf {
            self.0.join("0.log")
        }

        fn open(&self, max_bytes: u64, max_files: u32) -> Log {
            Log::open(&self.log(), Limits { bytes: max_bytes, files: max_files, age: None }, Lost::default())
        }

        fn read(&self, suffix: &str) -> String {
            let path = if suffix.is_empty() { self.log() } else { numbered(&self.log(), suffix) };
            fs::read_to_string(path).unwrap_or_else(|_| "absent".into())
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn files_are_full_records_newest_first_and_bounded_in_number() {
        let dir = Dir::new("rotate");
        let mut log = dir.open(8, 3);
        log.append(b"aaa\nbbb\nccc\n");
        assert_eq!([dir.read(""), dir.read("1"), dir.read("2")], ["ccc\n", "aaa\nbbb\n", "absent"]);
        log.append(b"ddd\neee\n");
        log.append(b"f\n");
        assert_eq!([dir.read(""), dir.read("1"), dir.read("2")], ["eee\nf\n", "ccc\nddd\n", "aaa\nbbb\n"]);
        log.append(b"ggggggg\n");
        assert_eq!([dir.read(""), dir.read("1"), dir.read("2")], ["ggggggg\n", "eee\nf\n", "ccc\nddd\n"]);
        assert_eq!(dir.read("3"), "absent");
    }

    #[test]
    fn a_record_larger_than_a_file_is_kept_whole() {
        let dir = Dir::new("large");
        let mut log = dir.open(4, 2);
        log.append(b"a\n0123456789\nb\n");
        assert_eq!([dir.read(""), dir.read("1")], ["b\n", "0123456789\n"]);
    }

    #[test]
    fn one_file_means_no_history() {
        let dir = Dir::new("one");
        let mut log = dir.open(4, 1);
        log.append(b"aaa\nbbb\n");
        assert_eq!([dir.read(""), dir.read("1")], ["bbb\n", "absent"]);
    }

    #[test]
    fn what_is_beyond_the_budget_is_counted_and_not_written() {
        let dir = Dir::new("budget");
        let record = |text: &str| format!("2026-01-02T15:04:05.000000007Z stdout F {text}\n");
        let mut log = dir.open(1000, 3);
        log.budget = record("a").len() as u64 * 2 + 5;
        for text in ["a", "b", "c", "d"] {
            log.append(record(text).as_bytes());
        }
        assert_eq!(dir.read(""), record("a") + &record("b"));
        assert_eq!(log.lost, Lost { lines: 2, bytes: 4 });
    }

    #[test]
    fn an_old_file_is_rotated_when_output_comes() {
        let dir = Dir::new("age");
        let limits = Limits { bytes: 1000, files: 3, age: Some(Duration::from_secs(60)) };
        let mut log = Log::open(&dir.log(), limits, Lost::default());
        log.append(b"a\n");
        log.append(b"b\n");
        log.born -= Duration::from_secs(61);
        log.append(b"c\n");
        log.append(b"d\n");
        assert_eq!([dir.read(""), dir.read("1")], ["c\nd\n", "a\nb\n"]);
    }

    #[test]
    fn a_restarted_monitor_goes_on_where_the_file_ends() {
        let dir = Dir::new("resume");
        dir.open(8, 2).append(b"aaa\n");
        let mut log = dir.open(8, 2);
        log.append(b"bbb\n");
        assert_eq!(dir.read(""), "aaa\nbbb\n");
        log.append(b"c\n");
        assert_eq!([dir.read(""), dir.read("1")], ["c\n", "aaa\nbbb\n"]);
    }

    #[test]
    fn a_rotation_that_was_killed_half_way_loses_nothing() {
        let dir = Dir::new("killed");
        let mut log = dir.open(4, 5);
        log.append(b"aaa\nbbb\n");
        log.append(b"ccc\n");
        let all = ["0.log", "0.log.1", "0.log.2"].map(|name| dir.0.join(name));
        let check = |step: &str| {
            fs::write(dir.0.join("0.log.new"), "").unwrap();
            finish_rotation(&dir.log(), 5);
            let texts = ["", "1", "2", "3", "4"].map(|n| dir.read(n));
            let texts: Vec<_> = texts.iter().map(String::as_str).filter(|t| !t.is_empty()).collect();
            assert_eq!(texts[..3], ["ccc\n", "bbb\n", "aaa\n"], "{step}");
            assert!(!dir.0.join("0.log.new").exists());
            for (n, text) in texts[..3].iter().enumerate() {
                fs::write(&all[n], text).unwrap();
            }
            for n in ["3", "4"] {
                let _ = fs::remove_file(numbered(&dir.log(), n));
            }
        };
        check("before anything moved");
        fs::rename(&all[2], numbered(&dir.log(), "3")).unwrap();
        check("oldest moved");
        fs::rename(&all[2], numbered(&dir.log(), "3")).unwrap();
        fs::rename(&all[1], &all[2]).unwrap();
        check("all backups moved");
        fs::rename(&all[2], numbered(&dir.log(), "3")).unwrap();
        fs::rename(&all[1], &all[2]).unwrap();
        fs::rename(&all[0], &all[1]).unwrap();
        check("current moved");
    }

    #[test]
    fn half_a_record_is_taken_back_and_nothing_else() {
        let dir = Dir::new("torn");
        let check = |text: &str, expected: &str| {
            fs::write(dir.log(), text).unwrap();
            cut_torn_record(&dir.log()).unwrap();
            assert_eq!(dir.read(""), expected);
        };
        check("a\nb\n", "a\nb\n");
        check("a\nb", "a\n");
        check("b", "");
        check("", "");
        let long = "x".repeat(300_000);
        check(&long, &long);
        cut_torn_record(&dir.0.join("absent")).unwrap();
    }

    #[test]
    fn reopen_follows_the_name_and_keeps_what_is_there() {
        let dir = Dir::new("reopen");
        let mut log = dir.open(100, 2);
        log.append(b"a\n");
        fs::rename(dir.log(), dir.0.join("moved")).unwrap();
        log.append(b"b\n");
        log.reopen().unwrap();
        log.append(b"c\n");
        log.reopen().unwrap();
        log.append(b"d\n");
        assert_eq!(fs::read_to_string(dir.0.join("moved")).unwrap(), "a\nb\n");
        assert_eq!(dir.read(""), "c\nd\n");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_tried_again() {
        let dir = Dir::new("absent");
        fs::create_dir(dir.log()).unwrap();
        let mut log = dir.open(1000, 2);
        assert!(log.reopen().is_err());
        let mut out = [0; 64];
        let (_, len) = Formatter::new(Stream::Stdout, false).format(b"a\n", &mut out);
        log.append(&out[..len]);
        assert_eq!(log.lost, Lost { lines: 1, bytes: 2 });
        fs::remove_dir(dir.log()).unwrap();
        log.append(&out[..len]);
        let text = dir.read("");
        assert!(text.lines().count() == 2 && text.contains("1 lines (2 bytes)"), "{text}");
    }

    #[test]
    fn loss_is_counted_and_told_when_writing_works_again() {
        let dir = Dir::new("full");
        let mut log = dir.open(1 << 20, 2);
        let record = |text: &str| {
            let mut out = vec![0; HEADER + text.len() + 1];
            let mut formatter = Formatter::new(Stream::Stdout, false);
            formatter.format(format!("{text}\n").as_bytes(), &mut out);
            out
        };
        log.append(&record("before"));
        log.file = Some(File::options().write(true).open("/dev/full").unwrap());
        log.append(&[record("lost"), record("gone")].concat());
        assert_eq!(log.lost, Lost { lines: 2, bytes: 10 });
        log.reopen().unwrap();
        log.append(&record("after"));
        let text = dir.read("");
        let lines: Vec<_> = text.lines().map(|l| &l[HEADER..]).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!([lines[0], lines[2]], ["before", "after"]);
        assert!(lines[1].starts_with("keel-shim: 2 lines (10 bytes) of output are missing here: No space"));
        log.append(&record("more"));
        assert_eq!(dir.read("").lines().count(), 4);
        assert_eq!(log.lost.lines, 2);
    }
}
