//! `compose --document` through the program's own `run`: what stands in the documents, and where.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]

mod program;

use std::path::{Path, PathBuf};

use mempo_data::{Task, read_document, read_rows};
use mempo_text::{NewTokenizer, Tokenizer, train_tokenizer};
use serde_json::{Value, json};

use program::{fails, run, write_lines};

fn tasks(stage: &Path) -> Vec<Task> {
    let mut files = files(stage);
    files.retain(|file| file.parent().unwrap().ends_with("tasks"));
    read_rows(&files).unwrap().map(Result::unwrap).collect()
}

/// All Parquet files of a stage.
fn files(stage: &Path) -> Vec<PathBuf> {
    let folders = ["tasks", "corpus"].map(|table| stage.join(table));
    let entries = folders.iter().filter(|folder| folder.is_dir()).flat_map(|folder| fs_err::read_dir(folder).unwrap());
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn bytes(stage: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let relative = |file: &PathBuf| file.strip_prefix(stage).unwrap().to_owned();
    files(stage).iter().map(|file| (relative(file), fs_err::read(file).unwrap())).collect()
}

fn metadata(task: &Task) -> Value {
    serde_json::from_str(task.metadata.as_ref().unwrap()).unwrap()
}

/// A hundred cities, 41 questions about some of them, each naming the documents of two, some prose, a tokenizer.
fn write_inputs(directory: &Path) {
    let city = |i: usize| {
        let text = format!("City {i} is in land {}. {}", i * 7, "It has streets and squares. ".repeat(1 + i % 5));
        json!({"id": format!("c{i}"), "title": format!("City {i}"), "text": text})
    };
    write_lines(&directory.join("cities.jsonl"), &(0..100).map(city).collect::<Vec<_>>());
    let question = |i: usize| {
        let hops = json!([{"doc_id": format!("c{i}")}, {"doc_id": format!("c{}", i + 50)}]);
        json!({"question": format!("Where is city {i}"), "answer": format!("land {}", i * 7), "metadata": {"hops": hops}})
    };
    write_lines(&directory.join("questions.jsonl"), &(0..41).map(question).collect::<Vec<_>>());
    let prose = |i: usize| format!("Chapter {i}. {}\n\n", "The sea was calm, and nobody spoke of it. ".repeat(20));
    let prose: String = (0..400).map(prose).collect();
    fs_err::write(directory.join("novel.txt"), &prose).unwrap();
    let text =
        format!("Document 1:\nCity 17\nCity 17 is in land 119. It has streets and squares.\n\n{}", &prose[..3000]);
    train_tokenizer(std::iter::repeat_n(text, 3), &NewTokenizer::of_size(400), &directory.join("model")).unwrap();
}

const COMPOSE: &str =
    "compose --document --questions @questions.jsonl --objectives 2 --documents @cities.jsonl --tokenizer @model";

/// The title and text of a document of the corpus.
fn passage(directory: &Path, id: &str) -> String {
    let lines = fs_err::read_to_string(directory.join("cities.jsonl")).unwrap();
    let mut rows = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let row = rows.find(|row| row["id"] == id).unwrap();
    format!("{}\n{}", row["title"].as_str().unwrap(), row["text"].as_str().unwrap().trim())
}

#[test]
fn the_same_questions_come_at_every_length_with_their_passages_once() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    run(directory, &format!("{COMPOSE} --document-tokens 900 600 1500 --name eval --seed 5 --out @out")).unwrap();
    run(directory, "verify @out").unwrap();
    let stage = directory.join("out");
    let tasks = tasks(&stage);
    assert_eq!(tasks.len(), 3 * 20);
    let ids: Vec<&str> = tasks[..4].iter().map(|task| task.task_id.as_str()).collect();
    assert_eq!(ids, ["eval-0000000-1500", "eval-0000000-600", "eval-0000000-900", "eval-0000001-1500"]);
    assert!(tasks.is_sorted_by_key(|task| &task.task_id));
    let tokenizer = Tokenizer::load(&directory.join("model")).unwrap();
    let mut depths = std::collections::BTreeMap::<u64, Vec<f64>>::new();
    for task in &tasks {
        let document = read_document(&stage, task).unwrap().unwrap();
        let facts = metadata(task);
        let length = facts["document_tokens"].as_u64().unwrap();
        assert!(task.task_id.ends_with(&format!("-{length}")));
        let tokens = tokenizer.encode_untrusted(&document).len() as u64;
        assert_eq!(facts["actual_tokens"], tokens, "counted piece by piece as at once");
        assert!(tokens <= length && tokens + 110 > length, "{tokens} of {length}: short by less than a passage");
        let gold = facts["rows"].as_array().unwrap().iter().flat_map(|row| row["hops"].as_array().unwrap());
        let gold: Vec<&str> = gold.map(|hop| hop["doc_id"].as_str().unwrap()).collect();
        assert_eq!(gold.len(), 4);
        for (id, place) in gold.iter().zip(facts["gold_passages"].as_array().unwrap()) {
            let whole = format!("Document {}:\n{}", place["passage"], passage(directory, id));
            assert_eq!(document.matches(&whole).count(), 1, "{id} in {}", task.task_id);
            assert_eq!(document.matches(&passage(directory, id)).count(), 1, "{id} in {}", task.task_id);
            let before = tokenizer.encode_untrusted(&document[..document.find(&whole).unwrap()]).len();
            let depth = place["depth"].as_f64().unwrap();
            assert!((depth - before as f64 / tokens as f64).abs() < 1e-5);
            depths.entry(length).or_default().push(depth);
        }
        let passages: Vec<&str> = document.split("\n\n").collect();
        assert_eq!(passages.len() as u64, facts["passages"].as_u64().unwrap());
        let bodies = passages.iter().map(|passage| passage.split_once('\n').unwrap().1);
        assert_eq!(bodies.collect::<std::collections::HashSet<_>>().len(), passages.len(), "nothing twice");
        assert!(passages[1].starts_with("Document 2:\nCity "));
    }
    for (length, mut depths) in depths {
        depths.sort_by(f64::total_cmp);
        assert_eq!(depths.len(), 80);
        let even = |i: usize| (i as f64 + 0.5) / 80.0;
        let off = depths.iter().enumerate().map(|(i, depth)| (depth - even(i)).abs()).fold(0.0, f64::max);
        assert!(off < 0.2, "{length}: {off} off an even spread");
        let mean = depths.iter().sum::<f64>() / 80.0;
        assert!((mean - 0.5).abs() < 0.08, "{length}: mean depth {mean}");
    }
    for block in tasks.chunks(3) {
        let same = |task: &Task| (task.question.clone(), task.objectives.clone(), metadata(task)["rows"].clone());
        assert!(block.iter().all(|task| same(task) == same(&block[0])), "one question, three lengths");
    }
}

