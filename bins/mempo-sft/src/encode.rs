//! Rows -> examples: ids and loss masks.
//!
//! Prompts come from [`PromptBuilder::prompt`] under a context policy, the same function and the same policy as in
//! rollouts, so that a step is trained on exactly the ids it will see. `loss_mask[i]` is true where `input_ids[i]` is a
//! prediction target: the policy's own tokens of this step and the id that ends its turn, nothing else. Stored rollouts
//! keep their ids; text is encoded once, here.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::anyhow;
use mempo_agent::{ContextOptions, ContextPolicy, Past, context_policy, format_problem, outcome, row_segments};
use mempo_data::{Objective, Segment, SegmentKind, SftExample, Status, Step, StopReason, Trajectory};
use mempo_run::ResultExt;
use mempo_text::{
    Carried, ChatTemplate, ParsedCompletion, Profile, PromptBuilder, Tokenizer, ToolSpec, parse_completion,
};

use crate::counts::{Counts, count};
use crate::record::{Demonstration, Form, Record, Turn, parse_record};
use crate::source::{Row, RowContent};

/// Which trajectories become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Keep {
    /// All that can be read.
    All,
    /// Those with the right answer in the right form.
    Correct,
}

/// What the encoder needs of a task.
pub(crate) struct TaskFacts {
    /// Gold answers.
    pub(crate) objectives: Vec<Objective>,
    /// `train`, `dev` or `test`.
    pub(crate) split: String,
}

/// Everything fixed while rows are encoded.
pub(crate) struct Encoder {
    steps: PromptBuilder,
    pairs: PromptBuilder,
    context: Box<dyn ContextPolicy>,
    end_of_turn: i32,
    /// Tasks by name, where they were given.
    pub(crate) tasks: HashMap<String, TaskFacts>,
    /// Which trajectories become examples.
    pub(crate) keep: Keep,
    /// Longest example; plain text is cut to it, others are dropped.
    pub(crate) max_tokens: usize,
}

/// The examples of a row, with its books.
#[derive(Debug, Default)]
pub(crate) struct Encoded {
    pub(crate) examples: Vec<SftExample>,
    pub(crate) counts: Counts,
}

/// What a step's completion is, for the examples and for the books.
struct Completion<'a> {
    ids: &'a [i32],
    segments: &'a [Segment],
    faulty: bool,
}

/// What a row's examples share.
struct Labels {
    row: u64,
    trajectory_id: String,
    task_id: Option<String>,
    split: Option<String>,
}

impl Encoder {
    /// Loads tokenizer and template from `dir`; `profile` is a name or a folder.
    pub(crate) fn load(dir: &Path, profile: &str, context: &ContextOptions) -> anyhow::Result<Self> {
        let context = context_policy(context).usage()?;
        if context.answers_at_once() {
            let name = context.name();
            return Err(anyhow!("--context {name} is for evaluation: there is nothing to learn from it")).usage();
        }
        let tokenizer = Arc::new(Tokenizer::load(dir).bad_input()?);
        let profile = Profile::load(profile).usage()?;
        let plain = Profile { system: String::new(), user: "{question}".to_owned(), ..profile.clone() };
        let build = |profile, tools: &[ToolSpec]| {
            PromptBuilder::new(tokenizer.clone(), ChatTemplate::load(dir)?, profile, tools)
        };
        let steps = build(profile, &[ToolSpec::search()]).bad_input()?;
        let pairs = build(plain, &[]).bad_input()?;
        let end_of_turn = steps
            .end_of_turn_id()
            .ok_or_else(|| {
                let dir = dir.display();
                anyhow!("{dir}: the chat template closes an assistant turn with no control token; expected one such as <|im_end|>")
            })
            .bad_input()?;
        Ok(Self { steps, pairs, context, end_of_turn, tasks: HashMap::new(), keep: Keep::All, max_tokens: usize::MAX })
    }

    /// The examples of one row, or what is wrong with it.
    pub(crate) fn encode_row(&self, row: &Row) -> Result<Encoded, String> {
        let mut encoded = Encoded::default();
        match &row.content {
            RowContent::Json(text) => {
                let Record { id, task_id, split, form } = parse_record(text)?;
                let labels = Labels {
                    row: row.number,
                    trajectory_id: id.or_else(|| task_id.clone()).unwrap_or_else(|| format!("{:09}", row.number)),
                    split: split.or_else(|| Some(self.tasks.get(task_id.as_ref()?)?.split.clone())),
                    task_id,
                };
                match form {
                    Form::Chat(demonstration) => self.encode_chat(&labels, &demonstration, &mut encoded)?,
                    Form::Pair { prompt, completion } => {
                        self.encode_pair(&labels, &prompt, &completion, &mut encoded)?;
                    }
                    Form::Text(text) => self.encode_text(&labels, &text, &mut encoded)?,
                }
            }
            RowContent::Rollout(trajectory, steps) => {
                self.encode_rollout(row.number, trajectory, steps, &mut encoded)?;
            }
        }
        Ok(encoded)
    }

