//! Where rows come from: finds the input files, cuts them into units of bounded size, reads a unit's rows.
//!
//! JSON lines, JSON arrays and foreign Parquet files all yield JSON text, so that what follows knows one form; a rollout directory
//! yields trajectories with their steps as they are stored. A unit is cut by row count and bytes
//! alone: it does not depend on what was done before.

use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};
use fs_err as fs;
use mempo_data::{
    JSON_ROWS_EXTENSIONS, JsonRows, Step, Trajectory, groups, has_extension, json_rows, parquet_bytes,
    parquet_row_count, read_rows,
};
use mempo_run::{Input, ResultExt};

use crate::record::COLUMNS;

/// Most rows of a unit.
const UNIT_ROWS: u64 = 512;
/// A unit is closed once its rows hold this much text. Its examples take many times that: with a whole history in each prompt
/// every text is in as many examples as steps follow it.
const UNIT_BYTES: usize = 4 << 20;
/// One file, or one part of a rollout directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// JSON objects, one a line or in one array.
    Lines(PathBuf),
    /// A foreign Parquet file.
    Table(PathBuf),
    /// The same part of both tables of a rollout directory.
    Rollout { trajectories: PathBuf, steps: PathBuf },
}

impl Source {
    /// The file to name in messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Lines(path) | Self::Table(path) => path,
            Self::Rollout { trajectories, .. } => trajectories,
        }
    }
}

/// Consecutive rows of one source: the grain of commit, resume and shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unit {
    /// Index of the source.
    pub(crate) source: usize,
    /// Number of the unit's first row, counted over all sources.
    pub(crate) first_row: u64,
    /// Rows of the unit.
    pub(crate) rows: u64,
}

/// A row as it was found.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Counted over all sources, from 0.
    pub(crate) number: u64,
    /// Line of its file, or row of its array or table, from 1.
    pub(crate) line: u64,
    /// What it holds.
    pub(crate) content: RowContent,
}

/// What a row holds.
#[derive(Debug, Clone)]
pub(crate) enum RowContent {
    /// JSON text, not yet read.
    Json(Vec<u8>),
    /// A stored trajectory.
    Rollout(Box<Trajectory>, Vec<Step>),
}

/// Finds the sources that `paths` name, and the inputs whose digests a resume must match.
pub(crate) fn find_sources(paths: &[PathBuf]) -> anyhow::Result<(Vec<Source>, Vec<Input>)> {
    let (mut sources, mut inputs) = (Vec::new(), Vec::new());
    for path in paths {
        if is_stage(path)? {
            let input = Input::stage("trajectories", path)?;
            sources.extend(rollout_sources(&input)?);
            inputs.push(input);
        } else {
            let files = data_files(path)?;
            inputs.push(Input::files("trajectories", &files)?);
            sources.extend(
                files.into_iter().map(|file| {
                    if has_extension(&file, ".parquet") { Source::Table(file) } else { Source::Lines(file) }
                }),
            );
        }
    }
    Ok((sources, inputs))
}

/// Whether `path` is the directory of a stage (perhaps of its shards).
fn is_stage(path: &Path) -> anyhow::Result<bool> {
    if !path.is_dir() {
        return Ok(false);
    }
    if path.join("run.json").exists() || path.join("manifest.json").exists() {
        return Ok(true);
    }
    let mut entries = fs::read_dir(path)?.filter_map(Result::ok);
    Ok(entries.any(|entry| entry.file_name().to_string_lossy().starts_with("shard-")))
}

fn rollout_sources(input: &Input) -> anyhow::Result<Vec<Source>> {
    let (trajectories, steps) = (input.table("trajectories")?, input.table("steps")?);
    if trajectories.len() != steps.len() {
        let (found, expected) = (steps.len(), trajectories.len());
        return Err(anyhow!("{}: {found} parts of `steps`, expected {expected}", input.dir().display())).bad_input();
    }
    let pairs = trajectories.into_iter().zip(steps);
    Ok(pairs.map(|(trajectories, steps)| Source::Rollout { trajectories, steps }).collect())
}

