//! Long documents for tasks: the passages that tell the answers among others, at several lengths (RULER-HQA, as MemAgent,
//! arXiv 2507.02259, evaluates on it).
//!
//! Differs from it: lengths are tokens, not numbers of passages; gold passages are spread evenly over all depths instead of
//! wherever a shuffle puts them; a task's documents of several lengths have them at one depth, and the longer hold what the
//! shorter do.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::Args;
use mempo_data::{Document, Task, read_rows, write_rows};
use mempo_run::{Input, ResultExt, Stage, seed_of};
use mempo_text::Tokenizer;
use serde::Serialize;
use serde_json::{Value, json};

use super::evidence::Evidence;
use super::library::{Library, SEPARATOR, Shelf};
use super::permutation::Permutation;
use super::plan::{Plan, Wanted, heading};
use super::{ComposeArguments, filler};
use crate::corpus;
use crate::rows::{self, Located};

/// A document larger than this stands in a file of its own, beside the tasks.
const INLINE_BYTES: usize = 256 << 10;
/// Tokens of the documents of one unit, at least one document: what is held in memory, and made again after an interruption.
const UNIT_TOKENS: u64 = 4 << 20;

/// Whether and how `compose` gives tasks a document.
#[derive(Debug, Args, Serialize)]
pub(crate) struct DocumentOptions {
    /// Give each task a long document to read (MemAgent): the passages that tell its answers, which the questions name (in
    /// `metadata.hops[].doc_id`, `doc_ids` or `supporting_doc_ids`, see --documents) or bring (HotpotQA's `context`), among others
    #[arg(long, requires_all = ["tokenizer", "document_tokens"], conflicts_with = "verl")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    document: bool,
    /// Files of documents, in the forms that `index --corpus` reads: those that questions name, and what is put around them
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "document")]
    #[serde(skip)]
    documents: Vec<PathBuf>,
    /// Prose for when the documents are used up: text files, or JSON Lines or Parquet rows of `text` and perhaps `title`; cut
    /// where paragraphs end
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "document")]
    #[serde(skip)]
    filler: Vec<PathBuf>,
    /// How long a document may be, in tokens; every task comes at each of these lengths
    #[arg(long, value_name = "N", num_args = 1.., requires = "document")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    document_tokens: Vec<u32>,
    /// Model directory whose tokenizer counts
    #[arg(long, value_name = "DIR", requires = "document")]
    #[serde(skip)]
    tokenizer: Option<PathBuf>,
    /// Draw no passage that holds one of the task's answers, but `yes` and `no`. Without this, as in RULER-HQA, an answer may
    /// also stand where no question led to it
    #[arg(long, requires = "document")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    distractors_without_answers: bool,
    /// Once all passages are in a document, let them come again
    #[arg(long, requires = "document")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    repeat_distractors: bool,
}

impl DocumentOptions {
    /// The files that are read for it.
    pub(crate) fn inputs(&self) -> anyhow::Result<Vec<Input>> {
        let mut inputs = Vec::new();
        if let Some(dir) = self.tokenizer.as_ref().filter(|_| self.document) {
            let file = dir.join("tokenizer.json");
            if !file.is_file() {
                return Err(anyhow!("{}: no tokenizer.json; expected a model directory", dir.display())).bad_input();
            }
            inputs.push(Input::files("tokenizer", &[file])?);
        }
        for (name, files) in [("documents", &self.documents), ("filler", &self.filler)] {
            if !files.is_empty() {
                inputs.push(Input::files(name, files)?);
            }
        }
        Ok(inputs)
    }

    /// Starts to collect passages, if documents are wanted.
    pub(crate) fn collect(&self, out: &Path) -> anyhow::Result<Option<Collection>> {
        let collection = || Ok(Collection { shelf: Shelf::beside(out)?, sources: Vec::new() });
        self.document.then(collection).transpose()
    }

    /// Lengths in the order in which their task ids sort.
    fn lengths(&self) -> Vec<u32> {
        let lengths: BTreeMap<String, u32> =
            self.document_tokens.iter().map(|length| (length.to_string(), *length)).collect();
        lengths.into_values().collect()
    }
}

/// What a question's row says of its passages.
struct Source {
    place: String,
    /// Documents by their ids.
    ids: Vec<String>,
    /// Passages by number: of those that came with the row, the ones that tell the answer and the others.
    gold: Vec<u32>,
    given: Vec<u32>,
}

/// Passages while files are read, and where those of the questions are.
pub(crate) struct Collection {
    shelf: Shelf,
    sources: Vec<Source>,
}

