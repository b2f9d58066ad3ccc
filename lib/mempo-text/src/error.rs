//! What can go wrong while text becomes ids. What the policy writes is never an error: see [`crate::parse_completion`].

use std::path::PathBuf;

/// Failures of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written; the message names it.
    #[error("tokenizer files")]
    Io(#[from] std::io::Error),
    /// A tokenizer or configuration file is not what this crate can use.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was found, what was expected, what to do.
        message: String,
    },
    /// The chat template failed, or does not carry messages through unchanged.
    #[error("chat template of {path}: {message}")]
    Template {
        /// Where the template stands.
        path: PathBuf,
        /// What was found, what was expected, what to do.
        message: String,
    },
    /// A profile is unknown or malformed.
    #[error("profile {name}: {message}")]
    Profile {
        /// Name or folder.
        name: String,
        /// What was found, what was expected, what to do.
        message: String,
    },
    /// A tokenizer could not be trained.
    #[error("training a tokenizer: {0}")]
    Train(String),
}
