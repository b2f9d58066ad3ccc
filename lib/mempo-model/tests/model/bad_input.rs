//! Damaged directories are refused with words that name the file and what is wrong.

use std::collections::HashMap;
use std::path::Path;

use mempo_model::{Model, counter_hash};
use tch::{Kind, Tensor};

use crate::{CPU, golden};

/// A copy of a golden model, changed by `change`; the error of loading it.
fn error_of(name: &str, change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs_err::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    change(dir.path());
    let Err(error) = Model::load(dir.path(), &CPU) else { panic!("the changed model was loaded") };
    let error = error.to_string();
    assert!(error.contains(&dir.path().display().to_string()), "names no file: {error}");
    error
}

fn check(error: &str, words: &[&str]) {
    assert!(words.iter().all(|word| error.contains(word)), "{error}\nlacks one of {words:?}");
}

fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = dir.join("model.safetensors");
    let mut tensors: HashMap<String, Tensor> = Tensor::read_safetensors(&path).unwrap().into_iter().collect();
    edit(&mut tensors);
    let tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    Tensor::write_safetensors(&tensors, &path).unwrap();
}

fn edit_text(path: &Path, from: &str, to: &str) {
    let text = fs_err::read_to_string(path).unwrap();
    assert!(text.contains(from));
    fs_err::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn files_cut_short_anywhere() {
    for keep in [0, 4, 500, 50_000, 96_815] {
        let error = error_of("qwen2", |dir| {
            let path = dir.join("model.safetensors");
            let bytes = fs_err::read(&path).unwrap();
            fs_err::write(&path, &bytes[..keep]).unwrap();
        });
        check(&error, &["model.safetensors", "cut short"]);
    }
}

#[test]
fn tensors_missing_misshapen_or_foreign() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    let error = error_of("qwen2", |dir| {
        edit_tensors(dir, |tensors| drop(tensors.remove(Q)));
    });
    check(&error, &["model.safetensors", Q, "missing", "[32, 32]"]);
    let error = error_of("qwen2", |dir| {
        edit_tensors(dir, |tensors| {
            tensors.insert(Q.to_owned(), Tensor::zeros([32, 16], (Kind::Float, tch::Device::Cpu)));
        });
    });
    check(&error, &[Q, "[32, 16]", "[32, 32]"]);
    let error = error_of("qwen2", |dir| {
        edit_tensors(dir, |tensors| {
            tensors.insert(Q.to_owned(), Tensor::zeros([32, 32], (Kind::Double, tch::Device::Cpu)));
        });
    });
    check(&error, &[Q, "F64"]);
    let error = error_of("qwen2", |dir| {
        edit_tensors(dir, |tensors| {
            tensors.insert(
                "model.layers.0.self_attn.o_proj.bias".to_owned(),
                Tensor::zeros([32], (Kind::Float, tch::Device::Cpu)),
            );
        });
    });
    check(&error, &["o_proj.bias", "not part of this model"]);
}

#[test]
fn shards_missing_or_pointing_elsewhere() {
    const SHARD: &str = "model-00002-of-00003.safetensors";
    let error = error_of("llama", |dir| fs_err::remove_file(dir.join(SHARD)).unwrap());
    check(&error, &["model.safetensors.index.json", SHARD, "missing"]);
    for name in ["../outside.safetensors", "/etc/passwd", "sub/file.safetensors", "..", ""] {
        let error = error_of("llama", |dir| {
            edit_text(&dir.join("model.safetensors.index.json"), SHARD, name);
        });
        check(&error, &["index.json", "plain file name"]);
    }
    let error = error_of("llama", |dir| {
        fs_err::copy(dir.join("model-00001-of-00003.safetensors"), dir.join(SHARD)).unwrap();
    });
    check(&error, &[SHARD, "two shards"]);
    let error = error_of("llama", |dir| {
        fs_err::remove_file(dir.join("model.safetensors.index.json")).unwrap();
    });
    check(&error, &["neither"]);
}

#[test]
fn configs_of_other_families_or_features() {
    let edit = |from: &'static str, to: &'static str| {
        error_of("llama", move |dir| {
            edit_text(&dir.join("config.json"), from, to);
        })
    };
    check(&edit("\"llama\"", "\"gpt_neox\""), &["config.json", "gpt_neox", "qwen2"]);
    check(&edit("\"rope_type\": \"default\"", "\"rope_type\": \"llama3\""), &["config.json", "rope_type", "llama3"]);
    check(&edit("\"attention_bias\": false", "\"attention_bias\": true"), &["config.json", "attention_bias"]);
    check(&edit("\"vocab_size\": 199", "\"vocab_size\": 200"), &["embed_tokens", "[199, 32]", "[200, 32]"]);
    check(&edit("\"hidden_size\": 32,", ""), &["config.json", "hidden_size"]);
}

#[test]
fn whatever_bytes_a_model_has_loading_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs_err::read_dir(golden("qwen2")).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let header =
        8 + u64::from_le_bytes(fs_err::read(dir.path().join("model.safetensors")).unwrap()[..8].try_into().unwrap());
    let (mut refused, mut loaded) = (0, 0);
    for (name, trials) in [("config.json", 600), ("model.safetensors", 600)] {
        let path = dir.path().join(name);
        let whole = fs_err::read(&path).unwrap();
        let reach = if name == "config.json" { whole.len() as u64 } else { header };
        for trial in 0..trials {
            let draw = |what: u64| counter_hash(trial, what);
            let (place, mut bytes) = ((draw(0) % reach) as usize, whole.clone());
            match draw(1) % 3 {
                0 => bytes[place] ^= 1 << (draw(2) % 8),
                1 => bytes[place] = draw(2) as u8,
                _ => drop(bytes.remove(place)),
            }
            fs_err::write(&path, &bytes).unwrap();
            match Model::load(dir.path(), &CPU) {
                Ok(_) => loaded += 1,
                Err(_) => refused += 1,
            }
        }
        fs_err::write(&path, &whole).unwrap();
    }
    assert!(refused > 600 && loaded > 0, "{refused} refused, {loaded} loaded");
}
