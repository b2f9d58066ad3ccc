//! What memories are worth: the mean of what continuations from each of them achieve, and what is left of it without them.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context as _, anyhow};
use clap::ValueEnum;
use mempo_data::{Trajectory, read_rows};
use mempo_run::{Input, ResultExt};
use serde::Serialize;

use crate::bootstrap::{Cluster, Estimate, RESAMPLES, bootstrap};

/// Task, trajectory, step.
pub(crate) type State = (String, i32, i32);

/// What of a continuation counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Worth {
    /// Its reward: everything right, in the right form
    Success,
    /// The share of its objectives that are right
    ExactMatch,
}

/// What is left of the worth of memories that were changed.
#[derive(Debug, Serialize)]
pub(crate) struct Control {
    /// What was done to them.
    pub(crate) memory: String,
    /// Memories continued both ways.
    pub(crate) memories: usize,
    /// Mean worth as they are, and changed.
    pub(crate) kept: f64,
    pub(crate) changed: f64,
    /// `changed - kept`, clustered by task.
    pub(crate) difference: Estimate,
}

/// Mean worth of the continuations from each state; their indices say which one they are from.
pub(crate) fn worth_of_states(continuations: &Input, worth: Worth) -> anyhow::Result<HashMap<State, f64>> {
    let dir = continuations.dir().display();
    let manifest = continuations.manifest().with_context(|| format!("{dir}: no manifest")).bad_input()?;
    let number = |name: &str| {
        let found = manifest.arguments.get(name).and_then(serde_json::Value::as_i64).filter(|number| *number > 0);
        found.with_context(|| format!("{dir}: its manifest has no {name}")).bad_input()
    };
    let (count, steps) = (number("group_size")? as i32, number("max_steps")? as i32);
    let mut sums: HashMap<State, (f64, f64)> = HashMap::new();
    for row in read_rows::<Trajectory>(&continuations.table("trajectories")?).bad_input()? {
        let row = row.bad_input()?;
        let Some(reward) = row.reward else { continue };
        let value = match worth {
            Worth::Success => f64::from(reward),
            Worth::ExactMatch => f64::from(row.exact_match.iter().sum::<f32>()) / row.exact_match.len().max(1) as f64,
        };
        let state = row.trajectory_index / count;
        let sum = sums.entry((row.task_id, state / steps, state % steps)).or_default();
        *sum = (sum.0 + value, sum.1 + 1.0);
    }
    Ok(sums.into_iter().map(|(state, (sum, count))| (state, sum / count)).collect())
}

/// Compares continuations from changed memories with those from the memories as they are.
pub(crate) fn control(
    kept: &HashMap<State, f64>,
    continuations: &Input,
    worth: Worth,
    seed: u64,
) -> anyhow::Result<Control> {
    let dir = continuations.dir().display();
    let memory = continuations.manifest().and_then(|manifest| manifest.arguments.get("memory")?.as_str());
    let memory =
        memory.with_context(|| format!("{dir}: not sampled with --memory, so it is no control")).bad_input()?;
    let changed = worth_of_states(continuations, worth)?;
    let pairs = changed.iter().filter_map(|(state, changed)| Some((&state.0, *changed, *kept.get(state)?)));
    let pairs: Vec<(&String, f64, f64)> = pairs.collect();
    if pairs.is_empty() {
        return Err(anyhow!("{dir}: continues none of the memories of --continuations")).bad_input();
    }
    let mut tasks: BTreeMap<&str, Cluster> = BTreeMap::new();
    for (task, changed, kept) in &pairs {
        let sums = &mut tasks.entry(task).or_insert_with(|| vec![vec![0.0; 3]])[0];
        sums.iter_mut().zip([changed, kept, &1.0]).for_each(|(sum, value)| *sum += value);
    }
    let tasks: Vec<Cluster> = tasks.into_values().collect();
    let difference = bootstrap(&tasks, seed, RESAMPLES, |sums| vec![Some((sums[0] - sums[1]) / sums[2])]);
    let mean = |of: fn(&(&String, f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / pairs.len() as f64;
    Ok(Control {
        memory: memory.to_owned(),
        memories: pairs.len(),
        kept: mean(|pair| pair.2),
        changed: mean(|pair| pair.1),
        difference: difference[0],
    })
}
