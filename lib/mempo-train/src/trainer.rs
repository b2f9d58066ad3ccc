//! A model in training: parameters in the compute type, fp32 master weights and moments, one call an optimizer step.

use std::path::Path;

use mempo_model::{Model, initial_adapter, logprobs_at};
use serde::Serialize;
use tch::{Kind, Tensor, no_grad_guard};

use crate::adamw::{AdamW, norm};
use crate::backward::{Backward, Pass, target_hidden};
use crate::batch::{Arrangement, MicroBatch, Sequence, micro_batch_overhead};
use crate::flat::{Layout, Slot};
use crate::head::Coefficients;
use crate::lora::Adapters;
use crate::memory::Room;
use crate::policy::{PolicyStats, PolicySums, PolicyTrajectory, check_ids, set_sequence_ratios, weighted_sequences};
use crate::state::{self, Counters};
use crate::{Error, Loss, OptimizerOptions, PolicyOptions};

/// Optimizer steps with a gradient that is not finite, one after the other, before training gives up.
const MOST_SKIPPED: u64 = 3;

/// A sequence for supervised training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainSequence {
    /// Token ids.
    pub ids: Vec<i32>,
    /// One per id: whether it is a prediction target. The first id cannot be one: nothing comes before it.
    pub targets: Vec<bool>,
}

/// What a supervised optimizer step did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepStats {
    /// Mean negative log-probability of the target tokens, in nats.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens predicted.
    pub target_tokens: u64,
    /// Tokens of all sequences.
    pub tokens: u64,
    /// Whether the update was left out because the gradient was not finite.
    pub skipped: bool,
}

/// What training begins with beside a model.
#[derive(Debug, Clone, Copy)]
pub struct Beginning<'a> {
    /// The directory that the model is from, which adapters remember.
    pub base: &'a Path,
    /// Seed of fresh adapters.
    pub seed: u64,
    /// The folder of a state, from which training continues, master weights included.
    pub state: Option<&'a Path>,
}

/// A model in training.
///
/// The model computes in its own type (bf16 or f32); the optimizer works on fp32 master weights, of which the
/// model's are the rounded copy, so that no update is too small to count. In f32 the two are the same memory.
pub struct Trainer {
    model: Model,
    /// What is trained: the model's parameters, or adapters beside them.
    layout: Layout,
    leaves: Vec<Tensor>,
    adapters: Option<Adapters>,
    head_slot: Option<usize>,
    arrangement: Arrangement,
    /// What a micro-batch costs beside its tokens, in tokens.
    overhead: usize,
    /// Tokens of a micro-batch that memory was found to hold.
    room: Room,
    /// The leaves, flat, in the compute type.
    weights: Tensor,
    optimizer: AdamW,
    options: OptimizerOptions,
    counters: Counters,
}

