//! One error type: what we were doing, and why it failed. Everything ends in a one-line report, so nothing is matched on.

use std::fmt;
use std::io;
use std::path::Path;

#[derive(Debug)]
pub(crate) struct Error {
    /// What was being done, to what.
    doing: String,
    source: Option<io::Error>,
}

impl Error {
    pub(crate) fn new(doing: impl Into<String>) -> Error {
        Error { doing: doing.into(), source: None }
    }

    /// The report is one line whatever a runtime put in its message.
    pub(crate) fn one_line(&self) -> String {
        self.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.doing),
            None => f.write_str(&self.doing),
        }
    }
}

impl std::error::Error for Error {}

/// Adds operation and object to an io error.
pub(crate) trait Context<T> {
    fn doing(self, operation: &str) -> Result<T, Error>;
    fn at(self, operation: &str, path: &Path) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn doing(self, operation: &str) -> Result<T, Error> {
        self.map_err(|source| Error { doing: operation.to_owned(), source: Some(source) })
    }

    fn at(self, operation: &str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error {
            doing: format!("{operation} {}", path.display()),
            source: Some(source),
        })
    }
}
