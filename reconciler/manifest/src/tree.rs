//! YAML text as a tree in which every key and value knows its place.
//!
//! Aliases share nodes, so a "billion laughs" file stays as small as its text; what it would expand to is counted
//! and refused before anything walks over it. `<<` is resolved here.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span as YamlSpan};

use crate::report::MAX_PROBLEMS;
use crate::scalar::{Scalar, resolve_plain};

/// Nesting that is refused. Kubernetes objects nest about twelve deep; walks recurse as deep as this.
pub(crate) const MAX_DEPTH: usize = 64;
/// Values in one document, aliases expanded. A file of the largest size holds fewer when it has real content.
pub(crate) const MAX_VALUES: u64 = 200_000;

/// Lines and columns count from 1; columns are characters. `end` is exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub line: u32,
    pub column: u32,
    pub end_line: u32,
    pub end_column: u32,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub span: Span,
    pub value: Value,
    /// The text was quoted or a block.
    pub quoted: bool,
    /// This node and all below it, aliases expanded.
    weight: u64,
}

#[derive(Debug)]
pub(crate) enum Value {
    Scalar { text: String, meaning: Scalar },
    List(Vec<NodeId>),
    Map(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub key: String,
    pub key_span: Span,
    /// The key's text is not what kubectl reads, e.g. `yes` is "true": the text as written.
    pub written_key: Option<String>,
    pub value: NodeId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeId(u32);

/// All documents of a file.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    pub roots: Vec<NodeId>,
    pub problems: Vec<TreeProblem>,
}

/// Something wrong with the YAML itself.
#[derive(Debug)]
pub(crate) struct TreeProblem {
    pub span: Span,
    pub message: String,
    pub help: Option<String>,
    /// An earlier place that it is about.
    pub earlier: Option<Span>,
}

impl Tree {
    /// Reads all documents. After a syntax error it goes on with the next `---`.
    pub(crate) fn read(text: &str) -> Tree {
        let mut tree = Tree::default();
        let mut rest = text;
        let mut lines_before = 0;
        while let Err(fatal) = Builder::new(&mut tree, lines_before).run(rest) {
            let failed_line = fatal.span.line;
            tree.note(fatal);
            if tree.problems.len() > MAX_PROBLEMS {
                break;
            }
            match next_document(text, failed_line, lines_before) {
                Some((line, at)) => (rest, lines_before) = (&text[at..], line - 1),
                None => break,
            }
        }
        tree.explain_templates(text);
        tree
    }

    /// One more than is shown is kept, so that the reader can say that there are more.
    fn note(&mut self, problem: TreeProblem) {
        if self.problems.len() <= MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }

    /// `{{ ... }}` is valid YAML for something else; the messages about it mislead.
    fn explain_templates(&mut self, text: &str) {
        for problem in &mut self.problems {
            let line = text.split('\n').nth((problem.span.line as usize).wrapping_sub(1)).unwrap_or("");
            if line.contains("{{") {
                problem.help = Some("this looks like a template; render it first".into());
            }
        }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(crate) fn entry(&self, id: NodeId, key: &str) -> Option<&Entry> {
        match &self.node(id).value {
            Value::Map(entries) => entries.iter().find(|e| e.key == key),
            Value::List(_) | Value::Scalar { .. } => None,
        }
    }

    /// The text under a key, when it is text.
    pub(crate) fn text(&self, id: NodeId, key: &str) -> Option<&str> {
        match &self.node(self.entry(id, key)?.value).value {
            Value::Scalar { text, meaning: Scalar::Text } => Some(text),
            Value::Scalar { .. } | Value::List(_) | Value::Map(_) => None,
        }
    }

    pub(crate) fn is_null(&self, id: NodeId) -> bool {
        matches!(self.node(id).value, Value::Scalar { meaning: Scalar::Null, .. })
    }
}

/// First line from `line` (counted from 1) that starts a document, after the one that was begun with: (line, byte
/// offset). The failing line itself may be the start that came too early.
fn next_document(text: &str, line: u32, lines_before: u32) -> Option<(u32, usize)> {
    let mut at = 0;
    for (number, content) in (1u32..).zip(text.split_inclusive('\n')) {
        let is_later = number >= line && number > lines_before + 1;
        if is_later
            && content.strip_prefix("---").is_some_and(|r| r.is_empty() || r.starts_with([' ', '\n', '\r']))
        {
            return Some((number, at));
        }
        at += content.len();
    }
    None
}

/// An open list or map.
struct Open {
    id: NodeId,
    anchor: usize,
    /// The key that waits for its value.
    key: Option<Key>,
    map: bool,
    entries: Vec<Entry>,
    /// Place of each key: a map may have very many.
    seen: BTreeMap<String, Span>,
    items: Vec<NodeId>,
    merges: Vec<(NodeId, Span)>,
}

struct Key {
    text: String,
    span: Span,
    written: Option<String>,
    merge: bool,
}

struct Builder<'t> {
    tree: &'t mut Tree,
    lines_before: u32,
    open: Vec<Open>,
    anchors: BTreeMap<usize, NodeId>,
    /// Nodes of the current document; the tree's own nodes are bounded by it too.
    values: u64,
}

impl<'t> Builder<'t> {
    fn new(tree: &'t mut Tree, lines_before: u32) -> Self {
        Builder { tree, lines_before, open: Vec::new(), anchors: BTreeMap::new(), values: 0 }
    }

