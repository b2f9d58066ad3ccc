//! A trajectory in the making: its steps so far, how it ended, what it cost.

use mempo_data::{Status, Step, StopReason, Task, Trajectory};
use mempo_text::{ParsedCompletion, ToolCall, parse_continuation};

use crate::calls::Answer;
use crate::outcome::{format_problem, outcome, row_segments};
use crate::{Agent, Generated, Generation, OnToolFailure, Start, ToolFailure, observation};

/// One attempt at a task.
pub(crate) struct Attempt<'t> {
    pub(crate) task: &'t Task,
    pub(crate) trajectory_index: i32,
    pub(crate) steps: Vec<Step>,
    /// What it reads.
    pub(crate) document: &'t [i32],
    /// What the engine is working on.
    pub(crate) prompt_ids: Vec<i32>,
    /// The last step's call, while a tool elsewhere works on it.
    open_call: Option<ToolCall>,
    end: Option<End>,
    /// The first failure of a tool that the policy was told of.
    fault: Option<String>,
    tags_valid: bool,
    tool_calls: i32,
    unique_tokens: usize,
    /// Steps in the order of their ids.
    sorted: Vec<usize>,
}

struct End {
    status: Status,
    answer: Option<String>,
    error: Option<String>,
}

impl End {
    /// What a tool did wrong on the way is not the policy's, whatever the policy made of it.
    fn after(self, fault: Option<String>) -> Self {
        let Some(fault) = fault.filter(|_| self.status.is_policy()) else { return self };
        let error = [Some(fault), self.error].into_iter().flatten().collect::<Vec<_>>().join("; ");
        Self { status: Status::ToolError, answer: self.answer, error: Some(error) }
    }
}

impl<'t> Attempt<'t> {
    pub(crate) fn new(start: Start<'t>) -> Self {
        let Start { task, trajectory_index, steps, document } = start;
        let mut steps = steps.to_vec();
        for step in &mut steps {
            step.trajectory_index = trajectory_index;
        }
        let mut attempt = Self {
            task,
            trajectory_index,
            steps: Vec::new(),
            document,
            prompt_ids: Vec::new(),
            open_call: None,
            end: None,
            fault: None,
            tags_valid: true,
            tool_calls: 0,
            unique_tokens: 0,
            sorted: Vec::new(),
        };
        for step in steps {
            attempt.push(step);
        }
        attempt
    }

    fn push(&mut self, step: Step) {
        let place = self.sorted.partition_point(|other| ids(&self.steps[*other]).lt(ids(&step)));
        self.sorted.insert(place, self.steps.len());
        self.steps.push(step);
    }

    /// How many of the prompt's tokens a perfect prefix cache of this trajectory has not seen.
    fn new_tokens(&self, prompt_ids: &[i32]) -> usize {
        // What begins most like the prompt stands next to it.
        let place = self.sorted.partition_point(|step| ids(&self.steps[*step]).lt(prompt_ids));
        let neighbours = &self.sorted[place.saturating_sub(1)..self.sorted.len().min(place + 1)];
        let shared = neighbours.iter().map(|step| {
            let seen = ids(&self.steps[*step]);
            seen.zip(prompt_ids).take_while(|(a, b)| a == b).count()
        });
        prompt_ids.len() - shared.max().unwrap_or(0)
    }

    pub(crate) fn is_active(&self) -> bool {
        self.end.is_none()
    }

    /// What a tool elsewhere is to answer before the attempt can go on.
    pub(crate) fn open_call(&self) -> Option<&ToolCall> {
        self.open_call.as_ref()
    }

    /// Ends the attempt without an answer; `error` says why in words.
    pub(crate) fn stop(&mut self, status: Status, error: &str) {
        let error = format!("step {}: {error}", self.steps.len());
        self.end = Some(End { status, answer: None, error: Some(error) });
    }

