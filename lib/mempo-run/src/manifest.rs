//! What a run was started with (`run.json`) and what came of it (`manifest.json`, the commit).

use std::{collections::BTreeMap, io::Write, ops::Deref, path::Path};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Input, ResultExt, Shard, StageArgs, digest, durable};

/// Name of the file written when a stage begins.
pub(crate) const RUN: &str = "run.json";
/// Name of the file written when a stage is finished.
pub(crate) const MANIFEST: &str = "manifest.json";

/// Name of the folder that a stage continues from.
pub(crate) const RESUME: &str = "resume";

/// What a stage was started with; a run that continues must match it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Version of the tables.
    pub schema_version: u32,
    /// The program.
    pub program: String,
    /// Its version.
    pub program_version: String,
    /// The subcommand.
    pub stage: String,
    /// Which part of the work this is; null for all of it.
    pub shard: Option<Shard>,
    /// Seed of everything random.
    pub seed: u64,
    /// Resolved arguments.
    pub arguments: Value,
    /// What was read.
    pub inputs: Vec<InputRecord>,
}

/// One thing that a stage reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRecord {
    /// What the stage calls it.
    pub name: String,
    /// SHA-256 over the sorted (name, SHA-256) pairs of the files that matter.
    pub digest: String,
    /// Where it was; only told, never compared.
    pub path: String,
    /// Whether its bytes were taken to be as its own manifest says (`--trust-inputs`); only told, never compared.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_trusted: bool,
}

/// What a finished stage consists of. Fields of [`Run`] are its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the stage was started with.
    #[serde(flatten)]
    pub run: Run,
    /// Every file that belongs to it, sorted by path.
    pub files: Vec<FileRecord>,
    /// Rows of each table.
    pub rows: BTreeMap<String, u64>,
    /// What the stage has to say about its result; of shards, a list of theirs.
    pub summary: Value,
    /// Seconds that the last process worked on it.
    pub wall_seconds: f64,
    /// The most memory it had in RAM at a time (of shards, the largest); not known of what older versions wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
}

/// One file of a finished stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path inside the stage's directory, with `/`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal SHA-256.
    pub sha256: String,
    /// Whether it was removed later to free disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
}

impl Deref for Manifest {
    type Target = Run;

    fn deref(&self) -> &Run {
        &self.run
    }
}

impl Run {
    /// What a program's stage is to be started with.
    pub(crate) fn new(
        (program, stage): (&str, &str),
        args: &StageArgs,
        arguments: &impl Serialize,
        inputs: &[&Input],
    ) -> anyhow::Result<Self> {
        Ok(Self {
            schema_version: mempo_data::SCHEMA_VERSION,
            program: program.to_owned(),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            stage: stage.to_owned(),
            shard: args.shard,
            seed: args.seed,
            // As it is once it has been written and read, so that it can be compared with what is read later.
            arguments: serde_json::from_str(&serde_json::to_string(arguments)?)?,
            inputs: inputs.iter().map(|input| input.to_record()).collect(),
        })
    }

    /// Names this run's temporary files, so that only they are cleaned up.
    pub(crate) fn id(&self) -> anyhow::Result<String> {
        let mut without_paths = self.clone();
        for input in &mut without_paths.inputs {
            (input.path, input.is_trusted) = (String::new(), false);
        }
        let mut id = digest::of_bytes(&serde_json::to_vec(&without_paths)?);
        id.truncate(16);
        Ok(id)
    }

    /// The run that is recorded in a directory, if there is one.
    pub(crate) fn read(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(RUN);
        let Some(text) = read_if_there(&path)? else {
            return Ok(None);
        };
        let run = serde_json::from_slice(&text).with_context(|| {
            format!("{}: not what a stage writes; remove {} or choose another --out", path.display(), dir.display())
        });
        run.map(Some).usage()
    }

    pub(crate) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        durable::write_file(&dir.join(RUN), &self.id()?, |sink| {
            serde_json::to_writer_pretty(&mut *sink, self)?;
            Ok(sink.write_all(b"\n")?)
        })
    }
}

/// Key of the manifest's own digest: of all bytes before it.
const SEAL: &str = ",\n  \"manifest_sha256\": \"";
const END: &str = "\"\n}\n";

impl Manifest {
    /// The digest of what the stage read under this name.
    pub fn made_from(&self, name: &str) -> Option<&str> {
        self.inputs.iter().find(|record| record.name == name).map(|record| record.digest.as_str())
    }

    /// A number of the summary; of shards, the mean of theirs.
    pub fn summary_number(&self, name: &str) -> Option<f64> {
        let Value::Array(shards) = &self.summary else { return self.summary[name].as_f64() };
        let numbers = shards.iter().map(|summary| summary[name].as_f64()).collect::<Option<Vec<f64>>>()?;
        Some(numbers.iter().sum::<f64>() / numbers.len() as f64)
    }

