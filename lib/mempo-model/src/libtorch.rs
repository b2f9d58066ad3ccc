//! The libtorch that this process runs on: where it lies, which version it is, and its GPU part.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::Error;

/// The libtorch in use, for people to read.
#[derive(Debug, Clone)]
pub struct Libtorch {
    /// Its version, such as `2.11.0`.
    pub version: Option<String>,
    /// Where its libraries lie.
    pub folder: Option<PathBuf>,
    /// Its GPU part, where there is one; it is loaded when a GPU is asked for.
    pub cuda_library: Option<PathBuf>,
}

impl Libtorch {
    /// Looks where it is. Loads nothing.
    pub fn in_use() -> Self {
        Self { version: version(), folder: libtorch_folder(), cuda_library: cuda_library() }
    }
}

/// The GPU part of libtorch: the file or folder that `MEMPO_LIBTORCH_CUDA` names, or else beside the libtorch in use,
/// or in a `cuda/torch/lib` next to its folder (where it finds its own libraries in `cuda/nvidia`).
pub(crate) fn cuda_library() -> Option<PathBuf> {
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
pub(crate) fn load_cuda(library: &Path) -> Result<(), Error> {
    #[expect(unsafe_code, reason = "loading a library runs its initialisers; this one is libtorch's own")]
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
    let loaded = loaded.map_err(|error| {
        Error::Device(format!("{} could not be loaded: {error}; --device cpu does without it", library.display()))
    })?;
    std::mem::forget(loaded);
    Ok(())
}

/// Its version, such as `2.11.0`, as the library itself says.
fn version() -> Option<String> {
    #[expect(unsafe_code, reason = "a function of libtorch's stable C interface: no arguments, gives a 64-bit number")]
    let number = unsafe {
        let function = Library::this().get::<unsafe extern "C" fn() -> u64>(b"aoti_torch_abi_version\0").ok()?;
        function()
    };
    let [major, minor, patch, ..] = number.to_be_bytes();
    Some(format!("{major}.{minor}.{patch}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libtorch_in_use_is_found() {
        tch::set_num_threads(2);
        let libtorch = Libtorch::in_use();
        assert!(libtorch.folder.unwrap().join("libtorch_cpu.so").is_file());
        assert!(libtorch.version.unwrap().starts_with("2."));
    }
}
