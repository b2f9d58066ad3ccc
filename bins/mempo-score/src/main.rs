//! Entry point of `mempo-score`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mempo_run::main(mempo_score::run)
}
