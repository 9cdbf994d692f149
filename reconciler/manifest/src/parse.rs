//! Bytes of one file to objects and messages.

use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use std::borrow::Cow;

use crate::diagnostic::{Diagnostic, Severity};
use crate::known::{KINDS, KindState, KnownKind, kind_named, nearest};
use crate::object::{Kind, Object, ObjectKey, Origin};
use crate::report::{Path, Report};
use crate::tree::{NodeId, Span, Tree, Value};
use crate::walk::Walk;
use crate::{check, validate};

/// Largest file that is read. The API server's limit for one object is about the same; real manifests are a few KiB.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// What one file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// In the order of the file. Incomplete when there are errors.
    pub objects: Vec<Object>,
    /// Sorted by place.
    pub diagnostics: Vec<Diagnostic>,
    /// Every object that the file names, also those with errors.
    pub claims: Vec<ObjectKey>,
}

impl Parsed {
    /// A file that could not be read at all.
    pub fn unreadable(file: &str, message: impl Into<String>, help: Option<String>) -> Parsed {
        let diagnostics = vec![Diagnostic::about_file(file, message, help)];
        Parsed { diagnostics, ..Parsed::default() }
    }

    /// A file above [`MAX_FILE_BYTES`]; `size_bytes` when it is known.
    pub fn too_large(file: &str, size_bytes: Option<u64>) -> Parsed {
        let size = size_bytes.map_or_else(String::new, |s| format!(" ({s} bytes)"));
        let message = format!("the file is larger than {MAX_FILE_BYTES} bytes (1 MiB){size}");
        Parsed::unreadable(file, message, Some("split it, or move what is not a manifest elsewhere".into()))
    }

    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }
}

/// Reads one file: YAML with any number of documents, or JSON. All problems are found in one go.
pub fn parse(file: &str, text: &[u8]) -> Parsed {
    if text.len() > MAX_FILE_BYTES {
        return Parsed::too_large(file, Some(text.len() as u64));
    }
    let text = match std::str::from_utf8(text) {
        Ok(text) => text,
        Err(error) => return not_utf8(file, text, error.valid_up_to()),
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = as_yaml(text);
    let tree = Tree::read(&text);
    let mut report = Report::new(file, &text, &tree);
    let hide = text.contains("Secret");
    for problem in &tree.problems {
        report.yaml_problem(problem, hide);
    }
    let mut reader = Reader { report, objects: Vec::new(), claims: Vec::new() };
    for root in &tree.roots {
        reader.document(*root);
    }
    let Reader { report, objects, claims } = reader;
    let mut diagnostics = report.finish();
    let duplicates = check::duplicates(&objects);
    if !duplicates.is_empty() {
        diagnostics.extend(duplicates);
        diagnostics.sort();
    }
    Parsed { objects, diagnostics, claims }
}

struct Reader<'a> {
    report: Report<'a>,
    objects: Vec<Object>,
    claims: Vec<ObjectKey>,
}

impl<'a> Reader<'a> {
    fn document(&mut self, root: NodeId) {
        let tree = self.report.tree;
        if tree.is_null(root) {
            return;
        }
        self.object(root, root, &Path::Root, None);
    }

