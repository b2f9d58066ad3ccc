//! The examples of a training run, in memory: ids and mask of each, five bytes a token.
//!
//! A run is refused above [`MOST_TOKENS`] tokens (5 GiB); examples are checked as they are read, so that a wrong one is
//! named before the first optimizer step.

use std::path::PathBuf;

use anyhow::anyhow;
use mempo_data::{SftExample, read_rows};
use mempo_run::{Input, ResultExt};
use mempo_train::TrainSequence;

/// Most tokens held.
pub(crate) const MOST_TOKENS: usize = 1 << 30;

/// What a model can take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModelLimits {
    /// Rows of the embedding.
    pub(crate) vocabulary_size: usize,
    /// Positions the model was made for.
    pub(crate) max_tokens: usize,
}

/// Examples by index, in the order of the directories and rows they came from.
#[derive(Debug, Default)]
pub(crate) struct Dataset {
    examples: Vec<Compact>,
    /// Each directory with the index of its first example here.
    origins: Vec<(PathBuf, usize)>,
}

#[derive(Debug)]
struct Compact {
    /// Its place in its directory.
    row: u32,
    ids: Box<[i32]>,
    targets: Box<[bool]>,
}

impl Dataset {
    /// Reads the table `sft_examples` of each input: what is to be trained on, then the examples whose split is
    /// `put_aside`.
    pub(crate) fn read(inputs: &[Input], limits: ModelLimits, put_aside: Option<&str>) -> anyhow::Result<(Self, Self)> {
        let (mut trained, mut aside, mut tokens) = (Self::default(), Self::default(), 0);
        for input in inputs {
            trained.origins.push((input.dir().to_path_buf(), trained.examples.len()));
            for (index, row) in read_rows::<SftExample>(&input.table("sft_examples")?).bad_input()?.enumerate() {
                let row = row.bad_input()?;
                check(&row, limits)
                    .map_err(|problem| anyhow!("{}: example `{}`: {problem}", input.dir().display(), row.example_id))
                    .bad_input()?;
                tokens += row.input_ids.len();
                if tokens > MOST_TOKENS {
                    return Err(anyhow!("the examples hold more than {MOST_TOKENS} tokens; train on fewer at a time"))
                        .usage();
                }
                let is_aside = put_aside.is_some() && row.split.as_deref() == put_aside;
                let dataset = if is_aside { &mut aside } else { &mut trained };
                let (ids, targets) = (row.input_ids.into(), row.loss_mask.into());
                dataset.examples.push(Compact { row: index as u32, ids, targets });
            }
        }
        if trained.examples.is_empty() {
            let split = put_aside.filter(|_| !aside.examples.is_empty());
            let all = split.map_or_else(String::new, |split| format!(" but those put aside, of split `{split}`"));
            return Err(anyhow!("no examples in the given directories{all}")).bad_input();
        }
        Ok((trained, aside))
    }

    /// Tokens of each example.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.examples.iter().map(|example| example.ids.len()).collect()
    }

    /// The examples of the given indices, for the trainer.
    pub(crate) fn sequences(&self, indices: &[u32]) -> Vec<TrainSequence> {
        let sequence = |index: &u32| {
            let example = &self.examples[*index as usize];
            TrainSequence { ids: example.ids.to_vec(), targets: example.targets.to_vec() }
        };
        indices.iter().map(sequence).collect()
    }

    /// Every example, for the trainer.
    pub(crate) fn all_sequences(&self) -> Vec<TrainSequence> {
        self.sequences(&(0..self.examples.len() as u32).collect::<Vec<_>>())
    }

    /// Where an example came from, in words `mempo-sft show` takes.
    pub(crate) fn describe(&self, index: u32) -> String {
        let index = index as usize;
        let origin = self.origins.iter().rfind(|(_, first)| *first <= index);
        origin.map_or_else(String::new, |(dir, _)| format!("{} --row {}", dir.display(), self.examples[index].row))
    }
}

fn check(row: &SftExample, limits: ModelLimits) -> Result<(), String> {
    let (ids, mask) = (&row.input_ids, &row.loss_mask);
    if ids.len() != mask.len() {
        return Err(format!("{} loss_mask entries, expected {}, one an id", mask.len(), ids.len()));
    }
    if !mask.iter().skip(1).any(|target| *target) {
        return Err("no target: expected at least one loss_mask entry after the first to be true".to_owned());
    }
    if mask[0] {
        return Err("the first token is a target, but nothing precedes it".to_owned());
    }
    if ids.len() > limits.max_tokens {
        return Err(format!("{} tokens, expected at most {}, the model's positions", ids.len(), limits.max_tokens));
    }
    match ids.iter().find(|id| !(0..limits.vocabulary_size as i32).contains(id)) {
        None => Ok(()),
        Some(id) => Err(format!("id {id}, expected 0..{}: built with another tokenizer", limits.vocabulary_size)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_examples_are_named_before_training() {
        let limits = ModelLimits { vocabulary_size: 10, max_tokens: 4 };
        let example = |ids: &[i32], mask: &[bool]| SftExample {
            example_id: "e".into(),
            trajectory_id: "t".into(),
            task_id: None,
            split: None,
            step_index: 0,
            input_ids: ids.to_vec(),
            loss_mask: mask.to_vec(),
            target_count: 1,
        };
        assert_eq!(check(&example(&[1, 9, 0], &[false, false, true]), limits), Ok(()));
        let refused = |ids: &[i32], mask: &[bool], expected: &str| {
            let problem = check(&example(ids, mask), limits).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        };
        refused(&[1, 2], &[true], "1 loss_mask entries, expected 2");
        refused(&[1, 2], &[false, false], "no target");
        refused(&[], &[], "no target");
        refused(&[1, 2], &[true, true], "the first token is a target");
        refused(&[1, 2, 3, 4, 5], &[false, true, true, true, true], "5 tokens, expected at most 4");
        refused(&[1, 10], &[false, true], "id 10, expected 0..10");
        refused(&[1, -1], &[false, true], "id -1");
    }
}
