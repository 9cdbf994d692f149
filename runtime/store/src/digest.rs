//! Content digests.

use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::str::FromStr;

/// A SHA-256 digest, written `sha256:<64 lower-case hex digits>`.
///
/// A digest names files, so it can only be made from checked text: nothing an image or a registry says becomes part
/// of a path before it has passed through here. SHA-512 is allowed by the OCI specification but no registry serves
/// it and the layout of every store on disk is `blobs/sha256`; it is refused by name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The 64 hex digits, without the algorithm.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(64);
        for byte in self.0 {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
            }
        }
        text
    }

    /// A digest from its 64 hex digits.
    pub fn from_hex(hex: &str) -> Result<Digest, DigestError> {
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return Err(DigestError::Malformed(hex.to_owned()));
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            match (nibble(pair[0]), nibble(pair[1])) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => return Err(DigestError::Malformed(hex.to_owned())),
            }
        }
        Ok(Digest(bytes))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    #[error("{0:?} is not a digest (expected sha256:<64 hex digits>)")]
    Malformed(String),
    #[error("digest {0:?} uses an algorithm other than sha256")]
    Algorithm(String),
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Digest, DigestError> {
        match text.split_once(':') {
            Some(("sha256", hex)) => {
                Digest::from_hex(hex).map_err(|_| DigestError::Malformed(text.to_owned()))
            }
            Some(_) => Err(DigestError::Algorithm(text.to_owned())),
            None => Err(DigestError::Malformed(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Digest, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A running SHA-256.
#[derive(Clone, Default)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }

    /// Where it is, to go on from in another process.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.0.serialize().to_vec()
    }

    /// `None` for what [`Hasher::save`] has not made.
    pub(crate) fn restore(saved: &[u8]) -> Option<Hasher> {
        let saved = SerializedState::<Sha256>::try_from(saved).ok()?;
        Sha256::deserialize(&saved).ok().map(Hasher)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_form_is_a_digest() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), format!("sha256:{hex}"));
        assert_eq!(format!("sha256:{hex}").parse(), Ok(Digest::of(b"")));
        for bad in
            ["", "sha256:", hex, "sha256:../../../etc/passwd", &format!("sha256:{}", hex.to_uppercase())]
        {
            assert!(matches!(bad.parse::<Digest>(), Err(DigestError::Malformed(_))), "{bad}");
        }
        let sha512 = format!("sha512:{hex}{hex}");
        assert_eq!(sha512.parse::<Digest>(), Err(DigestError::Algorithm(sha512)));
    }
}
