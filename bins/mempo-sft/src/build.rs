//! `mempo-sft build`: trajectories, pairs or text -> table `sft_examples`.
//!
//! Inputs are cut into units of some hundred rows; the rows of a unit are encoded in parallel, filtered, written as one part
//! and forgotten. Beside each part stands `counts/part-*.json` with what became of its rows. In memory are two units (one is
//! written while the next is encoded), with `--tasks` each task's gold answers, and what [`crate::kin`] and [`crate::duplicates`] need.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, anyhow};
use mempo_agent::{ContextOptions, ToolNames};
use mempo_data::{SftExample, Task, read_rows, write_rows};
use mempo_run::{Input, ResultExt, ShardedStageArgs, Stage};
use mempo_text::{Profile, ToolSpec};
use rayon::prelude::*;
use serde::Serialize;
use tracing::{info, warn};

use crate::condition::{Condition, Facts};
use crate::counts::Counts;
use crate::duplicates::{self, Finder};
use crate::encode::{Encoder, Settings};
use crate::example::Encoded;
use crate::filter::FilterOptions;
use crate::gold::Tasks;
use crate::kin::Kin;
use crate::record::InputFormat;
use crate::source::{Reader, Row, Source, Unit, find_sources, plan_units};

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
/// messages; verl's `extra_info` may hold them), MEM1's `q`, `t0`, `r0`, `i0`, `t1` …, or plain `text`; files are JSON lines or one JSON array (also .gz, .zst), or Parquet. A
/// directory written by `mempo-rollout sample` is read as it stands, with the ids that were sampled. Each assistant turn of a
/// trajectory becomes one example whose prompt is what the agent would see at that step; only the assistant's own tokens are
/// targets, and not those of turns with `loss_mask` or `weight` 0, `train` or `loss` false.
///
/// What was left out, and why, is counted at the end. A trajectory without memory is refused where --context carries nothing
/// else; one that lacks it in some steps is left out.
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
    #[command(flatten)]
    #[serde(skip)]
    tools: ToolNames,
    /// How rows are read
    #[arg(long, value_enum, default_value = "auto")]
    input_format: InputFormat,
    /// Tasks with gold answers, sources and splits, found by `task_id` or, where a row has none, by its question
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: Option<PathBuf>,
    #[command(flatten)]
    filter: FilterOptions,
    /// Share of tasks put aside, 0 to 1: their examples get the split `dev`, which `train` measures its loss on, the others
    /// `train`. Rows of one task or one question stay together, and what rows join that name both; other splits that rows or
    /// --tasks name remain
    #[arg(long, value_name = "SHARE")]
    validation_share: Option<f64>,
    /// Longest example in tokens: plain text is cut, longer steps are dropped and counted
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,
    /// --max-steps of the rollouts to come: profiles that tell how many steps are left (mem1) count from it
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    max_steps: u32,
    /// Rows that may be unusable before the stage stops
    #[arg(long, default_value_t = 0)]
    #[serde(skip)]
    max_bad: u64,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

/// What the manifest holds: the arguments, and the tools that prompts tell of, where there are others than `search`.
#[derive(Serialize)]
struct Resolved<'a> {
    #[serde(flatten)]
    arguments: &'a BuildArguments,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<Vec<ToolSpec>>,
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
    let condition = arguments.filter.check()?;
    let validation = validation(arguments)?;
    let (sources, mut inputs) = find_sources(&arguments.trajectories)?;
    let tasks = arguments.tasks.as_deref().map(|dir| Input::stage("tasks", dir)).transpose()?;
    inputs.push(tokenizer_input(&arguments.tokenizer)?);
    let profile = arguments.profile.as_deref().and_then(Profile::files);
    inputs.extend(profile.map(|files| Input::files("profile", &files)).transpose()?);
    let all_inputs: Vec<&Input> = inputs.iter().chain(&tasks).collect();
    let settings = Settings {
        format: arguments.input_format,
        tasks: Tasks::default(),
        max_tokens: arguments.max_tokens as usize,
        max_steps: arguments.max_steps as usize,
        validation,
        find_leaks: arguments.filter.drop_leaks || condition.as_ref().is_some_and(|condition| condition.asks("leaks")),
        keep_text: false,
    };
    // Before the directory is begun: a misspelt name must not be what a later start has to match.
    let profile = arguments.profile.as_deref().unwrap_or(arguments.context.profile());
    let tools = arguments.tools.read().bad_input()?;
    let encoder = Encoder::load(&arguments.tokenizer, (profile, &tools), &arguments.context, settings)?;
    let tools = Some(tools.specs()).filter(|specs| *specs != [ToolSpec::search()]);
    let resolved = Resolved { arguments, tools };
    let Some(stage) = Stage::open("mempo-sft", "build", &arguments.stage.stage(), &resolved, &all_inputs)? else {
        return Ok(());
    };
    let units = plan_units(&sources)?;
    let options = &arguments.filter;
    let mut builder = Builder {
        stage: &stage,
        sources: &sources,
        units: &units,
        encoder,
        options,
        condition,
        duplicates: HashMap::new(),
    };
    builder.encoder.settings.tasks = tasks.as_ref().map(read_tasks).transpose()?.unwrap_or_default();
    builder.join_kin()?;
    builder.find_duplicates()?;
    let counts = builder.build(arguments.max_bad)?;
    counts.lines().iter().for_each(|line| info!("{line}"));
    if counts.examples == 0 && arguments.stage.stage().shard.is_none() {
        return Err(anyhow!("no example came of the rows: {}", counts.lines().join("; "))).bad_input();
    }
    stage.finish(&[(TABLE, counts.examples)], serde_json::to_value(&counts)?)
}

