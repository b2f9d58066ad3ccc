//! `invent`: documents and questions about entities that do not exist, so that nothing can be answered by heart.

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use mempo_data::Document;
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use serde::Serialize;
use serde_json::json;

use crate::base::training_documents;
use crate::data::{read_lines, write_lines};
use crate::made_up::Inventor;
use crate::questions::Question;
use crate::random::Random;

/// Attempts at an entity with a name of its own.
const ATTEMPTS: usize = 100;

/// Make documents and questions about invented entities.
///
/// Writes corpus.jsonl and questions.jsonl in the form of `mempo-demo data`: entities of the training regions, each with
/// all its documents and questions of one hop, every name and value replaced. What is learnt from them is to read: what
/// stands in them is true nowhere else. Nothing of the dev and test regions is used.
#[derive(Debug, Args, Serialize)]
pub(crate) struct InventArguments {
    /// What `mempo-demo data` wrote
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    data: PathBuf,
    /// Entities to invent
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    entities: u32,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// Runs `invent`.
pub(crate) fn run(arguments: &InventArguments) -> anyhow::Result<()> {
    let input = Input::stage("data", &arguments.data)?;
    let Some(stage) = Stage::open("mempo-demo", "invent", &arguments.stage, arguments, &[&input])? else {
        return Ok(());
    };
    let questions: Vec<Question> = read_lines(&arguments.data.join("questions-train.jsonl")).bad_input()?;
    let documents = training_documents(&arguments.data, &questions).bad_input()?;
    let inventor = Inventor::new(&questions, &documents).bad_input()?;
    let (mut titles, mut questions, mut documents) = (HashSet::new(), Vec::new(), Vec::new());
    for index in 0..arguments.entities {
        let mut random = Random::new(stage.seed(&["entity", &index.to_string()]));
        let (asked, told) = entity(&inventor, &titles, &mut random).usage()?;
        titles.extend(told.first().map(|document| document.title.clone()));
        questions.extend(asked.into_iter().map(|question| numbered_question(question, index)));
        documents.extend(told.into_iter().map(|document| numbered_document(document, index)));
    }
    stage.write_file("corpus.jsonl", |file| write_lines(file, &documents))?;
    stage.write_file("questions.jsonl", |file| write_lines(file, &questions))?;
    let rows = [("documents", documents.len() as u64), ("questions", questions.len() as u64)];
    stage.finish(&rows, json!({ "entities": arguments.entities }))
}

/// An entity whose name no other has.
fn entity(
    inventor: &Inventor<'_>,
    titles: &HashSet<String>,
    random: &mut Random,
) -> anyhow::Result<(Vec<Question>, Vec<Document>)> {
    let mut attempts = (0..ATTEMPTS).map(|_| inventor.entity(random));
    let fresh = attempts.find(|(_, documents)| documents.iter().all(|document| !titles.contains(&document.title)));
    ensure!(fresh.is_some(), "--entities: after {} no further name was found, ask for fewer", titles.len());
    Ok(fresh.unwrap_or_default())
}

/// The question with ids of this entity instead of the real one's.
fn numbered_question(mut question: Question, index: u32) -> Question {
    for hop in &mut question.metadata.hops {
        hop.doc_id = numbered(&hop.doc_id, index);
    }
    Question {
        id: format!("{index:04}/{}", question.metadata.attribute),
        source: "invented".to_owned(),
        entities: vec![format!("{index:04}")],
        ..question
    }
}

fn numbered_document(mut document: Document, index: u32) -> Document {
    document.doc_id = numbered(&document.doc_id, index);
    document
}

fn numbered(doc_id: &str, index: u32) -> String {
    let passage = doc_id.split_once('/').map_or(doc_id, |(_, passage)| passage);
    format!("{index:04}/{passage}")
}
