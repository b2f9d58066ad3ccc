//! The whole trainer against autograd, against itself cut differently, and against itself stopped and continued.

mod adapters;
mod repacking;

use tch::{Kind, Tensor};

use super::*;
use crate::testing::{Numbers, config, fresh, model, optimizer_options, policy_options, train_sequences, trajectories};
use crate::{Aggregation, PolicySequence, StateDtype, verify_state};

const BUDGET: usize = 64;

fn trainer(seed: u64, tied: bool, kind: Kind) -> Trainer {
    Trainer::new(model(seed, tied, kind), &optimizer_options(), &fresh()).unwrap()
}

/// The accumulated gradient, parameter after parameter; cleared.
fn take_gradient(trainer: &mut Trainer) -> Vec<Tensor> {
    let flat = trainer.optimizer.gradient.copy();
    let _ = trainer.optimizer.gradient.zero_();
    trainer.layout.slots.iter().map(|slot| slot.view(&flat)).collect()
}

fn policy_gradient(
    trainer: &mut Trainer,
    trajectories: &[PolicyTrajectory],
    options: &PolicyOptions,
    budget: usize,
) -> (Vec<Tensor>, PolicyStats) {
    let sums = trainer.accumulate_policy(trajectories, options, 0.8, budget).unwrap();
    (take_gradient(trainer), sums.stats(options, 0.0))
}

fn supervised_gradient(trainer: &mut Trainer, sequences: &[TrainSequence]) -> Vec<Tensor> {
    let (prepared, _) = trainer.supervised(sequences).unwrap();
    let pass = Pass { temperature: 1.0, tokens_per_micro_batch: BUDGET, entropy: false };
    let coefficients = |columns: &Tensor| Coefficients { logprob: -columns.select(1, 0), entropy: None };
    trainer.backward().run(&prepared, &pass, &mut |_, columns| coefficients(columns)).unwrap();
    take_gradient(trainer)
}

fn assert_close(found: &[Tensor], expected: &[Tensor], tolerance: f64) {
    let norm = |tensors: &mut dyn Iterator<Item = Tensor>| -> f64 {
        tensors.map(|tensor| tensor.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
    };
    let size = norm(&mut expected.iter().map(Tensor::shallow_clone));
    let error = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    assert!(size > 1e-3, "a gradient of {size} shows nothing");
    assert!(error < tolerance * size, "off by {error} of {size}");
}

/// Log-probabilities of one step's completion, by plain operations.
fn plain_logprobs(trainer: &Trainer, step: &PolicySequence, temperature: f64) -> Tensor {
    let ids: Vec<i64> = step.prompt_ids.iter().chain(&step.completion_ids).map(|&id| i64::from(id)).collect();
    let ids = Tensor::from_slice(&ids).unsqueeze(0);
    let logits = trainer.model.hidden(&ids).matmul(&trainer.model.head_weight().tr()).squeeze_dim(0);
    let (start, length) = (step.prompt_ids.len() as i64, step.completion_ids.len() as i64);
    let targets = ids.squeeze_dim(0).narrow(0, start, length).unsqueeze(1);
    let rows = logits.narrow(0, start - 1, length) / temperature;
    rows.log_softmax(-1, Kind::Float).gather(1, &targets, false).squeeze_dim(1)
}

fn weighted_tokens(trajectory: &PolicyTrajectory) -> f64 {
    let mut tokens = 0.0;
    for step in &trajectory.steps {
        tokens += step.completion_ids.len() as f64 * f64::from(step.loss_weight);
    }
    tokens
}

/// The definition of the loss, step by step, left to autograd.
fn autograd_policy(
    trainer: &Trainer,
    trajectories: &[PolicyTrajectory],
    options: &PolicyOptions,
) -> (Vec<Tensor>, f64) {
    let weights: Vec<f64> = trajectories.iter().map(weighted_tokens).collect();
    let counted = weights.iter().filter(|&&weight| weight > 0.0).count() as f64;
    let mut loss = Tensor::from(0.0);
    for (trajectory, weight) in trajectories.iter().zip(&weights).filter(|(_, weight)| **weight > 0.0) {
        let denominator = match options.aggregation {
            Aggregation::TrajectoryMean => counted * weight,
            Aggregation::TokenMean => weights.iter().sum(),
            other => panic!("{other:?} is held to the golden files"),
        };
        for step in trajectory.steps.iter().filter(|step| !step.completion_ids.is_empty()) {
            let terms = plain_terms(&plain_logprobs(trainer, step, 0.8), step, options);
            loss += terms.sum(Kind::Double) * f64::from(step.loss_weight) / denominator;
        }
    }
    let leaves: Vec<&Tensor> = trainer.model.parameters().iter().map(|(_, tensor)| tensor).collect();
    (Tensor::run_backward(&[&loss], &leaves, false, false), loss.double_value(&[]))
}

fn plain_terms(logprobs: &Tensor, step: &PolicySequence, options: &PolicyOptions) -> Tensor {
    let old = Tensor::from_slice(&step.old_logprobs);
    let reference = Tensor::from_slice(step.reference_logprobs.as_ref().unwrap());
    let advantage = Tensor::from_slice(&step.advantages);
    let ratio = (logprobs - old).clamp(-20.0, 20.0).exp();
    let clipped = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high);
    let loss = (-&advantage * &ratio).maximum(&(-&advantage * clipped));
    let limited = loss.minimum(&(-&advantage * options.dual_clip));
    let policy = limited.where_self(&advantage.lt(0.0), &loss);
    let difference = (reference - logprobs).clamp(-20.0, 20.0);
    let kl = (difference.exp() - &difference - 1.0).clamp(-10.0, 10.0);
    policy + kl * options.kl_coefficient
}

