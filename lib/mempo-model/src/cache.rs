//! Keys and values of many sequences, one a row, that grow, stop and go on from a common prefix.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::Model;
use crate::kernels::{Kernels, fixed_attention_at};

/// Columns are made in steps of this.
const COLUMN_STEP: i64 = 64;

/// Tokens of one pass over prompts, padding included: enough to fill a GPU, or few enough for a CPU's caches.
fn prompt_tokens(device: Device) -> usize {
    if device.is_cuda() { 16_384 } else { 4096 }
}

/// Keys and values of all layers. Column and position are the same: every row begins in column 0, whatever its length,
/// so a row can drop its end and go on from there.
pub(crate) struct Cache {
    /// Of each layer `[2,R,C,K,d]`: keys, then values; what lies past a row's length is finite and meaningless.
    layers: Vec<Tensor>,
    lengths: Vec<i64>,
}

/// Tokens that follow the first `kept` of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Continuation<'a> {
    pub(crate) row: usize,
    pub(crate) kept: usize,
    pub(crate) ids: &'a [i32],
}

impl Cache {
    pub(crate) fn new(model: &Model) -> Self {
        let (config, runtime) = (model.config(), model.runtime());
        let shape = [2, 0, 0, config.key_value_heads(), config.head_size()];
        let layer = |_| Tensor::zeros(shape, (runtime.kind, runtime.device));
        Self { layers: (0..config.num_hidden_layers).map(layer).collect(), lengths: Vec::new() }
    }

    /// Columns of every row.
    fn capacity(&self) -> i64 {
        self.layers.first().map_or(0, |layer| layer.size()[2])
    }

    /// Makes room for so many rows of so many tokens. Layer by layer, so that only one of them is there twice; columns grow by a
    /// quarter at least, so that a history that gets longer step by step is seldom copied.
    pub(crate) fn reserve(&mut self, rows: usize, columns: usize) {
        let held = self.capacity();
        let (rows, columns) = (rows.max(self.lengths.len()), columns as i64);
        let columns = if columns > held { columns.max(held + held / 4) } else { held };
        let columns = (columns + COLUMN_STEP - 1) / COLUMN_STEP * COLUMN_STEP;
        if (rows, columns) == (self.lengths.len(), held) {
            return;
        }
        for layer in &mut self.layers {
            let [_, held_rows, _, heads, size] = layer.size()[..] else { unreachable!("a layer is [2,R,C,K,d]") };
            // Zeros: a column that is never seen still meets a weight of 0, and 0 times a stray NaN is NaN.
            let larger = Tensor::zeros([2, rows as i64, columns, heads, size], (layer.kind(), layer.device()));
            larger.narrow(1, 0, held_rows).narrow(2, 0, held).copy_(layer);
            *layer = larger;
        }
        self.lengths.resize(rows, 0);
    }

    /// Puts what lies in row `from` of each pair into row `to`, all at once.
    pub(crate) fn move_rows(&mut self, moves: &[(usize, usize)]) {
        // Row by row: an operator that selects several would first copy the whole cache to have it without gaps.
        let held = |layer: &Tensor, row: usize, length: i64| layer.narrow(1, row as i64, 1).narrow(2, 0, length);
        for layer in &self.layers {
            let taken = moves.iter().map(|(from, _)| held(layer, *from, self.lengths[*from]).copy());
            let taken: Vec<Tensor> = taken.collect();
            for ((from, to), row) in moves.iter().zip(taken) {
                held(layer, *to, self.lengths[*from]).copy_(&row);
            }
        }
        let lengths: Vec<i64> = moves.iter().map(|(from, _)| self.lengths[*from]).collect();
        for ((_, to), length) in moves.iter().zip(lengths) {
            self.lengths[*to] = length;
        }
    }

    /// Runs what follows in each row and gives the hidden states at their ends, `[N,D]`, in the order given.
    pub(crate) fn extend(&mut self, model: &Model, continuations: &[Continuation]) -> Tensor {
        let mut order: Vec<usize> = (0..continuations.len()).collect();
        // Those without a prefix come first; equal ones side by side, to be run once.
        order.sort_by_key(|place| {
            let Continuation { kept, ids, .. } = &continuations[*place];
            (*kept > 0, ids.len(), *ids, *place)
        });
        let budget = prompt_tokens(model.runtime().device);
        let mut ends = Vec::new();
        let mut rest = &order[..];
        while !rest.is_empty() {
            let chunk = Chunk::take(continuations, rest, budget);
            rest = &rest[chunk.members.len()..];
            ends.push(self.extend_chunk(model, &chunk));
        }
        let mut places = vec![0; order.len()];
        for (end, place) in order.iter().enumerate() {
            places[*place] = end as i64;
        }
        Tensor::cat(&ends, 0).index_select(0, &Tensor::from_slice(&places).to_device(model.runtime().device))
    }

