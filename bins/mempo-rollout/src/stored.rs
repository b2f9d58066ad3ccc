//! Stored trajectories to go on from: each of their memories is a state that can be tried again, with the memory as it is,
//! with none, or with that of another task.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::anyhow;
use clap::ValueEnum;
use mempo_agent::Start;
use mempo_data::{Row, SegmentKind, Step, Task, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_text::{Segment, Tags, Tokenizer, between_tags};
use serde::Serialize;

/// What is done to a memory before it is gone on from: two controls of what a policy really takes from its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemoryControl {
    /// Nothing between its tags.
    Empty,
    /// What a trajectory of the next task remembered, after as many steps if there is one.
    Swapped,
}

/// How a rollout is gone on from.
pub(crate) struct FromOptions {
    /// Steps a trajectory may have.
    pub(crate) max_steps: usize,
    /// Trajectories from each state.
    pub(crate) count: usize,
    pub(crate) control: Option<MemoryControl>,
    /// The profile's tags.
    pub(crate) tags: Tags,
}

/// A memory that was answered, with the steps up to it.
struct State {
    trajectory_index: i32,
    steps: Vec<Step>,
    /// Where the last step's ids are between the memory's tags.
    inside: Range<usize>,
}

/// The states of a rollout by task.
pub(crate) struct Stored {
    states: BTreeMap<String, Vec<State>>,
    options: FromOptions,
}

impl Stored {
    /// Reads all of a rollout, to go on from each memory that is not in the last of the steps a trajectory may have. The
    /// tokenizer must be the rollout's.
    pub(crate) fn read(rollouts: &Input, tokenizer: &Tokenizer, options: FromOptions) -> anyhow::Result<Self> {
        let mut stored = Self { states: BTreeMap::new(), options };
        let mut steps: Vec<Step> = Vec::new();
        for step in read_rows::<Step>(&rollouts.table("steps")?).bad_input()? {
            let step = step.bad_input()?;
            stored.check(&step, tokenizer).bad_input()?;
            let of = |step: &Step| (step.task_id.clone(), step.trajectory_index);
            if steps.last().is_some_and(|last| of(last) != of(&step)) {
                steps.clear();
            }
            steps.push(step);
            stored.keep(&steps, tokenizer);
        }
        if stored.states.is_empty() {
            let (dir, max_steps) = (rollouts.dir().display(), stored.options.max_steps);
            return Err(anyhow!(
                "{dir}: no memory to go on from: none was followed by a step within --max-steps {max_steps}"
            ))
            .bad_input();
        }
        stored.apply_control(tokenizer)?;
        Ok(stored)
    }

    /// Keeps the last of a trajectory's steps so far as a state, if it can be gone on from; with a control only if there is
    /// something between its memory's tags.
    fn keep(&mut self, steps: &[Step], tokenizer: &Tokenizer) {
        let Some(step) = steps.last().filter(|step| step.observation_ids.is_some()) else { return };
        if steps.len() >= self.options.max_steps {
            return;
        }
        let memory = step.segments.iter().find(|segment| segment.kind == SegmentKind::Memory);
        let Some(memory) = memory else { return };
        let range = memory.start as usize..memory.end as usize;
        let segment = Segment { kind: mempo_text::SegmentKind::Memory, range };
        let inside = between_tags(tokenizer, &self.options.tags, &step.completion_ids, &segment);
        if self.options.control.is_none() || !inside.is_empty() {
            let state = State { trajectory_index: step.trajectory_index, steps: steps.to_vec(), inside };
            self.states.entry(step.task_id.clone()).or_default().push(state);
        }
    }

    fn apply_control(&mut self, tokenizer: &Tokenizer) -> anyhow::Result<()> {
        let Some(control) = self.options.control else { return Ok(()) };
        if control == MemoryControl::Swapped && self.states.len() < 2 {
            return Err(anyhow!("--memory swapped needs memories of at least two tasks, found those of one"))
                .bad_input();
        }
        let replacements: Vec<Vec<i32>> = self.replacements(control);
        for (state, ids) in self.states.values_mut().flatten().zip(replacements) {
            state.replace_memory(&ids, tokenizer);
        }
        Ok(())
    }

