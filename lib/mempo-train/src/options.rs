//! Options of the optimizer and of the policy loss, and the learning-rate schedule.
//!
//! One struct is command-line flags, API and manifest entry.

use clap::{Args, ValueEnum};
use serde::Serialize;
use tch::Kind;

use crate::{Error, LoraOptions};

/// AdamW, its schedule, and what training keeps in memory. Defaults are those of reinforcement learning; a program with other defaults changes
/// them on its command (`mut_arg`).
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
pub struct OptimizerOptions {
    /// Highest learning rate of the schedule
    #[arg(long, default_value_t = 1e-6)]
    pub learning_rate: f64,
    /// Part of the optimizer steps over which the learning rate rises to its highest value
    #[arg(long, default_value_t = 0.0)]
    pub warmup_ratio: f64,
    /// Learning rate after the warm-up
    #[arg(long, value_enum, default_value_t = Schedule::Constant)]
    pub schedule: Schedule,
    /// Decoupled weight decay; matrices only, never norms and biases
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Decay of the mean of gradients
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f64,
    /// Decay of the mean of squared gradients
    #[arg(long, default_value_t = 0.999)]
    pub beta2: f64,
    /// Added to the root of the mean square
    #[arg(long, default_value_t = 1e-8)]
    pub epsilon: f64,
    /// Gradients with a larger norm (over all parameters) are scaled down to it; inf: never
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Number format of gradient and moments. With a bf16 model, f32 takes 18 bytes a parameter in all, bf16 takes 12
    #[arg(long, value_enum, default_value_t = StateDtype::F32)]
    pub optimizer_dtype: StateDtype,
    /// Keep only each layer's input for the backward pass and compute the rest again: a fraction of the memory, up to a
    /// third more time
    #[arg(long)]
    pub recompute: bool,
    /// Adapters instead of all weights.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraOptions,
}

/// Number format of gradient and moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateDtype {
    /// Exact sums.
    F32,
    /// Half the memory; moments are rounded at random, right on average, so that no change is too small to count.
    Bf16,
}

impl StateDtype {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to zero in a straight line.
    Linear,
    /// Falls to zero along half a cosine.
    Cosine,
}

/// The policy loss: a policy-gradient term, KL to a reference policy, entropy.
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
pub struct PolicyOptions {
    /// Policy-gradient term of a token
    #[arg(long, value_enum, default_value_t = Loss::PpoClip)]
    pub loss: Loss,
    /// The ratio is clipped below 1 - this
    #[arg(long, default_value_t = 0.2)]
    pub clip_low: f64,
    /// The ratio is clipped above 1 + this
    #[arg(long, default_value_t = 0.2)]
    pub clip_high: f64,
    /// With ppo-clip and a negative advantage, the loss of a token is at most this times -advantage; inf: no limit
    #[arg(long, default_value_t = 3.0)]
    pub dual_clip: f64,
    /// Weight of the KL divergence to the reference policy
    #[arg(long, default_value_t = 0.001)]
    pub kl_coefficient: f64,
    /// Estimator of that divergence
    #[arg(long, value_enum, default_value_t = KlEstimator::K3)]
    pub kl: KlEstimator,
    /// Multiply the estimate (k2 or k3) by the ratio, which corrects it where the policy has moved on from the old one
    #[arg(long)]
    pub kl_ratio: bool,
    /// Weight of the policy's entropy, which is rewarded
    #[arg(long, default_value_t = 0.0)]
    pub entropy_coefficient: f64,
    /// Weigh tokens by how much likelier they are under the old policy than where they were sampled, at most this (2 is
    /// usual); for rollouts of another engine or an older policy
    #[arg(long, value_name = "CAP")]
    pub importance_cap: Option<f64>,
    /// How token losses become one number
    #[arg(long, value_enum, default_value_t = Aggregation::TrajectoryMean)]
    pub aggregation: Aggregation,
    /// Tokens a trajectory's sum of losses is divided by with `--aggregation constant`
    #[arg(long, default_value_t = 4096.0)]
    pub loss_length: f64,
}

/// Policy-gradient term of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Clipped ratio with separate bounds and dual clip (PPO; the paper)
    PpoClip,
    /// Clipped ratio of whole sequences, a sequence being a step (GSPO)
    GspoStep,
    /// The same, a sequence being a trajectory
    GspoTrajectory,
    /// Log-probability weighed by the clipped ratio: no token loses its gradient (CISPO)
    Cispo,
    /// Log-probability times advantage, without a ratio
    Reinforce,
}

/// Estimator of the divergence from the reference policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlEstimator {
    /// `old - ref`, taken from each token's advantage: as a loss term its gradient has mean 0
    K1,
    /// Half the squared difference
    K2,
    /// `exp(x) - x - 1`, never negative (the papers' choice)
    K3,
}

/// How token losses become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Mean over the tokens of each trajectory (all its steps), then mean over trajectories: `1/N Σ_i 1/|τ_i|
    /// Σ_k` (MemPO)
    TrajectoryMean,
    /// Mean over all tokens of the optimizer step
    TokenMean,
    /// Mean over the tokens of each step, then mean over steps
    SequenceMean,
    /// Sum over the tokens of each trajectory over --loss-length, then mean over trajectories (Dr. GRPO)
    Constant,
}

