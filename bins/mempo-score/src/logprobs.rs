//! `mempo-score logprobs`: log-probabilities of what was sampled, under the policy and a reference policy.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use clap::Args;
use mempo_data::{Logprobs, Step, write_rows};
use mempo_model::{DeviceOptions, Model, Runtime, ScoreOptions, ScoredSequence};
use mempo_run::{Input, ResultExt, ShardedStageArgs, Stage};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::probe::key;
use crate::rollouts::{Attempt, Rollouts, TASKS_PER_UNIT};
use crate::sums::{read_units, write_unit};

/// Mean and largest difference from the sampler's log-probabilities, in nats, above which a warning names the worst row.
/// Rounding alone stays below (docs/LOG.md), an engine that computes something else does not.
const LARGE_F32: [f64; 2] = [1e-4, 1e-2];
const LARGE_BF16: [f64; 2] = [5e-3, 0.5];

/// Score every completion under the policy and the reference, at the sampling temperature (table `logprobs`)
#[derive(Debug, Args, Serialize)]
pub(crate) struct LogprobsArguments {
    /// Directory of a finished `mempo-rollout sample`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    rollouts: PathBuf,
    /// The policy that will be updated
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    model: PathBuf,
    /// The policy it is held close to; without it the column is null
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    reference: Option<PathBuf>,
    /// Tokens scored at once, padding included
    #[arg(long, default_value_t = 16384)]
    tokens_per_batch: usize,
    #[command(flatten)]
    #[serde(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

/// Reads the rollout unit by unit, scores each completion, writes `logprobs`.
pub(crate) fn run(arguments: &LogprobsArguments) -> anyhow::Result<()> {
    arguments.stage.stage().check_free()?;
    let rollouts = Rollouts::open(&arguments.rollouts)?;
    let policy = Input::model("model", &arguments.model)?;
    let reference = arguments.reference.as_deref().map(|path| Input::model("reference", path)).transpose()?;
    let inputs: Vec<&Input> = [&rollouts.input, &policy].into_iter().chain(&reference).collect();
    let Some(stage) = Stage::open("mempo-score", "logprobs", &arguments.stage.stage(), arguments, &inputs)? else {
        return Ok(());
    };
    let task_count = rollouts.count_tasks()?;
    let range = stage.shard_range(task_count.div_ceil(TASKS_PER_UNIT));
    let mut reader = rollouts.reader()?;
    let options = ScoreOptions { temperature: rollouts.temperature(), tokens_per_batch: arguments.tokens_per_batch };
    let models = Models::load(&policy, reference.as_ref(), &arguments.device.resolve().usage()?, options)?;
    let progress = stage.progress("logprobs", (range.len() * TASKS_PER_UNIT).min(task_count) as u64, "tasks");
    for unit in 0..range.end {
        stage.check_interrupt()?;
        let wanted = range.contains(&unit) && !stage.has_part("logprobs", unit);
        let groups = reader.next_unit(wanted)?;
        if wanted {
            models.score_unit(&stage, unit, &groups, policy.digest())?;
            progress.inc(groups.len() as u64);
        }
    }
    let large = if models.policy.runtime().is_f32() { LARGE_F32 } else { LARGE_BF16 };
    finish(stage, range, large)
}

/// What a completion is scored under.
struct Models {
    policy: Model,
    reference: Reference,
    options: ScoreOptions,
}

enum Reference {
    None,
    /// The reference is the policy itself: scored once.
    Policy,
    Other(Box<Model>),
}

impl Models {
    fn load(
        policy: &Input,
        reference: Option<&Input>,
        runtime: &Runtime,
        options: ScoreOptions,
    ) -> anyhow::Result<Self> {
        let load = |path: &Path| Model::load(path, runtime).bad_input();
        let reference = match reference {
            None => Reference::None,
            Some(reference) if reference.digest() == policy.digest() => Reference::Policy,
            Some(reference) => Reference::Other(Box::new(load(reference.dir())?)),
        };
        Ok(Self { policy: load(policy.dir())?, reference, options })
    }

