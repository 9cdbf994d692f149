//! How a command ends when it does not succeed: what failed, why, what helps, and the exit code.

use std::error::Error;
use std::fmt::Write as _;
use std::io;

use keel_api::{ClientError, ControlError, exit};

#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    /// What, where and the chain of causes, one line. Empty when everything has been said already.
    pub(crate) message: String,
    pub(crate) hints: Vec<String>,
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), hints: Vec::new() }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Failure {
        Failure::new(exit::FAILED, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(exit::INVALID, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Failure {
        Failure::new(exit::NOT_FOUND, message)
    }

    /// An exit code whose reason is on the screen already.
    pub(crate) fn silent(code: u8) -> Failure {
        Failure::new(code, "")
    }

    /// An error with its causes.
    pub(crate) fn of(error: &(dyn Error + 'static)) -> Failure {
        Failure::failed(chain(error))
    }

    pub(crate) fn io(operation: &str, what: impl std::fmt::Display, error: &io::Error) -> Failure {
        let failure = Failure::failed(format!("{operation} {what}: {}", reason(error)));
        match error.kind() {
            io::ErrorKind::PermissionDenied => failure.hint("run the command as root"),
            _ => failure,
        }
    }

    #[must_use]
    pub(crate) fn code(mut self, code: u8) -> Failure {
        self.code = code;
        self
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hints.push(hint.into());
        self
    }

    /// What goes to standard error.
    pub(crate) fn render(&self, color: bool) -> String {
        let (red, bold, off) = if color { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let mut text = String::new();
        if !self.message.is_empty() {
            let _ = writeln!(text, "{red}error:{off} {}", self.message);
        }
        for hint in &self.hints {
            let _ = writeln!(text, "{bold}hint:{off} {hint}");
        }
        text
    }
}

/// Writing to standard output failed. A reader that has had enough is no failure.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Failure::silent(exit::DONE);
        }
        Failure::failed(format!("write to standard output: {}", reason(&error)))
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Failure {
        Failure { code: error.exit_code(), message: error.message, hints: error.hints }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        match error {
            ClientError::Refused(refused) => refused.into(),
            ClientError::NoDaemon { .. } => {
                Failure::of(&error).code(exit::UNAVAILABLE).hint("start one: keel daemon --manifests DIR")
            }
            ClientError::Connect { ref source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Failure::of(&error)
                    .code(exit::UNAVAILABLE)
                    .hint("the daemon talks to root and to its own user; try sudo")
            }
            ClientError::Gone { .. } => {
                let failure = Failure::failed(error.to_string()).code(exit::UNAVAILABLE);
                failure
                    .hint("containers go on, and the next daemon ends what this one has begun: keel status")
            }
            _ => Failure::of(&error).code(exit::UNAVAILABLE),
        }
    }
}

/// An error and its causes on one line, each said once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = match cause.downcast_ref::<io::Error>() {
            Some(io) => reason(io),
            None => cause.to_string(),
        };
        if !text.ends_with(&said) {
            let _ = write!(text, ": {said}");
        }
        next = cause.source();
    }
    text
}

/// The system's words without the number that Rust adds.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => keel_sys::errno_text(number),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_each_cause_once_and_ends_with_hints() {
        let error = ClientError::Connect {
            socket: "/run/x/keel.sock".into(),
            source: io::Error::from_raw_os_error(13),
        };
        let failure = Failure::from(error);
        assert_eq!(failure.code, exit::UNAVAILABLE);
        assert_eq!(
            failure.render(false),
            "error: connect to /run/x/keel.sock: permission denied\n\
             hint: the daemon talks to root and to its own user; try sudo\n"
        );
    }

    #[test]
    fn a_closed_pipe_is_success() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((failure.code, failure.render(true).as_str()), (exit::DONE, ""));
    }
}
