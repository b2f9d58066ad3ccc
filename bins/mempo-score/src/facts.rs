//! What tasks say of themselves: source, gold answers, and which of them are not independent.

use std::collections::HashMap;

use mempo_data::{Objective, Task, read_rows};
use mempo_run::{Input, ResultExt};

/// What is known of a task.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fact {
    pub(crate) source: String,
    pub(crate) objectives: Vec<Objective>,
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
                tasks.push((Fact { source, objectives, cluster: task_id }, entities(metadata.as_deref())));
            }
        }
        Ok(Self::new(tasks))
    }

    /// Joins tasks that share entities into clusters. `cluster` of each fact is the task's own id to begin with.
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
        let facts = tasks
            .into_iter()
            .zip(clusters)
            .map(|((fact, _), cluster)| (fact.cluster.clone(), Fact { cluster, ..fact }));
        Self(facts.collect())
    }

    /// The facts of a task, if they are known.
    pub(crate) fn of(&self, task_id: &str) -> Option<&Fact> {
        self.0.get(task_id)
    }
}

/// The list `entities` in a task's metadata; empty if there is none.
fn entities(metadata: Option<&str>) -> Vec<String> {
    let metadata: Option<serde_json::Value> = metadata.and_then(|text| serde_json::from_str(text).ok());
    let entities = metadata.and_then(|value| value.get("entities").cloned());
    entities.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default()
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
            let fact = Fact { source: "s".to_owned(), objectives: vec![], cluster: id.to_owned() };
            (fact, entities(Some(metadata)))
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
}
