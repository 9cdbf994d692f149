//! Reading tar archives: ustar, GNU and PAX, one header at a time from a stream.
//!
//! The rules are those that two decades of unpackers paid for: a PAX size replaces the header's always and applies
//! to the next file only (not to the long-name headers in between), malformed PAX is an error and never skipped,
//! metadata and sparse maps are bounded before they are read.

use std::io::{self, BufRead};

const BLOCK: usize = 512;
/// All extension headers of one entry together. Real ones are a few hundred bytes; ACLs and capabilities of an
/// entry fit many times. Beyond it the archive is refused.
const MAX_METADATA: u64 = 1 << 20;
/// Regions of one sparse file. GNU tar makes one per hole; 10,000 is a heavily fragmented disk image.
const MAX_SPARSE: usize = 10_000;
/// Extension headers in front of one entry: `x`, `L`, `K`, and `g` by odd writers.
const MAX_EXTENSIONS: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("cannot read the archive")]
    Read(#[from] io::Error),
    #[error("archive ends in the middle of an entry (at byte {0})")]
    Truncated(u64),
    #[error("invalid tar header at byte {at}: {problem}")]
    Header { at: u64, problem: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// One entry with all its extension headers applied. Names are raw bytes, exactly as in the archive.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds and nanoseconds since 1970; seconds may be negative.
    pub(crate) mtime: (i64, u32),
    /// Bytes of data in the archive.
    pub(crate) size: u64,
    pub(crate) sparse: Option<Sparse>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) device: (u64, u64),
}

/// Where the data of a sparse file goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sparse {
    /// Offset and length, ascending, not overlapping; together as long as the entry's data.
    pub(crate) regions: Vec<(u64, u64)>,
    /// Length of the file with its holes.
    pub(crate) len: u64,
}

pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes consumed so far.
    at: u64,
    /// Data of the current entry that nobody has read.
    data: u64,
    /// Fill bytes after it.
    padding: u64,
}

/// What PAX records say about the next entry.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: PaxSparse,
}

#[derive(Default)]
struct PaxSparse {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    /// `GNU.sparse.realsize` (1.0) or `GNU.sparse.size` (0.x).
    len: Option<u64>,
    /// Version 0.1: one record with all numbers. Version 0.0: repeated records, in order.
    map: Vec<u64>,
    is_sparse: bool,
}

impl<R: BufRead> TarReader<R> {
    pub(crate) fn new(input: R) -> TarReader<R> {
        TarReader { input, at: 0, data: 0, padding: 0 }
    }

