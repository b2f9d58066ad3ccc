//! Stored trajectories to go on from: each of their memories is a state that can be tried again.

use std::collections::HashMap;

use mempo_agent::Start;
use mempo_data::{SegmentKind, Step, Task, read_rows};
use mempo_run::{Input, ResultExt};

/// The steps of a rollout by task and trajectory.
pub(crate) struct Stored {
    steps: HashMap<String, Vec<Vec<Step>>>,
    max_steps: usize,
}

impl Stored {
    /// Reads all of a rollout, whose trajectories have fewer than `max_steps` steps to go on from.
    pub(crate) fn read(rollouts: &Input, max_steps: usize) -> anyhow::Result<Self> {
        let mut steps: HashMap<String, Vec<Vec<Step>>> = HashMap::new();
        for step in read_rows::<Step>(&rollouts.table("steps")?).bad_input()? {
            let step = step.bad_input()?;
            let trajectories = steps.entry(step.task_id.clone()).or_default();
            let index = step.trajectory_index as usize;
            trajectories.resize_with(trajectories.len().max(index + 1), Vec::new);
            trajectories[index].push(step);
        }
        Ok(Self { steps, max_steps })
    }

    /// `count` starts from every memory that had a next step. The trajectory index is
    /// `(i * max_steps + t) * count + j` for the `j`-th from step `t` of trajectory `i`.
    pub(crate) fn starts<'t>(&self, task: &'t Task, count: usize) -> Vec<Start<'t>> {
        let trajectories = self.steps.get(&task.task_id).map_or(&[][..], Vec::as_slice);
        let mut starts = Vec::new();
        for (index, steps) in trajectories.iter().enumerate() {
            let states = (0..steps.len().min(self.max_steps - 1)).filter(|step| goes_on(&steps[*step]));
            for state in states {
                let first = (index * self.max_steps + state) * count;
                starts.extend((first..first + count).map(|trajectory_index| Start {
                    task,
                    trajectory_index: trajectory_index as i32,
                    steps: steps[..=state].to_vec(),
                }));
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
        let steps = HashMap::from([("t".to_owned(), vec![first, second])]);
        let stored = Stored { steps, max_steps: 4 };
        let task: Task = serde_json::from_value(serde_json::json!({
            "task_id": "t", "source": "", "split": "", "question": "", "objectives": [], "document": null,
            "document_ref": null, "metadata": null,
        }))
        .unwrap();
        let found: Vec<(i32, usize)> =
            stored.starts(&task, 2).iter().map(|start| (start.trajectory_index, start.steps.len())).collect();
        // Step 1 has no memory, step 3 is the last a trajectory may have, the second's last was not answered.
        assert_eq!(found, [(0, 1), (1, 1), (4, 3), (5, 3), (8, 1), (9, 1)]);
    }
}