    fn encode_chat(&self, labels: &Labels, demonstration: &Demonstration, encoded: &mut Encoded) -> Result<(), String> {
        count(&mut encoded.counts.rows, "chat", 1);
        if demonstration.system_messages > 0 {
            count(&mut encoded.counts.notes, "system messages ignored", demonstration.system_messages);
        }
        if !demonstration.turns.iter().any(|turn| turn.trained) {
            return Err("every assistant turn has loss_mask 0: the row has no targets".to_owned());
        }
        let steps: Vec<Step> = demonstration.turns.iter().map(|turn| self.recorded_step(turn)).collect();
        self.check_memory(&steps)?;
        if self.keep == Keep::Correct && !self.is_correct(labels.task_id.as_deref(), &steps)? {
            count(&mut encoded.counts.dropped, "answer not correct (trajectories)", 1);
            return Ok(());
        }
        for (index, (step, turn)) in steps.iter().zip(&demonstration.turns).enumerate() {
            if !turn.trained {
                count(&mut encoded.counts.dropped, "loss_mask 0 (steps)", 1);
                continue;
            }
            let past = Past { question: &demonstration.question, steps: &steps[..index], builder: &self.steps };
            let prompt_ids =
                self.steps.prompt(past.question, &self.context.carried(&past)).map_err(|error| error.to_string())?;
            let parsed = self.parse(&step.completion_ids);
            let faulty = format_problem(self.steps.profile().memory, index, &parsed).is_some();
            let completion = Completion { ids: &step.completion_ids, segments: &row_segments(&parsed), faulty };
            self.push_step(labels, index, prompt_ids, &completion, encoded);
        }
        Ok(())
    }

    /// A turn as the step the agent would have recorded.
    fn recorded_step(&self, turn: &Turn) -> Step {
        let completion_ids = self.steps.completion_ids_from_text(&turn.completion);
        let segments = row_segments(&self.parse(&completion_ids));
        Step {
            task_id: String::new(),
            trajectory_index: 0,
            step_index: 0,
            prompt_ids: Vec::new(),
            completion_ids,
            sampling_logprobs: Vec::new(),
            segments,
            completion: turn.completion.clone(),
            observation: turn.observation.clone(),
            observation_ids: turn.observation.as_deref().map(|text| self.steps.observation_ids(text, None)),
            stop_reason: StopReason::Eos,
        }
    }

    /// Refuses trajectories that the `mempo` context would make forget everything.
    fn check_memory(&self, steps: &[Step]) -> Result<(), String> {
        if !self.context.needs_memory() {
            return Ok(());
        }
        for (index, step) in steps.iter().enumerate().skip(1) {
            let found = self.parse(&step.completion_ids).memory_count;
            if found != 1 {
                return Err(format!(
                    "step {index} (from 0) of {} has {found} <{}> segments, expected 1: --context {} carries nothing \
                     older than the last step; use --context react for trajectories without memory",
                    steps.len(),
                    self.steps.profile().tags.memory,
                    self.context.name()
                ));
            }
        }
        Ok(())
    }

    fn encode_pair(
        &self,
        labels: &Labels,
        prompt: &str,
        completion: &str,
        encoded: &mut Encoded,
    ) -> Result<(), String> {
        count(&mut encoded.counts.rows, "pair", 1);
        if completion.is_empty() {
            return Err("an empty completion: the row has no targets".to_owned());
        }
        let prompt_ids = self.pairs.prompt(prompt, &Carried::default()).map_err(|error| error.to_string())?;
        let completion_ids = self.pairs.completion_ids_from_text(completion);
        if let Some(targets) = self.push_completion(labels, 0, prompt_ids, &completion_ids, encoded) {
            count(&mut encoded.counts.targets, "completion", targets);
        }
        Ok(())
    }