    /// The next entry, `None` at the end mark or the end of the stream. Data of the entry before is skipped.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        let mut pax: Option<Pax> = None;
        let mut long_name = None;
        let mut long_link = None;
        let mut metadata = 0u64;
        for extensions in 0.. {
            let start = self.at;
            let fail = |problem: &str| TarError::Header { at: start, problem: problem.to_owned() };
            let pending = pax.is_some() || long_name.is_some() || long_link.is_some();
            let Some(block) = self.header_block()? else {
                return if pending { Err(fail("extension header without an entry")) } else { Ok(None) };
            };
            let header = Header { block: &block, at: start };
            header.verify_checksum()?;
            let kind = block[156];
            if !matches!(kind, b'x' | b'g' | b'L' | b'K') {
                let pax = pax.unwrap_or_default();
                return self.entry(&header, pax, long_name, long_link).map(Some);
            }
            if extensions == MAX_EXTENSIONS {
                return Err(fail("too many extension headers before one entry"));
            }
            let size = header.number(124, 12, "size")?;
            metadata = metadata.saturating_add(size);
            if metadata > MAX_METADATA {
                return Err(fail("extension headers of one entry are longer than 1 MiB"));
            }
            let bytes = self.read_bytes(size as usize)?;
            self.skip_padding(size)?;
            match kind {
                b'x' if pax.is_some() => return Err(fail("two PAX headers before one entry")),
                b'x' => pax = Some(parse_pax(&bytes, start)?),
                b'L' => long_name = Some(until_nul(&bytes).to_vec()),
                b'K' => long_link = Some(until_nul(&bytes).to_vec()),
                // Global defaults: every image unpacker ignores them; `git archive` writes one with a comment.
                _ => {}
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// The next piece of the current entry's data; empty when there is no more. Consume what was used.
    pub(crate) fn data(&mut self) -> Result<&[u8], TarError> {
        if self.data == 0 {
            return Ok(&[]);
        }
        let (at, left) = (self.at, self.data);
        let bytes = self.input.fill_buf()?;
        if bytes.is_empty() {
            return Err(TarError::Truncated(at));
        }
        let n = (bytes.len() as u64).min(left) as usize;
        Ok(&bytes[..n])
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.input.consume(n);
        self.at += n as u64;
        self.data -= n as u64;
    }

    /// Bytes consumed from the start of the archive: after an entry, where its data is.
    pub(crate) fn position(&self) -> u64 {
        self.at
    }

    /// The rest of the stream after the archive's end.
    pub(crate) fn into_input(self) -> R {
        self.input
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let path = pax.path.take().or(long_name).unwrap_or_else(|| header.path());
        let link =
            pax.link.take().or(long_link).unwrap_or_else(|| until_nul(header.field(157, 100)).to_vec());
        let mut kind = header.kind()?;
        if kind == Kind::File && path.ends_with(b"/") && header.field(156, 1) != b"S" {
            // Version 7 archives have no type for directories.
            kind = Kind::Dir;
        }
        let size = match pax.size {
            Some(size) => size,
            None => header.number(124, 12, "size")?,
        };
        let size = if kind == Kind::File { size } else { 0 };
        let device = match kind {
            Kind::Char | Kind::Block => {
                (header.number(329, 8, "device major")?, header.number(337, 8, "device minor")?)
            }
            _ => (0, 0),
        };
        let mut entry = Entry {
            path,
            kind,
            link,
            // Writers put the file type's bits here too.
            mode: (header.number(100, 8, "mode")? & 0o7777) as u32,
            uid: pax.uid.map_or_else(|| header.number(108, 8, "uid"), Ok)?,
            gid: pax.gid.map_or_else(|| header.number(116, 8, "gid"), Ok)?,
            mtime: pax.mtime.map_or_else(|| header.signed(136, 12, "mtime").map(|s| (s, 0)), Ok)?,
            size,
            sparse: None,
            xattrs: std::mem::take(&mut pax.xattrs),
            device,
        };
        let old_sparse = match header.field(156, 1) {
            b"S" => Some(self.old_gnu_sparse(header)?),
            _ => None,
        };
        self.data = entry.size;
        self.padding = padding(entry.size);
        if old_sparse.is_some() {
            entry.sparse = old_sparse;
        } else if pax.sparse.is_sparse && kind == Kind::File {
            let before = self.data;
            if let Some(name) = pax.sparse.name.take() {
                entry.path = name;
            }
            entry.sparse = Some(self.pax_sparse(pax.sparse, header.at)?);
            entry.size -= before - self.data;
        }
        if let Some(sparse) = &entry.sparse {
            sparse.check(entry.size, header.at)?;
        }
        Ok(entry)
    }

    /// Old GNU sparse files: four regions in the header, 21 in each block that follows.
    fn old_gnu_sparse(&mut self, header: &Header<'_>) -> Result<Sparse, TarError> {
        let len = header.number(483, 12, "sparse size")?;
        let mut regions = Vec::new();
        take_regions(header, 386, 4, &mut regions)?;
        let mut more = header.block[482] != 0;
        while more {
            if regions.len() > MAX_SPARSE {
                return Err(header.fail("sparse map is too long"));
            }
            let at = self.at;
            let block: [u8; BLOCK] =
                self.read_bytes(BLOCK)?.try_into().map_err(|_| TarError::Truncated(at))?;
            let before = regions.len();
            let extension = Header { block: &block, at };
            take_regions(&extension, 0, 21, &mut regions)?;
            more = block[504] != 0;
            if more && regions.len() == before {
                return Err(extension.fail("empty sparse map block"));
            }
        }
        Ok(Sparse { regions, len })
    }

    /// PAX sparse files: 1.0 has its map in front of the data, 0.0 and 0.1 in the PAX header.
    fn pax_sparse(&mut self, sparse: PaxSparse, at: u64) -> Result<Sparse, TarError> {
        let fail = |problem: &str| TarError::Header { at, problem: problem.to_owned() };
        let len = sparse.len.ok_or_else(|| fail("sparse file without its size"))?;
        let numbers = match (sparse.major.unwrap_or(0), sparse.minor.unwrap_or(0)) {
            (0, _) => sparse.map,
            (1, 0) => {
                let before = self.data;
                let count = self.decimal_line()? as usize;
                if count > MAX_SPARSE {
                    return Err(fail("sparse map is too long"));
                }
                let mut numbers = Vec::with_capacity(count * 2);
                for _ in 0..count * 2 {
                    numbers.push(self.decimal_line()?);
                }
                let fill = padding(before - self.data).min(self.data);
                for _ in 0..fill {
                    self.data_byte()?;
                }
                numbers
            }
            _ => return Err(fail("unknown version of the sparse format")),
        };
        if numbers.len() % 2 != 0 || numbers.len() / 2 > MAX_SPARSE {
            return Err(fail("malformed sparse map"));
        }
        let regions = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Ok(Sparse { regions, len })
    }

    fn decimal_line(&mut self) -> Result<u64, TarError> {
        let at = self.at;
        let mut digits = Vec::new();
        loop {
            match self.data_byte()? {
                b'\n' => break,
                digit if digits.len() < 20 => digits.push(digit),
                _ => return Err(TarError::Header { at, problem: "malformed sparse map".into() }),
            }
        }
        decimal(&digits).ok_or_else(|| TarError::Header { at, problem: "malformed sparse map".into() })
    }

    fn data_byte(&mut self) -> Result<u8, TarError> {
        let at = self.at;
        let byte = self.data()?.first().copied().ok_or(TarError::Truncated(at))?;
        self.consume(1);
        Ok(byte)
    }

    /// The next non-zero block; `None` at the end mark (two zero blocks) or at the end of the stream.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let at = self.at;
        let Some(block) = self.block()? else { return Ok(None) };
        if block != [0; BLOCK] {
            return Ok(Some(block));
        }
        match self.block()? {
            None => Ok(None),
            Some(second) if second == [0; BLOCK] => Ok(None),
            Some(_) => Err(TarError::Header { at, problem: "a lone zero block".into() }),
        }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let bytes = self.input.fill_buf()?;
            if bytes.is_empty() {
                return if filled == 0 { Ok(None) } else { Err(TarError::Truncated(self.at)) };
            }
            let n = bytes.len().min(BLOCK - filled);
            block[filled..filled + n].copy_from_slice(&bytes[..n]);
            filled += n;
            self.input.consume(n);
            self.at += n as u64;
        }
        Ok(Some(block))
    }

