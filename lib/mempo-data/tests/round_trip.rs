//! Rows that go into a file come out of it equal, and equal rows give equal files.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

use std::{io::Write, path::PathBuf};

use mempo_data::{
    Advantage, AnsweredQuery, Context, Document, Error, Key, Logprobs, Objective, Row, Score, Segment, SegmentKind,
    SftExample, Status, Step, StopReason, TABLES, TableWriter, Task, Trajectory, columns, read_rows, write_rows,
};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use proptest::prelude::*;

fn bytes<R: Row>(rows: &[R]) -> Vec<u8> {
    let mut sink = Vec::new();
    assert_eq!(write_rows(rows, &mut sink).unwrap(), rows.len() as u64);
    sink
}

fn through_a_file<R: Row>(rows: &[R]) -> Vec<R> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("part-00000.parquet");
    fs_err::write(&path, bytes(rows)).unwrap();
    read_rows(&[path]).unwrap().collect::<Result<_, _>>().unwrap()
}

#[track_caller]
fn check<R: Row + PartialEq + std::fmt::Debug>(rows: &[R]) {
    assert!(TABLES.contains(&R::TABLE));
    assert_eq!(through_a_file(rows), rows);
    assert_eq!(through_a_file::<R>(&[]), []);
    assert_eq!(bytes(rows), bytes(rows));
}

fn full_task(task_id: &str) -> Task {
    Task {
        task_id: task_id.to_owned(),
        source: "hotpotqa".to_owned(),
        split: "dev".to_owned(),
        question: "Who? Where?".to_owned(),
        objectives: vec![
            Objective { question: "Who?".to_owned(), answers: vec!["Ada".to_owned(), "Lovelace".to_owned()] },
            Objective { question: "Where?".to_owned(), answers: vec![] },
        ],
        document: Some("Ada 🜚 lived\nin London.".to_owned()),
        document_ref: Some("corpus.parquet#7".to_owned()),
        metadata: Some("{}".to_owned()),
    }
}

fn bare_task(task_id: &str) -> Task {
    Task { objectives: vec![], document: None, document_ref: None, metadata: None, ..full_task(task_id) }
}

#[test]
fn tasks() {
    check(&[full_task("a"), bare_task("b")]);
    check(&[bare_task("a"), bare_task("b")]);
}

fn full_trajectory(trajectory_index: i32, status: Status) -> Trajectory {
    Trajectory {
        task_id: "a".to_owned(),
        trajectory_index,
        step_count: 3,
        status,
        answer: Some("Ada; London".to_owned()),
        format_valid: true,
        exact_match: vec![1.0, 0.0],
        f1: vec![1.0, 0.4],
        reward: Some(0.0),
        generated_tokens: 10,
        processed_tokens: 200,
        unique_tokens: 90,
        peak_tokens: i32::MAX,
        tool_calls: 2,
        error: Some("no such page".to_owned()),
        policy: "00ff".to_owned(),
        seed: u64::MAX,
    }
}

#[test]
fn trajectories_of_every_status() {
    let statuses = [
        Status::Ok,
        Status::MaxSteps,
        Status::Truncated,
        Status::ParseError,
        Status::ToolError,
        Status::EngineError,
        Status::Timeout,
    ];
    let full: Vec<Trajectory> = (0..).zip(statuses).map(|(index, status)| full_trajectory(index, status)).collect();
    check(&full);
    let bare = full.into_iter().map(|row| Trajectory {
        answer: None,
        reward: None,
        error: None,
        exact_match: vec![],
        f1: vec![],
        ..row
    });
    check(&bare.collect::<Vec<_>>());
}

fn full_step(step_index: i32, stop_reason: StopReason) -> Step {
    let kinds = [SegmentKind::Memory, SegmentKind::Think, SegmentKind::ToolCall, SegmentKind::Answer];
    let segments = (0..).zip(kinds).map(|(start, kind)| Segment { kind, start, end: start + 1 });
    Step {
        task_id: "a".to_owned(),
        trajectory_index: 0,
        step_index,
        prompt_ids: vec![1, 2, 3],
        completion_ids: vec![4, 5, 6, 7],
        sampling_logprobs: vec![-0.5, f32::NEG_INFINITY, -1e-30, 0.0],
        segments: segments.collect(),
        completion: "<mem>x</mem>".to_owned(),
        observation: Some("Doc 1".to_owned()),
        observation_ids: Some(vec![]),
        stop_reason,
    }
}

