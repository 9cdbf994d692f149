//! Syntax of names. Errors are what is wrong, without the name itself.

/// What is wrong with a DNS name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadName {
    pub message: String,
}

impl BadName {
    /// A name that would be right, or the rule.
    pub(crate) fn help(&self, name: &str, allowed: char) -> String {
        let fixed: String = name
            .to_lowercase()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == allowed { c } else { '-' })
            .collect();
        let fixed = fixed.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        let is_right = if allowed == '.' { subdomain(fixed).is_ok() } else { dns_label(fixed).is_ok() };
        if is_right { format!("for example: {fixed}") } else { "for example: web-1".into() }
    }
}

/// RFC 1123 label: lower-case letters, digits and "-", at most 63.
pub(crate) fn dns_label(name: &str) -> Result<(), BadName> {
    let bad = |message: String| Err(BadName { message });
    if name.is_empty() {
        return bad("must not be empty".into());
    }
    if name.len() > 63 {
        return bad(format!("must be at most 63 characters, is {}", name.len()));
    }
    if let Some(c) = name.chars().find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')) {
        return bad(format!("must have only lower-case letters, digits and \"-\", not {}", show(c)));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return bad("must start and end with a letter or digit".into());
    }
    Ok(())
}

/// RFC 1123 subdomain: labels with dots between, at most 253.
pub(crate) fn subdomain(name: &str) -> Result<(), BadName> {
    let bad = |message: String| Err(BadName { message });
    if name.is_empty() {
        return bad("must not be empty".into());
    }
    if name.len() > 253 {
        return bad(format!("must be at most 253 characters, is {}", name.len()));
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if let Some(c) = name.chars().find(|c| !allowed(*c)) {
        return bad(format!("must have only lower-case letters, digits, \"-\" and \".\", not {}", show(c)));
    }
    let is_part = |part: &str| !part.is_empty() && !part.starts_with('-') && !part.ends_with('-');
    if !name.split('.').all(is_part) {
        return bad("each part between dots must start and end with a letter or digit".into());
    }
    Ok(())
}

/// Name of a label or annotation: optional DNS prefix, "/", name.
pub(crate) fn qualified_name(key: &str) -> Result<(), String> {
    let name = match key.split_once('/') {
        Some((prefix, name)) => {
            subdomain(prefix).map_err(|e| format!("the part before \"/\" {}", e.message))?;
            name
        }
        None => key,
    };
    if name.is_empty() {
        return Err("must not be empty".into());
    }
    word(name, "the name")
}

pub(crate) fn label_value(value: &str) -> Result<(), String> {
    if value.is_empty() { Ok(()) } else { word(value, "a label's value") }
}

/// Letters, digits, "-", "_" and ".", at most 63, starting and ending with a letter or digit.
fn word(text: &str, what: &str) -> Result<(), String> {
    if text.len() > 63 {
        return Err(format!("{what} must be at most 63 characters, is {}", text.len()));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(c) = text.chars().find(|c| !allowed(*c)) {
        return Err(format!(
            "{what} must have only letters, digits, \"-\", \"_\" and \".\", not {}",
            show(c)
        ));
    }
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if edge(text.chars().next()) && edge(text.chars().last()) {
        Ok(())
    } else {
        Err(format!("{what} must start and end with a letter or digit"))
    }
}

/// Key of a ConfigMap or Secret: it becomes a file name.
pub(crate) fn data_key(key: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if key.is_empty() || key.len() > 253 {
        return Err("a key must have 1 to 253 characters".into());
    }
    if let Some(c) = key.chars().find(|c| !allowed(*c)) {
        return Err(format!("a key must not have {}", show(c)));
    }
    if key == "." || key.starts_with("..") {
        return Err("a key must not be \".\" or start with \"..\"".into());
    }
    Ok(())
}

/// IANA service name: the name of a port.
pub(crate) fn port_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 15 {
        return Err(format!("a port's name must have 1 to 15 characters, has {}", name.len()));
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return Err("a port's name must have only lower-case letters, digits and \"-\"".into());
    }
    if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        return Err("a port's name must have a letter".into());
    }
    if name.starts_with('-') || name.ends_with('-') || name.contains("--") {
        return Err("a port's name must not start or end with \"-\" or have \"--\"".into());
    }
    Ok(())
}

/// Name of an environment variable.
pub(crate) fn env_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("must not be empty".into());
    }
    match name.chars().find(|c| *c == '=' || !(*c == ' ' || c.is_ascii_graphic())) {
        Some(c) => Err(format!("must not have {}", show(c))),
        None => Ok(()),
    }
}

/// Relative path without "..": it stays inside its directory.
pub(crate) fn inner_path(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("must not be empty".into());
    }
    if path.starts_with('/') {
        return Err("must be relative, without \"/\" in front".into());
    }
    no_parent(path)
}

pub(crate) fn absolute_path(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("must not be empty".into());
    }
    if !path.starts_with('/') {
        return Err("must be absolute, with \"/\" in front".into());
    }
    no_parent(path)
}

fn no_parent(path: &str) -> Result<(), String> {
    if path.contains('\0') {
        return Err("must not have a zero byte".into());
    }
    if path.split('/').any(|part| part == "..") {
        return Err("must not have \"..\"".into());
    }
    Ok(())
}

fn show(c: char) -> String {
    match c {
        ' ' => "a space".into(),
        c if c.is_control() => format!("the control character {:#04x}", u32::from(c)),
        c => format!("\"{c}\""),
    }
}
