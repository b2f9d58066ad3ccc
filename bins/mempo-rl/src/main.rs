//! Entry point of `mempo-rl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mempo_run::main(mempo_rl::run)
}
