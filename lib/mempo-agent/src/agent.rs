//! The loop: the trajectories of a unit advance side by side, each at its own pace, as the engine completes their steps and
//! tools answer them.

use mempo_data::{Status, Step, Task, Trajectory};
use mempo_text::PromptBuilder;
use rayon::prelude::*;

use crate::attempt::Attempt;
use crate::trajectories::Trajectories;
use crate::{ContextPolicy, Engine, Error, LimitOptions, Past, Request, RewardKind, Toolbox};

/// How trajectories are made.
pub struct Agent<'a> {
    /// Lays out every prompt.
    pub builder: &'a PromptBuilder,
    /// What a step sees of the steps before it.
    pub context: &'a dyn ContextPolicy,
    /// The tools.
    pub toolbox: &'a Toolbox,
    /// Where a trajectory ends at the latest.
    pub limits: &'a LimitOptions,
    /// What a trajectory is rewarded for.
    pub reward: RewardKind,
    /// Digest of the checkpoint that samples.
    pub policy: String,
    /// Seed of the run, as rows name it.
    pub seed: u64,
    /// Seed of the model call at (task_id, trajectory_index, step_index).
    pub seed_of: &'a (dyn Fn(&str, i32, i32) -> u64 + Sync),
}

/// Where a trajectory starts.
#[derive(Debug, Clone, Copy)]
pub struct Start<'t> {
    /// What it works on.
    pub task: &'t Task,
    /// Its own number among the task's.
    pub trajectory_index: i32,
    /// Steps that are taken as done: the next one follows from them.
    pub steps: &'t [Step],
    /// What it reads, as [`ContextPolicy::prepare`] left it; empty where documents are searched for.
    pub document: &'t [i32],
}

/// Rows of some tasks, sorted by key.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// One a trajectory.
    pub trajectories: Vec<Trajectory>,
    /// One a model call.
    pub steps: Vec<Step>,
}

impl Agent<'_> {
    /// Runs trajectories from where each is to start; the rows begin with the steps that were given. What the policy does
    /// wrong and what fails for one of them is in the rows' status; an `Err` means that a prompt can't be built at all, or
    /// that the engine can do no more.
    pub fn run(&self, engine: &mut dyn Engine, starts: Vec<Start<'_>>) -> Result<Unit, Error> {
        let mut attempts: Vec<Attempt<'_>> = starts.into_iter().map(Attempt::new).collect();
        let with_messages = engine.wants_messages();
        let first = self.requests(attempts.iter_mut().enumerate().collect(), with_messages)?;
        let mut trajectories = Trajectories::new(self, attempts, with_messages);
        let result = engine.run(first, &mut trajectories);
        let mut attempts = trajectories.into_attempts()?;
        result.map_err(Error::Engine)?;
        for attempt in attempts.iter_mut().filter(|attempt| attempt.is_active()) {
            attempt.stop(Status::EngineError, "the engine left this prompt without a completion");
        }
        Ok(self.rows(attempts))
    }

    /// The next request of every trajectory that goes on; one whose prompt is too long ends.
    pub(crate) fn requests(
        &self,
        attempts: Vec<(usize, &mut Attempt<'_>)>,
        with_messages: bool,
    ) -> Result<Vec<Request>, Error> {
        let active = attempts.into_par_iter().filter(|(_, attempt)| attempt.is_active());
        let requests = active.map(|(place, attempt)| self.request(place, attempt, with_messages));
        Ok(requests.collect::<Result<Vec<_>, Error>>()?.into_iter().flatten().collect())
    }

    fn request(&self, place: usize, attempt: &mut Attempt<'_>, with_messages: bool) -> Result<Option<Request>, Error> {
        let question = &attempt.task.question;
        let past = Past { question, steps: &attempt.steps, document: attempt.document, builder: self.builder };
        let carried = self.context.carried(&past);
        let unbuilt = |source| Error::Prompt { task_id: attempt.task.task_id.clone(), source };
        let mut prompt = self.builder.prompt(question, &carried).map_err(unbuilt)?;
        let messages = if with_messages { self.builder.messages(question, &carried) } else { Ok(Vec::new()) };
        let messages = messages.map_err(unbuilt)?;
        prompt.extend(self.opening());
        let (length, most) = (prompt.len(), self.limits.max_prompt_tokens);
        if length > most {
            attempt.stop(Status::Truncated, &format!("the prompt has {length} tokens, more than {most}"));
            return Ok(None);
        }
        let step_index = attempt.steps.len() as i32;
        let seed = (self.seed_of)(&attempt.task.task_id, attempt.trajectory_index, step_index);
        attempt.prompt_ids.clone_from(&prompt);
        Ok(Some(Request { trajectory: place, prompt_ids: prompt, messages, seed }))
    }

    /// What every completion begins with, put there instead of generated.
    pub(crate) fn opening(&self) -> Vec<i32> {
        if self.context.answers_at_once() { self.builder.answer_opening_ids() } else { Vec::new() }
    }

    /// Steps a trajectory may have: of one that reads a document, as many as that takes.
    pub(crate) fn max_steps(&self, document: &[i32]) -> usize {
        match self.context.reads_documents() {
            true => self.context.reading_steps(document) + 1,
            false if self.context.answers_at_once() => 1,
            false => self.limits.max_steps,
        }
    }

    fn rows(&self, attempts: Vec<Attempt<'_>>) -> Unit {
        let mut unit = Unit { trajectories: Vec::new(), steps: Vec::new() };
        for attempt in attempts {
            let (trajectory, steps) = attempt.finish(self);
            unit.trajectories.push(trajectory);
            unit.steps.extend(steps);
        }
        unit
    }
}

#[cfg(test)]
pub(crate) mod tests;
