//! Where the output of containers is kept: docker's `--log-driver` and `--log-opt`, as annotations of a pod and as the
//! daemon's default.

use std::collections::BTreeMap;

/// Names of drivers, several with commas between them.
pub const DRIVER: &str = "evenkeel.dev/log-driver";
/// `name=value`, several with commas between them.
pub const OPTIONS: &str = "evenkeel.dev/log-opt";
/// Annotations that begin like this are ours, so others are mistakes.
pub const PREFIX: &str = "evenkeel.dev/log-";

const DRIVERS: [&str; 4] = ["k8s-file", "raw", "journald", "none"];
const NAMES: [&str; 8] =
    ["max-size", "max-file", "max-age", "max-total-size", "compress", "mode", "max-buffer-size", "tag"];
/// Those that are about files.
const OF_FILES: [&str; 5] = ["max-size", "max-file", "max-age", "max-total-size", "compress"];
/// The buffer is a pipe of the kernel.
const BUFFER_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 20;
/// A file that holds less is rotated for every burst.
const MIN_FILE_BYTES: u64 = 4 << 10;
const MAX_FILES: u32 = 1000;

/// What was said in one place; the rest is for the next one to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogSettings {
    pub drivers: Option<LogDrivers>,
    /// Of one file.
    pub max_bytes: Option<u64>,
    /// The current one counted.
    pub max_files: Option<u32>,
    pub max_age_s: Option<u64>,
    /// Of all files of a run together.
    pub max_total_bytes: Option<u64>,
    pub compress: Option<bool>,
    /// The container never waits for its log.
    pub non_blocking: Option<bool>,
    pub buffer_bytes: Option<u64>,
    pub tag: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogDrivers {
    pub file: Option<LogFile>,
    pub journal: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFile {
    /// Time, stream and text of each line, as the kubelet has it.
    Cri,
    /// The output as it is.
    Raw,
}

impl Default for LogDrivers {
    fn default() -> LogDrivers {
        LogDrivers { file: Some(LogFile::Cri), journal: false }
    }
}

impl LogSettings {
    /// Of a pod. An annotation that was not validated counts as far as it can be understood.
    pub fn of(annotations: &BTreeMap<String, String>) -> LogSettings {
        let mut settings = LogSettings::default();
        if let Some(driver) = annotations.get(DRIVER) {
            let _ = settings.set_drivers(driver);
        }
        for (name, value) in annotations.get(OPTIONS).into_iter().flat_map(|text| options(text)) {
            let _ = settings.set_option(name, value);
        }
        settings
    }

    pub fn set_drivers(&mut self, text: &str) -> Result<(), String> {
        let mut drivers = LogDrivers { file: None, journal: false };
        let mut names: Vec<&str> = Vec::new();
        for name in text.split(',').map(str::trim) {
            let file = match name {
                "k8s-file" => Some(LogFile::Cri),
                "raw" => Some(LogFile::Raw),
                "journald" => {
                    drivers.journal = true;
                    None
                }
                "none" => None,
                _ => return Err(unknown("driver", name, &DRIVERS)),
            };
            if file.is_some() && drivers.file.is_some_and(|other| Some(other) != file) {
                return Err("k8s-file and raw exclude each other: output is moved into one file".into());
            }
            drivers.file = file.or(drivers.file);
            names.push(name);
        }
        if names.contains(&"none") && names.len() > 1 {
            return Err("none excludes all other drivers".into());
        }
        self.drivers = Some(drivers);
        Ok(())
    }

    pub fn set_option(&mut self, name: &str, value: &str) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{name}: {value:?} is not {what}"));
        match name {
            "max-size" => match bytes(value) {
                Some(size) if size >= MIN_FILE_BYTES => self.max_bytes = Some(size),
                Some(_) => return Err(format!("{name}: {value} is less than {MIN_FILE_BYTES} bytes")),
                None => return wrong("a size such as 10m"),
            },
            "max-file" => match value.parse() {
                Ok(files @ 1..=MAX_FILES) => self.max_files = Some(files),
                _ => return wrong(&format!("a number from 1 to {MAX_FILES}")),
            },
            "max-age" => match seconds(value) {
                Some(age @ 1..) => self.max_age_s = Some(age),
                _ => return wrong("a time such as 90s, 30m, 12h or 7d"),
            },
            "max-total-size" => match bytes(value) {
                Some(size) if size >= MIN_FILE_BYTES => self.max_total_bytes = Some(size),
                Some(_) => return Err(format!("{name}: {value} is less than {MIN_FILE_BYTES} bytes")),
                None => return wrong("a size such as 100m"),
            },
            "compress" => match value.parse() {
                Ok(on) => self.compress = Some(on),
                Err(_) => return wrong("true or false"),
            },
            "mode" => match value {
                "blocking" => self.non_blocking = Some(false),
                "non-blocking" => self.non_blocking = Some(true),
                _ => return wrong("blocking or non-blocking"),
            },
            "max-buffer-size" => match bytes(value) {
                Some(size) if BUFFER_BYTES.contains(&size) => self.buffer_bytes = Some(size),
                Some(_) => return wrong("between 64k and 1m, which is what a pipe can be"),
                None => return wrong("a size such as 1m"),
            },
            "tag" if value.contains("{{") => return wrong("plain text, and templates are not done"),
            "tag" => self.tag = Some(value.to_owned()),
            _ => return Err(unknown("option", name, &NAMES)),
        }
        Ok(())
    }

    /// What contradicts itself within one place.
    pub fn check(&self) -> Result<(), String> {
        if self.buffer_bytes.is_some() && self.non_blocking == Some(false) {
            return Err("max-buffer-size is for mode=non-blocking".into());
        }
        if let (Some(total), Some(one)) = (self.max_total_bytes, self.max_bytes)
            && total < one
        {
            return Err("max-total-size is less than max-size".into());
        }
        let given = [
            self.max_bytes.is_some(),
            self.max_files.is_some(),
            self.max_age_s.is_some(),
            self.max_total_bytes.is_some(),
            self.compress.is_some(),
        ];
        if let (Some(drivers), Some(at)) = (self.drivers, given.iter().position(|given| *given))
            && drivers.file.is_none()
        {
            return Err(format!("{} is for files, and no driver writes one", OF_FILES[at]));
        }
        if self.tag.is_some() && self.drivers.is_some_and(|drivers| !drivers.journal) {
            return Err("tag is for journald, which is not among the drivers".into());
        }
        Ok(())
    }

    /// With `other` for what this one does not say.
    pub fn or(self, other: &LogSettings) -> LogSettings {
        LogSettings {
            drivers: self.drivers.or(other.drivers),
            max_bytes: self.max_bytes.or(other.max_bytes),
            max_files: self.max_files.or(other.max_files),
            max_age_s: self.max_age_s.or(other.max_age_s),
            max_total_bytes: self.max_total_bytes.or(other.max_total_bytes),
            compress: self.compress.or(other.compress),
            non_blocking: self.non_blocking.or(other.non_blocking),
            buffer_bytes: self.buffer_bytes.or(other.buffer_bytes),
            tag: self.tag.or_else(|| other.tag.clone()),
        }
    }
}

