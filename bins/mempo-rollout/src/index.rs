//! `index`: documents -> the corpus table, a BM25 index over it and, if an encoder is given, their vectors.

use std::path::PathBuf;

use clap::Args;
use mempo_agent::SearchIndex;
use mempo_run::{Failure, Input, Stage, StageArgs};
use serde::Serialize;
use serde_json::json;

use crate::corpus;
use crate::vectors::{Recipe, VectorOptions};

/// The index's folder beside the table.
pub(crate) const INDEX_FOLDER: &str = "index";

/// Make a BM25 search index of documents.
///
/// Reads rows of JSON lines, a JSON array or Parquet: doc_id (or id), title, text; or Search-R1's id and contents, whose first line is the
/// title in quotes. Words are lower-cased, title and text are searched together. With --encoder documents can be found by
/// vectors, too. Memory does not grow with the documents but for some 20 bytes each; while it works, OUT takes about twice
/// what it will.
#[derive(Debug, Args, Serialize)]
pub(crate) struct IndexArguments {
    /// Files of documents, `.parquet`, or JSON: a row a line, or one array (also `.gz`, `.zst`)
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
    let embedder = arguments.vectors.open()?;
    let resolved = Resolved { arguments, vectors: embedder.as_ref().map(|embedder| &embedder.recipe) };
    let inputs: Vec<&Input> = [&input].into_iter().chain(&encoder).collect();
    let Some(stage) = Stage::open("mempo-rollout", "index", &arguments.stage, &resolved, &inputs)? else {
        return Ok(());
    };
    let count = match corpus::write(&stage, &arguments.corpus, corpus::LIMITS) {
        Err(error) if matches!(error.downcast_ref(), Some(Failure::BadInput(_))) => return Err(stage.withdraw(error)),
        written => written?,
    };
    if let Some(embedder) = &embedder {
        embedder.write(&stage, corpus::documents(&stage)?, count)?;
    }
    if !stage.dir().join(INDEX_FOLDER).is_dir() {
        write_words(&stage, count)?;
    }
    tracing::info!("{count} documents indexed");
    stage.finish(&[(corpus::TABLE, count)], json!({}))
}

/// Writes the BM25 index.
fn write_words(stage: &Stage, count: u64) -> anyhow::Result<()> {
    let progress = stage.progress("index", count, "documents");
    let documents = corpus::documents(stage)?.inspect(|_| progress.inc(1));
    stage.replace_dir(INDEX_FOLDER, |dir| SearchIndex::try_build::<anyhow::Error>(documents, dir).map(drop))
}
