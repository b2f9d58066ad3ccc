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
        let mut trainer = Trainer::new(model(3, tied, Kind::Float), &options, &fresh()).unwrap();
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

        let mut full = Trainer::new(merged, &optimizer_options(), &fresh()).unwrap();
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
        Trainer::new(model(4, true, Kind::BFloat16), options, &Beginning { state, ..fresh() })
    };
    let mut straight = new(&adapter_options(false), None).unwrap();
    step(&mut straight);
    straight.save_state(folder.path()).unwrap();
    step(&mut straight);
    let mut continued = new(&adapter_options(false), Some(folder.path())).unwrap();
    step(&mut continued);
    assert_eq!(weights(&continued), weights(&straight));
    assert_eq!(continued.global_step(), 2);
    assert_eq!(base_of(folder.path()).unwrap(), Some("base".into()));
    let with = |change: &dyn Fn(&mut LoraOptions)| {
        let mut options = adapter_options(false);
        change(&mut options.lora);
        new(&options, Some(folder.path())).err().unwrap().to_string()
    };
    let error = with(&|lora| *lora = LoraOptions::NONE);
    assert!(error.contains("adapters were trained; give the same --lora-rank"), "{error}");
    let error = with(&|lora| lora.lora_alpha = Some(9.0));
    assert!(error.contains("it was trained with --lora-rank 3 --lora-alpha 4.5 --lora-targets q_proj,"), "{error}");
    for nowhere in ["p_proj", "lm_head", "embed_tokens"] {
        let error = with(&|lora| lora.lora_targets = vec![nowhere.to_owned()]);
        assert!(error.contains(&format!("no linear layer `{nowhere}`")), "{error}");
    }
    assert!(with(&|lora| lora.lora_alpha = Some(0.0)).contains("--lora-alpha is 0"));
}
