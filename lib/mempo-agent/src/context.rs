//! Context policies: what a step sees of the steps before it.

use mempo_data::Step;
use mempo_text::CarriedStep;

use crate::Error;

/// Chooses what the next prompt holds beside the question.
pub trait ContextPolicy {
    /// Its name on the command line and in the manifest.
    fn name(&self) -> &str;
    /// The steps carried into the next prompt, oldest first.
    fn carried<'a>(&self, steps: &'a [Step]) -> Vec<CarriedStep<'a>>;
    /// Whether the prompt ends with `<answer>`, so that the first step, which is the only one, answers from what the
    /// policy knows.
    fn answers_at_once(&self) -> bool {
        false
    }
}

/// The last step only: everything older is reachable through its memory alone (MemPO, arXiv 2603.00680).
#[derive(Debug, Clone, Copy)]
pub struct Mempo;

/// Every step: the history grows without bound (ReAct, arXiv 2210.03629).
#[derive(Debug, Clone, Copy)]
pub struct React;

/// The question alone, and the answer at once: what the policy knows without a tool.
#[derive(Debug, Clone, Copy)]
pub struct ClosedBook;

impl ContextPolicy for Mempo {
    fn name(&self) -> &'static str {
        "mempo"
    }

    fn carried<'a>(&self, steps: &'a [Step]) -> Vec<CarriedStep<'a>> {
        steps.last().map(carry).into_iter().collect()
    }
}

impl ContextPolicy for React {
    fn name(&self) -> &'static str {
        "react"
    }

    fn carried<'a>(&self, steps: &'a [Step]) -> Vec<CarriedStep<'a>> {
        steps.iter().map(carry).collect()
    }
}

impl ContextPolicy for ClosedBook {
    fn name(&self) -> &'static str {
        "closed-book"
    }

    fn carried<'a>(&self, _: &'a [Step]) -> Vec<CarriedStep<'a>> {
        Vec::new()
    }

    fn answers_at_once(&self) -> bool {
        true
    }
}

fn carry(step: &Step) -> CarriedStep<'_> {
    CarriedStep { completion_ids: &step.completion_ids, observation_ids: step.observation_ids.as_deref() }
}

/// The context policy of that name: `mempo`, `react` or `closed-book`.
pub fn context_policy(name: &str) -> Result<Box<dyn ContextPolicy + Send + Sync>, Error> {
    match name {
        "mempo" => Ok(Box::new(Mempo)),
        "react" => Ok(Box::new(React)),
        "closed-book" => Ok(Box::new(ClosedBook)),
        _ => Err(Error::UnknownContext(name.to_owned())),
    }
}
