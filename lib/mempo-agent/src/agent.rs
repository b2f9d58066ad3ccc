//! The loop: all trajectories of a unit advance step by step together, one engine call a step.

use mempo_data::{Status, Step, Task, Trajectory};
use mempo_text::PromptBuilder;
use rayon::prelude::*;

use crate::attempt::Attempt;
use crate::{ContextPolicy, Engine, Error, Generation, LimitOptions, Request, Toolbox};

/// How trajectories are made.
pub struct Agent<'a> {
    /// Lays out every prompt.
    pub builder: &'a PromptBuilder,
    /// What a step sees of the steps before it.
    pub context: &'a (dyn ContextPolicy + Send + Sync),
    /// The tools.
    pub toolbox: &'a Toolbox,
    /// Where a trajectory ends at the latest.
    pub limits: &'a LimitOptions,
    /// Trajectories a task.
    pub group_size: usize,
    /// Digest of the checkpoint that samples.
    pub policy: String,
    /// Seed of the run, as rows name it.
    pub seed: u64,
    /// Seed of the model call at (task_id, trajectory_index, step_index).
    pub seed_of: &'a (dyn Fn(&str, i32, i32) -> u64 + Sync),
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
    /// Attempts each task `group_size` times. What the policy does wrong and what fails around it is in the rows' status;
    /// an `Err` means that a prompt can't be built at all.
    pub fn run_unit(&self, engine: &mut dyn Engine, tasks: &[Task]) -> Result<Unit, Error> {
        let group = |task| (0..self.group_size as i32).map(move |index| Attempt::new(task, index));
        let mut attempts: Vec<Attempt<'_>> = tasks.iter().flat_map(group).collect();
        for _ in 0..self.max_steps() {
            let active = self.prompts(&mut attempts)?;
            if active.is_empty() {
                break;
            }
            let requests: Vec<Request> = active.iter().map(|(attempt, prompt)| self.request(attempt, prompt)).collect();
            match generate(engine, &requests) {
                Ok(generations) => {
                    active.into_par_iter().zip(generations).for_each(|((attempt, prompt_ids), generation)| {
                        attempt.advance(self, prompt_ids, generation);
                    });
                }
                Err(error) => {
                    for (attempt, _) in active {
                        attempt.stop(Status::EngineError, &error);
                    }
                }
            }
        }
        Ok(self.rows(attempts))
    }

    /// The next prompt of every trajectory that goes on; one whose prompt is too long ends.
    fn prompts<'b, 't>(&self, attempts: &'b mut [Attempt<'t>]) -> Result<Vec<(&'b mut Attempt<'t>, Vec<i32>)>, Error> {
        let active = attempts.par_iter_mut().filter(|attempt| attempt.is_active());
        let prompts: Result<Vec<Option<_>>, Error> = active
            .map(|attempt| {
                let carried = self.context.carried(&attempt.steps);
                let prompt = self.builder.prompt(&attempt.task.question, &carried);
                let mut prompt =
                    prompt.map_err(|source| Error::Prompt { task_id: attempt.task.task_id.clone(), source })?;
                prompt.extend(self.opening());
                if prompt.len() <= self.limits.max_prompt_tokens {
                    return Ok(Some((attempt, prompt)));
                }
                let (length, most) = (prompt.len(), self.limits.max_prompt_tokens);
                attempt.stop(Status::Truncated, &format!("the prompt has {length} tokens, more than {most}"));
                Ok(None)
            })
            .collect();
        Ok(prompts?.into_iter().flatten().collect())
    }

    /// What every completion begins with, put there instead of generated.
    pub(crate) fn opening(&self) -> Vec<i32> {
        if self.context.answers_at_once() { self.builder.answer_opening_ids() } else { Vec::new() }
    }

    /// Steps a trajectory may have.
    pub(crate) fn max_steps(&self) -> usize {
        if self.context.answers_at_once() { 1 } else { self.limits.max_steps }
    }

    fn request(&self, attempt: &Attempt<'_>, prompt_ids: &[i32]) -> Request {
        let step_index = attempt.steps.len() as i32;
        let seed = (self.seed_of)(&attempt.task.task_id, attempt.trajectory_index, step_index);
        Request { prompt_ids: prompt_ids.to_vec(), seed }
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

fn generate(engine: &mut dyn Engine, requests: &[Request]) -> Result<Vec<Generation>, String> {
    let generations = engine.generate(requests)?;
    if generations.len() == requests.len() {
        return Ok(generations);
    }
    Err(format!("the engine returned {} completions for {} prompts", generations.len(), requests.len()))
}

#[cfg(test)]
mod tests;
