//! Entry point of `mempo-sft`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mempo_run::main(mempo_sft::run)
}
