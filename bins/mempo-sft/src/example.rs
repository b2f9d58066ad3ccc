//! What comes of a row: sequences of ids with the mask of their targets, the books, and what filters ask.

use std::borrow::Cow;

use mempo_data::{Objective, SftExample};

use crate::condition::Facts;
use crate::counts::{Counts, count};

/// The examples of a row, with its books.
#[derive(Debug, Default)]
pub(crate) struct Encoded {
    pub(crate) examples: Vec<SftExample>,
    pub(crate) counts: Counts,
    /// What filters ask.
    pub(crate) facts: Facts,
    /// Question and completions, where they are kept.
    pub(crate) text: String,
}

impl Encoded {
    /// Leaves the row out, whatever came of it so far.
    pub(crate) fn leave_out(&mut self, reason: &str) {
        let rows = std::mem::take(&mut self.counts.rows);
        *self = Self { facts: std::mem::take(&mut self.facts), ..Self::default() };
        self.counts.rows = rows;
        count(&mut self.counts.dropped, reason, 1);
    }

    /// Whether it was left out, as [`Self::leave_out`] does, or nothing came of it.
    pub(crate) fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }
}

/// What a row's examples share.
pub(crate) struct Labels<'a> {
    pub(crate) row: u64,
    pub(crate) trajectory_id: String,
    pub(crate) task_id: Option<String>,
    pub(crate) split: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) question: Option<String>,
    pub(crate) objectives: Option<Cow<'a, [Objective]>>,
}

/// Prompt, completion and exactly one end of the turn: whichever of `end_ids` the completion ends with gives way to
/// `end_of_turn`, the one the chat template writes.
pub(crate) fn close_turn(prompt_ids: Vec<i32>, completion_ids: &[i32], end_of_turn: i32, end_ids: &[i32]) -> Vec<i32> {
    let body = match completion_ids.split_last() {
        Some((last, body)) if *last == end_of_turn || end_ids.contains(last) => body,
        _ => completion_ids,
    };
    let mut ids = prompt_ids;
    ids.extend_from_slice(body);
    ids.push(end_of_turn);
    ids
}

/// Appends the example whose targets are `ids[first_target..]`.
pub(crate) fn push(labels: &Labels<'_>, step_index: usize, ids: Vec<i32>, first_target: usize, encoded: &mut Encoded) {
    let target_count = ids.len() - first_target;
    encoded.counts.examples += 1;
    encoded.counts.tokens += ids.len() as u64;
    if let Some(split) = &labels.split {
        count(&mut encoded.counts.splits, split, 1);
    }
    encoded.examples.push(SftExample {
        example_id: format!("{:09}-{step_index:05}", labels.row),
        trajectory_id: labels.trajectory_id.clone(),
        task_id: labels.task_id.clone(),
        split: labels.split.clone(),
        step_index: step_index as i32,
        loss_mask: (0..ids.len()).map(|position| position >= first_target).collect(),
        target_count: target_count as i32,
        input_ids: ids,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The five-token case: two of the prompt, two of the completion, the end of the turn.
    #[test]
    fn targets_are_the_completion_and_one_end_of_turn() {
        let labels = Labels {
            row: 3,
            trajectory_id: "t".into(),
            task_id: None,
            split: None,
            source: None,
            question: None,
            objectives: None,
        };
        let check = |completion: &[i32], ids: &[i32], mask: &[bool]| {
            let mut encoded = Encoded::default();
            push(&labels, 1, close_turn(vec![1, 2], completion, 9, &[8]), 2, &mut encoded);
            let example = &encoded.examples[0];
            assert_eq!((&example.input_ids[..], &example.loss_mask[..]), (ids, mask), "{completion:?}");
            assert_eq!(example.target_count as usize, mask.iter().filter(|target| **target).count());
            assert_eq!(example.example_id, "000000003-00001");
        };
        let (no, yes) = (false, true);
        check(&[5, 6], &[1, 2, 5, 6, 9], &[no, no, yes, yes, yes]);
        check(&[5, 6, 9], &[1, 2, 5, 6, 9], &[no, no, yes, yes, yes]);
        check(&[5, 6, 8], &[1, 2, 5, 6, 9], &[no, no, yes, yes, yes]);
        check(&[9, 6], &[1, 2, 9, 6, 9], &[no, no, yes, yes, yes]);
        check(&[5], &[1, 2, 5, 9], &[no, no, yes, yes]);
    }
}
