//! `mempo-score`: rollouts + checkpoint -> answer probabilities, log-probabilities, advantages, evaluation.
//!
//! One file a subcommand: [`segments`] asks the model how probable the gold answer is given each memory, [`logprobs`]
//! scores what was sampled, [`advantages`] turns rewards into what the update needs, [`evaluate`] reports, [`credit`] holds
//! memory rewards to what continuations show. Beside them, pure: [`probe`] lays out what is scored, [`reward`] turns
//! scores into rows, [`normalise`] centres groups, [`spread`] divides among steps, [`measure`], [`contrast`] and [`bootstrap`] compute figures with
//! intervals of what [`measured`] gathers and [`kept`] keeps, [`report`] renders them. [`rollouts`] reads rollouts unit by unit, [`worth`] continuations of memories,
//! [`query`] is the one place that speaks SQL, [`baseline`] judges answers from a file, [`facts`] knows what tasks say of
//! themselves, and [`sums`] keeps what units add to a summary.

mod advantages;
mod baseline;
mod bootstrap;
mod contrast;
mod cost;
mod credit;
mod evaluate;
mod explain;
mod facts;
mod kept;
mod logprobs;
mod measure;
mod measured;
mod normalise;
mod probe;
mod query;
mod report;
mod reward;
mod rollouts;
mod segments;
mod spread;
mod sums;
mod worth;

#[cfg(test)]
mod fixture;

use clap::{CommandFactory, Parser, Subcommand};
use mempo_doctor::DoctorArguments;
use mempo_run::{CommonArgs, StandardCommand};

/// Score rollouts: how far each memory supports the gold answer, what the update needs, and how good a policy is.
///
/// Between a rollout and its update:
///
///   mempo-score segments   --rollouts rollouts --tasks tasks --model checkpoint --out scores
///   mempo-score logprobs   --rollouts rollouts --model checkpoint --reference sft --out logprobs
///   mempo-score advantages --rollouts rollouts --scores scores --out advantages
///
/// And to compare policies on the same tasks:
///
///   mempo-score evaluate   --rollouts before after --by objectives
///
/// Stages can be stopped and started again with the same words; they continue where they were.
#[derive(Parser)]
#[command(name = "mempo-score", version, about, long_about, verbatim_doc_comment)]
pub struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value a process")]
enum Command {
    Segments(segments::SegmentsArguments),
    Logprobs(logprobs::LogprobsArguments),
    Advantages(advantages::AdvantagesArguments),
    Evaluate(evaluate::EvaluateArguments),
    Credit(credit::CreditArguments),
    Doctor(DoctorArguments),
    #[command(flatten)]
    Standard(StandardCommand),
}

/// Does what the command line asks.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    arguments.common.init();
    match arguments.command {
        Command::Segments(arguments) => segments::run(&arguments),
        Command::Logprobs(arguments) => logprobs::run(&arguments),
        Command::Advantages(arguments) => advantages::run(&arguments),
        Command::Evaluate(arguments) => evaluate::run(&arguments),
        Command::Credit(arguments) => credit::run(&arguments),
        Command::Doctor(arguments) => arguments.run(),
        Command::Standard(command) => command.run(Arguments::command()),
    }
}
