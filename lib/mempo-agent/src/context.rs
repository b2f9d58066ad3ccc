//! Context policies: what a step sees of the steps before it.

use mempo_data::Step;
use mempo_text::CarriedStep;

use crate::Error;

/// Chooses the steps that the next prompt repeats after the question.
pub trait ContextPolicy {
    /// Its name on the command line and in the manifest.
    fn name(&self) -> &str;
    /// The steps carried into the next prompt, oldest first.
    fn carried<'a>(&self, steps: &'a [Step]) -> Vec<CarriedStep<'a>>;
}

/// The last step only: everything older is reachable through its memory alone (MemPO, arXiv 2603.00680).
#[derive(Debug, Clone, Copy)]
pub struct Mempo;

/// Every step: the history grows without bound (ReAct, arXiv 2210.03629).
#[derive(Debug, Clone, Copy)]
pub struct React;

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

fn carry(step: &Step) -> CarriedStep<'_> {
    CarriedStep { completion_ids: &step.completion_ids, observation_ids: step.observation_ids.as_deref() }
}

/// The context policy of that name: `mempo` or `react`.
pub fn context_policy(name: &str) -> Result<Box<dyn ContextPolicy + Send + Sync>, Error> {
    match name {
        "mempo" => Ok(Box::new(Mempo)),
        "react" => Ok(Box::new(React)),
        _ => Err(Error::UnknownContext(name.to_owned())),
    }
}
