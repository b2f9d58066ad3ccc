//! Micro-batches: which sequences run together, and their tensors.
//!
//! Shapes: `B` sequences, `T` tokens (padded), `R` target rows of the micro-batch, `K` columns a target.

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

/// Cuts sequences of these `lengths` into micro-batches of at most `budget` padded tokens (longest × count),
/// longest first. Positions into `lengths`; each occurs once. A sequence longer than the budget runs alone; one
/// of length 0 not at all.
pub fn micro_batches(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).filter(|&index| lengths[index] > 0).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        match batches.last_mut() {
            Some(batch) if lengths[batch[0]] * (batch.len() + 1) <= budget => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

/// The tensors of one micro-batch.
pub(crate) struct MicroBatch {
    /// `[B, T]` int64, padded on the right with id 0.
    pub(crate) ids_bt: Tensor,
    /// `[R]` int64: rows of the flattened `[B·T, D]` hidden states that predict the targets.
    pub(crate) rows_r: Tensor,
    /// `[R]` int64: the ids to predict.
    pub(crate) targets_r: Tensor,
    /// `[R, K]` fp32.
    pub(crate) columns_rk: Tensor,
}

impl MicroBatch {
    /// Lays out the sequences at `members`, in that order; at least one of them has a target.
    pub(crate) fn new(sequences: &[Sequence], members: &[usize], device: Device) -> Self {
        let width = members.iter().map(|&member| sequences[member].input_length()).max().unwrap_or(0);
        let mut ids = vec![0_i64; members.len() * width];
        let (mut rows, mut targets, mut columns) = (Vec::new(), Vec::new(), Vec::new());
        for (line, &member) in members.iter().enumerate() {
            let sequence = &sequences[member];
            let input = &sequence.ids[..sequence.input_length()];
            for (place, &id) in ids[line * width..].iter_mut().zip(input) {
                *place = i64::from(id);
            }
            rows.extend(sequence.targets.iter().map(|&target| (line * width + target - 1) as i64));
            targets.extend(sequence.targets.iter().map(|&target| i64::from(sequence.ids[target])));
            columns.extend_from_slice(&sequence.columns);
        }
        let count = rows.len() as i64;
        Self {
            ids_bt: Tensor::from_slice(&ids).view([members.len() as i64, width as i64]).to_device(device),
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
        assert_eq!(micro_batches(&[3, 9, 1, 9, 4, 0], 10), [vec![1], vec![3], vec![4, 0], vec![2]]);
        assert_eq!(micro_batches(&[50, 2, 2], 10), [vec![0], vec![1, 2]]);
        assert!(micro_batches(&[0, 0], 10).is_empty());
        let lengths: Vec<usize> = (0..200).map(|index| index * 7919 % 97 + 1).collect();
        for budget in [97, 200, 1000, 100_000] {
            let batches = micro_batches(&lengths, budget);
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
    fn rows_point_at_the_position_before_each_target() {
        let sequences = [
            Sequence { ids: vec![5, 6, 7], targets: vec![2], columns: vec![0.5] },
            Sequence { ids: vec![1, 2, 3, 4, 9], targets: vec![1, 3], columns: vec![0.1, 0.2] },
        ];
        let batch = MicroBatch::new(&sequences, &[1, 0], Device::Cpu);
        assert_eq!(Vec::<Vec<i64>>::try_from(&batch.ids_bt).unwrap(), [[1, 2, 3], [5, 6, 0]]);
        assert_eq!(Vec::<i64>::try_from(&batch.rows_r).unwrap(), [0, 2, 4]);
        assert_eq!(Vec::<i64>::try_from(&batch.targets_r).unwrap(), [2, 4, 7]);
        assert_eq!(batch.columns_rk.size(), [3, 1]);
    }
}
