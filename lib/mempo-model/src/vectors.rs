//! Vectors in files, and the exact search for those with the largest inner products.
//!
//! A file holds one tensor `vectors`, `[N,D]` in half precision, as safetensors. On a CPU files are mapped, and a pass over them
//! holds a block of a few MiB in single precision; on a GPU they lie in its memory.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, View};
use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::encoder::Embeddings;
use crate::weights::borrowed;

const NAME: &str = "vectors";
/// Numbers converted to single precision at a time: what a core's caches hold, or what keeps a GPU at work.
const BLOCK: i64 = 1 << 20;
const GPU_BLOCK: i64 = 1 << 27;

/// Vectors on their way into a file.
struct Saved<'a> {
    tensor: &'a Tensor,
    shape: [usize; 2],
}

impl View for Saved<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.tensor.copy_data_u8(&mut bytes, self.tensor.numel());
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * 2
    }
}

/// Writes vectors one after the other in half precision; refuses those that have numbers beyond it.
pub fn write_vectors(vectors: &[Embeddings], file: &mut impl Write) -> Result<(), Error> {
    let pieces: Vec<Tensor> = vectors.iter().map(|piece| piece.0.to_kind(Kind::Half)).collect();
    let tensor = Tensor::cat(&pieces, 0);
    let (rows, size) = tensor.size2().map_err(|error| Error::Options(format!("vectors: {error}")))?;
    if tensor.isfinite().all().int64_value(&[]) == 0 {
        let problem = "vectors hold numbers that half precision has not; have them normalised".to_owned();
        return Err(Error::Options(problem));
    }
    let saved = Saved { tensor: &tensor, shape: [rows as usize, size as usize] };
    let bytes = safetensors::serialize([(NAME, saved)], None)
        .map_err(|error| Error::Options(format!("vectors cannot be laid out: {error}")))?;
    Ok(file.write_all(&bytes)?)
}

/// One file's vectors, `[N,D]`.
struct Part {
    tensor: Tensor,
    /// What the tensor lies in, on a CPU; dropped after it.
    _map: Option<memmap2::Mmap>,
}

/// Vectors by their position in all files, one after the other.
pub struct Vectors {
    parts: Vec<Part>,
    size: i64,
    len: usize,
    device: Device,
}

impl Vectors {
    /// Opens files of vectors that have `size` numbers each.
    pub fn open(paths: &[PathBuf], size: i64, device: Device) -> Result<Self, Error> {
        let parts = paths.iter().map(|path| Part::open(path, size, device)).collect::<Result<Vec<_>, _>>()?;
        let len = parts.iter().map(|part| part.tensor.size()[0] as usize).sum();
        Ok(Self { parts, size, len, device })
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty, reason = "an index is made of documents")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// For each row of `queries`: positions and inner products of the `top_k` vectors with the largest, in descending order,
    /// equal ones by position. What comes back for a query does not depend on the others.
    pub fn nearest(&self, queries: &[Embeddings], top_k: usize) -> Vec<Vec<(usize, f32)>> {
        let _guard = tch::no_grad_guard();
        let there = queries.iter().map(|rows| rows.0.to_device(self.device));
        let queries: Vec<Tensor> = there.flat_map(|rows| rows.unbind(0)).collect();
        let mut best: Vec<Vec<(usize, f32)>> = vec![Vec::new(); queries.len()];
        let block = if self.device.is_cuda() { GPU_BLOCK } else { BLOCK };
        let step = (block / self.size).max(1);
        let mut first = 0;
        for part in &self.parts {
            let rows = part.tensor.size()[0];
            for start in (0..rows).step_by(step as usize) {
                let count = step.min(rows - start);
                let vectors = part.tensor.narrow(0, start, count).to_kind(Kind::Float);
                for (query, best) in queries.iter().zip(&mut best) {
                    let scores = Vec::<f32>::try_from(vectors.mv(query)).expect("a product is a vector of f32");
                    best.extend(scores.into_iter().enumerate().map(|(row, score)| (first + row, score)));
                    keep_best(best, top_k);
                }
                first += count as usize;
            }
        }
        best
    }
}

/// Leaves the `top_k` best, best first.
fn keep_best(scored: &mut Vec<(usize, f32)>, top_k: usize) {
    let better = |a: &(usize, f32), b: &(usize, f32)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
    if scored.len() > top_k && top_k > 0 {
        scored.select_nth_unstable_by(top_k - 1, better);
    }
    scored.truncate(top_k);
    scored.sort_unstable_by(better);
}

