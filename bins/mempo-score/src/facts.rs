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
    /// Length of the task's document: the one it was composed at; where only its own is known, the mean over all tasks with
    /// about that length.
    pub(crate) document_tokens: Option<u64>,
    /// First task (by name) of those that share entities, directly or through others; itself if it shares none.
    pub(crate) cluster: String,
}

/// What a row of `tasks` tells.
struct Told {
    fact: Fact,
    /// Whether its document was made to the length that it names, and others with it.
    is_composed: bool,
    entities: Vec<String>,
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
                let fact = Fact { source, objectives, document_tokens, cluster: task_id };
                // `compose` writes both the length it aimed at and what came of it.
                let is_composed = metadata["actual_tokens"].is_u64();
                tasks.push(Told { fact, is_composed, entities: entities(&metadata) });
            }
        }
        Ok(Self::new(tasks))
    }

    /// Joins tasks that share entities into clusters, and their lengths into classes. `cluster` of each fact is the task's own
    /// id to begin with, `document_tokens` its own length.
    fn new(mut tasks: Vec<Told>) -> Self {
        tasks.sort_by(|a, b| a.fact.cluster.cmp(&b.fact.cluster));
        tasks.dedup_by(|a, b| a.fact.cluster == b.fact.cluster);
        let mut parents: Vec<usize> = (0..tasks.len()).collect();
        let mut first_with: HashMap<&str, usize> = HashMap::new();
        for (task, told) in tasks.iter().enumerate() {
            for entity in &told.entities {
                let other = *first_with.entry(entity).or_insert(task);
                let (a, b) = (root(&mut parents, task), root(&mut parents, other));
                parents[a.max(b)] = a.min(b);
            }
        }
        let clusters: Vec<String> =
            (0..tasks.len()).map(|task| tasks[root(&mut parents, task)].fact.cluster.clone()).collect();
        let own = tasks.iter().filter(|told| !told.is_composed).filter_map(|told| told.fact.document_tokens);
        let classes = length_classes(own.collect());
        let facts = tasks.into_iter().zip(clusters).map(|(Told { fact, is_composed, .. }, cluster)| {
            let class = |length| if is_composed { length } else { classes[&length] };
            let document_tokens = fact.document_tokens.map(class);
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

/// For each length the mean of its class, in whole tokens: a class holds what is at most a quarter longer than its shortest.
fn length_classes(mut lengths: Vec<u64>) -> BTreeMap<u64, u64> {
    lengths.sort_unstable();
    let mut classes = BTreeMap::new();
    let mut rest = &lengths[..];
    while let [shortest, ..] = rest {
        let (class, longer) = rest.split_at(rest.partition_point(|length| *length <= shortest + shortest / 4));
        let (sum, count) = (class.iter().sum::<u64>(), class.len() as u64);
        classes.extend(class.iter().map(|length| (*length, (sum + count / 2) / count)));
        rest = longer;
    }
    classes
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
            let fact = Fact { source, objectives: vec![], document_tokens: None, cluster };
            Told { fact, is_composed: false, entities: entities(&metadata) }
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

    /// The classes of documents with these lengths, in their order.
    fn classes(given: &[u64], is_composed: bool) -> Vec<u64> {
        let task = |(number, length): (usize, &u64)| {
            let (source, cluster) = ("s".to_owned(), format!("{number:02}"));
            let fact = Fact { source, objectives: vec![], document_tokens: Some(*length), cluster };
            Told { fact, is_composed, entities: vec![] }
        };
        let facts = Facts::new(given.iter().enumerate().map(task).collect());
        let class = |number| facts.of(&format!("{number:02}")).unwrap().document_tokens.unwrap();
        (0..given.len()).map(class).collect()
    }

    #[test]
    fn documents_of_about_one_length_are_one_group() {
        // RULER-HQA's lengths, two tasks each, some tokens apart.
        let given = [7_000, 7_101, 14_200, 13_900, 28_000, 28_001, 448_000, 452_000];
        assert_eq!(classes(&given, false), [7_051, 7_051, 14_050, 14_050, 28_001, 28_001, 450_000, 450_000]);
        // Those of other documents lie as near each other as they like; 3,000 and 5,000 are not one group.
        assert_eq!(classes(&[600, 500, 800, 700], false), [550, 550, 750, 750]);
        assert_eq!(classes(&[3_000, 5_000], false), [3_000, 5_000]);
    }

    #[test]
    fn lengths_that_were_asked_for_are_groups_however_near_they_are() {
        let given = [640, 600, 640, 700];
        assert_eq!(classes(&given, true), given);
    }
}
