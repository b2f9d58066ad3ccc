//! Group-normalised advantages, as values in and values out: one function a formula.
//!
//! Sums run in the order of the rows, in float64, so that equal input gives equal bytes.

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};
use serde::Serialize;

/// Among which memories a memory reward is centred and scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemoryScope {
    /// Memories at the same step of the task's trajectories.
    PerStep,
    /// All memories of the task.
    Pooled,
    /// Memories of one trajectory.
    PerTrajectory,
}

/// Which trajectories' memories get a memory advantage; the others get 0 and do not count in the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemoryApply {
    /// All with a reward.
    All,
    /// Those with valid format.
    WellFormed,
    /// Those with reward 1 (InfoMem, arXiv 2606.03329).
    Success,
}

/// Which of a trajectory's memories get a memory advantage; the others get 0 and do not count in the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemorySteps {
    /// All of them.
    All,
    /// The last one.
    Final,
}

impl MemorySteps {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
    pub(crate) fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// Which advantages are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Estimator {
    /// Trajectory and memory advantages, each normalised (MemPO, arXiv 2603.00680, eq. 4 and 8)
    Mempo,
    /// Reward minus the group's mean, over its standard deviation (DeepSeekMath, arXiv 2402.03300); memories are paid beside it
    /// where there are --scores, unless --alpha is 0
    Grpo,
    /// The same without the standard deviation (Dr. GRPO, arXiv 2503.20783)
    DrGrpo,
    /// Reward minus the mean of the others' (RLOO, arXiv 2402.14740)
    Rloo,
    /// Reward minus the group's mean, for every conversation of a trajectory (MemAgent, arXiv 2507.02259; `grpo` divides it
    /// by the standard deviation)
    Memagent,
    /// As grpo, divided evenly among the steps before the last, which is not trained (MemAgent in slime-agentic)
    MemagentSlime,
}

/// What is normalised and what is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Combine {
    /// Each advantage is normalised, then they are added: `A = A^T + alpha A^M` (the paper)
    Advantages,
    /// Rewards are added, then normalised: `A = norm(R^T + alpha R^M)` inside a memory, 0 where all sums are equal; a memory of
    /// a group below --min-memory-group keeps the trajectory's advantage
    Rewards,
    /// What a trajectory's memories gained counts in its own reward: `A = norm(R^T + alpha r)` for all its tokens. `r` is the mean
    /// reward of its memories that count, standardised over the trajectories that have one, whatever --memory-scope says; the
    /// others have 0. With it --memory-apply is `success`, --memory-steps `final` and --min-memory-group 2 unless they are
    /// given: InfoMem (arXiv 2606.03329), with `--estimator grpo`, alpha its lambda, and scores by `segments --bias null
    /// --difference logprob`
    Infomem,
}

