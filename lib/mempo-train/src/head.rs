//! The output head: log-probabilities of chosen tokens and the gradient of a loss over them, without the logits ever
//! existing as a whole.
//!
//! For any loss that depends on the network through the log-probabilities `lp_t` of the chosen tokens alone,
//! the derivative by the logits is `c_t (onehot_t - p_t)` with `c_t = dL/dlp_t`. So each chunk of rows needs
//! its logits only for a moment: from them come `lp_t`, then `c_t` from the loss, then the gradients of the
//! hidden states and of the head's weight. The caller sends the former back through the body. The same
//! memory-saving idea as Cut Cross-Entropy (arXiv 2411.09009), with plain operations.
//!
//! Shapes: `R` rows, `C` rows of one chunk, `D` hidden size, `V` vocabulary.

use std::ops::Range;

use mempo_model::Runtime;
use tch::{Device, Kind, Tensor, no_grad_guard};

/// Elements of one chunk of logits: on the CPU what stays in the cache, on a GPU about half a gibibyte in fp32.
const CPU_CHUNK: i64 = 1 << 20;
const GPU_CHUNK: i64 = 1 << 27;
/// Fewer rows make the products inefficient, whatever the vocabulary.
const LEAST_ROWS: i64 = 128;

/// The head of a model at a temperature.
pub(crate) struct Head<'a> {
    /// Output embeddings, the model's own or tied.
    pub(crate) weight_vd: &'a Tensor,
    /// How the model computes.
    pub(crate) runtime: &'a Runtime,
    /// Logits are divided by this.
    pub(crate) temperature: f64,
    /// Whether to compute entropies.
    pub(crate) entropy: bool,
}

/// What the loss sees of a chunk of rows.
pub(crate) struct Chunk {
    /// Which rows.
    pub(crate) rows: Range<i64>,
    /// `[C]` fp32: natural log-probabilities of the chosen tokens.
    pub(crate) logprobs_c: Tensor,
    /// `[C]` fp32: entropies of the distributions, in nats, where asked for.
    pub(crate) entropies_c: Option<Tensor>,
}

/// Derivatives of a loss by what it sees of a chunk, each `[C]` fp32.
pub(crate) struct Coefficients {
    /// By the log-probabilities.
    pub(crate) logprob: Tensor,
    /// By the entropies, where the loss depends on them.
    pub(crate) entropy: Option<Tensor>,
}