    fn read_bytes(&mut self, len: usize) -> Result<Vec<u8>, TarError> {
        let mut all = Vec::with_capacity(len);
        while all.len() < len {
            let bytes = self.input.fill_buf()?;
            if bytes.is_empty() {
                return Err(TarError::Truncated(self.at));
            }
            let n = bytes.len().min(len - all.len());
            all.extend_from_slice(&bytes[..n]);
            self.input.consume(n);
            self.at += n as u64;
        }
        Ok(all)
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let data = std::mem::take(&mut self.data);
        self.skip(data)?;
        let fill = std::mem::take(&mut self.padding);
        match self.skip(fill) {
            // Some writers end with the data, and every other reader takes it.
            Err(TarError::Truncated(_)) => Ok(()),
            other => other,
        }
    }

    fn skip_padding(&mut self, size: u64) -> Result<(), TarError> {
        self.skip(padding(size))
    }

    fn skip(&mut self, mut len: u64) -> Result<(), TarError> {
        while len > 0 {
            let bytes = self.input.fill_buf()?;
            if bytes.is_empty() {
                return Err(TarError::Truncated(self.at));
            }
            let n = (bytes.len() as u64).min(len);
            self.input.consume(n as usize);
            self.at += n;
            len -= n;
        }
        Ok(())
    }
}

