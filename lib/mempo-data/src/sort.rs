//! Rows in any order into rows sorted by key, in bounded memory: an external merge sort. What does not fit is put aside in
//! sorted files, *runs*, which are then merged.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;

use crate::write::{check_order, failed};
use crate::{Key, Result, Row, TableWriter, read_rows};

/// Runs merged at a time. A run takes a batch of rows and a page of each column in memory, mostly some megabytes.
const FAN_IN: usize = 128;
/// Bytes that the allocator takes beside a row's own: a few texts and lists, each rounded up.
const ALLOCATED: usize = 64;

/// Takes rows in any order; see the module.
pub struct Sorter<R: Row> {
    folder: PathBuf,
    memory: usize,
    fan_in: usize,
    /// What waits to be sorted, and about how many bytes it takes.
    rows: Vec<R>,
    bytes: usize,
    runs: Vec<PathBuf>,
    /// Runs written so far, those of runs included: each has a name of its own.
    run_count: usize,
    row_count: u64,
}

impl<R: Row> Sorter<R> {
    /// Keeps about `memory` bytes of rows, at least one, and puts the others into files in `folder`, which must be there and is
    /// left as it is by others.
    pub fn new(folder: &Path, memory: usize) -> Self {
        let folder = folder.to_owned();
        Self { folder, memory, fan_in: FAN_IN, rows: vec![], bytes: 0, runs: vec![], run_count: 0, row_count: 0 }
    }

    /// Rows taken so far.
    pub fn row_count(&self) -> u64 {
        self.row_count
    }

    /// Takes a row. That its key was there before may show now, or when the sorted rows are read.
    pub fn push(&mut self, row: R) -> Result<()> {
        let key_bytes = size_of::<Key>() + row.key().task_id.len();
        self.bytes += size_of::<R>() + row.size() + row.key().task_id.len() + key_bytes + ALLOCATED;
        self.rows.push(row);
        self.row_count += 1;
        if self.bytes >= self.memory {
            self.bytes = 0;
            let rows = sorted(std::mem::take(&mut self.rows));
            let run = self.write_run(rows.map(Ok))?;
            self.runs.push(run);
        }
        Ok(())
    }

    /// The rows by their keys, those of equal keys (where a table has them) as they came. The files of `folder` must stay until
    /// all are read.
    pub fn finish(mut self) -> Result<Sorted<R>> {
        let last = sorted(std::mem::take(&mut self.rows));
        while self.runs.len() >= self.fan_in {
            let runs = std::mem::take(&mut self.runs);
            for group in runs.chunks(self.fan_in) {
                let merged = Sorted::new(open(group)?)?;
                let run = self.write_run(merged)?;
                self.runs.push(run);
                // They only take room now; whoever made the folder removes what cannot be removed here.
                for run in group {
                    let _ = fs_err::remove_file(run);
                }
            }
        }
        let mut sources = open(&self.runs)?;
        sources.push(Box::new(last.map(Ok)));
        Sorted::new(sources)
    }

    fn write_run(&mut self, rows: impl Iterator<Item = Result<R>>) -> Result<PathBuf> {
        let path = self.folder.join(format!("run-{:05}.parquet", self.run_count));
        self.run_count += 1;
        let file = fs_err::File::create(&path).map_err(|error| failed::<R>(ParquetError::External(Box::new(error))))?;
        let mut writer = TableWriter::new(BufWriter::new(file.into_parts().0))?;
        for row in rows {
            writer.push(&row?)?;
        }
        writer.finish()?;
        Ok(path)
    }
}

fn sorted<R: Row>(mut rows: Vec<R>) -> std::vec::IntoIter<R> {
    rows.sort_by_cached_key(Row::key);
    rows.into_iter()
}

/// Rows that are sorted by key.
type Source<R> = Box<dyn Iterator<Item = Result<R>> + Send>;

fn open<R: Row>(runs: &[PathBuf]) -> Result<Vec<Source<R>>> {
    runs.iter().map(|run| Ok(Box::new(read_rows(std::slice::from_ref(run))?) as Source<R>)).collect()
}

/// Rows by their keys; made by [`Sorter::finish`]. After an error there are no more.
pub struct Sorted<R: Row> {
    sources: Vec<Source<R>>,
    /// The next row of each source that has one.
    heads: BinaryHeap<Head<R>>,
    previous: Option<Key>,
}

impl<R: Row> Sorted<R> {
    fn new(sources: Vec<Source<R>>) -> Result<Self> {
        let mut merged = Self { heads: BinaryHeap::with_capacity(sources.len()), sources, previous: None };
        for source in 0..merged.sources.len() {
            merged.advance(source)?;
        }
        Ok(merged)
    }

    /// Puts the next row of a source among the heads.
    fn advance(&mut self, source: usize) -> Result<()> {
        if let Some(row) = self.sources[source].next().transpose()? {
            self.heads.push(Head { key: row.key(), source, row });
        }
        Ok(())
    }

