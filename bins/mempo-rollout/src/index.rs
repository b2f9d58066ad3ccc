//! `index`: documents -> the corpus table, a BM25 index over it and, if an encoder is given, their vectors.

use std::path::PathBuf;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use mempo_agent::SearchIndex;
use mempo_data::{Document, write_rows};
use mempo_run::{Input, ResultExt, Stage, StageArgs};
use serde::Serialize;
use serde_json::json;

use crate::retrieval::split_contents;
use crate::rows::{self, Located};
use crate::vectors::{Recipe, VectorOptions};

/// Documents in one file of the table.
const PART_ROWS: usize = 100_000;
/// The index's folder beside the table.
pub(crate) const INDEX_FOLDER: &str = "index";

/// Make a BM25 search index of documents.
///
/// Reads JSON Lines or Parquet rows: doc_id (or id), title, text; or Search-R1's id and contents, whose first line is the
/// title in quotes. Words are lower-cased, title and text are searched together. With --encoder documents can be found by
/// vectors, too.
#[derive(Debug, Args, Serialize)]
pub(crate) struct IndexArguments {
    /// Files of documents, `.parquet` or JSON Lines (also `.gz`, `.zst`)
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    #[serde(skip)]
    corpus: Vec<PathBuf>,
    #[command(flatten)]
    #[serde(skip)]
    vectors: VectorOptions,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

/// What the manifest holds: the arguments, and how vectors were made, if they were.
#[derive(Serialize)]
struct Resolved<'a> {
    #[serde(flatten)]
    arguments: &'a IndexArguments,
    #[serde(skip_serializing_if = "Option::is_none")]
    vectors: Option<&'a Recipe>,
}

/// Runs `index`.
pub(crate) fn run(arguments: &IndexArguments) -> anyhow::Result<()> {
    arguments.stage.check_free()?;
    let input = Input::files("corpus", &arguments.corpus)?;
    let encoder = arguments.vectors.input()?;
    let documents = read_documents(&arguments.corpus).bad_input()?;
    let embedder = arguments.vectors.open()?;
    let resolved = Resolved { arguments, vectors: embedder.as_ref().map(|embedder| &embedder.recipe) };
    let inputs: Vec<&Input> = [&input].into_iter().chain(&encoder).collect();
    let Some(stage) = Stage::open("mempo-rollout", "index", &arguments.stage, &resolved, &inputs)? else {
        return Ok(());
    };
    for (unit, part) in documents.chunks(PART_ROWS).enumerate() {
        stage.check_interrupt()?;
        if !stage.has_part("corpus", unit) {
            stage.write_part("corpus", unit, |file| Ok(write_rows(part, file).map(drop)?))?;
        }
    }
    if let Some(embedder) = &embedder {
        embedder.write(&stage, &documents)?;
    }
    stage.check_interrupt()?;
    let count = documents.len() as u64;
    stage.replace_dir(INDEX_FOLDER, |dir| Ok(SearchIndex::build(documents, dir).map(drop)?))?;
    tracing::info!("{count} documents indexed");
    stage.finish(&[("corpus", count)], json!({}))
}

/// What a document is read from.
pub(crate) const COLUMNS: [&str; 5] = ["doc_id", "id", "contents", "title", "text"];

/// All documents, sorted by id.
fn read_documents(paths: &[PathBuf]) -> anyhow::Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        let before = documents.len();
        for row in rows::read(path, &COLUMNS)? {
            documents.push(document(&row?)?);
        }
        ensure!(documents.len() > before, "{} holds no documents", path.display());
    }
    documents.sort_by(|a, b| a.doc_id.cmp(&b.doc_id));
    match documents.windows(2).find(|pair| pair[0].doc_id == pair[1].doc_id) {
        Some(pair) => Err(anyhow!("two documents have the id `{}`: ids must be unique", pair[0].doc_id)),
        None => Ok(documents),
    }
}

/// A row as a document.
pub(crate) fn document(row: &Located) -> anyhow::Result<Document> {
    let doc_id = row.text(&["doc_id", "id"])?;
    if let Some(contents) = row.optional_text(&["contents"])? {
        let (title, text) = split_contents(&contents);
        return Ok(Document { doc_id, title: title.to_owned(), text: text.to_owned() });
    }
    let text = row.text(&["text"]).context("expected `title` and `text`, or Search-R1's `contents`")?;
    Ok(Document { doc_id, title: row.text(&["title"])?, text })
}
