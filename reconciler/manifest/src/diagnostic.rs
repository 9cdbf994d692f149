//! Messages about manifests, each with its place and the line it is about.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Longest source line that is shown; the rest is cut around the marker.
const MAX_SHOWN_COLUMNS: usize = 160;

/// How bad it is. An error holds the whole file back, a warning does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    Error,
    Warning,
}

/// One message. Orders by place. Lines and columns count from 1, 0 is "the file as a whole"; columns are characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Diagnostic {
    pub file: String,
    pub line: u32,
    pub column: u32,
    pub severity: Severity,
    /// Field path such as `spec.containers[0].image`; empty for the document or file as a whole.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub path: String,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub help: Option<String>,
    /// Characters to mark, at least 1.
    pub width: u32,
    /// The line as written; what may be secret is replaced.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub source_line: String,
    /// The other place that the message is about.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub related: Option<Related>,
}

/// Another place that a message is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Related {
    pub file: String,
    pub line: u32,
    pub column: u32,
    pub message: String,
}

impl Diagnostic {
    /// A message about a file as a whole.
    pub fn about_file(file: &str, message: impl Into<String>, help: Option<String>) -> Self {
        Diagnostic {
            file: file.to_owned(),
            line: 0,
            column: 0,
            severity: Severity::Error,
            path: String::new(),
            message: message.into(),
            help,
            width: 1,
            source_line: String::new(),
            related: None,
        }
    }

    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// `file:line:column`, as editors and terminals know it.
    pub fn place(&self) -> String {
        if self.line == 0 {
            self.file.clone()
        } else {
            format!("{}:{}:{}", self.file, self.line, self.column)
        }
    }

    /// `file:line:column: error: message (path)`, for logs and conditions.
    pub fn one_line(&self) -> String {
        let path = if self.path.is_empty() { String::new() } else { format!(" ({})", self.path) };
        format!("{}: {}: {}{path}", self.place(), self.severity.word(), self.message)
    }

    /// Several lines for people: message, place, source line with marker, help. Ends with a newline.
    pub fn render(&self, color: bool) -> String {
        let paint = |code: &'static str| if color { code } else { "" };
        let (strong, off, faint) = (paint("\x1b[1m"), paint("\x1b[0m"), paint("\x1b[34m"));
        let tone = paint(match self.severity {
            Severity::Error => "\x1b[1;31m",
            Severity::Warning => "\x1b[1;33m",
        });
        let mut out = format!("{tone}{}{off}{strong}: {}{off}\n", self.severity.word(), self.message);
        let gutter = self.line.to_string().len();
        let pad = " ".repeat(gutter);
        let path = if self.path.is_empty() { String::new() } else { format!("  {}", self.path) };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{pad}{faint}-->{off} {}{path}", self.place());
        if !self.source_line.is_empty() {
            let (shown, column) = window(&self.source_line, self.column as usize);
            let room = shown.chars().count().saturating_sub(column - 1).max(1);
            let marker = "^".repeat((self.width as usize).clamp(1, room));
            let _ = writeln!(out, "{pad} {faint}|{off}");
            let _ = writeln!(out, "{faint}{} |{off} {shown}", self.line);
            let _ = writeln!(out, "{pad} {faint}|{off} {}{tone}{marker}{off}", " ".repeat(column - 1));
        }
        if let Some(related) = &self.related {
            let _ = writeln!(
                out,
                "{pad} {faint}={off} {}: {}:{}:{}",
                related.message, related.file, related.line, related.column
            );
        }
        if let Some(help) = &self.help {
            let _ = writeln!(out, "{pad} {faint}={off} hint: {help}");
        }
        out
    }
}

impl Severity {
    pub fn word(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }
}

/// The part of a line to show, control characters replaced, and the marker's column in it.
fn window(line: &str, column: usize) -> (String, usize) {
    let shown = |c: char| {
        if c == '\t' {
            ' '
        } else if c.is_control() {
            '\u{fffd}'
        } else {
            c
        }
    };
    let column = column.max(1);
    let total = line.chars().count();
    if total <= MAX_SHOWN_COLUMNS {
        return (line.chars().map(shown).collect(), column.min(total + 1));
    }
    let start = column.saturating_sub(MAX_SHOWN_COLUMNS / 2).min(total - MAX_SHOWN_COLUMNS);
    let part = line.chars().skip(start).take(MAX_SHOWN_COLUMNS).map(shown).collect();
    (part, (column - start).min(MAX_SHOWN_COLUMNS))
}
