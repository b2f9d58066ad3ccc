//! The policy loss of an optimizer step: which tokens count how much, and what they sum up to.
//!
//! `L = Σ_t w_t (pg_t + β kl_t - η H_t)` over all policy tokens; `pg` and `kl` are those of [`crate::surrogate`], `H` is the
//! entropy of the whole distribution. `w_t` is what `--aggregation` makes of the optimizer step, such as `1 / (N |τ_i|)` for
//! MemPO's objective (arXiv 2603.00680: `1/N Σ_i 1/|τ_i| Σ_k`, `|τ_i|` counting the policy tokens of all steps).

use serde::Serialize;
use tch::{Kind, Tensor};

use crate::batch::Sequence;
use crate::head::{Chunk, Coefficients};
use crate::surrogate::{LOGPROB_CLAMP, Token, kl, surrogate};
use crate::{Aggregation, Error, KlEstimator, Loss, PolicyOptions};

/// Values a token brings along: its weight, then those of [`Token`].
const COLUMNS: usize = 6;

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
    /// The same as the sampler gave them, where it is another engine or an older policy.
    pub sampling_logprobs: Option<Vec<f32>>,
    /// One per completion id.
    pub advantages: Vec<f32>,
    /// 1 normally. The step's tokens count this often, in the loss and in the trajectory's length; 0 leaves the
    /// step out.
    pub loss_weight: f32,
}

/// What an optimizer step on trajectories did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyStats {
    /// `policy_loss + kl_coefficient · kl - entropy_coefficient · entropy`.
    pub loss: f64,
    /// Aggregated policy-gradient loss.
    pub policy_loss: f64,
    /// Aggregated estimate of the divergence from the reference policy, in nats; none without reference log-probs.
    pub kl: Option<f64>,
    /// Mean over tokens of the ratio `exp(lp - old)`, or the sequence's.
    pub ratio_mean: f64,
    /// Mean over tokens of its distance from 1.
    pub ratio_distance: f64,
    /// Largest of the ratios.
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
    distance: f64,
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
    let kept = || trajectories.iter().flat_map(PolicyTrajectory::kept);
    let total_steps: f64 = kept().map(|step| f64::from(step.loss_weight)).sum();
    let mut sequences = Vec::new();
    for (trajectory, length) in trajectories.iter().zip(lengths) {
        for step in trajectory.kept() {
            let denominator = match options.aggregation {
                Aggregation::TrajectoryMean => counted * length,
                Aggregation::TokenMean => total_tokens,
                Aggregation::SequenceMean => total_steps * step.completion_ids.len() as f64,
                Aggregation::Constant => counted * options.loss_length,
            };
            sequences.push(step.sequence(f64::from(step.loss_weight) / denominator, options));
        }
    }
    Ok(sequences)
}

/// Gives every token the mean log-ratio of its sequence, of which `logprobs` are the current ones, sequence after sequence
/// in the order of [`weighted_sequences`] (GSPO, arXiv 2507.18071, eq. 7).
pub(crate) fn set_sequence_ratios(
    trajectories: &[PolicyTrajectory],
    options: &PolicyOptions,
    sequences: &mut [Sequence],
    logprobs: &[Vec<f32>],
) {
    let mut rest = sequences.iter_mut().zip(logprobs);
    for trajectory in trajectories {
        let steps: Vec<&PolicySequence> = trajectory.kept().collect();
        let mut members: Vec<(&mut Sequence, &Vec<f32>)> = rest.by_ref().take(steps.len()).collect();
        let sums: Vec<(f64, f64)> =
            steps.iter().zip(&members).map(|(step, (_, logprobs))| step.log_ratio(logprobs)).collect();
        let all = sums.iter().fold((0.0, 0.0), |all, step| (all.0 + step.0, all.1 + step.1));
        for ((sequence, _), own) in members.iter_mut().zip(sums) {
            let (sum, weight) = if options.loss == Loss::GspoStep { own } else { all };
            let mean = (sum / weight).clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP) as f32;
            sequence.columns.chunks_mut(COLUMNS).for_each(|token| token[COLUMNS - 1] = mean);
        }
    }
}

impl PolicyTrajectory {
    /// `|τ|`: policy tokens of all steps, each as often as its step's loss weight says.
    fn weighted_tokens(&self) -> f64 {
        self.steps.iter().map(|step| f64::from(step.loss_weight) * step.completion_ids.len() as f64).sum()
    }

    /// The steps that are learned from.
    fn kept(&self) -> impl Iterator<Item = &PolicySequence> {
        self.steps.iter().filter(|step| step.loss_weight > 0.0 && !step.completion_ids.is_empty())
    }
}

