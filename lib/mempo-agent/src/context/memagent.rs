use std::borrow::Cow;

use mempo_text::Carried;

use super::{ContextPolicy, Past, memory};

/// One chunk of the document a step, and the memory that the step before wrote; at the end the memory alone (MemAgent,
/// arXiv 2507.02259, §3).
#[derive(Debug, Clone, Copy)]
pub struct MemAgent {
    /// Tokens of a chunk; the last one may have fewer.
    pub chunk_tokens: usize,
    /// Most chunks: of a longer document the first and the last half of so many are read.
    pub max_chunks: Option<usize>,
}

impl ContextPolicy for MemAgent {
    fn name(&self) -> &'static str {
        "memagent"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        let written = past.steps.last().and_then(|step| Some((step, memory(step)?)));
        let memory = written.map(|(step, memory)| Cow::Borrowed(&step.completion_ids[memory.range]));
        let chunk = self.chunk(past.document, past.steps.len()).map(Cow::Borrowed);
        Carried { memory, chunk, ..Carried::default() }
    }

    fn needs_memory(&self) -> bool {
        true
    }

    fn reads_documents(&self) -> bool {
        true
    }

    fn prepare(&self, mut document: Vec<i32>) -> Vec<i32> {
        let most = self.max_chunks.map_or(usize::MAX, |chunks| chunks.saturating_mul(self.chunk_tokens));
        if document.len() > most {
            document.drain(most / 2..document.len() - (most - most / 2));
        }
        document
    }

    fn chunk_tokens(&self) -> Option<usize> {
        Some(self.chunk_tokens)
    }

    fn reading_steps(&self, document: &[i32]) -> usize {
        document.len().div_ceil(self.chunk_tokens)
    }
}
