//! What changed between two versions of a pod, field by field.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::DesiredPod;

/// One changed field. Values are short text, cut where they are long and hidden where they could be secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// As in the manifest, list items by name: `containers[web].env[MODE]`.
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<String>,
}

/// Longest value that is shown whole.
const SHOWN_CHARS: usize = 80;
/// More changes than this are noise to a reader.
const MAX_CHANGES: usize = 64;
/// Words in the name of a variable whose value is better not printed.
const SENSITIVE: [&str; 6] = ["PASS", "SECRET", "TOKEN", "CREDENTIAL", "APIKEY", "API_KEY"];

impl fmt::Display for FieldChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) if old != new => write!(f, "{} changed: {old} -> {new}", self.path),
            (None, Some(new)) => write!(f, "{} added: {new}", self.path),
            (Some(old), None) => write!(f, "{} removed: was {old}", self.path),
            _ => write!(f, "{} changed", self.path),
        }
    }
}

/// Spec, labels and annotations; in path order. Contents behind references are not kept in records, so a change of
/// those alone gives an empty list.
pub fn diff(old: &DesiredPod, new: &DesiredPod) -> Vec<FieldChange> {
    let mut changes = Vec::new();
    let spec = |pod: &DesiredPod| serde_json::to_value(&pod.spec).unwrap_or(Value::Null);
    let map = |map| serde_json::to_value(map).unwrap_or(Value::Null);
    compare("", Some(&spec(old)), Some(&spec(new)), &mut changes);
    compare("labels", Some(&map(&old.labels)), Some(&map(&new.labels)), &mut changes);
    compare("annotations", Some(&map(&old.annotations)), Some(&map(&new.annotations)), &mut changes);
    changes.truncate(MAX_CHANGES);
    changes
}

fn compare(path: &str, old: Option<&Value>, new: Option<&Value>, changes: &mut Vec<FieldChange>) {
    if old == new || changes.len() > MAX_CHANGES {
        return;
    }
    match (old, new) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let mut keys: Vec<&String> =
                a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))).collect();
            keys.sort();
            for key in keys {
                compare(&join(path, key), a.get(key), b.get(key), changes);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) if named(a) && named(b) => {
            compare_named(path, a, b, changes);
        }
        _ => changes.push(FieldChange {
            path: path.to_owned(),
            old: old.map(|value| show(path, value)),
            new: new.map(|value| show(path, value)),
        }),
    }
}

fn compare_named(path: &str, old: &[Value], new: &[Value], changes: &mut Vec<FieldChange>) {
    let before = changes.len();
    for item in old {
        let other = new.iter().find(|n| name(n) == name(item));
        compare(&format!("{path}[{}]", name(item)), Some(item), other, changes);
    }
    for item in new.iter().filter(|n| !old.iter().any(|o| name(o) == name(n))) {
        compare(&format!("{path}[{}]", name(item)), None, Some(item), changes);
    }
    if changes.len() == before {
        changes.push(FieldChange { path: format!("{path} order"), old: None, new: None });
    }
}

/// Lists whose items have names that occur once are compared by name; all others as a whole.
fn named(items: &[Value]) -> bool {
    let names: Vec<&str> = items.iter().map(name).collect();
    names.iter().enumerate().all(|(i, n)| !n.is_empty() && !names[..i].contains(n))
}

fn name(item: &Value) -> &str {
    item.get("name").and_then(Value::as_str).unwrap_or("")
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn show(path: &str, value: &Value) -> String {
    let upper = path.to_ascii_uppercase();
    if SENSITIVE.iter().any(|word| upper.contains(word)) {
        return "(hidden)".into();
    }
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Object(fields) if fields.contains_key("name") => {
            match fields.get("value").or(fields.get("image")) {
                Some(inner) => return show(path, inner),
                None => value.to_string(),
            }
        }
        other => other.to_string(),
    };
    if text.chars().count() <= SHOWN_CHARS {
        return text;
    }
    text.chars().take(SHOWN_CHARS).chain("...".chars()).collect()
}
