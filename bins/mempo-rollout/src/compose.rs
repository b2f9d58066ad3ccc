//! `compose`: questions joined into tasks of n objectives (MEM1, arXiv 2506.15841, section on multi-objective tasks).
//!
//! Within one source and split, consecutive questions form non-overlapping blocks; what does not fill a block is dropped.
//! [`answered`] leaves out what a policy knows. [`document`] gives each task a long document: [`evidence`] says which passages tell its answers, [`filler`] cuts prose into
//! others, [`library`] keeps them all on disk, [`plan`] chooses and orders those of one document.

mod answered;
mod document;
mod evidence;
mod filler;
mod library;
mod permutation;
mod plan;

use std::collections::{BTreeMap, HashSet};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, ensure};
use clap::Args;
use mempo_data::{Objective, Task, has_extension, write_json_rows, write_rows};
use mempo_run::{Input, ResultExt, Stage, StageArgs, seed_of};
use serde::Serialize;
use serde_json::{Value, json};

use self::answered::Answered;
use self::document::{Collection, DocumentOptions};
use crate::question::{COLUMNS, Defaults, Question};
use crate::rows;

/// Tasks in one file of the table.
const PART_ROWS: usize = 20_000;

/// Join questions into tasks of N objectives.
///
/// Reads rows of JSON lines, a JSON array or Parquet with a column `question` (or `query`) and `golden_answers` (or `answers`, `answer`): a
/// text, a list, or SQuAD's {"text": [...]}; or verl's `prompt`, `reward_model` and `extra_info` (with lists of answers in
/// `target`, a row is the questions that `extra_info` lists, or that the prompt ends in after a colon, joined by `; `, as MEM1's do). Optional columns: id, source (or data_source), split, metadata. A task joins N consecutive questions of one source and split; left-over questions are
/// dropped and counted. With --document each task is about a long text, at every length that --document-tokens lists: the
/// same questions, the passages that tell their answers at the same depth, among more and more others.
#[derive(Debug, Args, Serialize)]
pub(crate) struct ComposeArguments {
    /// Files of questions, `.parquet`, or JSON: a row a line, or one array (also `.gz`, `.zst`)
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    #[serde(skip)]
    questions: Vec<PathBuf>,
    /// Questions a task
    #[arg(long, value_name = "N", default_value = "2")]
    objectives: NonZeroUsize,
    /// A list-valued column of which the questions of a task share no value, such as `entities`
    #[arg(long, value_name = "COLUMN")]
    distinct: Option<String>,
    /// Take the questions in an order drawn from the seed instead of the files' order
    #[arg(long)]
    shuffle: bool,
    /// Leave out the questions that rollouts on other tasks answered in some trajectory (a gold answer stands in the one given, or the
    /// other way round), such as closed-book ones on tasks of one question (MemAgent's filter)
    #[arg(long, value_names = ["TASKS", "ROLLOUTS"], num_args = 2)]
    #[serde(skip)]
    unless_answered: Vec<PathBuf>,
    /// Stop after this many tasks
    #[arg(long, value_name = "N")]
    max_tasks: Option<NonZeroUsize>,
    /// What task ids begin with
    #[arg(long, default_value = "task")]
    name: String,
    /// Split of rows that name none
    #[arg(long, default_value = "train", value_parser = ["train", "dev", "test"])]
    split: String,
    /// Also write the tasks as verl's trainers for reinforcement learning read them, to OUT/verl.parquet: data_source, prompt,
    /// ability, reward_model, extra_info
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    verl: bool,
    #[command(flatten)]
    #[serde(flatten)]
    long: DocumentOptions,
    #[command(flatten)]
    #[serde(skip)]
    stage: StageArgs,
}

#[derive(Debug, Default)]
struct Counts {
    questions: u64,
    rejected_answers: u64,
    rejected_questions: u64,
    answered_questions: u64,
}

