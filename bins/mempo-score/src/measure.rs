//! Figures of a policy: what is measured of a trajectory, and means over trajectories with intervals by cluster.
//!
//! Names carry a version: a figure that is computed otherwise gets another name. A trajectory that something other than
//! the policy broke says nothing about the policy: it counts in `errors.v1` alone.

use std::collections::{BTreeMap, BTreeSet};

use clap::ValueEnum;
use mempo_data::Trajectory;
use serde::Serialize;

use crate::bootstrap::{Estimate, RESAMPLES, bootstrap};
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

/// Sums and counts of every metric over one task's trajectories.
#[derive(Debug, Clone)]
pub(crate) struct TaskFigures {
    pub(crate) task_id: String,
    group: Group,
    cluster: String,
    trajectories: u64,
    /// Sum and count of each metric, in the order of [`METRICS`].
    columns: Vec<f64>,
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
        group: Group {
            objectives: objectives.filter(|_| by.contains(&By::Objectives)),
            source: fact.map(|fact| fact.source.clone()).filter(|_| by.contains(&By::Source)),
        },
        cluster: fact.map_or(task_id, |fact| &fact.cluster).clone(),
        trajectories: rows.len() as u64,
        columns,
    }
}

/// The figures of a group of tasks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GroupFigures {
    pub(crate) group: Group,
    pub(crate) tasks: u64,
    pub(crate) trajectories: u64,
    pub(crate) clusters: u64,
    #[serde(serialize_with = "by_name")]
    pub(crate) metrics: Vec<Estimate>,
}

/// Writes estimates as a map from metric name.
fn by_name<S: serde::Serializer>(metrics: &[Estimate], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(METRICS.iter().map(|metric| metric.name).zip(metrics))
}

/// The groups of several runs: all tasks first, then the groups that tasks name.
pub(crate) fn groups_of<'a>(tasks: impl Iterator<Item = &'a TaskFigures>) -> BTreeSet<Group> {
    tasks.map(|task| task.group.clone()).chain([Group::default()]).collect()
}

impl Group {
    fn holds(&self, task: &TaskFigures) -> bool {
        *self == Self::default() || *self == task.group
    }
}

/// Means over the trajectories of a group's tasks.
pub(crate) fn group_figures(tasks: &[TaskFigures], group: &Group, seed: u64) -> GroupFigures {
    let members: Vec<&TaskFigures> = tasks.iter().filter(|task| group.holds(task)).collect();
    let clusters = cluster_rows(members.iter().map(|task| (task.cluster.as_str(), task.columns.clone())));
    GroupFigures {
        group: group.clone(),
        tasks: members.len() as u64,
        trajectories: members.iter().map(|task| task.trajectories).sum(),
        clusters: clusters.len() as u64,
        metrics: bootstrap(&clusters, seed, RESAMPLES, |sums| each_metric(|place| ratio(sums, 2 * place))),
    }
}

/// Differences `tasks - baseline` over the tasks that both have, each task beside itself in every resample.
pub(crate) fn paired_figures(
    tasks: &[TaskFigures],
    baseline: &[TaskFigures],
    group: &Group,
    seed: u64,
) -> GroupFigures {
    let others: BTreeMap<&str, &TaskFigures> = baseline.iter().map(|task| (task.task_id.as_str(), task)).collect();
    let members = tasks.iter().filter(|task| group.holds(task));
    let pairs: Vec<(&TaskFigures, &TaskFigures)> =
        members.filter_map(|task| Some((task, *others.get(task.task_id.as_str())?))).collect();
    let clusters = cluster_rows(pairs.iter().map(|(task, other)| {
        let columns = task.columns.chunks(2).zip(other.columns.chunks(2));
        (task.cluster.as_str(), columns.flat_map(|(task, other)| [task, other].concat()).collect())
    }));
    let difference = |sums: &[f64], place| Some(ratio(sums, 4 * place)? - ratio(sums, 4 * place + 2)?);
    GroupFigures {
        group: group.clone(),
        tasks: pairs.len() as u64,
        trajectories: pairs.iter().map(|(task, _)| task.trajectories).sum(),
        clusters: clusters.len() as u64,
        metrics: bootstrap(&clusters, seed, RESAMPLES, |sums| each_metric(|place| difference(sums, place))),
    }
}

