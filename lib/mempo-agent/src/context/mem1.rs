use std::borrow::Cow;

use mempo_text::{Carried, CarriedStep};

use super::{ContextPolicy, Past, memory, results};

/// The last completion from its memory on, and what it brought (MEM1, arXiv 2506.15841): what was written before the
/// memory is dropped with everything older.
#[derive(Debug, Clone, Copy)]
pub struct Mem1;

impl ContextPolicy for Mem1 {
    fn name(&self) -> &'static str {
        "mem1"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        let last = past.steps.last().map(|step| {
            let start = memory(step).map_or(0, |memory| memory.range.start);
            CarriedStep { completion_ids: Cow::Borrowed(&step.completion_ids[start..]), observation_ids: results(step) }
        });
        last.into_iter().collect::<Vec<_>>().into()
    }

    fn needs_memory(&self) -> bool {
        true
    }
}
