//! The corpus table of an index: documents of foreign files, sorted by id in bounded memory, and read again from the table by
//! what is made of them.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use mempo_data::{Document, Error, Sorted, Sorter, TableWriter, read_rows};
use mempo_run::{ResultExt, Stage};

use crate::retrieval::split_contents;
use crate::rows::{self, Located};

/// The table.
pub(crate) const TABLE: &str = "corpus";
/// As an index has it.
pub(crate) const LIMITS: Limits = Limits { part_rows: 100_000, sort_bytes: 256 << 20 };
/// Documents between two lines of the log, while nobody knows how many there will be.
const LOG_DOCUMENTS: u64 = 1_000_000;
/// Beside the state to continue from: the number of documents, once all are in the table.
const COUNT: &str = "documents.json";
/// What a document is read from.
pub(crate) const COLUMNS: [&str; 5] = ["doc_id", "id", "contents", "title", "text"];

/// How much is held and written at a time.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Documents in one file of the table.
    part_rows: usize,
    /// Bytes of documents that are sorted in memory; more are put aside in files and merged.
    sort_bytes: usize,
}

/// Writes the table, or what an earlier start has left to do; returns how many documents it has.
///
/// A start that was stopped before all were written sorts again, and leaves the files that are there.
pub(crate) fn write(stage: &Stage, paths: &[PathBuf], limits: Limits) -> anyhow::Result<u64> {
    if let Some(dir) = stage.resume_dir() {
        return Ok(serde_json::from_slice(&fs_err::read(dir.join(COUNT))?)?);
    }
    let count = stage.with_scratch(|folder| {
        let sorter = read_documents(stage, paths, Sorter::new(folder, limits.sort_bytes))?;
        let count = sorter.row_count();
        let documents = sorter.finish().or_else(|error| refuse_twice(error, paths))?;
        write_parts(stage, (count, limits.part_rows), documents, paths)?;
        Ok(count)
    })?;
    stage.save_resume(|dir| Ok(fs_err::write(dir.join(COUNT), serde_json::to_vec(&count)?)?))?;
    Ok(count)
}

/// The documents of the written table in their order, until a signal comes.
pub(crate) fn documents(stage: &Stage) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Document>>> {
    let part = |unit| stage.dir().join(TABLE).join(format!("part-{unit:05}.parquet"));
    let parts: Vec<PathBuf> = (0..usize::MAX).take_while(|unit| stage.has_part(TABLE, *unit)).map(part).collect();
    let again = || format!("{}: what was written is damaged, use --restart", stage.dir().display());
    let rows = read_rows::<Document>(&parts).with_context(again)?;
    Ok(rows.map(move |row| {
        stage.check_interrupt()?;
        row.with_context(again)
    }))
}

/// Takes all documents of the files.
fn read_documents(stage: &Stage, paths: &[PathBuf], mut sorter: Sorter<Document>) -> anyhow::Result<Sorter<Document>> {
    for path in paths {
        let before = sorter.row_count();
        for row in rows::read(path, &COLUMNS).bad_input()? {
            stage.check_interrupt()?;
            let document = row.and_then(|row| document(&row)).bad_input()?;
            sorter.push(document).or_else(|error| refuse_twice(error, paths))?;
            if sorter.row_count().is_multiple_of(LOG_DOCUMENTS) {
                tracing::info!("{} documents read", sorter.row_count());
            }
        }
        if sorter.row_count() == before {
            return Err(anyhow!("{} holds no documents", path.display())).bad_input();
        }
    }
    Ok(sorter)
}

/// Writes the files of the table that are not there yet.
fn write_parts(
    stage: &Stage,
    (count, part_rows): (u64, usize),
    documents: Sorted<Document>,
    paths: &[PathBuf],
) -> anyhow::Result<()> {
    let progress = stage.progress("sort", count, "documents");
    let mut documents = documents.map(|row| {
        stage.check_interrupt()?;
        progress.inc(1);
        row.or_else(|error| refuse_twice(error, paths))
    });
    for unit in 0..count.div_ceil(part_rows as u64) as usize {
        let mut part = documents.by_ref().take(part_rows);
        if stage.has_part(TABLE, unit) {
            part.try_for_each(|row| row.map(drop))?;
            continue;
        }
        stage.write_part(TABLE, unit, |file| {
            let mut writer = TableWriter::new(file)?;
            part.try_for_each(|row| anyhow::Ok(writer.push(&row?)?))?;
            writer.finish()?;
            Ok(())
        })?;
    }
    Ok(())
}