fn each_metric(estimate: impl Fn(usize) -> Option<f64>) -> Vec<Option<f64>> {
    (0..METRICS.len()).map(estimate).collect()
}

/// The sum in column `place` over the count in the next; nothing if nothing counted.
fn ratio(sums: &[f64], place: usize) -> Option<f64> {
    let (sum, count) = (sums.get(place)?, sums.get(place + 1)?);
    (*count > 0.0).then(|| sum / count)
}

/// Columns summed by cluster, in the order of the clusters' names.
fn cluster_rows<'a>(tasks: impl Iterator<Item = (&'a str, Vec<f64>)>) -> Vec<Vec<f64>> {
    let mut clusters: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (cluster, columns) in tasks {
        let sums = clusters.entry(cluster).or_insert_with(|| vec![0.0; columns.len()]);
        sums.iter_mut().zip(columns).for_each(|(sum, value)| *sum += value);
    }
    clusters.into_values().collect()
}

#[cfg(test)]
mod tests {
    use mempo_data::Status;

    use super::*;
    use crate::fixture::trajectory;

    fn figures(rows: &[Trajectory]) -> Vec<TaskFigures> {
        rows.chunk_by(|a, b| a.task_id == b.task_id).map(|rows| task_figures(rows, &[By::Objectives], None)).collect()
    }

    fn metric(figures: &GroupFigures, name: &str) -> Option<f64> {
        figures.metrics[METRICS.iter().position(|metric| metric.name == name).unwrap()].value
    }

    #[test]
    fn means_are_over_trajectories_and_failures_around_the_policy_are_apart() {
        let mut rows = [
            trajectory("a", 0, &[1.0, 0.0]),
            trajectory("a", 1, &[1.0, 1.0]),
            trajectory("b", 0, &[0.0]),
            trajectory("c", 0, &[0.0]),
        ];
        rows[0].processed_tokens = 300;
        rows[3].status = Status::EngineError;
        rows[3].processed_tokens = 1_000_000;
        let tasks = figures(&rows);
        let all = group_figures(&tasks, &Group::default(), 0);
        assert_eq!((all.tasks, all.trajectories, all.clusters), (3, 4, 3));
        assert_eq!(metric(&all, "em.v1"), Some(0.5));
        assert_eq!(metric(&all, "em_all.v1"), Some(1.0 / 3.0));
        assert_eq!(metric(&all, "errors.v1"), Some(0.25));
        assert_eq!(metric(&all, "tokens_total.v1"), Some(500.0 / 3.0), "300, 100, 100");
        let groups: Vec<Option<usize>> = groups_of(tasks.iter()).into_iter().map(|group| group.objectives).collect();
        assert_eq!(groups, [None, Some(1), Some(2)]);
        let two = group_figures(&tasks, &Group { objectives: Some(2), source: None }, 0);
        assert_eq!((two.tasks, metric(&two, "em.v1")), (1, Some(0.75)));
    }

    #[test]
    fn pairs_are_common_tasks_and_vary_less_than_the_parts() {
        let values = |shift: f32| -> Vec<Trajectory> {
            (0..60).map(|task| trajectory(&format!("t{task:02}"), 0, &[(task % 7) as f32 / 10.0 + shift])).collect()
        };
        let (better, mut worse) = (figures(&values(0.25)), values(0.0));
        worse.truncate(50);
        let worse = figures(&worse);
        let found = paired_figures(&better, &worse, &Group::default(), 3);
        assert_eq!(found.tasks, 50);
        let em = found.metrics[1];
        assert!((em.value.unwrap() - 0.25).abs() < 1e-6);
        assert!(em.high.unwrap() - em.low.unwrap() < 1e-6, "every task gains the same");
        let alone = group_figures(&better, &Group::default(), 3).metrics[1];
        assert!(alone.high.unwrap() - alone.low.unwrap() > 0.05);
    }

    #[test]
    fn no_tasks_have_no_figures() {
        let none = group_figures(&[], &Group::default(), 0);
        assert_eq!((none.tasks, none.clusters), (0, 0));
        assert_eq!(none.metrics.len(), METRICS.len());
        assert!(none.metrics.iter().all(|estimate| estimate.value.is_none()));
    }
}
