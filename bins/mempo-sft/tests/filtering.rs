//! What `mempo-sft build` leaves out, and how it splits.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

mod fixture;

use std::path::{Path, PathBuf};

use fixture::{manifest, mempo_sft, model_dir, refusal, same_bytes, text, write};
use mempo_data::{SftExample, read_rows};
use serde_json::{Value, json};

const CALL: &str = "<tool_call>\n{\"name\": \"search\", \"arguments\": {\"query\": \"x\"}}\n</tool_call>";

/// A trajectory of two steps.
fn row(question: &str, found: &str, memory: &str, answer: &str) -> Value {
    json!({"golden_answers": ["Szohôd"], "messages": [
        {"role": "user", "content": question},
        {"role": "assistant", "content": format!("<think>look</think>\n{CALL}")},
        {"role": "tool", "content": found},
        {"role": "assistant", "content": format!("<mem>{memory}</mem><answer>{answer}</answer>")},
    ]})
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| row.to_string() + "\n").collect()
}

fn words<'a>(out: &'a Path, input: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["build", "--tokenizer", text(model_dir()), "--out", text(out), "--trajectories", text(input)];
    words.extend(more);
    words
}

fn build(out: &Path, input: &Path, more: &[&str]) -> Vec<SftExample> {
    mempo_sft(&words(out, input, more)).unwrap();
    examples(out)
}

fn examples(dir: &Path) -> Vec<SftExample> {
    let mut files: Vec<PathBuf> =
        fs_err::read_dir(dir.join("sft_examples")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    read_rows::<SftExample>(&files).unwrap().map(Result::unwrap).collect()
}

/// The rows whose examples are there.
fn kept(examples: &[SftExample]) -> Vec<usize> {
    let mut rows: Vec<usize> = examples.iter().map(|example| example.example_id[..9].parse().unwrap()).collect();
    rows.dedup();
    rows
}

fn dropped(dir: &Path) -> Value {
    manifest(dir)["summary"]["dropped"].clone()
}

#[test]
fn each_filter_leaves_out_and_counts_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [
        row("Capital?", "It is Szohôd.", "the capital: Szohôd", "Szohôd"),
        row("Capital?", "It is Klow.", "the capital: Klow", "Klow"),
        row("Capital?", "Nothing.", "the capital: Szohôd", "Szohôd"),
        row("Capital?", "It is Szohôd.", "Szohôd</mem><mem>Szohôd", "Szohôd"),
        row("Capital?", "It is Szohôd.", "Szohôd", "Szohôd</answer><answer>Szohôd"),
    ];
    let input = write(&dir.path().join("rows.jsonl"), &lines(&rows));
    let check = |name: &str, more: &[&str], expected: &[usize], counts: Value| {
        let out = dir.path().join(name);
        assert_eq!(kept(&build(&out, &input, more)), expected, "{name}");
        assert_eq!(dropped(&out), counts, "{name}");
    };
    let memory = "memory missing in a step (trajectories)";
    let (format, answer) = ("format not valid (trajectories)", "answer not correct (trajectories)");
    let leak = "gold answer in a memory too soon (trajectories)";
    check("all", &[], &[0, 1, 2, 4], json!({memory: 1}));
    check("well-formed", &["--keep", "well-formed"], &[0, 1, 2], json!({memory: 1, format: 1}));
    check("correct", &["--keep", "correct"], &[0, 2], json!({memory: 1, format: 1, answer: 1}));
    check("leaks", &["--drop-leaks"], &[0, 1, 4], json!({memory: 1, leak: 1}));
    let both = ["--keep", "correct", "--drop-leaks"];
    check("both", &both, &[0], json!({memory: 1, format: 1, answer: 1, leak: 1}));
    let sql = ["--where", "correct or (not format_valid and leaks is not true)"];
    check("where", &sql, &[0, 2, 4], json!({memory: 1, "--where is not true (rows)": 1}));
    let sql = [
        "--where",
        "answer = 'Klow' and steps = 2 and tool_calls = 1 and f1 = 0 and form = 'chat' and peak_tokens < tokens",
    ];
    check("columns", &sql, &[1], json!({memory: 1, "--where is not true (rows)": 3}));
}

#[test]
fn words_that_mean_nothing_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let input = write(&dir.path().join("rows.jsonl"), &lines(&[row("Capital?", "x", "y", "z")]));
    let out = dir.path().join("out");
    for (more, told) in [
        (
            ["--where", "reward > 0"],
            "--where: Schema error: No field named reward; expected a condition on trajectory_id (text)",
        ),
        (["--where", "steps"], "--where: it is whole number, no condition"),
        (["--near-similarity", "0.2"], "expected a share from 0.75 to 1"),
        (["--validation-share", "1"], "expected a share from 0 to below 1"),
    ] {
        let (message, code) = refusal(&words(&out, &input, &more));
        assert!(message.contains(told), "{message}");
        assert_eq!(code, 2);
        assert!(!out.exists());
    }
    let mut nothing = row("Capital?", "x", "y", "z");
    nothing.as_object_mut().unwrap().remove("golden_answers");
    let input = write(&dir.path().join("no-gold.jsonl"), &lines(&[nothing]));
    let (message, code) = refusal(&words(&out, &input, &["--drop-leaks"]));
    assert!(message.contains("no-gold.jsonl:1: no gold answers: --drop-leaks needs `golden_answers`"), "{message}");
    assert_eq!(code, 4);
}

