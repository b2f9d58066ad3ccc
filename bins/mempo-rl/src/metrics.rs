//! `metrics.jsonl`: one line an optimizer step, nothing that varies between equal runs.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, ensure};
use fs_err::File;
use mempo_train::PolicyStats;
use serde::Serialize;
use serde_json::Value;

/// What one optimizer step did. A number that is not finite is written as null.
#[derive(Debug, Serialize)]
pub(crate) struct Metric {
    /// From 1, in this run.
    pub(crate) step: u64,
    /// Over all runs that handed the trainer state on.
    pub(crate) global_step: u64,
    /// From 0.
    pub(crate) epoch: u32,
    pub(crate) learning_rate: f64,
    /// Mean over the step's trajectories.
    pub(crate) reward_mean: f64,
    pub(crate) trajectories: u64,
    #[serde(flatten)]
    pub(crate) stats: PolicyStats,
}

/// The file, with what it holds.
pub(crate) struct MetricsFile {
    file: File,
    /// One a step done.
    pub(crate) lines: Vec<Value>,
}

impl MetricsFile {
    /// Opens the file at `path` with the lines of the first `steps` steps: later ones are done again, and so dropped.
    pub(crate) fn open(path: &Path, steps: u64) -> anyhow::Result<Self> {
        let text = if path.exists() { fs_err::read_to_string(path)? } else { String::new() };
        let kept: Vec<&str> = text.split_inclusive('\n').take(steps as usize).collect();
        let damaged = || format!("{}: not the metrics of {steps} steps; run with --restart", path.display());
        let lines: Vec<Value> =
            kept.iter().map(|line| serde_json::from_str(line)).collect::<Result<_, _>>().with_context(damaged)?;
        ensure!(lines.len() as u64 == steps && kept.concat().ends_with('\n') == (steps > 0), damaged());
        let file = fs_err::OpenOptions::new().create(true).append(true).open(path)?;
        file.set_len(kept.iter().map(|line| line.len() as u64).sum())?;
        Ok(Self { file, lines })
    }

    /// Appends a line.
    pub(crate) fn push(&mut self, metric: &Metric) -> anyhow::Result<()> {
        let line = serde_json::to_string(metric)?;
        self.file.write_all((line.clone() + "\n").as_bytes())?;
        self.lines.push(serde_json::from_str(&line)?);
        Ok(())
    }

    /// Makes all lines durable: a state is saved only after the lines that lead to it.
    pub(crate) fn sync(&self) -> anyhow::Result<()> {
        Ok(self.file.sync_data()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(step: u64) -> Metric {
        let stats = PolicyStats {
            loss: 0.5,
            policy_loss: 0.5,
            kl: None,
            ratio_mean: 1.0,
            ratio_max: 1.0,
            clip_fraction: 0.0,
            entropy: 2.0,
            gradient_norm: f64::NAN,
            tokens: 7,
            skipped: true,
        };
        Metric {
            step,
            global_step: step + 10,
            epoch: 0,
            learning_rate: 1e-6,
            reward_mean: 0.25,
            trajectories: 4,
            stats,
        }
    }

    #[test]
    fn continuing_drops_the_lines_of_steps_that_are_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsFile::open(&path, 0).unwrap();
        (1..=4).for_each(|step| metrics.push(&metric(step)).unwrap());
        assert!(metrics.lines[0]["gradient_norm"].is_null() && metrics.lines[0]["kl"].is_null());
        let whole = fs_err::read(&path).unwrap();
        // A torn line, as a kill leaves it.
        fs_err::write(&path, [&whole[..], b"{\"step\": 5"].concat()).unwrap();
        let mut metrics = MetricsFile::open(&path, 2).unwrap();
        assert_eq!(metrics.lines.len(), 2);
        (3..=4).for_each(|step| metrics.push(&metric(step)).unwrap());
        assert_eq!(fs_err::read(&path).unwrap(), whole);
        assert!(MetricsFile::open(&path, 5).is_err());
    }
}