    /// What goes between the tags of each state's memory, in order.
    fn replacements(&self, control: MemoryControl) -> Vec<Vec<i32>> {
        let tasks: Vec<&Vec<State>> = self.states.values().collect();
        let mut replacements = Vec::new();
        for (place, states) in tasks.iter().enumerate() {
            let others = tasks[(place + 1) % tasks.len()];
            for (index, state) in states.iter().enumerate() {
                let as_late: Vec<&State> =
                    others.iter().filter(|other| other.steps.len() == state.steps.len()).collect();
                replacements.push(match control {
                    MemoryControl::Empty => Vec::new(),
                    MemoryControl::Swapped if as_late.is_empty() => others[index % others.len()].memory(),
                    MemoryControl::Swapped => as_late[index % as_late.len()].memory(),
                });
            }
        }
        replacements
    }

    fn check(&self, step: &Step, tokenizer: &Tokenizer) -> anyhow::Result<()> {
        let (key, index) = (step.key(), step.trajectory_index);
        let after = || (index as usize + 1).checked_mul(self.options.max_steps)?.checked_mul(self.options.count);
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

    /// `count` starts from every state. The trajectory index is `(i * max_steps + t) * count + j` for the `j`-th from step
    /// `t` of trajectory `i`.
    pub(crate) fn starts<'t>(&'t self, task: &'t Task) -> Vec<Start<'t>> {
        let FromOptions { max_steps, count, .. } = &self.options;
        let states = self.states.get(&task.task_id).into_iter().flatten();
        let starts = states.flat_map(|state| {
            let first = (state.trajectory_index as usize * max_steps + state.steps.len() - 1) * count;
            (first..first + count).map(|index| Start {
                task,
                trajectory_index: index as i32,
                steps: &state.steps,
                document: &[],
            })
        });
        starts.collect()
    }
}

impl State {
    fn last(&self) -> &Step {
        &self.steps[self.steps.len() - 1]
    }

    fn memory(&self) -> Vec<i32> {
        self.last().completion_ids[self.inside.clone()].to_vec()
    }

    /// Other ids between the tags. Nobody sampled them: their log-probabilities are 0.
    fn replace_memory(&mut self, ids: &[i32], tokenizer: &Tokenizer) {
        let (from, to) = (self.inside.start, self.inside.end);
        let last = self.steps.len() - 1;
        let step = &mut self.steps[last];
        step.completion_ids.splice(from..to, ids.iter().copied());
        step.sampling_logprobs.splice(from..to, ids.iter().map(|_| 0.0));
        step.completion = tokenizer.decode(&step.completion_ids);
        let moved = |place: i32| {
            if place as usize >= to { place - (to - from) as i32 + ids.len() as i32 } else { place }
        };
        for segment in &mut step.segments {
            (segment.start, segment.end) = (moved(segment.start), moved(segment.end));
        }
        self.inside = from..from + ids.len();
    }
}

#[cfg(test)]
mod tests {
    use mempo_data::{Segment, StopReason};
    use mempo_text::{NewTokenizer, train_tokenizer};

    use super::*;

    fn tokenizer() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let text = "<mem>red blue</mem><think>on</think>".to_owned();
        train_tokenizer(std::iter::repeat_n(text, 3), &NewTokenizer::of_size(300), folder.path()).unwrap();
        Tokenizer::load(folder.path()).unwrap()
    }

    /// A step that remembers something, thinks, and was answered.
    fn step(tokenizer: &Tokenizer, task_id: &str, step_index: i32, memory: &str) -> Step {
        let encode = |text: &str| tokenizer.encode_plain(text);
        let pieces = [encode("<mem>"), encode(memory), encode("</mem>"), encode("<think>on</think>")];
        let (completion_ids, end) = (pieces.concat(), pieces[..3].concat().len() as i32);
        let segment = |kind, start, end| Segment { kind, start, end };
        let all = completion_ids.len() as i32;
        Step {
            task_id: task_id.to_owned(),
            trajectory_index: 0,
            step_index,
            prompt_ids: vec![1],
            sampling_logprobs: vec![-1.0; completion_ids.len()],
            segments: vec![segment(SegmentKind::Memory, 0, end), segment(SegmentKind::Think, end, all)],
            completion: tokenizer.decode(&completion_ids),
            completion_ids,
            observation: None,
            observation_ids: Some(Vec::new()),
            stop_reason: StopReason::StopString,
        }
    }

