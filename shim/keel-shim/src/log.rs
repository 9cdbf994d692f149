//! The log file: bounded by rotation, never truncated, and honest about what it could not take.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use keel_proto::Stream;
use keel_sys::monitor::{Reaped, Status, splice};

use crate::args::LogOptions;
use crate::compress::Packing;
use crate::cri::{Formatter, HEADER};
use crate::error::{Context, Error};
use crate::replay::parse;
use crate::rotation;

/// Logs may hold secrets: the owner writes, the group reads.
pub(crate) const MODE: u32 = 0o640;

/// How a record begins that the monitor itself wrote, on the stderr stream.
pub(crate) const MARK: &str = "keel-shim: ";

/// In place of how much was written: none of what was to be.
const NO_RECORD: usize = usize::MAX;

pub(crate) struct Log {
    path: PathBuf,
    /// Holds the output as it came, without headers.
    pub(crate) raw: bool,
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
    /// Rotated files wait for compression.
    to_pack: bool,
    packing: Option<Packing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Of one file.
    pub(crate) bytes: u64,
    /// The current one counted.
    pub(crate) files: u32,
    /// Looked at when output comes: an idle log wakes nobody to be rotated.
    pub(crate) age: Option<Duration>,
    /// Of all files together, the oldest of which go for it.
    pub(crate) total: Option<u64>,
    /// Rotated files are compressed.
    pub(crate) compress: bool,
}

