//! A model in memory: its config, its parameters by name, and the forward pass over right-padded batches.

use std::cell::OnceCell;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::adapter::{Adapters, adapter_shapes};
use crate::blocks::{Attend, Linear};
use crate::builder::{Builder, allocate};
use crate::config::{Config, Family};
use crate::kernels::Kernels;
use crate::llama::Llama;
use crate::packed::Packed;
use crate::qwen2::Qwen2;
use crate::qwen3::Qwen3;
use crate::rotary::{Rotary, RotaryAt};
use crate::{Error, Runtime, weights};

/// The stack of layers of one family: hidden states `[B,T,D]` go from `embed` through every `layer` to `norm`.
pub(crate) trait Decoder {
    /// Of ids `[B,T]`.
    fn embed(&self, ids: &Tensor) -> Tensor;
    /// After a layer, from 0.
    fn layer(&self, index: usize, hidden: &Tensor, rotary: &RotaryAt, attend: &mut Attend) -> Tensor;
    /// After the final norm.
    fn norm(&self, hidden: &Tensor) -> Tensor;
    /// `[V,D]`, the embedding itself where the two are tied.
    fn head_weight(&self) -> &Tensor;
}

fn decoder(builder: &mut Builder, config: &Config) -> Box<dyn Decoder + Send> {
    match config.family() {
        Some(Family::Qwen2) => Box::new(Qwen2::new(builder, config)),
        Some(Family::Qwen3) => Box::new(Qwen3::new(builder, config)),
        Some(Family::Llama) => Box::new(Llama::new(builder, config)),
        None => unreachable!("a checked config has a family"),
    }
}

/// Logits over a temperature, float32; 0 (greedy) counts as 1.
pub(crate) fn scaled(logits: &Tensor, temperature: f64) -> Tensor {
    let logits = logits.to_kind(Kind::Float);
    #[expect(clippy::float_cmp, reason = "only the exact 1 of a caller who means it can be left out")]
    if temperature == 0.0 || temperature == 1.0 { logits } else { logits / temperature }
}

impl Config {
    /// Numbers in all of a model's parameters; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        let shapes = Builder::list(|builder| decoder(builder, self));
        shapes.iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum()
    }

    /// Numbers in adapters of this rank beside the layers whose names end with one of `targets`.
    pub fn adapter_parameter_count(&self, rank: i64, targets: &[String]) -> u64 {
        let shapes = Builder::list(|builder| decoder(builder, self));
        adapter_shapes(shapes.iter().map(|(name, shape)| (name.as_str(), shape.clone())), rank, targets)
            .map(|(_, shape)| shape.iter().product::<i64>() as u64)
            .sum()
    }
}

/// A decoder-only language model.
pub struct Model {
    pub(crate) config: Config,
    runtime: Runtime,
    pub(crate) parameters: Vec<(String, Tensor)>,
    kernels: Kernels,
    /// Of some layers, beside their parameters.
    pub(crate) adapters: Adapters,
    decoder: Box<dyn Decoder + Send>,
    head: Linear,
    rotary: Rotary,
    /// The same model with packed weights, once it was asked for.
    packed: OnceCell<Option<Box<Model>>>,
}

/// What a pass for training runs over; positions count from 0 in every sequence.
pub enum Rows {
    /// Ids `[B,T]`, int64, a sequence a row, right-padded with any id.
    Padded(Tensor),
    /// A single row of sequences end to end.
    Packed(Packed),
}

impl Rows {
    /// A sequence a row.
    pub fn padded(sequences: &[&[i32]], device: Device) -> Self {
        Self::Padded(padded(sequences, device))
    }

    fn ids(&self) -> &Tensor {
        match self {
            Self::Padded(ids) => ids,
            Self::Packed(packed) => &packed.ids,
        }
    }
}

/// The forward pass over rows `[B,T]` in pieces that follow each other; all give `[B,T,D]`, differentiable.
pub struct Pieces<'a> {
    model: &'a Model,
    rows: &'a Rows,
    rotary: RotaryAt,
}

