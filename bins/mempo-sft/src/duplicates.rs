//! Rows like an earlier one, found before anything is written.
//!
//! All rows are encoded and filtered once, in order, whatever part of them this shard does: so what counts as a duplicate
//! depends on the rows and options alone. In memory are 16 bytes for each row kept so far, or 1.1 KB where near ones are looked
//! for; the outcome is written as `duplicates.jsonl`, and a later start reads it.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};

use anyhow::{Context, anyhow};
use mempo_data::SftExample;
use mempo_run::{ResultExt, Stage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::filter::{Duplicates, FilterOptions};
use crate::near::{NearIndex, Sketch};

const FILE: &str = "duplicates.jsonl";
/// Most rows that near duplicates are looked for among.
const MOST_NEAR: usize = 1_500_000;
/// Most rows that exact ones are looked for among.
const MOST_EXACT: usize = 30_000_000;

/// A row that is left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Duplicate {
    /// The row, counted over all inputs from 0, as in the names of examples.
    row: u64,
    /// The earlier row; null if all ids are equal, so that any will do.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<u64>,
    /// Estimated share of common five-word sequences.
    #[serde(skip_serializing_if = "Option::is_none")]
    similarity: Option<f64>,
}

/// Looks for them, row by row.
pub(crate) struct Finder {
    /// None: exact ones only.
    least: Option<f64>,
    exact: HashSet<u128>,
    near: NearIndex,
    found: Vec<Duplicate>,
}

/// What rows are compared by.
pub(crate) struct Print {
    row: u64,
    exact: u128,
    sketch: Option<Sketch>,
}

impl Finder {
    /// None where duplicates are kept.
    pub(crate) fn new(options: &FilterOptions) -> Option<Self> {
        let least = (options.drop_duplicates? == Duplicates::Near).then_some(options.near_similarity);
        Some(Self { least, exact: HashSet::new(), near: NearIndex::default(), found: Vec::new() })
    }

    /// Compares rows with those before; each with its examples and text, none of them without examples.
    pub(crate) fn compare(&mut self, rows: &[(u64, &[SftExample], &str)]) -> anyhow::Result<()> {
        let sketch = |text: &str| self.least.and_then(|_| Sketch::of(text));
        let print = |(row, examples, text): &(u64, &[SftExample], &str)| Print {
            row: *row,
            exact: digest(examples),
            sketch: sketch(text),
        };
        let prints: Vec<Print> = rows.par_iter().map(print).collect();
        for print in &prints {
            self.judge(print);
        }
        let counts = [(self.near.len(), MOST_NEAR), (self.exact.len() + self.found.len(), MOST_EXACT)];
        if let Some((_, most)) = counts.into_iter().find(|(count, most)| count > most) {
            return Err(anyhow!("more than {most} rows to look for duplicates among; give them in several builds"))
                .usage();
        }
        Ok(())
    }

    fn judge(&mut self, print: &Print) {
        if !self.exact.insert(print.exact) {
            self.found.push(Duplicate { row: print.row, of: None, similarity: None });
            return;
        }
        let (Some(least), Some(sketch)) = (self.least, &print.sketch) else { return };
        match self.near.find(sketch, least) {
            Some((of, similarity)) => {
                self.found.push(Duplicate { row: print.row, of: Some(of), similarity: Some(similarity) });
            }
            None => self.near.insert(print.row, sketch),
        }
    }

    /// Writes the outcome and gives it by row.
    pub(crate) fn finish(self, stage: &Stage) -> anyhow::Result<HashMap<u64, &'static str>> {
        stage.write_file(FILE, |sink| {
            for duplicate in &self.found {
                serde_json::to_writer(&mut *sink, duplicate)?;
                sink.write_all(b"\n")?;
            }
            Ok(())
        })?;
        Ok(by_row(&self.found))
    }
}

/// What an earlier start found.
pub(crate) fn read(stage: &Stage) -> anyhow::Result<Option<HashMap<u64, &'static str>>> {
    let path = stage.dir().join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let lines = BufReader::new(fs_err::File::open(&path)?).lines();
    let rows = lines.map(|line| Ok(serde_json::from_str::<Duplicate>(&line?)?)).collect::<anyhow::Result<Vec<_>>>();
    let rows = rows.with_context(|| format!("{}: not a list of duplicates; run with --restart", path.display()));
    Ok(Some(by_row(&rows.bad_input()?)))
}

fn by_row(found: &[Duplicate]) -> HashMap<u64, &'static str> {
    let reason =
        |duplicate: &Duplicate| if duplicate.of.is_some() { "near duplicate (rows)" } else { "exact duplicate (rows)" };
    found.iter().map(|duplicate| (duplicate.row, reason(duplicate))).collect()
}

/// Of all ids and targets of a row.
fn digest(examples: &[SftExample]) -> u128 {
    let mut digest = Sha256::new();
    for example in examples {
        digest.update((example.input_ids.len() as u64).to_le_bytes());
        example.input_ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
        let mask: Vec<u8> = example.loss_mask.iter().map(|target| u8::from(*target)).collect();
        digest.update(mask);
    }
    let bytes: [u8; 32] = digest.finalize().into();
    bytes.iter().take(16).fold(0, |number, byte| number << 8 | u128::from(*byte))
}
