//! Scoring against a plain log-softmax, whatever the batches.

use mempo_model::{Branch, Model, ScoreOptions, ScoredSequence, Trunk};
use tch::Kind;

use crate::{fresh, ids, logits};

fn sequences() -> Vec<ScoredSequence> {
    (0..9u64)
        .map(|i| {
            let length = 3 + (i * 31 % 60) as usize;
            let start = 1 + (i as usize * 7) % (length - 1);
            let end = if i == 4 { start } else { length - usize::from(i == 5) };
            ScoredSequence { ids: ids(i, length as u64), targets: start..end }
        })
        .collect()
}

fn score(model: &Model, sequences: &[ScoredSequence], tokens_per_batch: usize) -> Vec<Vec<f32>> {
    model.completion_logprobs(sequences, &ScoreOptions { temperature: 1.0, tokens_per_batch }).unwrap()
}

#[test]
fn scores_are_a_plain_log_softmax_for_any_batching() {
    let model = fresh("qwen2", 2, Kind::Float);
    let sequences = sequences();
    for tokens_per_batch in [1, 64, 150, 100_000] {
        for (sequence, found) in sequences.iter().zip(score(&model, &sequences, tokens_per_batch)) {
            let table = logits(&model, &sequence.ids).log_softmax(-1, Kind::Double);
            let plain: Vec<f64> = sequence
                .targets
                .clone()
                .map(|target| table.double_value(&[target as i64 - 1, i64::from(sequence.ids[target])]))
                .collect();
            assert_eq!(found.len(), plain.len());
            for (found, plain) in found.iter().zip(&plain) {
                assert!((f64::from(*found) - plain).abs() < 1e-5, "{tokens_per_batch}: {found} {plain}");
            }
        }
    }
}

#[test]
fn the_order_of_sequences_changes_nothing() {
    let model = fresh("llama", 2, Kind::BFloat16);
    let forwards = sequences();
    let backwards: Vec<ScoredSequence> = forwards.iter().rev().cloned().collect();
    let mut reversed = score(&model, &backwards, 90);
    reversed.reverse();
    assert_eq!(score(&model, &forwards, 90), reversed);
}

#[test]
fn impossible_targets_and_ids_are_refused() {
    let model = fresh("llama", 2, Kind::Float);
    for (ids, targets, word) in [
        (vec![1, 2, 3], 0..2, "targets 0..2"),
        (vec![1, 2, 3], 1..4, "targets 1..4"),
        (vec![1, 199, 3], 1..2, "199"),
        (vec![1, -1, 3], 1..2, "-1"),
        (vec![1; 257], 1..2, "256"),
    ] {
        let good = ScoredSequence { ids: vec![1, 2], targets: 1..2 };
        let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 100 };
        let error =
            model.completion_logprobs(&[good, ScoredSequence { ids, targets }], &options).unwrap_err().to_string();
        assert!(error.contains("sequence 1") && error.contains(word), "{error}");
    }
}

fn trunk() -> Trunk {
    let branches = (0..14u64).map(|i| {
        let length = 1 + (i * 5 % 9) as usize;
        let start = if i == 3 { length } else { i as usize % length };
        Branch {
            at: 1 + (i as usize * 17) % 70,
            ids: ids(100 + i, length as u64),
            targets: start..length - usize::from(i == 8),
        }
    });
    Trunk { ids: ids(7, 75), branches: branches.collect() }
}

/// Each branch as a sequence of its own.
fn alone(trunk: &Trunk, branch: &Branch) -> ScoredSequence {
    let targets = branch.at + branch.targets.start..branch.at + branch.targets.end;
    ScoredSequence { ids: [&trunk.ids[..branch.at], &branch.ids].concat(), targets }
}

#[test]
fn branches_are_scored_as_if_each_were_alone() {
    let trunk = trunk();
    for (family, kind, tolerance) in [
        ("qwen2", Kind::Float, 1e-5),
        ("qwen3", Kind::Float, 1e-5),
        ("llama", Kind::Float, 1e-5),
        ("qwen2", Kind::BFloat16, 0.2),
    ] {
        let model = fresh(family, 2, kind);
        for temperature in [1.0, 0.6] {
            let found = model.branch_logprobs(&trunk, temperature).unwrap();
            let sequences: Vec<ScoredSequence> = trunk.branches.iter().map(|branch| alone(&trunk, branch)).collect();
            let options = ScoreOptions { temperature, tokens_per_batch: 1 };
            let expected = model.completion_logprobs(&sequences, &options).unwrap();
            for (branch, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.len(), expected.len(), "{family}: branch {branch}");
                for (found, expected) in found.iter().zip(expected) {
                    let difference = (found - expected).abs() / expected.abs().max(1.0);
                    assert!(difference < tolerance, "{family} {kind:?}: branch {branch}: {found}, alone {expected}");
                }
            }
        }
    }
}

#[test]
fn branches_without_targets_and_impossible_ones() {
    let model = fresh("llama", 2, Kind::Float);
    let nothing = Trunk { ids: ids(7, 5), branches: vec![Branch { at: 5, ids: Vec::new(), targets: 0..0 }] };
    assert_eq!(model.branch_logprobs(&nothing, 1.0).unwrap(), vec![Vec::<f32>::new()]);
    for (at, ids, targets, word) in [
        (0, vec![1], 0..1, "continues 0 of 5"),
        (6, vec![1], 0..1, "continues 6 of 5"),
        (2, vec![1], 0..2, "0..2"),
        (2, vec![199], 0..1, "199"),
        (5, vec![1; 252], 0..1, "position 257"),
    ] {
        let branches = vec![Branch { at: 1, ids: vec![1], targets: 0..1 }, Branch { at, ids, targets }];
        let error = model.branch_logprobs(&Trunk { branches, ..nothing.clone() }, 1.0).unwrap_err().to_string();
        assert!(error.contains("sequence 1") && error.contains(word), "{error}");
    }
}
