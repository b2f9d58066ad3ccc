//! `mempo-sft build`: trajectories, pairs or text -> table `sft_examples`.
//!
//! Inputs are cut into units of some hundred rows; the rows of a unit are encoded in parallel, written as one part and
//! forgotten. Beside each part stands `counts/part-*.json` with what became of its rows. In memory are one unit and,
//! with `--tasks`, each task's gold answers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use mempo_agent::ContextOptions;
use mempo_data::{Task, read_rows, write_rows};
use mempo_run::{Input, ResultExt, ShardedStageArgs, Stage};
use rayon::prelude::*;
use serde::Serialize;
use tracing::{info, warn};

use crate::counts::Counts;
use crate::encode::{Encoded, Encoder, Keep, TaskFacts};
use crate::source::{Reader, Row, Source, find_sources, plan_units};

const TABLE: &str = "sft_examples";
/// The files of a model directory that decide how text becomes ids.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
];

/// Turn trajectories into training examples: one a model call, with a loss mask.
///
/// Rows may be chat messages (`messages` or `conversations`, as OpenAI, Hugging Face, ShareGPT and Swift write them), a
/// `question` and its `transcript` with <information> between the turns, `prompt` and `completion` (or `response`, texts or
/// messages), or plain `text`; files are JSON lines (also .gz, .zst) or Parquet. A directory written by `mempo-rollout
/// sample` is read as it stands, with the ids that were sampled. Each assistant turn of a trajectory becomes one
/// example whose prompt is what the agent would see at that step; only the assistant's own tokens are targets.
#[derive(Debug, clap::Args, Serialize)]
pub(crate) struct BuildArguments {
    /// Files, folders of files, or rollout directories
    #[arg(long, required = true, num_args = 1.., value_name = "FILE|DIR")]
    #[serde(skip)]
    trajectories: Vec<PathBuf>,
    /// Model directory with tokenizer.json and the chat template
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tokenizer: PathBuf,
    #[command(flatten)]
    #[serde(flatten)]
    context: ContextOptions,
    /// How the agent talks: a built-in name or a folder [default: as --context]
    #[arg(long, value_name = "NAME|DIR")]
    #[serde(serialize_with = "profile_name")]
    profile: Option<String>,
    /// Tasks with gold answers and splits, found by `task_id`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: Option<PathBuf>,
    /// Which trajectories to keep; `correct` needs --tasks, except for rollouts, which hold their reward
    #[arg(long, value_enum, default_value = "all")]
    keep: Keep,
    /// Longest example in tokens: plain text is cut, longer steps are dropped and counted
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,
    /// Rows that may be unusable before the stage stops
    #[arg(long, default_value_t = 0)]
    #[serde(skip)]
    max_bad: u64,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

/// A profile's folder counts by its content (an input's digest), not by its path.
#[allow(clippy::ref_option, reason = "serde passes a reference to the field")]
fn profile_name<S: serde::Serializer>(profile: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let built_in = profile.as_deref().map(|name| if Path::new(name).is_dir() { "a folder" } else { name });
    built_in.serialize(serializer)
}

/// Runs the stage.
pub(crate) fn run(arguments: &BuildArguments) -> anyhow::Result<()> {
    arguments.stage.stage().check_free()?;
    let (sources, mut inputs) = find_sources(&arguments.trajectories)?;
    let tasks = arguments.tasks.as_deref().map(|dir| Input::stage("tasks", dir)).transpose()?;
    check_keep(arguments, &sources)?;
    inputs.push(tokenizer_input(&arguments.tokenizer)?);
    inputs.extend(profile_input(arguments)?);
    let all_inputs: Vec<&Input> = inputs.iter().chain(&tasks).collect();
    // Before the directory is begun: a misspelt name must not be what a later start has to match.
    let profile = arguments.profile.as_deref().unwrap_or(arguments.context.profile());
    let mut encoder = Encoder::load(&arguments.tokenizer, profile, &arguments.context)?;
    let Some(stage) = Stage::open("mempo-sft", "build", &arguments.stage.stage(), arguments, &all_inputs)? else {
        return Ok(());
    };
    encoder.keep = arguments.keep;
    encoder.max_tokens = arguments.max_tokens as usize;
    encoder.tasks = tasks.as_ref().map(read_tasks).transpose()?.unwrap_or_default();
    let counts = build_units(&stage, &sources, &encoder, arguments.max_bad)?;
    counts.lines().iter().for_each(|line| info!("{line}"));
    if counts.examples == 0 && arguments.stage.stage().shard.is_none() {
        return Err(anyhow!("no example came of the rows: {}", counts.lines().join("; "))).bad_input();
    }
    stage.finish(&[(TABLE, counts.examples)], serde_json::to_value(&counts)?)
}

/// Encodes and writes every unit of this shard that is not there yet; the books of all of them.
fn build_units(stage: &Stage, sources: &[Source], encoder: &Encoder, max_bad: u64) -> anyhow::Result<Counts> {
    let units = plan_units(sources)?;
    let mine = stage.shard_range(units.len());
    let rows = units[mine.clone()].iter().map(|unit| unit.rows).sum();
    let progress = stage.progress("encoding", rows, "rows");
    let mut reader = Reader::new(sources);
    let mut books = Counts::default();
    for (index, unit) in units.iter().enumerate().take(mine.end) {
        if index < mine.start {
            reader.skip(*unit)?;
            continue;
        }
        stage.check_interrupt()?;
        if stage.has_part(TABLE, index) {
            reader.skip(*unit)?;
            books.add(&read_counts(stage, index)?);
            progress.skip(unit.rows);
        } else {
            let bad_left = max_bad.saturating_sub(books.bad_rows);
            let path = sources[unit.source].path();
            let built = encode_unit(encoder, path, &reader.read(*unit)?, bad_left)?;
            write_unit(stage, index, &built)?;
            books.add(&built.counts);
            progress.inc(unit.rows);
        }
    }
    Ok(books)
}

/// The examples of a unit in the order of its rows.
fn encode_unit(encoder: &Encoder, path: &Path, rows: &[Row], bad_left: u64) -> anyhow::Result<Encoded> {
    let results: Vec<Result<Encoded, String>> = rows.par_iter().map(|row| encoder.encode_row(row)).collect();
    let mut unit = Encoded::default();
    for (row, result) in rows.iter().zip(results) {
        match result {
            Ok(built) => {
                unit.counts.add(&built.counts);
                unit.examples.extend(built.examples);
            }
            Err(problem) if unit.counts.bad_rows < bad_left => {
                warn!("{}:{}: {problem}; row left out", path.display(), row.line);
                unit.counts.bad_rows += 1;
            }
            Err(problem) => return Err(anyhow!("{}:{}: {problem}", path.display(), row.line)).bad_input(),
        }
    }
    Ok(unit)
}

/// Counts first: a unit is done when its part is there.
fn write_unit(stage: &Stage, index: usize, encoded: &Encoded) -> anyhow::Result<()> {
    stage.write_file(&counts_name(index), |sink| Ok(serde_json::to_writer(sink, &encoded.counts)?))?;
    stage.write_part(TABLE, index, |sink| {
        write_rows(&encoded.examples, sink)?;
        Ok(())
    })
}

fn counts_name(index: usize) -> String {
    format!("counts/part-{index:05}.json")
}

fn read_counts(stage: &Stage, index: usize) -> anyhow::Result<Counts> {
    let path = stage.dir().join(counts_name(index));
    let text = fs_err::read_to_string(&path)?;
    serde_json::from_str(&text)
        .with_context(|| format!("{}: not a unit's counts; run with --restart", path.display()))
        .bad_input()
}

fn check_keep(arguments: &BuildArguments, sources: &[Source]) -> anyhow::Result<()> {
    let recorded = sources.iter().find(|source| !matches!(source, Source::Rollout { .. }));
    match recorded {
        Some(source) if arguments.keep == Keep::Correct && arguments.tasks.is_none() => {
            let path = source.path().display();
            Err(anyhow!("--keep correct needs --tasks DIR: {path} holds no rewards, only the gold answers can tell"))
                .usage()
        }
        _ => Ok(()),
    }
}

fn tokenizer_input(dir: &Path) -> anyhow::Result<Input> {
    let files: Vec<PathBuf> = TOKENIZER_FILES.iter().map(|name| dir.join(name)).filter(|path| path.exists()).collect();
    if !files.iter().any(|path| path.ends_with("tokenizer.json")) {
        return Err(anyhow!("{}: no tokenizer.json; expected a model directory", dir.display())).bad_input();
    }
    Input::files("tokenizer", &files)
}

fn profile_input(arguments: &BuildArguments) -> anyhow::Result<Option<Input>> {
    let Some(dir) = arguments.profile.as_deref().map(Path::new).filter(|path| path.is_dir()) else { return Ok(None) };
    let mut files = fs_err::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    files.retain(|path| path.is_file());
    files.sort();
    Ok(Some(Input::files("profile", &files)?))
}

fn read_tasks(input: &Input) -> anyhow::Result<HashMap<String, TaskFacts>> {
    let rows = read_rows::<Task>(&input.table("tasks")?).bad_input()?;
    rows.map(|row| {
        let task = row.bad_input()?;
        Ok((task.task_id, TaskFacts { objectives: task.objectives, split: task.split }))
    })
    .collect()
}
