//! `mempo-sft train` as a user runs it.

#![allow(clippy::unwrap_used, reason = "a failing helper should fail the test")]

mod fixture;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fixture::{manifest, mempo_sft, model_dir, refusal, same_bytes, text, write};
use serde_json::{Value, json};

/// Pairs of a prompt and its only completion, in several lengths.
fn toy_examples(dir: &Path, rows: usize) -> std::path::PathBuf {
    let words = ["the", "capital", "river", "search", "Borduria"];
    let lines: String = (0..rows)
        .map(|row| {
            let prompt = format!("{} {}", words[row % 5], words[(row / 5) % 5]);
            let completion = words[(row + row / 5) % 5].repeat(1 + row % 4);
            json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
        })
        .collect();
    let input = write(&dir.join("toy.jsonl"), &lines);
    let out = dir.join("examples");
    mempo_sft(&["build", "--trajectories", text(&input), "--tokenizer", text(model_dir()), "--out", text(&out)])
        .unwrap();
    out
}

fn words<'a>(examples: &'a Path, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["train", "--examples", text(examples), "--model", text(model_dir()), "--out", text(out)];
    words.extend(["--device", "cpu", "--dtype", "f32", "--threads", "1", "--tokens-per-micro-batch", "256"]);
    words.extend(more);
    words
}

fn metrics(out: &Path) -> Vec<Value> {
    let text = fs_err::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn loss_falls_on_a_toy_set_and_the_checkpoint_can_be_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let (examples, out) = (toy_examples(dir.path(), 100), dir.path().join("checkpoint"));
    let more = ["--epochs", "12", "--learning-rate", "1e-2", "--tokens-per-batch", "1024", "--validate-every", "10"];
    mempo_sft(&words(&examples, &out, &[&more[..], &["--validation", text(&examples)]].concat())).unwrap();
    let lines = metrics(&out);
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    let (first, last) = (loss(&lines[0]), loss(lines.last().unwrap()));
    assert!(last < 0.5 * first, "first {first}, last {last}");
    assert!(lines.iter().enumerate().all(|(index, line)| line["step"] == index as u64 + 1));
    assert!(lines[9]["validation_loss"].is_f64() && lines[8].get("validation_loss").is_none());
    assert!(lines.last().unwrap()["validation_loss"].as_f64().unwrap() < 0.5 * first);
    let summary = &manifest(&out)["summary"];
    assert_eq!(summary["optimizer_steps"], lines.len());
    let best = summary["best_validation_step"].as_u64().unwrap() as usize;
    let validation = |line: &Value| line["validation_loss"].as_f64();
    let lowest = lines.iter().filter_map(validation).fold(f64::INFINITY, f64::min);
    assert_eq!(validation(&lines[best - 1]), Some(lowest));
    assert_eq!(summary["best_validation_loss"], lowest);
    assert!(!out.join("resume").exists());
    for name in ["config.json", "tokenizer.json", "generation_config.json"] {
        assert_eq!(fs_err::read(out.join(name)).unwrap(), fs_err::read(model_dir().join(name)).unwrap(), "{name}");
    }
    // The checkpoint is a model: trained further it starts near where the last step ended.
    let further = dir.path().join("further");
    let more = ["--max-steps", "1", "--learning-rate", "1e-5", "--tokens-per-batch", "100000"];
    let mut words = words(&examples, &further, &more);
    words[4] = text(&out);
    mempo_sft(&words).unwrap();
    let again = loss(&metrics(&further)[0]);
    let measured = lines.last().unwrap()["validation_loss"].as_f64().unwrap();
    assert!((again - measured).abs() < 1e-4, "the whole set again: {again}, measured before: {measured}");
}

#[test]
fn an_update_that_was_left_out_must_be_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (examples, out) = (toy_examples(dir.path(), 20), dir.path().join("checkpoint"));
    // The first update leaves weights whose squares are not finite.
    let more = ["--learning-rate", "1e14", "--warmup-ratio", "0", "--max-steps", "2", "--tokens-per-batch", "64"];
    let (message, code) = refusal(&words(&examples, &out, &more));
    assert!(
        code == 3 && message.contains("1 of 2 optimizer steps") && message.contains("--allow-skipped"),
        "{message}"
    );
    assert!(!out.join("manifest.json").exists() && !out.join("model.safetensors").exists());
    mempo_sft(&words(&examples, &out, &[&more[..], &["--allow-skipped"]].concat())).unwrap();
    assert_eq!((metrics(&out).len(), &manifest(&out)["summary"]["skipped_steps"]), (2, &json!(1)));
}

#[test]
fn several_directories_are_one_shuffle() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (toy_examples(&dir.path().join("1"), 30), toy_examples(&dir.path().join("2"), 20));
    let out = dir.path().join("checkpoint");
    mempo_sft(&words(&first, &out, &["--examples", text(&second), "--tokens-per-batch", "512"])).unwrap();
    let of = |dir: &Path| manifest(dir)["summary"]["tokens"].as_u64().unwrap();
    assert_eq!(manifest(&out)["summary"]["tokens"].as_u64().unwrap(), of(&first) + of(&second));
}