#[test]
fn policy_gradient_equals_autograd() {
    let trajectories = trajectories(9, 5);
    for (tied, aggregation) in
        [(true, Aggregation::TrajectoryMean), (false, Aggregation::TrajectoryMean), (true, Aggregation::TokenMean)]
    {
        let options = PolicyOptions { aggregation, ..policy_options() };
        let mut trainer = trainer(1, tied, Kind::Float);
        let (expected, loss) = autograd_policy(&trainer, &trajectories, &options);
        let (found, stats) = policy_gradient(&mut trainer, &trajectories, &options, BUDGET);
        assert!((stats.loss - loss).abs() < 1e-5 * loss.abs(), "{stats:?}, expected {loss}");
        assert!(stats.clip_fraction > 0.1 && stats.clip_fraction < 0.9, "{stats:?}");
        assert_close(&found, &expected, 1e-5);
    }
}

#[test]
fn the_cut_into_micro_batches_changes_nothing() {
    let mut trainer = trainer(2, true, Kind::Float);
    let trajectories = trajectories(8, 6);
    let (expected, stats) = policy_gradient(&mut trainer, &trajectories, &policy_options(), 1_000_000);
    for budget in [1, 30, 100] {
        let (found, cut) = policy_gradient(&mut trainer, &trajectories, &policy_options(), budget);
        assert_close(&found, &expected, 1e-5);
        assert!((cut.loss - stats.loss).abs() < 1e-6 && cut.tokens == stats.tokens);
    }
    let sequences = train_sequences(12, 7);
    let loss = trainer.validation_loss(&sequences, 1_000_000).unwrap();
    assert!((trainer.validation_loss(&sequences, 30).unwrap() - loss).abs() < 1e-5);
    let mut other = self::trainer(2, true, Kind::Float);
    let whole = trainer.sft_step(&sequences, 1e-3, 1_000_000).unwrap();
    let cut = other.sft_step(&sequences, 1e-3, 30).unwrap();
    assert!((whole.loss - cut.loss).abs() < 1e-5 && (whole.loss - loss).abs() < 1e-5);
    assert!((whole.gradient_norm / cut.gradient_norm - 1.0).abs() < 1e-5);
}

