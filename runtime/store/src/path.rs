//! Paths inside a layer: lists of names, checked once, never handed to the kernel as the image wrote them.

use std::ffi::CStr;

/// `PATH_MAX` without the NUL: longer paths cannot be used by the container either.
const MAX_PATH: usize = 4095;
/// `NAME_MAX` of every Linux file system.
const MAX_NAME: usize = 255;

/// A path below a layer's root: at least one name, none of them empty, `.` or `..`, none with a NUL or a slash.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LayerPath {
    /// `usr/lib` NUL `libc.so` NUL: both the parent and the name are C strings without another copy.
    bytes: Vec<u8>,
    name_start: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("it contains a NUL byte")]
    Nul,
    #[error("it is longer than {MAX_PATH} bytes")]
    TooLong,
    #[error("one of its names is longer than {MAX_NAME} bytes")]
    NameTooLong,
}

impl LayerPath {
    /// The path that `text` means when the layer's root is `/`: leading slashes and `.` vanish, `..` is taken
    /// lexically and stops at the root. `None` is the root itself.
    pub(crate) fn parse(text: &[u8]) -> Result<Option<LayerPath>, PathError> {
        if text.contains(&0) {
            return Err(PathError::Nul);
        }
        if text.len() > MAX_PATH {
            return Err(PathError::TooLong);
        }
        let mut names: Vec<&[u8]> = Vec::new();
        for name in text.split(|&b| b == b'/') {
            match name {
                b"" | b"." => {}
                b".." => drop(names.pop()),
                _ if name.len() > MAX_NAME => return Err(PathError::NameTooLong),
                _ => names.push(name),
            }
        }
        Ok(LayerPath::from_names(&names))
    }

    fn from_names(names: &[&[u8]]) -> Option<LayerPath> {
        let (name, parents) = names.split_last()?;
        let mut bytes = parents.join(&b'/');
        bytes.push(0);
        let name_start = bytes.len();
        bytes.extend_from_slice(name);
        bytes.push(0);
        Some(LayerPath { bytes, name_start })
    }

    /// `name` in the directory `parent` (joined by slashes, empty for the root); both already checked.
    pub(crate) fn join(parent: &[u8], name: &[u8]) -> LayerPath {
        let bytes = [parent, b"\0", name, b"\0"].concat();
        LayerPath { bytes, name_start: parent.len() + 1 }
    }

    pub(crate) fn name(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes[self.name_start..]).unwrap_or_default()
    }

    /// Empty when the parent is the root.
    pub(crate) fn parent(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let (parent, name) = (self.parent().to_bytes(), self.name().to_bytes());
        if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
    }
}

impl std::fmt::Debug for LayerPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", show(&self.to_bytes()))
    }
}

/// A name from an image as text: bytes that are not printable ASCII, UTF-8 letters or a lone backslash are escaped, so
/// that it can stand in a message or a JSON file and be read back by [`unshow`].
pub(crate) fn show(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                c if c.is_control() => {
                    let mut utf8 = [0; 4];
                    for byte in c.encode_utf8(&mut utf8).bytes() {
                        text.push_str(&format!("\\x{byte:02x}"));
                    }
                }
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// The inverse of [`show`]; `None` when the text is not one of its results.
pub(crate) fn unshow(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = match (first, tail) {
            (b'\\', [b'\\', tail @ ..]) => {
                bytes.push(b'\\');
                tail
            }
            (b'\\', [b'x', high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                tail
            }
            (b'\\', _) => return None,
            (byte, tail) => {
                bytes.push(byte);
                tail
            }
        };
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &[u8], expected: &str) {
        let shown = match LayerPath::parse(text) {
            Ok(Some(path)) => show(&path.to_bytes()),
            Ok(None) => "the root".to_owned(),
            Err(e) => e.to_string(),
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn every_path_ends_below_the_root() {
        check(b"a/b", "a/b");
        check(b"/a//b/./c/", "a/b/c");
        check(b"../../etc/passwd", "etc/passwd");
        check(b"a/../../b", "b");
        check(b"./", "the root");
        check(b"a/..", "the root");
        check(b"", "the root");
        check(b"a\0b", "it contains a NUL byte");
        check(&[b'a'; 256], "one of its names is longer than 255 bytes");
        check(&b"a/".repeat(2049), "it is longer than 4095 bytes");
        check(b"\xff\xfe/\xc3\xa4", "\\xff\\xfe/\u{e4}");
    }

    #[test]
    fn shown_names_read_back() {
        for bytes in [&b"plain"[..], b"\xff\x00\n\\x41\\", "\u{e4}\u{1f600}".as_bytes(), b""] {
            assert_eq!(unshow(&show(bytes)).as_deref(), Some(bytes));
        }
        assert_eq!(unshow("\\q"), None);
    }
}
