//! Collects the problems of one file and finds the place of each.

use crate::diagnostic::{Diagnostic, Related, Severity};
use crate::object::Place;
use crate::tree::{Entry, NodeId, Span, Tree, TreeProblem, Value};

/// Problems of one file that are shown. A file that is not a manifest at all has thousands.
pub(crate) const MAX_PROBLEMS: usize = 100;

/// Way from a document's root to a value. Built on the stack while walking; costs nothing until a problem is found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Path<'p> {
    Root,
    Key(&'p Path<'p>, &'p str),
    Index(&'p Path<'p>, usize),
}

impl Path<'_> {
    pub(crate) fn key<'q>(&'q self, key: &'q str) -> Path<'q> {
        Path::Key(self, key)
    }

    pub(crate) fn index(&self, index: usize) -> Path<'_> {
        Path::Index(self, index)
    }

    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        match self {
            Path::Root => {}
            Path::Key(parent, key) => {
                parent.write(out);
                if key.contains(['.', '[', ']']) {
                    out.push_str(&format!("[\"{key}\"]"));
                } else {
                    if !out.is_empty() {
                        out.push('.');
                    }
                    out.push_str(key);
                }
            }
            Path::Index(parent, index) => {
                parent.write(out);
                out.push_str(&format!("[{index}]"));
            }
        }
    }

    fn steps(&self) -> Vec<Path<'_>> {
        let mut steps = match self {
            Path::Root => return Vec::new(),
            Path::Key(parent, _) | Path::Index(parent, _) => parent.steps(),
        };
        steps.push(*self);
        steps
    }
}

pub(crate) struct Report<'a> {
    pub(crate) file: &'a str,
    pub(crate) tree: &'a Tree,
    lines: Vec<&'a str>,
    root: Option<NodeId>,
    /// Paths that already have a problem; what is below them would only repeat it.
    covered: Vec<String>,
    /// Values below `data` and `stringData` are secret.
    secret: bool,
    diagnostics: Vec<Diagnostic>,
    left_out: usize,
}

impl<'a> Report<'a> {
    pub(crate) fn new(file: &'a str, text: &'a str, tree: &'a Tree) -> Self {
        Report {
            file,
            tree,
            lines: text.split('\n').map(|l| l.strip_suffix('\r').unwrap_or(l)).collect(),
            root: None,
            covered: Vec::new(),
            secret: false,
            diagnostics: Vec::new(),
            left_out: 0,
        }
    }

    /// Starts a document, or an item of a list in it.
    pub(crate) fn begin(&mut self, root: NodeId, secret: bool) {
        self.root = Some(root);
        self.secret = secret;
        self.covered.clear();
    }

    pub(crate) fn is_full(&self) -> bool {
        self.left_out > 0
    }

    pub(crate) fn error(&mut self, path: &Path<'_>, message: impl Into<String>) {
        self.add(Severity::Error, path, None, message.into(), None);
    }

    pub(crate) fn error_help(
        &mut self,
        path: &Path<'_>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.add(Severity::Error, path, None, message.into(), Some(help.into()));
    }

    /// About the key at the end of the path, not its value.
    pub(crate) fn error_key(&mut self, path: &Path<'_>, message: impl Into<String>, help: impl Into<String>) {
        let key_span = match path {
            Path::Key(parent, key) => {
                self.node_at(parent).and_then(|id| self.tree.entry(id, key)).map(|entry| entry.key_span)
            }
            Path::Root | Path::Index(..) => None,
        };
        self.add(Severity::Error, path, key_span, message.into(), Some(help.into()));
    }

    pub(crate) fn is_covered(&self, path: &Path<'_>) -> bool {
        let rendered = path.render();
        self.covered.iter().any(|c| is_below(&rendered, c))
    }

    pub(crate) fn warn(&mut self, path: &Path<'_>, message: impl Into<String>, help: Option<String>) {
        self.add(Severity::Warning, path, None, message.into(), help);
    }

    /// About the key of an entry, not its value.
    pub(crate) fn at_key(
        &mut self,
        severity: Severity,
        path: &Path<'_>,
        entry: &Entry,
        message: impl Into<String>,
        help: Option<String>,
    ) {
        self.add(severity, path, Some(entry.key_span), message.into(), help);
    }

    /// An error after which nothing at or below the path is worth saying.
    pub(crate) fn cover(&mut self, path: &Path<'_>) {
        self.covered.push(path.render());
    }

    pub(crate) fn yaml_problem(&mut self, problem: &TreeProblem, hide: bool) {
        let line = self.line(problem.span.line);
        let source_line = if hide { hidden(line) } else { line.to_owned() };
        let related = problem.earlier.map(|earlier| Related {
            file: self.file.to_owned(),
            line: earlier.line,
            column: earlier.column,
            message: "first given here".into(),
        });
        self.push(Diagnostic {
            severity: Severity::Error,
            line: problem.span.line,
            column: problem.span.column,
            width: width(problem.span, line),
            path: String::new(),
            message: problem.message.clone(),
            // The related place says it already.
            help: problem.help.clone().filter(|_| related.is_none()),
            file: self.file.to_owned(),
            source_line,
            related,
        });
    }

