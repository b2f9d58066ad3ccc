//! The order in which examples are trained on: a seeded shuffle, cut into optimizer steps by padded tokens.
//!
//! In each epoch the examples are put in the order of a keyed hash of (epoch, example), which depends on nothing but
//! the seed. Windows of that order are sorted by length and cut, so that padding stays small; the steps of a window
//! then follow one another in the order of their first example's hash. Pure: the same lengths, sizes and seed give the
//! same plan, whatever was done before.

/// Optimizer steps whose examples are sorted by length together.
const WINDOW_STEPS: u64 = 64;

/// The examples of one optimizer step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedStep {
    /// From 0.
    pub(crate) epoch: u32,
    /// Indices of examples.
    pub(crate) examples: Vec<u32>,
}

/// Every optimizer step of `epochs` epochs over examples of the given lengths (in tokens). A step's examples, padded to
/// its longest, hold at most `tokens_per_batch` tokens, unless it is one example alone that is longer.
pub(crate) fn plan_steps(
    lengths: &[usize],
    epochs: u32,
    tokens_per_batch: u64,
    seed_of: &dyn Fn(&[&str]) -> u64,
) -> Vec<PlannedStep> {
    let plan_epoch = |epoch: u32| {
        let mut keyed: Vec<(u64, u32)> = (0..lengths.len() as u32)
            .map(|example| (seed_of(&["shuffle", &epoch.to_string(), &example.to_string()]), example))
            .collect();
        keyed.sort_unstable();
        let windows = cut_windows(&keyed, lengths, tokens_per_batch.saturating_mul(WINDOW_STEPS));
        windows
            .into_iter()
            .flat_map(move |window| {
                let mut steps = pack_window(window, lengths, tokens_per_batch);
                steps.sort_unstable_by_key(|step| step[0]);
                steps.into_iter().map(move |step| PlannedStep {
                    epoch,
                    examples: step.into_iter().map(|(_, example)| example).collect(),
                })
            })
            .collect::<Vec<_>>()
    };
    (0..epochs).flat_map(plan_epoch).collect()
}

/// Consecutive stretches of about `window_tokens` tokens.
fn cut_windows(keyed: &[(u64, u32)], lengths: &[usize], window_tokens: u64) -> Vec<Vec<(u64, u32)>> {
    let (mut windows, mut window, mut tokens) = (Vec::new(), Vec::new(), 0);
    for entry in keyed {
        window.push(*entry);
        tokens += lengths[entry.1 as usize] as u64;
        if tokens >= window_tokens {
            windows.push(std::mem::take(&mut window));
            tokens = 0;
        }
    }
    windows.extend((!window.is_empty()).then_some(window));
    windows
}

/// Sorts a window by length and fills one step after another.
fn pack_window(mut window: Vec<(u64, u32)>, lengths: &[usize], tokens_per_batch: u64) -> Vec<Vec<(u64, u32)>> {
    let length = |entry: &(u64, u32)| lengths[entry.1 as usize];
    window.sort_unstable_by_key(|entry| (length(entry), *entry));
    let mut steps: Vec<Vec<(u64, u32)>> = Vec::new();
    for entry in window {
        match steps.last_mut() {
            // Lengths ascend, so that the newcomer is the one the others are padded to.
            Some(step) if (step.len() as u64 + 1) * length(&entry) as u64 <= tokens_per_batch => step.push(entry),
            _ => steps.push(vec![entry]),
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lengths: &[usize], epochs: u32, tokens: u64, seed: u64) -> Vec<PlannedStep> {
        plan_steps(lengths, epochs, tokens, &|parts| mempo_run::seed_of(seed, parts))
    }

    fn lengths() -> Vec<usize> {
        (0..2000).map(|example| 5 + mempo_run::seed_of(1, &[&example.to_string()]) as usize % 200).collect()
    }

    #[test]
    fn every_epoch_holds_every_example_once_within_the_budget() {
        let lengths = lengths();
        let steps = plan(&lengths, 2, 1000, 7);
        for epoch in 0..2 {
            let mut seen: Vec<u32> =
                steps.iter().filter(|step| step.epoch == epoch).flat_map(|step| step.examples.clone()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..2000).collect::<Vec<u32>>());
        }
        for step in &steps {
            let longest = step.examples.iter().map(|example| lengths[*example as usize]).max().unwrap();
            assert!(longest * step.examples.len() <= 1000);
        }
    }

    #[test]
    fn padding_is_small_though_the_order_is_shuffled() {
        let lengths = lengths();
        let steps = plan(&lengths, 1, 1000, 7);
        let padded: usize = steps
            .iter()
            .map(|step| {
                let longest = step.examples.iter().map(|example| lengths[*example as usize]).max().unwrap();
                longest * step.examples.len()
            })
            .sum();
        let tokens: usize = lengths.iter().sum();
        assert!((padded - tokens) as f64 / (padded as f64) < 0.03, "{tokens} of {padded}");
        let first: Vec<usize> = steps.iter().take(20).map(|step| lengths[step.examples[0] as usize]).collect();
        assert!(!first.is_sorted(), "steps must not come in the order of length: {first:?}");
    }

    #[test]
    fn the_order_is_the_seeds_alone_and_differs_between_epochs() {
        let lengths = lengths();
        assert_eq!(plan(&lengths, 2, 1000, 7), plan(&lengths, 2, 1000, 7));
        assert_ne!(plan(&lengths, 1, 1000, 7), plan(&lengths, 1, 1000, 8));
        let steps = plan(&lengths, 2, 1000, 7);
        let first_of = |epoch| steps.iter().find(|step| step.epoch == epoch).map(|step| step.examples.clone());
        assert_ne!(first_of(0), first_of(1));
        assert_eq!(plan(&lengths, 1, 1000, 7), steps[..steps.iter().filter(|step| step.epoch == 0).count()]);
    }

    #[test]
    fn an_example_longer_than_the_budget_is_a_step_of_its_own() {
        let mut steps: Vec<usize> = plan(&[50, 3, 3, 3], 1, 10, 0).iter().map(|step| step.examples.len()).collect();
        steps.sort_unstable();
        assert_eq!(steps, [1, 3]);
    }
}
