//! An encoder of texts: one vector a sequence of ids, pooled from the last layer's hidden states.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::adapter::Adapters;
use crate::bert::{Bert, EncoderConfig, own_name};
use crate::builder::{Builder, allocate};
use crate::model::{check_ids, padded};
use crate::{Error, Runtime, weights};

/// What becomes of a sequence's hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// Their mean (E5, MiniLM)
    Mean,
    /// The first one, of [CLS] (BGE)
    Cls,
}

/// How to make vectors.
#[derive(Debug, Clone, Copy)]
pub struct EmbedOptions {
    /// Which hidden states a vector is made of.
    pub pooling: Pooling,
    /// Whether vectors are divided by their Euclidean length.
    pub normalise: bool,
    /// Tokens of one forward pass, padding included; a longer sequence goes alone.
    pub tokens_per_batch: usize,
}

/// Vectors of several sequences, `[N,D]`, float32 on the CPU.
pub struct Embeddings(pub(crate) Tensor);

impl Embeddings {
    /// Vectors of `size` numbers each, one after the other.
    ///
    /// # Panics
    /// If the last one has fewer.
    pub fn new(numbers: &[f32], size: usize) -> Self {
        assert_eq!(numbers.len() % size, 0, "numbers beyond the last vector of {size}");
        Self(Tensor::from_slice(numbers).view([-1, size as i64]))
    }

    /// Those of row `row`, one number an axis.
    pub fn row(&self, row: usize) -> Vec<f32> {
        Vec::<f32>::try_from(self.0.get(row as i64)).expect("a row of float32 is a vector of f32")
    }
}

/// A BERT encoder in memory.
pub struct Encoder {
    config: EncoderConfig,
    runtime: Runtime,
    bert: Bert,
}

impl Encoder {
    /// Reads a Hugging Face model directory; weights that are no finite numbers are refused.
    pub fn load(dir: &Path, runtime: &Runtime) -> Result<Self, Error> {
        let config = EncoderConfig::load(dir)?;
        let parameters = allocate(Builder::list(|builder| Bert::new(builder, &config)), runtime)?;
        weights::load(dir, &parameters, own_name)?;
        if let Some((name, _)) = parameters.iter().find(|(_, tensor)| !is_finite(tensor)) {
            let problem = "holds numbers that are not finite; fetch or make the encoder again".to_owned();
            return Err(Error::Tensor { path: dir.to_owned(), tensor: name.clone(), problem });
        }
        let tensors = parameters.into_iter().map(|(_, tensor)| tensor).collect();
        let bert = Builder::build(tensors, runtime.kernels(), Adapters::new(), |builder| Bert::new(builder, &config));
        Ok(Self { config, runtime: *runtime, bert })
    }

    /// Its config.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Where and how it computes.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// A vector for each sequence, in the order given. What comes back for a sequence may differ
    /// in its last bits with what is given beside it, but not with their order.
    pub fn embed(&self, sequences: &[Vec<i32>], options: &EmbedOptions) -> Result<Embeddings, Error> {
        for (row, ids) in sequences.iter().enumerate() {
            check_ids(row, ids, self.config.max_position_embeddings, self.config.vocab_size)?;
        }
        let _guard = tch::no_grad_guard();
        let vectors = Tensor::zeros([sequences.len() as i64, self.config.hidden_size], (Kind::Float, Device::Cpu));
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        order.sort_by_key(|row| (sequences[*row].len(), &sequences[*row]));
        let mut rest = &order[..];
        while !rest.is_empty() {
            // Sorted by length: the last row of a batch sets its width.
            let fits = |count: usize| count * sequences[rest[count - 1]].len() <= options.tokens_per_batch;
            let count = (1..=rest.len()).take_while(|count| fits(*count)).last().unwrap_or(1);
            let (batch, later) = rest.split_at(count);
            let ids: Vec<&[i32]> = batch.iter().map(|row| &sequences[*row][..]).collect();
            let places: Vec<i64> = batch.iter().map(|row| *row as i64).collect();
            let pooled = self.pooled(&ids, options).to_device(Device::Cpu);
            let _ = vectors.shallow_clone().index_copy_(0, &Tensor::from_slice(&places), &pooled);
            rest = later;
        }
        match (0..sequences.len()).find(|row| !is_finite(&vectors.get(*row as i64))) {
            Some(row) => {
                let problem = "has a vector whose numbers are not finite: with --dtype f32 they may be".to_owned();
                Err(Error::Sequence { row, problem })
            }
            None => Ok(Embeddings(vectors)),
        }
    }

    /// Of one batch: `[B,D]`, float32.
    fn pooled(&self, rows: &[&[i32]], options: &EmbedOptions) -> Tensor {
        let device = self.runtime.device;
        let ids = padded(rows, device);
        let lengths: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
        let lengths = Tensor::from_slice(&lengths).to_device(device).unsqueeze(1);
        let mask = Tensor::arange(ids.size()[1], (Kind::Int64, device)).unsqueeze(0).lt_tensor(&lengths);
        let is_ragged = rows.iter().any(|row| row.len() != rows[0].len());
        let attended = is_ragged.then(|| mask.unsqueeze(1).unsqueeze(1));
        let hidden = self.bert.forward(&ids, attended.as_ref());
        let pooled = match options.pooling {
            Pooling::Mean => {
                let hidden = hidden.to_kind(Kind::Float).masked_fill(&mask.logical_not().unsqueeze(-1), 0.0);
                hidden.sum_dim_intlist([1].as_slice(), false, Kind::Float) / lengths
            }
            Pooling::Cls => hidden.select(1, 0).to_kind(Kind::Float),
        };
        if options.normalise {
            let length = (&pooled * &pooled).sum_dim_intlist([-1].as_slice(), true, Kind::Float).sqrt();
            pooled / length.clamp_min(1e-12)
        } else {
            pooled
        }
    }
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) == 1
}
