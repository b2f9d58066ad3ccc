//! `mempo-score credit`: how well memory rewards tell what a memory is worth.
//!
//! A memory's worth is what continuations from it achieve (`mempo-rollout sample --from`). Rewards and the advantages made
//! of them are held to it by rank correlation (Spearman, ties at their mean rank): over all memories, and with each
//! task's mean worth taken off, which is what a group's advantages can know.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use mempo_data::{Score, Trajectory, read_rows};
use mempo_run::{Input, ResultExt, print_data, print_table};
use serde::Serialize;

use crate::evaluate::write_whole;
use crate::normalise::{MemoryScope, NormaliseOptions, Rewarded, group_advantages};
use crate::report::render_estimate;
use crate::worth::{Control, State, Worth, control, worth_of_states};

/// Hold memory rewards to what continuations from the memories show
///
/// One row a table of scores and memory scope, best first: rank correlation of the memory advantage with the memory's worth
/// within tasks, of the memory reward with its worth over all, and how well the last memory's answer probability tells
/// successful trajectories from others (area under the ROC curve). With --controls also what continuations achieve from the
/// same memories emptied or swapped: what is left did not come from the memory.
#[derive(Debug, Args)]
pub(crate) struct CreditArguments {
    /// The rollout whose memories are judged
    #[arg(long, value_name = "DIR")]
    rollouts: PathBuf,
    /// Output of `mempo-rollout sample --from` that rollout
    #[arg(long, value_name = "DIR")]
    continuations: PathBuf,
    /// Outputs of `mempo-score segments` of the rollout
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    scores: Vec<PathBuf>,
    /// Outputs of `mempo-rollout sample --from` that rollout with --memory empty or swapped
    #[arg(long, num_args = 1.., value_name = "DIR")]
    controls: Vec<PathBuf>,
    /// What of a continuation counts
    #[arg(long, value_enum, default_value = "success")]
    worth: Worth,
    /// Seed of the bootstrap
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Also write the JSON to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    normalise: NormaliseOptions,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Report {
    worth: Worth,
    rewards: Vec<Found>,
    controls: Vec<Control>,
}

/// One way to pay memories.
#[derive(Debug, Serialize)]
struct Found {
    scores: String,
    scope: String,
    /// Memories with worth and reward.
    memories: usize,
    advantage_within_tasks: Option<f64>,
    reward_over_all: Option<f64>,
    last_memory_auc: Option<f64>,
}

/// Reads all tables, correlates, prints.
pub(crate) fn run(arguments: &CreditArguments) -> anyhow::Result<()> {
    let rollouts = Input::stage("rollouts", &arguments.rollouts)?;
    let continuations = |dir| {
        let continuations = Input::stage("continuations", dir)?;
        continuations.check_made_from("from", &rollouts, "mempo-rollout sample")?;
        if arguments.worth == Worth::Success && reward(&continuations) != reward(&rollouts) {
            let (dir, own, other) = (dir.display(), reward(&continuations), reward(&rollouts));
            return Err(anyhow!(
                "{dir}: its reward is {own}, that of --rollouts {other}: sample with the same --reward"
            ))
            .bad_input();
        }
        Ok::<_, anyhow::Error>(continuations)
    };
    let worth = worth_of_states(&continuations(&arguments.continuations)?, arguments.worth)?;
    let mut controls = Vec::new();
    for dir in &arguments.controls {
        controls.push(control(&worth, &continuations(dir)?, arguments.worth, arguments.seed)?);
    }
    let rows = read_rows::<Trajectory>(&rollouts.table("trajectories")?).bad_input()?;
    let trajectories = rows.collect::<mempo_data::Result<Vec<Trajectory>>>().bad_input()?;
    let mut found = Vec::new();
    for dir in &arguments.scores {
        let scores = Input::stage("scores", dir)?;
        scores.check_made_from("rollouts", &rollouts, "mempo-score segments")?;
        let rows = read_rows::<Score>(&scores.table("scores")?).bad_input()?;
        let rows = rows.collect::<mempo_data::Result<Vec<Score>>>().bad_input()?;
        for scope in [MemoryScope::PerStep, MemoryScope::Pooled, MemoryScope::PerTrajectory] {
            let options = NormaliseOptions { memory_scope: scope, ..arguments.normalise.clone() };
            found.push(judge(&label(&scores), &trajectories, &rows, &worth, &options));
        }
    }
    let order = |found: &Found| found.advantage_within_tasks.unwrap_or(f64::NEG_INFINITY);
    found.sort_by(|a, b| order(b).total_cmp(&order(a)));
    let report = Report { worth: arguments.worth, rewards: found, controls };
    let json = format!("{}\n", serde_json::to_string_pretty(&report)?);
    if let Some(path) = &arguments.out {
        write_whole(path, json.as_bytes())?;
    }
    if arguments.json {
        print_data(&json);
    } else {
        print(&report);
    }
    Ok(())
}

/// The rule that a rollout was rewarded by.
fn reward(rollout: &Input) -> String {
    let named = rollout.manifest().and_then(|manifest| manifest.arguments.get("reward")?.as_str());
    named.unwrap_or("the default").to_owned()
}

/// Bias, probe and so on, as the scores' manifest has them.
fn label(scores: &Input) -> String {
    let argument = |name: &str| {
        let value = scores.manifest().and_then(|manifest| manifest.arguments.get(name)?.as_str());
        value.unwrap_or("?").to_owned()
    };
    ["bias", "probe", "answer", "difference"].map(argument).join(" ")
}

fn judge(
    label: &str,
    trajectories: &[Trajectory],
    scores: &[Score],
    worth: &HashMap<State, f64>,
    options: &NormaliseOptions,
) -> Found {
    let (mut rewards, mut advantages, mut last) = (Vec::new(), Vec::new(), Vec::new());
    for task in trajectories.chunk_by(|a, b| a.task_id == b.task_id) {
        let first = scores.partition_point(|row| row.task_id < task[0].task_id);
        let own: Vec<&Score> = scores[first..].iter().take_while(|row| row.task_id == task[0].task_id).collect();
        let mut states = Vec::new();
        let attempts: Vec<Rewarded> = task
            .iter()
            .filter_map(|row| {
                let reward = f64::from(row.reward?);
                let steps = own.iter().filter(|score| score.trajectory_index == row.trajectory_index);
                last.extend(
                    steps.clone().next_back().and_then(|score| Some((score.answer_probability?, reward >= 1.0))),
                );
                let memories: Vec<(i32, f64)> =
                    steps.filter_map(|score| Some((score.step_index, score.memory_reward?))).collect();
                let last_memory = own.iter().rfind(|score| score.trajectory_index == row.trajectory_index);
                let last_memory = last_memory.map(|score| score.step_index);
                let state = |step: &(i32, f64)| (row.task_id.clone(), row.trajectory_index, step.0);
                states.extend(memories.iter().map(state));
                Some(Rewarded { reward, format_valid: row.format_valid, memories, last_memory })
            })
            .collect();
        let memory_rewards = attempts.iter().flat_map(|attempt| attempt.memories.iter().map(|memory| memory.1));
        let found = group_advantages(&attempts, options).memory.concat();
        let known: Vec<(f64, f64, f64)> = states
            .iter()
            .zip(memory_rewards)
            .zip(found)
            .filter_map(|((state, reward), advantage)| Some((reward, advantage, *worth.get(state)?)))
            .collect();
        let mean = known.iter().map(|(_, _, worth)| worth).sum::<f64>() / known.len().max(1) as f64;
        rewards.extend(known.iter().map(|(reward, _, worth)| (*reward, *worth)));
        advantages.extend(known.iter().map(|(_, advantage, worth)| (*advantage, worth - mean)));
    }
    Found {
        scores: label.to_owned(),
        scope: options.memory_scope.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned()),
        memories: rewards.len(),
        advantage_within_tasks: rank_correlation(&advantages),
        reward_over_all: rank_correlation(&rewards),
        last_memory_auc: area_under_curve(&last),
    }
}