/// All that the rows go through.
struct Builder<'a> {
    stage: &'a Stage,
    sources: &'a [Source],
    units: &'a [Unit],
    encoder: Encoder,
    options: &'a FilterOptions,
    condition: Option<Condition>,
    /// Why a row is a duplicate, by its number.
    duplicates: HashMap<u64, &'static str>,
}

impl Builder<'_> {
    /// Goes through all rows once, where some are put aside: which tasks and questions belong together.
    fn join_kin(&mut self) -> anyhow::Result<()> {
        let Some(mut kin) = self.encoder.settings.validation.take() else { return Ok(()) };
        let progress = self.stage.progress("joining", self.units.iter().map(|unit| unit.rows).sum(), "rows");
        let mut reader = Reader::new(self.sources);
        for unit in self.units {
            self.stage.check_interrupt()?;
            kin.join_rows(&reader.read(*unit)?, &self.encoder.settings);
            progress.inc(unit.rows);
        }
        self.encoder.settings.validation = Some(kin);
        Ok(())
    }

    /// Goes through all rows once, where duplicates are looked for and no earlier start has done so.
    fn find_duplicates(&mut self) -> anyhow::Result<()> {
        let Some(mut finder) = Finder::new(self.options) else { return Ok(()) };
        if let Some(found) = duplicates::read(self.stage)? {
            self.duplicates = found;
            return Ok(());
        }
        let progress = self.stage.progress("comparing", self.units.iter().map(|unit| unit.rows).sum(), "rows");
        let mut reader = Reader::new(self.sources);
        self.encoder.settings.keep_text = true;
        for unit in self.units {
            self.stage.check_interrupt()?;
            let rows = reader.read(*unit)?;
            // A row that can't be used is told of when it is its turn to be written.
            let encoded = self.encode_rows(&rows).into_iter().map(Result::unwrap_or_default).collect();
            let encoded = self.filter(encoded)?;
            let kept = rows.iter().zip(&encoded).filter(|(_, encoded)| !encoded.is_empty());
            let kept: Vec<_> =
                kept.map(|(row, encoded)| (row.number, encoded.examples.as_slice(), encoded.text.as_str())).collect();
            finder.compare(&kept)?;
            progress.inc(unit.rows);
        }
        self.encoder.settings.keep_text = false;
        self.duplicates = finder.finish(self.stage)?;
        Ok(())
    }

    /// Encodes and writes every unit of this shard that is not there yet; the books of all of them. One unit is written while
    /// the next is encoded.
    fn build(&self, max_bad: u64) -> anyhow::Result<Counts> {
        let mine = self.stage.shard_range(self.units.len());
        let rows = self.units[mine.clone()].iter().map(|unit| unit.rows).sum();
        let progress = self.stage.progress("encoding", rows, "rows");
        let mut reader = Reader::new(self.sources);
        let mut books = Counts::default();
        thread::scope(|scope| {
            let mut writing = None;
            for (index, unit) in self.units.iter().enumerate().take(mine.end) {
                if index < mine.start {
                    reader.skip(*unit)?;
                    continue;
                }
                self.stage.check_interrupt()?;
                if self.stage.has_part(TABLE, index) {
                    reader.skip(*unit)?;
                    books.add(&read_counts(self.stage, index)?);
                    progress.skip(unit.rows);
                    continue;
                }
                let bad_left = max_bad.saturating_sub(books.bad_rows);
                let path = self.sources[unit.source].path();
                let (examples, counts) = self.build_unit(path, &reader.read(*unit)?, bad_left)?;
                books.add(&counts);
                writing.take().map_or(Ok(()), written)?;
                let progress = &progress;
                writing = Some(scope.spawn(move || {
                    write_unit(self.stage, index, &examples, &counts)?;
                    progress.inc(unit.rows);
                    Ok(())
                }));
            }
            writing.take().map_or(Ok(()), written)
        })?;
        Ok(books)
    }

    /// The examples of a unit in the order of its rows, and its books.
    fn build_unit(&self, path: &Path, rows: &[Row], bad_left: u64) -> anyhow::Result<(Vec<SftExample>, Counts)> {
        let (mut encoded, mut numbers, mut counts) = (Vec::new(), Vec::new(), Counts::default());
        for (row, result) in rows.iter().zip(self.encode_rows(rows)) {
            match result {
                Ok(built) => {
                    encoded.push(built);
                    numbers.push(row.number);
                }
                Err(problem) if counts.bad_rows < bad_left => {
                    warn!("{}:{}: {problem}; row left out", path.display(), row.line);
                    counts.bad_rows += 1;
                }
                Err(problem) => return Err(anyhow!("{}:{}: {problem}", path.display(), row.line)).bad_input(),
            }
        }
        let mut examples = Vec::new();
        for (mut built, number) in self.filter(encoded)?.into_iter().zip(numbers) {
            if let Some(reason) = self.duplicates.get(&number) {
                built.leave_out(reason);
            }
            counts.add(&built.counts);
            examples.extend(built.examples);
        }
        Ok((examples, counts))
    }

    /// Each row's examples, or what is wrong with it; those that --keep and --drop-leaks leave out have none.
    fn encode_rows(&self, rows: &[Row]) -> Vec<Result<Encoded, String>> {
        let encode = |row: &Row| {
            let mut encoded = self.encoder.encode_row(row)?;
            if !encoded.is_empty()
                && let Some(reason) =
                    self.options.reason(&encoded.facts).map_err(|asks| self.no_gold(asks, &encoded.facts))?
            {
                encoded.leave_out(reason);
            }
            Ok(encoded)
        };
        rows.par_iter().map(encode).collect()
    }

    /// What an option lacks that needs gold answers.
    fn no_gold(&self, asks: &str, facts: &Facts) -> String {
        match &facts.task_id {
            Some(task) if !self.encoder.settings.tasks.is_empty() => {
                format!("task `{task}` is not among the tasks given by --tasks")
            }
            _ => format!(
                "no gold answers: {asks} needs `golden_answers` in the row, or its task (by `task_id` or question) among \
                 --tasks DIR"
            ),
        }
    }

    /// Leaves out the rows of which --where is not true.
    fn filter(&self, mut encoded: Vec<Encoded>) -> anyhow::Result<Vec<Encoded>> {
        if let Some(condition) = &self.condition {
            // What is out already may know nothing of itself.
            let mut left: Vec<&mut Encoded> = encoded.iter_mut().filter(|row| !row.is_empty()).collect();
            let facts: Vec<Facts> = left.iter().map(|row| row.facts.clone()).collect();
            for (row, holds) in left.iter_mut().zip(condition.holds(&facts).usage()?) {
                if !holds {
                    row.leave_out("--where is not true (rows)");
                }
            }
        }
        Ok(encoded)
    }
}

