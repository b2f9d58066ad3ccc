//! What finds documents of an index: BM25, an encoder's vectors, or both by reciprocal rank.

use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_agent::{Bm25Options, Hit, SearchIndex, reciprocal_rank_fusion};
use mempo_model::{DeviceOptions, Embeddings, Vectors};
use mempo_run::{Input, ResultExt};
use serde::Serialize;

use crate::index::INDEX_FOLDER;
use crate::vectors::{self, Embedder, Recipe};

/// Documents of each ranking that are fused, at least.
const FUSED: usize = 100;
/// Most callers whose queries are looked for in one pass over the vectors.
const CALLERS: usize = 64;

/// How documents of an index are found.
#[derive(Debug, Args)]
pub(crate) struct RetrieverOptions {
    /// How documents of an index are found; dense and hybrid need an index made with --encoder
    #[arg(long, value_enum, default_value = "bm25")]
    retriever: Kind,
    #[command(flatten)]
    bm25: Bm25Options,
    /// For dense and hybrid: the encoder that the index was made with
    #[arg(long, value_name = "DIR")]
    encoder: Option<PathBuf>,
    /// For dense and hybrid: put before every query that is encoded: "query: " for E5, "" for MiniLM
    #[arg(long, value_name = "TEXT", default_value = "query: ")]
    query_prefix: String,
    /// For dense and hybrid, where to encode queries and search: cpu, cuda or cuda:N, whose memory then holds the vectors
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    search_device: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// By words
    Bm25,
    /// By the inner product of vectors
    Dense,
    /// By the sum of 1 / (60 + rank) over both
    Hybrid,
}

/// What a manifest holds of them; the encoder is an input.
#[derive(Debug, Serialize)]
pub(crate) struct RecordedRetriever {
    kind: Kind,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    bm25: Option<Bm25Options>,
    #[serde(skip_serializing_if = "Option::is_none")]
    query_prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    search_device: Option<String>,
}

impl RetrieverOptions {
    /// Whether words alone are looked for, by the usual constants.
    pub(crate) fn is_usual(&self) -> bool {
        !self.is_dense() && self.bm25 == Bm25Options::default()
    }

    fn is_dense(&self) -> bool {
        self.retriever != Kind::Bm25
    }

    /// The encoder, if one is needed.
    pub(crate) fn input(&self) -> anyhow::Result<Option<Input>> {
        match (&self.encoder, self.is_dense()) {
            (None, false) => Ok(None),
            (Some(dir), true) => Input::model("encoder", dir).map(Some),
            (Some(_), false) => {
                Err(anyhow!("--encoder is given, but --retriever is bm25, which has no use for it")).usage()
            }
            (None, true) => {
                Err(anyhow!("--retriever needs --encoder DIR, the encoder that the index was made with")).usage()
            }
        }
    }

    /// For the manifest: nothing if it is as usual.
    pub(crate) fn recorded(&self) -> Option<RecordedRetriever> {
        let of_dense = |value: &String| self.is_dense().then(|| value.clone());
        (!self.is_usual()).then(|| RecordedRetriever {
            kind: self.retriever,
            bm25: (self.bm25 != Bm25Options::default()).then_some(self.bm25),
            query_prefix: of_dense(&self.query_prefix),
            search_device: of_dense(&self.search_device),
        })
    }

    /// What finds documents of `index`; `encoder` is what [`Self::input`] gave.
    pub(crate) fn open(&self, index: &Input, encoder: Option<&Input>) -> anyhow::Result<Retriever> {
        let dense = encoder.map(|encoder| self.dense(index, encoder)).transpose()?;
        let words = SearchIndex::open(&index.dir().join(INDEX_FOLDER), self.bm25).bad_input()?;
        if let Some((_, found)) = dense.as_ref().filter(|(_, found)| *found as u64 != words.len()) {
            let (dir, expected) = (index.dir().display(), words.len());
            return Err(anyhow!("{dir}: {found} vectors of {expected} documents: make it again")).bad_input();
        }
        let (dense, is_hybrid) = (dense.map(|(dense, _)| dense), self.retriever == Kind::Hybrid);
        Ok(Retriever { words, dense, is_hybrid })
    }

    /// The search among the vectors of `index`, and how many there are.
    fn dense(&self, index: &Input, encoder: &Input) -> anyhow::Result<(Dense, usize)> {
        let recipe = Recipe::of(index)?;
        index.check_made_from("encoder", encoder, "mempo-rollout index")?;
        // The libraries of a GPU are loaded before anything else is asked of libtorch: the policy may need them later.
        DeviceOptions::default().resolve().usage()?;
        let embedder = Embedder::open(encoder.dir(), recipe.on(&self.search_device))?;
        let (size, device) = (embedder.encoder.config().hidden_size, embedder.encoder.runtime().device);
        let vectors = Vectors::open(&vectors::files(index), size, device).bad_input()?;
        let count = vectors.len();
        let (questions, asked) = mpsc::channel();
        let worker = Worker { embedder, vectors, query_prefix: self.query_prefix.clone() };
        std::thread::Builder::new().name("dense search".to_owned()).spawn(move || worker.run(&asked))?;
        Ok((Dense { questions }, count))
    }
}

