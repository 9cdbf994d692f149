//! Manifests and what is said about them.

use std::fmt::Write as _;

use crate::{Parsed, parse};

const CASES: &str = include_str!("../cases.txt");

fn describe(parsed: &Parsed) -> String {
    let mut out = String::new();
    for d in &parsed.diagnostics {
        let path = if d.path.is_empty() { String::new() } else { format!(" {}", d.path) };
        write!(out, "{}:{} {}{path}: {}", d.line, d.column, d.severity.word(), d.message).unwrap();
        if let Some(related) = &d.related {
            write!(out, " | {} {}:{}", related.message, related.line, related.column).unwrap();
        }
        if let Some(help) = &d.help {
            write!(out, " | {help}").unwrap();
        }
        out.push('\n');
    }
    out
}

/// (name, manifest, answer) of each case.
fn cases() -> Vec<(&'static str, &'static str, &'static str)> {
    CASES
        .split("\n==== ")
        .skip(1)
        .map(|case| {
            let (name, rest) = case.split_once('\n').unwrap();
            let (manifest, answer) = rest.split_once("----").unwrap();
            (name, manifest, answer.strip_prefix('\n').unwrap_or(answer))
        })
        .collect()
}

#[test]
fn every_case_is_answered_as_written() {
    let mut blessed = CASES.split("\n==== ").next().unwrap().to_owned();
    let mut wrong = Vec::new();
    for (name, manifest, answer) in cases() {
        let found = describe(&parse("f.yaml", manifest.as_bytes()));
        if found.trim_end() != answer.trim_end() {
            wrong.push(format!("==== {name}\n-- expected\n{answer}\n-- found\n{found}"));
        }
        write!(blessed, "\n==== {name}\n{manifest}----\n{found}").unwrap();
        blessed.truncate(blessed.trim_end().len());
    }
    if std::env::var_os("KEEL_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/cases.txt"), blessed + "\n").unwrap();
    } else {
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
    assert!(cases().len() >= 80, "only {} cases", cases().len());
}
