//! Files that change after they were committed.

use anyhow::{Context, ensure};
use mempo_run::{seed_of, verify};

use super::Bench;
use crate::chain::Stage;

/// Flips single bits and cuts files of a finished stage, `count` times each, one file after the other; `verify` must notice
/// each time. How many were tried.
pub fn damage_trial(bench: &Bench, stage: &Stage, seed: u64, count: u64) -> anyhow::Result<u64> {
    let manifest = verify(&bench.path(&stage.out))?;
    let copy = bench.path(&format!("damaged-{}", stage.out));
    super::remove(&copy)?;
    let names = manifest.files.iter().map(|file| file.path.as_str()).chain(["manifest.json"]);
    let names: Vec<&str> = names.collect();
    for name in &names {
        let to = copy.join(name);
        fs_err::create_dir_all(to.parent().context("a file lies in a folder")?)?;
        fs_err::copy(bench.path(&stage.out).join(name), to)?;
    }
    verify(&copy)?;
    let mut tried = 0;
    for trial in 0..count {
        let name = names[(trial % names.len() as u64) as usize];
        let path = copy.join(name);
        let whole = fs_err::read(&path)?;
        if whole.is_empty() {
            continue;
        }
        let draw = |what: &str| seed_of(seed, &["damage", what, name, &trial.to_string()]) as usize;
        let (place, bit, length) = (draw("place") % whole.len(), draw("bit") % 8, draw("length") % whole.len());
        let mut flipped = whole.clone();
        flipped[place] ^= 1 << bit;
        for (what, damaged) in
            [(format!("bit {bit} of byte {place}"), &flipped[..]), (format!("cut to {length}"), &whole[..length])]
        {
            fs_err::write(&path, damaged)?;
            let told = verify(&copy).err().with_context(|| format!("{}/{name}: {what} is not noticed", stage.out))?;
            let told = format!("{told:#}");
            ensure!(told.contains(name), "{name}: {what} is noticed, but it is not named: {told}");
            tried += 1;
        }
        fs_err::write(&path, &whole)?;
    }
    super::remove(&copy)?;
    Ok(tried)
}
