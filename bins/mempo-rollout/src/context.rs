//! `context`: exactly what a step saw.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;
use mempo_data::{Step, read_rows};
use mempo_run::{ResultExt, print_data};
use mempo_text::Tokenizer;
use serde_json::json;

use crate::show::{parts, printable};

/// Print exactly what a step saw: its prompt, as it was put before the model
#[derive(Debug, Args)]
pub(crate) struct ContextArguments {
    /// The rollout's folder, or one shard's
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Model directory whose tokenizer turns the ids into text
    #[arg(long, value_name = "DIR", required_unless_present = "ids")]
    tokenizer: Option<PathBuf>,
    /// Print the ids as a JSON list instead
    #[arg(long)]
    ids: bool,
    /// The step's task
    #[arg(long, value_name = "ID")]
    task: String,
    /// Its trajectory, by its number in the task's group
    #[arg(long, value_name = "N", default_value_t = 0)]
    trajectory: i32,
    /// The step, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    step: i32,
}

/// Runs `context`.
pub(crate) fn run(arguments: &ContextArguments) -> anyhow::Result<()> {
    let step = find(arguments)?;
    let text = match &arguments.tokenizer {
        Some(dir) if !arguments.ids => printable(&Tokenizer::load(dir).bad_input()?.decode(&step.prompt_ids)),
        _ => json!(step.prompt_ids).to_string(),
    };
    print_data(&format!("{text}\n"));
    Ok(())
}

fn find(arguments: &ContextArguments) -> anyhow::Result<Step> {
    let ContextArguments { dir, task, trajectory, step, .. } = arguments;
    let (mut has_task, mut has_trajectory) = (false, false);
    for row in read_rows::<Step>(&parts(dir, "steps")?).bad_input()? {
        let row = row.bad_input()?;
        let is_task = row.task_id == *task;
        let is_trajectory = is_task && row.trajectory_index == *trajectory;
        if is_trajectory && row.step_index == *step {
            return Ok(row);
        }
        (has_task, has_trajectory) = (has_task || is_task, has_trajectory || is_trajectory);
    }
    let lacking = match (has_task, has_trajectory) {
        (false, _) => format!("task `{task}`"),
        (_, false) => format!("trajectory {trajectory} of task `{task}`"),
        _ => format!("step {step} of trajectory {trajectory} of task `{task}`"),
    };
    Err(anyhow!("{}: {lacking} is not in it", dir.display())).bad_input()
}

#[cfg(test)]
mod tests {
    use mempo_data::{StopReason, write_rows};
    use mempo_run::exit_code;

    use super::*;

    #[test]
    fn the_step_is_found_or_what_is_lacking_is_said() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::create_dir(folder.path().join("steps")).unwrap();
        let step = |task: &str, trajectory_index: i32, step_index: i32| Step {
            task_id: task.to_owned(),
            trajectory_index,
            step_index,
            prompt_ids: vec![trajectory_index, step_index],
            completion_ids: vec![],
            sampling_logprobs: vec![],
            segments: vec![],
            completion: String::new(),
            observation: None,
            observation_ids: None,
            stop_reason: StopReason::Eos,
        };
        let rows = [step("a", 0, 0), step("a", 1, 0), step("a", 1, 1), step("b", 0, 0)];
        write_rows(&rows, fs_err::File::create(folder.path().join("steps/part-00000.parquet")).unwrap()).unwrap();
        let find = |task: &str, trajectory: i32, step: i32| {
            let (dir, task) = (folder.path().to_owned(), task.to_owned());
            find(&ContextArguments { dir, tokenizer: None, ids: true, task, trajectory, step })
        };
        assert_eq!(find("a", 1, 1).unwrap().prompt_ids, [1, 1]);
        for (task, trajectory, step, told) in [
            ("c", 0, 0, ": task `c` is not in it"),
            ("b", 1, 0, ": trajectory 1 of task `b` is not"),
            ("a", 0, 1, ": step 1 of trajectory 0 of task `a` is not"),
        ] {
            let error = find(task, trajectory, step).unwrap_err();
            assert!(error.to_string().contains(told) && exit_code(&error) == 4, "{error}");
        }
    }
}
