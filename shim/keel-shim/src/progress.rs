//! Output moves from a FIFO to the log without a moment in which it is in neither, and a successor can tell what of it
//! is in both.
//!
//! ```text
//! tee(FIFO)  ─> note: stream, log position ─> write to the log ─> take it from the FIFO ─> note: nothing under way
//! ```
//! Killed before the last step, the same bytes are in the FIFO and, as far as the write came, in the log behind the
//! noted position. The note is in shared memory of a file, so it costs no system call.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use keel_proto::{Stream, file};
use keel_sys::file::{pipe, set_pipe_size};
use keel_sys::monitor::{SharedCells, null_stream, splice, tee};

use crate::error::{Context, Error};
use crate::log::MARK;
use crate::pump::PIPE;
use crate::replay::parse;
use crate::rotation::numbered;

const STREAM: usize = 0;
const INODE: usize = 1;
const OFFSET: usize = 2;
/// Values of the stream cell.
const NONE: u64 = 0;
const STDOUT: u64 = 1;
const STDERR: u64 = 2;

/// Rotated files that one batch of output can have gone through; it would take absurdly small ones to pass more.
const FILES: u32 = 1000;

pub(crate) struct Progress {
    cells: SharedCells,
    /// Where output is looked at before it is taken.
    peek: OwnedFd,
    into_peek: OwnedFd,
}

impl Progress {
    pub(crate) fn open(dir: &Path) -> Result<Progress, Error> {
        let (peek, into_peek) = wide_pipe()?;
        Ok(Progress { cells: map(dir)?, peek, into_peek })
    }

    /// How much waits in the FIFO, where it stays. 0: end of file. It is read by [`Progress::next`], to the end.
    pub(crate) fn look(&self, fifo: &File) -> io::Result<usize> {
        tee(fifo.as_fd(), self.into_peek.as_fd(), PIPE)
    }

    /// The next part of the `left` bytes that were looked at.
    pub(crate) fn next(&self, buffer: &mut [u8], left: usize) -> usize {
        let most = left.min(buffer.len());
        // Nothing can fail: the bytes are there.
        keel_sys::file::read(&self.peek, &mut buffer[..most]).unwrap_or(0)
    }

    pub(crate) fn begin(&self, stream: Stream, (inode, offset): (u64, u64)) {
        self.cells[INODE].store(inode, Ordering::Relaxed);
        self.cells[OFFSET].store(offset, Ordering::Relaxed);
        let stream = if stream == Stream::Stdout { STDOUT } else { STDERR };
        self.cells[STREAM].store(stream, Ordering::Release);
    }

    /// Takes out of the FIFO what was looked at. The shim's own standard input serves as the place to throw it.
    pub(crate) fn take(&self, fifo: &File, mut len: usize) {
        while len > 0 {
            match splice(fifo.as_fd(), null_stream(), len) {
                Ok(0) | Err(_) => break,
                Ok(n) => len -= n,
            }
        }
        self.cells[STREAM].store(NONE, Ordering::Release);
    }
}

/// Holds as much as one look: a narrower one would show a part of a batch as if it were all.
fn wide_pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    let (peek, into_peek) = pipe().doing("create a pipe")?;
    let _ = set_pipe_size(&peek, PIPE);
    Ok((peek, into_peek))
}

fn map(dir: &Path) -> Result<SharedCells, Error> {
    let path = dir.join(file::PROGRESS);
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).open(&path).at("open", &path)?;
    SharedCells::map(&file).at("map", &path)
}

/// After a crash: takes out of the FIFOs what is in the log already.
pub(crate) fn resume(dir: &Path, log: &Path, stdout: &File, stderr: &File) -> Result<(), Error> {
    let cells = map(dir)?;
    let (stream, fifo) = match cells[STREAM].load(Ordering::Acquire) {
        STDOUT => (Stream::Stdout, stdout),
        STDERR => (Stream::Stderr, stderr),
        _ => return Ok(()),
    };
    let at = (cells[INODE].load(Ordering::Relaxed), cells[OFFSET].load(Ordering::Relaxed));
    let written = written_since(log, at, stream).at("read log", log)?;
    let (peek, into_peek) = wide_pipe()?;
    let mut waiting = vec![0; written.len()];
    let mut got = 0;
    if !written.is_empty()
        && let Ok(n) = tee(fifo.as_fd(), into_peek.as_fd(), written.len())
    {
        drop(into_peek);
        let mut peek = File::from(peek);
        while got < n {
            match peek.read(&mut waiting[got..n]) {
                Ok(0) | Err(_) => break,
                Ok(more) => got += more,
            }
        }
    }
    // Anything else at the head of the FIFO means that it was taken already.
    if got == written.len() && waiting == written {
        let mut fifo = fifo;
        fifo.read_exact(&mut waiting).doing("take logged output out of the FIFO")?;
    }
    cells[STREAM].store(NONE, Ordering::Release);
    Ok(())
}

