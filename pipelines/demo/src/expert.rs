//! `expert`: tasks and a search index -> what a forgetful expert did, to be learnt from.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::Args;
use mempo_agent::{Bm25Options, SearchIndex};
use mempo_data::{Document, Task, read_rows};
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use mempo_text::Profile;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::info;

use crate::data::write_lines;
use crate::questions::{Finder, Steps};
use crate::random::Random;
use crate::work::{Attempt, Habits, Search, attempt};

/// Let a scripted expert work on tasks, with a memory that forgets.
///
/// Writes with-memory.jsonl and with-history.jsonl: the very same attempts as chat messages of an agent with a memory, and
/// of one that sees its whole history. The expert really searches; a value that its search did not bring it does not know.
#[derive(Debug, Args, Serialize)]
pub(crate) struct ExpertArguments {
    /// Tasks of `mempo-rollout compose`, of questions of `mempo-demo data`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    tasks: PathBuf,
    /// What `mempo-rollout index` wrote
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    search: PathBuf,
    /// Probability of dropping each known fact whenever the memory is rewritten
    #[arg(long, value_name = "P", default_value_t = 0.3)]
    forget: f64,
    /// Documents a search returns
    #[arg(long, value_name = "N", default_value_t = 1)]
    top_k: usize,
    /// The profile whose tags are written and whose form the search results have: a built-in name or a folder
    #[arg(long, value_name = "NAME|DIR", default_value = "mempo")]
    #[serde(serialize_with = "crate::profile_name")]
    profile: String,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// What `mempo-rollout compose` keeps of the questions.
#[derive(Deserialize)]
struct Metadata {
    rows: Vec<Steps>,
}

/// Runs `expert`.
pub(crate) fn run(arguments: &ExpertArguments) -> anyhow::Result<()> {
    if !(0.0..=1.0).contains(&arguments.forget) {
        return Err(anyhow!("--forget {}: expected a probability", arguments.forget)).usage();
    }
    let tasks = Input::stage("tasks", &arguments.tasks)?;
    let search = Input::stage("search", &arguments.search)?;
    let profile = Profile::load(&arguments.profile).bad_input()?;
    let profile_files = Profile::files(&arguments.profile).map(|files| Input::files("profile", &files)).transpose()?;
    let inputs: Vec<&Input> = [&tasks, &search].into_iter().chain(&profile_files).collect();
    let Some(stage) = Stage::open("mempo-demo", "expert", &arguments.stage, arguments, &inputs)? else {
        return Ok(());
    };
    let index = SearchIndex::open(&arguments.search.join("index"), Bm25Options::default()).bad_input()?;
    let mut attempts = Vec::new();
    for task in read_rows::<Task>(&tasks.table("tasks")?)? {
        let task = task?;
        let steps = steps_of(&task).bad_input()?;
        let questions = task.objectives.iter().map(|objective| objective.question.as_str()).zip(&steps);
        let questions: Vec<(&str, &Steps)> = questions.collect();
        let mut finder = Finder { index: &index, top_k: arguments.top_k };
        let habits = Habits { forget: arguments.forget };
        let mut random = Random::new(stage.seed(&["expert", &task.task_id]));
        attempts.push((task.task_id, attempt(&questions, &mut finder, &profile, habits, &mut random)?));
    }
    let row = |task_id: &str, messages| json!({ "task_id": task_id, "messages": messages });
    let with_memory = attempts.iter().map(|(id, attempt)| row(id, attempt.with_memory(false)));
    stage.write_file("with-memory.jsonl", |file| write_lines(file, with_memory))?;
    let with_history = attempts.iter().map(|(id, attempt)| row(id, attempt.with_history()));
    stage.write_file("with-history.jsonl", |file| write_lines(file, with_history))?;
    finish(stage, &attempts)
}

/// Counts what was forgotten.
fn finish(stage: Stage, attempts: &[(String, Attempt)]) -> anyhow::Result<()> {
    let chances: u64 = attempts.iter().map(|(_, attempt)| attempt.chances).sum();
    let forgotten: u64 = attempts.iter().map(|(_, attempt)| attempt.forgotten).sum();
    let rate = forgotten as f64 / chances.max(1) as f64;
    info!("{} attempts; {forgotten} of {chances} known facts forgotten when rewriting: {rate:.3}", attempts.len());
    let summary = json!({ "facts_known_at_rewriting": chances, "facts_forgotten": forgotten, "forget_rate": rate });
    stage.finish(&[("attempts", attempts.len() as u64)], summary)
}

/// How each of a task's questions is worked on.
pub(crate) fn steps_of(task: &Task) -> anyhow::Result<Vec<Steps>> {
    let metadata = task.metadata.as_deref().unwrap_or("null");
    let metadata: Metadata = serde_json::from_str(metadata)
        .with_context(|| format!("task `{}`: its questions were not made by `mempo-demo data`", task.task_id))?;
    Ok(metadata.rows)
}

impl Search for Finder<'_> {
    fn documents(&mut self, query: &str) -> anyhow::Result<Vec<Document>> {
        Finder::documents(self, query)
    }
}
