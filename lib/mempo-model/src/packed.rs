//! Sequences one after the other in a single row, without padding.

use tch::{Device, Kind, Tensor};

use crate::kernels::{Kernels, varlen_attention};

/// Ids of several sequences, end to end.
pub struct Packed {
    /// `[1,N]`, int64.
    pub(crate) ids: Tensor,
    /// `[1,N]`, int64: from 0 in each sequence.
    pub(crate) positions: Tensor,
    /// `[S+1]`, int32: where each sequence begins, and where the last ends.
    offsets: Tensor,
    lengths: Vec<i64>,
}

impl Packed {
    /// Of sequences that are not empty.
    pub fn new(sequences: &[&[i32]], device: Device) -> Self {
        let ids: Vec<i64> = sequences.iter().flat_map(|ids| ids.iter().map(|id| i64::from(*id))).collect();
        let positions: Vec<i64> = sequences.iter().flat_map(|ids| 0..ids.len() as i64).collect();
        let mut offsets = vec![0];
        for ids in sequences {
            offsets.push(offsets[offsets.len() - 1] + ids.len() as i32);
        }
        Self {
            ids: Tensor::from_slice(&ids).unsqueeze(0).to_device(device),
            positions: Tensor::from_slice(&positions).unsqueeze(0).to_device(device),
            offsets: Tensor::from_slice(&offsets).to_device(device),
            lengths: sequences.iter().map(|ids| ids.len() as i64).collect(),
        }
    }

    /// Causal attention of each sequence for itself: queries `[1,H,N,d]`, keys and values `[1,K,N,d]` -> `[1,H,N,d]`. One
    /// kernel on a GPU in bf16; elsewhere sequence by sequence.
    pub(crate) fn attend(&self, kernels: Kernels, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        if kernels == Kernels::Fast && q.device().is_cuda() && q.kind() == Kind::BFloat16 {
            let longest = self.lengths.iter().copied().max().unwrap_or(0);
            return varlen_attention(q, k, v, &self.offsets, longest);
        }
        let [q, k, v] = [q, k, v].map(|x| x.split_with_sizes(&self.lengths, 2));
        let each: Vec<Tensor> = (0..self.lengths.len())
            .map(|one| kernels.causal_attention_in_training(&q[one], &k[one], &v[one]))
            .collect();
        Tensor::cat(&each, 2)
    }
}