#[test]
fn steps_of_every_stop_reason() {
    let reasons = [StopReason::StopString, StopReason::Eos, StopReason::MaxTokens, StopReason::Error];
    let full: Vec<Step> = (0..).zip(reasons).map(|(index, reason)| full_step(index, reason)).collect();
    check(&full);
    let bare = full.into_iter().map(|row| Step {
        prompt_ids: vec![],
        completion_ids: vec![],
        sampling_logprobs: vec![],
        segments: vec![],
        observation: None,
        observation_ids: None,
        ..row
    });
    check(&bare.collect::<Vec<_>>());
}

fn score(step_index: i32, value: Option<f64>) -> Score {
    Score {
        task_id: "a".to_owned(),
        trajectory_index: 1,
        step_index,
        answer_logprob: value,
        answer_probability: value,
        objective_logprobs: value.map(|value| vec![value, value / 3.0]),
        bias_logprob: value,
        bias_probability: value,
        memory_reward: value,
        answer_token_count: 4,
        truncated: true,
    }
}

#[test]
fn scores() {
    check(&[score(0, Some(-0.1)), score(1, None)]);
    check(&[score(0, None), score(1, None)]);
}

fn context(kind: &str) -> Context {
    Context {
        task_id: "a".to_owned(),
        trajectory_index: 0,
        step_index: 1,
        kind: kind.to_owned(),
        context_ids: vec![1, 2],
        answer_ids: vec![3],
    }
}

#[test]
fn contexts_may_repeat_a_key() {
    check(&[context("memory"), context("bias")]);
}

fn logprobs_of(step_index: i32, reference_logprobs: Option<Vec<f32>>) -> Logprobs {
    Logprobs {
        task_id: "a".to_owned(),
        trajectory_index: 0,
        step_index,
        policy_logprobs: vec![-0.25, -3.5],
        reference_logprobs,
    }
}

#[test]
fn logprobs() {
    check(&[logprobs_of(0, Some(vec![-0.3, -3.0])), logprobs_of(1, None)]);
    check(&[logprobs_of(0, None)]);
}

fn advantage(step_index: i32, memory_advantage: Option<f32>) -> Advantage {
    Advantage {
        task_id: "a".to_owned(),
        trajectory_index: 0,
        step_index,
        trajectory_advantage: -0.75,
        memory_advantage,
        memory_start: memory_advantage.map(|_| 2),
        memory_end: memory_advantage.map(|_| 7),
        loss_weight: 1.0,
    }
}

#[test]
fn advantages() {
    check(&[advantage(0, Some(0.5)), advantage(1, None)]);
    check(&[advantage(0, None)]);
}

fn example(number: usize) -> SftExample {
    SftExample {
        example_id: format!("{number:06}"),
        trajectory_id: "t".to_owned(),
        task_id: Some("a".to_owned()),
        split: Some("train".to_owned()),
        step_index: 0,
        input_ids: vec![number as i32, 9],
        loss_mask: vec![false, true],
        target_count: 1,
    }
}

#[test]
fn sft_examples() {
    check(&[example(0), SftExample { task_id: None, split: None, ..example(1) }]);
}

fn document(number: usize, text: &str) -> Document {
    Document { doc_id: format!("{number:06}"), title: "T".to_owned(), text: text.to_owned() }
}

#[test]
fn corpus() {
    check(&[document(0, ""), document(1, "b")]);
}

#[test]
fn queries() {
    let row = |query: &str, top_k, documents| AnsweredQuery { query: query.to_owned(), top_k, documents };
    check(&[row("", 1, vec![]), row("Où ?", 2, vec![document(0, ""), document(1, "b")]), row("Où ?", 3, vec![])]);
}

#[test]
fn many_rows_and_row_groups() {
    check(&(0..40_000).map(example).collect::<Vec<_>>());
}

#[test]
fn long_texts_end_a_row_group_early_and_are_read_few_at_a_time() {
    let text = "so long a text ".repeat(1 << 18);
    let rows: Vec<Document> = (0..40).map(|number| document(number, &format!("{number}{text}"))).collect();
    assert!(footer(&bytes(&rows)).num_row_groups() >= 2);
    assert_eq!(through_a_file(&rows), rows);
}

