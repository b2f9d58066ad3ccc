//! What a program can end with: kinds of failure, their exit codes, and `main`.

use std::{
    io::{ErrorKind, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
};

use crate::{interrupt, log, output};

/// Any other failure.
const FAILURE: u8 = 1;
/// Disk or I/O error.
const IO: u8 = 74;

/// A failure with an exit code of its own. Everything else ends with 1.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// 2: the words of the command do not fit together, or not with what is there.
    #[error(transparent)]
    Usage(anyhow::Error),
    /// 3: the result is not good enough to go on with (error rate, NaN).
    #[error(transparent)]
    Quality(anyhow::Error),
    /// 4: an input is missing, damaged or means nothing.
    #[error(transparent)]
    BadInput(anyhow::Error),
    /// 73: another run holds the output.
    #[error("{} is held by {owner}; wait for it to end, or choose another --out", out.display())]
    Locked {
        /// The output.
        out: PathBuf,
        /// Process and host of the other run.
        owner: String,
    },
    /// 74: the output cannot be written.
    #[error("cannot write {}{room}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Where the disk is full: what is free and what is needed, and what to do.
        room: String,
        /// The cause.
        source: anyhow::Error,
    },
    /// 75: a signal came; what was committed stays.
    #[error("interrupted; run the same command again to continue")]
    Interrupted,
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Quality(_) => 3,
            Self::BadInput(_) => 4,
            Self::Locked { .. } => 73,
            Self::Io { .. } => IO,
            Self::Interrupted => 75,
        }
    }

    /// Whether one of an error's causes already is a failure with a code of its own.
    pub(crate) fn is_in(error: &anyhow::Error) -> bool {
        error.chain().any(<dyn std::error::Error>::is::<Self>)
    }
}

/// Says what kind of failure an error is. An error that already is a [`Failure`] stays what it is.
pub trait ResultExt<T> {
    /// What the result holds if it failed.
    type Error;

    /// An input is missing, damaged or means nothing (exit code 4).
    fn bad_input(self) -> anyhow::Result<T>;
    /// The words of the command do not fit together (exit code 2).
    fn usage(self) -> anyhow::Result<T>;
    /// The result is not good enough to go on with (exit code 3).
    fn quality(self) -> anyhow::Result<T>;
    /// The same, of those errors that mean it.
    fn quality_if(self, means_it: impl FnOnce(&Self::Error) -> bool) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> ResultExt<T> for Result<T, E> {
    type Error = E;

    fn bad_input(self) -> anyhow::Result<T> {
        self.map_err(|error| mark(error.into(), Failure::BadInput))
    }

    fn usage(self) -> anyhow::Result<T> {
        self.map_err(|error| mark(error.into(), Failure::Usage))
    }

    fn quality(self) -> anyhow::Result<T> {
        self.map_err(|error| mark(error.into(), Failure::Quality))
    }

    fn quality_if(self, means_it: impl FnOnce(&E) -> bool) -> anyhow::Result<T> {
        self.map_err(|error| {
            let means_it = means_it(&error);
            let error = error.into();
            if means_it { mark(error, Failure::Quality) } else { error }
        })
    }
}

fn mark(error: anyhow::Error, kind: fn(anyhow::Error) -> Failure) -> anyhow::Error {
    if Failure::is_in(&error) { error } else { kind(error).into() }
}

/// The exit code that `error` ends a program with.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(failure) = error.chain().find_map(|cause| cause.downcast_ref::<Failure>()) {
        return failure.exit_code();
    }
    let io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    if io_errors.into_iter().any(is_disk_error) { IO } else { FAILURE }
}

/// Whether an error is the disk's fault whatever was being done.
fn is_disk_error(error: &std::io::Error) -> bool {
    const EIO: i32 = 5;
    let kinds =
        [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge, ErrorKind::ReadOnlyFilesystem];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(EIO)
}

/// A program's `main`: parses the command line, runs, reports an error once and gives the exit code.
pub fn main<A: clap::Parser>(run: fn(A) -> anyhow::Result<()>) -> ExitCode {
    let arguments = match A::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nobody is left to tell if help cannot be printed.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    interrupt::install();
    let Ok(result) = catch_unwind(AssertUnwindSafe(|| run(arguments))) else {
        // The panic hook has said what happened.
        return ExitCode::from(FAILURE);
    };
    match result.and_then(|()| output::check()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

fn report(error: &anyhow::Error) {
    let message = printable(&format!("{error:#}"));
    if log::is_json() {
        tracing::error!("{message}");
    } else {
        log::suspend(|| {
            // Nobody is left to tell if standard error cannot be written.
            let _ = writeln!(std::io::stderr(), "error: {message}");
        });
    }
}

/// Bytes of the longest message.
const LONGEST_MESSAGE: usize = 8 << 10;

/// A message that may quote what strangers wrote: no control characters, and no more than fits a few screens.
fn printable(message: &str) -> String {
    let escaped = |character: char| match character {
        '\n' => vec![character],
        character if character.is_control() => character.escape_default().collect(),
        character => vec![character],
    };
    let whole: String = message.chars().flat_map(escaped).collect();
    if whole.len() <= LONGEST_MESSAGE {
        return whole;
    }
    let beginning = &whole[..whole.floor_char_boundary(LONGEST_MESSAGE)];
    format!("{beginning} … ({} bytes in all)", whole.len())
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    fn io_error(kind: ErrorKind) -> anyhow::Error {
        std::io::Error::from(kind).into()
    }

    #[test]
    fn codes_are_found_below_contexts() {
        let failed = || -> anyhow::Result<()> { Err(anyhow!("low")) };
        let check = |result: anyhow::Result<()>, code: u8, text: &str| {
            let error = result.context("above").unwrap_err();
            assert_eq!((exit_code(&error), format!("{error:#}").as_str()), (code, text));
        };
        check(failed(), 1, "above: low");
        check(failed().usage(), 2, "above: low");
        check(failed().quality(), 3, "above: low");
        check(failed().context("middle").bad_input(), 4, "above: middle: low");
        check(Err(Failure::Interrupted.into()), 75, "above: interrupted; run the same command again to continue");
    }

    #[test]
    fn messages_are_cut_and_cannot_paint_the_terminal() {
        assert_eq!(printable("a\n\u{1b}[31mb\0ä"), "a\n\\u{1b}[31mb\\u{0}ä");
        let long = printable(&"x".repeat(20_000));
        assert!(long.len() < 9_000 && long.ends_with("(20000 bytes in all)"), "{}", long.len());
    }

    #[test]
    fn the_first_kind_stays() {
        let interrupted: anyhow::Result<()> = Err(Failure::Interrupted.into());
        assert_eq!(exit_code(&interrupted.context("reading").bad_input().unwrap_err()), 75);
    }

    #[test]
    fn disk_errors_are_found_anywhere() {
        for (kind, code) in [
            (ErrorKind::StorageFull, 74),
            (ErrorKind::QuotaExceeded, 74),
            (ErrorKind::ReadOnlyFilesystem, 74),
            (ErrorKind::NotFound, 1),
        ] {
            assert_eq!(exit_code(&io_error(kind).context("saving")), code, "{kind}");
        }
        assert_eq!(exit_code(&std::io::Error::from_raw_os_error(5).into()), 74);
    }
}
