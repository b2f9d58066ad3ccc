//! `mempo-score advantages`: from rewards to what the update needs of every step.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_data::{Advantage, Key, write_rows};
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use mempo_text::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::explain::Explained;
use crate::normalise::{GroupAdvantages, GroupState, NormaliseOptions, Rewarded, group_advantages};
use crate::query::Session;
use crate::rollouts::Rollouts;
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
    /// Directory of a finished `mempo-score segments` of the same rollout; needed with `--estimator mempo` alone
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    scores: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    normalise: NormaliseOptions,
    /// Tasks whose trajectories all earned the same
    #[arg(long, value_enum, default_value = "keep")]
    degenerate: Degenerate,
    /// Trajectories without a reward
    #[arg(long, value_enum, default_value = "leave-out")]
    null_rewards: NullRewards,
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
    stage: StageArgs,
}

/// Joins trajectories, steps and scores by key, computes advantages task by task, writes `advantages`.
pub(crate) fn run(arguments: &AdvantagesArguments) -> anyhow::Result<()> {
    let rollouts = Rollouts::open(&arguments.rollouts)?;
    let scores = match (arguments.normalise.estimator.pays_memories(), &arguments.scores) {
        (false, _) => None,
        (true, Some(path)) => Some(Input::stage("scores", path)?),
        (true, None) => {
            return Err(anyhow!("--estimator mempo needs --scores DIR, the output of `mempo-score segments`")).usage();
        }
    };
    let tokenizer = arguments.inside_of()?;
    scores.as_ref().map_or(Ok(()), |scores| check_lineage(scores, &rollouts.input)).bad_input()?;
    let inputs: Vec<&Input> = std::iter::once(&rollouts.input).chain(&scores).collect();
    let Some(stage) = Stage::open("mempo-score", "advantages", &arguments.stage, arguments, &inputs)? else {
        return Ok(());
    };
    let session = Session::new((arguments.memory_limit_mib as usize) << 20)?;
    let mut rows = joined_rows(&session, &rollouts, scores.as_ref(), tokenizer.is_some())?.peekable();
    let task_count = rollouts.count_tasks()?;
    let parts = stage.shard_range(task_count.div_ceil(TASKS_PER_PART));
    let progress = stage.progress("advantages", (parts.len() * TASKS_PER_PART).min(task_count) as u64, "tasks");
    let mut estimation = Estimation { arguments, tokenizer, sums: Sums::default(), explained: Explained::default() };
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
    let summary = estimation.summary();
    tracing::info!("{summary}");
    stage.finish(&[("advantages", written)], summary)
}

/// Scores of other rollouts may have the same keys: the manifest says what was scored.
fn check_lineage(scores: &Input, rollouts: &Input) -> anyhow::Result<()> {
    scores.table("scores")?;
    let records = scores.manifest().into_iter().flat_map(|manifest| &manifest.inputs);
    if records.into_iter().any(|record| record.name == "rollouts" && record.digest == rollouts.digest()) {
        return Ok(());
    }
    let (scores, rollouts) = (scores.dir().display(), rollouts.dir().display());
    Err(anyhow!("{scores}: not the scores of {rollouts}: run `mempo-score segments --rollouts {rollouts}`"))
}

/// A step with its trajectory and its score; a trajectory without steps has one row.
#[derive(Debug, Clone, Deserialize)]
struct JoinedRow {
    task_id: String,
    trajectory_index: i32,
    step_count: i32,
    reward: Option<f32>,
    format_valid: bool,
    step_index: Option<i32>,
    segments: Option<Vec<SegmentCells>>,
    scored: bool,
    memory_reward: Option<f64>,
    answer_probability: Option<f64>,
    observation_length: i64,
    /// Only where they are needed.
    completion_ids: Option<Vec<i32>>,
}

#[derive(Debug, Clone, Deserialize)]
struct SegmentCells {
    kind: String,
    start: i32,
    end: i32,
}

impl JoinedRow {
    fn memory(&self) -> Option<&SegmentCells> {
        self.segments.iter().flatten().find(|segment| segment.kind == "memory")
    }

    fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index.unwrap_or(0))
    }
}

