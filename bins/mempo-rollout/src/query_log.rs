//! What a remote search answered, written beside the rollout, and a search that answers the same again without a server.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::anyhow;
use mempo_agent::Search;
use mempo_data::{AnsweredQuery, Document, Row, read_rows};
use mempo_run::{Input, ResultExt};

/// A query and how many documents are wanted.
type Query = (String, usize);

/// Asks each query of a unit once; all who ask it get the same answer, which is kept. Failures are not.
pub(crate) struct Recorder {
    search: Box<dyn Search>,
    answers: Mutex<BTreeMap<Query, Vec<Document>>>,
}

impl Recorder {
    pub(crate) fn new(search: Box<dyn Search>) -> Self {
        Self { search, answers: Mutex::default() }
    }

    /// The unit's answers, sorted; from now on another unit's are kept.
    pub(crate) fn take(&self) -> Vec<AnsweredQuery> {
        let answers = std::mem::take(&mut *self.lock());
        let row = |((query, top_k), documents)| AnsweredQuery { query, top_k: top_k as i32, documents };
        answers.into_iter().map(row).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Query, Vec<Document>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Search for Recorder {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        let key = (query.to_owned(), top_k);
        let known = self.lock().get(&key).cloned();
        let found = known.map_or_else(|| self.search.search(query, top_k), Ok)?;
        // Of two that asked at the same time both take what the first was told.
        Ok(self.lock().entry(key).or_insert(found).clone())
    }
}

/// Answers queries as they were answered in a rollout.
pub(crate) struct Replay {
    dir: PathBuf,
    /// Answers by unit: a server may have answered a later unit otherwise.
    answers: HashMap<Query, BTreeMap<usize, Vec<Document>>>,
    unit: AtomicUsize,
}

impl Replay {
    /// Reads all of a rollout's log.
    pub(crate) fn read(rollouts: &Input) -> anyhow::Result<Self> {
        let mut answers: HashMap<Query, BTreeMap<usize, Vec<Document>>> = HashMap::new();
        for path in rollouts.table(AnsweredQuery::TABLE)? {
            let unit = unit_of(&path).bad_input()?;
            for row in read_rows::<AnsweredQuery>(std::slice::from_ref(&path)).bad_input()? {
                let AnsweredQuery { query, top_k, documents } = row.bad_input()?;
                answers.entry((query, top_k as usize)).or_default().insert(unit, documents);
            }
        }
        Ok(Self { dir: rollouts.dir().to_owned(), answers, unit: AtomicUsize::new(0) })
    }

    /// From now on this unit asks: it gets what it was told then, if it asked the same.
    pub(crate) fn begin(&self, unit: usize) {
        self.unit.store(unit, Ordering::Relaxed);
    }
}

impl Search for Replay {
    fn search(&self, query: &str, top_k: usize) -> Result<Vec<Document>, String> {
        let by_unit = self.answers.get(&(query.to_owned(), top_k));
        let here = by_unit.and_then(|by_unit| by_unit.get(&self.unit.load(Ordering::Relaxed)));
        let found = here.or_else(|| by_unit?.values().next());
        found.cloned().ok_or_else(|| {
            let dir = self.dir.display();
            format!("{dir}: nobody asked `{query}` for {top_k} documents there: ask a server, or an index")
        })
    }
}

/// The unit whose part a file is.
fn unit_of(path: &Path) -> anyhow::Result<usize> {
    let number = path.file_stem().and_then(|stem| stem.to_str()?.strip_prefix("part-")?.parse().ok());
    number.ok_or_else(|| anyhow!("{}: expected part-NUMBER.parquet", path.display()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// Tells each time what nobody was told before; fails on every third call.
    struct Fickle(AtomicU64);

    impl Search for Fickle {
        fn search(&self, query: &str, _: usize) -> Result<Vec<Document>, String> {
            let call = self.0.fetch_add(1, Ordering::Relaxed);
            if call % 3 == 2 {
                return Err("busy".to_owned());
            }
            let title = String::new();
            Ok(vec![Document { doc_id: call.to_string(), title, text: query.to_owned() }])
        }
    }

    #[test]
    fn whoever_asks_the_same_in_a_unit_is_told_the_same_and_that_is_kept() {
        let recorder = Recorder::new(Box::new(Fickle(AtomicU64::new(0))));
        let told: Vec<Vec<Option<Vec<Document>>>> = std::thread::scope(|scope| {
            let ask = || (0..50).map(|i| recorder.search(&format!("q{}", i % 7), 2).ok()).collect();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let kept = recorder.take();
        assert!(kept.is_sorted_by_key(Row::key) && kept.len() == 7, "{kept:?}");
        for (i, told) in told.iter().flat_map(|told| told.iter().enumerate()) {
            let row = kept.iter().find(|row| row.query == format!("q{}", i % 7)).unwrap();
            assert!(told.as_ref().is_none_or(|told| *told == row.documents), "{i}: {told:?}");
        }
        assert!(told.iter().flatten().flatten().count() > 150, "a failure is not remembered");
        assert!(recorder.take().is_empty());
    }
}