    fn extend_chunk(&mut self, model: &Model, chunk: &Chunk) -> Tensor {
        let device = model.runtime().device;
        let ids = model.padded(&chunk.distinct);
        let width = ids.size()[1];
        let (sources, targets) = chunk.places(self.capacity(), width);
        let (sources, targets) = (on(&sources, device), on(&targets, device));
        let fresh = chunk.members.iter().all(|member| member.kept == 0);
        let kernels = model.kernels();
        let seen = (!fresh).then(|| Seen::new(chunk, width, model));
        // Members with a prefix are distinct, one a row.
        let first: Vec<i64> =
            if fresh { vec![0] } else { chunk.members.iter().map(|member| member.kept as i64).collect() };
        let positions = on(&first, device).unsqueeze(1) + Tensor::arange(width, (Kind::Int64, device)).unsqueeze(0);
        // Padding stays among the positions there are.
        let positions = positions.clamp_max(model.config().max_position_embeddings as i64 - 1);
        let hidden = model.forward(&ids, &positions, &mut |layer, q, k, v| {
            let written = [(0, &k), (1, &v)].map(|(place, new)| {
                let new = new.transpose(1, 2).flatten(0, 1).index_select(0, &sources);
                let cache = self.layers[layer].select(0, place);
                let _ = cache.flatten(0, 1).index_copy_(0, &targets, &new);
                cache
            });
            match &seen {
                None => kernels.causal_attention(&q, &k, &v),
                Some(seen) => seen.attend(&q, &written[0], &written[1]),
            }
        });
        for member in &chunk.members {
            self.lengths[member.row] = (member.kept + member.ids.len()) as i64;
        }
        hidden.flatten(0, 1).index_select(0, &on(&chunk.ends(width), device))
    }

    /// One token more in each of the first rows: ids `[B,1]` -> hidden states `[B,D]`.
    pub(crate) fn step(&mut self, model: &Model, ids: &Tensor) -> Tensor {
        let (rows, runtime) = (ids.size()[0], model.runtime());
        let (device, capacity) = (runtime.device, self.capacity());
        let lengths = &mut self.lengths[..rows as usize];
        let positions = on(lengths, device).unsqueeze(1);
        let targets: Vec<i64> =
            lengths.iter().enumerate().map(|(row, length)| row as i64 * capacity + length).collect();
        let targets = on(&targets, device);
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let columns = seen_columns(longest, model.kernels());
        let mask = lengths.iter().any(|length| *length < longest).then(|| {
            let unseen = Tensor::arange(columns, (Kind::Int64, device)).unsqueeze(0).gt_tensor(&positions);
            additive_mask(&unseen, runtime.kind).unsqueeze(1).unsqueeze(1)
        });
        for length in lengths {
            *length += 1;
        }
        let hidden = model.forward(ids, &positions, &mut |layer, q, k, v| {
            let [keys, values] = [(0, k), (1, v)].map(|(place, new)| {
                let cache = self.layers[layer].select(0, place);
                let _ = cache.flatten(0, 1).index_copy_(0, &targets, &new.squeeze_dim(2));
                cache.narrow(0, 0, rows).narrow(1, 0, columns).transpose(1, 2)
            });
            match model.kernels() {
                Kernels::Fixed => fixed_attention_at(&q, [&keys, &values], &positions.squeeze_dim(1), longest),
                _ => attend_to_cache(&q, &keys, &values, mask.as_ref()),
            }
        });
        hidden.squeeze_dim(1)
    }
}

fn on(values: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(values).to_device(device)
}

/// Columns of the cache to look at so that `last` is among them: whole steps, where blocks have to keep their shape.
fn seen_columns(last: i64, kernels: Kernels) -> i64 {
    match kernels {
        Kernels::Fixed => (last / COLUMN_STEP + 1) * COLUMN_STEP,
        _ => last + 1,
    }
}

