//! Durations, times and sizes between people and machines.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const YEAR: u64 = 365 * DAY;

/// `90`, `90s`, `5m`, `1h30m`, `250ms`, `7d`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; write 90s, 5m or 1h30m");
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit_ms = match &rest[..letters] {
            "ms" => 1,
            "s" => 1000,
            "m" => MINUTE * 1000,
            "h" => HOUR * 1000,
            "d" => DAY * 1000,
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        let part = number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)?;
        total = total.checked_add(part).ok_or_else(wrong)?;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// How old something is, in the two largest units that matter: `42s`, `3m20s`, `5h`, `12d`.
pub(crate) fn age(now_ms: u64, then_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(then_ms) / 1000;
    let two = |large: u64, l: char, small: u64, s: char| match (seconds % large) / small {
        0 => format!("{}{l}", seconds / large),
        rest => format!("{}{l}{rest}{s}", seconds / large),
    };
    match seconds {
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(MINUTE, 'm', 1, 's'),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(HOUR, 'h', MINUTE, 'm'),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(DAY, 'd', HOUR, 'h'),
        s if s < 2 * YEAR => format!("{}d", s / DAY),
        s => format!("{}y", s / YEAR),
    }
}

/// Time an action took: `0.08s`, `12.3s`, `4m10s`.
pub(crate) fn took(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{}.{:02}s", ms / 1000, ms % 1000 / 10),
        10_000..120_000 => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
        _ => age(ms, 0),
    }
}

/// `512 B`, `1.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    match tenths {
        0..1000 => format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]),
        _ => format!("{} {}", tenths / 10, UNITS[unit]),
    }
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// `2026-01-02T15:04:05.000000000Z`: the form of log lines. Of fixed width, so that text order is time order.
pub(crate) fn time_nanos(since_epoch: u128) -> String {
    let millis = u64::try_from(since_epoch / 1_000_000).unwrap_or(u64::MAX);
    let seconds = keel_plan::rfc3339(millis);
    format!("{}.{:09}Z", seconds.trim_end_matches('Z'), since_epoch % 1_000_000_000)
}

/// Accepts RFC 3339 in UTC and gives it the fixed width of [`time_nanos`].
pub(crate) fn parse_time(text: &str) -> Result<String, String> {
    let wrong = || format!("`{text}` is not a time; write 2026-01-02T15:04:05Z");
    let body = text.strip_suffix('Z').ok_or_else(wrong)?;
    let (whole, fraction) = body.split_once('.').unwrap_or((body, ""));
    let pattern = b"dddd-dd-ddTdd:dd:dd";
    let fits = whole.len() == pattern.len()
        && whole.bytes().zip(pattern).all(|(c, p)| if *p == b'd' { c.is_ascii_digit() } else { c == *p });
    if !fits || fraction.len() > 9 || !fraction.bytes().all(|c| c.is_ascii_digit()) {
        return Err(wrong());
    }
    Ok(format!("{whole}.{fraction:0<9}Z"))
}

/// `1 pod`, `2 pods`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("90", 90_000), ("90s", 90_000), ("1h30m", 5_400_000), ("250ms", 250), ("0", 0)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "m", "-5s", "5 m", "5w", "99999999999999999999s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ages_keep_two_units_while_they_matter() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (200, "3m20s"),
            (600, "10m"),
            (3 * HOUR, "3h"),
            (3 * HOUR + 61, "3h1m"),
            (30 * HOUR, "30h"),
            (3 * DAY + 5 * HOUR, "3d5h"),
            (40 * DAY, "40d"),
            (3 * YEAR, "3y"),
        ] {
            assert_eq!(age(seconds * 1000, 0), text);
        }
        assert_eq!(age(0, 1000), "0s", "a clock that went back");
    }

    #[test]
    fn sizes_and_times_taken() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 20, "10.0 MiB"), (300 << 20, "300 MiB")]
        {
            assert_eq!(size(bytes), text);
        }
        for (ms, text) in [(83, "0.08s"), (12_345, "12.3s"), (250_000, "4m10s")] {
            assert_eq!(took(ms), text);
        }
    }

    #[test]
    fn times_are_of_fixed_width() {
        assert_eq!(time_nanos(1_767_366_245_000_000_007), "2026-01-02T15:04:05.000000007Z");
        assert_eq!(parse_time("2026-01-02T15:04:05.5Z").unwrap(), "2026-01-02T15:04:05.500000000Z");
        assert!(parse_time("2026-01-02 15:04:05").is_err());
    }
}
