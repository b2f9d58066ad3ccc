//! System calls that fail: `strace` lets the N-th call of a kind fail or ends the process at it.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::{Bench, Trial, read_to_string};
use crate::chain::Stage;

/// A kind of system call and how it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// All calls of the kind, as `strace` names them.
    pub calls: &'static str,
    /// What happens at it: an error's name, or `KILL`.
    pub what: &'static str,
}

const fn fault(calls: &'static str, what: &'static str) -> Fault {
    Fault { calls, what }
}

const SYNC: &str = "fsync,fdatasync";
const RENAME: &str = "rename,renameat,renameat2";
const MAKE: &str = "mkdir,mkdirat";
const REMOVE: &str = "unlink,unlinkat,rmdir";
const WRITE: &str = "write,pwrite64,writev";

/// Everything that is tried.
pub const FAULTS: [Fault; 14] = [
    fault(WRITE, "KILL"),
    fault(WRITE, "EIO"),
    fault(WRITE, "ENOSPC"),
    fault(SYNC, "KILL"),
    fault(SYNC, "EIO"),
    fault(SYNC, "ENOSPC"),
    fault(RENAME, "KILL"),
    fault(RENAME, "EIO"),
    fault(RENAME, "ENOSPC"),
    fault(MAKE, "KILL"),
    fault(MAKE, "EIO"),
    fault(MAKE, "ENOSPC"),
    fault(REMOVE, "KILL"),
    fault(REMOVE, "EIO"),
];

impl Fault {
    /// The kind in one word: `fsync`.
    pub fn kind(self) -> &'static str {
        self.calls.split(',').next().unwrap_or(self.calls)
    }
}

/// How many calls of a kind an undisturbed run of a stage makes in the thread that makes most of them.
pub fn count_calls(bench: &Bench, stage: &Stage, fault: Fault) -> anyhow::Result<u64> {
    let trial = Trial::new(bench, stage, "count")?;
    let log = bench.path("strace.log");
    let mut command =
        traced(bench, &trial.line, &["-o".as_ref(), log.as_os_str(), "-e".as_ref(), trace(fault).as_ref()]);
    ensure!(command.status()?.success(), "`{}` does not run under strace", trial.line);
    let mut counts = std::collections::HashMap::new();
    for line in read_to_string(&log)?.lines().filter(|line| line.contains('(')) {
        *counts.entry(line.split_whitespace().next().unwrap_or_default().to_owned()).or_insert(0) += 1;
    }
    fs_err::remove_file(&log)?;
    Ok(counts.into_values().max().unwrap_or(0))
}

/// Runs a stage whose `number`-th call of a kind fails. It has to end with 74, or go on where nothing depends on the call;
/// a killed one has to be unfinished or whole. Then the same command finishes.
pub fn fault_trial(bench: &Bench, stage: &Stage, fault: Fault, number: u64) -> anyhow::Result<Option<i32>> {
    let trial = Trial::new(bench, stage, "fault")?;
    let harm = if fault.what == "KILL" { "signal=KILL".to_owned() } else { format!("error={}", fault.what) };
    let inject = format!("inject={}:{harm}:when={number}", fault.calls);
    let errors = bench.path("fault.log");
    let mut command =
        traced(bench, &trial.line, &["-o".as_ref(), "/dev/null".as_ref(), "-e".as_ref(), inject.as_ref()]);
    command.stderr(fs_err::File::create(&errors)?.into_parts().0);
    let status = command.status()?;
    let told = read_to_string(&errors)?;
    if fault.what != "KILL" {
        ensure!(
            matches!(status.code(), Some(0 | 74)),
            "`{}` ended with {status}, expected 0 or 74\n{told}",
            trial.line
        );
        ensure!(!told.contains("panicked"), "`{}` panicked\n{told}", trial.line);
    }
    if status.code() == Some(0) {
        ensure!(trial.is_finished(), "`{}` ended with 0 unfinished", trial.line);
    }
    trial.must_recover()?;
    Ok(status.code())
}

fn trace(fault: Fault) -> String {
    format!("trace={}", fault.calls)
}

fn traced(bench: &Bench, line: &str, options: &[&std::ffi::OsStr]) -> Command {
    let plain = bench.command(line);
    let mut command = Command::new("strace");
    command.args(["-f", "-qqq"]).args(options).arg("--").arg(plain.get_program()).args(plain.get_args());
    command.envs(plain.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command.current_dir(&bench.dir).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Whether `strace` may watch processes here.
pub fn can_trace() -> anyhow::Result<bool> {
    if !super::has("strace") {
        return Ok(false);
    }
    let status = Command::new("strace").args(["-qqq", "-e", "trace=none", "true"]).status();
    Ok(status.context("strace does not start")?.success())
}