    fn score_unit(&self, stage: &Stage, unit: usize, groups: &[Vec<Attempt>], digest: &str) -> anyhow::Result<()> {
        let attempts = || groups.iter().flatten();
        let steps: Vec<&Step> = attempts().flat_map(|attempt| &attempt.steps).collect();
        let sequences = steps.iter().map(|step| sequence(step)).collect::<anyhow::Result<Vec<_>>>()?;
        let (policy, tokens_computed) = self.score(&self.policy, &steps, &sequences)?;
        let reference = match &self.reference {
            Reference::None => None,
            Reference::Policy => Some(policy.clone()),
            Reference::Other(model) => Some(self.score(model, &steps, &sequences)?.0),
        };
        let mut health = health(&steps, &policy, attempts().all(|attempt| attempt.trajectory.policy == digest))?;
        health.tokens_asked = sequences.iter().map(|sequence| sequence.ids.len() as u64).sum();
        health.tokens_computed = tokens_computed as u64;
        write_unit(stage, unit, &health)?;
        let mut reference = reference.map(Vec::into_iter);
        let rows = steps.iter().zip(policy).map(|(step, policy_logprobs)| Logprobs {
            task_id: step.task_id.clone(),
            trajectory_index: step.trajectory_index,
            step_index: step.step_index,
            policy_logprobs,
            reference_logprobs: reference.as_mut().and_then(Iterator::next),
        });
        let rows: Vec<Logprobs> = rows.collect();
        stage.write_part("logprobs", unit, |file| Ok(write_rows(&rows, file).map(drop)?))
    }

    /// One log-probability per completion id, step by step, and the number of tokens that were run for them.
    fn score(
        &self,
        model: &Model,
        steps: &[&Step],
        sequences: &[ScoredSequence],
    ) -> anyhow::Result<(Vec<Vec<f32>>, usize)> {
        for (step, sequence) in steps.iter().zip(sequences) {
            model
                .check_ids(0, &sequence.ids)
                .with_context(|| format!("{}: prompt and completion", key(step)))
                .bad_input()?;
        }
        let (logprobs, tokens_computed) = self.logprobs(model, sequences)?;
        for (step, logprobs) in steps.iter().zip(&logprobs) {
            if let Some(place) = logprobs.iter().position(|value| !value.is_finite()) {
                let found = logprobs[place];
                return Err(anyhow!(
                    "{}: log-probability {found} of completion token {place}, expected a finite number: the checkpoint \
                     is damaged, or its weights overflow (try --dtype f32)",
                    key(step)
                ))
                .quality();
            }
        }
        Ok((logprobs, tokens_computed))
    }

    /// In float32 what prompts have in common is run once, which changes the last bits at most (nothing with
    /// `--deterministic`). In bf16 a shared pass rounds otherwise than rows do, as training has them, which would move the first
    /// ratio further from 1: every sequence has a row of its own.
    fn logprobs(&self, model: &Model, sequences: &[ScoredSequence]) -> anyhow::Result<(Vec<Vec<f32>>, usize)> {
        if model.runtime().is_f32() {
            return model.shared_logprobs(sequences, &self.options).bad_input();
        }
        let inputs = sequences.iter().filter(|sequence| !sequence.targets.is_empty());
        let tokens = inputs.map(|sequence| sequence.targets.end - 1).sum();
        Ok((model.completion_logprobs(sequences, &self.options).bad_input()?, tokens))
    }
}

fn sequence(step: &Step) -> anyhow::Result<ScoredSequence> {
    let (start, sampled) = (step.prompt_ids.len(), step.sampling_logprobs.len());
    if start == 0 || sampled != step.completion_ids.len() {
        let (key, ids) = (key(step), step.completion_ids.len());
        return Err(anyhow!(
            "{key}: {start} prompt ids, {ids} completion ids and {sampled} sampling_logprobs: sample again"
        ))
        .bad_input();
    }
    let ids = [step.prompt_ids.as_slice(), &step.completion_ids].concat();
    Ok(ScoredSequence { targets: start..ids.len(), ids })
}

/// How far the scored log-probabilities are from the sampler's.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Health {
    steps: u64,
    tokens: u64,
    difference_sum: f64,
    difference_max: f64,
    /// The row of the largest difference.
    worst: Option<String>,
    /// The model is the one that sampled.
    own_policy: bool,
    /// Prompt and completion ids of the steps, and how many of them the policy ran.
    #[serde(default)]
    tokens_asked: u64,
    #[serde(default)]
    tokens_computed: u64,
}

impl Health {
    fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.tokens += other.tokens;
        self.difference_sum += other.difference_sum;
        self.own_policy &= other.own_policy;
        self.tokens_asked += other.tokens_asked;
        self.tokens_computed += other.tokens_computed;
        self.meet(other.difference_max, || other.worst.clone());
    }

    fn meet(&mut self, difference: f64, row: impl FnOnce() -> Option<String>) {
        if difference > self.difference_max {
            self.difference_max = difference;
            self.worst = row();
        }
    }
}

