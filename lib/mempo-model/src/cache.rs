//! Keys and values of a batch that is being decoded.

use tch::{Device, Kind, Tensor};

use crate::Model;
use crate::blocks::causal_attention;

/// Tokens of one prefill pass, padding included: enough to fill a GPU, or few enough for a CPU's caches.
fn prefill_tokens(device: Device) -> usize {
    if device.is_cuda() { 16_384 } else { 4096 }
}

/// Keys and values of all layers, one slot a row.
///
/// Prompts end at one common column, so that every step writes a single column for all rows; `mask` hides what lies
/// before a shorter prompt. Positions are the prompt's own, so the alignment changes nothing else.
pub(crate) struct Cache {
    /// Per layer, `[B,K,C,d]` with `C` columns of room.
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    /// `[B,1,1,C]`: 0, or minus infinity before a prompt's start; absent when all prompts are equally long.
    mask: Option<Tensor>,
    /// Position of the next token of each row, `[B,1]`, int64.
    positions: Tensor,
    /// Columns in use.
    columns: i64,
}

impl Cache {
    /// Runs the prompts of all rows and gives the cache and the hidden states at their ends, `[B,D]`. Rows must be
    /// sorted by length, equal prompts side by side: those are run once. Makes room for `room` tokens more.
    pub(crate) fn prefill(model: &Model, prompts: &[&[i32]], room: usize) -> (Self, Tensor) {
        let width = prompts.last().map_or(0, |prompt| prompt.len());
        let mut cache = Self::allocate(model, prompts, width as i64, room as i64);
        let mut ends = Vec::new();
        let mut start = 0;
        while start < prompts.len() {
            let chunk = Chunk::take(prompts, start, prefill_tokens(model.runtime().device));
            start += chunk.prompt_of_row.len();
            ends.push(cache.prefill_chunk(model, &chunk, start - chunk.prompt_of_row.len()));
        }
        (cache, Tensor::cat(&ends, 0))
    }

    fn allocate(model: &Model, prompts: &[&[i32]], width: i64, room: i64) -> Self {
        let (config, runtime) = (model.config(), model.runtime());
        let shape = [prompts.len() as i64, config.key_value_heads(), width + room, config.head_size()];
        let layers = || {
            let empty = |_| Tensor::empty(shape, (runtime.kind, runtime.device));
            (0..config.num_hidden_layers).map(empty).collect::<Vec<Tensor>>()
        };
        let lengths: Vec<i64> = prompts.iter().map(|prompt| prompt.len() as i64).collect();
        let positions = Tensor::from_slice(&lengths).unsqueeze(1).to_device(runtime.device);
        let mask = (lengths[0] < width).then(|| {
            let columns = Tensor::arange(width + room, (Kind::Int64, runtime.device));
            let hidden = columns.unsqueeze(0).lt_tensor(&(width - &positions));
            let mask = Tensor::zeros(hidden.size(), (runtime.kind, runtime.device));
            mask.masked_fill(&hidden, f64::NEG_INFINITY).unsqueeze(1).unsqueeze(1)
        });
        Self { keys: layers(), values: layers(), mask, positions, columns: width }
    }

    /// Runs the distinct prompts of a chunk and spreads their keys and values over the rows from `first_row` on.
    fn prefill_chunk(&mut self, model: &Model, chunk: &Chunk, first_row: usize) -> Tensor {
        let device = model.runtime().device;
        let width = chunk.prompts.last().map_or(0, |prompt| prompt.len() as i64);
        let rows = chunk.prompt_of_row.len() as i64;
        let sources = chunk.sources(width, device);
        let ids = model.padded(&chunk.prompts);
        let positions = Tensor::arange(width, (Kind::Int64, device)).unsqueeze(0);
        let (columns, first_row) = (self.columns, first_row as i64);
        let hidden = model.forward(&ids, &positions, &mut |layer, q, k, v| {
            let attended = causal_attention(&q, &k, &v);
            for (cache, new) in [(&self.keys[layer], &k), (&self.values[layer], &v)] {
                let cache = cache.narrow(0, first_row, rows).narrow(2, 0, columns);
                // A hidden column still meets a weight of 0, and 0 times a stray NaN is NaN.
                let _ = cache.narrow(2, 0, columns - width).zero_();
                let spread = new.transpose(1, 2).flatten(0, 1).index_select(0, &sources);
                cache.narrow(2, columns - width, width).copy_(&spread.unflatten(0, [rows, width]).transpose(1, 2));
            }
            attended
        });
        hidden.flatten(0, 1).index_select(0, &chunk.ends(width, device))
    }

