//! Means over the trajectories of groups of tasks, differences of runs, and differences of those, with intervals.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use crate::bootstrap::{Cluster, Estimate, RESAMPLES, bootstrap};
use crate::cost::Cost;
use crate::measure::{Group, METRICS, TaskFigures};

/// The figures of a group of tasks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GroupFigures {
    pub(crate) group: Group,
    /// Of an interaction: the group whose difference is subtracted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) minus: Option<Group>,
    pub(crate) seeds: u64,
    pub(crate) tasks: u64,
    pub(crate) trajectories: u64,
    pub(crate) clusters: u64,
    #[serde(serialize_with = "by_name")]
    pub(crate) metrics: Vec<Estimate>,
    /// What sampling them took, where runs are of one group each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cost: Option<Cost>,
}

/// Writes estimates as a map from metric name, without those that were not asked for.
fn by_name<S: serde::Serializer>(metrics: &[Estimate], serializer: S) -> Result<S::Ok, S::Error> {
    let metrics = METRICS.iter().zip(metrics).filter(|(metric, estimate)| estimate.value.is_some() || !metric.best);
    serializer.collect_map(metrics.map(|(metric, estimate)| (metric.name, estimate)))
}

/// Means over the trajectories of a group's tasks.
pub(crate) fn group_figures(tasks: &[TaskFigures], group: &Group, seed: u64) -> GroupFigures {
    let seeds: Vec<u64> = seeds_of(tasks).into_iter().collect();
    let members = tasks.iter().filter(|task| group.holds(task));
    let place = |task: &TaskFigures| seeds.iter().position(|seed| *seed == task.seed).unwrap_or(0);
    let mean = Mean { sign: 1.0, tasks: members.map(|task| (place(task), task)).collect() };
    figures(&[mean], seeds.len(), group, None, seed)
}

/// Differences `tasks - baseline` over the tasks that both have, each task beside itself in every resample.
pub(crate) fn paired_figures(
    tasks: &[TaskFigures],
    baseline: &[TaskFigures],
    group: &Group,
    seed: u64,
) -> GroupFigures {
    let seeds = paired_seeds(tasks, baseline);
    figures(&difference(1.0, tasks, baseline, &seeds, group), seeds.len(), group, None, seed)
}

/// By how much `tasks - baseline` is larger in one group than in another.
pub(crate) fn interaction_figures(
    tasks: &[TaskFigures],
    baseline: &[TaskFigures],
    group: &Group,
    minus: &Group,
    seed: u64,
) -> GroupFigures {
    let seeds = paired_seeds(tasks, baseline);
    let mut means = difference(1.0, tasks, baseline, &seeds, group);
    means.extend(difference(-1.0, tasks, baseline, &seeds, minus));
    figures(&means, seeds.len(), group, Some(minus), seed)
}

/// A mean over trajectories, added or subtracted; each task with the place of its seed.
struct Mean<'a> {
    sign: f64,
    tasks: Vec<(usize, &'a TaskFigures)>,
}

fn difference<'a>(
    sign: f64,
    tasks: &'a [TaskFigures],
    baseline: &'a [TaskFigures],
    seeds: &[(u64, u64)],
    group: &Group,
) -> Vec<Mean<'a>> {
    let others: HashMap<(u64, &str), &TaskFigures> =
        baseline.iter().map(|task| ((task.seed, task.task_id.as_str()), task)).collect();
    let pairs = seeds.iter().enumerate().flat_map(|(place, (own, other))| {
        let members = tasks.iter().filter(|task| task.seed == *own && group.holds(task));
        let others = &others;
        members.filter_map(move |task| Some(((place, task), (place, *others.get(&(*other, task.task_id.as_str()))?))))
    });
    let (own, other) = pairs.unzip();
    vec![Mean { sign, tasks: own }, Mean { sign: -sign, tasks: other }]
}

fn seeds_of(tasks: &[TaskFigures]) -> BTreeSet<u64> {
    tasks.iter().map(|task| task.seed).collect()
}

/// Which seed of one stands beside which of the other: the same, or all beside one that stands alone.
fn paired_seeds(tasks: &[TaskFigures], baseline: &[TaskFigures]) -> Vec<(u64, u64)> {
    let (own, others) = (seeds_of(tasks), seeds_of(baseline));
    match (own.len(), others.len()) {
        (1, _) | (_, 1) => own.iter().flat_map(|own| others.iter().map(|other| (*own, *other))).collect(),
        _ => own.intersection(&others).map(|seed| (*seed, *seed)).collect(),
    }
}

