//! What every command gets.

use crate::cli::{Global, LogFormat};
use crate::config::Settings;
use crate::failure::Outcome;
use crate::term::Term;
use crate::world::Paths;

pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) paths: Paths,
    pub(crate) term: Term,
    pub(crate) verbose: u8,
    pub(crate) log_format: LogFormat,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Outcome<Context> {
        let settings = Settings::load(global)?;
        Ok(Context {
            paths: Paths::new(&settings.root, &settings.run),
            settings,
            term: Term::detect(global),
            verbose: global.verbose,
            log_format: global.log_format,
        })
    }

    pub(crate) fn client(&self) -> keel_api::Client {
        keel_api::Client::new(self.paths.socket())
    }

    /// Log lines go to standard error. `base` is the level without `-v` and `-q`.
    pub(crate) fn start_logging(&self, base: tracing::Level) {
        use tracing_subscriber::EnvFilter;
        let level = match (self.term.quiet, self.verbose) {
            (true, _) => tracing::Level::ERROR,
            (false, 0) => base,
            (false, 1) if base < tracing::Level::INFO => tracing::Level::INFO,
            (false, 1) => tracing::Level::DEBUG,
            (false, _) => tracing::Level::TRACE,
        };
        let filter = EnvFilter::builder()
            .with_env_var("KEEL_LOG")
            .with_default_directive(level.into())
            .from_env_lossy();
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        // A second start in one process is refused, which leaves the first: nothing to do about it.
        let _ = match self.log_format {
            LogFormat::Text => builder.with_ansi(false).with_target(false).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
        };
    }
}
