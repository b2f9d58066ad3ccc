//! The crate from outside: against transformers' numbers, and against itself.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic as tests do")]

mod bad_input;
mod checkpoint;
mod deterministic;
mod encoder;
mod generation;
mod golden;
mod scoring;

use std::path::{Path, PathBuf};

use mempo_model::{Config, DeviceOptions, Model, Runtime};
use tch::{Device, Kind, Tensor};

const CPU: Runtime = Runtime { device: Device::Cpu, kind: Kind::Float, deterministic: false };

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(name: &str) -> Model {
    let _ = DeviceOptions { threads: Some(2), ..DeviceOptions::default() }.resolve().unwrap();
    Model::load(&golden(name), &CPU).unwrap()
}

fn fresh(family: &str, seed: u64, kind: Kind) -> Model {
    fresh_on(family, seed, &Runtime::cpu(kind))
}

/// A small fresh model with a window of 256 and weights large enough to have opinions.
fn fresh_on(family: &str, seed: u64, runtime: &Runtime) -> Model {
    let mut config = Config::load(&golden(family)).unwrap();
    config.initializer_range = 0.3;
    Model::initialise(config, seed, runtime).unwrap()
}

fn ids(seed: u64, count: u64) -> Vec<i32> {
    (0..count).map(|i| (mempo_model::counter_hash(seed, i) % 199) as i32).collect()
}

/// Logits of the whole sequence by a plain forward pass, `[T,V]`, float32.
fn logits(model: &Model, ids: &[i32]) -> Tensor {
    let _guard = tch::no_grad_guard();
    let ids = Tensor::from_slice(ids).to_kind(Kind::Int64).unsqueeze(0);
    model.hidden(&ids).squeeze_dim(0).linear(model.head_weight(), None::<Tensor>).to_kind(Kind::Float)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}