    fn run(mut self, text: &str) -> Result<(), TreeProblem> {
        for event in Parser::new_from_str(text) {
            let (event, span) = event.map_err(|e| self.syntax(e.marker(), e.info(), text))?;
            let span = self.span(span);
            match event {
                Event::DocumentStart(_) => self.values = 0,
                Event::Scalar(text, style, anchor, tag) => {
                    let quoted = style != ScalarStyle::Plain;
                    let tag = tag.as_deref().map(|t| (t.handle.as_str(), t.suffix.as_str()));
                    let meaning = self.meaning(&text, quoted, tag, span);
                    let value = Value::Scalar { text: text.into_owned(), meaning };
                    let id = self.add(Node { span, value, quoted, weight: 1 })?;
                    self.anchor(anchor, id);
                    self.place(id, span)?;
                }
                Event::Alias(anchor) => {
                    let Some(&id) = self.anchors.get(&anchor) else {
                        return Err(problem(span, "this alias refers to the value that it is part of"));
                    };
                    self.values = self.values.saturating_add(self.tree.node(id).weight);
                    self.bound(span)?;
                    self.place(id, span)?;
                }
                Event::SequenceStart(anchor, tag) => self.begin(false, anchor, tag.is_some(), span)?,
                Event::MappingStart(anchor, tag) => self.begin(true, anchor, tag.is_some(), span)?,
                Event::SequenceEnd | Event::MappingEnd => self.end(span)?,
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            }
        }
        Ok(())
    }

    fn begin(&mut self, map: bool, anchor: usize, tagged: bool, span: Span) -> Result<(), TreeProblem> {
        if self.open.len() >= MAX_DEPTH {
            return Err(problem(span, &format!("nested deeper than {MAX_DEPTH} levels")));
        }
        if tagged {
            self.tree.note(problem(span, "tags have no meaning in a manifest"));
        }
        let value = if map { Value::Map(Vec::new()) } else { Value::List(Vec::new()) };
        let id = self.add(Node { span, value, quoted: false, weight: 1 })?;
        self.open.push(Open {
            id,
            anchor,
            key: None,
            map,
            entries: Vec::new(),
            seen: BTreeMap::new(),
            items: Vec::new(),
            merges: Vec::new(),
        });
        Ok(())
    }

    fn end(&mut self, span: Span) -> Result<(), TreeProblem> {
        let Some(mut open) = self.open.pop() else { return Ok(()) };
        for (from, at) in std::mem::take(&mut open.merges) {
            self.merge(&mut open, from, at)?;
        }
        let children = open.items.iter().copied().chain(open.entries.iter().map(|e| e.value));
        let weight = children.map(|c| self.tree.node(c).weight).fold(1u64, u64::saturating_add);
        let node = &mut self.tree.nodes[open.id.0 as usize];
        node.weight = weight;
        node.value = if open.map { Value::Map(open.entries) } else { Value::List(open.items) };
        if weight > MAX_VALUES {
            return Err(too_many(node.span));
        }
        let start = node.span;
        self.anchor(open.anchor, open.id);
        self.place(open.id, Span { end_line: span.line, end_column: span.column, ..start })
    }

    /// Adds what a `<<` brings, unless the map has the key itself.
    fn merge(&mut self, open: &mut Open, from: NodeId, at: Span) -> Result<(), TreeProblem> {
        let sources: Vec<NodeId> = match &self.tree.node(from).value {
            Value::List(items) => items.clone(),
            Value::Map(_) | Value::Scalar { .. } => vec![from],
        };
        for source in sources {
            let Value::Map(brought) = &self.tree.node(source).value else {
                let message = "\"<<\" takes a map or a list of maps, usually an alias such as *defaults";
                self.tree.note(problem(at, message));
                return Ok(());
            };
            self.values = self.values.saturating_add(brought.len() as u64);
            self.bound(at)?;
            for entry in brought {
                if !open.seen.contains_key(&entry.key) {
                    open.seen.insert(entry.key.clone(), entry.key_span);
                    open.entries.push(entry.clone());
                }
            }
        }
        Ok(())
    }

    /// Puts a finished value where it belongs: under the waiting key, as a key, into the list, or as a document.
    fn place(&mut self, id: NodeId, span: Span) -> Result<(), TreeProblem> {
        let Some(open) = self.open.last_mut() else {
            self.tree.roots.push(id);
            return Ok(());
        };
        if !open.map {
            open.items.push(id);
            return Ok(());
        }
        let Some(key) = open.key.take() else {
            let key = read_key(self.tree.node(id), span)?;
            open.key = Some(key);
            return Ok(());
        };
        if key.merge {
            open.merges.push((id, span));
            return Ok(());
        }
        if let Some(&first) = open.seen.get(&key.text) {
            self.tree.note(TreeProblem {
                span: key.span,
                message: format!("key \"{}\" is given twice", key.text),
                help: Some(format!("the first is at line {}, column {}", first.line, first.column)),
                earlier: Some(first),
            });
            return Ok(());
        }
        open.seen.insert(key.text.clone(), key.span);
        open.entries.push(Entry { key: key.text, key_span: key.span, written_key: key.written, value: id });
        Ok(())
    }

