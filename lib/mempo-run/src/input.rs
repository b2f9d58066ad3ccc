//! What a stage reads: where it is, that it is whole, and the digest that stands for its content.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;
use serde::Serialize;

use crate::{FileRecord, InputRecord, Manifest, ResultExt, Run, StageArgs, check, difference, digest, manifest};

static TRUSTED: AtomicBool = AtomicBool::new(false);

/// From now on takes the bytes of what stages wrote to be as their manifests say; only sizes are compared.
pub(crate) fn trust_stages() {
    TRUSTED.store(true, Ordering::Relaxed);
}

/// Something that a stage reads.
#[derive(Debug, Clone)]
pub struct Input {
    name: &'static str,
    dir: PathBuf,
    digest: String,
    manifest: Option<Manifest>,
    /// Whether `dir` as a whole is the input, so that nothing may be written into it.
    is_whole_dir: bool,
    /// Whether the bytes were read to make the digest, and not only looked up in the manifest.
    is_hashed: bool,
}

impl Input {
    /// The output of a finished stage, or a complete set of its shards, with every byte as it was written.
    pub fn stage(name: &'static str, dir: &Path) -> anyhow::Result<Self> {
        let is_hashed = !TRUSTED.load(Ordering::Relaxed);
        let manifest = check::compare(dir, is_hashed)?;
        // A shard's files count by their names inside it: how the work was cut does not matter.
        let inner = |file: &FileRecord| match file.path.split_once('/') {
            Some((folder, inner)) if crate::Shard::of_folder(folder).is_some() => inner.to_owned(),
            _ => file.path.clone(),
        };
        let names: Vec<String> = manifest.files.iter().map(inner).collect();
        let digests = manifest.files.iter().map(|file| file.sha256.as_str());
        let digest = digest::of_pairs(names.iter().map(String::as_str).zip(digests));
        Ok(Self { name, dir: dir.to_owned(), digest, manifest: Some(manifest), is_whole_dir: true, is_hashed })
    }

