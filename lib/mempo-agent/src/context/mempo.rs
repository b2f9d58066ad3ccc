use std::borrow::Cow;

use clap::ValueEnum;
use mempo_data::Step;
use mempo_text::{Carried, CarriedStep, PromptBuilder};
use serde::Serialize;

use super::{ContextPolicy, Past, memory, results, whole};

/// What is carried of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carry {
    /// The step as it was: memory, thought, call and results.
    #[default]
    Step,
    /// Its memory and its results.
    MemoryAndResults,
    /// Its memory alone: results are never seen by the step after them.
    Memory,
}

/// The last steps only: everything older is reachable through their memory alone (MemPO, arXiv 2603.00680, carries one).
#[derive(Debug, Clone, Copy)]
pub struct Mempo {
    /// What is carried of a step.
    pub carry: Carry,
    /// How many steps are carried.
    pub steps: usize,
    /// Most tokens between the tags of a carried memory; a longer one is cut and marked.
    pub max_memory_tokens: Option<usize>,
}

impl Default for Mempo {
    fn default() -> Self {
        Self { carry: Carry::Step, steps: 1, max_memory_tokens: None }
    }
}

impl Mempo {
    fn carry<'a>(&self, step: &'a Step, builder: &PromptBuilder) -> Option<CarriedStep<'a>> {
        let Some(mut memory) = memory(step) else {
            return (self.carry != Carry::Memory).then(|| match self.carry {
                Carry::Step => whole(step),
                _ => CarriedStep { completion_ids: Cow::Borrowed(&[]), observation_ids: results(step) },
            });
        };
        let mut ids = Cow::Borrowed(step.completion_ids.as_slice());
        let cut = self.max_memory_tokens.and_then(|most| builder.cap_memory(&ids, &memory, most));
        if let Some((shorter, place)) = cut {
            (ids, memory) = (Cow::Owned(shorter), place);
        }
        if self.carry != Carry::Step {
            ids = Cow::Owned(builder.memory_ids(&ids, &memory));
        }
        let observation_ids = if self.carry == Carry::Memory { None } else { results(step) };
        Some(CarriedStep { completion_ids: ids, observation_ids })
    }
}

impl ContextPolicy for Mempo {
    fn name(&self) -> &'static str {
        "mempo"
    }

    fn carried<'a>(&self, past: &Past<'a>) -> Carried<'a> {
        let last = &past.steps[past.steps.len().saturating_sub(self.steps)..];
        last.iter().filter_map(|step| self.carry(step, past.builder)).collect::<Vec<_>>().into()
    }

    fn needs_memory(&self) -> bool {
        true
    }
}
