//! Trajectories, steps and scores joined by key, task by task.

use anyhow::anyhow;
use mempo_data::Key;
use mempo_run::Input;
use serde::Deserialize;

use crate::normalise::MemorySteps;
use crate::query::Session;
use crate::rollouts::Rollouts;

/// A step with its trajectory and its score; a trajectory without steps has one row.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct JoinedRow {
    pub(super) task_id: String,
    pub(super) trajectory_index: i32,
    pub(super) step_count: i32,
    pub(super) reward: Option<f32>,
    pub(super) format_valid: bool,
    pub(super) step_index: Option<i32>,
    pub(super) segments: Option<Vec<SegmentCells>>,
    pub(super) scored: bool,
    pub(super) memory_reward: Option<f64>,
    pub(super) answer_probability: Option<f64>,
    pub(super) observation_length: i64,
    /// Only where they are needed.
    pub(super) completion_ids: Option<Vec<i32>>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct SegmentCells {
    pub(super) kind: String,
    pub(super) start: i32,
    pub(super) end: i32,
}

impl JoinedRow {
    /// Whether the step is of those that end a trajectory: it calls no tool, and does more than remember.
    pub(super) fn may_answer(&self) -> bool {
        let has = |kind: &str| self.segments.iter().flatten().any(|segment| segment.kind == kind);
        !has("tool_call") && (has("answer") || !has("memory"))
    }

    pub(super) fn memory(&self) -> Option<&SegmentCells> {
        self.segments.iter().flatten().find(|segment| segment.kind == "memory")
    }

    pub(super) fn key(&self) -> Key {
        Key::of_step(&self.task_id, self.trajectory_index, self.step_index.unwrap_or(0))
    }
}

pub(super) fn joined_rows(
    session: &Session,
    rollouts: &Rollouts,
    scores: Option<&Input>,
    with_ids: bool,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<JoinedRow>>> {
    let step_key = ["task_id", "trajectory_index", "step_index"];
    session.register("trajectories", &rollouts.input.table("trajectories")?, &step_key[..2])?;
    session.register("steps", &rollouts.input.table("steps")?, &step_key)?;
    let (score_columns, score_join) = match scores {
        Some(scores) => {
            session.register("scores", &scores.table("scores")?, &step_key)?;
            ("scores.step_index IS NOT NULL", "LEFT JOIN scores USING (task_id, trajectory_index, step_index)")
        }
        None => ("false", ""),
    };
    let [memory_reward, answer_probability] = if scores.is_some() {
        ["scores.memory_reward", "scores.answer_probability"]
    } else {
        ["CAST(NULL AS DOUBLE)"; 2]
    };
    let completion_ids = if with_ids { "completion_ids" } else { "CAST(NULL AS INT[])" };
    session.rows(&format!(
        "SELECT trajectories.task_id, trajectories.trajectory_index, step_count, reward, format_valid,
             steps.step_index, segments, {score_columns} AS scored, {memory_reward} AS memory_reward,
             {answer_probability} AS answer_probability, {completion_ids} AS completion_ids,
             CAST(COALESCE(char_length(observation), 0) AS BIGINT) AS observation_length
         FROM trajectories LEFT JOIN steps USING (task_id, trajectory_index) {score_join}
         ORDER BY trajectories.task_id, trajectories.trajectory_index, steps.step_index"
    ))
}

type Rows<I> = std::iter::Peekable<I>;

/// The rows of the next task.
pub(super) fn next_task(
    rows: &mut Rows<impl Iterator<Item = anyhow::Result<JoinedRow>>>,
) -> anyhow::Result<Vec<JoinedRow>> {
    let mut task: Vec<JoinedRow> = rows.next().transpose()?.into_iter().collect();
    while let Some(row) = rows
        .next_if(|row| row.as_ref().map_or(true, |row| task.first().is_some_and(|first| first.task_id == row.task_id)))
    {
        task.push(row?);
    }
    Ok(task)
}

/// A number that is none would reach every advantage of its group.
pub(super) fn check_finite(chunk: &[JoinedRow]) -> anyhow::Result<()> {
    let bad = |row: &&JoinedRow| {
        let rewards = [row.reward.map(f64::from), row.memory_reward];
        rewards.into_iter().flatten().any(|reward| !reward.is_finite())
    };
    chunk.iter().find(bad).map_or(Ok(()), |row| {
        let (key, reward, memory) = (row.key(), row.reward, row.memory_reward);
        Err(anyhow!("{key}: reward {reward:?}, memory reward {memory:?}: expected finite numbers; score again"))
    })
}

pub(super) fn check_steps(chunk: &[JoinedRow], scored: Option<MemorySteps>) -> anyhow::Result<()> {
    let first = &chunk[0];
    let found = chunk.iter().filter(|row| row.step_index.is_some()).count();
    if found != first.step_count as usize {
        let (key, expected) = (first.key(), first.step_count);
        return Err(anyhow!(
            "{key}: `steps` has {found} rows of the trajectory, which counts {expected}: sample again"
        ));
    }
    let mut memories = chunk.iter().filter(|row| row.memory().is_some());
    let unscored = match scored {
        None => None,
        Some(MemorySteps::All) => memories.find(|row| !row.scored),
        Some(MemorySteps::Final) => memories.next_back().filter(|row| !row.scored),
    };
    unscored.map_or(Ok(()), |row| {
        Err(anyhow!(
            "{}: `scores` has no row for this memory: run `segments` on this rollout again, unless only --memory-steps final \
             was scored and is to be paid",
            row.key()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_answers_unless_it_calls_a_tool_or_only_remembers() {
        for (kinds, answers) in [
            (&["memory", "think", "answer"][..], true),
            (&["answer"], true),
            (&["memory", "think", "tool_call"], false),
            (&["tool_call"], false),
            (&["memory"], false),
            (&[], true),
        ] {
            let cells = |kind: &&str| SegmentCells { kind: (*kind).to_owned(), start: 0, end: 1 };
            let row = JoinedRow {
                task_id: "a".to_owned(),
                trajectory_index: 0,
                step_count: 1,
                reward: None,
                format_valid: true,
                step_index: Some(0),
                segments: Some(kinds.iter().map(cells).collect()),
                scored: false,
                memory_reward: None,
                answer_probability: None,
                observation_length: 0,
                completion_ids: None,
            };
            assert_eq!(row.may_answer(), answers, "{kinds:?}");
        }
    }
}
