//! `mempo-sft train`: examples and a model -> checkpoint.
//!
//! The order of examples and the size of each optimizer step are planned before the first one; the run is then a walk
//! along that plan. The state is saved under `OUT/resume` every so often and removed at the end; a run that was stopped
//! continues from it and ends with the same bytes.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, anyhow};
use mempo_model::{Config, DeviceOptions, Model, Runtime};
use mempo_run::{Input, MetricsFile, Progress, ResultExt, Stage, StageArgs};
use mempo_train::{Beginning, MemoryBudget, OptimizerOptions, StepStats, TrainSequence, Trainer, learning_rate_at};
use serde::Serialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::dataset::{Dataset, ModelLimits};
use crate::schedule::{PlannedStep, plan_steps};

/// Fit a model to examples; the output directory is a complete Hugging Face model.
///
/// Several example directories are mixed in one shuffle. The loss is the mean over the target tokens of the whole
/// optimizer step, however it is cut into micro-batches. All examples are held in memory, five bytes a token.
#[derive(Debug, clap::Args, Serialize)]
#[command(
    mut_arg("learning_rate", |arg| arg.default_value("1e-5")),
    mut_arg("warmup_ratio", |arg| arg.default_value("0.05")),
    mut_arg("schedule", |arg| arg.default_value("cosine")),
    mut_arg("beta2", |arg| arg.default_value("0.95"))
)]
pub(crate) struct TrainArguments {
    /// Directories written by `mempo-sft build`
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    #[serde(skip)]
    examples: Vec<PathBuf>,
    /// Model directory to start from
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    model: PathBuf,
    /// Times every example is seen
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Stop after this many optimizer steps; the learning rate follows the shorter schedule
    #[arg(long, value_name = "N")]
    max_steps: Option<usize>,
    /// Tokens of an optimizer step, padding included (whole examples)
    #[arg(long, default_value_t = 16384, value_parser = clap::value_parser!(u64).range(1..))]
    tokens_per_batch: u64,
    /// Tokens run through the model at a time, padding included
    #[arg(long, default_value_t = 8192)]
    tokens_per_micro_batch: usize,
    /// Split of --examples that the loss is measured on instead of training on it (see `build --validation-share`)
    #[arg(long, value_name = "SPLIT", default_value = "dev")]
    validation_split: String,
    /// More examples to measure the loss on, whatever their split
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    validation: Option<PathBuf>,
    /// Optimizer steps between two such measurements; the last step is always measured
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    validate_every: u64,
    /// Also keep the checkpoint with the lowest of these losses, in OUT/best
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    keep_best: bool,
    /// Commit a checkpoint although the gradient of some optimizer steps was not finite and their updates were left out
    #[arg(long)]
    #[serde(skip)]
    allow_skipped: bool,
    /// Optimizer steps between two saved states
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    #[serde(skip)]
    save_every: u64,
    #[command(flatten)]
    optimizer: OptimizerOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference to the field")]
fn is_false(value: &bool) -> bool {
    !value
}

/// Folder of the checkpoint with the lowest validation loss.
const BEST: &str = "best";

/// Runs the stage.
pub(crate) fn run(arguments: &TrainArguments) -> anyhow::Result<()> {
    arguments.stage.check_free()?;
    arguments.optimizer.check().usage()?;
    let runtime = arguments.device.resolve().usage()?;
    let stages = |dirs: &[PathBuf], name| dirs.iter().map(|dir| Input::stage(name, dir)).collect::<Result<Vec<_>, _>>();
    let examples = stages(&arguments.examples, "examples")?;
    let validation = stages(arguments.validation.as_slice(), "validation")?;
    let model = Input::model("model", &arguments.model)?;
    let inputs: Vec<&Input> = examples.iter().chain(&validation).chain([&model]).collect();
    let config = Config::load(&arguments.model).bad_input()?;
    arguments.optimizer.lora.check(&config).usage()?;
    let Some(stage) = Stage::open("mempo-sft", "train", &arguments.stage, arguments, &inputs)? else { return Ok(()) };

    let limits =
        ModelLimits { vocabulary_size: config.vocab_size as usize, max_tokens: config.max_position_embeddings };
    let (dataset, aside) = Dataset::read(&examples, limits, Some(&arguments.validation_split))?;
    let mut measured = aside.all_sequences();
    if !validation.is_empty() {
        measured.extend(Dataset::read(&validation, limits, None)?.0.all_sequences());
    }
    let lengths = dataset.lengths();
    if arguments.keep_best && measured.is_empty() {
        return Err(anyhow!(
            "--keep-best: there is no example to measure the loss on; give --validation DIR, or put tasks aside with \
             `mempo-sft build --validation-share`"
        ))
        .usage();
    }
    let mut plan = plan_steps(&lengths, arguments.epochs, arguments.tokens_per_batch, &|parts| stage.seed(parts));
    plan.truncate(arguments.max_steps.unwrap_or(usize::MAX));
    info!("{} examples, {} tokens, {} optimizer steps", lengths.len(), lengths.iter().sum::<usize>(), plan.len());
    info!("{} examples to measure the loss on", measured.len());

    let longest = lengths.iter().copied().max().unwrap_or(0);
    let budget = MemoryBudget::new(&config, &runtime, &arguments.optimizer, longest);
    info!("{}", budget.describe(arguments.tokens_per_micro_batch));

    let mut training = Training::open(arguments, &runtime, stage, dataset, measured)?;
    training.walk(&plan)?;
    training.finish(plan.len())
}

/// What one optimizer step did, a line of the metrics.
#[derive(Debug, Serialize)]
struct Metric {
    /// From 1: how many steps were done.
    step: u64,
    /// From 0.
    epoch: u32,
    /// Mean negative log-probability of the step's target tokens, in nats, before the update; null if not finite.
    loss: f64,
    /// Of this step.
    learning_rate: f64,
    /// Before clipping; null if not finite: then the weights were left as they were.
    gradient_norm: f64,
    /// Tokens of the step, padding left out.
    tokens: u64,
    /// Targets among them.
    target_tokens: u64,
    /// The same mean over the validation examples after the update, where it was taken; null if not finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    validation_loss: Option<f64>,
}

/// A run under way.
struct Training<'a> {
    arguments: &'a TrainArguments,
    stage: Stage,
    dataset: Dataset,
    validation: Vec<TrainSequence>,
    trainer: Trainer,
    metrics: MetricsFile,
    /// Step of the state under `resume`.
    saved_step: u64,
}

