//! Entry point of `mempo-rollout`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mempo_run::main(mempo_rollout::run)
}
