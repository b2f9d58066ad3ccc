//! What tasks say of themselves: source, gold answers, and which of them are not independent.

use std::collections::{BTreeMap, HashMap};

use mempo_data::{Objective, Task, read_rows};
use mempo_run::{Input, ResultExt};
use serde_json::Value;

/// What is known of a task.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fact {
    pub(crate) source: String,
    pub(crate) objectives: Vec<Objective>,
    /// Length of the task's document: the mean over all tasks whose length is nearest to the same power of two, so that
    /// documents made to one length are one group.
    pub(crate) document_tokens: Option<u64>,
    /// First task (by name) of those that share entities, directly or through others; itself if it shares none.
    pub(crate) cluster: String,
}

/// Facts by task.
pub(crate) struct Facts(HashMap<String, Fact>);

impl Facts {
    /// Reads the tables `tasks` of finished stages.
    pub(crate) fn read(inputs: &[Input]) -> anyhow::Result<Self> {
        let mut tasks = Vec::new();
        for input in inputs {
            for task in read_rows::<Task>(&input.table("tasks")?).bad_input()? {
                let Task { task_id, source, objectives, metadata, .. } = task.bad_input()?;
                let metadata = metadata.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Value::Null);
                let document_tokens = metadata["document_tokens"].as_u64();
                tasks.push((Fact { source, objectives, document_tokens, cluster: task_id }, entities(&metadata)));
            }
        }
        Ok(Self::new(tasks))
    }

    /// Joins tasks that share entities into clusters, and their lengths into classes. `cluster` of each fact is the task's own
    /// id to begin with, `document_tokens` its own length.
    fn new(mut tasks: Vec<(Fact, Vec<String>)>) -> Self {
        tasks.sort_by(|(a, _), (b, _)| a.cluster.cmp(&b.cluster));
        tasks.dedup_by(|(a, _), (b, _)| a.cluster == b.cluster);
        let mut parents: Vec<usize> = (0..tasks.len()).collect();
        let mut first_with: HashMap<&str, usize> = HashMap::new();
        for (task, (_, entities)) in tasks.iter().enumerate() {
            for entity in entities {
                let other = *first_with.entry(entity).or_insert(task);
                let (a, b) = (root(&mut parents, task), root(&mut parents, other));
                parents[a.max(b)] = a.min(b);
            }
        }
        let clusters: Vec<String> =
            (0..tasks.len()).map(|task| tasks[root(&mut parents, task)].0.cluster.clone()).collect();
        let lengths = mean_lengths(tasks.iter().filter_map(|(fact, _)| fact.document_tokens));
        let facts = tasks.into_iter().zip(clusters).map(|((fact, _), cluster)| {
            let document_tokens = fact.document_tokens.map(|length| lengths[&length_class(length)]);
            (fact.cluster.clone(), Fact { document_tokens, cluster, ..fact })
        });
        Self(facts.collect())
    }

    /// The facts of a task, if they are known.
    pub(crate) fn of(&self, task_id: &str) -> Option<&Fact> {
        self.0.get(task_id)
    }
}

/// The list `entities` in a task's metadata; empty if there is none.
fn entities(metadata: &Value) -> Vec<String> {
    serde_json::from_value(metadata["entities"].clone()).unwrap_or_default()
}

/// The exponent of the power of two that is nearest to a length, as a ratio.
fn length_class(length: u64) -> i32 {
    (length.max(1) as f64).log2().round() as i32
}

/// The mean length of each class, in whole tokens.
fn mean_lengths(lengths: impl Iterator<Item = u64>) -> BTreeMap<i32, u64> {
    let mut sums: BTreeMap<i32, (u64, u64)> = BTreeMap::new();
    for length in lengths {
        let (sum, count) = sums.entry(length_class(length)).or_default();
        (*sum, *count) = (*sum + length, *count + 1);
    }
    sums.into_iter().map(|(class, (sum, count))| (class, (sum + count / 2) / count)).collect()
}

/// The first task of a task's cluster (union-find with path halving).
fn root(parents: &mut [usize], mut task: usize) -> usize {
    while parents[task] != task {
        parents[task] = parents[parents[task]];
        task = parents[task];
    }
    task
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_share_entities_through_others_are_one_cluster() {
        let task = |id: &str, metadata: &str| {
            let metadata = serde_json::from_str(metadata).unwrap_or(Value::Null);
            let (source, cluster) = ("s".to_owned(), id.to_owned());
            (Fact { source, objectives: vec![], document_tokens: None, cluster }, entities(&metadata))
        };
        let facts = Facts::new(vec![
            task("d", r#"{"entities": ["x", "z"]}"#),
            task("c", r#"{"entities": ["y"]}"#),
            task("b", r#"{"entities": ["w", "y"]}"#),
            task("a", r#"{"entities": ["z", "w"]}"#),
            task("e", r#"{"level": 2}"#),
            task("f", "not json"),
        ]);
        let clusters = ["a", "b", "c", "d", "e", "f"].map(|id| facts.of(id).unwrap().cluster.clone());
        assert_eq!(clusters, ["a", "a", "a", "a", "e", "f"]);
        assert!(facts.of("g").is_none());
    }

    #[test]
    fn documents_of_about_one_length_are_one_group() {
        let task = |(number, length): (usize, u64)| {
            let cluster = format!("{number:02}");
            let document_tokens = (length > 0).then_some(length);
            (Fact { source: "s".to_owned(), objectives: vec![], document_tokens, cluster }, vec![])
        };
        // RULER-HQA's lengths, two tasks each, some tokens apart; then a task without a document.
        let given = [7_000, 7_101, 14_200, 13_900, 28_000, 28_001, 448_000, 452_000];
        let facts = Facts::new(given.into_iter().enumerate().map(task).collect());
        let found: Vec<u64> =
            (0..given.len()).map(|task| facts.of(&format!("{task:02}")).unwrap().document_tokens.unwrap()).collect();
        assert_eq!(found, [7_051, 7_051, 14_050, 14_050, 28_001, 28_001, 450_000, 450_000]);
    }
}