/// The footer of a file.
fn footer(content: &[u8]) -> ParquetMetaData {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    ParquetMetaDataReader::new().parse_and_finish(&file).unwrap()
}

#[test]
fn file_metadata_holds_version_and_table_and_nothing_else_of_ours() {
    let metadata = footer(&bytes(&[example(0)]));
    let pairs = metadata.file_metadata().key_value_metadata().unwrap();
    let mut pairs: Vec<_> = pairs.iter().map(|pair| (pair.key.as_str(), pair.value.as_deref())).collect();
    pairs.retain(|(key, _)| *key != "ARROW:schema");
    assert_eq!(pairs, [("mempo.schema_version", Some("1")), ("mempo.table", Some("sft_examples"))]);
}

#[test]
fn pushing_rows_one_by_one_gives_the_same_bytes() {
    let rows: Vec<SftExample> = (0..3000).map(example).collect();
    let mut sink = Vec::new();
    let mut writer = TableWriter::new(&mut sink).unwrap();
    for row in &rows {
        writer.push(row).unwrap();
    }
    assert_eq!(writer.finish().unwrap(), 3000);
    assert_eq!(sink, bytes(&rows));
}

#[test]
fn rows_must_be_sorted_and_unique() {
    let unsorted = write_rows(&[example(1), example(0)], Vec::new()).unwrap_err();
    assert_eq!(
        unsorted.to_string(),
        "table `sft_examples`: 000000/trajectory 0/step 0 comes after 000001/trajectory 0/step 0, expected rows sorted \
         by key; sort the file"
    );
    let twice = write_rows(&[example(1), example(1)], Vec::new()).unwrap_err();
    assert!(matches!(twice, Error::Duplicate { key, .. } if key == Key::of_id("000001")));
}

#[test]
fn a_full_disk_is_an_io_error_in_the_chain() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let error = write_rows(&[example(0)], Full).unwrap_err();
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    let mut found = None;
    while let Some(error) = source {
        found = found.or(error.downcast_ref::<std::io::Error>().map(std::io::Error::kind));
        source = error.source();
    }
    assert_eq!(found, Some(std::io::ErrorKind::StorageFull));
}

#[test]
fn every_struct_field_is_a_column() {
    // A field without a column would be dropped in silence, so the fields are taken from the rows' debug form.
    fn fields<R: Row + std::fmt::Debug>(row: &R) -> Vec<String> {
        let text = format!("{row:#?}");
        let lines = text.lines().filter(|line| line.starts_with("    ") && !line.starts_with("     "));
        lines.filter_map(|line| line.trim().split_once(": ").map(|(name, _)| name.to_owned())).collect()
    }
    fn check<R: Row + std::fmt::Debug>(row: &R) {
        let names: Vec<_> = columns(R::TABLE).unwrap().iter().map(|column| column.name.to_owned()).collect();
        assert_eq!(fields(row), names, "{}", R::TABLE);
    }
    check(&full_task("a"));
    check(&full_trajectory(0, Status::Ok));
    check(&full_step(0, StopReason::Eos));
    check(&score(0, None));
    check(&context("bias"));
    check(&logprobs_of(0, None));
    check(&advantage(0, None));
    check(&example(0));
    check(&document(0, ""));
}

fn any_step() -> impl Strategy<Value = Step> {
    let ids = || prop::collection::vec(any::<i32>(), 0..5);
    let texts = (any::<String>(), prop::option::of(any::<String>()), prop::option::of(ids()));
    (ids(), ids(), prop::collection::vec(-1e9f32..0.0, 0..5), texts).prop_map(
        |(prompt_ids, completion_ids, sampling_logprobs, (completion, observation, observation_ids))| Step {
            prompt_ids,
            completion_ids,
            sampling_logprobs,
            completion,
            observation,
            observation_ids,
            ..full_step(0, StopReason::Eos)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_steps(mut rows in prop::collection::vec(any_step(), 0..20)) {
        (0..).zip(&mut rows).for_each(|(index, row): (i32, &mut Step)| row.step_index = index);
        prop_assert_eq!(through_a_file(&rows), rows);
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = read_rows::<Task>(&[PathBuf::from("/nowhere/part-00000.parquet")]).err().unwrap();
    assert_eq!(error.to_string(), "cannot read rows from /nowhere/part-00000.parquet");
}
