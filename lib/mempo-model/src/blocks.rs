//! What the families share: norm, projections, attention, MLP.

use mempo_native::PackedLinear;
use tch::{Kind, Tensor};

use crate::adapter::Adapter;
use crate::builder::Builder;
use crate::config::Config;
use crate::kernels::{Kernels, expect};
use crate::rotary::RotaryAt;

/// How a layer attends: `(layer, q [B,H,T,d], k [B,K,T,d], v [B,K,T,d]) -> [B,H,T,d]`. The caller's choice, because it
/// holds the cache, if there is one.
pub(crate) type Attend<'a> = dyn FnMut(usize, Tensor, Tensor, Tensor) -> Tensor + 'a;

/// Ids `[B,T]` -> `[B,T,D]` in float32: the sum that every layer adds to is not rounded to what products are computed in, which
/// is where most of the error of a deep model in bf16 would come from.
pub(crate) fn embed(table: &Tensor, ids: &Tensor) -> Tensor {
    Tensor::embedding(table, ids, -1, false, false).to_kind(Kind::Float)
}

/// Root-mean-square norm (Zhang & Sennrich 2019, eq. 4).
pub(crate) struct RmsNorm {
    weight: Tensor,
    epsilon: f64,
}

impl RmsNorm {
    /// Over the last axis, of `size`.
    pub(crate) fn new(builder: &mut Builder, name: &str, size: i64, config: &Config) -> Self {
        let weight = builder.parameter(format!("{name}.weight"), &[size]);
        Self { weight, epsilon: config.rms_norm_eps }
    }

    /// `[.., size] -> [.., size]`, computed in the input's number format and given in the weight's.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let weight = self.weight.to_kind(x.kind());
        x.rms_norm(self.weight.size(), Some(&weight), self.epsilon).to_kind(self.weight.kind())
    }
}

/// A linear layer.
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    kernels: Kernels,
    packed: Option<PackedLinear>,
    adapter: Option<Adapter>,
}

impl Linear {
    /// Of `weight [O, I]` and `bias [O]`.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, kernels: Kernels, adapter: Option<Adapter>) -> Self {
        let packed = kernels.pack(&weight, bias.as_ref());
        Self { weight, bias, kernels, packed, adapter }
    }

    /// Of a head without bias and adapter, `[N, D] -> [N, V]`, as [`Kernels::logits`].
    pub(crate) fn logits(&self, hidden: &Tensor) -> Tensor {
        match &self.packed {
            Some(packed) => expect(packed.forward(hidden)),
            None => self.kernels.logits(hidden, &self.weight),
        }
    }

    /// `[.., I] -> [.., O]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let product = match &self.packed {
            Some(packed) => expect(packed.forward(x)),
            None => self.kernels.linear(x, &self.weight, self.bias.as_ref()),
        };
        match &self.adapter {
            Some(adapter) => product + adapter.forward(x, self.kernels),
            None => product,
        }
    }
}

/// Several projections of one input (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`; or a single one).
///
/// Their parameters are leaves of their own, under their own names. Where they lie one after the other in memory, as
/// they do in a model that was loaded, and need no gradient, one matrix product does them all, unless products have to
/// keep their shape or a part has an adapter.
pub(crate) struct Projections {
    /// One a part, or one for all.
    products: Vec<Linear>,
    outputs: Vec<i64>,
}

impl Projections {
    /// `parts` are (name, output size); weights come first, then biases, so that each kind is contiguous.
    pub(crate) fn new(builder: &mut Builder, prefix: &str, input: i64, parts: &[(&str, i64)], bias: bool) -> Self {
        let mut parameters = |kind: &str, input: &[i64]| -> Vec<Tensor> {
            let shape = |output: i64| [&[output], input].concat();
            parts
                .iter()
                .map(|(name, output)| builder.parameter(format!("{prefix}.{name}.{kind}"), &shape(*output)))
                .collect()
        };
        let weights = parameters("weight", &[input]);
        let biases = if bias { parameters("bias", &[]) } else { Vec::new() };
        let kernels = builder.kernels();
        let adapters = parts.iter().map(|(name, _)| builder.adapter(&format!("{prefix}.{name}")));
        let adapters: Vec<Option<Adapter>> = adapters.collect();
        let apart = kernels == Kernels::Fixed || adapters.iter().any(Option::is_some);
        let joined = if apart { (None, None) } else { (joined(&weights), joined(&biases)) };
        let products = match joined {
            (Some(weight), one_bias) if one_bias.is_some() == bias => {
                vec![Linear::new(weight, one_bias, kernels, None)]
            }
            _ => {
                let mut biases = biases.into_iter();
                let parts = weights.into_iter().zip(adapters);
                parts.map(|(weight, adapter)| Linear::new(weight, biases.next(), kernels, adapter)).collect()
            }
        };
        Self { products, outputs: parts.iter().map(|(_, output)| *output).collect() }
    }

