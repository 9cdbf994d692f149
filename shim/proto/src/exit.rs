//! How a container ended: one line of JSON, written by the shim before it tells anybody.

use std::fmt;
use std::path::Path;

use crate::json::{Value, Writer, members};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExitRecord {
    pub id: String,
    pub pid: u32,
    /// Exit code, or 128 + signal. -1 when `lost`.
    pub code: i32,
    /// The signal that ended it, 0 for none.
    pub signal: i32,
    pub core: bool,
    /// The kernel killed something in the container's cgroup for want of memory.
    pub oom: bool,
    /// The monitor was killed and the kernel keeps no status for others: how it ended is not known.
    pub lost: bool,
    pub started_at_ms: u64,
    pub finished_at_ms: u64,
    pub user_us: u64,
    pub system_us: u64,
    pub max_rss_kb: u64,
    /// Log output that could never be written.
    pub log_lost_lines: u64,
    pub log_lost_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseExitError {
    /// Not one JSON object.
    Malformed,
    /// A version later than this reader.
    Version(i64),
    /// No `code` member: not an exit record.
    NoCode,
}

impl fmt::Display for ParseExitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParseExitError::Malformed => f.write_str("exit record is not a JSON object"),
            ParseExitError::Version(v) => write!(f, "exit record has unknown version {v}"),
            ParseExitError::NoCode => f.write_str("exit record has no exit code"),
        }
    }
}

impl std::error::Error for ParseExitError {}

impl ExitRecord {
    /// Name and directory of a container's record.
    pub fn path(exits: &Path, id: &str) -> std::path::PathBuf {
        exits.join(format!("{id}.json"))
    }

    /// One line, with its newline; members always in this order.
    pub fn to_json(&self) -> String {
        let mut line = Writer::default()
            .raw("version", 1)
            .text("id", &self.id)
            .raw("pid", self.pid)
            .raw("code", self.code)
            .raw("signal", self.signal)
            .raw("core", self.core)
            .raw("oom", self.oom)
            .raw("lost", self.lost)
            .raw("started_at_ms", self.started_at_ms)
            .raw("finished_at_ms", self.finished_at_ms)
            .raw("user_us", self.user_us)
            .raw("system_us", self.system_us)
            .raw("max_rss_kb", self.max_rss_kb)
            .raw("log_lost_lines", self.log_lost_lines)
            .raw("log_lost_bytes", self.log_lost_bytes)
            .finish();
        line.push('\n');
        line
    }

    /// Lenient: any order, unknown members ignored, absent ones zero, except the version and the code.
    pub fn parse(text: &str) -> Result<ExitRecord, ParseExitError> {
        let mut record = ExitRecord::default();
        let mut version = 1;
        let mut code = None;
        members(text, |key, value| match (key, value) {
            ("version", Value::Number(n)) => version = n,
            ("code", Value::Number(n)) => code = i32::try_from(n).ok(),
            (key, value) => record.set(key, value),
        })
        .ok_or(ParseExitError::Malformed)?;
        if version != 1 {
            return Err(ParseExitError::Version(version));
        }
        record.code = code.ok_or(ParseExitError::NoCode)?;
        Ok(record)
    }

    fn set(&mut self, key: &str, value: Value) {
        match value {
            Value::Text(text) if key == "id" => self.id = text,
            Value::Bool(flag) => match key {
                "core" => self.core = flag,
                "oom" => self.oom = flag,
                "lost" => self.lost = flag,
                _ => {}
            },
            Value::Number(n) => {
                let n = u64::try_from(n).unwrap_or(0);
                match key {
                    "pid" => self.pid = u32::try_from(n).unwrap_or(0),
                    "signal" => self.signal = i32::try_from(n).unwrap_or(0),
                    "started_at_ms" => self.started_at_ms = n,
                    "finished_at_ms" => self.finished_at_ms = n,
                    "user_us" => self.user_us = n,
                    "system_us" => self.system_us = n,
                    "max_rss_kb" => self.max_rss_kb = n,
                    "log_lost_lines" => self.log_lost_lines = n,
                    "log_lost_bytes" => self.log_lost_bytes = n,
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> ExitRecord {
        ExitRecord {
            id: "web-\"1\"\n\u{e9}".into(),
            pid: 4_000_000,
            code: 137,
            signal: 9,
            core: false,
            oom: true,
            lost: false,
            started_at_ms: 1_790_000_000_001,
            finished_at_ms: 1_790_000_000_002,
            user_us: 1,
            system_us: 2,
            max_rss_kb: 3,
            log_lost_lines: 4,
            log_lost_bytes: 5,
        }
    }

    #[test]
    fn record_survives_the_disk() {
        let record = example();
        assert_eq!(ExitRecord::parse(&record.to_json()), Ok(record));
    }

    #[test]
    fn layout_is_fixed() {
        let record = ExitRecord { id: "a".into(), code: -1, lost: true, ..ExitRecord::default() };
        assert_eq!(
            record.to_json(),
            "{\"version\":1,\"id\":\"a\",\"pid\":0,\"code\":-1,\"signal\":0,\"core\":false,\"oom\":false,\
             \"lost\":true,\"started_at_ms\":0,\"finished_at_ms\":0,\"user_us\":0,\"system_us\":0,\"max_rss_kb\":0,\
             \"log_lost_lines\":0,\"log_lost_bytes\":0}\n"
        );
    }

    #[test]
    fn reader_takes_foreign_layouts_and_skips_what_it_does_not_know() {
        let text = "\n{ \"new\" : {\"a\":[1,{\"b\":null}],\"c\":\"}\"}, \"x\":[], \"f\":1.5e3,\n \"code\" : 3 , \"core\":true }\n";
        let record = ExitRecord::parse(text).unwrap();
        assert_eq!((record.code, record.core), (3, true));
    }

    #[test]
    fn reader_refuses_what_is_not_a_record() {
        let check = |text: &str, error| assert_eq!(ExitRecord::parse(text), Err(error), "{text}");
        check("", ParseExitError::Malformed);
        check("null", ParseExitError::Malformed);
        check("{\"code\":1", ParseExitError::Malformed);
        check("{\"code\":1} x", ParseExitError::Malformed);
        check("{\"code\":x}", ParseExitError::Malformed);
        check("{\"id\":\"\\u00\"}", ParseExitError::Malformed);
        check("{}", ParseExitError::NoCode);
        check("{\"version\":2,\"code\":1}", ParseExitError::Version(2));
        check(&format!("{{\"a\":{}", "[".repeat(100_000)), ParseExitError::Malformed);
        let whole = example().to_json();
        for cut in (0..whole.len() - 2).filter(|i| whole.is_char_boundary(*i)) {
            check(&whole[..cut], ParseExitError::Malformed);
        }
    }
}