    /// One object at `id` inside the document `root`. `default_kind` is what a typed list holds.
    fn object(
        &mut self,
        root: NodeId,
        id: NodeId,
        path: &Path<'_>,
        default_kind: Option<&'static KnownKind>,
    ) {
        let tree = self.report.tree;
        self.report.begin(root, tree.text(id, "kind") == Some("Secret"));
        if self.report.is_full() {
            return;
        }
        if !matches!(tree.node(id).value, Value::Map(_)) {
            self.report.error_help(
                path,
                "a document must be a map of fields",
                "a manifest starts with apiVersion, kind and metadata",
            );
            return;
        }
        if let Some(item_kind) = self.list_kind(id) {
            self.list(root, id, path, item_kind);
            return;
        }
        let Some(kind) = self.kind(id, path, default_kind) else { return };
        self.claim(id, kind);
        match kind.state {
            KindState::Runs => {}
            KindState::NotYet => {
                let message = format!("kind {} of Kubernetes is not done yet", kind.kind);
                self.report.error_help(&path.key("kind"), message, "remove this document to run the others");
                return;
            }
            KindState::NoMeaning => {
                self.report.warn(
                    &path.key("kind"),
                    format!("kind {} has no effect on one host", kind.kind),
                    None,
                );
                return;
            }
        }
        self.api_version(id, path, kind, default_kind.is_some());
        let value = Walk { report: &mut self.report, root_type: kind.kind }.object(id, path);
        if let Some(object) = self.decode(kind.kind, value, id, path) {
            self.objects.push(object);
        }
    }

    /// `Some` for `List` and `PodList`: the kind of the items when the list says it.
    fn list_kind(&self, id: NodeId) -> Option<Option<&'static KnownKind>> {
        let item = self.report.tree.text(id, "kind")?.strip_suffix("List")?;
        if item.is_empty() { Some(None) } else { kind_named(item).map(Some) }
    }

    fn list(&mut self, root: NodeId, id: NodeId, path: &Path<'_>, item_kind: Option<&'static KnownKind>) {
        let tree = self.report.tree;
        let Value::Map(entries) = &tree.node(id).value else { return };
        for entry in entries {
            if !matches!(entry.key.as_str(), "apiVersion" | "kind" | "metadata" | "items") {
                let help =
                    nearest(&entry.key, ["items"].into_iter()).map(|n| format!("did you mean \"{n}\"?"));
                let message = format!("unknown field \"{}\"", entry.key);
                self.report.at_key(Severity::Error, &path.key(&entry.key), entry, message, help);
            }
        }
        let items_path = path.key("items");
        match tree.entry(id, "items").map(|e| &tree.node(e.value).value) {
            Some(Value::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.object(root, *item, &items_path.index(index), item_kind);
                }
            }
            Some(Value::Scalar { meaning: crate::scalar::Scalar::Null, .. }) => {}
            Some(_) => self.report.error(&items_path, "must be a list"),
            None => self.report.error(&items_path, "field \"items\" is missing"),
        }
    }

    fn kind(
        &mut self,
        id: NodeId,
        path: &Path<'_>,
        default_kind: Option<&'static KnownKind>,
    ) -> Option<&'static KnownKind> {
        let tree = self.report.tree;
        let here = path.key("kind");
        let Some(entry) = tree.entry(id, "kind").filter(|e| !tree.is_null(e.value)) else {
            if default_kind.is_none() {
                self.report.error_help(&here, "field \"kind\" is missing", "for example: kind: Pod");
            }
            return default_kind;
        };
        let Value::Scalar { text, .. } = &tree.node(entry.value).value else {
            self.report.error(&here, "must be text");
            return None;
        };
        let known = kind_named(text);
        if known.is_none() {
            let near = nearest(text, KINDS.iter().map(|k| k.kind).chain(["List"]));
            let message = format!("unknown kind \"{text}\"");
            match near {
                Some(near) => self.report.error_help(&here, message, format!("did you mean {near}?")),
                None => self.report.error_help(
                    &here,
                    message,
                    format!("kinds that run: {}, List", crate::kinds().join(", ")),
                ),
            }
        }
        known
    }

    fn api_version(&mut self, id: NodeId, path: &Path<'_>, kind: &KnownKind, optional: bool) {
        let tree = self.report.tree;
        let here = path.key("apiVersion");
        let help = format!("write apiVersion: {}", kind.api_version);
        match tree.entry(id, "apiVersion").map(|e| &tree.node(e.value).value) {
            Some(Value::Scalar { text, .. }) if text == kind.api_version => {}
            Some(Value::Scalar { text, .. }) if !text.is_empty() => {
                let message = format!("apiVersion \"{text}\" has no kind {}", kind.kind);
                self.report.error_help(&here, message, help);
            }
            None if optional => {}
            _ => self.report.error_help(&here, "field \"apiVersion\" is missing", help),
        }
    }

    fn claim(&mut self, id: NodeId, kind: &KnownKind) {
        let tree = self.report.tree;
        let Some(metadata) = tree.entry(id, "metadata").map(|e| e.value) else { return };
        if kind.state == KindState::Runs
            && let Some(name) = tree.text(metadata, "name")
        {
            self.claims.push(ObjectKey {
                kind: kind.kind.to_owned(),
                namespace: tree.text(metadata, "namespace").unwrap_or("default").to_owned(),
                name: name.to_owned(),
            });
        }
    }

    fn decode(&mut self, kind: &str, value: Json, id: NodeId, path: &Path<'_>) -> Option<Object> {
        let kind = match kind {
            "Pod" => Kind::Pod(self.typed(value, path)?),
            "Deployment" => Kind::Deployment(self.typed(value, path)?),
            "ConfigMap" => Kind::ConfigMap(self.typed(value, path)?),
            "Secret" => Kind::Secret(self.typed(value, path)?),
            _ => return None,
        };
        validate::object(&mut self.report, &kind, path);
        let span = self.start(id);
        let origin = Origin { file: self.report.file.to_owned(), line: span.line, column: span.column };
        let mut object = Object::new(origin, kind);
        let mut places = vec![self.report.place(&path.key("metadata").key("name"))];
        check::visit(&object.kind, path, &mut |here, _| places.push(self.report.place(here)));
        object.places = places.into();
        Some(object)
    }

    fn typed<T: DeserializeOwned>(&mut self, value: Json, path: &Path<'_>) -> Option<T> {
        match serde_json::from_value(value) {
            Ok(typed) => Some(typed),
            Err(error) => {
                self.report.error(path, format!("cannot be read: {error}"));
                None
            }
        }
    }

    fn start(&self, id: NodeId) -> Span {
        match &self.report.tree.node(id).value {
            Value::Map(entries) => entries.first().map_or(self.report.tree.node(id).span, |e| e.key_span),
            Value::List(_) | Value::Scalar { .. } => self.report.tree.node(id).span,
        }
    }
}

