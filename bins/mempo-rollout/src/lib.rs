//! `mempo-rollout`: questions -> tasks, documents -> search index, tasks and checkpoint -> rollouts.
//!
//! One file a subcommand. [`compose`] joins questions into tasks of n objectives; [`index`] makes a corpus table and a
//! BM25 index; [`sample`] lets a checkpoint work on the tasks and records every step; [`show`] prints what it did, [`context`]
//! what a step saw.
//! Beside them: [`rows`] reads JSON Lines and Parquet, [`question`] understands question rows, [`local_engine`] puts a
//! model behind the agent, [`server`] one of a vLLM or SGLang server, [`retrieval`] puts a search index behind Search-R1's protocol,
//! [`vectors`] puts an encoder's beside it, [`retriever`] finds documents by words, vectors or both, [`stored`] gives states to go on from, [`tally`] keeps the books.

mod compose;
mod context;
mod corpus;
mod http;
mod http_tool;
mod index;
mod local_engine;
mod query_log;
mod question;
mod reading;
mod retrieval;
mod retriever;
mod rows;
mod sample;
mod served;
mod server;
mod show;
mod stored;
mod tally;
#[cfg(test)]
mod testing;
mod tools;
mod top_up;
mod vectors;
mod watchdog;
mod web;

use clap::{CommandFactory, Parser, Subcommand};
use mempo_doctor::DoctorArguments;
use mempo_run::{CommonArgs, StandardCommand};

/// Rollouts: compose tasks, index documents, let a checkpoint search and answer, look at what it did.
///
/// A run from nothing:
///
///   mempo-rollout compose --questions questions.jsonl --objectives 2 --out tasks
///   mempo-rollout index --corpus corpus.jsonl --out index
///   mempo-rollout sample --tasks tasks --model MODEL --search index --out rollouts
///   mempo-rollout show rollouts --where reward=1
///
/// Every subcommand can be stopped and started again with the same words; it continues where it was.
#[derive(Parser)]
#[command(name = "mempo-rollout", version, about, long_about, verbatim_doc_comment)]
pub struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value a process")]
enum Command {
    Compose(compose::ComposeArguments),
    Index(index::IndexArguments),
    Sample(sample::SampleArguments),
    Context(context::ContextArguments),
    ServeSearch(retrieval::ServeSearchArguments),
    ServedName(served::ServedNameArguments),
    Show(show::ShowArguments),
    Doctor(DoctorArguments),
    #[command(flatten)]
    Standard(StandardCommand),
}

/// Does what the command line asks.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    arguments.common.init();
    match arguments.command {
        Command::Compose(arguments) => compose::run(&arguments),
        Command::Index(arguments) => index::run(&arguments),
        Command::Sample(arguments) => sample::run(arguments),
        Command::Context(arguments) => context::run(&arguments),
        Command::ServeSearch(arguments) => retrieval::run(&arguments),
        Command::ServedName(arguments) => served::run(&arguments),
        Command::Show(arguments) => show::run(&arguments),
        Command::Doctor(arguments) => arguments.run(),
        Command::Standard(command) => command.run(Arguments::command()),
    }
}
