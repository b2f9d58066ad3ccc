//! Rows of files that others made, JSON lines, a JSON array or Parquet, as JSON text: what follows knows one form.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use arrow_json::reader::infer_json_schema_from_iterator;
use arrow_json::{LineDelimitedWriter, ReaderBuilder};
use parquet::arrow::ArrowWriter;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use serde_json::Value;

use crate::caught::guarded;
use crate::json_array::Elements;
use crate::{Error, Result, parquet_batches, parquet_builder};

/// Longest line, or element of an array, read.
const LINE_BYTES: u64 = 64 << 20;
/// Rows of a table turned to JSON at a time.
const BATCH_ROWS: usize = 64;

/// How the names of such files end, in upper or lower case.
pub const JSON_ROWS_EXTENSIONS: [&str; 10] = [
    ".parquet",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".ndjson",
    ".ndjson.gz",
    ".ndjson.zst",
    ".json",
    ".json.gz",
    ".json.zst",
];

/// A row's number (the line of a text file, the element of an array, the row of a table; from 1) and its JSON text, not yet parsed.
pub type JsonRow = (u64, Vec<u8>);
/// The rows of a file, one after another; after an error there are no more.
pub type JsonRows = Box<dyn Iterator<Item = Result<JsonRow>> + Send>;

/// The rows of a file in order, read as they are asked for: lines of JSON, plain or compressed as the name says, blank ones
/// left out; the elements of an array, where the file begins with one; or those of a Parquet file as objects without their null
/// fields.
///
/// Of a table only the `wanted` columns are read, or all where it has none of them.
pub fn json_rows(path: &Path, wanted: &[&str]) -> Result<JsonRows> {
    if has_extension(path, ".parquet") {
        return table_rows(path, wanted);
    }
    let mut reader = open_text(path)?;
    match reader.fill_buf() {
        Ok(beginning) if Elements::<Text>::are_in(beginning) => {
            Ok(numbered(path, Elements::new(reader, LINE_BYTES as usize)))
        }
        Ok(_) => Ok(numbered(path, Lines(Some(reader)))),
        Err(error) => Ok(numbered(path, std::iter::once(Err(error)))),
    }
}

/// The lines of a text file in order, plain or compressed as the name says, blank ones left out.
pub fn text_lines(path: &Path) -> Result<JsonRows> {
    Ok(numbered(path, Lines(Some(open_text(path)?))))
}

/// A text file, as it is read.
type Text = Box<dyn BufRead + Send>;

fn open_text(path: &Path) -> Result<Text> {
    let open = |source| Error::Open { file: path.to_owned(), source };
    let file = BufReader::new(fs_err::File::open(path).map_err(open)?);
    Ok(if has_extension(path, ".gz") {
        Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file)))
    } else if has_extension(path, ".zst") {
        Box::new(BufReader::new(zstd::Decoder::with_buffer(file).map_err(open)?))
    } else {
        Box::new(file)
    })
}

/// Numbers from 1; blank rows are left out after that.
fn numbered(path: &Path, texts: impl Iterator<Item = io::Result<Vec<u8>>> + Send + 'static) -> JsonRows {
    let file = path.to_owned();
    let mut rows = (1..).zip(texts).map(move |(line, text)| match text {
        Ok(text) => Ok((line, text)),
        Err(source) => Err(Error::Line { file: file.clone(), line, source }),
    });
    let is_blank = |row: &Result<JsonRow>| row.as_ref().is_ok_and(|(_, text)| text.trim_ascii().is_empty());
    Box::new(std::iter::from_fn(move || rows.find(|row| !is_blank(row))))
}

/// Rows of a Parquet file, by what its end says.
pub fn parquet_row_count(path: &Path) -> Result<u64> {
    Ok(open_table(path)?.metadata().file_metadata().num_rows() as u64)
}

/// Bytes of a Parquet file's rows before compression, all columns, by what its end says.
pub fn parquet_bytes(path: &Path) -> Result<u64> {
    let table = open_table(path)?;
    let bytes = table.metadata().row_groups().iter().map(|group| u64::try_from(group.total_byte_size()).unwrap_or(0));
    Ok(bytes.fold(0, u64::saturating_add))
}