    /// `[.., input] -> [.., output]` for each part.
    pub(crate) fn forward(&self, x: &Tensor) -> Vec<Tensor> {
        match &self.products[..] {
            [all] => all.forward(x).split_with_sizes(&self.outputs, -1),
            each => each.iter().map(|product| product.forward(x)).collect(),
        }
    }

    /// The same for a single part.
    pub(crate) fn forward_one(&self, x: &Tensor) -> Tensor {
        self.products[0].forward(x)
    }
}

/// One tensor over all `parts` (stacked along their first axis) if they are neighbours in one storage and need no
/// gradient. A view, never a copy: it stays true when the parts are updated in place.
fn joined(parts: &[Tensor]) -> Option<Tensor> {
    let (first, rest) = parts.split_first()?;
    let mut end = first.data_ptr() as usize;
    for part in parts {
        let neighbours = part.data_ptr() as usize == end && part.is_contiguous() && part.kind() == first.kind();
        if !neighbours || part.requires_grad() || part.numel() == 0 {
            return None;
        }
        end += part.numel() * part.kind().elt_size_in_bytes();
    }
    let mut size = first.size();
    size[0] += rest.iter().map(|part| part.size()[0]).sum::<i64>();
    // libtorch refuses a view past the end of the storage, so parts of another storage can never be joined.
    first.f_as_strided(&size, first.stride(), None).ok()
}

/// Grouped-query attention with rotary positions.
pub(crate) struct Attention {
    qkv_proj: Projections,
    o_proj: Projections,
    /// Of each head's query and key, where the family has them.
    norms: Option<(RmsNorm, RmsNorm)>,
    head_size: i64,
}

impl Attention {
    /// `bias`: whether q, k and v have one; `norms`: whether each head's q and k are normed before they are turned.
    pub(crate) fn new(builder: &mut Builder, name: &str, config: &Config, bias: bool, norms: bool) -> Self {
        let (hidden_size, head_size) = (config.hidden_size, config.head_size());
        let (queries, keys) = (config.num_attention_heads * head_size, config.key_value_heads() * head_size);
        let parts = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)];
        let qkv_proj = Projections::new(builder, name, hidden_size, &parts, bias);
        let o_proj = Projections::new(builder, name, queries, &[("o_proj", hidden_size)], false);
        let mut norm = |part: &str| RmsNorm::new(builder, &format!("{name}.{part}"), head_size, config);
        let norms = norms.then(|| (norm("q_norm"), norm("k_norm")));
        Self { qkv_proj, o_proj, norms, head_size }
    }

    /// `[B,T,D] -> [B,T,D]`.
    pub(crate) fn forward(&self, layer: usize, x: &Tensor, rotary: &RotaryAt, attend: &mut Attend) -> Tensor {
        let qkv = self.qkv_proj.forward(x);
        let heads = |part: &Tensor| part.unflatten(-1, [-1, self.head_size]);
        let (mut q, mut k, v) = (heads(&qkv[0]), heads(&qkv[1]), heads(&qkv[2]));
        if let Some((q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
        }
        let attended =
            attend(layer, rotary.rotate(&q).transpose(1, 2), rotary.rotate(&k).transpose(1, 2), v.transpose(1, 2));
        self.o_proj.forward_one(&attended.transpose(1, 2).flatten(2, 3))
    }
}

/// Gated MLP: `down(silu(gate(x)) * up(x))`.
pub(crate) struct Mlp {
    gate_up_proj: Projections,
    down_proj: Projections,
    kernels: Kernels,
}

impl Mlp {
    pub(crate) fn new(builder: &mut Builder, name: &str, config: &Config) -> Self {
        let (outer, inner) = (config.hidden_size, config.intermediate_size);
        Self {
            gate_up_proj: Projections::new(builder, name, outer, &[("gate_proj", inner), ("up_proj", inner)], false),
            down_proj: Projections::new(builder, name, inner, &[("down_proj", outer)], false),
            kernels: builder.kernels(),
        }
    }

    /// `[B,T,D] -> [B,T,D]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let gate_up = self.gate_up_proj.forward(x);
        self.down_proj.forward_one(&(self.kernels.silu(&gate_up[0]) * &gate_up[1]))
    }
}
