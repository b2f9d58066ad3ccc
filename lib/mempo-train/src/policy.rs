//! The policy loss: per-token terms and their derivative by the token's log-probability.
//!
//! `L = Σ_t w_t (pg_t + β k3_t)` over all policy tokens, where `w_t` is what `--aggregation` makes of the
//! optimizer step: `1 / (N |τ_i|)` for MemPO's objective (arXiv 2603.00680: `1/N Σ_i 1/|τ_i| Σ_k`, `|τ_i|`
//! counting the policy tokens of all steps), or `1 / Σ_i |τ_i|`. With `r = exp(lp - old)`, the difference
//! clamped to ±20: `pg = max(-A r, -A clip(r, 1-lo, 1+hi))`, for `A < 0` at most `-A c` (dual clip, arXiv
//! 1912.09729), and `k3 = exp(x) - x - 1` with `x = ref - lp` clamped to ±20 and the result to 10 (the clamps
//! are verl's).

use serde::Serialize;
use tch::{Kind, Tensor};

use crate::batch::Sequence;
use crate::head::Chunk;
use crate::{Aggregation, Error, PolicyOptions};

/// Values a token brings along: weight, old log-probability, reference log-probability (NaN if there is none),
/// advantage.
const COLUMNS: usize = 4;
const LOGPROB_CLAMP: f64 = 20.0;
const KL_CLAMP: f64 = 10.0;

/// All model calls of one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyTrajectory {
    /// The calls, or any repacking of their tokens into sequences: the gradient is the same.
    pub steps: Vec<PolicySequence>,
}

/// One model call: its completion is learned, its prompt only conditions.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySequence {
    /// Ids the model saw; at least one.
    pub prompt_ids: Vec<i32>,
    /// Ids the model wrote.
    pub completion_ids: Vec<i32>,
    /// One per completion id: log-probability the ratio is taken against, at the sampling temperature.
    pub old_logprobs: Vec<f32>,
    /// The same under the reference policy.
    pub reference_logprobs: Option<Vec<f32>>,
    /// One per completion id.
    pub advantages: Vec<f32>,
    /// 1 normally. The step's tokens count this often, in the loss and in the trajectory's length; 0 leaves the
    /// step out.
    pub loss_weight: f32,
}

/// What an optimizer step on trajectories did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyStats {
    /// `policy_loss + kl_coefficient · kl`.
    pub loss: f64,
    /// Aggregated clipped-ratio loss.
    pub policy_loss: f64,
    /// Aggregated k3 estimate of the divergence from the reference policy, in nats; none without reference log-probs.
    pub kl: Option<f64>,
    /// Mean over tokens of `exp(lp - old)`.
    pub ratio_mean: f64,
    /// Largest of them.
    pub ratio_max: f64,
    /// Part of the tokens whose policy gradient the clipping stopped.
    pub clip_fraction: f64,
    /// Aggregated entropy of the policy, in nats.
    pub entropy: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Policy tokens learned from.
    pub tokens: u64,
    /// Whether the update was left out because the gradient was not finite.
    pub skipped: bool,
}

/// Sums over the tokens of one optimizer step.
#[derive(Debug, Default)]
pub(crate) struct PolicySums {
    policy_loss: f64,
    kl: f64,
    entropy: f64,
    ratio: f64,
    clipped: f64,
    ratio_max: f64,
    tokens: u64,
    with_reference: bool,
}

