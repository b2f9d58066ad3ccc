//! Rows out of Parquet files, a batch at a time: memory does not grow with the table.

use std::{
    collections::VecDeque,
    ops::Range,
    path::{Path, PathBuf},
};

use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use parquet::{
    arrow::ProjectionMask,
    file::metadata::{FileMetaData, ParquetMetaData},
};

use crate::{
    Error, Result, Row, SCHEMA_VERSION, TABLE_KEY, VERSION_KEY, arrow_schema,
    caught::{parquet_batches, parquet_builder},
    conform::{check_schema, conform_batch},
};

/// Rows and bytes that are decoded at once.
const BATCH_ROWS: u64 = 1024;
const BATCH_BYTES: u64 = 16 << 20;

/// The rows of the given files, one file after the other.
///
/// The columns of all files are checked before this returns. Columns that the table does not have are left unread.
pub fn read_rows<R: Row>(files: &[PathBuf]) -> Result<RowReader<R>> {
    let schema = arrow_schema(R::TABLE);
    for file in files {
        drop(open::<R>(file, &schema)?);
    }
    Ok(RowReader { schema, files: files.to_vec().into(), current: None, rows: VecDeque::new() })
}

/// Iterates over the rows of a table; made by [`read_rows`].
pub struct RowReader<R: Row> {
    schema: SchemaRef,
    /// Files not yet opened.
    files: VecDeque<PathBuf>,
    current: Option<OpenFile>,
    /// Rows decoded and not yet given out.
    rows: VecDeque<R>,
}

type Batches = Box<dyn Iterator<Item = parquet::errors::Result<RecordBatch>> + Send>;

struct OpenFile {
    path: PathBuf,
    batches: Batches,
    /// Rows decoded so far.
    row_count: usize,
}

impl<R: Row> Iterator for RowReader<R> {
    type Item = Result<R>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.pop_front() {
                return Some(Ok(row));
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    // Nothing after a damaged place can be trusted to be in order.
                    self.files.clear();
                    self.current = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

impl<R: Row> RowReader<R> {
    /// Decodes the next batch; false at the end of the last file.
    fn fill(&mut self) -> Result<bool> {
        let Some(current) = &mut self.current else {
            let Some(path) = self.files.pop_front() else {
                return Ok(false);
            };
            let batches = open::<R>(&path, &self.schema)?;
            self.current = Some(OpenFile { path, batches, row_count: 0 });
            return Ok(true);
        };
        let Some(batch) = current.batches.next() else {
            self.current = None;
            return Ok(true);
        };
        let file = &current.path;
        let batch = batch.map_err(|source| Error::Parquet { file: file.clone(), source })?;
        let rows = current.row_count..current.row_count + batch.num_rows();
        let batch = conform_batch(file, &batch, &self.schema, &rows)?;
        current.row_count = rows.end;
        self.rows = decode(file, &batch, rows)?;
        Ok(true)
    }
}

fn decode<R: Row>(file: &Path, batch: &RecordBatch, rows: Range<usize>) -> Result<VecDeque<R>> {
    serde_arrow::from_record_batch(batch).map_err(|source| Error::BadRow {
        file: file.to_owned(),
        table: R::TABLE,
        rows,
        source: Box::new(source),
    })
}

/// Opens a file, checks that it holds the table, and reads only the table's columns.
fn open<R: Row>(path: &Path, schema: &SchemaRef) -> Result<Batches> {
    let damaged = |source| Error::Parquet { file: path.to_owned(), source };
    let file = fs_err::File::open(path).map_err(|source| Error::Open { file: path.to_owned(), source })?;
    let builder = parquet_builder(file.into_parts().0).map_err(damaged)?;
    check_metadata::<R>(path, builder.metadata().file_metadata())?;
    check_schema(path, builder.schema(), schema)?;
    let columns = builder.schema().fields().iter().enumerate();
    let wanted = columns.filter(|(_, field)| schema.fields().find(field.name()).is_some()).map(|(column, _)| column);
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.collect::<Vec<_>>());
    let batch_rows = batch_rows(builder.metadata());
    let batches = parquet_batches(builder.with_projection(mask).with_batch_size(batch_rows)).map_err(damaged)?;
    Ok(Box::new(batches))
}

/// As many rows as hold about [`BATCH_BYTES`], so that long documents do not pile up.
fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let row_bytes = metadata.row_groups().iter().map(|group| {
        let bytes = u64::try_from(group.total_byte_size()).unwrap_or_default();
        bytes / u64::try_from(group.num_rows()).unwrap_or_default().max(1)
    });
    let largest = row_bytes.max().unwrap_or_default().max(1);
    (BATCH_BYTES / largest).clamp(1, BATCH_ROWS) as usize
}

/// Refuses a file that names another table or a newer schema; files of other programs name nothing.
fn check_metadata<R: Row>(path: &Path, metadata: &FileMetaData) -> Result<()> {
    let value = |key: &str| {
        let pairs = metadata.key_value_metadata()?;
        pairs.iter().find(|pair| pair.key == key).and_then(|pair| pair.value.clone())
    };
    if let Some(found) = value(TABLE_KEY).filter(|found| found != R::TABLE) {
        return Err(Error::WrongTable { file: path.to_owned(), found, expected: R::TABLE });
    }
    let newer = |found: &String| found.parse::<u32>().map_or(true, |version| version > SCHEMA_VERSION);
    match value(VERSION_KEY).filter(newer) {
        Some(found) => Err(Error::NewerSchema { file: path.to_owned(), found }),
        None => Ok(()),
    }
}
