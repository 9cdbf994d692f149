//! From a layer's compressed bytes to its tar stream, with both digests taken on the way.

use crate::Digest;
use crate::digest::Hasher;
use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};
use std::rc::Rc;

/// One inflate and hash step; fits the second-level cache of small machines together with the decoder's window.
const BUFFER: usize = 128 * 1024;

/// What a layer is compressed with, by its first bytes: media types in manifests are wrong often enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn sniff(magic: &[u8]) -> io::Result<Compression> {
        let refuse = |what: &str| {
            Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("layer is compressed with {what}; only gzip, zstd and no compression are OCI layers"),
            ))
        };
        match magic {
            [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
            // A skippable frame in front of the first real one.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
            [b'B', b'Z', b'h', ..] => refuse("bzip2"),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => refuse("xz"),
            _ => Ok(Compression::None),
        }
    }
}

/// Reads raw bytes and hashes them. The count is shared because the reader disappears inside a decoder.
pub(crate) struct HashingReader<R> {
    inner: R,
    hasher: Option<Hasher>,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..n]);
        }
        self.count.set(self.count.get() + n as u64);
        Ok(n)
    }
}

type Source<R> = BufReader<Chain<Cursor<Vec<u8>>, HashingReader<R>>>;

enum Decoder<R: Read> {
    None(Source<R>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<Source<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, Source<R>>),
}

/// The uncompressed stream of a layer. `BufRead`, so that the tar reader and the file writer work on this one buffer.
pub(crate) struct LayerStream<R: Read> {
    decoder: Decoder<R>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    hasher: Hasher,
    bytes: u64,
    compressed: Rc<Cell<u64>>,
    budget: Budget,
}

/// When an inflating stream is stopped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) max_bytes: u64,
    pub(crate) max_ratio: u64,
    /// Below this many bytes the ratio is not looked at: small layers of zeros are common and harmless.
    pub(crate) ratio_from: u64,
}

/// Digests and lengths of both sides of a stream that was read to its end.
pub(crate) struct Sums {
    /// `None` when the caller hashes the compressed side itself.
    pub(crate) compressed: Option<Digest>,
    pub(crate) diff_id: Digest,
    pub(crate) bytes: u64,
}

impl<R: Read> LayerStream<R> {
    pub(crate) fn new(reader: R, hash_compressed: bool, budget: Budget) -> io::Result<LayerStream<R>> {
        let count = Rc::new(Cell::new(0));
        let hasher = hash_compressed.then(Hasher::default);
        let mut reader = HashingReader { inner: reader, hasher, count: Rc::clone(&count) };
        let mut magic = vec![0; 6];
        let mut filled = 0;
        while filled < magic.len() {
            match reader.read(&mut magic[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        magic.truncate(filled);
        let compression = Compression::sniff(&magic)?;
        let source = BufReader::with_capacity(BUFFER, Cursor::new(magic).chain(reader));
        let decoder = match compression {
            Compression::None => Decoder::None(source),
            Compression::Gzip => Decoder::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(source))),
            Compression::Zstd => Decoder::Zstd(zstd::stream::read::Decoder::with_buffer(source)?),
        };
        Ok(LayerStream {
            decoder,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            hasher: Hasher::default(),
            bytes: 0,
            compressed: count,
            budget,
        })
    }

    /// Reads what is left: the diffID covers everything after the archive's end mark too, and the blob's digest
    /// everything after the last compressed frame.
    pub(crate) fn drain(mut self) -> io::Result<Sums> {
        loop {
            let n = self.fill_buf()?.len();
            if n == 0 {
                break;
            }
            self.consume(n);
        }
        let mut source = match self.decoder {
            Decoder::None(source) => source,
            Decoder::Gzip(decoder) => decoder.into_inner(),
            Decoder::Zstd(decoder) => decoder.finish(),
        };
        io::copy(&mut source, &mut io::sink())?;
        let (_, reader) = source.into_inner().into_inner();
        Ok(Sums {
            compressed: reader.hasher.map(Hasher::finish),
            diff_id: self.hasher.finish(),
            bytes: self.bytes,
        })
    }

    fn check_budget(&self) -> io::Result<()> {
        let Budget { max_bytes, max_ratio, ratio_from } = self.budget;
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        if self.bytes > max_bytes {
            return refuse(format!("layer inflates to more than {max_bytes} bytes"));
        }
        if self.bytes > ratio_from && self.bytes / max_ratio > self.compressed.get() {
            return refuse(format!("layer inflates to more than {max_ratio} times its size"));
        }
        Ok(())
    }
}

impl<R: Read> Read for LayerStream<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let n = bytes.len().min(out.len());
        out[..n].copy_from_slice(&bytes[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl<R: Read> BufRead for LayerStream<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            let buffer = &mut self.buffer[..];
            let n = match &mut self.decoder {
                Decoder::None(source) => source.read(buffer),
                Decoder::Gzip(decoder) => decoder.read(buffer),
                Decoder::Zstd(decoder) => decoder.read(buffer),
            }?;
            self.hasher.update(&self.buffer[..n]);
            self.bytes += n as u64;
            (self.start, self.end) = (0, n);
            self.check_budget()?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
    }
}
