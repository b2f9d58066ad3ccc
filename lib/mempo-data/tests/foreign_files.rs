//! Files of other programs: what is harmless is converted, what is not is refused with the place and the remedy.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

use std::{path::PathBuf, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, BooleanArray, DictionaryArray, Float64Array, Int64Array, LargeListArray, LargeStringArray,
        NullArray, StringArray, StringViewArray, StructArray, UInt8Array, types::Int32Type,
    },
    buffer::OffsetBuffer,
    datatypes::{DataType, Field},
    record_batch::RecordBatch,
};
use mempo_data::{Document, Logprobs, Objective, Row, SftExample, Task, Trajectory, read_rows, write_rows};

/// Writes the columns as any other program would, and reads them as rows of `R`.
fn read<R: Row>(columns: Vec<(&str, ArrayRef)>) -> (PathBuf, mempo_data::Result<Vec<R>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.parquet");
    let batch = RecordBatch::try_from_iter_with_nullable(
        columns.into_iter().map(|(name, array)| (name.to_owned(), array, true)),
    )
    .unwrap();
    let file = fs_err::File::create(&path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let rows = read_rows::<R>(std::slice::from_ref(&path)).and_then(Iterator::collect);
    (path, rows)
}

#[track_caller]
fn check_refused<R: Row + std::fmt::Debug>(columns: Vec<(&str, ArrayRef)>, expected: &str) {
    let (path, rows) = read::<R>(columns);
    let error = rows.unwrap_err();
    assert_eq!(error.to_string(), expected.replace("FILE", &path.display().to_string()));
}

fn text(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

#[test]
fn text_of_every_kind_and_more_columns_in_another_order() {
    let dictionary: DictionaryArray<Int32Type> = ["x", "y"].into_iter().collect();
    let (_, rows) = read::<Document>(vec![
        ("url", text(&["u", "v"])),
        ("text", Arc::new(dictionary)),
        ("title", Arc::new(LargeStringArray::from(vec!["A", "B"]))),
        ("doc_id", Arc::new(StringViewArray::from(vec!["0", "1"]))),
    ]);
    let document = |doc_id: &str, title: &str, text: &str| Document {
        doc_id: doc_id.to_owned(),
        title: title.to_owned(),
        text: text.to_owned(),
    };
    assert_eq!(rows.unwrap(), [document("0", "A", "x"), document("1", "B", "y")]);
}

/// One list per row with the given items.
fn large_list(item_name: &str, items: ArrayRef, lengths: &[usize]) -> ArrayRef {
    let field = Arc::new(Field::new(item_name, items.data_type().clone(), true));
    Arc::new(LargeListArray::new(field, OffsetBuffer::from_lengths(lengths.iter().copied()), items, None))
}

#[test]
fn nested_columns_are_converted_inside_and_matched_by_name() {
    let answers = large_list("item", Arc::new(LargeStringArray::from(vec!["Ada", "Eva"])), &[2]);
    let fields = vec![
        Arc::new(Field::new("answers", answers.data_type().clone(), true)),
        Arc::new(Field::new("difficulty", DataType::UInt8, true)),
        Arc::new(Field::new("question", DataType::Utf8, true)),
    ];
    let objectives =
        StructArray::new(fields.into(), vec![answers, Arc::new(UInt8Array::from(vec![3])), text(&["Who?"])], None);
    let (_, rows) = read::<Task>(vec![
        ("task_id", text(&["a"])),
        ("source", text(&["s"])),
        ("split", text(&["dev"])),
        ("question", text(&["Who?"])),
        ("objectives", large_list("item", Arc::new(objectives), &[1])),
        ("metadata", Arc::new(NullArray::new(1))),
    ]);
    let task = &rows.unwrap()[0];
    let answers = vec!["Ada".to_owned(), "Eva".to_owned()];
    assert_eq!(task.objectives, [Objective { question: "Who?".to_owned(), answers }]);
    assert_eq!((&task.document, &task.metadata), (&None, &None));
}

fn example_columns(step_index: ArrayRef, mask: ArrayRef) -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("example_id", text(&["e"])),
        ("trajectory_id", text(&["t"])),
        ("step_index", step_index),
        ("input_ids", large_list("element", Arc::new(Int64Array::from(vec![1, 2])), &[2])),
        ("loss_mask", large_list("element", mask, &[2])),
        ("target_count", Arc::new(Int64Array::from(vec![1]))),
    ]
}

#[test]
fn integers_of_other_widths_if_they_fit() {
    let mask = || -> ArrayRef { Arc::new(BooleanArray::from(vec![false, true])) };
    let (_, rows) = read::<SftExample>(example_columns(Arc::new(UInt8Array::from(vec![7])), mask()));
    assert_eq!(rows.unwrap()[0].step_index, 7);
    check_refused::<SftExample>(
        example_columns(Arc::new(Int64Array::from(vec![1 << 40])), mask()),
        "FILE: column `step_index`, rows 0 to 1: a value does not fit type Int32",
    );
}

