//! `mempo-score advantages`: from rewards to what the update needs of every step.

mod joined;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_data::{Advantage, write_rows};
use mempo_run::{Input, ResultExt, ShardedStageArgs, Stage};
use mempo_text::{Tags, Tokenizer};
use serde::Serialize;
use serde_json::{Value, json};

use joined::{JoinedRow, SegmentCells, check_finite, check_steps, joined_rows, next_task};

use crate::explain::Explained;
use crate::normalise::{
    Combine, Estimator, GroupAdvantages, GroupState, NormaliseOptions, Rewarded, group_advantages, not_negative,
};
use crate::query::Session;
use crate::rollouts::Rollouts;
use crate::spread::{Spread, SpreadOptions, TrajectoryCredit};
use crate::sums::Sums;

/// Consecutive tasks whose rows make one part.
const TASKS_PER_PART: usize = 1024;

/// What becomes of tasks whose trajectories all earned the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Degenerate {
    /// They stay: their tokens count in the loss's denominator.
    Keep,
    /// They are left out (loss weight 0).
    Drop,
    /// They are left out only if no memory has an advantage either (DAPO's filter, arXiv 2503.14476, without losing what
    /// memories teach).
    DropWithoutMemory,
}

/// What becomes of trajectories without a reward: something other than the policy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum NullRewards {
    /// They have no rows and count in no group.
    LeaveOut,
    /// They count as reward 0.
    Zero,
}

/// Which tokens of a memory get its advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Credit {
    /// All of `<mem>...</mem>`.
    Tags,
    /// Those between the tags; a token that reaches into a tag is not one of them.
    Inside,
}

/// Turn rewards and scores into advantages (table `advantages`)
#[derive(Debug, Args, Serialize)]
pub(crate) struct AdvantagesArguments {
    /// Directory of a finished `mempo-rollout sample`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    rollouts: PathBuf,
    /// Directory of a finished `mempo-score segments` of the same rollout. With it memories are paid, whatever the estimator;
    /// mempo needs it
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    scores: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    normalise: NormaliseOptions,
    #[command(flatten)]
    #[serde(flatten)]
    spread: SpreadOptions,
    /// Tasks whose trajectories all earned the same
    #[arg(long, value_enum, default_value = "keep")]
    degenerate: Degenerate,
    /// Trajectories without a reward
    #[arg(long, value_enum, default_value = "leave-out")]
    null_rewards: NullRewards,
    /// Subtract P from the reward of a trajectory whose format is not valid. Where few earn anything, nothing else tells steps that
    /// break off or repeat themselves from others. (A step of `--context memagent` that only rewrites the memory has no format)
    #[arg(long, value_name = "P", value_parser = not_negative)]
    #[serde(skip_serializing_if = "Option::is_none")]
    malformed_penalty: Option<f64>,
    /// Tokens of a memory that get its advantage
    #[arg(long, value_enum, default_value = "tags")]
    credit: Credit,
    /// Directory with the rollout's tokenizer; needed with `--credit inside`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tokenizer: Option<PathBuf>,
    /// Memory for joining and sorting tables, in MiB; more is spilled to disk
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(16..))]
    #[serde(skip)]
    memory_limit_mib: u32,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

