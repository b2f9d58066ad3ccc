//! Stored trajectories to go on from: each of their memories is a state that can be tried again.

use std::collections::{BTreeMap, HashMap};

use anyhow::anyhow;
use mempo_agent::Start;
use mempo_data::{Row, SegmentKind, Step, Task, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_text::Tokenizer;

/// The steps of a rollout by task and trajectory.
pub(crate) struct Stored {
    steps: HashMap<String, BTreeMap<i32, Vec<Step>>>,
    max_steps: usize,
    count: usize,
}

impl Stored {
    /// Reads all of a rollout, to go on `count` times from each step that is not the last of `max_steps`. The tokenizer
    /// must be the rollout's.
    pub(crate) fn read(
        rollouts: &Input,
        tokenizer: &Tokenizer,
        max_steps: usize,
        count: usize,
    ) -> anyhow::Result<Self> {
        let mut stored = Self { steps: HashMap::new(), max_steps, count };
        for step in read_rows::<Step>(&rollouts.table("steps")?).bad_input()? {
            let step = step.bad_input()?;
            stored.check(&step, tokenizer).bad_input()?;
            let trajectories = stored.steps.entry(step.task_id.clone()).or_default();
            trajectories.entry(step.trajectory_index).or_default().push(step);
        }
        if !stored.steps.values().flat_map(BTreeMap::values).any(|steps| stored.states(steps).next().is_some()) {
            let (dir, max_steps) = (rollouts.dir().display(), stored.max_steps);
            return Err(anyhow!(
                "{dir}: no memory to go on from: none was followed by a step within --max-steps {max_steps}"
            ))
            .bad_input();
        }
        Ok(stored)
    }

    /// The steps that can be gone on from.
    fn states(&self, steps: &[Step]) -> impl Iterator<Item = usize> {
        (0..steps.len().min(self.max_steps - 1)).filter(|step| goes_on(&steps[*step]))
    }

    fn check(&self, step: &Step, tokenizer: &Tokenizer) -> anyhow::Result<()> {
        let (key, index) = (step.key(), step.trajectory_index);
        let after = || (index as usize + 1).checked_mul(self.max_steps)?.checked_mul(self.count);
        let after = if index < 0 { None } else { after() };
        if after.is_none_or(|after| i32::try_from(after).is_err()) {
            return Err(anyhow!(
                "{key}: expected a trajectory index of 0 or more, and (index + 1) * --max-steps * --group-size below 2^31"
            ));
        }
        if tokenizer.decode(&step.completion_ids) != step.completion {
            return Err(anyhow!(
                "{key}: its ids are not those of --model's tokenizer: give a model of the same vocabulary"
            ));
        }
        Ok(())
    }

    /// `count` starts from every memory that had a next step. The trajectory index is
    /// `(i * max_steps + t) * count + j` for the `j`-th from step `t` of trajectory `i`.
    pub(crate) fn starts<'t>(&'t self, task: &'t Task) -> Vec<Start<'t>> {
        let mut starts = Vec::new();
        for (index, steps) in self.steps.get(&task.task_id).into_iter().flatten() {
            for state in self.states(steps) {
                let first = (*index as usize * self.max_steps + state) * self.count;
                let start = |index| Start { task, trajectory_index: index as i32, steps: &steps[..=state] };
                starts.extend((first..first + self.count).map(start));
            }
        }
        starts
    }
}

/// Whether a step wrote a memory and was answered.
fn goes_on(step: &Step) -> bool {
    step.observation_ids.is_some() && step.segments.iter().any(|segment| segment.kind == SegmentKind::Memory)
}

#[cfg(test)]
mod tests {
    use mempo_data::{Segment, StopReason};

    use super::*;

    fn step(step_index: i32, memory: bool, answered: bool) -> Step {
        Step {
            task_id: "t".to_owned(),
            trajectory_index: 0,
            step_index,
            prompt_ids: vec![1],
            completion_ids: vec![2],
            sampling_logprobs: vec![0.0],
            segments: if memory { vec![Segment { kind: SegmentKind::Memory, start: 0, end: 1 }] } else { Vec::new() },
            completion: String::new(),
            observation: None,
            observation_ids: answered.then(Vec::new),
            stop_reason: StopReason::StopString,
        }
    }

    #[test]
    fn every_memory_that_was_answered_is_a_start() {
        let first = vec![step(0, true, true), step(1, false, true), step(2, true, true), step(3, true, true)];
        let second = vec![step(0, true, true), step(1, true, false)];
        let steps = HashMap::from([("t".to_owned(), BTreeMap::from([(0, first), (1, second)]))]);
        let stored = Stored { steps, max_steps: 4, count: 2 };
        let task: Task = serde_json::from_value(serde_json::json!({
            "task_id": "t", "source": "", "split": "", "question": "", "objectives": [], "document": null,
            "document_ref": null, "metadata": null,
        }))
        .unwrap();
        let found: Vec<(i32, usize)> =
            stored.starts(&task).iter().map(|start| (start.trajectory_index, start.steps.len())).collect();
        // Step 1 has no memory, step 3 is the last a trajectory may have, the second's last was not answered.
        assert_eq!(found, [(0, 1), (1, 1), (4, 3), (5, 3), (8, 1), (9, 1)]);
    }
}
