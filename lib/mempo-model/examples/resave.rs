//! Loads a model directory (or, where it holds no weights, makes a fresh model of its config), saves it again, and
//! writes what it computes beside it for `tests/recheck.py`: `resave SOURCE OUT f32|bf16`.

use std::path::Path;

use anyhow::Context;
use mempo_model::{Config, DeviceOptions, Model, ScoreOptions, ScoredSequence, counter_hash, save_checkpoint};
use tch::{Kind, Tensor};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, out, dtype] = &arguments[..] else { anyhow::bail!("usage: resave SOURCE OUT f32|bf16") };
    let (source, out) = (Path::new(source), Path::new(out));
    let runtime = DeviceOptions { device: "cpu".to_owned(), dtype: dtype.clone(), threads: None, deterministic: false }
        .resolve()?;
    let fresh = !source.join("model.safetensors").exists() && !source.join("model.safetensors.index.json").exists();
    let model =
        if fresh { Model::initialise(Config::load(source)?, 1, &runtime)? } else { Model::load(source, &runtime)? };
    save_checkpoint(&model, source, out)?;

    let size = model.config().vocab_size as u64;
    let ids: Vec<i32> = (0..64).map(|i| (counter_hash(1, i) % size) as i32).collect();
    let tensor = Tensor::from_slice(&ids).to_kind(Kind::Int64).unsqueeze(0);
    let logits =
        tch::no_grad(|| model.hidden(&tensor).linear(model.head_weight(), None::<Tensor>).to_kind(Kind::Float));
    let sequence = ScoredSequence { targets: 1..ids.len(), ids };
    let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 1024 };
    let logprobs = model.completion_logprobs(&[sequence], &options)?.concat();
    let tensors = [("ids", tensor), ("logits", logits), ("logprobs", Tensor::from_slice(&logprobs).unsqueeze(0))];
    Tensor::write_safetensors(&tensors, out.join("mempo.safetensors")).context("writing mempo.safetensors")
}