/// Joins trajectories, steps and scores by key, computes advantages task by task, writes `advantages`.
pub(crate) fn run(arguments: &AdvantagesArguments) -> anyhow::Result<()> {
    arguments.stage.stage().check_free()?;
    let rollouts = Rollouts::open(&arguments.rollouts)?;
    arguments.check().usage()?;
    let scores = arguments.scores.as_ref().map(|path| Input::stage("scores", path)).transpose()?;
    let inside_of = arguments.inside_of(&rollouts)?;
    if let Some(scores) = &scores {
        scores.table("scores")?;
        scores.check_made_from("rollouts", &rollouts.input, "mempo-score segments")?;
    }
    let inputs: Vec<&Input> = std::iter::once(&rollouts.input).chain(&scores).collect();
    let Some(stage) = Stage::open("mempo-score", "advantages", &arguments.stage.stage(), arguments, &inputs)? else {
        return Ok(());
    };
    let session = Session::new((arguments.memory_limit_mib as usize) << 20)?;
    let mut rows = joined_rows(&session, &rollouts, scores.as_ref(), inside_of.is_some())?.peekable();
    let task_count = rollouts.count_tasks()?;
    let parts = stage.shard_range(task_count.div_ceil(TASKS_PER_PART));
    let progress = stage.progress("advantages", (parts.len() * TASKS_PER_PART).min(task_count) as u64, "tasks");
    let mut estimation = Estimation::new(arguments, inside_of);
    let mut written = 0;
    for part in 0..parts.end {
        let mut advantages = Vec::new();
        for _ in 0..TASKS_PER_PART.min(task_count - part * TASKS_PER_PART) {
            stage.check_interrupt()?;
            let task = next_task(&mut rows)?;
            if parts.contains(&part) {
                advantages.extend(estimation.task(&task)?);
                progress.inc(1);
            }
        }
        written += advantages.len() as u64;
        if parts.contains(&part) && !stage.has_part("advantages", part) {
            stage.write_part("advantages", part, |file| Ok(write_rows(&advantages, file).map(drop)?))?;
        }
    }
    let mut summary = estimation.summary();
    if let Some(manifest) = scores.as_ref().and_then(Input::manifest) {
        summary["closed_book_probability_mean"] = json!(manifest.summary_number("closed_book_probability_mean"));
    }
    tracing::info!("{summary}");
    stage.finish(&[("advantages", written)], summary)
}

impl AdvantagesArguments {
    /// Refuses options that want scores where there are none, or that contradict each other.
    fn check(&self) -> anyhow::Result<()> {
        let NormaliseOptions { estimator, combine, .. } = self.normalise;
        if self.scores.is_none() && (estimator == Estimator::Mempo || combine != Combine::Advantages) {
            return Err(anyhow!(
                "--estimator mempo and --combine rewards or infomem need --scores DIR, the output of `mempo-score segments`"
            ));
        }
        let divides = self.spread.of(estimator).credit == TrajectoryCredit::Divide;
        if divides && combine == Combine::Rewards {
            return Err(anyhow!(
                "--combine rewards puts a memory's advantage in the trajectory's place, which --trajectory-credit divide leaves \
                 undefined: take --combine advantages, or --trajectory-credit copy"
            ));
        }
        Ok(())
    }

    /// The tokenizer and tags that tell where a memory's tags end, if that matters.
    fn inside_of(&self, rollouts: &Rollouts) -> anyhow::Result<Option<(Tokenizer, Tags)>> {
        match (self.credit, &self.tokenizer) {
            (Credit::Tags, _) => Ok(None),
            (Credit::Inside, Some(dir)) => Ok(Some((Tokenizer::load(dir).bad_input()?, rollouts.profile()?.tags))),
            (Credit::Inside, None) => Err(anyhow!("--credit inside needs --tokenizer DIR, a model directory")).usage(),
        }
    }
}

/// Advantages on their way, task by task.
struct Estimation<'a> {
    arguments: &'a AdvantagesArguments,
    /// What tells where a memory's tags end, where these have no credit.
    inside_of: Option<(Tokenizer, Tags)>,
    spread: Spread,
    sums: Sums,
    explained: Explained,
}

impl<'a> Estimation<'a> {
    fn new(arguments: &'a AdvantagesArguments, inside_of: Option<(Tokenizer, Tags)>) -> Self {
        let spread = arguments.spread.of(arguments.normalise.estimator);
        Self { arguments, inside_of, spread, sums: Sums::default(), explained: Explained::default() }
    }

