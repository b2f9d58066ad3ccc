use std::borrow::Cow;

use mempo_text::Carried;

use super::{ContextPolicy, Past};

/// The document at once, or its end: what a model makes of it without a memory.
#[derive(Debug, Clone, Copy)]
pub struct FullDocument {
    /// Most tokens, from the end; nothing for the whole.
    pub last_tokens: Option<usize>,
}

impl ContextPolicy for FullDocument {
    fn name(&self) -> &'static str {
        "full-document"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        Carried { chunk: Some(Cow::Borrowed(past.document)), ..Carried::default() }
    }

    fn reads_documents(&self) -> bool {
        true
    }

    fn prepare(&self, mut document: Vec<i32>) -> Vec<i32> {
        let most = self.last_tokens.unwrap_or(usize::MAX);
        document.drain(..document.len().saturating_sub(most));
        document
    }
}
