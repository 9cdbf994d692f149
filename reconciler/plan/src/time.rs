//! Milliseconds since the epoch as RFC 3339, the way Kubernetes prints times.

pub(crate) mod timestamp {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::model::Millis;

    /// `2026-01-02T03:04:05Z`, as serialised text.
    pub(crate) fn serialize<S: Serializer>(millis: &Millis, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::rfc3339(*millis))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Millis, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::from_rfc3339(&text)
            .ok_or_else(|| serde::de::Error::custom("not a time like 2026-01-02T03:04:05Z"))
    }

    /// The same for a time that may be absent.
    pub(crate) mod option {
        use serde::{Deserializer, Serializer};

        use crate::model::Millis;

        pub(crate) fn serialize<S: Serializer>(
            millis: &Option<Millis>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match millis {
                Some(millis) => super::serialize(millis, serializer),
                None => serializer.serialize_none(),
            }
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<Millis>, D::Error> {
            super::deserialize(deserializer).map(Some)
        }
    }
}

use crate::model::Millis;

const DAY_S: u64 = 86_400;
/// Days of 400 years, after which the Gregorian calendar repeats.
const ERA_DAYS: u64 = 146_097;
/// From 0000-03-01 to 1970-01-01: counting from March puts the leap day last.
const EPOCH_DAYS: u64 = 719_468;

/// Whole seconds, UTC.
pub fn rfc3339(millis: Millis) -> String {
    let seconds = millis / 1000;
    let (day, second) = (seconds / DAY_S + EPOCH_DAYS, seconds % DAY_S);
    let (era, day) = (day / ERA_DAYS, day % ERA_DAYS);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + carry;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn from_rfc3339(text: &str) -> Option<Millis> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month) || day == 0 || year < 1970 {
        return None;
    }
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year) = (year / 400, year % 400);
    let days = era * ERA_DAYS + year * 365 + year / 4 - year / 100 + (153 * month + 2) / 5 + day - 1;
    Some(((days.checked_sub(EPOCH_DAYS)?) * DAY_S + hour * 3600 + minute * 60 + second) * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_printed_and_read_back() {
        let check = |millis, text: &str| {
            assert_eq!(rfc3339(millis), text);
            assert_eq!(from_rfc3339(text), Some(millis));
        };
        check(0, "1970-01-01T00:00:00Z");
        check(951_782_400_000, "2000-02-29T00:00:00Z");
        check(951_868_799_000, "2000-02-29T23:59:59Z");
        check(1_767_225_599_000, "2025-12-31T23:59:59Z");
        check(1_772_323_200_000, "2026-03-01T00:00:00Z");
        check(4_107_542_400_000, "2100-03-01T00:00:00Z");
    }
}
