//! Standard output and standard error: data and talk, and when they may be coloured.

use std::io::{self, IsTerminal, Write};

use crate::cli::{Global, When};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    pub(crate) color_out: bool,
    pub(crate) color_err: bool,
    /// Progress bars and other things that move.
    pub(crate) live: bool,
    pub(crate) quiet: bool,
}

impl Term {
    pub(crate) fn detect(global: &Global) -> Term {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let color = |terminal: bool| match global.color {
            When::Always => true,
            When::Never => false,
            When::Auto => terminal && !plain && !dumb,
        };
        let error_terminal = io::stderr().is_terminal();
        Term {
            color_out: color(io::stdout().is_terminal()),
            color_err: color(error_terminal),
            live: error_terminal && !dumb && !global.quiet,
            quiet: global.quiet,
        }
    }

    /// Before the command line is understood.
    pub(crate) fn plain() -> Term {
        Term { color_out: false, color_err: false, live: false, quiet: false }
    }

    /// Data. An error here ends the command, and a closed pipe ends it well.
    pub(crate) fn print(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Talk. Nobody listening is no problem.
    pub(crate) fn say(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Talk that `--quiet` leaves out.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            self.say(text);
        }
    }
}

/// Names for colours, empty when there are none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(pub(crate) bool);

impl Paint {
    pub(crate) fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.wrap("31", text)
    }

    pub(crate) fn cyan(self, text: &str) -> String {
        self.wrap("36", text)
    }

    pub(crate) fn faint(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
