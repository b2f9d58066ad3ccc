//! `mempo-rollout served-name`: what a server has to call a checkpoint.

use std::path::PathBuf;

use clap::Args;
use mempo_run::{Input, print_data};

use crate::server::served_name;

/// Print the name by which a vLLM server has to serve a checkpoint, so that it is known to be this one
#[derive(Debug, Args)]
pub(crate) struct ServedNameArguments {
    /// Checkpoint: a Hugging Face model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
}

/// Runs `served-name`.
pub(crate) fn run(arguments: &ServedNameArguments) -> anyhow::Result<()> {
    let model = Input::model("model", &arguments.model)?;
    print_data(&format!("{}\n", served_name(model.digest())));
    Ok(())
}