/// Runs `compose`.
pub(crate) fn run(arguments: &ComposeArguments) -> anyhow::Result<()> {
    arguments.stage.check_free()?;
    let mut inputs = vec![Input::files("questions", &arguments.questions)?];
    inputs.extend(arguments.long.inputs()?);
    let answered = Answered::open(&arguments.unless_answered)?;
    let known = answered.as_ref().map(Answered::questions).transpose()?.unwrap_or_default();
    let mut collection = arguments.long.collect(&arguments.stage.out)?;
    let (questions, counts) = read_questions(arguments, collection.as_mut(), &known).bad_input()?;
    let blocks = blocks(&questions, arguments);
    let composed = blocks.len() * arguments.objectives.get();
    let n = arguments.objectives;
    if blocks.is_empty() {
        return Err(anyhow!("{} questions make no task of {n} objectives", questions.len())).bad_input();
    }
    let tasks: Vec<Task> = blocks.iter().enumerate().map(|(i, block)| task(i, block, &questions, arguments)).collect();
    let documents =
        collection.map(|collection| collection.finish(arguments, &blocks, &tasks)).transpose().bad_input()?;
    let inputs: Vec<&Input> = inputs.iter().chain(answered.iter().flat_map(Answered::inputs)).collect();
    let Some(stage) = Stage::open("mempo-rollout", "compose", &arguments.stage, arguments, &inputs)? else {
        return Ok(());
    };
    let mut summary = json!({
        "questions": counts.questions,
        "rejected_answers": counts.rejected_answers,
        "rejected_questions": counts.rejected_questions,
        "unused_questions": questions.len() - composed,
    });
    if answered.is_some() {
        summary["answered_questions"] = counts.answered_questions.into();
        tracing::info!("{} questions left out that were answered", counts.answered_questions);
    }
    tracing::info!(
        "{} tasks of {n} from {} questions; {} not used, {} without an answer free of `;`",
        tasks.len(),
        counts.questions,
        summary["unused_questions"],
        counts.rejected_questions,
    );
    let Some(documents) = documents else {
        write_tasks(arguments, &stage, &tasks)?;
        return stage.finish(&[("tasks", tasks.len() as u64)], summary);
    };
    let written = documents.write(arguments, &stage, &tasks)?;
    summary["documents"] = written.summary();
    stage.finish(&[("tasks", written.tasks), ("corpus", written.corpus)], summary)
}

fn write_tasks(arguments: &ComposeArguments, stage: &Stage, tasks: &[Task]) -> anyhow::Result<()> {
    for (unit, part) in tasks.chunks(PART_ROWS).enumerate() {
        stage.write_part("tasks", unit, |file| Ok(write_rows(part, file).map(drop)?))?;
    }
    if arguments.verl {
        let rows: Vec<Value> = tasks.iter().enumerate().map(verl_row).collect();
        stage.write_file("verl.parquet", |file| Ok(write_json_rows(&rows, file)?))?;
    }
    Ok(())
}

fn read_questions(
    arguments: &ComposeArguments,
    mut collection: Option<&mut Collection>,
    known: &HashSet<String>,
) -> anyhow::Result<(Vec<Question>, Counts)> {
    let mut questions = Vec::new();
    let mut counts = Counts::default();
    let mut wanted: Vec<&str> = COLUMNS.into_iter().chain(arguments.distinct.as_deref()).collect();
    if collection.is_some() {
        wanted.extend(evidence::COLUMNS);
    }
    for path in &arguments.questions {
        let stem = stem(path);
        let distinct = arguments.distinct.as_deref();
        let defaults = Defaults { source: &stem, split: &arguments.split, distinct };
        let before = counts.questions;
        for row in rows::read(path, &wanted)? {
            let row = row?;
            let (parsed, rejected) = Question::parse(&row, &defaults)?;
            counts.rejected_questions += u64::from(parsed.is_none());
            let is_known =
                |question: &Question| question.objectives.iter().any(|asked| known.contains(&asked.question));
            counts.answered_questions += u64::from(parsed.as_ref().is_some_and(is_known));
            let question = parsed.filter(|question| !is_known(question));
            if let Some(collection) = &mut collection {
                collection.add(&row, question.is_some())?;
            }
            counts.questions += 1;
            counts.rejected_answers += rejected;
            questions.extend(question);
        }
        ensure_rows(path, counts.questions - before)?;
    }
    Ok((questions, counts))
}

/// A file's name without its extension, and without that of its compression.
fn stem(path: &Path) -> String {
    let compressed = has_extension(path, ".gz") || has_extension(path, ".zst");
    let path = if compressed { path.with_extension("") } else { path.to_owned() };
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn ensure_rows(path: &Path, rows: u64) -> anyhow::Result<()> {
    ensure!(rows > 0, "{} holds no rows", path.display());
    Ok(())
}

/// A task in the making: which questions, and what another may not share with them.
#[derive(Default)]
struct Block<'q> {
    members: Vec<usize>,
    values: HashSet<&'q str>,
}

