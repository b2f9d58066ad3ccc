//! Rows of JSON Lines or Parquet files as JSON objects, each with the place it comes from.

use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, anyhow};
use arrow::record_batch::RecordBatch;
use fs_err::File;
use mempo_data::{parquet_batches, parquet_builder};
use serde_json::{Map, Value};

/// A row and where it stands, as messages name it: `FILE:LINE`, or `FILE row N` (from 0) of a table.
pub(crate) struct Located {
    pub(crate) place: String,
    pub(crate) fields: Map<String, Value>,
}

type Rows = Box<dyn Iterator<Item = anyhow::Result<Located>>>;

/// The rows of a file in order, read as they are asked for. Columns that are null are absent.
pub(crate) fn read(path: &Path) -> anyhow::Result<Rows> {
    let file = File::open(path)?;
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet")) {
        read_parquet(path, file).with_context(|| format!("{} is not a readable Parquet file", path.display()))
    } else {
        Ok(read_lines(path, file))
    }
}

fn read_lines(path: &Path, file: File) -> Rows {
    let path = path.display().to_string();
    let lines = BufReader::new(file).lines().enumerate();
    Box::new(lines.filter_map(move |(index, line)| {
        let place = format!("{path}:{}", index + 1);
        match line.as_deref().map(|line| if index == 0 { line.trim_start_matches('\u{feff}') } else { line }) {
            Ok(line) if line.trim().is_empty() => None,
            Ok(line) => Some(object(place, line)),
            Err(error) => Some(Err(anyhow!("{place}: the line can't be read: {error}"))),
        }
    }))
}

fn object(place: String, line: &str) -> anyhow::Result<Located> {
    let value = serde_json::from_str(line).with_context(|| format!("{place}: not a line of JSON"))?;
    match value {
        Value::Object(mut fields) => {
            fields.retain(|_, value| !value.is_null());
            Ok(Located { place, fields })
        }
        _ => Err(anyhow!("{place}: expected a JSON object with one field a column")),
    }
}

fn read_parquet(path: &Path, file: File) -> anyhow::Result<Rows> {
    let path = path.display().to_string();
    let batches = parquet_batches(parquet_builder(file.into_parts().0)?)?;
    let mut row = 0;
    Ok(Box::new(batches.flat_map(move |batch| {
        let lines = batch.map_err(Into::into).and_then(|batch| json_lines(&batch));
        let lines = match lines {
            Ok(lines) => lines,
            Err(error) => return vec![Err(error.context(format!("{path} row {row}: can't be read")))],
        };
        let located = lines.lines().map(|line| {
            row += 1;
            object(format!("{path} row {}", row - 1), line)
        });
        located.collect()
    })))
}

fn json_lines(batch: &RecordBatch) -> anyhow::Result<String> {
    let mut writer = arrow_json::LineDelimitedWriter::new(Vec::new());
    writer.write(batch)?;
    writer.finish()?;
    Ok(String::from_utf8(writer.into_inner())?)
}

impl Located {
    /// The first of the named columns that is there; the error says which were looked for.
    pub(crate) fn first_of(&self, names: &[&str]) -> anyhow::Result<&Value> {
        let found = names.iter().find_map(|name| self.fields.get(*name));
        found.with_context(|| {
            let there: Vec<&str> = self.fields.keys().map(String::as_str).collect();
            format!("{}: expected a column `{}`, found `{}`", self.place, names.join("` or `"), there.join("`, `"))
        })
    }

    /// The first of the named columns that is there, as text.
    pub(crate) fn text(&self, names: &[&str]) -> anyhow::Result<String> {
        let value = self.first_of(names)?;
        scalar(value).with_context(|| format!("{}: column `{}` holds no text", self.place, names.join("` or `")))
    }

    /// [`Self::text`] where the column may be absent.
    pub(crate) fn optional_text(&self, names: &[&str]) -> anyhow::Result<Option<String>> {
        if names.iter().any(|name| self.fields.contains_key(*name)) { self.text(names).map(Some) } else { Ok(None) }
    }
}

/// Text, or a number as text.
pub(crate) fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Several texts: a list, a single one, or either under `text` (as in SQuAD).
pub(crate) fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Array(items) => items.iter().map(scalar).collect(),
        Value::Object(fields) => texts(fields.get("text")?),
        single => Some(vec![scalar(single)?]),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, LargeStringArray, ListBuilder, StringBuilder};
    use parquet::arrow::ArrowWriter;
    use serde_json::json;

    use super::*;

    #[test]
    fn parquet_rows_are_those_of_json_lines() {
        let directory = tempfile::tempdir().unwrap();
        let mut answers = ListBuilder::new(StringBuilder::new());
        answers.append_value([Some("x"), Some("y")]);
        answers.append_null();
        let columns: [(&str, ArrayRef); 3] = [
            ("question", Arc::new(LargeStringArray::from(vec!["é?", "q2?"]))),
            ("answers", Arc::new(answers.finish())),
            ("id", Arc::new(Int64Array::from(vec![Some(1), None]))),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let table = directory.path().join("q.parquet");
        let mut writer = ArrowWriter::try_new(File::create(&table).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let lines = directory.path().join("q.jsonl");
        let text =
            "{\"question\": \"é?\", \"answers\": [\"x\", \"y\"], \"id\": 1}\n\n{\"question\": \"q2?\", \"id\": null}\n";
        fs_err::write(&lines, text).unwrap();
        let all = |path: &Path| -> Vec<Located> { read(path).unwrap().map(Result::unwrap).collect() };
        let (from_table, from_lines) = (all(&table), all(&lines));
        assert_eq!(from_table.len(), 2);
        for (a, b) in from_table.iter().zip(&from_lines) {
            assert_eq!(a.fields, b.fields);
        }
        assert_eq!(from_table[0].fields["answers"], json!(["x", "y"]));
        assert!(from_table[1].place.ends_with("q.parquet row 1"));
        assert!(from_lines[1].place.ends_with("q.jsonl:3"));
    }

    #[test]
    fn broken_files_name_the_line() {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes, told) in [
            ("cut.jsonl", b"{\"a\": 1}\n{\"a\":".as_slice(), "cut.jsonl:2"),
            ("list.jsonl", b"[1]", "list.jsonl:1"),
            ("latin.jsonl", b"{}\n{\"a\": \"\xe9\"}", "latin.jsonl:2"),
            ("not.parquet", b"{\"a\": 1}", "not.parquet"),
        ] {
            let path = directory.path().join(name);
            fs_err::write(&path, bytes).unwrap();
            let error = read(&path).and_then(|mut rows| rows.find_map(Result::err).map_or(Ok(()), Err)).unwrap_err();
            assert!(format!("{error:#}").contains(told), "{name}: {error:#}");
        }
    }
}