impl<'a> Training<'a> {
    /// Loads the model, and the state of an earlier start where there is one.
    fn open(
        arguments: &'a TrainArguments,
        runtime: &Runtime,
        stage: Stage,
        dataset: Dataset,
        validation: Vec<TrainSequence>,
    ) -> anyhow::Result<Self> {
        let model = Model::load(&arguments.model, runtime).bad_input()?;
        let resume = stage.resume_dir();
        let base = fs_err::canonicalize(&arguments.model)?;
        let beginning = Beginning { base: &base, seed: stage.seed(&["lora"]), state: resume.as_deref() };
        let trainer = Trainer::new(model, &arguments.optimizer, &beginning)?;
        let saved_step = trainer.global_step();
        if saved_step > 0 {
            info!("continuing after optimizer step {saved_step}");
        }
        let metrics = MetricsFile::open(stage.dir(), saved_step)?;
        Ok(Self { arguments, stage, dataset, validation, trainer, metrics, saved_step })
    }

    /// Takes the steps of the plan that are not done yet.
    fn walk(&mut self, plan: &[PlannedStep]) -> anyhow::Result<()> {
        let progress = self.stage.progress("training", plan.len() as u64, "steps");
        progress.skip(self.saved_step);
        for step in self.saved_step..plan.len() as u64 {
            if let Err(interrupted) = self.stage.check_interrupt() {
                self.save()?;
                return Err(interrupted);
            }
            self.take_step(&plan[step as usize], plan.len() as u64, &progress)?;
            if (step + 1).is_multiple_of(self.arguments.save_every) {
                self.save()?;
            }
        }
        Ok(())
    }

