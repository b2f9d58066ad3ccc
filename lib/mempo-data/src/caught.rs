//! The Parquet library panics on some damage that its own checks let through: here such a panic becomes an error, and says
//! nothing on the terminal by itself. And a few kilobytes may stand for terabytes, as one long value repeated: reading is given
//! up when it takes too much memory.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use arrow::record_batch::RecordBatch;
use mempo_guard::{Bounds, bounded};
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::errors::{ParquetError, Result};

/// What reading the end of a file, or one batch, may take.
const BOUNDS: Bounds = Bounds { time: None, memory: 4 << 30, stack: 8 << 20 };

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// A reader of any Parquet file, by its own schema alone: the Arrow schema that writers may leave beside it is not checked by
/// the library before it is taken apart.
pub fn parquet_builder(file: std::fs::File) -> Result<ParquetRecordBatchReaderBuilder<std::fs::File>> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    guarded(|| ParquetRecordBatchReaderBuilder::try_new_with_options(file, options))?
}

/// The batches of a reader, one after the other; after an error there are no more.
pub fn parquet_batches(
    builder: ParquetRecordBatchReaderBuilder<std::fs::File>,
) -> Result<impl Iterator<Item = Result<RecordBatch>>> {
    batches_within(BOUNDS, builder)
}

fn batches_within(
    bounds: Bounds,
    builder: ParquetRecordBatchReaderBuilder<std::fs::File>,
) -> Result<impl Iterator<Item = Result<RecordBatch>>> {
    let mut reader: Option<ParquetRecordBatchReader> = Some(within(&bounds, || builder.build())??);
    Ok(std::iter::from_fn(move || {
        let mut batches = reader.take()?;
        match within(&bounds, move || (batches.next(), batches)) {
            Ok((Some(Ok(batch)), batches)) => {
                reader = Some(batches);
                Some(Ok(batch))
            }
            Ok((Some(Err(error)), _)) => Some(Err(error.into())),
            Ok((None, _)) => None,
            Err(error) => Some(Err(error)),
        }
    }))
}

/// What `read` gives; an error if it panics or takes too much memory.
pub(crate) fn guarded<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    within(&BOUNDS, read)
}

fn within<T: Send + 'static>(bounds: &Bounds, read: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    bounded(bounds, || caught(read)).map_err(|given_up| ParquetError::General(given_up.to_string()))?
}

/// What `read` gives, or its panic as an error.
fn caught<T>(read: impl FnOnce() -> T) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            if !IS_CAUGHT.get() {
                before(panic);
            }
        }));
    });
    let outer = IS_CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    IS_CAUGHT.set(outer);
    result.map_err(|_| ParquetError::General("damaged: the reader gave up".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringArray};
    use parquet::arrow::ArrowWriter;
    use parquet::file::properties::WriterProperties;

    use super::*;

    /// Some kilobytes that stand for half a gigabyte: one long value, and 64 times its number in a dictionary.
    #[test]
    fn a_value_that_is_repeated_too_often_is_given_up() {
        let long = "x".repeat(8 << 20);
        let column: ArrayRef = Arc::new(StringArray::from(vec![long.as_str(); 64]));
        let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
        let properties = WriterProperties::builder()
            .set_dictionary_page_size_limit(64 << 20)
            .set_compression(parquet::basic::Compression::ZSTD(parquet::basic::ZstdLevel::default()))
            .build();
        let file = tempfile::tempfile().unwrap();
        let mut writer = ArrowWriter::try_new(file.try_clone().unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        drop(batch);
        assert!(file.metadata().unwrap().len() < 100_000);
        let read = |memory: u64| {
            let builder = parquet_builder(file.try_clone().unwrap()).unwrap();
            batches_within(Bounds { memory, ..BOUNDS }, builder).unwrap().collect::<Vec<_>>()
        };
        let found = read(128 << 20);
        assert!(found.len() == 1 && found[0].as_ref().unwrap_err().to_string().contains("128 MiB"), "{found:?}");
        assert_eq!(read(4 << 30)[0].as_ref().unwrap().num_rows(), 64);
    }
}