/// JSON that YAML would read otherwise: tabs as indentation, and characters above U+FFFF written as two escapes.
fn as_yaml(text: &str) -> Cow<'_, str> {
    let is_json = text.trim_start().starts_with(['{', '[']);
    if !is_json || !(text.contains('\t') || text.contains("\\ud") || text.contains("\\uD")) {
        return Cow::Borrowed(text);
    }
    let text = text.replace('\t', " ");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let taken = match surrogate_pair(rest) {
            Some(character) => {
                out.push(character);
                12
            }
            None => {
                let taken = rest.char_indices().nth(2).map_or(rest.len(), |(i, _)| i);
                out.push_str(&rest[..taken]);
                taken
            }
        };
        rest = &rest[taken..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The character of `\uD83D\uDE00` at the start of a text.
fn surrogate_pair(text: &str) -> Option<char> {
    let unit = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    char::decode_utf16([unit(0)?, unit(6)?]).next()?.ok().filter(|c| *c > '\u{ffff}')
}

fn not_utf8(file: &str, text: &[u8], valid: usize) -> Parsed {
    let before = &text[..valid];
    let line_start = before.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
    let help = match text {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "the file looks like UTF-16; save it as UTF-8",
        _ if text.contains(&0) => "the file looks binary; move it out of the manifest directory",
        _ => "save the file as UTF-8",
    };
    let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let message = format!("byte 0x{:02x} is not valid UTF-8", text[valid]);
    let diagnostic = Diagnostic {
        line: clamp(line),
        column: clamp(column),
        ..Diagnostic::about_file(file, message, Some(help.into()))
    };
    Parsed { diagnostics: vec![diagnostic], ..Parsed::default() }
}
