//! `$(VAR)` expansion by Kubernetes' rules.

use std::collections::BTreeMap;

use crate::model::{EnvEntry, EnvValue};

/// The environment in order; a later entry of the same name replaces an earlier one in its place. Values written in
/// the manifest may name earlier variables; values from ConfigMaps, Secrets and fields are taken as they are.
///
/// `field` gives the value of a pod's field, `host_millis` thousandths of a resource that the host has.
pub fn expand_env(
    entries: &[EnvEntry],
    field: &dyn Fn(&str) -> String,
    host_millis: &dyn Fn(&str) -> u64,
) -> Vec<(String, String)> {
    let mut known = BTreeMap::new();
    let mut order: Vec<&str> = Vec::with_capacity(entries.len());
    for entry in entries {
        let value = match &entry.value {
            EnvValue::Literal(text) => expand(text, &known),
            EnvValue::Verbatim(text) | EnvValue::Resource(text) => text.clone(),
            EnvValue::Field(path) => field(path),
            EnvValue::Host { resource, divisor_millis } => {
                host_millis(resource).div_ceil((*divisor_millis).max(1)).to_string()
            }
        };
        if known.insert(entry.name.clone(), value).is_none() {
            order.push(&entry.name);
        }
    }
    order.into_iter().map(|name| (name.to_owned(), known.remove(name).unwrap_or_default())).collect()
}

/// `$(NAME)` becomes the variable's value; an unknown name stays as written; `$$` is one dollar sign.
pub fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => out.extend(["$(", name, ")"]),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let variables = [("A", "1"), ("B", "$(A)"), ("EMPTY", "")].map(|(k, v)| (k.into(), v.into())).into();
        assert_eq!(expand(text, &variables), expected, "{text}");
    }

    #[test]
    fn references_are_expanded_as_kubernetes_does() {
        check("$(A)", "1");
        check("x$(A)y$(A)z", "x1y1z");
        check("$(B)", "$(A)");
        check("$(EMPTY)", "");
        check("$(NOPE)", "$(NOPE)");
        check("$$(A)", "$(A)");
        check("$$$(A)", "$1");
        check("$$$$(A)", "$$(A)");
        check("$A ${A}", "$A ${A}");
        check("$(A", "$(A");
        check("tail$", "tail$");
        check("$()", "$()");
        check("$((A))", "$((A))");
    }

    #[test]
    fn variables_see_earlier_ones_only_and_the_last_wins() {
        let entry = |name: &str, value| EnvEntry { name: name.into(), value };
        let env = expand_env(
            &[
                entry("FROM", EnvValue::Verbatim("$(X)".into())),
                entry("EARLY", EnvValue::Literal("$(X)".into())),
                entry("X", EnvValue::Literal("1".into())),
                entry("LATE", EnvValue::Literal("$(X)$(FROM)".into())),
                entry("IP", EnvValue::Field("status.podIP".into())),
                entry("CORES", EnvValue::Host { resource: "limits.cpu".into(), divisor_millis: 1000 }),
                entry("X", EnvValue::Literal("$(X)2".into())),
            ],
            &|path| format!("<{path}>"),
            &|_| 3500,
        );
        let expected = [
            ("FROM", "$(X)"),
            ("EARLY", "$(X)"),
            ("X", "12"),
            ("LATE", "1$(X)"),
            ("IP", "<status.podIP>"),
            ("CORES", "4"),
        ];
        assert_eq!(env, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
}
