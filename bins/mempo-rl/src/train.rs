//! `mempo-rl train`: rollouts, advantages and log-probs -> the next checkpoint.
//!
//! The optimizer steps are planned from the small tables; the sequences of as many steps as fit in the memory
//! limit are loaded at a time. The state is saved under `OUT/resume` every so often and removed at the end; a
//! run that was stopped continues from it and ends with the same bytes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow};
use clap::Args;
use mempo_model::{DeviceOptions, Model};
use mempo_run::{Input, MetricsFile, ResultExt, Stage, StageArgs};
use mempo_train::{
    Beginning, KlEstimator, MemoryBudget, OptimizerOptions, PolicyOptions, PolicyStats, PolicyTrajectory, Trainer,
    learning_rate_at, verify_merged, verify_state,
};
use serde::Serialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::alarms::AlarmOptions;
use crate::history::HISTOGRAM;
use crate::inputs::{Inputs, temperature};
use crate::load::Source;
use crate::plan::{Planned, PlannedStep, Selection, plan_steps, window};

const PROGRESS_FILE: &str = "progress.json";
/// Metrics that are shown at the end.
const SHOWN: [&str; 7] = ["reward_mean", "loss", "kl", "entropy", "clip_fraction", "ratio_max", "gradient_norm"];
/// Tokens of the sequences in memory, at about 16 bytes each: half a gibibyte, or one optimizer step if that is more.
pub(crate) const TOKENS_IN_MEMORY: u64 = 32 << 20;

/// Update a model on a rollout; the output directory is a complete Hugging Face model
///
/// The loss is MemPO's: the clipped ratio of every policy token, times the advantage of its trajectory (and,
/// inside the memory, of the memory), averaged over the tokens of each trajectory and then over trajectories;
/// plus a KL term. The ratio is taken against `--logprobs`, or without them against the log-probs of sampling.
/// Optimizer state is carried on from MODEL/trainer.
#[derive(Debug, Args, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
pub(crate) struct TrainArguments {
    /// Output of `mempo-rollout sample`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub(crate) rollouts: PathBuf,
    /// Output of `mempo-score advantages` for these rollouts
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub(crate) advantages: PathBuf,
    /// Output of `mempo-score logprobs` for these rollouts; needed, with --reference, for the KL term
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub(crate) logprobs: Option<PathBuf>,
    /// Model to update
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub(crate) model: PathBuf,
    /// Whole trajectories of an optimizer step, at most; an epoch is cut into steps of equal size
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = at_least_one)]
    trajectories_per_step: usize,
    /// Times every trajectory is learned from
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Optimizer steps that --schedule and --warmup-ratio span, counted over all runs that hand the trainer state on: those of
    /// the whole loop (default: each run's own)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule_steps: Option<u64>,
    /// Tokens run through the model at a time, padding included
    #[arg(long, default_value_t = 16384, value_name = "N", value_parser = at_least_one)]
    pub(crate) tokens_per_micro_batch: usize,
    /// Start with new optimizer state, whatever is in MODEL/trainer
    #[arg(long)]
    pub(crate) fresh_optimizer: bool,
    /// Learn from rollouts of another checkpoint than MODEL
    #[arg(long)]
    pub(crate) off_policy: bool,
    /// Learn from rollouts sampled with --top-p below 1
    #[arg(long)]
    pub(crate) allow_cut_sampling: bool,
    /// Commit a checkpoint although the gradient of some optimizer steps was not finite and their updates were left out
    #[arg(long)]
    #[serde(skip)]
    pub(crate) allow_skipped: bool,
    /// Before the first optimizer step, require of all trajectories that the ratio to the old policy is 1 (and the divergence
    /// from the reference 0 if it is the model itself) to this mean distance; best with --deterministic
    #[arg(long, value_name = "TOLERANCE", num_args = 0..=1, default_missing_value = "1e-6")]
    #[serde(skip)]
    pub(crate) check_identity: Option<f64>,
    /// Optimizer steps between two saved states
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = at_least_one)]
    #[serde(skip)]
    save_every: usize,
    #[command(flatten)]
    #[serde(skip)]
    pub(crate) alarms: AlarmOptions,
    #[command(flatten)]
    pub(crate) policy: PolicyOptions,
    #[command(flatten)]
    pub(crate) optimizer: OptimizerOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    #[serde(skip)]
    pub(crate) stage: StageArgs,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

