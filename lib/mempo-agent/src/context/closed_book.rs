use mempo_text::Carried;

use super::{ContextPolicy, Past};

/// The question alone, and the answer at once: what the policy knows without a tool.
#[derive(Debug, Clone, Copy)]
pub struct ClosedBook;

impl ContextPolicy for ClosedBook {
    fn name(&self) -> &'static str {
        "closed-book"
    }

    fn carried<'a>(&self, _: &Past<'a>) -> Carried<'a> {
        Carried::default()
    }

    fn answers_at_once(&self) -> bool {
        true
    }
}
