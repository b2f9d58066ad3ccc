//! Work cut into shards.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use mempo_run::{Manifest, finished, verify};

use super::{Bench, Trial};
use crate::chain::Stage;

/// Runs a stage in `count` shards, last one first: their parts together have to be those of the whole, and as long as one
/// is missing it has to be named. Whether the stage can be cut at all.
pub fn shard_trial(bench: &Bench, stage: &Stage, count: usize) -> anyhow::Result<bool> {
    let trial = Trial::new(bench, stage, &format!("shards-{count}"))?;
    for index in (0..count).rev() {
        let status = bench.command(&format!("{} --shard {index}/{count}", trial.line)).status()?;
        if status.code() == Some(2) && index + 1 == count {
            return Ok(false);
        }
        ensure!(status.success(), "`{}` as shard {index}/{count}: {status}", trial.line);
        if index > 0 {
            let told = finished(&trial.out).err().context("shards are missing, and nobody notices")?.to_string();
            ensure!(told.contains(&format!("missing shard-0-of-{count}")), "a missing shard is not named: {told}");
        }
    }
    let (whole, shards) = (verify(&bench.path(&stage.out))?, verify(&trial.out)?);
    ensure!(whole.rows == shards.rows, "{}: rows {:?}, not {:?}", trial.line, shards.rows, whole.rows);
    ensure!(tables(&whole) == tables(&shards), "{} in {count} shards gives other bytes", trial.line);
    Ok(true)
}

/// Digests of the parts of tables, by their names inside the shard.
fn tables(manifest: &Manifest) -> BTreeMap<String, &str> {
    let parts = manifest.files.iter().filter(|file| file.path.ends_with(".parquet"));
    let inner = |path: &str| match path.split_once('/') {
        Some((folder, inner)) if folder.starts_with("shard-") => inner.to_owned(),
        _ => path.to_owned(),
    };
    parts.map(|file| (inner(&file.path), file.sha256.as_str())).collect()
}