/// Spearman's; none where one side does not vary.
fn rank_correlation(pairs: &[(f64, f64)]) -> Option<f64> {
    let left = ranks(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>());
    let right = ranks(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>());
    let mean = f64::midpoint(pairs.len() as f64, 1.0);
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
    let spread = (product(&left, &left) * product(&right, &right)).sqrt();
    (spread > 0.0).then(|| product(&left, &right) / spread)
}

/// From 1; equal values share their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for same in order.chunk_by(|a, b| values[*a].total_cmp(&values[*b]).is_eq()) {
        let rank = before as f64 + f64::midpoint(same.len() as f64, 1.0);
        for place in same {
            ranks[*place] = rank;
        }
        before += same.len();
    }
    ranks
}

/// Probability that a success has the higher value (Mann-Whitney); none without both kinds.
fn area_under_curve(values: &[(f64, bool)]) -> Option<f64> {
    let ranks = ranks(&values.iter().map(|value| value.0).collect::<Vec<_>>());
    let successes = values.iter().filter(|value| value.1).count() as f64;
    let failures = values.len() as f64 - successes;
    let sum: f64 = ranks.iter().zip(values).filter(|(_, value)| value.1).map(|(rank, _)| rank).sum();
    (successes > 0.0 && failures > 0.0).then(|| (sum - successes * (successes + 1.0) / 2.0) / (successes * failures))
}

