//! Rows -> examples: ids and loss masks.
//!
//! Prompts come from [`PromptBuilder::prompt`] under a context policy, the same function and the same policy as in
//! rollouts, so that a step is trained on exactly the ids it will see. `loss_mask[i]` is true where `input_ids[i]` is a
//! prediction target: the policy's own tokens of this step and the id that ends its turn, nothing else. Stored rollouts
//! keep their ids; text is encoded once, here.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use anyhow::anyhow;
use mempo_agent::{
    ContextOptions, ContextPolicy, Past, RewardKind, ToolTable, check_profile, context_policy, format_problem, outcome,
    row_segments,
};
use mempo_data::{Objective, Segment, SegmentKind, Status, Step, StopReason, Trajectory};
use mempo_run::ResultExt;
use mempo_text::{
    Carried, ChatTemplate, ParsedCompletion, Profile, PromptBuilder, Tokenizer, ToolSpec, parse_completion,
};
use tracing::warn;

use crate::condition::Facts;
use crate::counts::count;
use crate::example::{Encoded, Labels, close_turn, push};
use crate::gold::{Tasks, key, leaks, objectives};
use crate::kin::Kin;
use crate::record::{Demonstration, Form, InputFormat, Record, Turn, parse_record};
use crate::self_test::drift;
use crate::source::{Row, RowContent};

/// Everything fixed while rows are encoded.
pub(crate) struct Encoder {
    steps: PromptBuilder,
    pairs: PromptBuilder,
    context: Box<dyn ContextPolicy>,
    end_of_turn: i32,
    /// What is asked of it.
    pub(crate) settings: Settings,
}

/// What is asked of an encoder.
pub(crate) struct Settings {
    /// How rows are read.
    pub(crate) format: InputFormat,
    /// Those that were given.
    pub(crate) tasks: Tasks,
    /// Longest example; plain text is cut to it, others are dropped.
    pub(crate) max_tokens: usize,
    /// Steps that a rollout will have at most: some profiles tell how many are left.
    pub(crate) max_steps: usize,
    /// What is put aside, if anything is to be.
    pub(crate) validation: Option<Kin>,
    /// Whether leaks are looked for, which takes time.
    pub(crate) find_leaks: bool,
    /// Whether rows keep their text to be compared by.
    pub(crate) keep_text: bool,
}

/// What a step's completion is, for the examples and for the books.
struct Completion<'a> {
    ids: &'a [i32],
    segments: &'a [Segment],
    faulty: bool,
}

impl Encoder {
    /// Loads tokenizer and template from `dir`; `profile` is a name or a folder.
    pub(crate) fn load(
        dir: &Path,
        (profile, tools): (&str, &ToolTable),
        context: &ContextOptions,
        settings: Settings,
    ) -> anyhow::Result<Self> {
        let context = context_policy(context).usage()?;
        if context.answers_at_once() {
            let name = context.name();
            return Err(anyhow!("--context {name} is for evaluation: there is nothing to learn from it")).usage();
        }
        let tokenizer = Arc::new(Tokenizer::load(dir).bad_input()?);
        let profile = Profile::load(profile).usage()?;
        tools.check(&profile).usage()?;
        check_profile(&*context, &profile).map_err(anyhow::Error::msg).usage()?;
        let plain = Profile { system: String::new(), user: "{question}".to_owned(), ..profile.clone() };
        let build = |profile, tools: &[ToolSpec]| {
            PromptBuilder::new(tokenizer.clone(), ChatTemplate::load(dir)?, profile, tools)
        };
        let steps = build(profile, &tools.specs()).bad_input()?;
        let pairs = build(plain, &[]).bad_input()?;
        let end_of_turn = steps
            .end_of_turn_id()
            .ok_or_else(|| {
                let dir = dir.display();
                anyhow!("{dir}: the chat template closes an assistant turn with no control token; expected one such as <|im_end|>")
            })
            .bad_input()?;
        if let Some(told) = drift(&steps, end_of_turn).bad_input()? {
            warn!("{}: {told}", dir.display());
        }
        Ok(Self { steps, pairs, context, end_of_turn, settings })
    }

    /// The examples of one row, or what is wrong with it.
    pub(crate) fn encode_row(&self, row: &Row) -> Result<Encoded, String> {
        let mut encoded = Encoded::default();
        match &row.content {
            RowContent::Json(text) => {
                let record = parse_record(text, self.settings.format)?;
                let labels = self.labels(row.number, &record)?;
                record.ignored.iter().for_each(|(name, number)| count(&mut encoded.counts.notes, name, *number));
                match &record.form {
                    Form::Chat(demonstration) => self.encode_chat(&labels, demonstration, &mut encoded)?,
                    Form::Pair { prompt, completion } => self.encode_pair(&labels, prompt, completion, &mut encoded)?,
                    Form::Text(text) => self.encode_text(&labels, text, &mut encoded)?,
                }
            }
            RowContent::Rollout(trajectory, steps) => {
                self.encode_rollout(row.number, trajectory, steps, &mut encoded)?;
            }
        }
        Ok(encoded)
    }

