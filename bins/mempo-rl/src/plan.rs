//! Which trajectories are learned from, in which order, cut into which optimizer steps.

use anyhow::anyhow;
use mempo_data::{Advantage, Cursor, Key, Trajectory, read_rows};
use mempo_run::{Input, ResultExt};

/// A trajectory to learn from: what has to be known before its tokens are read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Planned {
    pub(crate) task_id: String,
    pub(crate) trajectory_index: i32,
    pub(crate) step_count: i32,
    /// Prompt and completion tokens of all its steps.
    pub(crate) tokens: u64,
    /// Those of its longest step.
    pub(crate) longest: usize,
    pub(crate) reward: f32,
}

impl Planned {
    /// The key of one of its steps.
    pub(crate) fn key(&self, step_index: i32) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, step_index)
    }
}

/// The trajectories of a rollout that can be learned from, sorted by key, and how many cannot.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    pub(crate) trajectories: Vec<Planned>,
    /// Something other than the policy failed: there is no reward.
    pub(crate) without_reward: u64,
    /// There is a reward, but the table of advantages leaves the trajectory out.
    pub(crate) without_advantages: u64,
}

impl Selection {
    /// Walks the tables `trajectories` and `advantages` side by side.
    pub(crate) fn read(rollouts: &Input, advantages: &Input) -> anyhow::Result<Self> {
        let counts_as_zero = advantages
            .manifest()
            .is_some_and(|manifest| manifest.arguments.get("null_rewards") == Some(&"zero".into()));
        let rows = read_rows::<Trajectory>(&rollouts.table("trajectories")?).bad_input()?;
        let mut advantages = Cursor::new(read_rows::<Advantage>(&advantages.table("advantages")?).bad_input()?);
        let mut selection = Self::default();
        for row in rows {
            let row = row.bad_input()?;
            let key = Key::of_step(&row.task_id, row.trajectory_index, 0);
            let has_advantages = advantages.take(&key).bad_input()?.is_some();
            let reward = row.reward.or(counts_as_zero.then_some(0.0));
            match (reward, has_advantages) {
                (Some(reward), true) => selection.trajectories.push(Planned {
                    task_id: row.task_id,
                    trajectory_index: row.trajectory_index,
                    step_count: row.step_count,
                    tokens: row.processed_tokens.max(0) as u64,
                    longest: row.peak_tokens.max(0) as usize,
                    reward,
                }),
                (Some(_), false) => selection.without_advantages += 1,
                (None, false) => selection.without_reward += 1,
                (None, true) => {
                    return Err(anyhow!("{key}: has advantages, but its trajectory has no reward")).bad_input();
                }
            }
        }
        Ok(selection)
    }

    /// Tokens of the longest step of all.
    pub(crate) fn longest_row(&self) -> usize {
        self.trajectories.iter().map(|planned| planned.longest).max().unwrap_or(0)
    }

    /// The trajectories of a step, in its order.
    pub(crate) fn members<'a>(&'a self, step: &'a PlannedStep) -> impl Iterator<Item = &'a Planned> {
        step.members.iter().map(|&member| &self.trajectories[member])
    }
}

/// One optimizer step: positions into [`Selection::trajectories`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedStep {
    pub(crate) epoch: u32,
    pub(crate) members: Vec<usize>,
}

/// Orders the trajectories anew for every epoch, by a number that `seed_of` gives for (epoch, task, index), and
/// cuts each epoch into the fewest steps of at most `per_step` trajectories, of sizes as equal as can be: a
/// small rest would be a noisy update of full size.
pub(crate) fn plan_steps(
    trajectories: &[Planned],
    epochs: u32,
    per_step: usize,
    seed_of: &dyn Fn(&[&str]) -> u64,
) -> Vec<PlannedStep> {
    let count = trajectories.len();
    let steps = count.div_ceil(per_step);
    let mut plan = Vec::new();
    for epoch in 0..epochs {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by_cached_key(|&index| {
            let planned = &trajectories[index];
            let parts = ["order", &epoch.to_string(), &planned.task_id, &planned.trajectory_index.to_string()];
            (seed_of(&parts), index)
        });
        plan.extend((0..steps).map(|step| PlannedStep {
            epoch,
            members: order[step * count / steps..(step + 1) * count / steps].to_vec(),
        }));
    }
    plan
}

/// How many steps at the front of `plan` can be held in memory together: as many as have at most `token_limit`
/// tokens, but at least one.
pub(crate) fn window(plan: &[PlannedStep], trajectories: &[Planned], token_limit: u64) -> usize {
    let mut total = 0;
    let fitting = plan.iter().take_while(|step| {
        total += step.members.iter().map(|&member| trajectories[member].tokens).sum::<u64>();
        total <= token_limit
    });
    fitting.count().max(1).min(plan.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trajectories(count: usize) -> Vec<Planned> {
        (0..count)
            .map(|index| Planned {
                task_id: format!("task-{}", index / 4),
                trajectory_index: (index % 4) as i32,
                step_count: 2,
                tokens: 10 * (index as u64 + 1),
                longest: 10,
                reward: 0.0,
            })
            .collect()
    }

    fn plan(count: usize, epochs: u32, per_step: usize, seed: u64) -> Vec<PlannedStep> {
        plan_steps(&trajectories(count), epochs, per_step, &|parts| mempo_run::seed_of(seed, parts))
    }

    #[test]
    fn every_epoch_takes_every_trajectory_once_in_steps_of_equal_size() {
        let plan = plan(22, 3, 5, 1);
        assert_eq!(plan.len(), 15);
        assert!(plan.iter().all(|step| (4..=5).contains(&step.members.len())));
        let epoch = |epoch| -> Vec<usize> {
            plan.iter().filter(|step| step.epoch == epoch).flat_map(|step| step.members.clone()).collect()
        };
        for number in 0..3 {
            let mut members = epoch(number);
            members.sort_unstable();
            assert_eq!(members, (0..22).collect::<Vec<_>>());
        }
        assert_ne!(epoch(0), epoch(1));
        assert_ne!(epoch(0), (0..22).collect::<Vec<_>>());
    }

    #[test]
    fn the_order_follows_the_seed_and_each_key_alone() {
        assert_eq!(plan(12, 1, 4, 1), plan(12, 1, 4, 1));
        assert_ne!(plan(12, 1, 4, 1), plan(12, 1, 4, 2));
        // Without the last trajectory the others keep their order.
        let order = |count| plan(count, 1, 100, 7).remove(0).members;
        let kept: Vec<usize> = order(12).into_iter().filter(|&member| member != 11).collect();
        assert_eq!(kept, order(11));
        assert!(plan(0, 2, 4, 1).is_empty());
    }

    #[test]
    fn a_window_holds_what_fits_and_at_least_one_step() {
        let trajectories = trajectories(4);
        let step = |member| PlannedStep { epoch: 0, members: vec![member] };
        let plan = [step(0), step(1), step(2), step(3)];
        assert_eq!(window(&plan, &trajectories, 29), 1);
        assert_eq!(window(&plan, &trajectories, 30), 2);
        assert_eq!(window(&plan, &trajectories, 1000), 4);
        assert_eq!(window(&plan[3..], &trajectories, 1), 1);
        assert_eq!(window(&[], &trajectories, 1), 0);
    }
}
