//! The whole chain on a tiny model: from facts to a policy updated by reinforcement learning, by the programs alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use mempo_tests::chain::{READING, STAGES, stages, write_inputs};
use mempo_tests::run;
use serde_json::Value;

fn manifest(directory: &Path, stage: &str) -> Value {
    let text = fs_err::read_to_string(directory.join(stage).join("manifest.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn metrics(directory: &Path, stage: &str) -> Vec<Value> {
    let text = fs_err::read_to_string(directory.join(stage).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_stage_runs_and_hands_on_what_the_next_one_needs() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory, 12);
    let stages = stages(STAGES);
    for stage in &stages {
        run(directory, &stage.line, 0);
    }

    let losses: Vec<f64> = metrics(directory, "sft").iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert!(losses.last().unwrap() < &(losses[0] / 2.0), "SFT did not learn: {losses:?}");

    // Same weights, same ids: what was sampled, what is scored and what is trained agree.
    let update = metrics(directory, "policy");
    assert!((update[0]["ratio_mean"].as_f64().unwrap() - 1.0).abs() < 1e-4, "{}", update[0]);
    assert!(update[0]["kl"].as_f64().unwrap().abs() < 1e-6, "{}", update[0]);

    run(directory, "mempo-score evaluate --rollouts rollouts --json", 0);
    for stage in &stages {
        run(directory, &format!("mempo-score verify {}", stage.out), 0);
    }

    let before = manifest(directory, "rollouts");
    run(directory, &stages[5].line, 0);
    assert_eq!(before, manifest(directory, "rollouts"), "a finished stage is left as it is");
    run(directory, &format!("{} --seed 7", stages[5].line), 2);
}

#[test]
fn documents_are_read_by_the_same_programs() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory, 40);
    // A folder that happens to have a built-in profile's name is none.
    fs_err::create_dir(directory.join("memagent")).unwrap();
    for stage in &stages(READING) {
        run(directory, &stage.line, 0);
        run(directory, &format!("mempo-score verify {}", stage.out), 0);
    }
    // Each task at two lengths, four trajectories each: two chunks or four, and the step that answers.
    let rows = &manifest(directory, "rollouts")["rows"];
    assert_eq!((&rows["trajectories"], &rows["steps"]), (&48.into(), &(24 * 3 + 24 * 5).into()));
    assert_eq!(manifest(directory, "scores")["rows"]["scores"], 24 * 2 + 24 * 4, "a score a memory");
    assert_eq!(manifest(directory, "advantages")["rows"]["advantages"], rows["steps"]);
    let update = metrics(directory, "policy");
    assert_eq!(update.len(), 2);
    assert!((update[0]["ratio_mean"].as_f64().unwrap() - 1.0).abs() < 1e-4, "{}", update[0]);
    assert!(update[0]["gradient_norm"].as_f64().unwrap() > 0.0, "memories are paid for: {}", update[0]);
    let by_length =
        "mempo-score evaluate --rollouts rollouts --tasks tasks --by document-tokens --best-of 4 --table sub_em.v1";
    let table = String::from_utf8(run(directory, by_length, 0).stdout).unwrap();
    assert!(table.contains("120") && table.contains("240"), "{table}");
    check_other_readers(directory);
    let refused =
        run(directory, "mempo-score segments --rollouts rollouts --tasks tasks --model base --out refused", 2);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--bias prefix"), "the paper's bias has no window");
    for (line, told) in [
        ("mempo-rollout sample --tasks tasks --model base --context memagent --search index --out refused", "--search"),
        ("mempo-rollout sample --tasks tasks --model base --context memagent --from rollouts --out refused", "--from"),
        (
            "mempo-rollout sample --tasks tasks --model base --context memagent --max-completion-tokens 9 --out refused",
            "5000",
        ),
    ] {
        assert!(String::from_utf8_lossy(&run(directory, line, 2).stderr).contains(told), "{line}");
    }
}

/// The same documents without their middle, at once and as their ends; what was read otherwise is not counted together.
fn check_other_readers(directory: &Path) {
    let sample = "mempo-rollout sample --tasks tasks --model base --group-size 1 --max-completion-tokens 10 --dtype f32 --device cpu";
    run(directory, &format!("{sample} --context memagent --chunk-tokens 60 --max-chunks 2 --seed 1 --out middle"), 0);
    assert_eq!(manifest(directory, "middle")["rows"]["steps"], 12 * 3, "two chunks of each, and the step that answers");
    run(directory, &format!("{sample} --context full-document --out whole"), 0);
    run(directory, &format!("{sample} --context full-document --last-tokens 60 --seed 1 --out end"), 0);
    for name in ["whole", "end"] {
        assert_eq!(manifest(directory, name)["rows"]["steps"], 12);
    }
    let peak = |name: &str| manifest(directory, name)["summary"]["peak_tokens"].as_u64().unwrap();
    assert!(peak("end") + 150 < peak("whole"), "{} {}", peak("end"), peak("whole"));
    for (one, other, differs) in [("rollouts", "middle", "max_chunks"), ("whole", "end", "last_tokens")] {
        let line = format!("mempo-score evaluate --rollouts {one} {other} --name a a");
        let told = run(directory, &line, 4).stderr;
        assert!(String::from_utf8_lossy(&told).contains(differs), "{line}");
    }
    // A question takes room, too: the first task's fills what is left but for one token.
    let chunks = "mempo-rollout sample --tasks tasks --model base --context memagent --chunk-tokens 60 --max-completion-tokens 10";
    let told = run(directory, &format!("{chunks} --max-prompt-tokens 1 --out none"), 2).stderr;
    let told = String::from_utf8_lossy(&told).into_owned();
    let words = told.split(" tokens of question").next().and_then(|before| before.split(' ').next_back());
    let words: usize = words.and_then(|words| words.parse().ok()).unwrap_or_else(|| panic!("{told}"));
    run(directory, &format!("{chunks} --max-prompt-tokens {} --out none", words + 60 + 10 - 1), 2);
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    write_inputs(directory, 12);
    fs_err::write(
        directory.join("broken.jsonl"),
        "{\"question\": \"Who?\", \"golden_answers\": [\"x\"]}\n{\"question\": \n",
    )
    .unwrap();
    fs_err::write(directory.join("empty.jsonl"), "").unwrap();
    let cases = [
        ("mempo-rollout compose --questions broken.jsonl --objectives 1 --out bad", "broken.jsonl:2"),
        ("mempo-rollout compose --questions missing.jsonl --objectives 1 --out bad", "missing.jsonl"),
        ("mempo-rollout index --corpus empty.jsonl --out bad", "empty.jsonl"),
        ("mempo-sft build --trajectories questions.jsonl --tokenizer missing --out bad", "missing"),
        ("mempo-score logprobs --rollouts missing --model missing --out bad", "missing"),
    ];
    for (line, named) in cases {
        let output = run(directory, line, 4);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(named), "`{line}` does not name {named}:\n{text}");
        assert!(!directory.join("bad/manifest.json").exists());
    }
}
