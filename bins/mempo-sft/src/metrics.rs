//! `metrics.jsonl`: one line an optimizer step, nothing that varies between equal runs.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use fs_err as fs;
use mempo_run::ResultExt;
use serde::{Deserialize, Serialize};

/// What one optimizer step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Metric {
    /// From 1: how many steps were done.
    pub(crate) step: u64,
    /// From 0.
    pub(crate) epoch: u32,
    /// Mean negative log-probability of the step's target tokens, in nats, before the update; null if not finite.
    pub(crate) loss: Option<f64>,
    /// Of this step.
    pub(crate) learning_rate: f64,
    /// Before clipping; null if not finite: then the weights were left as they were.
    pub(crate) gradient_norm: Option<f64>,
    /// Tokens of the step, padding left out.
    pub(crate) tokens: u64,
    /// Targets among them.
    pub(crate) target_tokens: u64,
    /// The same mean over the validation examples after the update, where it was taken.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) validation_loss: Option<f64>,
}

/// The file, with what it holds.
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: fs::File,
    /// One a step done.
    pub(crate) lines: Vec<Metric>,
}

impl MetricsFile {
    /// Opens `path`, keeping the lines of the first `steps` steps: those after the state that is continued from are
    /// done again.
    pub(crate) fn open(path: &Path, steps: u64) -> anyhow::Result<Self> {
        let text = if path.exists() { fs::read_to_string(path)? } else { String::new() };
        let kept: Vec<&str> = text.split_inclusive('\n').take(steps as usize).collect();
        let lines = kept.iter().map(|line| serde_json::from_str(line)).collect::<Result<Vec<Metric>, _>>();
        let lines =
            lines.with_context(|| format!("{}: not metrics; run with --restart", path.display())).bad_input()?;
        if lines.len() as u64 != steps {
            let found = lines.len();
            let problem = format!("{}: {found} lines, expected {steps}; run with --restart", path.display());
            return Err(anyhow!(problem)).bad_input();
        }
        let bytes: usize = kept.iter().map(|line| line.len()).sum();
        let file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        file.set_len(bytes as u64)?;
        Ok(Self { path: path.to_path_buf(), file, lines })
    }

    /// Appends a line.
    pub(crate) fn push(&mut self, metric: Metric) -> anyhow::Result<()> {
        let line = serde_json::to_string(&metric)? + "\n";
        self.file.write_all(line.as_bytes()).with_context(|| self.path.display().to_string())?;
        self.lines.push(metric);
        Ok(())
    }

    /// Makes all lines durable: a state is saved only after the lines that lead to it.
    pub(crate) fn sync(&self) -> anyhow::Result<()> {
        Ok(self.file.sync_data()?)
    }

    /// The step with the lowest validation loss; the first of equals.
    pub(crate) fn best_validation(&self) -> Option<(u64, f64)> {
        let losses = self.lines.iter().filter_map(|line| Some((line.step, line.validation_loss?)));
        losses.min_by(|left, right| left.1.total_cmp(&right.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(step: u64, validation_loss: Option<f64>) -> Metric {
        let (loss, gradient_norm) = (Some(1.0 / step as f64), Some(0.1));
        Metric {
            step,
            epoch: 0,
            loss,
            learning_rate: 1e-5,
            gradient_norm,
            tokens: 9,
            target_tokens: 3,
            validation_loss,
        }
    }

    #[test]
    fn reopening_drops_the_steps_that_are_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut metrics = MetricsFile::open(&path, 0).unwrap();
        for (step, validation_loss) in [(1, Some(0.5)), (2, Some(0.25)), (3, Some(0.25)), (4, None)] {
            metrics.push(metric(step, validation_loss)).unwrap();
        }
        assert_eq!(metrics.best_validation(), Some((2, 0.25)));
        let whole = fs::read(&path).unwrap();
        // A torn line, as a kill leaves it.
        fs::write(&path, [&whole[..], b"{\"step\": 5"].concat()).unwrap();
        let mut metrics = MetricsFile::open(&path, 2).unwrap();
        assert_eq!(metrics.lines.len(), 2);
        metrics.push(metric(3, Some(0.25))).unwrap();
        metrics.push(metric(4, None)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        let error = MetricsFile::open(&path, 5).err().unwrap();
        assert!(format!("{error:#}").contains("4 lines, expected 5"), "{error:#}");
    }
}
