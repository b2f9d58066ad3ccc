//! Linear layers whose weight lies in the order that oneDNN's kernels read it in.

use std::ffi::c_char;
use std::ptr::null;

use tch::{Device, TchError, Tensor};

use crate::{In, Out, new_tensor};

unsafe extern "C" {
    fn mempo_pack_weight(out: Out, weight: In, rows: i64) -> *const c_char;
    fn mempo_packed_linear(out: Out, x: In, packed: In, bias: In) -> *const c_char;
}

/// A weight for few rows on a CPU. The ordinary linear layer reorders its weight in every call, which for a batch that
/// decodes takes as long as the product.
pub struct PackedLinear {
    packed: Tensor,
    bias: Option<Tensor>,
}

impl PackedLinear {
    /// Copies `weight [O, I]` for products of about so many `rows`. An error where libtorch has no such kernel, as on a
    /// GPU, or in bf16 on a CPU without AVX-512.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, rows: i64) -> Result<Self, TchError> {
        if weight.device() != Device::Cpu {
            return Err(TchError::Torch("weights are packed on the CPU only".to_owned()));
        }
        // SAFETY: live tensors.
        let packed = unsafe { new_tensor(|out| mempo_pack_weight(out, weight.as_ptr(), rows)) }?;
        Ok(Self { packed, bias: bias.map(Tensor::shallow_clone) })
    }

    /// `x [.., I]` -> `[.., O]`, without gradients.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let bias = self.bias.as_ref().map_or_else(null, Tensor::as_ptr);
        // SAFETY: live tensors; a null bias is allowed.
        unsafe { new_tensor(|out| mempo_packed_linear(out, x.as_ptr(), self.packed.as_ptr(), bias)) }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn the_product_is_that_of_the_ordinary_layer() {
        tch::manual_seed(3);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (weight, bias) = (random(&[48, 80]), random(&[48]));
        for bias in [Some(&bias), None] {
            let packed = PackedLinear::new(&weight, bias, 16).unwrap();
            for shape in [&[16, 1, 80][..], &[3, 80], &[2, 50, 80]] {
                let x = random(shape);
                let (found, expected) = (packed.forward(&x).unwrap(), x.linear(&weight, bias));
                assert_eq!(found.size(), expected.size());
                assert!((found - expected).abs().max().double_value(&[]) < 1e-4);
            }
        }
        assert!(PackedLinear::new(&random(&[4]), None, 16).is_err());
    }
}
