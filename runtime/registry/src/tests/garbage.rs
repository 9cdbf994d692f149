//! Parsers meet damaged and random input: an error or a value, never a panic or a loop.

use super::fixture::{Content, Packing, noise};
use crate::auth::{lower_token, parse_challenges};
use crate::manifest::{lower_config_platform, lower_diff_ids, lower_document};

const ROUNDS: u64 = 3000;

/// `seed` with some bytes changed, removed or doubled, or nothing but noise.
fn damage(seed: &[u8], round: u64) -> Vec<u8> {
    if round.is_multiple_of(7) {
        return noise((round % 300) as usize, round);
    }
    let mut bytes = seed.to_vec();
    for pair in noise(2 * (1 + round as usize % 4), round).chunks(2) {
        let at = (usize::from(pair[0]) * 251 + round as usize) % bytes.len();
        match pair[1] % 4 {
            0 => bytes[at] = pair[1],
            1 => bytes.truncate(at + 1),
            2 => bytes.insert(at, br#""{}[]:,\=0"#[usize::from(pair[1]) % 10]),
            _ => {
                let tail = bytes[at..].to_vec();
                bytes.extend_from_slice(&tail[..tail.len().min(64)]);
            }
        }
    }
    bytes
}

#[test]
fn damaged_documents_are_errors() {
    let mut content = Content::default();
    let image = content.image("1", "amd64", &[(Packing::Plain, &[("a", b"x")])]);
    content.index("2", &[("amd64", Some("v2"), image)]);
    let documents = content.manifests.values().map(|(_, body)| body).chain(content.blobs.values());
    for document in documents {
        for round in 0..ROUNDS {
            let bytes = damage(document, round);
            let _ = lower_document(&bytes, None, "x:1", "r");
            let _ = lower_document(&bytes, Some("application/json"), "x:1", "r");
            let _ = lower_diff_ids(&bytes, 1);
            let _ = lower_config_platform(&bytes);
            let _ = lower_token(&bytes);
        }
    }
}

#[test]
fn damaged_challenges_end() {
    let seed = br#"Bearer realm="https://a/token",service="s\"x",scope="repository:x:pull", Basic realm="y""#;
    for round in 0..ROUNDS * 4 {
        let text = String::from_utf8_lossy(&damage(seed, round)).into_owned();
        assert!(parse_challenges(&text).len() <= text.len() / 2 + 1);
    }
}
