//! Micro-batches: which sequences run together, and their tensors.
//!
//! Shapes: `B` sequences, `T` tokens (padded), `R` target rows of the micro-batch, `K` columns a target.

use mempo_model::{Packed, Rows};
use tch::{Device, Tensor};

/// A sequence with the positions to learn.
pub(crate) struct Sequence {
    /// Token ids; ids past the last target play no part.
    pub(crate) ids: Vec<i32>,
    /// Positions of `ids` that are predicted from the ones before, ascending, from 1.
    pub(crate) targets: Vec<usize>,
    /// What the loss needs of each target, the same number of values for each, target after target.
    pub(crate) columns: Vec<f32>,
}

impl Sequence {
    /// Ids the model has to see: up to the last target, which itself is not an input.
    pub(crate) fn input_length(&self) -> usize {
        self.targets.last().copied().unwrap_or(0)
    }
}

/// How the sequences of a micro-batch lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrangement {
    /// A row each, padded to the longest: for the CPU, where a kernel over rows of one length is fastest.
    Padded,
    /// End to end: for a GPU, whose attention takes sequences of any lengths.
    Packed,
}

impl Arrangement {
    pub(crate) fn of(device: Device) -> Self {
        if device.is_cuda() { Self::Packed } else { Self::Padded }
    }

    /// Cuts sequences of these `lengths` into micro-batches of at most `budget` tokens, padding included, longest first.
    /// Positions into `lengths`; each occurs once. A sequence longer than the budget runs alone; one of length 0 not at
    /// all. `overhead` is what a micro-batch costs beside its tokens, in tokens.
    pub(crate) fn micro_batches(self, lengths: &[usize], budget: usize, overhead: usize) -> Vec<Vec<usize>> {
        match self {
            Self::Padded => padded_micro_batches(lengths, budget, overhead),
            Self::Packed => packed_micro_batches(lengths, budget),
        }
    }
}

/// What a micro-batch costs beside its tokens, in tokens: adding to the gradient (20), and the hundreds of small operations
/// that take about 10 ms however few tokens there are, at the speed that models of this size reach.
pub(crate) fn micro_batch_overhead(parameters: u64, device: Device) -> usize {
    let tokens_times_parameters = if device.is_cuda() { 300_000_000_000 } else { 300_000_000 };
    20 + (tokens_times_parameters / parameters.max(1)) as usize
}

/// So that the padded tokens (longest × count) are fewest when each micro-batch counts as `overhead` tokens more.
fn padded_micro_batches(lengths: &[usize], budget: usize, overhead: usize) -> Vec<Vec<usize>> {
    let order = longest_first(lengths);
    // What the first `end` sequences cost at least, and where their last micro-batch begins.
    let mut best = vec![(0, 0)];
    for end in 1..=order.len() {
        let costs = (0..end).rev().map_while(|start| {
            let (count, padded) = (end - start, lengths[order[start]] * (end - start));
            (count == 1 || padded <= budget).then(|| (best[start].0 + padded + overhead, start))
        });
        best.push(costs.min().unwrap_or_default());
    }
    let mut batches = Vec::new();
    let mut end = order.len();
    while end > 0 {
        let start = best[end].1;
        batches.push(order[start..end].to_vec());
        end = start;
    }
    batches.reverse();
    batches
}

/// Each sequence in the fullest micro-batch that has room for it (best fit decreasing).
fn packed_micro_batches(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for index in longest_first(lengths) {
        let fits = |tokens: usize| tokens + lengths[index] <= budget;
        match batches.iter_mut().filter(|(tokens, _)| fits(*tokens)).max_by_key(|(tokens, _)| *tokens) {
            Some((tokens, members)) => {
                *tokens += lengths[index];
                members.push(index);
            }
            None => batches.push((lengths[index], vec![index])),
        }
    }
    batches.into_iter().map(|(_, members)| members).collect()
}

fn longest_first(lengths: &[usize]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).filter(|&index| lengths[index] > 0).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    order
}

/// The tensors of one micro-batch.
pub(crate) struct MicroBatch {
    /// The ids of `[B, T]`, padded on the right with id 0, or of all sequences end to end, `[1, T]`.
    pub(crate) ids_bt: Rows,
    /// `[R]` int64: rows of the flattened `[B·T, D]` hidden states that predict the targets.
    pub(crate) rows_r: Tensor,
    /// `[R]` int64: the ids to predict.
    pub(crate) targets_r: Tensor,
    /// `[R, K]` fp32.
    pub(crate) columns_rk: Tensor,
}

