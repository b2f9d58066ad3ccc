//! Files that change after they were committed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use mempo_run::{seed_of, verify};

use super::Bench;
use crate::chain::Stage;

/// Cuts of one file, at most: all its lengths, or as many evenly.
const MOST_CUTS: usize = 20_000;

/// Flips single bits and cuts files of a finished stage, `count` times each, one file after the other; `verify` must notice
/// each time. How many were tried.
pub fn damage_trial(bench: &Bench, stage: &Stage, seed: u64, count: u64) -> anyhow::Result<u64> {
    let copy = Copy::new(bench, stage)?;
    let mut tried = 0;
    for trial in 0..count {
        let name = &copy.names[(trial % copy.names.len() as u64) as usize];
        let whole = fs_err::read(copy.path.join(name))?;
        if whole.is_empty() {
            continue;
        }
        let draw = |what: &str| seed_of(seed, &["damage", what, name, &trial.to_string()]) as usize;
        let (place, bit, length) = (draw("place") % whole.len(), draw("bit") % 8, draw("length") % whole.len());
        let mut flipped = whole.clone();
        flipped[place] ^= 1 << bit;
        copy.must_notice(name, &flipped, &format!("bit {bit} of byte {place}"))?;
        copy.must_notice(name, &whole[..length], &format!("cut to {length}"))?;
        fs_err::write(copy.path.join(name), &whole)?;
        tried += 2;
    }
    Ok(tried)
}

/// Cuts the smallest file of each kind to all its lengths; how many were tried.
pub fn cut_trial(bench: &Bench, stage: &Stage) -> anyhow::Result<u64> {
    let copy = Copy::new(bench, stage)?;
    let mut smallest: BTreeMap<Option<&OsStr>, (u64, &str)> = BTreeMap::new();
    for name in &copy.names {
        let size = fs_err::metadata(copy.path.join(name))?.len();
        let kind = smallest.entry(Path::new(name).extension()).or_insert((size, name));
        *kind = (*kind).min((size, name));
    }
    let mut tried = 0;
    for (_, name) in smallest.into_values() {
        let whole = fs_err::read(copy.path.join(name))?;
        for length in (0..whole.len()).step_by(whole.len().div_ceil(MOST_CUTS).max(1)) {
            copy.must_notice(name, &whole[..length], &format!("cut to {length}"))?;
            tried += 1;
        }
        fs_err::write(copy.path.join(name), &whole)?;
    }
    Ok(tried)
}

/// The files of a finished stage in another folder, which is removed with it.
struct Copy {
    path: PathBuf,
    /// Of all files, the manifest last.
    names: Vec<String>,
}

impl Copy {
    fn new(bench: &Bench, stage: &Stage) -> anyhow::Result<Self> {
        let manifest = verify(&bench.path(&stage.out))?;
        let path = bench.path(&format!("damaged-{}", stage.out));
        super::remove(&path)?;
        let names = manifest.files.into_iter().map(|file| file.path).chain(["manifest.json".to_owned()]);
        let copy = Self { path, names: names.collect() };
        for name in &copy.names {
            let to = copy.path.join(name);
            fs_err::create_dir_all(to.parent().context("a file lies in a folder")?)?;
            fs_err::copy(bench.path(&stage.out).join(name), to)?;
        }
        verify(&copy.path)?;
        Ok(copy)
    }

    /// Gives a file other bytes, which `verify` must notice and name.
    fn must_notice(&self, name: &str, damaged: &[u8], what: &str) -> anyhow::Result<()> {
        fs_err::write(self.path.join(name), damaged)?;
        let told = verify(&self.path).err().with_context(|| format!("{name}: {what} is not noticed"))?;
        let told = format!("{told:#}");
        ensure!(told.contains(name), "{name}: {what} is noticed, but it is not named: {told}");
        Ok(())
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = super::remove(&self.path);
    }
}
