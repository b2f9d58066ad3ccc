//! Finished directories: finding the manifest, or those of all shards, and comparing the files with it.

use std::path::{Component, Path, PathBuf};

use anyhow::anyhow;
use serde_json::Value;

use crate::{FileRecord, Manifest, ResultExt, Run, Shard, difference, digest, durable, manifest, status};

/// The manifest of a finished stage, its files not looked at; that of a complete set of shards is theirs together, with paths from `dir`.
pub fn finished(dir: &Path) -> anyhow::Result<Manifest> {
    if !dir.is_dir() {
        return Err(anyhow!("{}: no such directory, expected the output of a stage", dir.display())).bad_input();
    }
    if let Some(manifest) = Manifest::read(dir)? {
        return Ok(manifest);
    }
    let shards = shards(dir)?;
    if shards.is_empty() {
        return Err(unfinished(dir)).bad_input();
    }
    complete(dir, &shards)
}

/// Whether a stage has begun in a directory and not ended.
pub fn is_under_way(dir: &Path) -> anyhow::Result<bool> {
    Ok(Manifest::read(dir)?.is_none() && Run::read(dir)?.is_some())
}

/// Why a directory without a manifest is no input.
fn unfinished(dir: &Path) -> anyhow::Error {
    match Run::read(dir) {
        Ok(Some(run)) => {
            let (program, stage) = (run.program, run.stage);
            anyhow!("{}: not finished; run its `{program} {stage}` command again to finish it", dir.display())
        }
        _ => anyhow!("{}: no {}, expected the output of a finished stage", dir.display(), manifest::MANIFEST),
    }
}

/// The shards that have a folder in a directory, sorted.
pub(crate) fn shards(dir: &Path) -> anyhow::Result<Vec<Shard>> {
    let mut shards = Vec::new();
    for entry in fs_err::read_dir(dir).bad_input()? {
        shards.extend(Shard::of_folder(&entry.bad_input()?.file_name().to_string_lossy()));
    }
    shards.sort_by_key(|shard| (shard.count, shard.index));
    Ok(shards)
}

/// The manifests of all shards together, if they are all there and of one kind.
fn complete(dir: &Path, found: &[Shard]) -> anyhow::Result<Manifest> {
    let count = found[0].count;
    if let Some(other) = found.iter().find(|shard| shard.count != count) {
        let (first, second) = (found[0].folder(), other.folder());
        let error =
            anyhow!("{}: holds {first} and {second}, expected shards of one set; remove the others", dir.display());
        return Err(error).bad_input();
    }
    let mut manifests = Vec::new();
    let mut missing = Vec::new();
    for shard in (0..count).map(|index| Shard { index, count }) {
        let folder = dir.join(shard.folder());
        match Manifest::read(&folder)? {
            Some(manifest) => manifests.push((shard, manifest)),
            None if folder.is_dir() => missing.push(format!("{} (not finished)", shard.folder())),
            None => missing.push(shard.folder()),
        }
    }
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(anyhow!("{}: missing {missing}; run them with --shard", dir.display())).bad_input();
    }
    agree(dir, &manifests)?;
    join(manifests).ok_or_else(|| unfinished(dir)).bad_input()
}

/// Shards must come from one command, except for which shard they are.
fn agree(dir: &Path, manifests: &[(Shard, Manifest)]) -> anyhow::Result<()> {
    let (first, expected) = &manifests[0];
    for (shard, manifest) in manifests {
        let mut differences = difference::between(&expected.run, &manifest.run);
        if (&expected.program, &expected.stage) != (&manifest.program, &manifest.stage) {
            differences.insert(0, "program and stage".to_owned());
        }
        if manifest.shard != Some(*shard) {
            differences.insert(0, format!("says that it is shard {:?}", manifest.shard));
        }
        if !differences.is_empty() {
            let (folder, first, differences) = (shard.folder(), first.folder(), differences.join("; "));
            let error = anyhow!("{}: {folder} differs from {first}: {differences}; run it again", dir.display());
            return Err(error).bad_input();
        }
    }
    Ok(())
}