#[test]
fn packed_sequences_have_the_gradient_of_padded_ones() {
    for recompute in [false, true] {
        let options = OptimizerOptions { recompute, ..optimizer_options() };
        let mut trainer = Trainer::new(model(2, true, Kind::Float), &options, &fresh()).unwrap();
        let trajectories = trajectories(8, 6);
        let (expected, stats) = policy_gradient(&mut trainer, &trajectories, &policy_options(), BUDGET);
        trainer.arrangement = Arrangement::Packed;
        for budget in [1, 30, 1000] {
            let (found, packed) = policy_gradient(&mut trainer, &trajectories, &policy_options(), budget);
            assert_close(&found, &expected, 1e-5);
            assert!((packed.loss - stats.loss).abs() < 1e-6 && packed.tokens == stats.tokens);
        }
    }
}

#[test]
fn supervised_gradient_equals_autograd() {
    for (tied, recompute) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut trainer = trainer(4, tied, Kind::Float);
        trainer.options.recompute = recompute;
        let sequences = train_sequences(7, 9);
        let mut logprobs = Vec::new();
        for sequence in &sequences {
            let ids: Vec<i64> = sequence.ids.iter().map(|&id| i64::from(id)).collect();
            let ids = Tensor::from_slice(&ids).unsqueeze(0);
            let logits = trainer.model.hidden(&ids).matmul(&trainer.model.head_weight().tr()).squeeze_dim(0);
            let all = logits.log_softmax(-1, Kind::Float);
            for index in (0..sequence.ids.len()).filter(|&index| sequence.targets[index]) {
                logprobs.push(all.get(index as i64 - 1).get(i64::from(sequence.ids[index])));
            }
        }
        let loss = -Tensor::stack(&logprobs, 0).mean(Kind::Float);
        let leaves: Vec<&Tensor> = trainer.model.parameters().iter().map(|(_, tensor)| tensor).collect();
        let expected = Tensor::run_backward(&[&loss], &leaves, false, false);
        assert_eq!(trainer.supervised(&sequences).unwrap().1, logprobs.len() as u64);
        assert_close(&supervised_gradient(&mut trainer, &sequences), &expected, 1e-5);
        let stats = trainer.sft_step(&sequences, 0.0, BUDGET).unwrap();
        assert!((stats.loss - loss.double_value(&[])).abs() < 1e-5);
    }
}

#[test]
fn recomputed_layers_train_to_the_same_weights_in_bf16() {
    let train = |recompute: bool| {
        let mut trainer = trainer(4, true, Kind::BFloat16);
        trainer.options.recompute = recompute;
        let losses: Vec<f64> =
            (0..5).map(|_| trainer.sft_step(&train_sequences(7, 9), 1e-2, BUDGET).unwrap().loss).collect();
        (losses, trainer.optimizer.master.copy())
    };
    let ((losses, plain), (found, recomputed)) = (train(false), train(true));
    assert!(losses[4] < losses[0], "{losses:?}");
    for (a, b) in losses.iter().zip(&found) {
        assert!((a - b).abs() < 1e-3, "{losses:?} {found:?}");
    }
    let difference = ((&plain - &recomputed).norm() / plain.norm()).double_value(&[]);
    assert!(difference < 1e-2, "{difference}");
}

/// On policy, with the reference equal to the policy too, only the score function is left: `-Σ w A ∇lp`.
#[test]
fn on_policy_the_gradient_is_that_of_reinforce() {
    let mut trainer = trainer(5, true, Kind::Float);
    let mut trajectories = trajectories(6, 10);
    let mut loss = Tensor::from(0.0);
    for trajectory in &mut trajectories {
        let tokens = weighted_tokens(trajectory);
        for step in trajectory.steps.iter_mut().filter(|step| !step.completion_ids.is_empty()) {
            let logprobs = plain_logprobs(&trainer, step, 0.8);
            step.old_logprobs = Vec::try_from(logprobs.detach()).unwrap();
            step.reference_logprobs = Some(step.old_logprobs.clone());
            if step.loss_weight > 0.0 {
                let weighted = (logprobs * Tensor::from_slice(&step.advantages)).sum(Kind::Double);
                loss -= weighted * f64::from(step.loss_weight) / tokens;
            }
        }
    }
    let counted = trajectories.iter().filter(|trajectory| weighted_tokens(trajectory) > 0.0).count() as f64;
    let leaves: Vec<&Tensor> = trainer.model.parameters().iter().map(|(_, tensor)| tensor).collect();
    let expected = Tensor::run_backward(&[&(loss / counted)], &leaves, false, false);
    let (found, stats) = policy_gradient(&mut trainer, &trajectories, &policy_options(), BUDGET);
    assert_close(&found, &expected, 1e-5);
    assert!((stats.ratio_mean - 1.0).abs() < 1e-5 && (stats.ratio_max - 1.0).abs() < 1e-5, "{stats:?}");
    assert!(stats.kl.unwrap().abs() < 1e-9 && stats.clip_fraction == 0.0, "{stats:?}");

    let before = trainer.optimizer.master.copy();
    let options = PolicyOptions { kl_coefficient: 0.0, ..policy_options() };
    trainer.policy_step(&trajectories, &options, 0.0, 0.8, BUDGET).unwrap();
    assert_eq!(trainer.optimizer.master, before, "a learning rate of 0 moves nothing");
}

