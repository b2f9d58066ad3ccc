//! Small models and inputs for the tests.

use std::path::Path;

use mempo_model::{Config, Model, Runtime};
use tch::Kind;

use crate::{
    Aggregation, Beginning, KlEstimator, LoraOptions, Loss, OptimizerOptions, PolicyOptions, PolicySequence,
    PolicyTrajectory, Schedule, StateDtype, TrainSequence,
};

pub(crate) const VOCABULARY: i32 = 41;

pub(crate) fn optimizer_options() -> OptimizerOptions {
    OptimizerOptions {
        learning_rate: 1e-3,
        warmup_ratio: 0.0,
        schedule: Schedule::Constant,
        weight_decay: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
        optimizer_dtype: StateDtype::F32,
        recompute: false,
        lora: LoraOptions::NONE,
    }
}

pub(crate) fn fresh() -> Beginning<'static> {
    Beginning { base: Path::new("base"), seed: 0, state: None }
}

pub(crate) fn policy_options() -> PolicyOptions {
    PolicyOptions {
        clip_low: 0.2,
        clip_high: 0.2,
        dual_clip: 3.0,
        kl_coefficient: 0.05,
        aggregation: Aggregation::TrajectoryMean,
        loss: Loss::PpoClip,
        kl: KlEstimator::K3,
        kl_ratio: false,
        entropy_coefficient: 0.0,
        importance_cap: None,
        loss_length: 100.0,
    }
}

/// Two layers, weights large enough that the probabilities differ.
pub(crate) fn model(seed: u64, tied: bool, kind: Kind) -> Model {
    model_on(seed, tied, &Runtime::cpu(kind))
}

pub(crate) fn model_on(seed: u64, tied: bool, runtime: &Runtime) -> Model {
    let config: Config = serde_json::from_value(config(tied)).unwrap();
    // The tests themselves run side by side.
    tch::set_num_threads(1);
    Model::initialise(config, seed, runtime).unwrap()
}

pub(crate) fn config(tied: bool) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    })
}

/// Numbers in [0, 1) that look random, from a hash of the seed and a count.
pub(crate) struct Numbers {
    seed: u64,
    count: u64,
}

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    pub(crate) fn next(&mut self) -> f32 {
        self.count += 1;
        let mut hash = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.count.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((hash ^ (hash >> 29)) >> 40) as f32 / (1_u64 << 24) as f32
    }

    pub(crate) fn ids(&mut self, count: usize) -> Vec<i32> {
        (0..count).map(|_| (self.next() * VOCABULARY as f32) as i32).collect()
    }
}

/// Trajectories of one to four steps of different lengths, among them a step that is left out, one that counts
/// double and an empty one. Old log-probabilities are about those of a uniform policy.
pub(crate) fn trajectories(count: usize, seed: u64) -> Vec<PolicyTrajectory> {
    let mut numbers = Numbers::new(seed);
    let mut trajectory = |index: usize| PolicyTrajectory {
        steps: (0..=index % 4)
            .map(|step| {
                let tokens = if index == 3 && step == 1 { 0 } else { 1 + (numbers.next() * 9.0) as usize };
                let prompt = 1 + (numbers.next() * 12.0) as usize;
                let mut around = |middle: f32, width: f32| -> Vec<f32> {
                    (0..tokens).map(|_| middle + width * (numbers.next() - 0.5)).collect()
                };
                let (old_logprobs, reference) = (around(-3.7, 2.0), around(-3.7, 4.0));
                PolicySequence {
                    old_logprobs,
                    reference_logprobs: Some(reference),
                    sampling_logprobs: None,
                    advantages: around(0.0, 3.0),
                    prompt_ids: numbers.ids(prompt),
                    completion_ids: numbers.ids(tokens),
                    loss_weight: [1.0, 1.0, 0.0, 2.0][(index + step) % 4],
                }
            })
            .collect(),
    };
    (0..count).map(&mut trajectory).collect()
}

/// Sequences of different lengths with targets scattered over them.
pub(crate) fn train_sequences(count: usize, seed: u64) -> Vec<TrainSequence> {
    let mut numbers = Numbers::new(seed);
    let mut sequence = || {
        let length = 2 + (numbers.next() * 20.0) as usize;
        let targets = (0..length).map(|index| index > 0 && numbers.next() < 0.6).collect();
        TrainSequence { ids: numbers.ids(length), targets }
    };
    (0..count).map(|_| sequence()).collect()
}
