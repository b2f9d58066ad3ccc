//! Entry point of the demonstration's own program.

use std::process::ExitCode;

fn main() -> ExitCode {
    mempo_run::main(mempo_demo::run)
}