/// Cuts trajectories into sequences whose tokens carry their share of the loss: the only place where steps,
/// trajectories and the optimizer step meet, so nothing after it depends on how tokens are packed.
pub(crate) fn weighted_sequences(
    trajectories: &[PolicyTrajectory],
    options: &PolicyOptions,
    vocabulary: usize,
) -> Result<Vec<Sequence>, Error> {
    for (trajectory, content) in trajectories.iter().enumerate() {
        for (step, sequence) in content.steps.iter().enumerate() {
            check(sequence, options, vocabulary).map_err(|problem| Error::Step { trajectory, step, problem })?;
        }
    }
    let lengths: Vec<f64> = trajectories.iter().map(PolicyTrajectory::weighted_tokens).collect();
    let total_tokens: f64 = lengths.iter().sum();
    let counted = lengths.iter().filter(|&&length| length > 0.0).count() as f64;
    let mut sequences = Vec::new();
    for (trajectory, length) in trajectories.iter().zip(lengths) {
        let denominator = match options.aggregation {
            Aggregation::TrajectoryMean => counted * length,
            Aggregation::TokenMean => total_tokens,
        };
        let steps = trajectory.steps.iter().filter(|step| step.loss_weight > 0.0 && !step.completion_ids.is_empty());
        sequences.extend(steps.map(|step| step.sequence(f64::from(step.loss_weight) / denominator)));
    }
    Ok(sequences)
}

impl PolicyTrajectory {
    /// `|τ|`: policy tokens of all steps, each as often as its step's loss weight says.
    fn weighted_tokens(&self) -> f64 {
        self.steps.iter().map(|step| f64::from(step.loss_weight) * step.completion_ids.len() as f64).sum()
    }
}

impl PolicySequence {
    fn sequence(&self, weight: f64) -> Sequence {
        let start = self.prompt_ids.len();
        let mut columns = Vec::with_capacity(COLUMNS * self.completion_ids.len());
        for index in 0..self.completion_ids.len() {
            let reference = self.reference_logprobs.as_ref().map_or(f32::NAN, |logprobs| logprobs[index]);
            columns.extend([weight as f32, self.old_logprobs[index], reference, self.advantages[index]]);
        }
        Sequence {
            ids: [self.prompt_ids.as_slice(), &self.completion_ids].concat(),
            targets: (start..start + self.completion_ids.len()).collect(),
            columns,
        }
    }
}

fn check(step: &PolicySequence, options: &PolicyOptions, vocabulary: usize) -> Result<(), String> {
    let tokens = step.completion_ids.len();
    let mut columns = vec![("old log-probabilities", &step.old_logprobs), ("advantages", &step.advantages)];
    match &step.reference_logprobs {
        Some(logprobs) => columns.push(("reference log-probabilities", logprobs)),
        None if options.kl_coefficient > 0.0 => {
            return Err("no reference log-probabilities, which --kl-coefficient above 0 needs".to_owned());
        }
        None => {}
    }
    for (name, values) in columns {
        if values.len() != tokens {
            return Err(format!("{} {name} for {tokens} completion ids", values.len()));
        }
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(format!("{name}: value {index} is {}, not a finite number", values[index]));
        }
    }
    if step.prompt_ids.is_empty() {
        return Err("the prompt is empty: the first completion token has nothing to be predicted from".to_owned());
    }
    if !(step.loss_weight.is_finite() && step.loss_weight >= 0.0) {
        return Err(format!("loss weight is {}, expected a number of at least 0", step.loss_weight));
    }
    check_ids(step.prompt_ids.iter().chain(&step.completion_ids), vocabulary)
}

/// Refuses ids that the model has no embedding for.
pub(crate) fn check_ids<'a>(mut ids: impl Iterator<Item = &'a i32>, vocabulary: usize) -> Result<(), String> {
    match ids.find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocabulary)) {
        Some(id) => Err(format!("id {id} is outside the model's vocabulary of {vocabulary}")),
        None => Ok(()),
    }
}