impl Limits {
    pub(crate) fn of(options: &LogOptions) -> Limits {
        Limits {
            bytes: options.max_bytes,
            files: options.max_files,
            age: options.max_age.map(Duration::from_secs),
            total: options.max_total,
            compress: options.compress,
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
    pub(crate) fn open(path: &Path, raw: bool, limits: Limits) -> Log {
        let mut log = Log {
            path: path.to_owned(),
            raw,
            file: None,
            inode: 0,
            size: 0,
            born: SystemTime::now(),
            limits,
            budget: u64::MAX,
            lost: Lost::default(),
            untold: Lost::default(),
            reason: None,
            // A monitor before this one may have left some.
            to_pack: limits.compress,
            packing: None,
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
        let beyond = self.measure(beyond);
        self.lost.add(beyond);
        if records.is_empty() {
            return;
        }
        if let Err((unwritten, e)) = self.tell_loss().and_then(|()| self.write(records)) {
            self.count(records.get(unwritten..).unwrap_or(records), e);
        }
    }

    /// Moves what was looked at in `pipe` to the end of a raw log, without a copy of ours in between. Answers how much the
    /// disk refused, which is still in the pipe.
    pub(crate) fn take(&mut self, pipe: &File, looked_at: &[u8]) -> usize {
        let mut done = 0;
        let result = self.tell_loss().and_then(|()| {
            while done < looked_at.len() {
                let len = self.prepare(&looked_at[done..]).map_err(|e| (done, e))?;
                done += self.move_in(pipe, len).map_err(|e| (done, e))?;
            }
            Ok(())
        });
        let Err((moved, e)) = result else { return 0 };
        let refused = looked_at.get(moved..).unwrap_or(looked_at);
        self.count(refused, e);
        refused.len()
    }

    /// The same with what nobody wants to look at. `None`: that has to be done after all.
    pub(crate) fn take_unseen(&mut self, pipe: &File, most: usize) -> Option<io::Result<usize>> {
        let roomy = self.limits.bytes.saturating_sub(self.size) >= most as u64;
        if !roomy || self.is_old() || self.untold != Lost::default() || self.file.is_none() {
            return None;
        }
        match self.move_in(pipe, most) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => None,
            moved => Some(moved),
        }
    }

    fn move_in(&mut self, pipe: &File, len: usize) -> io::Result<usize> {
        if self.file.is_none() {
            self.open_end()?;
        }
        let Some(file) = &self.file else { return Err(io::ErrorKind::NotFound.into()) };
        let moved = splice(pipe.as_fd(), file.as_fd(), len)?;
        self.size += moved as u64;
        Ok(moved)
    }

    /// Opens the file by name again, after somebody moved it away.
    pub(crate) fn reopen(&mut self) -> Result<(), Error> {
        self.open_end().at("open log", &self.path)
    }

    /// Begins a new file whatever the size of the current one.
    pub(crate) fn rotate_now(&mut self) -> Result<(), Error> {
        self.rotate().at("rotate log", &self.path)
    }

    /// Has the next rotated file compressed, if one waits and none is at it. Between batches of output only: what is in
    /// which file must not change within one.
    pub(crate) fn compress_some(&mut self) {
        if self.to_pack && self.packing.is_none() {
            // Failed for want of room, or memory: the next rotation tries again.
            self.packing = Packing::start(&self.path).ok().flatten();
            self.to_pack = self.packing.is_some();
        }
    }

    /// Whether it was our child that ended.
    pub(crate) fn reaped(&mut self, reaped: &Reaped) -> bool {
        let Some(packing) = self.packing.take_if(|packing| packing.is(reaped.pid)) else { return false };
        let status = Status::decode(reaped.status);
        let done = packing.finish(&self.path, status);
        self.to_pack = done.is_ok() && status == Some(Status::Exited(0));
        self.compress_some();
        true
    }

    fn open_end(&mut self) -> io::Result<()> {
        let mut options = File::options();
        // The kernel moves pages into no file that was opened for appending.
        options.write(true).append(!self.raw).create(true).truncate(false);
        let mut file = options.mode(MODE).open(&self.path)?;
        let meta = file.metadata()?;
        (self.inode, self.size) = (meta.ino(), meta.len());
        if self.raw {
            self.size = file.seek(io::SeekFrom::End(0))?;
        }
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

    /// The end: what is being compressed stays as it is, because nobody is there to rename it.
    pub(crate) fn settle(&mut self) {
        if let Some(packing) = self.packing.take() {
            packing.cancel(&self.path);
        }
        self.sync();
    }

    /// The length of the whole records that may still be written.
    fn within_budget(&self, records: &[u8]) -> usize {
        match usize::try_from(self.budget).ok().and_then(|budget| records.get(..budget)) {
            None => records.len(),
            Some(head) => memchr::memrchr(b'\n', head).map_or(0, |at| at + 1),
        }
    }

    fn count(&mut self, records: &[u8], reason: io::Error) {
        let lost = self.measure(records);
        self.lost.add(lost);
        self.untold.add(lost);
        self.reason = Some(reason);
    }

    fn measure(&self, records: &[u8]) -> Lost {
        if !self.raw {
            return measure(records);
        }
        Lost { lines: memchr::memchr_iter(b'\n', records).count() as u64, bytes: records.len() as u64 }
    }

    fn tell_loss(&mut self) -> Result<(), (usize, io::Error)> {
        if self.untold == Lost::default() {
            return Ok(());
        }
        let reason = self.reason.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
        let text = self.untold.tell(&reason);
        let out = if self.raw {
            // Nobody knows whether what came before ended its line.
            format!("\n{text}").into_bytes()
        } else {
            record(&text)
        };
        self.write(&out).map_err(|(_, e)| (NO_RECORD, e))?;
        self.untold = Lost::default();
        self.reason = None;
        Ok(())
    }

    /// On error, how many bytes are in the log: a whole number of records.
    fn write(&mut self, records: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        while done < records.len() {
            let rest = &records[done..];
            let len = self.prepare(rest).map_err(|e| (done, e))?;
            self.write_part(&rest[..len]).map_err(|(n, e)| (done + n, e))?;
            done += len;
        }
        Ok(())
    }

    /// How much of `records` goes into the current file, which is a new one if that is due.
    fn prepare(&mut self, records: &[u8]) -> io::Result<usize> {
        if self.is_old() {
            self.rotate()?;
        }
        let room = usize::try_from(self.limits.bytes.saturating_sub(self.size)).unwrap_or(usize::MAX);
        let Some(head) = records.get(..room) else { return Ok(records.len()) };
        if let Some(at) = memchr::memrchr(b'\n', head) {
            return Ok(at + 1);
        }
        if self.size > 0 {
            self.rotate()?;
            return self.prepare(records);
        }
        // A record that is larger than a whole file gets a file of its own; a raw log has only pieces of it.
        Ok(memchr::memchr(b'\n', records).map_or(records.len(), |at| at + 1))
    }

    fn is_old(&self) -> bool {
        let old = |age| self.born.elapsed().is_ok_and(|now| now >= age);
        self.size > 0 && self.limits.age.is_some_and(old)
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
                    let newline = memchr::memrchr(b'\n', &part[..done]).map_or(0, |at| at + 1);
                    let whole = if self.raw { done } else { newline };
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
        let next = rotation::next(&self.path);
        let file =
            options.write(true).append(!self.raw).create(true).truncate(false).mode(MODE).open(&next)?;
        rotation::shift(&self.path, self.limits.files)?;
        if let Some(total) = self.limits.total {
            // As if the current one were full, which it will be.
            rotation::keep_within(&self.path, total.saturating_sub(self.limits.bytes))?;
        }
        self.inode = file.metadata()?.ino();
        self.born = SystemTime::now();
        self.file = Some(file);
        self.size = 0;
        self.to_pack = self.limits.compress;
        Ok(())
    }
}

impl Lost {
    pub(crate) fn add(&mut self, more: Lost) {
        self.lines += more.lines;
        self.bytes += more.bytes;
    }

    /// The line in its place.
    pub(crate) fn tell(self, reason: &str) -> String {
        format!("{MARK}{} lines ({} bytes) of output are missing here{reason}\n", self.lines, self.bytes)
    }
}

/// A line of the monitor itself.
pub(crate) fn record(line: &str) -> Vec<u8> {
    let mut out = vec![0; HEADER + line.len()];
    let mut formatter = Formatter::new(Stream::Stderr, false);
    formatter.set_time(SystemTime::now());
    formatter.format(line.as_bytes(), &mut out);
    out
}

/// The output in records.
pub(crate) fn measure(records: &[u8]) -> Lost {
    let mut lost = Lost::default();
    for record in records.split_inclusive(|b| *b == b'\n') {
        if let Some((_, text)) = parse(record) {
            lost.lines += u64::from(text.ends_with(b"\n"));
            lost.bytes += text.len() as u64;
        }
    }
    lost
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
    use crate::rotation::numbered;
    use std::fs;

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
            Log::open(&self.log(), false, limits(max_bytes, max_files))
        }

        fn read(&self, suffix: &str) -> String {
            let path =
                if suffix.is_empty() { self.log() } else { numbered(&self.log(), suffix.parse().unwrap()) };
            fs::read_to_string(path).unwrap_or_else(|_| "absent".into())
        }
    }

    fn limits(bytes: u64, files: u32) -> Limits {
        Limits { bytes, files, age: None, total: None, compress: false }
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
        let limits = Limits { age: Some(Duration::from_secs(60)), ..limits(1000, 3) };
        let mut log = Log::open(&dir.log(), false, limits);
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
            rotation::finish(&dir.log(), 5);
            let texts = ["", "1", "2", "3", "4"].map(|n| dir.read(n));
            let texts: Vec<_> = texts.iter().map(String::as_str).filter(|t| !t.is_empty()).collect();
            assert_eq!(texts[..3], ["ccc\n", "bbb\n", "aaa\n"], "{step}");
            assert!(!dir.0.join("0.log.new").exists());
            for (n, text) in texts[..3].iter().enumerate() {
                fs::write(&all[n], text).unwrap();
            }
            for n in [3, 4] {
                let _ = fs::remove_file(numbered(&dir.log(), n));
            }
        };
        check("before anything moved");
        fs::rename(&all[2], numbered(&dir.log(), 3)).unwrap();
        check("oldest moved");
        fs::rename(&all[2], numbered(&dir.log(), 3)).unwrap();
        fs::rename(&all[1], &all[2]).unwrap();
        check("all backups moved");
        fs::rename(&all[2], numbered(&dir.log(), 3)).unwrap();
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
