//! A whole model directory out: new weights, everything else as the source has it.

use std::path::Path;

use serde_json::Value;
use tch::Kind;

use crate::{Error, Model};

/// A stage's own files, which are no part of the model.
const OWN_FILES: &[&str] = &["manifest.json", "run.json", "metrics.jsonl", "timings.jsonl", "lock", "status.json"];
/// Endings of weight files.
const WEIGHT_ENDINGS: &[&str] = &[
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
];

/// Writes `model` into `out_dir` as a complete Hugging Face directory: its weights in the model's own number format,
/// and the tokenizer files, chat templates, generation config and so on of `source_dir` byte for byte. `config.json` is
/// copied too; only its `dtype` (or `torch_dtype`) is changed where it names another number format.
pub fn save_checkpoint(model: &Model, source_dir: &Path, out_dir: &Path) -> Result<(), Error> {
    fs_err::create_dir_all(out_dir)?;
    let kind = model.runtime().kind;
    model.save_weights(out_dir, kind)?;
    copy_files(source_dir, out_dir)?;
    let templates = source_dir.join("additional_chat_templates");
    if templates.is_dir() {
        let out = out_dir.join("additional_chat_templates");
        fs_err::create_dir_all(&out)?;
        copy_files(&templates, &out)?;
    }
    name_dtype(&out_dir.join("config.json"), kind)
}

/// Copies the plain files of `source` that are neither weights nor a stage's own nor hidden.
fn copy_files(source: &Path, out: &Path) -> Result<(), Error> {
    for entry in fs_err::read_dir(source)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let skipped = OWN_FILES.contains(&name.as_str())
            || WEIGHT_ENDINGS.iter().any(|ending| name.ends_with(ending))
            || name.starts_with('.')
            || Path::new(&name).extension().is_some_and(|ending| ending == "log");
        if path.is_file() && !skipped {
            fs_err::write(out.join(&name), fs_err::read(&path)?)?;
        }
    }
    Ok(())
}

fn name_dtype(path: &Path, kind: Kind) -> Result<(), Error> {
    let name = if kind == Kind::BFloat16 { "bfloat16" } else { "float32" };
    let mut config: Value = serde_json::from_str(&fs_err::read_to_string(path)?)
        .map_err(|error| Error::Config { path: path.to_owned(), problem: error.to_string() })?;
    let mut changed = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key).filter(|value| *value != name) {
            *value = name.into();
            changed = true;
        }
    }
    if changed {
        let text = serde_json::to_string_pretty(&config).map_err(std::io::Error::from)?;
        fs_err::write(path, text + "\n")?;
    }
    Ok(())
}
