use mempo_text::Carried;

use super::{ContextPolicy, Past, whole};

/// Every step: the history grows without bound (ReAct, arXiv 2210.03629).
#[derive(Debug, Clone, Copy)]
pub struct React;

impl ContextPolicy for React {
    fn name(&self) -> &'static str {
        "react"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        past.steps.iter().map(whole).collect::<Vec<_>>().into()
    }
}
