//! What is asked of the model: the gold answer after a memory, and after what the bias conditions on.
//!
//! A probe is a context followed by answer ids, and only the answer counts. MemPO, arXiv 2603.00680, eq. 5-6:
//! `P[ans | x]` is the geometric mean of the answer tokens' probabilities, `R^M = P[ans | memory] - P[ans | bias]`.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{anyhow, ensure};
use clap::{Args, ValueEnum};
use mempo_agent::{ContextPolicy, Past, React};
use mempo_data::{Key, Segment, SegmentKind, Step, StopReason, Task};
use mempo_run::ResultExt;
use mempo_text::{Carried, MemoryRule, Profile, PromptBuilder};
use serde::Serialize;

use crate::normalise::MemorySteps;
use crate::rollouts::Attempt;

/// What the bias conditions on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Bias {
    /// Question and all earlier steps, as they were.
    Prefix,
    /// What the policy saw at the step.
    Context,
    /// Question and the memory of the step before.
    PreviousMemory,
    /// The question alone.
    Null,
    /// Nothing: the mean over the task's trajectories of what their memories make of the answer.
    Reference,
    /// No bias: the reward is the answer's probability.
    None,
}

/// Where the memory is shown to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ProbeKind {
    /// After the question alone.
    Memory,
    /// After the step's own prompt.
    InPlace,
}

/// A context and the answer ids after it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Probe {
    pub(crate) ids: Vec<i32>,
    /// Where the answer starts.
    pub(crate) answer_start: usize,
}

impl Probe {
    pub(crate) fn answer(&self) -> Range<usize> {
        self.answer_start..self.ids.len()
    }
}

/// What is asked about one memory.
#[derive(Debug, Clone)]
pub(crate) struct MemoryProbes {
    pub(crate) key: Key,
    pub(crate) memory: Probe,
    pub(crate) bias: Option<Probe>,
    /// The memory hit a length limit.
    pub(crate) truncated: bool,
}

/// What is asked about one task.
#[derive(Debug, Clone)]
pub(crate) struct TaskProbes {
    pub(crate) task_id: String,
    /// The question alone: what the model knows by heart.
    pub(crate) closed_book: Probe,
    /// Each objective's own tokens within the answer.
    pub(crate) spans: Vec<Range<usize>>,
    pub(crate) memories: Vec<MemoryProbes>,
}

impl TaskProbes {
    /// Every probe, repeated as often as it is asked for.
    pub(crate) fn probes(&self) -> impl Iterator<Item = &Probe> {
        let memories = self.memories.iter().flat_map(|memory| std::iter::once(&memory.memory).chain(&memory.bias));
        std::iter::once(&self.closed_book).chain(memories)
    }
}

/// Which of an objective's gold answers is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Alias {
    /// The first.
    First,
    /// Objective by objective, the one whose own tokens are likeliest after the question alone while the other objectives
    /// have their first: the form that the judge would write. It is chosen once a task, not anew after each memory, so that
    /// memory and bias are asked for the same answer
    Likeliest,
}

/// What decides the contexts.
#[derive(Debug, Clone, Copy, Args, Serialize)]
pub(crate) struct ProbeOptions {
    /// What the bias conditions on
    #[arg(long, value_enum, default_value = "prefix")]
    pub(crate) bias: Bias,
    /// Where the memory is shown to the model
    #[arg(long, value_enum, default_value = "memory")]
    pub(crate) probe: ProbeKind,
    /// Which gold answer of an objective is scored, where it has several
    #[arg(long, value_enum, default_value = "first")]
    pub(crate) alias: Alias,
    /// Memories of a trajectory that are scored: for `advantages --memory-steps final` the last is enough
    #[arg(long, value_enum, default_value = "all")]
    #[serde(skip_serializing_if = "MemorySteps::is_all")]
    pub(crate) memory_steps: MemorySteps,
    /// Most tokens of a memory, as the rollout's steps saw it.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) max_memory_tokens: Option<usize>,
}

impl ProbeOptions {
    /// Refuses what makes no sense of a rollout in which documents were read.
    pub(crate) fn check(&self, profile: &Profile) -> anyhow::Result<()> {
        ensure!(
            self.bias != Bias::Prefix || profile.reading.is_none(),
            "--bias prefix is all that was read, which no window need hold: with the profile `{}` choose --bias null, \
             previous-memory, context, reference or none",
            profile.name
        );
        Ok(())
    }
}

/// Which of an objective's answers is scored, by its place; the first where nothing is said.
pub(crate) type Chosen = Vec<usize>;