/// The questions of each task. A question goes to the first open block of its source and split that it shares no value
/// with; without `--distinct` that is the only open one, so that blocks are consecutive.
fn blocks(questions: &[Question], arguments: &ComposeArguments) -> Vec<Vec<usize>> {
    let most = arguments.max_tasks.map_or(usize::MAX, NonZeroUsize::get);
    let mut open: BTreeMap<(&str, &str), Vec<Block<'_>>> = BTreeMap::new();
    let mut full = Vec::new();
    for index in order(questions.len(), arguments) {
        if full.len() == most {
            break;
        }
        let question = &questions[index];
        let values: HashSet<&str> = question.distinct.iter().map(String::as_str).collect();
        let candidates = open.entry((&question.source, &question.split)).or_default();
        let place = candidates.iter().position(|block| block.values.is_disjoint(&values)).unwrap_or_else(|| {
            candidates.push(Block::default());
            candidates.len() - 1
        });
        let block = &mut candidates[place];
        block.members.push(index);
        block.values.extend(values);
        if block.members.len() == arguments.objectives.get() {
            full.push(candidates.remove(place).members);
        }
    }
    full
}

/// The order in which questions are taken.
fn order(count: usize, arguments: &ComposeArguments) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    if arguments.shuffle {
        order.sort_by_cached_key(|index| (seed_of(arguments.stage.seed, &["compose", &index.to_string()]), *index));
    }
    order
}

fn task(index: usize, block: &[usize], questions: &[Question], arguments: &ComposeArguments) -> Task {
    let members: Vec<&Question> = block.iter().map(|index| &questions[*index]).collect();
    let objectives: Vec<Objective> = members.iter().flat_map(|question| question.objectives.clone()).collect();
    let texts: Vec<&str> = objectives.iter().map(|objective| objective.question.as_str()).collect();
    Task {
        task_id: format!("{}-{index:07}", arguments.name),
        source: members[0].source.clone(),
        split: members[0].split.clone(),
        question: texts.join("; "),
        objectives,
        document: None,
        document_ref: None,
        metadata: Some(metadata(&members, arguments.distinct.as_deref()).to_string()),
    }
}