impl Collection {
    /// Takes in what a row brings; of a row that became a question, `is_kept`, also what it names.
    pub(crate) fn add(&mut self, row: &Located, is_kept: bool) -> anyhow::Result<()> {
        let evidence = Evidence::parse(row)?;
        let mut source = Source { place: row.place.clone(), ids: evidence.ids, gold: Vec::new(), given: Vec::new() };
        for passage in evidence.passages {
            let number = self.shelf.add(&passage.title, &passage.text)?;
            if passage.is_gold { &mut source.gold } else { &mut source.given }.extend(number);
        }
        if is_kept {
            self.sources.push(source);
        }
        Ok(())
    }

    /// Reads documents and filler, and plans what can tell early that they are too few or too long: the first task's longest
    /// document, and all tasks' shortest passages.
    pub(crate) fn finish(
        mut self,
        arguments: &ComposeArguments,
        blocks: &[Vec<usize>],
        tasks: &[Task],
    ) -> anyhow::Result<LongDocuments> {
        let options = &arguments.long;
        let found = self.read_documents(&options.documents)?;
        let filler_from = self.shelf.len();
        for path in &options.filler {
            filler::read(path, |title, text| self.shelf.add(title, text).map(drop))?;
        }
        let dir = options.tokenizer.as_deref().unwrap_or(Path::new(""));
        let library = self.shelf.close(filler_from, Tokenizer::load(dir)?)?;
        let passages = |block: &Vec<usize>| passages(block.iter().map(|index| &self.sources[*index]), &found);
        let passages = blocks.iter().map(passages).collect::<anyhow::Result<Vec<_>>>()?;
        let mut documents = LongDocuments::new(library, passages);
        documents.check(arguments, tasks)?;
        Ok(documents)
    }

    /// The numbers of the documents that questions name.
    fn read_documents(&mut self, paths: &[PathBuf]) -> anyhow::Result<HashMap<String, Option<u32>>> {
        let ids = self.sources.iter().flat_map(|source| &source.ids);
        let mut found: HashMap<String, Option<u32>> = ids.map(|id| (id.clone(), None)).collect();
        for path in paths {
            let before = self.shelf.len();
            for row in rows::read(path, &corpus::COLUMNS)? {
                let row = row?;
                let Document { doc_id, title, text } = corpus::document(&row)?;
                let number = self.shelf.add(&title, &text)?;
                let Some(known) = found.get_mut(&doc_id) else { continue };
                if known.is_some() && *known != number {
                    return Err(anyhow!("{}: a second document has the id `{doc_id}`: ids must be unique", row.place));
                }
                *known = number;
            }
            if self.shelf.len() == before {
                tracing::warn!("{}: no document that was not there before", path.display());
            }
        }
        Ok(found)
    }
}

/// The passages that come with a task.
struct TaskPassages {
    gold: Vec<u32>,
    given: Vec<u32>,
    /// How many gold passages the tasks before it have.
    gold_before: usize,
}

/// Those of a task's questions, each once.
fn passages<'s>(
    sources: impl Iterator<Item = &'s Source>,
    found: &HashMap<String, Option<u32>>,
) -> anyhow::Result<TaskPassages> {
    let mut passages = TaskPassages { gold: Vec::new(), given: Vec::new(), gold_before: 0 };
    for source in sources {
        for id in &source.ids {
            let number = found.get(id).copied().flatten().with_context(|| {
                format!("{}: document `{id}` tells its answer, and is in none of --documents", source.place)
            })?;
            passages.gold.push(number);
        }
        passages.gold.extend(&source.gold);
        passages.given.extend(&source.given);
    }
    let mut seen = std::collections::HashSet::new();
    passages.gold.retain(|passage| seen.insert(*passage));
    passages.given.retain(|passage| seen.insert(*passage));
    Ok(passages)
}

/// Makes tasks with documents.
pub(crate) struct LongDocuments {
    library: Library,
    tasks: Vec<TaskPassages>,
    gold_count: usize,
}

impl LongDocuments {
    fn new(library: Library, mut tasks: Vec<TaskPassages>) -> Self {
        let mut gold_count = 0;
        for task in &mut tasks {
            task.gold_before = gold_count;
            gold_count += task.gold.len();
        }
        Self { library, tasks, gold_count }
    }

    /// Refuses what cannot be done before anything is written: too little text for the longest document of the first task,
    /// a shortest one that its own passages do not fit into.
    fn check(&mut self, arguments: &ComposeArguments, tasks: &[Task]) -> anyhow::Result<()> {
        let lengths = arguments.long.document_tokens.iter();
        let (Some(shortest), Some(longest)) = (lengths.clone().min(), lengths.max()) else { return Ok(()) };
        self.with_wanted(arguments, (0, &tasks[0]), *longest, |library, wanted| Plan::new(library, wanted).map(drop))?;
        for task in tasks.iter().enumerate() {
            self.with_wanted(arguments, task, *shortest, Plan::check_room)?;
        }
        Ok(())
    }

