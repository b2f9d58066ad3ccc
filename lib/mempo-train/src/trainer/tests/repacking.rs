//! How the tokens of trajectories are cut into sequences and micro-batches never changes the gradient, nor do tokens that
//! are not to be learnt.

use clap::ValueEnum;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

use super::*;
use crate::KlEstimator;

/// Losses and averages that know tokens and trajectories only; for `gspo-step` and `sequence-mean` a step is the unit.
const LOSSES: [Loss; 4] = [Loss::PpoClip, Loss::GspoTrajectory, Loss::Cispo, Loss::Reinforce];
const AGGREGATIONS: [Aggregation; 3] = [Aggregation::TrajectoryMean, Aggregation::TokenMean, Aggregation::Constant];

/// Cuts each step's completion in two sequences, the second first: the same tokens after the same ids before them.
fn split(trajectory: &PolicyTrajectory, numbers: &mut Numbers) -> PolicyTrajectory {
    let halves = |step: &PolicySequence| {
        let length = step.completion_ids.len();
        let middle = (numbers.next() * length as f32) as usize;
        let part = |range: std::ops::Range<usize>| {
            let values = |all: &Vec<f32>| all[range.clone()].to_vec();
            PolicySequence {
                prompt_ids: [step.prompt_ids.as_slice(), &step.completion_ids[..range.start]].concat(),
                completion_ids: step.completion_ids[range.clone()].to_vec(),
                old_logprobs: values(&step.old_logprobs),
                reference_logprobs: step.reference_logprobs.as_ref().map(values),
                sampling_logprobs: step.sampling_logprobs.as_ref().map(values),
                advantages: values(&step.advantages),
                loss_weight: step.loss_weight,
            }
        };
        [part(middle..length), part(0..middle)].into_iter().filter(|part| !part.completion_ids.is_empty())
    };
    PolicyTrajectory { steps: trajectory.steps.iter().flat_map(halves).collect() }
}

/// Trajectories with log-probabilities of sampling that are not quite the old policy's.
fn sampled(seed: u64) -> Vec<PolicyTrajectory> {
    let mut content = trajectories(6, seed);
    let mut numbers = Numbers::new(seed + 1);
    for step in content.iter_mut().flat_map(|trajectory| &mut trajectory.steps) {
        let near = step.old_logprobs.iter().map(|old| old + numbers.next() - 0.5);
        step.sampling_logprobs = Some(near.collect());
    }
    content
}

fn close(
    trainer: &mut Trainer,
    [left, right]: [&[PolicyTrajectory]; 2],
    options: &PolicyOptions,
    budget: usize,
) -> bool {
    let (expected, stats) = policy_gradient(trainer, left, options, BUDGET);
    let (found, other) = policy_gradient(trainer, right, options, budget);
    let norm = |tensors: &mut dyn Iterator<Item = Tensor>| -> f64 {
        tensors.map(|tensor| tensor.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
    };
    let size = norm(&mut expected.iter().map(Tensor::shallow_clone));
    let error = norm(&mut found.iter().zip(&expected).map(|(found, expected)| found - expected));
    size > 1e-3 && error < 1e-5 * size && (stats.loss - other.loss).abs() < 1e-5 * stats.loss.abs().max(1.0)
}

proptest! {
    // The same cases every time: one in some thousands has a ratio so close to a bound that the last bit decides.
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), ..ProptestConfig::with_cases(64) })]

    #[test]
    fn splitting_and_repacking_steps_changes_nothing(
        seed in 0_u64..10_000,
        loss in select(&LOSSES[..]),
        aggregation in select(&AGGREGATIONS[..]),
        kl in select(KlEstimator::value_variants()),
        kl_ratio: bool,
        entropy_coefficient in select(&[0.0, 0.02][..]),
        importance_cap in select(&[None, Some(1.2)][..]),
        budget in 1_usize..200,
    ) {
        let options =
            PolicyOptions { loss, kl, kl_ratio, entropy_coefficient, importance_cap, aggregation, ..policy_options() };
        let (mut numbers, content) = (Numbers::new(seed), sampled(seed));
        let pieces: Vec<PolicyTrajectory> = content.iter().map(|trajectory| split(trajectory, &mut numbers)).collect();
        let mut trainer = trainer(seed, true, Kind::Float);
        prop_assert!(close(&mut trainer, [&content, &pieces], &options, budget));
    }

    #[test]
    fn steps_of_no_weight_have_no_gradient(
        seed in 0_u64..10_000,
        loss in select(Loss::value_variants()),
        aggregation in select(Aggregation::value_variants()),
        budget in 1_usize..200,
    ) {
        let options = PolicyOptions { loss, aggregation, ..policy_options() };
        let (mut numbers, content) = (Numbers::new(seed + 7), sampled(seed));
        let mut others = content.clone();
        for step in others.iter_mut().flat_map(|trajectory| &mut trajectory.steps) {
            if step.loss_weight <= 0.0 {
                step.completion_ids = numbers.ids(step.completion_ids.len());
                step.advantages.iter_mut().for_each(|advantage| *advantage = 1e3 * numbers.next());
            }
        }
        prop_assert_ne!(&content, &others);
        let mut trainer = trainer(seed, true, Kind::Float);
        prop_assert!(close(&mut trainer, [&content, &others], &options, budget));
    }

    #[test]
    fn what_stands_after_the_last_target_has_no_gradient(seed in 0_u64..10_000, more in 1_usize..9) {
        let sequences = train_sequences(5, seed);
        let mut numbers = Numbers::new(seed + 7);
        let longer = sequences.iter().cloned().map(|mut sequence| {
            sequence.ids.extend(numbers.ids(more));
            sequence.targets.resize(sequence.ids.len(), false);
            sequence
        });
        let (mut trainer, longer) = (trainer(seed, true, Kind::Float), longer.collect::<Vec<_>>());
        let expected = supervised_gradient(&mut trainer, &sequences);
        let found = supervised_gradient(&mut trainer, &longer);
        assert_close(&found, &expected, 1e-5);
    }
}

#[test]
fn where_a_step_is_the_unit_only_the_cut_into_micro_batches_is_free() {
    let (mut numbers, content) = (Numbers::new(1), sampled(5));
    let pieces: Vec<PolicyTrajectory> = content.iter().map(|trajectory| split(trajectory, &mut numbers)).collect();
    let mut trainer = trainer(3, true, Kind::Float);
    for options in [
        PolicyOptions { loss: Loss::GspoStep, ..policy_options() },
        PolicyOptions { aggregation: Aggregation::SequenceMean, ..policy_options() },
    ] {
        assert!(close(&mut trainer, [&content, &content], &options, 1));
        assert!(!close(&mut trainer, [&content, &pieces], &options, BUDGET));
    }
}
