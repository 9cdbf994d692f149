//! Errors on standard error, and in the log file that the caller reads.

use crate::args::Globals;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

/// Set by a caller that shows what the log says.
const LOG_IS_READ: &str = "KEEL_RUNTIME_LOG_IS_READ";

pub(crate) struct Log {
    file: Option<File>,
    json: bool,
    debug: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    level: &'a str,
    msg: &'a str,
    time: &'a str,
}

impl Log {
    /// A caller that wants a log it cannot have would never learn why a container failed.
    pub(crate) fn open(globals: &Globals) -> Result<Log, String> {
        let open = |path: &PathBuf| {
            let opened = OpenOptions::new().append(true).create(true).open(path);
            opened.map_err(|e| format!("open the log {}: {e}", path.display()))
        };
        let file = globals.log.as_ref().map(open).transpose()?;
        Ok(Log { file, json: globals.log_json, debug: globals.debug })
    }

    /// Twice, as other runtimes do, unless the caller says that it reads the log: then standard error is the container's.
    pub(crate) fn error(&self, message: &str) {
        if self.file.is_none() || std::env::var_os(LOG_IS_READ).is_none() {
            eprintln!("keel-runtime: error: {message}");
        }
        self.write("error", message);
    }

    pub(crate) fn warning(&self, message: &str) {
        if self.file.is_none() {
            eprintln!("keel-runtime: warning: {message}");
        }
        self.write("warning", message);
    }

    /// As lines of the log, wherever they go: what reads one reads the other.
    pub(crate) fn debug(&self, message: &str) {
        if !self.debug {
            return;
        }
        match self.file {
            Some(_) => self.write("debug", message),
            None => eprintln!("{}", self.line("debug", message)),
        }
    }

    fn write(&self, level: &str, message: &str) {
        let Some(mut file) = self.file.as_ref() else { return };
        // The log is for the caller's comfort; the exit code tells the truth.
        let _ = writeln!(file, "{}", self.line(level, message));
    }

    fn line(&self, level: &str, message: &str) -> String {
        let time = keel_oci::state::now_rfc3339();
        if self.json {
            serde_json::to_string(&Line { level, msg: message, time: &time }).unwrap_or_default()
        } else {
            format!("time=\"{time}\" level={level} msg={message:?}")
        }
    }
}