    fn take_step(&mut self, planned: &PlannedStep, total_steps: u64, progress: &Progress) -> anyhow::Result<()> {
        let start = Instant::now();
        let done = self.trainer.global_step();
        let learning_rate = learning_rate_at(&self.arguments.optimizer, done, total_steps);
        let sequences = self.dataset.sequences(&planned.examples);
        let stats = self.trainer.sft_step(&sequences, learning_rate, self.arguments.tokens_per_micro_batch);
        let stats = self.judge(stats, planned)?;
        if stats.skipped {
            let examples = self.named(planned);
            warn!("optimizer step {}: the gradient is not finite, the weights stay as they are ({examples})", done + 1);
        }
        let budget = self.arguments.tokens_per_micro_batch;
        if let Some(tokens) = self.trainer.micro_batch_that_fits().filter(|tokens| *tokens < budget) {
            warn!("optimizer step {}: memory ran out; micro-batches of {tokens} tokens fit", done + 1);
        }
        let elapsed = start.elapsed().as_secs_f64();
        let measured = (done + 1).is_multiple_of(self.arguments.validate_every) || done + 1 == total_steps;
        let validation_loss = if measured && !self.validation.is_empty() {
            Some(self.trainer.validation_loss(&self.validation, self.arguments.tokens_per_micro_batch)?)
        } else {
            None
        };
        if let Some(loss) = validation_loss.filter(|_| self.arguments.keep_best) {
            self.keep_if_best(loss)?;
        }
        let tokens_per_second = stats.tokens as f64 / elapsed;
        let at_validation = validation_loss.map_or_else(String::new, |loss| format!(", validation {loss:.4}"));
        progress.message(format!("loss {:.4}{at_validation}, {tokens_per_second:.0} tokens/s", stats.loss));
        progress.inc(1);
        self.stage.timing(&json!({ "step": done + 1, "seconds": elapsed, "tokens_per_second": tokens_per_second }));
        self.metrics.push(&Metric {
            step: done + 1,
            epoch: planned.epoch,
            loss: stats.loss,
            learning_rate,
            gradient_norm: stats.gradient_norm,
            tokens: stats.tokens,
            target_tokens: stats.target_tokens,
            validation_loss,
        })
    }

    /// Names the examples of a step that failed; numbers that are none stop the stage as a quality gate.
    fn judge(&self, stats: Result<StepStats, mempo_train::Error>, planned: &PlannedStep) -> anyhow::Result<StepStats> {
        let stats = stats.quality_if(mempo_train::Error::is_not_finite);
        stats.with_context(|| format!("an optimizer step of {}", self.named(planned)))
    }

    /// The first examples of a step, as words that show them.
    fn named(&self, planned: &PlannedStep) -> String {
        let named: Vec<String> = planned.examples.iter().take(4).map(|index| self.dataset.describe(*index)).collect();
        format!("{} examples, mempo-sft show {} …", planned.examples.len(), named.join("; "))
    }

    /// Keeps the weights as they are if no earlier validation loss was as low.
    fn keep_if_best(&self, loss: f64) -> anyhow::Result<()> {
        if !loss.is_finite() || self.metrics.numbers("validation_loss").any(|(_, earlier)| earlier <= loss) {
            return Ok(());
        }
        self.stage.replace_dir(BEST, |dir| {
            let saved = self.trainer.save_checkpoint(&self.arguments.model, dir);
            saved.quality_if(mempo_train::Error::is_not_finite)
        })
    }

    /// Makes the run so far durable.
    fn save(&mut self) -> anyhow::Result<()> {
        let step = self.trainer.global_step();
        if step > self.saved_step {
            self.metrics.sync()?;
            self.stage.save_resume(|dir| self.trainer.save_state(dir).quality_if(mempo_train::Error::is_not_finite))?;
            self.saved_step = step;
        }
        Ok(())
    }

    /// Writes the checkpoint and commits it.
    fn finish(mut self, planned_steps: usize) -> anyhow::Result<()> {
        self.metrics.sync()?;
        let skipped = self.trainer.skipped_steps();
        if skipped > 0 && !self.arguments.allow_skipped {
            self.save()?;
            return Err(anyhow!(
                "{skipped} of {planned_steps} optimizer steps had a gradient that is not finite and left the weights as they \
                 were: lower --learning-rate or look at the examples above; or run the same command with --allow-skipped, which \
                 commits what the others made"
            ))
            .quality();
        }
        self.stage.write_files(|dir| {
            let saved = self.trainer.save_checkpoint(&self.arguments.model, dir);
            saved.quality_if(mempo_train::Error::is_not_finite)
        })?;
        self.metrics.show(&["loss", "validation_loss", "gradient_norm", "learning_rate"]);
        let summary = summary(&self.metrics, planned_steps);
        info!("{summary}");
        self.stage.finish(&[], summary)
    }
}

fn summary(metrics: &MetricsFile, planned_steps: usize) -> Value {
    let sum = |name: &str| metrics.lines().iter().filter_map(|line| line[name].as_u64()).sum::<u64>();
    let best = metrics.numbers("validation_loss").min_by(|left, right| left.1.total_cmp(&right.1));
    json!({
        "optimizer_steps": planned_steps,
        "tokens": sum("tokens"),
        "target_tokens": sum("target_tokens"),
        "skipped_steps": metrics.lines().iter().filter(|line| line["gradient_norm"].is_null()).count(),
        "first_loss": metrics.lines().first().map(|line| line["loss"].clone()),
        "last_loss": metrics.last("loss"),
        "best_validation_loss": best.map(|(_, loss)| loss),
        "best_validation_step": best.map(|(index, _)| index + 1),
    })
}