/// Steps long enough, and a model wide enough, for libtorch to divide operations between threads.
fn long_trajectories(model: &Model) -> Vec<PolicyTrajectory> {
    let mut numbers = Numbers::new(4);
    let mut step = |prompt: usize, tokens: usize| PolicySequence {
        prompt_ids: numbers.ids(prompt),
        completion_ids: numbers.ids(tokens),
        old_logprobs: Vec::new(),
        reference_logprobs: None,
        sampling_logprobs: None,
        advantages: (0..tokens).map(|place| (place as f32).sin()).collect(),
        loss_weight: 1.0,
    };
    let mut steps = vec![step(70, 50), step(13, 100), step(30, 9), step(90, 31), step(5, 5)];
    let scored = |step: &PolicySequence| mempo_model::ScoredSequence {
        ids: [step.prompt_ids.as_slice(), &step.completion_ids].concat(),
        targets: step.prompt_ids.len()..step.prompt_ids.len() + step.completion_ids.len(),
    };
    let scored: Vec<_> = steps.iter().map(scored).collect();
    let options = mempo_model::ScoreOptions { temperature: 0.8, tokens_per_batch: 300 };
    for (step, logprobs) in steps.iter_mut().zip(model.completion_logprobs(&scored, &options).unwrap()) {
        step.old_logprobs = logprobs;
    }
    let rest = steps.split_off(2);
    vec![PolicyTrajectory { steps }, PolicyTrajectory { steps: rest }]
}

#[test]
fn deterministic_training_depends_neither_on_micro_batches_nor_on_threads() {
    let mut config = config(true);
    for (key, value) in [("hidden_size", 192), ("intermediate_size", 520), ("vocab_size", 900)] {
        config[key] = value.into();
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        let run = |threads: i32, budget: usize, recompute: bool| {
            tch::set_num_threads(threads);
            let runtime = mempo_model::Runtime { deterministic: true, ..mempo_model::Runtime::cpu(kind) };
            let model = Model::initialise(serde_json::from_value(config.clone()).unwrap(), 8, &runtime).unwrap();
            let trajectories = long_trajectories(&model);
            let options = OptimizerOptions { recompute, ..optimizer_options() };
            let mut trainer = Trainer::new(model, &options, &fresh()).unwrap();
            let options = PolicyOptions { kl_coefficient: 0.0, ..policy_options() };
            let stats: Vec<PolicyStats> =
                (0..2).map(|_| trainer.policy_step(&trajectories, &options, 1e-3, 0.8, budget).unwrap()).collect();
            let ratios = [stats[0].ratio_max, stats[0].ratio_mean].map(f64::to_bits);
            assert_eq!(ratios, [1_f64.to_bits(); 2], "{kind:?}: {:?}", stats[0]);
            (stats, weights(&trainer))
        };
        let expected = run(1, 1000, false);
        for (threads, budget, recompute) in [(2, 1, false), (3, 100_000, false), (5, 200, true)] {
            assert_eq!(run(threads, budget, recompute), expected, "{kind:?}, {threads} threads, budget {budget}");
        }
    }
}

fn weights(trainer: &Trainer) -> Vec<Tensor> {
    let parameters = trainer.model.parameters().iter().map(|(_, tensor)| tensor.detach().copy());
    parameters.chain([trainer.optimizer.master.copy()]).collect()
}

