//! What can go wrong, with the file, tensor or sequence it went wrong with.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written; the message names it.
    #[error("model files")]
    Io(#[from] std::io::Error),
    /// A weights file could not be written.
    #[error("{}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A config that is no JSON, lacks a key, or asks for something that is not computed here.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The config file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// Weight files that are missing, damaged or badly named.
    #[error("{}: {problem}", path.display())]
    Weights {
        /// The weights, shard or index file, or the model directory.
        path: PathBuf,
        /// What was found, and what to do.
        problem: String,
    },
    /// A tensor that is missing, unexpected, or of the wrong shape or dtype.
    #[error("{}: tensor `{tensor}` {problem}", path.display())]
    Tensor {
        /// The weights, shard or index file.
        path: PathBuf,
        /// The tensor's Hugging Face name.
        tensor: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A device, dtype or thread count that cannot be had.
    #[error("{0}")]
    Device(String),
    /// A sequence that the model cannot take.
    #[error("sequence {row}: {problem}")]
    Sequence {
        /// Its place in the list that was given, from 0.
        row: usize,
        /// What was found and what was expected.
        problem: String,
    },
    /// Options that contradict each other or the model.
    #[error("{0}")]
    Options(String),
}
