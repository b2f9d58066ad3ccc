//! A weight file with some bytes changed.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use mempo_fuzz::Change;

static FOLDER: LazyLock<(PathBuf, Vec<u8>)> = LazyLock::new(|| {
    let folder = mempo_fuzz::model_folder();
    let weights = fs_err::read(folder.join("model.safetensors")).expect("it was copied");
    (folder, weights)
});

libfuzzer_sys::fuzz_target!(|changes: Vec<Change>| {
    let (folder, mut bytes) = (&FOLDER.0, FOLDER.1.clone());
    for change in changes {
        change.apply(&mut bytes);
    }
    fs_err::write(folder.join("model.safetensors"), &bytes).expect("there is room");
    mempo_fuzz::load_model(folder);
});
