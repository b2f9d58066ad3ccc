//! Writes a rollout of a million steps and its scores, to time `mempo-score advantages` on them (`./just bench-advantages`).

use std::path::{Path, PathBuf};

use mempo_data::{Row, Score, Segment, SegmentKind, Status, Step, StopReason, Trajectory, write_rows};
use mempo_run::{Input, Stage, StageArgs};
use serde_json::json;

const TASKS: i32 = 3907;
const GROUP: i32 = 16;
const STEPS: i32 = 16;
const TASKS_PER_PART: usize = 64;

fn main() -> anyhow::Result<()> {
    let folder = PathBuf::from(std::env::args().nth(1).expect("usage: rows FOLDER"));
    let arguments =
        json!({"profile": "mempo", "context": "mempo", "temperature": 1.0, "top_p": 1.0, "group_size": GROUP});
    write(&folder.join("rollouts"), &arguments, &[], |stage, part, tasks| {
        write_part(stage, part, tasks, 1, |task, index, _| trajectory(task, index))?;
        write_part(stage, part, tasks, STEPS, step)
    })?;
    let rollouts = Input::stage("rollouts", &folder.join("rollouts"))?;
    write(&folder.join("scores"), &json!({}), &[&rollouts], |stage, part, tasks| {
        write_part(stage, part, tasks, STEPS, score)
    })
}

/// Writes a finished stage, part by part.
fn write(
    out: &Path,
    arguments: &serde_json::Value,
    inputs: &[&Input],
    part_of: impl Fn(&Stage, usize, &[i32]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let out = StageArgs { out: out.to_owned(), seed: 0, restart: false, shard: None };
    let Some(stage) = Stage::open("rows", "rows", &out, arguments, inputs)? else { return Ok(()) };
    let tasks: Vec<i32> = (0..TASKS).collect();
    for (part, tasks) in tasks.chunks(TASKS_PER_PART).enumerate() {
        part_of(&stage, part, tasks)?;
    }
    stage.finish(&[], json!({}))
}

fn write_part<R: Row>(
    stage: &Stage,
    part: usize,
    tasks: &[i32],
    steps: i32,
    row: impl Fn(i32, i32, i32) -> R,
) -> anyhow::Result<()> {
    if stage.has_part(R::TABLE, part) {
        return Ok(());
    }
    let keys = tasks.iter().flat_map(|task| (0..GROUP).map(move |index| (*task, index)));
    let keys = keys.flat_map(|(task, index)| (0..steps).map(move |step| (task, index, step)));
    let rows: Vec<R> = keys.map(|(task, index, step)| row(task, index, step)).collect();
    stage.write_part(R::TABLE, part, |file| Ok(write_rows(&rows, file).map(drop)?))
}

fn task_id(task: i32) -> String {
    format!("task-{task:06}")
}

fn trajectory(task: i32, trajectory_index: i32) -> Trajectory {
    Trajectory {
        task_id: task_id(task),
        trajectory_index,
        step_count: STEPS,
        status: Status::Ok,
        answer: Some("red; blue".to_owned()),
        format_valid: true,
        exact_match: vec![1.0, 0.0],
        f1: vec![1.0, 0.5],
        reward: Some(f32::from(u8::from((task * 7 + trajectory_index * 5) % 3 == 0))),
        generated_tokens: 40 * STEPS,
        processed_tokens: 300 * STEPS,
        unique_tokens: 60 * STEPS,
        peak_tokens: 340,
        tool_calls: STEPS - 1,
        error: None,
        policy: "policy".to_owned(),
        seed: 0,
    }
}

fn step(task: i32, trajectory_index: i32, step_index: i32) -> Step {
    let ids = |count: i32| (0..count).map(|place| (task + step_index * 31 + place * 7) % 4096).collect();
    Step {
        task_id: task_id(task),
        trajectory_index,
        step_index,
        prompt_ids: ids(300),
        completion_ids: ids(40),
        sampling_logprobs: vec![-0.5; 40],
        segments: vec![Segment { kind: SegmentKind::Memory, start: 0, end: 20 }],
        completion: "<mem>colour = red</mem><think>next</think>".to_owned(),
        observation: Some("found nothing of the kind".to_owned()),
        observation_ids: Some(ids(30)),
        stop_reason: StopReason::StopString,
    }
}

fn score(task: i32, trajectory_index: i32, step_index: i32) -> Score {
    let spread = (i64::from(task) * 7919 + i64::from(trajectory_index) * 104_729 + i64::from(step_index) * 1299) % 1000;
    let probability = (spread + 1) as f64 / 1001.0;
    Score {
        task_id: task_id(task),
        trajectory_index,
        step_index,
        answer_logprob: Some(probability.ln()),
        answer_probability: Some(probability),
        bias_logprob: None,
        bias_probability: None,
        objective_logprobs: Some(vec![probability.ln(); 2]),
        memory_reward: Some(probability),
        answer_token_count: 9,
        truncated: false,
    }
}
