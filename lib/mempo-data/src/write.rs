//! Rows into one Parquet file, a batch at a time. Equal rows give equal bytes: batches and row groups are cut by the
//! rows alone, and nothing about the time, the machine or the run goes into the file.

use std::io::Write;

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};
use serde_arrow::ArrayBuilder;

use crate::{Error, Key, Result, Row, SCHEMA_VERSION, TABLE_KEY, VERSION_KEY, arrow_schema};

/// Rows and bytes that become one Arrow batch: few enough that 32-bit offsets never overflow.
const BATCH_ROWS: usize = 1024;
const BATCH_BYTES: usize = 8 << 20;
/// Rows and bytes that become one Parquet row group.
const GROUP_ROWS: usize = 16 * BATCH_ROWS;
const GROUP_BYTES: usize = 8 * BATCH_BYTES;

/// Writes one Parquet file with the given rows, which must be sorted by key, and gives their number.
pub fn write_rows<R: Row>(rows: &[R], sink: impl Write + Send) -> Result<u64> {
    let mut writer = TableWriter::new(sink)?;
    for row in rows {
        writer.push(row)?;
    }
    writer.finish()
}

/// Writes one Parquet file row by row, for tables that do not fit into memory.
pub struct TableWriter<R: Row, W: Write + Send> {
    schema: SchemaRef,
    builder: ArrayBuilder,
    writer: ArrowWriter<W>,
    previous: Option<Key>,
    /// What waits in the builder.
    batch: Filling,
    /// What waits in the writer's row group.
    group: Filling,
    row_count: u64,
    row_type: std::marker::PhantomData<fn(&R)>,
}

/// Rows and bytes collected so far.
#[derive(Default)]
struct Filling {
    rows: usize,
    bytes: usize,
}

impl<R: Row, W: Write + Send> TableWriter<R, W> {
    /// Starts a file.
    pub fn new(sink: W) -> Result<Self> {
        let schema = arrow_schema(R::TABLE);
        let builder = ArrayBuilder::from_arrow(schema.fields()).map_err(|source| Error::Convert {
            table: R::TABLE,
            key: Key::of_id(""),
            source: Box::new(source),
        })?;
        let writer = ArrowWriter::try_new(sink, schema.clone(), Some(properties(R::TABLE))).map_err(failed::<R>)?;
        Ok(Self {
            schema,
            builder,
            writer,
            previous: None,
            batch: Filling::default(),
            group: Filling::default(),
            row_count: 0,
            row_type: std::marker::PhantomData,
        })
    }

    /// Adds a row; its key must come after the last one's.
    pub fn push(&mut self, row: &R) -> Result<()> {
        let key = row.key();
        check_order::<R>(self.previous.as_ref(), &key)?;
        self.builder.push(row).map_err(|source| Error::Convert {
            table: R::TABLE,
            key: key.clone(),
            source: Box::new(source),
        })?;
        self.previous = Some(key);
        self.batch.rows += 1;
        self.batch.bytes += row.size();
        self.row_count += 1;
        if self.batch.rows >= BATCH_ROWS || self.batch.bytes >= BATCH_BYTES {
            self.end_batch()?;
        }
        Ok(())
    }

    /// Writes what is left and the footer, flushes the sink, and gives the number of rows.
    pub fn finish(mut self) -> Result<u64> {
        self.end_batch()?;
        self.writer.finish().map_err(failed::<R>)?;
        self.writer.inner_mut().flush().map_err(|source| failed::<R>(ParquetError::External(Box::new(source))))?;
        Ok(self.row_count)
    }

    fn end_batch(&mut self) -> Result<()> {
        if self.batch.rows == 0 {
            return Ok(());
        }
        let arrays = self.builder.to_arrow().map_err(|source| Error::Convert {
            table: R::TABLE,
            key: self.previous.clone().unwrap_or_else(|| Key::of_id("")),
            source: Box::new(source),
        })?;
        let batch = RecordBatch::try_new(self.schema.clone(), arrays).map_err(|source| failed::<R>(source.into()))?;
        self.writer.write(&batch).map_err(failed::<R>)?;
        self.group.rows += self.batch.rows;
        self.group.bytes += self.batch.bytes;
        self.batch = Filling::default();
        if self.group.rows >= GROUP_ROWS || self.group.bytes >= GROUP_BYTES {
            self.writer.flush().map_err(failed::<R>)?;
            self.group = Filling::default();
        }
        Ok(())
    }
}

/// Refuses a key that may not come after the previous one.
pub(crate) fn check_order<R: Row>(previous: Option<&Key>, key: &Key) -> Result<()> {
    match previous {
        Some(previous) if previous > key => {
            Err(Error::Unsorted { table: R::TABLE, previous: previous.clone(), found: key.clone() })
        }
        Some(previous) if previous == key && !R::REPEATS => Err(Error::Duplicate { table: R::TABLE, key: key.clone() }),
        _ => Ok(()),
    }
}

/// An error from the sink of a table.
pub(crate) fn failed<R: Row>(source: ParquetError) -> Error {
    Error::Write { table: R::TABLE, source }
}

fn properties(table: &str) -> WriterProperties {
    let level = ZstdLevel::try_new(3).expect("3 is a zstd level");
    let metadata = vec![
        KeyValue::new(VERSION_KEY.to_owned(), SCHEMA_VERSION.to_string()),
        KeyValue::new(TABLE_KEY.to_owned(), table.to_owned()),
    ];
    WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_key_value_metadata(Some(metadata))
        // Groups are ended by hand, by rows and bytes.
        .set_max_row_group_row_count(None)
        .build()
}