fn figures(means: &[Mean<'_>], seeds: usize, group: &Group, minus: Option<&Group>, seed: u64) -> GroupFigures {
    let width = 2 * METRICS.len();
    let mut clusters: BTreeMap<&str, Cluster> = BTreeMap::new();
    for (place, mean) in means.iter().enumerate() {
        for (seed, task) in &mean.tasks {
            let rows = clusters.entry(&task.cluster).or_insert_with(|| vec![vec![0.0; width * means.len()]; seeds]);
            let cells = &mut rows[*seed][place * width..][..width];
            cells.iter_mut().zip(&task.columns).for_each(|(sum, value)| *sum += value);
        }
    }
    let estimate = |sums: &[f64], metric: usize| {
        let values = means.iter().zip(sums.chunks(width)).map(|(mean, sums)| {
            let (sum, count) = (sums[2 * metric], sums[2 * metric + 1]);
            (count > 0.0).then(|| mean.sign * sum / count)
        });
        values.sum::<Option<f64>>()
    };
    let clusters: Vec<Cluster> = clusters.into_values().collect();
    let members = || means[0].tasks.iter().map(|(_, task)| task);
    GroupFigures {
        group: group.clone(),
        minus: minus.cloned(),
        seeds: seeds as u64,
        tasks: members().map(|task| &task.task_id).collect::<BTreeSet<_>>().len() as u64,
        trajectories: members().map(|task| task.trajectories).sum(),
        clusters: clusters.len() as u64,
        metrics: bootstrap(&clusters, seed, RESAMPLES, |sums| {
            (0..METRICS.len()).map(|metric| if sums.is_empty() { None } else { estimate(sums, metric) }).collect()
        }),
        cost: None,
    }
}

#[cfg(test)]
mod tests {
    use mempo_data::{Status, Trajectory};

    use super::*;
    use crate::fixture::trajectory;
    use crate::measure::{Measure, groups_of, task_figures};

    fn figures(rows: &[Trajectory]) -> Vec<TaskFigures> {
        let measure = Measure { facts: None, best_of: 0 };
        rows.chunk_by(|a, b| a.task_id == b.task_id).map(|rows| task_figures(rows, &measure)).collect()
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
        let two = group_figures(&tasks, &Group { objectives: Some(2), ..Group::default() }, 0);
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

    /// Tasks of two and four objectives under three seeds; what `gain` adds depends on the seed and the objectives.
    fn seeds(gain: impl Fn(u64, usize) -> f32) -> Vec<TaskFigures> {
        let runs = (1..4).flat_map(|seed| {
            let tasks = (0..30).map(|task| (format!("t{task:02}"), if task % 2 == 0 { 2 } else { 4 }, task));
            let rows: Vec<Trajectory> = tasks
                .map(|(id, objectives, task)| {
                    let value = (task % 5) as f32 / 10.0 + gain(seed, objectives);
                    Trajectory { seed, ..trajectory(&id, 0, &vec![value; objectives]) }
                })
                .collect();
            figures(&rows)
        });
        runs.collect()
    }

    #[test]
    fn an_interaction_is_a_difference_of_differences_over_seeds() {
        let (plain, better) = (seeds(|_, _| 0.0), seeds(|seed, objectives| 0.01 * (seed * objectives as u64) as f32));
        let groups = groups_of(plain.iter());
        let four = groups.iter().find(|group| group.objectives == Some(4)).unwrap();
        let two = four.grown_from(&groups)[0];
        assert_eq!((two.objectives, two.grown_from(&groups)), (Some(2), vec![]));
        assert!(Group::default().grown_from(&groups).is_empty());
        let found = interaction_figures(&better, &plain, four, two, 1);
        assert_eq!((found.seeds, found.tasks, found.trajectories), (3, 15, 45));
        let em = found.metrics[1];
        assert!((em.value.unwrap() - 0.04).abs() < 1e-6, "0.08 - 0.04 with the mean seed: {em:?}");
        // All that varies is the seed: from three times the first to three times the last.
        assert!((em.low.unwrap() - 0.02).abs() < 1e-6 && (em.high.unwrap() - 0.06).abs() < 1e-6, "{em:?}");
    }

    #[test]
    fn seeds_stand_beside_their_own_or_all_beside_the_only_one() {
        let all = seeds(|seed, _| 0.01 * seed as f32);
        let of = |wanted: &[u64]| all.iter().filter(|task| wanted.contains(&task.seed)).cloned().collect::<Vec<_>>();
        let value = |a: &[u64], b: &[u64]| {
            let found = paired_figures(&of(a), &of(b), &Group::default(), 0);
            (found.seeds, found.metrics[1].value.map(|value| (value * 1000.0).round()))
        };
        assert_eq!(value(&[1, 2, 3], &[2, 3]), (2, Some(0.0)));
        assert_eq!(value(&[1, 2, 3], &[1]), (3, Some(10.0)));
        assert_eq!(value(&[3], &[1, 2]), (2, Some(15.0)));
        assert_eq!(value(&[3], &[1]), (1, Some(20.0)));
    }
}