#[test]
fn a_saved_state_continues_bit_for_bit() {
    for (kind, optimizer_dtype) in
        [(Kind::Float, StateDtype::F32), (Kind::BFloat16, StateDtype::F32), (Kind::BFloat16, StateDtype::Bf16)]
    {
        let options = OptimizerOptions { optimizer_dtype, ..optimizer_options() };
        let folder = tempfile::tempdir().unwrap();
        let step = |trainer: &mut Trainer, number: u64| {
            let sequences = train_sequences(5, number);
            trainer.sft_step(&sequences, 1e-3, BUDGET).unwrap();
            trainer.policy_step(&trajectories(5, number), &policy_options(), 1e-3, 1.0, BUDGET).unwrap();
        };
        let mut straight = Trainer::new(model(6, true, kind), &options, &fresh()).unwrap();
        step(&mut straight, 1);
        straight.save_state(folder.path()).unwrap();
        verify_state(straight.model(), folder.path()).unwrap();
        // Another model's weights: all that counts is the state.
        let other = model(99, true, kind);
        let message = verify_state(&other, folder.path()).unwrap_err().to_string();
        assert!(message.contains("master.safetensors") && message.contains("--fresh-optimizer"), "{message}");
        let mut continued =
            Trainer::new(other, &options, &Beginning { state: Some(folder.path()), ..fresh() }).unwrap();
        assert_eq!(continued.global_step(), 2);
        for number in [2, 3] {
            step(&mut straight, number);
            step(&mut continued, number);
        }
        assert_eq!(weights(&continued), weights(&straight));
        assert_eq!(continued.global_step(), 6);
    }
}

#[test]
fn a_damaged_or_foreign_state_is_refused_by_file() {
    let folder = tempfile::tempdir().unwrap();
    trainer(7, true, Kind::Float).save_state(folder.path()).unwrap();
    let error = |tied| match Trainer::new(
        model(7, tied, Kind::Float),
        &optimizer_options(),
        &Beginning { state: Some(folder.path()), ..fresh() },
    ) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    let message = error(false);
    assert!(message.contains("master.safetensors") && message.contains("lm_head.weight is missing"), "{message}");
    let path = folder.path().join("second_moment.safetensors");
    let mut bytes = fs_err::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs_err::write(&path, bytes).unwrap();
    let message = error(true);
    assert!(message.contains("second_moment.safetensors") && message.contains("SHA-256"), "{message}");
}

/// Gradient and moments in bf16 lose digits, not what is learnt: over many steps the weights go where those of fp32 go.
#[test]
fn optimizer_state_in_bf16_learns_what_that_in_fp32_learns() {
    let train = |optimizer_dtype: StateDtype| {
        let options = OptimizerOptions { optimizer_dtype, ..optimizer_options() };
        let mut trainer = Trainer::new(model(4, true, Kind::BFloat16), &options, &fresh()).unwrap();
        let start = trainer.optimizer.master.copy();
        let losses: Vec<f64> =
            (0..60).map(|_| trainer.sft_step(&train_sequences(7, 9), 3e-3, BUDGET).unwrap().loss).collect();
        assert_eq!(trainer.optimizer.gradient.kind(), optimizer_dtype.kind());
        (losses, &trainer.optimizer.master - start)
    };
    let ((losses, exact), (found, rounded)) = (train(StateDtype::F32), train(StateDtype::Bf16));
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
    assert!((losses[59] - found[59]).abs() < 0.05 * losses[0], "{losses:?} {found:?}");
    let cosine = (&exact * &rounded).sum(Kind::Double) / (exact.norm() * rounded.norm()).to_kind(Kind::Double);
    assert!(cosine.double_value(&[]) > 0.9, "{cosine:?}");
}

