//! Rotated files are compressed by a short-lived process of the same program, so that neither the container nor its
//! monitor waits, and an idle monitor has no memory for it.
//!
//! The child only reads its standard input and writes its standard output. The one that renames is the monitor, because
//! files may move on meanwhile.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::UNIX_EPOCH;

use flate2::{Compression, GzBuilder};
use keel_sys::monitor::Status;
use keel_sys::process::{SchedAttr, ioprio_set, kill, reset_signals, sched_setattr};

use crate::error::{Context, Error};
use crate::log::MODE;
use crate::rotation;
use crate::setup::SELF;

/// How this program is called for it.
pub(crate) const VERB: &str = "compress";
/// Name of the field in the header of a compressed file: inode number and time of birth of the original, by which a
/// reader that has it open knows where it is now.
const ORIGINAL: [u8; 2] = *b"KL";
/// Containers come first. Not as far behind as it goes: on a host that is always busy, nothing would ever be compressed.
const NICE: i32 = 10;
const IOPRIO_CLASS_IDLE: u32 = 3;
const SIGKILL: i32 = 9;

/// Inode number and nanoseconds of birth; 0 where the file system does not know the latter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    fn of(found: &fs::Metadata) -> Identity {
        let born = found.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        Identity(found.ino(), born.map_or(0, |at| u64::try_from(at.as_nanos()).unwrap_or(0)))
    }

    /// As RFC 1952 has extra fields.
    fn extra(self) -> Vec<u8> {
        let mut field = ORIGINAL.to_vec();
        field.extend_from_slice(&16_u16.to_le_bytes());
        field.extend_from_slice(&self.0.to_le_bytes());
        field.extend_from_slice(&self.1.to_le_bytes());
        field
    }
}

/// A file that is being compressed.
pub(crate) struct Packing {
    child: i32,
    source: Identity,
}

impl Packing {
    /// `None`: every file is compressed already.
    pub(crate) fn start(log: &Path) -> io::Result<Option<Packing>> {
        let Some(path) = rotation::first_plain(log) else { return Ok(None) };
        let file = File::open(path)?;
        let source = Identity::of(&file.metadata()?);
        let packing = rotation::packing(log);
        // A child that is still at work for a monitor that was killed keeps the file that had the name before.
        let _ = fs::remove_file(&packing);
        let out = File::options().write(true).create_new(true).mode(MODE).open(&packing)?;
        let mut command = Command::new(SELF);
        command.arg(VERB).env_clear().stdin(file).stdout(out).stderr(Stdio::null());
        // Reaped with all other children.
        let child = command.spawn()?;
        Ok(Some(Packing { child: i32::try_from(child.id()).unwrap_or(0), source }))
    }

    pub(crate) fn is(&self, pid: i32) -> bool {
        self.child == pid
    }

    pub(crate) fn finish(&self, log: &Path, status: Option<Status>) -> io::Result<()> {
        if status != Some(Status::Exited(0)) {
            // No room, most likely. The next rotation tries again.
            return fs::remove_file(rotation::packing(log));
        }
        rotation::packed(log, |found| Identity::of(found) == self.source)
    }

    /// Nobody waits for it any more.
    pub(crate) fn cancel(&self, log: &Path) {
        let _ = kill(self.child, SIGKILL);
        let _ = fs::remove_file(rotation::packing(log));
    }
}

/// The child: standard input to standard output.
pub(crate) fn run() -> Result<ExitCode, Error> {
    reset_signals();
    let _ = sched_setattr(&SchedAttr { nice: NICE, ..SchedAttr::default() });
    let _ = ioprio_set(IOPRIO_CLASS_IDLE, 0);
    let file = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    let mut input = file(io::stdin().as_fd()).doing("take the file to compress")?;
    let output = file(io::stdout().as_fd()).doing("take the compressed file")?;
    let found = input.metadata().doing("look at the file to compress")?;
    let builder = GzBuilder::new().extra(Identity::of(&found).extra());
    let builder = builder.mtime(u32::try_from(found.mtime()).unwrap_or(0));
    let mut encoder = builder.write(BufWriter::new(&output), Compression::default());
    io::copy(&mut input, &mut encoder).doing("compress")?;
    let done = encoder.finish().and_then(|buffer| buffer.into_inner().map_err(io::Error::from));
    done.and_then(|_| output.sync_data()).doing("write the compressed file")?;
    Ok(ExitCode::SUCCESS)
}