impl TrainArguments {
    /// Refuses options that would say nothing together.
    fn check_together(&self) -> anyhow::Result<()> {
        if self.policy.kl_ratio && self.policy.kl == KlEstimator::K1 {
            return Err(anyhow!(
                "--kl-ratio multiplies the estimates k2 and k3; k1 is part of the advantages: leave one out"
            ));
        }
        if self.policy.importance_cap.is_some() && self.logprobs.is_none() {
            return Err(anyhow!(
                "--importance-cap weighs the old policy's log-probs against those of sampling, and without --logprobs the two \
                 are one: give --logprobs"
            ));
        }
        Ok(())
    }
}

/// Runs the stage.
pub(crate) fn run(arguments: &TrainArguments) -> anyhow::Result<()> {
    arguments.stage.check_free()?;
    arguments.policy.check().usage()?;
    arguments.optimizer.check().usage()?;
    arguments.check_together().usage()?;
    let inputs = Inputs::open(arguments)?;
    let Some(stage) = Stage::open("mempo-rl", "train", &arguments.stage, arguments, &inputs.list())? else {
        return Ok(());
    };
    arguments.alarms.check_rollouts(&inputs.rollouts)?;
    arguments.alarms.check_advantages(&inputs.advantages)?;
    let selection = Selection::read(&inputs.rollouts, &inputs.advantages)?;
    if selection.trajectories.is_empty() {
        return Err(anyhow!("{}: no trajectory has advantages", arguments.advantages.display())).bad_input();
    }
    let (epochs, per_step) = (arguments.epochs, arguments.trajectories_per_step);
    let plan = plan_steps(&selection.trajectories, epochs, per_step, &|parts| stage.seed(parts));
    info!("{} trajectories, {} optimizer steps", selection.trajectories.len(), plan.len());
    let source = inputs.source(arguments)?;
    let mut training = Training::open(arguments, &inputs, &selection, stage)?;
    training.check_schedule(plan.len())?;
    training.check_identity(&plan, &selection, &source)?;
    training.walk(&plan, &selection, &source)?;
    training.finish(plan.len(), &selection, &inputs.advantages)
}

/// What one optimizer step did, a line of the metrics. A number that is not finite is written as null.
#[derive(Debug, Serialize)]
struct Metric {
    /// From 1, in this run.
    step: u64,
    /// Over all runs that handed the trainer state on.
    global_step: u64,
    epoch: u32,
    learning_rate: f64,
    /// Mean over the step's trajectories.
    reward_mean: f64,
    trajectories: u64,
    #[serde(flatten)]
    stats: PolicyStats,
}

/// A run under way.
pub(crate) struct Training<'a> {
    pub(crate) arguments: &'a TrainArguments,
    stage: Stage,
    pub(crate) trainer: Trainer,
    pub(crate) metrics: MetricsFile,
    pub(crate) temperature: f64,
    /// Whether the reference policy is the model that is trained.
    pub(crate) own_reference: bool,
    /// Optimizer steps of the state under `resume`.
    pub(crate) saved: usize,
}

