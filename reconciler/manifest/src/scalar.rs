//! What a plain YAML scalar means.
//!
//! The verdict is kubectl's (YAML 1.1 as its Go library reads it), not YAML 1.2's: `yes` and `on` are booleans,
//! `0755` is octal, `1_000` is a number. A file must mean the same here and there.

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scalar {
    Null,
    Bool(bool),
    Int(i64),
    /// Not an integer of 64 bits. The text is kept: amounts are computed from it exactly.
    Float(f64),
    Text,
}

impl Scalar {
    /// As in "this is a number".
    pub(crate) fn noun(&self) -> &'static str {
        match self {
            Scalar::Null => "null",
            Scalar::Bool(_) => "a boolean",
            Scalar::Int(_) | Scalar::Float(_) => "a number",
            Scalar::Text => "text",
        }
    }
}

/// Meaning of an unquoted scalar without a tag.
pub(crate) fn resolve_plain(text: &str) -> Scalar {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Scalar::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Scalar::Bool(true);
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Scalar::Bool(false);
        }
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => return Scalar::Float(f64::INFINITY),
        "-.inf" | "-.Inf" | "-.INF" => return Scalar::Float(f64::NEG_INFINITY),
        ".nan" | ".NaN" | ".NAN" => return Scalar::Float(f64::NAN),
        _ => {}
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return Scalar::Text;
    }
    let plain: String = text.chars().filter(|c| *c != '_').collect();
    if let Some(int) = integer(&plain) {
        return Scalar::Int(int);
    }
    if is_float(&plain)
        && let Ok(float) = plain.parse()
    {
        return Scalar::Float(float);
    }
    Scalar::Text
}

/// `0x`, `0o`, `0b`, and a leading zero for octal.
fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'o' | b'O', ..] => (8, &digits[2..]),
        [b'0', b'b' | b'B', ..] => (2, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).ok()?;
    i64::try_from(if negative { -value } else { value }).ok()
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let text = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let exponent_ok = exponent.is_none_or(|e| digits(e.strip_prefix(['-', '+']).unwrap_or(e)));
    let mantissa_ok = match mantissa.split_once('.') {
        Some(("", fraction)) => digits(fraction),
        Some((whole, fraction)) => digits(whole) && (fraction.is_empty() || digits(fraction)),
        None => digits(mantissa),
    };
    exponent_ok && mantissa_ok
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_mean_what_kubectl_reads() {
        let check = |text: &str, meaning: Scalar| assert_eq!(resolve_plain(text), meaning, "{text}");
        check("0755", Scalar::Int(493));
        check("0o755", Scalar::Int(493));
        check("0x1F", Scalar::Int(31));
        check("0b11", Scalar::Int(3));
        check("1_000", Scalar::Int(1000));
        check("-5", Scalar::Int(-5));
        check("+5", Scalar::Int(5));
        check("0", Scalar::Int(0));
        check("09", Scalar::Float(9.0));
        check("1.10", Scalar::Float(1.1));
        check("1e3", Scalar::Float(1000.0));
        check(".5", Scalar::Float(0.5));
        check("5.", Scalar::Float(5.0));
        check("99999999999999999999", Scalar::Float(1e20));
        check("yes", Scalar::Bool(true));
        check("y", Scalar::Bool(true));
        check("on", Scalar::Bool(true));
        check("Off", Scalar::Bool(false));
        check("~", Scalar::Null);
        check("", Scalar::Null);
        check("yEs", Scalar::Text);
        check("12:30:45", Scalar::Text);
        check("2024-01-01", Scalar::Text);
        check("1.2.3", Scalar::Text);
        check("-", Scalar::Text);
        check("--", Scalar::Text);
        check("-a", Scalar::Text);
        check(".", Scalar::Text);
        check("0x", Scalar::Text);
        check("0x-5", Scalar::Text);
        check("1e", Scalar::Text);
        check("100m", Scalar::Text);
        check("+", Scalar::Text);
    }
}
