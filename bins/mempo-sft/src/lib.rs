//! `mempo-sft`: recorded trajectories -> supervised examples -> checkpoint.
//!
//! One file a subcommand. [`build`] turns demonstrations, our own rollouts, prompt and completion pairs or plain text
//! into the table `sft_examples`; [`show`] prints one of them coloured by its loss mask; [`init`] makes a fresh model
//! directory; [`train`] fits a model to the examples. Beside them: [`record`] reads rows (`chat` messages, a `transcript` with tags, those of `mem1`), [`encode`]
//! turns text into ids and masks, an [`example`] each (after the [`self_test`] of a template), [`filter`] says which rows stay (by [`gold`] answers,
//! a [`condition`] in SQL, as no [`duplicates`], also [`near`] ones), [`source`] finds and reads rows, [`counts`] keeps the
//! books, [`kin`] says which rows are put aside together, [`schedule`] orders the examples.

mod build;
mod chat;
mod condition;
mod counts;
mod dataset;
mod duplicates;
mod encode;
mod example;
mod filter;
mod gold;
mod init;
mod kin;
mod mem1;
mod near;
pub mod record;
mod schedule;
mod self_test;
mod show;
mod source;
mod train;
mod transcript;

use clap::{CommandFactory, Parser, Subcommand};
use mempo_doctor::DoctorArguments;
use mempo_run::{CommonArgs, StandardCommand};

/// Supervised fine-tuning: build examples from trajectories, look at them, make a fresh model, train.
///
/// A run from nothing:
///
///   mempo-sft build --trajectories expert.jsonl --tokenizer MODEL --out examples
///   mempo-sft show examples --tokenizer MODEL --row 0
///   mempo-sft train --examples examples --model MODEL --out checkpoint
///
/// Every subcommand can be stopped and started again with the same words; it continues where it was.
#[derive(Parser)]
#[command(name = "mempo-sft", version, about, long_about, verbatim_doc_comment)]
pub struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value a process")]
enum Command {
    Build(build::BuildArguments),
    Show(show::ShowArguments),
    Init(init::InitArguments),
    Train(train::TrainArguments),
    Doctor(DoctorArguments),
    #[command(flatten)]
    Standard(StandardCommand),
}

/// Does what the command line asks.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    arguments.common.init();
    match arguments.command {
        Command::Build(arguments) => build::run(&arguments),
        Command::Show(arguments) => show::run(&arguments),
        Command::Init(arguments) => init::run(&arguments),
        Command::Train(arguments) => train::run(&arguments),
        Command::Doctor(arguments) => arguments.run(),
        Command::Standard(command) => command.run(Arguments::command()),
    }
}
