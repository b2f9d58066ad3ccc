//! `mempo-score evaluate`: how good policies are, with intervals, side by side and paired.

use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use clap::Args;
use mempo_run::{Input, ResultExt, print_data, print_table};

use crate::baseline::{LabelledFile, read_answers};
use crate::bootstrap::{LEVEL, RESAMPLES};
use crate::contrast::{GroupFigures, group_figures, interaction_figures, paired_figures};
use crate::cost::cost_of;
use crate::facts::Facts;
use crate::kept::{kept, read_kept};
use crate::measure::{By, Measure, groups_of};
use crate::measured::{self, Measured};
use crate::report::{Difference, Figure, Intervals, Report, Run, Table};

/// Report F1, exact match and token counts with intervals, several rollouts side by side
///
/// Figures are means over trajectories (F1 and exact match: mean over objectives first) with 95 % bootstrap intervals
/// clustered by task. Differences are paired: over the tasks that both have. Rollouts of one --name are one: other tasks, or
/// the same ones under another seed, and intervals are then over seeds too. With `--by objectives` or `document-tokens` a last
/// table says by how much each difference grows from the fewest objectives to more, from the shortest documents to longer
/// ones. Trajectories that a tool or the engine broke count in `errors.v1` alone. `sub_em.v1` (RULER-HQA's) needs --tasks.
#[derive(Debug, Args)]
pub(crate) struct EvaluateArguments {
    /// Directories of finished `mempo-rollout sample`
    #[arg(long, required_unless_present = "figures", num_args = 1.., value_name = "DIR")]
    rollouts: Vec<PathBuf>,
    /// Names for them, in the same order (default: the directories' names); those that share a name are reported as one
    #[arg(long, num_args = 1.., value_name = "LABEL")]
    name: Vec<String>,
    /// Figures that `--figures-out` wrote, as if their rollouts were here; of a name that is here too they are more of it
    #[arg(long, num_args = 1.., value_name = "FILE")]
    figures: Vec<PathBuf>,
    /// Answers from JSON lines {"task_id", "answer"} as one more column; needs --tasks
    #[arg(long, num_args = 1.., value_name = "LABEL=FILE", requires = "tasks")]
    answers: Vec<LabelledFile>,
    /// The tasks that were sampled: their sources, gold answers, and (metadata `entities`) which are not independent
    #[arg(long, num_args = 1.., value_name = "DIR")]
    tasks: Vec<PathBuf>,
    /// Also report by these; `source` and `document-tokens` (in the tasks' metadata) need --tasks
    #[arg(long, value_enum, value_delimiter = ',')]
    by: Vec<By>,
    /// Also report the best of each task's first K trajectories, as published tables do: `..._best` figures, no less than the
    /// means, and no substitute for them
    #[arg(long, value_name = "K")]
    best_of: Option<NonZeroUsize>,
    /// Print these figures alone, each as a table of runs by groups: metrics, `seconds` and `peak_memory_mib` of RAM (by groups
    /// where each rollout is of one group: one length, say)
    #[arg(long, value_name = "FIGURE", value_delimiter = ',', value_parser = Figure::of)]
    table: Vec<Figure>,
    /// What the others are compared with (default: the first)
    #[arg(long, value_name = "LABEL")]
    baseline: Option<String>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Also write the JSON to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also write the figures of each task to this file (.jsonl, .jsonl.zst), small enough to keep when rollouts go
    #[arg(long, value_name = "FILE")]
    figures_out: Option<PathBuf>,
    /// Seed of the bootstrap
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Reads trajectories, measures them by task, prints the report.
pub(crate) fn run(arguments: &EvaluateArguments) -> anyhow::Result<()> {
    let report = evaluate(arguments)?;
    let json = format!("{}\n", serde_json::to_string_pretty(&report)?);
    if let Some(path) = &arguments.out {
        write_whole(path, json.as_bytes())?;
    }
    if arguments.json {
        print_data(&json);
    } else if !arguments.table.is_empty() {
        for (place, figure) in arguments.table.iter().enumerate() {
            print_data(if place > 0 { "\n" } else { "" });
            print(report.figure_table(*figure));
        }
    } else {
        print(report.settings_table());
        print_data("\n");
        print(report.figures_table());
        for table in [report.differences_table(), report.interactions_table()] {
            if !table.1.is_empty() {
                print_data("\n");
                print(table);
            }
        }
    }
    Ok(())
}

fn print((header, rows): Table) {
    print_table(&header.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
}

fn evaluate(arguments: &EvaluateArguments) -> anyhow::Result<Report> {
    let best_of = arguments.best_of.map_or(0, NonZeroUsize::get);
    let mut measured = measure(arguments, best_of)?;
    let labels: Vec<&str> = measured.iter().map(|run| run.label.as_str()).collect();
    let baseline = arguments.baseline.as_deref().unwrap_or(labels[0]).to_owned();
    if !labels.contains(&baseline.as_str()) {
        return Err(anyhow!("--baseline {baseline} is none of {}", labels.join(", "))).usage();
    }
    measured::check(&measured, &arguments.by)?;
    if let Some(path) = &arguments.figures_out {
        write_whole(path, &kept(path, &measured, best_of)?)?;
    }
    let mut with_tasks = false;
    for run in &mut measured {
        with_tasks |= run.tasks.iter().any(|task| task.group.source.is_some());
        let groups = run.tasks.iter_mut().map(|task| &mut task.group);
        for group in groups.chain(run.costs.iter_mut().map(|run| &mut run.group)) {
            *group = group.only(&arguments.by);
        }
    }
    Ok(Report {
        best_of: Some(best_of).filter(|&count| count > 0),
        ..report(measured, &baseline, with_tasks, arguments.seed)
    })
}

/// Rollouts, figures of others that were kept, and answers from files, in this order.
fn measure(arguments: &EvaluateArguments, best_of: usize) -> anyhow::Result<Vec<Measured>> {
    let inputs = arguments.tasks.iter().map(|path| Input::stage("tasks", path)).collect::<anyhow::Result<Vec<_>>>()?;
    let facts = if inputs.is_empty() { None } else { Some(Facts::read(&inputs)?) };
    let labels = labels(arguments).usage()?;
    let measure = Measure { facts: facts.as_ref(), best_of };
    let mut measured: Vec<Measured> = Vec::new();
    for (path, label) in arguments.rollouts.iter().zip(labels) {
        measured::add(&mut measured, Measured::of_rollouts(path, label, &measure)?, path)?;
    }
    for path in &arguments.figures {
        for run in read_kept(path, best_of)? {
            measured::add(&mut measured, run, path)?;
        }
    }
    for file in &arguments.answers {
        if measured.iter().any(|run| run.label == file.label) {
            return Err(anyhow!("--answers {}: another run has this name", file.label)).usage();
        }
        let facts = facts.as_ref().expect("clap requires --tasks with --answers");
        let rows = read_answers(&file.path, facts)?;
        measured.push(Measured::of_answers(&rows, file.label.clone(), &measure));
    }
    Ok(measured)
}

/// One label a rollout; where none is given, none stands for two.
fn labels(arguments: &EvaluateArguments) -> anyhow::Result<Vec<String>> {
    let paths = &arguments.rollouts;
    if !arguments.name.is_empty() {
        if arguments.name.len() != paths.len() {
            return Err(anyhow!("{} names for {} rollouts: give as many", arguments.name.len(), paths.len()));
        }
        return Ok(arguments.name.clone());
    }
    let unique = |labels: &[String]| labels.iter().collect::<HashSet<_>>().len() == labels.len();
    let names = paths.iter().map(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    let labels = match names.collect::<Option<Vec<_>>>() {
        Some(names) if unique(&names) => names,
        _ => paths.iter().map(|path| path.display().to_string()).collect(),
    };
    if !unique(&labels) {
        return Err(anyhow!("labels must differ, found {}: give each rollout a --name", labels.join(", ")));
    }
    Ok(labels)
}

fn report(measured: Vec<Measured>, baseline: &str, with_tasks: bool, seed: u64) -> Report {
    let found = groups_of(measured.iter().flat_map(|run| &run.tasks));
    let base = measured.iter().find(|run| run.label == baseline).expect("a label was looked for");
    let grown = || found.iter().flat_map(|group| group.grown_from(&found).into_iter().map(move |minus| (group, minus)));
    let differences = measured.iter().filter(|run| run.label != baseline).map(|run| Difference {
        label: run.label.clone(),
        baseline: baseline.to_owned(),
        groups: found.iter().map(|group| paired_figures(&run.tasks, &base.tasks, group, seed)).collect(),
        interactions: grown()
            .map(|(group, minus)| interaction_figures(&run.tasks, &base.tasks, group, minus, seed))
            .collect(),
    });
    let differences = differences.collect();
    let figures = |run: &Measured, group| {
        let cost = cost_of(&run.costs, group);
        GroupFigures { cost, ..group_figures(&run.tasks, group, seed) }
    };
    let runs = measured.into_iter().map(|run| Run {
        groups: found.iter().map(|group| figures(&run, group)).collect(),
        label: run.label,
        settings: run.settings,
        policies: run.policies,
        seeds: run.tasks.iter().map(|task| task.seed).collect::<BTreeSet<_>>().into_iter().collect(),
    });
    let clusters = if with_tasks { "tasks that share entities" } else { "task" };
    let intervals = Intervals { method: "percentile bootstrap", clusters, level: LEVEL, resamples: RESAMPLES, seed };
    Report { intervals, best_of: None, runs: runs.collect(), differences }
}

/// Writes a file whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let mut name = path.file_name().with_context(|| format!("{}: not a file name", path.display())).usage()?.to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = fs_err::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    Ok(fs_err::rename(&temporary, path)?)
}

#[cfg(test)]
mod tests {
    use mempo_run::Failure;
    use serde_json::{Value, json};

    use super::Figure;
    use crate::fixture::{Chain, failure};

    #[test]
    fn rollouts_and_answers_stand_side_by_side() {
        let chain = Chain::new();
        let answers =
            chain.tasks.iter().map(|task| json!({"task_id": task.task_id, "answer": "ANY; the purple"}).to_string());
        fs_err::write(chain.path("answers.jsonl"), answers.collect::<Vec<_>>().join("\n")).unwrap();
        let found = chain.report("--rollouts @rollouts --name policy --tasks @tasks --answers majority=@answers.jsonl --by objectives,source",
        );
        let labels: Vec<&Value> = found["runs"].as_array().unwrap().iter().map(|run| &run["label"]).collect();
        assert_eq!(labels, ["policy", "majority"]);
        assert_eq!(found["runs"][0]["settings"]["context"], "mempo");
        let groups: Vec<&Value> =
            found["runs"][0]["groups"].as_array().unwrap().iter().map(|group| &group["group"]).collect();
        assert_eq!(
            groups,
            [&json!({}), &json!({"objectives": 2, "source": "even"}), &json!({"objectives": 2, "source": "odd"})]
        );

        let (policy, majority) = (&found["runs"][0]["groups"][0], &found["runs"][1]["groups"][0]);
        assert_eq!((&policy["tasks"], &policy["trajectories"]), (&json!(17), &json!(34)));
        assert_eq!(policy["clusters"], 9, "tasks 2k and 2k + 1 share an entity");
        // 17 right and 16 half right count; the broken one does not.
        let em = (17.0 + 16.0 * 0.5) / 33.0;
        assert!((policy["metrics"]["em.v1"]["value"].as_f64().unwrap() - em).abs() < 1e-12);
        assert_eq!(policy["metrics"]["errors.v1"]["value"], json!(1.0 / 34.0));
        assert_eq!(majority["metrics"]["em.v1"], json!({"value": 0.5, "low": 0.5, "high": 0.5}));
        assert_eq!(majority["metrics"]["tokens_total.v1"]["value"], 0.0);
        let difference = &found["differences"][0];
        assert_eq!((&difference["label"], &difference["baseline"]), (&json!("majority"), &json!("policy")));
        let value = difference["groups"][0]["metrics"]["em.v1"]["value"].as_f64().unwrap();
        assert!((value - (0.5 - em)).abs() < 1e-12);
        assert!(!chain.path("report.json.tmp").exists());
    }

    #[test]
    fn a_rollout_does_not_differ_from_itself_and_tables_print() {
        let chain = Chain::new();
        let found = chain.report("--rollouts @rollouts @rollouts --name a b --baseline b");
        assert_eq!(found["differences"].as_array().unwrap().len(), 1);
        assert_eq!(
            found["differences"][0]["groups"][0]["metrics"]["f1_squad.v1"],
            json!({"value": 0.0, "low": 0.0, "high": 0.0})
        );
        assert_eq!(found["differences"][0]["label"], "a");
        assert_eq!(found["runs"][0]["groups"][0]["clusters"], 17);
        chain.run("evaluate --rollouts @rollouts --by objectives").unwrap();
    }

    #[test]
    fn rollouts_of_one_name_are_one() {
        let mut chain = Chain::new();
        for row in &mut chain.trajectories {
            row.seed = 1;
        }
        chain.write_rollouts("other");
        let names = "--name a a b b --baseline b";
        let found = chain.report(&format!("--rollouts @rollouts @other @rollouts @other {names} --by objectives"));
        assert_eq!(found["runs"].as_array().unwrap().len(), 2);
        assert_eq!(found["runs"][0]["seeds"], json!([0, 1]));
        let all = &found["runs"][0]["groups"][0];
        assert_eq!((&all["seeds"], &all["tasks"], &all["trajectories"]), (&json!(2), &json!(17), &json!(68)));
        assert_eq!(found["differences"][0]["groups"][0]["metrics"]["em.v1"]["high"], 0.0);
        let error = chain.run("evaluate --rollouts @rollouts @rollouts --name a a").unwrap_err();
        assert!(
            matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("task-00` under seed 0")),
            "{error:#}"
        );
    }

    #[test]
    fn answers_are_held_to_gold_and_the_best_stand_beside_the_mean() {
        let mut chain = Chain::new();
        for row in chain.trajectories.iter_mut().filter(|row| row.trajectory_index == 0) {
            row.answer = Some("it is any colour; purple".to_owned());
        }
        chain.write();
        let metrics = |line: &str| chain.report(line)["runs"][0]["groups"][0]["metrics"].clone();
        let found = metrics("--rollouts @rollouts --tasks @tasks --best-of 2");
        // The other answers are missing; one of them is the engine's fault.
        assert!((found["sub_em.v1"]["value"].as_f64().unwrap() - 17.0 * 0.5 / 33.0).abs() < 1e-12);
        assert_eq!(found["sub_em_best.v1"]["value"], 0.5);
        assert_eq!((&found["em_best.v1"]["value"], &found["em_all_best.v1"]["value"]), (&json!(1.0), &json!(1.0)));
        // The first trajectory of every second task is right.
        let first = metrics("--rollouts @rollouts --best-of 1");
        assert_eq!(first["em_all_best.v1"]["value"], json!(9.0 / 17.0));
        assert_eq!(first["sub_em.v1"]["value"], Value::Null, "no gold answers");
        assert!(metrics("--rollouts @rollouts").get("em_best.v1").is_none());
        let error = chain.run("evaluate --rollouts @rollouts --best-of 3").unwrap_err();
        assert!(matches!(failure(&error), (Failure::Usage(..), text) if text.contains("2 trajectories")), "{error:#}");
    }

    #[test]
    fn lengths_of_documents_are_groups_and_columns() {
        let mut chain = Chain::new();
        for (number, task) in (0..).zip(&mut chain.tasks) {
            task.metadata = Some(json!({"document_tokens": 7_000 * (1 + number % 2)}).to_string());
        }
        chain.write();
        let line = "--rollouts @rollouts @rollouts --name a b --tasks @tasks --by document-tokens";
        let found = chain.report(line);
        let groups = found["runs"][0]["groups"].as_array().unwrap();
        let lengths: Vec<&Value> = groups.iter().map(|group| &group["group"]).collect();
        assert_eq!(lengths, [&json!({}), &json!({"document_tokens": 7_000}), &json!({"document_tokens": 14_000})]);
        let grown = &found["differences"][0]["interactions"];
        assert_eq!(grown.as_array().unwrap().len(), 1);
        assert_eq!((&grown[0]["group"], &grown[0]["minus"]), (lengths[2], lengths[1]));
        assert!(groups[0]["cost"]["seconds"].as_f64().is_some() && groups[1].get("cost").is_none(), "both in one run");
        chain.run(&format!("evaluate {line} --table sub_em.v1,seconds,peak_memory_mib --best-of 2")).unwrap();
        assert!(Figure::of("sub_em").unwrap_err().contains("sub_em.v1"));

        // Sampled length by length: what each took is known, and all of it.
        let all = std::mem::take(&mut chain.trajectories);
        for (place, name) in ["short", "long"].into_iter().enumerate() {
            let is_of = |task_id: &str| task_id.trim_start_matches("task-").parse::<usize>().unwrap() % 2 == place;
            chain.trajectories = all.iter().filter(|row| is_of(&row.task_id)).cloned().collect();
            chain.write_rollouts(name);
        }
        let found = chain.report("--rollouts @short @long --name a a --tasks @tasks --by document-tokens");
        let seconds = |place: usize| found["runs"][0]["groups"][place]["cost"]["seconds"].as_f64().unwrap();
        assert!((seconds(0) - seconds(1) - seconds(2)).abs() < 1e-9);
        chain.trajectories = all;

        chain.tasks[3].metadata = None;
        chain.write();
        let error = chain.run(&format!("evaluate {line}")).unwrap_err();
        assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("task-03")), "{error:#}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut chain = Chain::new();
        fs_err::write(
            chain.path("answers.jsonl"),
            "{\"task_id\": \"task-00\", \"answer\": null}\n{\"task_id\": \"nowhere\"}\n",
        )
        .unwrap();
        let usage = [
            "--rollouts @rollouts --by source",
            "--rollouts @rollouts --by document-tokens",
            "--rollouts @rollouts @rollouts",
            "--rollouts @rollouts --baseline x",
        ];
        for line in usage {
            let error = chain.run(&format!("evaluate {line}")).unwrap_err();
            assert!(matches!(failure(&error).0, Failure::Usage(..)), "{line}: {error:#}");
        }
        let error = chain.run("evaluate --rollouts @rollouts --tasks @tasks --answers m=@answers.jsonl").unwrap_err();
        assert!(
            matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("answers.jsonl:2")),
            "{error:#}"
        );
        let error = chain.run("evaluate --rollouts @tasks").unwrap_err();
        assert!(matches!(failure(&error).0, Failure::BadInput(..)), "{error:#}");
        chain.tasks.pop();
        chain.write();
        let error = chain.run("evaluate --rollouts @rollouts --tasks @tasks").unwrap_err();
        assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("task-16")), "{error:#}");
    }
}