impl Head<'_> {
    /// Gradient `[R, D]` (in the hidden states' type) of a loss by `hidden_rd`; that by the head's weight is added to
    /// `weight_gradient_vd`, if it is wanted. `coefficients` is asked once a chunk for the loss's derivatives.
    pub(crate) fn backward(
        &self,
        hidden_rd: &Tensor,
        targets_r: &Tensor,
        mut weight_gradient_vd: Option<&mut Tensor>,
        coefficients: &mut dyn FnMut(&Chunk) -> Coefficients,
    ) -> Tensor {
        let _no_grad = no_grad_guard();
        let kind = hidden_rd.kind();
        let mut parts = Vec::new();
        for rows in self.chunks(targets_r) {
            let (start, length) = (rows.start, rows.end - rows.start);
            let part_cd = hidden_rd.narrow(0, start, length);
            let targets_c1 = targets_r.narrow(0, start, length).unsqueeze(1);
            let mut logprobs_cv = self.all_logprobs(&part_cd);
            let logprobs_c = logprobs_cv.gather(1, &targets_c1, false).squeeze_dim(1);
            let entropies_c = self.entropy.then(|| entropies(&logprobs_cv));
            let chunk = Chunk { rows, logprobs_c, entropies_c };
            let Coefficients { logprob, entropy } = coefficients(&chunk);
            let entropy_cv = entropy.map(|by_c| entropy_gradient(&logprobs_cv, &chunk, &by_c));
            let mut scale_c1 = (logprob / -self.temperature).unsqueeze(1);
            // p - onehot in fp32: where p is near 1 the difference would be lost in bf16.
            let minus_one_c1 = chunk.logprobs_c.full_like(-1.0).unsqueeze(1);
            let mut residual_cv = logprobs_cv.exp_().scatter_add_(1, &targets_c1, &minus_one_c1);
            if let Some(entropy_cv) = entropy_cv {
                residual_cv = residual_cv * &scale_c1 + entropy_cv / self.temperature;
                let _ = scale_c1.fill_(1.0);
            }
            let residual_cv = residual_cv.to_kind(kind);
            parts.push((self.runtime.linear(&residual_cv, &self.weight_vd.tr()) * &scale_c1).to_kind(kind));
            if let Some(weight_gradient_vd) = weight_gradient_vd.as_deref_mut() {
                let scaled_cd = (&part_cd * &scale_c1).to_kind(kind);
                self.runtime.add_product(weight_gradient_vd, &residual_cv.tr(), &scaled_cd);
            }
        }
        Tensor::cat(&parts, 0)
    }

    /// `[C, V]` fp32 log-probabilities of the whole vocabulary.
    fn all_logprobs(&self, hidden_cd: &Tensor) -> Tensor {
        self.runtime.logits(hidden_cd, self.weight_vd, self.temperature).log_softmax(-1, Kind::Float)
    }

    fn chunks(&self, targets_r: &Tensor) -> impl Iterator<Item = Range<i64>> + use<> {
        let (rows, vocabulary) = (targets_r.size()[0], self.weight_vd.size()[0]);
        let elements = if self.weight_vd.device() == Device::Cpu { CPU_CHUNK } else { GPU_CHUNK };
        let step = (elements / vocabulary).max(LEAST_ROWS);
        (0..rows).step_by(step as usize).map(move |start| start..rows.min(start + step))
    }
}

/// `-Σ p ln p` of each row, as a batched dot product so that no further buffer of the vocabulary's size is made
/// than `p`.
fn entropies(logprobs_cv: &Tensor) -> Tensor {
    logprobs_cv.exp().unsqueeze(1).bmm(&logprobs_cv.unsqueeze(2)).view([-1]).neg()
}