/// Waits until a unit is written.
fn written(writing: ScopedJoinHandle<'_, anyhow::Result<()>>) -> anyhow::Result<()> {
    writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Counts first: a unit is done when its part is there.
fn write_unit(stage: &Stage, index: usize, examples: &[SftExample], counts: &Counts) -> anyhow::Result<()> {
    stage.write_file(&counts_name(index), |sink| Ok(serde_json::to_writer(sink, counts)?))?;
    stage.write_part(TABLE, index, |sink| {
        write_rows(examples, sink)?;
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

/// What is to be put aside, by its share and the seed that decides which.
fn validation(arguments: &BuildArguments) -> anyhow::Result<Option<Kin>> {
    let Some(share) = arguments.validation_share else { return Ok(None) };
    if !(0.0..1.0).contains(&share) {
        return Err(anyhow!("--validation-share {share}, expected a share from 0 to below 1")).usage();
    }
    Ok(Some(Kin::new(share, arguments.stage.stage().seed)))
}

fn tokenizer_input(dir: &Path) -> anyhow::Result<Input> {
    let files: Vec<PathBuf> = TOKENIZER_FILES.iter().map(|name| dir.join(name)).filter(|path| path.exists()).collect();
    if !files.iter().any(|path| path.ends_with("tokenizer.json")) {
        return Err(anyhow!("{}: no tokenizer.json; expected a model directory", dir.display())).bad_input();
    }
    Input::files("tokenizer", &files)
}

fn read_tasks(input: &Input) -> anyhow::Result<Tasks> {
    let rows = read_rows::<Task>(&input.table("tasks")?).bad_input()?;
    rows.map(ResultExt::bad_input).collect()
}