/// `path` itself, or the data files in the folder `path`, sorted by name.
pub(crate) fn data_files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let known = |file: &Path| JSON_ROWS_EXTENSIONS.iter().any(|extension| has_extension(file, extension));
    if !path.is_dir() {
        if !known(path) {
            let (path, extensions) = (path.display(), JSON_ROWS_EXTENSIONS.join(", "));
            return Err(anyhow!("{path}: expected a name ending in {extensions}")).bad_input();
        }
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).filter(|file| known(file)).collect();
    files.sort();
    if files.is_empty() {
        let (path, extensions) = (path.display(), JSON_ROWS_EXTENSIONS.join(", "));
        return Err(anyhow!("{path}: no file ends in {extensions}")).bad_input();
    }
    Ok(files)
}

/// Cuts the sources into units; reads every line file once to count.
pub(crate) fn plan_units(sources: &[Source]) -> anyhow::Result<Vec<Unit>> {
    let (mut units, mut first_row) = (Vec::new(), 0);
    for (source, found) in sources.iter().enumerate() {
        let sizes = match found {
            Source::Lines(path) => {
                let rows = json_rows(path, &COLUMNS).bad_input()?;
                unit_sizes(rows.map(|row| Ok(row.bad_input()?.1.len())))?
            }
            Source::Table(path) => {
                let rows = parquet_row_count(path).bad_input()?;
                let mean_bytes = parquet_bytes(path).bad_input()? / rows.max(1);
                unit_sizes((0..rows).map(|_| Ok(mean_bytes as usize)))?
            }
            Source::Rollout { trajectories, .. } => vec![parquet_row_count(trajectories).bad_input()?],
        };
        for rows in sizes {
            units.push(Unit { source, first_row, rows });
            first_row += rows;
        }
    }
    Ok(units)
}

/// Rows of each unit, given the bytes of each row.
fn unit_sizes(row_bytes: impl Iterator<Item = anyhow::Result<usize>>) -> anyhow::Result<Vec<u64>> {
    let (mut sizes, mut rows, mut bytes) = (Vec::new(), 0, 0);
    for row in row_bytes {
        rows += 1;
        bytes = row?.saturating_add(bytes);
        if rows == UNIT_ROWS || bytes >= UNIT_BYTES {
            sizes.push(rows);
            (rows, bytes) = (0, 0);
        }
    }
    sizes.extend((rows > 0).then_some(rows));
    Ok(sizes)
}

/// Reads units in their order; a file stays open from one of its units to the next.
pub(crate) struct Reader<'a> {
    sources: &'a [Source],
    open: Option<(usize, JsonRows)>,
}

impl<'a> Reader<'a> {
    /// Nothing is open yet.
    pub(crate) fn new(sources: &'a [Source]) -> Self {
        Self { sources, open: None }
    }

    /// Passes over a unit that is not wanted.
    pub(crate) fn skip(&mut self, unit: Unit) -> anyhow::Result<()> {
        match &self.sources[unit.source] {
            Source::Rollout { .. } => Ok(()),
            Source::Lines(path) | Source::Table(path) => {
                let mut rows = self.rows_of(unit.source, path)?.take(unit.rows as usize);
                rows.try_for_each(|row| row.map(drop)).bad_input()
            }
        }
    }

    /// The rows of a unit; the units before it must have been read or skipped.
    pub(crate) fn read(&mut self, unit: Unit) -> anyhow::Result<Vec<Row>> {
        let number = unit.first_row..;
        match &self.sources[unit.source] {
            Source::Rollout { trajectories, steps } => Ok(read_trajectories(trajectories, steps)?
                .into_iter()
                .zip(number)
                .map(|(content, number)| Row { number, line: number - unit.first_row + 1, content })
                .collect()),
            Source::Lines(path) | Source::Table(path) => {
                let rows = self.rows_of(unit.source, path)?.take(unit.rows as usize).zip(number);
                let row = |(row, number)| -> anyhow::Result<Row> {
                    let (line, text) = Result::bad_input(row)?;
                    Ok(Row { number, line, content: RowContent::Json(text) })
                };
                rows.map(row).collect()
            }
        }
    }

