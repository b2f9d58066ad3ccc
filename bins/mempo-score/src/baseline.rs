//! Answers from a file instead of a policy, judged by the same rules: a majority value, a person, another system.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, anyhow};
use mempo_agent::{RewardKind, outcome};
use mempo_data::{Status, Trajectory};
use mempo_run::ResultExt;
use serde::Deserialize;

use crate::facts::Facts;

/// `LABEL=FILE` on the command line.
#[derive(Debug, Clone)]
pub(crate) struct LabelledFile {
    pub(crate) label: String,
    pub(crate) path: PathBuf,
}

impl FromStr for LabelledFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((label, path)) if !label.is_empty() && !path.is_empty() => {
                Ok(Self { label: label.to_owned(), path: path.into() })
            }
            _ => Err("expected LABEL=FILE".to_owned()),
        }
    }
}

#[derive(Deserialize)]
struct Line {
    task_id: String,
    answer: Option<String>,
}

/// The answers as trajectories without steps or tokens, sorted by task.
pub(crate) fn read_answers(path: &Path, facts: &Facts) -> anyhow::Result<Vec<Trajectory>> {
    let text = fs_err::read_to_string(path).bad_input()?;
    let mut answers = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}:{number}", path.display());
        let line: Line = serde_json::from_str(line)
            .with_context(|| format!("{}: expected {{\"task_id\": …, \"answer\": …}}", place()))
            .bad_input()?;
        let Some(fact) = facts.of(&line.task_id) else {
            return Err(anyhow!("{}: no task `{}` in --tasks", place(), line.task_id)).bad_input();
        };
        let judged = outcome(&fact.objectives, line.answer.as_deref(), true, Status::Ok, RewardKind::default());
        let row = Trajectory {
            task_id: line.task_id.clone(),
            trajectory_index: 0,
            step_count: 0,
            status: Status::Ok,
            answer: line.answer,
            format_valid: judged.format_valid,
            exact_match: judged.exact_match,
            f1: judged.f1,
            reward: judged.reward,
            generated_tokens: 0,
            processed_tokens: 0,
            unique_tokens: 0,
            peak_tokens: 0,
            tool_calls: 0,
            error: None,
            policy: String::new(),
            seed: 0,
        };
        if answers.insert(line.task_id, row).is_some() {
            return Err(anyhow!("{}: a second answer to the same task", place())).bad_input();
        }
    }
    Ok(answers.into_values().collect())
}