impl PolicySequence {
    fn sequence(&self, weight: f64, options: &PolicyOptions) -> Sequence {
        let start = self.prompt_ids.len();
        let mut columns = Vec::with_capacity(COLUMNS * self.completion_ids.len());
        for index in 0..self.completion_ids.len() {
            let old = self.old_logprobs[index];
            let reference = self.reference_logprobs.as_ref().map_or(f32::NAN, |logprobs| logprobs[index]);
            let mut advantage = self.advantages[index];
            if options.kl == KlEstimator::K1 && !reference.is_nan() {
                advantage -= options.kl_coefficient as f32 * (old - reference);
            }
            columns.extend([weight as f32, old, reference, advantage, self.importance(index, options), f32::NAN]);
        }
        Sequence {
            ids: [self.prompt_ids.as_slice(), &self.completion_ids].concat(),
            targets: (start..start + self.completion_ids.len()).collect(),
            columns,
        }
    }

    /// How much likelier a token was under the old policy than where it was sampled, at most the cap (truncated importance
    /// sampling).
    fn importance(&self, index: usize, options: &PolicyOptions) -> f32 {
        match (&self.sampling_logprobs, options.importance_cap) {
            (Some(sampling), Some(cap)) => {
                let difference = f64::from(self.old_logprobs[index]) - f64::from(sampling[index]);
                difference.clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP).exp().min(cap) as f32
            }
            _ => 1.0,
        }
    }

    /// Sum over its tokens of current minus old log-probability, and their number, both times its weight.
    fn log_ratio(&self, logprobs: &[f32]) -> (f64, f64) {
        let differences = logprobs.iter().zip(&self.old_logprobs).map(|(new, old)| f64::from(*new) - f64::from(*old));
        let weight = f64::from(self.loss_weight);
        (weight * differences.sum::<f64>(), weight * logprobs.len() as f64)
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
    match &step.sampling_logprobs {
        Some(logprobs) => columns.push(("sampling log-probabilities", logprobs)),
        None if options.importance_cap.is_some() => {
            return Err("no log-probabilities of sampling, which --importance-cap needs".to_owned());
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
    /// Adds the terms of a chunk; returns the loss's derivatives.
    pub(crate) fn add(&mut self, chunk: &Chunk, columns_ck: &Tensor, options: &PolicyOptions) -> Coefficients {
        let logprobs = &chunk.logprobs_c;
        let [weight, old, reference, advantage, importance, sequence] = std::array::from_fn(|column| {
            let column = column as i64;
            columns_ck.select(1, column)
        });
        let token = Token { old, reference, advantage, importance, sequence };
        let surrogate = surrogate(logprobs, &token, options);
        let kl = self.with_reference.then(|| kl(logprobs, &token, options));
        let mut coefficient = surrogate.derivative;
        if let Some((_, derivative)) = &kl
            && options.kl != KlEstimator::K1
        {
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
                (&surrogate.ratio - 1.0).abs(),
                surrogate.clipped.to_kind(Kind::Float),
            ],
            0,
        )
        .sum_dim_intlist(1, false, Kind::Double);
        self.add_sums(&sums, surrogate.ratio.max().double_value(&[]), logprobs.size()[0]);
        let entropy = (options.entropy_coefficient > 0.0).then(|| &weight * -options.entropy_coefficient);
        Coefficients { logprob: coefficient * weight, entropy }
    }

    fn add_sums(&mut self, sums: &Tensor, ratio_max: f64, tokens: i64) {
        let values = [0, 1, 2, 3, 4, 5].map(|index| sums.double_value(&[index]));
        self.policy_loss += values[0];
        self.kl += values[1];
        self.entropy += values[2];
        self.ratio += values[3];
        self.distance += values[4];
        self.clipped += values[5];
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
        // k1 is part of the advantages already.
        let kl_coefficient = if options.kl == KlEstimator::K1 { 0.0 } else { options.kl_coefficient };
        PolicyStats {
            loss: self.policy_loss + kl_coefficient * self.kl - options.entropy_coefficient * self.entropy,
            policy_loss: self.policy_loss,
            kl: self.with_reference.then_some(self.kl),
            ratio_mean: self.ratio / tokens,
            ratio_distance: self.distance / tokens,
            ratio_max: self.ratio_max,
            clip_fraction: self.clipped / tokens,
            entropy: self.entropy,
            gradient_norm,
            tokens: self.tokens,
            skipped: !gradient_norm.is_finite(),
        }
    }
}
