//! Loss terms of a token and their derivatives by its log-probability.
//!
//! With `r = exp(lp - old)`, the difference clamped to ±20, and `A` the advantage:
//! - `ppo-clip`: `max(-A r, -A clip(r, 1-lo, 1+hi))`, for `A < 0` at most `-A c` (dual clip, arXiv 1912.09729);
//! - `gspo`: the same without dual clip, `r` being `exp` of the sequence's mean difference in value, and the token's own in
//!   gradient (arXiv 2507.18071, eq. 13);
//! - `cispo`: `-clip(r, 1-lo, 1+hi) A lp`, no gradient through the ratio (arXiv 2506.13585, eq. 4);
//! - `reinforce`: `-A lp`.
//!
//! All of them times the token's importance. KL to the reference policy, with `x = ref - lp` clamped to ±20: `k3 = exp(x) - x
//! - 1`, at most 10 (the clamps are verl's); `k2 = x² / 2`; both times `r` where asked for, which is right off policy, too.

use tch::Tensor;

use crate::{KlEstimator, Loss, PolicyOptions};

/// Differences of log-probabilities count at most this much.
pub(crate) const LOGPROB_CLAMP: f64 = 20.0;
const KL_CLAMP: f64 = 10.0;

/// What tokens bring along, each `[C]`.
pub(crate) struct Token {
    /// Log-probability the ratio is taken against.
    pub(crate) old: Tensor,
    /// The same of the reference policy, NaN if there is none.
    pub(crate) reference: Tensor,
    pub(crate) advantage: Tensor,
    /// Factor of the policy term, 1 normally.
    pub(crate) importance: Tensor,
    /// Mean difference over its sequence, NaN where the loss needs none.
    pub(crate) sequence: Tensor,
}

/// The policy term of some tokens, each `[C]`.
pub(crate) struct Surrogate {
    pub(crate) loss: Tensor,
    pub(crate) derivative: Tensor,
    pub(crate) ratio: Tensor,
    /// Where clipping stopped or changed the gradient.
    pub(crate) clipped: Tensor,
}

/// The policy term at log-probabilities `[C]`.
pub(crate) fn surrogate(logprobs: &Tensor, token: &Token, options: &PolicyOptions) -> Surrogate {
    let Surrogate { loss, derivative, ratio, clipped } = match options.loss {
        Loss::PpoClip => ppo_clip(logprobs, token, options),
        Loss::GspoStep | Loss::GspoTrajectory => gspo(token, options),
        Loss::Cispo => cispo(logprobs, token, options),
        Loss::Reinforce => reinforce(logprobs, token),
    };
    Surrogate { loss: loss * &token.importance, derivative: derivative * &token.importance, ratio, clipped }
}

fn ratio(logprobs: &Tensor, old: &Tensor) -> (Tensor, Tensor) {
    let difference = logprobs - old;
    let ratio = difference.clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP).exp();
    (ratio, difference.abs().gt(LOGPROB_CLAMP))
}

fn clip(ratio: &Tensor, options: &PolicyOptions) -> Tensor {
    ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
}

fn ppo_clip(logprobs: &Tensor, token: &Token, options: &PolicyOptions) -> Surrogate {
    let (ratio, outside) = ratio(logprobs, &token.old);
    let plain = -(&token.advantage * &ratio);
    let clipped_loss = -(&token.advantage * clip(&ratio, options));
    let pessimistic = plain.maximum(&clipped_loss);
    let limit = &token.advantage * -options.dual_clip;
    let limited = token.advantage.lt(0.0).logical_and(&pessimistic.gt_tensor(&limit));
    let clipped = clipped_loss.gt_tensor(&plain).logical_or(&limited);
    let derivative = plain.masked_fill(&clipped.logical_or(&outside), 0.0);
    Surrogate { loss: limit.where_self(&limited, &pessimistic), derivative, ratio, clipped }
}

fn gspo(token: &Token, options: &PolicyOptions) -> Surrogate {
    let ratio = token.sequence.exp();
    let plain = -(&token.advantage * &ratio);
    let clipped_loss = -(&token.advantage * clip(&ratio, options));
    let clipped = clipped_loss.gt_tensor(&plain);
    Surrogate { loss: plain.maximum(&clipped_loss), derivative: plain.masked_fill(&clipped, 0.0), ratio, clipped }
}

fn cispo(logprobs: &Tensor, token: &Token, options: &PolicyOptions) -> Surrogate {
    let (ratio, _) = ratio(logprobs, &token.old);
    let bounded = clip(&ratio, options);
    let clipped = bounded.not_equal_tensor(&ratio);
    let derivative = -(bounded * &token.advantage);
    Surrogate { loss: &derivative * logprobs, derivative, ratio, clipped }
}

fn reinforce(logprobs: &Tensor, token: &Token) -> Surrogate {
    let (ratio, _) = ratio(logprobs, &token.old);
    let derivative = -&token.advantage;
    let clipped = derivative.isnan();
    Surrogate { loss: &derivative * logprobs, derivative, ratio, clipped }
}

/// Estimate of KL(policy ‖ reference) per token, and its derivative.
pub(crate) fn kl(logprobs: &Tensor, token: &Token, options: &PolicyOptions) -> (Tensor, Tensor) {
    let (value, derivative) = match options.kl {
        // The gradient of k1 has mean 0; in the reward it has k2's.
        KlEstimator::K1 => (logprobs - &token.reference, logprobs.zeros_like()),
        KlEstimator::K2 => k2(logprobs, &token.reference),
        KlEstimator::K3 => k3(logprobs, &token.reference),
    };
    if !options.kl_ratio {
        return (value, derivative);
    }
    let (ratio, outside) = ratio(logprobs, &token.old);
    let through_ratio = (&value * &ratio).masked_fill(&outside, 0.0);
    (value * &ratio, derivative * ratio + through_ratio)
}

fn k2(logprobs: &Tensor, reference: &Tensor) -> (Tensor, Tensor) {
    let difference = logprobs - reference;
    let clamped = difference.clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP);
    (clamped.square() * 0.5, clamped.masked_fill(&difference.abs().gt(LOGPROB_CLAMP), 0.0))
}

fn k3(logprobs: &Tensor, reference: &Tensor) -> (Tensor, Tensor) {
    let difference = reference - logprobs;
    let clamped = difference.clamp(-LOGPROB_CLAMP, LOGPROB_CLAMP);
    let growth = clamped.expm1();
    let value = &growth - clamped;
    let outside = difference.abs().gt(LOGPROB_CLAMP).logical_or(&value.gt(KL_CLAMP));
    (value.clamp_max(KL_CLAMP), (-growth).masked_fill(&outside, 0.0))
}
