//! The C++ of the suite: operators of libtorch that tch does not bind, operators of our own whose results do not depend on
//! the batch, and a setting of the C library. Safe to call.

#![expect(unsafe_code, reason = "calls C++ functions")]

mod deterministic;
mod packed;

use std::ffi::{CStr, c_char, c_void};
use std::ptr::null_mut;

use tch::{Device, Kind, TchError, Tensor};
use torch_sys::C_tensor;

pub use deterministic::{fixed_add_product, fixed_attention, fixed_attention_at, fixed_linear, fixed_silu};
pub use packed::PackedLinear;

type Out = *mut *mut C_tensor;
type In = *const C_tensor;

unsafe extern "C" {
    fn mempo_fused_adamw(
        weights: *mut C_tensor,
        gradient: *mut C_tensor,
        first: *mut C_tensor,
        second: *mut C_tensor,
        step: *mut C_tensor,
        divisor: *mut C_tensor,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        epsilon: f64,
    ) -> *const c_char;
    fn mempo_varlen_attention(out: Out, q: In, k: In, v: In, offsets: In, longest: i64) -> *const c_char;
    fn mempo_inference_mode() -> *mut c_void;
    fn mempo_end_inference_mode(mode: *mut c_void);
    fn mempo_keep_freed_memory();
}

/// The numbers of an AdamW update, as `torch.optim.AdamW` names them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// `lr`
    pub learning_rate: f64,
    /// First of `betas`.
    pub beta1: f64,
    /// Second of `betas`.
    pub beta2: f64,
    /// `weight_decay`, decoupled.
    pub weight_decay: f64,
    /// `eps`
    pub epsilon: f64,
}

impl AdamW {
    /// libtorch's `_fused_adamw_`: one pass over memory. Updates `weights` and both moments in place; all four tensors
    /// have one type and shape. `step` (float32, one element) is the number of this update, from 1; `divisor` (the same)
    /// divides the gradient first, which is written back.
    pub fn update(
        &self,
        [weights, gradient, first, second]: [&Tensor; 4],
        step: &Tensor,
        divisor: &Tensor,
    ) -> Result<(), TchError> {
        let alike = |tensor: &&Tensor| tensor.size() == weights.size() && tensor.is_contiguous();
        let single = |tensor: &Tensor| tensor.numel() == 1 && tensor.kind() == Kind::Float;
        if ![weights, gradient, first, second].iter().all(alike) || !single(step) || !single(divisor) {
            return Err(TchError::Shape(format!(
                "weights {:?}, gradient {:?} and moments {:?} and {:?} must be contiguous and of one shape, step and divisor one float each",
                weights.size(),
                gradient.size(),
                first.size(),
                second.size()
            )));
        }
        // SAFETY: the pointers are those of live tensors of one shape; type and device the operator checks. It changes them
        // in place only, as tch's own in-place operators do through shared handles. C++ exceptions are caught on the other
        // side.
        let message = unsafe {
            mempo_fused_adamw(
                weights.as_ptr().cast_mut(),
                gradient.as_ptr().cast_mut(),
                first.as_ptr().cast_mut(),
                second.as_ptr().cast_mut(),
                step.as_ptr().cast_mut(),
                divisor.as_ptr().cast_mut(),
                self.learning_rate,
                self.beta1,
                self.beta2,
                self.weight_decay,
                self.epsilon,
            )
        };
        checked(message)
    }
}

/// An error from the message that a C++ function gave, if it gave one.
fn checked(message: *const c_char) -> Result<(), TchError> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a message is a C string of this thread that nothing else has touched since the call.
    let message = unsafe { CStr::from_ptr(message) };
    Err(TchError::Torch(message.to_string_lossy().into_owned()))
}