impl<'a> Training<'a> {
    /// Loads the model with the state of an earlier start, or else the state that came with the model, if there
    /// is one.
    fn open(
        arguments: &'a TrainArguments,
        inputs: &Inputs,
        selection: &Selection,
        stage: Stage,
    ) -> anyhow::Result<Self> {
        let runtime = arguments.device.resolve().usage()?;
        let base = fs_err::canonicalize(inputs.base.as_ref().unwrap_or(&inputs.model).dir())?;
        let model = Model::load(&base, &runtime).bad_input()?;
        let budget = MemoryBudget::new(model.config(), &runtime, &arguments.optimizer, selection.longest_row());
        info!("{}", budget.describe(arguments.tokens_per_micro_batch));
        let (resume, before) = (stage.resume_dir(), inputs.trainer.as_ref().map(Input::dir));
        let saved = resume.as_deref().map_or(Ok(0), read_progress)?;
        if resume.is_some() {
            info!("continuing after optimizer step {saved}");
        } else if let (Some(trainer), None) = (before, &inputs.base) {
            verify_state(&model, trainer).bad_input()?;
        }
        let beginning = Beginning { base: &base, seed: stage.seed(&["lora"]), state: resume.as_deref().or(before) };
        let trainer = Trainer::new(model, &arguments.optimizer, &beginning).bad_input()?;
        if inputs.base.is_some() && resume.is_none() {
            verify_merged(&trainer, &arguments.model).bad_input()?;
        }
        let metrics = MetricsFile::open(stage.dir(), saved as u64)?;
        let (temperature, own_reference) = (temperature(&inputs.rollouts)?, inputs.is_own_reference());
        Ok(Self { arguments, stage, trainer, metrics, temperature, own_reference, saved })
    }

    /// Takes the steps of the plan that are not done yet.
    fn walk(&mut self, plan: &[PlannedStep], selection: &Selection, source: &Source) -> anyhow::Result<()> {
        let progress = self.stage.progress("train", plan.len() as u64, "steps");
        progress.skip(self.saved as u64);
        let mut done = self.saved;
        while done < plan.len() {
            let steps = &plan[done..][..window(&plan[done..], &selection.trajectories, TOKENS_IN_MEMORY)];
            let members = steps.iter().flat_map(|step| selection.members(step));
            let mut loaded = source.load(&members.collect::<Vec<_>>())?.into_iter();
            for step in steps {
                self.stop_if_interrupted(done)?;
                let content: Vec<PolicyTrajectory> = loaded.by_ref().take(step.members.len()).collect();
                let learning_rate = self.learning_rate(done, plan.len());
                let stats = self.step(done, &content, learning_rate)?;
                done += 1;
                progress.message(format!("loss {:.4}", stats.loss));
                progress.inc(1);
                let rewards = selection.members(step).map(|planned| f64::from(planned.reward));
                self.metrics.push(&Metric {
                    step: done as u64,
                    global_step: self.trainer.global_step(),
                    epoch: step.epoch,
                    learning_rate,
                    reward_mean: rewards.sum::<f64>() / step.members.len() as f64,
                    trajectories: step.members.len() as u64,
                    stats: stats.clone(),
                })?;
                let members: Vec<&Planned> = selection.members(step).collect();
                self.judge(done, &stats, &content, &members)?;
                if done - self.saved >= self.arguments.save_every {
                    self.save(done)?;
                }
            }
        }
        Ok(())
    }

    /// Of the step after `done` others: of this run, or of all runs that --schedule-steps spans.
    fn learning_rate(&self, done: usize, planned: usize) -> f64 {
        let own = (done as u64, planned as u64);
        let (step, total) = self.arguments.schedule_steps.map_or(own, |total| (self.trainer.global_step(), total));
        learning_rate_at(&self.arguments.optimizer, step, total)
    }

    /// A schedule that ends before the run would leave steps with a learning rate of 0.
    fn check_schedule(&self, planned: usize) -> anyhow::Result<()> {
        let Some(total) = self.arguments.schedule_steps else { return Ok(()) };
        let last = self.trainer.global_step() + (planned - self.saved) as u64;
        if last <= total {
            return Ok(());
        }
        Err(anyhow!(
            "--schedule-steps {total}: this run ends with optimizer step {last} of all runs: give the number of the whole loop, with \
             --restart"
        ))
        .usage()
    }

