//! `metrics.jsonl`: one line an optimizer step, nothing that varies between equal runs; and the same for TensorBoard.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, anyhow};
use fs_err::{File, OpenOptions};
use serde::Serialize;
use serde_json::Value;

use crate::output::render_table;
use crate::tensorboard::EventFile;
use crate::{ResultExt, durable, overview};

/// The metrics of a training run: a file of one JSON object an optimizer step, and what it holds.
#[derive(Debug)]
pub struct MetricsFile {
    file: File,
    lines: Vec<Value>,
    events: EventFile,
}

impl MetricsFile {
    /// Opens `DIR/metrics.jsonl` with the lines of the first `steps` steps: those after the state that is continued
    /// from are done again, and so dropped.
    ///
    /// # Errors
    /// If the file holds fewer lines or something else.
    pub fn open(dir: &Path, steps: u64) -> anyhow::Result<Self> {
        let path = dir.join("metrics.jsonl");
        let text = if path.exists() { fs_err::read_to_string(&path)? } else { String::new() };
        let kept: Vec<&str> = text.split_inclusive('\n').take(steps as usize).collect();
        let lines = kept.iter().map(|line| serde_json::from_str(line)).collect::<Result<Vec<Value>, _>>();
        let lines =
            lines.with_context(|| format!("{}: not metrics; run with --restart", path.display())).bad_input()?;
        let whole = kept.iter().filter(|line| line.ends_with('\n')).count();
        if whole as u64 != steps {
            let problem = format!("{}: {whole} lines, expected {steps}; run with --restart", path.display());
            return Err(anyhow!(problem)).bad_input();
        }
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(&path)?;
            file.set_len(kept.iter().map(|line| line.len() as u64).sum())?;
            anyhow::Ok((file, EventFile::create(dir, &lines)?))
        };
        let (file, events) = open().map_err(|error| durable::failed(&path, &path, error))?;
        Ok(Self { file, lines, events })
    }

    /// Appends a line. A number that is not finite is written as null.
    pub fn push(&mut self, metric: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(metric)?;
        let value = serde_json::from_str(&line)?;
        let write = || -> anyhow::Result<()> {
            self.events.push(&value)?;
            Ok(self.file.write_all((line + "\n").as_bytes())?)
        };
        write().map_err(|error| self.failed(error))?;
        self.lines.push(value);
        Ok(())
    }

    fn failed(&self, error: anyhow::Error) -> anyhow::Error {
        durable::failed(self.file.path(), self.file.path(), error)
    }

    /// Makes all lines durable: a state is saved only after the lines that lead to it.
    pub fn sync(&self) -> anyhow::Result<()> {
        self.file.sync_data().map_err(|error| self.failed(error.into()))
    }

    /// One a step done.
    pub fn lines(&self) -> &[Value] {
        &self.lines
    }

    /// A value of every line that has it as a number, with the line's index.
    pub fn numbers<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (usize, f64)> + 'a {
        self.lines.iter().enumerate().filter_map(move |(index, line)| Some((index, line[name].as_f64()?)))
    }

    /// Logs the course of some metrics, on one screen.
    pub fn show(&self, metrics: &[&str]) {
        let (header, rows) = overview(&self.lines, metrics);
        tracing::info!("{} optimizer steps\n{}", self.lines.len(), render_table(&header, &rows));
    }

    /// A value of the last line; null if there is none.
    pub fn last(&self, name: &str) -> Value {
        self.lines.last().map_or(Value::Null, |line| line[name].clone())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn continuing_drops_the_lines_of_steps_that_are_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = MetricsFile::open(folder.path(), 0).unwrap();
        let line = |step: u64| json!({ "step": step, "loss": if step == 2 { f64::NAN } else { 0.5 } });
        (1..=4).for_each(|step| metrics.push(&line(step)).unwrap());
        assert!(metrics.lines()[1]["loss"].is_null());
        assert_eq!(metrics.numbers("loss").map(|(index, _)| index).collect::<Vec<_>>(), [0, 2, 3]);
        let path = folder.path().join("metrics.jsonl");
        let whole = fs_err::read(&path).unwrap();
        // A torn line, as a kill leaves it.
        fs_err::write(&path, [&whole[..], b"{\"step\": 5"].concat()).unwrap();
        let mut metrics = MetricsFile::open(folder.path(), 2).unwrap();
        assert_eq!((metrics.lines().len(), metrics.last("step")), (2, json!(2)));
        (3..=4).for_each(|step| metrics.push(&line(step)).unwrap());
        assert_eq!(fs_err::read(&path).unwrap(), whole);
        let error = MetricsFile::open(folder.path(), 5).unwrap_err();
        assert!(format!("{error:#}").contains("4 lines, expected 5"), "{error:#}");
        fs_err::write(&path, whole.strip_suffix(b"\n").unwrap()).unwrap();
        assert!(MetricsFile::open(folder.path(), 4).is_err());
    }
}
