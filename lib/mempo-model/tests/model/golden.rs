//! transformers' own numbers (`tests/golden/make.py`).

use std::collections::HashMap;

use mempo_model::{
    Config, GenerateOptions, GenerateRequest, Model, Runtime, ScoreOptions, ScoredSequence, generate_each,
};
use tch::{Kind, Tensor};

use crate::{golden, largest_difference, load, logits};

/// One a family, and one with stretched positions.
const MODELS: [&str; 4] = ["qwen2", "qwen3", "llama", "llama3"];

fn expected(name: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(golden(name).join("expected.safetensors")).unwrap().into_iter().collect()
}

fn rows(ids: &Tensor) -> Vec<Vec<i32>> {
    let row = |row| Vec::<i64>::try_from(ids.get(row)).unwrap().iter().map(|id| *id as i32).collect();
    (0..ids.size()[0]).map(row).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    for name in MODELS {
        let (model, expected) = (load(name), expected(name));
        for (row, ids) in rows(&expected["ids"]).iter().enumerate() {
            let difference = largest_difference(&logits(&model, ids), &expected["logits"].get(row as i64));
            assert!(difference < 1e-4, "{name}: {difference}");
        }
    }
}

#[test]
fn logprobs_are_those_of_transformers() {
    for name in MODELS {
        let (model, expected) = (load(name), expected(name));
        let sequences: Vec<ScoredSequence> =
            rows(&expected["ids"]).into_iter().map(|ids| ScoredSequence { ids, targets: 1..40 }).collect();
        let options = ScoreOptions { temperature: 0.7, tokens_per_batch: 100 };
        let found: Vec<f32> = model.completion_logprobs(&sequences, &options).unwrap().concat();
        let difference = largest_difference(&Tensor::from_slice(&found), &expected["logprobs"].flatten(0, 1));
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

#[test]
fn greedy_ids_are_those_of_transformers() {
    for name in MODELS {
        let (model, expected) = (load(name), expected(name));
        let ids = rows(&expected["ids"]);
        let requests = [&ids[0][..9], &ids[1][..21]].map(|prompt| GenerateRequest {
            session: 0,
            prompt_ids: prompt.to_vec(),
            seed: 0,
        });
        let options = GenerateOptions {
            temperature: 0.0,
            top_p: 1.0,
            max_tokens: 64,
            banned_ids: Vec::new(),
            end_ids: Vec::new(),
            vocabulary_limit: 199,
            max_rows: 2,
        };
        let found = generate_each(&model, &requests, &options, &mut |_, _| false).unwrap();
        let found: Vec<Vec<i32>> = found.into_iter().map(|generated| generated.ids).collect();
        assert_eq!(found, rows(&expected["greedy"]), "{name}");
    }
}

#[test]
fn gradients_are_those_of_transformers() {
    for name in MODELS {
        let (mut model, expected) = (load(name), expected(name));
        let leaf = |tensor: &Tensor| tensor.detach().copy().set_requires_grad(true);
        let leaves: Vec<Tensor> = model.parameters().iter().map(|(_, tensor)| leaf(tensor)).collect();
        model.bind_parameters(leaves);
        let logits = model.hidden(&expected["ids"]).linear(model.head_weight(), None::<Tensor>);
        let targets = expected["ids"].narrow(1, 1, 39).flatten(0, 1);
        logits.narrow(1, 0, 39).flatten(0, 1).cross_entropy_for_logits(&targets).backward();
        let mut compared = 0;
        for (parameter, tensor) in model.parameters() {
            assert!(tensor.grad().defined(), "{name}: {parameter} has no gradient");
            if let Some(gradient) = expected.get(&format!("gradient.{parameter}")) {
                let difference = largest_difference(&tensor.grad(), gradient);
                assert!(difference < 1e-5, "{name}: {parameter}: {difference}");
                compared += 1;
            }
        }
        assert_eq!(compared, expected.keys().filter(|key| key.starts_with("gradient.")).count(), "{name}");
    }
}

/// What thirty layers add up is not rounded each time: with sums in bf16 the error would be 0.0105.
#[test]
fn deep_models_in_bf16_stay_near_f32() {
    let mut config = Config::load(&golden("llama")).unwrap();
    config.num_hidden_layers = 30;
    let rounded = Model::initialise(config.clone(), 3, &Runtime::cpu(Kind::BFloat16)).unwrap();
    let mut exact = Model::initialise(config, 3, &Runtime::cpu(Kind::Float)).unwrap();
    exact.bind_parameters(rounded.parameters().iter().map(|(_, tensor)| tensor.to_kind(Kind::Float)).collect());
    let ids = Tensor::from_slice(&crate::ids(4, 200)).to_kind(Kind::Int64).unsqueeze(0);
    let hidden = |model: &Model| tch::no_grad(|| model.hidden(&ids)).to_kind(Kind::Double);
    let (found, expected) = (hidden(&rounded), hidden(&exact));
    let error = ((found - &expected).norm() / expected.norm()).double_value(&[]);
    assert!(error < 0.008, "{error}");
}

/// Joined projections are a shortcut of separate ones, and see updates made in place.
#[test]
fn bound_views_of_a_flat_buffer_compute_the_same_and_follow_it() {
    for name in MODELS {
        let mut model = load(name);
        let ids = crate::ids(5, 30);
        let before = logits(&model, &ids);
        let flat =
            Tensor::cat(&model.parameters().iter().map(|(_, tensor)| tensor.flatten(0, -1)).collect::<Vec<_>>(), 0);
        let bind = |model: &mut Model, requires_grad: bool| {
            let mut start = 0;
            let view = |tensor: &Tensor| {
                start += tensor.numel() as i64;
                flat.narrow(0, start - tensor.numel() as i64, tensor.numel() as i64)
                    .view_as(tensor)
                    .set_requires_grad(requires_grad)
            };
            let views = model.parameters().iter().map(|(_, tensor)| tensor).map(view).collect();
            model.bind_parameters(views);
        };
        for requires_grad in [false, true] {
            bind(&mut model, requires_grad);
            assert!(largest_difference(&logits(&model, &ids), &before) < 1e-5, "{name}");
        }
        let _ = tch::no_grad(|| flat.shallow_clone().g_mul_scalar_(1.1));
        let separate = logits(&model, &ids);
        bind(&mut model, false);
        let _ = tch::no_grad(|| flat.shallow_clone().g_mul_scalar_(0.5).g_mul_scalar_(2.0));
        assert!(largest_difference(&separate, &before) > 0.1 && separate.kind() == Kind::Float, "{name}");
        assert!(largest_difference(&logits(&model, &ids), &separate) < 1e-4, "{name}");
    }
}
