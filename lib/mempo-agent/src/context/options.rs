//! Options of context policies, and where they are found by name.

use clap::Args;
use serde::Serialize;

use super::{AMem, Carry, ClosedBook, ContextPolicy, FullDocument, Mem1, MemAgent, Mempo, NoPast, RagMemory, React};
use crate::Error;
use crate::options::at_least_one;

const NAMES: [&str; 9] =
    ["mempo", "react", "mem1", "rag-memory", "a-mem", "none", "closed-book", "memagent", "full-document"];

/// What a step sees of the past.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize)]
pub struct ContextOptions {
    /// What a step sees of the past: its last step with a memory (mempo; mem1: from the memory on), every step (react), its
    /// last step and the most relevant of the others (rag-memory) or notes of them (a-mem), nothing (none), or nothing and
    /// it must answer at once (closed-book). Where tasks have a document to read: a chunk of it and the memory of those
    /// before (memagent), or all of it (full-document)
    #[arg(long, default_value = "mempo", value_parser = NAMES)]
    pub context: String,
    /// With mempo: what is carried of a step
    #[arg(long, value_enum, default_value_t)]
    pub carry: Carry,
    /// With mempo: how many of the last steps are carried
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub carry_steps: usize,
    /// With mempo: most tokens of a carried memory; a longer one is cut and marked
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory_tokens: Option<usize>,
    /// With rag-memory and a-mem: most earlier steps or notes that are retrieved
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = at_least_one)]
    pub retrieved_steps: usize,
    /// With memagent: tokens of a chunk, one a step [default: 5000]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_tokens: Option<usize>,
    /// With memagent: most chunks; of a longer document the first and the last half of so many are read
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_chunks: Option<usize>,
    /// With full-document: only so many tokens, from the document's end
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_tokens: Option<usize>,
}

/// Tokens of a section where nothing is said (MemAgent, arXiv 2507.02259).
const CHUNK_TOKENS: usize = 5000;

impl Default for ContextOptions {
    fn default() -> Self {
        Self {
            context: "mempo".to_owned(),
            carry: Carry::default(),
            carry_steps: 1,
            max_memory_tokens: None,
            retrieved_steps: 3,
            chunk_tokens: None,
            max_chunks: None,
            last_tokens: None,
        }
    }
}

impl ContextOptions {
    /// Tokens of a chunk, of who reads by chunks.
    pub fn chunk_tokens(&self) -> usize {
        self.chunk_tokens.unwrap_or(CHUNK_TOKENS)
    }

    /// The profile that is made for the context policy.
    pub fn profile(&self) -> &str {
        if self.context == "closed-book" { "react" } else { &self.context }
    }
}

/// The context policy of that name, as the options say; an option that means nothing to it is an error.
pub fn context_policy(options: &ContextOptions) -> Result<Box<dyn ContextPolicy>, Error> {
    let ContextOptions { carry, carry_steps, max_memory_tokens, retrieved_steps, .. } = *options;
    let ContextOptions { chunk_tokens, max_chunks, last_tokens, .. } = *options;
    let defaults = ContextOptions { context: options.context.clone(), ..ContextOptions::default() };
    let name = options.context.as_str();
    let is_plain = match name {
        "mempo" => *options == ContextOptions { carry, carry_steps, max_memory_tokens, ..defaults },
        "rag-memory" | "a-mem" => *options == ContextOptions { retrieved_steps, ..defaults },
        "memagent" => *options == ContextOptions { chunk_tokens, max_chunks, ..defaults },
        "full-document" => *options == ContextOptions { last_tokens, ..defaults },
        _ => *options == defaults,
    };
    if !is_plain {
        return Err(Error::ContextOption(name.to_owned()));
    }
    Ok(match name {
        "mempo" => Box::new(Mempo { carry, steps: carry_steps, max_memory_tokens }),
        "react" => Box::new(React),
        "mem1" => Box::new(Mem1),
        "rag-memory" => Box::new(RagMemory { retrieved: retrieved_steps }),
        "a-mem" => Box::new(AMem { retrieved: retrieved_steps }),
        "none" => Box::new(NoPast),
        "closed-book" => Box::new(ClosedBook),
        "memagent" => Box::new(MemAgent { chunk_tokens: options.chunk_tokens(), max_chunks }),
        "full-document" => Box::new(FullDocument { last_tokens }),
        _ => return Err(Error::UnknownContext { name: name.to_owned(), known: NAMES.join("`, `") }),
    })
}