impl Pieces<'_> {
    /// What the first layer takes.
    pub fn embed(&self) -> Tensor {
        self.model.decoder.embed(self.rows.ids())
    }

    /// What a layer, from 0, makes of what came before it.
    pub fn layer(&self, index: usize, hidden: &Tensor) -> Tensor {
        let kernels = self.model.kernels();
        let attend: &mut Attend = match self.rows {
            Rows::Padded(_) => &mut |_, q, k, v| kernels.causal_attention_in_training(&q, &k, &v),
            Rows::Packed(packed) => &mut |_, q, k, v| packed.attend(kernels, &q, &k, &v),
        };
        self.model.decoder.layer(index, hidden, &self.rotary, attend)
    }

    /// What the head takes.
    pub fn norm(&self, hidden: &Tensor) -> Tensor {
        self.model.decoder.norm(hidden)
    }

    /// All of them: what the head takes.
    pub fn whole(&self) -> Tensor {
        let layers = 0..self.model.config.num_hidden_layers;
        self.norm(&layers.fold(self.embed(), |hidden, layer| self.layer(layer, &hidden)))
    }
}

impl Model {
    /// Reads a Hugging Face model directory. Parameters lie in one flat buffer of the runtime's number format and need
    /// no gradient.
    pub fn load(dir: &Path, runtime: &Runtime) -> Result<Self, Error> {
        let config = Config::load(dir)?;
        let model = Self::allocate(config, runtime)?;
        let tied = model.config.tie_word_embeddings;
        weights::load(dir, &model.parameters, |name| {
            let unneeded = name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
            (!unneeded).then_some(name)
        })?;
        Ok(model)
    }

    pub(crate) fn allocate(config: Config, runtime: &Runtime) -> Result<Self, Error> {
        let parameters = allocate(Builder::list(|builder| decoder(builder, &config)), runtime)?;
        Ok(Self::build(config, runtime, parameters, runtime.kernels()))
    }

    fn build(config: Config, runtime: &Runtime, parameters: Vec<(String, Tensor)>, kernels: Kernels) -> Self {
        let tensors = parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        let adapters = Adapters::new();
        let decoder = Builder::build(tensors, kernels, adapters.clone(), |builder| decoder(builder, &config));
        let head = Linear::new(decoder.head_weight().shallow_clone(), None, kernels, None);
        let rotary = Rotary::new(&config, runtime.device);
        let packed = OnceCell::new();
        Self { config, runtime: *runtime, parameters, kernels, adapters, decoder, head, rotary, packed }
    }

    /// The model as it decodes fastest: on a CPU with a second copy of its weights, unless that would be large, or a
    /// trainer may change them.
    pub(crate) fn for_decoding(&self) -> &Self {
        const MOST_BYTES: usize = 8 << 30;
        let pack = || {
            let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
            let fits = self.parameters.iter().map(|(_, tensor)| bytes(tensor)).sum::<usize>() <= MOST_BYTES;
            let fixed = self.adapters.is_empty() && self.parameters.iter().all(|(_, tensor)| !tensor.requires_grad());
            let wanted = self.kernels == Kernels::Fast && self.runtime.device == Device::Cpu && fits && fixed;
            wanted.then(|| {
                let parameters = self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
                Box::new(Self::build(self.config.clone(), &self.runtime, parameters.collect(), Kernels::Packed))
            })
        };
        self.packed.get_or_init(pack).as_deref().unwrap_or(self)
    }

    /// Its config.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where and how it computes.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Every parameter under its Hugging Face name, in a fixed order: embedding, layers (of projections that share an
    /// input first all weights, then all biases), final norm, head. A tied head is not among them.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Puts other tensors of the same order and shapes in the parameters' place, such as views of a trainer's flat
    /// buffer that require gradients.
    ///
    /// # Panics
    /// If their number or a shape differs.
    pub fn bind_parameters(&mut self, tensors: Vec<Tensor>) {
        assert_eq!(tensors.len(), self.parameters.len(), "number of tensors to bind");
        for ((_, parameter), tensor) in self.parameters.iter_mut().zip(tensors) {
            *parameter = tensor;
        }
        self.rebuild();
    }