    /// Writes every task at every length, with its document in the row or in a file beside it; gives rows of both tables and
    /// what the manifest says of them.
    pub(crate) fn write(
        mut self,
        arguments: &ComposeArguments,
        stage: &Stage,
        tasks: &[Task],
    ) -> anyhow::Result<Written> {
        let lengths = arguments.long.lengths();
        let all: Vec<(usize, u32)> = (0..tasks.len()).flat_map(|i| lengths.iter().map(move |n| (i, *n))).collect();
        let progress = stage.progress("documents", all.len() as u64, "documents");
        let mut written = Written::default();
        let mut done = 0;
        for (unit, work) in units(&all).enumerate() {
            if stage.has_part("tasks", unit) {
                progress.skip(work.len() as u64);
            } else {
                let mut rows = Vec::new();
                for (place, (index, length)) in work.iter().enumerate() {
                    stage.check_interrupt()?;
                    rows.push(self.task(arguments, stage, (*index, &tasks[*index]), *length, done + place)?);
                    progress.inc(1);
                }
                stage.write_part("tasks", unit, |file| Ok(write_rows(&rows, file).map(drop)?))?;
            }
            done += work.len();
            written.add(&stage.dir().join(format!("tasks/part-{unit:05}.parquet")))?;
        }
        if written.repeated > 0 {
            tracing::warn!("{} passages come more than once in a document: give more with --filler", written.repeated);
        }
        Ok(written)
    }

    /// A task at one length; its document, if it is large, is written.
    fn task(
        &mut self,
        arguments: &ComposeArguments,
        stage: &Stage,
        (index, task): (usize, &Task),
        length: u32,
        place: usize,
    ) -> anyhow::Result<Task> {
        let plan = self.with_wanted(arguments, (index, task), length, Plan::new).bad_input()?;
        let (text, facts) = self.render(&plan, &self.tasks[index].gold.clone())?;
        let mut task = Task { task_id: format!("{}-{length}", task.task_id), ..task.clone() };
        let mut metadata: Value = serde_json::from_str(task.metadata.as_deref().unwrap_or("{}"))?;
        metadata["document_tokens"] = length.into();
        for (name, value) in facts {
            metadata[name] = value;
        }
        task.metadata = Some(metadata.to_string());
        if text.len() <= INLINE_BYTES {
            task.document = Some(text);
            return Ok(task);
        }
        task.document_ref = Some(format!("corpus/part-{place:05}.parquet#{}", task.task_id));
        if !stage.has_part("corpus", place) {
            let document = Document { doc_id: task.task_id.clone(), title: String::new(), text };
            stage.write_part("corpus", place, |file| Ok(write_rows(&[document], file).map(drop)?))?;
        }
        Ok(task)
    }