/// How rewards become advantages.
#[derive(Debug, Clone, Args, Serialize)]
pub(crate) struct NormaliseOptions {
    /// Advantages to compute
    #[arg(long, value_enum, default_value = "mempo")]
    pub(crate) estimator: Estimator,
    /// Whether advantages or rewards of trajectory and memory are added
    #[arg(long, value_enum, default_value = "advantages")]
    pub(crate) combine: Combine,
    /// Memories compared with each other
    #[arg(long, value_enum, default_value = "per-step")]
    pub(crate) memory_scope: MemoryScope,
    /// Trajectories whose memories get a memory advantage
    #[arg(long, value_enum, default_value = "all", default_value_if("combine", "infomem", "success"))]
    pub(crate) memory_apply: MemoryApply,
    /// Memories of a trajectory that get a memory advantage
    #[arg(long, value_enum, default_value = "all", default_value_if("combine", "infomem", "final"))]
    #[serde(skip_serializing_if = "MemorySteps::is_all")]
    pub(crate) memory_steps: MemorySteps,
    /// Memories a group must have; smaller groups have memory advantage 0
    #[arg(
        long,
        default_value_t = 4,
        default_value_if("combine", "infomem", "2"),
        value_parser = clap::value_parser!(u32).range(2..)
    )]
    pub(crate) min_memory_group: u32,
    /// Weight of the memory beside the trajectory
    #[arg(long, default_value_t = 1.0, value_parser = not_negative)]
    pub(crate) alpha: f64,
    /// Weight of the memory at the end of training; between, by --progress, a straight line
    #[arg(long, value_parser = not_negative)]
    pub(crate) alpha_end: Option<f64>,
    /// How much of the training is done, from 0 to 1
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    pub(crate) progress: f64,
    /// Least standard deviation that trajectory rewards are divided by, in the unit of the reward
    #[arg(long, default_value_t = 1e-6, value_parser = not_negative)]
    pub(crate) std_floor: f64,
    /// Least standard deviation that memory rewards are divided by, in the unit of `segments --difference`: probability of the
    /// answer, or nats a token, where 0.05 is a twentieth of that probability. Memories that differ by less get small
    /// advantages: 1e-5 and 1e-4 are both no answer. Sums of both rewards (--combine rewards and infomem) are divided by no less
    /// than the larger of the two floors
    #[arg(long, default_value_t = 0.05, value_parser = not_negative)]
    pub(crate) memory_std_floor: f64,
    /// Centre only, without dividing by the standard deviation
    #[arg(long)]
    pub(crate) no_std: bool,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number| (0.0..=1.0).contains(number)).ok_or_else(|| "expected 0 to 1".to_owned())
}

/// A finite number of at least 0.
pub(crate) fn not_negative(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_owned())
}

impl NormaliseOptions {
    /// The memory's weight now.
    fn alpha(&self) -> f64 {
        self.alpha + (self.alpha_end.unwrap_or(self.alpha) - self.alpha) * self.progress
    }

    /// Least deviation that trajectory rewards are divided by, if they are.
    fn trajectory_floor(&self) -> Option<f64> {
        (!self.no_std).then_some(self.std_floor)
    }

    /// Least deviation that memory rewards are divided by, if they are.
    fn memory_floor(&self) -> Option<f64> {
        (!self.no_std).then_some(self.memory_std_floor)
    }

    /// Least deviation that sums of both are divided by, if they are: memories that differ by nothing to speak of must not
    /// gain weight where trajectories are equal.
    fn sum_floor(&self) -> Option<f64> {
        (!self.no_std).then_some(self.std_floor.max(self.memory_std_floor))
    }

    /// The estimator's advantages of a group's rewards; `floor` counts where it divides by their deviation.
    fn estimate(&self, rewards: &[f64], least: usize, floor: Option<f64>) -> (Vec<f64>, GroupState) {
        match self.estimator {
            Estimator::Mempo | Estimator::Grpo | Estimator::MemagentSlime => normalise(rewards, least, floor),
            Estimator::DrGrpo | Estimator::Memagent => normalise(rewards, least, None),
            Estimator::Rloo => {
                let (values, state) = normalise(rewards, least, None);
                let count = rewards.len() as f64;
                (values.into_iter().map(|value| value * count / (count - 1.0).max(1.0)).collect(), state)
            }
        }
    }
}

/// A trajectory that has a reward, with its memories.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rewarded {
    pub(crate) reward: f64,
    pub(crate) format_valid: bool,
    /// Step index and reward of each memory that has a reward.
    pub(crate) memories: Vec<(i32, f64)>,
    /// Step index of the last memory, whether it has a reward or not.
    pub(crate) last_memory: Option<i32>,
}

impl Rewarded {
    /// Place, step index and reward of each memory that counts.
    fn counted(&self, options: &NormaliseOptions) -> impl Iterator<Item = (usize, i32, f64)> {
        let applies = match options.memory_apply {
            MemoryApply::All => true,
            MemoryApply::WellFormed => self.format_valid,
            MemoryApply::Success => self.reward >= 1.0,
        };
        let final_alone = options.memory_steps == MemorySteps::Final;
        let memories = self.memories.iter().enumerate().map(|(place, &(step, reward))| (place, step, reward));
        memories.filter(move |(_, step, _)| applies && (!final_alone || Some(*step) == self.last_memory))
    }