    /// Puts the layers together anew from parameters and adapters.
    pub(crate) fn rebuild(&mut self) {
        let (adapters, config) = (self.adapters.clone(), &self.config);
        let tensors = self.parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        self.decoder = Builder::build(tensors, self.kernels, adapters, |builder| decoder(builder, config));
        self.head = Linear::new(self.decoder.head_weight().shallow_clone(), None, self.kernels, None);
        self.packed = OnceCell::new();
    }

    /// Ids `[B,T]` (int64, right-padded with any id) -> hidden states `[B,T,D]` after the final norm, positions from 0.
    /// What stands at padding is meaningless and touches nothing else. Differentiable.
    pub fn hidden(&self, ids: &Tensor) -> Tensor {
        self.forward(ids, &self.positions(ids), &mut |_, q, k, v| self.kernels().causal_attention(&q, &k, &v))
    }

    /// The same for training, piece by piece for those who keep less for the backward pass than autograd would.
    pub fn pieces<'a>(&'a self, rows: &'a Rows) -> Pieces<'a> {
        let positions = match rows {
            Rows::Padded(ids) => self.positions(ids),
            Rows::Packed(packed) => packed.positions.shallow_clone(),
        };
        Pieces { model: self, rows, rotary: self.rotary.at(&positions, self.runtime.kind) }
    }

    fn positions(&self, ids: &Tensor) -> Tensor {
        Tensor::arange(ids.size()[1], (Kind::Int64, self.runtime.device)).unsqueeze(0)
    }

    /// The head's matrix `[V,D]`.
    pub fn head_weight(&self) -> &Tensor {
        self.decoder.head_weight()
    }

    /// Hidden states `[N,D]` -> logits over a temperature `[N,V]`, as [`Runtime::logits`].
    pub(crate) fn logits(&self, hidden: &Tensor, temperature: f64) -> Tensor {
        scaled(&self.head.logits(hidden), temperature)
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Ids `[B,T]` at positions `[B or 1, T]`, attending as the caller says.
    pub(crate) fn forward(&self, ids: &Tensor, positions: &Tensor, attend: &mut Attend) -> Tensor {
        let rotary = self.rotary.at(positions, self.runtime.kind);
        let layers = 0..self.config.num_hidden_layers;
        let last =
            layers.fold(self.decoder.embed(ids), |hidden, layer| self.decoder.layer(layer, &hidden, &rotary, attend));
        self.decoder.norm(&last)
    }

    /// Refuses a sequence that is empty, longer than the window, or holds an id outside the vocabulary.
    pub fn check_ids(&self, row: usize, ids: &[i32]) -> Result<(), Error> {
        check_ids(row, ids, self.config.max_position_embeddings, self.config.vocab_size)
    }

    /// Rows of ids, right-padded with 0 to the longest: `[B,T]`, int64, on the model's device.
    pub(crate) fn padded(&self, rows: &[&[i32]]) -> Tensor {
        padded(rows, self.runtime.device)
    }
}

/// Refuses a sequence that is empty, longer than `window`, or holds an id that is not below `size`.
pub(crate) fn check_ids(row: usize, ids: &[i32], window: usize, size: i64) -> Result<(), Error> {
    let problem = if ids.is_empty() {
        "is empty; expected at least one id".to_owned()
    } else if ids.len() > window {
        format!("has {} tokens; the model's window is {window}", ids.len())
    } else if let Some(id) = ids.iter().find(|id| !(0..size).contains(&i64::from(**id))) {
        format!("holds id {id}; the model's vocabulary is 0 to {}", size - 1)
    } else {
        return Ok(());
    };
    Err(Error::Sequence { row, problem })
}

/// Rows of ids, right-padded with 0 to the longest: `[B,T]`, int64, on `device`.
pub(crate) fn padded(rows: &[&[i32]], device: Device) -> Tensor {
    let width = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let mut flat = vec![0i64; rows.len() * width];
    for (row, padded) in rows.iter().zip(flat.chunks_mut(width.max(1))) {
        padded.iter_mut().zip(row.iter()).for_each(|(to, id)| *to = i64::from(*id));
    }
    Tensor::from_slice(&flat).view([rows.len() as i64, width as i64]).to_device(device)
}