#[test]
fn large_documents_stand_beside_the_tasks_and_a_killed_run_ends_with_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    let line = format!(
        "{COMPOSE} --max-tasks 3 --document-tokens 2000 150000 --filler @novel.txt --repeat-distractors --seed 5"
    );
    run(directory, &format!("{line} --out @whole")).unwrap();
    run(directory, "verify @whole").unwrap();
    let stage = directory.join("whole");
    let rows = tasks(&stage);
    assert_eq!(rows.len(), 6);
    for task in &rows {
        let is_large = metadata(task)["document_tokens"] == 150_000;
        assert_eq!((task.document.is_some(), task.document_ref.is_some()), (!is_large, is_large));
        let document = read_document(&stage, task).unwrap().unwrap();
        assert_eq!(document.len() > 256 << 10, is_large, "{}", document.len());
        assert_eq!(metadata(task)["repeated_passages"].as_u64().unwrap() > 0, is_large);
    }
    assert_eq!(rows[0].document_ref.as_deref(), Some("corpus/part-00000.parquet#task-0000000-150000"));
    let manifest: Value = serde_json::from_slice(&fs_err::read(stage.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["rows"], json!({"tasks": 6, "corpus": 3}));
    let sum = |name: &str| rows.iter().map(|task| metadata(task)[name].as_u64().unwrap()).sum::<u64>();
    assert_eq!(manifest["summary"]["documents"]["repeated_passages"], sum("repeated_passages"));

    // As a process leaves it that was killed after a document, before the tasks that go with it.
    run(directory, &format!("{line} --out @cut")).unwrap();
    let cut = directory.join("cut");
    for path in ["manifest.json", "tasks/part-00000.parquet", "corpus/part-00002.parquet"] {
        fs_err::remove_file(cut.join(path)).unwrap();
    }
    run(directory, &format!("{line} --out @cut")).unwrap();
    assert_eq!(bytes(&cut), bytes(&stage));
    let other = format!("{line} --out @other").replace("--seed 5", "--seed 6");
    run(directory, &other).unwrap();
    assert_ne!(bytes(&directory.join("other")), bytes(&stage));

    fs_err::write(cut.join("corpus/part-00002.parquet"), "harmed").unwrap();
    let (code, message) = fails(directory, "verify @cut");
    assert!(code == 4 && message.contains("corpus/part-00002.parquet"), "{message}");
}