/// Long texts of made-up words; each `variant` of a story has some words of its own.
fn story(seed: usize, variant: usize) -> String {
    let word =
        |at: usize| if at % 80 == 79 { seed * 977 + at * 31 + variant } else { (seed * 7919 + at * at * 13) % 9001 };
    (0..160).map(|at| format!("river{}", word(at))).collect::<Vec<_>>().join(" ")
}

#[test]
fn duplicates_are_those_of_rows_that_were_kept_whatever_the_shards() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = Vec::new();
    for story_number in 0..150 {
        for variant in 0..3 {
            // The first variant's answer is wrong, so that it is no row to be like.
            let answer = if variant == 0 { "Klow" } else { "Szohôd" };
            rows.push(row(&format!("Capital {story_number}?"), "It is Szohôd.", &story(story_number, variant), answer));
        }
        rows.push(rows[rows.len() - 1].clone());
    }
    let input = write(&dir.path().join("rows.jsonl"), &lines(&rows));
    let out = dir.path().join("exact");
    assert_eq!(kept(&build(&out, &input, &["--drop-duplicates", "exact"])).len(), 450);
    assert_eq!(dropped(&out), json!({"exact duplicate (rows)": 150}));

    let more = ["--drop-duplicates", "near", "--keep", "correct", "--near-similarity", "0.75"];
    let whole = dir.path().join("near");
    let found = build(&whole, &input, &more);
    assert_eq!(kept(&found), (0..150).map(|story| 4 * story + 1).collect::<Vec<_>>());
    let counts =
        json!({"answer not correct (trajectories)": 150, "exact duplicate (rows)": 150, "near duplicate (rows)": 150});
    assert_eq!(dropped(&whole), counts);
    let first = fs_err::read_to_string(whole.join("duplicates.jsonl")).unwrap();
    let first: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    assert_eq!((&first["row"], &first["of"]), (&json!(2), &json!(1)));
    assert!(first["similarity"].as_f64().unwrap() >= 0.7);

    let sharded = dir.path().join("sharded");
    for shard in ["0/2", "1/2"] {
        mempo_sft(&words(&sharded, &input, &[&more[..], &["--shard", shard]].concat())).unwrap();
    }
    let parts = ["shard-0-of-2", "shard-1-of-2"].map(|shard| examples(&sharded.join(shard)));
    assert_eq!(parts.concat(), found);
    // A later start of a run that was stopped after the comparison.
    let resumed = dir.path().join("resumed");
    mempo_sft(&words(&resumed, &input, &more)).unwrap();
    for name in ["manifest.json", "sft_examples/part-00001.parquet", "counts/part-00001.json"] {
        fs_err::remove_file(resumed.join(name)).unwrap();
    }
    mempo_sft(&words(&resumed, &input, &more)).unwrap();
    assert_eq!(same_bytes(&whole), same_bytes(&resumed));
}

#[test]
fn tasks_stay_together_when_some_are_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows: Vec<Value> = Vec::new();
    for number in 0..400 {
        let mut row = row(&format!("Capital {}?", number % 200), "x", &format!("note {number}"), "y");
        if number % 4 == 0 {
            row["task_id"] = json!(format!("task-{}", number % 100));
        }
        if number >= 398 {
            row["split"] = json!("test");
        }
        rows.push(row);
    }
    let input = write(&dir.path().join("rows.jsonl"), &lines(&rows));
    let split = |name: &str, seed: &str| {
        let found = build(&dir.path().join(name), &input, &["--validation-share", "0.25", "--seed", seed]);
        let of_row = |row: usize| {
            let prefix = format!("{row:09}");
            let mut splits: Vec<&str> = found
                .iter()
                .filter(|example| example.example_id.starts_with(&prefix))
                .map(|example| example.split.as_deref().unwrap())
                .collect();
            splits.dedup();
            assert_eq!(splits.len(), 1, "row {row}");
            splits[0].to_owned()
        };
        (0..400).map(of_row).collect::<Vec<_>>()
    };
    let found = split("a", "1");
    for number in 0..198 {
        assert_eq!(found[number], found[number + 200], "the same question or task");
    }
    for number in (0..200).step_by(4) {
        assert_eq!(found[number], found[(number + 100) % 200], "the same task");
    }
    assert_eq!(found[398..], ["test", "test"], "a split that the row names");
    let aside = found.iter().filter(|split| *split == "dev").count();
    assert!((60..=140).contains(&aside), "{aside} of 400");
    assert_eq!(manifest(&dir.path().join("a"))["summary"]["splits"]["dev"], 2 * aside);
    assert_eq!(found, split("b", "1"));
    assert_ne!(found, split("c", "2"));
}