    /// A list of counts of the summary; of shards, the sums of theirs.
    pub fn summary_counts(&self, name: &str) -> Option<Vec<u64>> {
        let counts = |summary: &Value| summary[name].as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<_>>>();
        let Value::Array(shards) = &self.summary else { return counts(&self.summary) };
        let add = |sums: Vec<u64>, more: Vec<u64>| sums.iter().zip(more).map(|(sum, more)| sum + more).collect();
        shards.iter().map(counts).collect::<Option<Vec<_>>>()?.into_iter().reduce(add)
    }

    /// A directory's manifest, if there is one.
    pub(crate) fn read(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(MANIFEST);
        let bytes = read_if_there(&path)?;
        bytes.map(|bytes| Self::parse(&path, bytes)).transpose().bad_input()
    }

    /// A manifest from its file's content. Damage of any byte is noticed.
    fn parse(path: &Path, bytes: Vec<u8>) -> anyhow::Result<Self> {
        let content = || {
            let text = String::from_utf8(bytes).ok()?;
            let (content, seal) = text.strip_suffix(END)?.rsplit_once(SEAL)?;
            (digest::of_bytes(content.as_bytes()) == seal).then(|| format!("{content}\n}}"))
        };
        let path = path.display();
        let content = content().with_context(|| format!("{path}: damaged; make the stage again"))?;
        let manifest: Self = serde_json::from_str(&content)
            .with_context(|| format!("{path}: not a manifest; was it written by a newer program?"))?;
        let (found, newest) = (manifest.schema_version, mempo_data::SCHEMA_VERSION);
        if found > newest {
            bail!("{path}: schema version {found}, this program reads up to {newest}; use a newer one");
        }
        Ok(manifest)
    }

    /// Commits a stage.
    pub(crate) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        let content = text.strip_suffix("\n}").context("a manifest is an object")?;
        let seal = digest::of_bytes(content.as_bytes());
        durable::write_file(&dir.join(MANIFEST), &self.run.id()?, |sink| {
            Ok(write!(sink, "{content}{SEAL}{seal}{END}")?)
        })
    }
}

fn read_if_there(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match digest::check_plain(path).and_then(|()| fs_err::read(path)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).bad_input(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn run() -> Run {
        Run {
            schema_version: 1,
            program: "mempo-test".to_owned(),
            program_version: "0.1.0".to_owned(),
            stage: "numbers".to_owned(),
            shard: None,
            seed: u64::MAX,
            arguments: json!({ "temperature": 0.1, "limits": { "max_steps": 16 } }),
            inputs: vec![InputRecord {
                name: "tasks".to_owned(),
                digest: "ab".repeat(32),
                path: "x".to_owned(),
                is_trusted: false,
            }],
        }
    }

    #[test]
    fn summaries_of_shards_are_put_together() {
        let of = |summary| Manifest {
            run: run(),
            files: vec![],
            rows: BTreeMap::new(),
            summary,
            wall_seconds: 0.0,
            peak_memory_bytes: None,
        };
        let (one, other) = (json!({"mean": 0.5, "bins": [1, 2]}), json!({"mean": 1.5, "bins": [3, 0]}));
        let whole = of(one.clone());
        assert_eq!((whole.summary_number("mean"), whole.summary_counts("bins")), (Some(0.5), Some(vec![1, 2])));
        let shards = of(json!([one, other]));
        assert_eq!((shards.summary_number("mean"), shards.summary_counts("bins")), (Some(1.0), Some(vec![4, 2])));
        assert_eq!((shards.summary_number("bins"), shards.summary_counts("mean")), (None, None));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let rows = BTreeMap::from([("steps".to_owned(), 3)]);
        let manifest = Manifest {
            run: run(),
            files: vec![],
            rows,
            summary: json!({ "mean": 0.3 }),
            wall_seconds: 0.25,
            peak_memory_bytes: Some(1 << 30),
        };
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap(), Some(manifest));
        let path = folder.path().join(MANIFEST);
        let bytes = fs_err::read(&path).unwrap();
        serde_json::from_slice::<Value>(&bytes).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::parse(&path, damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Manifest::parse(&path, bytes[..length].to_vec()).is_err(), "length {length}");
        }
    }

    #[test]
    fn the_id_of_a_run_does_not_depend_on_paths() {
        let mut moved = run();
        moved.inputs[0].path = "elsewhere".to_owned();
        assert_eq!(moved.id().unwrap(), run().id().unwrap());
        moved.inputs[0].digest = "cd".repeat(32);
        assert_ne!(moved.id().unwrap(), run().id().unwrap());
    }
}