    fn with_scores(&self) -> bool {
        self.arguments.scores.is_some()
    }

    /// The advantages of every step of a task. A trajectory without a reward has no rows and counts in no group (unless
    /// asked otherwise); a memory without a reward (its context was past the model's window) gets memory advantage 0 and
    /// counts in no group either.
    fn task(&mut self, rows: &[JoinedRow]) -> anyhow::Result<Vec<Advantage>> {
        let (mut attempts, mut chunks) = (Vec::new(), Vec::new());
        for chunk in rows.chunk_by(|a, b| a.trajectory_index == b.trajectory_index) {
            check_steps(chunk, self.with_scores().then_some(self.arguments.normalise.memory_steps)).bad_input()?;
            self.explain(chunk);
            let first = &chunk[0];
            self.sums.add("trajectories", 1.0);
            if first.reward.is_none() {
                self.sums.add("trajectories_without_reward", 1.0);
            }
            check_finite(chunk).quality()?;
            let instead = (self.arguments.null_rewards == NullRewards::Zero).then_some(0.0);
            let Some(reward) = first.reward.or(instead) else { continue };
            let memories = chunk.iter().filter(|row| row.memory().is_some());
            let last_memory = memories.clone().next_back().and_then(|row| row.step_index);
            let memories = memories.filter_map(|row| Some((row.step_index?, row.memory_reward?))).collect();
            let format_valid = first.format_valid;
            let penalty = self.arguments.malformed_penalty.filter(|_| !format_valid).unwrap_or(0.0);
            let reward = f64::from(reward) - penalty;
            attempts.push(Rewarded { reward, format_valid, memories, last_memory });
            chunks.push(chunk);
        }
        let found = group_advantages(&attempts, &self.arguments.normalise);
        count_states(&attempts, &found, &mut self.sums);
        let loss_weight = self.loss_weight(&found);
        let parts = chunks.iter().zip(&found.trajectory).zip(&found.memory);
        Ok(parts
            .flat_map(|((chunk, trajectory), memory)| self.steps(chunk, *trajectory, memory, loss_weight))
            .collect())
    }

    /// 0 where the task is to be left out.
    fn loss_weight(&mut self, found: &GroupAdvantages) -> f32 {
        let same = found.trajectory_state != GroupState::Mixed;
        let memories_too = found.memory.iter().flatten().all(|advantage| *advantage == 0.0);
        let dropped = match self.arguments.degenerate {
            Degenerate::Keep => false,
            Degenerate::Drop => same,
            Degenerate::DropWithoutMemory => same && memories_too,
        };
        self.sums.add("tasks_dropped", f64::from(u8::from(dropped)));
        if dropped { 0.0 } else { 1.0 }
    }

    /// Notes what each memory of a trajectory earned, and under which circumstances.
    fn explain(&mut self, chunk: &[JoinedRow]) {
        let (mut tool_calls, mut observation) = (0, 0);
        for row in chunk {
            if let (Some(step), Some(reward)) = (row.step_index, row.memory_reward) {
                self.explained.add([f64::from(step), f64::from(tool_calls), observation as f64], reward);
            }
            if let Some(probability) = row.answer_probability {
                self.explained.add_probability(probability);
            }
            tool_calls += row.segments.iter().flatten().filter(|segment| segment.kind == "tool_call").count() as i32;
            observation = row.observation_length;
        }
    }