/// In files of their own, in either order, and by way of `--tasks` too.
#[test]
fn a_question_is_of_one_split_with_and_without_its_task_s_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut named: Vec<Value> = (0..100).map(|n| row(&format!("Capital {n}?"), "x", "named", "y")).collect();
    named.iter_mut().enumerate().for_each(|(n, row)| row["task_id"] = json!(format!("task-{n}")));
    let unnamed: Vec<Value> = (0..100).map(|n| row(&format!(" Capital  {n}"), "x", "plain", "y")).collect();
    for (name, rows) in [("a", [&named[..], &unnamed[..]].concat()), ("b", [&unnamed[..], &named[..]].concat())] {
        let input = write(&dir.path().join(format!("{name}.jsonl")), &lines(&rows));
        let found = build(&dir.path().join(name), &input, &["--validation-share", "0.3"]);
        let split = |row: usize| {
            let prefix = format!("{row:09}");
            found.iter().find(|example| example.example_id.starts_with(&prefix)).unwrap().split.clone().unwrap()
        };
        assert!((0..100).all(|n| split(n) == split(n + 100)), "{name}");
        assert!((15..=45).contains(&(0..100).filter(|n| split(*n) == "dev").count()), "{name}");
    }
}

#[test]
fn mem1_s_rows_and_forced_formats_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let mem1 = json!({
        "q": "Capital?", "t0": "<think>look</think>", "r0": "<think>look</think>\n<search>x</search>",
        "i0": "\n\n<information>It is Szohôd.</information>\n\n", "t1": "<think>Szohôd</think>",
        "r1": "<think>Szohôd</think><answer>Szohôd</answer>", "Golden_answer": ["Szohôd"], "Exact_match": 1, "text": "other",
    });
    let input = write(&dir.path().join("mem1.jsonl"), &lines(&[mem1]));
    let (message, code) = refusal(&words(&dir.path().join("a"), &input, &[]));
    assert!(message.contains("none of the 2 steps has a <mem> segment"), "{message}");
    assert_eq!(code, 4);
    let out = dir.path().join("b");
    let found = build(&out, &input, &["--context", "react", "--where", "exact_match = 1"]);
    let shown = mempo_text::Tokenizer::load(model_dir()).unwrap().decode(&found[1].input_ids);
    assert_eq!(shown.matches("<think>look</think>").count(), 1, "{shown}");
    assert!(shown.contains("<information>") && shown.matches("It is Szohôd.").count() == 1, "{shown}");
    let found = build(&dir.path().join("c"), &input, &["--input-format", "text"]);
    assert_eq!((found.len(), found[0].target_count), (1, found[0].input_ids.len() as i32 - 1));
    let (message, code) = refusal(&words(&dir.path().join("d"), &input, &["--input-format", "chat"]));
    assert!(message.contains("mem1.jsonl:1: no column `messages` or `conversations`, found [q, t0"), "{message}");
    assert_eq!(code, 4);
}

#[test]
fn examples_put_aside_are_measured_and_not_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<Value> = (0..60)
        .map(|row| json!({"prompt": format!("river {row}"), "completion": "search", "split": if row < 20 { "dev" } else { "train" }}))
        .collect();
    let input = write(&dir.path().join("rows.jsonl"), &lines(&rows));
    let built = dir.path().join("examples");
    let found = build(&built, &input, &[]);
    let tokens = |split: &str| {
        let of_split = found.iter().filter(|example| example.split.as_deref() == Some(split));
        of_split.map(|example| example.input_ids.len()).sum::<usize>()
    };
    let train = |out: &Path, more: &[&str]| {
        let mut words = vec!["train", "--examples", text(&built), "--model", text(model_dir()), "--out", text(out)];
        words.extend([
            "--device",
            "cpu",
            "--dtype",
            "f32",
            "--threads",
            "1",
            "--max-steps",
            "1",
            "--tokens-per-batch",
            "1000000",
        ]);
        words.extend(more);
        mempo_sft(&words).unwrap();
        manifest(out)["summary"].clone()
    };
    let summary = train(&dir.path().join("a"), &[]);
    assert_eq!(summary["tokens"], tokens("train"));
    assert!(summary["best_validation_loss"].is_f64());
    let summary = train(&dir.path().join("b"), &["--validation-split", "none"]);
    assert_eq!(summary["tokens"], tokens("train") + tokens("dev"));
    assert!(summary["best_validation_loss"].is_null());
}
