//! Which rows are put aside together: those of one task, those of one question, and whatever rows join that name both.
//!
//! A trajectory may name its task while another asks the same without a name, so names are joined before any row is drawn. A
//! name is its hash, which is also its draw: in memory are 16 bytes for each question that stands beside a task's name.

use std::collections::HashMap;

use mempo_run::seed_of;
use rayon::prelude::*;

use crate::encode::Settings;
use crate::gold::key;
use crate::record::parse_record;
use crate::source::{Row, RowContent};

/// Names of tasks and questions, as far as they are joined.
pub(crate) struct Kin {
    share: f64,
    seed: u64,
    /// From a name to another one that it belongs to; a name that leads nowhere draws for all that lead to it.
    parents: HashMap<u64, u64>,
}

impl Kin {
    /// Of which this share is put aside; the seed decides which.
    pub(crate) fn new(share: f64, seed: u64) -> Self {
        Self { share, seed, parents: HashMap::new() }
    }

    /// Joins what rows name together. A row that cannot be read is told of when it is its turn.
    pub(crate) fn join_rows(&mut self, rows: &[Row], settings: &Settings) {
        let names: Vec<[String; 2]> = rows.par_iter().flat_map_iter(|row| joined(row, settings)).collect();
        for [one, other] in &names {
            self.join(one, other);
        }
    }

    /// Whether what has this name is put aside.
    pub(crate) fn is_aside(&self, name: &str) -> bool {
        (self.root(self.draw(name)) as f64 / 2f64.powi(64)) < self.share
    }

    fn join(&mut self, one: &str, other: &str) {
        let (one, other) = (self.root(self.draw(one)), self.root(self.draw(other)));
        // By bits that hardly count in a draw, so that joining puts neither more nor less aside.
        let (root, child) = if one.rotate_left(32) <= other.rotate_left(32) { (one, other) } else { (other, one) };
        if root != child {
            self.parents.insert(child, root);
        }
    }

    fn draw(&self, name: &str) -> u64 {
        seed_of(self.seed, &["validation", name])
    }

    fn root(&self, mut name: u64) -> u64 {
        while let Some(parent) = self.parents.get(&name) {
            name = *parent;
        }
        name
    }
}

/// Pairs of names that a row joins: its task's with its question, and with its task's question.
fn joined(row: &Row, settings: &Settings) -> Vec<[String; 2]> {
    let record = match &row.content {
        RowContent::Json(text) => parse_record(text, settings.format).ok(),
        RowContent::Rollout(..) => None,
    };
    let (task_id, asked) = match &row.content {
        RowContent::Json(_) => {
            record.as_ref().map_or((None, None), |record| (record.task_id.as_deref(), record.question()))
        }
        RowContent::Rollout(trajectory, _) => (Some(trajectory.task_id.as_str()), None),
    };
    let task = settings.tasks.find(task_id, asked).ok().flatten();
    let Some(task_id) = task_id.or(task.map(|task| task.task_id.as_str())) else { return Vec::new() };
    let questions = asked.into_iter().chain(task.map(|task| task.question.as_str()));
    questions.map(|question| [task_id.to_owned(), key(question)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_joined_is_put_aside_together_and_no_more_of_it() {
        let mut kin = Kin::new(0.25, 7);
        let alone = (0..4000).filter(|number| kin.is_aside(&format!("q{number}"))).count();
        assert!((850..1150).contains(&alone), "{alone}");
        for number in 0..4000 {
            kin.join(&format!("task {}", number % 2000), &format!("q{number}"));
            kin.join(&format!("q{number}"), &format!("task {}", number % 2000));
        }
        let aside: Vec<bool> = (0..4000).map(|number| kin.is_aside(&format!("q{number}"))).collect();
        assert!((0..2000).all(|number| aside[number] == aside[number + 2000]));
        assert!((0..2000).all(|number| aside[number] == kin.is_aside(&format!("task {number}"))));
        let joined = aside.iter().filter(|aside| **aside).count();
        assert!((800..1200).contains(&joined), "{joined}");
        assert_eq!(kin.parents.len(), 4000);
    }
}
