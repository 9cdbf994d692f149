//! Amounts of CPU and memory as Kubernetes writes them: `500m`, `1.5`, `128Mi`, `1e3`.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// An amount as written. Equality is of the text; compare amounts with [`Quantity::millis`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("is not an amount such as 250m, 1.5, 128Mi or 2G")]
    Syntax,
    #[error("is larger than any host")]
    TooLarge,
}

/// More is taken as a mistake; it also keeps every sum inside 64 bits.
const MAX_MILLIS: i128 = (i64::MAX as i128) / 16;

impl Quantity {
    /// Thousandths of the unit, rounded up. Negative amounts are valid syntax.
    pub fn millis(&self) -> Result<i64, QuantityError> {
        parse_millis(&self.0)
    }

    /// CPU: thousandths of a core, rounded up. Negative amounts count as 0.
    pub fn millicores(&self) -> Result<u64, QuantityError> {
        Ok(self.millis()?.max(0).unsigned_abs())
    }

    /// Memory: bytes, rounded up. Negative amounts count as 0.
    pub fn bytes(&self) -> Result<u64, QuantityError> {
        Ok(self.millis()?.max(0).unsigned_abs().div_ceil(1000))
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Numbers are accepted where text is expected: `cpu: 1` and `cpu: "1"` are the same.
impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(serde_json::Number),
        }
        Ok(Quantity(match Written::deserialize(deserializer)? {
            Written::Text(text) => text,
            Written::Number(number) => number.to_string(),
        }))
    }
}

impl JsonSchema for Quantity {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": ["string", "number"], "format": "quantity"})
    }
}

fn parse_millis(text: &str) -> Result<i64, QuantityError> {
    let (sign, rest) = match text.as_bytes().first() {
        Some(b'-') => (-1, &text[1..]),
        Some(b'+') => (1, &text[1..]),
        _ => (1, text),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(QuantityError::Syntax);
    }
    let (numerator, denominator) = scale(suffix).ok_or(QuantityError::Syntax)?;
    // 18 digits are far below the smallest unit that counts (1/1000); more cannot change the rounded-up result by
    // more than one unit, which the trailing flag keeps.
    let kept = &fraction[..fraction.len().min(18)];
    let lost = fraction[kept.len()..].bytes().any(|b| b != b'0');
    let digits = format!("{whole}{kept}");
    let value: i128 =
        if digits.len() > 36 { None } else { digits.parse().ok() }.ok_or(QuantityError::TooLarge)?;
    let divisor = 10i128
        .pow(u32::try_from(kept.len()).unwrap_or(18))
        .checked_mul(denominator)
        .ok_or(QuantityError::TooLarge)?;
    let scaled = value.checked_mul(numerator).ok_or(QuantityError::TooLarge)?;
    let millis = scaled / divisor + i128::from(scaled % divisor != 0 || lost);
    if millis > MAX_MILLIS {
        return Err(QuantityError::TooLarge);
    }
    i64::try_from(sign * millis).map_err(|_| QuantityError::TooLarge)
}

/// Factor from the written number to thousandths of the unit, as a fraction.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1000 * 1024i128.pow(power), 1));
    let decimal = |power: i32| {
        let power = power + 3;
        let size = 10i128.checked_pow(power.unsigned_abs())?;
        Some(if power >= 0 { (size, 1) } else { (1, size) })
    };
    match suffix {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || digits.len() > 2 || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            decimal(exponent.parse().ok()?)
        }
    }
}

pub(crate) fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_reads_them() {
        let check = |text: &str, millis: Result<i64, QuantityError>| {
            assert_eq!(Quantity(text.into()).millis(), millis, "{text}");
        };
        check("1", Ok(1000));
        check("500m", Ok(500));
        check("0.5", Ok(500));
        check(".5", Ok(500));
        check("5.", Ok(5000));
        check("1.5Gi", Ok(1_610_612_736_000));
        check("128Mi", Ok(134_217_728_000));
        check("1e3", Ok(1_000_000));
        check("1E3", Ok(1_000_000));
        check("1E", Err(QuantityError::TooLarge));
        check("1e-3", Ok(1));
        check("1n", Ok(1));
        check("100k", Ok(100_000_000));
        check("-1", Ok(-1000));
        check("0.0001", Ok(1));
        check("", Err(QuantityError::Syntax));
        check(".", Err(QuantityError::Syntax));
        check("1.2.3", Err(QuantityError::Syntax));
        check("128MB", Err(QuantityError::Syntax));
        check("128 Mi", Err(QuantityError::Syntax));
        check("1K", Err(QuantityError::Syntax));
        check("abc", Err(QuantityError::Syntax));
        check("9999999999999999999999999999999999999999", Err(QuantityError::TooLarge));
        check("1e99", Err(QuantityError::Syntax));
    }

    #[test]
    fn bytes_and_millicores_round_up() {
        assert_eq!(Quantity("1500m".into()).bytes(), Ok(2));
        assert_eq!(Quantity("0.1".into()).millicores(), Ok(100));
        assert_eq!(Quantity("-1".into()).millicores(), Ok(0));
    }
}
