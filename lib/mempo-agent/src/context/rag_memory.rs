use mempo_text::Carried;

use super::relevance::Texts;
use super::{ContextPolicy, Past, whole};

/// The last step, and those of the earlier ones that have most to do with the question and with what the last step wrote, in
/// their order: the history as a store to retrieve from, not to read through. Relevance is that of words (BM25).
#[derive(Debug, Clone, Copy)]
pub struct RagMemory {
    /// Most steps that are retrieved.
    pub retrieved: usize,
}

impl ContextPolicy for RagMemory {
    fn name(&self) -> &'static str {
        "rag-memory"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        let Some((last, earlier)) = past.steps.split_last() else { return Carried::default() };
        let texts: Vec<String> = earlier
            .iter()
            .map(|step| format!("{} {}", step.completion, step.observation.as_deref().unwrap_or_default()))
            .collect();
        let query = format!("{} {}", past.question, last.completion);
        let best = Texts::new(texts.iter().map(String::as_str)).best(&query, self.retrieved);
        let steps = best.into_iter().map(|place| &earlier[place]).chain([last]);
        steps.map(whole).collect::<Vec<_>>().into()
    }
}
