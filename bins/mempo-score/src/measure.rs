//! Figures of a policy: what is measured of a trajectory, and its sums by task.
//!
//! Names carry a version: a figure that is computed otherwise gets another name. A trajectory that something other than
//! the policy broke says nothing about the policy: it counts in `errors.v1` alone.

use std::collections::BTreeSet;

use clap::ValueEnum;
use mempo_data::Trajectory;
use mempo_text::answer::{split_answers, sub_exact_match};
use serde::{Deserialize, Serialize};

use crate::facts::{Fact, Facts};

/// One figure.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    /// A share, shown in percent; else a number.
    pub(crate) share: bool,
    /// The best of a task's first trajectories, instead of the mean over all of them.
    pub(crate) best: bool,
    /// Nothing where it takes gold answers and there are none.
    value: Value,
}

/// All figures, in the order in which they are shown.
pub(crate) const METRICS: [Metric; 15] = [
    share("f1_squad.v1", F1),
    share("em.v1", EXACT_MATCH),
    share("em_all.v1", ALL_RIGHT),
    share("sub_em.v1", sub_em),
    best("f1_squad_best.v1", F1),
    best("em_best.v1", EXACT_MATCH),
    best("em_all_best.v1", ALL_RIGHT),
    best("sub_em_best.v1", sub_em),
    share("format_valid.v1", |row, _| Some(number(row.format_valid))),
    count("tokens_total.v1", |row, _| Some(f64::from(row.processed_tokens))),
    count("tokens_generated.v1", |row, _| Some(f64::from(row.generated_tokens))),
    count("tokens_unique.v1", |row, _| Some(f64::from(row.unique_tokens))),
    count("tokens_peak.v1", |row, _| Some(f64::from(row.peak_tokens))),
    count("tool_calls.v1", |row, _| Some(f64::from(row.tool_calls))),
    share(ERRORS, |row, _| Some(number(!row.status.is_policy()))),
];
const ERRORS: &str = "errors.v1";

type Value = fn(&Trajectory, Option<&Fact>) -> Option<f64>;

const fn share(name: &'static str, value: Value) -> Metric {
    Metric { name, share: true, best: false, value }
}

const fn best(name: &'static str, value: Value) -> Metric {
    Metric { name, share: true, best: true, value }
}

const fn count(name: &'static str, value: Value) -> Metric {
    Metric { name, share: false, best: false, value }
}

const F1: Value = |row, _| Some(mean(&row.f1));
const EXACT_MATCH: Value = |row, _| Some(mean(&row.exact_match));
const ALL_RIGHT: Value = |row, _| Some(number(mean(&row.exact_match) >= 1.0));

/// Share of the objectives whose answer, by position, holds a gold answer or is part of one.
fn sub_em(row: &Trajectory, fact: Option<&Fact>) -> Option<f64> {
    let objectives = &fact?.objectives;
    let answers = row.answer.as_deref().map(split_answers).unwrap_or_default();
    let right = objectives.iter().zip(&answers).filter(|(objective, given)| sub_exact_match(given, &objective.answers));
    Some(right.count() as f64 / objectives.len().max(1) as f64)
}

impl Metric {
    /// Sum and count of what it says of a task's trajectories, whose best are among the first `best_of`.
    fn sum(&self, rows: &[Trajectory], fact: Option<&Fact>, best_of: usize) -> [f64; 2] {
        let rows = if self.best { &rows[..best_of.min(rows.len())] } else { rows };
        let counted = rows.iter().filter(|row| row.status.is_policy() || self.name == ERRORS);
        let values = counted.filter_map(|row| (self.value)(row, fact));
        values.fold(
            [0.0, 0.0],
            |[sum, count], value| {
                if self.best { [f64::max(sum, value), 1.0] } else { [sum + value, count + 1.0] }
            },
        )
    }
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
    /// Length that the task's document was composed at; where only its own is known, those within a quarter are one.
    DocumentTokens,
}

