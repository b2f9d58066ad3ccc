//! Safetensors in and out: one file or shards with an index, every tensor's name, shape and dtype checked.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Error, Model};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Read at a time.
const PIECE_BYTES: usize = 1 << 24;
/// Hugging Face's shard size, in bytes.
const SHARD_BYTES: usize = 5_000_000_000;

#[derive(Serialize, Deserialize)]
struct Index {
    metadata: serde_json::Value,
    weight_map: BTreeMap<String, String>,
}

/// Fills `parameters` from the weights in `dir`, converted to the parameters' number format. `own_name` says what a tensor of
/// the files is called here; nothing if it is not needed.
pub(crate) fn load(
    dir: &Path,
    parameters: &[(String, Tensor)],
    own_name: impl Fn(&str) -> Option<&str>,
) -> Result<(), Error> {
    let _guard = tch::no_grad_guard();
    let (listing, files, index) = weight_files(dir)?;
    let wanted: HashMap<&str, &Tensor> = parameters.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut found = BTreeSet::new();
    for path in &files {
        let file = fs_err::File::open(path)?;
        #[expect(
            unsafe_code,
            reason = "the map is read-only and gone before this function returns; inputs are never modified"
        )]
        let bytes = unsafe { memmap2::Mmap::map(file.file()) }?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| Error::Weights {
            path: path.clone(),
            problem: format!("damaged or cut short ({error}; {} bytes); fetch or copy it again", bytes.len()),
        })?;
        for (name, view) in tensors.iter() {
            let problem = |problem: String| Error::Tensor { path: path.clone(), tensor: name.to_owned(), problem };
            let Some(own_name) = own_name(name) else { continue };
            match wanted.get(own_name) {
                Some(parameter) => fill(parameter, &view, &bytes).map_err(problem)?,
                None => {
                    return Err(problem("is not part of this model; does config.json belong to it?".to_owned()));
                }
            }
            if !found.insert(own_name.to_owned()) {
                return Err(problem("stands in two shards".to_owned()));
            }
        }
    }
    match parameters.iter().find(|(name, _)| !found.contains(name)) {
        None => Ok(()),
        Some((name, tensor)) => Err(Error::Tensor {
            path: index.get(name).map_or(listing, |file| dir.join(file)),
            tensor: name.clone(),
            problem: format!("is missing; expected shape {:?}", tensor.size()),
        }),
    }
}

/// The file that lists the tensors, the files that hold them, and (for shards) which holds which.
type WeightFiles = (PathBuf, Vec<PathBuf>, BTreeMap<String, String>);

fn weight_files(dir: &Path) -> Result<WeightFiles, Error> {
    let (single, path) = (dir.join(SINGLE), dir.join(INDEX));
    if single.is_file() {
        return Ok((single.clone(), vec![single], BTreeMap::new()));
    }
    if !path.is_file() {
        let problem =
            format!("holds neither {SINGLE} nor {INDEX}; weights in other formats must be converted to safetensors");
        return Err(Error::Weights { path: dir.to_owned(), problem });
    }
    let problem = |problem: String| Error::Weights { path: path.clone(), problem };
    let text = fs_err::read_to_string(&path)?;
    let index: Index =
        serde_json::from_str(&text).map_err(|error| problem(format!("not an index of shards: {error}")))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) =
        names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref()) || name.contains('\\'))
    {
        return Err(problem(format!("shard name `{name}` is not a plain file name")));
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
    if let Some(missing) = files.iter().find(|file| !file.is_file()) {
        return Err(problem(format!("the shard {} is missing", missing.display())));
    }
    Ok((path, files, index.weight_map))
}

/// Copies a tensor out of the map, piece by piece, each given back once it is read.
fn fill(parameter: &Tensor, view: &TensorView, map: &memmap2::Mmap) -> Result<(), String> {
    let kind = match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        other => return Err(format!("has dtype {other}; expected F32, BF16 or F16")),
    };
    let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
    if shape != parameter.size() {
        return Err(format!("has shape {shape:?}; expected {:?}", parameter.size()));
    }
    let data = view.data();
    #[expect(unsafe_code, reason = "safetensors checked the shape, and the tensor ends with this function")]
    let source = unsafe { borrowed(data, &shape, kind) };
    // No parameter is without an axis, or empty along the first.
    let rows = shape[0];
    let row_bytes = data.len() / rows as usize;
    let step = (PIECE_BYTES / row_bytes.max(1)).max(1);
    for start in (0..rows).step_by(step) {
        let count = rows.min(start + step as i64) - start;
        parameter.narrow(0, start, count).copy_(&source.narrow(0, start, count));
        forget(map, &data[start as usize * row_bytes..(start + count) as usize * row_bytes]);
    }
    Ok(())
}

/// A tensor over bytes; a copy of them where they are not aligned, as in some old files.
///
/// # Safety
/// There are as many bytes as shape and kind say, and they outlive the tensor, which is only read.
#[expect(unsafe_code, reason = "a tensor has no lifetime")]
pub(crate) unsafe fn borrowed(data: &[u8], shape: &[i64], kind: Kind) -> Tensor {
    if data.as_ptr().align_offset(kind.elt_size_in_bytes()) != 0 {
        return Tensor::from_data_size(data, shape, kind);
    }
    // SAFETY: aligned, and otherwise as the caller promises.
    unsafe { Tensor::from_blob(data.as_ptr(), shape, &strides(shape), kind, Device::Cpu) }
}

