//! Rows of every form on the tokenizers of Qwen2.5 and SmolLM2, beside what transformers makes of them
//! (`golden/make.py`); and such as cannot be used.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

#[allow(dead_code, reason = "the other test files use the rest")]
mod fixture;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fixture::{mempo_sft, model_dir, refusal, text, write};
use mempo_data::{SftExample, read_rows};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Golden {
    tokenizer_sha256: String,
    files: BTreeMap<String, Vec<Example>>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Example {
    ids: Vec<i32>,
    first_target: usize,
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn contexts() -> BTreeMap<String, String> {
    let rows: Value = serde_json::from_slice(&fs_err::read(golden("rows.json")).unwrap()).unwrap();
    let context = |(file, what): (&String, &Value)| (file.clone(), what["context"].as_str().unwrap().to_owned());
    rows.as_object().unwrap().iter().map(context).collect()
}

fn built(tokenizer: &Path, file: &str, context: &str) -> Vec<Example> {
    let dir = tempfile::tempdir().unwrap();
    let (input, profile, out) = (golden(file), golden("profile"), dir.path().join("out"));
    let words = ["build", "--trajectories", text(&input), "--tokenizer", text(tokenizer), "--out", text(&out)];
    mempo_sft(&[&words[..], &["--profile", text(&profile), "--context", context]].concat()).unwrap();
    let rows = read_rows::<SftExample>(&[out.join("sft_examples/part-00000.parquet")]).unwrap();
    let example = |row: SftExample| {
        let first_target = row.loss_mask.iter().position(|target| *target).unwrap();
        assert!(row.loss_mask[first_target..].iter().all(|target| *target));
        Example { ids: row.input_ids, first_target }
    };
    rows.map(|row| example(row.unwrap())).collect()
}

/// The golden file of a tokenizer, told by its digest.
fn golden_of(tokenizer: &Path) -> Option<Golden> {
    let bytes = fs_err::read(tokenizer.join("tokenizer.json")).unwrap();
    let digest = Sha256::digest(bytes).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let goldens = ["qwen2.5.json", "smollm2.json"]
        .map(|name| -> Golden { serde_json::from_slice(&fs_err::read(golden(name)).unwrap()).unwrap() });
    goldens.into_iter().find(|golden| golden.tokenizer_sha256 == digest)
}

#[test]
#[allow(clippy::print_stderr, reason = "a skipped check must be seen")]
fn published_tokenizers_give_the_ids_and_targets_of_transformers() {
    let Ok(dirs) = std::env::var("MEMPO_TEST_TOKENIZERS") else {
        eprintln!("SKIPPED with published tokenizers: `./just tokenizers` fetches them and runs this test again");
        return;
    };
    let contexts = contexts();
    for dir in std::env::split_paths(&dirs) {
        let Some(golden) = golden_of(&dir) else {
            eprintln!("SKIPPED {}: golden/make.py does not know this tokenizer", dir.display());
            continue;
        };
        assert_eq!(golden.files.len(), contexts.len());
        for (file, expected) in &golden.files {
            assert_eq!(&built(&dir, file, &contexts[file]), expected, "{} {file}", dir.display());
        }
    }
}

/// As many examples as transformers makes of them, with the texts it learns; also without a published tokenizer at hand.
#[test]
fn every_form_gives_the_examples_it_says() {
    let known: Golden = serde_json::from_slice(&fs_err::read(golden("qwen2.5.json")).unwrap()).unwrap();
    for (file, context) in contexts() {
        assert_eq!(built(model_dir(), &file, &context).len(), known.files[&file].len(), "{file}");
    }
    for (lines, table, context) in [("chat.jsonl", "chat.parquet", "mempo"), ("verl.jsonl", "verl.parquet", "react")] {
        assert_eq!(built(model_dir(), lines, context), built(model_dir(), table, context), "{table}");
    }
}

#[test]
fn rows_that_cannot_be_used_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let lines = fs_err::read_to_string(golden("refused.jsonl")).unwrap();
    assert!(lines.lines().count() >= 16);
    for line in lines.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let input = write(&dir.path().join("row.jsonl"), &case["row"].to_string());
        let out = dir.path().join("out");
        let words = ["build", "--trajectories", text(&input), "--tokenizer", text(model_dir()), "--out", text(&out)];
        let (message, code) = refusal(&[&words[..], &["--context", "react", "--restart"]].concat());
        let told = case["told"].as_str().unwrap();
        assert!(message.contains("row.jsonl:1: ") && message.contains(told), "{line}\n  found {message}");
        assert_eq!(code, 4, "{line}");
    }
}
