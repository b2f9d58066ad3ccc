//! Sequences one after the other in a single row, without padding.

use mempo_native::Offsets;
use tch::{Device, Kind, Tensor};

use crate::kernels::{Kernels, varlen_attention};

/// Ids of several sequences, end to end.
pub struct Packed {
    /// `[1,N]`, int64.
    pub(crate) ids: Tensor,
    /// `[1,N]`, int64: from 0 in each sequence.
    pub(crate) positions: Tensor,
    lengths: Vec<usize>,
    /// The same, for the kernel of a GPU.
    offsets: Offsets,
}

impl Packed {
    /// Of sequences that are not empty.
    pub fn new(sequences: &[&[i32]], device: Device) -> Self {
        let ids: Vec<i64> = sequences.iter().flat_map(|ids| ids.iter().map(|id| i64::from(*id))).collect();
        let positions: Vec<i64> = sequences.iter().flat_map(|ids| 0..ids.len() as i64).collect();
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        Self {
            ids: Tensor::from_slice(&ids).unsqueeze(0).to_device(device),
            positions: Tensor::from_slice(&positions).unsqueeze(0).to_device(device),
            offsets: Offsets::new(&lengths, device),
            lengths,
        }
    }

    /// Causal attention of each sequence for itself: queries `[1,H,N,d]`, keys and values `[1,K,N,d]` -> `[1,H,N,d]`. One
    /// kernel on a GPU in bf16; elsewhere sequence by sequence.
    pub(crate) fn attend(&self, kernels: Kernels, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        if kernels == Kernels::Fast && q.device().is_cuda() && q.kind() == Kind::BFloat16 {
            return varlen_attention(q, k, v, &self.offsets);
        }
        let lengths: Vec<i64> = self.lengths.iter().map(|length| *length as i64).collect();
        let [q, k, v] = [q, k, v].map(|x| x.split_with_sizes(&lengths, 2));
        let each: Vec<Tensor> = (0..self.lengths.len())
            .map(|one| kernels.causal_attention_in_training(&q[one], &k[one], &v[one]))
            .collect();
        Tensor::cat(&each, 2)
    }
}
