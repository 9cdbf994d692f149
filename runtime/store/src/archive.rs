//! Named files in a directory or a tar archive, for import: opened by name, in any order, as often as wanted.

use crate::fsio::{self, At, FsError, TEMPORARY};
use crate::path::LayerPath;
use crate::stream::{Budget, LayerStream};
use crate::tar::{Kind, TarError, TarReader};
use crate::{Store, space};
use keel_sys::file;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Entries of an image archive; an image of 500 layers has about 1500.
const MAX_ENTRIES: usize = 100_000;
/// Links followed from one name to its file (docker writes links for layers that images share).
const MAX_LINKS: usize = 8;
/// An archive this much longer than its compressed form is refused, whatever the disk could hold.
const MAX_ARCHIVE: u64 = 1 << 40;
const MAX_ARCHIVE_RATIO: u64 = 1100;
/// The disk is not filled to the last block by a spooled archive.
const SPACE_RESERVE: u64 = 64 << 20;
const SPACE_CHECK_BYTES: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("{} is not a readable archive", path.display())]
    Tar {
        path: PathBuf,
        #[source]
        source: TarError,
    },
    #[error("{} has more than {MAX_ENTRIES} entries", .0.display())]
    TooManyEntries(PathBuf),
}

pub(crate) enum Archive {
    Dir { path: PathBuf, root: File },
    Tar { path: PathBuf, file: Arc<File>, index: BTreeMap<Vec<u8>, Place>, _spool: Option<Spool> },
}

/// Where a name's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Data { offset: u64, size: u64 },
    Link(Vec<u8>),
}

/// One file of an archive, from its start.
pub(crate) struct Member {
    pub(crate) size: u64,
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Member {
    pub(crate) fn skip(&mut self, n: u64) {
        self.at = self.end.min(self.at + n);
    }
}

impl Read for Member {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = (self.end - self.at).min(out.len() as u64) as usize;
        // By position: members of one archive are read on several threads through one file.
        let n = self.file.read_at(&mut out[..n], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Archive {
    /// A directory, or a tar archive that may be compressed.
    pub(crate) fn open(store: &Store, path: &Path) -> Result<Archive, ArchiveError> {
        let opened = File::open(path).at("open", path)?;
        if opened.metadata().at("look at", path)?.is_dir() {
            return Ok(Archive::Dir { path: path.to_owned(), root: opened });
        }
        let mut magic = [0; 4];
        let n = opened.read_at(&mut magic, 0).at("read", path)?;
        let is_plain = !matches!(&magic[..n], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd]);
        if is_plain && opened.metadata().at("look at", path)?.is_file() {
            return Archive::index(path, opened, None);
        }
        Archive::spool(store, path, opened)
    }

    /// An archive that can be read once only: kept in a temporary file of the store while it is imported.
    pub(crate) fn spool(store: &Store, path: &Path, reader: impl Read) -> Result<Archive, ArchiveError> {
        let spool = Spool::new(store);
        let file = spool.fill(path, reader)?;
        Archive::index(path, file, Some(spool))
    }

    fn index(path: &Path, file: File, spool: Option<Spool>) -> Result<Archive, ArchiveError> {
        let fail = |source| ArchiveError::Tar { path: path.to_owned(), source };
        let mut index = BTreeMap::new();
        let mut tar = TarReader::new(BufReader::new(&file));
        while let Some(entry) = tar.next_entry().map_err(fail)? {
            if index.len() == MAX_ENTRIES {
                return Err(ArchiveError::TooManyEntries(path.to_owned()));
            }
            let Ok(Some(name)) = LayerPath::parse(&entry.path) else { continue };
            let place = match entry.kind {
                Kind::File if entry.sparse.is_none() => {
                    Place::Data { offset: tar.position(), size: entry.size }
                }
                Kind::HardLink => Place::Link(entry.link.clone()),
                Kind::Symlink => Place::Link(beside(name.parent().to_bytes(), &entry.link)),
                _ => continue,
            };
            index.insert(name.to_bytes(), place);
            tar.seek_past_data().map_err(fail)?;
        }
        Ok(Archive::Tar { path: path.to_owned(), file: Arc::new(file), index, _spool: spool })
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Archive::Dir { path, .. } | Archive::Tar { path, .. } => path,
        }
    }