    fn stored(tokenizer: &Tokenizer, trajectories: &[&[Step]], control: Option<MemoryControl>) -> Stored {
        let options = FromOptions { max_steps: 4, count: 2, control, tags: Tags::default() };
        let mut stored = Stored { states: BTreeMap::new(), options };
        for steps in trajectories {
            (1..=steps.len()).for_each(|count| stored.keep(&steps[..count], tokenizer));
        }
        stored.apply_control(tokenizer).unwrap();
        stored
    }

    fn task(task_id: &str) -> Task {
        serde_json::from_value(serde_json::json!({
            "task_id": task_id, "source": "", "split": "", "question": "", "objectives": [], "document": null,
            "document_ref": null, "metadata": null,
        }))
        .unwrap()
    }

    #[test]
    fn every_memory_that_was_answered_is_a_start() {
        let tokenizer = tokenizer();
        let with = |index, memory: bool, answered: bool| {
            let mut step = step(&tokenizer, "t", index, "red");
            step.segments.retain(|segment| memory || segment.kind != SegmentKind::Memory);
            step.observation_ids = answered.then(Vec::new);
            step
        };
        let first = [with(0, true, true), with(1, false, true), with(2, true, true), with(3, true, true)];
        let mut second = [with(0, true, true), with(1, true, false)];
        for step in &mut second {
            step.trajectory_index = 1;
        }
        let stored = stored(&tokenizer, &[&first, &second], None);
        let task = task("t");
        let found: Vec<(i32, usize)> =
            stored.starts(&task).iter().map(|start| (start.trajectory_index, start.steps.len())).collect();
        // Step 1 has no memory, step 3 is the last a trajectory may have, the second's last was not answered.
        assert_eq!(found, [(0, 1), (1, 1), (4, 3), (5, 3), (8, 1), (9, 1)]);
    }

    #[test]
    fn a_control_replaces_what_is_between_the_tags_and_nothing_else() {
        let tokenizer = tokenizer();
        let steps = |task: &str, memories: [&str; 2]| {
            [0, 1].map(|index| step(&tokenizer, task, index, memories[index as usize]))
        };
        let (a, b) = (steps("a", ["red", "blue blue"]), steps("b", ["on red", ""]));
        let last = |control, task_id: &str, state: usize| {
            let stored = stored(&tokenizer, &[&a, &b], control);
            let task = task(task_id);
            let start = stored.starts(&task)[2 * state];
            let last = start.steps[start.steps.len() - 1].clone();
            assert_eq!(last.sampling_logprobs.len(), last.completion_ids.len());
            let think = &last.completion_ids[last.segments[1].start as usize..last.segments[1].end as usize];
            assert_eq!(tokenizer.decode(think), "<think>on</think>");
            let memory = &last.completion_ids[..last.segments[0].end as usize];
            (start.steps.len(), tokenizer.decode(memory))
        };
        let memory = |steps, text: &str| (steps, text.to_owned());
        assert_eq!(last(None, "a", 1), memory(2, "<mem>blue blue</mem>"));
        assert_eq!(last(Some(MemoryControl::Empty), "a", 1), memory(2, "<mem></mem>"));
        assert_eq!(last(Some(MemoryControl::Swapped), "a", 0), memory(1, "<mem>on red</mem>"));
        assert_eq!(last(Some(MemoryControl::Swapped), "a", 1), memory(2, "<mem>on red</mem>"), "none as late");
        assert_eq!(last(Some(MemoryControl::Swapped), "b", 0), memory(1, "<mem>red</mem>"));
        let task = task("b");
        let stored = stored(&tokenizer, &[&a, &b], Some(MemoryControl::Empty));
        assert_eq!(stored.starts(&task).len(), 2, "nothing to take from the empty one");
    }
}