/// Minus infinity where `hidden`, 0 elsewhere.
fn additive_mask(hidden: &Tensor, kind: Kind) -> Tensor {
    Tensor::zeros(hidden.size(), (kind, hidden.device())).masked_fill(hidden, f64::NEG_INFINITY)
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

/// What rows that go on from a prefix see: their own cache up to each new token.
struct Seen {
    /// Their rows of the cache.
    rows: Tensor,
    columns: i64,
    kernels: Kernels,
    /// The position of each one's first query, `[B]`, and the last of them.
    first: Tensor,
    largest: i64,
    /// `[B,1,T,C]`.
    mask: Tensor,
}

impl Seen {
    fn new(chunk: &Chunk, width: i64, model: &Model) -> Self {
        let (kernels, device, kind) = (model.kernels(), model.runtime().device, model.runtime().kind);
        let members = || chunk.members.iter();
        let rows: Vec<i64> = members().map(|member| member.row as i64).collect();
        let kept: Vec<i64> = members().map(|member| member.kept as i64).collect();
        let last = members().map(|member| (member.kept + member.ids.len()) as i64 - 1).max().unwrap_or(0);
        let columns = seen_columns(last, kernels);
        let largest = kept.iter().copied().max().unwrap_or(0);
        let first = on(&kept, device);
        let last = first.view([-1, 1, 1, 1]) + Tensor::arange(width, (Kind::Int64, device)).view([1, 1, -1, 1]);
        let unseen = Tensor::arange(columns, (Kind::Int64, device)).gt_tensor(&last);
        Self { rows: on(&rows, device), columns, kernels, first, largest, mask: additive_mask(&unseen, kind) }
    }

    /// Queries `[B,H,T,d]` over a layer's keys and values `[R,C,K,d]` -> `[B,H,T,d]`.
    fn attend(&self, q: &Tensor, keys: &Tensor, values: &Tensor) -> Tensor {
        let shares = q.size()[1] / keys.size()[2];
        let gather = |cache: &Tensor| {
            let rows = cache.narrow(1, 0, self.columns).index_select(0, &self.rows).transpose(1, 2);
            // No kernel of the GPU takes both a mask and fewer key-value heads.
            if q.device().is_cuda() && shares > 1 { rows.repeat_interleave_self_int(shares, 1, None) } else { rows }
        };
        let (keys, values) = (gather(keys), gather(values));
        if self.kernels == Kernels::Fixed {
            return fixed_attention_at(q, [&keys, &values], &self.first, self.largest);
        }
        let grouped = q.size()[1] != keys.size()[1];
        Tensor::scaled_dot_product_attention(q, &keys, &values, Some(&self.mask), 0.0, false, None, grouped)
    }
}

/// Continuations that are run in one pass; all of them have a prefix, or none.
struct Chunk<'a> {
    members: Vec<Continuation<'a>>,
    /// Ids to run, by length; members without a prefix share equal ones.
    distinct: Vec<&'a [i32]>,
    /// For each member, which of `distinct` is its own.
    distinct_of: Vec<usize>,
}

impl<'a> Chunk<'a> {
    /// As many members, in `order`, as keep the distinct ids, padded, within the token budget.
    fn take(continuations: &[Continuation<'a>], order: &[usize], budget: usize) -> Self {
        let mut chunk = Self { members: Vec::new(), distinct: Vec::new(), distinct_of: Vec::new() };
        for place in order {
            let member = continuations[*place];
            let shared = member.kept == 0 && chunk.distinct.last() == Some(&member.ids);
            if let Some(first) = chunk.members.first()
                && ((first.kept > 0) != (member.kept > 0)
                    || (!shared && (chunk.distinct.len() + 1) * member.ids.len() > budget))
            {
                break;
            }
            if !shared {
                chunk.distinct.push(member.ids);
            }
            chunk.members.push(member);
            chunk.distinct_of.push(chunk.distinct.len() - 1);
        }
        chunk
    }

    /// For every token of every member: where it stands among the padded ids, and where in the flat cache.
    fn places(&self, capacity: i64, width: i64) -> (Vec<i64>, Vec<i64>) {
        let range = |start: i64, member: &Continuation| -> Range<i64> { start..start + member.ids.len() as i64 };
        let members = || self.members.iter().zip(&self.distinct_of);
        let sources = members().flat_map(|(member, distinct)| range(*distinct as i64 * width, member));
        let targets =
            members().flat_map(|(member, _)| range(member.row as i64 * capacity + member.kept as i64, member));
        (sources.collect(), targets.collect())
    }

    /// For each member, where its last token stands.
    fn ends(&self, width: i64) -> Vec<i64> {
        let members = self.members.iter().zip(&self.distinct_of);
        members.map(|(member, distinct)| *distinct as i64 * width + member.ids.len() as i64 - 1).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Config, Runtime};

    #[test]
    fn it_grows_by_a_quarter_at_least_and_keeps_what_it_holds() {
        let config = Config::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama")).unwrap();
        let model = Model::initialise(config, 4, &Runtime::cpu(Kind::Float)).unwrap();
        let mut cache = Cache::new(&model);
        cache.reserve(2, 260);
        assert_eq!((cache.lengths.len(), cache.capacity()), (2, 320));
        let held: Vec<Tensor> = cache.layers.iter_mut().map(|layer| layer.uniform_(0.0, 1.0).copy()).collect();
        cache.reserve(1, 320);
        assert_eq!((cache.lengths.len(), cache.capacity()), (2, 320));
        cache.reserve(3, 321);
        assert_eq!((cache.lengths.len(), cache.capacity()), (3, 448));
        for (layer, held) in cache.layers.iter().zip(&held) {
            assert_eq!(&layer.narrow(1, 0, 2).narrow(2, 0, 320), held);
            assert_eq!(layer.sum(Kind::Double), held.sum(Kind::Double));
        }
    }
}
