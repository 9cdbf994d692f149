//! Writing tar archives: ustar headers, PAX records where ustar is too small. The same input gives the same bytes.

use crate::tar::{Entry, Kind};
use std::io::{self, Write};

const BLOCK: usize = 512;
/// Eleven octal digits.
const MAX_OCTAL_SIZE: u64 = 0o77_777_777_777;
/// Seven octal digits.
const MAX_OCTAL_ID: u64 = 0o7_777_777;

/// Writes the header of an entry; its `size` bytes of data and [`pad`] must follow.
pub(crate) fn header(out: &mut impl Write, entry: &Entry) -> io::Result<()> {
    let records = pax_records(entry);
    if !records.is_empty() {
        let size = records.len() as u64;
        out.write_all(&block(b'x', b"pax", b"", size, &Entry::plain(b"pax".to_vec(), Kind::File, 0o644)))?;
        out.write_all(&records)?;
        pad(out, size)?;
    }
    let kind = match entry.kind {
        Kind::File => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::Char => b'3',
        Kind::Block => b'4',
        Kind::Dir => b'5',
        Kind::Fifo => b'6',
    };
    out.write_all(&block(kind, &entry.path, &entry.link, entry.size, entry))
}

/// Fills the last block of `size` bytes of data.
pub(crate) fn pad(out: &mut impl Write, size: u64) -> io::Result<()> {
    let fill = (size.wrapping_neg() % BLOCK as u64) as usize;
    out.write_all(&[0; BLOCK][..fill])
}

/// The end mark.
pub(crate) fn end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

/// A small file whole.
pub(crate) fn file(out: &mut impl Write, path: &str, bytes: &[u8]) -> io::Result<()> {
    let mut entry = Entry::plain(path.as_bytes().to_vec(), Kind::File, 0o644);
    entry.size = bytes.len() as u64;
    header(out, &entry)?;
    out.write_all(bytes)?;
    pad(out, entry.size)
}

impl Entry {
    /// Root's, from 1970, empty.
    pub(crate) fn plain(path: Vec<u8>, kind: Kind, mode: u32) -> Entry {
        Entry {
            path,
            kind,
            link: Vec::new(),
            mode,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: 0,
            sparse: None,
            xattrs: Vec::new(),
            device: (0, 0),
        }
    }
}

fn pax_records(entry: &Entry) -> Vec<u8> {
    let mut records = Vec::new();
    let mut add = |key: &[u8], value: &[u8]| {
        // The length counts its own digits.
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        records.extend_from_slice(format!("{len} ").as_bytes());
        records.extend_from_slice(key);
        records.push(b'=');
        records.extend_from_slice(value);
        records.push(b'\n');
    };
    if entry.path.len() > 100 {
        add(b"path", &entry.path);
    }
    if entry.link.len() > 100 {
        add(b"linkpath", &entry.link);
    }
    if entry.size > MAX_OCTAL_SIZE {
        add(b"size", entry.size.to_string().as_bytes());
    }
    for (key, id) in [(&b"uid"[..], entry.uid), (b"gid", entry.gid)] {
        if id > MAX_OCTAL_ID {
            add(key, id.to_string().as_bytes());
        }
    }
    let (seconds, nanos) = entry.mtime;
    if seconds < 0 || nanos != 0 || seconds as u64 > MAX_OCTAL_SIZE {
        let text = match (seconds, nanos) {
            (_, 0) => seconds.to_string(),
            (0.., _) => format!("{seconds}.{nanos:09}"),
            (-1, _) => format!("-0.{:09}", 1_000_000_000 - nanos),
            _ => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanos),
        };
        add(b"mtime", text.as_bytes());
    }
    for (name, value) in &entry.xattrs {
        add(&[b"SCHILY.xattr.", &name[..]].concat(), value);
    }
    records
}

fn block(kind: u8, path: &[u8], link: &[u8], size: u64, entry: &Entry) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |start: usize, bytes: &[u8], len: usize| {
        let n = bytes.len().min(len);
        block[start..start + n].copy_from_slice(&bytes[..n]);
    };
    let octal = |value: u64, digits: usize| format!("{value:0digits$o}").into_bytes();
    let id = |id: u64| octal(if id > MAX_OCTAL_ID { 0 } else { id }, 7);
    let seconds = u64::try_from(entry.mtime.0).ok().filter(|s| *s <= MAX_OCTAL_SIZE).unwrap_or(0);
    put(0, path, 100);
    put(100, &octal(u64::from(entry.mode), 7), 8);
    put(108, &id(entry.uid), 8);
    put(116, &id(entry.gid), 8);
    put(124, &octal(if size > MAX_OCTAL_SIZE { 0 } else { size }, 11), 12);
    put(136, &octal(seconds, 11), 12);
    put(156, &[kind], 1);
    put(157, link, 100);
    put(257, b"ustar\x0000", 8);
    if matches!(entry.kind, Kind::Char | Kind::Block) {
        put(329, &octal(entry.device.0, 7), 8);
        put(337, &octal(entry.device.1, 7), 8);
    }
    put(148, b"        ", 8);
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}
