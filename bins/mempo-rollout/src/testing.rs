//! Rows for the tests.

use mempo_data::{Status, Trajectory};

/// A trajectory of one step, without an answer, that earned nothing.
pub(crate) fn trajectory(task_id: &str, trajectory_index: i32) -> Trajectory {
    Trajectory {
        task_id: task_id.to_owned(),
        trajectory_index,
        step_count: 1,
        status: Status::Ok,
        answer: None,
        format_valid: true,
        exact_match: vec![0.0],
        f1: vec![0.0],
        reward: Some(0.0),
        generated_tokens: 1,
        processed_tokens: 1,
        unique_tokens: 1,
        peak_tokens: 1,
        tool_calls: 0,
        error: None,
        policy: "p".to_owned(),
        seed: 0,
    }
}