    /// What its examples share, some of it from the row's task.
    fn labels(&self, row: u64, record: &Record) -> Result<Labels<'_>, String> {
        let Record { id, task_id, split, source, gold, .. } = record;
        let question = record.question();
        let task = self.settings.tasks.find(task_id.as_deref(), question)?;
        let objectives = match (task, gold) {
            (Some(task), _) => Some(Cow::Borrowed(task.objectives.as_slice())),
            (None, gold) => gold.clone().map(|gold| Cow::Owned(objectives(gold))),
        };
        let trajectory_id = id.as_ref().or(task_id.as_ref()).cloned().unwrap_or_else(|| format!("{row:09}"));
        let task_id = task_id.clone().or_else(|| Some(task?.task_id.clone()));
        let split = split.clone().or_else(|| Some(task?.split.clone()));
        let asked = question.map(key);
        let kin = task_id.as_ref().or(asked.as_ref()).unwrap_or(&trajectory_id);
        Ok(Labels {
            row,
            split: self.split(split, kin),
            source: source.clone().or_else(|| Some(task?.source.clone())),
            question: question.map(str::to_owned),
            trajectory_id,
            task_id,
            objectives,
        })
    }

    /// The split of a row; `kin` is what it shares with rows that must be of the same.
    fn split(&self, given: Option<String>, kin: &str) -> Option<String> {
        match &self.settings.validation {
            Some(all) if given.as_ref().is_none_or(|split| split == "train") => {
                Some(if all.is_aside(kin) { "dev" } else { "train" }.to_owned())
            }
            _ => given,
        }
    }

    fn encode_chat(
        &self,
        labels: &Labels<'_>,
        demonstration: &Demonstration,
        encoded: &mut Encoded,
    ) -> Result<(), String> {
        if self.context.reads_documents() {
            return Err(format!(
                "--context {} reads documents, which a chat does not hold: give rollouts, or a prompt and a completion a row",
                self.context.name()
            ));
        }
        count(&mut encoded.counts.rows, "chat", 1);
        demonstration.ignored.iter().for_each(|(name, number)| count(&mut encoded.counts.notes, name, *number));
        if !demonstration.turns.iter().any(|turn| turn.trained) {
            return Err(
                "no assistant turn is to be learnt (loss_mask 0, weight 0 or train false): the row has no targets"
                    .to_owned(),
            );
        }
        let mut steps: Vec<Step> =
            demonstration.turns.iter().enumerate().map(|(index, turn)| self.recorded_step(index, turn)).collect();
        let parsed: Vec<ParsedCompletion> = steps.iter().map(|step| self.parse(&step.completion_ids)).collect();
        steps.iter_mut().zip(&parsed).for_each(|(step, parsed)| step.segments = row_segments(parsed));
        let whole = self.check_memory(&parsed)?;
        let rule = self.steps.profile().memory;
        let faulty = |index: usize| format_problem(rule, index, &parsed[index]).is_some();
        for (index, (step, turn)) in steps.iter().zip(&demonstration.turns).enumerate() {
            if !turn.trained {
                count(&mut encoded.counts.dropped, "not to be learnt (steps)", 1);
                continue;
            }
            let past =
                Past { question: &demonstration.question, steps: &steps[..index], document: &[], builder: &self.steps };
            let prompt_ids = self.steps.prompt(past.question, &self.context.carried(&past));
            let prompt_ids = prompt_ids.map_err(|error| error.to_string())?;
            let completion = Completion { ids: &step.completion_ids, segments: &step.segments, faulty: faulty(index) };
            self.push_step(labels, index, prompt_ids, &completion, encoded);
        }
        let answer = parsed.last().and_then(|parsed| parsed.answer.as_deref());
        encoded.facts.format_valid = Some(!(0..parsed.len()).any(faulty));
        judge(labels.objectives.as_deref(), answer, &mut encoded.facts);
        encoded.facts.tool_calls = parsed.iter().filter(|parsed| parsed.tool_call.is_some()).count() as i64;
        self.describe("chat", labels, &steps, encoded);
        if !whole {
            encoded.leave_out("memory missing in a step (trajectories)");
        }
        Ok(())
    }

    /// What filters ask of a trajectory beside its judgement.
    fn describe(&self, form: &str, labels: &Labels<'_>, steps: &[Step], encoded: &mut Encoded) {
        let (facts, examples) = (&mut encoded.facts, &encoded.examples);
        let lengths = || examples.iter().map(|example| example.input_ids.len() as i64);
        facts.trajectory_id.clone_from(&labels.trajectory_id);
        facts.task_id.clone_from(&labels.task_id);
        facts.source.clone_from(&labels.source);
        facts.split.clone_from(&labels.split);
        facts.question.clone_from(&labels.question);
        form.clone_into(&mut facts.form);
        facts.steps = steps.len() as i64;
        facts.tokens = lengths().sum();
        facts.peak_tokens = lengths().max().unwrap_or_default();
        facts.target_tokens = examples.iter().map(|example| i64::from(example.target_count)).sum();
        if self.settings.find_leaks && !steps.is_empty() {
            let memories: Vec<String> = steps.iter().map(|step| self.memory(step)).collect();
            let memories: Vec<&str> = memories.iter().map(String::as_str).collect();
            let observations: Vec<&str> = steps.iter().map(|step| step.observation.as_deref().unwrap_or("")).collect();
            let question = labels.question.as_deref().unwrap_or("");
            let objectives = labels.objectives.as_deref();
            facts.leaks = objectives.map(|objectives| leaks(objectives, question, &memories, &observations));
        }
        if self.settings.keep_text {
            let question = labels.question.as_ref().or(labels.task_id.as_ref()).map_or("", String::as_str);
            let completions = steps.iter().map(|step| step.completion.as_str());
            encoded.text = [question].into_iter().chain(completions).collect::<Vec<_>>().join("\n");
        }
    }

    /// A turn as the step the agent would have recorded.
    fn recorded_step(&self, index: usize, turn: &Turn) -> Step {
        let completion_ids = self.steps.completion_ids_from_text(&turn.completion);
        let steps_left = self.settings.max_steps.saturating_sub(index + 1);
        let observation_ids =
            turn.observation.as_deref().map(|text| self.steps.observation_ids(text, Some(steps_left)));
        Step {
            task_id: String::new(),
            trajectory_index: 0,
            step_index: 0,
            prompt_ids: Vec::new(),
            completion_ids,
            sampling_logprobs: Vec::new(),
            segments: Vec::new(),
            completion: turn.completion.clone(),
            observation: observation_ids.as_deref().map(|ids| self.steps.tokenizer().decode(ids)),
            observation_ids,
            stop_reason: StopReason::Eos,
        }
    }

    /// Whether every step that needs a memory has one. Refuses trajectories without any, which a context that carries
    /// memories would make forget everything.
    fn check_memory(&self, parsed: &[ParsedCompletion]) -> Result<bool, String> {
        if !self.context.needs_memory() || parsed.len() < 2 {
            return Ok(true);
        }
        if parsed.iter().all(|step| step.memory_count == 0) {
            return Err(format!(
                "none of the {} steps has a <{}> segment: --context {} carries nothing older than the last step; use \
                 --context react for trajectories without memory",
                parsed.len(),
                self.steps.profile().tags.memory,
                self.context.name()
            ));
        }
        Ok(parsed[1..].iter().all(|step| step.memory_count == 1))
    }

    fn encode_pair(
        &self,
        labels: &Labels<'_>,
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
        self.describe("pair", labels, &[], encoded);
        if self.settings.keep_text {
            encoded.text = [prompt, completion].join("\n");
        }
        Ok(())
    }

    fn encode_text(&self, labels: &Labels<'_>, text: &str, encoded: &mut Encoded) -> Result<(), String> {
        count(&mut encoded.counts.rows, "text", 1);
        let ids = self.steps.tokenizer().encode_plain(text);
        if ids.len() < 2 {
            return Err(format!("{} tokens of text, expected at least 2: the row has no targets", ids.len()));
        }
        for (index, piece) in ids.chunks(self.settings.max_tokens).enumerate() {
            if piece.len() < 2 {
                count(&mut encoded.counts.dropped, "last piece of one token", 1);
                continue;
            }
            count(&mut encoded.counts.targets, "text", piece.len() as u64 - 1);
            push(labels, index, piece.to_vec(), 1, encoded);
        }
        self.describe("text", labels, &[], encoded);
        if self.settings.keep_text {
            text.clone_into(&mut encoded.text);
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
        let Some(reward) = trajectory.reward else {
            encoded.leave_out("failed around the policy (trajectories)");
            return Ok(());
        };
        let task = self.settings.tasks.find(Some(&trajectory.task_id), None)?;
        let labels = Labels {
            row,
            trajectory_id: format!("{}/{}", trajectory.task_id, trajectory.trajectory_index),
            split: self.split(task.map(|task| task.split.clone()), &trajectory.task_id),
            source: task.map(|task| task.source.clone()),
            question: task.map(|task| task.question.clone()),
            task_id: Some(trajectory.task_id.clone()),
            objectives: task.map(|task| Cow::Borrowed(task.objectives.as_slice())),
        };
        for (index, step) in steps.iter().enumerate() {
            self.check_ids(step)?;
            if matches!(step.stop_reason, StopReason::MaxTokens | StopReason::Error) || step.completion_ids.is_empty() {
                count(&mut encoded.counts.dropped, "completion cut short (steps)", 1);
                continue;
            }
            let faulty = !trajectory.format_valid && self.is_faulty(index, step);
            let completion = Completion { ids: &step.completion_ids, segments: &step.segments, faulty };
            self.push_step(&labels, index, step.prompt_ids.clone(), &completion, encoded);
        }
        encoded.facts = Facts {
            answer: trajectory.answer.clone(),
            tool_calls: i64::from(trajectory.tool_calls),
            format_valid: Some(trajectory.format_valid),
            correct: Some(reward >= 1.0),
            exact_match: mean(&trajectory.exact_match),
            f1: mean(&trajectory.f1),
            ..Facts::default()
        };
        self.describe("rollout", &labels, steps, encoded);
        Ok(())
    }

    /// Whether a step of a trajectory broke the format: as the agent saw it, since only it knows whether a completion went on from
    /// an opened tag. Where all of a completion is a memory, the agent was reading.
    fn is_faulty(&self, index: usize, step: &Step) -> bool {
        let read = self.steps.parse_memory(&step.completion_ids);
        let reads = read.memory_count == 1 && row_segments(&read) == step.segments;
        let parsed = if reads { read } else { self.parse(&step.completion_ids) };
        format_problem(self.steps.profile().memory, index, &parsed).is_some()
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
        labels: &Labels<'_>,
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
        labels: &Labels<'_>,
        step_index: usize,
        prompt_ids: Vec<i32>,
        completion_ids: &[i32],
        encoded: &mut Encoded,
    ) -> Option<u64> {
        let first_target = prompt_ids.len();
        let end_ids = self.steps.tokenizer().end_of_turn_ids();
        let ids = close_turn(prompt_ids, completion_ids, self.end_of_turn, end_ids);
        if ids.len() > self.settings.max_tokens {
            count(&mut encoded.counts.dropped, "longer than --max-tokens", 1);
            return None;
        }
        let body = ids.len() - 1 - first_target;
        push(labels, step_index, ids, first_target, encoded);
        count(&mut encoded.counts.targets, "end of turn", 1);
        Some(body as u64)
    }

    /// What stands in the first memory of a step; empty if there is none.
    fn memory(&self, step: &Step) -> String {
        let memory = step.segments.iter().find(|segment| segment.kind == SegmentKind::Memory);
        let ids = memory.and_then(|memory| step.completion_ids.get(memory.start as usize..memory.end as usize));
        ids.map_or_else(String::new, |ids| self.steps.tokenizer().decode(ids))
    }

    fn parse(&self, completion_ids: &[i32]) -> ParsedCompletion {
        parse_completion(self.steps.tokenizer(), completion_ids, self.steps.profile())
    }
}

/// What the answer is worth, where that can be known.
fn judge(objectives: Option<&[Objective]>, answer: Option<&str>, facts: &mut Facts) {
    facts.answer = answer.map(str::to_owned);
    let Some(objectives) = objectives else { return };
    let status = if answer.is_some() { Status::Ok } else { Status::MaxSteps };
    let judged = outcome(objectives, answer, facts.format_valid == Some(true), status, RewardKind::ExactMatch);
    facts.format_valid = Some(judged.format_valid);
    facts.correct = Some(judged.reward == Some(1.0));
    facts.exact_match = mean(&judged.exact_match);
    facts.f1 = mean(&judged.f1);
}

/// Of single-precision numbers, to the digits that they have: 0.9 is to be 0.9 in a condition.
fn mean(values: &[f32]) -> Option<f64> {
    let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64;
    (!values.is_empty()).then(|| (mean * 1e6).round() / 1e6)
}

fn segment_name(kind: SegmentKind) -> &'static str {
    match kind {
        SegmentKind::Memory => "memory",
        SegmentKind::Think => "think",
        SegmentKind::ToolCall => "tool call",
        SegmentKind::Answer => "answer",
    }
}
