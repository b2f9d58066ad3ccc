//! The one place that speaks SQL: tables of finished stages through DataFusion.
//!
//! Queries select, join and order; they never add floats, whose sum would depend on the order of partitions.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{SessionConfig, SessionContext, col};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

/// Small batches: what an operator holds at least is a few of them.
const BATCH_ROWS: usize = 1024;

/// A session and what runs it.
pub(crate) struct Session {
    runtime: Runtime,
    context: SessionContext,
}

impl Session {
    /// A session that spills to disk above `memory_bytes`. Joins merge their inputs, which are sorted as they lie on
    /// disk: hash joins can't spill. That takes at least two partitions.
    pub(crate) fn new(memory_bytes: usize) -> anyhow::Result<Self> {
        let config = SessionConfig::new()
            .with_target_partitions(2)
            .with_batch_size(BATCH_ROWS)
            .with_sort_spill_reservation_bytes(memory_bytes / 16)
            .set_bool("datafusion.optimizer.prefer_existing_sort", true)
            .set_bool("datafusion.optimizer.prefer_hash_join", false)
            .set_bool("datafusion.execution.parquet.schema_force_view_types", false);
        let environment =
            RuntimeEnvBuilder::new().with_memory_pool(Arc::new(FairSpillPool::new(memory_bytes))).build_arc()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        Ok(Self { runtime, context: SessionContext::new_with_config_rt(config, environment) })
    }

    /// Makes one of our tables known by its name, as sorted by its key columns.
    pub(crate) fn register(&self, table: &str, files: &[PathBuf], key: &[&str]) -> anyhow::Result<()> {
        let urls = files.iter().map(|file| file_url(file)).collect::<anyhow::Result<Vec<_>>>()?;
        let order = key.iter().map(|column| col(*column).sort(true, false)).collect();
        let options = ListingOptions::new(Arc::new(ParquetFormat::default())).with_file_sort_order(vec![order]);
        let config = ListingTableConfig::new_with_multi_paths(urls)
            .with_listing_options(options)
            .with_schema(mempo_data::arrow_schema(table));
        self.context.register_table(table, Arc::new(ListingTable::try_new(config)?))?;
        Ok(())
    }

    /// Runs a query and gives its rows one by one, as they come.
    pub(crate) fn rows<T: DeserializeOwned>(
        &self,
        sql: &str,
    ) -> anyhow::Result<impl Iterator<Item = anyhow::Result<T>> + use<'_, T>> {
        let stream = self.runtime.block_on(async { self.context.sql(sql).await?.execute_stream().await })?;
        let batches = Batches { runtime: &self.runtime, stream };
        Ok(batches.flat_map(|batch| match batch.and_then(|batch| decode(&batch)) {
            Ok(rows) => rows.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        }))
    }
}

struct Batches<'a> {
    runtime: &'a Runtime,
    stream: SendableRecordBatchStream,
}

impl Iterator for Batches<'_> {
    type Item = anyhow::Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.runtime.block_on(self.stream.next());
        batch.map(|batch| batch.context("reading joined tables"))
    }
}

fn decode<T: DeserializeOwned>(batch: &RecordBatch) -> anyhow::Result<Vec<T>> {
    serde_arrow::from_record_batch(batch).context("decoding joined rows")
}

/// The file as a URL: a plain path would be read as a pattern if its name holds `*`, `?` or `[`.
fn file_url(file: &Path) -> anyhow::Result<ListingTableUrl> {
    let path = fs_err::canonicalize(file)?;
    let escaped = path.as_os_str().as_encoded_bytes().iter().map(|&byte| match byte {
        b'/' | b'-' | b'_' | b'.' | b'~' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    });
    Ok(ListingTableUrl::parse(format!("file://{}", escaped.collect::<String>()))?)
}

#[cfg(test)]
mod tests {
    use mempo_data::{Advantage, write_rows};
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Found {
        task_id: String,
        step_index: i32,
        other: Option<i32>,
    }

    fn rows(keep: impl Fn(i32) -> bool) -> Vec<Advantage> {
        let row = |number: i32| Advantage {
            task_id: format!("task-{:06}", number / 4),
            trajectory_index: 0,
            step_index: number % 4,
            trajectory_advantage: 0.0,
            memory_advantage: None,
            memory_start: Some(number),
            memory_end: None,
            loss_weight: 1.0,
        };
        (0..COUNT).filter(|number| keep(*number)).map(row).collect()
    }

    const COUNT: i32 = 240_000;

    #[test]
    fn joins_larger_than_memory_come_complete_and_in_order() {
        // Names that a pattern or a URL would read otherwise.
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, rows: &[Advantage]| {
            let path = folder.path().join(name);
            write_rows(rows, fs_err::File::create(&path).unwrap()).unwrap();
            path
        };
        let all = rows(|_| true);
        let (first, second) = all.split_at(COUNT as usize / 3);
        let files = [write("a [1]*.parquet", first), write("b%20?#.parquet", second)];
        // About 10 MiB on either side of the join.
        let sql = "SELECT a.task_id, a.step_index, b.memory_start AS other
            FROM advantages a LEFT JOIN (SELECT * FROM advantages WHERE memory_start % 3 = 0) b
            USING (task_id, trajectory_index, step_index) ORDER BY a.task_id, a.step_index";
        let session = Session::new(4 << 20).unwrap();
        session.register("advantages", &files, &["task_id", "trajectory_index", "step_index"]).unwrap();
        let found: Vec<Found> = session.rows(sql).unwrap().collect::<anyhow::Result<_>>().unwrap();
        assert_eq!(found.len(), all.len());
        for (found, row) in found.iter().zip(&all) {
            let other = row.memory_start.filter(|number| number % 3 == 0);
            assert_eq!((&found.task_id, found.step_index, found.other), (&row.task_id, row.step_index, other));
        }
    }
}