    /// Takes in what the engine made of the prompt: one step more, and an end, an observation or an open call.
    pub(crate) fn advance(&mut self, agent: &Agent<'_>, generation: Generated) {
        let prompt_ids = std::mem::take(&mut self.prompt_ids);
        let generation = match generation {
            Ok(generation) => generation,
            Err(problem) => return self.stop(Status::EngineError, &problem),
        };
        if generation.ids.len() != generation.logprobs.len() {
            let (ids, logprobs) = (generation.ids.len(), generation.logprobs.len());
            return self.stop(Status::EngineError, &format!("{ids} ids came with {logprobs} log-probabilities"));
        }
        let profile = agent.builder.profile();
        let reads = self.steps.len() < agent.context.reading_steps(self.document);
        let parsed = if reads {
            agent.builder.parse_memory(&generation.ids)
        } else {
            parse_continuation(agent.builder.tokenizer(), &agent.opening(), &generation.ids, profile)
        };
        let readable = !matches!(parsed.tool_call, Some(Err(_)));
        self.tags_valid &= readable && format_problem(profile.memory, self.steps.len(), &parsed).is_none();
        self.unique_tokens += self.new_tokens(&prompt_ids) + generation.ids.len();
        let mut step = self.step(prompt_ids, generation, &parsed);
        if !reads {
            self.act(agent, parsed, &mut step);
        }
        self.push(step);
    }

    /// Takes in what the open call came to: the last step's observation, or an end.
    pub(crate) fn resume(&mut self, agent: &Agent<'_>, answer: Answer) {
        if let (Some(call), Some(mut step)) = (self.open_call.take(), self.steps.pop()) {
            self.take_answer(agent, &call.name, answer, &mut step);
            self.steps.push(step);
        }
    }

    fn step(&self, prompt_ids: Vec<i32>, generation: Generation, parsed: &ParsedCompletion) -> Step {
        Step {
            task_id: self.task.task_id.clone(),
            trajectory_index: self.trajectory_index,
            step_index: self.steps.len() as i32,
            prompt_ids,
            completion_ids: generation.ids,
            sampling_logprobs: generation.logprobs,
            segments: row_segments(parsed),
            completion: parsed.text.clone(),
            observation: None,
            observation_ids: None,
            stop_reason: generation.stop_reason,
        }
    }

    fn act(&mut self, agent: &Agent<'_>, parsed: ParsedCompletion, step: &mut Step) {
        let max_steps = agent.max_steps(self.document);
        let last = self.steps.len() + 1 == max_steps;
        match (parsed.answer, parsed.tool_call) {
            (Some(answer), _) => self.end = Some(End { status: Status::Ok, answer: Some(answer), error: None }),
            (None, Some(_)) if last => {
                self.stop(Status::MaxSteps, &format!("no answer within {max_steps} steps"));
            }
            (None, Some(Ok(call))) => self.call(agent, call, step),
            (None, Some(Err(problem))) => {
                if !self.corrected(agent, step) {
                    self.correct(agent, format!("Error: {problem}"), step);
                }
            }
            (None, None) => {
                self.tags_valid = false;
                if !last && self.corrected(agent, step) {
                    return;
                }
                if step.stop_reason == StopReason::MaxTokens {
                    let length = step.completion_ids.len();
                    self.stop(Status::Truncated, &format!("no tool call or answer within {length} tokens"));
                } else {
                    self.stop(Status::ParseError, "neither a tool call nor an answer");
                }
            }
        }
    }

    fn call(&mut self, agent: &Agent<'_>, call: ToolCall, step: &mut Step) {
        let made = self.steps.iter().filter(|step| step.observation.is_some()).count();
        if let Some(most) = agent.limits.max_tool_calls.filter(|most| made >= *most) {
            return observe(agent, format!("Error: all {most} tool calls are made; answer now."), step);
        }
        self.tool_calls += 1;
        if agent.toolbox.remote(&call.name).is_some() {
            self.open_call = Some(call);
        } else {
            self.take_answer(agent, &call.name, agent.toolbox.call(&call), step);
        }
    }

    fn take_answer(&mut self, agent: &Agent<'_>, tool: &str, answer: Answer, step: &mut Step) {
        match answer {
            Ok(results) => observe(agent, results, step),
            Err(ToolFailure::BadArguments(problem)) => self.correct(agent, problem, step),
            Err(ToolFailure::Failed(error)) => {
                let problem = format!("tool `{tool}`: {error}");
                if agent.limits.on_tool_failure == OnToolFailure::Stop {
                    return self.stop(Status::ToolError, &problem);
                }
                self.fault
                    .get_or_insert_with(|| format!("step {}: {problem}, which the policy was told", step.step_index));
                observe(agent, format!("Error: {problem}"), step);
            }
        }
    }

