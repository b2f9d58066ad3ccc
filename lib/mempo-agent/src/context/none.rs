use mempo_text::Carried;

use super::{ContextPolicy, Past};

/// Nothing: every step begins with the question alone, as if it were the first. The floor under every memory.
#[derive(Debug, Clone, Copy)]
pub struct NoPast;

impl ContextPolicy for NoPast {
    fn name(&self) -> &'static str {
        "none"
    }

    fn carried<'a>(&self, _: &Past<'a>) -> Carried<'a> {
        Carried::default()
    }
}