    fn add(&mut self, node: Node) -> Result<NodeId, TreeProblem> {
        self.values = self.values.saturating_add(1);
        self.bound(node.span)?;
        let id = NodeId(u32::try_from(self.tree.nodes.len()).map_err(|_| too_many(node.span))?);
        self.tree.nodes.push(node);
        Ok(id)
    }

    fn bound(&self, span: Span) -> Result<(), TreeProblem> {
        if self.values > MAX_VALUES { Err(too_many(span)) } else { Ok(()) }
    }

    fn anchor(&mut self, anchor: usize, id: NodeId) {
        if anchor > 0 {
            self.anchors.insert(anchor, id);
        }
    }

    fn meaning(&mut self, text: &str, quoted: bool, tag: Option<(&str, &str)>, span: Span) -> Scalar {
        match tag {
            None if quoted => Scalar::Text,
            None => resolve_plain(text),
            Some(("tag:yaml.org,2002:" | "!!", "str")) | Some(("" | "!", "")) => Scalar::Text,
            Some(("tag:yaml.org,2002:" | "!!", "int" | "float" | "bool" | "null")) => resolve_plain(text),
            Some((handle, suffix)) => {
                let handle = if handle == "tag:yaml.org,2002:" { "!!" } else { handle };
                self.tree
                    .problems
                    .push(problem(span, &format!("tag \"{handle}{suffix}\" has no meaning in a manifest")));
                Scalar::Text
            }
        }
    }

    fn span(&self, span: YamlSpan) -> Span {
        let start = self.place_of(&span.start);
        let end = self.place_of(&span.end);
        Span { line: start.0, column: start.1, end_line: end.0, end_column: end.1 }
    }

    fn place_of(&self, marker: &Marker) -> (u32, u32) {
        let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        (clamp(marker.line()).saturating_add(self.lines_before), clamp(marker.col()).saturating_add(1))
    }

    fn syntax(&self, marker: &Marker, info: &str, text: &str) -> TreeProblem {
        let (mut line, mut column) = self.place_of(marker);
        let lines = || text.split('\n');
        let mut content = lines().nth(marker.line().saturating_sub(1));
        if content.is_none() {
            // The end of a text without a line end counts as one line further.
            let last = lines().next_back().unwrap_or("");
            let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            line = clamp(lines().count()).saturating_add(self.lines_before);
            column = clamp(last.chars().count()).saturating_add(1);
            content = Some(last);
        }
        let span = Span { line, column, end_line: line, end_column: column.saturating_add(1) };
        let mut found = problem(span, &format!("not valid YAML: {info}"));
        found.help = syntax_help(info, content.unwrap_or(""));
        found
    }
}

fn read_key(node: &Node, span: Span) -> Result<Key, TreeProblem> {
    let Value::Scalar { text, meaning } = &node.value else {
        return Err(problem(span, "a key must be text, not a list or map"));
    };
    let read = match meaning {
        Scalar::Text => text.clone(),
        Scalar::Bool(value) => value.to_string(),
        Scalar::Int(value) => value.to_string(),
        Scalar::Float(value) => value.to_string(),
        Scalar::Null => return Err(problem(span, "a key must not be empty")),
    };
    Ok(Key {
        merge: !node.quoted && text == "<<",
        written: (read != *text).then(|| text.clone()),
        text: read,
        span,
    })
}

fn syntax_help(info: &str, line: &str) -> Option<String> {
    let indent: &str = &line[..line.len() - line.trim_start().len()];
    if indent.contains('\t') || info.contains("tab") {
        return Some("YAML is indented with spaces; replace the tab".into());
    }
    if info.contains("mapping values are not allowed") {
        return Some("quote the text when it contains \": \", or check the indentation".into());
    }
    if info.contains("did not find expected") {
        return Some("check the indentation of this line against the lines above".into());
    }
    if info.contains("unknown anchor") {
        return Some("an alias (*name) needs an anchor (&name) above it in the same document; quote text that starts with *".into());
    }
    if info.contains("quoted scalar") {
        return Some("a closing quote is missing, or a backslash needs doubling".into());
    }
    None
}

fn problem(span: Span, message: &str) -> TreeProblem {
    TreeProblem { span, message: message.to_owned(), help: None, earlier: None }
}

fn too_many(span: Span) -> TreeProblem {
    TreeProblem {
        help: Some("aliases inside aliases multiply; write the values out or split the document".into()),
        ..problem(span, &format!("the document expands to more than {MAX_VALUES} values"))
    }
}
