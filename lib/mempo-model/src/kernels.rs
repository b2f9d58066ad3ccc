//! The operators in which what stands beside a row may reach its last bits, fast or not.

use mempo_native::{Offsets, PackedLinear};
use tch::{Device, Kind, Tensor};

/// How they compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernels {
    /// As libtorch finds fastest for the shape and the number of threads.
    Fast,
    /// The same, with weights laid out once for the products of few rows that decoding is made of.
    Packed,
    /// In blocks of one shape: a row's result depends on nothing else.
    Fixed,
}

/// Longest rows whose attention is written out for training on the CPU, where the fused kernel's backward pass takes
/// about twice as long: the weights `[B,H,T,T]` are then no larger than the rest of a layer's activations.
pub(crate) const WRITTEN_OUT: i64 = 512;

/// Rows that packed weights are laid out for.
const PACKED_ROWS: i64 = 16;

impl Kernels {
    /// A weight laid out anew, if these kernels want it and the machine can.
    pub(crate) fn pack(self, weight: &Tensor, bias: Option<&Tensor>) -> Option<PackedLinear> {
        if self == Self::Packed { PackedLinear::new(weight, bias, PACKED_ROWS).ok() } else { None }
    }

    /// `x [.., I]`, `weight [O, I]`, `bias [O]` -> `[.., O]`.
    pub(crate) fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Self::Fast | Self::Packed => x.linear(weight, bias),
            Self::Fixed => expect(mempo_native::fixed_linear(x, weight, bias)),
        }
    }

    /// Hidden states `[N,D]` and the head's matrix `[V,D]` -> logits `[N,V]`: in float32 where a GPU gives products of bf16 unrounded,
    /// else as [`Self::linear`] has them.
    pub(crate) fn logits(self, hidden: &Tensor, head_weight: &Tensor) -> Tensor {
        // Whatever refuses the one product, the other is tried, and says what is wrong with both.
        let is_wide = self != Self::Fixed && hidden.device().is_cuda() && hidden.kind() == Kind::BFloat16;
        let wide = is_wide.then(|| hidden.f_mm_dtype(&head_weight.tr(), Kind::Float).ok()).flatten();
        wide.unwrap_or_else(|| self.linear(hidden, head_weight, None))
    }

    /// `sum [O, I] += left [O, R] · right [R, I]`.
    pub(crate) fn add_product(self, sum: &mut Tensor, left: &Tensor, right: &Tensor) {
        match self {
            Self::Fixed => mempo_native::fixed_add_product(sum, left, right).unwrap_or_else(|error| panic!("{error}")),
            _ if right.kind() == sum.kind() => {
                let _ = sum.addmm_(left, right);
            }
            _ => {
                let _ = sum.g_add_(&left.matmul(right));
            }
        }
    }

    /// `x · sigmoid(x)`.
    pub(crate) fn silu(self, x: &Tensor) -> Tensor {
        match self {
            Self::Fast | Self::Packed => x.silu(),
            Self::Fixed => expect(mempo_native::fixed_silu(x)),
        }
    }

    /// Queries `[B,H,T,d]` over keys and values `[B,K,T,d]` -> `[B,H,T,d]`. Every position sees itself and those before
    /// it; right padding is never seen by what is real.
    pub(crate) fn causal_attention(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        match self {
            Self::Fixed => expect(mempo_native::fixed_attention(q, k, v)),
            _ if q.requires_grad() => self.causal_attention_in_training(q, k, v),
            _ => fused_attention(q, k, v),
        }
    }

    /// The same where a gradient is asked for, now or when the layer is computed again.
    pub(crate) fn causal_attention_in_training(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        match self {
            Self::Fixed => expect(mempo_native::fixed_attention(q, k, v)),
            _ if q.device() == Device::Cpu && q.size()[2] <= WRITTEN_OUT => written_out_attention(q, k, v),
            _ => fused_attention(q, k, v),
        }
    }
}