fn health(steps: &[&Step], policy: &[Vec<f32>], own_policy: bool) -> anyhow::Result<Health> {
    let mut health = Health { steps: steps.len() as u64, own_policy, ..Health::default() };
    for (step, policy) in steps.iter().zip(policy) {
        for (place, (scored, sampled)) in policy.iter().zip(&step.sampling_logprobs).enumerate() {
            let difference = (f64::from(*scored) - f64::from(*sampled)).abs();
            if !difference.is_finite() {
                return Err(anyhow!(
                    "{}: sampling log-probability {sampled} of token {place} (what a teacher wrote has none)",
                    key(step)
                ))
                .quality();
            }
            health.tokens += 1;
            health.difference_sum += difference;
            health.meet(difference, || Some(format!("{}, token {place}", key(step))));
        }
    }
    Ok(health)
}

fn finish(stage: Stage, units: std::ops::Range<usize>, large: [f64; 2]) -> anyhow::Result<()> {
    let mut health = Health { own_policy: true, ..Health::default() };
    read_units::<Health>(&stage, units)?.iter().for_each(|unit| health.add(unit));
    let mean = health.difference_sum / health.tokens.max(1) as f64;
    let (max, worst) = (health.difference_max, health.worst.as_deref().unwrap_or("none"));
    let message = format!("|policy - sampling| log-probability: mean {mean:.2e}, max {max:.2e} ({worst})");
    if !health.own_policy {
        tracing::warn!("{message}: the model is not the policy that sampled, so the ratio starts away from 1");
    } else if mean > large[0] || max > large[1] {
        tracing::warn!("{message}: the engine and the scorer do not agree; were both run with the same --dtype?");
    } else {
        tracing::info!("{message}");
    }
    let summary = json!({
        "steps": health.steps,
        "tokens": health.tokens,
        "sampling_difference_mean": mean,
        "sampling_difference_max": max,
        "sampling_difference_worst": health.worst,
        "model_is_the_sampling_policy": health.own_policy,
        "tokens_asked": health.tokens_asked,
        "tokens_computed": health.tokens_computed,
    });
    stage.finish(&[("logprobs", health.steps)], summary)
}

#[cfg(test)]
mod tests {
    use mempo_data::{Row, StopReason};
    use mempo_run::Failure;

    use super::*;
    use crate::fixture::{Chain, failure, make_model};

    fn step(step_index: i32, sampled: &[f32]) -> Step {
        Step {
            task_id: "t".to_owned(),
            trajectory_index: 0,
            step_index,
            prompt_ids: vec![1, 2],
            completion_ids: vec![3; sampled.len()],
            sampling_logprobs: sampled.to_vec(),
            segments: vec![],
            completion: String::new(),
            observation: None,
            observation_ids: None,
            stop_reason: StopReason::Eos,
        }
    }

    #[test]
    fn the_worst_row_is_named() {
        let (first, second) = (step(0, &[-1.0, -2.0]), step(1, &[-0.5]));
        let mut total = health(&[&first], &[vec![-1.0, -2.25]], true).unwrap();
        total.add(&health(&[&second], &[vec![-1.0]], true).unwrap());
        let expected = Health {
            steps: 2,
            tokens: 3,
            difference_sum: 0.75,
            difference_max: 0.5,
            worst: Some("t/trajectory 0/step 1, token 0".to_owned()),
            own_policy: true,
            ..Health::default()
        };
        assert_eq!(total, expected);
    }

    const COMMAND: &str = "logprobs --rollouts @rollouts --model @model --dtype f32 --device cpu";

