//! `show`: trajectories of a rollout to read: prompts collapsed to their length, completions and observations in full.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::Args;
use mempo_data::{Cursor, Key, Row, Step, Trajectory, read_rows};
use mempo_run::{ResultExt, print_data};
use serde_json::{Value, json};

use crate::tally::name;

/// Print trajectories of a rollout, finished or still running.
#[derive(Debug, Args)]
pub(crate) struct ShowArguments {
    /// The rollout's folder, or one shard's
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Start at this row of the table `trajectories`, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    row: usize,
    /// Only trajectories whose column has this value, such as reward=0 or status=truncated
    #[arg(long = "where", value_name = "COLUMN=VALUE", value_parser = condition)]
    condition: Option<(String, String)>,
    /// How many to print
    #[arg(short = 'n', value_name = "COUNT", default_value_t = 3)]
    count: usize,
}

fn condition(text: &str) -> Result<(String, String), String> {
    let (column, value) = text.split_once('=').ok_or("expected COLUMN=VALUE")?;
    Ok((column.trim().to_owned(), value.trim().to_owned()))
}

/// Runs `show`.
pub(crate) fn run(arguments: &ShowArguments) -> anyhow::Result<()> {
    let trajectories = read_rows::<Trajectory>(&parts(&arguments.dir, "trajectories")?).bad_input()?;
    let mut steps = Cursor::new(read_rows::<Step>(&parts(&arguments.dir, "steps")?).bad_input()?);
    let mut left = arguments.count;
    for (index, row) in trajectories.enumerate().skip(arguments.row) {
        if left == 0 {
            break;
        }
        let row = row.bad_input()?;
        let chosen = arguments.condition.as_ref().map_or(Ok(true), |(column, value)| matches(&row, column, value));
        if chosen.usage()? {
            print_data(&render(index, &row, &steps_of(&row, &mut steps)?));
            left -= 1;
        }
    }
    if left == arguments.count {
        tracing::info!("no trajectory of {} fits", arguments.dir.display());
    }
    Ok(())
}

/// The parts of a table that are there so far.
pub(crate) fn parts(dir: &Path, table: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let folder = dir.join(table);
    if folder.is_dir() {
        for entry in fs_err::read_dir(&folder)? {
            files.push(entry?.path());
        }
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "parquet"));
    files.sort();
    if files.is_empty() {
        let dir = dir.display();
        let error = anyhow!("{dir} holds no table `{table}`: name a rollout with a finished unit, or a shard's folder");
        return Err(error).bad_input();
    }
    Ok(files)
}

/// Whether a column has the value; numbers compare as numbers.
fn matches(row: &Trajectory, column: &str, value: &str) -> anyhow::Result<bool> {
    let fields = json!(row);
    let found = fields.get(column).with_context(|| {
        let names: Vec<&str> = fields.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        format!("no column `{column}`: there are {}", names.join(", "))
    })?;
    let wanted: Option<Value> = serde_json::from_str(value).ok();
    Ok(match found {
        Value::String(text) => text == value,
        Value::Number(number) => number.as_f64() == wanted.and_then(|wanted| wanted.as_f64()),
        other => Some(other) == wanted.as_ref(),
    })
}

fn steps_of(row: &Trajectory, steps: &mut Cursor<Step>) -> anyhow::Result<Vec<Step>> {
    let keys = (0..row.step_count).map(|step_index| Key { step_index, ..row.key() });
    let step = |key| {
        let step = steps.take(&key).bad_input()?;
        step.with_context(|| format!("the table `steps` lacks {key}: damaged, sample again")).bad_input()
    };
    keys.map(step).collect()
}

fn render(index: usize, row: &Trajectory, steps: &[Step]) -> String {
    let mut text = String::new();
    let reward = row.reward.map_or("none".to_owned(), |reward| reward.to_string());
    let format = if row.format_valid { "valid" } else { "invalid" };
    // Writing into a String can't fail.
    let _ = writeln!(text, "━━ row {index}: {}, trajectory {}", printable(&row.task_id), row.trajectory_index);
    let _ = writeln!(text, "   reward {reward} · {} · format {format} · {} steps", name(row.status), row.step_count);
    let _ = writeln!(
        text,
        "   tokens: {} generated, {} processed, {} unique, {} at most in a step",
        row.generated_tokens, row.processed_tokens, row.unique_tokens, row.peak_tokens
    );
    if let Some(answer) = &row.answer {
        let _ =
            writeln!(text, "   answer: {} · exact match {:?} · F1 {:?}", printable(answer), row.exact_match, row.f1);
    }
    if let Some(error) = &row.error {
        let _ = writeln!(text, "   error: {}", printable(error));
    }
    for step in steps {
        text.push_str(&render_step(step));
    }
    text.push('\n');
    text
}

fn render_step(step: &Step) -> String {
    let logprobs = &step.sampling_logprobs;
    let mean = logprobs.iter().map(|value| f64::from(*value)).sum::<f64>() / logprobs.len().max(1) as f64;
    let mut text = format!(
        "── step {}: prompt {} tokens, completion {} tokens, mean log-probability {mean:.3}, ended by {}\n{}\n",
        step.step_index,
        step.prompt_ids.len(),
        step.completion_ids.len(),
        json!(step.stop_reason).as_str().unwrap_or_default(),
        printable(&step.completion),
    );
    if let (Some(observation), Some(ids)) = (&step.observation, &step.observation_ids) {
        let _ = writeln!(text, "   observation, {} tokens:\n{}", ids.len(), printable(observation));
    }
    text
}

/// Text without characters that steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    let visible = |c: char| match c {
        '\n' | '\t' => c,
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(visible).collect()
}