    /// Tells the policy what it did wrong. It may go on, but the format is broken.
    fn correct(&mut self, agent: &Agent<'_>, problem: String, step: &mut Step) {
        self.tags_valid = false;
        observe(agent, problem, step);
    }

    /// Tells the policy in the profile's words that it neither called nor answered, if the profile has any.
    fn corrected(&mut self, agent: &Agent<'_>, step: &mut Step) -> bool {
        let Some(ids) = agent.builder.correction_ids() else { return false };
        self.tags_valid = false;
        note(agent, ids, step);
        true
    }

    /// The finished attempt as rows.
    pub(crate) fn finish(self, agent: &Agent<'_>) -> (Trajectory, Vec<Step>) {
        let unfinished = || End { status: Status::MaxSteps, answer: None, error: None };
        let End { status, answer, error } = self.end.unwrap_or_else(unfinished).after(self.fault);
        let mut judged = outcome(&self.task.objectives, answer.as_deref(), self.tags_valid, status, agent.reward);
        if self.steps.last().is_some_and(|step| !agent.reward.sees(&agent.builder.said(&step.completion_ids))) {
            judged.reward = judged.reward.map(|_| 0.0);
        }
        let sizes = self.steps.iter().map(|step| step.prompt_ids.len() + step.completion_ids.len());
        let trajectory = Trajectory {
            task_id: self.task.task_id.clone(),
            trajectory_index: self.trajectory_index,
            step_count: self.steps.len() as i32,
            status,
            answer,
            format_valid: judged.format_valid,
            exact_match: judged.exact_match,
            f1: judged.f1,
            reward: judged.reward,
            generated_tokens: self.steps.iter().map(|step| step.completion_ids.len() as i32).sum(),
            processed_tokens: sizes.clone().sum::<usize>() as i32,
            unique_tokens: self.unique_tokens as i32,
            peak_tokens: sizes.max().unwrap_or(0) as i32,
            tool_calls: self.tool_calls,
            error,
            policy: agent.policy.clone(),
            seed: agent.seed,
        };
        (trajectory, self.steps)
    }
}

fn observe(agent: &Agent<'_>, results: String, step: &mut Step) {
    let tokenizer = agent.builder.tokenizer();
    let results = observation::cut(tokenizer, results, agent.limits.max_observation_tokens);
    let steps_left = agent.limits.max_steps.saturating_sub(step.step_index as usize + 1);
    note(agent, agent.builder.observation_ids(&results, Some(steps_left)), step);
}

fn note(agent: &Agent<'_>, ids: Vec<i32>, step: &mut Step) {
    step.observation = Some(agent.builder.tokenizer().decode(&ids));
    step.observation_ids = Some(ids);
}

/// What the model saw and wrote.
fn ids(step: &Step) -> impl Iterator<Item = &i32> {
    step.prompt_ids.iter().chain(&step.completion_ids)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn step(prompt_ids: Vec<i32>, completion_ids: Vec<i32>) -> Step {
        Step {
            task_id: "a".to_owned(),
            trajectory_index: 0,
            step_index: 0,
            sampling_logprobs: vec![0.0; completion_ids.len()],
            prompt_ids,
            completion_ids,
            segments: vec![],
            completion: String::new(),
            observation: None,
            observation_ids: None,
            stop_reason: StopReason::Eos,
        }
    }

    proptest! {
        #[test]
        fn what_any_earlier_step_began_with_is_not_new(
            steps in proptest::collection::vec(proptest::collection::vec(0..3, 1..8), 0..12),
            prompt in proptest::collection::vec(0..3, 1..8),
            cut in 0..8_usize,
        ) {
            let task = Task {
                task_id: "a".to_owned(), source: String::new(), split: String::new(), question: String::new(),
                objectives: vec![], document: None, document_ref: None, metadata: None,
            };
            let rows: Vec<Step> = steps
                .iter()
                .map(|ids: &Vec<i32>| {
                    let (prompt, completion) = ids.split_at(cut.min(ids.len()));
                    step(prompt.to_vec(), completion.to_vec())
                })
                .collect();
            let attempt = Attempt::new(Start { task: &task, trajectory_index: 0, steps: &rows, document: &[] });
            let shared = |ids: &Vec<i32>| ids.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
            let expected = prompt.len() - steps.iter().map(shared).max().unwrap_or(0);
            prop_assert_eq!(attempt.new_tokens(&prompt), expected);
        }
    }
}