    /// The optimizer step after `done` others.
    fn step(&mut self, done: usize, content: &[PolicyTrajectory], learning_rate: f64) -> anyhow::Result<PolicyStats> {
        let started = Instant::now();
        let (options, budget) = (&self.arguments.policy, self.arguments.tokens_per_micro_batch);
        let stats = self.trainer.policy_step(content, options, learning_rate, self.temperature, budget);
        let stats = stats.quality_if(mempo_train::Error::is_not_finite);
        let stats = stats.with_context(|| format!("optimizer step {}", done + 1))?;
        if let Some(tokens) = self.trainer.micro_batch_that_fits().filter(|tokens| *tokens < budget) {
            warn!("optimizer step {}: memory ran out; micro-batches of {tokens} tokens fit", done + 1);
        }
        let seconds = started.elapsed().as_secs_f64();
        self.stage.timing(&json!({ "step": done + 1, "seconds": seconds, "policy_tokens": stats.tokens }));
        Ok(stats)
    }

    fn stop_if_interrupted(&mut self, done: usize) -> anyhow::Result<()> {
        if let Err(interrupted) = self.stage.check_interrupt() {
            if done > self.saved {
                self.save(done)?;
            }
            return Err(interrupted);
        }
        Ok(())
    }

    /// Makes the run so far durable.
    pub(crate) fn save(&mut self, done: usize) -> anyhow::Result<()> {
        self.metrics.sync()?;
        self.stage.save_resume(|dir| {
            self.trainer.save_state(dir).quality_if(mempo_train::Error::is_not_finite)?;
            fs_err::write(dir.join(PROGRESS_FILE), json!({ "steps": done }).to_string())?;
            Ok(())
        })?;
        self.saved = done;
        Ok(())
    }

    /// Writes the checkpoint and commits it.
    fn finish(mut self, planned: usize, selection: &Selection, advantages: &Input) -> anyhow::Result<()> {
        self.metrics.sync()?;
        self.refuse_skipped(planned)?;
        self.stage.write_files(|dir| {
            let saved = self.trainer.save_checkpoint(&self.arguments.model, dir);
            saved.quality_if(mempo_train::Error::is_not_finite)
        })?;
        let mut summary = summary(&self.metrics, selection);
        summary[HISTOGRAM] = json!(advantages.manifest().and_then(|manifest| manifest.summary_counts(HISTOGRAM)));
        self.metrics.show(&SHOWN);
        info!("{summary}");
        self.stage.finish(&[], summary)
    }
}

/// Optimizer steps of the state in `resume`.
fn read_progress(resume: &Path) -> anyhow::Result<usize> {
    let path = resume.join(PROGRESS_FILE);
    let progress: Value = serde_json::from_str(&fs_err::read_to_string(&path)?)
        .with_context(|| format!("{}: damaged; run with --restart", path.display()))?;
    let steps =
        progress["steps"].as_u64().with_context(|| format!("{}: no steps; run with --restart", path.display()))?;
    Ok(steps as usize)
}

fn summary(metrics: &MetricsFile, selection: &Selection) -> Value {
    let lines = metrics.lines();
    let mean = |name: &str| metrics.numbers(name).map(|(_, value)| value).sum::<f64>() / lines.len().max(1) as f64;
    json!({
        "optimizer_steps": lines.len(),
        "skipped_steps": lines.iter().filter(|line| line["skipped"] == true).count(),
        "trajectories": selection.trajectories.len(),
        "trajectories_without_reward": selection.without_reward,
        "trajectories_without_advantages": selection.without_advantages,
        "policy_tokens": lines.iter().filter_map(|line| line["tokens"].as_u64()).sum::<u64>(),
        "reward_mean": mean("reward_mean"),
        "clip_fraction_mean": mean("clip_fraction"),
        "gradient_norm_mean": mean("gradient_norm"),
        "last_loss": metrics.last("loss"),
        "last_kl": metrics.last("kl"),
        "last_entropy": metrics.last("entropy"),
        "global_step": metrics.last("global_step"),
    })
}