    fn rows_of(&mut self, source: usize, path: &Path) -> anyhow::Result<&mut JsonRows> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != source) {
            self.open = Some((source, json_rows(path, &COLUMNS).bad_input()?));
        }
        Ok(&mut self.open.as_mut().expect("opened above").1)
    }
}

/// The trajectories of one part with their steps.
fn read_trajectories(trajectories: &Path, steps: &Path) -> anyhow::Result<Vec<RowContent>> {
    let mut groups_of_steps = groups(read_rows::<Step>(&[steps.to_path_buf()]).bad_input()?);
    let (mut rows, mut group): (Vec<RowContent>, Vec<Step>) = (Vec::new(), Vec::new());
    for trajectory in read_rows::<Trajectory>(&[trajectories.to_path_buf()]).bad_input()? {
        let trajectory = trajectory.bad_input()?;
        if group.is_empty() && trajectory.step_count > 0 {
            group = groups_of_steps.next().transpose().bad_input()?.unwrap_or_default();
        }
        let mine =
            |step: &Step| (&step.task_id, step.trajectory_index) == (&trajectory.task_id, trajectory.trajectory_index);
        let count = group.iter().take_while(|step| mine(step)).count();
        if count != trajectory.step_count as usize {
            let (task, index, expected) = (&trajectory.task_id, trajectory.trajectory_index, trajectory.step_count);
            let found = format!("{}: {count} steps of trajectory {task}/{index}", steps.display());
            return Err(anyhow!("{found}, expected {expected}: sample the rollouts again")).bad_input();
        }
        let rest = group.split_off(count);
        rows.push(RowContent::Rollout(Box::new(trajectory), std::mem::replace(&mut group, rest)));
    }
    if !group.is_empty() {
        bail!("{}: steps of `{}` without a trajectory", steps.display(), group[0].task_id);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {

    use super::*;

    fn write(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
    }

    #[test]
    fn units_are_cut_by_rows_and_by_bytes() {
        let sizes = |bytes: &[usize]| unit_sizes(bytes.iter().map(|bytes| Ok(*bytes))).unwrap();
        assert_eq!(sizes(&[10; 1030]), [512, 512, 6]);
        assert_eq!(sizes(&[UNIT_BYTES, 1, UNIT_BYTES - 1, 5]), [1, 2, 1]);
        assert_eq!(sizes(&[]), [0; 0]);
    }

    #[test]
    fn units_read_after_skipped_ones_hold_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let rows: Vec<String> = (0..1200).map(|row| format!("{{\"row\":{row}}}")).collect();
        write(&path, &rows.join("\n"));
        let sources = vec![Source::Lines(path.clone()), Source::Lines(path)];
        let units = plan_units(&sources).unwrap();
        assert_eq!(
            units.iter().map(|unit| (unit.source, unit.first_row, unit.rows)).collect::<Vec<_>>(),
            [(0, 0, 512), (0, 512, 512), (0, 1024, 176), (1, 1200, 512), (1, 1712, 512), (1, 2224, 176),]
        );
        let mut reader = Reader::new(&sources);
        for unit in &units[..4] {
            reader.skip(*unit).unwrap();
        }
        let rows = reader.read(units[4]).unwrap();
        assert_eq!((rows.len(), rows[0].number, rows[0].line), (512, 1712, 513));
        let RowContent::Json(text) = &rows[0].content else { panic!("expected JSON") };
        assert_eq!(text.trim_ascii(), b"{\"row\":512}");
    }

    #[test]
    fn a_folder_yields_its_data_files_by_name_and_foreign_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.jsonl.gz", "a.parquet", "notes.txt"] {
            write(&dir.path().join(name), "");
        }
        let files = data_files(dir.path()).unwrap();
        assert_eq!(files, [dir.path().join("a.parquet"), dir.path().join("b.jsonl.gz")]);
        let error = data_files(&dir.path().join("notes.txt")).unwrap_err();
        assert!(format!("{error:#}").contains("expected a name ending in .parquet, .jsonl"), "{error:#}");
    }
}