/// `dL/dH · dH/dz` with `dH/dz_j = -p_j (ln p_j + H)`, `[C, V]`.
fn entropy_gradient(logprobs_cv: &Tensor, chunk: &Chunk, by_entropy_c: &Tensor) -> Tensor {
    let entropies_c = chunk.entropies_c.as_ref().expect("who weighs entropies has asked for them");
    (logprobs_cv + entropies_c.unsqueeze(1)) * logprobs_cv.exp() * -by_entropy_c.unsqueeze(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loss `Σ_t w_t f(lp_t)` with `f(x) = x² + x`, so that the coefficient depends on the log-probability.
    fn coefficient(logprobs: &Tensor, weights: &Tensor) -> Tensor {
        (logprobs * 2.0 + 1.0) * weights
    }

    struct Case {
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
    }

    fn case(rows: i64, vocabulary: i64, kind: Kind) -> Case {
        tch::manual_seed(11);
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
        Case {
            hidden: random([rows, 16]).set_requires_grad(true),
            weight: (random([vocabulary, 16]) * 0.5).detach().set_requires_grad(true),
            targets: Tensor::randint(vocabulary, [rows], (Kind::Int64, Device::Cpu)),
            weights: Tensor::rand([rows], (Kind::Float, Device::Cpu)) / rows as f64,
        }
    }

    fn autograd(case: &Case, temperature: f64, by_entropy: bool) -> (Tensor, Tensor, Tensor, Tensor) {
        let (hidden, weight) = (case.hidden.to_kind(Kind::Double), case.weight.to_kind(Kind::Double));
        let all = (hidden.matmul(&weight.tr()) / temperature).log_softmax(-1, Kind::Double);
        let logprobs = all.gather(1, &case.targets.unsqueeze(1), false).squeeze_dim(1);
        let entropies = -(all.exp() * &all).sum_dim_intlist(1, false, Kind::Double);
        let entropy = &entropies * f64::from(u8::from(by_entropy));
        let loss = ((&logprobs * &logprobs + &logprobs + entropy) * &case.weights).sum(Kind::Double);
        let gradients = Tensor::run_backward(&[&loss], &[&case.hidden, &case.weight], false, false);
        let [hidden, weight] = gradients.try_into().unwrap();
        (logprobs.detach(), entropies.detach(), hidden, weight)
    }

    fn relative(found: &Tensor, expected: &Tensor) -> f64 {
        let found = found.to_kind(Kind::Double);
        let expected = expected.to_kind(Kind::Double);
        ((found - &expected).norm() / expected.norm()).double_value(&[])
    }

    fn check(rows: i64, vocabulary: i64, kind: Kind, temperature: f64, by_entropy: bool, tolerance: f64) {
        let case = case(rows, vocabulary, kind);
        let (logprobs, entropies, hidden_gradient, weight_gradient) = autograd(&case, temperature, by_entropy);
        let (hidden, weight) = (case.hidden.detach(), case.weight.detach());
        let head = Head { weight_vd: &weight, runtime: &Runtime::cpu(kind), temperature, entropy: true };
        let mut found_weight = Tensor::zeros([vocabulary, 16], (Kind::Float, Device::Cpu));
        let (mut found_logprobs, mut found_entropies) = (Vec::new(), Vec::new());
        let found_hidden = head.backward(&hidden, &case.targets, Some(&mut found_weight), &mut |chunk| {
            found_logprobs.push(chunk.logprobs_c.shallow_clone());
            found_entropies.push(chunk.entropies_c.as_ref().unwrap().shallow_clone());
            let weights = case.weights.narrow(0, chunk.rows.start, chunk.rows.end - chunk.rows.start);
            let entropy = by_entropy.then(|| weights.shallow_clone());
            Coefficients { logprob: coefficient(&chunk.logprobs_c, &weights), entropy }
        });
        assert!(found_logprobs.len() > 1, "the case is to be cut into chunks");
        for (name, found, expected) in [
            ("logprobs", Tensor::cat(&found_logprobs, 0), logprobs),
            ("entropies", Tensor::cat(&found_entropies, 0), entropies.detach()),
            ("hidden gradient", found_hidden.shallow_clone(), hidden_gradient),
            ("weight gradient", found_weight, weight_gradient),
        ] {
            let error = relative(&found, &expected);
            assert!(error < tolerance, "{name} in {kind:?} at {temperature}: off by {error}");
        }
        assert_eq!(found_hidden.kind(), kind);
    }

    #[test]
    fn gradients_equal_autograd() {
        for by_entropy in [false, true] {
            check(300, 9000, Kind::Float, 1.0, by_entropy, 3e-6);
            check(300, 9000, Kind::Float, 0.7, by_entropy, 3e-6);
            check(300, 9000, Kind::BFloat16, 1.0, by_entropy, 1e-2);
            check(300, 9000, Kind::BFloat16, 1.3, by_entropy, 1e-2);
        }
    }

    /// A token of probability 1 - 1e-4 has a gradient of about 1e-4, which p rounded to bf16 before the
    /// difference would lose.
    #[test]
    fn near_certain_tokens_keep_their_gradient_in_bf16() {
        let weight = Tensor::from_slice(&[9.25_f32, 0.0]).view([2, 1]).to_kind(Kind::BFloat16);
        let hidden = Tensor::ones([1, 1], (Kind::BFloat16, Device::Cpu));
        let runtime = Runtime::cpu(Kind::BFloat16);
        let head = Head { weight_vd: &weight, runtime: &runtime, temperature: 1.0, entropy: false };
        let mut gradient = Tensor::zeros([2, 1], (Kind::Float, Device::Cpu));
        let targets = Tensor::from_slice(&[0_i64]);
        let _ = head.backward(&hidden, &targets, Some(&mut gradient), &mut |chunk| Coefficients {
            logprob: chunk.logprobs_c.ones_like(),
            entropy: None,
        });
        let expected = 1.0 / (9.25_f64.exp() + 1.0);
        assert!((gradient.double_value(&[0, 0]) / expected - 1.0).abs() < 0.01);
    }
}
