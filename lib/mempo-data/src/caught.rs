//! The Parquet library panics on some damage that its own checks let through: here such a panic becomes an error, and says
//! nothing on the terminal by itself.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use arrow::record_batch::RecordBatch;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::errors::{ParquetError, Result};

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// A reader of any Parquet file, by its own schema alone: the Arrow schema that writers may leave beside it is not checked by
/// the library before it is taken apart.
pub fn parquet_builder(file: std::fs::File) -> Result<ParquetRecordBatchReaderBuilder<std::fs::File>> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    caught(|| ParquetRecordBatchReaderBuilder::try_new_with_options(file, options))?
}

/// The batches of a reader, one after the other; after an error there are no more.
pub fn parquet_batches(
    builder: ParquetRecordBatchReaderBuilder<std::fs::File>,
) -> Result<impl Iterator<Item = Result<RecordBatch>>> {
    let mut reader: Option<ParquetRecordBatchReader> = Some(caught(|| builder.build())??);
    Ok(std::iter::from_fn(move || {
        let batches = reader.as_mut()?;
        let batch = caught(|| batches.next()).map(Option::transpose);
        let batch = batch.and_then(|batch| Ok(batch?)).transpose();
        if !matches!(batch, Some(Ok(_))) {
            reader = None;
        }
        batch
    }))
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
