//! `doctor`, a subcommand of every program: what a run will need, tried before the run. libtorch and the device; of a
//! model directory its config, weights, tokenizer and chat template, and the tokens where an answer begins.
//!
//! Every line is ✓, `!` (works, but know this) or ✗ with what to do; one ✗ ends the program with code 3.

mod machine;
mod model;
mod report;
mod text;

use std::path::PathBuf;

use anyhow::{anyhow, ensure};
use clap::Args;
use mempo_model::DeviceOptions;
use mempo_run::ResultExt;

use report::Report;

/// Try libtorch and the device, and whether a model directory can be used
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// A model directory to try: config, weights, tokenizer, chat template
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// How the agent talks: a built-in profile (mempo, react) or a folder
    #[arg(long, value_name = "NAME|DIR", default_value = "mempo")]
    profile: String,
    /// A gold answer, to see its tokens and those before it
    #[arg(long, value_name = "TEXT", default_value = "Paris")]
    answer: String,
    #[command(flatten)]
    device: DeviceOptions,
}

impl DoctorArguments {
    /// Prints what was found; an error (exit code 3) names what failed.
    pub fn run(&self) -> anyhow::Result<()> {
        ensure_text(&self.answer).usage()?;
        let report = self.examine();
        match report.failures() {
            [] => Ok(()),
            failures => Err(anyhow!("{} failed: see ✗ above", failures.join(", "))).quality(),
        }
    }

    fn examine(&self) -> Report {
        let mut report = Report::default();
        let runtime = machine::examine(&self.device, &mut report);
        if let Some(dir) = &self.model {
            let config = model::examine_config(dir, &mut report);
            let probe = text::examine(dir, self, config.as_ref(), &mut report);
            if let (Some(runtime), Some(_)) = (runtime, config) {
                model::examine_weights(dir, &runtime, probe.as_ref(), &mut report);
            }
        }
        report
    }
}

fn ensure_text(answer: &str) -> anyhow::Result<()> {
    ensure!(!answer.trim().is_empty(), "--answer is empty: give a text such as Paris");
    Ok(())
}

#[cfg(test)]
mod tests;
