//! The tools of a rollout: which they are, and what `search` stands on: an index, a server, or what a server once answered.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_agent::{BuiltIn, Calculator, ContextPolicy, Search, SearchTool, Tool, ToolNames, ToolTable, Toolbox};
use mempo_data::{AnsweredQuery, Document, Row};
use mempo_run::{Input, ResultExt};
use mempo_text::{Profile, ToolSpec};
use serde::Serialize;

use crate::http::{Client, Limits, Secret};
use crate::http_tool::{self, HttpTool};
use crate::index::INDEX_FOLDER;
use crate::query_log::{Recorder, Replay};
use crate::retrieval::{self, RemoteSearch};
use crate::retriever::{RecordedRetriever, Retriever, RetrieverOptions};
use crate::web::{self, Engine, WebSearch};

/// Longest answer of a server that is searched, in bytes.
const ANSWER_BYTES: u64 = 16 << 20;
/// The environment's word for it.
pub(crate) const KEY: &str = "MEMPO_SEARCH_KEY";
/// Searches among vectors that wait at a time.
const WAITING: usize = 64;

/// Longest answer of a tool elsewhere, in bytes.
const TOOL_BYTES: u64 = 1 << 20;

/// Which tools there are, and what they stand on.
#[derive(Debug, Args)]
pub(crate) struct ToolOptions {
    #[command(flatten)]
    names: ToolNames,
    /// Where `search` looks: an index, as `index` writes it; the web, as web:searxng or web:serper (its address is read from the
    /// environment as MEMPO_SEARCH_URL, a key as MEMPO_SEARCH_KEY); a server of Search-R1's protocol at http://HOST:PORT, as
    /// `serve-search` is one (a key, if it wants one, is read from the environment as MEMPO_SEARCH_KEY); or a rollout whose
    /// search was a server, to be answered as it was then
    #[arg(long, value_name = "DIR|URL|web:NAME", value_parser = place)]
    search: Option<Place>,
    #[command(flatten)]
    retriever: RetrieverOptions,
    /// Longest time of a call to a server, with all its attempts, of which one may take half of it
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    tool_timeout: u64,
    /// How often a call to a server is tried again that failed, each time after a longer pause
    #[arg(long, value_name = "N", default_value_t = 4)]
    tool_retries: u32,
    /// Most requests in a minute to a server that is searched, to the web, and to each tool elsewhere, evenly spread
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tool_requests_per_minute: Option<u32>,
    /// Let MEMPO_SEARCH_URL be an address of this machine or of a private network
    #[arg(long)]
    allow_private_addresses: bool,
}

/// Where `search` looks.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// An index, or a rollout with a log of its queries.
    Dir(PathBuf),
    Server(String),
    Web(Engine),
}

fn place(text: &str) -> Result<Place, String> {
    if let Some(name) = text.strip_prefix("web:") {
        return Engine::from_str(name, false)
            .map(Place::Web)
            .map_err(|_| "expected web:searxng or web:serper".to_owned());
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        return retrieval::address(text).map(Place::Server);
    }
    Ok(Place::Dir(text.into()))
}

impl ToolOptions {
    /// The directory that is searched, if it is one.
    pub(crate) fn input(&self) -> anyhow::Result<Option<Input>> {
        match &self.search {
            Some(Place::Dir(dir)) => Input::stage("search", dir).map(Some),
            Some(Place::Server(_) | Place::Web(_)) | None => Ok(None),
        }
    }

    /// The encoder of an index that is searched by vectors.
    pub(crate) fn encoder(&self) -> anyhow::Result<Option<Input>> {
        match &self.search {
            Some(Place::Dir(_)) => self.retriever.input(),
            _ if self.retriever.is_usual() => Ok(None),
            _ => Err(anyhow!(
                "--retriever, --bm25-k1 and --bm25-b say how an index is searched, which --search does not name"
            ))
            .usage(),
        }
    }

    /// The tools, by name; none where documents are read. Who answers at once is told of `search` only where there is one.
    pub(crate) fn table(&self, context: &dyn ContextPolicy) -> anyhow::Result<ToolTable> {
        match &self.search {
            None if context.reads_documents() => return Ok(ToolTable::default()),
            Some(_) if context.reads_documents() => {
                return Err(anyhow!("--search is given, but --context reads the tasks' documents")).usage();
            }
            _ => {}
        }
        let mut table = self.names.read().bad_input()?;
        http_tool::check_urls(&mut table.named)?;
        match (table.built_in.contains(&BuiltIn::Search), &self.search) {
            (true, None) if context.answers_at_once() => {
                table.built_in.retain(|tool| *tool != BuiltIn::Search);
                Ok(table)
            }
            (true, None) => {
                Err(anyhow!("the tool `search` needs --search DIR or URL; --tools names other tools")).usage()
            }
            (false, Some(_)) => Err(anyhow!("--search is given, but --tools does not name `search`")).usage(),
            _ => Ok(table),
        }
    }

