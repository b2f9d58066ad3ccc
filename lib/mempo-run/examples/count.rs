//! A whole program in one stage: it writes numbers as documents, one unit a part, as slowly as it is told to.
//!
//! The tests of this crate start, stop and kill it.

use std::{process::ExitCode, thread::sleep, time::Duration};

use clap::{CommandFactory, Parser, Subcommand};
use mempo_data::{Document, write_rows};
use mempo_run::{CommonArgs, ShardedStageArgs, Stage, StandardCommand};
use serde::Serialize;

/// Counts
#[derive(Parser)]
#[command(name = "count")]
struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write numbers
    Numbers(Numbers),
    #[command(flatten)]
    Standard(StandardCommand),
}

#[derive(clap::Args, Serialize)]
struct Numbers {
    /// Units of work
    #[arg(long, default_value_t = 5)]
    units: usize,
    /// Time each takes
    #[arg(long, default_value_t = 0)]
    #[serde(skip)]
    milliseconds_per_unit: u64,
    /// Go wrong badly
    #[arg(long)]
    #[serde(skip)]
    panic: bool,
    #[command(flatten)]
    #[serde(skip)]
    stage: ShardedStageArgs,
}

fn main() -> ExitCode {
    mempo_run::main(run)
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    arguments.common.init();
    match arguments.command {
        Command::Numbers(arguments) => numbers(&arguments),
        Command::Standard(command) => command.run(Arguments::command()),
    }
}

fn numbers(arguments: &Numbers) -> anyhow::Result<()> {
    assert!(!arguments.panic, "asked to go wrong");
    let Some(stage) = Stage::open("count", "numbers", &arguments.stage.stage(), arguments, &[])? else {
        return Ok(());
    };
    let units = stage.shard_range(arguments.units);
    let count = units.len() as u64;
    let progress = stage.progress("counting", count, "units");
    for unit in units {
        stage.check_interrupt()?;
        if stage.has_part("corpus", unit) {
            progress.skip(1);
            continue;
        }
        sleep(Duration::from_millis(arguments.milliseconds_per_unit));
        let text = stage.seed(&["numbers", &unit.to_string()]).to_string();
        let row = Document { doc_id: format!("{unit:05}"), title: unit.to_string(), text };
        stage.write_part("corpus", unit, |sink| Ok(write_rows(&[row], sink).map(drop)?))?;
        stage.timing(&serde_json::json!({ "unit": unit }));
        progress.inc(1);
    }
    drop(progress);
    stage.finish(&[("corpus", count)], serde_json::json!({ "units": count }))
}
