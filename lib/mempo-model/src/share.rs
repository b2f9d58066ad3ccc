//! Scoring sequences that begin alike: each shared beginning is run once, whatever its owner finds in the batch.
//!
//! The longest sequences become trunks; one that begins as a trunk does, and has no more of its own than what it shares,
//! becomes its branch. So every prefix of a trajectory is scored in one pass over it, and all memories of a task in one pass over its
//! question.

use std::collections::HashMap;

use crate::random::counter_hash;
use crate::{Branch, Error, Model, ScoreOptions, ScoredSequence, Trunk};

/// Ids whose hash is looked up together: shorter beginnings are not shared.
const BLOCK: usize = 32;
/// Longest branch. Its attention is written out, which a long one would make dear.
const LONGEST_BRANCH: usize = 192;
/// Attention weights of a pass, in elements: 256 MB in float32.
const MOST_WEIGHTS: usize = 1 << 26;

/// A trunk, as a place in the list of sequences, and the sequences that begin as it does with how many ids they share.
struct Group {
    trunk: usize,
    members: Vec<(usize, usize)>,
}

impl Model {
    /// The same as [`Model::completion_logprobs`], sharing what sequences have in common; also gives the number of tokens
    /// that were run, padding left out. What comes back may differ in its last bits with what is scored beside it, but not
    /// with the order.
    pub fn shared_logprobs(
        &self,
        sequences: &[ScoredSequence],
        options: &ScoreOptions,
    ) -> Result<(Vec<Vec<f32>>, usize), Error> {
        self.share(sequences, options, self.pass_overhead())
    }

    fn share(
        &self,
        sequences: &[ScoredSequence],
        options: &ScoreOptions,
        overhead: usize,
    ) -> Result<(Vec<Vec<f32>>, usize), Error> {
        for (row, sequence) in sequences.iter().enumerate() {
            self.check_scored(row, sequence)?;
        }
        let mut logprobs = vec![Vec::new(); sequences.len()];
        let mut alone = Vec::new();
        let mut computed = 0;
        for group in groups(sequences) {
            if !group.is_worth_it(sequences, overhead) {
                alone.extend(group.members.iter().map(|(place, _)| *place));
                continue;
            }
            for members in group.passes(self, sequences, options) {
                let trunk = trunk(sequences, &group, members);
                let longest = trunk.branches.iter().map(|branch| branch.at).max().unwrap_or(0);
                computed += longest + trunk.branches.iter().map(|branch| branch.targets.end - 1).sum::<usize>();
                let found = self.branch_logprobs(&trunk, options.temperature)?;
                for ((place, _), found) in members.iter().zip(found) {
                    logprobs[*place] = found;
                }
            }
        }
        let plain: Vec<ScoredSequence> = alone.iter().map(|place| sequences[*place].clone()).collect();
        computed += plain.iter().map(inputs).sum::<usize>();
        for (place, found) in alone.iter().zip(self.completion_logprobs(&plain, options)?) {
            logprobs[*place] = found;
        }
        Ok((logprobs, computed))
    }

    /// What a pass costs beside its tokens, in tokens: some ten milliseconds of small operations, at the speed that models
    /// of this size reach. More than anything can save where a sequence is to be computed as if it were alone.
    fn pass_overhead(&self) -> usize {
        if self.runtime().deterministic {
            return usize::MAX / 2;
        }
        let tokens_times_parameters = if self.runtime().device.is_cuda() { 300_000_000_000 } else { 600_000_000 };
        50 + (tokens_times_parameters / self.config().parameter_count().max(1)) as usize
    }
}

/// Ids the model sees: the last target is predicted, not read.
fn inputs(sequence: &ScoredSequence) -> usize {
    if sequence.targets.is_empty() { 0 } else { sequence.targets.end - 1 }
}

/// Every sequence with targets in one group, longest first.
fn groups(sequences: &[ScoredSequence]) -> Vec<Group> {
    let mut order: Vec<usize> = (0..sequences.len()).filter(|place| inputs(&sequences[*place]) > 0).collect();
    order.sort_by_key(|place| {
        let sequence = &sequences[*place];
        (std::cmp::Reverse(inputs(sequence)), &sequence.ids, sequence.targets.start)
    });
    let mut groups: Vec<Group> = Vec::new();
    let mut trunk_of_beginning: HashMap<(usize, u64), usize> = HashMap::new();
    for place in order {
        let sequence = &sequences[place];
        let beginnings = beginnings(&sequence.ids[..sequence.targets.start]);
        let found = beginnings.iter().rev().find_map(|key| trunk_of_beginning.get(key));
        if let Some(group) = found {
            let trunk = &sequences[groups[*group].trunk];
            let shared = shared_ids(trunk, sequence);
            if shared >= BLOCK && inputs(sequence) - shared <= shared.min(LONGEST_BRANCH) {
                groups[*group].members.push((place, shared));
                continue;
            }
        }
        for key in beginnings {
            trunk_of_beginning.entry(key).or_insert(groups.len());
        }
        groups.push(Group { trunk: place, members: vec![(place, sequence.targets.start)] });
    }
    groups
}

/// Number of blocks and hash of every beginning that is whole blocks.
fn beginnings(ids: &[i32]) -> Vec<(usize, u64)> {
    let mut hash = 0;
    let mut keys = Vec::new();
    for (count, block) in (1..).zip(ids.chunks_exact(BLOCK)) {
        hash = block.iter().fold(hash, |hash, id| counter_hash(hash, *id as u64));
        keys.push((count, hash));
    }
    keys
}