    /// One token more in every row: ids `[B,1]` -> hidden states `[B,D]`.
    pub(crate) fn step(&mut self, model: &Model, ids: &Tensor) -> Tensor {
        let column = self.columns;
        let mask = self.mask.as_ref().map(|mask| mask.narrow(3, 0, column + 1));
        let hidden = model.forward(ids, &self.positions, &mut |layer, q, k, v| {
            self.keys[layer].narrow(2, column, 1).copy_(&k);
            self.values[layer].narrow(2, column, 1).copy_(&v);
            let (keys, values) =
                (self.keys[layer].narrow(2, 0, column + 1), self.values[layer].narrow(2, 0, column + 1));
            attend_to_cache(&q, &keys, &values, mask.as_ref())
        });
        self.columns += 1;
        self.positions = &self.positions + 1;
        hidden.squeeze_dim(1)
    }

    /// Keeps only these rows, in this order.
    pub(crate) fn keep(&mut self, rows: &[i64]) {
        let rows = Tensor::from_slice(rows).to_device(self.positions.device());
        for cache in self.keys.iter_mut().chain(&mut self.values) {
            let mut shape = cache.size();
            shape[0] = rows.size()[0];
            let kept = Tensor::empty(&shape, (cache.kind(), cache.device()));
            kept.narrow(2, 0, self.columns).copy_(&cache.narrow(2, 0, self.columns).index_select(0, &rows));
            *cache = kept;
        }
        self.mask = self.mask.as_ref().map(|mask| mask.index_select(0, &rows));
        self.positions = self.positions.index_select(0, &rows);
    }
}

/// One query a row `[B,H,1,d]` over the cache `[B,K,C,d]` -> `[B,H,1,d]`. The heads of a group stand as query rows of
/// their key-value head, so that each key and value is read once and the fast kernels take it.
fn attend_to_cache(q: &Tensor, keys: &Tensor, values: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let (rows, heads, _, head_size) = q.size4().expect("q is [B,H,1,d]");
    let groups = keys.size()[1];
    let mut q = q.reshape([rows, groups, heads / groups, head_size]);
    // A single bf16 query row falls to a kernel five times slower on the CPU than two rows do.
    let lone = heads == groups && q.kind() == Kind::BFloat16 && q.device() == Device::Cpu;
    if lone {
        q = q.expand([rows, groups, 2, head_size], false);
    }
    let attended = Tensor::scaled_dot_product_attention(&q, keys, values, mask, 0.0, false, None, false);
    let attended = if lone { attended.narrow(2, 0, 1) } else { attended };
    attended.reshape([rows, heads, 1, head_size])
}

/// Rows whose distinct prompts are run in one pass.
struct Chunk<'a> {
    /// Distinct, by length.
    prompts: Vec<&'a [i32]>,
    prompt_of_row: Vec<usize>,
}

impl<'a> Chunk<'a> {
    /// As many rows from `start` on as keep the distinct prompts, padded, within the token budget.
    fn take(rows: &[&'a [i32]], start: usize, budget: usize) -> Self {
        let mut chunk = Self { prompts: Vec::new(), prompt_of_row: Vec::new() };
        for prompt in &rows[start..] {
            if chunk.prompts.last() != Some(prompt) {
                if !chunk.prompts.is_empty() && (chunk.prompts.len() + 1) * prompt.len() > budget {
                    break;
                }
                chunk.prompts.push(prompt);
            }
            chunk.prompt_of_row.push(chunk.prompts.len() - 1);
        }
        chunk
    }

    /// For each row and each of the last `width` columns, which token of the right-padded prompts stands there. Columns
    /// before a prompt's start are hidden by the mask; its first token stands there.
    fn sources(&self, width: i64, device: Device) -> Tensor {
        let of_row = |prompt: &usize| {
            let padding = width - self.prompts[*prompt].len() as i64;
            let first = *prompt as i64 * width;
            (0..width).map(move |column| first + (column - padding).max(0))
        };
        let sources: Vec<i64> = self.prompt_of_row.iter().flat_map(of_row).collect();
        Tensor::from_slice(&sources).to_device(device)
    }

    /// For each row, where its prompt's last token stands.
    fn ends(&self, width: i64, device: Device) -> Tensor {
        let end = |prompt: &usize| *prompt as i64 * width + self.prompts[*prompt].len() as i64 - 1;
        Tensor::from_slice(&self.prompt_of_row.iter().map(end).collect::<Vec<i64>>()).to_device(device)
    }
}
