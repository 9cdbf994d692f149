//! One complete look at a directory.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::names::{is_ignored, is_manifest_name};

/// Directories inside directories. More is a loop of symlinks or a mistake; it is reported.
const MAX_DEPTH: usize = 16;
/// Names read in one directory walk, also of files that do not count. More is not a manifest directory.
const MAX_ENTRIES: usize = 100_000;
/// Bytes of all files together: what the process is willing to hold.
const MAX_TOTAL_BYTES: u64 = 256 << 20;
/// A file changed so shortly before it was read may change again without a new time stamp.
const RACY: Duration = Duration::from_secs(2);

/// How a directory is read and watched.
#[derive(Clone, Debug)]
pub struct Options {
    /// Follow symlinks that lead out of the directory.
    pub follow_outside: bool,
    /// Larger files are reported and not read.
    pub max_file_bytes: u64,
    /// Quiet time after the last event before the directory is read.
    pub settle: Duration,
    /// The same after nothing but renames of whole files into place: those are complete, and only their neighbours of the
    /// same batch are waited for. The second look follows at once.
    pub settle_placed: Duration,
    /// Time between two looks at a changed directory that must agree.
    pub confirm: Duration,
    /// Time between looks without any event.
    pub relist: Duration,
    /// The same when the kernel gives no events.
    pub poll: Duration,
    /// How long one file that keeps changing delays the others.
    pub hold: Duration,
    /// How long a file that a writer keeps open is not read.
    pub hold_open: Duration,
    /// An empty directory means "nothing", also when there was something before.
    pub allow_empty: bool,
    /// There was something before this process started: an empty directory is suspicious from the beginning.
    pub had_files: bool,
    /// Never ask the kernel for events.
    pub force_polling: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            follow_outside: false,
            max_file_bytes: 1 << 20,
            settle: Duration::from_millis(250),
            settle_placed: Duration::from_millis(4),
            confirm: Duration::from_millis(100),
            relist: Duration::from_secs(20),
            poll: Duration::from_secs(2),
            hold: Duration::from_secs(10),
            hold_open: Duration::from_secs(60),
            allow_empty: false,
            had_files: false,
            force_polling: false,
        }
    }
}

/// All manifest files of a directory at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By path relative to the directory, with "/". When the condition is not `Ok`, what was read last.
    pub files: BTreeMap<String, FileState>,
    pub condition: Condition,
}

/// One file.
#[derive(Clone, PartialEq, Eq)]
pub enum FileState {
    Text(Arc<[u8]>),
    /// Why it could not be read, one line.
    Unreadable(String),
    /// Larger than `Options::max_file_bytes`.
    TooLarge,
}

/// Whether the directory could be read. Anything but `Ok` means "unknown": delete nothing because of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "camelCase")]
pub enum Condition {
    #[default]
    Ok,
    Missing,
    Unreadable(String),
    /// There were manifests, and now there is none: deleted, or not mounted?
    SuddenlyEmpty,
}

/// Why there is no listing.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("{} does not exist", path.display())]
    Missing { path: PathBuf },
    #[error("cannot {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is neither a directory nor a file", path.display())]
    WrongKind { path: PathBuf },
    #[error("{} has more than {MAX_ENTRIES} entries", path.display())]
    TooManyEntries { path: PathBuf },
    #[error("the manifests in {} are larger than {} MiB together", path.display(), MAX_TOTAL_BYTES >> 20)]
    TooManyBytes { path: PathBuf },
    #[error("{} is nested deeper than {MAX_DEPTH} directories", path.display())]
    TooDeep { path: PathBuf },
}

/// Reads every manifest below a directory once, or one file. The condition is always `Ok`: what cannot be read as a
/// whole is an error.
pub fn list(path: &Path, options: &Options) -> Result<Snapshot, ListError> {
    let scan = scan(path, options, &Scan::default())?;
    Ok(Snapshot { files: scan.states(), condition: Condition::Ok })
}