/// A task's answer with one alias an objective, after the question alone.
pub(crate) struct AliasProbe {
    /// The objective and the alias that is tried.
    pub(crate) tried: (usize, usize),
    pub(crate) probe: Probe,
    /// The alias's own tokens within the answer.
    pub(crate) span: Range<usize>,
}

/// Every alias of every objective that has several, the other objectives having their first.
pub(crate) fn alias_probes(
    builder: &PromptBuilder,
    options: ProbeOptions,
    task: &Task,
) -> anyhow::Result<Vec<AliasProbe>> {
    let mut probes = Vec::new();
    for (objective, known) in task.objectives.iter().enumerate().filter(|(_, known)| known.answers.len() > 1) {
        for alias in 0..known.answers.len() {
            let mut chosen = vec![0; task.objectives.len()];
            chosen[objective] = alias;
            let (layout, spans) = Layout::new(builder, options, task, &chosen)?;
            let probe = layout.probe(layout.question_prompt.clone());
            probes.push(AliasProbe { tried: (objective, alias), probe, span: spans[objective].clone() });
        }
    }
    Ok(probes)
}

/// Lays out the probes of a task's memories.
pub(crate) fn task_probes(
    builder: &PromptBuilder,
    options: ProbeOptions,
    task: &Task,
    attempts: &[Attempt],
    chosen: &Chosen,
) -> anyhow::Result<TaskProbes> {
    let (layout, spans) = Layout::new(builder, options, task, chosen)?;
    let mut memories = Vec::new();
    for attempt in attempts {
        layout.check_first_prompt(&attempt.steps)?;
        let first = match options.memory_steps {
            MemorySteps::All => 0,
            MemorySteps::Final => attempt.steps.iter().rposition(has_memory).unwrap_or(0),
        };
        for index in first..attempt.steps.len() {
            memories.extend(layout.memory_probes(&attempt.steps, index)?);
        }
    }
    let closed_book = layout.probe(layout.question_prompt.clone());
    Ok(TaskProbes { task_id: task.task_id.clone(), closed_book, spans, memories })
}

struct Layout<'a> {
    builder: &'a PromptBuilder,
    options: ProbeOptions,
    task: &'a Task,
    question_prompt: Vec<i32>,
    answer: Vec<i32>,
}

impl<'a> Layout<'a> {
    /// Also gives each objective's own tokens within the answer.
    fn new(
        builder: &'a PromptBuilder,
        options: ProbeOptions,
        task: &'a Task,
        chosen: &[usize],
    ) -> anyhow::Result<(Self, Vec<Range<usize>>)> {
        let answers = task.objectives.iter().enumerate().map(|(place, objective)| {
            let alias = chosen.get(place).copied().unwrap_or(0);
            objective.answers.get(alias).map(String::as_str)
        });
        let answers = answers.collect::<Option<Vec<_>>>().unwrap_or_default();
        let answer = builder.answer_ids(&answers);
        if answers.is_empty() || answer.spans.iter().any(Range::is_empty) {
            return Err(anyhow!("task {}: an objective has no answer to score: compose the tasks again", task.task_id))
                .bad_input();
        }
        let question_prompt = builder.prompt(&task.question, &Carried::default()).bad_input()?;
        Ok((Self { builder, options, task, question_prompt, answer: answer.ids }, answer.spans))
    }

    /// The context, the answer's opening exactly as the policy writes it, the answer.
    fn probe(&self, mut ids: Vec<i32>) -> Probe {
        ids.extend(self.builder.answer_opening_ids());
        let answer_start = ids.len();
        ids.extend(&self.answer);
        Probe { ids, answer_start }
    }

    fn memory_probes(&self, steps: &[Step], index: usize) -> anyhow::Result<Option<MemoryProbes>> {
        let step = &steps[index];
        let Some(memory) = memory_segment(step)? else { return Ok(None) };
        let bias = self.bias_context(steps, index)?;
        let (context, is_capped) = self.memory_context(step, memory)?;
        let is_cut = step.stop_reason == StopReason::MaxTokens && memory.end as usize == step.completion_ids.len();
        Ok(Some(MemoryProbes {
            key: key(step),
            memory: self.probe(context),
            bias: bias.map(|context| self.probe(context)),
            truncated: is_capped || is_cut,
        }))
    }