#[test]
fn refusals_name_column_found_and_expected() {
    check_refused::<SftExample>(
        example_columns(text(&["first"]), Arc::new(BooleanArray::from(vec![false, true]))),
        "FILE: column `step_index` has type Utf8, expected Int32; convert it first",
    );
    let step_index = || -> ArrayRef { Arc::new(Int64Array::from(vec![0])) };
    check_refused::<SftExample>(
        example_columns(step_index(), Arc::new(Float64Array::from(vec![0.0, 1.0]))),
        "FILE: column `loss_mask.element` has type Float64, expected Boolean; convert it first",
    );
    check_refused::<SftExample>(
        example_columns(step_index(), Arc::new(BooleanArray::from(vec![Some(true), None]))),
        "FILE: column `loss_mask.element` is null in row 1, expected a value in every row",
    );
    check_refused::<Document>(
        vec![("id", text(&["a"])), ("title", text(&["b"])), ("text", text(&["c"]))],
        "FILE: no column `doc_id`, expected one of type Utf8; the file has `id`, `title`, `text`",
    );
    check_refused::<Document>(
        vec![("doc_id", text(&["a"])), ("title", Arc::new(NullArray::new(1))), ("text", text(&["c"]))],
        "FILE: column `title` is null in row 0, expected a value in every row",
    );
}

#[test]
fn doubles_are_rounded_to_single_precision() {
    let (_, rows) = read::<Logprobs>(vec![
        ("task_id", text(&["a"])),
        ("trajectory_index", Arc::new(Int64Array::from(vec![0]))),
        ("step_index", Arc::new(Int64Array::from(vec![0]))),
        ("policy_logprobs", large_list("item", Arc::new(Float64Array::from(vec![-0.1])), &[1])),
    ]);
    assert_eq!(rows.unwrap()[0].policy_logprobs, [-0.1f32]);
}

fn file_with(folder: &tempfile::TempDir, content: &[u8]) -> PathBuf {
    let path = folder.path().join("part-00000.parquet");
    fs_err::write(&path, content).unwrap();
    path
}

fn corpus_bytes() -> Vec<u8> {
    let document = Document { doc_id: "a".to_owned(), title: "b".to_owned(), text: "c".to_owned() };
    let mut sink = Vec::new();
    write_rows(&[document], &mut sink).unwrap();
    sink
}

#[test]
fn another_table_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = file_with(&folder, &corpus_bytes());
    let error = read_rows::<Trajectory>(std::slice::from_ref(&path)).err().unwrap();
    let expected = format!("{}: holds table `corpus`, expected table `trajectories`", path.display());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_newer_schema_is_refused() {
    let content = corpus_bytes();
    let key = b"mempo.schema_version";
    let place = content.windows(key.len()).rposition(|window| window == key).unwrap() + key.len();
    let digit = place + content[place..].iter().position(|&byte| byte == b'1').unwrap();
    let newer = [&content[..digit], b"9", &content[digit + 1..]].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = file_with(&folder, &newer);
    let error = read_rows::<Document>(std::slice::from_ref(&path)).err().unwrap();
    let expected = format!("{}: schema version 9, this program reads up to 1; use a newer program", path.display());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_truncated_file_is_refused() {
    let content = corpus_bytes();
    for length in [0, 3, 8, content.len() / 2, content.len() - 1] {
        let folder = tempfile::tempdir().unwrap();
        let path = file_with(&folder, &content[..length]);
        let error = read_rows::<Document>(std::slice::from_ref(&path)).err().unwrap();
        let expected = format!("{}: cannot be read as a Parquet file; copy or make it again", path.display());
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn an_unknown_status_is_refused() {
    let list = || large_list("element", Arc::new(Float64Array::from(vec![1.0])), &[1]);
    let one = || -> ArrayRef { Arc::new(Int64Array::from(vec![1])) };
    let (path, rows) = read::<Trajectory>(vec![
        ("task_id", text(&["a"])),
        ("trajectory_index", one()),
        ("step_count", one()),
        ("status", text(&["fine"])),
        ("format_valid", Arc::new(BooleanArray::from(vec![true]))),
        ("exact_match", list()),
        ("f1", list()),
        ("generated_tokens", one()),
        ("processed_tokens", one()),
        ("unique_tokens", one()),
        ("peak_tokens", one()),
        ("tool_calls", one()),
        ("policy", text(&["p"])),
        ("seed", one()),
    ]);
    let error = rows.unwrap_err();
    let place = path.display();
    assert_eq!(error.to_string(), format!("{place}: rows 0 to 1 of table `trajectories` hold a value with no meaning"));
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("unknown variant `fine`") && cause.contains("status"), "{cause}");
}