fn joined_rows(
    session: &Session,
    rollouts: &Rollouts,
    scores: Option<&Input>,
    with_ids: bool,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<JoinedRow>>> {
    let step_key = ["task_id", "trajectory_index", "step_index"];
    session.register("trajectories", &rollouts.input.table("trajectories")?, &step_key[..2])?;
    session.register("steps", &rollouts.input.table("steps")?, &step_key)?;
    let (score_columns, score_join) = match scores {
        Some(scores) => {
            session.register("scores", &scores.table("scores")?, &step_key)?;
            ("scores.step_index IS NOT NULL", "LEFT JOIN scores USING (task_id, trajectory_index, step_index)")
        }
        None => ("false", ""),
    };
    let [memory_reward, answer_probability] = if scores.is_some() {
        ["scores.memory_reward", "scores.answer_probability"]
    } else {
        ["CAST(NULL AS DOUBLE)"; 2]
    };
    let completion_ids = if with_ids { "completion_ids" } else { "CAST(NULL AS INT[])" };
    session.rows(&format!(
        "SELECT trajectories.task_id, trajectories.trajectory_index, step_count, reward, format_valid,
             steps.step_index, segments, {score_columns} AS scored, {memory_reward} AS memory_reward,
             {answer_probability} AS answer_probability, {completion_ids} AS completion_ids,
             CAST(COALESCE(char_length(observation), 0) AS BIGINT) AS observation_length
         FROM trajectories LEFT JOIN steps USING (task_id, trajectory_index) {score_join}
         ORDER BY trajectories.task_id, trajectories.trajectory_index, steps.step_index"
    ))
}

type Rows<I> = std::iter::Peekable<I>;

/// The rows of the next task.
fn next_task(rows: &mut Rows<impl Iterator<Item = anyhow::Result<JoinedRow>>>) -> anyhow::Result<Vec<JoinedRow>> {
    let mut task: Vec<JoinedRow> = rows.next().transpose()?.into_iter().collect();
    while let Some(row) = rows
        .next_if(|row| row.as_ref().map_or(true, |row| task.first().is_some_and(|first| first.task_id == row.task_id)))
    {
        task.push(row?);
    }
    Ok(task)
}

impl AdvantagesArguments {
    /// The tokenizer that tells where a memory's tags end, if that matters.
    fn inside_of(&self) -> anyhow::Result<Option<Tokenizer>> {
        match (self.credit, &self.tokenizer) {
            (Credit::Tags, _) => Ok(None),
            (Credit::Inside, Some(dir)) => Tokenizer::load(dir).bad_input().map(Some),
            (Credit::Inside, None) => Err(anyhow!("--credit inside needs --tokenizer DIR, a model directory")).usage(),
        }
    }
}

/// Advantages on their way, task by task.
struct Estimation<'a> {
    arguments: &'a AdvantagesArguments,
    tokenizer: Option<Tokenizer>,
    sums: Sums,
    explained: Explained,
}