    #[test]
    fn what_was_sampled_is_found_again() {
        let chain = Chain::new();
        make_model(&chain.path("other"), 2);
        chain.run(&format!("{COMMAND} --reference @model --out @same")).unwrap();
        chain.run(&format!("{COMMAND} --reference @other --out @logprobs")).unwrap();
        let (same, rows) = (chain.rows::<Logprobs>("same"), chain.rows::<Logprobs>("logprobs"));
        let other = Model::load(&chain.path("other"), chain.model().runtime()).unwrap();
        assert_eq!(rows.len(), chain.steps.len());
        for ((row, same), step) in rows.iter().zip(&same).zip(&chain.steps).step_by(7) {
            assert_eq!((key(step), &row.policy_logprobs), (row.key(), &same.policy_logprobs));
            assert_eq!(same.reference_logprobs.as_ref(), Some(&same.policy_logprobs));
            let reference = Chain::logprobs(&other, &step.prompt_ids, &step.completion_ids);
            let pairs = reference.iter().zip(row.reference_logprobs.as_ref().unwrap());
            assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-4));
        }
        let summary = chain.summary("logprobs");
        assert!(summary["sampling_difference_max"].as_f64().unwrap() < 1e-4, "{summary}");
        assert_eq!(summary["model_is_the_sampling_policy"], true);
        assert_eq!(summary["tokens"], chain.steps.iter().map(|step| step.completion_ids.len()).sum::<usize>());
        let ids = chain.steps.iter().map(|step| step.prompt_ids.len() + step.completion_ids.len()).sum::<usize>();
        assert_eq!(summary["tokens_asked"], ids);
        // A model this small runs a token sooner than it could find what to share; no last id is run.
        assert_eq!(summary["tokens_computed"], ids - chain.steps.len());
        chain.run(&format!("{COMMAND} --out @rounded").replace("f32", "bf16")).unwrap();
        assert_eq!(chain.summary("rounded")["tokens_computed"], summary["tokens_computed"]);
    }

    #[test]
    fn what_prompts_share_is_run_once() {
        let mut chain = Chain::new();
        let shared: Vec<i32> = (0..600).map(|place| 65 + place % 26).collect();
        for step in &mut chain.steps {
            let own = step.prompt_ids.split_off(step.prompt_ids.len() - 40);
            step.prompt_ids = [&shared[..], &own].concat();
        }
        chain.write();
        chain.run(&format!("{COMMAND} --out @logprobs")).unwrap();
        let summary = chain.summary("logprobs");
        let [asked, computed] = ["tokens_asked", "tokens_computed"].map(|name| summary[name].as_u64().unwrap());
        let repeated = (600 * chain.steps.len()) as u64;
        assert!(computed < asked - repeated * 9 / 10, "{summary}");
        let model = chain.model();
        for (row, step) in chain.rows::<Logprobs>("logprobs").iter().zip(&chain.steps) {
            let alone = Chain::logprobs(&model, &step.prompt_ids, &step.completion_ids);
            for (shared, alone) in row.policy_logprobs.iter().zip(alone) {
                assert!((shared - alone).abs() <= 1e-5 * alone.abs().max(1.0), "{}: {shared}, {alone}", key(step));
            }
        }
    }

    #[test]
    fn another_policy_and_the_row_that_shows_it_are_named() {
        let mut chain = Chain::new();
        make_model(&chain.path("other"), 2);
        chain.run(&format!("{COMMAND} --out @other-scores").replace("@model", "@other")).unwrap();
        assert_eq!(chain.summary("other-scores")["model_is_the_sampling_policy"], false);
        assert!(chain.rows::<Logprobs>("other-scores")[0].reference_logprobs.is_none());

        chain.steps[10].sampling_logprobs[2] -= 3.0;
        chain.write();
        chain.run(&format!("{COMMAND} --out @logprobs")).unwrap();
        let summary = chain.summary("logprobs");
        assert_eq!(summary["sampling_difference_worst"], "task-01/trajectory 1/step 1, token 2");
        assert!((summary["sampling_difference_max"].as_f64().unwrap() - 3.0).abs() < 1e-3);
    }

    #[test]
    fn a_sequence_past_the_window_is_refused_by_key() {
        let mut chain = Chain::new();
        let ids = std::iter::repeat_n(65, 5000);
        chain.steps[2].prompt_ids.extend(ids);
        chain.write();
        let error = chain.run(&format!("{COMMAND} --out @logprobs")).unwrap_err();
        let (kind, text) = failure(&error);
        assert!(matches!(kind, Failure::BadInput(..)), "{text}");
        assert!(text.contains("task-00/trajectory 0/step 2") && text.contains("4096"), "{text}");
    }

    #[test]
    fn unequal_columns_are_refused_by_key() {
        let mut bad = step(4, &[-1.0]);
        bad.completion_ids.push(3);
        let error = sequence(&bad).unwrap_err();
        assert!(format!("{error:#}").contains("t/trajectory 0/step 4"), "{error:#}");
        assert_eq!(sequence(&step(0, &[-1.0, -2.0])).unwrap().targets, 2..4);
    }
}
