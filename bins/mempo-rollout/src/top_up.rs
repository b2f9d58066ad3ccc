//! A rollout to be topped up: groups that teach nothing get further trajectories, and everything that is there is kept.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context;
use mempo_agent::{Start, Unit};
use mempo_data::{AnsweredQuery, Row, Step, Task, Trajectory, read_rows};
use mempo_run::{Input, ResultExt};

/// What may differ between a rollout and one that tops it up: how many trajectories a task gets, and how they are made.
pub(crate) const MAY_DIFFER: [&str; 5] =
    ["group_size", "max_error_rate", "concurrency", "threads", "content of --only-groups"];

/// What is known of a task's group.
#[derive(Debug, Default)]
struct Group {
    trajectories: usize,
    /// The smallest and the largest reward.
    rewards: Option<(f32, f32)>,
    /// One above the highest trajectory index.
    next: i32,
}

impl Group {
    fn add(&mut self, row: &Trajectory) {
        self.trajectories += 1;
        self.next = self.next.max(row.trajectory_index + 1);
        if let Some(reward) = row.reward {
            let (least, most) = self.rewards.unwrap_or((reward, reward));
            self.rewards = Some((least.min(reward), most.max(reward)));
        }
    }

    /// Whether nothing can be learnt from it: all rewards are equal, as that of one trajectory alone is, or there is none.
    fn teaches_nothing(&self) -> bool {
        self.rewards.is_none_or(|(least, most)| least.to_bits() == most.to_bits())
    }
}

/// A rollout that is there, unit by unit as it was sampled.
pub(crate) struct Earlier {
    groups: BTreeMap<String, Group>,
    trajectories: Vec<PathBuf>,
    steps: Vec<PathBuf>,
    queries: Vec<PathBuf>,
    /// Trajectories that a group gets.
    count: i32,
}

impl Earlier {
    /// Reads the trajectories of a rollout, which has to be that of the same units.
    pub(crate) fn read(rollouts: &Input, count: usize) -> anyhow::Result<Self> {
        let trajectories = rollouts.table(Trajectory::TABLE)?;
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        for row in read_rows::<Trajectory>(&trajectories).bad_input()? {
            let row = row.bad_input()?;
            groups.entry(row.task_id.clone()).or_default().add(&row);
        }
        let wanted = groups.values().filter(|group| group.teaches_nothing()).count();
        tracing::info!("{wanted} of {} groups teach nothing and get {count} further trajectories each", groups.len());
        let steps = rollouts.table(Step::TABLE)?;
        let queries = rollouts.table(AnsweredQuery::TABLE).unwrap_or_default();
        Ok(Self { groups, trajectories, steps, queries, count: count as i32 })
    }

    /// How many trajectories a task has there.
    pub(crate) fn kept(&self, task: &Task) -> usize {
        self.groups.get(&task.task_id).map_or(0, |group| group.trajectories)
    }

    /// Further trajectories of a task, if it needs any. Their indexes follow those that there are.
    pub(crate) fn starts<'t>(&self, task: &'t Task) -> Vec<Start<'t>> {
        let nothing = Group::default();
        let group = self.groups.get(&task.task_id).unwrap_or(&nothing);
        let count = if group.teaches_nothing() { self.count } else { 0 };
        (group.next..group.next + count)
            .map(|index| Start { task, trajectory_index: index, steps: &[], document: &[] })
            .collect()
    }

    /// A unit's rows with those that there are of it.
    pub(crate) fn join(&self, unit: usize, mut new: Unit) -> anyhow::Result<Unit> {
        new.trajectories.extend(rows(&self.trajectories, unit)?);
        new.steps.extend(rows(&self.steps, unit)?);
        new.trajectories.sort_by_cached_key(Row::key);
        new.steps.sort_by_cached_key(Row::key);
        Ok(new)
    }

    /// What a server told a unit now, with what it told it earlier: of two answers the first.
    pub(crate) fn join_answers(&self, unit: usize, new: Vec<AnsweredQuery>) -> anyhow::Result<Vec<AnsweredQuery>> {
        let mut all = if self.queries.is_empty() { Vec::new() } else { rows::<AnsweredQuery>(&self.queries, unit)? };
        all.extend(new);
        all.sort_by_cached_key(Row::key);
        all.dedup_by(|later, earlier| later.key() == earlier.key());
        Ok(all)
    }
}

/// The rows of a unit's part.
fn rows<R: Row>(parts: &[PathBuf], unit: usize) -> anyhow::Result<Vec<R>> {
    let part = parts.get(unit).with_context(|| format!("--only-groups has no part {unit} of `{}`", R::TABLE));
    let rows = read_rows::<R>(std::slice::from_ref(part.bad_input()?)).bad_input()?;
    rows.collect::<Result<_, _>>().bad_input()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::trajectory;

    fn row(index: i32, reward: Option<f32>) -> Trajectory {
        Trajectory { reward, ..trajectory("a", index) }
    }

    #[test]
    fn a_group_is_topped_up_until_its_rewards_differ() {
        for (rewards, teaches_nothing) in [
            (vec![Some(0.0), Some(0.0)], true),
            (vec![Some(1.0), None, Some(1.0)], true),
            (vec![None, None], true),
            (vec![Some(0.25)], true),
            (vec![Some(1.0), None, Some(0.0)], false),
        ] {
            let mut group = Group::default();
            (0..).zip(&rewards).for_each(|(index, reward)| group.add(&row(index, *reward)));
            assert_eq!(group.teaches_nothing(), teaches_nothing, "{rewards:?}");
            assert_eq!((group.trajectories, group.next), (rewards.len(), rewards.len() as i32));
        }
    }
}
