//! Where rows come from: finds the input files, cuts them into units of bounded size, reads a unit's rows.
//!
//! JSON lines (plain or `.gz`) and foreign Parquet files both yield JSON text, so that what follows knows one form;
//! a rollout directory yields trajectories with their steps as they are stored. A unit is cut by row count and bytes
//! alone: it does not depend on what was done before.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use fs_err as fs;
use mempo_data::{Step, Trajectory, groups, parquet_batches, parquet_builder, read_rows};
use mempo_run::{Input, ResultExt};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

/// Most rows of a unit.
const UNIT_ROWS: u64 = 512;
/// A unit is closed once its rows hold this much text.
const UNIT_BYTES: usize = 16 << 20;
/// Longest line read.
const LINE_BYTES: u64 = 64 << 20;
/// Rows turned to JSON at a time.
const BATCH_ROWS: usize = 64;
/// Text files read.
const EXTENSIONS: [&str; 6] = [".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz"];

/// One file, or one part of a rollout directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// One JSON object a line.
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
    /// Line (or row) of its file, from 1.
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

/// A line of a file with its number, from 1.
pub(crate) type Line = (u64, Vec<u8>);
/// The lines of a file, one after another.
pub(crate) type Lines = Box<dyn Iterator<Item = anyhow::Result<Line>> + Send>;

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
    let known = |file: &Path| EXTENSIONS.iter().chain(&[".parquet"]).any(|extension| has_extension(file, extension));
    if !path.is_dir() {
        if !known(path) {
            return Err(anyhow!("{}: expected a name ending in .parquet, {}", path.display(), EXTENSIONS.join(", ")))
                .bad_input();
        }
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).filter(|file| known(file)).collect();
    files.sort();
    if files.is_empty() {
        return Err(anyhow!("{}: no file ends in .parquet, {}", path.display(), EXTENSIONS.join(", "))).bad_input();
    }
    Ok(files)
}

/// Whether the file's name ends in `extension`, upper or lower case.
pub(crate) fn has_extension(path: &Path, extension: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().to_lowercase().ends_with(extension))
}

/// Cuts the sources into units; reads every line file once to count.
pub(crate) fn plan_units(sources: &[Source]) -> anyhow::Result<Vec<Unit>> {
    let (mut units, mut first_row) = (Vec::new(), 0);
    for (source, found) in sources.iter().enumerate() {
        let sizes = match found {
            Source::Lines(path) => unit_sizes(lines(path)?.map(|line| line.map(|(_, text)| text.len())))?,
            Source::Table(path) => {
                let rows = parquet_rows(path)?;
                unit_sizes((0..rows).map(|_| Ok(0)))?
            }
            Source::Rollout { trajectories, .. } => vec![parquet_rows(trajectories)?],
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
        bytes += row?;
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
    open: Option<(usize, Lines)>,
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
                self.lines_of(unit.source, path)?.take(unit.rows as usize).try_for_each(|line| line.map(drop))
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
                let lines = self.lines_of(unit.source, path)?.take(unit.rows as usize);
                lines
                    .zip(number)
                    .map(|(line, number)| {
                        line.map(|(line, text)| Row { number, line, content: RowContent::Json(text) })
                    })
                    .collect()
            }
        }
    }

    fn lines_of(&mut self, source: usize, path: &Path) -> anyhow::Result<&mut Lines> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != source) {
            self.open = Some((source, lines(path)?));
        }
        Ok(&mut self.open.as_mut().expect("opened above").1)
    }
}

/// The rows of a JSON lines file, or those of a Parquet file as JSON text; blank lines are left out.
pub(crate) fn lines(path: &Path) -> anyhow::Result<Lines> {
    if has_extension(path, ".parquet") {
        return parquet_lines(path);
    }
    let file = fs::File::open(path).bad_input()?;
    let reader: Box<dyn BufRead + Send> = if has_extension(path, ".gz") {
        Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(BufReader::new(file))))
    } else {
        Box::new(BufReader::new(file))
    };
    let path = path.to_path_buf();
    let mut numbered = (1..).zip(RawLines(reader)).map(move |(number, line)| match line {
        Ok(text) => Ok((number, text)),
        Err(error) => Err(error).with_context(|| format!("{}:{number}", path.display())).bad_input(),
    });
    let blank = |line: &anyhow::Result<Line>| line.as_ref().is_ok_and(|(_, text)| text.trim_ascii().is_empty());
    Ok(Box::new(std::iter::from_fn(move || numbered.find(|line| !blank(line)))))
}

/// Lines as bytes, of bounded length; a byte order mark at the start of the file is left out.
struct RawLines(Box<dyn BufRead + Send>);

impl Iterator for RawLines {
    type Item = anyhow::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        match self.0.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(read) if read as u64 == LINE_BYTES && !line.ends_with(b"\n") => {
                Some(Err(anyhow!("a line longer than {} MiB; expected one JSON object a line", LINE_BYTES >> 20)))
            }
            Ok(_) => Some(Ok(line.strip_prefix(b"\xef\xbb\xbf").map_or(line.clone(), <[u8]>::to_vec))),
            Err(error) => Some(Err(error.into())),
        }
    }
}

fn open_parquet(path: &Path) -> anyhow::Result<ParquetRecordBatchReaderBuilder<std::fs::File>> {
    let (file, _) = fs::File::open(path).bad_input()?.into_parts();
    parquet_builder(file).with_context(|| format!("{}: not Parquet", path.display())).bad_input()
}

fn parquet_rows(path: &Path) -> anyhow::Result<u64> {
    Ok(open_parquet(path)?.metadata().file_metadata().num_rows() as u64)
}

/// The rows of a Parquet file as JSON objects without null fields.
fn parquet_lines(path: &Path) -> anyhow::Result<Lines> {
    let batches = parquet_batches(open_parquet(path)?.with_batch_size(BATCH_ROWS))?;
    let path = path.to_path_buf();
    let rows = batches.flat_map(move |batch| {
        let text = batch.and_then(|batch| {
            let mut writer = arrow_json::LineDelimitedWriter::new(Vec::new());
            writer.write(&batch)?;
            Ok(writer.into_inner())
        });
        match text.with_context(|| path.display().to_string()).bad_input() {
            Ok(text) => {
                text.split(|byte| *byte == b'\n').filter(|row| !row.is_empty()).map(|row| Ok(row.to_vec())).collect()
            }
            Err(error) => vec![Err(error)],
        }
    });
    Ok(Box::new((1..).zip(rows).map(|(number, row)| row.map(|row| (number, row)))))
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
    use std::io::Write;

    use super::*;

    fn write(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
    }

    #[test]
    fn lines_are_numbered_as_an_editor_numbers_them() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, packed) = (dir.path().join("a.jsonl"), dir.path().join("a.jsonl.gz"));
        let text = "\u{feff}{\"a\":1}\n\n  \n{\"b\":2}";
        write(&plain, text);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        fs::write(&packed, encoder.finish().unwrap()).unwrap();
        for path in [plain, packed] {
            let found: Vec<Line> = lines(&path).unwrap().map(Result::unwrap).collect();
            let expected = vec![(1, b"{\"a\":1}\n".to_vec()), (4, b"{\"b\":2}".to_vec())];
            assert_eq!(found, expected, "{}", path.display());
        }
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
