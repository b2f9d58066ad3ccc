//! What the fuzz targets share: a folder of their own, a model to damage, changes of bytes.

use std::path::{Path, PathBuf};

use arbitrary::Arbitrary;
use mempo_model::{DeviceOptions, Model};

/// A folder with the files of a small Qwen2 model, each of which a target may replace.
pub fn model_folder() -> PathBuf {
    let folder = tempfile::tempdir().expect("a temporary folder").keep();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../lib/mempo-model/tests/golden/qwen2");
    for name in ["config.json", "model.safetensors"] {
        fs_err::copy(golden.join(name), folder.join(name)).expect("the golden model is there");
    }
    folder
}

/// Loads the model, or does not: nothing else may happen.
pub fn load_model(folder: &Path) {
    let options = DeviceOptions { device: "cpu".to_owned(), dtype: "f32".to_owned(), ..DeviceOptions::default() };
    drop(Model::load(folder, &options.resolve().expect("the CPU is there")));
}

/// One change of some bytes.
#[derive(Arbitrary, Debug)]
pub enum Change {
    /// The end is lost.
    Cut(u32),
    /// A byte comes in.
    Insert(u32, u8),
    /// A byte is lost.
    Remove(u32),
    /// A byte is another.
    Replace(u32, u8),
    /// Eight bytes are another number.
    Number(u32, u64),
}

impl Change {
    /// Changes `bytes` where they are long enough; places count from 0, and from the end beyond half of `u32`.
    pub fn apply(self, bytes: &mut Vec<u8>) {
        let length = bytes.len();
        let place = |at: u32| match at.checked_sub(1 << 31) {
            None => (at as usize).min(length),
            Some(back) => length.saturating_sub(back as usize),
        };
        match self {
            Self::Cut(at) => bytes.truncate(place(at)),
            Self::Insert(at, byte) => bytes.insert(place(at), byte),
            Self::Remove(at) if place(at) < length => drop(bytes.remove(place(at))),
            Self::Replace(at, byte) if place(at) < length => bytes[place(at)] = byte,
            Self::Number(at, number) if place(at) + 8 <= length => {
                bytes[place(at)..place(at) + 8].copy_from_slice(&number.to_le_bytes());
            }
            Self::Remove(_) | Self::Replace(..) | Self::Number(..) => {}
        }
    }
}