fn print(report: &Report) {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let rows: Vec<Vec<String>> = report
        .rewards
        .iter()
        .map(|row| {
            vec![
                row.scores.clone(),
                row.scope.clone(),
                row.memories.to_string(),
                number(row.advantage_within_tasks),
                number(row.reward_over_all),
                number(row.last_memory_auc),
            ]
        })
        .collect();
    let header =
        ["bias probe answer difference", "scope", "memories", "advantage, in tasks", "reward, all", "last AUC"];
    print_table(&header, &rows);
    if !report.controls.is_empty() {
        print_data("\n");
        let percent = |value: f64| format!("{:.1}", 100.0 * value);
        let row = |control: &Control| {
            let left =
                [percent(control.kept), percent(control.changed), render_estimate(true, control.difference, true)];
            [control.memory.clone(), control.memories.to_string()].into_iter().chain(left).collect()
        };
        let rows: Vec<Vec<String>> = report.controls.iter().map(row).collect();
        print_table(&["memory", "memories", "worth as it is, %", "worth, %", "difference"], &rows);
    }
}

#[cfg(test)]
mod tests {
    use mempo_run::Failure;
    use serde_json::{Value, json};

    use super::*;
    use crate::fixture::{Chain, failure};

    #[test]
    fn rewards_are_held_to_worth_and_controls_to_what_was_kept() {
        let chain = Chain::new();
        chain
            .run("segments --rollouts @rollouts --tasks @tasks --model @model --device cpu --dtype f32 --out @scores")
            .unwrap();
        chain.write_continuations("kept", ["seed", "0"], |trajectory| if trajectory == 0 { 1.0 } else { 0.0 });
        chain.write_continuations("swapped", ["memory", "swapped"], |_| 0.0);
        let credit = "credit --rollouts @rollouts --continuations @kept --scores @scores --out @credit.json";
        let found = |more: &str| -> Value {
            chain.run(&format!("{credit} {more}")).unwrap();
            serde_json::from_str(&fs_err::read_to_string(chain.path("credit.json")).unwrap()).unwrap()
        };
        let report = found("--controls @swapped");
        assert_eq!(report["rewards"].as_array().unwrap().len(), 3, "a row a scope");
        let control = &report["controls"][0];
        assert_eq!((&control["memory"], &control["changed"]), (&json!("swapped"), &json!(0.0)));
        let kept = control["kept"].as_f64().unwrap();
        assert!(kept > 0.3 && kept < 0.7, "the share of memories of the first trajectories: {kept}");
        assert_eq!(control["difference"]["value"], json!(-kept));
        let control = &found("--controls @swapped --worth exact-match")["controls"][0];
        assert_eq!(control["changed"], 0.5, "the second objective is always right");
        chain.write_continuations("graded", ["reward", "f1.v1"], |_| 0.5);
        let error = chain.run(&credit.replace("@kept", "@graded")).unwrap_err();
        assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("f1.v1")), "{error:#}");
        let error = chain.run(&format!("{credit} --controls @kept")).unwrap_err();
        assert!(matches!(failure(&error), (Failure::BadInput(..), text) if text.contains("no control")), "{error:#}");
    }

    #[test]
    fn ranks_share_ties_and_correlate() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [3.5, 1.0, 3.5, 2.0]);
        let close = |found: Option<f64>, expected: f64| assert!((found.unwrap() - expected).abs() < 1e-12, "{found:?}");
        close(rank_correlation(&[(1.0, 10.0), (2.0, 100.0), (3.0, 1000.0)]), 1.0);
        close(rank_correlation(&[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]), -1.0);
        // 1 - 6 Σd² / (n (n² - 1)) with d = 1, 1, 0, 0.
        close(rank_correlation(&[(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (4.0, 4.0)]), 1.0 - 12.0 / 60.0);
        assert_eq!(rank_correlation(&[(1.0, 1.0), (1.0, 2.0)]), None);
    }

    #[test]
    fn the_area_is_the_share_of_pairs_in_order() {
        let values = [(0.9, true), (0.4, true), (0.5, false), (0.1, false), (0.4, false)];
        // Of six pairs four are in order, one is a tie.
        assert!((area_under_curve(&values).unwrap() - (4.5 / 6.0)).abs() < 1e-12);
        assert_eq!(area_under_curve(&[(0.5, true)]), None);
    }
}
