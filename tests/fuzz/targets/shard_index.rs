//! The index of a model's weight files.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(mempo_fuzz::model_folder);

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    fs_err::write(FOLDER.join("model.safetensors.index.json"), json).expect("there is room");
    mempo_fuzz::load_model(&FOLDER);
});