/// Whether a name ends so, in upper or lower case.
pub fn has_extension(path: &Path, extension: &str) -> bool {
    path.to_string_lossy().to_lowercase().ends_with(extension)
}

/// Lines as bytes, of bounded length; a byte order mark at the start of one is left out.
struct Lines(Option<Box<dyn BufRead + Send>>);

impl Iterator for Lines {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let reader = self.0.as_mut()?;
        let mut line = Vec::new();
        let result = match reader.take(LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => return None,
            Ok(read) if read as u64 == LINE_BYTES && !line.ends_with(b"\n") => {
                let message = format!("a line longer than {} MiB; expected one JSON object a line", LINE_BYTES >> 20);
                Err(io::Error::new(io::ErrorKind::InvalidData, message))
            }
            Ok(_) => {
                if line.starts_with(b"\xef\xbb\xbf") {
                    line.drain(..3);
                }
                Ok(line)
            }
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.0 = None;
        }
        Some(result)
    }
}

fn open_table(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<std::fs::File>> {
    let file = fs_err::File::open(path).map_err(|source| Error::Open { file: path.to_owned(), source })?;
    parquet_builder(file.into_parts().0).map_err(|source| Error::Parquet { file: path.to_owned(), source })
}

fn table_rows(path: &Path, wanted: &[&str]) -> Result<JsonRows> {
    let mut table = open_table(path)?.with_batch_size(BATCH_ROWS);
    let columns = table.parquet_schema().root_schema().get_fields().iter().enumerate();
    let known = columns.filter(|(_, column)| wanted.contains(&column.name()));
    let known: Vec<usize> = known.map(|(index, _)| index).collect();
    if !known.is_empty() {
        let mask = ProjectionMask::roots(table.parquet_schema(), known);
        table = table.with_projection(mask);
    }
    let file = path.to_owned();
    let batches = parquet_batches(table).map_err(|source| Error::Parquet { file: file.clone(), source })?;
    let rows = batches.flat_map(move |batch| match batch.and_then(|batch| guarded(move || json_lines(&batch))?) {
        Ok(text) => {
            text.split(|byte| *byte == b'\n').filter(|row| !row.is_empty()).map(|row| Ok(row.to_vec())).collect()
        }
        Err(source) => vec![Err(Error::Parquet { file: file.clone(), source })],
    });
    Ok(Box::new((1..).zip(rows).map(|(number, row)| row.map(|row| (number, row)))))
}

/// Writes one Parquet file of rows that are no table here, as another program wants them; columns are what the rows hold.
pub fn write_json_rows(rows: &[Value], sink: impl Write + Send) -> Result<()> {
    let written = || -> parquet::errors::Result<()> {
        let schema = Arc::new(infer_json_schema_from_iterator(rows.iter().map(Ok))?);
        let mut decoder = ReaderBuilder::new(Arc::clone(&schema)).with_batch_size(rows.len().max(1)).build_decoder()?;
        decoder.serialize(rows)?;
        let mut writer = ArrowWriter::try_new(sink, schema, None)?;
        if let Some(batch) = decoder.flush()? {
            writer.write(&batch)?;
        }
        writer.close().map(drop)
    };
    written().map_err(|source| Error::Write { table: "rows of another program", source })
}

fn json_lines(batch: &RecordBatch) -> parquet::errors::Result<Vec<u8>> {
    let mut writer = LineDelimitedWriter::new(Vec::new());
    writer.write(batch)?;
    Ok(writer.into_inner())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use arrow::array::{ArrayRef, Int64Array, LargeStringArray, ListBuilder, StringBuilder};

    use super::*;

    fn all(path: &Path, wanted: &[&str]) -> Vec<(u64, String)> {
        let text = |row: Result<JsonRow>| row.map(|(number, text)| (number, String::from_utf8(text).unwrap())).unwrap();
        json_rows(path, wanted).unwrap().map(text).collect()
    }

    #[test]
    fn lines_are_numbered_as_an_editor_numbers_them() {
        let dir = tempfile::tempdir().unwrap();
        let text = "\u{feff}{\"a\":1}\n\n  \n{\"b\":2}".as_bytes();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(text).unwrap();
        let forms = [
            ("a.jsonl", text.to_vec()),
            ("a.gz", gzip.finish().unwrap()),
            ("a.ZST", zstd::encode_all(text, 1).unwrap()),
        ];
        for (name, bytes) in forms {
            let path = dir.path().join(name);
            fs_err::write(&path, bytes).unwrap();
            assert_eq!(all(&path, &[]), [(1, "{\"a\":1}\n".to_owned()), (4, "{\"b\":2}".to_owned())], "{name}");
        }
    }

    #[test]
    fn an_array_s_elements_are_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let text = "\u{feff}\n[\n{\"a\": 1},\n\n{\"b\": \"[,]\"}]\n";
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(text.as_bytes()).unwrap();
        for (name, bytes) in [("a.json", text.as_bytes().to_vec()), ("a.json.gz", gzip.finish().unwrap())] {
            let path = dir.path().join(name);
            fs_err::write(&path, bytes).unwrap();
            let found: Vec<_> = all(&path, &[]).into_iter().map(|(row, text)| (row, text.trim().to_owned())).collect();
            assert_eq!(found, [(1, "{\"a\": 1}".to_owned()), (2, "{\"b\": \"[,]\"}".to_owned())], "{name}");
            assert_eq!(text_lines(&path).unwrap().count(), 3, "{name}");
        }
    }

    fn table(dir: &Path) -> PathBuf {
        let mut answers = ListBuilder::new(StringBuilder::new());
        answers.append_value([Some("x"), Some("y")]);
        answers.append_null();
        let columns: [(&str, ArrayRef); 3] = [
            ("question", Arc::new(LargeStringArray::from(vec!["é?", "q2?"]))),
            ("answers", Arc::new(answers.finish())),
            ("id", Arc::new(Int64Array::from(vec![Some(1), None]))),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let path = dir.join("q.parquet");
        let mut writer = ArrowWriter::try_new(fs_err::File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        path
    }

    #[test]
    fn a_table_s_rows_are_objects_of_the_wanted_columns() {
        let dir = tempfile::tempdir().unwrap();
        let path = table(dir.path());
        let whole = [
            (1, r#"{"question":"é?","answers":["x","y"],"id":1}"#.to_owned()),
            (2, r#"{"question":"q2?"}"#.to_owned()),
        ];
        assert_eq!(all(&path, &["question", "answers", "id", "more"]), whole);
        assert_eq!(all(&path, &["nothing", "of", "it"]), whole);
        assert_eq!(all(&path, &["id", "question"])[0].1, r#"{"question":"é?","id":1}"#);
        assert_eq!(parquet_row_count(&path).unwrap(), 2);
        assert!((20..2000).contains(&parquet_bytes(&path).unwrap()));
    }

    #[test]
    fn rows_for_another_program_are_read_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        let row =
            |i: usize| serde_json::json!({"a": {"target": [["x"], ["y", "é"]]}, "index": i, "name": format!("n{i}")});
        let rows: Vec<Value> = (0..200).map(row).collect();
        write_json_rows(&rows, fs_err::File::create(&path).unwrap()).unwrap();
        let parse = |(_, text): (u64, String)| serde_json::from_str::<Value>(&text).unwrap();
        assert_eq!(all(&path, &[]).into_iter().map(parse).collect::<Vec<_>>(), rows);
    }

    #[test]
    fn what_cannot_be_read_names_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let long = [vec![b'\n'], vec![b' '; LINE_BYTES as usize + 1]].concat();
        for (name, bytes, told) in [
            ("not.parquet", b"{\"a\": 1}".to_vec(), "not.parquet"),
            ("not.gz", b"{\"a\": 1}".to_vec(), "not.gz:1"),
            ("long.jsonl", long, "long.jsonl:2"),
            ("cut.json", b"[{}, {\"a\": 1".to_vec(), "cut.json:2"),
        ] {
            let path = dir.path().join(name);
            fs_err::write(&path, bytes).unwrap();
            let error = json_rows(&path, &[]).and_then(|mut rows| rows.find_map(Result::err).map_or(Ok(()), Err));
            let error = error.unwrap_err();
            assert!(error.to_string().contains(told), "{error}");
        }
    }
}
