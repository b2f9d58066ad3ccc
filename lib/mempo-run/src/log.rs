//! Logging to standard error, in step with the progress bars that are drawn there.

use std::{
    io::{self, IsTerminal, Write},
    sync::{LazyLock, OnceLock},
};

use indicatif::MultiProgress;
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use crate::LogFormat;

/// All bars of the process; log lines are written between their redraws.
pub(crate) static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

struct Settings {
    quiet: bool,
    format: LogFormat,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// Sets up logging once; later calls change nothing.
pub(crate) fn init(quiet: bool, format: LogFormat) {
    if SETTINGS.set(Settings { quiet, format }).is_err() {
        return;
    }
    let level = if quiet { "warn" } else { "info,tantivy=warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Between)
        // The log must not end the run, even if standard error is closed or its disk is full.
        .log_internal_errors(false)
        .with_target(false);
    // Fails only if the program has a subscriber already; then that one is right.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(has_terminal() && !no_colour()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Whether errors, too, are wanted as JSON.
pub(crate) fn is_json() -> bool {
    SETTINGS.get().is_some_and(|settings| settings.format == LogFormat::Json)
}

/// Whether progress is drawn as a bar. Before [`init`], as in tests, it is not.
pub(crate) fn wants_bars() -> bool {
    let text = SETTINGS.get().is_some_and(|settings| !settings.quiet && settings.format == LogFormat::Text);
    text && has_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Does something to the terminal without the bars in the way.
pub(crate) fn suspend<T>(act: impl FnOnce() -> T) -> T {
    BARS.suspend(act)
}

fn has_terminal() -> bool {
    io::stderr().is_terminal()
}

/// <https://no-color.org>: any value but the empty one.
fn no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Writes log lines to standard error, between redraws of the bars.
struct Between;

impl<'a> MakeWriter<'a> for Between {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for Between {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        suspend(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
