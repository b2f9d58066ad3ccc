//! What can go wrong in training.

use std::path::PathBuf;

/// An error of this crate. Messages name the file or the position of the offending sequence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option has a value that makes no sense.
    #[error("--{option} is {value}: {expected}")]
    Option {
        /// Name of the flag, without dashes.
        option: &'static str,
        /// What was given.
        value: f64,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A sequence to train on is malformed.
    #[error("sequence {sequence}: {problem}")]
    Sequence {
        /// Position in the optimizer step.
        sequence: usize,
        /// What was found and what was expected.
        problem: String,
    },
    /// A step of a trajectory is malformed.
    #[error("trajectory {trajectory}, step {step}: {problem}")]
    Step {
        /// Position of the trajectory in the optimizer step.
        trajectory: usize,
        /// Position of the step in the trajectory.
        step: usize,
        /// What was found and what was expected.
        problem: String,
    },
    /// The gradient was not finite several optimizer steps in a row.
    #[error(
        "the gradient was NaN or infinite {consecutive} optimizer steps in a row (up to step {global_step}): \
         lower --learning-rate, or train with --dtype f32"
    )]
    NonFinite {
        /// Steps in a row.
        consecutive: u64,
        /// The last of them.
        global_step: u64,
    },
    /// The weights are not finite: nothing was saved.
    #[error(
        "the weights are NaN or infinite after optimizer step {global_step}, nothing was saved: lower --learning-rate, or \
         train with --dtype f32"
    )]
    Weights {
        /// The last optimizer step.
        global_step: u64,
    },
    /// Adapters were asked for that the model has no place for.
    #[error("--lora-targets: the model's layers have no linear layer `{target}`; q_proj and down_proj are two of them")]
    Adapters {
        /// What was given.
        target: String,
    },
    /// A file of the trainer state cannot be used.
    #[error("{}: {problem}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What was found, what was expected, what to do.
        problem: String,
    },
    /// Reading or writing failed; the source names the path.
    #[error("training state")]
    Io(#[from] std::io::Error),
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// Memory did not suffice for a micro-batch of one sequence.
    #[error(
        "out of memory with a micro-batch of one sequence: use --recompute, --optimizer-dtype bf16, or shorter \
         sequences ({0})"
    )]
    Memory(String),
    /// The model could not be saved.
    #[error(transparent)]
    Model(#[from] mempo_model::Error),
}

impl Error {
    /// Whether numbers that are none came up: the model went wrong, not the program.
    pub fn is_not_finite(&self) -> bool {
        matches!(self, Self::NonFinite { .. } | Self::Weights { .. })
    }
}
