//! Linear layer, attention and SiLU that compute a row in the same way, bit for bit, whatever stands beside it and
//! however many threads work.
//!
//! Every matrix product has a fixed shape: rows are taken in blocks, the last filled up with zeros, and attention goes over
//! keys in blocks, too, whose parts of the softmax are added one after the other. Gradients are those of libtorch's
//! ordinary operators; they depend on the shape of the whole batch, as those do.

use std::ffi::c_char;
use std::ptr::null;

use tch::{Device, TchError, Tensor};
use torch_sys::C_tensor;

use crate::{In, Out, checked, new_tensor};

/// Key tokens of one product of attention.
const COLUMNS: i64 = 64;

/// Rows of one product of a linear layer: what a decoding batch has, or what keeps a GPU's tiles filled.
fn linear_rows(device: Device) -> i64 {
    if device.is_cuda() { 128 } else { 32 }
}

/// Query tokens of one product of attention. A token that is decoded alone stands in a block of this.
fn query_rows(device: Device) -> i64 {
    if device.is_cuda() { 16 } else { 8 }
}

unsafe extern "C" {
    fn mempo_fixed_linear(out: Out, x: In, weight: In, bias: In, rows: i64) -> *const c_char;
    fn mempo_fixed_attention(out: Out, q: In, k: In, v: In, rows: i64, columns: i64) -> *const c_char;
    fn mempo_fixed_attention_at(
        out: Out,
        q: In,
        k: In,
        v: In,
        first: In,
        largest: i64,
        rows: i64,
        columns: i64,
    ) -> *const c_char;
    fn mempo_fixed_silu(out: Out, x: In) -> *const c_char;
    fn mempo_fixed_add_product(sum: *mut C_tensor, left: In, right: In) -> *const c_char;
}

/// `x [.., I]`, `weight [O, I]`, `bias [O]` -> `[.., O]`.
pub fn fixed_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
    let bias = bias.map_or_else(null, Tensor::as_ptr);
    // SAFETY: live tensors; a null bias is allowed.
    unsafe { new_tensor(|out| mempo_fixed_linear(out, x.as_ptr(), weight.as_ptr(), bias, linear_rows(x.device()))) }
}

/// Causal attention `q [B,H,T,d]`, `k`, `v [B,K,T,d]` -> `[B,H,T,d]`, all from position 0 on.
pub fn fixed_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TchError> {
    let rows = query_rows(q.device());
    // SAFETY: live tensors.
    unsafe { new_tensor(|out| mempo_fixed_attention(out, q.as_ptr(), k.as_ptr(), v.as_ptr(), rows, COLUMNS)) }
}

/// The same for queries `[B,H,T,d]` that begin at the positions `first [B]` (int64, on their device, none above
/// `largest`) of keys and values `[B,K,S,d]`. Without gradients. What is not seen is to be finite.
pub fn fixed_attention_at(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    first: &Tensor,
    largest: i64,
) -> Result<Tensor, TchError> {
    let (rows, q, k, v, first) = (query_rows(q.device()), q.as_ptr(), k.as_ptr(), v.as_ptr(), first.as_ptr());
    // SAFETY: live tensors.
    unsafe { new_tensor(|out| mempo_fixed_attention_at(out, q, k, v, first, largest, rows, COLUMNS)) }
}

/// `sum [O, I] += left [O, R] · right [R, I]`, the same on any number of threads.
pub fn fixed_add_product(sum: &mut Tensor, left: &Tensor, right: &Tensor) -> Result<(), TchError> {
    // SAFETY: the tensors live through the call, whose operators check their shapes and kinds; `sum` is changed in place, as by
    // tch's own in-place operators.
    checked(unsafe { mempo_fixed_add_product(sum.as_mut_ptr(), left.as_ptr(), right.as_ptr()) })
}

