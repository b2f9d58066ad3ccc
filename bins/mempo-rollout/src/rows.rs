//! Rows of JSON lines, JSON arrays or Parquet files as JSON objects, each with the place it comes from.

use std::path::Path;

use anyhow::{Context, anyhow};
use mempo_data::json_rows;
use serde_json::{Map, Value};

/// A row and where it stands, as messages name it: `FILE:LINE`, or `FILE:ROW` (from 1) of an array or a table.
#[derive(Clone)]
pub(crate) struct Located {
    pub(crate) place: String,
    pub(crate) fields: Map<String, Value>,
}

/// The rows of a file in order, read as they are asked for. Columns that are null are absent; of a table only those `wanted`
/// are read.
pub(crate) fn read(path: &Path, wanted: &[&str]) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Located>>> {
    let rows = json_rows(path, wanted)?;
    Ok(rows.map(move |row| {
        let (number, json) = row?;
        object(format!("{}:{number}", path.display()), &json)
    }))
}

fn object(place: String, json: &[u8]) -> anyhow::Result<Located> {
    match serde_json::from_slice(json).with_context(|| format!("{place}: not JSON"))? {
        Value::Object(mut fields) => {
            fields.retain(|_, value| !value.is_null());
            Ok(Located { place, fields })
        }
        _ => Err(anyhow!("{place}: expected a JSON object with one field a column")),
    }
}

impl Located {
    /// The first of the named columns that is there; the error says which were looked for.
    pub(crate) fn first_of(&self, names: &[&str]) -> anyhow::Result<&Value> {
        let found = names.iter().find_map(|name| self.fields.get(*name));
        found.with_context(|| {
            let there: Vec<&str> = self.fields.keys().map(String::as_str).collect();
            format!(
                "{}: expected a column `{}`, found of those that are read `{}`",
                self.place,
                names.join("` or `"),
                there.join("`, `")
            )
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
    use super::*;

    #[test]
    fn broken_files_name_the_line() {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes, told) in [
            ("cut.jsonl", b"{\"a\": 1}\n{\"a\":".as_slice(), "cut.jsonl:2"),
            ("list.jsonl", b"[1]", "list.jsonl:1"),
            ("array.json", b"[{}, {\"a\": 1}, 3]", "array.json:3: expected a JSON object"),
            ("array.json", b"[{}, {\"a\": }]", "array.json:2: not JSON"),
            ("latin.jsonl", b"{}\n{\"a\": \"\xe9\"}", "latin.jsonl:2"),
            ("not.parquet", b"{\"a\": 1}", "not.parquet"),
        ] {
            let path = directory.path().join(name);
            fs_err::write(&path, bytes).unwrap();
            let error =
                read(&path, &[]).and_then(|mut rows| rows.find_map(Result::err).map_or(Ok(()), Err)).unwrap_err();
            assert!(format!("{error:#}").contains(told), "{name}: {error:#}");
        }
    }
}
