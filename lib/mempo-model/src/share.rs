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

/// A sequence that begins as a trunk does.
#[derive(Clone, Copy)]
struct Member {
    /// Its place in the list of sequences.
    place: usize,
    /// Ids that it shares with the trunk.
    shared: usize,
    /// Ids of its own that the model sees.
    own: usize,
}

/// A trunk, as a place in the list of sequences, and the sequences that begin as it does, itself included.
struct Group {
    trunk: usize,
    members: Vec<Member>,
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
        self.share(sequences, options, self.costs())
    }

    fn share(
        &self,
        sequences: &[ScoredSequence],
        options: &ScoreOptions,
        costs: Costs,
    ) -> Result<(Vec<Vec<f32>>, usize), Error> {
        for (row, sequence) in sequences.iter().enumerate() {
            self.check_scored(row, sequence)?;
        }
        let mut logprobs = vec![Vec::new(); sequences.len()];
        let mut alone = Vec::new();
        let mut computed = 0;
        for group in groups(sequences) {
            let passes = group.passes(options.tokens_per_batch, costs);
            if !group.is_worth_it(&passes, costs) {
                alone.extend(group.members.iter().map(|member| member.place));
                continue;
            }
            for members in passes {
                computed += longest_shared(members) + members.iter().map(|member| member.own).sum::<usize>();
                let found = self.branch_logprobs(&trunk(sequences, &group, members), options.temperature)?;
                for (member, found) in members.iter().zip(found) {
                    logprobs[member.place] = found;
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

    /// A pass: some ten milliseconds of small operations, at the speed that models of this size reach; more than anything can save
    /// where a sequence is to be computed as if it were alone. An attention weight: as measured on a CPU, and about right for a
    /// GPU, where both are as many times faster.
    fn costs(&self) -> Costs {
        const WEIGHT_IN_PARAMETERS: f64 = 1000.0;
        let parameters = self.config().parameter_count().max(1) as f64;
        let weights = self.config().num_attention_heads as f64 * self.config().num_hidden_layers as f64;
        let tokens_times_parameters = if self.runtime().device.is_cuda() { 3e11 } else { 6e8 };
        let pass =
            if self.runtime().deterministic { f64::INFINITY } else { 50.0 + tokens_times_parameters / parameters };
        Costs { pass, weight: WEIGHT_IN_PARAMETERS * weights / parameters }
    }
}

/// What scoring costs beside the products of the tokens that are run, in tokens.
#[derive(Clone, Copy)]
struct Costs {
    /// A pass.
    pass: f64,
    /// A branch's token's attention to another, whose weight is written out.
    weight: f64,
}

impl Costs {
    /// Of a row by itself, whose attention a kernel computes without writing it out.
    fn row(self, tokens: usize) -> f64 {
        const FUSED: f64 = 0.4;
        let tokens = tokens as f64;
        tokens * (1.0 + tokens / 2.0 * self.weight * FUSED)
    }

    /// Of a pass over so much of a trunk and `count` branches, each padded to `width`.
    fn pass(self, trunk: usize, count: usize, width: usize) -> f64 {
        self.pass + self.row(trunk) + (count * width) as f64 * (1.0 + (trunk + width) as f64 * self.weight)
    }
}

/// Ids the model sees: the last target is predicted, not read.
fn inputs(sequence: &ScoredSequence) -> usize {
    if sequence.targets.is_empty() { 0 } else { sequence.targets.end - 1 }
}

/// Every sequence with targets in one group, the longest first; in a group those with most of their own first.
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
            let own = inputs(sequence) - shared;
            if shared >= BLOCK && own <= shared.min(LONGEST_BRANCH) {
                groups[*group].members.push(Member { place, shared, own });
                continue;
            }
        }
        for key in beginnings {
            trunk_of_beginning.entry(key).or_insert(groups.len());
        }
        let shared = sequence.targets.start;
        let own = inputs(sequence) - shared;
        groups.push(Group { trunk: place, members: vec![Member { place, shared, own }] });
    }
    for group in &mut groups {
        group.members.sort_by_key(|member| std::cmp::Reverse((member.own, member.shared)));
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
    /// Whether these passes cost less than a row a member.
    fn is_worth_it(&self, passes: &[&[Member]], costs: Costs) -> bool {
        let apart: f64 = self.members.iter().map(|member| costs.row(member.shared + member.own)).sum();
        let cost = |pass: &&[Member]| costs.pass(longest_shared(pass), pass.len(), pass[0].own);
        let together: f64 = passes.iter().map(cost).sum();
        self.members.len() > 1 && self.members[0].own <= LONGEST_BRANCH && together < apart
    }

    /// The cheapest cut into passes whose tokens keep the budget. Each runs anew as much of the trunk as its branches need; where that
    /// takes more than half of the budget, or all, branches have half of it beside the trunk.
    fn passes(&self, tokens_per_batch: usize, costs: Costs) -> Vec<&[Member]> {
        let budget = |trunk: usize| tokens_per_batch.saturating_sub(trunk).max(tokens_per_batch / 2);
        // What the first `end` members cost at least, and where their last pass begins.
        let mut best = vec![(0.0, 0)];
        for end in 1..=self.members.len() {
            let (mut cheapest, mut trunk) = ((f64::INFINITY, 0), 0);
            for start in (0..end).rev() {
                let (count, width) = (end - start, self.members[start].own.max(1));
                trunk = trunk.max(self.members[start].shared);
                if count > 1 && count * width > budget(trunk) {
                    break;
                }
                let cost = best[start].0 + costs.pass(trunk, count, width);
                if cost < cheapest.0 {
                    cheapest = (cost, start);
                }
            }
            best.push(cheapest);
        }
        let mut passes = Vec::new();
        let mut end = self.members.len();
        while end > 0 {
            let start = best[end].1;
            passes.push(&self.members[start..end]);
            end = start;
        }
        passes
    }
}

/// How much of the trunk a pass runs.
fn longest_shared(members: &[Member]) -> usize {
    members.iter().map(|member| member.shared).max().unwrap_or(0)
}

fn trunk(sequences: &[ScoredSequence], group: &Group, members: &[Member]) -> Trunk {
    let trunk = &sequences[group.trunk];
    let branch = |member: &Member| {
        let (sequence, shared) = (&sequences[member.place], member.shared);
        let targets = sequence.targets.start - shared..sequence.targets.end - shared;
        Branch { at: shared, ids: sequence.ids[shared..].to_vec(), targets }
    };
    Trunk { ids: trunk.ids[..trunk.targets.start].to_vec(), branches: members.iter().map(branch).collect() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Kind;

    use super::*;
    use crate::{Config, Runtime};

    const CHEAP: Costs = Costs { pass: 64.0, weight: 0.0 };

    fn fresh(family: &str) -> Model {
        let mut config =
            Config::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)).unwrap();
        config.initializer_range = 0.3;
        Model::initialise(config, 4, &Runtime::cpu(Kind::Float)).unwrap()
    }

    fn ids(seed: u64, count: u64) -> Vec<i32> {
        (0..count).map(|i| (counter_hash(seed, i) % 199) as i32).collect()
    }

    /// A trunk that is longer than the budget is still run once for what the budget's half holds of branches, and narrow branches do
    /// not pay for a wide one.
    #[test]
    fn passes_are_the_cheapest_that_keep_the_budget() {
        let member = |place: usize, shared: usize, own: usize| Member { place, shared, own };
        let costs = |pass: f64| Costs { pass, weight: 0.0 };
        let passes = |members: &[Member], tokens: usize, costs: Costs| -> Vec<usize> {
            let group = Group { trunk: 0, members: members.to_vec() };
            group.passes(tokens, costs).iter().map(|members| members.len()).collect()
        };
        let equal: Vec<Member> = (0..16).map(|place| member(place, 1000 - place, 20)).collect();
        assert_eq!(passes(&equal, 4096, costs(50.0)), [16]);
        assert_eq!(passes(&equal, 800, costs(50.0)), [16], "320 tokens in half of 800");
        let few = passes(&equal, 200, costs(50.0));
        assert_eq!((few.len(), few.iter().sum::<usize>()), (4, 16), "5 of 20 tokens in half of 200");
        assert_eq!(passes(&equal, 1, costs(50.0)), [1; 16]);
        // One of 150 beside 40 of 5: padding costs 5,800 tokens, another pass over the trunk 100 and what a pass costs.
        let mut mixed = vec![member(0, 100, 150)];
        mixed.extend((1..41).map(|place| member(place, 90, 5)));
        assert_eq!(passes(&mixed, 100_000, costs(50.0)), [40, 1]);
        assert_eq!(passes(&mixed, 100_000, costs(6_000.0)), [41]);
        let group = Group { trunk: 0, members: mixed };
        let worth = |costs: Costs| group.is_worth_it(&group.passes(100_000, costs), costs);
        assert!(worth(costs(50.0)) && !worth(costs(f64::INFINITY)));
        // Memories of a question beside prefixes of one long trajectory: what they would not see of it is dear to leave out.
        let memories = (0..30).map(|place| member(place, 100, 20));
        let both: Vec<Member> = memories.chain((30..40).map(|place| member(place, 1000, 20))).collect();
        assert_eq!(passes(&both, 100_000, costs(200.0)), [40]);
        assert_eq!(passes(&both, 100_000, Costs { pass: 200.0, weight: 0.01 }), [10, 30]);
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
            for tokens_per_batch in [1, 60, 250, 100_000] {
                let options = ScoreOptions { temperature, tokens_per_batch };
                let (found, computed) = model.share(&sequences, &options, CHEAP).unwrap();
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.len(), expected.len());
                    for (found, expected) in found.iter().zip(expected) {
                        let difference = (found - expected).abs() / expected.abs().max(1.0);
                        assert!(difference < 1e-5, "{family} {tokens_per_batch}: {found}, alone {expected}");
                    }
                }
                // The longest trunk has 140 ids.
                assert!(computed < apart || tokens_per_batch == 1, "{computed} of {apart} tokens");
                if tokens_per_batch == 100_000 {
                    assert!(computed * 2 < apart, "{computed} of {apart} tokens");
                    let mut backwards: Vec<ScoredSequence> = sequences.iter().rev().cloned().collect();
                    let mut reversed = model.share(&backwards, &options, CHEAP).unwrap().0;
                    reversed.reverse();
                    assert_eq!(found, reversed);
                    backwards[0].targets = 0..3;
                    assert!(model.shared_logprobs(&backwards, &options).is_err());
                }
            }
        }
    }
}
