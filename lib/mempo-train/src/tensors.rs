//! Named tensors in a safetensors file as fp32, one tensor in memory at a time, with the SHA-256 of the whole file.

use std::collections::HashMap;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::Error;

const LARGEST_HEADER: u64 = 100 << 20;

/// Writes tensors and returns the file's SHA-256 in hexadecimal.
pub(crate) fn write_tensors(path: &Path, tensors: &[(&str, Tensor)]) -> Result<String, Error> {
    let mut end = 0;
    let mut infos = Vec::new();
    for (name, tensor) in tensors {
        let size = 4 * tensor.numel();
        let shape = tensor.size().iter().map(|&length| length as usize).collect();
        infos.push(((*name).to_owned(), TensorInfo { dtype: Dtype::F32, shape, data_offsets: (end, end + size) }));
        end += size;
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let unusable = |problem: String| Error::State { path: path.to_owned(), problem };
    let metadata = Metadata::new(Some(format), infos).map_err(|error| unusable(error.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| unusable(error.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = BufWriter::new(fs_err::File::create(path)?);
    let mut digest = Sha256::new();
    let mut write = |bytes: &[u8]| {
        digest.update(bytes);
        file.write_all(bytes)
    };
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for (_, tensor) in tensors {
        let mut bytes = vec![0; 4 * tensor.numel()];
        tensor
            .to_device(tch::Device::Cpu)
            .to_kind(Kind::Float)
            .contiguous()
            .f_copy_data_u8(&mut bytes, tensor.numel())?;
        write(&bytes)?;
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok(hex(digest))
}

/// Hands each tensor of the file at `path` to `each`, in file order; returns the file's SHA-256 in hexadecimal.
pub(crate) fn read_tensors(
    path: &Path,
    each: &mut dyn FnMut(&str, Tensor) -> Result<(), String>,
) -> Result<String, Error> {
    let unusable = |problem: String| Error::State { path: path.to_owned(), problem };
    let mut file = BufReader::new(fs_err::File::open(path)?);
    let mut digest = Sha256::new();
    let mut read = |bytes: &mut [u8]| -> Result<(), Error> {
        file.read_exact(bytes).map_err(|error| unusable(format!("cannot be read to its end: {error}")))?;
        digest.update(bytes);
        Ok(())
    };
    let mut length = [0; 8];
    read(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > LARGEST_HEADER {
        return Err(unusable(format!("not a safetensors file: its header would be {length} bytes long")));
    }
    let mut header = vec![0; length as usize];
    read(&mut header)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| unusable(format!("not a safetensors file: {error}")))?;
    for name in metadata.offset_keys() {
        let info = metadata.info(&name).expect("names come from the same header");
        if info.dtype != Dtype::F32 {
            return Err(unusable(format!("tensor {name} is {:?}, expected F32", info.dtype)));
        }
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        read(&mut bytes)?;
        let shape: Vec<i64> = info.shape.iter().map(|&length| length as i64).collect();
        if 4 * shape.iter().product::<i64>() != bytes.len() as i64 {
            return Err(unusable(format!("tensor {name} of shape {shape:?} has {} bytes", bytes.len())));
        }
        each(&name, Tensor::f_from_data_size(&bytes, &shape, Kind::Float)?).map_err(unusable)?;
    }
    Ok(hex(digest))
}

fn hex(digest: Sha256) -> String {
    format!("{:x}", digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_and_other_readers_read_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let first = Tensor::from_slice(&[1.5_f32, -2.0, 3.0, 0.0, 5.0, 1e-30]).view([2, 3]);
        let second = Tensor::from_slice(&[7.0_f32]);
        let written = write_tensors(&path, &[("b", first.shallow_clone()), ("a", second.shallow_clone())]).unwrap();
        let mut found = HashMap::new();
        let mut collect = |name: &str, tensor: Tensor| {
            found.insert(name.to_owned(), tensor);
            Ok(())
        };
        assert_eq!(read_tensors(&path, &mut collect).unwrap(), written);
        assert_eq!(found["b"], first);
        assert_eq!(found["a"], second);
        // The crate's own reader checks the whole layout.
        let bytes = fs_err::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("b").unwrap().shape(), [2, 3]);

        fs_err::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let message = read_tensors(&path, &mut |_, _| Ok(())).unwrap_err().to_string();
        assert!(message.contains("fill whole buffer"), "{message}");
    }
}
