//! `./just torture`: kills stages, lets their disk fail, damages their files, many times. What was tried stays in
//! DIR/results.jsonl, so that counts grow from run to run; the table at the end counts all of it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use mempo_run::{print_data, print_table};
use mempo_tests::chain::Stage;
use mempo_tests::torture::{
    Bench, FAULTS, Kills, can_mount, can_trace, count_calls, cut_trial, damage_trial, disk_trial, fault_trial,
    kill_trial, race_trial,
};
use serde::{Deserialize, Serialize};

/// Do harm to every stage and see that it recovers: the same command again, and the same bytes
#[derive(Debug, Parser)]
struct Arguments {
    /// Where stages run and results are kept
    dir: PathBuf,
    /// Processes killed a stage, in all runs together
    #[arg(long, default_value_t = 1000, value_name = "N")]
    kills: u64,
    /// Failing system calls a stage and kind of failure, spread over all that there are; all when not given
    #[arg(long, value_name = "N")]
    faults: Option<u64>,
    /// Sizes of disk a stage
    #[arg(long, default_value_t = 64, value_name = "N")]
    disks: u64,
    /// Files damaged a stage, one half by a bit, one by a cut; beside all cuts of one file of each kind
    #[arg(long, default_value_t = 4000, value_name = "N")]
    damages: u64,
    /// Races of two writers a stage
    #[arg(long, default_value_t = 20, value_name = "N")]
    races: u64,
    /// Only this stage, such as "rl train"
    #[arg(long)]
    stage: Option<String>,
}

/// One line of the results.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    stage: String,
    trial: String,
    /// What was done, so that it is not done again.
    point: u64,
    /// How often it was done.
    count: u64,
    /// How many of them ended the process.
    ended: u64,
    #[serde(default)]
    stop_seconds: f64,
}

struct Results {
    path: PathBuf,
    records: Vec<Record>,
}

impl Results {
    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let text = if path.exists() { fs_err::read_to_string(&path)? } else { String::new() };
        let records = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        Ok(Self { records: records.with_context(|| path.display().to_string())?, path })
    }

    fn of(&self, stage: &Stage, trial: &str) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(move |record| record.stage == stage.name && record.trial == trial)
    }

    fn has(&self, stage: &Stage, trial: &str, point: u64) -> bool {
        self.of(stage, trial).any(|record| record.point == point)
    }

    fn add(
        &mut self,
        stage: &Stage,
        trial: &str,
        point: u64,
        [count, ended]: [u64; 2],
        stop_seconds: f64,
    ) -> anyhow::Result<()> {
        let record = Record { stage: stage.name.clone(), trial: trial.to_owned(), point, count, ended, stop_seconds };
        let mut file = fs_err::OpenOptions::new().create(true).append(true).open(&self.path)?;
        writeln!(file, "{}", serde_json::to_string(&record)?)?;
        self.records.push(record);
        // A signal ends it here, between two trials.
        mempo_run::check_interrupt()
    }
}

fn main() -> ExitCode {
    mempo_run::main(|arguments| run(&arguments))
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let bench = Bench::new(&arguments.dir)?;
    let mut results = Results::open(arguments.dir.join("results.jsonl"))?;
    let wanted = |stage: &&Stage| arguments.stage.as_ref().is_none_or(|name| *name == stage.name);
    for stage in bench.stages().iter().filter(wanted) {
        let duration = bench.duration(stage)?;
        kills(&bench, stage, duration, arguments.kills, &mut results)?;
        for point in 0..arguments.races {
            if !results.has(stage, "race", point) {
                race_trial(&bench, stage, 2)?;
                results.add(stage, "race", point, [1, 0], 0.0)?;
            }
        }
        let (from, to) = (results.of(stage, "damage").map(|record| record.count).sum(), arguments.damages);
        if from < to {
            let count = damage_trial(&bench, stage, from, (to - from).div_ceil(2))?;
            results.add(stage, "damage", from, [count, 0], 0.0)?;
        }
        if !results.has(stage, "cut", 0) {
            let count = cut_trial(&bench, stage)?;
            results.add(stage, "cut", 0, [count, 0], 0.0)?;
        }
        if can_trace()? {
            faults(&bench, stage, arguments.faults, &mut results)?;
        }
        if can_mount() {
            disks(&bench, stage, arguments.disks, &mut results)?;
        }
    }
    print(&results);
    if !can_trace()? || !can_mount() {
        print_data("\nNot tried here: system calls that fail need strace, disks that are too small need unshare.\n");
    }
    Ok(())
}

fn kills(bench: &Bench, stage: &Stage, duration: Duration, wanted: u64, results: &mut Results) -> anyhow::Result<()> {
    let done = |results: &Results| results.of(stage, "kill").map(|record| record.ended).sum::<u64>();
    while done(results) < wanted {
        let seed = results.of(stage, "kill").count() as u64;
        // Chains of one to eight: the second resume has other ways to go wrong than the first.
        let Kills { killed, stopped, stop_seconds } = kill_trial(bench, stage, seed, 1 + seed % 8, duration)?;
        results.add(stage, "kill", seed, [killed + stopped, killed + stopped], stop_seconds)?;
    }
    Ok(())
}

fn faults(bench: &Bench, stage: &Stage, wanted: Option<u64>, results: &mut Results) -> anyhow::Result<()> {
    for fault in FAULTS {
        let name = format!("{} {}", fault.kind(), fault.what);
        let calls = count_calls(bench, stage, fault)?;
        let wanted = wanted.map_or(calls, |wanted| wanted.min(calls));
        for point in 0..wanted {
            let number = 1 + point * calls / wanted;
            if !results.has(stage, &name, number) {
                let code = fault_trial(bench, stage, fault, number)?;
                results.add(stage, &name, number, [1, u64::from(code != Some(0))], 0.0)?;
            }
        }
    }
    Ok(())
}

/// Sizes from next to nothing to more than the stage's files, evenly.
fn disks(bench: &Bench, stage: &Stage, wanted: u64, results: &mut Results) -> anyhow::Result<()> {
    let needed = bench.size(stage)?.div_ceil(1024) * 3;
    for point in 0..wanted {
        let kilobytes = 8 + needed * point / wanted;
        if !results.has(stage, "disk", kilobytes) {
            let code = disk_trial(bench, stage, kilobytes)?;
            results.add(stage, "disk", kilobytes, [1, u64::from(code != 0)], 0.0)?;
        }
    }
    Ok(())
}

fn print(results: &Results) {
    let mut table: BTreeMap<(&str, &str), [u64; 2]> = BTreeMap::new();
    let mut slowest: f64 = 0.0;
    for record in &results.records {
        let sums = table.entry((&record.trial, &record.stage)).or_default();
        *sums = [sums[0] + record.count, sums[1] + record.ended];
        slowest = slowest.max(record.stop_seconds);
    }
    let row = |((trial, stage), sums): (&(&str, &str), &[u64; 2])| {
        vec![(*trial).to_owned(), (*stage).to_owned(), sums[0].to_string(), sums[1].to_string()]
    };
    print_table(&["harm", "stage", "times", "ended the process"], &table.iter().map(row).collect::<Vec<_>>());
    let total: u64 = table.values().map(|sums| sums[0]).sum();
    print_data(&format!("\n{total} times harm was done, each time the same bytes came of it. "));
    print_data(&format!("From SIGTERM to the end: at most {slowest:.1} s.\n"));
}