/// A listing with what is needed to tell whether a file changed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scan {
    pub(crate) files: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) state: FileState,
    pub(crate) stamp: Stamp,
    /// The path that was read, symlinks resolved.
    pub(crate) real: PathBuf,
    /// Read so soon after its last change that the stamp proves nothing.
    racy: bool,
}

/// Two equal stamps of one file mean equal contents, unless it is racy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    pub(crate) size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Scan {
    pub(crate) fn states(&self) -> BTreeMap<String, FileState> {
        self.files.iter().map(|(name, entry)| (name.clone(), entry.state.clone())).collect()
    }

    /// Nothing moved between two looks.
    pub(crate) fn agrees(&self, other: &Scan) -> bool {
        self.files.len() == other.files.len()
            && self
                .files
                .iter()
                .zip(&other.files)
                .all(|((name, a), (other_name, b))| name == other_name && a.same(b))
    }
}

impl Entry {
    pub(crate) fn same(&self, other: &Entry) -> bool {
        self.stamp == other.stamp && self.state == other.state
    }
}

impl Stamp {
    fn of(meta: &Metadata) -> Stamp {
        Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Changed within the last moments, or in the future.
    pub(crate) fn is_fresh(&self) -> bool {
        let since = |(seconds, nanos): (i64, i64)| {
            let time = UNIX_EPOCH.checked_add(Duration::new(
                u64::try_from(seconds).unwrap_or(0),
                u32::try_from(nanos).unwrap_or(0),
            ));
            time.and_then(|t| SystemTime::now().duration_since(t).ok())
        };
        [self.modified, self.changed].into_iter().any(|t| since(t).is_none_or(|age| age < RACY))
    }
}

/// Reads a directory (or one file), taking over from `before` what did not change.
pub(crate) fn scan(path: &Path, options: &Options, before: &Scan) -> Result<Scan, ListError> {
    let root = match fs::canonicalize(path) {
        Ok(root) => root,
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(ListError::Missing { path: path.to_owned() });
        }
        Err(source) => return Err(ListError::Io { operation: "resolve", path: path.to_owned(), source }),
    };
    let meta = fs::metadata(&root).map_err(|source| io_error("stat", &root, source))?;
    let mut walk = Walk { root: root.clone(), options, before, found: Scan::default(), entries: 0, bytes: 0 };
    if meta.is_dir() {
        walk.directory(&root, "", &mut Vec::new())?;
    } else if meta.is_file() {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        walk.file(&root, name)?;
    } else {
        return Err(ListError::WrongKind { path: path.to_owned() });
    }
    Ok(walk.found)
}

struct Walk<'a> {
    root: PathBuf,
    options: &'a Options,
    before: &'a Scan,
    found: Scan,
    entries: usize,
    bytes: u64,
}