    pub(crate) fn finish(mut self) -> Vec<Diagnostic> {
        if self.left_out > 0 {
            let message = format!("and {} more problems or more", self.left_out);
            self.diagnostics
                .push(Diagnostic { line: u32::MAX, ..Diagnostic::about_file(self.file, message, None) });
        }
        self.diagnostics.sort();
        if let Some(last) = self.diagnostics.last_mut().filter(|d| d.line == u32::MAX) {
            last.line = 0;
        }
        self.diagnostics.dedup();
        self.diagnostics
    }

    /// Whether the map at a path has fields besides these.
    pub(crate) fn has_other_fields(&self, path: &Path<'_>, known: &[&str]) -> bool {
        let Some(id) = self.node_at(path) else { return false };
        match &self.tree.node(id).value {
            Value::Map(entries) => entries.iter().any(|e| !known.contains(&e.key.as_str())),
            Value::List(_) | Value::Scalar { .. } => false,
        }
    }

    pub(crate) fn has_field(&self, path: &Path<'_>, field: &str) -> bool {
        self.node_at(path).is_some_and(|id| self.tree.entry(id, field).is_some())
    }

    fn node_at(&self, path: &Path<'_>) -> Option<NodeId> {
        path.steps().into_iter().try_fold(self.root?, |node, step| {
            match (step, &self.tree.node(node).value) {
                (Path::Key(_, key), Value::Map(_)) => self.tree.entry(node, key).map(|e| e.value),
                (Path::Index(_, index), Value::List(items)) => items.get(index).copied(),
                _ => None,
            }
        })
    }

    /// Where a path is, for messages that are made later.
    pub(crate) fn place(&self, path: &Path<'_>) -> Place {
        let span = self.locate(path);
        let line = self.line(span.line);
        Place {
            line: span.line,
            column: span.column,
            width: width(span, line),
            path: path.render(),
            source_line: line.to_owned(),
        }
    }

    fn add(
        &mut self,
        severity: Severity,
        path: &Path<'_>,
        at: Option<Span>,
        message: String,
        help: Option<String>,
    ) {
        let rendered = path.render();
        if self.covered.iter().any(|c| is_below(&rendered, c)) {
            return;
        }
        let span = at.unwrap_or_else(|| self.locate(path));
        let line = self.line(span.line);
        let is_secret =
            self.secret && path.steps().iter().any(|s| matches!(s, Path::Key(_, "data" | "stringData")));
        let source_line = if is_secret { hidden(line) } else { line.to_owned() };
        self.push(Diagnostic {
            file: self.file.to_owned(),
            line: span.line,
            column: span.column,
            width: width(span, line),
            path: rendered,
            severity,
            message,
            help,
            source_line,
            related: None,
        });
    }

    fn push(&mut self, mut diagnostic: Diagnostic) {
        // What is missing at the very end of a text is one line further for the parser.
        if let Some(last) = self.lines.last().filter(|_| diagnostic.line as usize > self.lines.len()) {
            diagnostic.line = u32::try_from(self.lines.len()).unwrap_or(u32::MAX);
            diagnostic.column = u32::try_from(last.chars().count() + 1).unwrap_or(u32::MAX);
        }
        if self.diagnostics.len() < MAX_PROBLEMS {
            self.diagnostics.push(diagnostic);
        } else {
            self.left_out += 1;
        }
    }

    fn line(&self, number: u32) -> &'a str {
        self.lines.get((number as usize).wrapping_sub(1)).copied().unwrap_or("")
    }

    /// The token that stands for a path: a scalar itself, the key of a list or map, the nearest parent's key when the
    /// field is absent.
    fn locate(&self, path: &Path<'_>) -> Span {
        let Some(mut node) = self.root else { return Span::default() };
        let mut span = self.first_token(node);
        for step in path.steps() {
            let next = match (step, &self.tree.node(node).value) {
                (Path::Key(_, key), Value::Map(_)) => {
                    self.tree.entry(node, key).map(|e| (e.value, e.key_span))
                }
                (Path::Index(_, index), Value::List(items)) => {
                    items.get(index).map(|item| (*item, self.first_token(*item)))
                }
                _ => None,
            };
            let Some((child, place)) = next else { return span };
            (node, span) = (child, place);
        }
        let found = self.tree.node(node);
        // The parser puts an empty block at the end of the text one line further.
        let is_inside = found.span.line as usize <= self.lines.len();
        let is_shown = matches!(found.value, Value::Scalar { .. })
            && found.span.line == found.span.end_line
            && is_inside;
        let is_empty = found.span.column == found.span.end_column;
        if is_shown && !is_empty { found.span } else { span }
    }

    fn first_token(&self, id: NodeId) -> Span {
        let node = self.tree.node(id);
        match &node.value {
            Value::Map(entries) => entries.first().map_or(node.span, |e| e.key_span),
            Value::List(_) | Value::Scalar { .. } => node.span,
        }
    }
}

fn is_below(path: &str, covered: &str) -> bool {
    path.strip_prefix(covered)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']) || covered.is_empty())
}

fn width(span: Span, line: &str) -> u32 {
    let end = if span.end_line == span.line {
        span.end_column
    } else {
        u32::try_from(line.trim_end().chars().count() + 1).unwrap_or(u32::MAX)
    };
    end.saturating_sub(span.column).max(1)
}

/// Only the key of a line stays.
fn hidden(line: &str) -> String {
    match line.split_once(':') {
        Some((key, _)) => format!("{key}: (hidden)"),
        None => "(hidden)".into(),
    }
}
