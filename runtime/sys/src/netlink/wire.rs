//! Netlink framing: builds datagrams of messages and nested attributes, and reads them back.

/// Sizes of the fixed headers (linux/netlink.h).
pub const HEADER_BYTES: usize = 16;
const NESTED: u16 = 0x8000;
/// Upper bits of an attribute type are flags (nested, byte order).
const TYPE_MASK: u16 = 0x3fff;

pub mod flag {
    pub const REQUEST: u16 = 0x1;
    pub const ACK: u16 = 0x4;
    pub const DUMP: u16 = 0x300;
    pub const REPLACE: u16 = 0x100;
    pub const EXCL: u16 = 0x200;
    pub const CREATE: u16 = 0x400;
    pub const APPEND: u16 = 0x800;
    /// On an answer: the table changed while it was being listed.
    pub const DUMP_INTERRUPTED: u16 = 0x10;
    /// On an error: the request is not echoed.
    pub const CAPPED: u16 = 0x100;
    /// On an error: attributes with the reason follow.
    pub const ACK_TLVS: u16 = 0x200;
}

/// A datagram under construction. Numbers are in the byte order of the host unless a method says `be`.
#[derive(Clone, Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// One message; `body` writes the family header and the attributes.
    pub fn message(&mut self, kind: u16, flags: u16, sequence: u32, body: impl FnOnce(&mut Writer)) {
        let start = self.0.len();
        self.raw(&[0; 4]);
        self.raw(&kind.to_ne_bytes());
        self.raw(&flags.to_ne_bytes());
        self.raw(&sequence.to_ne_bytes());
        self.raw(&[0; 4]);
        body(self);
        self.pad();
        let length = u32::try_from(self.0.len() - start).expect("a message is far below 4 GiB");
        self.0[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn attribute(&mut self, kind: u16, data: &[u8]) {
        let length = u16::try_from(4 + data.len()).expect("single values are names and addresses");
        self.raw(&length.to_ne_bytes());
        self.raw(&kind.to_ne_bytes());
        self.raw(data);
        self.pad();
    }

    /// A string with its terminating zero.
    pub fn string(&mut self, kind: u16, text: &str) {
        let mut bytes = Vec::with_capacity(text.len() + 1);
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
        self.attribute(kind, &bytes);
    }

    pub fn u8(&mut self, kind: u16, value: u8) {
        self.attribute(kind, &[value]);
    }

    pub fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    pub fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        let start = self.0.len();
        self.raw(&[0; 2]);
        self.raw(&(kind | NESTED).to_ne_bytes());
        body(self);
        let length = u16::try_from(self.0.len() - start).expect("callers split lists before 64 KiB");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// One message of a datagram.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub body: &'a [u8],
}

/// The messages of a datagram; stops at the first one that does not fit.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = datagram.get(..HEADER_BYTES)?;
        let length = read_u32(header, 0)? as usize;
        let body = datagram.get(HEADER_BYTES..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message {
            kind: read_u16(header, 4)?,
            flags: read_u16(header, 6)?,
            sequence: read_u32(header, 8)?,
            body,
        })
    })
}

/// The attributes of a list; stops at the first one that does not fit.
pub fn attributes(mut list: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(list, 0)?);
        let kind = read_u16(list, 2)? & TYPE_MASK;
        let value = list.get(4..length)?;
        list = list.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// First attribute of that kind.
pub fn find(list: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(list).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Text up to its terminating zero.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

pub fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

pub fn read_be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut writer = Writer::default();
        writer.message(16, flag::REQUEST, 7, |w| {
            w.raw(&[9; 4]);
            w.string(3, "ek0");
            w.nest(18, |w| w.u32(1, 42));
        });
        writer.message(17, flag::ACK, 8, |_| {});
        let bytes = writer.into_bytes();
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence), (16, flag::REQUEST, 7));
        let list = &all[0].body[4..];
        assert_eq!(text(find(list, 3).unwrap()), "ek0");
        assert_eq!(find(find(list, 18).unwrap(), 1), Some(&42u32.to_ne_bytes()[..]));
        assert!(all[1].body.is_empty());
    }

    #[test]
    fn garbage_ends_the_iteration() {
        assert_eq!(messages(&[1; 15]).count(), 0);
        assert_eq!(messages(&[0xff; 64]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[5, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[5, 0, 1, 0, 9]).count(), 1);
    }
}