/// A row as a document.
pub(crate) fn document(row: &Located) -> anyhow::Result<Document> {
    let doc_id = row.text(&["doc_id", "id"])?;
    if let Some(contents) = row.optional_text(&["contents"])? {
        let (title, text) = split_contents(&contents);
        return Ok(Document { doc_id, title: title.to_owned(), text: text.to_owned() });
    }
    let text = row.text(&["text"]).context("expected `title` and `text`, or Search-R1's `contents`")?;
    Ok(Document { doc_id, title: row.text(&["title"])?, text })
}

/// Tells where the documents stand that have one id; other errors are given on.
fn refuse_twice<T>(error: Error, paths: &[PathBuf]) -> anyhow::Result<T> {
    let Error::Duplicate { key, .. } = &error else { return Err(error.into()) };
    let id = &key.task_id;
    let rows = paths.iter().flat_map(|path| rows::read(path, &COLUMNS).into_iter().flatten().flatten());
    let twice = rows.filter(|row| row.text(&["doc_id", "id"]).is_ok_and(|found| found == *id)).take(2);
    let places: Vec<String> = twice.map(|row| row.place).collect();
    let places = places.join(" and ");
    Err(anyhow!("two documents have the id `{id}`: {places}; ids must be unique, remove one or change its id"))
        .bad_input()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use mempo_agent::{Bm25Options, SearchIndex};
    use mempo_data::write_rows;
    use mempo_run::{StageArgs, exit_code};
    use serde_json::{Value, json};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        stage: StageArgs,
    }

    const SMALL: Limits = Limits { part_rows: 70, sort_bytes: 9_000 };

    fn stage(folder: &Path) -> Stage {
        let out = folder.join("out").display().to_string();
        let line = Line::parse_from(["", "--out", &out]);
        Stage::open("mempo-rollout", "index", &line.stage, &json!({}), &[]).unwrap().unwrap()
    }

    fn documents() -> Vec<Document> {
        let of = |i: usize| {
            let text = format!("river {} city {}", i % 7, i % 11);
            Document { doc_id: format!("{i:03}"), title: format!("land {}", i % 5), text }
        };
        (0..300).map(of).collect()
    }

    /// The documents in no order in files of each form: JSON lines in Search-R1's form and in ours, and a table.
    fn files(folder: &Path, documents: &[Document]) -> Vec<PathBuf> {
        let paths = ["a.jsonl", "b.jsonl", "c.parquet"].map(|name| folder.join(name));
        let third =
            |which| documents.iter().rev().enumerate().filter(move |(i, _)| i * i % 3 == which).map(|(_, row)| row);
        let rows = |rows: Vec<Value>| rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
        let contents = |row: &Document| json!({"id": row.doc_id, "contents": crate::retrieval::contents(row)});
        fs_err::write(&paths[0], rows(third(1).map(contents).collect())).unwrap();
        let plain = |row: &Document| json!({"doc_id": row.doc_id, "title": row.title, "text": row.text, "more": 1});
        let (even, odd): (Vec<_>, Vec<_>) = third(0).partition(|row| row.doc_id.ends_with(['0', '2', '4', '6', '8']));
        fs_err::write(&paths[1], rows(even.into_iter().map(plain).collect())).unwrap();
        let odd: Vec<Document> = odd.into_iter().rev().cloned().collect();
        write_rows(&odd, fs_err::File::create(&paths[2]).unwrap()).unwrap();
        paths.into()
    }

    fn parts(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let entries = fs_err::read_dir(folder.join("out").join(TABLE)).unwrap().map(Result::unwrap);
        let name = |entry: &fs_err::DirEntry| entry.file_name().into_string().unwrap();
        let mut parts: Vec<_> = entries.map(|entry| (name(&entry), fs_err::read(entry.path()).unwrap())).collect();
        parts.sort();
        parts
    }

    #[test]
    fn documents_of_all_forms_come_sorted_into_bytes_that_memory_does_not_change() {
        let (folder, expected) = (tempfile::tempdir().unwrap(), documents());
        let paths = files(folder.path(), &expected);
        let stage = stage(folder.path());
        assert_eq!(write(&stage, &paths, SMALL).unwrap(), 300);
        let found: Vec<Document> = super::documents(&stage).unwrap().map(Result::unwrap).collect();
        assert_eq!(found, expected);
        let written = parts(folder.path());
        assert_eq!(written.len(), 5);
        for (part, (name, bytes)) in expected.chunks(70).zip(&written) {
            let mut whole = Vec::new();
            write_rows(part, &mut whole).unwrap();
            assert!(whole == *bytes, "{name}");
        }
        let left = fs_err::read_dir(folder.path().join("out")).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(left.filter(|name| name.to_string_lossy().contains("scratch")).count(), 0);
        let (streamed, whole) = (folder.path().join("streamed"), folder.path().join("whole"));
        let rankings = |dir: &Path| {
            let index = SearchIndex::open(dir, Bm25Options::default()).unwrap();
            ["river 3", "land 4 city 10", "2"].map(|query| index.search(query, 40).unwrap())
        };
        for dir in [&streamed, &whole] {
            fs_err::create_dir(dir).unwrap();
        }
        SearchIndex::try_build::<anyhow::Error>(super::documents(&stage).unwrap(), &streamed).unwrap();
        SearchIndex::build(expected, &whole).unwrap();
        assert_eq!(rankings(&streamed), rankings(&whole));
    }

    #[test]
    fn a_start_that_was_stopped_goes_on_to_the_same_bytes() {
        let (folder, expected) = (tempfile::tempdir().unwrap(), documents());
        let paths = files(folder.path(), &expected);
        let stage = stage(folder.path());
        write(&stage, &paths, SMALL).unwrap();
        let whole = parts(folder.path());
        let time = |unit: usize| {
            let part = folder.path().join(format!("out/corpus/part-{unit:05}.parquet"));
            fs_err::metadata(part).unwrap().modified().unwrap()
        };
        let (before, first) = (time(4), time(0));
        fs_err::remove_dir_all(stage.resume_dir().unwrap()).unwrap();
        fs_err::remove_file(folder.path().join("out/corpus/part-00004.parquet")).unwrap();
        assert_eq!(write(&stage, &paths, SMALL).unwrap(), 300);
        assert!(parts(folder.path()) == whole && time(0) == first && time(4) > before);
        // Once all are there, the files of the documents are not asked again.
        fs_err::remove_file(&paths[0]).unwrap();
        assert_eq!(write(&stage, &paths, SMALL).unwrap(), 300);
    }

    #[test]
    fn an_id_that_comes_twice_is_told_with_both_places_wherever_it_shows() {
        for limits in [LIMITS, SMALL, Limits { sort_bytes: 1, ..SMALL }] {
            let folder = tempfile::tempdir().unwrap();
            let mut paths = files(folder.path(), &documents());
            paths.push(folder.path().join("d.jsonl"));
            fs_err::write(
                &paths[3],
                "\n{\"id\": \"new\", \"title\": \"\", \"text\": \"\"}\n{\"id\": 299, \"contents\": \"\"}",
            )
            .unwrap();
            let stage = stage(folder.path());
            let error = write(&stage, &paths, limits).unwrap_err();
            let message = format!("{error:#}");
            assert!(exit_code(&error) == 4 && message.contains("id `299`"), "{message}");
            assert!(message.contains("c.parquet:") && message.contains("d.jsonl:3; "), "{message}");
            assert_eq!(stage.withdraw(error).to_string(), message);
            let left: Vec<_> =
                fs_err::read_dir(folder.path().join("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left, [".lock"]);
        }
    }
}