/// `x · sigmoid(x)`, element by element.
pub fn fixed_silu(x: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: live tensors.
    unsafe { new_tensor(|out| mempo_fixed_silu(out, x.as_ptr())) }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    fn relative(found: &Tensor, expected: &Tensor) -> f64 {
        let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
        ((found - &expected).norm() / expected.norm()).double_value(&[])
    }

    /// The outputs and the gradients by the inputs of some function and of a reference are close.
    fn same_with_gradients(
        inputs: &[Tensor],
        ours: impl Fn(&[Tensor]) -> Tensor,
        theirs: impl Fn(&[Tensor]) -> Tensor,
    ) {
        let run = |function: &dyn Fn(&[Tensor]) -> Tensor| {
            let leaves: Vec<Tensor> = inputs.iter().map(|input| input.copy().set_requires_grad(true)).collect();
            let out = function(&leaves);
            let weights = Tensor::arange(out.numel() as i64, (Kind::Float, Device::Cpu)).sin().view_as(&out);
            let mut found = Tensor::run_backward(&[(&out * weights).sum(Kind::Float)], &leaves, false, false);
            found.push(out.detach());
            found
        };
        for (found, expected) in run(&ours).iter().zip(run(&theirs)) {
            assert_eq!(found.size(), expected.size());
            let off = relative(found, &expected);
            assert!(off < 3e-6, "{off}");
        }
    }

    #[test]
    fn values_and_gradients_are_those_of_the_ordinary_operators() {
        tch::manual_seed(5);
        let random = |shape: &[i64]| random(shape, Kind::Float);
        let inputs = [random(&[3, 21, 24]), random(&[40, 24]), random(&[40])];
        let (ours, theirs) = (
            |x: &[Tensor]| fixed_linear(&x[0], &x[1], Some(&x[2])).unwrap(),
            |x: &[Tensor]| x[0].linear(&x[1], Some(&x[2])),
        );
        same_with_gradients(&inputs, ours, theirs);
        let without = |x: &[Tensor]| fixed_linear(&x[0], &x[1], None).unwrap();
        same_with_gradients(&inputs[..2], without, |x| x[0].linear(&x[1], None::<Tensor>));
        let inputs = [random(&[2, 6, 150, 16]), random(&[2, 3, 150, 16]), random(&[2, 3, 150, 16])];
        let theirs = |x: &[Tensor]| {
            Tensor::scaled_dot_product_attention(&x[0], &x[1], &x[2], None::<Tensor>, 0.0, true, None, true)
        };
        same_with_gradients(&inputs, |x| fixed_attention(&x[0], &x[1], &x[2]).unwrap(), theirs);
        same_with_gradients(&[random(&[100]) * 10.0], |x| fixed_silu(&x[0]).unwrap(), |x| x[0].silu());
    }

    #[test]
    fn extreme_values_have_a_finite_slope() {
        let x = Tensor::from_slice(&[-200.0f32, 200.0]).set_requires_grad(true);
        let out = fixed_silu(&x).unwrap();
        let gradient = &Tensor::run_backward(&[out.sum(Kind::Float)], &[&x], false, false)[0];
        assert_eq!(Vec::<f32>::try_from(gradient).unwrap(), [0.0, 1.0]);
    }

    #[test]
    fn sums_of_products_are_the_same_on_any_number_of_threads() {
        tch::manual_seed(7);
        for kind in [Kind::Float, Kind::BFloat16] {
            // Sums over few and many rows, onto few and many.
            for (rows, inputs, outputs) in [(10, 192, 520), (170, 520, 192), (121, 192, 900), (300, 24, 1100)] {
                let (x, weight) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
                let gradient = random(&[rows, outputs], kind);
                let run = |threads: i32| {
                    tch::set_num_threads(threads);
                    let leaves = [&x, &weight].map(|leaf| leaf.copy().set_requires_grad(true));
                    let out = fixed_linear(&leaves[0], &leaves[1], None).unwrap();
                    let mut found = Tensor::run_backward(&[(out * &gradient).sum(Kind::Float)], &leaves, false, false);
                    let mut sum = Tensor::ones([outputs, inputs], (Kind::Float, Device::Cpu));
                    fixed_add_product(&mut sum, &gradient.tr(), &x).unwrap();
                    found.push(sum);
                    found
                };
                let expected = run(1);
                let product = gradient.to_kind(Kind::Float).tr().matmul(&x.to_kind(Kind::Float));
                let off = relative(&(&expected[2] - 1.0), &product);
                assert!(off < if kind == Kind::Float { 1e-6 } else { 5e-3 }, "{off}");
                for threads in [2, 3, 5] {
                    for (place, (found, expected)) in run(threads).iter().zip(&expected).enumerate() {
                        assert_eq!(found, expected, "{kind:?} {threads} threads, {rows} {inputs} {outputs}: {place}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_company_on_any_number_of_threads() {
        tch::manual_seed(6);
        for kind in [Kind::Float, Kind::BFloat16] {
            let (x, weight) = (random(&[101, 72], kind), random(&[200, 72], kind));
            let (q, k, v) =
                (random(&[3, 4, 90, 16], kind), random(&[3, 2, 90, 16], kind), random(&[3, 2, 90, 16], kind));
            let linear = fixed_linear(&x, &weight, None).unwrap();
            let attended = fixed_attention(&q, &k, &v).unwrap();
            for threads in [1, 2, 3, 5] {
                tch::set_num_threads(threads);
                for (start, count) in [(0, 1), (7, 33), (50, 51), (0, 101)] {
                    let part = fixed_linear(&x.narrow(0, start, count), &weight, None).unwrap();
                    assert_eq!(part, linear.narrow(0, start, count), "{kind:?} {threads} {start}");
                    let silu = fixed_silu(&x.narrow(0, start, count).contiguous()).unwrap();
                    assert_eq!(silu, fixed_silu(&x).unwrap().narrow(0, start, count), "{kind:?} {threads} {start}");
                }
                for (row, start, count) in [(0, 89, 1), (1, 40, 20), (2, 0, 90), (2, 64, 1)] {
                    let of = |x: &Tensor| x.narrow(0, row, 1);
                    let first = Tensor::from_slice(&[start]);
                    let part = fixed_attention_at(&of(&q).narrow(2, start, count), &of(&k), &of(&v), &first, start);
                    assert_eq!(
                        part.unwrap(),
                        of(&attended).narrow(2, start, count),
                        "{kind:?} {threads} {row} {start}"
                    );
                }
            }
        }
    }
}
