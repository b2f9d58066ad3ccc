//! Adapters against the gradient of all weights, and against themselves stopped and continued.

use mempo_model::Runtime;

use super::*;
use crate::{LoraOptions, base_of};

fn adapter_options(recompute: bool) -> OptimizerOptions {
    let lora = LoraOptions { lora_rank: Some(3), lora_alpha: Some(4.5), ..LoraOptions::NONE };
    OptimizerOptions { recompute, lora, ..optimizer_options() }
}

/// The model that the trainer would save, read back.
fn saved_model(trainer: &Trainer, tied: bool) -> Model {
    let folder = tempfile::tempdir().unwrap();
    trainer.model().save_weights(folder.path(), Kind::Float).unwrap();
    fs_err::write(folder.path().join("config.json"), config(tied).to_string()).unwrap();
    Model::load(folder.path(), &Runtime::cpu(Kind::Float)).unwrap()
}

#[test]
fn adapters_get_the_gradient_of_the_merged_weights() {
    let content = trajectories(4, 17);
    for (tied, recompute) in [(true, false), (false, true)] {
        let options = adapter_options(recompute);
        let mut trainer = Trainer::new(model(3, tied, Kind::Float), &options, Path::new("base"), None).unwrap();
        assert!(trainer.model().first_other_than(&model(3, tied, Kind::Float)).is_none(), "they begin as nothing");
        for _ in 0..5 {
            trainer.policy_step(&content, &policy_options(), 0.05, 0.8, BUDGET).unwrap();
        }
        for ((name, weight), (_, before)) in
            trainer.model().parameters().iter().zip(model(3, tied, Kind::Float).parameters())
        {
            assert!(weight.equal(before), "{name} is frozen");
        }
        let merged = saved_model(&trainer, tied);
        assert!(
            trainer.model().first_other_than(&model(3, tied, Kind::Float)).is_some_and(|name| name.contains("proj"))
        );
        assert!(trainer.model().first_other_than(&merged).is_none());

        let mut full = Trainer::new(merged, &optimizer_options(), Path::new(""), None).unwrap();
        let (by_weight, full_stats) = policy_gradient(&mut full, &content, &policy_options(), BUDGET);
        let (by_adapter, stats) = policy_gradient(&mut trainer, &content, &policy_options(), BUDGET);
        assert!((stats.loss - full_stats.loss).abs() < 1e-5 * full_stats.loss.abs().max(1.0));
        let of = |name: &str| full.layout.slots.iter().position(|slot| slot.name == name).unwrap();
        let matrix = |place: usize| trainer.layout.slots[place].view(&trainer.optimizer.master);
        let mut expected = Vec::new();
        // W = W0 + s B A, so dA = s Bᵀ dW and dB = s dW Aᵀ; the slots of a layer are A, then B.
        for place in (0..trainer.layout.slots.len()).step_by(2) {
            let layer = trainer.layout.slots[place].name.strip_suffix(".lora_A.weight").unwrap();
            let gradient = &by_weight[of(&format!("{layer}.weight"))];
            expected.push(matrix(place + 1).tr().matmul(gradient) * 1.5);
            expected.push(gradient.matmul(&matrix(place).tr()) * 1.5);
        }
        assert_eq!(by_adapter.len(), 2 * 2 * 7);
        assert_close(&by_adapter, &expected, 2e-5);
    }
}

#[test]
fn adapters_continue_bit_for_bit_and_only_as_adapters() {
    let (content, folder) = (trajectories(3, 5), tempfile::tempdir().unwrap());
    let step = |trainer: &mut Trainer| {
        trainer.policy_step(&content, &policy_options(), 0.05, 1.0, BUDGET).unwrap();
    };
    let new = |options: &OptimizerOptions, state| {
        Trainer::new(model(4, true, Kind::BFloat16), options, Path::new("base"), state)
    };
    let mut straight = new(&adapter_options(false), None).unwrap();
    step(&mut straight);
    straight.save_state(folder.path()).unwrap();
    step(&mut straight);
    let mut continued = new(&adapter_options(false), Some(folder.path())).unwrap();
    step(&mut continued);
    assert_eq!(weights(&continued), weights(&straight));
    assert_eq!(continued.global_step(), 2);
    assert_eq!(base_of(Path::new("checkpoint"), Some(folder.path())).unwrap(), std::path::absolute("base").unwrap());
    let error = new(&optimizer_options(), Some(folder.path())).err().unwrap().to_string();
    assert!(error.contains("the state of adapters, but all weights are to be trained"), "{error}");

    let lora = LoraOptions { lora_targets: vec!["p_proj".to_owned()], ..adapter_options(false).lora };
    let error = new(&OptimizerOptions { lora, ..optimizer_options() }, None).err().unwrap().to_string();
    assert!(error.contains("no linear layer `p_proj`"), "{error}");
}