/// What finds documents of an index.
pub(crate) struct Retriever {
    words: SearchIndex,
    dense: Option<Dense>,
    is_hybrid: bool,
}

impl From<SearchIndex> for Retriever {
    /// By words alone.
    fn from(words: SearchIndex) -> Self {
        Self { words, dense: None, is_hybrid: false }
    }
}

impl Retriever {
    /// How many documents are searched.
    #[allow(clippy::len_without_is_empty, reason = "an index is made of documents")]
    pub(crate) fn len(&self) -> u64 {
        self.words.len()
    }

    /// Whether queries wait for a pass over vectors, so that it is better to have many wait together.
    pub(crate) fn is_dense(&self) -> bool {
        self.dense.is_some()
    }

    /// The `top_k` best documents for each query, best first.
    pub(crate) fn search(&self, queries: &[String], top_k: usize) -> anyhow::Result<Vec<Vec<Hit>>> {
        let depth = if self.is_hybrid { top_k.max(FUSED) } else { top_k };
        let words = || queries.iter().map(|query| Ok(self.words.search(query, depth)?)).collect();
        let Some(dense) = &self.dense else { return words() };
        let nearest = dense.search(queries, depth)?.into_iter();
        let nearest: Vec<Vec<Hit>> = nearest.map(|found| self.hits(&found)).collect::<anyhow::Result<_>>()?;
        if !self.is_hybrid || top_k == 0 {
            return Ok(nearest);
        }
        let rankings = words()?.into_iter().zip(nearest);
        Ok(rankings.map(|(words, nearest)| reciprocal_rank_fusion(vec![words, nearest], top_k)).collect())
    }

    fn hits(&self, found: &[(usize, f32)]) -> anyhow::Result<Vec<Hit>> {
        let hit =
            |(position, score): &(usize, f32)| Ok(Hit { document: self.words.document_at(*position)?, score: *score });
        found.iter().map(hit).collect()
    }
}

/// Positions and inner products, best first.
type Found = Vec<(usize, f32)>;

/// Queries of one caller, and where it waits.
struct Question {
    queries: Vec<String>,
    top_k: usize,
    answer: mpsc::Sender<anyhow::Result<Vec<Found>>>,
}

/// The search among vectors, which one thread does for all who ask.
struct Dense {
    questions: mpsc::Sender<Question>,
}

impl Dense {
    fn search(&self, queries: &[String], top_k: usize) -> anyhow::Result<Vec<Found>> {
        let (answer, answered) = mpsc::channel();
        let ended = |()| anyhow!("the search among vectors has ended");
        self.questions.send(Question { queries: queries.to_vec(), top_k, answer }).map_err(|_| ended(()))?;
        answered.recv().map_err(|_| ended(()))?
    }
}

struct Worker {
    embedder: Embedder,
    vectors: Vectors,
    query_prefix: String,
}

impl Worker {
    /// Answers until nobody can ask any more. Who asks while a pass is under way shares the next one.
    fn run(&self, asked: &mpsc::Receiver<Question>) {
        while let Ok(first) = asked.recv() {
            let questions: Vec<Question> = std::iter::once(first).chain(asked.try_iter().take(CALLERS - 1)).collect();
            let mut embedded = Vec::new();
            let mut waiting = Vec::new();
            for question in questions {
                match self.embed(&question.queries) {
                    Ok(vectors) => {
                        embedded.extend(vectors);
                        waiting.push(question);
                    }
                    // Whoever no longer waits for the answer has no need of it, here and below.
                    Err(error) => drop(question.answer.send(Err(error))),
                }
            }
            let most = waiting.iter().map(|question| question.top_k).max().unwrap_or(0);
            let mut found = self.vectors.nearest(&embedded, most).into_iter();
            for Question { queries, top_k, answer } in waiting {
                let mut own: Vec<Found> = found.by_ref().take(queries.len()).collect();
                for found in &mut own {
                    found.truncate(top_k);
                }
                drop(answer.send(Ok(own)));
            }
        }
    }

    /// Each alone, so that a query's vector is a function of the query.
    fn embed(&self, queries: &[String]) -> anyhow::Result<Vec<Embeddings>> {
        let texts = queries.iter().map(|query| format!("{}{query}", self.query_prefix)).collect();
        let options = self.embedder.options();
        let ids = self.embedder.ids(texts)?.into_iter();
        ids.map(|ids| Ok(self.embedder.encoder.embed(&[ids], &options)?)).collect()
    }
}

#[cfg(test)]
mod tests;
