//! The training sequences of chosen trajectories, joined by key from the tables of rollouts, advantages and
//! log-probs.

use std::path::PathBuf;

use anyhow::{Context, anyhow, bail, ensure};
use mempo_data::{Advantage, Cursor, Key, Logprobs, Row, Step, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_train::{PolicySequence, PolicyTrajectory};

use crate::plan::Planned;

/// Where the rows are, and what they must fit.
pub(crate) struct Source {
    steps: Vec<PathBuf>,
    advantages: Vec<PathBuf>,
    logprobs: Option<Vec<PathBuf>>,
    vocabulary_size: i32,
}

impl Source {
    /// The tables of finished stages; ids must be below `vocabulary_size`.
    pub(crate) fn new(
        rollouts: &Input,
        advantages: &Input,
        logprobs: Option<&Input>,
        vocabulary_size: i32,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            steps: rollouts.table("steps")?,
            advantages: advantages.table("advantages")?,
            logprobs: logprobs.map(|input| input.table("logprobs")).transpose()?,
            vocabulary_size,
        })
    }

    /// Whether there are reference log-probs (the first row tells).
    pub(crate) fn has_reference(&self) -> anyhow::Result<bool> {
        let Some(files) = &self.logprobs else {
            return Ok(false);
        };
        let first = read_rows::<Logprobs>(files).bad_input()?.next().transpose().bad_input()?;
        Ok(first.is_some_and(|row| row.reference_logprobs.is_some()))
    }

    /// The sequences of `wanted`, in that order; one may be wanted more than once. Walks each table once.
    pub(crate) fn load(&self, wanted: &[&Planned]) -> anyhow::Result<Vec<PolicyTrajectory>> {
        let mut rows = Rows {
            source: self,
            steps: open(&self.steps)?,
            advantages: open(&self.advantages)?,
            logprobs: self.logprobs.as_deref().map(open).transpose()?,
        };
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_by_key(|&index| wanted[index].key(0));
        let mut loaded = vec![PolicyTrajectory { steps: Vec::new() }; wanted.len()];
        for same in order.chunk_by(|&left, &right| wanted[left].key(0) == wanted[right].key(0)) {
            let planned = wanted[same[0]];
            let steps = (0..planned.step_count).map(|step_index| rows.sequence(&planned.key(step_index)));
            let trajectory = PolicyTrajectory { steps: steps.collect::<anyhow::Result<_>>()? };
            for &index in same {
                loaded[index] = trajectory.clone();
            }
        }
        Ok(loaded)
    }
}

/// The tables, read in step.
struct Rows<'a> {
    source: &'a Source,
    steps: Cursor<Step>,
    advantages: Cursor<Advantage>,
    logprobs: Option<Cursor<Logprobs>>,
}

impl Rows<'_> {
    /// The step of a key; keys come in order.
    fn sequence(&mut self, key: &Key) -> anyhow::Result<PolicySequence> {
        let source = self.source;
        let step = take(&mut self.steps, key, &source.steps)?;
        let advantage = take(&mut self.advantages, key, &source.advantages)?;
        let logprobs = match (&mut self.logprobs, &source.logprobs) {
            (Some(cursor), Some(files)) => Some(take(cursor, key, files)?),
            _ => None,
        };
        let sequence = sequence(step, &advantage, logprobs, source.vocabulary_size);
        sequence.with_context(|| format!("{}: {key}", folder(&source.steps))).bad_input()
    }
}

fn open<R: Row>(files: &[PathBuf]) -> anyhow::Result<Cursor<R>> {
    Ok(Cursor::new(read_rows(files).bad_input()?))
}

fn take<R: Row>(cursor: &mut Cursor<R>, key: &Key, files: &[PathBuf]) -> anyhow::Result<R> {
    let row = cursor.take(key).bad_input()?;
    row.ok_or_else(|| anyhow!("{}: no row {key}, which its trajectory counts; make the stage again", folder(files)))
        .bad_input()
}

/// The table's folder.
fn folder(files: &[PathBuf]) -> String {
    files.first().and_then(|file| file.parent()).map(|folder| folder.display().to_string()).unwrap_or_default()
}

/// A step as the update needs it: every completion token with its advantage and its old log-probability.
fn sequence(
    step: Step,
    advantage: &Advantage,
    logprobs: Option<Logprobs>,
    vocabulary_size: i32,
) -> anyhow::Result<PolicySequence> {
    let tokens = step.completion_ids.len();
    check_values("sampling_logprobs", &step.sampling_logprobs, tokens)?;
    let (old_logprobs, reference_logprobs) = match logprobs {
        Some(row) => (row.policy_logprobs, row.reference_logprobs),
        None => (step.sampling_logprobs.clone(), None),
    };
    check_values("policy_logprobs", &old_logprobs, tokens)?;
    if let Some(values) = &reference_logprobs {
        check_values("reference_logprobs", values, tokens)?;
    }
    ensure!(!step.prompt_ids.is_empty(), "prompt_ids is empty, expected at least one id");
    let mut ids = step.prompt_ids.iter().chain(&step.completion_ids);
    if let Some(id) = ids.find(|id| !(0..vocabulary_size).contains(id)) {
        bail!("id {id} is outside the model's vocabulary of {vocabulary_size}; was another model sampled?");
    }
    let weight = advantage.loss_weight;
    ensure!(weight.is_finite() && weight >= 0.0, "loss_weight is {weight}, expected a number of at least 0");
    Ok(PolicySequence {
        advantages: token_advantages(advantage, tokens)?,
        prompt_ids: step.prompt_ids,
        completion_ids: step.completion_ids,
        old_logprobs,
        reference_logprobs,
        sampling_logprobs: Some(step.sampling_logprobs),
        loss_weight: weight,
    })
}