#[test]
fn hotpotqa_brings_its_own_passages_and_they_are_each_other_s_distractors() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    let row = |i: usize| {
        let titles: Vec<String> = (0..10).map(|j| format!("T{}", (i * 3 + j) % 60)).collect();
        let sentences: Vec<Value> =
            titles.iter().map(|title| json!([format!("{title} is old."), " It is known."])).collect();
        json!({
            "id": format!("h{i}"), "question": format!("Who knows {i}?"), "answer": "yes",
            "context": {"title": titles, "sentences": sentences},
            "supporting_facts": {"title": [titles[2], titles[7], titles[2]], "sent_id": [0, 0, 1]},
        })
    };
    write_lines(&directory.join("hotpot.jsonl"), &(0..20).map(row).collect::<Vec<_>>());
    let line = "compose --document --questions @hotpot.jsonl --objectives 1 --tokenizer @model --document-tokens 700 --out @out";
    run(directory, line).unwrap();
    let stage = directory.join("out");
    for (i, task) in tasks(&stage).iter().enumerate() {
        let document = read_document(&stage, task).unwrap().unwrap();
        for j in 0..10 {
            let title = format!("T{}", (i * 3 + j) % 60);
            assert_eq!(document.matches(&format!(":\n{title}\n{title} is old. It is known.")).count(), 1, "{title}");
        }
        assert_eq!(metadata(task)["gold_passages"].as_array().unwrap().len(), 2);
        assert!(metadata(task)["passages"].as_u64().unwrap() > 12);
    }
}

#[test]
fn what_cannot_be_composed_says_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory);
    write_lines(&directory.join("bare.jsonl"), &[json!({"question": "Where?", "answer": "there"})]);
    let row = json!({"question": "Where?", "answer": "there", "doc_ids": ["c1", "x9"]});
    write_lines(&directory.join("named.jsonl"), &[row]);
    let city = json!({"id": "c1", "title": "Another", "text": "One more."});
    write_lines(&directory.join("twice.jsonl"), &[city]);
    fs_err::create_dir(directory.join("empty")).unwrap();
    let base = "compose --document --objectives 1 --document-tokens 1500 --out @out";
    let with_cities = format!("{base} --tokenizer @model --documents @cities.jsonl");
    for (line, code, told) in [
        (format!("{with_cities} --questions @bare.jsonl"), 4, "bare.jsonl:1: does not say which documents"),
        (format!("{with_cities} --questions @named.jsonl"), 4, "named.jsonl:1: document `x9`"),
        (format!("{with_cities} @twice.jsonl --questions @questions.jsonl"), 4, "id `c1`"),
        (format!("{base} --tokenizer @model --questions @questions.jsonl"), 4, "none of --documents"),
        (format!("{base} --tokenizer @empty --questions @questions.jsonl"), 4, "no tokenizer.json"),
        (
            format!("{with_cities} --questions @questions.jsonl").replace("1500", "60"),
            4,
            "more than --document-tokens 60",
        ),
        (format!("{with_cities} --questions @questions.jsonl").replace("1500", "90000"), 4, "--repeat-distractors"),
        (format!("{base} --questions @questions.jsonl"), 2, "--tokenizer"),
        (format!("{with_cities} --questions @questions.jsonl --verl"), 2, "--verl"),
    ] {
        let (found, message) = fails(directory, &line);
        assert!(message.contains(told), "{line}: {message}");
        assert!(found == code || code == 2, "{line}: {found}");
        assert!(!directory.join("out").exists(), "nothing was written: {line}");
    }
    let names: Vec<String> =
        fs_err::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
}
