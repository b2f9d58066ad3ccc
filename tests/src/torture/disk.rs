//! Disks that are too small: a stage on a file system in memory of a given size, which then grows.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::{Bench, Trial, remove};
use crate::chain::Stage;

/// Runs a stage with `kilobytes` of room for its output. It ends with 74, or fits; with more room it finishes. The first
/// exit code.
pub fn disk_trial(bench: &Bench, stage: &Stage, kilobytes: u64) -> anyhow::Result<i32> {
    let trial = Trial::new(bench, stage, "disk")?;
    let disk = bench.path("disk");
    remove(&disk)?;
    fs_err::create_dir_all(&disk)?;
    let line = stage.with_out("disk/out");
    let mut plain = bench.command(&line);
    let errors = bench.path("disk.log");
    let words: Vec<String> = std::iter::once(plain.get_program())
        .chain(plain.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let line = words.join(" ");
    // In a name space of its own, so that nothing has to be unmounted whatever happens.
    let script = format!(
        "mount -t tmpfs -o size={kilobytes}k none disk || exit 99\n\
         {line} 2> '{errors}'; first=$?\n\
         mount -o remount,size=1g none disk || exit 98\n\
         {line} 2>> '{errors}' || exit 97\n\
         cp -r disk/out '{out}' || exit 96\n\
         exit $first",
        errors = errors.display(),
        out = trial.out.display(),
    );
    plain.stdin(Stdio::null());
    let environment: Vec<_> = plain.get_envs().filter_map(|(key, value)| Some((key, value?))).collect();
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script]).envs(environment);
    let status = command.current_dir(&bench.dir).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    let told = super::read_to_string(&errors).unwrap_or_default();
    let code = status.code().context("the trial was killed")?;
    ensure!(matches!(code, 0 | 74), "{} with {kilobytes} KiB: exit code {code}\n{told}", stage.name);
    ensure!(code == 0 || told.contains("are free: make room"), "{} does not say what it needs:\n{told}", stage.name);
    ensure!(!told.contains("panicked"), "{} panicked\n{told}", stage.name);
    trial.must_equal_reference()?;
    Ok(code)
}

/// Whether this user may make file systems of its own.
pub fn can_mount() -> bool {
    let mount = "mount -t tmpfs -o size=64k none /mnt";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", mount]).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
