//! Holds a tree against the shapes of the model: every wrong field is reported, and what is right becomes JSON.
//!
//! The JSON always decodes into the model's structs: where a value is wrong or missing a placeholder stands in and
//! its path is covered, so that the value checks can go on with the rest.

use serde_json::{Map, Value as Json, json};

use crate::diagnostic::Severity;
use crate::known::{self, nearest};
use crate::report::{Path, Report};
use crate::scalar::Scalar;
use crate::schema::{SHAPES, Shape};
use crate::tree::{Entry, NodeId, Value};

pub(crate) struct Walk<'r, 'a> {
    pub(crate) report: &'r mut Report<'a>,
    /// Type at the document's root, for "belongs under".
    pub(crate) root_type: &'static str,
}

impl Walk<'_, '_> {
    /// A whole object; `apiVersion` and `kind` are the caller's.
    pub(crate) fn object(&mut self, id: NodeId, path: &Path<'_>) -> Json {
        self.fields(id, self.root_type, path, &["apiVersion", "kind"])
    }

    fn value(&mut self, id: NodeId, shape: &Shape, path: &Path<'_>) -> Json {
        let tree = self.report.tree;
        let node = tree.node(id);
        let found = match (shape, &node.value) {
            (Shape::Struct(name), Value::Map(_)) => return self.fields(id, name, path, &[]),
            (Shape::Map(inner), Value::Map(entries)) => return self.map(entries, inner, path),
            (Shape::List(inner), Value::List(items)) => return self.list(items, inner, path),
            (_, Value::Scalar { text, meaning }) => match scalar(text, meaning, shape) {
                Ok(value) => return value,
                Err(problem) => problem,
            },
            (_, other) => Problem {
                message: format!("must be {}, not {}", noun(shape), value_noun(other)),
                help: shape_help(shape, other),
            },
        };
        match found.help {
            Some(help) => self.report.error_help(path, found.message, help),
            None => self.report.error(path, found.message),
        }
        self.report.cover(path);
        placeholder(shape)
    }

    fn list(&mut self, items: &[NodeId], inner: &Shape, path: &Path<'_>) -> Json {
        let mut list = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            if self.report.is_full() {
                break;
            }
            list.push(self.value(*item, inner, &path.index(index)));
        }
        Json::Array(list)
    }

    fn map(&mut self, entries: &[Entry], inner: &Shape, path: &Path<'_>) -> Json {
        let mut map = Map::new();
        for entry in entries {
            if self.report.is_full() {
                break;
            }
            let here = path.key(&entry.key);
            if let Some(written) = &entry.written_key {
                let message = format!("YAML reads the key {written} as \"{}\"", entry.key);
                let help = format!("write \"{written}\" in quotes to keep the text");
                self.report.at_key(Severity::Warning, &here, entry, message, Some(help));
            }
            // Kubernetes reads a null in a map of text as the empty text.
            let value = if self.report.tree.is_null(entry.value) && *inner == Shape::Text {
                json!("")
            } else {
                self.value(entry.value, inner, &here)
            };
            map.insert(entry.key.clone(), value);
        }
        Json::Object(map)
    }

    fn fields(&mut self, id: NodeId, type_name: &str, path: &Path<'_>, skip: &[&str]) -> Json {
        let tree = self.report.tree;
        let fields = SHAPES.fields(type_name);
        let Value::Map(entries) = &tree.node(id).value else { return json!({}) };
        let mut map = Map::new();
        for entry in entries.iter().filter(|e| !skip.contains(&e.key.as_str())) {
            if self.report.is_full() {
                break;
            }
            let here = path.key(&entry.key);
            if self.known_but_not_done(entry, type_name, &here) {
                continue;
            }
            match fields.get(&entry.key) {
                None => self.unknown(entry, type_name, path),
                Some(_) if tree.is_null(entry.value) => {}
                Some(field) => {
                    let value = self.value(entry.value, &field.shape, &here);
                    map.insert(entry.key.clone(), value);
                }
            }
        }
        for (name, field) in fields.iter().filter(|(_, f)| f.required) {
            if !map.contains_key(name) {
                let here = path.key(name);
                self.report.error(&here, format!("field \"{name}\" is missing"));
                self.report.cover(&here);
                map.insert(name.clone(), placeholder(&field.shape));
            }
        }
        Json::Object(map)
    }

    fn known_but_not_done(&mut self, entry: &Entry, type_name: &str, here: &Path<'_>) -> bool {
        let Some(known) = known::fields(type_name) else { return false };
        let key = entry.key.as_str();
        // What a volume or a probe is, it is by the name of its field: `downwardAPI: {}` says something.
        let by_name = matches!(type_name, "Volume" | "Probe");
        let empty = match &self.report.tree.node(entry.value).value {
            Value::Map(entries) => entries.is_empty() && !by_name,
            Value::List(items) => items.is_empty(),
            Value::Scalar { meaning, .. } => *meaning == Scalar::Null,
        };
        if known.not_yet.contains(&key) {
            if !empty {
                let message = format!("field \"{key}\" of Kubernetes is not done yet");
                self.report.at_key(
                    Severity::Error,
                    here,
                    entry,
                    message,
                    Some("remove it to run without".into()),
                );
            }
            return true;
        }
        if known.no_effect.contains(&key) {
            if !empty {
                let message = format!("field \"{key}\" has no effect on one host");
                self.report.at_key(Severity::Warning, here, entry, message, None);
            }
            return true;
        }
        false
    }

    fn unknown(&mut self, entry: &Entry, type_name: &str, path: &Path<'_>) {
        let here = path.key(&entry.key);
        let names = SHAPES.fields(type_name).keys().map(String::as_str);
        let known = known::fields(type_name).map_or([&[][..]; 2], |k| [k.not_yet, k.no_effect]);
        let near = nearest(&entry.key, names.chain(known.into_iter().flatten().copied()));
        let elsewhere = SHAPES.path_to(self.root_type, &entry.key);
        let help = match (near, elsewhere) {
            (_, Some(elsewhere)) => Some(format!("it belongs at {elsewhere}")),
            (Some(near), None) => Some(format!("did you mean \"{near}\"?")),
            (None, None) => None,
        };
        self.report.at_key(Severity::Error, &here, entry, format!("unknown field \"{}\"", entry.key), help);
    }
}