/// Row-major strides.
fn strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// Gives back the memory of a part of the map that was read: loading then needs the model's own size and little more.
fn forget(map: &memmap2::Mmap, part: &[u8]) {
    let offset = part.as_ptr() as usize - map.as_ptr() as usize;
    #[expect(unsafe_code, reason = "the map is of a file and read-only: a page that is asked for again is read again")]
    let result = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, part.len()) };
    // A kernel that does not take the advice costs memory, nothing else.
    let _ = result;
}

/// A tensor on its way into a file.
struct Saved<'a> {
    model: &'a Model,
    name: &'a str,
    tensor: &'a Tensor,
    kind: Kind,
    shape: Vec<usize>,
}

impl View for Saved<'_> {
    fn dtype(&self) -> Dtype {
        match self.kind {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let tensor =
            self.model.merged(self.name, self.tensor).detach().to_device(Device::Cpu).to_kind(self.kind).contiguous();
        let mut bytes = vec![0; self.data_len()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.kind.elt_size_in_bytes()
    }
}

impl Model {
    /// Writes the weights as `dtype` (`Float`, `BFloat16` or `Half`) under Hugging Face's names into `dir`:
    /// `model.safetensors`, or shards of up to 5 GB and their index. A tied head is left out, adapters are merged.
    pub fn save_weights(&self, dir: &Path, dtype: Kind) -> Result<(), Error> {
        self.save_shards(dir, dtype, SHARD_BYTES)
    }

    fn save_shards(&self, dir: &Path, dtype: Kind, shard_bytes: usize) -> Result<(), Error> {
        if !matches!(dtype, Kind::Float | Kind::BFloat16 | Kind::Half) {
            return Err(Error::Options(format!(
                "weights cannot be saved as {dtype:?}; expected Float, BFloat16 or Half"
            )));
        }
        let mut shards: Vec<Vec<(&str, Saved)>> = Vec::new();
        let mut room = 0;
        for (name, tensor) in self.parameters() {
            let shape = tensor.size().iter().map(|size| *size as usize).collect();
            let saved = Saved { model: self, name, tensor, kind: dtype, shape };
            let bytes = saved.data_len();
            if shards.is_empty() || bytes > room {
                shards.push(Vec::new());
                room = shard_bytes.max(bytes);
            }
            room -= bytes;
            shards.last_mut().expect("one was just pushed").push((name, saved));
        }
        let count = shards.len();
        let mut index = Index { metadata: serde_json::Value::Null, weight_map: BTreeMap::new() };
        let mut total = 0;
        for (shard, tensors) in shards.into_iter().enumerate() {
            let file = if count == 1 {
                SINGLE.to_owned()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", shard + 1)
            };
            index.weight_map.extend(tensors.iter().map(|(name, _)| ((*name).to_owned(), file.clone())));
            total += tensors.iter().map(|(_, saved)| saved.data_len()).sum::<usize>();
            write_file(&dir.join(file), tensors)?;
        }
        if count > 1 {
            index.metadata = serde_json::json!({"total_size": total});
            let text = serde_json::to_string_pretty(&index).map_err(std::io::Error::from)?;
            fs_err::write(dir.join(INDEX), text + "\n")?;
        }
        Ok(())
    }
}

fn write_file(path: &Path, tensors: Vec<(&str, Saved)>) -> Result<(), Error> {
    // Without this entry several versions of transformers refuse the file.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => Error::Write { path: path.to_owned(), source },
        error => Error::Weights { path: path.to_owned(), problem: error.to_string() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Runtime;

    #[test]
    fn shards_and_their_index_hold_the_whole_model() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama");
        let runtime = Runtime::cpu(Kind::Float);
        let model = Model::load(&golden, &runtime).unwrap();
        let out = tempfile::tempdir().unwrap();
        model.save_shards(out.path(), Kind::Float, 30_000).unwrap();
        fs_err::copy(golden.join("config.json"), out.path().join("config.json")).unwrap();
        let text = fs_err::read_to_string(out.path().join(INDEX)).unwrap();
        let index: Index = serde_json::from_str(&text).unwrap();
        assert_eq!(index.metadata["total_size"], 4 * 31_328);
        assert_eq!(index.weight_map.len(), model.parameters().len());
        let files: BTreeSet<&String> = index.weight_map.values().collect();
        let count = files.len();
        assert!(count > 3, "{files:?}");
        for (number, file) in files.into_iter().enumerate() {
            assert_eq!(*file, format!("model-{:05}-of-{count:05}.safetensors", number + 1));
            let bytes = fs_err::metadata(out.path().join(file)).unwrap().len();
            assert!(bytes < 33_000, "{file}: {bytes}");
        }
        let again = Model::load(out.path(), &runtime).unwrap();
        for ((name, one), (_, other)) in model.parameters().iter().zip(again.parameters()) {
            assert!(one.equal(other), "{name}");
        }
    }
}