    /// What `act` makes of the document that a task wants at one length.
    fn with_wanted<T>(
        &mut self,
        arguments: &ComposeArguments,
        (index, task): (usize, &Task),
        length: u32,
        act: impl FnOnce(&mut Library, &Wanted<'_>) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let options = &arguments.long;
        let TaskPassages { gold, given, gold_before } = &self.tasks[index];
        let depths = Depths { seed: arguments.stage.seed, name: &arguments.name, count: self.gold_count };
        let gold: Vec<(u32, f64)> = gold.iter().zip(*gold_before..).map(|(p, place)| (*p, depths.of(place))).collect();
        let answers = task.objectives.iter().flat_map(|objective| objective.answers.clone());
        let kept_out: Vec<String> = if options.distractors_without_answers { answers.collect() } else { Vec::new() };
        let wanted = Wanted {
            name: &task.task_id,
            seed: arguments.stage.seed,
            gold: &gold,
            given,
            kept_out: &kept_out,
            tokens: length.into(),
            may_repeat: options.repeat_distractors,
        };
        act(&mut self.library, &wanted)
    }

    /// The document's text, and what the task's metadata says of it. The last passage has no separator after it.
    fn render(&mut self, plan: &Plan, gold: &[u32]) -> anyhow::Result<(String, [(&'static str, Value); 5])> {
        let mut text = String::new();
        let mut tokens = 0;
        let mut places = BTreeMap::new();
        for (passage, place) in plan.passages.iter().zip(1..) {
            let (heading, body) = (heading(place), self.library.text(*passage)?);
            if gold.contains(passage) {
                places.insert(*passage, (place, tokens));
            }
            let is_last = place == plan.passages.len();
            text.push_str(&heading);
            text.push_str(&body);
            tokens += self.library.count(&heading);
            if is_last {
                tokens += self.library.count(&body);
            } else {
                text.push_str(SEPARATOR);
                tokens += self.library.tokens(*passage)?;
            }
        }
        let share =
            |(place, before): &(usize, u64)| json!({"passage": place, "depth": round(*before as f64 / tokens as f64)});
        let gold: Vec<Value> = gold.iter().filter_map(|passage| places.get(passage)).map(share).collect();
        let facts = [
            ("actual_tokens", tokens.into()),
            ("passages", plan.passages.len().into()),
            ("gold_passages", gold.into()),
            ("filler_passages", plan.filler.into()),
            ("repeated_passages", plan.repeated.into()),
        ];
        Ok((text, facts))
    }
}

/// Six digits after the point.
fn round(share: f64) -> f64 {
    (share * 1e6).round() / 1e6
}

/// How deep gold passages are to stand: all tasks' together are one in each of as many strata of equal width, anywhere inside.
struct Depths<'a> {
    seed: u64,
    name: &'a str,
    count: usize,
}

impl Depths<'_> {
    fn of(&self, place: usize) -> f64 {
        let stratum = Permutation::new(seed_of(self.seed, &["strata", self.name]), self.count).at(place);
        let inside = seed_of(self.seed, &["depth", self.name, &place.to_string()]) as f64 / 2f64.powi(64);
        (stratum as f64 + inside) / self.count as f64
    }
}

/// Consecutive tasks whose documents have together no more than [`UNIT_TOKENS`], or one.
fn units(all: &[(usize, u32)]) -> impl Iterator<Item = &[(usize, u32)]> {
    let mut tokens = 0;
    let mut unit = 0;
    let units: Vec<u64> = all
        .iter()
        .map(|(_, length)| {
            if tokens > 0 && tokens + u64::from(*length) > UNIT_TOKENS {
                (tokens, unit) = (0, unit + 1);
            }
            tokens += u64::from(*length);
            unit
        })
        .collect();
    let ends = (1..=all.len()).filter(move |end| units.get(*end) != Some(&units[end - 1]));
    let mut start = 0;
    ends.map(move |end| &all[std::mem::replace(&mut start, end)..end])
}

/// What the tables hold.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) tasks: u64,
    pub(crate) corpus: u64,
    passages: u64,
    filler: u64,
    repeated: u64,
}

impl Written {
    /// Adds a part of the tasks, as it stands in its file: it may be of an earlier process.
    fn add(&mut self, part: &Path) -> anyhow::Result<()> {
        for task in read_rows::<Task>(&[part.to_owned()]).bad_input()? {
            let task = task.bad_input()?;
            self.tasks += 1;
            self.corpus += u64::from(task.document_ref.is_some());
            let metadata: Value = serde_json::from_str(task.metadata.as_deref().unwrap_or("{}"))?;
            let count = |name: &str| metadata[name].as_u64().unwrap_or_default();
            self.passages += count("passages");
            self.filler += count("filler_passages");
            self.repeated += count("repeated_passages");
        }
        Ok(())
    }

    /// What the manifest says.
    pub(crate) fn summary(&self) -> Value {
        let Self { passages, filler, repeated, .. } = self;
        json!({"passages": passages, "filler_passages": filler, "repeated_passages": repeated})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_are_one_in_each_stratum() {
        for count in [1, 2, 7, 128, 1000] {
            let depths = Depths { seed: 3, name: "t", count };
            let mut strata: Vec<usize> =
                (0..count).map(|place| (depths.of(place) * count as f64).floor() as usize).collect();
            strata.sort_unstable();
            assert_eq!(strata, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn units_are_consecutive_and_bounded() {
        let all: Vec<(usize, u32)> = (0..9).map(|i| (i, [1 << 21, 5 << 20, 1000][i % 3])).collect();
        let cut: Vec<&[(usize, u32)]> = units(&all).collect();
        assert_eq!(cut.concat(), all);
        let tokens = |unit: &[(usize, u32)]| unit.iter().map(|(_, length)| u64::from(*length)).sum::<u64>();
        assert!(cut.iter().all(|unit| unit.len() == 1 || tokens(unit) <= UNIT_TOKENS), "{cut:?}");
        assert_eq!(cut.iter().map(|unit| unit.len()).collect::<Vec<_>>(), [1, 1, 2, 1, 2, 1, 1]);
        assert_eq!(units(&[]).count(), 0);
    }
}