    /// A memory as the next step saw it, after what the options say; and whether it was capped.
    fn memory_context(&self, step: &Step, memory: Segment) -> anyhow::Result<(Vec<i32>, bool)> {
        let range = memory.start as usize..memory.end as usize;
        if self.builder.profile().memory == MemoryRule::Whole {
            return Ok((self.whole_memory_context(step, range)?, false));
        }
        let before = match self.options.probe {
            ProbeKind::Memory => self.question_prompt.clone(),
            ProbeKind::InPlace => [&step.prompt_ids, &step.completion_ids[..range.start]].concat(),
        };
        let segment = mempo_text::Segment { kind: mempo_text::SegmentKind::Memory, range };
        let most = self.options.max_memory_tokens;
        let capped = most.and_then(|most| self.builder.cap_memory(&step.completion_ids, &segment, most));
        let memory = match &capped {
            Some((ids, segment)) => self.builder.memory_ids(ids, segment),
            None => self.builder.memory_ids(&step.completion_ids, &segment),
        };
        Ok(([before, memory].concat(), capped.is_some()))
    }

    /// The same where a memory is a whole completion: it has its place in the prompt that asks for the answer.
    fn whole_memory_context(&self, step: &Step, memory: Range<usize>) -> anyhow::Result<Vec<i32>> {
        if self.options.probe == ProbeKind::InPlace {
            return Ok([&step.prompt_ids, &step.completion_ids[..memory.end]].concat());
        }
        let memory = Some(Cow::Borrowed(&step.completion_ids[memory]));
        self.builder.prompt(&self.task.question, &Carried { memory, ..Carried::default() }).bad_input()
    }

    fn bias_context(&self, steps: &[Step], index: usize) -> anyhow::Result<Option<Vec<i32>>> {
        let (earlier, step) = (&steps[..index], &steps[index]);
        Ok(match self.options.bias {
            Bias::None | Bias::Reference => None,
            Bias::Null => Some(self.question_prompt.clone()),
            Bias::Context => Some(step.prompt_ids.clone()),
            Bias::Prefix => {
                let past = Past { question: &self.task.question, steps: earlier, document: &[], builder: self.builder };
                Some(self.builder.prompt(past.question, &React.carried(&past)).bad_input()?)
            }
            Bias::PreviousMemory => {
                let memory =
                    earlier.last().map(|step| Ok::<_, anyhow::Error>((step, memory_segment(step)?))).transpose()?;
                Some(match memory {
                    Some((step, Some(memory))) => self.memory_context(step, memory)?.0,
                    _ => self.question_prompt.clone(),
                })
            }
        })
    }

    /// The prompt rebuilt from the task must be the one that was sampled from: else the tasks, the tokenizer or the
    /// profile are not the rollout's own, and every score would be about something else.
    fn check_first_prompt(&self, steps: &[Step]) -> anyhow::Result<()> {
        let Some(first) = steps.first() else { return Ok(()) };
        // What was read stands between two parts that are known.
        let reads = self.builder.profile().reading.is_some();
        let chunk = reads.then_some(Cow::Borrowed(&[][..]));
        let expected =
            self.builder.prompt(&self.task.question, &Carried { chunk, ..Carried::default() }).bad_input()?;
        let pairs = first.prompt_ids.iter().zip(&expected);
        let place = pairs.take_while(|(found, expected)| found == expected).count();
        if first.prompt_ids == expected || (reads && first.prompt_ids.ends_with(&expected[place..])) {
            return Ok(());
        }
        Err(anyhow!(
            "{}: prompt_ids differ at position {place} from the prompt built for the task: use the tasks and the \
             tokenizer that the rollout was sampled with",
            key(first)
        ))
        .bad_input()
    }
}

pub(crate) fn key(step: &Step) -> Key {
    Key::of_step(&step.task_id, step.trajectory_index, step.step_index)
}

fn has_memory(step: &Step) -> bool {
    step.segments.iter().any(|segment| segment.kind == SegmentKind::Memory)
}

/// The step's memory: the first segment of that kind.
pub(crate) fn memory_segment(step: &Step) -> anyhow::Result<Option<Segment>> {
    let memory = step.segments.iter().find(|segment| segment.kind == SegmentKind::Memory).copied();
    memory.map(|segment| check_range(step, segment).bad_input()).transpose()
}

fn check_range(step: &Step, segment: Segment) -> anyhow::Result<Segment> {
    let (Segment { start, end, .. }, count) = (segment, step.completion_ids.len());
    ensure!(
        0 <= start && start < end && end as usize <= count,
        "{}: memory segment {start}..{end} is not a range of the completion's {count} ids",
        key(step)
    );
    Ok(segment)
}
