//! What generates: token ids in, token ids with log-probabilities out.

use mempo_data::StopReason;

/// One completion asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Ids the model sees.
    pub prompt_ids: Vec<i32>,
    /// Seed of this completion alone: the same request gives the same completion in any company.
    pub seed: u64,
}

/// One completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Ids the model wrote, a stop string's or end-of-turn id included.
    pub ids: Vec<i32>,
    /// Natural log-probability of each id at the sampling temperature.
    pub logprobs: Vec<f32>,
    /// Why it ended; [`StopReason::Error`] where the engine failed for this request alone.
    pub stop_reason: StopReason,
}

/// Generates completions.
pub trait Engine {
    /// Completes every request, in the order given. An `Err` says in words why none could be completed.
    fn generate(&mut self, requests: &[Request]) -> Result<Vec<Generation>, String>;
}
