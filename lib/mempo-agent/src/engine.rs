//! What generates: token ids in, token ids with log-probabilities out.

use std::time::Duration;

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

/// Longest wait of an engine that has nothing to do before it looks around.
const TICK: Duration = Duration::from_millis(100);

/// What follows from completions, as an engine sees it.
pub trait Environment {
    /// Takes the completions (with their trajectories) that ended together, or none; gives the requests that are ready by
    /// now. It waits for nothing elsewhere.
    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<Request>;

    /// The trajectories, in order, that wait for a tool elsewhere: a request of each may follow, or its end.
    fn waiting(&self) -> Vec<usize>;

    /// Waits until a request may be ready, for a tenth of a second at most: the thread is parked, and unparked by whoever
    /// has something for it.
    fn wait(&self) {
        std::thread::park_timeout(TICK);
    }
}

/// Generates completions.
pub trait Engine {
    /// Completes every request, and those that follow from them, until none is left and no trajectory waits. While some
    /// wait, the others go on. An `Err` says in words why the engine can do no more; what was completed in this run is lost
    /// then.
    fn run(&mut self, requests: Vec<Request>, environment: &mut dyn Environment) -> Result<(), String>;

    /// Whether requests are to hold their prompts as messages, too.
    fn wants_messages(&self) -> bool {
        false
    }
}