/// The tensor that `call` makes.
///
/// # Safety
/// `call` passes on pointers of live tensors only, and sets its argument to a new tensor's pointer or gives a message.
unsafe fn new_tensor(call: impl FnOnce(Out) -> *const c_char) -> Result<Tensor, TchError> {
    let mut out = null_mut();
    checked(call(&raw mut out))?;
    // SAFETY: without a message the pointer is that of a tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Where sequences lie that stand end to end.
pub struct Offsets {
    /// `[S+1]`, int32: where each begins, and where the last ends. The kernel believes it.
    ends: Tensor,
    total: i64,
    longest: i64,
}

impl Offsets {
    /// Of sequences of these lengths.
    ///
    /// # Panics
    /// Where they are 2³¹ tokens or more, more than the kernel can count.
    pub fn new(lengths: &[usize], device: Device) -> Self {
        let mut ends = vec![0_i32];
        let mut total = 0;
        for length in lengths {
            total += length;
            ends.push(i32::try_from(total).expect("sequences of less than 2^31 tokens"));
        }
        let longest = lengths.iter().copied().max().unwrap_or(0) as i64;
        Self { ends: Tensor::from_slice(&ends).to_device(device), total: total as i64, longest }
    }
}

/// libtorch's flash attention (Dao 2023) over sequences that lie end to end: `q [N,H,d]`, `k`, `v [N,K,d]`, causal within
/// each -> `[N,H,d]`, differentiable. On a GPU, in bf16 or half precision; an error elsewhere.
pub fn varlen_attention(q: &Tensor, k: &Tensor, v: &Tensor, at: &Offsets) -> Result<Tensor, TchError> {
    let fits = |tensor: &Tensor| tensor.dim() == 3 && tensor.size()[0] == at.total;
    if ![q, k, v].into_iter().all(fits) {
        let (q, k, v) = (q.size(), k.size(), v.size());
        return Err(TchError::Shape(format!(
            "queries {q:?}, keys {k:?} and values {v:?} of sequences of {} tokens in all",
            at.total
        )));
    }
    let [q, k, v, offsets] = [q, k, v, &at.ends].map(Tensor::as_ptr);
    // SAFETY: the tensors are live, and no offset lies outside of them.
    unsafe { new_tensor(|out| mempo_varlen_attention(out, q, k, v, offsets, at.longest)) }
}

/// While it lives, this thread computes without gradients and without what libtorch does to make them possible later:
/// tensors made meanwhile can never take part in any. Calls of small operations take a quarter less time.
pub struct InferenceMode {
    mode: *mut c_void,
}

impl InferenceMode {
    /// Begins it. Guards end in the opposite order.
    #[expect(clippy::new_without_default, reason = "a guard is begun on purpose")]
    pub fn new() -> Self {
        // SAFETY: makes an object that ends in `drop`, on the same thread because a pointer is not `Send`.
        Self { mode: unsafe { mempo_inference_mode() } }
    }
}

impl Drop for InferenceMode {
    fn drop(&mut self) {
        // SAFETY: the pointer is that of `new`, freed once.
        unsafe { mempo_end_inference_mode(self.mode) }
    }
}

/// Lets the C library keep memory that is freed instead of giving it back to the system: libtorch on the CPU allocates
/// the same large buffers again and again, and clearing fresh pages costs a tenth of a small model's training step.
pub fn keep_freed_memory() {
    // SAFETY: sets two numbers of the allocator, which is allowed at any time.
    unsafe { mempo_keep_freed_memory() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: AdamW = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.5, epsilon: 1e-8 };

    fn one(value: f32) -> Tensor {
        Tensor::from_slice(&[value])
    }

    #[test]
    fn the_first_update_is_that_of_the_formula() {
        let [weights, gradient, first, second] = [2.0, 3.0, 0.0, 0.0].map(one);
        OPTIONS.update([&weights, &gradient, &first, &second], &one(1.0), &one(6.0)).unwrap();
        let close = |tensor: &Tensor, expected: f64| {
            let found = tensor.double_value(&[0]);
            assert!((found - expected).abs() < 1e-6, "{found}, expected {expected}");
        };
        close(&gradient, 0.5);
        close(&first, 0.05);
        close(&second, 0.0025);
        // The bias-corrected moments are g and g²: a step of the learning rate.
        close(&weights, 2.0 * (1.0 - 0.1 * 0.5) - 0.1);
    }

    #[test]
    fn offsets_are_those_of_the_tensors() {
        let at = Offsets::new(&[3, 0, 5], Device::Cpu);
        assert_eq!(Vec::<i32>::try_from(&at.ends).unwrap(), [0, 3, 3, 8]);
        let x = |tokens: i64| Tensor::zeros([tokens, 2, 8], (Kind::BFloat16, Device::Cpu));
        for (q, k) in [(x(9), x(8)), (x(8), x(7)), (x(8).unsqueeze(0), x(8))] {
            let error = varlen_attention(&q, &k, &k, &at).unwrap_err().to_string();
            assert!(error.contains("8 tokens in all"), "{error}");
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_an_error() {
        let [weights, gradient, first] = [2.0, 3.0, 0.0].map(one);
        let second = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        let error = OPTIONS.update([&weights, &gradient, &first, &second], &one(1.0), &one(1.0)).unwrap_err();
        assert!(!error.to_string().is_empty());
        let long = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
        let error = OPTIONS.update([&long, &gradient, &first, &first], &one(1.0), &one(1.0)).unwrap_err();
        assert!(error.to_string().contains("1048576"), "{error}");
        assert!(OPTIONS.update([&weights, &gradient, &first, &first.zeros_like()], &long, &one(1.0)).is_err());
    }
}