impl<R: io::Read + io::Seek> TarReader<io::BufReader<R>> {
    /// Leaves the current entry's data out without reading it.
    pub(crate) fn seek_past_data(&mut self) -> Result<(), TarError> {
        let offset = self.data + std::mem::take(&mut self.padding);
        let fail = || TarError::Header { at: self.at, problem: "entry is impossibly long".into() };
        self.input.seek_relative(i64::try_from(offset).map_err(|_| fail())?)?;
        self.at += offset;
        self.data = 0;
        Ok(())
    }
}

impl Sparse {
    fn check(&self, data: u64, at: u64) -> Result<(), TarError> {
        let mut end = 0;
        let mut total = 0u64;
        for &(offset, len) in &self.regions {
            let next = offset.checked_add(len);
            match next {
                Some(next) if offset >= end && next <= self.len => end = next,
                _ => {
                    return Err(TarError::Header {
                        at,
                        problem: "sparse regions out of order or range".into(),
                    });
                }
            }
            total = total.saturating_add(len);
        }
        if total != data {
            let problem = format!("sparse map covers {total} bytes of {data}");
            return Err(TarError::Header { at, problem });
        }
        Ok(())
    }
}

struct Header<'a> {
    block: &'a [u8; BLOCK],
    at: u64,
}

