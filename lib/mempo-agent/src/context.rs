//! Context policies: what a step sees of the steps before it. One file each; [`context_policy`] finds one by its name.

mod a_mem;
mod closed_book;
mod full_document;
mod mem1;
mod memagent;
mod mempo;
mod none;
mod options;
mod rag_memory;
mod react;
mod relevance;

use std::borrow::Cow;

use mempo_data::{SegmentKind, Step};
use mempo_text::{Carried, CarriedStep, MemoryRule, Profile, PromptBuilder, Segment};

pub use self::a_mem::AMem;
pub use self::closed_book::ClosedBook;
pub use self::full_document::FullDocument;
pub use self::mem1::Mem1;
pub use self::memagent::MemAgent;
pub use self::mempo::{Carry, Mempo};
pub use self::none::NoPast;
pub use self::options::{ContextOptions, context_policy};
pub use self::rag_memory::RagMemory;
pub use self::react::React;

/// What a policy chooses from.
#[derive(Clone, Copy)]
pub struct Past<'a> {
    /// The task's question.
    pub question: &'a str,
    /// The trajectory's steps so far, oldest first.
    pub steps: &'a [Step],
    /// What there is to read, as [`ContextPolicy::prepare`] left it; empty where documents are searched for.
    pub document: &'a [i32],
    /// Builds the prompt.
    pub builder: &'a PromptBuilder,
}

/// Chooses what the next prompt holds beside the question: a function of the question, the document and the steps alone, so
/// that training data, rollouts and scores agree on it.
pub trait ContextPolicy: Send + Sync {
    /// Its name on the command line and in the manifest.
    fn name(&self) -> &str;
    /// What is carried into the next prompt.
    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a>;
    /// Whether what is older than the last step is reachable through its memory alone.
    fn needs_memory(&self) -> bool {
        false
    }
    /// Whether tasks come with a document to read.
    fn reads_documents(&self) -> bool {
        false
    }
    /// What of a document is read.
    fn prepare(&self, document: Vec<i32>) -> Vec<i32> {
        document
    }
    /// Tokens of a document that a prompt holds beside a memory, where it holds no more however long the document is.
    fn chunk_tokens(&self) -> Option<usize> {
        None
    }
    /// The part of a document that a step reads, where it reads one; the last may be shorter than the others.
    fn chunk<'d>(&self, document: &'d [i32], step: usize) -> Option<&'d [i32]> {
        document.chunks(self.chunk_tokens()?).nth(step)
    }
    /// Steps that write a memory each and nothing else; the one after them answers.
    fn reading_steps(&self, _document: &[i32]) -> usize {
        0
    }
    /// Whether the prompt ends with `<answer>`, so that the first step, which is the only one, answers from what the
    /// policy knows.
    fn answers_at_once(&self) -> bool {
        false
    }
}

/// Refuses a profile whose messages have no place for what the policy shows of a document, and of what was read of it.
pub fn check_profile(context: &dyn ContextPolicy, profile: &Profile) -> Result<(), String> {
    let (name, found) = (context.name(), &profile.name);
    if !context.reads_documents() {
        return Ok(());
    }
    if profile.reading.is_none() {
        return Err(format!(
            "--context {name} reads documents, and --profile `{found}` has no `reading` to show them in: give `{name}`, or a folder like it"
        ));
    }
    if context.needs_memory() && profile.memory != MemoryRule::Whole {
        return Err(format!(
            "--context {name} carries a memory from chunk to chunk, and in --profile `{found}` `memory` is not `whole`: give `{name}`, or a folder like it"
        ));
    }
    Ok(())
}

/// A step as it was.
fn whole(step: &Step) -> CarriedStep<'_> {
    CarriedStep::new(&step.completion_ids, step.observation_ids.as_deref())
}

fn results(step: &Step) -> Option<Cow<'_, [i32]>> {
    step.observation_ids.as_deref().map(Cow::Borrowed)
}

/// The memory that counts: the first of a step.
pub(crate) fn memory(step: &Step) -> Option<Segment> {
    let found = step.segments.iter().find(|segment| segment.kind == SegmentKind::Memory)?;
    Some(Segment { kind: mempo_text::SegmentKind::Memory, range: found.start as usize..found.end as usize })
}

#[cfg(test)]
mod tests;
