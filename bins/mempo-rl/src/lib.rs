//! `mempo-rl`: rollouts and advantages -> the next checkpoint.
//!
//! Three subcommands: [`forecast`] says what an iteration will take, [`train`] does it, [`history`] looks back. Beside them: [`plan`] chooses the trajectories and orders them into optimizer
//! steps, [`inputs`] checks what is read, [`alarms`] whether the policy is still one to learn from, [`judge`] what its steps show, [`load`] joins the
//! tables of some of them into training sequences.

mod alarms;
mod forecast;
mod history;
mod inputs;
mod judge;
mod load;
mod plan;
mod train;

use clap::{CommandFactory, Parser, Subcommand};
use mempo_doctor::DoctorArguments;
use mempo_run::{CommonArgs, StandardCommand};

/// Reinforcement learning: one pass of policy updates over a rollout.
///
/// One iteration of the loop, from checkpoint 0 to checkpoint 1:
///
///   mempo-rollout sample --tasks tasks --model ckpt0 --search index --out rollouts
///   mempo-score segments --rollouts rollouts --tasks tasks --model ckpt0 --out scores
///   mempo-score advantages --rollouts rollouts --scores scores --out advantages
///   mempo-score logprobs --rollouts rollouts --model ckpt0 --reference sft --out logprobs
///   mempo-rl train --rollouts rollouts --advantages advantages --logprobs logprobs --model ckpt0 --out ckpt1
///
/// And over all iterations, with policies compared on tasks kept aside:
///
///   mempo-rl history --policies ckpt1 ckpt2 ckpt3 --dev dev1 dev2 dev3
///
/// A run that was stopped continues with the same words and ends with the same bytes.
#[derive(Debug, Parser)]
#[command(name = "mempo-rl", version, about, long_about, verbatim_doc_comment)]
pub struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value a process")]
enum Command {
    Train(train::TrainArguments),
    History(history::HistoryArguments),
    Forecast(forecast::ForecastArguments),
    Doctor(DoctorArguments),
    #[command(flatten)]
    Standard(StandardCommand),
}

/// Does what the command line asks.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    arguments.common.init();
    match arguments.command {
        Command::Train(arguments) => train::run(&arguments),
        Command::History(arguments) => history::run(&arguments),
        Command::Forecast(arguments) => forecast::run(&arguments),
        Command::Doctor(arguments) => arguments.run(),
        Command::Standard(command) => command.run(Arguments::command()),
    }
}
