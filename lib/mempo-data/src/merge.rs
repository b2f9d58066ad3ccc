//! Walking sorted tables: the rows of a task together, and one table beside another.

use std::iter::Peekable;

use crate::{Error, Key, Result, Row, RowReader, write::check_order};

/// Consecutive rows of one task together. Rows out of order are an error, after which the iteration ends.
pub fn groups<R: Row>(reader: impl Iterator<Item = Result<R>>) -> impl Iterator<Item = Result<Vec<R>>> {
    let mut rows = reader.peekable();
    let mut previous = None;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        let group = next_group(&mut rows, &mut previous).transpose();
        failed = matches!(group, Some(Err(_)));
        group
    })
}

fn next_group<R: Row>(
    rows: &mut Peekable<impl Iterator<Item = Result<R>>>,
    previous: &mut Option<Key>,
) -> Result<Option<Vec<R>>> {
    let mut group = Vec::new();
    while let Some(row) = next_of_group(rows, group.is_empty(), previous.as_ref()) {
        let row = row?;
        let key = row.key();
        check_order::<R>(previous.as_ref(), &key)?;
        *previous = Some(key);
        group.push(row);
    }
    Ok(Some(group).filter(|group| !group.is_empty()))
}

/// The next row, if it starts a group or belongs to the one begun; errors belong to every group.
fn next_of_group<R: Row>(
    rows: &mut Peekable<impl Iterator<Item = Result<R>>>,
    starts: bool,
    previous: Option<&Key>,
) -> Option<Result<R>> {
    rows.next_if(|row| match (row, previous) {
        (Ok(row), Some(previous)) => starts || row.key().task_id == previous.task_id,
        _ => true,
    })
}

/// Walks a sorted table beside another sorted one: gives the row of a key, if there is one, and skips those before.
pub struct Cursor<R: Row> {
    rows: Peekable<RowReader<R>>,
    /// The key of the last row passed.
    previous: Option<Key>,
    /// The key last asked for.
    asked: Option<Key>,
}

impl<R: Row> Cursor<R> {
    /// Starts before the table's first row.
    pub fn new(reader: RowReader<R>) -> Self {
        Self { rows: reader.peekable(), previous: None, asked: None }
    }

    /// The row of `key`, or `None` if the table has none. Keys must be asked for in order; where a key repeats, asking
    /// again gives the next of its rows.
    pub fn take(&mut self, key: &Key) -> Result<Option<R>> {
        if let Some(asked) = self.asked.take_if(|asked| *asked > *key) {
            return Err(Error::Backwards { table: R::TABLE, previous: asked, found: key.clone() });
        }
        self.asked = Some(key.clone());
        while let Some(row) = self.rows.next_if(|row| row.as_ref().map_or(true, |row| row.key() <= *key)) {
            let row = row?;
            let found = row.key();
            check_order::<R>(self.previous.as_ref(), &found)?;
            let reached = found == *key;
            self.previous = Some(found);
            if reached {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{Advantage, Context, read_rows, write_rows};

    fn row(task_id: &str, trajectory_index: i32, step_index: i32) -> Advantage {
        Advantage {
            task_id: task_id.to_owned(),
            trajectory_index,
            step_index,
            trajectory_advantage: 0.0,
            memory_advantage: None,
            memory_start: None,
            memory_end: None,
            loss_weight: 1.0,
        }
    }

    fn part<R: Row>(folder: &tempfile::TempDir, unit: usize, rows: &[R]) -> PathBuf {
        let path = folder.path().join(format!("part-{unit:05}.parquet"));
        write_rows(rows, fs_err::File::create(&path).unwrap()).unwrap();
        path
    }

    #[test]
    fn groups_span_files() {
        let folder = tempfile::tempdir().unwrap();
        let files = [
            part(&folder, 0, &[row("a", 0, 0), row("a", 1, 0), row("b", 0, 0)]),
            part::<Advantage>(&folder, 1, &[]),
            part(&folder, 2, &[row("b", 0, 1), row("c", 0, 0)]),
        ];
        let groups: Result<Vec<Vec<Advantage>>> = groups(read_rows(&files).unwrap()).collect();
        let lengths: Vec<_> = groups.unwrap().iter().map(|group| (group[0].task_id.clone(), group.len())).collect();
        assert_eq!(lengths, [("a".to_owned(), 2), ("b".to_owned(), 2), ("c".to_owned(), 1)]);
    }

    #[test]
    fn groups_refuse_a_task_that_comes_again() {
        let rows = [row("b", 0, 0), row("a", 0, 0), row("b", 0, 1)];
        let groups: Vec<_> = groups(rows.into_iter().map(Ok)).collect();
        assert_eq!(groups.len(), 2);
        assert!(matches!(&groups[1], Err(Error::Unsorted { found, .. }) if found.task_id == "a"));
    }

    #[test]
    fn groups_pass_an_error_on_and_end() {
        let error = Error::Duplicate { table: "advantages", key: Key::of_id("x") };
        let rows = vec![Ok(row("a", 0, 0)), Err(error), Ok(row("b", 0, 0))];
        let groups: Vec<_> = groups(rows.into_iter()).collect();
        assert_eq!(groups.len(), 1);
        assert!(groups[0].is_err());
    }

    #[test]
    fn a_cursor_skips_and_misses_like_a_map_does() {
        let folder = tempfile::tempdir().unwrap();
        let present: Vec<i32> = (0..200).filter(|index| index % 3 != 1).collect();
        let rows: Vec<_> = present.iter().map(|&index| row("a", index / 10, index % 10)).collect();
        let mut cursor = Cursor::<Advantage>::new(read_rows(&[part(&folder, 0, &rows)]).unwrap());
        for index in (0..220).filter(|index| index % 4 != 2) {
            let key = Key::of_step("a", index / 10, index % 10);
            let found = cursor.take(&key).unwrap().map(|row| row.key());
            assert_eq!(found, present.contains(&index).then_some(key));
        }
        let back = cursor.take(&Key::of_step("a", 0, 0));
        assert!(matches!(back, Err(Error::Backwards { .. })));
    }

    #[test]
    fn a_cursor_gives_the_rows_of_a_repeated_key_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let context = |kind: &str, step_index| Context {
            task_id: "a".to_owned(),
            trajectory_index: 0,
            step_index,
            kind: kind.to_owned(),
            context_ids: vec![],
            answer_ids: vec![],
        };
        let rows = [context("memory", 0), context("bias", 0), context("memory", 1)];
        let mut cursor = Cursor::<Context>::new(read_rows(&[part(&folder, 0, &rows)]).unwrap());
        let mut kind = |step_index| cursor.take(&Key::of_step("a", 0, step_index)).unwrap().map(|row| row.kind);
        assert_eq!(kind(0).as_deref(), Some("memory"));
        assert_eq!(kind(0).as_deref(), Some("bias"));
        assert_eq!(kind(0), None);
        assert_eq!(kind(1).as_deref(), Some("memory"));
    }
}
