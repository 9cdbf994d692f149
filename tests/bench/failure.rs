//! Errors of a measurement: what was being done, and why it did not work.

use std::fmt;
use std::path::Path;

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Failure {
        Failure(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

pub(crate) trait Doing<T> {
    fn doing(self, what: &str) -> Outcome<T>;
    fn doing_at(self, what: &str, path: &Path) -> Outcome<T>;
}

impl<T, E: fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{what}: {error}")))
    }

    fn doing_at(self, what: &str, path: &Path) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{what} {}: {error}", path.display())))
    }
}