    /// Plain files, in any order.
    pub fn files(name: &'static str, paths: &[PathBuf]) -> anyhow::Result<Self> {
        let records = paths.iter().map(|path| record(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let dir = paths.first().and_then(|path| path.parent()).unwrap_or(Path::new("")).to_owned();
        Ok(Self { name, dir, digest: digest_of(&records), manifest: None, is_whole_dir: false, is_hashed: true })
    }

    /// A Hugging Face model directory: configuration, weights and their index, tokenizer files, chat template.
    ///
    /// Where a stage wrote it, it must be finished, and these files as they were written.
    pub fn model(name: &'static str, dir: &Path) -> anyhow::Result<Self> {
        if !dir.join("config.json").is_file() {
            let error = anyhow!("{}: no config.json, expected a Hugging Face model directory", dir.display());
            return Err(error).bad_input();
        }
        let manifest = Manifest::read(dir)?;
        if manifest.is_none() && Run::read(dir)?.is_some() {
            check::finished(dir)?;
        }
        let files = manifest.iter().flat_map(|manifest| &manifest.files);
        let removed: Vec<FileRecord> = files.filter(|file| file.removed && matters(&file.path)).cloned().collect();
        let mut paths = Vec::new();
        for entry in fs_err::read_dir(dir).bad_input()? {
            let entry = entry.bad_input()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // A folder may be called `tokenizer`; a pipe or device in the place of a file is refused when it is read.
            if matters(&name) && !entry.path().is_dir() && removed.iter().all(|file| file.path != name) {
                paths.push(entry.path());
            }
        }
        let is_hashed = manifest.is_none() || !TRUSTED.load(Ordering::Relaxed);
        let known = manifest.as_ref().filter(|_| !is_hashed);
        let record = |path| known.map_or_else(|| record(path), |manifest| record_from(manifest, path));
        let mut records = paths.iter().map(|path| record(path)).collect::<anyhow::Result<Vec<_>>>()?;
        records.extend(removed);
        if !records.iter().any(|file| is_weights(Path::new(&file.path))) {
            return Err(anyhow!("{}: no *.safetensors, expected the model's weights", dir.display())).bad_input();
        }
        if let Some(manifest) = &manifest {
            compare(dir, manifest, &records)?;
        }
        Ok(Self { name, dir: dir.to_owned(), digest: digest_of(&records), manifest, is_whole_dir: true, is_hashed })
    }

    /// The parts of a table, in the order of their rows.
    pub fn table(&self, table: &str) -> anyhow::Result<Vec<PathBuf>> {
        let files = self.manifest.iter().flat_map(|manifest| &manifest.files);
        let mut parts: Vec<(usize, &str, &str)> = files.filter_map(|file| part_of(&file.path, table)).collect();
        if parts.is_empty() {
            let error = anyhow!("{}: no table `{table}`, expected {table}/part-*.parquet", self.dir.display());
            return Err(error).bad_input();
        }
        // Shards hold consecutive units; past unit 99999 names grow longer.
        parts.sort_by_key(|(shard, name, _)| (*shard, name.len(), *name));
        Ok(parts.into_iter().map(|(_, _, path)| self.dir.join(path)).collect())
    }

    /// Lower-case hexadecimal SHA-256 over the sorted (name, SHA-256) pairs of the files that matter.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The directory; of plain files, that of the first.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest, if a stage wrote the input.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The digest of what the stage that wrote the input read under this name.
    pub fn made_from(&self, name: &str) -> Option<&str> {
        self.manifest.as_ref()?.made_from(name)
    }

    /// Refuses what was not made from `source`, which the stage that wrote it read under the name `name`: rows of other
    /// tables may have the same keys. `stage` is the command that makes it.
    pub fn check_made_from(&self, name: &str, source: &Input, stage: &str) -> anyhow::Result<()> {
        if self.made_from(name) == Some(source.digest()) {
            return Ok(());
        }
        let (dir, from) = (self.dir.display(), source.dir.display());
        Err(anyhow!("{dir}: not made from {from}: run `{stage} --{name} {from}`")).bad_input()
    }

    /// Refuses what was not made by the same work as a stage is to do, so that rows of both can stand together. `except` are
    /// settings that may differ: arguments by their names in the manifest, inputs as `content of --NAME`.
    pub fn check_same_work(
        &self,
        args: &StageArgs,
        arguments: &impl Serialize,
        inputs: &[&Input],
        except: &[&str],
    ) -> anyhow::Result<()> {
        let dir = self.dir.display();
        let Some(manifest) = &self.manifest else { return Err(anyhow!("{dir}: no stage made it")).bad_input() };
        let run = Run::new((&manifest.program, &manifest.stage), args, arguments, inputs)?;
        let mut differences = difference::between(&manifest.run, &run);
        differences.retain(|line| except.iter().all(|name| line.split(": ").next() != Some(*name)));
        if differences.is_empty() {
            return Ok(());
        }
        let differences = differences.join("\n  ");
        Err(anyhow!("{dir} was made with other arguments or inputs (there -> here):\n  {differences}")).usage()
    }

    /// Refuses a model directory whose weights were removed: its digest is known, but nothing can be made from it.
    pub(crate) fn refuse_thinned(&self) -> anyhow::Result<()> {
        let removed = self.manifest.as_ref().and_then(|manifest| manifest.removed(matters));
        removed.map_or(Ok(()), |file| {
            Err(anyhow!("{}: {file} was removed to free disk; use a checkpoint that was kept", self.dir.display()))
                .bad_input()
        })
    }

    /// What is written about the input into the run's records.
    pub(crate) fn to_record(&self) -> InputRecord {
        let path = self.dir.display().to_string();
        InputRecord { name: self.name.to_owned(), digest: self.digest.clone(), path, is_trusted: !self.is_hashed }
    }

    /// Whether writing to `out` would change the input.
    pub(crate) fn holds(&self, out: &Path) -> bool {
        let (Ok(dir), Ok(out)) = (fs_err::canonicalize(&self.dir), std::path::absolute(out)) else {
            return false;
        };
        // The output may not exist yet, but the folders above it can be compared.
        let mut above = out.ancestors().filter_map(|folder| fs_err::canonicalize(folder).ok());
        self.is_whole_dir && above.any(|folder| folder == dir)
    }
}

/// Shard, name and path of a table's part.
fn part_of<'a>(path: &'a str, table: &str) -> Option<(usize, &'a str, &'a str)> {
    let (shard, inner) = match path.split_once('/') {
        Some((folder, inner)) => crate::Shard::of_folder(folder).map_or((0, path), |shard| (shard.index, inner)),
        None => (0, path),
    };
    let name = inner.strip_prefix(table)?.strip_prefix('/')?;
    (name.starts_with("part-") && name.ends_with(".parquet")).then_some((shard, name, path))
}

fn record(path: &Path) -> anyhow::Result<FileRecord> {
    let (size, sha256) = digest::of_file(path).bad_input()?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(FileRecord { path: name, size, sha256, removed: false })
}

/// The record of a file as the stage that wrote it left it, if the size is still that.
fn record_from(manifest: &Manifest, path: &Path) -> anyhow::Result<FileRecord> {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let known = manifest.files.iter().find(|file| file.path == name);
    let size = fs_err::metadata(path).bad_input()?.len();
    known.filter(|file| file.size == size).cloned().map_or_else(|| record(path), Ok)
}

fn digest_of(records: &[FileRecord]) -> String {
    digest::of_pairs(records.iter().map(|file| (file.path.as_str(), file.sha256.as_str())))
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors")
}

/// Whether a file of a model directory, by its path in there, changes what the model does.
fn matters(name: &str) -> bool {
    const NAMES: [&str; 6] = [
        "config.json",
        "generation_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
    ];
    let top_level = !name.contains('/');
    top_level
        && (NAMES.contains(&name)
            || is_weights(Path::new(name))
            || name.ends_with(".safetensors.index.json")
            || name.starts_with("tokenizer")
            || name.starts_with("chat_template"))
}

impl Manifest {
    /// The digest that [`Input::model`] finds for the model directory that this is the manifest of, nothing read.
    pub fn model_digest(&self) -> String {
        let files: Vec<FileRecord> = self.files.iter().filter(|file| matters(&file.path)).cloned().collect();
        digest_of(&files)
    }
}

/// The files that matter against the manifest of the stage that wrote them.
fn compare(dir: &Path, manifest: &Manifest, records: &[FileRecord]) -> anyhow::Result<()> {
    let expected = manifest.files.iter().filter(|file| matters(&file.path));
    let mut expected: Vec<&FileRecord> = expected.collect();
    let mut found: Vec<&FileRecord> = records.iter().collect();
    expected.sort_by_key(|file| &file.path);
    found.sort_by_key(|file| &file.path);
    if expected == found {
        return Ok(());
    }
    let differing = expected.iter().filter(|file| !found.contains(file)).map(|file| &file.path);
    let added = found.iter().filter(|file| expected.iter().all(|other| other.path != file.path)).map(|file| &file.path);
    let names = differing.chain(added).cloned().collect::<Vec<_>>().join(", ");
    let error = anyhow!("{}: {names} not as in {}; copy or make it again", dir.display(), manifest::MANIFEST);
    Err(error).bad_input()
}
