//! Where and in which number format a model computes.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tch::{Cuda, Device, Kind};

use crate::Error;

/// Where to compute, in which number format, on how many threads.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct DeviceOptions {
    /// Where to compute: cpu, cuda, cuda:N, or auto (the first GPU, or else the CPU)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Number format of weights and activations: bf16, f32, or auto (bf16)
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub dtype: String,
    /// CPU threads inside an operation; all cores when not given. Results on the CPU may differ in their last bits
    /// between thread counts
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { device: "auto".to_owned(), dtype: "auto".to_owned(), threads: None }
    }
}

/// What `DeviceOptions` came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runtime {
    /// Device that holds weights, cache and activations.
    pub device: Device,
    /// Their number format: `BFloat16` or `Float`.
    pub kind: Kind,
}

impl Runtime {
    /// Whether it computes in 32-bit floating point.
    pub fn is_f32(&self) -> bool {
        self.kind == Kind::Float
    }
}

impl DeviceOptions {
    /// Loads the GPU libraries if they may be needed, sets the thread count, and settles device and number format.
    /// Must come before anything else that touches libtorch.
    pub fn resolve(&self) -> Result<Runtime, Error> {
        let kind = match self.dtype.as_str() {
            "auto" | "bf16" => Kind::BFloat16,
            "f32" => Kind::Float,
            other => {
                return Err(Error::Device(format!("--dtype {other}: expected bf16, f32 or auto")));
            }
        };
        let device = self.resolve_device()?;
        let threads = match self.threads {
            Some(0) => return Err(Error::Device("--threads 0: expected at least 1".to_owned())),
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        };
        tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
        Ok(Runtime { device, kind })
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

/// The GPU part of libtorch: the file or folder that `MEMPO_LIBTORCH_CUDA` names, or else beside the libtorch in use,
/// or in a `cuda/torch/lib` next to its folder (where it finds its own libraries in `cuda/nvidia`).
fn cuda_library() -> Option<PathBuf> {
    let named = std::env::var_os("MEMPO_LIBTORCH_CUDA").map(PathBuf::from);
    let folders =
        named.clone().into_iter().chain(libtorch_folder().into_iter().flat_map(|folder| {
            [folder.clone(), folder.join("../cuda/torch/lib"), folder.join("../../cuda/torch/lib")]
        }));
    let inside = folders.map(|folder| folder.join("libtorch_cuda.so"));
    named.into_iter().filter(|path| path.is_file()).chain(inside).find(|path| path.is_file())
}

/// The folder of the libtorch that this process runs on.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = fs_err::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    Path::new(&line[line.find('/')?..]).parent().map(Path::to_owned)
}

/// Loads the GPU part of libtorch for the life of the process: it registers itself with the CPU part as it loads.
fn load_cuda(library: &Path) -> Result<(), Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    #[expect(unsafe_code, reason = "loading a library runs its initialisers; this one is libtorch's own")]
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
    let loaded = loaded.map_err(|error| {
        Error::Device(format!("{} could not be loaded: {error}; --device cpu does without it", library.display()))
    })?;
    std::mem::forget(loaded);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(device: &str, dtype: &str) -> DeviceOptions {
        DeviceOptions { device: device.to_owned(), dtype: dtype.to_owned(), threads: Some(2) }
    }

    #[test]
    fn names_resolve_or_are_refused() {
        assert_eq!(options("cpu", "f32").resolve().unwrap(), Runtime { device: Device::Cpu, kind: Kind::Float });
        assert_eq!(options("cpu", "auto").resolve().unwrap().kind, Kind::BFloat16);
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
    fn the_libtorch_in_use_is_found() {
        tch::set_num_threads(2);
        assert!(libtorch_folder().unwrap().join("libtorch_cpu.so").is_file());
    }
}