    fn encode_text(&self, labels: &Labels, text: &str, encoded: &mut Encoded) -> Result<(), String> {
        count(&mut encoded.counts.rows, "text", 1);
        let ids = self.steps.tokenizer().encode_plain(text);
        if ids.len() < 2 {
            return Err(format!("{} tokens of text, expected at least 2: the row has no targets", ids.len()));
        }
        for (index, piece) in ids.chunks(self.max_tokens).enumerate() {
            if piece.len() < 2 {
                count(&mut encoded.counts.dropped, "last piece of one token", 1);
                continue;
            }
            count(&mut encoded.counts.targets, "text", piece.len() as u64 - 1);
            push(labels, index, piece.to_vec(), 1, encoded);
        }
        Ok(())
    }

    fn encode_rollout(
        &self,
        row: u64,
        trajectory: &Trajectory,
        steps: &[Step],
        encoded: &mut Encoded,
    ) -> Result<(), String> {
        count(&mut encoded.counts.rows, "rollout", 1);
        let dropped = match trajectory.reward {
            None => Some("failed around the policy (trajectories)"),
            Some(reward) if self.keep == Keep::Correct && reward < 1.0 => Some("answer not correct (trajectories)"),
            Some(_) => None,
        };
        if let Some(reason) = dropped {
            count(&mut encoded.counts.dropped, reason, 1);
            return Ok(());
        }
        let labels = Labels {
            row,
            trajectory_id: format!("{}/{}", trajectory.task_id, trajectory.trajectory_index),
            split: self.tasks.get(&trajectory.task_id).map(|task| task.split.clone()),
            task_id: Some(trajectory.task_id.clone()),
        };
        for (index, step) in steps.iter().enumerate() {
            self.check_ids(step)?;
            if matches!(step.stop_reason, StopReason::MaxTokens | StopReason::Error) || step.completion_ids.is_empty() {
                count(&mut encoded.counts.dropped, "completion cut short (steps)", 1);
                continue;
            }
            // As the agent saw it: only it knows whether the completion went on from an opened tag.
            let faulty = !trajectory.format_valid && {
                let parsed = self.parse(&step.completion_ids);
                format_problem(self.steps.profile().memory, index, &parsed).is_some()
            };
            let completion = Completion { ids: &step.completion_ids, segments: &step.segments, faulty };
            self.push_step(&labels, index, step.prompt_ids.clone(), &completion, encoded);
        }
        Ok(())
    }

    /// Stored ids must be this tokenizer's, stored segments ranges of them.
    fn check_ids(&self, step: &Step) -> Result<(), String> {
        let count = step.completion_ids.len() as i32;
        if let Some(found) = step.segments.iter().find(|s| !(0 <= s.start && s.start <= s.end && s.end <= count)) {
            let (task, step, start, end) = (&step.task_id, step.step_index, found.start, found.end);
            return Err(format!("task `{task}` step {step}: segment {start}..{end} of a completion of {count} ids"));
        }
        let size = self.steps.tokenizer().vocabulary_size();
        let foreign = step.prompt_ids.iter().chain(&step.completion_ids).find(|id| !(0..size as i32).contains(id));
        foreign.map_or(Ok(()), |id| {
            Err(format!(
                "task `{}` step {}: id {id}, expected 0..{size}: these rollouts were sampled with another tokenizer",
                step.task_id, step.step_index
            ))
        })
    }

    /// A step of a trajectory, with its targets counted by segment.
    fn push_step(
        &self,
        labels: &Labels,
        step_index: usize,
        prompt_ids: Vec<i32>,
        completion: &Completion<'_>,
        encoded: &mut Encoded,
    ) {
        let Some(targets) = self.push_completion(labels, step_index, prompt_ids, completion.ids, encoded) else {
            return;
        };
        encoded.counts.steps += 1;
        if completion.faulty {
            count(&mut encoded.counts.notes, "steps with format faults", 1);
        }
        let mut rest = targets;
        for segment in completion.segments {
            let length = (segment.end - segment.start) as u64;
            count(&mut encoded.counts.targets, segment_name(segment.kind), length);
            rest = rest.saturating_sub(length);
        }
        if rest > 0 {
            count(&mut encoded.counts.targets, "outside segments", rest);
        }
    }

    /// Appends one example whose targets are the completion and the end of the turn, and counts the latter; gives the
    /// number of the other targets, or nothing where the example is too long.
    fn push_completion(
        &self,
        labels: &Labels,
        step_index: usize,
        prompt_ids: Vec<i32>,
        completion_ids: &[i32],
        encoded: &mut Encoded,
    ) -> Option<u64> {
        let first_target = prompt_ids.len();
        let end_ids = self.steps.tokenizer().end_of_turn_ids();
        let ids = close_turn(prompt_ids, completion_ids, self.end_of_turn, end_ids);
        if ids.len() > self.max_tokens {
            count(&mut encoded.counts.dropped, "longer than --max-tokens", 1);
            return None;
        }
        let body = ids.len() - 1 - first_target;
        push(labels, step_index, ids, first_target, encoded);
        count(&mut encoded.counts.targets, "end of turn", 1);
        Some(body as u64)
    }

