//! Where each parameter lies in the flat buffers.
//!
//! Matrices come first and vectors (norms, biases) after them, so that weight decay is one operation on the
//! front. Every parameter starts at a multiple of 64 elements for aligned kernels; the gaps hold zeros for
//! ever.

use tch::{Device, Kind, Tensor};

const ALIGNMENT: i64 = 64;

/// The place of one parameter.
pub(crate) struct Slot {
    /// Hugging Face name.
    pub(crate) name: String,
    /// Its shape.
    pub(crate) shape: Vec<i64>,
    offset: i64,
}

/// The places of all parameters, in the model's order.
pub(crate) struct Layout {
    /// One a parameter.
    pub(crate) slots: Vec<Slot>,
    /// Elements of a flat buffer.
    pub(crate) length: i64,
    /// Elements at the front that are subject to weight decay.
    pub(crate) decayed: i64,
}

impl Slot {
    /// This parameter's part of a flat buffer, sharing its storage.
    pub(crate) fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.shape.iter().product()).view(self.shape.as_slice())
    }
}

impl Layout {
    /// Places for parameters of these names and shapes.
    pub(crate) fn new(parameters: impl Iterator<Item = (String, Vec<i64>)>) -> Self {
        let mut slots: Vec<Slot> = parameters.map(|(name, shape)| Slot { name, shape, offset: 0 }).collect();
        let mut length = 0;
        let mut decayed = 0;
        for matrices in [true, false] {
            for slot in slots.iter_mut().filter(|slot| (slot.shape.len() > 1) == matrices) {
                slot.offset = length;
                let size: i64 = slot.shape.iter().product();
                length += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            }
            if matrices {
                decayed = length;
            }
        }
        Self { slots, length, decayed }
    }

    /// A flat buffer of zeros.
    pub(crate) fn zeros(&self, kind: Kind, device: Device) -> Tensor {
        Tensor::zeros([self.length], (kind, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_come_first_and_nothing_overlaps() {
        let shapes = [("norm", vec![3]), ("a", vec![2, 5]), ("bias", vec![65]), ("b", vec![64, 2])];
        let layout = Layout::new(shapes.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())));
        assert_eq!((layout.decayed, layout.length), (64 + 128, 64 + 128 + 64 + 128));
        let flat = layout.zeros(Kind::Float, Device::Cpu);
        for slot in &layout.slots {
            let _ = slot.view(&flat).g_add_scalar_(1.0);
        }
        let sum = |flat: &Tensor| flat.sum(Kind::Int64).int64_value(&[]);
        assert_eq!(sum(&flat), 3 + 10 + 65 + 128);
        assert_eq!(flat.max().int64_value(&[]), 1);
        assert_eq!(sum(&flat.narrow(0, 0, layout.decayed)), 138);
    }
}