impl MicroBatch {
    /// Lays out the sequences at `members`, in that order; at least one of them has a target.
    pub(crate) fn new(sequences: &[Sequence], members: &[usize], arrangement: Arrangement, device: Device) -> Self {
        let inputs: Vec<&[i32]> =
            members.iter().map(|&member| &sequences[member].ids[..sequences[member].input_length()]).collect();
        let width = inputs.iter().map(|input| input.len()).max().unwrap_or(0);
        let (mut rows, mut targets, mut columns) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        for (&member, input) in members.iter().zip(&inputs) {
            let sequence = &sequences[member];
            rows.extend(sequence.targets.iter().map(|&target| (start + target - 1) as i64));
            targets.extend(sequence.targets.iter().map(|&target| i64::from(sequence.ids[target])));
            columns.extend_from_slice(&sequence.columns);
            start += if arrangement == Arrangement::Padded { width } else { input.len() };
        }
        let count = rows.len() as i64;
        Self {
            ids_bt: match arrangement {
                Arrangement::Padded => Rows::padded(&inputs, device),
                Arrangement::Packed => Rows::Packed(Packed::new(&inputs, device)),
            },
            rows_r: Tensor::from_slice(&rows).to_device(device),
            targets_r: Tensor::from_slice(&targets).to_device(device),
            columns_rk: Tensor::from_slice(&columns).view([count, columns.len() as i64 / count]).to_device(device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_keep_the_budget_and_every_sequence() {
        assert_eq!(padded_micro_batches(&[3, 9, 1, 9, 4, 0], 10, 100), [vec![1], vec![3], vec![4, 0], vec![2]]);
        assert_eq!(padded_micro_batches(&[50, 2, 2], 10, 1), [vec![0], vec![1, 2]]);
        assert!(padded_micro_batches(&[0, 0], 10, 1).is_empty());
        // Padding 2 tokens is worth less than a micro-batch of 3, and more than one of 1.
        assert_eq!(padded_micro_batches(&[5, 3], 10, 3), [vec![0, 1]]);
        assert_eq!(padded_micro_batches(&[5, 3], 10, 1), [vec![0], vec![1]]);
        let lengths: Vec<usize> = (0..200).map(|index| index * 7919 % 97 + 1).collect();
        for budget in [97, 200, 1000, 100_000] {
            let batches = padded_micro_batches(&lengths, budget, 50);
            let mut seen: Vec<usize> = batches.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..200).collect::<Vec<_>>());
            for batch in &batches {
                let longest = batch.iter().map(|&index| lengths[index]).max().unwrap();
                assert!(longest * batch.len() <= budget);
            }
        }
    }

    #[test]
    fn packed_micro_batches_fill_the_budget() {
        assert_eq!(packed_micro_batches(&[3, 9, 1, 0, 6, 30, 7], 10), [vec![5], vec![1, 2], vec![6, 0], vec![4]]);
    }

    /// Against every way to cut ten sequences.
    #[test]
    fn the_cut_is_the_cheapest() {
        let lengths: Vec<usize> = (0..10).map(|index| index * 37 % 23 + 2).collect();
        let mut sorted = lengths.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        for (budget, overhead) in [(60, 7), (200, 30), (1000, 0), (1000, 200)] {
            let cost = |batches: &[Vec<usize>]| -> usize {
                batches.iter().map(|batch| batch.len() * batch[0] + overhead).sum()
            };
            let every = (0..1 << 9).filter_map(|cuts: u32| {
                let mut batches = vec![vec![sorted[0]]];
                for (place, length) in sorted.iter().enumerate().skip(1) {
                    if cuts >> (place - 1) & 1 == 1 {
                        batches.push(Vec::new());
                    }
                    batches.last_mut().unwrap().push(*length);
                }
                batches.iter().all(|batch| batch.len() * batch[0] <= budget).then(|| cost(&batches))
            });
            let found = padded_micro_batches(&lengths, budget, overhead);
            let found: Vec<Vec<usize>> =
                found.iter().map(|batch| batch.iter().map(|&index| lengths[index]).collect()).collect();
            assert_eq!(cost(&found), every.min().unwrap(), "{budget} {overhead}");
        }
    }

    #[test]
    fn rows_point_at_the_position_before_each_target() {
        let sequences = [
            Sequence { ids: vec![5, 6, 7], targets: vec![2], columns: vec![0.5] },
            Sequence { ids: vec![1, 2, 3, 4, 9], targets: vec![1, 3], columns: vec![0.1, 0.2] },
        ];
        let batch = MicroBatch::new(&sequences, &[1, 0], Arrangement::Padded, Device::Cpu);
        let Rows::Padded(ids) = &batch.ids_bt else { panic!("padded") };
        assert_eq!(Vec::<Vec<i64>>::try_from(ids).unwrap(), [[1, 2, 3], [5, 6, 0]]);
        assert_eq!(Vec::<i64>::try_from(&batch.rows_r).unwrap(), [0, 2, 4]);
        assert_eq!(Vec::<i64>::try_from(&batch.targets_r).unwrap(), [2, 4, 7]);
        assert_eq!(batch.columns_rk.size(), [3, 1]);
        let packed = MicroBatch::new(&sequences, &[1, 0], Arrangement::Packed, Device::Cpu);
        assert_eq!(Vec::<i64>::try_from(&packed.rows_r).unwrap(), [0, 2, 4]);
    }
}
