//! Tests of the whole workspace: the chain of programs end to end, what happens to it under harm, and its tidiness. What
//! `tests/*.rs` and `examples/torture.rs` share.

pub mod chain;
pub mod torture;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The workspace's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_path_buf()
}

/// A built program of the workspace, ready for arguments. `cargo build --workspace --bins` must have run.
pub fn program(name: &str) -> Command {
    let own = std::env::current_exe().expect("a program knows its own path");
    let folder = own.ancestors().nth(2).expect("tests lie in target/PROFILE/deps, examples in target/PROFILE/examples");
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace --bins` first", path.display());
    let mut command = Command::new(path);
    command.env("NO_COLOR", "1").env("OMP_NUM_THREADS", "2");
    command
}

/// Runs a program with words split on white space; panics with its standard error unless it exits with `code`.
#[track_caller]
pub fn run(directory: &Path, line: &str, code: i32) -> Output {
    let mut words = line.split_whitespace();
    let name = words.next().expect("a program's name");
    let output = program(name).args(words).current_dir(directory).output().expect("the program starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "`{line}`\n{text}");
    output
}
