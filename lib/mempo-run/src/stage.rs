//! A stage's directory from the first lock to the manifest that commits it.

use std::{
    fs::File,
    io::{BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::anyhow;
use serde::Serialize;
use serde_json::Value;

use crate::{
    FileRecord, Input, Manifest, Progress, ResultExt, Run, StageArgs, check, difference, digest, durable, interrupt,
    lock::{self, Lock},
    manifest, seed_of,
    status::Status,
};

/// A stage at work: it holds its directory's lock and writes parts that are there whole or not at all.
#[derive(Debug)]
pub struct Stage {
    dir: PathBuf,
    run: Run,
    run_id: String,
    started: Instant,
    status: Status,
    _lock: Lock,
}

impl Stage {
    /// Takes the output directory, new or where an earlier run of the same work stopped; `None` if it is finished.
    ///
    /// `arguments` is everything that the result depends on besides inputs, seed and shard. A directory that was begun
    /// with others is refused with the differences, unless `args.restart`.
    pub fn open<A: Serialize>(
        program: &'static str,
        stage: &'static str,
        args: &StageArgs,
        arguments: &A,
        inputs: &[&Input],
    ) -> anyhow::Result<Option<Self>> {
        let run = Run::new((program, stage), args, arguments, inputs)?;
        refuse_place(args, inputs)?;
        let dir = args.dir();
        if args.has_work() {
            inputs.iter().try_for_each(|input| input.refuse_thinned())?;
        }
        durable::create_folder(&dir).map_err(|error| durable::failed(&dir, &dir, error.into()))?;
        let lock = Lock::acquire(&dir)?;
        let run_id = run.id()?;
        let status = Status::new(&dir, &run_id);
        let mut stage = Self { run_id, dir, run, started: Instant::now(), status, _lock: lock };
        if args.restart {
            stage.clear()?;
        }
        if stage.is_finished()? {
            stage.forget_resume()?;
            tracing::info!("{} is finished already", stage.dir.display());
            return Ok(None);
        }
        stage.begin()?;
        stage.status.start();
        Ok(Some(stage))
    }

    /// Where the stage writes: `--out`, or the shard's folder inside it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A seed for the work item that `parts` name; see [`seed_of`].
    pub fn seed(&self, parts: &[&str]) -> u64 {
        seed_of(self.run.seed, parts)
    }

    /// Which of the run's `units` this shard does: consecutive ones, all of them without `--shard`.
    pub fn shard_range(&self, units: usize) -> Range<usize> {
        let Some(shard) = self.run.shard else {
            return 0..units;
        };
        let bound = |index: usize| (index as u128 * units as u128 / shard.count as u128) as usize;
        bound(shard.index)..bound(shard.index + 1)
    }

    /// Whether a unit's part of a table is there.
    pub fn has_part(&self, table: &str, unit: usize) -> bool {
        self.dir.join(part(table, unit)).is_file()
    }

    /// Writes a unit's part of a table.
    pub fn write_part(
        &self,
        table: &str,
        unit: usize,
        write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.write_file(&part(table, unit), write)
    }

    /// Writes any file of the stage: it is there with all its bytes, or as it was before.
    pub fn write_file(
        &self,
        relative: &str,
        write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        durable::write_file(&self.dir.join(relative), &self.run_id, write)?;
        self.status.shared().committed(relative);
        Ok(())
    }

    /// Lets `write` put files into the stage's directory by itself: they count once the stage is finished.
    pub fn write_files<T>(&self, write: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
        write(&self.dir).map_err(|error| durable::failed(&self.dir, &self.dir, error))
    }

    /// Builds a folder of the stage under another name and puts it in the place of the one that was there.
    pub fn replace_dir(&self, relative: &str, build: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
        durable::replace_folder(&self.dir.join(relative), &self.run_id, build)?;
        self.status.shared().committed(relative);
        Ok(())
    }

    /// Lets `work` put aside what does not fit into memory: in a folder on the disk of the output, which is removed behind it.
    pub fn with_scratch<T>(&self, work: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
        durable::with_scratch(&self.dir.join("scratch"), &self.run_id, work)
    }

    /// The state to continue from that [`Self::save_resume`] left, if there is one.
    pub fn resume_dir(&self) -> Option<PathBuf> {
        Some(self.dir.join(manifest::RESUME)).filter(|dir| dir.is_dir())
    }

    /// Builds the state to continue from, in the place of the one before. It goes when the stage is finished.
    pub fn save_resume(&self, build: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
        self.replace_dir(manifest::RESUME, build)
    }

    /// An error (exit code 75) once a signal has come; ask between units.
    #[allow(clippy::unused_self, reason = "only a stage can be continued after it")]
    pub fn check_interrupt(&self) -> anyhow::Result<()> {
        interrupt::check()
    }

    /// Starts to show progress: `what` is done to `total` things called `unit`.
    pub fn progress(&self, what: &str, total: u64, unit: &str) -> Progress {
        Progress::new(what, total, unit, self.status.shared())
    }

    /// Appends a line to `timings.jsonl`, which is no part of the result.
    pub fn timing(&self, value: &impl Serialize) {
        let path = self.dir.join("timings.jsonl");
        let append = || -> anyhow::Result<()> {
            let mut line = serde_json::to_vec(value)?;
            line.push(b'\n');
            Ok(fs_err::OpenOptions::new().create(true).append(true).open(&path)?.write_all(&line)?)
        };
        if let Err(error) = append() {
            tracing::warn!("timing left out: {error:#}");
        }
    }

    /// Takes the stage back because an input is not what it must be, and gives `error` on: nothing is left to match, so that the
    /// same command runs with the input that takes its place.
    #[must_use]
    pub fn withdraw(mut self, error: anyhow::Error) -> anyhow::Error {
        // The one that tells of the run ends before its file goes.
        self.status = Status::new(&self.dir, &self.run_id);
        if let Err(kept) = self.clear() {
            tracing::warn!("{}: not cleared, use --restart: {kept:#}", self.dir.display());
        }
        error
    }

    /// Commits the stage: `rows` of each table, and what it has to say about its result.
    pub fn finish(self, rows: &[(&str, u64)], summary: Value) -> anyhow::Result<()> {
        let failed = |error: std::io::Error| durable::failed(&self.dir, &self.dir, error.into());
        let paths = check::list_files(&self.dir).map_err(failed)?;
        let files = paths.into_iter().map(|path| self.record(path)).collect::<std::io::Result<Vec<_>>>();
        let wall_seconds = (self.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let manifest = Manifest {
            run: self.run.clone(),
            files: files.map_err(failed)?,
            rows: rows.iter().map(|(table, count)| ((*table).to_owned(), *count)).collect(),
            summary,
            wall_seconds,
            peak_memory_bytes: mempo_guard::peak_resident_bytes(),
        };
        manifest.write(&self.dir)?;
        self.forget_resume()?;
        self.status.finish();
        tracing::info!("{} is finished after {wall_seconds} s", self.dir.display());
        Ok(())
    }

    /// Removes the state to continue from: there is nothing to continue.
    fn forget_resume(&self) -> anyhow::Result<()> {
        let dir = self.dir.join(manifest::RESUME);
        durable::remove(&dir).map_err(|error| durable::failed(&dir, &dir, error.into()))
    }

    /// A file's record; its bytes are made durable, since not every file came through [`Self::write_file`].
    fn record(&self, path: String) -> std::io::Result<FileRecord> {
        let file = self.dir.join(&path);
        fs_err::File::open(&file)?.sync_all()?;
        if let Some(folder) = file.parent() {
            durable::sync_folder(folder)?;
        }
        let (size, sha256) = digest::of_file(&file)?;
        Ok(FileRecord { path, size, sha256, removed: false })
    }

    /// Whether the same work has been committed here; an error if other work has.
    fn is_finished(&self) -> anyhow::Result<bool> {
        let Some(mut manifest) = Manifest::read(&self.dir)? else {
            return Ok(false);
        };
        // A newer program need not do again what an older one has finished.
        manifest.run.program_version.clone_from(&self.run.program_version);
        self.refuse_other(&manifest.run)?;
        match manifest.files.iter().find_map(|file| check::problem(&self.dir, file, false)) {
            Some(problem) => Err(anyhow!("{problem}; use --restart to make it again")).bad_input(),
            None => Ok(true),
        }
    }

    /// Records a new run, or checks that the recorded one is the same and cleans up behind it.
    fn begin(&self) -> anyhow::Result<()> {
        let failed = |error: std::io::Error| durable::failed(&self.dir, &self.dir, error.into());
        let old = Run::read(&self.dir)?;
        if let Some(old) = &old {
            self.refuse_other(old)?;
        }
        durable::clean(&self.dir, &self.run_id).map_err(failed)?;
        if old.is_some() {
            tracing::info!("continuing in {}", self.dir.display());
            return Ok(());
        }
        if let Some(name) = self.entries()?.first() {
            let dir = self.dir.display();
            let error = anyhow!("{dir} holds `{name}` and no run of this program; choose another --out");
            return Err(error).usage();
        }
        self.run.write(&self.dir)
    }

    /// Refuses a directory that holds other work.
    fn refuse_other(&self, old: &Run) -> anyhow::Result<()> {
        self.refuse_other_stage(old)?;
        let differences = difference::between(old, &self.run);
        if differences.is_empty() {
            return Ok(());
        }
        let (dir, differences) = (self.dir.display(), differences.join("\n  "));
        let advice = "go back to what it was, choose another --out, or throw away what is there with --restart";
        Err(anyhow!("{dir} was begun with other arguments or inputs (old -> new); {advice}:\n  {differences}")).usage()
    }

    fn refuse_other_stage(&self, old: &Run) -> anyhow::Result<()> {
        if (&old.program, &old.stage, old.shard) == (&self.run.program, &self.run.stage, self.run.shard) {
            return Ok(());
        }
        let (dir, program, stage) = (self.dir.display(), &old.program, &old.stage);
        Err(anyhow!("{dir} holds the output of `{program} {stage}`; choose another --out")).usage()
    }

    /// Throws away what an earlier run of this stage left. The record of that run goes last, so that a directory that
    /// is half cleared is still known as its.
    fn clear(&self) -> anyhow::Result<()> {
        let Some(old) = Run::read(&self.dir)? else {
            return Ok(());
        };
        self.refuse_other_stage(&old)?;
        let clear = || -> anyhow::Result<()> {
            durable::remove(&self.dir.join(manifest::MANIFEST))?;
            durable::sync_folder(&self.dir)?;
            for name in self.entries()?.iter().filter(|name| *name != manifest::RUN) {
                durable::remove(&self.dir.join(name))?;
            }
            durable::remove(&self.dir.join(manifest::RUN))?;
            Ok(durable::sync_folder(&self.dir)?)
        };
        clear().map_err(|error| durable::failed(&self.dir, &self.dir, error))
    }

    /// Names of everything in the directory but the lock.
    fn entries(&self) -> anyhow::Result<Vec<String>> {
        let entries = fs_err::read_dir(&self.dir)?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<std::io::Result<Vec<String>>>()?;
        names.retain(|name| name != lock::NAME);
        names.sort();
        Ok(names)
    }
}

/// The path of a unit's part of a table.
fn part(table: &str, unit: usize) -> String {
    format!("{table}/part-{unit:05}.parquet")
}

/// Refuses to write into an input, or to mix shards with a whole.
fn refuse_place(args: &StageArgs, inputs: &[&Input]) -> anyhow::Result<()> {
    let out = args.out.display();
    if inputs.iter().any(|input| input.holds(&args.out)) {
        return Err(anyhow!("--out {out} lies in an input, which is never changed; choose another")).usage();
    }
    if args.shard.is_some() && args.out.join(manifest::RUN).exists() {
        return Err(anyhow!("{out} holds a run without --shard; choose another --out for shards")).usage();
    }
    Ok(())
}