/// bf16 has 8 bits: a step of 1e-6 on a weight of 0.3 is a thousandth of the gap to the next number.
#[test]
fn small_learning_rates_add_up_in_bf16() {
    let mut trainer = trainer(8, true, Kind::BFloat16);
    let sequences = train_sequences(4, 11);
    let start = weights(&trainer);
    trainer.sft_step(&sequences, 1e-6, BUDGET).unwrap();
    let first = weights(&trainer);
    assert_ne!(first.last(), start.last(), "the master weights move at once");
    for _ in 0..150 {
        trainer.sft_step(&sequences, 1e-6, BUDGET).unwrap();
    }
    let end = weights(&trainer);
    let moved = |from: &[Tensor]| -> i64 {
        end.iter()
            .zip(from)
            .take(end.len() - 1)
            .map(|(end, from)| end.ne_tensor(from).sum(Kind::Int64).int64_value(&[]))
            .sum()
    };
    assert!(moved(&first) > 100, "only {} rounded weights moved", moved(&first));
    let change = (end.last().unwrap() - start.last().unwrap()).abs().max().double_value(&[]);
    assert!((1e-4..1e-3).contains(&change), "150 steps of 1e-6 moved {change}");
}

#[test]
fn three_bad_gradients_in_a_row_stop_the_training() {
    let mut trainer = trainer(9, true, Kind::Float);
    let good = trajectories(4, 12);
    let mut bad = good.clone();
    for step in bad.iter_mut().flat_map(|trajectory| &mut trajectory.steps) {
        step.advantages.fill(-3e38);
        step.old_logprobs.fill(-18.0);
    }
    let options = PolicyOptions { dual_clip: f64::INFINITY, ..policy_options() };
    let before = weights(&trainer);
    let step = |trainer: &mut Trainer, content: &[PolicyTrajectory]| {
        trainer.policy_step(content, &options, 1e-3, 1.0, BUDGET).map(|stats| stats.skipped)
    };
    assert!(step(&mut trainer, &bad).unwrap());
    assert!(step(&mut trainer, &bad).unwrap());
    assert_eq!(weights(&trainer), before);
    assert!(!step(&mut trainer, &good).unwrap(), "a good step starts the count anew");
    assert!(step(&mut trainer, &bad).unwrap());
    assert!(step(&mut trainer, &bad).unwrap());
    let message = step(&mut trainer, &bad).unwrap_err().to_string();
    assert!(message.contains("3 optimizer steps in a row (up to step 6)"), "{message}");
    assert_eq!(trainer.skipped_steps(), 5);
}

/// What is done to one step of good input.
type Change<'a> = &'a dyn Fn(&mut PolicySequence);

#[test]
fn malformed_input_is_refused_by_place() {
    let mut trainer = trainer(10, true, Kind::Float);
    let mut message = |change: Change| {
        let mut content = trajectories(5, 13);
        change(&mut content[3].steps[2]);
        trainer.policy_step(&content, &policy_options(), 1e-3, 1.0, BUDGET).unwrap_err().to_string()
    };
    let cases: [(Change, &str); 5] = [
        (&|step| step.reference_logprobs = None, "trajectory 3, step 2: no reference log-probabilities"),
        (&|step| step.advantages.push(1.0), "advantages for"),
        (&|step| step.old_logprobs[0] = f32::NAN, "old log-probabilities: value 0 is NaN"),
        (&|step| step.prompt_ids.clear(), "the prompt is empty"),
        (&|step| step.completion_ids[0] = 41, "id 41 is outside the model's vocabulary of 41"),
    ];
    for (change, expected) in cases {
        let found = message(change);
        assert!(found.contains(expected), "{found}");
    }
    let first = TrainSequence { ids: vec![1, 2], targets: vec![true, true] };
    let message = trainer.sft_step(&[first], 1e-3, BUDGET).unwrap_err().to_string();
    assert!(message.contains("sequence 0: its first id is a target"), "{message}");
}

#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let trainer = trainer(1, true, Kind::Float);
    trainer.save_state(folder.path()).unwrap();
    let before = fs_err::read(folder.path().join("state.json")).unwrap();
    let _ = trainer.optimizer.master.get(5).fill_(f64::INFINITY);
    let error = trainer.save_state(folder.path()).unwrap_err();
    assert!(error.is_not_finite() && error.to_string().contains("nothing was saved"), "{error}");
    assert_eq!(fs_err::read(folder.path().join("state.json")).unwrap(), before);
}
