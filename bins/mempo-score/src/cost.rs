//! What sampling took: seconds and memory, of all runs of a name or of those of a group of tasks.

use mempo_run::Manifest;
use serde::{Deserialize, Serialize};

use crate::measure::{Group, TaskFigures};

/// What sampling took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// Seconds; of a run that was interrupted, those of its last process.
    pub(crate) seconds: f64,
    /// The most memory that a process had in RAM at a time.
    pub(crate) peak_memory_bytes: Option<u64>,
}

/// What one run took, and what all of its tasks share.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunCost {
    cost: Cost,
    pub(crate) group: Group,
}

impl Cost {
    /// What a stage's manifest says.
    pub(crate) fn of(manifest: &Manifest) -> Self {
        Self { seconds: manifest.wall_seconds, peak_memory_bytes: manifest.peak_memory_bytes }
    }

    /// Takes in that of another run.
    fn add(&mut self, other: &Self) {
        self.seconds += other.seconds;
        self.peak_memory_bytes = self.peak_memory_bytes.max(other.peak_memory_bytes);
    }
}

impl RunCost {
    /// Of a finished run of these tasks.
    pub(crate) fn new(cost: Cost, tasks: &[TaskFigures]) -> Self {
        let groups = tasks.iter().map(|task| task.group.clone());
        let group = groups.reduce(|all, group| all.shared(&group)).unwrap_or_default();
        Self { cost, group }
    }
}

/// What a group of tasks took, where runs can be told apart by it: each is of this group alone, or not of it at all. All runs are of
/// the group of all tasks.
pub(crate) fn cost_of(costs: &[RunCost], group: &Group) -> Option<Cost> {
    let mut sum = None::<Cost>;
    for run in costs {
        if *group == Group::default() || run.group == *group {
            sum.get_or_insert_default().add(&run.cost);
        } else if !run.group.excludes(group) {
            return None;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(objectives: Option<usize>, document_tokens: Option<u64>) -> Group {
        Group { objectives, source: None, document_tokens }
    }

    fn run(seconds: f64, peak_memory_bytes: Option<u64>, group: Group) -> RunCost {
        RunCost { cost: Cost { seconds, peak_memory_bytes }, group }
    }

    #[test]
    fn what_runs_of_one_length_took_is_known_by_length() {
        let short = of(Some(2), Some(7_000));
        let costs = [
            run(1.0, Some(10), short.clone()),
            run(2.0, Some(30), short.clone()),
            run(4.0, None, of(Some(2), Some(14_000))),
        ];
        assert_eq!(cost_of(&costs, &short), Some(Cost { seconds: 3.0, peak_memory_bytes: Some(30) }));
        assert_eq!(cost_of(&costs, &of(Some(2), Some(14_000))), Some(Cost { seconds: 4.0, peak_memory_bytes: None }));
        assert_eq!(cost_of(&costs, &of(Some(2), Some(28_000))), None, "no run");
    }

    #[test]
    fn what_a_run_of_several_lengths_took_is_not_known_by_length() {
        let (mixed, short) = (of(Some(2), None), of(Some(2), Some(7_000)));
        assert_eq!(mixed, short.shared(&of(Some(2), Some(14_000))));
        let costs = [run(1.0, None, mixed), run(2.0, None, short.clone())];
        assert_eq!(cost_of(&costs, &Group::default()), Some(Cost { seconds: 3.0, peak_memory_bytes: None }));
        assert_eq!(cost_of(&costs, &short), None);
        assert_eq!(cost_of(&costs[1..], &short), Some(Cost { seconds: 2.0, peak_memory_bytes: None }));
    }
}
