//! How long a search among vectors takes: `nearest FOLDER COUNT SIZE` writes COUNT made-up vectors of SIZE numbers into FOLDER,
//! searches them for 1 and for 32 queries, and says how many seconds that took, and of CPU (Linux), which other work beside it leaves as
//! it is.

#![allow(clippy::print_stdout, reason = "a measurement is printed")]

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use mempo_model::{DeviceOptions, Embeddings, Vectors, counter_uniform, write_vectors};

const PART: usize = 10_000;

fn made_up(seed: u64, count: usize, size: usize) -> Embeddings {
    let numbers: Vec<f32> = (0..count * size).map(|i| counter_uniform(seed, i as u64) - 0.5).collect();
    Embeddings::new(&numbers, size)
}

/// Seconds that all threads of this process have computed, in hundredths.
fn cpu_seconds() -> anyhow::Result<f64> {
    let stat = fs_err::read_to_string("/proc/self/stat")?;
    // After the name, which may hold anything: user and system time are the twelfth and thirteenth.
    let numbers = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks = numbers.skip(11).take(2).map(|ticks| Ok(ticks.parse::<u32>()?)).sum::<anyhow::Result<u32>>()?;
    Ok(f64::from(ticks) / 100.0)
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().context("usage: nearest FOLDER COUNT SIZE");
    let (folder, count, size) = (PathBuf::from(next()?), next()?.parse::<usize>()?, next()?.parse::<usize>()?);
    let runtime = DeviceOptions::default().resolve()?;
    fs_err::create_dir_all(&folder)?;
    let mut paths = Vec::new();
    for part in 0..count.div_ceil(PART) {
        let path = folder.join(format!("{part:05}.safetensors"));
        write_vectors(&[made_up(part as u64, PART.min(count - part * PART), size)], &mut fs_err::File::create(&path)?)?;
        paths.push(path);
    }
    let vectors = Vectors::open(&paths, size as i64, runtime.device)?;
    for queries in [1, 1, 32] {
        let queries = made_up(u64::MAX, queries, size);
        let (start, computed) = (Instant::now(), cpu_seconds()?);
        let found = vectors.nearest(&[queries], 10).len();
        let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds()? - computed);
        println!("{found} queries, {count} vectors of {size}: {wall:.2} s, {cpu:.2} s of CPU");
    }
    Ok(())
}
