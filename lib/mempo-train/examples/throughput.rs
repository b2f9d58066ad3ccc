//! Speed of supervised training on made-up ids: a model of about 2 million parameters, 64 sequences of 200
//! tokens a step.
//!
//! `cargo run --release -p mempo-train --example throughput -- [f32|bf16] [steps] [tokens per micro-batch]`;
//! `throughput.py` beside it is the same with plain PyTorch.

#![allow(clippy::print_stdout, reason = "an example reports on the terminal")]

use std::time::Instant;

use mempo_model::{Config, DeviceOptions, Model};
use mempo_train::{OptimizerOptions, Schedule, TrainSequence, Trainer};

const SEQUENCES: usize = 64;
const LENGTH: usize = 200;
const VOCABULARY: i32 = 3000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let dtype = words.next().unwrap_or_else(|| "f32".to_owned());
    let steps: usize = words.next().map_or(Ok(10), |word| word.parse())?;
    let tokens_per_micro_batch: usize = words.next().map_or(Ok(16384), |word| word.parse())?;
    let runtime = DeviceOptions { dtype, ..DeviceOptions::default() }.resolve()?;
    let model = Model::initialise(config()?, 0, &runtime)?;
    let parameters: usize = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    let options = OptimizerOptions {
        learning_rate: 1e-3,
        warmup_ratio: 0.0,
        schedule: Schedule::Constant,
        weight_decay: 0.01,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
    };
    let mut trainer = Trainer::new(model, &options, None)?;
    let sequences = sequences();
    let mut best = f64::INFINITY;
    for step in 0..steps {
        let start = Instant::now();
        let stats = trainer.sft_step(&sequences, 1e-3, tokens_per_micro_batch)?;
        let seconds = start.elapsed().as_secs_f64();
        best = best.min(seconds);
        println!("step {step}: loss {:.4}, {seconds:.3} s", stats.loss);
    }
    let rate = (SEQUENCES * LENGTH) as f64 / best;
    println!("{parameters} parameters, {runtime:?}: {rate:.0} tokens/s at best");
    Ok(())
}

fn config() -> Result<Config, serde_json::Error> {
    serde_json::from_value(serde_json::json!({
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
    }))
}

/// Every token but the first is a target.
fn sequences() -> Vec<TrainSequence> {
    let id = |number: usize| (number.wrapping_mul(2_654_435_761) >> 7) as i32 & i32::MAX;
    let sequence = |row: usize| TrainSequence {
        ids: (0..LENGTH).map(|column| id(row * LENGTH + column) % VOCABULARY).collect(),
        targets: (0..LENGTH).map(|column| column > 0).collect(),
    };
    (0..SEQUENCES).map(sequence).collect()
}
