//! Training: optimizer, losses, micro-batches, trainer state.
//!
//! Takes token ids, masks, weights and advantages and changes a [`mempo_model::Model`]; it does not know which
//! algorithm made the advantages, and knows no text. [`Trainer`] is the way in: one call an optimizer step,
//! either [`Trainer::sft_step`] or [`Trainer::policy_step`]. Inside:
//!
//! - [`batch`](self): sequences are sorted by length and cut into micro-batches by a budget of padded tokens;
//! - `head`: log-probabilities and the gradient of any loss that depends on them, in closed form and in chunks of rows;
//! - `policy`: the clipped ratio, the KL term and their derivative per token;
//! - `adamw`: AdamW over flat buffers; `flat` lays the parameters out in them;
//! - `lora`: low-rank adapters, which take the place of the weights in all of this;
//! - `state`: the fp32 master weights and moments as files, from which training continues bit for bit.
//!
//! The denominator of the loss is computed over the whole optimizer step before it is cut, so the gradient does
//! not depend on the cut (up to the order of floating-point sums).

mod adamw;
mod backward;
mod batch;
mod budget;
mod error;
mod flat;
mod head;
mod lora;
mod memory;
mod options;
mod policy;
mod state;
mod surrogate;
mod tensors;
mod trainer;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod testing;

pub use budget::MemoryBudget;
pub use error::Error;
pub use lora::{LoraOptions, base_of, verify_merged};
pub use options::{
    Aggregation, KlEstimator, Loss, OptimizerOptions, PolicyOptions, Schedule, StateDtype, learning_rate_at,
};
pub use policy::{PolicySequence, PolicyStats, PolicyTrajectory};
pub use state::{STATE_FILE, verify_state};
pub use trainer::{Beginning, StepStats, TrainSequence, Trainer};
