//! Signals: the first SIGINT or SIGTERM asks the stage to stop at the next commit, the second ends the process.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::Failure;

/// What a shell gives for a process ended by SIGINT.
const SECOND_SIGNAL: i32 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Listens for signals from now on.
pub(crate) fn install() {
    let installed = ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            #[allow(clippy::exit, reason = "everything committed is on disk; the user wants out now")]
            std::process::exit(SECOND_SIGNAL);
        }
        tracing::warn!("stopping after what is being done; a second signal stops at once");
    });
    if let Err(error) = installed {
        tracing::warn!("signals will end the run at once: {error}");
    }
}

/// An error (exit code 75) once a signal has come; for what runs outside a [`crate::Stage`].
pub fn check() -> anyhow::Result<()> {
    if REQUESTED.load(Ordering::SeqCst) { Err(Failure::Interrupted.into()) } else { Ok(()) }
}