impl Part {
    fn open(path: &Path, size: i64, device: Device) -> Result<Self, Error> {
        let problem = |problem: String| Error::Weights { path: path.to_owned(), problem };
        let file = fs_err::File::open(path)?;
        #[expect(unsafe_code, reason = "the map is read-only, and inputs are never modified while they are read")]
        let map = unsafe { memmap2::Mmap::map(file.file()) }?;
        let tensors = SafeTensors::deserialize(&map).map_err(|error| problem(format!("damaged: {error}")))?;
        let view = tensors.tensor(NAME).map_err(|error| problem(format!("no tensor `{NAME}`: {error}")))?;
        let (shape, dtype) = (view.shape().to_vec(), view.dtype());
        let [rows, numbers] = shape[..] else {
            return Err(problem(format!("`{NAME}` has shape {shape:?}; expected vectors of {size} numbers")));
        };
        if dtype != Dtype::F16 || numbers as i64 != size {
            return Err(problem(format!(
                "`{NAME}` is {dtype} {shape:?}; expected F16 vectors of {size} numbers, as the encoder makes them"
            )));
        }
        #[expect(unsafe_code, reason = "safetensors checked the shape, and the map is kept as long as the tensor")]
        let tensor = unsafe { borrowed(view.data(), &[rows as i64, size], Kind::Half) };
        if device.is_cuda() {
            let there = tensor.f_to_device(device).map_err(|_| {
                Error::Device(format!("the vectors do not fit into {device:?}'s memory: search them on the CPU"))
            })?;
            return Ok(Self { tensor: there, _map: None });
        }
        Ok(Self { tensor, _map: Some(map) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of little precision, so that sums are exact and many are equal.
    fn numbers(seed: u64, rows: i64, size: i64) -> Embeddings {
        let count = (rows * size) as u64;
        let numbers: Vec<f32> = (0..count).map(|i| (crate::counter_hash(seed, i) % 5) as f32 - 2.0).collect();
        Embeddings::new(&numbers, size as usize)
    }

    #[test]
    fn the_nearest_are_those_of_all_products_sorted() {
        let folder = tempfile::tempdir().unwrap();
        let (size, all) = (7, numbers(1, 1000, 7));
        let paths: Vec<PathBuf> = (0..3).map(|i| folder.path().join(format!("{i}"))).collect();
        for (path, (start, count)) in paths.iter().zip([(0, 400), (400, 599), (999, 1)]) {
            let some = Embeddings(all.0.narrow(0, start, count));
            write_vectors(&[some], &mut fs_err::File::create(path).unwrap()).unwrap();
        }
        let vectors = Vectors::open(&paths, size, Device::Cpu).unwrap();
        assert_eq!(vectors.len(), 1000);
        let queries = [numbers(2, 1, size), numbers(3, 2, size)];
        for top_k in [0, 1, 10, 2000] {
            let found = vectors.nearest(&queries, top_k);
            assert_eq!(found.len(), 3);
            for (found, query) in found.into_iter().zip([queries[0].row(0), queries[1].row(0), queries[1].row(1)]) {
                let product = |at| all.row(at).iter().zip(&query).map(|(a, b)| a * b).sum::<f32>();
                let mut expected: Vec<(usize, f32)> = (0..1000).map(|at| (at, product(at))).collect();
                expected.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
                expected.truncate(top_k);
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn the_best_of_many_blocks_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (path, size) = (folder.path().join("vectors"), 1 << 18);
        let rows = [1.0, 4.0, 2.0, 4.0, 3.0, 0.0].map(|scale| Tensor::full([1, size], scale, tch::kind::FLOAT_CPU));
        write_vectors(&rows.map(Embeddings), &mut fs_err::File::create(&path).unwrap()).unwrap();
        let vectors = Vectors::open(&[path], size, Device::Cpu).unwrap();
        let query = Tensor::zeros([1, size], tch::kind::FLOAT_CPU);
        let _ = query.get(0).get(5).fill_(0.5);
        assert_eq!(vectors.nearest(&[Embeddings(query)], 3), [[(1, 2.0), (3, 2.0), (4, 1.5)]]);
    }

    #[test]
    fn what_is_no_file_of_such_vectors_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vectors");
        let refused = |size| {
            let error = Vectors::open(std::slice::from_ref(&path), size, Device::Cpu).map(drop).unwrap_err();
            error.to_string()
        };
        write_vectors(&[numbers(1, 3, 4)], &mut fs_err::File::create(&path).unwrap()).unwrap();
        assert!(refused(5).contains("F16 [3, 4]; expected F16 vectors of 5 numbers"), "{}", refused(5));
        let bytes = fs_err::read(&path).unwrap();
        fs_err::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(refused(4).contains("damaged"));
        let large = Tensor::full([1, 4], 1e6, tch::kind::FLOAT_CPU);
        let error = write_vectors(&[Embeddings(large)], &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("half precision"), "{error}");
    }
}
