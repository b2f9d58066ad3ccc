//! Where and in which number format a model computes.

use serde::Serialize;
use tch::{Cuda, Device, Kind, Tensor};

use crate::Error;
use crate::kernels::{Kernels, WRITTEN_OUT};
use crate::libtorch::{cuda_library, load_cuda};
use crate::model::scaled;

/// Where to compute, in which number format, on how many threads.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct DeviceOptions {
    /// Where to compute: cpu, cuda, cuda:N, or auto (the first GPU, or else the CPU)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Number format of weights and activations: bf16, f32, or auto (bf16; f32 on a processor that does not multiply bf16 itself)
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub dtype: String,
    /// CPU threads inside an operation; all cores when not given. Results on the CPU may differ in their last bits
    /// between thread counts
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Compute in blocks of fixed shape: log-probabilities are then the same bits in sampling, scoring and training,
    /// whatever runs beside a sequence and on however many threads. Slower
    #[arg(long)]
    pub deterministic: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { device: "auto".to_owned(), dtype: "auto".to_owned(), threads: None, deterministic: false }
    }
}

/// What `DeviceOptions` came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runtime {
    /// Device that holds weights, cache and activations.
    pub device: Device,
    /// Their number format: `BFloat16` or `Float`.
    pub kind: Kind,
    /// Whether a sequence's numbers depend on nothing that runs beside it.
    pub deterministic: bool,
}

impl Runtime {
    /// The CPU, as fast as it can.
    pub fn cpu(kind: Kind) -> Self {
        Self { device: Device::Cpu, kind, deterministic: false }
    }

    /// Hidden states `[N,D]` and the head's matrix `[V,D]` -> logits over a temperature `[N,V]`, float32. A temperature of
    /// 0 (greedy) counts as 1. Log-probabilities are [`Tensor::log_softmax`] of these, in sampling, scoring and training.
    /// Without gradients.
    pub fn logits(&self, hidden: &Tensor, head_weight: &Tensor, temperature: f64) -> Tensor {
        scaled(&self.kernels().logits(hidden, head_weight), temperature)
    }

    /// `x [.., I]`, `weight [O, I]` -> `[.., O]`.
    pub fn linear(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        self.kernels().linear(x, weight, None)
    }

    /// `sum [O, I] += left [O, R] · right [R, I]`; where `right` is of another kind than `sum`, the product is rounded to that
    /// kind before it is added.
    pub fn add_product(&self, sum: &mut Tensor, left: &Tensor, right: &Tensor) {
        self.kernels().add_product(sum, left, right);
    }

    /// Attention weights that a token of a row leaves behind in training, at most, in each layer and head: those of rows up to some
    /// length are kept for the backward pass on a CPU. None of the rows has more than `longest` tokens.
    pub fn kept_attention_weights(&self, longest: usize) -> usize {
        let written_out = self.kernels() == Kernels::Fast && self.device == Device::Cpu;
        if written_out { longest.min(WRITTEN_OUT as usize) } else { 0 }
    }

    pub(crate) fn kernels(&self) -> Kernels {
        if self.deterministic { Kernels::Fixed } else { Kernels::Fast }
    }

    /// Whether it computes in 32-bit floating point.
    pub fn is_f32(&self) -> bool {
        self.kind == Kind::Float
    }

    /// Multiplies two matrices of `[1024,1024]`: the best of a few speeds, in GFLOP/s. An error says what the device
    /// cannot do, or that it computes nonsense.
    pub fn try_product(&self) -> Result<f64, Error> {
        const SIZE: i64 = 1024;
        let device = |error: tch::TchError| Error::Device(format!("{}: {error}", self.name()));
        let matrix = Tensor::f_full([SIZE, SIZE], 0.5, (self.kind, self.device)).map_err(device)?;
        let expected = SIZE as f64 / 4.0;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            let product = matrix.f_matmul(&matrix).map_err(device)?;
            let found = product.f_double_value(&[SIZE - 1, SIZE - 1]).map_err(device)?;
            if (found - expected).abs() > 0.01 * expected {
                let name = self.name();
                return Err(Error::Device(format!("{name}: a matrix product has {found} where {expected} is right")));
            }
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * (SIZE as f64).powi(3) / best / 1e9)
    }

    /// Device and number format as the command line names them, such as `cuda:0 bf16`.
    pub fn name(&self) -> String {
        let kind = if self.is_f32() { "f32" } else { "bf16" };
        match self.device {
            Device::Cuda(index) => format!("cuda:{index} {kind}"),
            _ => format!("cpu {kind}"),
        }
    }
}