    /// Mean reward of the memories that count, if there are any.
    fn gain(&self, options: &NormaliseOptions) -> Option<f64> {
        let (mut sum, mut count) = (0.0, 0.0);
        for (_, _, reward) in self.counted(options) {
            (sum, count) = (sum + reward, count + 1.0);
        }
        (count > 0.0).then(|| sum / count)
    }
}

/// What a group of values can teach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GroupState {
    /// Values differ.
    Mixed,
    /// All values are the same number: nothing to prefer.
    Equal,
    /// Fewer values than it takes.
    Small,
}

/// `(value - mean) / max(std, floor)` with the sample (n - 1) standard deviation, `value - mean` without a floor; 0 for all if
/// there are fewer than `least` values or all are equal. Equality is exact: rounding noise in the deviation can not pass for a signal.
#[allow(clippy::float_cmp, reason = "equal rewards are the same number")]
pub(crate) fn normalise(values: &[f64], least: usize, floor: Option<f64>) -> (Vec<f64>, GroupState) {
    let zeros = vec![0.0; values.len()];
    if values.len() < least.max(2) {
        return (zeros, GroupState::Small);
    }
    if values.iter().all(|&value| value == values[0]) {
        return (zeros, GroupState::Equal);
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let scale = floor.map_or(1.0, |floor| (squares / (count - 1.0)).sqrt().max(floor));
    (values.iter().map(|value| (value - mean) / scale).collect(), GroupState::Mixed)
}

/// Advantages of one task's trajectories.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GroupAdvantages {
    /// One a trajectory.
    pub(crate) trajectory: Vec<f64>,
    pub(crate) trajectory_state: GroupState,
    /// One a memory with a reward, in the order of [`Rewarded::memories`], already weighted by alpha: what its tokens get
    /// beside the trajectory's.
    pub(crate) memory: Vec<Vec<f64>>,
    pub(crate) memory_states: Vec<GroupState>,
}

/// Computes both advantages of a task's group.
pub(crate) fn group_advantages(attempts: &[Rewarded], options: &NormaliseOptions) -> GroupAdvantages {
    let mut rewards: Vec<f64> = attempts.iter().map(|attempt| attempt.reward).collect();
    let mut memory: Vec<Vec<f64>> = attempts.iter().map(|attempt| vec![0.0; attempt.memories.len()]).collect();
    if options.combine == Combine::Infomem {
        let memory_states = vec![add_gains(attempts, &mut rewards, options)];
        let (trajectory, trajectory_state) = options.estimate(&rewards, 2, options.sum_floor());
        return GroupAdvantages { trajectory, trajectory_state, memory, memory_states };
    }
    let (trajectory, trajectory_state) = options.estimate(&rewards, 2, options.trajectory_floor());
    let mut memory_states = Vec::new();
    let (alpha, least) = (options.alpha(), options.min_memory_group as usize);
    for members in memory_groups(attempts, options).values() {
        let own = |&(attempt, place): &(usize, usize)| attempts[attempt].memories[place].1;
        let both = |member: &(usize, usize)| attempts[member.0].reward + alpha * own(member);
        let (advantages, state) = match options.combine {
            Combine::Rewards => {
                options.estimate(&members.iter().map(both).collect::<Vec<_>>(), least, options.sum_floor())
            }
            _ => normalise(&members.iter().map(own).collect::<Vec<_>>(), least, options.memory_floor()),
        };
        memory_states.push(state);
        for (&(attempt, place), advantage) in members.iter().zip(advantages) {
            memory[attempt][place] = match options.combine {
                // Nothing to compare with: the memory keeps the trajectory's advantage.
                Combine::Rewards if state == GroupState::Small => 0.0,
                // Inside the memory this advantage stands in the trajectory's place, 0 where all sums are equal.
                Combine::Rewards => advantage - trajectory[attempt],
                _ => alpha * advantage,
            };
        }
    }
    GroupAdvantages { trajectory, trajectory_state, memory, memory_states }
}

