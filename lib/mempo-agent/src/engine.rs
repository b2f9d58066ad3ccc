//! What generates: token ids in, token ids with log-probabilities out.

use mempo_data::StopReason;
use mempo_text::Message;

/// One completion asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Place of its trajectory in the unit: a trajectory has one open request at a time, and its prompts share much.
    pub trajectory: usize,
    /// Ids the model sees.
    pub prompt_ids: Vec<i32>,
    /// The same as messages, if the engine wants them.
    pub messages: Vec<Message>,
    /// Seed of this completion alone: the same request gives the same completion in any company.
    pub seed: u64,
}

/// One completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Ids the model wrote, a stop string's or end-of-turn id included.
    pub ids: Vec<i32>,
    /// Natural log-probability of each id at the sampling temperature; NaN where nobody knows it.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub stop_reason: StopReason,
}

/// What came of a request: a completion, or why the engine failed for this one alone.
pub type Generated = Result<Generation, String>;

/// What follows from completions: takes those (with their trajectories) that ended together, gives the next requests of
/// the trajectories that go on.
pub type Next<'a> = dyn FnMut(Vec<(usize, Generated)>) -> Vec<Request> + 'a;

/// Generates completions.
pub trait Engine {
    /// Completes every request, and those that follow from them, until none is left. An `Err` says in words why the engine
    /// can do no more; what was completed in this run is lost then.
    fn run(&mut self, requests: Vec<Request>, next: &mut Next<'_>) -> Result<(), String>;

    /// Whether requests are to hold their prompts as messages, too.
    fn wants_messages(&self) -> bool {
        false
    }
}