/// Queries `[B,H,T,d]` of rows that begin at the positions `first [B]`, none above `largest`, over keys and values
/// `[B,K,S,d]` from position 0 on -> `[B,H,T,d]`, with [`Kernels::Fixed`]. What is not seen is finite.
pub(crate) fn fixed_attention_at(q: &Tensor, [k, v]: [&Tensor; 2], first: &Tensor, largest: i64) -> Tensor {
    expect(mempo_native::fixed_attention_at(q, k, v, first, largest))
}

/// Causal attention within each of several sequences that lie end to end: queries `[1,H,N,d]` over keys and values
/// `[1,K,N,d]` -> `[1,H,N,d]`. On a GPU, in bf16.
pub(crate) fn varlen_attention(q: &Tensor, k: &Tensor, v: &Tensor, at: &Offsets) -> Tensor {
    let by_token = |x: &Tensor| x.squeeze_dim(0).transpose(0, 1);
    let attended = mempo_native::varlen_attention(&by_token(q), &by_token(k), &by_token(v), at);
    expect(attended).transpose(0, 1).unsqueeze(0)
}

/// libtorch's own message, as tch's operators give it.
pub(crate) fn expect(result: Result<Tensor, tch::TchError>) -> Tensor {
    result.unwrap_or_else(|error| panic!("{error}"))
}

fn fused_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, true, None, grouped)
}

/// `softmax(q kᵀ / √d) v` with the heads of a group as rows of one product.
fn written_out_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (batch, heads, length, size) = q.size4().expect("q is [B,H,T,d]");
    let groups = k.size()[1];
    let rows = (heads / groups) * length;
    let scaled = q * (size as f64).powf(-0.5);
    let scores = scaled.reshape([batch, groups, rows, size]).matmul(&k.transpose(-1, -2));
    let future = Tensor::ones([length, length], (Kind::Bool, q.device())).triu(1);
    let scores = scores.view([batch, heads, length, length]).masked_fill(&future, f64::NEG_INFINITY);
    let weights = scores.softmax(-1, q.kind()).view([batch, groups, rows, length]);
    weights.matmul(v).view([batch, heads, length, size])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attention as it is defined, in float64.
    fn defined(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let share = q.size()[1] / k.size()[1];
        let [q, k, v] = [q, k, v].map(|x| x.to_kind(Kind::Double));
        let [k, v] = [k, v].map(|x| x.repeat_interleave_self_int(share, 1, None));
        let scores = q.matmul(&k.transpose(-1, -2)) / (q.size()[3] as f64).sqrt();
        let future = Tensor::ones([q.size()[2]; 2], (Kind::Bool, Device::Cpu)).triu(1);
        scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&v)
    }

    /// On both sides of the length from which libtorch's fused kernel takes over.
    #[test]
    fn attention_and_its_gradients_are_as_defined_at_any_length() {
        tch::manual_seed(8);
        for (length, heads) in [(7, 2), (WRITTEN_OUT, 2), (WRITTEN_OUT + 1, 2), (WRITTEN_OUT + 1, 6), (900, 2)] {
            let random = |heads: i64| Tensor::randn([2, heads, length, 16], (Kind::Float, Device::Cpu));
            let inputs = [random(6) * 3.0, random(heads) * 3.0, random(heads)];
            let weights = random(6);
            let run = |attend: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
                let leaves = inputs.each_ref().map(|input| input.copy().set_requires_grad(true));
                let out = attend(&leaves[0], &leaves[1], &leaves[2]);
                let mut found = Tensor::run_backward(&[(&out * &weights).sum(Kind::Double)], &leaves, false, false);
                found.push(out.detach());
                found
            };
            let expected = run(&|q, k, v| defined(q, k, v));
            for kernels in [Kernels::Fast, Kernels::Fixed] {
                let found = run(&|q, k, v| kernels.causal_attention_in_training(q, k, v));
                for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let difference = found.to_kind(Kind::Double) - expected.to_kind(Kind::Double);
                    let off = (difference.norm() / expected.to_kind(Kind::Double).norm()).double_value(&[]);
                    assert!(
                        off < 2e-6,
                        "{kernels:?}, {length} tokens, {heads} key-value heads: {place} is off by {off}"
                    );
                }
            }
        }
    }
}