struct Problem {
    message: String,
    help: Option<String>,
}

fn scalar(text: &str, meaning: &Scalar, shape: &Shape) -> Result<Json, Problem> {
    let value = match (shape, meaning) {
        (Shape::Text | Shape::Quantity | Shape::IntOrText, Scalar::Text) => json!(text),
        (Shape::OneOf(words), Scalar::Text) if words.iter().any(|w| w == text) => json!(text),
        (Shape::Bool, Scalar::Bool(value)) => json!(value),
        (Shape::Quantity, Scalar::Int(value)) => json!(value.to_string()),
        (Shape::Quantity, Scalar::Float(value)) if value.is_finite() => json!(text.replace('_', "")),
        (Shape::IntOrText, Scalar::Int(value)) if i32::try_from(*value).is_ok() => json!(value),
        (Shape::Int { min, max }, Scalar::Int(value)) if (min..=max).contains(&value) => json!(value),
        (Shape::Int { min, max }, Scalar::Float(value)) if is_whole(*value, *min, *max) => {
            // Whole and inside the range, so that the conversion is exact.
            json!(*value as i64)
        }
        (shape, meaning) => return Err(mismatch(text, meaning, shape)),
    };
    Ok(value)
}

fn is_whole(value: f64, min: i64, max: i64) -> bool {
    // 2^53: above it a float does not name one integer.
    value.fract() == 0.0 && value.abs() < 9.0e15 && value >= min as f64 && value <= max as f64
}

fn mismatch(text: &str, meaning: &Scalar, shape: &Shape) -> Problem {
    let message = match (shape, meaning) {
        (Shape::Text, Scalar::Null) => "must be text, but is empty".into(),
        (Shape::Text, other) => format!("must be text, but YAML reads it as {}", other.noun()),
        (Shape::OneOf(words), _) => format!("must be {}", list_words(words)),
        (Shape::Int { min, max }, Scalar::Int(_)) => {
            if *max == i64::MAX {
                format!("must be {min} or more")
            } else {
                format!("must be between {min} and {max}")
            }
        }
        (Shape::Int { .. }, Scalar::Float(_)) => "must be a whole number".into(),
        (Shape::IntOrText, Scalar::Int(_)) => format!("must be a number up to {}", i32::MAX),
        (shape, other) => format!(
            "must be {}, not {}",
            noun(shape),
            if *other == Scalar::Null { "empty" } else { other.noun() }
        ),
    };
    let help = match (shape, meaning) {
        (Shape::Text, Scalar::Null) => Some("write \"\" for the empty text".into()),
        (Shape::Text, _) => Some("put it in quotes".into()),
        (Shape::OneOf(words), _) => {
            nearest(text, words.iter().map(String::as_str)).map(|near| format!("did you mean {near}?"))
        }
        (Shape::Int { .. } | Shape::Bool, Scalar::Text)
            if !matches!(crate::scalar::resolve_plain(text), Scalar::Text) =>
        {
            Some("remove the quotes".into())
        }
        (Shape::List(inner), _) if **inner == Shape::Text => Some("write it as a list: [\"...\"]".into()),
        (Shape::List(_), _) => Some("start each item with \"- \"".into()),
        _ => None,
    };
    Problem { message, help }
}

fn shape_help(shape: &Shape, value: &Value) -> Option<String> {
    match (shape, value) {
        (Shape::List(_), Value::Map(_)) => Some("start each item with \"- \"".into()),
        _ => None,
    }
}

fn noun(shape: &Shape) -> &'static str {
    match shape {
        Shape::Text | Shape::OneOf(_) => "text",
        Shape::Bool => "true or false",
        Shape::Int { .. } => "a whole number",
        Shape::Quantity => "an amount such as 250m or 128Mi",
        Shape::IntOrText => "a number or text",
        Shape::List(_) => "a list",
        Shape::Map(_) => "a map",
        Shape::Struct(_) => "a map of fields",
    }
}

fn value_noun(value: &Value) -> &'static str {
    match value {
        Value::List(_) => "a list",
        Value::Map(_) => "a map",
        Value::Scalar { meaning, .. } => meaning.noun(),
    }
}

fn list_words(words: &[String]) -> String {
    let shown: Vec<&str> = words.iter().map(String::as_str).filter(|w| !w.is_empty()).collect();
    match shown.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

fn placeholder(shape: &Shape) -> Json {
    match shape {
        Shape::Text => json!(""),
        Shape::Bool => json!(false),
        Shape::Int { min, .. } => json!((*min).max(0)),
        Shape::OneOf(words) => json!(words.first()),
        Shape::Quantity => json!("0"),
        Shape::IntOrText => json!(0),
        Shape::List(_) => json!([]),
        Shape::Map(_) => json!({}),
        Shape::Struct(name) => {
            let required = SHAPES.fields(name).iter().filter(|(_, f)| f.required);
            Json::Object(required.map(|(name, f)| (name.clone(), placeholder(&f.shape))).collect())
        }
    }
}