impl Walk<'_> {
    /// `above`: the directories that are being walked, to notice loops.
    fn directory(&mut self, dir: &Path, prefix: &str, above: &mut Vec<(u64, u64)>) -> Result<(), ListError> {
        let meta = match fs::metadata(dir) {
            Ok(meta) => meta,
            // It went away under the walk: the next look tells.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !above.is_empty() => return Ok(()),
            Err(source) => return Err(io_error("stat", dir, source)),
        };
        let identity = (meta.dev(), meta.ino());
        if above.contains(&identity) {
            return Ok(());
        }
        if above.len() >= MAX_DEPTH {
            return Err(ListError::TooDeep { path: dir.to_owned() });
        }
        above.push(identity);
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound && above.len() > 1 => {
                above.pop();
                return Ok(());
            }
            Err(source) => return Err(io_error("read directory", dir, source)),
        };
        for entry in entries {
            let entry = entry.map_err(|source| io_error("read directory", dir, source))?;
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(ListError::TooManyEntries { path: self.root.clone() });
            }
            self.entry(&entry, prefix, above)?;
        }
        above.pop();
        Ok(())
    }

    fn entry(
        &mut self,
        entry: &fs::DirEntry,
        prefix: &str,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<(), ListError> {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if is_ignored(&name) {
            return Ok(());
        }
        let path = entry.path();
        let relative = format!("{prefix}{name}");
        let kind = match entry.file_type() {
            Ok(kind) => kind,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(io_error("stat", &path, source)),
        };
        if kind.is_dir() {
            return self.directory(&path, &format!("{relative}/"), above);
        }
        if !kind.is_symlink() {
            return if is_manifest_name(&name) { self.file(&path, relative) } else { Ok(()) };
        }
        let real = match fs::canonicalize(&path) {
            Ok(real) => real,
            Err(error) => {
                if is_manifest_name(&name) {
                    self.unreadable(relative, &path, format!("the symlink leads nowhere: {}", words(&error)));
                }
                return Ok(());
            }
        };
        let is_dir = real.is_dir();
        if !is_dir && !is_manifest_name(&name) {
            return Ok(());
        }
        if !self.options.follow_outside && !real.starts_with(&self.root) {
            let message =
                format!("the symlink leads to {}, outside of {}", real.display(), self.root.display());
            self.unreadable(relative, &path, message);
            return Ok(());
        }
        if is_dir {
            self.directory(&real, &format!("{relative}/"), above)
        } else {
            self.file(&real, relative)
        }
    }

    fn file(&mut self, path: &Path, relative: String) -> Result<(), ListError> {
        // Not blocking: a FIFO without a writer would hold the whole listing.
        let mut how = OpenOptions::new();
        how.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let before = self.before.files.get(&relative);
        if let Some(before) = before.filter(|b| !b.racy && b.real == path)
            && let Ok(meta) = fs::metadata(path)
            && Stamp::of(&meta) == before.stamp
        {
            let entry = before.clone();
            return self.keep(relative, entry);
        }
        match how.open(path).and_then(|file| Ok((file.metadata()?, file))) {
            Ok((meta, file)) => {
                let stamp = Stamp::of(&meta);
                let state = self.read(&meta, file);
                let entry = Entry { state, stamp, real: path.to_owned(), racy: stamp.is_fresh() };
                self.keep(relative, entry)
            }
            // It went away under the walk: the next look tells.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                self.unreadable(relative, path, format!("cannot open: {}", words(&error)));
                Ok(())
            }
        }
    }

    fn read(&self, meta: &Metadata, mut file: File) -> FileState {
        if !meta.is_file() {
            return FileState::Unreadable("is not a regular file".into());
        }
        if meta.len() > self.options.max_file_bytes {
            return FileState::TooLarge;
        }
        let mut text = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
        match file.by_ref().take(self.options.max_file_bytes + 1).read_to_end(&mut text) {
            Ok(_) if text.len() as u64 > self.options.max_file_bytes => FileState::TooLarge,
            Ok(_) => FileState::Text(text.into()),
            Err(error) => FileState::Unreadable(format!("cannot read: {}", words(&error))),
        }
    }

    fn keep(&mut self, relative: String, entry: Entry) -> Result<(), ListError> {
        if let FileState::Text(text) = &entry.state {
            self.bytes += text.len() as u64;
        }
        if self.bytes > MAX_TOTAL_BYTES {
            return Err(ListError::TooManyBytes { path: self.root.clone() });
        }
        self.found.files.insert(relative, entry);
        Ok(())
    }

    fn unreadable(&mut self, relative: String, path: &Path, message: String) {
        let state = FileState::Unreadable(message);
        let entry = Entry { state, stamp: Stamp::default(), real: path.to_owned(), racy: true };
        self.found.files.insert(relative, entry);
    }
}

/// The system's words without the number that Rust appends.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(reason, _)| reason).to_lowercase()
}

fn io_error(operation: &'static str, path: &Path, source: io::Error) -> ListError {
    ListError::Io { operation, path: path.to_owned(), source }
}

/// Sizes, not contents: they may be secret.
impl std::fmt::Debug for FileState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FileState::Text(text) => write!(f, "Text({} bytes)", text.len()),
            FileState::Unreadable(reason) => write!(f, "Unreadable({reason})"),
            FileState::TooLarge => f.write_str("TooLarge"),
        }
    }
}