    /// The rows of a trajectory's steps, in a task of that loss weight.
    fn steps(&self, chunk: &[JoinedRow], trajectory: f64, memory: &[f64], loss_weight: f32) -> Vec<Advantage> {
        let mut memory = memory.iter();
        let steps: Vec<&JoinedRow> = chunk.iter().filter(|row| row.step_index.is_some()).collect();
        let trains = |place: usize| self.spread.trains(place + 1 == steps.len() && steps[place].may_answer());
        let trained = (0..steps.len()).filter(|place| trains(*place)).count();
        let share = self.spread.share(trajectory, trained) as f32;
        steps
            .iter()
            .enumerate()
            .map(|(place, row)| {
                let segment = row.memory().filter(|_| self.with_scores());
                let advantage = segment.and(row.memory_reward).and_then(|_| memory.next()).copied().unwrap_or(0.0);
                let range = segment.map(|segment| self.credited(row, segment));
                Advantage {
                    task_id: row.task_id.clone(),
                    trajectory_index: row.trajectory_index,
                    step_index: row.key().step_index,
                    trajectory_advantage: share,
                    memory_advantage: segment.map(|_| advantage as f32),
                    memory_start: range.as_ref().map(|range| range.start),
                    memory_end: range.as_ref().map(|range| range.end),
                    loss_weight: if trains(place) { loss_weight } else { 0.0 },
                }
            })
            .collect()
    }

    /// The completion ids that a memory's advantage applies to.
    fn credited(&self, row: &JoinedRow, segment: &SegmentCells) -> Range<i32> {
        match (&self.inside_of, &row.completion_ids) {
            (Some((tokenizer, tags)), Some(ids)) => {
                let range = segment.start as usize..segment.end as usize;
                let memory = mempo_text::Segment { kind: mempo_text::SegmentKind::Memory, range };
                let inside = mempo_text::between_tags(tokenizer, tags, ids, &memory);
                inside.start as i32..inside.end as i32
            }
            _ => segment.start..segment.end,
        }
    }
}

fn count_states(attempts: &[Rewarded], found: &GroupAdvantages, sums: &mut Sums) {
    let all = |holds: fn(f64) -> bool| attempts.iter().all(|attempt| holds(attempt.reward));
    sums.add("tasks", 1.0);
    sums.add("memories", found.memory.iter().map(|memories| memories.len() as f64).sum());
    sums.add(
        match found.trajectory_state {
            GroupState::Mixed => "trajectory_mixed",
            GroupState::Small => "trajectory_too_small",
            GroupState::Equal if all(|reward| reward == 0.0) => "trajectory_all_zero",
            GroupState::Equal if all(|reward| reward >= 1.0) => "trajectory_all_one",
            GroupState::Equal => "trajectory_all_equal",
        },
        1.0,
    );
    for state in &found.memory_states {
        let name = match state {
            GroupState::Mixed => "memory_mixed",
            GroupState::Small => "memory_too_small",
            GroupState::Equal => "memory_all_equal",
        };
        sums.add(name, 1.0);
    }
}

impl Estimation<'_> {
    fn summary(&self) -> Value {
        let mut summary = counts(&self.sums);
        if self.with_scores()
            && let (Some(all), Value::Object(more)) = (summary.as_object_mut(), self.explained.summary())
        {
            all.extend(more);
        }
        summary
    }
}

fn counts(sums: &Sums) -> Value {
    let states = |kind: &str, names: &[&str]| {
        let counts = names.iter().map(|name| ((*name).to_owned(), sums.count(&format!("{kind}_{name}"))));
        let counts: BTreeMap<String, u64> = counts.collect();
        let total: u64 = counts.values().sum();
        let degenerate = total - sums.count(&format!("{kind}_mixed"));
        let share = (total > 0).then(|| degenerate as f64 / total as f64);
        json!({"groups": total, "degenerate_share": share, "by_state": counts})
    };
    json!({
        "tasks": sums.count("tasks"),
        "trajectories": sums.count("trajectories"),
        "trajectories_without_reward": sums.count("trajectories_without_reward"),
        "tasks_dropped": sums.count("tasks_dropped"),
        "memories_compared": sums.count("memories"),
        "trajectory_groups": states("trajectory", &["mixed", "all_zero", "all_one", "all_equal", "too_small"]),
        "memory_groups": states("memory", &["mixed", "all_equal", "too_small"]),
    })
}

#[cfg(test)]
mod tests;