impl Trainer {
    /// Takes over a model as `beginning` says. Without a state the master weights begin as the model has them, rounded where it
    /// computes in bf16: what was sampled is what is trained.
    pub fn new(mut model: Model, options: &OptimizerOptions, beginning: &Beginning<'_>) -> Result<Self, Error> {
        options.check()?;
        options.lora.check(model.config())?;
        let &Beginning { base, seed, state } = beginning;
        let _no_grad = no_grad_guard();
        let adapters = options.lora.adapters(base);
        let (device, kind) = (model.head_weight().device(), model.head_weight().kind());
        let layout = match &adapters {
            None => Layout::new(model.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.size()))),
            Some(adapters) => Layout::new(model.adapter_shapes(adapters.rank, &adapters.targets).into_iter()),
        };
        let mut optimizer = AdamW::new(&layout, device, options.optimizer_dtype.kind());
        for (place, slot) in layout.slots.iter().enumerate() {
            let mut master = slot.view(&optimizer.master);
            match &adapters {
                None => master.copy_(&model.parameters()[place].1),
                Some(_) => master.copy_(&initial_adapter(seed, &slot.name, &slot.shape)),
            }
        }
        let counters = state.map(|dir| state::load(dir, &layout, &mut optimizer, adapters.as_ref()));
        let counters = counters.transpose()?.unwrap_or_default();
        let weights = optimizer.master.to_kind(kind);
        let leaf = |slot: &Slot| slot.view(&weights).detach().set_requires_grad(true);
        let leaves: Vec<Tensor> = layout.slots.iter().map(leaf).collect();
        let shared = || leaves.iter().map(Tensor::shallow_clone);
        match &adapters {
            None => model.bind_parameters(shared().collect()),
            Some(adapters) => {
                let names = layout.slots.iter().map(|slot| slot.name.clone());
                model.bind_adapters(names.zip(shared()).collect(), adapters.scale());
            }
        }
        // Input embeddings are the head of a model that has no other.
        let head = |name: &str| layout.slots.iter().position(|slot| slot.name == name);
        let head_slot = head("lm_head.weight").or_else(|| head("model.embed_tokens.weight"));
        let overhead = micro_batch_overhead(model.config().parameter_count(), device);
        let arrangement = Arrangement::of(device);
        let room = Room::default();
        Ok(Self {
            model,
            layout,
            leaves,
            adapters,
            head_slot,
            arrangement,
            overhead,
            room,
            weights,
            optimizer,
            options: options.clone(),
            counters,
        })
    }

    /// The model as trained so far.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens of a micro-batch that memory was found to hold, once it has run out with more.
    pub fn micro_batch_that_fits(&self) -> Option<usize> {
        self.room.known()
    }

    /// Optimizer steps taken, over all stages that handed the state on.
    pub fn global_step(&self) -> u64 {
        self.counters.global_step
    }

    /// Optimizer steps left out because the gradient was not finite, counted likewise.
    pub fn skipped_steps(&self) -> u64 {
        self.counters.skipped_steps
    }

    /// One supervised optimizer step: the loss is the mean over the target tokens of all `sequences`, however
    /// they are cut into micro-batches of at most `tokens_per_micro_batch` padded tokens.
    pub fn sft_step(
        &mut self,
        sequences: &[TrainSequence],
        learning_rate: f64,
        tokens_per_micro_batch: usize,
    ) -> Result<StepStats, Error> {
        let (prepared, target_tokens) = self.supervised(sequences)?;
        let loss = self.accumulate(&prepared, tokens_per_micro_batch, |tokens_per_micro_batch| {
            let mut loss = 0.0;
            let pass = Pass { temperature: 1.0, tokens_per_micro_batch, entropy: false };
            self.backward().run(&prepared, &pass, &mut |chunk, columns_ck| {
                let weight_c = columns_ck.select(1, 0);
                loss -= (&weight_c * &chunk.logprobs_c).sum(Kind::Double).double_value(&[]);
                Coefficients { logprob: -weight_c, entropy: None }
            })?;
            Ok(loss)
        })?;
        let gradient_norm = self.update(learning_rate)?;
        let tokens = sequences.iter().map(|sequence| sequence.ids.len() as u64).sum();
        Ok(StepStats { loss, gradient_norm, target_tokens, tokens, skipped: !gradient_norm.is_finite() })
    }

    /// Mean negative log-probability of the target tokens of all `sequences`, in nats; changes nothing.
    pub fn validation_loss(&self, sequences: &[TrainSequence], tokens_per_micro_batch: usize) -> Result<f64, Error> {
        let (prepared, _) = self.supervised(sequences)?;
        let logprobs = self.logprobs(&prepared, 1.0, tokens_per_micro_batch)?;
        let weighted = |(sequence, logprobs): (&Sequence, &Vec<f32>)| -> f64 {
            let pairs = sequence.columns.iter().zip(logprobs);
            pairs.map(|(weight, logprob)| f64::from(*weight) * f64::from(*logprob)).sum()
        };
        Ok(-prepared.iter().zip(&logprobs).map(weighted).sum::<f64>())
    }

    /// Log-probabilities of each sequence's targets; changes nothing.
    fn logprobs(
        &self,
        sequences: &[Sequence],
        temperature: f64,
        tokens_per_micro_batch: usize,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let _no_grad = no_grad_guard();
        let lengths: Vec<usize> = sequences.iter().map(Sequence::input_length).collect();
        let shortest = lengths.iter().copied().min().unwrap_or(0);
        self.room.fit(tokens_per_micro_batch, shortest, |tokens| {
            let mut logprobs = vec![Vec::new(); sequences.len()];
            for members in self.arrangement.micro_batches(&lengths, tokens, self.overhead) {
                let batch = MicroBatch::new(sequences, &members, self.arrangement, self.weights.device());
                let hidden_rd = target_hidden(&self.model, &batch);
                let logprobs_r = logprobs_at(&self.model, &hidden_rd, &batch.targets_r, temperature);
                let mut flat = Vec::<f32>::try_from(&logprobs_r)?.into_iter();
                for member in members {
                    logprobs[member] = flat.by_ref().take(sequences[member].targets.len()).collect();
                }
            }
            Ok(logprobs)
        })
    }

    /// One optimizer step on whole trajectories. Log-probabilities are taken at `temperature`, that of
    /// sampling. The denominator of the loss is that of all `trajectories`, however their steps are cut into
    /// micro-batches.
    pub fn policy_step(
        &mut self,
        trajectories: &[PolicyTrajectory],
        options: &PolicyOptions,
        learning_rate: f64,
        temperature: f64,
        tokens_per_micro_batch: usize,
    ) -> Result<PolicyStats, Error> {
        let sums = self.accumulate_policy(trajectories, options, temperature, tokens_per_micro_batch)?;
        let gradient_norm = self.update(learning_rate)?;
        Ok(sums.stats(options, gradient_norm))
    }

    /// What [`Trainer::policy_step`] would find; changes nothing.
    pub fn policy_stats(
        &self,
        trajectories: &[PolicyTrajectory],
        options: &PolicyOptions,
        temperature: f64,
        tokens_per_micro_batch: usize,
    ) -> Result<PolicyStats, Error> {
        let sums = self.accumulate_policy(trajectories, options, temperature, tokens_per_micro_batch)?;
        let gradient_norm = norm(&self.optimizer.gradient);
        let _ = self.optimizer.gradient.shallow_clone().zero_();
        Ok(sums.stats(options, gradient_norm))
    }

    /// Writes the state from which [`Trainer::new`] continues bit for bit.
    pub fn save_state(&self, dir: &Path) -> Result<(), Error> {
        state::save(dir, &self.layout, &self.optimizer, self.counters, self.adapters.as_ref())
    }

    /// Writes a complete Hugging Face model directory, the files beside the weights taken from `source_dir`,
    /// and the state in its `trainer/`. Adapters are merged into the weights, and in `adapter/` by themselves.
    pub fn save_checkpoint(&self, source_dir: &Path, out_dir: &Path) -> Result<(), Error> {
        self.save_state(&out_dir.join("trainer"))?;
        if let Some(adapters) = &self.adapters {
            adapters.save(&out_dir.join("adapter"), &self.layout, &self.optimizer.master)?;
        }
        Ok(mempo_model::save_checkpoint(&self.model, source_dir, out_dir)?)
    }

    fn accumulate_policy(
        &self,
        trajectories: &[PolicyTrajectory],
        options: &PolicyOptions,
        temperature: f64,
        tokens_per_micro_batch: usize,
    ) -> Result<PolicySums, Error> {
        options.check()?;
        let mut sequences = weighted_sequences(trajectories, options, self.vocabulary())?;
        if matches!(options.loss, Loss::GspoStep | Loss::GspoTrajectory) {
            let logprobs = self.logprobs(&sequences, temperature, tokens_per_micro_batch)?;
            set_sequence_ratios(trajectories, options, &mut sequences, &logprobs);
        }
        let steps = || trajectories.iter().flat_map(|trajectory| &trajectory.steps);
        let with_reference = steps().all(|step| step.reference_logprobs.is_some());
        self.accumulate(&sequences, tokens_per_micro_batch, |tokens_per_micro_batch| {
            let mut sums = PolicySums::new(with_reference);
            let pass = Pass { temperature, tokens_per_micro_batch, entropy: true };
            self.backward().run(&sequences, &pass, &mut |chunk, columns_ck| sums.add(chunk, columns_ck, options))?;
            Ok(sums)
        })
    }

    /// What `run` gives for micro-batches of at most so many tokens, the gradient accumulated; where memory does not
    /// suffice, from the start with half as many.
    fn accumulate<T>(
        &self,
        sequences: &[Sequence],
        tokens_per_micro_batch: usize,
        mut run: impl FnMut(usize) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let shortest = sequences.iter().map(Sequence::input_length).min().unwrap_or(0);
        self.room.fit(tokens_per_micro_batch, shortest, |tokens| {
            let _ = self.optimizer.gradient.shallow_clone().zero_();
            run(tokens)
        })
    }

    fn backward(&self) -> Backward<'_> {
        Backward {
            model: &self.model,
            leaves: &self.leaves,
            layout: &self.layout,
            gradient: &self.optimizer.gradient,
            head_slot: self.head_slot,
            arrangement: self.arrangement,
            overhead: self.overhead,
            recompute: self.options.recompute,
        }
    }

    /// Each target weighs one over their number in all sequences, which is returned too.
    fn supervised(&self, sequences: &[TrainSequence]) -> Result<(Vec<Sequence>, u64), Error> {
        for (index, sequence) in sequences.iter().enumerate() {
            check(sequence, self.vocabulary()).map_err(|problem| Error::Sequence { sequence: index, problem })?;
        }
        let count = sequences.iter().flat_map(|sequence| &sequence.targets).filter(|&&target| target).count();
        let weight = 1.0 / count as f32;
        let prepare = |sequence: &TrainSequence| {
            let targets: Vec<usize> = (0..sequence.ids.len()).filter(|&index| sequence.targets[index]).collect();
            Sequence { ids: sequence.ids.clone(), columns: vec![weight; targets.len()], targets }
        };
        Ok((sequences.iter().map(prepare).collect(), count as u64))
    }

    /// Updates the weights from the accumulated gradient; returns its norm.
    fn update(&mut self, learning_rate: f64) -> Result<f64, Error> {
        let norm = self.optimizer.step(&self.options, learning_rate)?;
        self.counters.global_step += 1;
        if norm.is_finite() {
            self.counters.consecutive_skipped = 0;
            if self.weights.kind() != Kind::Float {
                let _no_grad = no_grad_guard();
                self.weights.copy_(&self.optimizer.master);
            }
            return Ok(norm);
        }
        self.counters.skipped_steps += 1;
        self.counters.consecutive_skipped += 1;
        if self.counters.consecutive_skipped < MOST_SKIPPED {
            return Ok(norm);
        }
        Err(Error::NonFinite { consecutive: self.counters.consecutive_skipped, global_step: self.counters.global_step })
    }

    fn vocabulary(&self) -> usize {
        self.model.head_weight().size()[0] as usize
    }
}

fn check(sequence: &TrainSequence, vocabulary: usize) -> Result<(), String> {
    if sequence.ids.len() != sequence.targets.len() {
        return Err(format!("{} ids, but a mask of {}", sequence.ids.len(), sequence.targets.len()));
    }
    if sequence.targets.first() == Some(&true) {
        return Err("its first id is a target: nothing comes before it to predict it from".to_owned());
    }
    check_ids(sequence.ids.iter(), vocabulary)
}

#[cfg(test)]
mod tests;
