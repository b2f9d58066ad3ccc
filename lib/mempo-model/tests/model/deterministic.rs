//! With `deterministic`, equal means equal bits.

use mempo_model::{Model, Runtime, ScoreOptions, ScoredSequence};
use tch::Kind;

use crate::generation::converse;
use crate::{fresh, fresh_on};

fn model(family: &str, kind: Kind) -> Model {
    fresh_on(family, 9, &Runtime { deterministic: true, ..Runtime::cpu(kind) })
}

/// Ids and log-probabilities (as bits) of every completion of some sessions, and the same sequences to be scored.
fn sample(model: &Model, max_rows: usize) -> (Vec<u32>, Vec<ScoredSequence>) {
    let (mut bits, mut sequences) = (Vec::new(), Vec::new());
    for (prompt, generated) in converse(model, 0.9, max_rows).concat() {
        bits.extend(generated.logprobs.iter().map(|logprob| logprob.to_bits()));
        let targets = prompt.len()..prompt.len() + generated.ids.len();
        sequences.push(ScoredSequence { ids: [prompt, generated.ids].concat(), targets });
    }
    (bits, sequences)
}

fn score(model: &Model, sequences: &[ScoredSequence], tokens_per_batch: usize) -> Vec<u32> {
    let options = ScoreOptions { temperature: 0.9, tokens_per_batch };
    let logprobs = model.completion_logprobs(sequences, &options).unwrap().concat();
    assert_eq!(logprobs, model.shared_logprobs(sequences, &options).unwrap().0.concat());
    logprobs.into_iter().map(f32::to_bits).collect()
}

#[test]
fn sampling_and_scoring_give_the_same_bits_in_any_company_on_any_number_of_threads() {
    for (family, kind) in [
        ("qwen2", Kind::Float),
        ("qwen2", Kind::BFloat16),
        ("qwen3", Kind::BFloat16),
        ("llama", Kind::Float),
        ("llama3", Kind::BFloat16),
    ] {
        let model = model(family, kind);
        let (expected, sequences) = sample(&model, 4);
        for (threads, max_rows, tokens_per_batch) in [(1, 1, 1), (2, 64, 200), (3, 7, 100_000)] {
            tch::set_num_threads(threads);
            let (bits, again) = sample(&model, max_rows);
            assert_eq!(again.len(), 33);
            assert!(again.iter().zip(&sequences).all(|(a, b)| a.ids == b.ids), "{family} {kind:?} {max_rows} rows");
            assert_eq!(bits, expected, "{family} {kind:?} {threads} threads, {max_rows} rows");
            let scored = score(&model, &sequences, tokens_per_batch);
            assert_eq!(scored, expected, "{family} {kind:?} {threads} threads, {tokens_per_batch} tokens a batch");
        }
    }
}

/// The numbers are those of the fast kernels up to rounding.
#[test]
fn only_the_last_bits_differ_from_those_of_the_fast_kernels() {
    let deterministic = model("qwen3", Kind::Float);
    let (_, sequences) = sample(&deterministic, 16);
    let found = score(&deterministic, &sequences, 500);
    let expected = score(&fresh("qwen3", 9, Kind::Float), &sequences, 500);
    for (found, expected) in found.into_iter().zip(expected) {
        let (found, expected) = (f32::from_bits(found), f32::from_bits(expected));
        assert!((found - expected).abs() < 1e-5 * expected.abs().max(1.0), "{found}, fast {expected}");
    }
}
