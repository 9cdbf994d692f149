//! Label selectors: `a=b,c!=d,e in (x,y),f notin (z),g,!h`.

use std::collections::BTreeMap;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selector(Vec<Rule>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    Missing,
    In(Vec<String>),
    NotIn(Vec<String>),
}

impl Selector {
    pub(crate) fn parse(text: &str) -> Result<Selector, String> {
        split(text)
            .into_iter()
            .filter(|part| !part.trim().is_empty())
            .map(rule)
            .collect::<Result<_, _>>()
            .map(Selector)
    }

    pub(crate) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|Rule { key, test }| match (test, labels.get(key)) {
            (Test::Exists, value) => value.is_some(),
            (Test::Missing, value) => value.is_none(),
            (Test::In(wanted), value) => value.is_some_and(|value| wanted.contains(value)),
            (Test::NotIn(unwanted), value) => value.is_none_or(|value| !unwanted.contains(value)),
        })
    }
}

/// At commas outside of parentheses.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
    .collect()
}

fn rule(part: &str) -> Result<Rule, String> {
    let part = part.trim();
    let one = |value: &str| vec![value.trim().to_owned()];
    let (key, test) = if let Some((key, value)) = part.split_once("!=") {
        (key, Test::NotIn(one(value)))
    } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        (key, Test::In(one(value)))
    } else if let Some((key, values)) = part.split_once(" notin ") {
        (key, Test::NotIn(set(values)?))
    } else if let Some((key, values)) = part.split_once(" in ") {
        (key, Test::In(set(values)?))
    } else if let Some(key) = part.strip_prefix('!') {
        (key, Test::Missing)
    } else {
        (part, Test::Exists)
    };
    let key = key.trim();
    let odd = |text: &str| text.contains(|c: char| c.is_whitespace() || "()=!".contains(c));
    let values: &[String] = match &test {
        Test::In(values) | Test::NotIn(values) => values,
        Test::Exists | Test::Missing => &[],
    };
    if key.is_empty() || odd(key) || values.iter().any(|value| odd(value)) {
        return Err(format!(
            "`{part}` is not a label rule; write app=web, app!=web, app in (a,b), app or !app"
        ));
    }
    Ok(Rule { key: key.to_owned(), test })
}

fn set(text: &str) -> Result<Vec<String>, String> {
    text.trim()
        .strip_prefix('(')
        .and_then(|text| text.strip_suffix(')'))
        .map(|inner| inner.split(',').map(|value| value.trim().to_owned()).collect())
        .ok_or_else(|| format!("`{text}` is not a list of values; write (a,b)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_match_as_in_kubernetes() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web", true),
            ("app!=web", false),
            ("tier!=db", true),
            ("app in (db, web)", true),
            ("app notin (db,web)", false),
            ("app", true),
            ("!app", false),
            ("app in (a,web),!tier", true),
        ] {
            assert_eq!(Selector::parse(text).unwrap().matches(&labels), expected, "{text}");
        }
        for text in ["=x", "a b", "app in x", "!"] {
            assert!(Selector::parse(text).is_err(), "{text}");
        }
    }
}