/// How trajectories are measured.
#[derive(Clone, Copy)]
pub(crate) struct Measure<'a> {
    /// What is known of the tasks.
    pub(crate) facts: Option<&'a Facts>,
    /// Among how many trajectories of a task the best is looked for; 0: nowhere.
    pub(crate) best_of: usize,
}

/// The tasks that share these; all tasks if it names nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub(crate) struct Group {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) objectives: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// Mean over the tasks of about this length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) document_tokens: Option<u64>,
}

/// Sums and counts of every metric over one task's trajectories in one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TaskFigures {
    pub(crate) task_id: String,
    /// The run's seed.
    pub(crate) seed: u64,
    /// All that tasks are told apart by; then only what is asked for.
    pub(crate) group: Group,
    pub(crate) cluster: String,
    pub(crate) trajectories: u64,
    /// Sum and count of each metric, in the order of [`METRICS`].
    pub(crate) columns: Vec<f64>,
}

/// Sums up the trajectories of one task.
pub(crate) fn task_figures(rows: &[Trajectory], measure: &Measure<'_>) -> TaskFigures {
    let Measure { facts, best_of } = *measure;
    let task_id = &rows[0].task_id;
    let fact = facts.and_then(|facts| facts.of(task_id));
    let objectives = rows.iter().map(|row| row.exact_match.len()).max();
    let columns = METRICS.iter().flat_map(|metric| metric.sum(rows, fact, best_of)).collect();
    TaskFigures {
        task_id: task_id.clone(),
        seed: rows[0].seed,
        group: Group {
            objectives,
            source: fact.map(|fact| fact.source.clone()),
            document_tokens: fact.and_then(|fact| fact.document_tokens),
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
    /// What `by` asks for, of all that is known.
    pub(crate) fn only(&self, by: &[By]) -> Self {
        Self {
            objectives: self.objectives.filter(|_| by.contains(&By::Objectives)),
            source: self.source.clone().filter(|_| by.contains(&By::Source)),
            document_tokens: self.document_tokens.filter(|_| by.contains(&By::DocumentTokens)),
        }
    }

    /// What both say; nothing where they differ.
    pub(crate) fn shared(&self, other: &Self) -> Self {
        Self {
            objectives: self.objectives.filter(|_| self.objectives == other.objectives),
            source: self.source.clone().filter(|_| self.source == other.source),
            document_tokens: self.document_tokens.filter(|_| self.document_tokens == other.document_tokens),
        }
    }

    /// Whether no task can be of both.
    pub(crate) fn excludes(&self, other: &Self) -> bool {
        fn differ<T: PartialEq>(own: Option<&T>, other: Option<&T>) -> bool {
            own.is_some() && other.is_some() && own != other
        }
        differ(self.objectives.as_ref(), other.objectives.as_ref())
            || differ(self.source.as_ref(), other.source.as_ref())
            || differ(self.document_tokens.as_ref(), other.document_tokens.as_ref())
    }

    pub(crate) fn holds(&self, task: &TaskFigures) -> bool {
        *self == Self::default() || *self == task.group
    }

    /// The groups that are alike but for having the fewest objectives, or the shortest documents, if they are others.
    pub(crate) fn grown_from<'a>(&self, groups: &'a BTreeSet<Self>) -> Vec<&'a Self> {
        // How large a group is, and what it shares with those it grows from and to.
        type Size = fn(&Group) -> (Option<u64>, Group);
        let sizes: [Size; 2] = [
            |group| (group.objectives.map(|count| count as u64), Self { objectives: None, ..group.clone() }),
            |group| (group.document_tokens, Self { document_tokens: None, ..group.clone() }),
        ];
        let least = |size: Size| {
            let (own, rest) = size(self);
            let alike = groups.iter().map(|group| (size(group), group));
            let alike = alike.filter(|((size, others), _)| size.is_some() && *others == rest);
            let ((least, _), group) = alike.min_by_key(|((size, _), _)| *size)?;
            (least < own).then_some(group)
        };
        sizes.into_iter().filter_map(least).collect()
    }
}
