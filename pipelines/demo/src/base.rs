//! `base`: what the small base model learns from, before any demonstration.

use std::path::{Path, PathBuf};

use clap::Args;
use mempo_data::Document;
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use mempo_text::Profile;
use serde::Serialize;
use serde_json::{Value, json};

use crate::data::{read_lines, write_lines};
use crate::made_up::{Found, Inventor};
use crate::questions::Question;
use crate::random::Random;
use crate::work::{Habits, attempt};

/// How many questions a task has, in hundredths of all tasks.
const OBJECTIVES: [(usize, usize); 4] = [(1, 10), (2, 35), (3, 25), (4, 30)];
const TWO_HOPS: f64 = 0.5;
/// Share of the attempts with a memory that loses facts, and how readily: the steps that lose them are not learnt, but
/// what to do with a memory that has lost something is.
const LOSSY: f64 = 0.33;
const LOSS: f64 = 0.25;
/// Words to copy.
const COPIED_WORDS: std::ops::Range<usize> = 4..14;

/// Make what the base model learns from: work on made-up facts, by an expert who forgets nothing.
///
/// Writes copies.jsonl (words to copy: prompts and completions), with-memory.jsonl and with-history.jsonl (chat
/// messages). Names and values are invented in the manner of the training regions' documents, so that the model learns to
/// read, not what stands there. Nothing of the dev and test regions is used.
#[derive(Debug, Args, Serialize)]
pub(crate) struct BaseArguments {
    /// What `mempo-demo data` wrote
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    data: PathBuf,
    /// The profile whose form the search results have: a built-in name or a folder
    #[arg(long, value_name = "NAME|DIR", default_value = "mempo")]
    #[serde(skip)]
    profile: String,
    /// Attempts with a memory
    #[arg(long, value_name = "N", default_value_t = 60_000)]
    with_memory: usize,
    /// Attempts that see their whole history
    #[arg(long, value_name = "N", default_value_t = 15_000)]
    with_history: usize,
    /// Lines of copies
    #[arg(long, value_name = "N", default_value_t = 30_000)]
    copies: usize,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// Runs `base`.
pub(crate) fn run(arguments: &BaseArguments) -> anyhow::Result<()> {
    let input = Input::stage("data", &arguments.data)?;
    let profile = Profile::load(&arguments.profile).bad_input()?;
    let Some(stage) = Stage::open("mempo-demo", "base", &arguments.stage, arguments, &[&input])? else {
        return Ok(());
    };
    let questions: Vec<Question> = read_lines(&arguments.data.join("questions-train.jsonl")).bad_input()?;
    let documents = training_documents(&arguments.data, &questions).bad_input()?;
    let inventor = Inventor::new(&questions, &documents).bad_input()?;

    let lines = (0..arguments.copies).map(|index| {
        let mut random = Random::new(stage.seed(&["copy", &index.to_string()]));
        copied_words(&inventor, &mut random)
    });
    stage.write_file("copies.jsonl", |file| write_lines(file, lines))?;
    for (name, count) in [("with-memory", arguments.with_memory), ("with-history", arguments.with_history)] {
        stage.write_file(&format!("{name}.jsonl"), |file| {
            for index in 0..count {
                stage.check_interrupt()?;
                let mut random = Random::new(stage.seed(&[name, &index.to_string()]));
                let messages = made_up_attempt(&inventor, &profile, name == "with-memory", &mut random)?;
                write_lines(file, [json!({ "task_id": format!("{name}-{index:07}"), "messages": messages })])?;
            }
            Ok(())
        })?;
    }
    let rows = [("attempts", (arguments.with_memory + arguments.with_history) as u64)];
    stage.finish(&rows, json!({}))
}

/// Documents of the entities that training questions are about; `data` is what `mempo-demo data` wrote.
pub(crate) fn training_documents(data: &Path, questions: &[Question]) -> anyhow::Result<Vec<Document>> {
    let mut documents: Vec<Document> = read_lines(&data.join("corpus.jsonl"))?;
    let codes: std::collections::HashSet<&str> =
        questions.iter().flat_map(|question| question.entities.iter().map(String::as_str)).collect();
    documents.retain(|document| document.doc_id.split('/').next().is_some_and(|code| codes.contains(code)));
    Ok(documents)
}

/// Chat messages of an attempt at a made-up task.
fn made_up_attempt(
    inventor: &Inventor<'_>,
    profile: &Profile,
    with_memory: bool,
    random: &mut Random,
) -> anyhow::Result<Value> {
    let mut draw = random.below(100);
    let (objectives, _) = OBJECTIVES
        .iter()
        .find(|(_, share)| {
            let hit = draw < *share;
            draw = draw.saturating_sub(*share);
            hit
        })
        .unwrap_or(&OBJECTIVES[0]);
    let (mut questions, mut search) = (Vec::new(), Found::default());
    while questions.len() < *objectives {
        let (question, found) = inventor.question(random.chance(TWO_HOPS), random)?;
        let clash = questions.iter().any(|other: &Question| other.metadata.mention == question.metadata.mention);
        if !clash {
            questions.push(question);
            search.add(found);
        }
    }
    let habits = Habits { forget: if random.chance(LOSSY) { LOSS } else { 0.0 } };
    let steps: Vec<_> = questions.iter().map(|question| (question.question.as_str(), &question.metadata)).collect();
    let attempt = attempt(&steps, &mut search, profile, habits, random)?;
    Ok(if with_memory { attempt.with_memory(true) } else { attempt.with_history() })
}

/// Invented words and some others; the first are to be written again.
fn copied_words(inventor: &Inventor<'_>, random: &mut Random) -> Value {
    let count = COPIED_WORDS.start + random.below(COPIED_WORDS.len());
    let mut words = |count: usize| {
        let words: Vec<String> = (0..count).map(|_| inventor.any_word(random)).collect();
        words.join(" ")
    };
    let copied = words(count);
    json!({ "prompt": format!("{copied}; {}", words(2)), "completion": copied })
}