/// One manifest for all shards.
fn join(manifests: Vec<(Shard, Manifest)>) -> Option<Manifest> {
    let mut all = manifests.first()?.1.clone();
    all.run.shard = None;
    all.files.clear();
    all.rows.clear();
    all.wall_seconds = 0.0;
    let mut summaries = Vec::new();
    for (shard, manifest) in manifests {
        let folder = shard.folder();
        all.files.extend(
            manifest.files.into_iter().map(|file| FileRecord { path: format!("{folder}/{}", file.path), ..file }),
        );
        for (table, rows) in manifest.rows {
            *all.rows.entry(table).or_default() += rows;
        }
        all.wall_seconds += manifest.wall_seconds;
        all.peak_memory_bytes = all.peak_memory_bytes.max(manifest.peak_memory_bytes);
        summaries.push(manifest.summary);
    }
    all.summary = Value::Array(summaries);
    Some(all)
}

/// Where a file of a manifest is, which must not lead out of the directory.
pub(crate) fn inside(dir: &Path, file: &FileRecord) -> anyhow::Result<PathBuf> {
    let relative = Path::new(&file.path);
    if relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(dir.join(relative));
    }
    Err(anyhow!("{}: the manifest names a file outside, `{}`", dir.display(), file.path)).bad_input()
}

/// What a file's record does not allow, if anything. With `deep` its bytes are compared, too, not only its size.
pub(crate) fn problem(dir: &Path, file: &FileRecord, deep: bool) -> Option<String> {
    let path = match inside(dir, file) {
        Ok(path) => path,
        Err(error) => return Some(error.to_string()),
    };
    if file.removed {
        return path.exists().then(|| format!("{}: said to be removed, and there", path.display()));
    }
    let size = match digest::check_plain(&path).and_then(|()| fs_err::metadata(&path)) {
        Ok(metadata) => metadata.len(),
        Err(error) => return Some(error.to_string()),
    };
    if size != file.size {
        return Some(format!("{}: {size} bytes, expected {}", path.display(), file.size));
    }
    if !deep {
        return None;
    }
    match digest::of_file(&path) {
        Ok((_, sha256)) if sha256 == file.sha256 => None,
        Ok((_, sha256)) => Some(format!("{}: SHA-256 {sha256}, expected {}", path.display(), file.sha256)),
        Err(error) => Some(error.to_string()),
    }
}

/// Problems that are told one by one.
const TOLD: usize = 20;

/// Compares every file of a finished directory with its manifest; an error names what differs.
pub fn verify(dir: &Path) -> anyhow::Result<Manifest> {
    compare(dir, true)
}

/// The same, of the files' bytes only if it is to be `deep`.
pub(crate) fn compare(dir: &Path, deep: bool) -> anyhow::Result<Manifest> {
    let manifest = finished(dir)?;
    let mut problems: Vec<String> = manifest.files.iter().filter_map(|file| problem(dir, file, deep)).collect();
    problems.extend(strangers(dir, &manifest)?);
    if problems.is_empty() {
        return Ok(manifest);
    }
    let more = problems.len().saturating_sub(TOLD);
    let told = problems[..problems.len() - more].join("\n  ");
    let more = if more == 0 { String::new() } else { format!("\n  and {more} more") };
    Err(anyhow!("{} is damaged; copy or make it again:\n  {told}{more}", dir.display())).bad_input()
}

/// Table parts that are not in the manifest: tools that read whole folders would take them in.
fn strangers(dir: &Path, manifest: &Manifest) -> anyhow::Result<Vec<String>> {
    let files = list_files(dir).bad_input()?;
    let parts =
        files.into_iter().filter(|path| Path::new(path).extension().is_some_and(|extension| extension == "parquet"));
    let strange = parts.filter(|path| manifest.files.iter().all(|file| file.path != *path));
    Ok(strange.map(|path| format!("{}: not in the manifest", dir.join(path).display())).collect())
}

/// The files below a stage's directory that belong to its result, as sorted relative paths with `/`.
pub(crate) fn list_files(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut files = Vec::new();
    collect(dir, "", &mut files)?;
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, prefix: &str, files: &mut Vec<String>) -> std::io::Result<()> {
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        if !belongs(&path, &name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &format!("{path}/"), files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Whether a path is part of the result: not the books of the run, nor what differs between equal runs.
fn belongs(path: &str, name: &str) -> bool {
    const BOOKS: [&str; 7] =
        [manifest::RUN, manifest::MANIFEST, "timings.jsonl", status::NAME, "logs", "tensorboard", manifest::RESUME];
    let is_log = Path::new(name).extension().is_some_and(|extension| extension == "log");
    !BOOKS.contains(&path) && !name.starts_with('.') && !is_log && !durable::is_temporary(name)
}