impl Estimation<'_> {
    fn with_scores(&self) -> bool {
        self.arguments.normalise.estimator.pays_memories()
    }

    /// The advantages of every step of a task. A trajectory without a reward has no rows and counts in no group (unless
    /// asked otherwise); a memory without a reward (its context was past the model's window) gets memory advantage 0 and
    /// counts in no group either.
    fn task(&mut self, rows: &[JoinedRow]) -> anyhow::Result<Vec<Advantage>> {
        let (mut attempts, mut chunks) = (Vec::new(), Vec::new());
        for chunk in rows.chunk_by(|a, b| a.trajectory_index == b.trajectory_index) {
            check_steps(chunk, self.with_scores()).bad_input()?;
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
            let memories = memories.filter_map(|row| Some((row.step_index?, row.memory_reward?))).collect();
            attempts.push(Rewarded { reward: f64::from(reward), format_valid: first.format_valid, memories });
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

    fn steps(&self, chunk: &[JoinedRow], trajectory: f64, memory: &[f64], loss_weight: f32) -> Vec<Advantage> {
        let mut memory = memory.iter();
        let steps = chunk.iter().filter(|row| row.step_index.is_some());
        steps
            .map(|row| {
                let segment = row.memory().filter(|_| self.with_scores());
                let advantage = segment.and(row.memory_reward).and_then(|_| memory.next()).copied().unwrap_or(0.0);
                let range = segment.map(|segment| self.credited(row, segment));
                Advantage {
                    task_id: row.task_id.clone(),
                    trajectory_index: row.trajectory_index,
                    step_index: row.key().step_index,
                    trajectory_advantage: trajectory as f32,
                    memory_advantage: segment.map(|_| advantage as f32),
                    memory_start: range.as_ref().map(|range| range.start),
                    memory_end: range.as_ref().map(|range| range.end),
                    loss_weight,
                }
            })
            .collect()
    }

    /// The completion ids that a memory's advantage applies to.
    fn credited(&self, row: &JoinedRow, segment: &SegmentCells) -> Range<i32> {
        match (&self.tokenizer, &row.completion_ids) {
            (Some(tokenizer), Some(ids)) => {
                let range = segment.start as usize..segment.end as usize;
                let memory = mempo_text::Segment { kind: mempo_text::SegmentKind::Memory, range };
                let inside = mempo_text::between_tags(tokenizer, ids, &memory);
                inside.start as i32..inside.end as i32
            }
            _ => segment.start..segment.end,
        }
    }
}

/// A number that is none would reach every advantage of its group.
fn check_finite(chunk: &[JoinedRow]) -> anyhow::Result<()> {
    let bad = |row: &&JoinedRow| {
        let rewards = [row.reward.map(f64::from), row.memory_reward];
        rewards.into_iter().flatten().any(|reward| !reward.is_finite())
    };
    chunk.iter().find(bad).map_or(Ok(()), |row| {
        let (key, reward, memory) = (row.key(), row.reward, row.memory_reward);
        Err(anyhow!("{key}: reward {reward:?}, memory reward {memory:?}: expected finite numbers; score again"))
    })
}

fn check_steps(chunk: &[JoinedRow], with_scores: bool) -> anyhow::Result<()> {
    let first = &chunk[0];
    let found = chunk.iter().filter(|row| row.step_index.is_some()).count();
    if found != first.step_count as usize {
        let (key, expected) = (first.key(), first.step_count);
        return Err(anyhow!(
            "{key}: `steps` has {found} rows of the trajectory, which counts {expected}: sample again"
        ));
    }
    let unscored = chunk.iter().find(|row| with_scores && row.memory().is_some() && !row.scored);
    unscored.map_or(Ok(()), |row| {
        Err(anyhow!("{}: `scores` has no row for this memory: run `segments` on this rollout again", row.key()))
    })
}

fn count_states(attempts: &[Rewarded], found: &GroupAdvantages, sums: &mut Sums) {
    let all = |holds: fn(f64) -> bool| attempts.iter().all(|attempt| holds(attempt.reward));
    sums.add("tasks", 1.0);
    sums.add("memories", found.memory.iter().map(|memories| memories.len() as f64).sum());
    sums.add(
        match found.trajectory_state {
            GroupState::Mixed => "trajectory_mixed",
            GroupState::Small => "trajectory_too_small",
            GroupState::Equal if all(|reward| reward <= 0.0) => "trajectory_all_zero",
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
mod tests {
    use clap::FromArgMatches;
    use mempo_data::{Row, Score, Step, Trajectory};
    use mempo_run::Failure;

    use super::*;
    use crate::fixture::{Chain, failure};

    const COMMAND: &str = "advantages --rollouts @rollouts --scores @scores";
    const SEGMENTS: &str =
        "segments --rollouts @rollouts --tasks @tasks --model @model --dtype f32 --device cpu --out @scores";

    /// `(value - mean) / sample std` of every value, written the long way round.
    fn standardised(values: &[f64]) -> Vec<f64> {
        let count = values.len() as f64;
        let pairs = values.iter().flat_map(|a| values.iter().map(move |b| (a - b).powi(2)));
        let std = (pairs.sum::<f64>() / (2.0 * count * (count - 1.0))).sqrt();
        let mean = values.iter().sum::<f64>() / count;
        values.iter().map(|value| (value - mean) / std).collect()
    }

    #[test]
    fn the_join_gives_what_brute_force_gives() {
        let chain = Chain::new();
        chain.run(SEGMENTS).unwrap();
        for scope in ["per-step", "pooled"] {
            chain
                .run(&format!("{COMMAND} --memory-scope {scope} --min-memory-group 2 --alpha 0.5 --out @{scope}"))
                .unwrap();
            let rows = chain.rows::<Advantage>(scope);
            let mut groups: BTreeMap<(String, i32), Vec<(Key, f64)>> = BTreeMap::new();
            let counted = |row: &&Trajectory| row.reward.is_some();
            let kept: Vec<Key> = chain.trajectories.iter().filter(counted).map(Row::key).collect();
            let is_kept = |task: &str, index| kept.contains(&Key::of_step(task, index, 0));
            for score in chain.rows::<Score>("scores").iter().filter(|row| is_kept(&row.task_id, row.trajectory_index))
            {
                let step = if scope == "pooled" { 0 } else { score.step_index };
                let group = groups.entry((score.task_id.clone(), step)).or_default();
                group.push((score.key(), score.memory_reward.unwrap()));
            }
            let mut expected: BTreeMap<Key, f64> = BTreeMap::new();
            for group in groups.into_values().filter(|group| group.len() > 1) {
                let values: Vec<f64> = group.iter().map(|(_, value)| *value).collect();
                let same = values.iter().all(|value| value.to_bits() == values[0].to_bits());
                let found = if same { vec![0.0; values.len()] } else { standardised(&values) };
                expected.extend(group.into_iter().map(|(key, _)| key).zip(found));
            }
            let steps: Vec<&Step> =
                chain.steps.iter().filter(|row| is_kept(&row.task_id, row.trajectory_index)).collect();
            assert_eq!(rows.len(), steps.len());
            for (row, step) in rows.iter().zip(steps) {
                assert_eq!(row.key(), step.key());
                let memory = 0.5 * expected.get(&row.key()).copied().unwrap_or(0.0);
                assert!((f64::from(row.memory_advantage.unwrap()) - memory).abs() < 1e-5, "{}", row.key());
                assert_eq!(
                    (row.memory_start, row.memory_end),
                    (Some(step.segments[0].start), Some(step.segments[0].end))
                );
                let task = chain.trajectories.iter().filter(|other| other.task_id == row.task_id);
                let rewards: Vec<f64> = task.filter(counted).map(|row| f64::from(row.reward.unwrap())).collect();
                let expected =
                    if rewards.len() < 2 { 0.0 } else { standardised(&rewards)[row.trajectory_index as usize] };
                assert!((f64::from(row.trajectory_advantage) - expected).abs() < 1e-6);
            }
        }
        let summary = chain.summary("per-step");
        assert_eq!(summary["trajectories_without_reward"], 1);
        assert_eq!(
            summary["trajectory_groups"]["by_state"],
            json!({"mixed": 16, "all_zero": 0, "all_one": 0, "all_equal": 0, "too_small": 1})
        );
        assert_eq!(summary["memory_groups"]["groups"], 17 * 3);
    }

    #[test]
    fn neither_shards_nor_little_memory_change_a_byte() {
        let chain = Chain::new();
        chain.run(SEGMENTS).unwrap();
        for shard in ["0/2", "1/2"] {
            chain.run(&SEGMENTS.replace("@scores", &format!("@shards --shard {shard}"))).unwrap();
        }
        chain.run(&format!("{COMMAND} --out @whole")).unwrap();
        chain.run(&format!("{COMMAND} --memory-limit-mib 16 --out @little").replace("@scores", "@shards")).unwrap();
        let bytes = |stage: &str| fs_err::read(chain.path(stage).join("advantages/part-00000.parquet")).unwrap();
        assert_eq!(bytes("whole"), bytes("little"));
    }

    #[test]
    fn grpo_needs_no_scores_and_pays_memories_nothing() {
        let chain = Chain::new();
        chain.run("advantages --rollouts @rollouts --estimator grpo --out @grpo").unwrap();
        let rows = chain.rows::<Advantage>("grpo");
        assert_eq!(rows.len(), chain.steps.len() - 3);
        assert!(rows.iter().all(|row| row.memory_advantage.is_none() && row.memory_start.is_none()));
        assert!((rows[0].trajectory_advantage - 0.5_f32.sqrt()).abs() < 1e-6);
        let error = chain.run("advantages --rollouts @rollouts --out @mempo").unwrap_err();
        assert!(matches!(failure(&error).0, Failure::Usage(..)));
    }

    /// `cargo test --release -p mempo-score -- --ignored --nocapture a_million`: a measurement, with the time in the log.
    #[test]
    #[ignore = "writes a million rows"]
    fn a_million_steps() {
        const STEPS: i32 = 16;
        let mut chain = Chain::new();
        let (trajectory, step) = (chain.trajectories[0].clone(), chain.steps[1].clone());
        (chain.trajectories, chain.steps) = (Vec::new(), Vec::new());
        let mut scores = Vec::new();
        for index in 0..1_000_000 / STEPS {
            let (task_id, trajectory_index) = (format!("task-{:06}", index / 16), index % 16);
            let reward = Some((index * 7919 % 3 == 0).into());
            let own = Trajectory {
                task_id: task_id.clone(),
                trajectory_index,
                reward,
                step_count: STEPS,
                ..trajectory.clone()
            };
            chain.trajectories.push(own);
            for step_index in 0..STEPS {
                let key = (task_id.clone(), trajectory_index, step_index);
                chain.steps.push(Step { task_id: key.0.clone(), trajectory_index, step_index, ..step.clone() });
                scores
                    .push(score(key, f64::from(mempo_model::counter_uniform(1, (index * STEPS + step_index) as u64))));
            }
        }
        chain.write();
        let rollouts = Input::stage("rollouts", &chain.path("rollouts")).unwrap();
        crate::fixture::write_stage_from(&chain.path("scores"), &json!({}), &[&rollouts], |stage| {
            crate::fixture::write_table(stage, &scores);
        });
        (chain.steps, chain.trajectories) = (Vec::new(), Vec::new());
        drop(scores);
        let start = std::time::Instant::now();
        chain.run(&format!("{COMMAND} --out @out")).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let status = fs_err::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find(|line| line.starts_with("VmHWM"));
        tracing::warn!("1,000,000 steps: {seconds:.2} s; peak of the whole test, rows included: {peak:?}");
        assert_eq!(chain.rows::<Advantage>("out").len(), 1_000_000);
    }

    fn score((task_id, trajectory_index, step_index): (String, i32, i32), probability: f64) -> Score {
        Score {
            task_id,
            trajectory_index,
            step_index,
            answer_logprob: Some(probability.ln()),
            answer_probability: Some(probability),
            bias_logprob: None,
            bias_probability: None,
            objective_logprobs: Some(vec![probability.ln(); 2]),
            memory_reward: Some(probability),
            answer_token_count: 9,
            truncated: false,
        }
    }

    #[test]
    fn tags_and_tasks_can_be_left_out() {
        let mut chain = Chain::new();
        chain.run(SEGMENTS).unwrap();
        let line = format!("{COMMAND} --credit inside");
        let error = chain.run(&format!("{line} --out @none")).unwrap_err();
        assert!(matches!(failure(&error).0, Failure::Usage(..)));
        chain.run(&format!("{line} --tokenizer @model --out @inside")).unwrap();
        let builder = chain.builder();
        for (row, step) in chain.rows::<Advantage>("inside").iter().zip(counted_steps(&chain)) {
            let ids = &step.completion_ids[row.memory_start.unwrap() as usize..row.memory_end.unwrap() as usize];
            let inside = builder.tokenizer().decode(ids);
            assert!(
                !inside.contains(['<', '>']) && step.completion.contains(&format!("<mem>{inside}</mem>")),
                "{inside}"
            );
        }

        // All trajectories of one task earn the same; a reward that was null becomes 0.
        for row in chain.trajectories.iter_mut().filter(|row| row.task_id == "task-03") {
            row.reward = Some(1.0);
        }
        chain.write();
        chain.run(&SEGMENTS.replace("@scores", "@again")).unwrap();
        let dropped = |degenerate: &str| -> Vec<(String, bool)> {
            let line = COMMAND.replace("@scores", "@again");
            chain.run(&format!("{line} --degenerate {degenerate} --null-rewards zero --out @{degenerate}")).unwrap();
            let rows = chain.rows::<Advantage>(degenerate);
            assert_eq!(rows.len(), chain.steps.len());
            let weights = rows.iter().map(|row| row.loss_weight.to_bits());
            assert!(weights.into_iter().all(|bits| [0.0_f32, 1.0].map(f32::to_bits).contains(&bits)));
            rows.into_iter().map(|row| (row.task_id, row.loss_weight < 0.5)).collect()
        };
        assert!(dropped("keep").iter().all(|(_, dropped)| !dropped));
        assert!(dropped("drop").iter().all(|(task, dropped)| *dropped == (task == "task-03")));
        assert_eq!(chain.summary("drop")["tasks_dropped"], 1);
        // Two trajectories a task: no memory group reaches the least size of 4.
        assert!(dropped("drop-without-memory").iter().all(|(task, dropped)| *dropped == (task == "task-03")));
    }

    fn counted_steps(chain: &Chain) -> impl Iterator<Item = &Step> {
        let kept = |step: &&Step| {
            let mut rows = chain.trajectories.iter();
            let own = rows.find(|row| (&row.task_id, row.trajectory_index) == (&step.task_id, step.trajectory_index));
            own.is_some_and(|row| row.reward.is_some())
        };
        chain.steps.iter().filter(kept)
    }

    #[test]
    fn the_report_says_what_explains_the_rewards() {
        let chain = Chain::new();
        chain.run(SEGMENTS).unwrap();
        chain.run(&format!("{COMMAND} --out @out")).unwrap();
        let summary = chain.summary("out");
        let bins = summary["answer_probability_histogram"].as_array().unwrap();
        let counted: u64 = bins.iter().map(|bin| bin.as_u64().unwrap()).sum();
        assert_eq!(counted as usize, chain.rows::<Score>("scores").len());
        let all = summary["memory_reward_explained_by_all"].as_f64().unwrap();
        let step = summary["memory_reward_explained_by"]["step_index"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&all) && step <= all + 1e-12, "{summary}");
    }

    #[test]
    fn scores_that_do_not_fit_are_refused() {
        let mut chain = Chain::new();
        chain.run(SEGMENTS).unwrap();
        chain.run("logprobs --rollouts @rollouts --model @model --dtype f32 --device cpu --out @logprobs").unwrap();
        let error = chain.run("advantages --rollouts @rollouts --scores @logprobs --out @a").unwrap_err();
        assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("scores")), "{error:#}");

        for step in &mut chain.steps {
            step.trajectory_index += 7;
        }
        for trajectory in &mut chain.trajectories {
            trajectory.trajectory_index += 7;
        }
        chain.write();
        let error = chain.run(&format!("{COMMAND} --out @b")).unwrap_err();
        assert!(
            matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("not the scores of")),
            "{error:#}"
        );
    }

    fn arguments() -> AdvantagesArguments {
        let line = ["advantages", "--rollouts", "r", "--out", "o"];
        let command = AdvantagesArguments::augment_args(clap::Command::new("advantages"));
        AdvantagesArguments::from_arg_matches(&command.get_matches_from(line)).unwrap()
    }

    fn row(trajectory_index: i32, step_index: Option<i32>, scored: bool) -> JoinedRow {
        let memory = SegmentCells { kind: "memory".to_owned(), start: 1, end: 3 };
        JoinedRow {
            task_id: "t".to_owned(),
            trajectory_index,
            step_count: 1,
            reward: Some(0.0),
            format_valid: true,
            step_index,
            segments: step_index.map(|_| vec![memory]),
            scored,
            memory_reward: None,
            answer_probability: None,
            observation_length: 0,
            completion_ids: None,
        }
    }

    #[test]
    fn rows_that_are_missing_are_named() {
        let arguments = arguments();
        let task = |rows: &[JoinedRow]| {
            let (sums, explained) = (Sums::default(), Explained::default());
            Estimation { arguments: &arguments, tokenizer: None, sums, explained }.task(rows)
        };
        let missing = |rows: &[JoinedRow]| failure(&task(rows).unwrap_err()).1;
        assert!(missing(&[row(0, Some(0), false)]).contains("t/trajectory 0/step 0: `scores` has no row"));
        assert!(missing(&[row(2, None, false)]).contains("t/trajectory 2/step 0: `steps` has 0 rows"));
        let mut infinite = row(0, Some(0), true);
        infinite.memory_reward = Some(f64::INFINITY);
        let error = task(&[infinite]).unwrap_err();
        assert!(matches!(failure(&error), (Failure::Quality(..), text) if text.contains("t/trajectory 0/step 0")));
        // A memory whose context was past the window has a row without a reward: it earns nothing.
        let found = task(&[row(0, Some(0), true)]).unwrap();
        assert_eq!((found[0].memory_advantage, found[0].memory_end, found[0].loss_weight), (Some(0.0), Some(3), 1.0));
    }
}
