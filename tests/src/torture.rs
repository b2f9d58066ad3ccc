//! What a stage promises when it is killed, when the disk fails, when its files are damaged: the means of trying it.
//!
//! A [`Bench`] holds finished stages of the small world. A trial runs one of them again in another folder, does harm on the
//! way, lets the same command finish, and compares every file with those of the run that nothing happened to.

mod damage;
mod disk;
mod faults;
mod kills;
mod shards;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use mempo_run::{FileRecord, finished, seed_of, verify};

pub use self::damage::{cut_trial, damage_trial};
pub use self::disk::{can_mount, disk_trial};
pub use self::faults::{FAULTS, Fault, can_trace, count_calls, fault_trial};
pub use self::kills::{Kills, kill_trial, race_trial};
pub use self::shards::shard_trial;
use crate::chain::{SMALL_UNITS, Stage, stages, write_inputs};
use crate::program;

/// In the environment of every process, and in no file.
const CANARY: &str = "canary-1f0c2b";

/// Finished stages to compare with.
pub struct Bench {
    dir: PathBuf,
    stages: Vec<Stage>,
}

impl Bench {
    /// Runs all stages in a folder; those that are finished there already are left.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        fs_err::create_dir_all(dir)?;
        if !dir.join("config.json").exists() {
            write_inputs(dir, 40);
        }
        let bench = Self { dir: fs_err::canonicalize(dir)?, stages: stages(SMALL_UNITS) };
        for stage in &bench.stages {
            bench.must_finish(&stage.line)?;
        }
        Ok(bench)
    }

    /// All stages, in order.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Bytes of a stage's files.
    pub fn size(&self, stage: &Stage) -> anyhow::Result<u64> {
        Ok(finished(&self.path(&stage.out))?.files.iter().map(|file| file.size).sum())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A command that runs a line in the bench's folder, as quietly as it may.
    fn command(&self, line: &str) -> Command {
        let mut words = line.split_whitespace();
        let mut command = program(words.next().unwrap_or_default());
        command.args(words).args(["--quiet"]).current_dir(&self.dir);
        command.env("OMP_NUM_THREADS", "1").env("RAYON_NUM_THREADS", "1").env("HF_TOKEN", CANARY);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs a line to its end, which must be a good one; the time it took.
    fn must_finish(&self, line: &str) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let output = self.command(line).stderr(Stdio::piped()).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`{line}`: {}\n{text}", output.status);
        Ok(start.elapsed())
    }

    /// How long a stage takes that nothing happens to.
    pub fn duration(&self, stage: &Stage) -> anyhow::Result<Duration> {
        let out = Trial::new(self, stage, "undisturbed")?;
        let duration = self.must_finish(&out.line)?;
        out.must_equal_reference()?;
        Ok(duration)
    }
}

/// A stage run again in a folder of its own, which is removed with it.
struct Trial<'b> {
    bench: &'b Bench,
    stage: &'b Stage,
    line: String,
    out: PathBuf,
}

impl<'b> Trial<'b> {
    fn new(bench: &'b Bench, stage: &'b Stage, name: &str) -> anyhow::Result<Self> {
        let name = format!("trial-{}-{name}", stage.out);
        let out = bench.path(&name);
        remove(&out)?;
        Ok(Self { bench, stage, line: stage.with_out(&name), out })
    }

    /// Ends the trial: the same command finishes, and what it leaves is what nothing happened to.
    fn must_recover(&self) -> anyhow::Result<()> {
        self.bench.must_finish(&self.line)?;
        self.must_equal_reference()
    }

    fn must_equal_reference(&self) -> anyhow::Result<()> {
        let (reference, found) = (verify(&self.bench.path(&self.stage.out))?, verify(&self.out)?);
        ensure!(reference.rows == found.rows, "{}: rows {:?}, not {:?}", self.line, found.rows, reference.rows);
        ensure!(!holds_canary(&self.out)?, "{}: a value of the environment is in a file", self.line);
        if let Some(difference) = first_difference(reproducible(&reference.files), reproducible(&found.files)) {
            bail!("{}: {difference}", self.line);
        }
        let leftovers = leftovers(&self.out)?;
        ensure!(leftovers.is_empty(), "{}: left behind {leftovers:?}", self.line);
        Ok(())
    }

    /// Whether the trial's folder counts as finished.
    fn is_finished(&self) -> bool {
        self.out.is_dir() && finished(&self.out).is_ok()
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        // Kept to be looked at if something is wrong with it.
        if !std::thread::panicking() {
            let _ = remove(&self.out);
        }
    }
}

/// The files whose bytes are promised: all but a search index, whose own file names are drawn.
fn reproducible(files: &[FileRecord]) -> Vec<&FileRecord> {
    files.iter().filter(|file| !file.path.starts_with("index/")).collect()
}

fn first_difference(reference: Vec<&FileRecord>, found: Vec<&FileRecord>) -> Option<String> {
    let names = |files: &[&FileRecord]| files.iter().map(|file| file.path.clone()).collect::<Vec<_>>();
    if names(&reference) != names(&found) {
        return Some(format!("files {:?}, not {:?}", names(&found), names(&reference)));
    }
    let other = reference.into_iter().zip(found).find(|(reference, found)| reference != found);
    other.map(|(reference, found)| format!("{}: {} bytes, {} without harm", found.path, found.size, reference.size))
}

/// Files that only live while something is written.
fn leftovers(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains(".tmp-") || name.contains(".old-") || name == "resume" {
            found.push(name);
        } else if entry.file_type()?.is_dir() {
            found.extend(leftovers(&entry.path())?);
        }
    }
    Ok(found)
}

/// Whether a file below a folder tells what only the environment holds.
fn holds_canary(folder: &Path) -> anyhow::Result<bool> {
    for entry in fs_err::read_dir(folder)? {
        let path = entry?.path();
        let holds = if path.is_dir() {
            holds_canary(&path)?
        } else {
            fs_err::read(&path)?.windows(CANARY.len()).any(|window| window == CANARY.as_bytes())
        };
        if holds {
            return Ok(true);
        }
    }
    Ok(false)
}

fn remove(folder: &Path) -> std::io::Result<()> {
    if folder.exists() { fs_err::remove_dir_all(folder) } else { Ok(()) }
}

/// Waits for a child, but no longer than `limit`.
fn wait_at_most(child: &mut Child, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= limit {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Numbers in [0, 1) named by what they are for.
fn uniform(seed: u64, parts: &[&str]) -> f64 {
    (seed_of(seed, parts) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A moment between a millisecond and `longest`, as likely between 1 and 10 milliseconds as between 10 and 100.
fn moment(seed: u64, parts: &[&str], longest: Duration) -> Duration {
    let (low, high) = (1e-3_f64.ln(), longest.as_secs_f64().max(2e-3).ln());
    Duration::from_secs_f64((low + (high - low) * uniform(seed, parts)).exp())
}

/// Whether a program of the system is there.
pub fn has(program: &str) -> bool {
    Command::new("sh").args(["-c", &format!("command -v {program}")]).output().is_ok_and(|found| found.status.success())
}

fn read_to_string(path: &Path) -> anyhow::Result<String> {
    fs_err::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}