/// A task as MEM1 composes them for verl: a list of answers for each question.
fn verl_row((index, task): (usize, &Task)) -> Value {
    let target: Vec<&[String]> = task.objectives.iter().map(|objective| &objective.answers[..]).collect();
    let questions: Vec<&str> = task.objectives.iter().map(|objective| objective.question.as_str()).collect();
    json!({
        "data_source": task.source,
        "prompt": [{"role": "user", "content": task.question}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": target}},
        "extra_info": {"split": task.split, "index": index, "task_id": task.task_id, "questions": questions},
    })
}

/// Ids of the questions, the values of the distinct column, and what metadata the rows had.
fn metadata(members: &[&Question], distinct: Option<&str>) -> Value {
    let mut fields = serde_json::Map::new();
    fields.insert("ids".to_owned(), members.iter().map(|question| question.id.as_str()).collect());
    if let Some(column) = distinct {
        fields.insert(column.to_owned(), members.iter().flat_map(|question| question.distinct.clone()).collect());
    }
    if members.iter().any(|question| question.metadata.is_some()) {
        let rows: Vec<Value> = members.iter().map(|question| question.metadata.clone().unwrap_or_default()).collect();
        fields.insert("rows".to_owned(), rows.into());
    }
    fields.into()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use mempo_data::read_rows;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: ComposeArguments,
    }

    fn arguments(words: &str) -> ComposeArguments {
        let line = format!("compose --questions q.jsonl --out out {words}");
        Line::parse_from(line.split_whitespace()).arguments
    }

    /// Questions named by their place, `a0 a1 …`, source and entities given.
    fn questions(rows: &[(&str, &[&str])]) -> Vec<Question> {
        let row = |(index, (source, entities)): (usize, &(&str, &[&str]))| Question {
            id: format!("q{index}"),
            source: (*source).to_owned(),
            split: "train".to_owned(),
            objectives: vec![Objective { question: format!("Q{index}?"), answers: vec![format!("A{index}")] }],
            metadata: None,
            distinct: entities.iter().map(ToString::to_string).collect(),
        };
        rows.iter().enumerate().map(row).collect()
    }

    #[test]
    fn blocks_are_consecutive_within_a_source_and_drop_the_tail() {
        let rows = [("nq", &[][..]), ("hotpot", &[]), ("nq", &[]), ("nq", &[]), ("hotpot", &[]), ("hotpot", &[])];
        let questions = questions(&rows);
        assert_eq!(blocks(&questions, &arguments("--objectives 2")), [vec![0, 2], vec![1, 4]]);
        assert_eq!(blocks(&questions, &arguments("--objectives 3")), [vec![0, 2, 3], vec![1, 4, 5]]);
        assert_eq!(blocks(&questions, &arguments("--objectives 1")).len(), 6);
        assert_eq!(blocks(&questions, &arguments("--objectives 2 --max-tasks 1")).len(), 1);
        assert!(blocks(&questions, &arguments("--objectives 4")).is_empty());
    }

    #[test]
    fn distinct_blocks_never_share_a_value() {
        let names: Vec<String> = (0..7).map(|name| format!("e{name}")).collect();
        let pairs: Vec<[&str; 2]> = (0..40).map(|i| [names[i % 7].as_str(), names[(i * i + 1) % 7].as_str()]).collect();
        let rows: Vec<(&str, &[&str])> = pairs.iter().map(|pair| ("s", &pair[..])).collect();
        let questions = questions(&rows);
        for words in ["--distinct entities", "--distinct entities --shuffle --seed 3"] {
            let arguments = arguments(&format!("--objectives 3 {words}"));
            let blocks = blocks(&questions, &arguments);
            assert!(blocks.len() >= 6, "{}", blocks.len());
            let mut used = HashSet::new();
            for block in &blocks {
                assert!(block.iter().all(|index| used.insert(*index)), "a question is used once");
                let sets = block.iter().map(|index| pairs[*index].into_iter().collect::<HashSet<_>>());
                let together = sets.clone().flatten().collect::<HashSet<_>>().len();
                assert_eq!(sets.map(|set| set.len()).sum::<usize>(), together);
            }
        }
    }

    #[test]
    fn shuffling_follows_the_seed_alone() {
        let order_of = |seed: u64| order(50, &arguments(&format!("--shuffle --seed {seed}")));
        assert_eq!(order_of(1), order_of(1));
        assert_ne!(order_of(1), order_of(2));
        let mut sorted = order_of(1);
        sorted.sort_unstable();
        assert_eq!(sorted, order(50, &arguments("")));
    }

    #[test]
    fn a_task_joins_questions_and_remembers_where_they_come_from() {
        let mut questions = questions(&[("nq", &["x"]), ("nq", &["y", "z"])]);
        questions[1].metadata = Some(json!({"hops": 2}));
        let task = task(12, &[0, 1], &questions, &arguments("--name dev --distinct entities"));
        assert_eq!((task.task_id.as_str(), task.question.as_str()), ("dev-0000012", "Q0?; Q1?"));
        assert_eq!(task.objectives[1], Objective { question: "Q1?".to_owned(), answers: vec!["A1".to_owned()] });
        let metadata: Value = serde_json::from_str(&task.metadata.unwrap()).unwrap();
        let expected = json!({"ids": ["q0", "q1"], "entities": ["x", "y", "z"], "rows": [null, {"hops": 2}]});
        assert_eq!(metadata, expected);
    }

    #[test]
    fn tasks_written_for_verl_are_the_same_tasks_when_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let row =
            |i: usize| json!({"question": format!("Q{i}?"), "golden_answers": [format!("A{i}"), "é"]}).to_string();
        fs_err::write(path("nq.jsonl"), (0..6).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let tasks = |questions: &str, objectives: &str, out: &str| -> Vec<Task> {
            let (questions, out) = (path(questions), path(out));
            let words = ["compose", "--questions", questions.to_str().unwrap(), "--objectives", objectives, "--verl"];
            let words = words.into_iter().chain(["--out", out.to_str().unwrap()]);
            run(&Line::parse_from(words).arguments).unwrap();
            read_rows(&[out.join("tasks/part-00000.parquet")]).unwrap().map(Result::unwrap).collect()
        };
        let (first, again) = (tasks("nq.jsonl", "2", "first"), tasks("first/verl.parquet", "1", "again"));
        let same = |task: &Task| (task.source.clone(), task.question.clone(), task.objectives.clone());
        assert_eq!(first.iter().map(same).collect::<Vec<_>>(), again.iter().map(same).collect::<Vec<_>>());
        assert_eq!((first.len(), first[2].objectives.len()), (3, 2));
    }
}