    /// The tools; `input` and `encoder` are what [`Self::input`] and [`Self::encoder`] gave, `table` what [`Self::table`] did.
    pub(crate) fn open(
        &self,
        table: ToolTable,
        (input, encoder): (Option<&Input>, Option<&Input>),
        profile: &Profile,
        top_k: usize,
    ) -> anyhow::Result<Tools> {
        let source = self.search.as_ref().map(|place| self.source(place, input, encoder)).transpose()?.map(Arc::new);
        let mut tools: Vec<Box<dyn Tool>> = Vec::new();
        for tool in &table.built_in {
            match (tool, &source) {
                (BuiltIn::Search, Some(source)) => {
                    tools.push(Box::new(SearchTool::new(Arc::clone(source), profile, top_k)));
                }
                (BuiltIn::Search, None) => {}
                (BuiltIn::Calculator, _) => tools.push(Box::new(Calculator)),
            }
        }
        // A pass over vectors serves all who ask at the time.
        let is_dense = matches!(source.as_deref(), Some(Source::Index(retriever)) if retriever.is_dense());
        for tool in table.named {
            tools.push(Box::new(HttpTool::new(tool, self.limits(TOOL_BYTES))));
        }
        Ok(Tools { toolbox: Toolbox::new(tools, if is_dense { WAITING } else { 0 })?, source })
    }

    /// For the manifest.
    pub(crate) fn recorded(&self, table: &ToolTable) -> RecordedTools {
        let search = match &self.search {
            Some(Place::Server(url)) => Some(url.clone()),
            Some(Place::Web(engine)) => {
                Some(format!("web:{} {}", engine.name(), web::place(*engine).unwrap_or_default()))
            }
            Some(Place::Dir(_)) | None => None,
        };
        let tools = Some(table.specs()).filter(|specs| *specs != [ToolSpec::search()]);
        let tool_urls = table.named.iter().map(|tool| (tool.spec().name, tool.url.clone())).collect();
        RecordedTools { search, retriever: self.retriever.recorded(), tools, tool_urls }
    }

    fn source(&self, place: &Place, input: Option<&Input>, encoder: Option<&Input>) -> anyhow::Result<Source> {
        match place {
            Place::Dir(dir) => self.stored(dir, input, encoder),
            Place::Server(url) => {
                let client = Client::new(url, Secret::bearer(KEY), self.limits(ANSWER_BYTES));
                Ok(Source::Server(Recorder::new(Box::new(RemoteSearch(client)))))
            }
            Place::Web(engine) => {
                let limits = self.limits(ANSWER_BYTES);
                let search = WebSearch::from_environment(*engine, limits, self.allow_private_addresses).usage()?;
                Ok(Source::Server(Recorder::new(Box::new(search))))
            }
        }
    }

    /// What a directory answers.
    fn stored(&self, dir: &Path, input: Option<&Input>, encoder: Option<&Input>) -> anyhow::Result<Source> {
        if let Some(input) = input.filter(|input| input.dir().join(INDEX_FOLDER).is_dir()) {
            return Ok(Source::Index(self.retriever.open(input, encoder)?));
        }
        match input.filter(|input| self.retriever.is_usual() && input.table(AnsweredQuery::TABLE).is_ok()) {
            Some(input) => Ok(Source::Log(Replay::read(input)?)),
            None => Err(anyhow!(
                "{}: neither an index, as `mempo-rollout index` writes it, nor a rollout with a table `{}`, as there is one \
                 where --search was a server, to be answered without --retriever, --bm25-k1 and --bm25-b",
                dir.display(),
                AnsweredQuery::TABLE
            ))
            .bad_input(),
        }
    }

    fn limits(&self, answer_bytes: u64) -> Limits {
        let call = Duration::from_secs(self.tool_timeout);
        let attempt = if self.tool_retries == 0 { call } else { call / 2 };
        let (retries, per_minute) = (self.tool_retries, self.tool_requests_per_minute);
        Limits { attempt, call: Some(call), retries, answer_bytes, per_minute, leaves_alone: true }
    }
}

/// What the manifest holds of tools: nothing where there is `search` alone and a directory is searched, which is an input.
#[derive(Serialize)]
pub(crate) struct RecordedTools {
    /// Address of the server that is searched, or who searches the web: nothing tells what stands behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    search: Option<String>,
    /// How an index is searched, if not as usual.
    #[serde(skip_serializing_if = "Option::is_none")]
    retriever: Option<RecordedRetriever>,
    /// What the policy is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<Vec<ToolSpec>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tool_urls: BTreeMap<String, String>,
}

/// What is searched.
enum Source {
    Index(Retriever),
    Server(Recorder),
    Log(Replay),
}

impl Search for Source {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        match self {
            Self::Index(index) => {
                let found = index.search(&[query.to_owned()], top_k).map_err(|error| format!("{error:#}"))?;
                Ok(found.into_iter().flatten().map(|hit| hit.document).collect())
            }
            Self::Server(recorder) => recorder.search(query, top_k),
            Self::Log(replay) => replay.search(query, top_k),
        }
    }

    fn is_remote(&self) -> bool {
        matches!(self, Self::Server(_))
    }
}

/// The tools of a rollout.
pub(crate) struct Tools {
    pub(crate) toolbox: Toolbox,
    source: Option<Arc<Source>>,
}

impl Tools {
    /// From now on this unit's trajectories call.
    pub(crate) fn begin(&self, unit: usize) {
        match self.source.as_deref() {
            None | Some(Source::Index(_)) => {}
            // What an interrupted unit was told is not the next one's.
            Some(Source::Server(recorder)) => drop(recorder.take()),
            Some(Source::Log(replay)) => replay.begin(unit),
        }
    }

    /// What a server told the unit, sorted; nothing to keep if none is asked.
    pub(crate) fn answered(&self) -> Option<Vec<AnsweredQuery>> {
        match self.source.as_deref() {
            Some(Source::Server(recorder)) => Some(recorder.take()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
