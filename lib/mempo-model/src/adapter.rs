//! Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): beside a frozen linear layer `x Wᵀ` a trained
//! `s x Aᵀ Bᵀ` with thin matrices `A [r, I]` and `B [O, r]`. Saved weights have them merged: `W + s B A`.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::kernels::Kernels;
use crate::{Model, random};

/// Adapters by the name of their layer, as `model.layers.0.self_attn.q_proj`.
pub(crate) type Adapters = HashMap<String, Adapter>;

/// The adapter of one linear layer.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// `A [r, I]`.
    down: Tensor,
    /// `B [O, r]`.
    up: Tensor,
    scale: f64,
}

impl Clone for Adapter {
    /// Of the same storage.
    fn clone(&self) -> Self {
        Self { down: self.down.shallow_clone(), up: self.up.shallow_clone(), scale: self.scale }
    }
}

impl Adapter {
    /// What is added to the layer's output: `[.., I] -> [.., O]`.
    pub(crate) fn forward(&self, x: &Tensor, kernels: Kernels) -> Tensor {
        kernels.linear(&kernels.linear(x, &self.down, None), &self.up, None) * self.scale
    }

    /// The layer's weight with the adapter in it, fp32 on the CPU.
    pub(crate) fn merged(&self, weight: &Tensor) -> Tensor {
        plain(weight) + plain(&self.up).matmul(&plain(&self.down)) * self.scale
    }
}

/// In fp32 on the CPU.
fn plain(tensor: &Tensor) -> Tensor {
    tensor.detach().to_device(tch::Device::Cpu).to_kind(Kind::Float)
}

const DOWN: &str = "lora_A.weight";
const UP: &str = "lora_B.weight";

/// Names and shapes of the adapters beside those of some parameters that are matrices of a target.
pub(crate) fn adapter_shapes<'a>(
    parameters: impl Iterator<Item = (&'a str, Vec<i64>)>,
    rank: i64,
    targets: &[String],
) -> impl Iterator<Item = (String, Vec<i64>)> {
    let layers = parameters.filter_map(|(name, shape)| Some((name.strip_suffix(".weight")?, shape)));
    let chosen = layers.filter(|(layer, shape)| {
        // Embeddings and head are matrices too, but no linear layers of the body.
        shape.len() == 2
            && layer.starts_with("model.layers.")
            && layer.rsplit('.').next().is_some_and(|own| targets.iter().any(|target| target == own))
    });
    chosen.flat_map(move |(layer, shape)| {
        [(format!("{layer}.{DOWN}"), vec![rank, shape[1]]), (format!("{layer}.{UP}"), vec![shape[0], rank])]
    })
}

impl Model {
    /// Names and shapes of the adapters' matrices, two a layer whose name ends with one of `targets`.
    pub fn adapter_shapes(&self, rank: i64, targets: &[String]) -> Vec<(String, Vec<i64>)> {
        let parameters = self.parameters.iter().map(|(name, weight)| (name.as_str(), weight.size()));
        adapter_shapes(parameters, rank, targets).collect()
    }

    /// Puts adapters of these matrices, as [`Model::adapter_shapes`] lists them, beside the model's layers; its own
    /// parameters stay as they are, and need no gradient.
    ///
    /// # Panics
    /// If a layer has only one of the two.
    pub fn bind_adapters(&mut self, matrices: Vec<(String, Tensor)>, scale: f64) {
        let mut by_name: HashMap<String, Tensor> = matrices.into_iter().collect();
        let layers: Vec<String> =
            by_name.keys().filter_map(|name| Some(name.strip_suffix(DOWN)?.trim_end_matches('.').to_owned())).collect();
        let adapter = |layer: String| {
            let mut take = |kind: &str| by_name.remove(&format!("{layer}.{kind}")).expect("a layer has both matrices");
            let adapter = Adapter { down: take(DOWN), up: take(UP), scale };
            (layer, adapter)
        };
        self.adapters = layers.into_iter().map(adapter).collect();
        self.rebuild();
    }

    /// A parameter as it is saved: with the adapter in it, if its layer has one.
    pub(crate) fn merged(&self, name: &str, parameter: &Tensor) -> Tensor {
        let adapter = name.strip_suffix(".weight").and_then(|layer| self.adapters.get(layer));
        adapter.map_or_else(|| parameter.shallow_clone(), |adapter| adapter.merged(parameter))
    }

    /// The name of the first parameter whose saved value is not, up to rounding of it and of what was added to bf16, that of
    /// `other`.
    pub fn first_other_than(&self, other: &Self) -> Option<String> {
        let _guard = tch::no_grad_guard();
        let pairs = self.parameters.iter().zip(&other.parameters);
        let mut differing = pairs.filter(|((name, mine), (_, theirs))| {
            let (own, merged, theirs) = (plain(mine), plain(&self.merged(name, mine)), plain(theirs));
            let tolerance = (own.abs() + (&merged - &own).abs()) * 0.01 + 1e-6;
            merged.size() != theirs.size() || (merged - theirs).abs().gt_tensor(&tolerance).any().int64_value(&[]) != 0
        });
        differing.next().map(|((name, _), _)| name.clone())
    }
}

/// What a matrix of an adapter begins as: `A` normal, with the spread that PEFT's uniform numbers have, `B` zero, so that
/// the layer begins as it was. The numbers are a function of the seed and the name.
pub fn initial_adapter(seed: u64, name: &str, shape: &[i64]) -> Tensor {
    if !name.ends_with(DOWN) {
        return Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu));
    }
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name.as_bytes()).finalize();
    let key = u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
    let spread = (1.0 / (3.0 * shape[1] as f32)).sqrt();
    let values: Vec<f32> =
        random::normals(key, (shape[0] * shape[1]) as usize).iter().map(|value| value * spread).collect();
    Tensor::from_slice(&values).view(shape)
}