fn spawn(words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_mempo-sft"))
        .args(words)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until the run has written `lines` metrics lines and a state to continue from.
fn wait_for(out: &Path, lines: usize, child: &mut Child) {
    let start = Instant::now();
    while metrics(out).len() < lines || !out.join("resume").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be stopped");
        assert!(start.elapsed() < Duration::from_mins(1), "no progress");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_run_that_was_killed_and_stopped_ends_with_the_bytes_of_an_undisturbed_one() {
    let dir = tempfile::tempdir().unwrap();
    let examples = toy_examples(dir.path(), 100);
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    let more = ["--epochs", "30", "--learning-rate", "1e-3", "--tokens-per-batch", "512", "--save-every", "7"];
    let validation = ["--validation", text(&examples), "--validate-every", "20", "--keep-best"];
    let more = [&more[..], &validation].concat();
    mempo_sft(&words(&examples, &whole, &more)).unwrap();
    let total = metrics(&whole).len();
    assert!(total > 80, "long enough to be stopped: {total} steps");

    let mut child = spawn(&words(&examples, &stopped, &more));
    wait_for(&stopped, 10, &mut child);
    signal(&child, "-KILL");
    child.wait().unwrap();
    let mut child = spawn(&words(&examples, &stopped, &more));
    wait_for(&stopped, 30, &mut child);
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(75));
    let done = metrics(&stopped).len();
    assert!(done < total, "stopped midway: {done} of {total}");
    mempo_sft(&words(&examples, &stopped, &more)).unwrap();
    let (expected, found) = (same_bytes(&whole), same_bytes(&stopped));
    assert!(expected.contains_key("best/model.safetensors"));
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, bytes) in &expected {
        assert!(bytes == &found[name], "{name} differs");
    }
    // Once more: it is finished, nothing is done.
    mempo_sft(&words(&examples, &stopped, &more)).unwrap();
    assert_eq!(same_bytes(&stopped), found);
}

#[test]
fn the_best_checkpoint_is_that_of_the_lowest_validation_loss() {
    let dir = tempfile::tempdir().unwrap();
    let (examples, out) = (toy_examples(dir.path(), 40), dir.path().join("out"));
    // Steps so large that the loss goes up and down; with a constant rate a shorter run is the beginning of a longer one.
    let more = ["--epochs", "9", "--learning-rate", "0.2", "--schedule", "constant", "--warmup-ratio", "0"];
    let more = [&more[..], &["--tokens-per-batch", "256", "--validation", text(&examples)]].concat();
    let all = [&more[..], &["--validate-every", "1", "--keep-best"]].concat();
    mempo_sft(&words(&examples, &out, &all)).unwrap();
    let summary = &manifest(&out)["summary"];
    let (best, steps) =
        (summary["best_validation_step"].as_u64().unwrap(), summary["optimizer_steps"].as_u64().unwrap());
    assert!(best < steps, "the last is the best, of {steps}");
    let (short, step) = (dir.path().join("short"), best.to_string());
    mempo_sft(&words(&examples, &short, &[&more[..], &["--max-steps", &step]].concat())).unwrap();
    let weights = |dir: &Path| fs_err::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&out.join("best")) == weights(&short) && weights(&short) != weights(&out));
    let other = dir.path().join("other");
    let (message, code) = refusal(&words(&examples, &other, &["--keep-best"]));
    assert!(code == 2 && message.contains("no example to measure the loss on"), "{message}");
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let examples = toy_examples(dir.path(), 10);
    let out = dir.path().join("out");
    let (message, code) = refusal(&words(&examples, &out, &["--beta2", "1"]));
    assert!(message.contains("--beta2 is 1"), "{message}");
    assert_eq!(code, 2);
    let (message, code) = refusal(&words(&dir.path().join("nothing"), &out, &[]));
    assert!(message.contains("nothing"), "{message}");
    assert_eq!(code, 4);
    mempo_sft(&words(&examples, &out, &[])).unwrap();
    let (message, code) = refusal(&words(&examples, &out, &["--epochs", "2"]));
    assert!(message.contains("epochs"), "{message}");
    assert_eq!(code, 2);
    // A model with fewer positions than the examples are long.
    let small = dir.path().join("small");
    fs_err::create_dir_all(&small).unwrap();
    for entry in fs_err::read_dir(model_dir()).unwrap() {
        let path = entry.unwrap().path();
        let of_stage = path.ends_with("manifest.json") || path.ends_with("run.json");
        if path.is_file() && !of_stage {
            fs_err::copy(&path, small.join(path.file_name().unwrap())).unwrap();
        }
    }
    let mut config: Value = serde_json::from_slice(&fs_err::read(small.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = json!(4);
    fs_err::write(small.join("config.json"), config.to_string()).unwrap();
    let other = dir.path().join("other");
    let mut words = words(&examples, &other, &[]);
    words[4] = text(&small);
    let (message, code) = refusal(&words);
    assert!(message.contains("expected at most 4, the model's positions"), "{message}");
    assert_eq!(code, 4);
}