/// Of an annotation. A word without `=` has an empty value.
pub fn options(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(|word| word.split_once('=').unwrap_or((word, "")))
}

fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let close = known.iter().find(|known| strsim::damerau_levenshtein(known, name) <= 2);
    let meant = close.map(|known| format!(" (did you mean {known}?)")).unwrap_or_default();
    format!("no log {what} {name:?}{meant}; there are {}", known.join(", "))
}

/// As docker has sizes: `k`, `m` and `g` are powers of 1024.
fn bytes(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match &text[end..] {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        _ => return None,
    };
    text[..end].parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn seconds(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[end..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    text[..end].parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_are_known_by_name_and_may_be_several() {
        let check = |text: &str, expected: Result<(Option<LogFile>, bool), &str>| {
            let mut settings = LogSettings::default();
            let set = settings.set_drivers(text);
            let found = set.map(|()| settings.drivers.map(|d| (d.file, d.journal)).unwrap());
            assert_eq!(found.as_ref().map_err(String::as_str), expected.as_ref().map_err(|e| *e), "{text}");
        };
        check("k8s-file", Ok((Some(LogFile::Cri), false)));
        check("raw, journald", Ok((Some(LogFile::Raw), true)));
        check("journald", Ok((None, true)));
        check("none", Ok((None, false)));
        check("none,journald", Err("none excludes all other drivers"));
        check("raw,k8s-file", Err("k8s-file and raw exclude each other: output is moved into one file"));
        check(
            "journal",
            Err(
                "no log driver \"journal\" (did you mean journald?); there are k8s-file, raw, journald, none",
            ),
        );
    }

    #[test]
    fn options_have_dockers_names_and_units() {
        let mut settings = LogSettings::default();
        for (name, value) in options(
            "max-size=10m,max-file=3, max-age=2h,compress=true,mode=non-blocking,max-buffer-size=128k",
        ) {
            settings.set_option(name, value).unwrap();
        }
        let expected = LogSettings {
            max_bytes: Some(10 << 20),
            max_files: Some(3),
            max_age_s: Some(7200),
            compress: Some(true),
            non_blocking: Some(true),
            buffer_bytes: Some(128 << 10),
            ..LogSettings::default()
        };
        assert_eq!(settings, expected);
        for (name, value, message) in [
            ("max-size", "10x", "max-size: \"10x\" is not a size such as 10m"),
            ("max-size", "100", "max-size: 100 is less than 4096 bytes"),
            ("max-file", "0", "max-file: \"0\" is not a number from 1 to 1000"),
            ("max-age", "1w", "max-age: \"1w\" is not a time such as 90s, 30m, 12h or 7d"),
            ("mode", "fast", "mode: \"fast\" is not blocking or non-blocking"),
            (
                "max-buffer-size",
                "4m",
                "max-buffer-size: \"4m\" is not between 64k and 1m, which is what a pipe can be",
            ),
            ("tag", "{{.ID}}", "tag: \"{{.ID}}\" is not plain text, and templates are not done"),
        ] {
            assert_eq!(settings.set_option(name, value), Err(message.to_owned()));
        }
        assert!(settings.set_option("max-files", "3").unwrap_err().contains("did you mean max-file?"));
    }

    #[test]
    fn contradictions_are_named_and_what_is_not_said_comes_from_elsewhere() {
        let said = |driver: &str, words: &str| {
            let mut settings = LogSettings::default();
            settings.set_drivers(driver).unwrap();
            options(words).for_each(|(name, value)| settings.set_option(name, value).unwrap());
            settings
        };
        let check = |driver: &str, words: &str, message: &str| {
            assert_eq!(said(driver, words).check(), Err(message.to_owned()));
        };
        check("journald", "max-file=2", "max-file is for files, and no driver writes one");
        check("k8s-file", "tag=x", "tag is for journald, which is not among the drivers");
        check("k8s-file", "mode=blocking,max-buffer-size=1m", "max-buffer-size is for mode=non-blocking");
        check("k8s-file", "max-size=2m,max-total-size=1m", "max-total-size is less than max-size");
        let pod = LogSettings { max_files: Some(2), ..LogSettings::default() };
        let both = pod.or(&said("journald,raw", "max-file=9,max-size=1m"));
        assert_eq!((both.max_files, both.max_bytes), (Some(2), Some(1 << 20)));
        assert!(both.drivers.unwrap().journal);
    }
}