/// Adds to rewards what the memories of each trajectory gained, held against the others that gained something.
fn add_gains(attempts: &[Rewarded], rewards: &mut [f64], options: &NormaliseOptions) -> GroupState {
    let gains = attempts.iter().zip(rewards).filter_map(|(attempt, reward)| Some((reward, attempt.gain(options)?)));
    let (members, gains): (Vec<&mut f64>, Vec<f64>) = gains.unzip();
    let (gains, state) = normalise(&gains, options.min_memory_group as usize, options.memory_floor());
    for (reward, gain) in members.into_iter().zip(gains) {
        *reward += options.alpha() * gain;
    }
    state
}

/// Trajectory and place in it of each memory that counts, by comparison group.
fn memory_groups(attempts: &[Rewarded], options: &NormaliseOptions) -> BTreeMap<i32, Vec<(usize, usize)>> {
    let mut groups: BTreeMap<i32, Vec<(usize, usize)>> = BTreeMap::new();
    for (index, attempt) in attempts.iter().enumerate() {
        for (place, step_index, _) in attempt.counted(options) {
            let group = match options.memory_scope {
                MemoryScope::PerStep => step_index,
                MemoryScope::Pooled => 0,
                MemoryScope::PerTrajectory => index as i32,
            };
            groups.entry(group).or_default().push((index, place));
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::fixture::normalise_options;
    use crate::spread::SpreadOptions;

    fn options(scope: MemoryScope, least: u32) -> NormaliseOptions {
        NormaliseOptions { memory_scope: scope, min_memory_group: least, ..normalise_options() }
    }

    fn attempt(reward: f64, memories: &[(i32, f64)]) -> Rewarded {
        let last_memory = memories.last().map(|memory| memory.0);
        Rewarded { reward, format_valid: true, memories: memories.to_vec(), last_memory }
    }

    #[track_caller]
    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}, expected {expected:?}");
    }

    fn number(value: &Value) -> f64 {
        value.as_f64().unwrap()
    }

    /// Numbers in a list, or in lists of a list.
    fn numbers(value: &Value) -> Vec<f64> {
        let list = value.as_array().unwrap().iter();
        list.flat_map(|one| one.as_array().map_or_else(|| vec![number(one)], |many| many.iter().map(number).collect()))
            .collect()
    }

    fn choice<T: ValueEnum>(value: &Value) -> T {
        T::from_str(value.as_str().unwrap(), false).unwrap()
    }

    fn given_options(given: &Value) -> NormaliseOptions {
        NormaliseOptions {
            estimator: choice(&given["estimator"]),
            combine: choice(&given["combine"]),
            memory_scope: choice(&given["memory_scope"]),
            memory_apply: choice(&given["memory_apply"]),
            memory_steps: choice(&given["memory_steps"]),
            min_memory_group: given["min_memory_group"].as_u64().unwrap() as u32,
            alpha: number(&given["alpha"]),
            alpha_end: given["alpha_end"].as_f64(),
            progress: number(&given["progress"]),
            std_floor: number(&given["std_floor"]),
            memory_std_floor: number(&given["memory_std_floor"]),
            no_std: given["no_std"] == true,
        }
    }

    fn given_attempt(one: &Value) -> Rewarded {
        let memory = |pair: &Value| (pair[0].as_i64().unwrap() as i32, number(&pair[1]));
        Rewarded {
            reward: number(&one["reward"]),
            format_valid: one["format_valid"] == true,
            memories: one["memories"].as_array().unwrap().iter().map(memory).collect(),
            last_memory: one["last_memory"].as_i64().map(|step| step as i32),
        }
    }

    /// Each step's share of its trajectory's advantage, and whether it is trained.
    fn spread_of(given: &Value, estimator: Estimator, trajectory: &[f64], group: &[Value]) -> (Vec<f64>, Vec<f64>) {
        let some = |key: &str| Some(&given[key]).filter(|value| value.is_string());
        let spread = SpreadOptions {
            trajectory_credit: some("trajectory_credit").map(choice),
            train_final: some("train_final").map(choice),
        };
        let spread = spread.of(estimator);
        let (mut shares, mut weights) = (Vec::new(), Vec::new());
        for (advantage, one) in trajectory.iter().zip(group) {
            let steps = one["steps"].as_u64().unwrap() as usize;
            // All of them end with an answer.
            let trains: Vec<bool> = (1..=steps).map(|step| spread.trains(step == steps)).collect();
            let trained = trains.iter().filter(|trains| **trains).count();
            shares.extend(vec![spread.share(*advantage, trained); steps]);
            weights.extend(trains.into_iter().map(|trains| f64::from(u8::from(trains))));
        }
        (shares, weights)
    }

    /// Numbers written by `tests/reference/make.py` from the formulas alone.
    #[test]
    fn weights_floors_and_penalties_are_finite_and_not_negative() {
        assert_eq!(["0", "0.5"].map(|text| not_negative(text).ok()), [Some(0.0), Some(0.5)]);
        assert!(["-1", "nan", "inf", "x", ""].iter().all(|text| not_negative(text).is_err()));
    }

    #[test]
    fn advantages_are_those_of_the_reference() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/advantages.json");
        let cases: Vec<Value> = serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap();
        for case in cases {
            let (options, group) = (given_options(&case["options"]), case["group"].as_array().unwrap());
            let found = group_advantages(&group.iter().map(given_attempt).collect::<Vec<_>>(), &options);
            let (shares, weights) = spread_of(&case["options"], options.estimator, &found.trajectory, group);
            let memory = found.memory.concat();
            for (found, key) in
                [(found.trajectory, "trajectory"), (memory, "memory"), (shares, "shares"), (weights, "weights")]
            {
                let expected = numbers(&case["expected"][key]);
                assert_eq!(found.len(), expected.len(), "{}", case["name"]);
                for (found, expected) in found.iter().zip(&expected) {
                    let off = (found - expected).abs() / expected.abs().max(1.0);
                    assert!(off < 1e-9, "{} {key}: {found}, expected {expected}", case["name"]);
                }
            }
        }
    }

    #[test]
    fn alpha_moves_from_start_to_end() {
        let at =
            |progress| NormaliseOptions { alpha: 1.0, alpha_end: Some(0.2), progress, ..normalise_options() }.alpha();
        close(&[at(0.0), at(0.5), at(1.0)], &[1.0, 0.6, 0.2]);
        close(&[NormaliseOptions { progress: 0.7, ..normalise_options() }.alpha()], &[1.0]);
    }

    /// Two trajectories of two steps: step 1 is easier by 0.5 for both, trajectory 1 better by 0.2 at both steps.
    fn toy() -> [Rewarded; 2] {
        [attempt(0.0, &[(0, 0.1), (1, 0.6)]), attempt(1.0, &[(0, 0.3), (1, 0.8)])]
    }

    #[test]
    fn per_step_removes_what_the_step_is_worth_and_pooled_keeps_it() {
        let half = 0.5_f64.sqrt();
        let per_step = group_advantages(&toy(), &options(MemoryScope::PerStep, 2));
        close(&per_step.memory.concat(), &[-half, -half, half, half]);
        close(&per_step.trajectory, &[-half, half]);

        // Mean 0.45; deviations -0.35, 0.15, -0.15, 0.35; sample variance 0.29 / 3.
        let std = (0.29_f64 / 3.0).sqrt();
        let pooled = group_advantages(&toy(), &options(MemoryScope::Pooled, 2));
        close(&pooled.memory.concat(), &[-0.35 / std, 0.15 / std, -0.15 / std, 0.35 / std]);

        let own = group_advantages(&toy(), &options(MemoryScope::PerTrajectory, 2));
        close(&own.memory.concat(), &[-half, half, -half, half]);
    }

    #[test]
    fn small_and_equal_groups_say_nothing() {
        let found = group_advantages(&toy(), &options(MemoryScope::PerStep, 4));
        assert_eq!(found.memory.concat(), [0.0; 4]);
        assert_eq!(found.memory_states, [GroupState::Small; 2]);
        let alone = group_advantages(&toy()[..1], &options(MemoryScope::Pooled, 2));
        assert_eq!((alone.trajectory, alone.trajectory_state), (vec![0.0], GroupState::Small));
        // 0.1 three times: the naive deviation is not exactly 0.
        let (values, state) = normalise(&[0.1; 3], 2, Some(1e-6));
        assert_eq!((values, state), (vec![0.0; 3], GroupState::Equal));
    }

    #[test]
    fn only_memories_that_apply_count_in_their_group() {
        let mut attempts =
            vec![attempt(1.0, &[(1, 0.2)]), attempt(0.0, &[(1, 0.9)]), attempt(1.0, &[(1, 0.4)]), attempt(1.0, &[])];
        attempts[2].format_valid = false;
        let with = |apply| {
            let options = NormaliseOptions { memory_apply: apply, alpha: 2.0, ..options(MemoryScope::PerStep, 2) };
            group_advantages(&attempts, &options).memory.concat()
        };
        close(&with(MemoryApply::Success), &[-2.0_f64.sqrt(), 0.0, 2.0_f64.sqrt()]);
        close(&with(MemoryApply::WellFormed), &[-2.0_f64.sqrt(), 2.0_f64.sqrt(), 0.0]);
    }

    #[test]
    fn the_floor_shrinks_small_differences_and_no_std_leaves_units() {
        close(&normalise(&[0.0, 0.01], 2, Some(0.1)).0, &[-0.05, 0.05]);
        close(&normalise(&[0.0, 3.0, 0.0], 2, None).0, &[-1.0, 2.0, -1.0]);
        let plain = NormaliseOptions { no_std: true, ..normalise_options() };
        assert_eq!((plain.trajectory_floor(), plain.memory_floor(), plain.sum_floor()), (None, None, None));
    }

    /// Four trajectories whose memories make the answer practically impossible, each a little less than the one before.
    fn hopeless() -> Vec<Rewarded> {
        let memories = [1e-5, 2e-5, 4e-5, 1.3e-4];
        (0..).zip(memories).map(|(index, memory)| attempt(f64::from(index % 2), &[(0, memory)])).collect()
    }

    #[test]
    fn memories_that_are_all_worth_nothing_earn_nothing() {
        // Mean 5e-5; deviations -4e-5, -3e-5, -1e-5, 8e-5.
        let deviations = [-4e-5, -3e-5, -1e-5, 8e-5];
        let scaled = |scale: f64| deviations.map(|deviation| deviation / scale);
        let options = normalise_options();
        let found = group_advantages(&hopeless(), &options);
        close(&found.memory.concat(), &scaled(0.05));
        let bare = NormaliseOptions { memory_std_floor: 1e-6, ..options.clone() };
        let bare = group_advantages(&hopeless(), &bare);
        close(&bare.memory.concat(), &scaled((9e-9_f64 / 3.0).sqrt()));
        assert!(bare.memory.concat()[3] > 1.4);
        // Each floor has its own rewards: 0, 1, 0, 1 have the deviation sqrt(1/3).
        assert_eq!(found.trajectory, bare.trajectory);
        let wide = group_advantages(&hopeless(), &NormaliseOptions { std_floor: 2.0, ..options });
        close(&wide.trajectory, &[-0.25, 0.25, -0.25, 0.25]);
        assert_eq!(wide.memory, found.memory);
    }

    #[test]
    fn the_larger_floor_is_that_of_sums() {
        let succeed = |attempts: Vec<Rewarded>| -> Vec<Rewarded> {
            attempts.into_iter().map(|attempt| Rewarded { reward: 1.0, ..attempt }).collect()
        };
        let attempts = succeed(hopeless());
        let rewards = NormaliseOptions { combine: Combine::Rewards, alpha: 0.5, ..normalise_options() };
        let found = group_advantages(&attempts, &rewards).memory.concat();
        close(&found, &[-4e-4, -3e-4, -1e-4, 8e-4]);
        let infomem = |std_floor| NormaliseOptions { combine: Combine::Infomem, std_floor, ..normalise_options() };
        close(&group_advantages(&attempts, &infomem(1e-6)).trajectory, &[-0.016, -0.012, -0.004, 0.032]);
        close(&group_advantages(&attempts, &infomem(1.0)).trajectory, &[-8e-4, -6e-4, -2e-4, 16e-4]);
    }

    #[test]
    fn equal_sums_leave_memories_nothing() {
        let attempts = [attempt(1.0, &[(0, 0.0)]), attempt(0.75, &[(0, 0.5)]), attempt(0.5, &[(0, 1.0)])];
        let options =
            |least| NormaliseOptions { combine: Combine::Rewards, alpha: 0.5, ..options(MemoryScope::PerStep, least) };
        let found = group_advantages(&attempts, &options(2));
        close(&found.trajectory, &[1.0, 0.0, -1.0]);
        assert_eq!(found.memory_states, [GroupState::Equal]);
        let whole = found.trajectory.iter().zip(found.memory.concat()).map(|(a, b)| a + b).collect::<Vec<_>>();
        close(&whole, &[0.0; 3]);
        let small = group_advantages(&attempts, &options(4));
        close(&small.memory.concat(), &[0.0; 3]);
    }

    proptest! {
        #[test]
        fn normalised_groups_are_centred_and_ignore_shift_and_scale(
            values in proptest::collection::vec(-4..5_i32, 2..20), shift in -3..4_i32, scale in 1..5_i32,
        ) {
            let floor = Some(1e-6);
            let values: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
            let (found, state) = normalise(&values, 2, floor);
            prop_assert!(found.iter().sum::<f64>().abs() < 1e-9);
            if state == GroupState::Mixed {
                let square: f64 = found.iter().map(|value| value * value).sum();
                prop_assert!((square - (values.len() - 1) as f64).abs() < 1e-9, "unit variance");
            }
            let moved: Vec<f64> = values.iter().map(|value| value * f64::from(scale) + f64::from(shift)).collect();
            for (a, b) in found.iter().zip(normalise(&moved, 2, floor).0) {
                prop_assert!((a - b).abs() < 1e-9);
            }
        }

        #[test]
        fn the_order_of_trajectories_makes_no_difference(
            rewards in proptest::collection::vec((0..2_i32, proptest::collection::vec(0..9_i32, 0..5)), 2..9),
            keys in proptest::collection::vec(any::<u32>(), 9),
        ) {
            let attempts: Vec<Rewarded> = rewards.iter().map(|(reward, memories)| {
                let memories = (0..).zip(memories).map(|(step, value)| (step, f64::from(*value) / 8.0));
                attempt(f64::from(*reward), &memories.collect::<Vec<_>>())
            }).collect();
            // Any permutation: the order of as many drawn numbers.
            let mut order: Vec<usize> = (0..attempts.len()).collect();
            order.sort_by_key(|place| keys[*place]);
            let permuted: Vec<Rewarded> = order.iter().map(|place| attempts[*place].clone()).collect();
            for (scope, combine) in [MemoryScope::PerStep, MemoryScope::Pooled, MemoryScope::PerTrajectory]
                .into_iter().flat_map(|scope| Combine::value_variants().iter().map(move |combine| (scope, *combine)))
            {
                let options = NormaliseOptions { combine, ..options(scope, 3) };
                let mut expected = group_advantages(&attempts, &options);
                let found = group_advantages(&permuted, &options);
                expected.memory = order.iter().map(|place| expected.memory[*place].clone()).collect();
                expected.trajectory = order.iter().map(|place| expected.trajectory[*place]).collect();
                for (a, b) in expected.memory.concat().iter().zip(found.memory.concat()) {
                    prop_assert!((a - b).abs() < 1e-9);
                }
                for (a, b) in expected.trajectory.iter().zip(found.trajectory) {
                    prop_assert!((a - b).abs() < 1e-9);
                }
            }
        }
    }
}
