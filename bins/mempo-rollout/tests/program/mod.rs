//! What the tests share: running the program in this process, and files for it.

use std::path::Path;

use clap::Parser;
use mempo_rollout::Arguments;
use serde_json::Value;

/// Runs a command line in this process; `@NAME` is a path in the directory.
pub(crate) fn run(directory: &Path, line: &str) -> anyhow::Result<()> {
    let path =
        |word: &str| word.strip_prefix('@').map_or(word.to_owned(), |name| directory.join(name).display().to_string());
    let words = std::iter::once("mempo-rollout".to_owned()).chain(line.split_whitespace().map(path));
    mempo_rollout::run(Arguments::try_parse_from(words)?)
}

/// Runs a command line that must fail; gives the exit code and the message.
pub(crate) fn fails(directory: &Path, line: &str) -> (u8, String) {
    let error = run(directory, line).expect_err(line);
    (mempo_run::exit_code(&error), format!("{error:#}"))
}

/// Writes JSON lines.
pub(crate) fn write_lines(path: &Path, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs_err::write(path, lines.join("\n")).unwrap();
}