/// The output of `stream` in the log from a position on, through the files that followed by rotation.
fn written_since(log: &Path, (inode, offset): (u64, u64), stream: Stream) -> io::Result<Vec<u8>> {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut found = false;
    for n in 0..FILES {
        let path = if n == 0 { log.to_owned() } else { numbered(log, n) };
        let Ok(meta) = fs::metadata(&path) else {
            // The current file may have been moved away by somebody.
            if n == 0 { continue } else { break }
        };
        files.push(path);
        if meta.ino() == inode {
            found = true;
            break;
        }
    }
    if !found {
        return Ok(Vec::new());
    }
    let mut written = Vec::new();
    for (i, path) in files.iter().rev().enumerate() {
        let file = File::open(path)?;
        let start = if i == 0 { offset } else { 0 };
        let size = file.metadata()?.len();
        let mut text = vec![0; usize::try_from(size.saturating_sub(start)).unwrap_or(0)];
        file.read_exact_at(&mut text, start)?;
        for record in text.split_inclusive(|b| *b == b'\n').filter(|r| r.ends_with(b"\n")) {
            match parse(record) {
                Some((Stream::Stderr, text)) if text.starts_with(MARK.as_bytes()) => {}
                Some((of, text)) if of == stream => written.extend_from_slice(text),
                _ => {}
            }
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::Formatter;
    use crate::log::{Limits, Log};
    use keel_sys::file::{c_path, cwd, mknodat};
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt;

    struct Rig {
        dir: PathBuf,
        writer: File,
        stdout: File,
        stderr: File,
    }

    impl Rig {
        fn new(name: &str) -> Rig {
            let dir = std::env::temp_dir().join(format!("keel-progress-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            let open = |name: &str| {
                let path = dir.join(name);
                if !path.exists() {
                    mknodat(cwd(), &c_path(&path).unwrap(), 0o010_600, 0, 0).unwrap();
                }
                File::options().read(true).write(true).custom_flags(0o4000).open(path).unwrap()
            };
            let (writer, stdout, stderr) = (open("stdout"), open("stdout"), open("stderr"));
            Rig { dir, writer, stdout, stderr }
        }

        fn log_path(&self) -> PathBuf {
            self.dir.join("0.log")
        }

        fn open(&self) -> (Progress, Log) {
            let limits = Limits { bytes: 1000, files: 100, age: None, total: None, compress: false };
            let log = Log::open(&self.log_path(), false, limits);
            (Progress::open(&self.dir).unwrap(), log)
        }

        /// One batch, killed after `written` of its records and before (or after) it was taken from the FIFO.
        fn batch_then_crash(&mut self, output: &[u8], written: usize, taken: bool) {
            let (progress, mut log) = self.open();
            self.writer.write_all(output).unwrap();
            let mut buffer = vec![0; 65536];
            let waiting = progress.look(&self.stdout).unwrap();
            let got = progress.next(&mut buffer, waiting);
            assert_eq!(&buffer[..got], output);
            progress.begin(Stream::Stdout, log.position());
            let mut records = vec![0; 1 << 20];
            let (_, len) = Formatter::new(Stream::Stdout, false).format(output, &mut records);
            for record in records[..len].split_inclusive(|b| *b == b'\n').take(written) {
                log.append(record);
            }
            if taken {
                let mut stdout = &self.stdout;
                stdout.read_exact(&mut buffer[..got]).unwrap();
            }
        }

        /// What the successor finds in the FIFO.
        fn resume(&mut self) -> String {
            resume(&self.dir, &self.log_path(), &self.stdout, &self.stderr).unwrap();
            let mut left = Vec::new();
            let _ = (&self.stdout).read_to_end(&mut left);
            String::from_utf8(left).unwrap()
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }

    #[test]
    fn a_successor_goes_on_exactly_where_the_log_ends() {
        let mut rig = Rig::new("exact");
        let output: String = (0..60).map(|n| format!("line {n}\n")).collect();
        // 1000 bytes hold about twenty records, so the batch goes through three files.
        for written in [0, 1, 20, 21, 45, 59, 60] {
            rig.batch_then_crash(output.as_bytes(), written, false);
            let expected: String = (written..60).map(|n| format!("line {n}\n")).collect();
            assert_eq!(rig.resume(), expected, "{written}");
        }
        rig.batch_then_crash(output.as_bytes(), 60, true);
        rig.writer.write_all(b"next\n").unwrap();
        assert_eq!(rig.resume(), "next\n");
        rig.writer.write_all(b"clean\n").unwrap();
        assert_eq!(rig.resume(), "clean\n");
    }

    #[test]
    fn the_beginning_of_a_line_counts_without_a_newline() {
        let mut rig = Rig::new("partial");
        rig.batch_then_crash(b"a\npart", 2, false);
        rig.writer.write_all(b" and rest\n").unwrap();
        assert_eq!(rig.resume(), " and rest\n");
    }
}
