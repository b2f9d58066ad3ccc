//! Directories out and in again.

use std::path::Path;

use mempo_model::{Model, Runtime, save_checkpoint};
use tch::Kind;

use crate::{CPU, fresh, golden, largest_difference, load, logits};

fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs_err::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = fs_err::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn save_load_save_gives_equal_bytes() {
    for (name, kind) in [("qwen2", Kind::Float), ("llama", Kind::BFloat16)] {
        let out = tempfile::tempdir().unwrap();
        let (first, second) = (out.path().join("1"), out.path().join("2"));
        let runtime = Runtime::cpu(kind);
        save_checkpoint(&Model::load(&golden(name), &runtime).unwrap(), &golden(name), &first).unwrap();
        save_checkpoint(&Model::load(&first, &runtime).unwrap(), &first, &second).unwrap();
        assert_eq!(names(&first), ["config.json", "model.safetensors"]);
        for file in names(&first) {
            assert_eq!(fs_err::read(first.join(&file)).unwrap(), fs_err::read(second.join(&file)).unwrap(), "{file}");
        }
    }
}

#[test]
fn a_saved_model_computes_the_same_and_shards_are_one_model() {
    let (model, out) = (load("llama"), tempfile::tempdir().unwrap());
    model.save_weights(out.path(), Kind::Float).unwrap();
    fs_err::copy(golden("llama").join("config.json"), out.path().join("config.json")).unwrap();
    let again = Model::load(out.path(), &CPU).unwrap();
    let ids = crate::ids(1, 20);
    assert!(largest_difference(&logits(&model, &ids), &logits(&again, &ids)) == 0.0);
}

#[test]
fn everything_but_weights_is_copied_and_dtype_follows() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for file in ["config.json", "model.safetensors"] {
        fs_err::copy(golden("qwen2").join(file), source.path().join(file)).unwrap();
    }
    fs_err::create_dir_all(source.path().join("additional_chat_templates")).unwrap();
    fs_err::create_dir_all(source.path().join("trainer")).unwrap();
    for file in [
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates/rag.jinja",
        "manifest.json",
        "run.json",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "trainer/moments",
        ".git",
    ] {
        fs_err::write(source.path().join(file), format!("bytes of {file}\n")).unwrap();
    }
    let runtime = Runtime::cpu(Kind::BFloat16);
    save_checkpoint(&Model::load(source.path(), &runtime).unwrap(), source.path(), out.path()).unwrap();
    assert_eq!(
        names(out.path()),
        [
            "additional_chat_templates",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json"
        ]
    );
    assert_eq!(
        fs_err::read_to_string(out.path().join("additional_chat_templates/rag.jinja")).unwrap(),
        "bytes of additional_chat_templates/rag.jinja\n"
    );
    let config = |dir: &Path| fs_err::read_to_string(dir.join("config.json")).unwrap();
    assert_eq!(
        config(out.path()).replace("bfloat16", "float32").trim_end(),
        config(source.path()).replace("1e-06", "1e-6").trim_end(),
        "only the dtype differs"
    );
}

#[test]
fn a_fresh_model_is_a_function_of_its_seed() {
    let bytes = |seed| {
        let out = tempfile::tempdir().unwrap();
        fresh("llama", seed, Kind::Float).save_weights(out.path(), Kind::Float).unwrap();
        fs_err::read(out.path().join("model.safetensors")).unwrap()
    };
    assert_eq!(bytes(1), bytes(1));
    assert_ne!(bytes(1), bytes(2));
    let model = fresh("qwen2", 1, Kind::Float);
    for (name, tensor) in model.parameters() {
        let (mean, deviation) = (tensor.mean(Kind::Double).double_value(&[]), tensor.std(false).double_value(&[]));
        let expected = if name.ends_with("norm.weight") {
            (1.0, 0.0)
        } else if name.ends_with("bias") {
            (0.0, 0.0)
        } else {
            (0.0, 0.3)
        };
        assert!(
            (mean - expected.0).abs() < 0.05 && (deviation - expected.1).abs() < 0.05,
            "{name}: {mean} {deviation}"
        );
    }
}