/// How many ids two sequences have in common before the targets of either.
fn shared_ids(trunk: &ScoredSequence, sequence: &ScoredSequence) -> usize {
    let contexts = trunk.ids[..trunk.targets.start].iter().zip(&sequence.ids[..sequence.targets.start]);
    contexts.take_while(|(a, b)| a == b).count()
}

impl Group {
    /// Whether one pass over the trunk costs less than a row a member.
    fn is_worth_it(&self, sequences: &[ScoredSequence], overhead: usize) -> bool {
        let apart: usize = self.members.iter().map(|(place, _)| inputs(&sequences[*place])).sum();
        let own = |(place, shared): &(usize, usize)| inputs(&sequences[*place]) - shared;
        let width = self.members.iter().map(own).max().unwrap_or(0);
        let trunk = sequences[self.trunk].targets.start;
        self.members.len() > 1 && width <= LONGEST_BRANCH && trunk + width * self.members.len() + overhead < apart
    }

    /// Members cut into passes that keep the token budget and bound the attention weights.
    fn passes(
        &self,
        model: &Model,
        sequences: &[ScoredSequence],
        options: &ScoreOptions,
    ) -> impl Iterator<Item = &[(usize, usize)]> {
        let own = |(place, shared): &(usize, usize)| inputs(&sequences[*place]) - shared;
        let width = self.members.iter().map(own).max().unwrap_or(0).max(1);
        let trunk = sequences[self.trunk].targets.start;
        let by_tokens = options.tokens_per_batch.saturating_sub(trunk) / width;
        let heads = model.config().num_attention_heads as usize;
        let by_weights = MOST_WEIGHTS / (heads * width * (trunk + width));
        self.members.chunks(by_tokens.min(by_weights).max(1))
    }
}

fn trunk(sequences: &[ScoredSequence], group: &Group, members: &[(usize, usize)]) -> Trunk {
    let trunk = &sequences[group.trunk];
    let branch = |(place, shared): &(usize, usize)| {
        let sequence = &sequences[*place];
        let targets = sequence.targets.start - shared..sequence.targets.end - shared;
        Branch { at: *shared, ids: sequence.ids[*shared..].to_vec(), targets }
    };
    Trunk { ids: trunk.ids[..trunk.targets.start].to_vec(), branches: members.iter().map(branch).collect() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Kind;

    use super::*;
    use crate::{Config, Runtime};

    fn fresh(family: &str) -> Model {
        let mut config =
            Config::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)).unwrap();
        config.initializer_range = 0.3;
        Model::initialise(config, 4, &Runtime::cpu(Kind::Float)).unwrap()
    }

    fn ids(seed: u64, count: u64) -> Vec<i32> {
        (0..count).map(|i| (counter_hash(seed, i) % 199) as i32).collect()
    }

    /// Prefixes of two trajectories, memories of a question, one that is like no other and two that are the same.
    fn alike() -> Vec<ScoredSequence> {
        let (answer, question) = (ids(1, 6), ids(2, 40));
        let with_answer = |context: &[i32]| ScoredSequence {
            ids: [context, &answer].concat(),
            targets: context.len() + 2..context.len() + answer.len(),
        };
        let mut sequences = Vec::new();
        for trajectory in 0..2 {
            let whole = [question.clone(), ids(10 + trajectory, 100)].concat();
            sequences.extend([40, 57, 81, 82, 120, 140].map(|end| with_answer(&whole[..end])));
        }
        sequences
            .extend((0..9).map(|memory| with_answer(&[question.clone(), ids(50 + memory, 3 + 4 * memory)].concat())));
        sequences.push(with_answer(&ids(99, 30)));
        sequences.push(ScoredSequence { ids: question.clone(), targets: 40..40 });
        sequences.push(sequences[1].clone());
        sequences
    }

    #[test]
    fn what_sequences_share_is_run_once_and_changes_nothing() {
        let sequences = alike();
        for (family, temperature) in [("qwen2", 1.0), ("llama", 0.7)] {
            let model = fresh(family);
            let plain = ScoreOptions { temperature, tokens_per_batch: 1 };
            let expected = model.completion_logprobs(&sequences, &plain).unwrap();
            let apart: usize = sequences.iter().map(|sequence| sequence.targets.end - 1).sum();
            for tokens_per_batch in [1, 250, 100_000] {
                let options = ScoreOptions { temperature, tokens_per_batch };
                let (found, computed) = model.share(&sequences, &options, 64).unwrap();
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.len(), expected.len());
                    for (found, expected) in found.iter().zip(expected) {
                        let difference = (found - expected).abs() / expected.abs().max(1.0);
                        assert!(difference < 1e-5, "{family} {tokens_per_batch}: {found}, alone {expected}");
                    }
                }
                if tokens_per_batch == 100_000 {
                    assert!(computed * 2 < apart, "{computed} of {apart} tokens");
                    let mut backwards: Vec<ScoredSequence> = sequences.iter().rev().cloned().collect();
                    let mut reversed = model.share(&backwards, &options, 64).unwrap().0;
                    reversed.reverse();
                    assert_eq!(found, reversed);
                    backwards[0].targets = 0..3;
                    assert!(model.shared_logprobs(&backwards, &options).is_err());
                }
            }
        }
    }
}
