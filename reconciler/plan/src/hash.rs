//! Identities and hashes. A hash is over canonical JSON of what was written: keys sorted, absent fields absent, so
//! that neither the order of Rust fields nor fields that a later version adds change it.

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::model::{ContainerId, ContainerName, PodId, PodKey, SpecHash};

/// Longest readable part of a pod id: with the digits it leaves room for container names in a 255-byte file name.
const POD_ID_NAME_BYTES: usize = 40;

impl SpecHash {
    /// Over any value whose JSON form is what counts.
    pub fn of(value: &impl Serialize) -> SpecHash {
        let mut hasher = Hasher::default();
        hasher.json(&serde_json::to_value(value).unwrap_or(Value::Null));
        hasher.finish()
    }
}

impl PodId {
    pub fn of(key: &PodKey) -> PodId {
        let mut hasher = Hasher::default();
        hasher.text(&key.namespace).text(&key.name);
        let mut end = key.name.len().min(POD_ID_NAME_BYTES);
        while !key.name.is_char_boundary(end) {
            end -= 1;
        }
        PodId(format!("{}-{}", &key.name[..end], hasher.hex(5)))
    }
}

impl ContainerId {
    pub fn of(pod: &PodId, container: &ContainerName, attempt: u32) -> ContainerId {
        ContainerId(format!("{pod}.{container}.{attempt}"))
    }
}

/// SHA-256 over length-prefixed pieces: no two sequences of pieces give the same bytes.
#[derive(Default)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }

    pub(crate) fn number(&mut self, number: u64) -> &mut Self {
        self.0.update(number.to_le_bytes());
        self
    }

    pub(crate) fn json(&mut self, value: &Value) -> &mut Self {
        let mut text = String::with_capacity(512);
        write_canonical(value, &mut text);
        self.text(&text)
    }

    pub(crate) fn finish(self) -> SpecHash {
        SpecHash(self.hex(8))
    }

    pub(crate) fn hex(self, bytes: usize) -> String {
        let digest = self.0.finalize();
        digest.iter().take(bytes).flat_map(|byte| [byte >> 4, byte & 15]).map(hex_digit).collect()
    }
}

fn hex_digit(nibble: u8) -> char {
    char::from(b"0123456789abcdef"[usize::from(nibble & 15)])
}

fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(fields) => {
            let mut sorted: Vec<_> = fields.iter().collect();
            sorted.sort_by_key(|(key, _)| key.as_str());
            out.push('{');
            for (key, value) in sorted {
                write_text(key, out);
                out.push(':');
                write_canonical(value, out);
                out.push(',');
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for item in items {
                write_canonical(item, out);
                out.push(',');
            }
            out.push(']');
        }
        Value::String(text) => write_text(text, out),
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => out.push_str(&number.to_string()),
    }
}

fn write_text(text: &str, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            out.push('\\');
        }
        out.push(character);
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_hash_does_not_depend_on_the_order_of_fields() {
        assert_eq!(SpecHash::of(&json!({"a": 1, "b": [true]})), SpecHash::of(&json!({"b": [true], "a": 1})));
        assert_ne!(SpecHash::of(&json!({"a": 1})), SpecHash::of(&json!({"a": "1"})));
        assert_ne!(SpecHash::of(&json!(["a,b"])), SpecHash::of(&json!(["a", "b"])));
    }

    #[test]
    fn a_pod_id_is_bounded_and_tells_namespaces_apart() {
        let id = |namespace: &str, name: &str| {
            PodId::of(&PodKey { namespace: namespace.into(), name: name.into() }).0
        };
        assert_ne!(id("a", "web"), id("b", "web"));
        assert!(id("a", "web").starts_with("web-"));
        assert_eq!(id("a", &"x".repeat(200)).len(), 40 + 1 + 10);
    }
}
