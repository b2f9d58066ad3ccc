//! The step loop of an agent that searches: prompt, completion, tool call, observation, until an answer.
//!
//! [`Agent::run`] takes tasks and an [`Engine`] and gives back trajectories and steps, the rows of a rollout. What a
//! step sees of the past is a [`ContextPolicy`]'s choice; what a tool call yields comes from the [`Toolbox`], whose
//! `search` stands on a [`SearchIndex`] or whatever else implements [`Search`]; what an answer is worth says [`outcome`]. This crate knows no model: an engine
//! takes token ids and returns token ids with their log-probabilities.

mod agent;
mod attempt;
mod bm25;
mod calculator;
mod calls;
mod context;
mod engine;
mod fusion;
mod observation;
mod options;
mod outcome;
mod read_only;
mod reward;
mod search;
mod tool_table;
mod toolbox;
mod trajectories;

use std::path::PathBuf;

pub use agent::{Agent, Start, Unit};
pub use bm25::Bm25Options;
pub use calculator::Calculator;
pub use context::{
    AMem, Carry, ClosedBook, ContextOptions, ContextPolicy, FullDocument, Mem1, MemAgent, Mempo, NoPast, Past,
    RagMemory, React, check_profile, context_policy,
};
pub use engine::{Engine, Environment, Generated, Generation, Request};
pub use fusion::reciprocal_rank_fusion;
pub use options::{LimitOptions, OnToolFailure, SamplingOptions};
pub use outcome::{Outcome, format_problem, outcome, row_segments};
pub use reward::{RewardKind, RewardOptions};
pub use search::{Hit, SearchIndex};
pub use tool_table::{BuiltIn, NamedTool, ToolNames, ToolTable};
pub use toolbox::{Search, SearchTool, Tool, ToolFailure, Toolbox};

/// What can go wrong around the agent. The policy's own mistakes are data, never an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that no context policy bears.
    #[error("unknown context policy `{name}`: choose one of `{known}`")]
    UnknownContext {
        /// What was given.
        name: String,
        /// Names that there are.
        known: String,
    },
    /// Options that belong to another context policy.
    #[error(
        "--context {0} has no such option: --carry, --carry-steps and --max-memory-tokens belong to mempo, \
         --retrieved-steps to rag-memory and a-mem, --chunk-tokens and --max-chunks to memagent, --last-tokens to \
         full-document"
    )]
    ContextOption(String),
    /// A file of the search index can't be written or read.
    #[error("search index {}", path.display())]
    IndexFile {
        /// Folder of the index.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The search index is not one, or not one of ours.
    #[error("search index {}", path.display())]
    Index {
        /// Folder of the index.
        path: PathBuf,
        /// What the search library says.
        source: tantivy::TantivyError,
    },
    /// A stored document lacks a field this version writes.
    #[error("search index {}: a document has no `{field}`: build the index again with `mempo-rollout index`", path.display())]
    Document {
        /// Folder of the index.
        path: PathBuf,
        /// The field.
        field: &'static str,
    },
    /// Tools that can't be offered together, or not by this profile.
    #[error("{0}")]
    Tools(String),
    /// A file of tools that can't be read.
    #[error("{}: {message}", path.display())]
    ToolFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// No threads are left to call tools on.
    #[error("no threads to call tools on: {0}")]
    Threads(String),
    /// The engine can do no more.
    #[error("{0}")]
    Engine(String),
    /// A prompt can't be built, whatever the policy does.
    #[error("task `{task_id}`: {source}")]
    Prompt {
        /// The task.
        task_id: String,
        /// What the prompt builder says.
        source: mempo_text::Error,
    },
}