impl Header<'_> {
    fn field(&self, start: usize, len: usize) -> &[u8] {
        &self.block[start..start + len]
    }

    fn fail(&self, problem: &str) -> TarError {
        TarError::Header { at: self.at, problem: problem.to_owned() }
    }

    /// Old writers summed signed characters; both sums are accepted, as everywhere.
    fn verify_checksum(&self) -> Result<(), TarError> {
        let stated = self.signed(148, 8, "checksum")?;
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (i, &byte) in self.block.iter().enumerate() {
            let byte = if (148..156).contains(&i) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte as i8);
        }
        if stated == unsigned || stated == signed { Ok(()) } else { Err(self.fail("wrong checksum")) }
    }

    fn kind(&self) -> Result<Kind, TarError> {
        Ok(match self.block[156] {
            // `7` asked for contiguous storage, `S` is an old GNU sparse file; both are files.
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            other => return Err(self.fail(&format!("unknown entry type {:?}", char::from(other)))),
        })
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(self.field(0, 100));
        // Only POSIX archives have a prefix; GNU ones keep times there. star's is shorter.
        let prefix = if self.field(257, 6) != b"ustar\0" {
            &[]
        } else if self.field(508, 4) == b"tar\0" {
            until_nul(self.field(345, 131))
        } else {
            until_nul(self.field(345, 155))
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    fn number(&self, start: usize, len: usize, what: &str) -> Result<u64, TarError> {
        let value = self.signed(start, len, what)?;
        u64::try_from(value).map_err(|_| self.fail(&format!("negative {what}")))
    }

    /// Octal text, or with the first bit set a big-endian two's complement number.
    fn signed(&self, start: usize, len: usize, what: &str) -> Result<i64, TarError> {
        let field = self.field(start, len);
        let bad = || self.fail(&format!("malformed {what}"));
        if field[0] & 0x80 != 0 {
            // Bit 6 of the first byte is the sign.
            let mut value = if field[0] & 0x40 != 0 { -1i128 } else { 0 };
            for (i, &byte) in field.iter().enumerate() {
                let byte = if i == 0 { (byte & 0x3f) | if value < 0 { 0xc0 } else { 0 } } else { byte };
                value = value << 8 | i128::from(byte);
            }
            return i64::try_from(value).map_err(|_| bad());
        }
        let text: Vec<u8> = field.iter().copied().skip_while(|&b| b == b' ').collect();
        let text = until_nul(&text);
        let text = text.strip_suffix(b" ").unwrap_or(text);
        let mut value = 0i64;
        for &digit in text {
            if digit == b' ' {
                break;
            }
            if !(b'0'..=b'7').contains(&digit) {
                return Err(bad());
            }
            value = value.checked_mul(8).ok_or_else(bad)? + i64::from(digit - b'0');
        }
        Ok(value)
    }
}

fn take_regions(
    header: &Header<'_>,
    start: usize,
    count: usize,
    regions: &mut Vec<(u64, u64)>,
) -> Result<(), TarError> {
    for i in 0..count {
        let at = start + i * 24;
        if header.block[at] == 0 && header.block[at + 12] == 0 {
            break;
        }
        regions.push((header.number(at, 12, "sparse offset")?, header.number(at + 12, 12, "sparse length")?));
    }
    Ok(())
}

/// Records of the form `<length> <key>=<value>\n`.
fn parse_pax(mut bytes: &[u8], at: u64) -> Result<Pax, TarError> {
    let mut pax = Pax::default();
    while !bytes.is_empty() {
        let fail = |problem: &str| TarError::Header { at, problem: format!("PAX: {problem}") };
        let space = bytes.iter().position(|&b| b == b' ').ok_or_else(|| fail("record without a length"))?;
        let len = decimal(&bytes[..space]).ok_or_else(|| fail("malformed length"))? as usize;
        if len <= space + 1 || len > bytes.len() || bytes[len - 1] != b'\n' {
            return Err(fail("record has the wrong length"));
        }
        let record = &bytes[space + 1..len - 1];
        let equals = record.iter().position(|&b| b == b'=').ok_or_else(|| fail("record without a value"))?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        apply_pax(&mut pax, key, value)
            .ok_or_else(|| fail(&format!("malformed value of {}", String::from_utf8_lossy(key))))?;
        bytes = &bytes[len..];
    }
    Ok(pax)
}

/// `None` when the value is malformed. An empty value takes the key back, which is the header's value again.
fn apply_pax(pax: &mut Pax, key: &[u8], value: &[u8]) -> Option<()> {
    let text = (!value.is_empty()).then(|| value.to_vec());
    let number = || if value.is_empty() { Some(None) } else { decimal(value).map(Some) };
    match key {
        b"path" => pax.path = text,
        b"linkpath" => pax.link = text,
        b"size" => pax.size = number()?,
        b"uid" => pax.uid = number()?,
        b"gid" => pax.gid = number()?,
        b"mtime" if value.is_empty() => pax.mtime = None,
        b"mtime" => pax.mtime = Some(pax_time(value)?),
        b"GNU.sparse.major" => {
            pax.sparse.major = number()?;
            pax.sparse.is_sparse = true;
        }
        b"GNU.sparse.minor" => pax.sparse.minor = number()?,
        b"GNU.sparse.name" => pax.sparse.name = text,
        b"GNU.sparse.realsize" | b"GNU.sparse.size" => {
            pax.sparse.len = number()?;
            pax.sparse.is_sparse = true;
        }
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
            // Offset and length alternate; anything else makes an odd or unordered map, refused later.
            if pax.sparse.map.len().is_multiple_of(2) != key.ends_with(b"offset")
                || pax.sparse.map.len() > 2 * MAX_SPARSE
            {
                return None;
            }
            pax.sparse.map.push(decimal(value)?);
        }
        b"GNU.sparse.map" => {
            for part in value.split(|&b| b == b',').filter(|part| !part.is_empty()) {
                if pax.sparse.map.len() > 2 * MAX_SPARSE {
                    return None;
                }
                pax.sparse.map.push(decimal(part)?);
            }
        }
        _ => {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                pax.xattrs.retain(|(other, _)| other != name);
                pax.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    Some(())
}

/// `[-]seconds[.fraction]`; nanoseconds always count forward.
fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let dot = value.iter().position(|&b| b == b'.');
    let (whole, fraction) = match dot {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &[][..]),
    };
    let seconds = if whole.is_empty() { 0 } else { i64::try_from(decimal(whole)?).ok()? };
    let mut nanos = 0u32;
    for i in 0..9 {
        let digit = match fraction.get(i) {
            Some(digit @ b'0'..=b'9') => u32::from(digit - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanos = nanos * 10 + digit;
    }
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}
