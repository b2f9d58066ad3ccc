//! Log-probabilities of given completions.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::{Error, Model};

/// A sequence and the part of it whose log-probabilities are wanted.
#[derive(Debug, Clone)]
pub struct ScoredSequence {
    /// Prompt and completion.
    pub ids: Vec<i32>,
    /// Places in `ids` that are scored, each given all ids before it; starts at 1 or later.
    pub targets: Range<usize>,
}

/// How to score.
#[derive(Debug, Clone, Copy)]
pub struct ScoreOptions {
    /// Logits are divided by it; 0 (greedy) counts as 1.
    pub temperature: f64,
    /// Tokens of one forward pass, padding included; a longer sequence goes alone.
    pub tokens_per_batch: usize,
}

impl Model {
    /// Natural log-probabilities of each sequence's targets, in the order given. What comes back for a sequence may
    /// differ in its last bits with what is scored beside it, but not with their order.
    pub fn completion_logprobs(
        &self,
        sequences: &[ScoredSequence],
        options: &ScoreOptions,
    ) -> Result<Vec<Vec<f32>>, Error> {
        for (row, sequence) in sequences.iter().enumerate() {
            self.check_scored(row, sequence)?;
        }
        let _guard = tch::no_grad_guard();
        let mut order: Vec<usize> = (0..sequences.len()).filter(|row| !sequences[*row].targets.is_empty()).collect();
        order.sort_by_key(|row| (sequences[*row].targets.end, &sequences[*row].ids));
        let mut logprobs = vec![Vec::new(); sequences.len()];
        let mut rest = &order[..];
        while !rest.is_empty() {
            // Sorted by length: the last row of a batch sets its width.
            let fits = |count: usize| count * (sequences[rest[count - 1]].targets.end - 1) <= options.tokens_per_batch;
            let count = (1..=rest.len()).take_while(|count| fits(*count)).last().unwrap_or(1);
            let (batch, later) = rest.split_at(count);
            let scored: Vec<&ScoredSequence> = batch.iter().map(|row| &sequences[*row]).collect();
            for (row, values) in batch.iter().zip(self.batch_logprobs(&scored, options.temperature)) {
                logprobs[*row] = values;
            }
            rest = later;
        }
        Ok(logprobs)
    }

    pub(crate) fn check_scored(&self, row: usize, sequence: &ScoredSequence) -> Result<(), Error> {
        self.check_ids(row, &sequence.ids)?;
        let (Range { start, end }, length) = (sequence.targets.clone(), sequence.ids.len());
        if start < 1 || start > end || end > length {
            let problem =
                format!("has {length} tokens and targets {start}..{end}; expected 1 <= start <= end <= length");
            return Err(Error::Sequence { row, problem });
        }
        Ok(())
    }

    fn batch_logprobs(&self, batch: &[&ScoredSequence], temperature: f64) -> Vec<Vec<f32>> {
        // The last target is predicted from the id before it; nothing after that matters.
        let inputs: Vec<&[i32]> = batch.iter().map(|sequence| &sequence.ids[..sequence.targets.end - 1]).collect();
        let hidden = self.hidden(&self.padded(&inputs));
        let width = hidden.size()[1];
        let (mut places, mut targets) = (Vec::new(), Vec::new());
        for (row, sequence) in batch.iter().enumerate() {
            places.extend(sequence.targets.clone().map(|target| row as i64 * width + target as i64 - 1));
            targets.extend(sequence.ids[sequence.targets.clone()].iter().map(|id| i64::from(*id)));
        }
        let device = self.runtime().device;
        let hidden = hidden.flatten(0, 1).index_select(0, &Tensor::from_slice(&places).to_device(device));
        let logprobs = logprobs_at(self, &hidden, &Tensor::from_slice(&targets).to_device(device), temperature);
        let flat = Vec::<f32>::try_from(&logprobs).expect("a one-dimensional float tensor is a vector of f32");
        let mut flat = flat.into_iter();
        batch.iter().map(|sequence| flat.by_ref().take(sequence.targets.len()).collect()).collect()
    }
}

/// Natural log-probabilities `[N]` (float32) of `targets` `[N]` under the head at hidden states `[N,D]`, computed in
/// chunks so that logits of all `N` never exist at once. For use without gradients.
pub fn logprobs_at(model: &Model, hidden: &Tensor, targets: &Tensor, temperature: f64) -> Tensor {
    let rows = chunk_rows(model);
    let chunks: Vec<Tensor> = (0..hidden.size()[0])
        .step_by(rows as usize)
        .map(|start| {
            let length = rows.min(hidden.size()[0] - start);
            let logits = model.logits(&hidden.narrow(0, start, length), temperature);
            let targets = targets.narrow(0, start, length).unsqueeze(1);
            logits.log_softmax(-1, Kind::Float).gather(1, &targets, false).squeeze_dim(1)
        })
        .collect();
    if chunks.is_empty() { Tensor::zeros([0], (Kind::Float, model.runtime().device)) } else { Tensor::cat(&chunks, 0) }
}

/// Rows of logits to hold at a time: 16 MB on a CPU, to stay near its caches; 512 MB on a GPU, to fill it.
fn chunk_rows(model: &Model) -> i64 {
    let elements = if model.runtime().device.is_cuda() { 1 << 27 } else { 1 << 22 };
    (elements / model.config().vocab_size).max(64)
}