fn check_values(name: &str, values: &[f32], tokens: usize) -> anyhow::Result<()> {
    ensure!(values.len() == tokens, "{name} has {} values for {tokens} completion ids", values.len());
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        bail!("{name}: value {index} is {}, expected a finite number", values[index]);
    }
    Ok(())
}

/// The trajectory's advantage for every token, plus the memory's for the tokens of the memory.
fn token_advantages(row: &Advantage, tokens: usize) -> anyhow::Result<Vec<f32>> {
    let memory = row.memory_advantage.unwrap_or(0.0);
    let finite = row.trajectory_advantage.is_finite() && memory.is_finite();
    ensure!(finite, "advantages are {} and {memory}, expected finite numbers", row.trajectory_advantage);
    let mut advantages = vec![row.trajectory_advantage; tokens];
    match (row.memory_advantage, row.memory_start, row.memory_end) {
        (None, _, _) => {}
        (Some(_), Some(start), Some(end)) if 0 <= start && start <= end && end as usize <= tokens => {
            advantages[start as usize..end as usize].iter_mut().for_each(|advantage| *advantage += memory);
        }
        (Some(_), start, end) => {
            bail!("memory_start {start:?} and memory_end {end:?} are no range of {tokens} completion ids")
        }
    }
    Ok(advantages)
}

#[cfg(test)]
mod tests {
    use mempo_data::StopReason;

    use super::*;

    fn step() -> Step {
        Step {
            task_id: "t".to_owned(),
            trajectory_index: 0,
            step_index: 0,
            prompt_ids: vec![1, 2],
            completion_ids: vec![3, 4, 5, 6],
            sampling_logprobs: vec![-1.0, -2.0, -3.0, -4.0],
            segments: Vec::new(),
            completion: String::new(),
            observation: None,
            observation_ids: None,
            stop_reason: StopReason::Eos,
        }
    }

    fn advantage() -> Advantage {
        Advantage {
            task_id: "t".to_owned(),
            trajectory_index: 0,
            step_index: 0,
            trajectory_advantage: 0.5,
            memory_advantage: Some(2.0),
            memory_start: Some(1),
            memory_end: Some(3),
            loss_weight: 1.0,
        }
    }

    fn logprobs(reference: Option<Vec<f32>>) -> Logprobs {
        Logprobs {
            task_id: "t".to_owned(),
            trajectory_index: 0,
            step_index: 0,
            policy_logprobs: vec![-1.5; 4],
            reference_logprobs: reference,
        }
    }

    #[test]
    fn memory_tokens_get_both_advantages() {
        let sequence = sequence(step(), &advantage(), None, 10).unwrap();
        assert_eq!(sequence.advantages, [0.5, 2.5, 2.5, 0.5]);
        assert_eq!(sequence.old_logprobs, [-1.0, -2.0, -3.0, -4.0]);
        assert_eq!(sequence.reference_logprobs, None);
        let without = Advantage { memory_advantage: None, memory_start: None, memory_end: None, ..advantage() };
        assert_eq!(token_advantages(&without, 2).unwrap(), [0.5, 0.5]);
    }

    #[test]
    fn given_logprobs_replace_those_of_sampling() {
        let sequence = sequence(step(), &advantage(), Some(logprobs(Some(vec![-2.5; 4]))), 10).unwrap();
        assert_eq!(sequence.old_logprobs, [-1.5; 4]);
        assert_eq!(sequence.reference_logprobs, Some(vec![-2.5; 4]));
    }

    #[test]
    fn rows_that_do_not_fit_are_refused_in_words() {
        let check = |step: Step, advantage: &Advantage, logprobs: Option<Logprobs>, expected: &str| {
            let error = sequence(step, advantage, logprobs, 10).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        let short = Step { sampling_logprobs: vec![-1.0], ..step() };
        check(short, &advantage(), None, "sampling_logprobs has 1 values for 4 completion ids");
        let short = Some(logprobs(Some(vec![-1.0; 3])));
        check(step(), &advantage(), short, "reference_logprobs has 3 values");
        let bad = Step { sampling_logprobs: vec![-1.0, f32::NAN, 0.0, 0.0], ..step() };
        check(bad, &advantage(), None, "sampling_logprobs: value 1 is NaN");
        let past = Advantage { memory_end: Some(5), ..advantage() };
        check(step(), &past, None, "memory_end Some(5)");
        let foreign = Step { completion_ids: vec![3, 4, 5, 10], ..step() };
        check(foreign, &advantage(), None, "id 10 is outside the model's vocabulary of 10");
        check(Step { prompt_ids: vec![], ..step() }, &advantage(), None, "prompt_ids is empty");
        let weight = Advantage { loss_weight: -1.0, ..advantage() };
        check(step(), &weight, None, "loss_weight is -1");
    }
}