impl OptimizerOptions {
    /// Refuses values that make no sense.
    pub fn check(&self) -> Result<(), Error> {
        let at_least_zero = "must be a number of at least 0";
        require(
            "learning-rate",
            self.learning_rate,
            (0.0..f64::INFINITY).contains(&self.learning_rate),
            at_least_zero,
        )?;
        require("warmup-ratio", self.warmup_ratio, (0.0..=1.0).contains(&self.warmup_ratio), "must be from 0 to 1")?;
        require("weight-decay", self.weight_decay, (0.0..f64::INFINITY).contains(&self.weight_decay), at_least_zero)?;
        require("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "must be at least 0 and below 1")?;
        require("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "must be at least 0 and below 1")?;
        require("epsilon", self.epsilon, self.epsilon > 0.0 && self.epsilon.is_finite(), "must be above 0")?;
        require("max-grad-norm", self.max_grad_norm, self.max_grad_norm > 0.0, "must be above 0 (inf: no limit)")
    }
}

impl PolicyOptions {
    /// Refuses values that make no sense.
    pub fn check(&self) -> Result<(), Error> {
        require("clip-low", self.clip_low, (0.0..=1.0).contains(&self.clip_low), "must be from 0 to 1")?;
        require("clip-high", self.clip_high, self.clip_high >= 0.0, "must be at least 0")?;
        require("dual-clip", self.dual_clip, self.dual_clip > 1.0, "must be above 1 (inf: no limit)")?;
        let kl = self.kl_coefficient;
        require("kl-coefficient", kl, (0.0..f64::INFINITY).contains(&kl), "must be a number of at least 0")?;
        let entropy = self.entropy_coefficient;
        let at_least_zero = "must be a number of at least 0";
        require("entropy-coefficient", entropy, (0.0..f64::INFINITY).contains(&entropy), at_least_zero)?;
        let cap = self.importance_cap.unwrap_or(1.0);
        require("importance-cap", cap, cap > 0.0, "must be above 0 (inf: no limit)")?;
        let length = self.loss_length;
        require("loss-length", length, length > 0.0 && length.is_finite(), "must be above 0")
    }
}

fn require(option: &'static str, value: f64, holds: bool, expected: &'static str) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(Error::Option { option, value, expected }) }
}

/// Learning rate of optimizer step `step` (from 0) out of `total_steps`.
///
/// Rises over the first `w = ceil(warmup_ratio · total_steps)` steps as `(step + 1) / w`, so that no step is
/// lost to a rate of 0, then follows the schedule, which would reach 0 at `total_steps`.
pub fn learning_rate_at(options: &OptimizerOptions, step: u64, total_steps: u64) -> f64 {
    let warmup_steps = (options.warmup_ratio * total_steps as f64).ceil() as u64;
    if step < warmup_steps {
        return options.learning_rate * (step + 1) as f64 / warmup_steps as f64;
    }
    let progress = (step - warmup_steps) as f64 / total_steps.saturating_sub(warmup_steps).max(1) as f64;
    let factor = match options.schedule {
        Schedule::Constant => 1.0,
        Schedule::Linear => 1.0 - progress.min(1.0),
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
    };
    options.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::optimizer_options;

    fn rates(schedule: Schedule, warmup_ratio: f64, total: u64) -> Vec<f64> {
        let options = OptimizerOptions { learning_rate: 1.0, warmup_ratio, schedule, ..optimizer_options() };
        (0..total).map(|step| learning_rate_at(&options, step, total)).collect()
    }

    #[test]
    fn schedules_follow_their_shapes() {
        assert_eq!(rates(Schedule::Constant, 0.0, 3), [1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Linear, 0.0, 4), [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(Schedule::Linear, 0.5, 4), [0.5, 1.0, 1.0, 0.5]);
        let cosine = rates(Schedule::Cosine, 0.0, 4);
        for (found, expected) in cosine.iter().zip([1.0, 0.853_553_390_6, 0.5, 0.146_446_609_4]) {
            assert!((found - expected).abs() < 1e-9, "{cosine:?}");
        }
        // All warm-up, and one step in all: never zero.
        assert_eq!(rates(Schedule::Cosine, 1.0, 2), [0.5, 1.0]);
        assert_eq!(rates(Schedule::Cosine, 0.1, 1), [1.0]);
    }

    #[test]
    fn nonsense_is_refused_by_flag_name() {
        let message = OptimizerOptions { beta2: 1.0, ..optimizer_options() }.check().unwrap_err().to_string();
        assert_eq!(message, "--beta2 is 1: must be at least 0 and below 1");
        assert!(OptimizerOptions { learning_rate: f64::NAN, ..optimizer_options() }.check().is_err());
        assert!(OptimizerOptions { max_grad_norm: f64::INFINITY, ..optimizer_options() }.check().is_ok());
        assert!(PolicyOptions { dual_clip: 1.0, ..crate::testing::policy_options() }.check().is_err());
    }
}