/// Whether this processor multiplies bf16 itself. Where it does not, bf16 takes several times as long as f32.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

impl DeviceOptions {
    /// Loads the GPU libraries if they may be needed, sets the thread count, and settles device and number format.
    /// Must come before anything else that touches libtorch.
    pub fn resolve(&self) -> Result<Runtime, Error> {
        let device = self.resolve_device()?;
        let kind = match self.dtype.as_str() {
            "auto" if device == Device::Cpu && !multiplies_bf16() => Kind::Float,
            "auto" | "bf16" => Kind::BFloat16,
            "f32" => Kind::Float,
            other => {
                return Err(Error::Device(format!("--dtype {other}: expected bf16, f32 or auto")));
            }
        };
        let threads = match self.threads {
            Some(0) => return Err(Error::Device("--threads 0: expected at least 1".to_owned())),
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        };
        tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
        mempo_native::keep_freed_memory();
        Ok(Runtime { device, kind, deterministic: self.deterministic })
    }

    fn resolve_device(&self) -> Result<Device, Error> {
        let index = match self.device.as_str() {
            "cpu" => return Ok(Device::Cpu),
            "auto" | "cuda" => 0,
            other => other
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .ok_or_else(|| Error::Device(format!("--device {other}: expected cpu, cuda, cuda:N or auto")))?,
        };
        let library = cuda_library();
        if let Some(library) = &library {
            load_cuda(library)?;
        }
        let count = usize::try_from(Cuda::device_count()).unwrap_or(0);
        if index < count {
            return Ok(Device::Cuda(index));
        }
        if self.device == "auto" {
            return Ok(Device::Cpu);
        }
        let library = library.map_or_else(
            || "libtorch_cuda.so was not found beside libtorch; MEMPO_LIBTORCH_CUDA may name it".to_owned(),
            |library| format!("{} was loaded", library.display()),
        );
        Err(Error::Device(format!("--device {}: {count} GPUs are visible ({library}); try --device cpu", self.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(device: &str, dtype: &str) -> DeviceOptions {
        DeviceOptions { device: device.to_owned(), dtype: dtype.to_owned(), threads: Some(2), deterministic: false }
    }

    #[test]
    fn names_resolve_or_are_refused() {
        assert_eq!(options("cpu", "f32").resolve().unwrap(), Runtime::cpu(Kind::Float));
        let usual = if multiplies_bf16() { Kind::BFloat16 } else { Kind::Float };
        assert_eq!(options("cpu", "auto").resolve().unwrap().kind, usual);
        assert_eq!(options("cpu", "bf16").resolve().unwrap().kind, Kind::BFloat16);
        assert_eq!(tch::get_num_threads(), 2);
        for (device, dtype, word) in
            [("gpu", "f32", "--device gpu"), ("cuda:x", "f32", "cuda:x"), ("cpu", "int8", "int8")]
        {
            let error = options(device, dtype).resolve().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = DeviceOptions { threads: Some(0), ..options("cpu", "f32") }.resolve().unwrap_err();
        assert!(error.to_string().contains("--threads"));
    }

    #[test]
    fn a_product_is_right_in_both_formats() {
        for dtype in ["f32", "bf16"] {
            let runtime = options("cpu", dtype).resolve().unwrap();
            assert_eq!(runtime.name(), format!("cpu {dtype}"));
            assert!(runtime.try_product().unwrap() > 0.0);
        }
    }
}