impl PolicySums {
    /// Adds the terms of a chunk; returns `dL/dlogprob`.
    pub(crate) fn add(&mut self, chunk: &Chunk, columns_ck: &Tensor, options: &PolicyOptions) -> Tensor {
        let logprobs = &chunk.logprobs_c;
        let [weight, old, reference, advantage] = [0, 1, 2, 3].map(|column| columns_ck.select(1, column));
        let surrogate = surrogate(logprobs, &old, &advantage, options);
        let kl = self.with_reference.then(|| k3(logprobs, &reference));
        let mut coefficient = surrogate.derivative;
        if let Some((_, derivative)) = &kl {
            coefficient += derivative * options.kl_coefficient;
        }
        let entropies = chunk.entropies_c.as_ref().map_or_else(|| logprobs.zeros_like(), Tensor::shallow_clone);
        let kl_values = kl.map_or_else(|| logprobs.zeros_like(), |(values, _)| values);
        let sums = Tensor::stack(
            &[
                &weight * surrogate.loss,
                &weight * kl_values,
                &weight * entropies,
                surrogate.ratio.shallow_clone(),
                surrogate.clipped.to_kind(Kind::Float),
            ],
            0,
        )
        .sum_dim_intlist(1, false, Kind::Double);
        self.add_sums(&sums, surrogate.ratio.max().double_value(&[]), logprobs.size()[0]);
        coefficient * weight
    }

    fn add_sums(&mut self, sums: &Tensor, ratio_max: f64, tokens: i64) {
        let values = [0, 1, 2, 3, 4].map(|index| sums.double_value(&[index]));
        self.policy_loss += values[0];
        self.kl += values[1];
        self.entropy += values[2];
        self.ratio += values[3];
        self.clipped += values[4];
        self.ratio_max = self.ratio_max.max(ratio_max);
        self.tokens += tokens as u64;
    }

    /// Starts at zero; `with_reference` says whether every token has a reference log-probability.
    pub(crate) fn new(with_reference: bool) -> Self {
        Self { with_reference, ..Self::default() }
    }

    /// The figures of the optimizer step.
    pub(crate) fn stats(&self, options: &PolicyOptions, gradient_norm: f64) -> PolicyStats {
        let tokens = self.tokens.max(1) as f64;
        PolicyStats {
            loss: self.policy_loss + options.kl_coefficient * self.kl,
            policy_loss: self.policy_loss,
            kl: self.with_reference.then_some(self.kl),
            ratio_mean: self.ratio / tokens,
            ratio_max: self.ratio_max,
            clip_fraction: self.clipped / tokens,
            entropy: self.entropy,
            gradient_norm,
            tokens: self.tokens,
            skipped: !gradient_norm.is_finite(),
        }
    }
}

struct Surrogate {
    loss: Tensor,
    derivative: Tensor,
    ratio: Tensor,
    clipped: Tensor,
}

/// Clipped-ratio loss per token, its derivative, and where the clipping stopped the gradient.
fn surrogate(logprobs: &Tensor, old: &Tensor, advantage: &Tensor, options: &PolicyOptions) -> Surrogate {
    let difference = logprobs - old;
    let ratio = difference.clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP).exp();
    let plain = -(advantage * &ratio);
    let clipped_loss = -(advantage * ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high));
    let pessimistic = plain.maximum(&clipped_loss);
    let limit = advantage * -options.dual_clip;
    let limited = advantage.lt(0.0).logical_and(&pessimistic.gt_tensor(&limit));
    let clipped = clipped_loss.gt_tensor(&plain).logical_or(&limited);
    let stopped = clipped.logical_or(&difference.abs().gt(LOGPROB_CLAMP));
    Surrogate {
        loss: limit.where_self(&limited, &pessimistic),
        derivative: plain.masked_fill(&stopped, 0.0),
        ratio,
        clipped,
    }
}

/// k3 estimate of KL(policy ‖ reference) per token and its derivative by the policy's log-probability.
fn k3(logprobs: &Tensor, reference: &Tensor) -> (Tensor, Tensor) {
    let difference = reference - logprobs;
    let clamped = difference.clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP);
    let growth = clamped.expm1();
    let value = &growth - clamped;
    let outside = difference.abs().gt(LOGPROB_CLAMP).logical_or(&value.gt(KL_CLAMP));
    (value.clamp_max(KL_CLAMP), (-growth).masked_fill(&outside, 0.0))
}
