//! Figures of a policy: what is measured of a trajectory, and its sums by task.
//!
//! Names carry a version: a figure that is computed otherwise gets another name. A trajectory that something other than
//! the policy broke says nothing about the policy: it counts in `errors.v1` alone.

use std::collections::BTreeSet;

use clap::ValueEnum;
use mempo_data::Trajectory;
use serde::Serialize;

use crate::facts::Facts;

/// One figure.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    /// A share, shown in percent; else a number.
    pub(crate) share: bool,
    value: fn(&Trajectory) -> f64,
}

/// All figures, in the order in which they are shown.
pub(crate) const METRICS: [Metric; 10] = [
    share("f1_squad.v1", |row| mean(&row.f1)),
    share("em.v1", |row| mean(&row.exact_match)),
    share("em_all.v1", |row| number(mean(&row.exact_match) >= 1.0)),
    share("format_valid.v1", |row| number(row.format_valid)),
    count("tokens_total.v1", |row| f64::from(row.processed_tokens)),
    count("tokens_generated.v1", |row| f64::from(row.generated_tokens)),
    count("tokens_unique.v1", |row| f64::from(row.unique_tokens)),
    count("tokens_peak.v1", |row| f64::from(row.peak_tokens)),
    count("tool_calls.v1", |row| f64::from(row.tool_calls)),
    share(ERRORS, |row| number(!row.status.is_policy())),
];
const ERRORS: &str = "errors.v1";

const fn share(name: &'static str, value: fn(&Trajectory) -> f64) -> Metric {
    Metric { name, share: true, value }
}

const fn count(name: &'static str, value: fn(&Trajectory) -> f64) -> Metric {
    Metric { name, share: false, value }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len().max(1) as f64
}

fn number(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

/// What trajectories are grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    /// Number of objectives.
    Objectives,
    /// Dataset the task comes from.
    Source,
}

/// The tasks that share these; all tasks if it names nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
pub(crate) struct Group {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) objectives: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
}

/// Sums and counts of every metric over one task's trajectories in one run.
#[derive(Debug, Clone)]
pub(crate) struct TaskFigures {
    pub(crate) task_id: String,
    /// The run's seed.
    pub(crate) seed: u64,
    pub(crate) group: Group,
    pub(crate) cluster: String,
    pub(crate) trajectories: u64,
    /// Sum and count of each metric, in the order of [`METRICS`].
    pub(crate) columns: Vec<f64>,
}

/// Sums up the trajectories of one task.
pub(crate) fn task_figures(rows: &[Trajectory], by: &[By], facts: Option<&Facts>) -> TaskFigures {
    let task_id = &rows[0].task_id;
    let fact = facts.and_then(|facts| facts.of(task_id));
    let objectives = rows.iter().map(|row| row.exact_match.len()).max();
    let mut columns = vec![0.0; 2 * METRICS.len()];
    for row in rows {
        for (metric, columns) in METRICS.iter().zip(columns.chunks_mut(2)) {
            if row.status.is_policy() || metric.name == ERRORS {
                columns[0] += (metric.value)(row);
                columns[1] += 1.0;
            }
        }
    }
    TaskFigures {
        task_id: task_id.clone(),
        seed: rows[0].seed,
        group: Group {
            objectives: objectives.filter(|_| by.contains(&By::Objectives)),
            source: fact.map(|fact| fact.source.clone()).filter(|_| by.contains(&By::Source)),
        },
        cluster: fact.map_or(task_id, |fact| &fact.cluster).clone(),
        trajectories: rows.len() as u64,
        columns,
    }
}

/// The groups of several runs: all tasks first, then the groups that tasks name.
pub(crate) fn groups_of<'a>(tasks: impl Iterator<Item = &'a TaskFigures>) -> BTreeSet<Group> {
    tasks.map(|task| task.group.clone()).chain([Group::default()]).collect()
}

impl Group {
    pub(crate) fn holds(&self, task: &TaskFigures) -> bool {
        *self == Self::default() || *self == task.group
    }

    /// The group of the same source with the fewest objectives, if that is another.
    pub(crate) fn with_fewest_objectives<'a>(&self, groups: &'a BTreeSet<Self>) -> Option<&'a Self> {
        let more = self.objectives?;
        let alike = groups.iter().filter(|group| group.source == self.source && group.objectives.is_some());
        alike.min_by_key(|group| group.objectives).filter(|group| group.objectives < Some(more))
    }
}