    /// Puts the next row of the source in the place of this one, whose turn it is.
    fn take(&mut self, Head { key, source, row }: Head<R>) -> Result<R> {
        check_order::<R>(self.previous.as_ref(), &key)?;
        self.previous = Some(key);
        self.advance(source)?;
        Ok(row)
    }
}

impl<R: Row> Iterator for Sorted<R> {
    type Item = Result<R>;

    fn next(&mut self) -> Option<Self::Item> {
        let head = self.heads.pop()?;
        let row = self.take(head);
        if row.is_err() {
            self.heads.clear();
        }
        Some(row)
    }
}

/// The next row of a source. The greatest of a heap is what comes first: the smallest key, of equal ones the earliest source.
struct Head<R> {
    key: Key,
    source: usize,
    row: R,
}

impl<R> Ord for Head<R> {
    fn cmp(&self, other: &Self) -> Ordering {
        (&other.key, other.source).cmp(&(&self.key, self.source))
    }
}

impl<R> PartialOrd for Head<R> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<R> PartialEq for Head<R> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<R> Eq for Head<R> {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Context, Document, Error};

    fn sorter<R: Row>(memory: usize, fan_in: usize) -> (tempfile::TempDir, Sorter<R>) {
        let folder = tempfile::tempdir().unwrap();
        let sorter = Sorter::new(folder.path(), memory);
        (folder, Sorter { fan_in, ..sorter })
    }

    fn document(doc_id: String) -> Document {
        let text = format!("about {doc_id}");
        Document { doc_id, title: String::new(), text }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn rows_come_as_a_sort_in_memory_puts_them(
            ids in prop::collection::btree_set("[a-c0-9é]{0,6}", 0..300),
            seed in any::<u64>(),
            memory in 1..40_000_usize,
            fan_in in 2..5_usize,
        ) {
            let expected: Vec<Document> = ids.into_iter().map(document).collect();
            let mut shuffled = expected.clone();
            let hash = |document: &Document| std::hash::BuildHasher::hash_one(
                &std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default(), (seed, &document.doc_id));
            shuffled.sort_by_key(hash);
            let (_folder, mut sorter) = sorter(memory, fan_in);
            for document in shuffled {
                sorter.push(document).unwrap();
            }
            prop_assert_eq!(sorter.row_count(), expected.len() as u64);
            let sorted: Vec<Document> = sorter.finish().unwrap().map(Result::unwrap).collect();
            prop_assert_eq!(sorted, expected);
        }
    }

    #[test]
    fn memory_holds_no_more_than_it_may_and_runs_of_runs_leave_the_others_no_room() {
        let (folder, mut sorter) = sorter(10_000, 3);
        let runs = || fs_err::read_dir(folder.path()).unwrap().count();
        for i in 0..2_000 {
            sorter.push(document(format!("{:05}", i * 7919 % 2_000))).unwrap();
            assert!(sorter.rows.len() < 10_000 / size_of::<Document>());
        }
        assert!(runs() > 9, "{} runs: three levels of three", runs());
        let rows = sorter.finish().unwrap();
        assert!(runs() < 3, "{} runs are merged at last", runs());
        assert!(rows.map(|row| row.unwrap().doc_id).eq((0..2_000).map(|i| format!("{i:05}"))));
    }

    #[test]
    fn rows_of_one_key_are_refused_wherever_they_stand_or_come_in_the_order_of_old() {
        for (memory, between) in [(usize::MAX, 5), (1, 5), (3_000, 100)] {
            let (_folder, mut sorter) = sorter(memory, 3);
            let ids = (0..between).chain([2]).map(|i| document(i.to_string()));
            let pushed = ids.map(|document| sorter.push(document)).collect::<Result<Vec<()>>>();
            let found = pushed.and_then(|_| sorter.finish()?.collect::<Result<Vec<_>>>()).map(|rows| rows.len());
            assert!(matches!(&found, Err(Error::Duplicate { key, .. }) if key.task_id == "2"), "{memory}: {found:?}");

            let (_folder, mut sorter) = self::sorter(memory, 3);
            for i in 0..between {
                let (task_id, kind) = ((i % 2).to_string(), i.to_string());
                let (context_ids, answer_ids) = (vec![i], vec![]);
                let row = Context { task_id, trajectory_index: 0, step_index: 0, kind, context_ids, answer_ids };
                sorter.push(row).unwrap();
            }
            let kinds = sorter.finish().unwrap().map(|row| row.unwrap().kind);
            let expected = (0..between).filter(|i| i % 2 == 0).chain((0..between).filter(|i| i % 2 == 1));
            assert!(kinds.eq(expected.map(|i| i.to_string())), "{memory}");
        }
    }

    #[test]
    fn a_folder_that_is_gone_is_a_failure_to_write() {
        let (folder, mut sorter) = sorter(1, 3);
        folder.close().unwrap();
        let error = sorter.push(document("a".to_owned())).unwrap_err();
        assert!(matches!(error, Error::Write { table: "corpus", .. }), "{error}");
    }
}