    /// Whether the last step answers the task as the agent's reward demands.
    fn is_correct(&self, task_id: Option<&str>, steps: &[Step]) -> Result<bool, String> {
        let task_id = task_id.ok_or("no `task_id`: --keep correct needs one to find the gold answers")?;
        let task = self
            .tasks
            .get(task_id)
            .ok_or_else(|| format!("task `{task_id}` is not among the tasks given by --tasks"))?;
        let parsed: Vec<ParsedCompletion> = steps.iter().map(|step| self.parse(&step.completion_ids)).collect();
        let rule = self.steps.profile().memory;
        let tags_valid = parsed.iter().enumerate().all(|(index, parsed)| format_problem(rule, index, parsed).is_none());
        let answer = parsed.last().and_then(|parsed| parsed.answer.as_deref());
        let status = if answer.is_some() { Status::Ok } else { Status::MaxSteps };
        Ok(outcome(&task.objectives, answer, tags_valid, status).reward == Some(1.0))
    }

    fn parse(&self, completion_ids: &[i32]) -> ParsedCompletion {
        parse_completion(self.steps.tokenizer(), completion_ids, self.steps.profile())
    }
}

/// Prompt, completion and exactly one end of the turn: whichever of `end_ids` the completion ends with gives way to
/// `end_of_turn`, the one the chat template writes.
fn close_turn(prompt_ids: Vec<i32>, completion_ids: &[i32], end_of_turn: i32, end_ids: &[i32]) -> Vec<i32> {
    let body = match completion_ids.split_last() {
        Some((last, body)) if *last == end_of_turn || end_ids.contains(last) => body,
        _ => completion_ids,
    };
    let mut ids = prompt_ids;
    ids.extend_from_slice(body);
    ids.push(end_of_turn);
    ids
}

/// Appends the example whose targets are `ids[first_target..]`.
fn push(labels: &Labels, step_index: usize, ids: Vec<i32>, first_target: usize, encoded: &mut Encoded) {
    let target_count = ids.len() - first_target;
    encoded.counts.examples += 1;
    encoded.counts.tokens += ids.len() as u64;
    encoded.examples.push(SftExample {
        example_id: format!("{:09}-{step_index:05}", labels.row),
        trajectory_id: labels.trajectory_id.clone(),
        task_id: labels.task_id.clone(),
        split: labels.split.clone(),
        step_index: step_index as i32,
        loss_mask: (0..ids.len()).map(|position| position >= first_target).collect(),
        target_count: target_count as i32,
        input_ids: ids,
    });
}

fn segment_name(kind: SegmentKind) -> &'static str {
    match kind {
        SegmentKind::Memory => "memory",
        SegmentKind::Think => "think",
        SegmentKind::ToolCall => "tool call",
        SegmentKind::Answer => "answer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The five-token case: two of the prompt, two of the completion, the end of the turn.
    #[test]
    fn targets_are_the_completion_and_one_end_of_turn() {
        let labels = Labels { row: 3, trajectory_id: "t".into(), task_id: None, split: None };
        let check = |completion: &[i32], ids: &[i32], mask: &[bool]| {
            let mut encoded = Encoded::default();
            push(&labels, 1, close_turn(vec![1, 2], completion, 9, &[8]), 2, &mut encoded);
            let example = &encoded.examples[0];
            assert_eq!((&example.input_ids[..], &example.loss_mask[..]), (ids, mask), "{completion:?}");
            assert_eq!(example.target_count as usize, mask.iter().filter(|target| **target).count());
            assert_eq!(example.example_id, "000000003-00001");
        };
        let (no, yes) = (false, true);
        check(&[5, 6], &[1, 2, 5, 6, 9], &[no, no, yes, yes, yes]);
        check(&[5, 6, 9], &[1, 2, 5, 6, 9], &[no, no, yes, yes, yes]);
        check(&[5, 6, 8], &[1, 2, 5, 6, 9], &[no, no, yes, yes, yes]);
        check(&[9, 6], &[1, 2, 9, 6, 9], &[no, no, yes, yes, yes]);
        check(&[5], &[1, 2, 5, 9], &[no, no, yes, yes]);
    }
}