    /// `None` when there is no file of this name. Links stay inside.
    pub(crate) fn member(&self, name: &str) -> Result<Option<Member>, FsError> {
        let Ok(Some(name)) = LayerPath::parse(name.as_bytes()) else { return Ok(None) };
        match self {
            Archive::Dir { path, root } => {
                let at = path.join(String::from_utf8_lossy(&name.to_bytes()).as_ref());
                let name = CString::new(name.to_bytes()).map_err(io::Error::from).at("open", &at)?;
                let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
                let resolve = file::RESOLVE_IN_ROOT | file::RESOLVE_NO_MAGICLINKS;
                let opened = match file::openat2(root, &name, flags, 0, resolve) {
                    Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                        return Ok(None);
                    }
                    other => File::from(other.at("open", &at)?),
                };
                let metadata = opened.metadata().at("look at", &at)?;
                if !metadata.is_file() {
                    return Ok(None);
                }
                let size = metadata.len();
                Ok(Some(Member { size, file: Arc::new(opened), at: 0, end: size }))
            }
            Archive::Tar { file, index, .. } => {
                let mut name = name.to_bytes();
                for _ in 0..MAX_LINKS {
                    match index.get(&name) {
                        None => return Ok(None),
                        Some(&Place::Data { offset, size }) => {
                            let file = Arc::clone(file);
                            return Ok(Some(Member { size, file, at: offset, end: offset + size }));
                        }
                        Some(Place::Link(target)) => match LayerPath::parse(target) {
                            Ok(Some(target)) => name = target.to_bytes(),
                            _ => return Ok(None),
                        },
                    }
                }
                Ok(None)
            }
        }
    }

    /// A small file whole.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, FsError> {
        let Some(member) = self.member(name)? else { return Ok(None) };
        let at = self.path().join(name);
        if member.size > limit {
            let too_long = io::Error::other(format!("longer than the limit of {limit} bytes"));
            return Err(too_long).at("read", &at);
        }
        let mut bytes = Vec::with_capacity(member.size as usize);
        member.take(limit).read_to_end(&mut bytes).at("read", &at)?;
        Ok(Some(bytes))
    }
}

/// A link's target as a name in the archive.
fn beside(parent: &[u8], target: &[u8]) -> Vec<u8> {
    if target.starts_with(b"/") { target.to_vec() } else { [parent, b"/", target].concat() }
}

/// A temporary file of the store that goes when it is dropped.
pub(crate) struct Spool {
    path: PathBuf,
}

impl Spool {
    pub(crate) fn new(store: &Store) -> Spool {
        Spool { path: store.inner.partial_dir().join(format!("{TEMPORARY}{}", fsio::unique())) }
    }

    fn fill(&self, from: &Path, reader: impl Read) -> Result<File, ArchiveError> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&self.path)
            .at("create", &self.path)?;
        let budget = Budget { max_bytes: MAX_ARCHIVE, max_ratio: MAX_ARCHIVE_RATIO, ratio_from: 1 << 30 };
        let mut stream = LayerStream::new(reader, false, budget).at("read", from)?;
        let (mut at, mut unchecked) = (0, 0);
        loop {
            let n = {
                let bytes = stream.fill_buf().at("read", from)?;
                file.write_all_at(bytes, at).at("write", &self.path)?;
                bytes.len()
            };
            if n == 0 {
                return Ok(file);
            }
            stream.consume(n);
            at += n as u64;
            unchecked += n as u64;
            if unchecked >= SPACE_CHECK_BYTES {
                unchecked = 0;
                space::require(&file, &self.path, SPACE_RESERVE, 1)?;
            }
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
