//! `majority`: answers without reading, the value most common in training for each attribute asked about.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use mempo_data::{Task, read_rows};
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use serde::Serialize;
use serde_json::json;

use crate::data::{read_lines, write_lines};
use crate::facts::ATTRIBUTES;
use crate::questions::Question;

/// Answer every question with its attribute's most common value in training: a floor for scores.
///
/// Writes answers.jsonl, one line a task: task_id and answer.
#[derive(Debug, Args, Serialize)]
pub(crate) struct MajorityArguments {
    /// Tasks of `mempo-rollout compose`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: PathBuf,
    /// What `mempo-demo data` wrote
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    data: PathBuf,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// Runs `majority`.
pub(crate) fn run(arguments: &MajorityArguments) -> anyhow::Result<()> {
    let tasks = Input::stage("tasks", &arguments.tasks)?;
    let data = Input::stage("data", &arguments.data)?;
    let Some(stage) = Stage::open("mempo-demo", "majority", &arguments.stage, arguments, &[&tasks, &data])? else {
        return Ok(());
    };
    let questions: Vec<Question> = read_lines(&arguments.data.join("questions-train.jsonl")).bad_input()?;
    let values = most_common(&questions);
    let mut answers = Vec::new();
    for task in read_rows::<Task>(&tasks.table("tasks")?)? {
        let task = task?;
        let parts: anyhow::Result<Vec<&str>> = task
            .objectives
            .iter()
            .map(|objective| {
                let attribute = attribute(&objective.question)?;
                values.get(attribute).copied().with_context(|| format!("`{attribute}` is never asked for in training"))
            })
            .collect();
        let parts = parts.with_context(|| format!("task `{}`", task.task_id)).bad_input()?;
        answers.push(json!({ "task_id": task.task_id, "answer": parts.join("; ") }));
    }
    stage.write_file("answers.jsonl", |file| write_lines(file, &answers))?;
    stage.finish(&[("answers", answers.len() as u64)], json!({}))
}

/// Each attribute's most common value over entities, ties by the alphabet.
fn most_common(questions: &[Question]) -> HashMap<&str, &str> {
    let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for question in questions.iter().filter(|question| question.metadata.hops.len() == 1) {
        *counts.entry((&question.metadata.attribute, &question.golden_answers[0])).or_default() += 1;
    }
    let mut best: HashMap<&str, (u64, &str)> = HashMap::new();
    for ((attribute, value), count) in counts {
        let entry = best.entry(attribute).or_insert((0, value));
        if count > entry.0 {
            *entry = (count, value);
        }
    }
    best.into_iter().map(|(attribute, (_, value))| (attribute, value)).collect()
}

/// What a question asks for: `What is the <attribute> of …?`
fn attribute(question: &str) -> anyhow::Result<&'static str> {
    let rest = question.split_once(" the ").map_or("", |(_, rest)| rest);
    let found = ATTRIBUTES
        .iter()
        .find(|(attribute, _)| rest.strip_prefix(attribute).is_some_and(|after| after.starts_with(" of ")));
    found.map(|(attribute, _)| *attribute).with_context(|| format!("`{question}` asks for no known attribute"))
}
