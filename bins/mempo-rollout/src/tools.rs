//! What a rollout's tools stand on: an index, a server, or what a server once answered.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use mempo_agent::{Search, SearchIndex, SearchTool, Toolbox};
use mempo_data::{AnsweredQuery, Document, Row};
use mempo_run::{Input, ResultExt};
use mempo_text::Profile;
use serde::Serialize;

use crate::http::{Client, Limits, Secret};
use crate::index::INDEX_FOLDER;
use crate::query_log::{Recorder, Replay};
use crate::retrieval::{self, RemoteSearch};

/// Longest answer of a server that is searched, in bytes.
const ANSWER_BYTES: u64 = 16 << 20;
/// The environment's word for it.
const KEY: &str = "MEMPO_SEARCH_KEY";
/// Calls to tools elsewhere that are under way at a time.
const WAITING: usize = 64;

/// What tools stand on.
#[derive(Debug, Args, Serialize)]
pub(crate) struct ToolOptions {
    /// Where `search` looks: an index, as `index` writes it; a server of Search-R1's protocol at http://HOST:PORT, as
    /// `serve-search` is one (a key, if it wants one, is read from the environment as MEMPO_SEARCH_KEY); or a rollout whose
    /// search was a server, to be answered as it was then
    #[arg(long, value_name = "DIR|URL", value_parser = place)]
    #[serde(skip_serializing_if = "Place::is_dir")]
    search: Place,
    /// Longest time of a call to a server, with all its attempts, of which one may take half of it
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    #[serde(skip)]
    tool_timeout: u64,
    /// How often a call to a server is tried again that failed, each time after a longer pause
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[serde(skip)]
    tool_retries: u32,
}

/// Where `search` looks. What is recorded of it is a server's address: nothing tells what stands behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Place {
    /// An index, or a rollout with a log of its queries.
    #[serde(skip)]
    Dir(PathBuf),
    Server(String),
}

impl Place {
    fn is_dir(&self) -> bool {
        matches!(self, Self::Dir(_))
    }
}

fn place(text: &str) -> Result<Place, String> {
    if text.starts_with("http://") || text.starts_with("https://") {
        return retrieval::address(text).map(Place::Server);
    }
    Ok(Place::Dir(text.into()))
}

impl ToolOptions {
    /// The directory that is searched, if it is one.
    pub(crate) fn input(&self) -> anyhow::Result<Option<Input>> {
        match &self.search {
            Place::Dir(dir) => Input::stage("search", dir).map(Some),
            Place::Server(_) => Ok(None),
        }
    }

    /// The tools; `input` is what [`Self::input`] gave.
    pub(crate) fn open(&self, input: Option<&Input>, profile: &Profile, top_k: usize) -> anyhow::Result<Tools> {
        let source = Arc::new(match (&self.search, input) {
            (Place::Server(url), _) => {
                let client = Client::new(url, Secret::bearer(KEY), self.limits());
                Source::Server(Recorder::new(Box::new(RemoteSearch(client))))
            }
            (Place::Dir(dir), input) => stored(dir, input)?,
        });
        let search = SearchTool::new(Arc::clone(&source), profile, top_k);
        let waiting = if matches!(*source, Source::Server(_)) { WAITING } else { 0 };
        Ok(Tools { toolbox: Toolbox::new(vec![Box::new(search)], waiting)?, source })
    }

    fn limits(&self) -> Limits {
        let call = Duration::from_secs(self.tool_timeout);
        let attempt = if self.tool_retries == 0 { call } else { call / 2 };
        let retries = self.tool_retries;
        Limits { attempt, call: Some(call), retries, answer_bytes: ANSWER_BYTES, leaves_alone: true }
    }
}

/// What a directory answers.
fn stored(dir: &Path, input: Option<&Input>) -> anyhow::Result<Source> {
    let index = dir.join(INDEX_FOLDER);
    if index.is_dir() {
        return Ok(Source::Index(SearchIndex::open(&index).bad_input()?));
    }
    match input.filter(|input| input.table(AnsweredQuery::TABLE).is_ok()) {
        Some(input) => Ok(Source::Log(Replay::read(input)?)),
        None => Err(anyhow!(
            "{}: neither an index, as `mempo-rollout index` writes it, nor a rollout with a table `{}`, as there is one \
             where --search was a server",
            dir.display(),
            AnsweredQuery::TABLE
        ))
        .bad_input(),
    }
}

/// What is searched.
enum Source {
    Index(SearchIndex),
    Server(Recorder),
    Log(Replay),
}

impl Search for Source {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        match self {
            Self::Index(index) => Search::search(index, query, top_k),
            Self::Server(recorder) => recorder.search(query, top_k),
            Self::Log(replay) => replay.search(query, top_k),
        }
    }
}

/// The tools of a rollout.
pub(crate) struct Tools {
    pub(crate) toolbox: Toolbox,
    source: Arc<Source>,
}

impl Tools {
    /// From now on this unit's trajectories call.
    pub(crate) fn begin(&self, unit: usize) {
        match &*self.source {
            Source::Index(_) => {}
            // What an interrupted unit was told is not the next one's.
            Source::Server(recorder) => drop(recorder.take()),
            Source::Log(replay) => replay.begin(unit),
        }
    }

    /// What a server told the unit, sorted; nothing to keep if none is asked.
    pub(crate) fn answered(&self) -> Option<Vec<AnsweredQuery>> {
        match &*self.source {
            Source::Server(recorder) => Some(recorder.take()),
            Source::Index(_) | Source::Log(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
